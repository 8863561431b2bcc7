//! Resources of the process that VMs and clients share: descriptors, standard output, the TCP listener.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use guest::{Options, Workload};
use openapi::{Client, ClientError};
use spec::{ConsoleConfig, ConsoleMode, SerialConfig, VmConfig, VmId, VmState};
use tests::{Face, Service, built};

/// A bound, and no measure: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Result<(String, String)> {
    match result {
        Err(ClientError::Problem(problem)) => Ok((problem.code, problem.detail)),
        other => bail!("not refused by the service: {other:?}"),
    }
}

/// The number in front of a word.
fn number(text: &str, before: &str) -> Result<usize> {
    let (head, _) = text.split_once(before).context(before.to_owned())?;
    let digits = head.rsplit(|c: char| !c.is_ascii_digit()).next();
    Ok(digits.unwrap_or_default().parse()?)
}

/// Configurations that need many descriptors of each kind.
fn configurations(service: &Service) -> Result<Vec<VmConfig>> {
    let path = |name: &str| service.path(name).to_string_lossy().into_owned();
    let (plain, _) = service.pocket("plain", Options::default())?;
    let mut vcpus = plain.clone();
    vcpus.cpus = spec::CpusConfig::with_vcpus(8);
    let mut sockets = plain.clone();
    sockets.serial = SerialConfig {
        socket: Some(path("serial.sock")),
        mode: ConsoleMode::Socket,
        file: None,
    };
    sockets.console = ConsoleConfig::with_mode(ConsoleMode::Pty);
    sockets.vsock = Some(serde_json::from_value(
        serde_json::json!({ "cid": 3, "socket": path("vsock") }),
    )?);
    let mut disks = plain.clone();
    std::fs::File::create(path("disk"))?.set_len(1 << 20)?;
    let (options, _) = service.pocket(
        "disks",
        Options {
            workload: Workload::Queues,
            ..Options::default()
        },
    )?;
    (disks.payload, disks.serial) = (options.payload, options.serial);
    disks.disks = Some(vec![serde_json::from_value(
        serde_json::json!({ "path": path("disk"), "image_type": "Raw", "num_queues": 8 }),
    )?]);
    disks.console = ConsoleConfig {
        file: Some(path("console")),
        ..ConsoleConfig::with_mode(ConsoleMode::File)
    };
    disks.balloon = Some(serde_json::from_value(serde_json::json!({ "size": 0 }))?);
    disks.memory.shared = true;
    Ok(vec![plain, vcpus, sockets, disks])
}

/// Boots VMs until one is refused. Returns those that run, and the code and detail of the refusal.
async fn fill(service: &Service) -> Result<(Vec<VmId>, (String, String))> {
    let mut running = Vec::new();
    while running.len() < 160 {
        let name = format!("fill{}", running.len());
        let (config, _) = service.pocket(&name, Options::default())?;
        let id = service.create(&name, config).await?;
        match service.client().vms_boot(&id).await {
            Ok(()) => running.push(id),
            error => return Ok((running, refused(error)?)),
        }
    }
    bail!("no VM was refused")
}

/// The budget of a machine is an upper bound of what it opens, and not far above that. Where the limit is
/// too low, the machine is refused before anything of it is there.
#[tokio::test]
async fn machine_opens_no_more_descriptors_than_it_reserves() -> Result<()> {
    /// Descriptors that only guests, clients or a hand-over cause.
    const LATER: usize = 40;
    const VSOCK: usize = 256;
    let roomy = Service::start(Face::Many).await?;
    let tight = Service::start_with(&["prlimit", "--nofile=96:96"], &[]).await?;
    // So that even the smallest machine is refused.
    fill(&tight).await?;
    for (index, config) in configurations(&roomy)?.into_iter().enumerate() {
        let name = format!("vm{index}");
        let id = tight.create(&name, config.clone()).await?;
        let open = tight.descriptors()?;
        let (code, detail) = refused(tight.client().vms_boot(&id).await)?;
        assert_eq!(code, "too-few-descriptors");
        ensure!(detail.contains("limit of 96"), "{detail}");
        let needed = number(&detail, " file descriptors")?;
        assert_eq!(tight.client().vms_info(&id).await?.state, VmState::Created);
        assert!(tight.descriptors()? <= open, "something stayed open");
        // Its socket would count against the limit when the next one is created.
        tight.client().vms_delete(&id).await?;

        let with_vsock = config.vsock.is_some();
        let starts_queues = config.disks.is_some();
        let id = roomy.create(&name, config).await?;
        let before = roomy.descriptors()?;
        roomy.client().vms_boot(&id).await?;
        if starts_queues {
            let serial = tests::Serial::at(roomy.path("disks.serial"));
            roomy.prints(&id, &serial, "queues", 1, PATIENCE).await?;
        }
        let client = UnixStream::connect(roomy.path("serial.sock")).ok();
        let after = roomy.descriptors()?;
        let opened = after.saturating_sub(before);
        println!("vm{index}: {opened} opened, {needed} reserved");
        ensure!(
            opened <= needed,
            "vm{index}: {opened} opened, {needed} reserved"
        );
        let slack = LATER + if with_vsock { VSOCK } else { 0 };
        ensure!(needed <= opened + slack, "vm{index}: {opened}, {needed}");
        drop(client);
        roomy.client().vms_delete(&id).await?;
    }
    Ok(())
}

