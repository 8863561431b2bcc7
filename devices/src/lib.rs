//! The platform's devices, and what all devices share: interrupts, PCI configuration space.
//!
//! A device answers accesses through [`memory::DeviceOps`], raises an [`InterruptLine`], and
//! tells its owner about what concerns the whole machine through a [`PowerEvents`]. It knows
//! neither KVM nor virtio, so its tests need neither.
//!
//! | device | where on x86 | what for |
//! |---|---|---|
//! | [`Serial`] | ports 0x3f8-0x3ff | 16550, the guest's console; its other end is a [`Console`] |
//! | [`PowerBlock`] | ports 0x600-0x607 | ACPI sleep, reset, and generic events (power button) |
//! | [`HotplugBlock`] | ports 0x620-0x62b | ACPI hotplug of PCI devices |
//! | [`CpuBlock`] | ports 0x640-0x66b | ACPI hotplug of vCPUs |
//! | [`DimmBlock`] | ports 0x670-0x6f7 | ACPI hotplug of memory |
//! | [`KeyboardReset`] | port 0x64 | the reset line of a PC's keyboard controller, and no more |
//! | [`ResetControl`] | port 0xcf9 | the chipset's reset control register, amid PCI's ports |
//! | [`DebugPort`] | port 0x80 | progress codes of firmware; tells when the first one came |
//! | [`DebugConsole`] | port 0xe9, or another | text of firmware and kernels that boot |
//! | [`Rtc`] | ports 0x70, 0x71 | clock and battery-backed memory, for firmware |
//! | [`PmTimer`] | port 0x608 | the ACPI timer, for firmware |
//! | [`pvpanic()`] | a PCI function | a guest reports that its kernel panicked |
//! | [`tpm::Tpm`] | 0xfed40000 | a TPM 2.0, which `swtpm` emulates |
//! | [`pci::Bus`] | ECAM, ports 0xcf8-0xcff | configuration space of PCI devices |
//!
//! ```
//! use devices::{PowerBlock, PowerEvent, power};
//! use memory::DeviceOps;
//! use std::sync::{Arc, Mutex};
//! let seen = Arc::new(Mutex::new(Vec::new()));
//! let (line, events) = (devices::InterruptLine::new()?, Arc::clone(&seen));
//! let block = PowerBlock::new(line, move |event| events.lock().unwrap().push(event));
//! block.write(power::SLEEP_CONTROL, &[power::SLEEP_ENABLE | power::S5 << 2]);
//! assert_eq!(*seen.lock().unwrap(), [PowerEvent::PowerOff]);
//! # Ok::<(), std::io::Error>(())
//! ```

#![forbid(unsafe_code)]

mod client;
mod console;
pub mod cpus;
mod debug_console;
mod debug_port;
pub mod dimms;
pub mod event_loop;
pub mod host_file;
pub mod hotplug;
mod interrupt;
pub mod pci;
pub mod pm_timer;
pub mod power;
mod pvpanic;
mod reset;
pub mod rtc;
pub mod sandbox;
mod serial;
pub mod tpm;
mod unix;

pub use console::{Console, ConsoleError, ConsoleInput, Watch, flush_terminal, on_terminal_escape};
pub use cpus::CpuBlock;
pub use debug_console::DebugConsole;
pub use debug_port::DebugPort;
pub use dimms::DimmBlock;
pub use hotplug::HotplugBlock;
pub use interrupt::InterruptLine;
pub use pm_timer::PmTimer;
pub use power::{PowerBlock, PowerEvent, PowerEvents};
pub use pvpanic::{BAR_LEN as PVPANIC_BAR_LEN, PanicEvent, PvpanicError, pvpanic};
pub use reset::{KeyboardReset, ResetControl};
pub use rtc::Rtc;
pub use serial::Serial;
pub use unix::Listening;
