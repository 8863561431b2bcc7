//! A program with Cloud Hypervisor's command line and API, ours or another, for benchmarks.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use openapi::Client;

/// A program with one VM. Killed when dropped.
#[derive(Debug)]
pub struct Program(Child);

impl Program {
    /// Starts a program with its API's socket in `dir`, and waits until it answers.
    ///
    /// # Errors
    /// When it cannot be started, or does not answer within 10 s.
    pub async fn start(program: &Path, dir: &Path) -> Result<(Self, Client)> {
        let socket = dir.join("api.sock");
        let child = Command::new(program)
            .arg("--api-socket")
            .arg(&socket)
            .stderr(Stdio::null())
            .spawn()?;
        let (process, client) = (Self(child), Client::unix(&socket));
        let start = Instant::now();
        while client.ping().await.is_err() {
            if start.elapsed() > Duration::from_secs(10) {
                bail!("{} does not answer", program.display());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok((process, client))
    }

    /// Returns its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the KiB of a process, shared ones by their share: all, and those of guests that have
/// `memory` bytes of RAM each.
///
/// # Errors
/// When it has ended.
pub fn pss(pid: u32, memory: u64) -> Result<(u64, u64)> {
    let (beyond, ram) = mapped(pid, memory)?;
    Ok((beyond.pss + ram.pss, ram.pss))
}

/// Returns what a process has mapped beyond the RAM of guests with `memory` bytes each.
///
/// # Errors
/// When it has ended.
pub fn beyond_ram(pid: u32, memory: u64) -> Result<Mapped> {
    Ok(mapped(pid, memory)?.0)
}

/// Pages that a process has mapped, in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mapped {
    /// All, shared ones by their share.
    pub pss: u64,
    /// Those that no other process has and no file: what the process alone costs, however many run.
    pub own: u64,
}

fn mapped(pid: u32, memory: u64) -> Result<(Mapped, Mapped)> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut beyond, mut ram, mut is_ram) = (Mapped::default(), Mapped::default(), false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or("");
        let value = words.next().and_then(|value| value.parse::<u64>().ok());
        let of = if is_ram { &mut ram } else { &mut beyond };
        match (name, value) {
            ("Size:", Some(kib)) => is_ram = kib == memory >> 10,
            ("Pss:", Some(kib)) => of.pss += kib,
            // Also pages of a file whose content the host has not written to storage yet: those of a
            // program that was built a moment ago. Such a mapping has none of `Anonymous`.
            ("Anonymous:", Some(kib)) => of.own += kib,
            _ => {}
        }
    }
    Ok((beyond, ram))
}
