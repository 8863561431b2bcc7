//! A machine in its phases: *built*, when all its parts exist, and *active*, when it has booted.
//! Dropping either gives all its resources back.

mod background;
mod core_sharing;
mod dimms;
mod firmware;
mod hotplug;
mod memory_map;
mod platform;
pub(crate) mod ram;
mod run_control;
mod save;
mod spare;
mod vcpu;
mod vcpus;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use ::devices::event_loop::EventLoop;
use ::devices::sandbox::{Confinement, ThreadKind};
use ::devices::tpm::Tpm;
use ::devices::{ConsoleInput, CpuBlock, HotplugBlock, PowerBlock, Serial};
use hypervisor::{Kvm, Vm};
use memory::{
    CommitError, ListenerHandle, LostWatch, MemoryListener, SpaceKind, Topology, Transaction,
};
use parking_lot::{Mutex, MutexGuard};
use spec::{CpuProfile, VmConfig, VmCounters};
use virtio_devices::Workers;

use crate::arch::x86_64::cpu_model::CpuModel;
use crate::arch::x86_64::layout::Layout;
use crate::arch::x86_64::{cpu, features, hyperv, profiles};
use crate::boot;
use crate::descriptors::{Descriptors, Reservation};
use crate::devices::{
    ConsoleEnd, DeviceEnds, DeviceHandle, Devices, LimiterGroups, MachineOrigin, MemoryEnd,
    OpenContext, OpenedDevices, PciHost, SharedTopology,
};
use crate::failure::{BuildError, MoveError};
use crate::guest_event::{GuestEvent, Outputs, Port, Reporter};

pub(crate) use self::background::{Background, Machine};
use self::core_sharing::CoreSharing;
use self::dimms::Dimms;
use self::firmware::FirmwareClocks;
pub(crate) use self::memory_map::of as memory_map;
pub(crate) use self::ram::GuestRam;
pub(crate) use self::run_control::NotParked;
use self::run_control::{RunControl, Want};
pub(crate) use self::save::{Clocks, Extent};
pub(crate) use self::spare::SpareVm;
use self::vcpu::GuestEnd;
pub(crate) use self::vcpu::{Halter, Throttle, host_cpus};
use self::vcpus::{Recipe, Vcpus};

/// How long vCPUs may take to leave the guest. They take microseconds; only a device that blocks
/// makes them take longer.
const PARK_PATIENCE: Duration = Duration::from_secs(5);

/// How long a pause that nothing is in a hurry for waits for vCPUs. A host with many more runnable
/// threads than CPUs has been seen to take longer than [`PARK_PATIENCE`].
const PAUSE_LIMIT: Duration = Duration::from_secs(60);

/// The host's KVM, and what it supports.
pub(crate) struct Host {
    pub(crate) kvm: Arc<Kvm>,
    /// Makes the VMs.
    pub(crate) vms: SpareVm,
    pub(crate) cpu: CpuModel,
    /// Event loops of devices.
    pub(crate) workers: Workers,
    /// Threads for work that may block.
    pub(crate) background: Background,
    /// Directories below which disk images may name files, besides their own.
    pub(crate) image_dirs: Vec<PathBuf>,
    /// The sandbox of the threads that work for guests.
    pub(crate) confinement: Confinement,
    /// The one VM that there is has the terminal to itself.
    pub(crate) terminal: bool,
    /// Descriptors that VMs may use.
    pub(crate) descriptors: Descriptors,
}

impl Host {
    /// Lists the features of a guest's CPUs that this host lacks, of those that the profile has.
    ///
    /// # Errors
    /// Fails if the guest sees Hyper-V's interfaces, and KVM lacks them.
    pub(crate) fn lacking(
        &self,
        profile: CpuProfile,
        wanted: &CpuModel,
    ) -> Result<Vec<String>, hyperv::Unavailable> {
        let supported = self.kvm.hyperv_cpuid().ok().flatten();
        let here = profiles::cut(profile, &self.cpu);
        let here = hyperv::as_seen_by(wanted, here, supported.as_ref())?;
        Ok(features::lacking(&here, wanted))
    }
}

