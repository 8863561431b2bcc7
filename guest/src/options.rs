//! The guest's command line, and the commands it takes while it runs.

use core::error::Error;
use core::fmt;

use crate::names::named;

/// vCPUs that the guest can use.
pub const MAX_CPUS: u32 = 64;

/// The guest's options. As text they are the words of its command line: `workload=dirty rate=1000 ...`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The work.
    pub workload: Workload,
    /// How many vCPUs to use (1 to [`MAX_CPUS`]); by default all that ACPI lists, or one.
    pub cpus: Option<u32>,
    /// Milliseconds between [heartbeats](crate::Line::Heartbeat); by default there are none.
    pub heartbeat_ms: Option<u32>,
    /// The TSC's frequency in kHz, not 0, where neither CPUID nor kvmclock has it.
    pub tsc_khz: Option<u32>,
    /// How to power off, where ACPI does not say.
    pub sleep_port: Option<PortValue>,
    /// How to reset, where ACPI does not say.
    pub reset_port: Option<PortValue>,
    /// The register in which the power button shows, and its bit, as no AML is read that says so. The
    /// guest looks at the register about ten times a second, and powers off when the bit is set.
    pub button_port: Option<PortValue>,
    /// The action after a workload that ends.
    pub then: After,
}

/// The work that the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workload {
    /// None: all vCPUs are halted.
    #[default]
    Idle,
    /// Looking at the clock, on all vCPUs, without end.
    Spin,
    /// Writing pages, each vCPU a part of the region of its own, without end.
    Dirty {
        /// MiB of memory to write to, in all, not 0; by default all that is free.
        region_mib: Option<u64>,
        /// Pages a second, in all, not 0; by default as fast as can be.
        rate: Option<u64>,
        /// The order of the pages.
        order: Order,
    },
    /// Writing each free page once, then checking them: [`Line::Touched`](crate::Line::Touched),
    /// [`Line::Verified`](crate::Line::Verified).
    Touch,
    /// Writing to a port so many times on each vCPU: [`Line::Exits`](crate::Line::Exits).
    Exits {
        /// The port.
        port: u16,
        /// Writes, on each vCPU.
        count: u64,
    },
    /// Counting with all vCPUs on one counter: [`Line::Smp`](crate::Line::Smp).
    Smp,
    /// Driving the first virtio device of each kind on the first PCI bus, on the first vCPU, without
    /// end: entropy, a disk (whose first MiB it writes over), a network interface that answers ARP
    /// and sends UDP datagrams back, a console that sends back what is typed, a watchdog that it pings,
    /// and a TPM that it asks for random numbers. The
    /// [command](Command::Io) `io` returns its progress.
    Io,
    /// Answering on vsock connections, on the first vCPU, without end. The guest listens at
    /// [`Workload::VSOCK_PORT`], and connects to that port of the host when it starts and after each event
    /// that connections are gone: [`Line::Vsock`](crate::Line::Vsock).
    Vsock,
    /// Starting every virtio device on the first PCI bus with all its queues, each with an interrupt of its
    /// own, and nothing more: [`Line::Queues`](crate::Line::Queues).
    Queues,
    /// Exceptions, floating point, interrupts and clocks: [`Line::SelfTest`](crate::Line::SelfTest).
    SelfTest,
    /// Attacking the host on the first vCPU, without end. Heartbeats count the rounds as writes.
    Attack(Attack),
    /// Crashing.
    Crash(Crash),
}

impl Workload {
    /// The port of [`Workload::Vsock`], on both sides.
    pub const VSOCK_PORT: u32 = 1024;
}

/// A port and a value to write to it, or to find in it: `PORT:VALUE` in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortValue {
    /// The port.
    pub port: u16,
    /// The byte.
    pub value: u8,
}

named! {
    /// The order in which pages are written.
    #[derive(Default)]
    pub enum Order {
        /// By address.
        #[default]
        Linear = "linear",
        /// Far from each other.
        Scattered = "scattered",
    }
}

named! {
    /// An action after the end of the workload.
    #[derive(Default)]
    pub enum After {
        /// Be idle, and take commands.
        #[default]
        Stay = "stay",
        /// Power off.
        PowerOff = "poweroff",
        /// Reset.
        Reset = "reset",
    }
}

named! {
    /// A way to crash.
    pub enum Crash {
        /// A fault without a handler for it, twice: KVM reports a shutdown.
        TripleFault = "triple-fault",
        /// An instruction that KVM would have to emulate and cannot.
        Emulation = "emulation",
        /// A read from nowhere in ring 3: the guest itself says so and stops.
        Fault = "fault",
        /// Reporting a panic to each pvpanic device, and stopping.
        Panic = "panic",
    }
}

