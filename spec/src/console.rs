//! Serial port and consoles.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits;
use crate::service::FieldProblem;
use crate::validate::{UNSUPPORTED, problem};
use crate::vm::VmConfig;

/// The host's end of a console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum ConsoleMode {
    /// There is no such device.
    Off,
    /// A new pseudo terminal; `file` shows its path once the VM has booted.
    Pty,
    /// The terminal (or standard input and output) of this program.
    Tty,
    /// Output is written to `file`.
    File,
    /// A unix socket at `socket`, on which one client at a time is served.
    Socket,
    /// Output is discarded.
    Null,
}

/// The serial port COM1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// Path, with mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Path, with mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// The host's end.
    pub mode: ConsoleMode,
}

impl SerialConfig {
    /// Returns a configuration of this mode, without a path.
    #[must_use]
    pub fn with_mode(mode: ConsoleMode) -> Self {
        Self {
            file: None,
            socket: None,
            mode,
        }
    }
}

/// `Null`.
impl Default for SerialConfig {
    fn default() -> Self {
        Self::with_mode(ConsoleMode::Null)
    }
}

/// The virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Path, with mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Path, with mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// The host's end.
    pub mode: ConsoleMode,
    /// Put it behind a virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Device id; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment to put it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// PCI device number to give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl ConsoleConfig {
    /// Returns a configuration of this mode, without a path.
    #[must_use]
    pub fn with_mode(mode: ConsoleMode) -> Self {
        Self {
            file: None,
            socket: None,
            mode,
            iommu: false,
            id: None,
            pci_segment: None,
            pci_device_id: None,
        }
    }
}

/// `Tty`.
impl Default for ConsoleConfig {
    fn default() -> Self {
        Self::with_mode(ConsoleMode::Tty)
    }
}

/// A port to which firmware, and the kernel that boots, can write text (QEMU's `isa-debugcon`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DebugConsoleConfig {
    /// Path, with mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The host's end. `Socket` is refused.
    pub mode: ConsoleMode,
    /// The port; 0xe9 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}

impl DebugConsoleConfig {
    /// The port where nothing else is said: that of Bochs, QEMU and Cloud Hypervisor.
    const DEFAULT_PORT: u16 = 0xe9;

    /// Returns the I/O port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.iobase.unwrap_or(Self::DEFAULT_PORT)
    }

    pub(crate) fn check(&self, found: &mut Vec<FieldProblem>) {
        if self.mode == ConsoleMode::Socket {
            let detail = "the debug console has no input and no mode Socket; use Pty or File";
            found.push(problem("/debug_console/mode", UNSUPPORTED, detail.into()));
        }
        let port = self.port();
        let is_taken = |(first, last): &(u16, u16)| (*first..=*last).contains(&port);
        if let Some((first, last)) = limits::PLATFORM_PORTS.iter().find(|range| is_taken(range)) {
            let detail = format!(
                "`iobase` ({port:#x}) is a port of the machine itself, which has {first:#x} to {last:#x}"
            );
            found.push(problem("/debug_console/iobase", "out-of-range", detail));
        }
    }
}

/// The host's end of a serial port or console, as a configuration has it.
#[derive(Clone, Copy, Debug)]
pub struct ConsoleEnd<'a> {
    /// The field of the configuration.
    pub name: &'static str,
    /// The host's end; `Off` where the VM has no such device.
    pub mode: ConsoleMode,
    /// Path, with mode `File`.
    pub file: Option<&'a String>,
    /// Path, with mode `Socket`.
    pub socket: Option<&'a String>,
}

impl VmConfig {
    /// Returns the serial port, the virtio console and the debug console.
    #[must_use]
    pub fn console_ends(&self) -> [ConsoleEnd<'_>; 3] {
        let (serial, console) = (&self.serial, &self.console);
        let debug = self.debug_console.as_ref();
        let end = |name, mode, file, socket| ConsoleEnd {
            name,
            mode,
            file,
            socket,
        };
        [
            end(
                "serial",
                serial.mode,
                serial.file.as_ref(),
                serial.socket.as_ref(),
            ),
            end(
                "console",
                console.mode,
                console.file.as_ref(),
                console.socket.as_ref(),
            ),
            end(
                "debug_console",
                debug.map_or(ConsoleMode::Off, |debug| debug.mode),
                debug.and_then(|debug| debug.file.as_ref()),
                None,
            ),
        ]
    }

    /// Removes the paths of pseudo terminals, which a VM's driver has filled in.
    pub fn forget_terminals(&mut self) {
        let debug = self.debug_console.as_mut();
        let ends = [
            (self.serial.mode, &mut self.serial.file),
            (self.console.mode, &mut self.console.file),
        ];
        let debug = debug.map(|debug| (debug.mode, &mut debug.file));
        for (mode, file) in ends.into_iter().chain(debug) {
            if mode == ConsoleMode::Pty {
                *file = None;
            }
        }
    }
}