/// The parts of a machine other than its vCPUs.
pub(crate) struct Parts {
    // Fields drop in this order: first devices release the guest's memory, then listeners end, then the VM,
    // then the map and with it the RAM.
    pub(crate) devices: Devices,
    _listeners: Vec<ListenerHandle>,
    pub(crate) vm: Vm,
    pub(crate) topology: SharedTopology,
    pub(crate) ram: GuestRam,
    _lost: Vec<LostWatch>,
    /// The machine's own event loops for devices, if it has any.
    _loops: Vec<EventLoop>,
    pub(crate) serial: Option<Arc<Serial>>,
    pub(crate) power: Arc<PowerBlock>,
    pub(crate) hotplug: Arc<HotplugBlock>,
    pub(crate) clocks: FirmwareClocks,
    pub(crate) cpus: Arc<CpuBlock>,
    pub(crate) dimms: Option<Dimms>,
    tpm: Option<Arc<Tpm>>,
    /// Last: given back when all else is closed.
    descriptors: Vec<Arc<Reservation>>,
}

/// A machine with all its parts, and nothing to boot.
pub(crate) struct Built {
    parts: Parts,
    layout: Layout,
    vcpus: Vcpus,
}

/// A machine that has booted; its vCPUs run, or are parked.
pub(crate) struct Active {
    pub(crate) parts: Parts,
    pub(crate) vcpus: Vcpus,
    pub(crate) clocks: Clocks,
}

impl Built {
    /// Builds the machine that `config`, which is valid, describes, with the descriptors that are
    /// `reserved` for it. What the guest writes to its serial port and console goes to `outputs`.
    pub(crate) fn new(
        host: &Host,
        config: &VmConfig,
        outputs: Outputs,
        origin: &MachineOrigin,
        reporter: &Reporter,
        reserved: Vec<Arc<Reservation>>,
    ) -> Result<Self, BuildError> {
        let model = cpu_model(host, config, origin)?;
        let bits = cpu::phys_bits(&model.cpuid, config.cpus.max_phys_bits);
        // Before anything is made: a configuration that cannot be laid out costs the host nothing.
        let layout = Layout::new(&ram::zone_sizes(&config.memory), bits)?;
        let layout = layout.with_segments(&config.pci_segment_weights())?;
        let vm = host.vms.take()?;
        let mut topology = Topology::new();
        let control = Arc::new(RunControl::new());
        let cores = CoreSharing::new(config.cpus.core_scheduling);
        let cores = cores
            .map_err(|lacking| BuildError::lacking("core-scheduling-unavailable", &lacking))?;
        let recipe = Recipe::new(model, &config.cpus, bits, cores, host.confinement, reporter);
        let vcpus = Vcpus::make(recipe, Arc::clone(&control), &vm, config.cpus.boot_vcpus)?;
        let end = GuestEnd {
            reporter: reporter.clone(),
            halter: Arc::new(Halter::new(control)),
        };
        // Before the first region: each commit must reach KVM.
        let listeners = register_listeners(&vm, &mut topology)?;
        let (ram, lost) = GuestRam::new(config, origin, reporter)?;
        let irq_routes = vm.irq_routes();
        let loops = own_loops(origin, host.confinement)?;
        let workers = Workers::new(loops.iter().map(|own| own.handle().clone()).collect());
        let context = OpenContext {
            workers: workers.as_ref().unwrap_or(&host.workers),
            image_dirs: &host.image_dirs,
            owner: origin.owner,
            limiters: &LimiterGroups::new(config),
            confinement: host.confinement,
        };
        let space = topology.space(SpaceKind::Memory);
        let topology = Arc::new(Mutex::new(topology));
        let windows = layout.segments.iter().map(|segment| segment.pci64);
        let host_bridge = PciHost::new(&topology, space, windows, irq_routes.clone());
        // Before the map is locked: what follows waits for programs and storage of the host.
        let emulator = platform::tpm_emulator(config, origin)?;
        let make_tpm = |emulator| platform::tpm(emulator, host.confinement, reporter);
        let tpm = emulator.as_ref().map(make_tpm).transpose()?;
        let ends = device_ends(outputs.console, ram.ends(&layout, reporter), reporter);
        let opened = OpenedDevices::open(config, ends, context)?;
        let build = |tx: &mut Transaction<'_>| -> Result<_, BuildError> {
            ram.map(tx, &config.memory, &layout)?;
            platform::map_pc(tx, &host_bridge, &end)?;
            let serial = match outputs.serial {
                Some(output) => Some(platform::map_serial(tx, irq_routes, output, reporter)?),
                None => None,
            };
            if let (Some(output), Some(debug)) = (outputs.debug, &config.debug_console) {
                platform::map_debug_console(tx, debug.port(), output)?;
            }
            if let Some(tpm) = &tpm {
                platform::map_tpm(tx, tpm)?;
            }
            let power = platform::map_power(tx, irq_routes, &end)?;
            let hotplug = platform::map_hotplug(tx, reporter)?;
            let clocks = FirmwareClocks::map(tx, &layout)?;
            let cpus = platform::map_cpus(tx, &config.cpus, reporter)?;
            let dimms = Dimms::map(tx, &config.memory, &layout, &ram, reporter)?;
            let devices = Devices::place_all(host_bridge, tx, config, opened, origin, reporter)?;
            Ok((serial, power, hotplug, clocks, cpus, dimms, devices))
        };
        let (serial, power, hotplug, clocks, cpus, dimms, devices) =
            // One transaction for the whole machine: KVM gets its memslots in one batch, and a part
            // that fails leaves nothing in the map. What was opened is closed as it is dropped.
            topology.lock().transaction(build)?;
        let parts = Parts {
            devices,
            _listeners: listeners,
            vm,
            topology,
            _loops: loops,
            ram,
            _lost: lost,
            serial,
            power,
            hotplug,
            clocks,
            cpus,
            dimms,
            tpm,
            descriptors: reserved,
        };
        Ok(Self {
            parts,
            layout,
            vcpus,
        })
    }

    /// Loads the payload and points the boot vCPU at it. The vCPUs are parked.
    pub(crate) fn boot(self, config: &VmConfig) -> Result<Active, BuildError> {
        let space = self.parts.topology.lock().space(SpaceKind::Memory);
        let view = space.view();
        // By the view in force and not through the transaction: the loader checks each address
        // against RAM.
        let entry = boot::load(config, &view, &self.layout)?;
        if let Some(first) = self.vcpus.boot_vcpu() {
            cpu::enter(first, &view, &entry)?;
        }
        self.start()
    }

    /// A machine for a guest that comes from elsewhere: its vCPUs are parked, and it has nothing to
    /// run until it is loaded.
    pub(crate) fn expect_guest(self) -> Result<Active, BuildError> {
        let active = self.start()?;
        // No device may touch guest memory before the load has committed the map and the RAM has
        // arrived.
        active.parts.devices.pause();
        Ok(active)
    }

    /// Starts the vCPUs' threads, and waits until all have started and are parked.
    fn start(self) -> Result<Active, BuildError> {
        let mut active = Active {
            parts: self.parts,
            vcpus: self.vcpus,
            clocks: Clocks::Running,
        };
        active.start_plugged()?;
        // A thread names itself when it first runs, which on a busy host is later than its start.
        // libvirt looks for the names of all vCPUs as soon as the boot is answered.
        active
            .vcpus
            .control
            .wait_parked_longer(PARK_PATIENCE, PAUSE_LIMIT)
            .map_err(|late| {
                BuildError::host("start all vCPU threads")(std::io::Error::other(late))
            })?;
        Ok(active)
    }
}

