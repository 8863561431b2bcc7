//! The end of a machine, and work on a machine that may block: both happen on other threads.
//!
//! ```text
//!          work may block             the thread gives the machine back
//!   On ──────────────────────► Busy ─────────────────────────────────────► On
//!    │                           │ shutdown, delete: the guest is halted at once
//!    │ shutdown, reset, failure  ▼
//!    └──────────────────────► Ending ── all is given back, or too late ──► Off, Building
//! ```
//!
//! A request that ends the VM is answered when the machine has given everything back, so that its
//! disks can be used again, and at the latest after [`END_PATIENCE`].

use std::sync::mpsc;
use std::time::{Duration, Instant};

use ::devices::event_loop::Sources;
use control::{Ask, Category, Reply, RequestError};
use spec::Failure;

use super::{Driver, DriverEvent, End, Stage};
use crate::devices::MachineOrigin;
use crate::guest_event::Port;
use crate::machine::{Active, Halter, Machine};

/// How long a client waits for a machine that does not give its resources back, because a device
/// waits for storage that hangs. The VM then counts as switched off.
pub(super) const END_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// The driver's next step when a machine is gone.
pub(super) enum Next {
    /// The VM is switched off.
    Off { by: End, asked: Vec<Ask> },
    /// Another machine is built, not before its time.
    Build {
        asked: Option<Ask>,
        origin: MachineOrigin,
        not_before: Instant,
    },
}

/// A machine that is being taken apart.
pub(super) struct Ending {
    next: Next,
    deadline: Instant,
    is_gone: bool,
}

/// A machine that another thread works on.
pub(super) struct Busy {
    halter: Halter,
    /// Requests that ended the VM meanwhile.
    end: Option<(Vec<Ask>, Instant)>,
}

