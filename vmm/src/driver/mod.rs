//! The driver: the one owner of a VM.
//!
//! A driver lives on a thread that it shares with other drivers, and never blocks it for long:
//! other threads build machines (which reads files and unpacks kernels), take them apart (which
//! unmaps RAM) and stop their devices (which waits for storage). Meanwhile requests wait, but for
//! those that end the VM.
//!
//! ```text
//!            Boot                    built
//!   Off ──────────────► Building ──────────► On ◄──► Busy: Pause, an ejected device
//!    ▲                   │    ▲              │
//!    │   cannot be built │    │ reset        │ reset, Shutdown, power-off, failure
//!    └───────────────────┴────┴── Ending ◄───┘
//! ```
//!
//! A guest that comes from elsewhere goes from `Off` to `Expecting` and then to `On` (`migration`).

mod building;
mod caller;
mod consoles;
mod devices;
mod ending;
mod guest_end;
mod memory;
mod migration;
mod mirror;
mod outgoing;
mod resize;
mod snapshot;
#[cfg(test)]
mod tests;
mod vcpus;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::devices::PowerEvent;
use ::devices::event_loop::{Actor, Flow, Sources};
use ::devices::sandbox::Violation;
use ::memory::Pages;
use ::migration::Progress;
use control::{
    Allowance, Ask, Category, EventSender, Inbox, Message, NewDevice, Peek, Reply, Request,
    RequestError, StatusPublisher, admit,
};
use spec::{BootTimeline, Failure, VmConfig, VmState};

pub(crate) use self::building::Started;
pub(crate) use self::caller::Caller;
use self::caller::{ANY_MACHINE, Call};
pub(crate) use self::consoles::Consoles;
use self::ending::{Busy, Ending, Next, Then};
use self::guest_end::LateBlocks;
use self::migration::Expected;
pub(crate) use self::migration::{DestinationParts, SourceParts};
use self::mirror::Mirrors;
pub(crate) use self::mirror::{ListedMirror, MirrorParts, NewMirror, Successor};
use self::outgoing::Outgoing;
pub(crate) use self::outgoing::Purpose;
use self::resize::Resizes;
pub(crate) use self::snapshot::{NewOverlay, SwitchedDisk};
use crate::devices::{MachineOrigin, Opened};
use crate::failure::{self, BuildError};
use crate::guest_event::{self, GuestEnd, Port, Reporter, Reports};
use crate::machine::{self, Active, Host, Machine};

/// Resets of a guest that are served at once; further ones wait for [`RESET_INTERVAL`] each.
const RESETS_AT_ONCE: u32 = 8;
const RESET_INTERVAL: Duration = Duration::from_secs(1);
/// Events and log lines of one kind that a guest may cause at once; further ones are counted.
const NOISE_AT_ONCE: u32 = 16;
const NOISE_INTERVAL: Duration = Duration::from_secs(2);
/// Messages that are handled before other drivers have their turn.
const MESSAGES_PER_TURN: usize = 32;

/// An event that the driver receives, from a thread that it started or from the migration engine.
pub(crate) enum DriverEvent {
    /// A machine was built, or could not be.
    Built(Box<Result<Started, BuildError>>),
    /// The machine has given back all that it had.
    Gone,
    /// Work on the machine is done.
    Returned(Machine, Then),
    /// Work on the machine panicked, and the machine went with it.
    Lost,
    /// The host resources of a device to hot-add were opened, or could not be.
    Opened(String, Box<Result<Opened, BuildError>>),
    /// The migration engine calls the driver.
    Call(Call),
}

/// An event, and the number of the machine that it belongs to. A VM gets a new machine at each
/// reset; events of an earlier one are ignored.
pub(crate) type Numbered = (u64, DriverEvent);

/// The sender of a machine's reports and of the driver's own events.
pub(crate) type Events = EventSender<Reports, Numbered>;

enum Stage {
    Off,
    Building {
        asked: Option<Ask>,
    },
    On(Machine),
    /// Another thread works on the machine.
    Busy(Box<Busy>),
    /// The machine is being taken apart.
    Ending(Box<Ending>),
    /// A guest is to come from elsewhere.
    Expecting(Expected),
}