/// Returns the CPU that the guest sees: that of the host where the guest booted, if it comes from
/// elsewhere, or else this host's, limited to the profile.
fn cpu_model(
    host: &Host,
    config: &VmConfig,
    origin: &MachineOrigin,
) -> Result<CpuModel, BuildError> {
    let mut model = match &origin.cpu {
        Some(model) => model.clone(),
        None => profiles::apply(config.cpus.profile, &host.cpu)?,
    };
    if !config.cpus.is_nested() {
        model.cpuid = features::without_virtualization(model.cpuid);
    }
    // The CPUs of a guest that comes from elsewhere have Hyper-V's leaves already.
    if config.cpus.kvm_hyperv && origin.cpu.is_none() {
        let supported = host.kvm.hyperv_cpuid()?;
        model.cpuid = hyperv::shown(&model.cpuid, supported.as_ref())
            .map_err(|lacking| BuildError::lacking("hyperv-unavailable", &lacking))?;
    }
    Ok(model)
}

/// Registers the listeners that keep KVM's memslots and ioeventfds in step with the map.
fn register_listeners(
    vm: &Vm,
    topology: &mut Topology,
) -> Result<Vec<ListenerHandle>, CommitError> {
    // Memslots before doorbells, by priority.
    let slots: Arc<dyn MemoryListener> = vm.memslots();
    let mut listeners = vec![topology.register(SpaceKind::Memory, 0, slots)?];
    for space in SpaceKind::ALL {
        listeners.push(topology.register(space, 10, vm.ioeventfds(space))?);
    }
    Ok(listeners)
}