/// Continues with the driver when the work on a machine is done.
pub(crate) type Then = Box<dyn FnOnce(&mut Driver, &mut Sources<'_>) + Send>;

impl Driver {
    /// Takes the machine apart, and then does what is `next`.
    pub(super) fn end_machine(&mut self, machine: Machine, next: Next) {
        // First, so that the driver ignores what the old machine still reports while it is taken
        // apart, such as a second reset. `Gone` therefore carries the new number.
        self.next_machine();
        let (number, events) = (self.machine, self.events.clone());
        machine.end(move || events.send((number, DriverEvent::Gone)));
        let deadline = Instant::now() + END_PATIENCE;
        self.stage = Stage::Ending(Box::new(Ending {
            next,
            deadline,
            is_gone: false,
        }));
    }

    /// Ends the machine, if there is one, because the guest did or because the host failed.
    pub(super) fn switch_off(&mut self, by: End, sources: &mut Sources<'_>) {
        let asked = Vec::new();
        match std::mem::replace(&mut self.stage, Stage::Off) {
            Stage::On(machine) => self.end_machine(machine, Next::Off { by, asked }),
            _ => {
                self.next_machine();
                self.off(by, sources);
            }
        }
    }

    /// Ends the VM's machine by request, in whatever stage it is. The request is answered when the
    /// machine is gone.
    pub(super) fn switch_off_for(&mut self, ask: Ask, sources: &mut Sources<'_>) {
        let by = End::Requested;
        match std::mem::replace(&mut self.stage, Stage::Off) {
            Stage::On(machine) => {
                let asked = vec![ask];
                self.end_machine(machine, Next::Off { by, asked });
            }
            Stage::Ending(mut ending) => {
                ending.next.give_up(ask);
                self.mirrors.end();
                self.stage = Stage::Ending(ending);
                if self.is_gone() {
                    self.finish_ending(sources);
                }
            }
            Stage::Busy(mut busy) => {
                // The thread that has the machine gives it back before it can be taken apart.
                busy.halter.halt();
                let deadline = Instant::now() + END_PATIENCE;
                // Later requests share the first one's deadline: repeating `Delete` must not
                // defer it.
                let (asked, _) = busy.end.get_or_insert((Vec::new(), deadline));
                asked.push(ask);
                self.stage = Stage::Busy(busy);
            }
            Stage::Building { asked } => {
                // The building thread will find that its machine's number is out of date.
                refuse(asked);
                self.next_machine();
                self.off(by, sources);
                self.answer_end(ask);
            }
            Stage::Off | Stage::Expecting(_) => {
                self.next_machine();
                self.off(by, sources);
                self.answer_end(ask);
            }
        }
    }

    /// Answers a request that ended the VM. A VM that is deleted leaves its thread next.
    fn answer_end(&mut self, ask: Ask) {
        self.is_deleted |= ask.request == control::Request::Delete;
        ask.answer(Ok(Reply::Done));
    }

    fn is_gone(&self) -> bool {
        matches!(&self.stage, Stage::Ending(ending) if ending.is_gone)
    }

    /// The machine has given back all that it had.
    pub(super) fn gone(&mut self, sources: &mut Sources<'_>) {
        // After the deadline the stage is `Off` under the same number. This event then has no
        // effect: the VM already counts as switched off.
        if let Stage::Ending(ending) = &mut self.stage {
            ending.is_gone = true;
            self.finish_ending(sources);
        }
    }

    /// Does what follows the end of a machine, when its time has come.
    fn finish_ending(&mut self, sources: &mut Sources<'_>) {
        let Stage::Ending(ending) = std::mem::replace(&mut self.stage, Stage::Off) else {
            return;
        };
        match ending.next {
            Next::Build { not_before, .. } if not_before > Instant::now() => {
                self.stage = Stage::Ending(ending);
            }
            Next::Build { asked, origin, .. } => {
                let outputs = self.consoles.outputs();
                self.build(asked, origin, Some(outputs));
            }
            Next::Off { by, asked } => {
                self.off(by, sources);
                asked.into_iter().for_each(|ask| self.answer_end(ask));
            }
        }
    }

    /// Returns when the driver has something to do by itself next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Ending(ending) => match &ending.next {
                Next::Build { not_before, .. } if ending.is_gone => Some(*not_before),
                _ => Some(ending.deadline),
            },
            Stage::Busy(busy) => busy.end.as_ref().map(|(_, deadline)| *deadline),
            Stage::On(_) => self.resizes.next_deadline(),
            Stage::Off | Stage::Building { .. } | Stage::Expecting(_) => None,
        }
    }

    /// Looks whether a deadline has passed, or the time for the next machine has come.
    pub(super) fn check_time(&mut self, sources: &mut Sources<'_>) {
        let now = Instant::now();
        match &mut self.stage {
            Stage::Ending(ending) if ending.is_gone => self.finish_ending(sources),
            Stage::Ending(ending) if ending.deadline <= now => {
                let stuck = stuck();
                tracing::error!(
                    detail = stuck.detail,
                    "a machine was not taken apart in time"
                );
                self.publisher
                    .record("machine-stuck", Some(stuck.detail.clone()));
                // No machine is built while the old one may still hold the locks of the disks and
                // write to them.
                if let Next::Build { asked, .. } = &mut ending.next {
                    refuse(asked.take());
                    ending.next = Next::Off {
                        by: End::Failed(stuck),
                        asked: Vec::new(),
                    };
                }
                self.finish_ending(sources);
            }
            Stage::Busy(busy) => {
                let Some((asked, _)) = busy.end.take_if(|(_, deadline)| *deadline <= now) else {
                    return;
                };
                // When the thread gives the machine back, nothing waits for it: it is taken apart.
                self.stage = Stage::Off;
                self.next_machine();
                self.publisher.record("machine-stuck", Some(stuck().detail));
                self.off(End::Requested, sources);
                asked.into_iter().for_each(|ask| self.answer_end(ask));
            }
            _ => {}
        }
    }

    /// Has another thread work on the machine, and continues with `then`. Other requests wait, but
    /// for those that end the VM. False if there is no machine.
    pub(super) fn lend<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Active) -> R + Send + 'static,
        then: impl FnOnce(&mut Self, R, &mut Sources<'_>) + Send + 'static,
    ) -> bool {
        let mut machine = match std::mem::replace(&mut self.stage, Stage::Off) {
            Stage::On(machine) => machine,
            other => {
                self.stage = other;
                return false;
            }
        };
        let halter = machine.halter();
        self.stage = Stage::Busy(Box::new(Busy { halter, end: None }));
        // The number stays: this is the same machine, and its reports count once it is back. If
        // the deadline of an end passes first, `Returned` is stale; dropping it ends the machine.
        let (number, events) = (self.machine, self.events.clone());
        self.host.background.run(move || {
            let mut lost = Lost(Some((number, events.clone())));
            // If `work` panics, unwinding drops the machine and `lost`, which sends `Lost`. Without
            // that event the VM would stay `Busy` until a client ends it.
            let result = work(&mut machine);
            lost.0 = None;
            let then: Then = Box::new(move |driver, sources| then(driver, result, sources));
            events.send((number, DriverEvent::Returned(machine, then)));
        });
        true
    }

    /// The machine went with the work on it.
    pub(super) fn lost(&mut self, sources: &mut Sources<'_>) {
        let Stage::Busy(busy) = std::mem::replace(&mut self.stage, Stage::Off) else {
            return;
        };
        let failure = Failure {
            code: "driver-panicked".to_owned(),
            detail: "work on the VM's machine failed inside the service".to_owned(),
            vcpu: None,
        };
        self.next_machine();
        self.off(End::Failed(failure), sources);
        let asked = busy.end.map(|(asked, _)| asked).unwrap_or_default();
        asked.into_iter().for_each(|ask| self.answer_end(ask));
    }

    /// Another thread gives the machine back.
    pub(super) fn returned(&mut self, machine: Machine, then: Then, sources: &mut Sources<'_>) {
        let Stage::Busy(busy) = std::mem::replace(&mut self.stage, Stage::Off) else {
            return;
        };
        match busy.end {
            // `then` is dropped, and with it the `Ask` of the request that lent the machine: its
            // client gets an error instead of waiting for a machine that ends.
            Some((asked, _)) => {
                let by = End::Requested;
                self.end_machine(machine, Next::Off { by, asked });
            }
            None => {
                self.stage = Stage::On(machine);
                then(self, sources);
                // Descriptors that became ready meanwhile do not say so again.
                for port in Port::BOTH {
                    self.take_input(port, sources);
                }
            }
        }
    }
}

