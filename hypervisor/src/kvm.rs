//! `/dev/kvm`: opening it, and what the host can do.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry,
};
use kvm_ioctls::Cap;

use crate::dirty::DirtyBackend;
use crate::vm::Vm;

const DEVICE: &str = "/dev/kvm";

/// KVM cannot be used; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no `/dev/kvm`.
    #[error(
        "{DEVICE} does not exist: load the module for this CPU (`modprobe kvm_intel` or `modprobe \
         kvm_amd`), and enable virtualisation in the firmware or nested virtualisation in the host"
    )]
    Missing,
    /// This user may not open it.
    #[error(
        "no permission to open {DEVICE}: add this user to the group `kvm` (`usermod -aG kvm \
         $USER`, \
         then log in again), or run as root"
    )]
    NotPermitted,
    /// The device cannot be opened.
    #[error("{DEVICE} cannot be opened")]
    Open(#[source] io::Error),
    /// The kernel has another version of the interface.
    #[error("{DEVICE} has API version {0}; version {KVM_API_VERSION} is required")]
    Version(i32),
    /// The host lacks what no VM can do without.
    #[error("the host's KVM lacks {0}, which is required")]
    Lacks(&'static str),
}

/// KVM refused an operation.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused to {attempt}: {source}")]
pub struct KvmError {
    attempt: String,
    source: io::Error,
}

impl KvmError {
    pub(crate) fn new(attempt: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let attempt = attempt.into();
        move |errno| Self {
            attempt,
            source: io::Error::from_raw_os_error(errno.errno()),
        }
    }

    pub(crate) fn other(attempt: impl Into<String>, source: io::Error) -> Self {
        Self {
            attempt: attempt.into(),
            source,
        }
    }
}

/// Capabilities of the host's KVM, as probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// vCPUs that a VM may have.
    pub max_vcpus: usize,
    /// Memslots that a VM may have.
    pub max_memslots: usize,
    /// Slots that the guest can read and not write.
    pub readonly_memory: bool,
    /// How far the dirty log can leave the protecting of pages to us: the flags of
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    pub manual_dirty_protect: u32,
    /// Maximum size in bytes of a vCPU's dirty ring; 0 without support.
    pub dirty_ring_bytes: usize,
    /// KVM has `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`: the name of the same capability on newer kernels,
    /// which also have it on CPUs with weak memory ordering.
    pub dirty_ring_acq_rel: bool,
    /// The guest's TSC can run at a frequency of its own.
    pub tsc_control: bool,
    /// Bytes of a vCPU's extended state where it can be more than 4096.
    pub xsave2_bytes: usize,
    /// A VM can run VMs of its own, and their state can be saved. (Some hosts list this and then
    /// answer `EINVAL`; only a vCPU can tell.)
    pub nested_state: bool,
}

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
    capabilities: Capabilities,
    /// The MSRs that make up a vCPU's state.
    msr_indices: Arc<[u32]>,
}

impl Kvm {
    /// Opens `/dev/kvm` and asks it what it can do.
    ///
    /// # Errors
    /// Fails if it is missing, not permitted, or not what is needed.
    pub fn open() -> Result<Self, OpenError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|errno| match errno.errno() {
            // The device node can exist without the module: then open fails with ENODEV or ENXIO.
            libc::ENOENT | libc::ENODEV | libc::ENXIO => OpenError::Missing,
            libc::EACCES | libc::EPERM => OpenError::NotPermitted,
            other => OpenError::Open(io::Error::from_raw_os_error(other)),
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION.cast_signed() {
            return Err(OpenError::Version(version));
        }
        for (needed, name) in [
            (Cap::UserMemory, "user memory regions"),
            (Cap::Irqchip, "the in-kernel interrupt controllers"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::Irqfd, "irqfd"),
            (Cap::IrqRouting, "interrupt routing"),
            (Cap::ImmediateExit, "immediate_exit"),
            (Cap::ExtCpuid, "extended CPUID"),
            (Cap::SetTssAddr, "a TSS address"),
        ] {
            if !kvm.check_extension(needed) {
                return Err(OpenError::Lacks(name));
            }
        }
        let bytes = |cap| usize::try_from(kvm.check_extension_int(cap)).unwrap_or(0);
        let raw = |cap: u32| u32::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
        // Old kernels know only the first name, hosts with weak memory ordering offer only the
        // second, and new x86 kernels offer both. Both answer with the size limit in bytes.
        let ring = raw(KVM_CAP_DIRTY_LOG_RING);
        let acq_rel = raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
        let capabilities = Capabilities {
            max_vcpus: kvm.get_max_vcpus(),
            max_memslots: kvm.get_nr_memslots(),
            readonly_memory: kvm.check_extension(Cap::ReadonlyMem),
            manual_dirty_protect: raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
            dirty_ring_bytes: ring.max(acq_rel) as usize,
            dirty_ring_acq_rel: acq_rel > 0,
            tsc_control: kvm.check_extension(Cap::TscControl),
            xsave2_bytes: bytes(Cap::Xsave2),
            nested_state: kvm.check_extension(Cap::NestedState),
        };
        let listed = kvm
            .get_msr_index_list()
            .map_err(|errno| OpenError::Open(io::Error::from_raw_os_error(errno.errno())))?;
        Ok(Self {
            kvm,
            capabilities,
            msr_indices: listed.as_slice().into(),
        })
    }