/// Returns what devices are connected to outside the guest: the console's output, the memory that
/// virtio-mem plugs, and the reports to the driver.
fn device_ends(
    console: Option<Box<dyn Write + Send>>,
    memory: Vec<MemoryEnd>,
    reporter: &Reporter,
) -> DeviceEnds {
    let to = reporter.clone();
    let console = console.map(|output| ConsoleEnd {
        output,
        on_room: Box::new(move || to.report(GuestEvent::Room(Port::Console))),
    });
    let to = reporter.clone();
    DeviceEnds {
        console,
        memory,
        on_watchdog: Box::new(move || to.report(GuestEvent::Watchdog)),
    }
}

/// Threads for the devices of a machine that may wait for its memory.
fn own_loops(
    origin: &MachineOrigin,
    confinement: Confinement,
) -> Result<Vec<EventLoop>, BuildError> {
    const LOOPS: usize = 2;
    // Two, so that the tasks of other devices need not all wait behind one.
    let count = if origin.may_wait { LOOPS } else { 0 };
    let start = |index| {
        let name = format!("devices-{index}");
        EventLoop::start_confined(&name, ThreadKind::Devices, confinement)
    };
    let own = (0..count).map(start);
    own.collect::<Result<_, _>>()
        .map_err(BuildError::host("start a thread"))
}

impl Active {
    /// Resumes the guest, and returns the time since which it runs.
    pub(crate) fn resume(&mut self) -> Result<Instant, MoveError> {
        self.resume_after(Duration::ZERO, Instant::now())
    }

    /// Resumes a guest that, at the moment `as_of`, had been stopped for `stopped_for`; a guest
    /// that came from elsewhere sees that time pass. Returns the time since which the guest runs.
    pub(crate) fn resume_after(
        &mut self,
        stopped_for: Duration,
        as_of: Instant,
    ) -> Result<Instant, MoveError> {
        let has_come = matches!(self.clocks, Clocks::Loaded { .. });
        self.start_clocks(stopped_for, as_of)?;
        // After the clocks: a vCPU that ran earlier would read a TSC that jumps.
        self.vcpus.control.want(Want::Run);
        let runs = Instant::now();
        // After the guest, for a shorter stop: its doorbells keep what it asks meanwhile.
        self.parts.devices.resume();
        if has_come {
            self.repeat_interrupts();
        }
        Ok(runs)
    }

    /// Raises every interrupt that a device's state says is pending. An edge that was on its way
    /// when the guest was saved, in an event descriptor, is in nothing that was saved. An
    /// interrupt too many is harmless: the driver reads the device's registers and finds nothing.
    fn repeat_interrupts(&self) {
        self.parts.devices.repeat_interrupts();
        self.parts.power.repeat_interrupt();
        if let Some(serial) = &self.parts.serial {
            serial.repeat_interrupt();
        }
    }

    /// Pauses the guest: on return no vCPU runs, and the devices do nothing. Fails if a vCPU does
    /// not stop in [`PARK_PATIENCE`]; then all continue.
    pub(crate) fn pause(&mut self) -> Result<(), NotParked> {
        self.park(|control| control.wait_parked(PARK_PATIENCE))
    }

    /// Pauses as [`Self::pause`] does, but waits up to [`PAUSE_LIMIT`] for vCPUs: for clients, whose guest
    /// may have to wait for a busy host.
    pub(crate) fn pause_patiently(&mut self) -> Result<(), NotParked> {
        self.park(|control| control.wait_parked_longer(PARK_PATIENCE, PAUSE_LIMIT))
    }

    fn park(
        &mut self,
        wait: impl FnOnce(&RunControl) -> Result<(), NotParked>,
    ) -> Result<(), NotParked> {
        let control = &self.vcpus.control;
        control.want(Want::Park);
        control.kick();
        // One vCPU that does not stop must not leave the others parked.
        wait(control).inspect_err(|_| control.want(Want::Run))?;
        // Before the devices, which may take long to finish: the guest's time ends here. Clocks
        // that were loaded and never started keep their values.
        if matches!(self.clocks, Clocks::Running) {
            self.clocks = Clocks::Paused(self.parts.vm.sample_clocks());
        }
        self.parts.devices.pause();
        Ok(())
    }

