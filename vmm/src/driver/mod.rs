//! The driver: the one owner of a VM.
//!
//! It lives on a pool thread and never blocks it for long: building a machine, which reads files
//! and unpacks kernels, is done by a thread made for it, and what is asked meanwhile waits.
//!
//! ```text
//!            Boot                    built
//!   Off ──────────────► Building ──────────► On ◄──┐ Pause, Resume
//!    ▲                   │    ▲              │ └───┘
//!    │   cannot be built │    └──────────────┤ reset
//!    └───────────────────┴───────────────────┘ Shutdown, power-off, failure
//! ```
//!
//! A guest that comes from elsewhere goes from `Off` to `Expecting` and then to `On` (`migration`).

mod consoles;
mod devices;
mod migration;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use ::devices::PowerEvent;
use ::devices::event_loop::{Actor, Flow, Sources};
use ::migration::Progress;
use control::{
    Ask, Category, EventSender, Inbox, Message, NewDevice, Reply, Request, RequestError,
    StatusPublisher, admit,
};
use spec::{BootTimeline, Failure, VmConfig, VmState};

use virtio_devices::TransportEvent;

use self::consoles::Consoles;
pub(crate) use self::migration::{Arrival, Caller, Departure};
use self::migration::{Call, Expected, Leaving};
use crate::devices::{MachineOrigin, Opened};
use crate::failure::{self, BuildError};
use crate::guest_event::{GuestEvent, Port, Reporter};
use crate::machine::{self, Active, Built, Host};

/// An event that the driver receives: from its machine, from a thread that it started, or from the
/// migration engine.
pub(crate) enum DriverEvent {
    /// The machine reports an event.
    Guest(GuestEvent),
    /// A machine was built, or could not be.
    Built(Box<Result<Active, BuildError>>),
    /// The host resources of a device to hot-add were opened, or could not be.
    Opened(String, Box<Result<Opened, BuildError>>),
    /// The migration engine calls the driver.
    Call(Call),
}

/// An event, and the number of the machine that it belongs to. A VM gets a new machine at each
/// reset; events of an earlier one are ignored.
pub(crate) type Numbered = (u64, DriverEvent);

enum Stage {
    Off,
    Building {
        asked: Option<Ask>,
    },
    On(Box<Active>),
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
    inbox: Inbox<Numbered>,
    reports: EventSender<Numbered>,
    publisher: StatusPublisher,
    stage: Stage,
    /// Counts the machines that the VM has had.
    machine: u64,
    /// When the boot was asked for that is going on or was the last.
    asked_at: Instant,
    consoles: Consoles,
    /// Asked while a machine is being built.
    waiting: VecDeque<Ask>,
    /// Devices that are being opened, by their names.
    opening: BTreeMap<String, (Ask, NewDevice)>,
    /// The guest is moving away.
    leaving: Option<Leaving>,
    /// The latest migration, of which the failure of a guest tells.
    progress: Option<Progress>,
}

impl Driver {
    pub(crate) fn new(
        host: Arc<Host>,
        config: Arc<VmConfig>,
        inbox: Inbox<Numbered>,
        reports: EventSender<Numbered>,
        publisher: StatusPublisher,
    ) -> Self {
        Self {
            host,
            config,
            inbox,
            reports,
            publisher,
            stage: Stage::Off,
            machine: 0,
            asked_at: Instant::now(),
            consoles: Consoles::default(),
            waiting: VecDeque::new(),
            opening: BTreeMap::new(),
            leaving: None,
            progress: None,
        }
    }

    /// What to do next: what the guest did first, then what was asked, in its order; nothing that
    /// is asked while a machine is being built.
    fn next(&mut self) -> Option<Message<Numbered>> {
        loop {
            match self.inbox.next() {
                Some(Message::Ask(ask)) => self.waiting.push_back(ask),
                Some(other) => return Some(other),
                None if matches!(self.stage, Stage::Building { .. }) => return None,
                None => return self.waiting.pop_front().map(Message::Ask),
            }
        }
    }

    fn answer(&mut self, ask: Ask, sources: &mut Sources<'_>) -> Flow {
        let verb = ask.request.verb();
        if let Err(denied) = admit(self.publisher.current().state, verb) {
            ask.answer(Err(denied.into()));
            return Flow::Stay;
        }
        if let Some(refused) = self.refused_while_moving(verb) {
            ask.answer(Err(refused));
            return Flow::Stay;
        }
        let answer = match &ask.request {
            Request::Boot => {
                self.boot(ask, sources);
                return Flow::Stay;
            }
            Request::Reboot => {
                self.build(Some(ask));
                return Flow::Stay;
            }
            Request::AddDevice(new) => {
                let new = new.clone();
                self.add_device(ask, new);
                return Flow::Stay;
            }
            Request::Delete => {
                self.switch_off(End::Requested, sources);
                ask.answer(Ok(Reply::Done));
                return Flow::Leave;
            }
            Request::Shutdown => {
                self.switch_off(End::Requested, sources);
                Ok(Reply::Done)
            }
            Request::RemoveDevice(device) => self.remove_device(&device.id),
            Request::Resize(sizes) => self.resize(sizes),
            Request::Pause
            | Request::Resume
            | Request::PowerButton
            | Request::Nmi
            | Request::Counters
            | Request::MemoryMap
            | Request::ResizeDisk(_) => self.perform(&ask.request),
        };
        ask.answer(answer);
        Flow::Stay
    }

