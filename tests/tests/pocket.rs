//! The pocket guest in the service, as a user drives it.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use guest::{Command, Crash, Line, Options, Workload};
use openapi::{ClientError, News};
use rustix::process::Signal;
use spec::{ConsoleMode, SerialConfig, VmState};
use tests::{Face, Serial, Service};

const SOON: Duration = Duration::from_secs(30);

fn beating() -> Options {
    Options {
        heartbeat_ms: Some(20),
        ..Options::default()
    }
}

async fn beats(serial: &Serial) -> Result<Line> {
    serial
        .wait_for_line("heartbeat", SOON, |line| {
            matches!(line, Line::Heartbeat { .. })
        })
        .await
}

fn heartbeats(serial: &Serial) -> usize {
    let beat = |line: &Line| matches!(line, Line::Heartbeat { .. });
    serial.lines().into_iter().filter(beat).count()
}

#[track_caller]
fn refused_with(result: &Result<(), ClientError>, status: u16) {
    let found = match result {
        Err(ClientError::Problem(problem)) => Some(problem.status),
        _ => None,
    };
    assert_eq!(found, Some(status), "{result:?}");
}

#[tokio::test]
async fn pause_and_resume() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (vm, serial) = service.boot_pocket("vm", beating()).await?;
    beats(&serial).await?;

    service.client().vms_pause(&vm).await?;
    let paused = serial.text();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(serial.text(), paused);
    let count = heartbeats(&serial);

    service.client().vms_resume(&vm).await?;
    serial
        .wait_for_line(
            "a later heartbeat",
            SOON,
            |line| matches!(line, Line::Heartbeat { count: now, .. } if *now > count as u64 + 1),
        )
        .await?;
    Ok(())
}

/// A firmware is an ELF file with a PVH note, as the pocket guest is. The guest also finds its command
/// line there.
#[tokio::test]
async fn firmware_boots_and_reboots() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, serial) = service.pocket("vm", beating())?;
    config.payload.firmware = config.payload.kernel.take();
    let vm = service.create("vm", config).await?;
    service.client().vms_boot(&vm).await?;
    beats(&serial).await?;
    service.client().vms_reboot(&vm).await?;
    serial.wait_for("pocket: hello", 2, SOON).await?;

    // What is no firmware is refused by what it lacks.
    let (mut config, _) = service.pocket("other", beating())?;
    let image = service.path("OVMF.fd");
    fs::write(&image, vec![0xff; 1 << 20])?;
    config.payload.kernel = None;
    config.payload.firmware = Some(image.to_string_lossy().into_owned());
    let other = service.create("other", config).await?;
    let refused = service.client().vms_boot(&other).await.unwrap_err();
    assert!(refused.to_string().contains("PVH note"), "{refused}");
    Ok(())
}

/// Each machine's panic is an event, and the VM stays as it is.
#[tokio::test]
async fn panic_of_guest_is_an_event() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let panic = Options {
        workload: Workload::Crash(Crash::Panic),
        ..Options::default()
    };
    let (mut config, _) = service.pocket("vm", panic)?;
    config.pvpanic = true;
    let vm = service.create("vm", config).await?;
    let client = service.client();
    let mut events = client.events(Some(0), Some(&vm)).await?;
    client.vms_boot(&vm).await?;
    let tree = client.vms_info(&vm).await?.device_tree.unwrap_or_default();
    assert!(tree.0.contains_key(spec::PVPANIC), "{tree:?}");
    for _ in 0..2 {
        let panic = loop {
            match tokio::time::timeout(SOON, events.next()).await?? {
                Some(News::Happened(event)) if event.event == "guest-panic" => break event,
                Some(_) => {}
                None => anyhow::bail!("the service ends the stream of events"),
            }
        };
        assert_eq!(panic.detail.as_deref(), Some("panic"));
        assert_eq!(client.vms_info(&vm).await?.state, VmState::Running);
        client.vms_reboot(&vm).await?;
    }
    Ok(())
}

