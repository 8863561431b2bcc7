//! The lines that the guest prints.

use core::fmt;

use crate::names::named;
use crate::options::{Key, OptionError, number};

/// The start of each line. Other programs may print on the same port.
const PREFIX: &str = "pocket: ";

/// A field of a line.
trait Field: Sized {
    fn parse(text: &str) -> Option<Self>;
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;
}

/// Declares [`Line`] with `parse` and `Display` from one table: a word, and the fields in order.
macro_rules! lines {
    ($($(#[$doc:meta])* $variant:ident = $word:literal {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    })+) => {
        /// A line of the guest. In text: `pocket: WORD FIELD=VALUE ...`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Line {
            $($(#[$doc])* $variant { $($(#[$field_doc])* $field: $type,)* },)+
        }

        impl Line {
            /// Reads a line, with or without its line end; nothing if the guest prints no such
            /// line.
            #[must_use]
            pub fn parse(line: &str) -> Option<Self> {
                let line = line.trim_end_matches(['\r', '\n']).strip_prefix(PREFIX)?;
                let mut words = line.split(' ');
                let line = match words.next()? {
                    $($word => Self::$variant {
                        $($field: Field::parse(
                            words.next()?.strip_prefix(concat!(stringify!($field), "="))?,
                        )?,)*
                    },)+
                    _ => return None,
                };
                words.next().is_none().then_some(line)
            }
        }

        impl fmt::Display for Line {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(PREFIX)?;
                match self {
                    $(Self::$variant { $($field,)* } => {
                        f.write_str($word)?;
                        $(f.write_str(concat!(" ", stringify!($field), "="))?;
                        Field::write($field, f)?;)*
                        Ok(())
                    })+
                }
            }
        }
    };
}

lines! {
    /// The first line.
    Hello = "hello" {
        /// vCPUs that it will use.
        cpus: u32,
        /// MiB of RAM, as the memory map says.
        ram_mib: u64,
        /// The TSC's frequency in kHz.
        tsc_khz: u64,
        /// The source of that frequency.
        tsc_from: TscSource,
    }
    /// All vCPUs are up, and the work begins.
    Ready = "ready" {
        /// vCPUs that came up.
        cpus: u32,
        /// MiB of RAM that work can use.
        free_mib: u64,
    }
    /// A sign of life, at a fixed interval.
    Heartbeat = "heartbeat" {
        /// Heartbeats so far, this one included.
        count: u64,
        /// Milliseconds since it started.
        uptime_ms: u64,
        /// Writes so far: of pages, or to the port, as the workload has it.
        writes: u64,
    }
    /// The answer to `ping`.
    Alive = "alive" {
        /// Milliseconds since it started.
        uptime_ms: u64,
    }
    /// The answer to `report`: gaps since the last one.
    Report = "report" {
        /// Milliseconds since it started.
        uptime_ms: u64,
        /// Writes so far: of pages, or to the port, as the workload has it.
        writes: u64,
        /// The largest gap in TSC time that a vCPU saw, in microseconds.
        gap_us: u64,
        /// The vCPU that saw it.
        gap_cpu: u32,
        /// The largest gap in kvmclock's time, in microseconds; 0 without kvmclock.
        clock_gap_us: u64,
        /// Interrupts taken so far.
        interrupts: u64,
        /// NMIs taken so far.
        nmis: u64,
    }
    /// The memory that was written has been checked.
    Verified = "verified" {
        /// Pages that were checked.
        pages: u64,
        /// Those that were not as they were written.
        bad: u64,
        /// The lowest of these.
        first_bad: Option<Address>,
    }
    /// Each free page was written once.
    Touched = "touched" {
        /// Pages written.
        pages: u64,
        /// Microseconds that it took.
        elapsed_us: u64,
    }
    /// The port was written to.
    Exits = "exits" {
        /// Writes in all.
        count: u64,
        /// Microseconds that they took, until the last vCPU was done.
        elapsed_us: u64,
    }
    /// The vCPUs have counted together.
    Smp = "smp" {
        /// vCPUs that took part.
        cpus: u32,
        /// The counter's final value.
        count: u64,
        /// The expected final value.
        expected: u64,
    }
    /// The answer to `io`: how far [`Workload::Io`](crate::Workload::Io) is.
    Io = "io" {
        /// Devices that were found on the bus.
        devices: u64,
        /// Bytes of entropy.
        random: u64,
        /// Pages that were written to the disk, and read back as they were written.
        blocks: u64,
        /// Frames that were answered.
        frames: u64,
        /// Characters that came by the console and were sent back.
        chars: u64,
        /// Bytes of random numbers from the TPM.
        tpm: u64,
        /// Checks that failed.
        bad: u64,
    }
    /// The answer on a vsock connection, whatever was sent there.
    Vsock = "vsock" {
        /// CID, as the device's configuration space has it now.
        cid: u64,
        /// MAC address of the first network interface, as its configuration space has it now; or 0.
        mac: Address,
        /// Connections that are open.
        connections: u64,
        /// Events that all connections are gone.
        resets: u64,
        /// Connections that such events ended.
        lost: u64,
    }
    /// All virtio devices have been started.
    Queues = "queues" {
        /// Devices.
        devices: u64,
        /// Queues, of all together.
        queues: u64,
    }
    /// The self-test has run.
    SelfTest = "selftest" {
        /// The checks that failed.
        failed: FailedChecks,
    }
    /// A non-maskable interrupt came.
    Nmi = "nmi" {
        /// NMIs so far, on all vCPUs.
        count: u64,
    }
    /// An exception that was not expected. The vCPU halts.
    Fault = "fault" {
        /// The vCPU.
        cpu: u32,
        /// The exception's vector.
        vector: u64,
        /// Its error code, or 0.
        code: Address,
        /// The instruction's address.
        rip: Address,
        /// CR2: for a page fault, which address was touched.
        address: Address,
    }
    /// The guest has found a fault in itself. The vCPU halts.
    Panic = "panic" {
        /// The vCPU.
        cpu: u32,
        /// The line of its source.
        line: u32,
    }
    /// The guest refuses an option or a command.
    Refused = "refused" {
        /// The refused item, and the reason.
        what: CommandError,
    }
    /// The guest still runs after the instruction that should have ended it.
    Survived = "survived" {
        /// The way in which it should have ended.
        by: Parting,
    }
    /// The last line before the guest ends.
    Bye = "bye" {
        /// The way in which it ends.
        by: Parting,
    }
}

named! {
    /// The source of the TSC's frequency.
    pub enum TscSource {
        /// [`Options::tsc_khz`](crate::Options::tsc_khz).
        Option = "option",
        /// CPUID leaf 15H.
        CpuidTsc = "cpuid-15",
        /// CPUID leaf 4000_0010H.
        CpuidHypervisor = "cpuid-40000010",
        /// The parameters of kvmclock.
        KvmClock = "kvmclock",
        /// None: 1 GHz is assumed.
        Assumed = "assumed",
    }
}

named! {
    /// How the guest ends.
    pub enum Parting {
        /// Power off.
        PowerOff = "poweroff",
        /// Reset.
        Reset = "reset",
        /// A crash that was asked for.
        Crash = "crash",
    }
}

named! {
    /// A check of the self-test.
    pub enum Check {
        /// A page fault is delivered with the right error code and CR2.
        PageFault = "page-fault",
        /// A general protection fault is delivered.
        GeneralProtection = "general-protection",
        /// An invalid opcode exception is delivered.
        InvalidOpcode = "invalid-opcode",
        /// Floating-point results are right, also across interrupts.
        FloatingPoint = "floating-point",
        /// The local APIC's timer interrupts a halted vCPU.
        Interrupts = "interrupts",
        /// The TSC and kvmclock advance at the same rate.
        Clocks = "clocks",
    }
}

/// Checks of the self-test that failed: `none`, or names with commas between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FailedChecks(u32);

impl FailedChecks {
    /// Adds one.
    pub fn insert(&mut self, check: Check) {
        self.0 |= 1 << check as u32;
    }

    /// Whether this one failed.
    #[must_use]
    pub fn contains(self, check: Check) -> bool {
        self.0 & 1 << check as u32 != 0
    }

    /// Whether none failed.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl Field for FailedChecks {
    fn parse(text: &str) -> Option<Self> {
        let mut failed = Self::default();
        if text != "none" {
            for name in text.split(',') {
                failed.insert(Check::parse(name)?);
            }
        }
        Some(failed)
    }

    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for check in Check::ALL.iter().filter(|check| self.contains(**check)) {
            write!(f, "{separator}{check}")?;
            separator = ",";
        }
        f.write_str(if self.is_empty() { "none" } else { "" })
    }
}

/// The reason for which the guest refuses an option or a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// An option's value is invalid. The guest uses its defaults.
    Option(Key),
    /// There is less free memory than the workload asks for, in MiB.
    Memory(u64),
    /// This vCPU (its local APIC's id) did not come up.
    Cpu(u32),
    /// There is no such command.
    Command,
    /// Neither ACPI nor an option names a way to power off.
    PowerOff,
    /// Neither ACPI nor an option names a way to reset.
    Reset,
}