/// Why a machine ends.
enum End {
    Requested,
    PowerOff,
    Failed(Failure),
}

/// The owner of one VM.
pub(crate) struct Driver {
    host: Arc<Host>,
    config: Arc<VmConfig>,
    inbox: Inbox<Reports, Numbered>,
    events: Events,
    publisher: StatusPublisher,
    stage: Stage,
    /// Counts the machines that the VM has had.
    machine: u64,
    /// When the boot was asked for that is going on or was the last.
    asked_at: Instant,
    consoles: Consoles,
    /// Devices that are being opened, by their names.
    opening: BTreeMap<String, (Ask, NewDevice)>,
    resizes: Resizes,
    mirrors: Mirrors,
    /// The guest is moving away.
    outgoing: Option<Outgoing>,
    /// Blocks of the disks that are still at the source of a migration.
    late_blocks: LateBlocks,
    /// The latest migration, of which the failure of a guest tells.
    progress: Option<Progress>,
    /// The VM is deleted: the driver leaves its thread.
    is_deleted: bool,
    resets: Allowance,
    noise: Allowance,
}

impl Driver {
    pub(crate) fn new(
        host: Arc<Host>,
        config: Arc<VmConfig>,
        inbox: Inbox<Reports, Numbered>,
        events: Events,
        publisher: StatusPublisher,
    ) -> Self {
        Self {
            host,
            config,
            inbox,
            events,
            publisher,
            stage: Stage::Off,
            machine: 0,
            asked_at: Instant::now(),
            consoles: Consoles::default(),
            opening: BTreeMap::new(),
            resizes: Resizes::default(),
            mirrors: Mirrors::default(),
            outgoing: None,
            late_blocks: LateBlocks::default(),
            progress: None,
            is_deleted: false,
            resets: Allowance::new(RESETS_AT_ONCE, RESET_INTERVAL),
            noise: Allowance::new(NOISE_AT_ONCE, NOISE_INTERVAL),
        }
    }

    /// Returns the next message that can be handled in this stage.
    fn next(&mut self) -> Option<Message<Reports, Numbered>> {
        // Between two machines, and while another thread has the machine, only what ends the VM.
        let is_between = self.is_between();
        let is_busy = matches!(self.stage, Stage::Busy(_));
        // What is held back stays bounded: the inbox limits requests and merges reports, and a
        // guest cannot cause events. In `Busy` only the two events that end that stage pass.
        self.inbox.next(|peek| match peek {
            Peek::Ask(request) => !is_between || ends_vm(request),
            Peek::Reports => !is_busy,
            Peek::Event((_, event)) => {
                !is_busy || matches!(event, DriverEvent::Returned(..) | DriverEvent::Lost)
            }
        })
    }

    fn is_between(&self) -> bool {
        matches!(
            self.stage,
            Stage::Building { .. } | Stage::Busy(_) | Stage::Ending(_)
        )
    }

    fn answer(&mut self, ask: Ask, sources: &mut Sources<'_>) {
        let verb = ask.request.verb();
        // A machine that is being built is not shown yet, and can be called off all the same.
        if !self.is_between()
            && let Err(denied) = admit(self.publisher.current().state, verb)
        {
            ask.answer(Err(denied.into()));
            return;
        }
        if let Some(refused) = self.refused_while_moving(verb) {
            ask.answer(Err(refused));
            return;
        }
        if let Some(refused) = self.refused_while_mirroring(&ask.request) {
            ask.answer(Err(refused));
            return;
        }
        let answer = match &ask.request {
            Request::Boot => return self.boot(ask, sources),
            Request::Reboot => return self.rebuild(Some(ask), Instant::now()),
            Request::AddDevice(new) => {
                let new = new.clone();
                return self.add_device(ask, new);
            }
            Request::Delete | Request::Shutdown => return self.switch_off_for(ask, sources),
            Request::Pause => return self.pause(ask),
            Request::RemoveDevice(device) => self.remove_device(&device.id),
            Request::Resize(sizes) => {
                let sizes = sizes.clone();
                return self.resize(ask, &sizes);
            }
            Request::ResizeZone(zone) => {
                let zone = zone.clone();
                return self.resize_zone(ask, &zone);
            }
            Request::Resume
            | Request::PowerButton
            | Request::Nmi
            | Request::Counters
            | Request::MemoryMap
            | Request::Cpu
            | Request::ResizeDisk(_) => self.perform(&ask.request),
        };
        ask.answer(answer);
    }

