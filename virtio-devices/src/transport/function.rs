//! A device with its driver's side: what the guest's accesses and the machine's requests come to.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ::memory::{AddressSpace, DeviceOps};
use ::state::{LoadError, LoadScope, SaveError, Scope};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::negotiation::{self, CommonConfig, Effect};
use super::{Transport, TransportEvent, saved};
use crate::device::{DeviceError, DeviceId, VirtioDevice};
use crate::limits::MAX_QUEUES;
use crate::queue::{Queue, QueueSetup, QueueState};

/// Bytes from one queue's doorbell to the next: `notify_off_multiplier` (virtio 1.3, 4.1.4.4).
pub(super) const DOORBELL_STRIDE: u64 = 4;

/// The state behind the lock: negotiation, and the device.
struct State {
    common: CommonConfig,
    device: Box<dyn VirtioDevice>,
    /// The machine is paused: no queue is served, whatever the driver says.
    paused: bool,
    /// The device may read and write guest memory: without bus mastering no queue is served.
    is_bus_master: bool,
    /// Device configuration space as the driver last saw a part of it.
    seen_config: Option<Vec<u8>>,
}

/// A virtio device, and what its driver has made of it. A transport's registers lead here.
pub(super) struct VirtioFunction {
    id: DeviceId,
    transport: Arc<Transport>,
    space: AddressSpace,
    kicks: Vec<Arc<EventFd>>,
    state: Mutex<State>,
}

