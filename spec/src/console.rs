//! Serial port and consoles.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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

/// A port to which firmware writes its log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DebugConsoleConfig {
    /// Path, with mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The host's end.
    pub mode: ConsoleMode,
    /// The port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}
