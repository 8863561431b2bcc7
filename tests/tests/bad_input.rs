//! Impossible requests: the error names the object, and nothing changes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use guest::{Crash, Options, Workload};
use openapi::ClientError;
use rustix::process::Signal;
use spec::{ConsoleMode, Problem, SerialConfig, VmConfig, VmState};
use tests::{Face, Service};

fn problem<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Result<Problem> {
    match result {
        Err(ClientError::Problem(problem)) => Ok(*problem),
        other => anyhow::bail!("not refused by the service: {other:?}"),
    }
}

/// Changes a configuration so that it cannot be.
type Spoil = fn(&mut VmConfig);

#[tokio::test]
async fn rejects_invalid_configs_by_field() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (good, _) = service.pocket("vm", Options::default())?;
    let spoiled: [(&str, u16, Spoil); 9] = [
        ("/memory/size", 422, |c| c.memory.size = 0),
        ("/memory/size", 422, |c| c.memory.size = 4097),
        ("/memory/size", 422, |c| c.memory.size = 1 << 60),
        ("/cpus/boot_vcpus", 422, |c| c.cpus.boot_vcpus = 0),
        ("/cpus/max_vcpus", 422, |c| {
            (c.cpus.boot_vcpus, c.cpus.max_vcpus) = (1 << 20, 1 << 20);
        }),
        ("/payload/kernel", 422, |c| c.payload.kernel = None),
        ("/serial/file", 422, |c| c.serial.file = None),
        ("/iommu", 501, |c| c.iommu = true),
        ("/payload/firmware", 422, |c| {
            c.payload.firmware = Some("/f".to_owned());
        }),
    ];
    for (pointer, status, spoil) in spoiled {
        let mut config = good.clone();
        spoil(&mut config);
        let refused = match service.create("vm", config).await {
            Err(error) => error.downcast::<ClientError>()?,
            Ok(id) => anyhow::bail!("{id} was created, and {pointer} cannot be"),
        };
        let refused = problem::<()>(Err(refused))?;
        // Of the body, in which the configuration is a part.
        let pointer = format!("/config{pointer}");
        assert_eq!(
            (refused.status, refused.errors[0].pointer.as_str()),
            (status, pointer.as_str())
        );
    }
    assert!(service.client().vms_list().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn rejects_invalid_payloads_at_boot() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (good, _) = service.pocket("vm", Options::default())?;
    let path = |name: &str| service.path(name).to_string_lossy().into_owned();
    fs::write(path("large"), vec![0; 80 << 20])?;
    for (name, initramfs) in [("missing", path("no-initramfs")), ("large", path("large"))] {
        let mut config = good.clone();
        config.memory.size = 64 << 20;
        config.payload.initramfs = Some(initramfs.clone());
        let vm = service.create(name, config).await?;
        let refused = problem(service.client().vms_boot(&vm).await)?;
        assert_eq!(refused.status, 422);
        assert!(refused.detail.contains(&initramfs), "{refused}");
        assert_eq!(
            service.client().vms_info(&vm).await?.state,
            VmState::Created
        );
    }
    Ok(())
}

/// Sends bytes as they are, and reads the answer to its end.
fn raw(service: &Service, request: &str) -> Result<String> {
    let mut socket = UnixStream::connect(service.socket())?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    // A body that is too large is refused before all of it has come.
    let _ = socket.write_all(request.as_bytes());
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}

fn put(path: &str, body: &str) -> String {
    let len = body.len();
    format!(
        "PUT /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    )
}

#[tokio::test]
async fn explains_unparsable_bodies() -> Result<()> {
    let service = Service::start(Face::One).await?;
    let large = format!("\"{}\"", "x".repeat(2 << 20));
    for (body, status, says) in [
        ("{", "400", "line 1"),
        (
            r#"{"payload": {"kernal": "/k"}}"#,
            "400",
            "did you mean `kernel`",
        ),
        (r#"{"payload": {"kernel": 7}}"#, "400", "/payload/kernel"),
        (large.as_str(), "413", ""),
    ] {
        let answer = raw(&service, &put("vm.create", body))?;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(says),
            "{answer}"
        );
    }
    let answer = raw(&service, &put("vm.boot", ""))?;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let answer = raw(
        &service,
        "GET /api/v1/vm.nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )?;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn explains_emulation_failure() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let options = Options {
        workload: Workload::Crash(Crash::TripleFault),
        ..Options::default()
    };
    let (vm, _) = service.boot_pocket("vm", options).await?;
    let info = service.reaches(&vm, VmState::Shutdown).await?;
    assert_eq!(info.failure.context("a failure")?.code, "triple-fault");
    // It can be booted again: what is wrong with it is the guest's business.
    service.client().vms_boot(&vm).await?;
    Ok(())
}

/// `timeout` signals its child, and then the child's process group. The second signal is no request to end
/// at once, which would leave sockets behind.
#[tokio::test]
async fn doubled_signal_ends_in_order() -> Result<()> {
    let mut service = Service::start(Face::Many).await?;
    service.boot_pocket("vm", Options::default()).await?;
    service.signal(Signal::TERM)?;
    // The process may have ended between the two.
    let _ = service.signal(Signal::TERM);
    assert!(service.ended(Duration::from_secs(20)).await?.success());
    assert!(!service.socket().exists());
    Ok(())
}

/// systemd starts services as session leaders without a terminal. The first terminal that one opens
/// could become its controlling terminal, and end the service when it goes.
#[tokio::test]
async fn closed_pty_does_not_end_service() -> Result<()> {
    let mut service = Service::start_in_session().await?;
    let (mut config, _) = service.pocket("vm", Options::default())?;
    config.serial = SerialConfig::with_mode(ConsoleMode::Pty);
    let vm = service.create("vm", config).await?;
    service.client().vms_boot(&vm).await?;
    let info = service.client().vms_info(&vm).await?;
    let terminal = info.config.serial.file.context("a path")?;
    assert!(terminal.starts_with("/dev/pts/"), "{terminal}");
    // Behind the program's name: state, parent, group, session, terminal.
    let stat = fs::read_to_string(format!("/proc/{}/stat", service.pid()))?;
    let (_, fields) = stat.rsplit_once(')').context("a name")?;
    let mut fields = fields.split_whitespace();
    assert_eq!(fields.nth(3), Some(service.pid().to_string().as_str()));
    assert_eq!(fields.next(), Some("0"), "it has a controlling terminal");
    service.client().vms_delete(&vm).await?;
    service.client().ping().await?;
    // A hang-up asks the service to end in order.
    service.signal(Signal::HUP)?;
    assert!(service.ended(Duration::from_secs(20)).await?.success());
    assert!(!service.socket().exists());
    Ok(())
}