/// Reports to the driver that the machine was lost with the work on it, which panicked.
struct Lost(Option<(u64, super::Events)>);

impl Drop for Lost {
    fn drop(&mut self) {
        if let Some((number, events)) = self.0.take() {
            events.send((number, DriverEvent::Lost));
        }
    }
}

impl Next {
    /// A request ends the VM: no other machine is built.
    fn give_up(&mut self, ask: Ask) {
        match self {
            Self::Off { asked, .. } => asked.push(ask),
            Self::Build { asked, .. } => {
                refuse(asked.take());
                *self = Self::Off {
                    by: End::Requested,
                    asked: vec![ask],
                };
            }
        }
    }
}

/// Answers a request for a machine that is not built, because another request ended the VM.
fn refuse(asked: Option<Ask>) {
    if let Some(ask) = asked {
        let detail = "the VM was shut down before its machine was built";
        let ended = RequestError::new(Category::Conflict, "machine-ended", detail);
        ask.answer(Err(ended));
    }
}

fn stuck() -> Failure {
    Failure {
        code: "machine-stuck".to_owned(),
        detail: format!(
            "the machine did not release its resources within {} s because its storage does not \
             respond; its disks stay locked until it responds",
            END_PATIENCE.as_secs()
        ),
        vcpu: None,
    }
}

/// How long the engine waits for a machine that was given up.
const GONE_PATIENCE: Duration = Duration::from_secs(10);

/// The end of a machine, for the engine's threads, which may wait for it.
pub(crate) struct Gone(mpsc::Receiver<()>);

impl Gone {
    pub(super) fn of(machine: Machine) -> Self {
        let (gone, heard) = mpsc::channel();
        machine.end(move || {
            // The engine may have stopped waiting.
            let _ = gone.send(());
        });
        Self(heard)
    }

    pub(super) fn already() -> Self {
        // Its sender is dropped here.
        Self(mpsc::channel().1)
    }

    /// Waits, with a time limit, until the machine has released its resources.
    pub(crate) fn wait(self) {
        if let Err(mpsc::RecvTimeoutError::Timeout) = self.0.recv_timeout(GONE_PATIENCE) {
            tracing::error!("a machine was not taken apart in time: its storage does not respond");
        }
    }
}