    /// Pauses the VM. Another thread waits until the devices have stopped.
    fn pause(&mut self, ask: Ask) {
        self.lend(Active::pause_patiently, move |driver, paused, _| {
            ask.answer(paused.map_err(|late| internal(&late)).map(|()| {
                driver
                    .publisher
                    .update(|status| status.state = VmState::Paused);
                Reply::Done
            }));
        });
    }

    /// Performs requests that need a running machine and keep it.
    fn perform(&mut self, request: &Request) -> Result<Reply, RequestError> {
        let Stage::On(active) = &mut self.stage else {
            return match request {
                Request::Counters => Ok(Reply::Counters(spec::VmCounters::new())),
                _ => Err(internal("the VM has no machine")),
            };
        };
        match request {
            Request::Resume if self.outgoing.as_ref().is_some_and(Outgoing::is_stranded) => {
                self.stay().map_err(|why| {
                    RequestError::new(Category::Conflict, "vm-migrating", why.detail)
                })?;
            }
            Request::Resume => {
                active.resume().map_err(|error| internal(&error))?;
                self.publisher
                    .update(|status| status.state = VmState::Running);
            }
            Request::PowerButton => active.press_power_button(),
            Request::Nmi => active.nmi(),
            Request::Counters => return Ok(Reply::Counters(active.counters())),
            Request::MemoryMap => {
                return Ok(Reply::MemoryMap(machine::memory_map(&active.topology())));
            }
            Request::Cpu => {
                let profile = self.config.cpus.profile;
                let described = active.vcpus.model().describe(profile);
                return Ok(Reply::Cpu(Box::new(described)));
            }
            Request::ResizeDisk(disk) => devices::resize_disk(active.devices(), disk)?,
            // `answer` does these itself. Named one by one, so that a new request is not answered
            // with `Done` before the driver does anything for it.
            Request::Boot
            | Request::Pause
            | Request::Reboot
            | Request::Shutdown
            | Request::Delete
            | Request::AddDevice(_)
            | Request::RemoveDevice(_)
            | Request::Resize(_)
            | Request::ResizeZone(_) => return Err(internal("the driver has no such operation")),
        }
        Ok(Reply::Done)
    }

    fn boot(&mut self, ask: Ask, sources: &mut Sources<'_>) {
        self.consoles.close(sources);
        self.build(Some(ask), MachineOrigin::default(), None);
    }

    /// Replaces the machine by another, which is built `not_before` this time.
    fn rebuild(&mut self, asked: Option<Ask>, not_before: Instant) {
        match std::mem::replace(&mut self.stage, Stage::Off) {
            Stage::On(machine) => {
                let origin = MachineOrigin {
                    // Over a reset devices stay where they are, and the TPM's emulator stays.
                    on_bus: machine.devices().places(),
                    tpm: machine.tpm().map(|tpm| Arc::clone(tpm.emulator())),
                    ..MachineOrigin::default()
                };
                let next = Next::Build {
                    asked,
                    origin,
                    not_before,
                };
                self.mirrors.await_reset();
                if let Some(outgoing) = &self.outgoing {
                    outgoing.interrupt("guest-reset", "the guest was reset: begin again");
                }
                // Its disks are locked, and its taps taken, until it is gone.
                self.end_machine(machine, next);
            }
            // Requests and guests reset a machine that is on only.
            other => {
                self.stage = other;
                if let Some(ask) = asked {
                    ask.answer(Err(internal("the VM has no machine")));
                }
            }
        }
    }

    /// Starts a new machine number: reports of earlier machines are ignored from now on.
    fn next_machine(&mut self) {
        self.machine += 1;
        if let Some(outgoing) = self.outgoing.take() {
            outgoing.interrupt("guest-ended", "the guest has ended");
        }
        self.late_blocks = LateBlocks::default();
        self.mirrors.end_with_machine();
        self.resizes_end_with_machine();
        self.give_up_additions();
    }

