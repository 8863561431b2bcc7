//! Saving what a machine is, and going on from it elsewhere.
//!
//! ```text
//!   Active (paused) ── save ──► sections ──► load ── Active (expecting) ── go ──► running
//! ```
//!
//! A load changes the map in one transaction, whatever the number of devices and queues, and gives
//! KVM the interrupt routes once; rings are looked up when the devices go on, behind the commit.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use hypervisor::{MemSlots, StateError, VcpuState, VmState};
use memory::RamBlock;
use state::{Load as _, Save as _, Store, Writer};

use super::Active;
use super::run_control::NotParked;
use crate::failure::MoveError;

impl From<NotParked> for MoveError {
    fn from(late: NotParked) -> Self {
        Self::NotParked(late.to_string())
    }
}

/// How much is saved, or loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Devices as they are while the guest runs: a first guess, from which the other side can tell
    /// whether it can go on at all, and do most of the work.
    DryRun,
    /// Everything, of a guest that stands.
    Whole,
}

impl Active {
    /// The guest's memory, and what tells of what is written to it.
    pub(crate) fn memory(&self) -> (Arc<RamBlock>, Arc<MemSlots>) {
        (Arc::clone(&self.parts.ram), self.parts.vm.memslots())
    }

    /// Saves what the machine is, but for its RAM. For [`Extent::Whole`] it is paused.
    pub(crate) fn save(&self, extent: Extent) -> Result<Vec<u8>, MoveError> {
        let mut writer = Writer::default();
        if extent == Extent::Whole {
            let vcpus: Vec<_> = self.on_vcpus(|_| |vcpu| vcpu.save());
            // Beside the vCPUs.
            let vm = self.parts.vm.save(self.clock)?;
            writer.scope("vm")?.put(&vm)?;
            for (index, state) in vcpus.into_iter().enumerate() {
                let state = answer(&state)??;
                writer.scope(&format!("vcpus/{index}"))?.put(&state)?;
            }
        }
        if let Some(serial) = &self.parts.serial {
            serial.save(&mut writer.scope("serial")?)?;
        }
        self.parts.power.save(&mut writer.scope("power")?)?;
        self.parts.hotplug.save(&mut writer.scope("hotplug")?)?;
        self.parts.devices.save(&mut writer)?;
        Ok(writer.finish())
    }

    /// Goes on from what was saved; it stands until [`Active::go`]. May be done again.
    pub(crate) fn load(&mut self, saved: &[u8], extent: Extent) -> Result<(), MoveError> {
        let mut store = Store::open(saved)?;
        let vcpus = match extent {
            Extent::DryRun => Vec::new(),
            Extent::Whole => self.load_vcpus(&mut store)?,
        };
        // Beside the vCPUs.
        self.load_devices(&mut store)?;
        store.finish()?;
        self.standing = vcpus
            .iter()
            .map(|answers| Ok::<_, MoveError>(answer(answers)??))
            .collect::<Result<_, _>>()?;
        Ok(())
    }

    fn load_vcpus(
        &mut self,
        store: &mut Store<'_>,
    ) -> Result<Vec<Receiver<Result<hypervisor::StandingClock, StateError>>>, MoveError> {
        // First, and not beside: a vCPU's local APIC is the interrupt controllers' affair.
        let vm: VmState = store.scope("vm")?.take()?;
        self.clock = self.parts.vm.load(&vm)?;
        let mut states = Vec::new();
        for index in 0..self.vcpus.len() {
            let state: VcpuState = store.scope(&format!("vcpus/{index}"))?.take()?;
            states.push(Some(state));
        }
        Ok(self.on_vcpus(|index| {
            let state = states.get_mut(index).and_then(Option::take);
            move |vcpu: &mut hypervisor::Vcpu| match state {
                Some(state) => vcpu.load(&state),
                None => Err(StateError::Chips),
            }
        }))
    }

    fn load_devices(&mut self, store: &mut Store<'_>) -> Result<(), MoveError> {
        if let Some(serial) = &self.parts.serial {
            (&**serial).load(&mut store.scope("serial")?, &mut ())?;
        }
        (&*self.parts.power).load(&mut store.scope("power")?, &mut ())?;
        (&*self.parts.hotplug).load(&mut store.scope("hotplug")?, &mut ())?;
        let held = self.parts.vm.irq_routes().hold();
        let devices = &self.parts.devices;
        let mut topology = self.parts.topology.lock();
        topology.transaction(|tx| -> Result<(), MoveError> { Ok(devices.load(store, tx)?) })?;
        drop(topology);
        Ok(held.finish()?)
    }

    /// Lets the guest run, which stood for so long. Gives since when it does.
    pub(crate) fn go(&mut self, stood_for_ns: u64) -> Result<Instant, MoveError> {
        if let Some(clock) = &mut self.clock {
            clock.nanoseconds = clock.nanoseconds.saturating_add(stood_for_ns);
        }
        self.start_clocks(stood_for_ns)?;
        let runs = self.resume()?;
        self.parts.devices.repeat_interrupts();
        Ok(runs)
    }

    /// Lets the clocks of a machine that was loaded go on.
    pub(crate) fn start_clocks(&mut self, stood_for_ns: u64) -> Result<(), MoveError> {
        let standing = std::mem::take(&mut self.standing);
        if standing.is_empty() {
            return Ok(());
        }
        let started = self.on_vcpus(|index| {
            let clock = standing.get(index).copied();
            move |vcpu: &mut hypervisor::Vcpu| match clock {
                Some(clock) => vcpu.start_clock(&clock, stood_for_ns),
                None => Ok(()),
            }
        });
        for started in &started {
            answer(started)??;
        }
        Ok(())
    }

    /// Makes durable all that the guest wrote to its disks. The machine is paused.
    pub(crate) fn flush(&self) -> Result<(), MoveError> {
        Ok(self.parts.devices.flush()?)
    }

    /// Releases what only one machine may have. The machine is paused and flushed.
    pub(crate) fn hand_over(&self) {
        self.parts.devices.hand_over();
    }

    /// Takes what only one machine may have. It is paused.
    pub(crate) fn take_over(&self) -> Result<(), MoveError> {
        Ok(self.parts.devices.take_over()?)
    }

    /// Has a job done on each vCPU's own thread, side by side.
    fn on_vcpus<R, J>(&self, mut job: impl FnMut(usize) -> J) -> Vec<Receiver<R>>
    where
        R: Send + 'static,
        J: FnOnce(&mut hypervisor::Vcpu) -> R + Send + 'static,
    {
        let vcpus = self.vcpus.iter().enumerate();
        let asked = vcpus.map(|(index, vcpu)| vcpu.ask(job(index))).collect();
        self.control.nudge();
        asked
    }
}

fn answer<R>(from: &Receiver<R>) -> Result<R, MoveError> {
    from.recv().map_err(|_| MoveError::VcpuGone)
}
