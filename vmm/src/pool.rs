//! The pool: where drivers live.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;
use std::time::Duration;

use control::{Category, EventLog, Migrate, RequestError, Spawn, VmHandle, connect};
use devices::event_loop::EventLoop;
use devices::sandbox::{Confinement, ThreadKind};
use hypervisor::{Kvm, KvmError, OpenError};
use migration::ConnectionLimit;
use parking_lot::Mutex;
use spec::{CpuCheck, CpuDescription, CpuProfile, HostCpu, HostLimits, VmConfig, VmId};
use virtio_devices::Workers;

use crate::arch::x86_64::cpu_model::CpuModel;
use crate::arch::x86_64::{cpu, features, profiles};
use crate::descriptors::Descriptors;
use crate::driver::{Caller, Driver};
use crate::machine::{self, Background, Host, SpareVm};
use crate::migrate::{
    Endpoints, Journals, KnownBases, MigrationTrust, MirrorTargets, remove_leftovers,
};

/// Maximum number of event-loop threads for drivers. Drivers only pass messages, so few threads are enough
/// for many VMs.
const DRIVER_THREADS: usize = 2;

/// How long the end of a pool waits for machines that are being taken apart.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// How long the end of a pool waits for a reader of standard output.
const TERMINAL_PATIENCE: Duration = Duration::from_secs(1);

/// How a pool is made.
#[derive(Clone, Debug, Default)]
pub struct PoolConfig {
    /// Event-loop threads of devices; as many as the host has CPUs when absent. Drivers have
    /// two others, or one if this is one.
    pub threads: Option<usize>,
    /// There is one VM, which has this program's terminal to itself if its console wants it.
    pub terminal: bool,
    /// Directories below which a disk image may name files (its backing file, its data file), besides
    /// the image's own directory.
    pub image_dirs: Vec<PathBuf>,
    /// The sandbox of the threads that work for guests; none by default.
    pub confinement: Confinement,
}

