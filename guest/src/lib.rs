//! The pocket guest: a tiny test kernel that boots on any KVM in milliseconds.
//!
//! [`IMAGE`] is an ELF kernel with a PVH entry point, built from `kernel/` by this crate's build
//! script with nothing but the compiler that builds the rest. Give it to any VMM that boots
//! kernels through PVH, with a command line from [`Options`], and it writes [`Line`]s to its
//! first serial port and takes [`Command`]s there.
//!
//! ```text
//!   host                                        guest
//!   Options ── Display ──► command line ── parse ──► Options ─► workload
//!   Line    ◄── parse ──── COM1 (0x3f8) ◄─ Display ── Line
//!   Command ── Display ──► COM1 ────────── parse ──► Command
//! ```
//!
//! Both sides compile the same vocabulary (`options.rs`, `line.rs`, `pattern.rs`), so neither can
//! say what the other does not understand.
//!
//! # How it runs anywhere
//! Some hosts run a guest's ring 0 through KVM's instruction emulator. So ring 0 is only a stub of
//! plain instructions: it enters long mode and goes down to ring 3 with I/O privilege level 3.
//! There all work is done, page tables, ports, APICs and memory included. What only ring 0
//! can do (halt, MSRs, CPUID as the VMM set it) is asked for with `ud2` at one known address.
//! An idle vCPU is halted, and there is no periodic tick: a sleep arms the local APIC's timer.
//!
//! # What a VMM must give it
//! - The PVH entry (`hvm_start_info`), RAM at 2 MiB, and an xAPIC. Memory up to 512 GiB is used.
//! - A 16550 at 0x3f8. Its interrupt (pin 4 of the I/O APIC) makes input prompt; without it input
//!   is looked at ten times a second.
//! - ACPI tables, if it is to find by itself how to power off ([`Options::sleep_port`] otherwise),
//!   how to reset ([`Options::reset_port`]), and which vCPUs there are ([`Options::cpus`]). It
//!   has no AML interpreter and so takes no power button.
//!
//! The very first instructions write [`FIRST_INSTRUCTION_VALUE`] to [`FIRST_INSTRUCTION_PORT`].
//!
//! # Time
//! Time is the TSC's. Its frequency is [`Options::tsc_khz`], else CPUID leaf 15H, else CPUID leaf
//! 4000_0010H, else kvmclock's parameters, else 1 GHz is assumed; [`Line::Hello`] names the
//! source ([`TscSource`]).
//! A *gap* is time that passed between two looks at the clock of a vCPU that did not sleep, or
//! that passed after a sleep should have ended. A stop that is over before a sleep ends is not
//! seen, so measure stops with [`Workload::Spin`] or [`Workload::Dirty`].
//!
//! ```
//! use guest::{Line, Options, Order, Workload};
//!
//! let dirty = Workload::Dirty { region_mib: Some(64), rate: Some(10_000), order: Order::Linear };
//! let cmdline = Options { workload: dirty, cpus: Some(2), ..Options::default() }.to_string();
//! assert_eq!(cmdline, "workload=dirty region_mib=64 rate=10000 cpus=2");
//! assert_eq!(
//!     Line::parse("pocket: verified pages=16384 bad=0 first_bad=none"),
//!     Some(Line::Verified { pages: 16384, bad: 0, first_bad: None }),
//! );
//! assert!(guest::IMAGE.starts_with(b"\x7fELF"));
//! ```

#![forbid(unsafe_code)]

mod disk;
mod line;
mod names;
mod options;
pub mod pattern;

pub use disk::check_disk;
pub use line::{Address, Check, CommandError, FailedChecks, Line, Parting, TscSource};
pub use options::{
    After, Attack, Command, Crash, Key, MAX_CPUS, OptionError, Options, Order, PortValue, Workload,
};
pub use pattern::DISK_PAGES;

/// The kernel: an ELF file for x86-64 with a PVH note, linked at 2 MiB.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pocket.elf"));

/// The port that the guest's first instructions write to, before anything else.
pub const FIRST_INSTRUCTION_PORT: u16 = 0x80;

/// The byte that they write there.
pub const FIRST_INSTRUCTION_VALUE: u8 = 0x57;