impl VirtioFunction {
    /// # Errors
    /// Fails if the host has no event descriptors left.
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        transport: Arc<Transport>,
        space: AddressSpace,
        vectors: u16,
    ) -> Result<Self, DeviceError> {
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES {
            let index = u16::try_from(sizes.len()).unwrap_or(u16::MAX);
            return Err(DeviceError::NoSuchQueue(index));
        }
        let kick = |_| {
            let made = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK);
            made.map(Arc::new)
                .map_err(DeviceError::host("create an event descriptor"))
        };
        Ok(Self {
            id: device.id(),
            transport,
            space,
            kicks: sizes.iter().map(kick).collect::<Result<_, _>>()?,
            state: Mutex::new(State {
                common: CommonConfig::new(device.features(), &sizes, vectors),
                device,
                paused: false,
                is_bus_master: false,
                seen_config: None,
            }),
        })
    }

    pub(super) fn id(&self) -> DeviceId {
        self.id
    }

    /// Returns the doorbell of each queue.
    pub(super) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Stops all queues. On return none is served; each can continue where it stopped.
    pub(super) fn pause(&self) {
        let mut state = self.state.lock();
        // Set before the queues stop, under the lock: a vCPU that writes DRIVER_OK next finds it.
        state.paused = true;
        state.stop_queues();
    }

    /// Undoes [`VirtioFunction::pause`], and serves a device that was loaded.
    pub(super) fn resume(&self) {
        let mut state = self.state.lock();
        state.paused = false;
        self.serve(&mut state);
    }

    /// The guest may have turned bus mastering on or off. Without it the queues stop where they are.
    pub(super) fn follow_bus_master(&self, is_on: impl FnOnce() -> bool) {
        let mut state = self.state.lock();
        // Asked under the lock: of two vCPUs that change the bit, the later call finds the later
        // value.
        let is_on = is_on();
        // Each write to configuration space comes here: queues must not restart for one that
        // changes something else.
        if state.is_bus_master == is_on {
            return;
        }
        state.is_bus_master = is_on;
        if is_on {
            self.serve(&mut state);
        } else {
            state.stop_queues();
        }
    }

    /// Resets the function, as after power-on.
    pub(super) fn reset(&self) {
        self.state.lock().reset(&self.transport);
    }

    /// The device goes, with all that it holds. Views of the map in which its registers still are may
    /// live on for a while: what reads them finds nothing there.
    pub(super) fn retire(&self) {
        let mut state = self.state.lock();
        state.paused = true;
        state.reset(&self.transport);
        // Drops the device here, and not with the last view of the map: its files and locks are
        // free when the removal returns.
        state.device = Box::new(Gone(self.id));
    }

    pub(super) fn flush(&self) -> Result<(), DeviceError> {
        self.state.lock().device.flush()
    }

    pub(super) fn hand_over(&self) {
        self.state.lock().device.hand_over();
    }

    pub(super) fn take_over(&self) -> Result<(), DeviceError> {
        self.state.lock().device.take_over()
    }

    /// Interrupts the driver for each queue and for its configuration, maybe for nothing: an interrupt
    /// that was raised where the device was saved may not have reached the guest.
    pub(super) fn repeat_interrupts(&self) {
        let state = self.state.lock();
        // Also of a broken device: the driver finds `DEVICE_NEEDS_RESET` by this interrupt alone.
        self.transport.repeat_config_changed();
        if state.common.driver_ok() && !self.transport.is_broken() {
            let queues = (0..).zip(state.common.queues());
            // Only those that the driver enabled: another one may have no handler for its vector.
            let enabled = queues.filter(|(_, queue)| queue.enabled);
            enabled.for_each(|(index, _)| self.transport.used(index));
        }
    }

    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        self.state.lock().device.counters()
    }

    /// Saves the transport's part and the device's. A device that is being served is saved as it
    /// is at this moment: of use only for a dry run.
    pub(super) fn save(
        &self,
        to: &mut Scope<'_>,
        assumes_bus_master: bool,
    ) -> Result<(), SaveError> {
        let mut state = self.state.lock();
        let State { common, device, .. } = &mut *state;
        for (index, queue) in (0_u16..).zip(common.queues_mut()) {
            if let Some(live) = device.queue_state(index) {
                queue.state = live;
            }
        }
        to.put(&saved::V2 {
            device: self.id.0,
            common: common.save(),
            isr: self.transport.isr.load(Ordering::Acquire),
            needs_reset: self.transport.is_broken(),
            config_generation: self.transport.config_generation.load(Ordering::Acquire),
            assumes_bus_master,
        })?;
        device.save(&mut to.child("device")?)
    }

    /// Loads what [`VirtioFunction::save`] saved. The device is paused, before and after, and has no
    /// queue in hand: its rings are looked up by [`VirtioFunction::resume`], behind the one commit.
    /// Returns whether bus mastering must be assumed, of a driver that is ready.
    pub(super) fn load(&self, from: &mut LoadScope<'_, '_>) -> Result<bool, LoadError> {
        let saved: saved::V2 = from.take()?;
        let mut state = self.state.lock();
        state.paused = true;
        state.forget(&self.transport, |device| device.prepare_load());
        if saved.device != self.id.0 {
            let (was, is) = (DeviceId(saved.device), self.id);
            return Err(from.refuse(format!(
                "the saved device is a {was:?}, and this one is a {is:?}"
            )));
        }
        state.common.load(&saved.common, |why| from.refuse(why))?;
        let transport = &self.transport;
        transport.isr.store(saved.isr, Ordering::Release);
        transport
            .needs_reset
            .store(saved.needs_reset, Ordering::Release);
        let generation = saved.config_generation;
        transport
            .config_generation
            .store(generation, Ordering::Release);
        transport.set_config_vector(state.common.config_vector());
        for (index, queue) in (0_u16..).zip(state.common.queues()) {
            transport.set_queue_vector(index, queue.vector);
        }
        let driver_ok = state.common.driver_ok();
        transport.driver_ok.store(driver_ok, Ordering::Release);
        state.device.load(&mut from.child("device")?)?;
        Ok(saved.assumes_bus_master && driver_ok)
    }

    /// Whether queues may be served. A device that needs a reset is not, whatever its driver
    /// enables: its rings and requests are in a state that neither side knows (virtio 1.3, 2.1.2).
    fn may_serve(&self, state: &State) -> bool {
        let is_wanted = state.common.driver_ok() && !self.transport.is_broken();
        is_wanted && state.is_bus_master && !state.paused
    }

    /// Activates the device and starts the queues that are enabled, if it may.
    fn serve(&self, state: &mut State) {
        if !self.may_serve(state) {
            return;
        }
        let features = state.common.features();
        // Devices rely on this order: features and transport are known before the first queue
        // starts.
        if let Err(error) = state.device.activate(features, &self.transport) {
            self.transport.needs_reset(&error.to_string());
            return;
        }
        for index in (0..).take(state.common.queues().len()) {
            self.start_queue(state, index);
        }
    }

    fn start_queue(&self, state: &mut State, index: u16) {
        let at = usize::from(index);
        let (Some(queue), Some(kick)) = (state.common.queues().get(at), self.kicks.get(at)) else {
            return;
        };
        // Asked for each queue: the start of an earlier one may have failed, and then the device
        // needs a reset.
        if !queue.enabled || !self.may_serve(state) {
            return;
        }
        let setup = QueueSetup {
            index,
            rings: queue.rings,
            state: queue.state,
            event_idx: state.common.event_idx(),
            space: self.space.clone(),
            kick: Arc::clone(kick),
            transport: Arc::clone(&self.transport),
        };
        // Rings that are nowhere are the guest's fault, and found only here: their addresses may
        // become RAM between the enabling and the start.
        let started = Queue::new(setup).map_err(DeviceError::from);
        if let Err(error) = started.and_then(|queue| state.device.start_queue(queue)) {
            self.transport.needs_reset(&error.to_string());
        }
    }

    fn write_common(&self, at: usize, data: &[u8]) {
        let mut state = self.state.lock();
        match state.common.write(at, data) {
            Effect::None => {}
            Effect::Reset => {
                // A driver resets a device once before it uses it. Only the end of a use is an
                // event for the owner.
                let was_used = state.common.driver_ok();
                state.reset(&self.transport);
                if was_used {
                    self.transport.report(TransportEvent::Reset);
                }
            }
            Effect::DriverOk => {
                self.transport.driver_ok.store(true, Ordering::Release);
                // A paused device is served when it is resumed.
                self.serve(&mut state);
                self.transport.report(TransportEvent::Activated);
            }
            Effect::StartQueue(index) => self.start_queue(&mut state, index),
            Effect::ResetQueue(index) => {
                // The registers were reset by `write` already, so a read of `queue_reset` finds 0
                // (2.6.1): requests in hand are completed before the guest's write returns.
                state.device.reset_queue(index);
            }
            Effect::ConfigVector(vector) => self.transport.set_config_vector(vector),
            Effect::QueueVector(queue, vector) => self.transport.set_queue_vector(queue, vector),
            Effect::Broken(why) => {
                state.stop_queues();
                self.transport.needs_reset(why);
            }
        }
    }

    fn read_common(&self, at: usize, data: &mut [u8]) {
        let needs_reset = if self.transport.is_broken() {
            negotiation::NEEDS_RESET
        } else {
            0
        };
        let mut state = self.state.lock();
        // Compares the space on each read, so a driver that reads generation, fields and generation (2.5)
        // sees any change in between.
        let (_, generation) = self.config(&mut state);
        copy(&state.common.image(needs_reset, generation), at, data);
    }

    /// Device configuration space and its generation, which is another whenever the driver could
    /// see a change: also one that the device makes without telling, between two reads of a field
    /// that is wider than the driver's accesses (virtio 1.3, 4.1.4.3.1).
    fn config<'a>(&self, state: &'a mut State) -> (&'a [u8], u8) {
        let now = state.device.config_space();
        if state.seen_config.as_ref().is_some_and(|seen| *seen != now) {
            self.transport.next_generation();
        }
        let generation = self.transport.config_generation.load(Ordering::Acquire);
        (state.seen_config.insert(now), generation)
    }
}

