//! The command line of Cloud Hypervisor as libvirt uses it: an inherited API socket, and events
//! through a FIFO.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use openapi::Client;
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::io::{FdFlags, fcntl_setfd};
use spec::{
    ConsoleConfig, ConsoleMode, CpusConfig, PayloadConfig, SerialConfig, VmConfig, VmState,
};
use tests::built;

/// Enough VMs that some threads have not run yet when the last is started.
const VCPUS: u32 = 16;

/// A VMM, killed by its process id when dropped.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the VMM as libvirt does, and returns it with all that it will write to its FIFO.
fn start(dir: &Path) -> Result<(Vmm, JoinHandle<std::io::Result<String>>)> {
    let listener = UnixListener::bind(dir.join("api.sock"))?;
    fcntl_setfd(&listener, FdFlags::empty())?;
    let fifo = dir.join("events");
    mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR)?;
    let child = Command::new(built("whimbrel")?)
        .arg0("cloud-hypervisor")
        .arg("--api-socket")
        .arg(format!("fd={}", listener.as_raw_fd()))
        .arg("--event-monitor")
        .arg(format!("path={}", fifo.display()))
        .stdin(Stdio::null())
        .stderr(File::create(dir.join("log"))?)
        .spawn()?;
    // Opening waits for the VMM, as it does in libvirt.
    let events = std::thread::spawn(move || {
        let mut text = String::new();
        File::open(fifo)?.read_to_string(&mut text)?;
        Ok(text)
    });
    Ok((Vmm(child), events))
}

fn pocket(dir: &Path) -> Result<VmConfig> {
    let kernel = dir.join("pocket.elf");
    std::fs::write(&kernel, guest::IMAGE)?;
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.display().to_string()),
        ..PayloadConfig::default()
    });
    config.cpus = CpusConfig::with_vcpus(VCPUS);
    config.serial = SerialConfig::with_mode(ConsoleMode::Null);
    config.console = ConsoleConfig::with_mode(ConsoleMode::Off);
    Ok(config)
}

#[tokio::test]
async fn inherited_socket_serves_a_vm_and_the_fifo_has_its_life() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut vmm, events) = start(dir.path())?;
    let client = Client::unix(dir.path().join("api.sock"));
    client.vm_create(&pocket(dir.path())?).await?;
    client.vm_boot().await?;
    // libvirt lists the threads now, and wants one of the right name for each vCPU.
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.0.id()))?;
    let names = tasks.map(|task| std::fs::read_to_string(task?.path().join("comm")));
    let names = names.collect::<std::io::Result<Vec<_>>>()?;
    for vcpu in 0..VCPUS {
        assert!(names.contains(&format!("vcpu{vcpu}\n")), "{names:?}");
    }
    assert_eq!(client.vm_info().await?.state, VmState::Running);
    client.vm_pause().await?;
    client.vm_resume().await?;
    client.vm_reboot().await?;
    client.vm_shutdown().await?;
    client.shut_service_down().await?;
    assert!(vmm.0.wait()?.success());
    let text = events.join().ok().context("the reader panicked")??;
    let stream = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>();
    let mut found = Vec::new();
    for event in stream {
        let event = event?;
        let word = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        found.push(format!("{}:{}", word("source"), word("event")));
    }
    let expected = "vmm:starting vm:booting vm:booted vm:pausing vm:paused vm:resuming vm:resumed \
                    vm:rebooting vm:rebooted vm:shutdown vm:deleted vmm:shutdown";
    assert_eq!(found.join(" "), expected);
    Ok(())
}