    /// The moment since which the guest's clocks do not count.
    pub(crate) fn clocks_stopped_at(&self) -> Option<Instant> {
        match &self.clocks {
            Clocks::Paused(sample) => Some(sample.taken_at()),
            Clocks::Running | Clocks::Loaded { .. } => None,
        }
    }

    /// Returns the handle that throttles the vCPUs.
    pub(crate) fn throttle(&self) -> Throttle {
        Throttle::new(Arc::clone(&self.vcpus.control))
    }

    /// Returns the handle that halts the guest, even if a vCPU waits for a missing page.
    pub(crate) fn halter(&self) -> Halter {
        Halter::new(Arc::clone(&self.vcpus.control))
    }

    /// Interrupts every vCPU, maskable or not.
    pub(crate) fn nmi(&self) {
        let vcpus = self.vcpus.plugged();
        vcpus.for_each(|(_, vcpu)| vcpu.inject_nmi());
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        self.parts.power.press_power_button();
    }

    /// Returns the receiver of input for a port, if the machine has that device.
    pub(crate) fn input(&self, port: Port) -> Option<&dyn ConsoleInput> {
        fn console(control: &DeviceHandle) -> Option<&dyn ConsoleInput> {
            match control {
                DeviceHandle::Console(handle) => Some(handle),
                _ => None,
            }
        }
        match port {
            Port::Serial => self.parts.serial.as_deref().map(|serial| serial as _),
            Port::Console => self.parts.devices.controls().find_map(console),
        }
    }

    /// The map.
    pub(crate) fn topology(&self) -> MutexGuard<'_, Topology> {
        self.parts.topology.lock()
    }

    /// The TPM, if the machine has one.
    pub(crate) fn tpm(&self) -> Option<Arc<Tpm>> {
        self.parts.tpm.clone()
    }

    /// Bytes that the guest has of the memory that was added, as they come and go: a counter for each
    /// zone that can grow.
    pub(crate) fn hotplugged(&self) -> Vec<Arc<AtomicU64>> {
        let dimms = self.dimms().map(|dimms| Arc::clone(dimms.accepted()));
        let devices = self.parts.devices.hotplugged();
        dimms.into_iter().chain(devices).collect()
    }

    /// The devices on the PCI bus.
    pub(crate) fn devices(&self) -> &Devices {
        &self.parts.devices
    }

    /// Keeps descriptors that devices have come to need.
    pub(crate) fn keep_descriptors(&mut self, more: Vec<Arc<Reservation>>) {
        self.parts.descriptors.extend(more);
    }

    /// Returns the counters of each device and vCPU.
    pub(crate) fn counters(&self) -> VmCounters {
        let named = |counters: &[(&str, u64)]| {
            counters
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count))
                .collect()
        };
        let (map, slots) = (
            self.parts.topology.lock().stats(),
            self.parts.vm.memslots().stats(),
        );
        let mut all = VmCounters::new();
        all.insert(
            "memory-map".to_owned(),
            named(&[
                ("commits", map.commits),
                ("renders", map.renders),
                ("listener_calls", map.listener_calls),
                ("memslot_ioctls", slots.ioctls),
                ("gate_closings", slots.gate_closings),
                ("irq_routings", self.parts.vm.irq_routes().calls()),
            ]),
        );
        for (index, vcpu) in self.vcpus.plugged() {
            if let Some(times) = vcpu.times() {
                let times = [("run_ns", times.run_ns), ("wait_ns", times.wait_ns)];
                all.insert(format!("vcpu{index}"), named(&times));
            }
        }
        for (id, counters) in self.parts.devices.counters() {
            all.insert(id.clone(), named(&counters));
        }
        if let Some(serial) = &self.parts.serial {
            all.insert("serial".to_owned(), named(&serial.counters()));
        }
        all
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.halter().halt();
        // Threads that wait for a page continue now: vCPUs end, and devices see that the page is lost.
        // Before the join: a vCPU may wait in the kernel for a page that no source sends any more.
        self.parts.ram.lose_awaited();
        // The parts drop behind this: no vCPU may be in a device, or in KVM_RUN, when they do.
        self.vcpus.join();
        self.parts.vm.irq_routes().end();
    }
}