/// Resources that a VM reserved are free again when the VM is gone, and no VM gets those of another.
#[tokio::test]
async fn descriptors_are_reserved_for_each_vm_and_given_back() -> Result<()> {
    let service = Service::start_with(&["prlimit", "--nofile=160:160"], &[]).await?;
    let (mut running, (code, detail)) = fill(&service).await?;
    assert_eq!(code, "too-few-descriptors", "{detail}");
    ensure!(running.len() > 1, "{detail}");
    // Each keeps its own over resets, though none is left.
    let first = running.swap_remove(0);
    for id in &running {
        service.client().vms_reboot(id).await?;
        service.reaches(id, VmState::Running).await?;
    }
    // One goes, and the next fits.
    service.client().vms_delete(&first).await?;
    let (config, _) = service.pocket("next", Options::default())?;
    let next = service.create("next", config).await?;
    service.client().vms_boot(&next).await?;
    Ok(())
}

/// Standard output is a pipe that nobody reads. The guest writes more to it than pipe and service hold.
#[tokio::test]
async fn unread_output_holds_up_neither_guest_nor_service() -> Result<()> {
    /// More than the 64 KiB of a pipe and the 256 KiB that are kept.
    const BYTES: u64 = 400_000;
    let mut service = Service::start_unread().await?;
    let workload = Workload::Exits {
        port: 0x3f8,
        count: BYTES,
    };
    let options = Options {
        workload,
        ..Options::default()
    };
    let (mut config, _) = service.pocket("vm", options)?;
    config.serial = SerialConfig::with_mode(ConsoleMode::Tty);
    let id = service.create("vm", config).await?;
    service.client().vms_boot(&id).await?;
    let start = Instant::now();
    let counters = loop {
        assert_eq!(
            service.client().vms_info(&id).await?.state,
            VmState::Running
        );
        let counters = service.client().vms_counters(&id).await?;
        let of = |name: &str| counters["serial"].get(name).copied().unwrap_or(0);
        let (out, lost) = (of("bytes_out"), of("bytes_lost"));
        if out + lost > BYTES {
            break (out, lost);
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "the guest is held up: {counters:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    ensure!(counters.1 > 0, "nothing was lost: {counters:?}");
    // What was kept comes when it is read.
    let mut output = service.take_output().context("a pipe")?;
    let read = tokio::task::spawn_blocking(move || {
        let mut piece = vec![0; 256 << 10];
        output.read_exact(&mut piece).map(|()| piece)
    });
    let piece = tokio::time::timeout(PATIENCE, read).await???;
    assert_eq!(piece.len(), 256 << 10);
    service.client().vms_delete(&id).await?;
    Ok(())
}

/// The token counts over TCP, on the unix socket it is not asked for, and without it there is no TCP.
#[tokio::test]
async fn tcp_asks_for_the_token_that_the_service_was_given() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("token");
    let token = "0123456789abcdef0123456789abcdef";
    std::fs::write(&file, format!("{token}\n"))?;
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode));
    let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let tcp = ["--tcp".to_owned(), free.to_string()];
    let with_token = |tcp: &[String]| {
        let path = file.to_string_lossy().into_owned();
        [tcp, &["--api-token-file".to_owned(), path]].concat()
    };
    let error = Service::start_with(&[], &tcp)
        .await
        .unwrap_err()
        .to_string();
    ensure!(error.contains("--api-token-file"), "{error}");
    mode(0o644)?;
    let error = Service::start_with(&[], &with_token(&tcp)).await;
    let error = error.unwrap_err().to_string();
    ensure!(error.contains("0644"), "{error}");
    mode(0o600)?;
    let service = Service::start_with(&[], &with_token(&tcp)).await?;
    service.client().vms_list().await?;
    let (code, _) = refused(Client::tcp(free).vms_list().await)?;
    assert_eq!(code, "token-missing");
    let wrong = Client::tcp(free).with_token("f".repeat(32).parse()?);
    assert_eq!(refused(wrong.vms_list().await)?.0, "token-wrong");
    let right = Client::tcp(free).with_token(token.parse()?);
    assert!(right.vms_list().await?.is_empty());
    // The command line, as a user has it.
    let remote = |variable: bool| {
        let mut command = std::process::Command::new(built("wh-remote")?);
        command.env_remove("WHIMBREL_TOKEN_FILE");
        if variable {
            command.env("WHIMBREL_TOKEN_FILE", &file);
        }
        command.args(["--tcp", &free.to_string(), "ls"]);
        anyhow::Ok(command.output()?)
    };
    assert!(remote(true)?.status.success());
    let refused = remote(false)?;
    assert!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(text.contains("--token-file"), "{text}");
    Ok(())
}
