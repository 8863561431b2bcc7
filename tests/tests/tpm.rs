//! A VM with a TPM, which `swtpm` (Debian's package of that name) emulates.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use guest::{Command, Line, Options, Workload};
use openapi::ClientError;
use spec::{
    ConsoleMode, ForkVm, MigrationPhase, Overrides, RestoreConfig, SerialConfig, StartMigration,
    TpmConfig, VmConfig,
};
use tests::{Face, Service, await_anyone, snapshots};

const SOON: Duration = Duration::from_secs(30);

/// Ends the process with the test.
struct Swtpm(Child);

impl Swtpm {
    fn start(state: &Path, socket: &Path) -> Result<Self> {
        std::fs::create_dir(state)?;
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

/// A configuration with a TPM at `socket`, and the socket of the serial port.
fn config(service: &Service, socket: &Path) -> Result<(VmConfig, PathBuf)> {
    let options = Options {
        workload: Workload::Io,
        ..Options::default()
    };
    let (mut config, _) = service.pocket("vm", options)?;
    let serial = service.path("serial");
    config.tpm = Some(TpmConfig {
        socket: socket.to_string_lossy().into_owned(),
    });
    config.serial = SerialConfig {
        socket: Some(serial.to_string_lossy().into_owned()),
        ..SerialConfig::with_mode(ConsoleMode::Socket)
    };
    Ok((config, serial))
}

/// The guest's commands reach the TPM in the sandbox, also after a reset.
#[tokio::test]
async fn tpm_serves_a_vm_over_its_resets() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let socket = service.path("swtpm");
    let (config, serial) = config(&service, &socket)?;
    let vm = service.create("vm", config).await?;
    let client = service.client();
    assert_eq!(code(client.vms_boot(&vm).await), "tpm-unusable");

    let swtpm = Swtpm::start(&service.path("state"), &socket)?;
    client.vms_boot(&vm).await?;
    random_bytes(&serial, 64)?;
    client.vms_reboot(&vm).await?;
    random_bytes(&serial, 64)?;

    // swtpm serves the next machine, too.
    client.vms_shutdown(&vm).await?;
    client.vms_boot(&vm).await?;
    random_bytes(&serial, 64)?;
    drop(swtpm);
    client.vms_shutdown(&vm).await?;
    assert_eq!(code(client.vms_boot(&vm).await), "tpm-unusable");
    Ok(())
}

/// The guest has extended a PCR, and reports any other value of it as bad: it finds the PCR after a
/// restore, a fork and a move, each time in another swtpm.
#[tokio::test]
async fn tpm_state_moves_with_its_guest() -> Result<()> {
    let (here, there) = tokio::try_join!(Service::start(Face::Many), Service::start(Face::Many))?;
    let socket = here.path("swtpm");
    let (config, serial) = config(&here, &socket)?;
    let _first = Swtpm::start(&here.path("state"), &socket)?;
    let vm = here.create("vm", config).await?;
    here.client().vms_boot(&vm).await?;
    random_bytes(&serial, 64)?;
    // A running guest's TPM is saved while the guest uses it.
    let folder = here.path("snapshot");
    let saved = snapshots::snapshot(&here, &vm, &folder).await;
    assert_eq!(saved.phase, MigrationPhase::Completed, "{saved:?}");
    random_bytes(&serial, 128)?;

    // The copies of the guest have a TPM and a serial port of their own.
    let overrides = |tpm: &Path, serial: &Path| Overrides {
        tpm: Some(TpmConfig {
            socket: tpm.to_string_lossy().into_owned(),
        }),
        serial: Some(SerialConfig {
            socket: Some(serial.to_string_lossy().into_owned()),
            ..SerialConfig::with_mode(ConsoleMode::Socket)
        }),
        ..Overrides::default()
    };
    let (socket2, serial2) = (there.path("swtpm2"), there.path("serial2"));
    let restored = "restored".parse()?;
    let what = RestoreConfig {
        overrides: Some(overrides(&socket2, &serial2)),
        ..snapshots::from(&folder, true)
    };
    let begun = there.client().vms_restore(&restored, &what).await?;
    let failed = snapshots::over(&there, &begun).await;
    let error = failed.error.context("a restore without swtpm")?;
    assert_eq!(error.code, "path-unusable");
    let _second = Swtpm::start(&there.path("state2"), &socket2)?;
    let begun = there.client().vms_restore(&restored, &what).await?;
    let came = snapshots::over(&there, &begun).await;
    assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
    random_bytes(&serial2, 128)?;

    let (socket3, serial3) = (there.path("swtpm3"), there.path("serial3"));
    let _third = Swtpm::start(&there.path("state3"), &socket3)?;
    let what = ForkVm {
        resume: true,
        overrides: overrides(&socket3, &serial3),
        ..ForkVm::default()
    };
    let begun = there.client().vms_fork(&restored, &what).await?;
    let came = snapshots::over(&there, &begun).await;
    assert_eq!(came.phase, MigrationPhase::Completed, "{came:?}");
    random_bytes(&serial3, 192)?;
    random_bytes(&serial2, 256)?;

    // A move, first to a destination without an emulator: the guest stays.
    std::fs::remove_file(&socket)?;
    for (listens, ends) in [
        (None, MigrationPhase::Failed),
        (Some("state4"), MigrationPhase::Completed),
    ] {
        let _fourth = match listens {
            Some(state) => Some(Swtpm::start(&there.path(state), &socket)?),
            None => None,
        };
        let at = await_anyone(format!("unix:{}", there.path("migration").display()));
        let waits = there.client().migrations_receive(&at).await?;
        let away = StartMigration::to(waits.endpoint.clone());
        let begun = here.client().vms_migrate(&vm, &away).await?;
        let sent = snapshots::over(&here, &begun).await;
        assert_eq!(sent.phase, ends, "{sent:?}");
        random_bytes(&serial, 320)?;
        if ends == MigrationPhase::Failed {
            there.client().migrations_cancel(&waits.id.parse()?).await?;
            snapshots::over(&there, &waits).await;
        }
    }
    assert!(here.client().vms_list().await?.is_empty());
    Ok(())
}