    /// Returns the host's capabilities.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The CPUID leaves that the host can give a guest.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::new("list the CPUID leaves that it supports"))
    }

    /// The CPUID leaves of Hyper-V's interfaces that KVM has; `None` if it has none.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn hyperv_cpuid(&self) -> Result<Option<CpuId>, KvmError> {
        const KVM_CAP_SYS_HYPERV_CPUID: u64 = 191;
        /// `_IOWR(KVMIO, 0xc1, struct kvm_cpuid2)`.
        const KVM_GET_SUPPORTED_HV_CPUID: libc::Ioctl = 0xc008_aec1;
        /// KVM has about ten.
        const LEAVES: usize = 64;
        if self.kvm.check_extension_raw(KVM_CAP_SYS_HYPERV_CPUID) == 0 {
            return Ok(None);
        }
        let attempt = "list its Hyper-V interfaces";
        let too_many = |_| KvmError::other(attempt, io::ErrorKind::InvalidInput.into());
        let mut cpuid = CpuId::new(LEAVES).map_err(too_many)?;
        let request = cpuid.as_mut_fam_struct_ptr();
        // SAFETY: KVM reads the number of entries, and writes no more than that many behind it.
        let done =
            unsafe { libc::ioctl(self.kvm.as_raw_fd(), KVM_GET_SUPPORTED_HV_CPUID, request) };
        if done < 0 {
            return Err(KvmError::other(attempt, io::Error::last_os_error()));
        }
        Ok(Some(cpuid))
    }

    /// The value of an MSR that describes the CPU, as a guest could see it; `None` if KVM has none.
    ///
    /// # Errors
    /// Fails if KVM refuses.
    pub fn feature_msr(&self, index: u32) -> Result<Option<u64>, KvmError> {
        let asked = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[asked]).map_err(|_| {
            KvmError::other("list an MSR", io::Error::from(io::ErrorKind::InvalidInput))
        })?;
        match self.kvm.get_msrs(&mut msrs) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(msrs.as_slice().first().map(|msr| msr.data)),
            // Unknown, in a kernel that does not ignore it.
            Err(error) if error.errno() == libc::EINVAL => Ok(None),
            Err(error) => Err(KvmError::new("read an MSR that describes the CPU")(error)),
        }
    }

    /// Creates a VM without memory and vCPUs, with interrupt controllers and dirty logging by bitmaps.
    ///
    /// # Errors
    /// An ioctl failed.
    pub fn create_vm(&self) -> Result<Vm, KvmError> {
        self.create_vm_with(DirtyBackend::Log)
    }

    /// Creates a VM like [`Kvm::create_vm`], with the given back end for dirty pages.
    ///
    /// # Errors
    /// An ioctl failed, as on a host without dirty rings.
    pub fn create_vm_with(&self, dirty: DirtyBackend) -> Result<Vm, KvmError> {
        let vm = loop {
            match self.kvm.create_vm() {
                // Registering the MMU notifier fails when a signal is pending, SIGSTOP included.
                Err(error) if error.errno() == libc::EINTR => {}
                made => break made.map_err(KvmError::new("create a VM"))?,
            }
        };
        Vm::new(vm, Arc::clone(&self.msr_indices), self.capabilities, dirty)
    }
}