    /// Returns a reporter for the machine in force: its events carry that machine's number.
    fn reporter(&self) -> Reporter {
        let (number, events) = (self.machine, self.events.clone());
        Reporter::new(move |event| events.report((number, event)))
    }

    /// Shows that the VM has no machine any more.
    fn off(&mut self, by: End, sources: &mut Sources<'_>) {
        // Those that waited for the machine after a reset.
        self.mirrors.end();
        self.consoles.close(sources);
        self.publisher.update(|status| {
            if status.state != VmState::Created {
                status.state = VmState::Shutdown;
            }
            status.devices.clear();
            status.balloon = None;
            status.hotplugged = Vec::new();
            status.vcpus = None;
            status.by_guest = !matches!(by, End::Requested);
            status.failure = match by {
                End::Requested | End::PowerOff => None,
                End::Failed(failure) => Some(failure),
            };
        });
    }

    /// Sets the configuration for the next machine, and publishes it with the names of this machine's pseudo
    /// terminals and taps.
    fn set_config(&mut self, config: Arc<VmConfig>) {
        let mut shown = Arc::clone(&config);
        self.consoles.show(Arc::make_mut(&mut shown));
        if let Stage::On(active) = &self.stage {
            devices::show_taps(active.devices(), &mut shown);
        }
        self.config = config;
        self.publisher.update(|status| status.config = shown);
    }

    fn take_input(&mut self, port: Port, sources: &mut Sources<'_>) {
        if let Stage::On(active) = &self.stage
            && let Some(input) = active.input(port)
        {
            self.consoles.take_input(port, input, sources);
        }
    }

    fn event(&mut self, event: DriverEvent, sources: &mut Sources<'_>) {
        match event {
            DriverEvent::Built(built) => self.built(*built, sources),
            DriverEvent::Gone => self.gone(sources),
            DriverEvent::Returned(machine, then) => self.returned(machine, then, sources),
            DriverEvent::Lost => self.lost(sources),
            DriverEvent::Opened(id, opened) => self.opened(&id, *opened),
            DriverEvent::Call(call) => call.answer(self, sources),
        }
    }

    /// Handles all that the machine reported, the end of the machine last.
    fn reported(&mut self, reports: Reports, sources: &mut Sources<'_>) {
        let Reports { first_entry, .. } = reports;
        self.note(first_entry, |boot, us| boot.first_entry_us = us);
        self.note(reports.first_debug_port, |boot, us| {
            boot.first_debug_port_us = us;
        });
        self.note(reports.first_serial, |boot, us| boot.first_serial_us = us);
        for port in Port::BOTH {
            // Descriptors are edge triggered: bytes that the guest had no room for cause no further
            // event. Without this report they would wait for more input.
            if reports.room[port as usize] && self.consoles.has_more(port) {
                self.take_input(port, sources);
            }
        }
        if reports.memory_changed {
            self.memory_changed();
        }
        // Before the guest's own end, which often follows.
        for event in reports.panics {
            tracing::warn!(event = event.name(), "a guest reports a panic");
            let detail = Some(event.name().to_owned());
            self.publisher.record("guest-panic", detail);
        }
        let mut stalled = Vec::new();
        for (id, device) in reports.devices {
            if let Some(why) = device.needs_reset {
                self.needs_reset(&id, &why);
            }
            if let Some(why) = device.stalled {
                stalled.push((id, why));
            }
        }
        // Before the guest's own end: a guest that crashes or resets over lost memory must end with
        // that failure, and must not boot again as if the host were sound.
        if let Some(offset) = reports.memory_lost
            && matches!(self.stage, Stage::On(_))
        {
            return self.memory_lost(failure::memory_lost(offset), sources);
        }
        let expired = reports.watchdog && self.watchdog_expired();
        let reset = expired.then_some(GuestEnd::Power(PowerEvent::Reset));
        match reports.end.or(reset) {
            Some(end) if self.late_blocks.are_awaited && !end.is_violation() => self.hold_end(end),
            Some(end) => return self.guest_ended(end, sources),
            None => {}
        }
        // Each of these may lend the machine. If `stalled` does, `ejected` finds `Busy` and reports
        // its slots again, for when the machine is back.
        self.stalled(stalled);
        self.ejected(reports.ejected);
        if reports.cpus {
            self.vcpus_answered();
        }
    }

