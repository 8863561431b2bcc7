//! A VM with a TPM, which `swtpm` (Debian's package of that name) emulates.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command as Process};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use guest::{Command, Line, Options, Workload};
use openapi::ClientError;
use spec::{ConsoleMode, SerialConfig, StartMigration, TpmConfig, VmSnapshotConfig};
use tests::{Face, Service};

const SOON: Duration = Duration::from_secs(30);

/// Ends the process with the test.
struct Swtpm(Child);

impl Swtpm {
    fn start(state: &Path, socket: &Path) -> Result<Self> {
        let process = Process::new("swtpm")
            .args(["socket", "--tpm2", "--tpmstate"])
            .arg(format!("dir={}", state.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", socket.display()))
            .spawn()
            .context("start swtpm, of the package swtpm")?;
        let start = Instant::now();
        while !socket.exists() {
            ensure!(start.elapsed() < SOON, "swtpm does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Self(process))
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks the guest until it has had so many random bytes of its TPM.
fn random_bytes(serial: &Path, wanted: u64) -> Result<()> {
    let mut stream = UnixStream::connect(serial)?;
    stream.set_read_timeout(Some(SOON))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let start = Instant::now();
    loop {
        ensure!(start.elapsed() < SOON, "the TPM gives no random numbers");
        writeln!(stream, "{}", Command::Io)?;
        let mut text = String::new();
        loop {
            text.clear();
            ensure!(
                reader.read_line(&mut text)? > 0,
                "the serial port is closed"
            );
            if let Some(Line::Io { tpm, bad, .. }) = Line::parse(&text) {
                ensure!(bad == 0, "{text}");
                if tpm >= wanted {
                    return Ok(());
                }
                break;
            }
        }
    }
}

fn code<T: std::fmt::Debug>(refused: Result<T, ClientError>) -> String {
    match refused {
        Err(ClientError::Problem(problem)) => problem.code,
        other => format!("{other:?}"),
    }
}

/// The guest's commands reach the TPM in the sandbox, also after a reset, and the VM stays where it is.
#[tokio::test]
async fn tpm_serves_a_vm_over_its_resets() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let options = Options {
        workload: Workload::Io,
        ..Options::default()
    };
    let (mut config, _) = service.pocket("vm", options)?;
    let (socket, serial) = (service.path("swtpm"), service.path("serial"));
    config.tpm = Some(TpmConfig {
        socket: socket.to_string_lossy().into_owned(),
    });
    config.serial = SerialConfig {
        socket: Some(serial.to_string_lossy().into_owned()),
        ..SerialConfig::with_mode(ConsoleMode::Socket)
    };
    let vm = service.create("vm", config).await?;
    let client = service.client();
    assert_eq!(code(client.vms_boot(&vm).await), "tpm-unusable");

    let state = service.path("state");
    std::fs::create_dir(&state)?;
    let swtpm = Swtpm::start(&state, &socket)?;
    client.vms_boot(&vm).await?;
    random_bytes(&serial, 64)?;
    client.vms_reboot(&vm).await?;
    random_bytes(&serial, 64)?;
    let away = StartMigration::to("unix:/nowhere");
    assert_eq!(
        code(client.vms_migrate(&vm, &away).await),
        "tpm-not-movable"
    );
    client.vms_pause(&vm).await?;
    let folder = VmSnapshotConfig {
        destination_url: format!("file://{}", service.path("snapshot").display()),
        base_url: None,
        disks: spec::SnapshotDisks::None,
    };
    assert_eq!(
        code(client.vms_snapshot(&vm, &folder).await),
        "tpm-not-movable"
    );
    client.vms_resume(&vm).await?;
    random_bytes(&serial, 128)?;

    // swtpm serves the next machine, too.
    client.vms_shutdown(&vm).await?;
    client.vms_boot(&vm).await?;
    random_bytes(&serial, 64)?;
    drop(swtpm);
    client.vms_shutdown(&vm).await?;
    assert_eq!(code(client.vms_boot(&vm).await), "tpm-unusable");
    Ok(())
}