impl State {
    fn stop_queues(&mut self) {
        for (index, queue) in (0_u16..).zip(self.common.queues_mut()) {
            // A queue that was not being served keeps the state that it was loaded or stopped with.
            if let Some(stopped) = self.device.stop_queue(index) {
                queue.state = stopped;
            }
        }
    }

    fn reset(&mut self, transport: &Transport) {
        self.forget(transport, |device| device.reset());
    }

    /// Stops the queues and forgets the driver, as the device does by `forget`.
    fn forget(&mut self, transport: &Transport, forget: impl FnOnce(&mut dyn VirtioDevice)) {
        self.stop_queues();
        forget(&mut *self.device);
        self.common.reset();
        transport.reset();
    }
}

/// In the place of a device that went.
struct Gone(DeviceId);

impl VirtioDevice for Gone {
    fn id(&self) -> DeviceId {
        self.0
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        Vec::new()
    }

    fn config_space(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _: u64, _: &Arc<Transport>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn start_queue(&mut self, queue: Queue) -> Result<(), DeviceError> {
        Err(DeviceError::NoSuchQueue(queue.index()))
    }

    fn stop_queue(&mut self, _: u16) -> Option<QueueState> {
        None
    }

    fn queue_state(&self, _: u16) -> Option<QueueState> {
        None
    }

    fn reset(&mut self) {}

    fn save(&self, _: &mut Scope<'_>) -> Result<(), SaveError> {
        Ok(())
    }

    fn load(&mut self, _: &mut LoadScope<'_, '_>) -> Result<(), LoadError> {
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

impl fmt::Debug for VirtioFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioFunction")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Fills `data` with a register file from `at` on; past its end, with zeros.
pub(crate) fn copy(registers: &[u8], at: usize, data: &mut [u8]) {
    for (byte, at) in data.iter_mut().zip(at..) {
        *byte = registers.get(at).copied().unwrap_or(0);
    }
}

fn offset(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// The registers of the common configuration structure.
pub(super) struct CommonRegisters(pub(super) Arc<VirtioFunction>);

impl DeviceOps for CommonRegisters {
    fn read(&self, at: u64, data: &mut [u8]) {
        self.0.read_common(offset(at), data);
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.0.write_common(offset(at), data);
    }
}

/// The ISR status (virtio 1.3, 4.1.4.5): reading clears it.
pub(super) struct IsrRegister(pub(super) Arc<VirtioFunction>);

impl DeviceOps for IsrRegister {
    fn read(&self, at: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (at, data.first_mut()) {
            *first = self.0.transport.isr.swap(0, Ordering::AcqRel);
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

/// Device configuration space.
pub(super) struct DeviceRegisters(pub(super) Arc<VirtioFunction>);

impl DeviceOps for DeviceRegisters {
    fn read(&self, at: u64, data: &mut [u8]) {
        let mut state = self.0.state.lock();
        let (space, _) = self.0.config(&mut state);
        copy(space, offset(at), data);
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.0.state.lock().device.write_config(offset(at), data);
    }
}

/// The doorbells, where the hypervisor does not take the write for us: one of an odd width.
pub(super) struct Doorbells(pub(super) Arc<VirtioFunction>);

impl DeviceOps for Doorbells {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, at: u64, _: &[u8]) {
        let queue = offset(at / DOORBELL_STRIDE);
        if let Some(kick) = self.0.kicks.get(queue) {
            // The write fails only if the counter is full of kicks that are not taken yet. One more adds nothing.
            let _ = kick.write(1);
        }
    }
}