/// A pool cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// KVM cannot be used; the text says what to do.
    #[error(transparent)]
    Kvm(#[from] OpenError),
    /// KVM does not say what it supports.
    #[error(transparent)]
    Host(#[from] KvmError),
    /// The host gives no thread.
    #[error("cannot start a pool thread: {0}")]
    Thread(#[from] io::Error),
}

/// Event-loop threads, and the drivers and devices on them. Dropping it ends all VMs.
///
/// Drivers and devices do not share threads: a guest that keeps its devices busy delays no driver,
/// and so no request.
pub struct Pool {
    host: Arc<Host>,
    // In the order of their end: machines are taken apart when their drivers are gone, and need
    // the loops of their devices for that.
    drivers: Vec<EventLoop>,
    _machines: MachinesEnd,
    _terminal: TerminalEnd,
    _devices: Vec<EventLoop>,
    next: AtomicUsize,
    callers: Callers,
    pending: Arc<ConnectionLimit>,
    journals: Journals,
    endpoints: Endpoints,
    mirror_targets: MirrorTargets,
    trust: MigrationTrust,
    /// The identities of images that others build on.
    known_bases: Arc<KnownBases>,
}

/// Waits, when it is dropped, until machines have given back what they had.
struct MachinesEnd(Background);

impl Drop for MachinesEnd {
    fn drop(&mut self) {
        if !self.0.wait(END_PATIENCE) {
            tracing::error!(
                "machines were not taken apart in time: their storage does not respond"
            );
        }
    }
}

/// Waits, when it is dropped, until the last output of guests is on the terminal.
struct TerminalEnd;

impl Drop for TerminalEnd {
    fn drop(&mut self) {
        devices::flush_terminal(TERMINAL_PATIENCE);
    }
}

fn loops(
    name: &str,
    kind: ThreadKind,
    count: usize,
    confinement: Confinement,
) -> io::Result<Vec<EventLoop>> {
    let start = |index| EventLoop::start_confined(&format!("{name}-{index}"), kind, confinement);
    (0..count).map(start).collect()
}

/// Asks the drivers of VMs, by their names.
#[derive(Clone, Default)]
pub(crate) struct Callers(Arc<Mutex<HashMap<VmId, Caller>>>);

impl Callers {
    pub(crate) fn get(&self, vm: &VmId) -> Option<Caller> {
        self.0.lock().get(vm).cloned()
    }

    /// A new VM, in the place of one of that name that is gone; those that are gone are forgotten.
    fn put(&self, vm: &VmId, caller: Caller) {
        let mut all = self.0.lock();
        all.retain(|_, caller| caller.is_there());
        all.insert(vm.clone(), caller);
    }
}

impl Pool {
    /// Opens KVM and starts the threads.
    ///
    /// # Errors
    /// Fails if KVM cannot be used, or the host gives no threads.
    pub fn start(config: &PoolConfig) -> Result<Self, StartError> {
        let kvm = Arc::new(Kvm::open()?);
        let cpu = CpuModel {
            cpuid: features::offered(kvm.supported_cpuid()?),
            arch_capabilities: kvm.feature_msr(features::ARCH_CAPABILITIES)?,
        };
        let cpus = || available_parallelism().map_or(1, usize::from);
        let threads = config.threads.unwrap_or_else(cpus).max(1);
        let confinement = config.confinement;
        let few = threads.min(DRIVER_THREADS);
        let drivers = loops("driver", ThreadKind::Drivers, few, confinement)?;
        let devices = loops("pool", ThreadKind::Devices, threads, confinement)?;
        let handles = devices.iter().map(|on| on.handle().clone()).collect();
        let workers = Workers::new(handles).ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        let background = Background::start()?;
        Ok(Self {
            host: Arc::new(Host {
                vms: SpareVm::new(Arc::clone(&kvm), &background),
                kvm,
                cpu,
                workers,
                background: background.clone(),
                image_dirs: config.image_dirs.clone(),
                confinement,
                terminal: config.terminal,
                descriptors: Descriptors::of_process(),
            }),
            drivers,
            _machines: MachinesEnd(background),
            _terminal: TerminalEnd,
            _devices: devices,
            next: AtomicUsize::new(0),
            callers: Callers::default(),
            pending: Arc::default(),
            journals: Journals::default(),
            endpoints: Endpoints::default(),
            mirror_targets: MirrorTargets::default(),
            trust: MigrationTrust::default(),
            known_bases: Arc::default(),
        })
    }

    /// Has the steps of migrations written down in this directory, so that they are known after a
    /// crash.
    #[must_use]
    pub fn with_journals(mut self, directory: PathBuf) -> Self {
        self.journals = Journals::new(directory);
        self
    }

    /// Sets what the operator allows migrations, where a request does not say. Removes from the directory
    /// for images those of guests that did not come to an earlier process.
    #[must_use]
    pub fn with_migration_trust(mut self, trust: MigrationTrust) -> Self {
        if let Some(storage) = &trust.storage {
            remove_leftovers(storage);
        }
        self.trust = trust;
        self
    }

    pub(crate) fn caller(&self, vm: &VmId) -> Option<Caller> {
        self.callers.get(vm)
    }

    pub(crate) fn callers(&self) -> &Callers {
        &self.callers
    }

    /// The limit of pending connections that all waits for a guest share.
    pub(crate) fn connection_limit(&self) -> Arc<ConnectionLimit> {
        Arc::clone(&self.pending)
    }

    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    pub(crate) fn journals(&self) -> &Journals {
        &self.journals
    }

    pub(crate) fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    pub(crate) fn mirror_targets(&self) -> &MirrorTargets {
        &self.mirror_targets
    }

    pub(crate) fn trust(&self) -> &MigrationTrust {
        &self.trust
    }

    pub(crate) fn known_bases(&self) -> &Arc<KnownBases> {
        &self.known_bases
    }
}

impl Spawn for Pool {
    fn spawn(
        &self,
        id: &VmId,
        config: Arc<VmConfig>,
        events: EventLog,
    ) -> Result<VmHandle, RequestError> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let Some(thread) = self.drivers.get(next % self.drivers.len()) else {
            return Err(RequestError::driver_gone());
        };
        let mut config = VmConfig::clone(&config);
        config.name_devices();
        let config = Arc::new(config);
        // Log lines of the VM's threads and devices, which inherit the span, carry its name.
        let span = tracing::error_span!("vm", %id);
        let _entered = span.enter();
        Ok(thread.handle().adopt(|waker| {
            let (handle, inbox, reports, publisher) =
                connect(id, Arc::clone(&config), events, move || waker.wake());
            self.callers.put(id, Caller::new(reports.clone()));
            let driver = Driver::new(Arc::clone(&self.host), config, inbox, reports, publisher);
            (driver, handle)
        }))
    }

    fn mover(&self) -> Option<&dyn Migrate> {
        Some(self)
    }

    fn host_limits(&self) -> HostLimits {
        /// Address space below 4 GiB that is not RAM, and room for a PCI window above.
        const NOT_RAM: u64 = 4 << 30;
        let bits = cpu::phys_bits(&self.host.cpu.cpuid, None);
        let space = 1_u64.checked_shl(bits.into()).unwrap_or(u64::MAX);
        HostLimits {
            max_vcpus: u32::try_from(self.host.kvm.capabilities().max_vcpus).unwrap_or(u32::MAX),
            max_memory: space.saturating_sub(NOT_RAM).min(1 << 46),
            host_cpus: machine::host_cpus(),
        }
    }

    fn host_cpu(&self) -> HostCpu {
        HostCpu {
            cpu: self.host.cpu.describe(CpuProfile::Host),
            profiles: profiles::fits(&self.host.cpu),
        }
    }

    fn check_cpu(&self, guest: &CpuDescription) -> Result<CpuCheck, RequestError> {
        let wanted = CpuModel::described(guest).ok_or_else(|| {
            let detail = format!("{} leaves are more than KVM takes", guest.cpuid.len());
            RequestError::new(Category::Unprocessable, "too-many-leaves", detail)
        })?;
        let lacking = self.host.lacking(guest.profile, &wanted);
        // The check lists what is missing.
        let lacking = lacking.unwrap_or_else(|why| vec![why.to_string()]);
        Ok(CpuCheck { lacking })
    }
}