/// A guest whose driver pings stays as it is; one that hangs is reset.
#[tokio::test]
async fn watchdog_resets_a_guest_that_hangs() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let working = Options {
        workload: Workload::Io,
        ..Options::default()
    };
    let (mut config, _) = service.pocket("vm", working)?;
    config.watchdog = true;
    let socket = service.path("serial");
    config.serial = SerialConfig {
        socket: Some(socket.to_string_lossy().into_owned()),
        ..SerialConfig::with_mode(ConsoleMode::Socket)
    };
    let vm = service.create("vm", config).await?;
    let client = service.client();
    let mut events = client.events(Some(0), Some(&vm)).await?;
    client.vms_boot(&vm).await?;
    let pings = async || -> Result<()> {
        let start = Instant::now();
        while client.vms_counters(&vm).await?[spec::WATCHDOG]["pings"] < 10 {
            ensure!(start.elapsed() < SOON, "the guest does not ping");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    pings().await?;
    // A fault that the guest itself catches, and stops: KVM sees a halted vCPU.
    let hang = Command::Crash(Crash::Fault);
    writeln!(UnixStream::connect(&socket)?, "{hang}")?;
    let mut seen = Vec::new();
    while !seen.iter().any(|event| event == "rebooted") {
        match tokio::time::timeout(SOON * 4, events.next()).await?? {
            Some(News::Happened(event)) => seen.push(event.event),
            Some(_) => {}
            None => bail!("the service ends the stream of events"),
        }
    }
    let expired = seen.iter().filter(|event| *event == "watchdog-expired");
    assert_eq!(expired.count(), 1, "{seen:?}");
    pings().await
}

#[tokio::test]
async fn devices_are_in_their_slots() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, serial) = service.pocket("vm", beating())?;
    let disk = |name: &str, slot: u8| -> Result<spec::DiskConfig> {
        let path = service.path(name);
        fs::write(&path, [0; 4096])?;
        let path = path.to_string_lossy();
        let disk = format!(
            r#"{{"path":"{path}","id":"{name}","image_type":"Raw","pci_device_id":{slot}}}"#
        );
        Ok(serde_json::from_str(&disk)?)
    };
    let mut plain = disk("plain", 3)?;
    plain.pci_device_id = None;
    config.disks = Some(vec![disk("first", 9)?, plain]);
    config.rng.pci_device_id = Some(1);
    let vm = service.create("vm", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    beats(&serial).await?;
    let added = client.vms_add_disk(&vm, &disk("second", 31)?).await?;
    assert_eq!(
        added.map(|added| added.bdf).as_deref(),
        Some("0000:00:1f.0")
    );
    for slot in [1, 9, 31] {
        let refused = client.vms_add_disk(&vm, &disk("third", slot)?).await;
        assert_eq!(
            refused.unwrap_err().code(),
            Some("pci-slot-taken"),
            "{slot}"
        );
    }
    // Slot 2 has a device that asks for none.
    let refused = client.vms_add_disk(&vm, &disk("third", 2)?).await;
    assert_eq!(refused.unwrap_err().code(), Some("no-free-slot"));
    client.vms_reboot(&vm).await?;
    serial.wait_for("pocket: hello", 2, SOON).await?;
    let tree = client.vms_info(&vm).await?.device_tree.unwrap_or_default();
    let at = |id: &str| tree.0.get(id).and_then(|node| node.pci_bdf.clone());
    for (id, bdf) in [
        ("first", "09"),
        ("second", "1f"),
        ("__rng", "01"),
        ("plain", "02"),
    ] {
        assert_eq!(at(id), Some(format!("0000:00:{bdf}.0")), "{id}");
    }
    Ok(())
}

#[tokio::test]
async fn two_vms_run_independently() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (one, one_serial) = service.boot_pocket("one", beating()).await?;
    let (two, two_serial) = service.boot_pocket("two", beating()).await?;
    beats(&one_serial).await?;
    beats(&two_serial).await?;

    service.client().vms_shutdown(&one).await?;
    service.reaches(&one, VmState::Shutdown).await?;
    let before = heartbeats(&two_serial);
    two_serial.wait_for("heartbeat", before + 2, SOON).await?;
    assert_eq!(
        service.client().vms_info(&two).await?.state,
        VmState::Running
    );
    Ok(())
}

#[tokio::test]
async fn a_reboot_starts_the_guest_anew() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (vm, serial) = service.boot_pocket("vm", beating()).await?;
    beats(&serial).await?;
    service.client().vms_reboot(&vm).await?;
    serial.wait_for("pocket: hello", 2, SOON).await?;
    assert_eq!(
        service.client().vms_info(&vm).await?.state,
        VmState::Running
    );
    Ok(())
}

#[tokio::test]
async fn crash_ends_only_its_vm() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (other, serial) = service.boot_pocket("other", beating()).await?;
    beats(&serial).await?;
    let crash = Options {
        workload: Workload::Crash(Crash::TripleFault),
        ..Options::default()
    };
    let (vm, _) = service.boot_pocket("crash", crash).await?;
    let info = service.reaches(&vm, VmState::Shutdown).await?;
    let failure = info.failure.expect("vm.info explains the end");
    assert_eq!(failure.code, "triple-fault");
    assert!(!failure.detail.is_empty());

    let before = heartbeats(&serial);
    serial.wait_for("heartbeat", before + 2, SOON).await?;
    assert_eq!(service.client().vms_info(&other).await?.failure, None);
    Ok(())
}

