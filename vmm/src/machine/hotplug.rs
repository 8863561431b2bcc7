//! Devices and vCPUs that a machine gets and loses while its guest runs.

use ::devices::cpus::{CpuSet, Refusal};
use ::devices::pci;
use spec::PciDeviceInfo;

use super::run_control::Want;
use super::save::Clocks;
use super::vcpus::ClockToFollow;
use super::{Active, PARK_PATIENCE};
use crate::arch::x86_64::cpu::CpuError;
use crate::devices::{At, Opened};
use crate::failure::{BuildError, MoveError};
use crate::guest_event::Reporter;

impl Active {
    /// Plugs a device in and tells the guest.
    pub(crate) fn add_device(
        &mut self,
        opened: Opened,
        reporter: &Reporter,
    ) -> Result<PciDeviceInfo, BuildError> {
        let id = opened.id.clone();
        let at = opened.slot.and_then(|slot| pci::Bdf::new(slot, 0));
        // Segment 0 is the only one with hotplug; the driver has refused others.
        let at = at.map_or(At::AnySlot(0), At::Exactly);
        let devices = &mut self.parts.devices;
        let plugged = self
            .parts
            .topology
            .lock()
            .transaction(|tx| devices.plug(tx, opened, at, reporter));
        if let Err(error) = plugged {
            // `plug` may have put it on the bus before the commit failed. A vCPU that scanned the
            // bus meanwhile found a device whose BAR showed nowhere.
            devices.forget(&id);
            return Err(error);
        }
        // A device starts unpaused. Its driver could not start it now, but a load may follow, which
        // expects all devices paused.
        if self.vcpus.control.wanted() != Want::Run {
            devices.pause();
        }
        let device = devices.place(&id);
        let slot = device.map(pci::Bdf::device);
        slot.into_iter()
            .for_each(|slot| self.parts.hotplug.insert(slot));
        // The bit of the slot before the interrupt that makes the guest read it.
        self.parts.power.announce_hotplug();
        Ok(PciDeviceInfo {
            id,
            bdf: device.map(|bdf| bdf.to_string()).unwrap_or_default(),
        })
    }

    /// Asks the guest to let go of a device; false if there is none of this name. It may be asked
    /// again: a guest that boots does not listen yet.
    pub(crate) fn want_device_back(&mut self, id: &str) -> bool {
        let Some(slot) = self.parts.devices.leave(id) else {
            return false;
        };
        self.parts.hotplug.want_back(slot);
        self.parts.power.announce_hotplug();
        true
    }

    /// The guest has let go of what is in a slot. Gives the name of the device that went.
    pub(crate) fn ejected(&mut self, slot: u8) -> Option<(String, Result<(), BuildError>)> {
        self.parts.devices.ejected(slot, &self.parts.topology)
    }

    /// The vCPUs that the guest sees as plugged.
    pub(crate) fn plugged_vcpus(&self) -> CpuSet {
        self.parts.cpus.present()
    }

    /// The plugged vCPUs that the guest should eject.
    pub(crate) fn leaving_vcpus(&self) -> CpuSet {
        self.parts.cpus.leaving()
    }

    /// Plugs vCPUs, the lowest first, until there are `count`, and notifies the guest. Withdraws all
    /// requests to eject. On an error none is plugged.
    pub(crate) fn plug_vcpus(&mut self, count: u32) -> Result<(), MoveError> {
        let present = self.plugged_vcpus();
        let missing = usize::try_from(count.saturating_sub(present.count())).unwrap_or(0);
        let free = (0..).filter(|vcpu| !present.contains(*vcpu));
        let new: Vec<u32> = free.take(missing).collect();
        // Before any is plugged, which starts with a clock.
        let follow = self.clock_to_follow()?;
        let all: CpuSet = present.iter().chain(new.iter().copied()).collect();
        // Some of the threads may have started. None was in the guest: the registers do not name
        // them.
        if let Err(error) = self.start_vcpus(&all, Some(&follow)) {
            self.vcpus.dismiss_all_but(&present);
            return Err(error.into());
        }
        if let Clocks::Loaded { vcpus, .. } = &mut self.clocks {
            // The clocks do not count yet: a vCPU that joins now must start with the others.
            vcpus.extend(new.iter().map(|vcpu| (*vcpu, follow.clock)));
        }
        // The guest may start a vCPU as soon as it sees it: its thread is there.
        let leaving = self.leaving_vcpus();
        for vcpu in new.into_iter().chain(leaving.iter()) {
            self.parts.cpus.plug(vcpu);
        }
        self.parts.power.announce_cpus();
        Ok(())
    }

    /// Asks the guest to eject the highest vCPUs, so that `count` stay. Not vCPU 0.
    pub(crate) fn want_vcpus_back(&mut self, count: u32) {
        let present = self.plugged_vcpus();
        let surplus = usize::try_from(present.count().saturating_sub(count.max(1))).unwrap_or(0);
        // The highest first, so that the numbers stay without gaps: configurations know only a
        // count.
        for vcpu in present.iter().rev().take(surplus) {
            self.parts.cpus.want_back(vcpu);
        }
        self.parts.power.announce_cpus();
    }

    /// The guest need not eject vCPUs any more.
    pub(crate) fn withdraw_vcpu_requests(&mut self) {
        self.parts.cpus.withdraw();
    }

    /// Ends the threads of vCPUs that the guest has ejected, without waiting for them. Returns what
    /// the guest refused since the last call.
    pub(crate) fn take_vcpu_answers(&mut self) -> Vec<Refusal> {
        self.vcpus.dismiss_all_but(&self.parts.cpus.present());
        self.parts.cpus.take_refusals()
    }

    /// Starts threads for all plugged vCPUs that have none.
    pub(super) fn start_plugged(&mut self) -> Result<(), CpuError> {
        self.start_vcpus(&self.parts.cpus.present(), None)
    }

    fn start_vcpus(
        &mut self,
        wanted: &CpuSet,
        follow: Option<&ClockToFollow>,
    ) -> Result<(), CpuError> {
        let topology = self.parts.topology.lock();
        self.vcpus
            .plug(&self.parts.vm, &topology, wanted.iter(), follow)
    }

    /// Reads the clock of vCPU 0.
    fn clock_to_follow(&self) -> Result<ClockToFollow, MoveError> {
        if let Clocks::Loaded { vcpus, .. } = &self.clocks {
            let first = vcpus.get(&0).ok_or(MoveError::VcpuGone)?;
            let clock = first.without_timer();
            return Ok(ClockToFollow { clock, at: None });
        }
        let sample = self.parts.vm.sample_clocks();
        let clock = self.on_first_vcpu(move |vcpu| vcpu.clock_at(&sample))?;
        // vCPU 0 may be in a device that blocks.
        let clock = clock
            .recv_timeout(PARK_PATIENCE)
            .map_err(|_| MoveError::VcpuGone)??;
        let at = Some(sample);
        Ok(ClockToFollow { clock, at })
    }
}