    /// What needs a machine that is on and leaves it on.
    fn perform(&mut self, request: &Request) -> Result<Reply, RequestError> {
        let Stage::On(active) = &mut self.stage else {
            return match request {
                Request::Counters => Ok(Reply::Counters(spec::VmCounters::new())),
                _ => Err(internal("there is no machine")),
            };
        };
        match request {
            Request::Pause => {
                active.pause().map_err(|late| internal(&late))?;
                self.publisher
                    .update(|status| status.state = VmState::Paused);
            }
            Request::Resume if self.leaving.as_ref().is_some_and(Leaving::is_stranded) => {
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
            Request::ResizeDisk(disk) => devices::resize_disk(active.devices(), disk)?,
            // `answer` does these itself. Named one by one, so that a new request is not answered
            // with `Done` before the driver does anything for it.
            Request::Boot
            | Request::Reboot
            | Request::Shutdown
            | Request::Delete
            | Request::AddDevice(_)
            | Request::RemoveDevice(_)
            | Request::Resize(_) => return Err(internal("the driver has no such operation")),
        }
        Ok(Reply::Done)
    }

    fn boot(&mut self, ask: Ask, sources: &mut Sources<'_>) {
        self.consoles.close(sources);
        match Consoles::open(&self.config, self.host.terminal) {
            Ok(consoles) => self.consoles = consoles,
            Err(error) => {
                ask.answer(Err((&error).into()));
                return;
            }
        }
        self.consoles.watch_all(sources);
        self.set_config(Arc::clone(&self.config));
        self.build(Some(ask));
    }

    /// Has a machine built, in place of the one that there is.
    fn build(&mut self, asked: Option<Ask>) {
        let origin = MachineOrigin {
            on_bus: match &self.stage {
                // Over a reset they stay where they are.
                Stage::On(active) => active.devices().places(),
                _ => BTreeMap::new(),
            },
            ..MachineOrigin::default()
        };
        self.stage = Stage::Building { asked };
        self.next_machine();
        self.asked_at = Instant::now();
        let reporter = self.reporter();
        let (host, config) = (Arc::clone(&self.host), Arc::clone(&self.config));
        let outputs = self.consoles.outputs();
        let (number, reports) = (self.machine, self.reports.clone());
        let builder = std::thread::Builder::new().name("vm-build".to_owned());
        let started = builder.spawn(move || {
            let built = Built::new(&host, &config, outputs, &origin, &reporter)
                .and_then(|built| built.boot(&config, &reporter));
            reports.send((number, DriverEvent::Built(Box::new(built))));
        });
        if let Err(source) = started {
            let error = BuildError::host("start a thread")(source);
            let built = Box::new(Err(error));
            self.reports.send((number, DriverEvent::Built(built)));
        }
    }

    fn built(&mut self, built: Result<Active, BuildError>, sources: &mut Sources<'_>) {
        let Stage::Building { asked } = std::mem::replace(&mut self.stage, Stage::Off) else {
            return;
        };
        let started = built.and_then(|mut active| {
            active.resume().map_err(BuildError::from)?;
            Ok(active)
        });
        let answer = match started {
            Ok(active) => {
                let devices = active.devices().tree();
                let balloon = active.devices().balloon();
                self.stage = Stage::On(Box::new(active));
                self.set_config(Arc::clone(&self.config));
                let built_us = self.microseconds(Instant::now());
                self.publisher.update(|status| {
                    let was_on = matches!(status.state, VmState::Running | VmState::Paused);
                    status.reboots = if was_on { status.reboots + 1 } else { 0 };
                    status.state = VmState::Running;
                    status.devices = devices;
                    status.balloon = balloon;
                    status.failure = None;
                    status.boot = Some(BootTimeline {
                        built_us,
                        ..BootTimeline::default()
                    });
                });
                // What came while there was no machine.
                for port in Port::BOTH {
                    self.take_input(port, sources);
                }
                Ok(Reply::Done)
            }
            Err(error) => {
                tracing::warn!(%error, "a machine cannot be built");
                let was_on = matches!(
                    self.publisher.current().state,
                    VmState::Running | VmState::Paused
                );
                if was_on {
                    self.switch_off(End::Failed(failure::told(&error)), sources);
                } else {
                    self.consoles.close(sources);
                }
                Err(RequestError::from(&error))
            }
        };
        if let Some(ask) = asked {
            ask.answer(answer);
        }
    }

    /// What the machine that there was still has to say is of no interest.
    fn next_machine(&mut self) {
        self.machine += 1;
        // Of that one, its guest will not hear any more.
        self.leaving = None;
        self.give_up_additions();
    }

    /// Returns a reporter for the machine in force: its events carry that machine's number.
    fn reporter(&self) -> Reporter {
        let (number, reports) = (self.machine, self.reports.clone());
        Reporter::new(move |event| reports.send((number, DriverEvent::Guest(event))))
    }

    /// Ends the machine.
    fn switch_off(&mut self, by: End, sources: &mut Sources<'_>) {
        self.stage = Stage::Off;
        self.next_machine();
        self.consoles.close(sources);
        self.publisher.update(|status| {
            if status.state != VmState::Created {
                status.state = VmState::Shutdown;
            }
            status.devices.clear();
            status.balloon = None;
            status.by_guest = !matches!(by, End::Requested);
            status.failure = match by {
                End::Requested | End::PowerOff => None,
                End::Failed(failure) => Some(failure),
            };
        });
    }

    /// What the next machine is built from, and what is shown: with the names of pseudo terminals
    /// and taps that were made for this one.
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
            DriverEvent::Guest(event) => self.guest_event(event, sources),
            DriverEvent::Built(built) => self.built(*built, sources),
            DriverEvent::Opened(id, opened) => self.opened(&id, *opened),
            DriverEvent::Call(call) => call.answer(self, sources),
        }
    }

    fn guest_event(&mut self, event: GuestEvent, sources: &mut Sources<'_>) {
        match event {
            GuestEvent::Power(PowerEvent::PowerOff) => self.switch_off(End::PowerOff, sources),
            GuestEvent::Power(PowerEvent::Reset) => self.build(None),
            GuestEvent::Failed(mut failure) => {
                self.add_progress(&mut failure);
                tracing::warn!(
                    code = failure.code,
                    detail = failure.detail,
                    "a guest failed"
                );
                self.switch_off(End::Failed(failure), sources);
            }
            GuestEvent::Room(port) => {
                if self.consoles.has_more(port) {
                    self.take_input(port, sources);
                }
            }
            GuestEvent::Device(id, TransportEvent::NeedsReset(why)) => {
                self.publisher
                    .record("device-needs-reset", Some(format!("{id}: {why}")));
            }
            GuestEvent::Device(id, TransportEvent::Stalled(why)) => self.stalled(id, why),
            GuestEvent::Device(id, event) => tracing::debug!(id, ?event, "a device"),
            GuestEvent::Ejected(slot) => self.ejected(slot),
            GuestEvent::FirstEntry(at) => self.note(at, |boot, us| boot.first_entry_us = us),
            GuestEvent::FirstDebugPort(at) => {
                self.note(at, |boot, us| boot.first_debug_port_us = us);
            }
            GuestEvent::FirstSerial(at) => self.note(at, |boot, us| boot.first_serial_us = us),
        }
    }

    fn note(&self, at: Instant, set: impl FnOnce(&mut BootTimeline, Option<u64>)) {
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
        while let Some(message) = self.next() {
            match message {
                Message::Event((machine, event))
                    if machine == self.machine || machine == migration::ANY_MACHINE =>
                {
                    self.event(event, sources);
                }
                // Of a machine that is no more.
                Message::Event(_) => {}
                Message::Ask(ask) => {
                    if self.answer(ask, sources) == Flow::Leave {
                        return Flow::Leave;
                    }
                }
                Message::Abandoned => {
                    self.switch_off(End::Requested, sources);
                    return Flow::Leave;
                }
            }
        }
        Flow::Stay
    }

    fn ready(&mut self, key: usize, sources: &mut Sources<'_>) -> Flow {
        if let Some(port) = Port::BOTH.get(key) {
            self.take_input(*port, sources);
        }
        Flow::Stay
    }

    fn crashed(&mut self, message: &str) {
        let detail = format!("the VM's driver failed: {message}");
        let failure = Failure {
            code: "driver-panicked".to_owned(),
            detail,
            vcpu: None,
        };
        self.stage = Stage::Off;
        self.publisher.update(|status| {
            status.state = VmState::Shutdown;
            status.failure = Some(failure);
        });
    }
}

fn internal(error: &(impl std::fmt::Display + ?Sized)) -> RequestError {
    RequestError::new(Category::Internal, "machine-fault", error.to_string())
}