named! {
    /// An attack on the VMM and on other guests.
    pub enum Attack {
        /// Ejecting all PCI slots through the hotplug block's port 0x628.
        Eject = "eject",
        /// Reading the serial port's FIFO while it is empty.
        SerialReads = "serial-reads",
        /// Starting all virtio devices with rings in no memory and resetting them.
        Status = "status",
        /// Moving BARs and resetting devices through their configuration space.
        Config = "config",
        /// Breaking a queue, then enabling it again while its device needs a reset.
        Requeue = "requeue",
        /// Chains of empty buffers in indirect tables as long as the queue, and longer.
        Chains = "chains",
        /// Discarding the whole disk with each request.
        Discards = "discards",
        /// Vsock connections to [`Attack::VSOCK_PORT`], a part of them reset at once.
        Vsock = "vsock",
    }
}

impl Attack {
    /// The host's port to which [`Attack::Vsock`] connects.
    pub const VSOCK_PORT: u32 = 7;
}

named! {
    /// A key of the command line.
    pub enum Key {
        /// [`Options::workload`]: `idle`, `spin`, `dirty`, `touch`, `exits`, `smp`, `io`, `vsock`,
        /// `queues`, `selftest`, `attack` or `crash`.
        Workload = "workload",
        /// [`Workload::Dirty`]'s `region_mib`.
        RegionMib = "region_mib",
        /// [`Workload::Dirty`]'s `rate`.
        Rate = "rate",
        /// [`Workload::Dirty`]'s `order`.
        Order = "order",
        /// [`Workload::Exits`]' `port`.
        Port = "port",
        /// [`Workload::Exits`]' `count`.
        Count = "count",
        /// The kind of [`Workload::Attack`].
        Attack = "attack",
        /// The kind of [`Workload::Crash`].
        Crash = "crash",
        /// [`Options::cpus`].
        Cpus = "cpus",
        /// [`Options::heartbeat_ms`].
        HeartbeatMs = "heartbeat_ms",
        /// [`Options::tsc_khz`].
        TscKhz = "tsc_khz",
        /// [`Options::sleep_port`].
        SleepPort = "sleep_port",
        /// [`Options::reset_port`].
        ResetPort = "reset_port",
        /// [`Options::button_port`].
        ButtonPort = "button_port",
        /// [`Options::then`].
        Then = "then",
    }
}

/// An option with an invalid value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionError(pub Key);

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the pocket guest's option {} has an invalid value",
            self.0
        )
    }
}

impl Error for OptionError {}