impl From<OptionError> for CommandError {
    fn from(OptionError(key): OptionError) -> Self {
        Self::Option(key)
    }
}

impl Field for CommandError {
    fn parse(text: &str) -> Option<Self> {
        let (kind, detail) = text.split_once(':').unwrap_or((text, ""));
        match (kind, detail) {
            ("option", key) => Key::parse(key).map(Self::Option),
            ("memory", mib) => number(mib).map(Self::Memory),
            ("cpu", id) => u32::try_from(number(id)?).ok().map(Self::Cpu),
            ("command", "") => Some(Self::Command),
            ("poweroff", "") => Some(Self::PowerOff),
            ("reset", "") => Some(Self::Reset),
            _ => None,
        }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option(key) => write!(f, "option:{key}"),
            Self::Memory(mib) => write!(f, "memory:{mib}"),
            Self::Cpu(id) => write!(f, "cpu:{id}"),
            Self::Command => f.write_str("command"),
            Self::PowerOff => f.write_str("poweroff"),
            Self::Reset => f.write_str("reset"),
        }
    }
}

/// An address, or another number that is printed in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(pub u64);

impl Field for Address {
    fn parse(text: &str) -> Option<Self> {
        number(text).map(Self)
    }

    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl<T: Field> Field for Option<T> {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "none" => Some(None),
            some => T::parse(some).map(Some),
        }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Some(value) => value.write(f),
            None => f.write_str("none"),
        }
    }
}

/// Implements [`Field`] with `Display` and a parse function.
macro_rules! plain_field {
    ($($type:ty = $parse:expr,)+) => {$(
        impl Field for $type {
            fn parse(text: &str) -> Option<Self> {
                $parse(text)
            }

            fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )+};
}

plain_field! {
    u64 = number,
    u32 = |text| u32::try_from(number(text)?).ok(),
    TscSource = TscSource::parse,
    Parting = Parting::parse,
}
