//! Services that end or start unexpectedly: what a killed one leaves behind is taken over by the next, and a
//! service that is started by mistake changes nothing of the one that runs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use guest::Options;
use rustix::process::Signal;
use spec::{ConsoleMode, SerialConfig, VmConfig, VmState};
use tests::{Face, Service, built};

const PATIENCE: Duration = Duration::from_secs(60);

/// Starts `whimbrel serve` with these arguments.
fn serve(arguments: &[&str]) -> Result<Command> {
    let program = match std::env::var_os("WHIMBREL") {
        Some(named) => named.into(),
        None => built("whimbrel")?,
    };
    let mut command = Command::new(program);
    command.arg("serve").args(arguments);
    Ok(command)
}

/// Runs a service to its end, which is expected to refuse to start. Returns what it says.
fn refused(mut service: Command) -> Result<String> {
    let output = service.output().context("run the service")?;
    ensure!(!output.status.success(), "the service ran: {output:?}");
    ensure!(output.stdout.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// A guest whose serial port and vsock device listen on sockets.
fn with_sockets(service: &Service) -> Result<VmConfig> {
    let (mut config, _) = service.pocket("vm", Options::default())?;
    config.serial = SerialConfig {
        mode: ConsoleMode::Socket,
        socket: Some(text(&service.path("serial.sock")).to_owned()),
        file: None,
    };
    let vsock = serde_json::json!({ "cid": 3, "socket": service.path("vsock") });
    config.vsock = Some(serde_json::from_value(vsock)?);
    Ok(config)
}

/// The next service removes the API sockets of the VMs that ended with the one before, and a VM that is
/// made anew takes its own sockets over.
#[tokio::test]
async fn sockets_of_a_killed_service_are_taken_over() -> Result<()> {
    let mut service = Service::start(Face::Many).await?;
    let config = with_sockets(&service)?;
    for name in ["vm", "other"] {
        service.create(name, config.clone()).await?;
    }
    service.client().vms_boot(&"vm".parse()?).await?;
    let vms = service.path("api/vms");
    ensure!(vms.join("vm.sock").exists() && vms.join("other.sock").exists());
    service.signal(Signal::KILL)?;
    service.ended(PATIENCE).await?;
    ensure!(vms.join("vm.sock").exists() && service.path("vsock").exists());
    // The socket of a program that lives, though it takes no lock.
    let _live = UnixListener::bind(vms.join("live.sock"))?;
    service.start_again().await?;
    let mut left = fs::read_dir(&vms)?
        .map(|file| Ok(file?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    left.sort();
    ensure!(left == ["live.sock"], "{left:?}");
    let vm = service.create("vm", config).await?;
    service.client().vms_boot(&vm).await?;
    service.reaches(&vm, VmState::Running).await?;
    std::os::unix::net::UnixStream::connect(service.path("serial.sock"))?;
    std::os::unix::net::UnixStream::connect(service.path("vsock"))?;
    Ok(())
}

#[tokio::test]
async fn second_service_on_socket_is_refused() -> Result<()> {
    let mut service = Service::start(Face::Many).await?;
    let said = refused(serve(&["--socket", text(&service.socket())])?)?;
    assert!(said.contains(&service.pid().to_string()), "{said}");
    service.client().ping().await?;
    service.signal(Signal::INT)?;
    assert!(service.ended(Duration::from_secs(20)).await?.success());
    assert!(!service.socket().exists());
    Ok(())
}

/// A service that is started by mistake, on the socket or the state directory of one that runs, ends
/// before it removes what it would take for leftovers.
#[tokio::test]
async fn service_that_cannot_start_removes_nothing() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let storage = service.path("images");
    fs::create_dir(&storage)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let title = "whimbrel: the guest of this image has not come; boot ";
    fs::write(storage.join("image.incoming"), format!("{title}{boot}"))?;
    fs::write(storage.join("image"), "image")?;
    let (socket, state) = (service.socket(), service.path("api"));
    let other = service.path("other.sock");
    let wanted = ["--migration-storage", text(&storage), "--state-dir"];
    for (socket, state, named) in [
        (&socket, service.path("elsewhere"), &socket),
        (&other, state.clone(), &state),
    ] {
        let state = [text(&state), "--socket", text(socket)];
        let said = refused(serve(&[&wanted[..], &state].concat())?)?;
        ensure!(said.contains(text(named)), "{said}");
        ensure!(storage.join("image").exists(), "the image was removed");
    }
    ensure!(!other.exists(), "the socket of the refused service is left");
    // No process runs there: what the test has made is found and removed.
    let third = Service::start_with(&[], &[wanted[0].to_owned(), wanted[1].to_owned()]).await?;
    ensure!(!storage.join("image").exists(), "{}", third.log());
    Ok(())
}

/// Nobody but the service's user can enter the folders of its sockets and journals, or replace them.
#[tokio::test]
async fn state_directory_is_private() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let state = dir.path().join("state");
    let mode = |path: &Path| Ok::<_, std::io::Error>(path.metadata()?.permissions().mode() & 0o777);
    let allow = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    for folder in ["", "vms", "migrations"] {
        fs::create_dir(state.join(folder))?;
        allow(&state.join(folder), 0o755)?;
    }
    let argument = ["--state-dir".to_owned(), text(&state).to_owned()];
    let service = Service::start_with(&[], &argument).await?;
    for folder in ["vms", "migrations"] {
        assert_eq!(mode(&state.join(folder))?, 0o700, "{folder}");
    }
    // The operator's own directory is not changed.
    assert_eq!(mode(&state)?, 0o755);
    drop(service);
    allow(&state, 0o775)?;
    let socket = dir.path().join("s");
    let second = serve(&["--socket", text(&socket), &argument[0], &argument[1]])?;
    let said = refused(second)?;
    ensure!(
        said.contains("chmod 700") && said.contains(text(&state)),
        "{said}"
    );
    Ok(())
}

/// A service that cannot start says why, each cause once, and not that it serves.
#[test]
fn refusal_names_its_cause_once() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    let socket = ["--socket", text(&socket)];
    let with = |more: [&'static str; 2]| [&socket[..], &more].concat();
    for (arguments, cause) in [
        (vec!["--socket", "/nowhere/at/all"], "No such file"),
        (with(["--threads", "0"]), "--threads"),
        (with(["--accept-migrations", "a"]), "is not an endpoint"),
    ] {
        let said = refused(serve(&arguments)?)?;
        assert_eq!(said.matches(cause).count(), 1, "{said}");
        assert!(!said.contains("API at"), "{said}");
    }
    let mut unreadable = serve(&socket)?;
    unreadable.env("RUST_LOG", "vmm=loud");
    let said = refused(unreadable)?;
    assert!(said.contains("RUST_LOG is \"vmm=loud\""), "{said}");
    Ok(())
}