impl Options {
    /// Parses a command line. The last word of a repeated key counts. Words with unknown keys are
    /// ignored, since VMMs add words of their own.
    ///
    /// # Errors
    /// A known key has an invalid value.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut options = Self::default();
        let mut kind = "idle";
        let mut dirty = (None, None, Order::default());
        let (mut port, mut count, mut crash) = (0x80, 1000, Crash::TripleFault);
        let mut attack = Attack::Status;
        for word in text.split_ascii_whitespace() {
            let Some((name, value)) = word.split_once('=') else {
                continue;
            };
            let Some(key) = Key::parse(name) else {
                continue;
            };
            let wrong = OptionError(key);
            match key {
                Key::Workload => kind = value,
                Key::RegionMib => dirty.0 = Some(positive(value).ok_or(wrong)?),
                Key::Rate => dirty.1 = Some(positive(value).ok_or(wrong)?),
                Key::Order => dirty.2 = Order::parse(value).ok_or(wrong)?,
                Key::Port => port = fits(number(value)).ok_or(wrong)?,
                Key::Count => count = number(value).ok_or(wrong)?,
                Key::Attack => attack = Attack::parse(value).ok_or(wrong)?,
                Key::Crash => crash = Crash::parse(value).ok_or(wrong)?,
                Key::Cpus => {
                    let cpus = fits(positive(value)).filter(|cpus| *cpus <= MAX_CPUS);
                    options.cpus = Some(cpus.ok_or(wrong)?);
                }
                Key::HeartbeatMs => {
                    options.heartbeat_ms = Some(fits(positive(value)).ok_or(wrong)?);
                }
                Key::TscKhz => options.tsc_khz = Some(fits(positive(value)).ok_or(wrong)?),
                Key::SleepPort => options.sleep_port = Some(PortValue::parse(value).ok_or(wrong)?),
                Key::ResetPort => options.reset_port = Some(PortValue::parse(value).ok_or(wrong)?),
                Key::ButtonPort => {
                    options.button_port = Some(PortValue::parse(value).ok_or(wrong)?);
                }
                Key::Then => options.then = After::parse(value).ok_or(wrong)?,
            }
        }
        let (region_mib, rate, order) = dirty;
        options.workload = match kind {
            "idle" => Workload::Idle,
            "spin" => Workload::Spin,
            "dirty" => Workload::Dirty {
                region_mib,
                rate,
                order,
            },
            "touch" => Workload::Touch,
            "exits" => Workload::Exits { port, count },
            "smp" => Workload::Smp,
            "io" => Workload::Io,
            "vsock" => Workload::Vsock,
            "queues" => Workload::Queues,
            "selftest" => Workload::SelfTest,
            "attack" => Workload::Attack(attack),
            "crash" => Workload::Crash(crash),
            _ => return Err(OptionError(Key::Workload)),
        };
        Ok(options)
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.workload.fmt(f)?;
        word(f, Key::Cpus, self.cpus)?;
        word(f, Key::HeartbeatMs, self.heartbeat_ms)?;
        word(f, Key::TscKhz, self.tsc_khz)?;
        word(f, Key::SleepPort, self.sleep_port)?;
        word(f, Key::ResetPort, self.reset_port)?;
        word(f, Key::ButtonPort, self.button_port)?;
        let then = Some(self.then).filter(|then| *then != After::Stay);
        word(f, Key::Then, then)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=", Key::Workload)?;
        match self {
            Self::Idle => f.write_str("idle"),
            Self::Spin => f.write_str("spin"),
            Self::Dirty {
                region_mib,
                rate,
                order,
            } => {
                f.write_str("dirty")?;
                word(f, Key::RegionMib, *region_mib)?;
                word(f, Key::Rate, *rate)?;
                let order = Some(order).filter(|order| **order != Order::Linear);
                word(f, Key::Order, order)
            }
            Self::Touch => f.write_str("touch"),
            Self::Exits { port, count } => {
                f.write_str("exits")?;
                word(f, Key::Port, Some(format_args!("{port:#x}")))?;
                word(f, Key::Count, Some(count))
            }
            Self::Smp => f.write_str("smp"),
            Self::Io => f.write_str("io"),
            Self::Vsock => f.write_str("vsock"),
            Self::Queues => f.write_str("queues"),
            Self::SelfTest => f.write_str("selftest"),
            Self::Attack(attack) => {
                f.write_str("attack")?;
                word(f, Key::Attack, Some(attack))
            }
            Self::Crash(crash) => {
                f.write_str("crash")?;
                word(f, Key::Crash, Some(crash))
            }
        }
    }
}

fn word(f: &mut fmt::Formatter<'_>, key: Key, value: Option<impl fmt::Display>) -> fmt::Result {
    match value {
        Some(value) => write!(f, " {key}={value}"),
        None => Ok(()),
    }
}

impl PortValue {
    fn parse(text: &str) -> Option<Self> {
        let (port, value) = text.split_once(':')?;
        Some(Self {
            port: fits(number(port))?,
            value: fits(number(value))?,
        })
    }
}

impl fmt::Display for PortValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}:{:#x}", self.port, self.value)
    }
}

/// A number, decimal or `0x` and hexadecimal.
pub(crate) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn positive(text: &str) -> Option<u64> {
    number(text).filter(|number| *number > 0)
}

fn fits<T: TryFrom<u64>>(number: Option<u64>) -> Option<T> {
    number.and_then(|number| T::try_from(number).ok())
}

/// A command on the guest's serial port, one a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answer [`Line::Alive`](crate::Line::Alive).
    Ping,
    /// Answer [`Line::Report`](crate::Line::Report), and reset the largest gap.
    Report,
    /// Answer [`Line::Io`](crate::Line::Io).
    Io,
    /// Check all memory that was written: [`Line::Verified`](crate::Line::Verified).
    Verify,
    /// Power off.
    PowerOff,
    /// Reset.
    Reset,
    /// Crash.
    Crash(Crash),
}

impl Command {
    /// Reads a line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        match line.trim() {
            "ping" => Some(Self::Ping),
            "report" => Some(Self::Report),
            "io" => Some(Self::Io),
            "verify" => Some(Self::Verify),
            "poweroff" => Some(Self::PowerOff),
            "reset" | "reboot" => Some(Self::Reset),
            other => other
                .strip_prefix("crash=")
                .and_then(Crash::parse)
                .map(Self::Crash),
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ping => f.write_str("ping"),
            Self::Report => f.write_str("report"),
            Self::Io => f.write_str("io"),
            Self::Verify => f.write_str("verify"),
            Self::PowerOff => f.write_str("poweroff"),
            Self::Reset => f.write_str("reset"),
            Self::Crash(crash) => write!(f, "crash={crash}"),
        }
    }
}
