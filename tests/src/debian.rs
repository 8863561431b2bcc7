//! The Debian guest without a disk that `ci/debian-guest` makes.

use std::env;

use anyhow::{Context as _, Result};
use spec::{ConsoleConfig, ConsoleMode, CpusConfig, PayloadConfig, SerialConfig, VmConfig};

use crate::Serial;

/// The last line of a guest that has booted.
pub const BUTTON: &str = "guest: waiting for the power button";

/// A configuration of this guest, with neither disks nor a console, whose serial port is this file.
///
/// # Errors
/// When `WHIMBREL_DEBIAN_GUEST` does not name the guest's folder.
pub fn config(cpus: CpusConfig, memory: u64, serial: &Serial) -> Result<VmConfig> {
    let guest = env::var("WHIMBREL_DEBIAN_GUEST")
        .context("WHIMBREL_DEBIAN_GUEST names the folder that ci/debian-guest made")?;
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(format!("{guest}/vmlinuz")),
        initramfs: Some(format!("{guest}/initramfs")),
        cmdline: Some("console=ttyS0 panic=-1".to_owned()),
        ..PayloadConfig::default()
    });
    config.cpus = cpus;
    config.memory.size = memory;
    config.serial = SerialConfig {
        file: Some(serial.path().to_string_lossy().into_owned()),
        socket: None,
        mode: ConsoleMode::File,
    };
    config.console = ConsoleConfig::with_mode(ConsoleMode::Off);
    Ok(config)
}