    /// Whether the watchdog's expiry is the guest's fault and resets it. A guest whose pages are still
    /// arriving may have stood still for want of one. The watchdog reports again.
    fn watchdog_expired(&mut self) -> bool {
        let Stage::On(active) = &self.stage else {
            return false;
        };
        if active.memory().0.pages() != Pages::There {
            return false;
        }
        tracing::warn!("the watchdog expired: the guest is reset");
        self.publisher.record("watchdog-expired", None);
        true
    }

    /// Records that a device needs a reset. A guest can cause that as often as it likes.
    fn needs_reset(&mut self, id: &str, why: &str) {
        let Some(suppressed) = self.noise.take(Instant::now()) else {
            return;
        };
        tracing::warn!(id, why, suppressed, "a virtio device needs a reset");
        let mut detail = format!("{id}: {why}");
        if suppressed > 0 {
            detail = format!("{detail} ({suppressed} such events were suppressed)");
        }
        self.publisher.record("device-needs-reset", Some(detail));
    }

    fn note(&self, at: Option<Instant>, set: impl FnOnce(&mut BootTimeline, Option<u64>)) {
        let Some(at) = at else {
            return;
        };
        let us = self.microseconds(at);
        self.publisher
            .update(|status| set(status.boot.get_or_insert_default(), us));
    }

    fn microseconds(&self, at: Instant) -> Option<u64> {
        u64::try_from(at.checked_duration_since(self.asked_at)?.as_micros()).ok()
    }
}

impl Actor for Driver {
    fn woken(&mut self, sources: &mut Sources<'_>) -> Flow {
        let flow = self.work(sources);
        sources.wake_at(self.next_deadline());
        flow
    }

    fn ready(&mut self, key: usize, sources: &mut Sources<'_>) -> Flow {
        if let Some(port) = Port::BOTH.get(key) {
            self.take_input(*port, sources);
        }
        Flow::Stay
    }

    fn crashed(&mut self, message: &str) {
        self.fail(Failure {
            code: "driver-panicked".to_owned(),
            detail: format!("the VM's driver failed: {message}"),
            vcpu: None,
        });
    }

    fn violated(&mut self, violation: &Violation) {
        let detail = format!("the VM's driver: {violation}");
        self.fail(guest_event::sandbox_violation(&detail, None));
    }
}

impl Driver {
    /// Handles what has passed its deadline, and then messages.
    fn work(&mut self, sources: &mut Sources<'_>) -> Flow {
        self.check_time(sources);
        self.check_resizes();
        for _ in 0..MESSAGES_PER_TURN {
            if self.is_deleted {
                return Flow::Leave;
            }
            match self.next() {
                None => return Flow::Stay,
                // Reports of an earlier machine are ignored.
                Some(Message::Reports(reports)) if reports.machine != self.machine => {}
                Some(Message::Reports(reports)) => self.reported(reports, sources),
                Some(Message::Event((machine, event)))
                    if machine == self.machine || machine == ANY_MACHINE =>
                {
                    self.event(event, sources);
                }
                Some(Message::Event(_)) => {}
                Some(Message::Ask(ask)) => self.answer(ask, sources),
                Some(Message::Abandoned) => {
                    // Nothing waits for the machine, which is taken apart by itself.
                    self.stage = Stage::Off;
                    self.off(End::Requested, sources);
                    return Flow::Leave;
                }
            }
        }
        if self.is_deleted {
            return Flow::Leave;
        }
        Flow::Again
    }

    /// Ends the machine of a driver that leaves its thread.
    fn fail(&mut self, failure: Failure) {
        self.stage = Stage::Off;
        self.publisher.update(|status| {
            status.state = VmState::Shutdown;
            status.failure = Some(failure);
        });
    }
}

fn ends_vm(request: &Request) -> bool {
    matches!(request, Request::Delete | Request::Shutdown)
}

fn internal(error: &(impl std::fmt::Display + ?Sized)) -> RequestError {
    RequestError::new(Category::Internal, "machine-fault", error.to_string())
}
