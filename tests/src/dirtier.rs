//! A pocket guest that writes to its memory all the time, and can be asked whether it is whole.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use guest::{Command, Line, Options, Order, Workload};
use spec::{VmConfig, VmId};

use crate::{Face, Service};

const PATIENCE: Duration = Duration::from_secs(60);

/// Boots one. Gives its name, and its serial port: a socket, at a path that stays where the guest goes.
///
/// # Errors
/// When it does not come up whole.
pub async fn boot(at: &Service) -> Result<(VmId, PathBuf)> {
    boot_with(at, None).await
}

/// Boots like [`boot`], with this many bytes of memory.
///
/// # Errors
/// The same as those of [`boot`].
pub async fn boot_with(at: &Service, memory: Option<u64>) -> Result<(VmId, PathBuf)> {
    boot_writing(at, memory, 16, 1000).await
}

/// Options of a guest that writes to `rate` pages a second of a region of so many MiB, or to none.
#[must_use]
pub fn options(region_mib: u64, rate: u64, heartbeat_ms: u32) -> Options {
    let workload = match rate {
        0 => Workload::Idle,
        rate => Workload::Dirty {
            region_mib: Some(region_mib),
            rate: Some(rate),
            order: Order::Scattered,
        },
    };
    Options {
        workload,
        heartbeat_ms: Some(heartbeat_ms),
        ..Options::default()
    }
}

/// Boots one that writes to `rate` pages a second of a region of so many MiB.
///
/// # Errors
/// The same as those of [`boot`].
pub async fn boot_writing(
    at: &Service,
    memory: Option<u64>,
    region_mib: u64,
    rate: u64,
) -> Result<(VmId, PathBuf)> {
    let change = |config: &mut VmConfig| {
        config.memory.size = memory.unwrap_or(config.memory.size);
    };
    boot_as(at, options(region_mib, rate, 100), change).await
}

/// Boots one whose configuration `change` changes.
///
/// # Errors
/// The same as those of [`boot`].
pub async fn boot_as(
    at: &Service,
    options: Options,
    change: impl FnOnce(&mut VmConfig),
) -> Result<(VmId, PathBuf)> {
    let (mut config, serial) = at.pocket("guest", options)?;
    let path = serial.path().to_owned();
    let port = serde_json::json!({ "mode": "Socket", "socket": path });
    config.serial = serde_json::from_value(port)?;
    change(&mut config);
    let vm: VmId = if at.face() == Face::Many {
        let vm = at.create("guest", config).await?;
        at.client().vms_boot(&vm).await?;
        vm
    } else {
        at.client().vm_create(&config).await?;
        at.client().vm_boot().await?;
        "guest".parse()?
    };
    check(&path).await?;
    Ok((vm, path))
}

/// Asks the guest, over its serial port, to check its memory. Returns how long the guest took for
/// that.
///
/// # Errors
/// When it does not answer, or a page is not what it wrote.
pub async fn check(port: &Path) -> Result<Duration> {
    let port = port.to_owned();
    tokio::task::spawn_blocking(move || check_now(&port)).await?
}

fn check_now(port: &Path) -> Result<Duration> {
    let mut stream = UnixStream::connect(port)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let lines = BufReader::new(stream.try_clone()?).lines();
    let mut lines = lines.map_while(Result::ok);
    // It is up, and looks at its port.
    lines
        .find(|line| matches!(Line::parse(line), Some(Line::Heartbeat { .. })))
        .context("the guest is silent")?;
    let asked = Instant::now();
    writeln!(stream, "{}", Command::Verify)?;
    let (pages, bad) = lines
        .find_map(|line| match Line::parse(&line) {
            Some(Line::Verified { pages, bad, .. }) => Some((pages, bad)),
            _ => None,
        })
        .context("the guest does not check its memory")?;
    ensure!(pages > 0 && bad == 0, "{bad} of {pages} pages are bad");
    Ok(asked.elapsed())
}