/// Every order in every state in which it makes no sense.
#[tokio::test]
async fn rejects_requests_in_wrong_state() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let client = service.client();
    let (config, serial) = service.pocket("vm", beating())?;
    let vm = service.create("vm", config).await?;

    refused_with(&client.vms_pause(&vm).await, 409);
    refused_with(&client.vms_resume(&vm).await, 409);
    refused_with(&client.vms_reboot(&vm).await, 409);
    refused_with(&client.vms_power_button(&vm).await, 409);
    refused_with(&client.vms_nmi(&vm).await, 409);
    assert_eq!(client.vms_info(&vm).await?.state, VmState::Created);

    client.vms_boot(&vm).await?;
    beats(&serial).await?;
    refused_with(&client.vms_boot(&vm).await, 409);
    refused_with(&client.vms_resume(&vm).await, 409);
    assert_eq!(client.vms_info(&vm).await?.state, VmState::Running);

    client.vms_pause(&vm).await?;
    refused_with(&client.vms_boot(&vm).await, 409);
    refused_with(&client.vms_pause(&vm).await, 409);
    assert_eq!(client.vms_info(&vm).await?.state, VmState::Paused);

    client.vms_shutdown(&vm).await?;
    refused_with(&client.vms_pause(&vm).await, 409);
    refused_with(&client.vms_resume(&vm).await, 409);
    assert_eq!(client.vms_info(&vm).await?.state, VmState::Shutdown);

    client.vms_delete(&vm).await?;
    refused_with(&client.vms_boot(&vm).await, 404);
    Ok(())
}

/// A payload that cannot be booted is refused by name, and a good one boots after it.
#[tokio::test]
async fn a_bad_kernel_is_named() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let client = service.client();
    let elf = guest::IMAGE;
    let bad: [(&str, Option<&[u8]>); 4] = [
        ("missing", None),
        ("empty", Some(b"")),
        ("truncated", Some(&elf[..100])),
        ("text", Some(b"#!/bin/sh\necho not a kernel\n")),
    ];
    for (name, content) in bad {
        let path = service.path(format!("{name}.kernel"));
        if let Some(content) = content {
            fs::write(&path, content)?;
        }
        let (mut config, _) = service.pocket(name, Options::default())?;
        config.payload.kernel = Some(path.to_string_lossy().into_owned());
        // Whether it is seen when the VM is made or when it is booted, it is refused.
        let refusal = match service.create(name, config).await {
            Ok(vm) => {
                let refusal = client.vms_boot(&vm).await.expect_err(name).to_string();
                let state = client.vms_info(&vm).await?.state;
                assert_eq!(state, VmState::Created, "{name}");
                refusal
            }
            Err(error) => error.to_string(),
        };
        assert!(refusal.contains(&format!("{name}.kernel")), "{refusal}");
    }
    let (_, serial) = service.boot_pocket("good", beating()).await?;
    beats(&serial).await?;
    Ok(())
}

#[tokio::test]
async fn a_serial_file_that_cannot_be_written_is_named() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = service.pocket("vm", Options::default())?;
    config.serial.file = Some("/nowhere/serial".to_owned());
    let refusal = match service.create("vm", config).await {
        Ok(vm) => {
            let boot = service.client().vms_boot(&vm).await;
            boot.expect_err("/nowhere is not there").to_string()
        }
        Err(error) => error.to_string(),
    };
    assert!(refusal.contains("/nowhere/serial"), "{refusal}");
    Ok(())
}

#[tokio::test]
async fn sigterm_ends_the_service_and_its_guests_cleanly() -> Result<()> {
    let mut service = Service::start(Face::Many).await?;
    let (_, serial) = service.boot_pocket("vm", beating()).await?;
    beats(&serial).await?;
    service.signal(Signal::TERM)?;
    let status = service.ended(SOON).await?;
    assert!(status.success(), "{status}: {}", service.log());
    assert!(!service.socket().exists(), "the socket is left behind");
    Ok(())
}

#[tokio::test]
async fn after_a_kill_the_next_start_takes_the_socket_over() -> Result<()> {
    let mut service = Service::start(Face::Many).await?;
    let (_, serial) = service.boot_pocket("vm", beating()).await?;
    beats(&serial).await?;
    service.signal(Signal::KILL)?;
    service.ended(SOON).await?;
    assert!(
        service.socket().exists(),
        "a killed service cleans nothing up"
    );
    service.start_again().await?;
    let (_, serial) = service.boot_pocket("again", beating()).await?;
    beats(&serial).await?;
    Ok(())
}

/// The calls and answers that Cloud Hypervisor's clients make and expect.
#[tokio::test]
async fn one_vm_socket_lifecycle() -> Result<()> {
    let mut service = Service::start(Face::One).await?;
    let (config, serial) = service.pocket("vm", beating())?;
    let client = service.client().clone();
    refused_with(&client.vm_info().await.map(drop), 404);
    client.vm_create(&config).await?;
    assert_eq!(client.vm_info().await?.state, VmState::Created);
    client.vm_boot().await?;
    beats(&serial).await?;
    client.vm_pause().await?;
    assert_eq!(client.vm_info().await?.state, VmState::Paused);
    client.vm_resume().await?;
    client.vm_counters().await?;
    client.vm_shutdown().await?;
    assert_eq!(client.vm_info().await?.state, VmState::Created);
    client.vm_delete().await?;
    client.shut_service_down().await?;
    let status = service.ended(SOON).await?;
    assert!(status.success(), "{status}: {}", service.log());
    Ok(())
}
