//! Errors of building, saving and loading a machine, and the failures that a VM's status shows.

use control::{Category, RequestError};
use devices::ConsoleError;
use devices::PvpanicError;
use devices::pci::{BarError, BusError};
use devices::tpm::{NewTpmError, TpmError};
use hypervisor::{KvmError, RunFailure, StateError, Vcpu};
use memory::{CommitError, RamError, TopologyError};
use rustix::io::Errno;
use spec::Failure;
use state::{InvalidPath, LoadError, OpenError, SaveError};
use virtio_devices::block::ImageError;
use virtio_devices::net::TapError;
use virtio_devices::rng::RngError;
use virtio_devices::vsock::VsockError;
use virtio_devices::{DeviceError, VirtioPciError};

use crate::arch::x86_64::cpu::CpuError;
use crate::arch::x86_64::layout::LayoutError;
use crate::arch::x86_64::profiles::ProfileError;
use crate::boot::BootError;
use crate::descriptors::TooFewDescriptors;
use crate::paths::PathError;

/// A machine cannot be built.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum BuildError {
    /// Its payload cannot be booted.
    Boot(#[from] BootError),
    /// Its serial port or one of its consoles cannot be made.
    Console(#[from] PortError),
    /// Its configuration names a file twice.
    Path(#[from] PathError),
    /// The process may not open as many files as the VM needs.
    Descriptors(#[from] TooFewDescriptors),
    /// KVM refuses something.
    Kvm(#[from] KvmError),
    /// The host has no memory for it.
    Ram(#[from] RamError),
    /// The host has no memory for one of its zones.
    #[error("memory zone `{zone}`")]
    Zone {
        /// The zone.
        zone: String,
        /// The host's answer.
        source: RamError,
    },
    /// Its map cannot be.
    Topology(#[from] TopologyError),
    /// Its map cannot be put in force.
    Commit(#[from] CommitError),
    /// A device cannot be put on the bus.
    Bus(#[from] BusError),
    /// A device is in a PCI segment that the machine does not have.
    #[error("the machine has no PCI segment {0}")]
    NoSegment(u16),
    /// A device's registers do not fit where they belong.
    Bar(#[from] BarError),
    /// A device cannot be made.
    Device(#[from] VirtioPciError),
    /// There is no entropy.
    Rng(#[from] RngError),
    /// A network interface's tap cannot be used.
    Tap(#[from] TapError),
    /// A disk's image cannot be used.
    Image(#[from] ImageError),
    /// The TPM's emulator cannot be used.
    Tpm(#[from] NewTpmError),
    /// A vsock device's socket cannot be made.
    Vsock(#[from] VsockError),
    /// The machine does not start.
    Move(#[from] MoveError),
    /// The host's CPU lacks what the guest is to see.
    Profile(#[from] ProfileError),
    /// The host's kernel lacks something that the configuration asks for.
    #[error("{detail}")]
    Lacking {
        /// Stable code.
        code: &'static str,
        /// The message, which names what the host lacks.
        detail: String,
    },
    /// The memory layout is not possible.
    #[error("{0}")]
    Layout(String),
    /// The host has no threads or descriptors for it.
    #[error("the host refused to {attempt}: {source}")]
    Host {
        /// The attempted operation.
        attempt: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// The host's end of a serial port or console cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the {port}'s {source}")]
pub struct PortError {
    port: &'static str,
    source: ConsoleError,
}

impl PortError {
    /// Adds the name of the field to an error: `serial`, `console` or `debug_console`.
    pub(crate) fn of(field: &str) -> impl FnOnce(ConsoleError) -> Self + use<> {
        let port = match field {
            "serial" => "serial port",
            "debug_console" => "debug console",
            _ => "console",
        };
        move |source| Self { port, source }
    }
}

/// A machine's state cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum MoveError {
    /// A KVM ioctl failed.
    Kvm(#[from] KvmError),
    /// The saved state of a vCPU or of the VM is inconsistent.
    State(#[from] StateError),
    /// A vCPU that the guest has cannot be made.
    #[error("{0}")]
    Cpu(String),
    /// A section of saved state cannot be written.
    Save(#[from] SaveError),
    /// A section does not fit this machine.
    Load(#[from] LoadError),
    /// The saved state is not readable as a whole.
    Open(#[from] OpenError),
    /// A device's name cannot name a section.
    Name(#[from] InvalidPath),
    /// The memory map cannot be committed.
    Commit(#[from] CommitError),
    /// A device cannot release or acquire its host resources.
    Device(#[from] DeviceError),
    /// A vCPU did not leave `KVM_RUN` in time.
    #[error("{0}")]
    NotParked(String),
    /// The host cannot give the guest's memory any more.
    #[error("the host lost memory of the guest at offset {0:#x} of its RAM")]
    MemoryLost(u64),
    /// The host cannot give the guest the memory that it had.
    #[error("{0}")]
    Memory(String),
    /// A vCPU thread has ended.
    #[error("a vCPU thread has ended")]
    VcpuGone,
}

impl From<LayoutError> for BuildError {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error.to_string())
    }
}

impl From<CpuError> for BuildError {
    fn from(error: CpuError) -> Self {
        match error {
            CpuError::Kvm(error) => Self::Kvm(error),
            CpuError::Memory(error) => Self::Boot(BootError::Memory(error)),
            CpuError::Thread(source) => Self::host("start a vCPU thread")(source),
            CpuError::Reset(error) => Self::Move(error.into()),
            CpuError::TooManyLeaves(_) | CpuError::NoApicId(_) | CpuError::ThreadFailed(_) => {
                Self::Layout(error.to_string())
            }
        }
    }
}

impl From<CpuError> for MoveError {
    fn from(error: CpuError) -> Self {
        match error {
            CpuError::Kvm(error) => Self::Kvm(error),
            CpuError::Reset(error) => Self::State(error),
            other => Self::Cpu(other.to_string()),
        }
    }
}

impl From<TpmError> for BuildError {
    fn from(error: TpmError) -> Self {
        Self::Tpm(error.into())
    }
}

impl From<PvpanicError> for BuildError {
    fn from(error: PvpanicError) -> Self {
        match error {
            PvpanicError::Region(error) => error.into(),
            PvpanicError::Bar(error) => error.into(),
        }
    }
}

impl BuildError {
    pub(crate) fn host(attempt: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { attempt, source }
    }

    /// The host's kernel lacks something, as `what` says.
    pub(crate) fn lacking(code: &'static str, what: &impl std::error::Error) -> Self {
        Self::Lacking {
            code,
            detail: what.to_string(),
        }
    }

    /// Stable code, for programs.
    fn code(&self) -> &'static str {
        match self {
            Self::Boot(BootError::InitramfsTooLarge { .. }) => "initramfs-too-large",
            Self::Boot(BootError::NotAKernel { .. }) => "not-a-kernel",
            Self::Boot(
                BootError::Unreadable { what, .. }
                | BootError::NotAFile { what, .. }
                | BootError::Empty { what, .. },
            ) => match *what {
                "initramfs" => "initramfs-unreadable",
                _ => "kernel-unreadable",
            },
            Self::Boot(_) => "payload-unusable",
            Self::Console(PortError {
                source: ConsoleError::Locked(_),
                ..
            })
            | Self::Path(_) => "file-in-use",
            Self::Console(_) => "console-unusable",
            Self::Descriptors(_) => "too-few-descriptors",
            Self::Kvm(_) => "kvm-refused",
            Self::Zone {
                source: RamError::NoSuchNode { .. },
                ..
            } => "no-such-numa-node",
            Self::Ram(_) | Self::Zone { .. } => "no-memory",
            Self::Topology(_) | Self::Commit(_) | Self::Layout(_) => "memory-map-impossible",
            Self::Profile(_) => "cpu-lacks-features",
            Self::Lacking { code, .. } => code,
            Self::Bus(_) | Self::Bar(_) | Self::NoSegment(_) => "no-free-slot",
            Self::Device(_) => "device-impossible",
            Self::Rng(_) => "rng-unusable",
            Self::Tap(_) => "tap-unusable",
            Self::Image(ImageError::Lock(_)) => "disk-in-use",
            Self::Image(ImageError::Frozen { .. }) => "image-frozen",
            Self::Image(ImageError::Incomplete { .. }) => "disk-incomplete",
            Self::Image(_) => "disk-unusable",
            Self::Vsock(_) => "vsock-unusable",
            Self::Tpm(_) => "tpm-unusable",
            Self::Move(MoveError::MemoryLost(_)) => "memory-lost",
            Self::Move(_) => "cannot-go-on",
            Self::Host { .. } => "host-refused",
        }
    }

    fn category(&self) -> Category {
        match self {
            Self::Zone {
                source: RamError::NoSuchNode { .. },
                ..
            }
            | Self::Boot(_)
            | Self::Console(_)
            | Self::Path(_)
            | Self::Layout(_)
            | Self::Profile(_)
            | Self::Lacking { .. }
            | Self::Bus(_)
            | Self::Bar(_)
            | Self::NoSegment(_)
            | Self::Rng(_)
            | Self::Tap(_)
            | Self::Vsock(_)
            | Self::Tpm(_)
            | Self::Image(_) => Category::Unprocessable,
            Self::Descriptors(_)
            | Self::Ram(_)
            | Self::Zone { .. }
            | Self::Host { .. }
            | Self::Move(MoveError::MemoryLost(_)) => Category::Host,
            Self::Kvm(_)
            | Self::Topology(_)
            | Self::Commit(_)
            | Self::Device(_)
            | Self::Move(_) => Category::Internal,
        }
    }

    /// With the causes behind it, in one line.
    fn detail(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        text
    }
}

impl From<&BuildError> for RequestError {
    fn from(error: &BuildError) -> Self {
        Self::new(error.category(), error.code(), error.detail())
    }
}

/// Why a guest ended, as the API tells it.
pub(crate) fn told(error: &BuildError) -> Failure {
    Failure {
        code: error.code().to_owned(),
        detail: error.detail(),
        vcpu: None,
    }
}

/// The instruction pointer of an x86 CPU after a reset.
const RESET_RIP: u64 = 0xfff0;
const RESET_CS_BASE: u64 = 0xffff_0000;

/// Describes a triple fault, an exception that the guest could not even deliver, with the registers of its vCPU.
pub(crate) fn triple_fault(vcpu: &Vcpu) -> Failure {
    let index = vcpu.index();
    let registers = match (vcpu.regs(), vcpu.sregs()) {
        (Ok(regs), Ok(sregs)) => {
            let mut text = format!(
                "RIP {:#x}, RSP {:#x}, CR2 {:#x}, CR3 {:#x}",
                regs.rip, regs.rsp, sregs.cr2, sregs.cr3
            );
            // On AMD a shutdown leaves the VMCB undefined, and KVM resets the vCPU before it reports one.
            if regs.rip == RESET_RIP && sregs.cs.base == RESET_CS_BASE {
                text += " (after a reset by KVM: the guest's position is lost)";
            }
            text
        }
        (Err(error), _) | (_, Err(error)) => error.to_string(),
    };
    Failure {
        code: "triple-fault".to_owned(),
        detail: format!("vCPU {index} shut down after a triple fault: {registers}"),
        vcpu: Some(index),
    }
}

/// The code of failures for which the host cannot give guest memory.
const MEMORY_LOST: &str = "memory-lost";

/// The host lost memory of the guest.
pub(crate) fn memory_lost(offset: u64) -> Failure {
    Failure {
        code: MEMORY_LOST.to_owned(),
        detail: MoveError::MemoryLost(offset).to_string(),
        vcpu: None,
    }
}

/// The kernel does not confine the thread of a vCPU, which therefore does not run its guest.
pub(crate) fn cannot_confine(vcpu: u32, error: &std::io::Error) -> Failure {
    Failure {
        code: "sandbox-unusable".to_owned(),
        detail: format!("vCPU {vcpu}: the kernel refused to confine its thread: {error}"),
        vcpu: Some(vcpu),
    }
}

/// The kernel does not keep other threads off the core of a vCPU, which therefore does not run its guest.
pub(crate) fn cannot_isolate(vcpu: u32, error: rustix::io::Errno) -> Failure {
    Failure {
        code: "core-scheduling-unavailable".to_owned(),
        detail: format!("vCPU {vcpu}: the kernel refused a cookie for core scheduling: {error}"),
        vcpu: Some(vcpu),
    }
}

/// A device that answered an access of this vCPU panicked.
pub(crate) fn vcpu_panicked(vcpu: u32, message: &str) -> Failure {
    Failure {
        code: "vcpu-panicked".to_owned(),
        detail: format!("vCPU {vcpu}: its thread failed inside the service: {message}"),
        vcpu: Some(vcpu),
    }
}

/// KVM cannot run the guest on.
pub(crate) fn cannot_run(vcpu: u32, why: &RunFailure) -> Failure {
    let code = match why {
        RunFailure::Emulation { .. } => "emulation-failure",
        RunFailure::Internal { .. } => "kvm-internal-error",
        RunFailure::Entry { .. } => "invalid-guest-state",
        // KVM could not read or write guest memory in this process.
        RunFailure::MemoryFault { .. } => MEMORY_LOST,
        RunFailure::Run(error) if *error == Errno::FAULT.raw_os_error() => MEMORY_LOST,
        RunFailure::Run(error) if *error == Errno::HWPOISON.raw_os_error() => MEMORY_LOST,
        RunFailure::Unknown(_) | RunFailure::Run(_) => "kvm-run-failed",
    };
    Failure {
        code: code.to_owned(),
        detail: format!("vCPU {vcpu}: {why}"),
        vcpu: Some(vcpu),
    }
}
