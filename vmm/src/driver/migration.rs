//! A guest that moves away, or comes: what the driver does for the migration's engine, which has
//! threads of its own and asks for each step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ::devices::event_loop::Sources;
use ::devices::pci::Bdf;
use ::devices::tpm::{LoadedTpm, Tpm, TpmSnapshot};
use control::{Arrival, Category, RequestError, SnapshotOf, Verb};
use hypervisor::MemSlots;
use memory::Pages;
use migration::{Decision, Progress, Refusal, Stopped, Whereabouts};
use spec::{Failure, VmConfig, VmState};
use virtio_devices::block::DiskAccess;

use super::consoles::Consoles;
use super::ending::Gone;
use super::outgoing::{Departure, Outgoing, OutgoingState, Purpose, with_advice};
use super::resize::Resizes;
use super::{Caller, Driver, End, Stage, internal};
use crate::arch::x86_64::cpu_model::CpuModel;
use crate::devices::DeviceHandle;
use crate::failure::MoveError;
use crate::guest_event::{Port, Reporter};
use crate::machine::{Active, Extent, GuestRam, Host, Machine, NotParked};

/// The parts of a source's machine that the engine needs.
pub(crate) struct SourceParts {
    /// Held until the operation has ended.
    pub(crate) _departure: Departure,
    pub(crate) caller: Caller,
    pub(crate) config: Arc<VmConfig>,
    pub(crate) places: BTreeMap<String, Bdf>,
    pub(crate) ram: GuestRam,
    pub(crate) memslots: Arc<MemSlots>,
    pub(crate) throttle: crate::machine::Throttle,
    /// The disks of the machine, by their names.
    pub(crate) disks: Vec<(String, DiskAccess)>,
    /// The TPM, which the engine reads itself: that may take a while.
    pub(crate) tpm: Option<Arc<Tpm>>,
    /// The guest is paused, by its owner.
    pub(crate) is_paused: bool,
}

/// The parts for building a destination's machine.
pub(crate) struct DestinationParts {
    pub(crate) caller: Caller,
    pub(crate) host: Arc<Host>,
    pub(crate) reporter: Reporter,
}

pub(super) const PAGES_ARRIVING: &str = "pages of the guest's memory are still arriving from the source or the \
                              snapshot; wait until that migration or restore is Completed";

pub(super) fn refused(code: &str) -> impl FnOnce(MoveError) -> Refusal {
    move |error| Refusal::new(code, error.to_string())
}

pub(super) fn no_machine() -> Refusal {
    Refusal::new("machine-gone", "the VM has no machine")
}

pub(super) fn moving(detail: &str) -> RequestError {
    RequestError::new(Category::Conflict, "vm-migrating", detail)
}

impl Driver {
    /// Why a request cannot be done while a guest moves, if it cannot.
    pub(super) fn refused_while_moving(&mut self, verb: Verb) -> Option<RequestError> {
        let phase = self
            .progress
            .as_ref()
            .map(|progress| progress.report().phase);
        let refuse = |detail: &str| Some(moving(&with_advice(detail, phase)));
        if matches!(verb, Verb::Counters) {
            return None;
        }
        if let Stage::Expecting(expected) = &self.stage {
            // Before the commit, `cancel` succeeds and the guest stays at the source. After
            // it, this VM may hold the only guest, and a `Delete` would lose it.
            return match verb {
                // The engine finds that the machine is gone.
                Verb::Delete if expected.decision.cancel().is_ok() => None,
                _ => refuse("the VM's guest has not arrived yet"),
            };
        }
        if let Some(refused) = self.late_blocks.refuse(verb) {
            return Some(refused);
        }
        if let Stage::On(active) = &self.stage
            && (verb == Verb::Pause || verb.changes_machine())
            && active.memory().0.pages() != Pages::There
        {
            // A device may be waiting for a page, and these requests wait for the devices.
            return Some(RequestError::new(
                Category::Conflict,
                "pages-arriving",
                with_advice(PAGES_ARRIVING, phase),
            ));
        }
        let outgoing = self.outgoing.as_ref()?;
        if matches!(
            outgoing.state,
            OutgoingState::Snapshot | OutgoingState::Imaged
        ) {
            return outgoing.refused_while_saving(verb);
        }
        let is_stopped = outgoing.is_stopped();
        match verb {
            Verb::MemoryMap | Verb::Cpu | Verb::Counters => None,
            // The migration is over and the guest is stranded: this may work by now.
            Verb::Resume | Verb::Shutdown | Verb::Delete if outgoing.is_stranded() => None,
            // The engine is gone, and nothing else would ever free the VM.
            Verb::Shutdown | Verb::Delete if outgoing.is_abandoned() => None,
            // The destination may hold the disks' locks and may run the guest by now. Only the
            // migration's outcome says whether the machine here may run or end.
            _ if is_stopped => refuse(match outgoing.purpose {
                Purpose::Move => "the VM's guest is stopped, for a hand-over to another service",
                Purpose::Snapshot(_) | Purpose::CoreDump => {
                    "the VM's guest is stopped for a moment, for a snapshot or forks: try again"
                }
            }),
            // `cancel` and the engine's commit exclude each other: either the request ends the
            // machine here, or the guest moves, never both.
            Verb::Reboot | Verb::Shutdown | Verb::Delete => match outgoing.decision.cancel() {
                Ok(()) => None,
                Err(late) => refuse(&late.to_string()),
            },
            // The destination built its machine from the configuration at the start. The state
            // of a changed machine would not load there.
            Verb::AddDevice
            | Verb::RemoveDevice
            | Verb::Resize
            | Verb::ResizeZone
            | Verb::ResizeDisk => refuse(outgoing.busy()),
            // Neither changes what the destination knows of the machine. A new verb belongs here
            // only if that is true of it.
            Verb::Boot | Verb::Pause | Verb::Resume | Verb::PowerButton | Verb::Nmi => None,
        }
    }

    /// Checks whether the guest can move away, or be saved, now. Returns whether its owner has paused it.
    fn check_departure(&self, purpose: Purpose) -> Result<bool, RequestError> {
        let conflict =
            |code: &str, detail: &str| Err(RequestError::new(Category::Conflict, code, detail));
        if let Some(outgoing) = &self.outgoing {
            return Err(moving(outgoing.busy()));
        }
        // A core dump contains nothing of the disks.
        if purpose != Purpose::CoreDump {
            self.check_no_mirror()?;
        }
        let state = self.publisher.current().state;
        let of_paused = match purpose {
            Purpose::Snapshot(SnapshotOf::Paused) => Some("a snapshot is taken"),
            Purpose::CoreDump => Some("a core dump is written"),
            Purpose::Move | Purpose::Snapshot(SnapshotOf::PausedOrRunning) => None,
        };
        if let Some(what) = of_paused
            && state != VmState::Paused
        {
            let detail = format!("{what} of a Paused VM, and this one is {state}");
            return conflict("wrong-state", &detail);
        }
        // A device that is plugged or ejected during the copy would make the machine differ from
        // the configuration that the destination gets. The check of `leaving` below has the same
        // reason.
        if !self.opening.is_empty() {
            return conflict("vm-busy", "a device is being added to the VM");
        }
        let Stage::On(active) = &self.stage else {
            let detail = "the VM must be Running or Paused to be moved or saved, and has no guest";
            return conflict("wrong-state", detail);
        };
        if let Some(id) = active.devices().leaving() {
            let detail =
                format!("the VM's guest has not ejected the device {id} yet; a reboot removes it");
            return conflict("vm-busy", &detail);
        }
        if active.memory().0.pages() != Pages::There {
            return conflict("pages-arriving", PAGES_ARRIVING);
        }
        Ok(state == VmState::Paused)
    }

    /// A guest begins to move away, or a snapshot of it is begun.
    pub(crate) fn depart(
        &mut self,
        purpose: Purpose,
        decision: &Decision,
        progress: &Progress,
    ) -> Result<SourceParts, RequestError> {
        let is_paused = self.check_departure(purpose)?;
        let Stage::On(active) = &self.stage else {
            return Err(internal(&no_machine()));
        };
        let (ram, memslots) = active.memory();
        // The caller is bound to this machine: after a guest's reset the engine's next step fails
        // with `machine-gone` instead of acting on another machine.
        let caller = Caller {
            machine: self.machine,
            to: self.events.clone(),
        };
        let mark = Arc::default();
        let parts = SourceParts {
            _departure: Departure {
                caller: caller.clone(),
                mark: Arc::clone(&mark),
            },
            caller,
            config: Arc::clone(&self.config),
            places: active.devices().places(),
            ram,
            memslots,
            throttle: active.throttle(),
            disks: active.devices().disks(),
            tpm: active.tpm(),
            is_paused,
        };
        self.publisher.record(
            match purpose {
                Purpose::Move => "migrating",
                Purpose::Snapshot(_) => "snapshotting",
                Purpose::CoreDump => "core-dumping",
            },
            None,
        );
        self.progress = Some(progress.clone());
        self.outgoing = Some(Outgoing {
            mark,
            decision: decision.clone(),
            purpose,
            state: match purpose {
                Purpose::Snapshot(_) if is_paused => OutgoingState::Snapshot,
                Purpose::CoreDump => OutgoingState::Snapshot,
                Purpose::Move | Purpose::Snapshot(_) => OutgoingState::Copying,
            },
        });
        Ok(parts)
    }

    pub(super) fn on(&mut self) -> Result<&mut Active, Refusal> {
        match &mut self.stage {
            Stage::On(active) => Ok(active),
            _ => Err(no_machine()),
        }
    }

    /// The guest's CPUs, before they have numbers.
    pub(crate) fn cpu_model(&mut self) -> Result<CpuModel, Refusal> {
        Ok(self.on()?.vcpus.model().clone())
    }

    /// Tells of something that happened to the VM.
    pub(crate) fn record(&self, event: &str, detail: String) {
        self.publisher.record(event, Some(detail));
    }

    pub(crate) fn save_dry_run(&mut self, tpm: Option<&TpmSnapshot>) -> Result<Vec<u8>, Refusal> {
        self.on()?
            .save(Extent::DryRun, tpm)
            .map_err(refused("cannot-be-saved"))
    }

    /// Stops the guest, on another thread, and answers when its clocks stopped. Without a machine
    /// the answer is dropped.
    pub(crate) fn stop_to_move(&mut self, answer: mpsc::Sender<Result<Stopped, Refusal>>) {
        self.stop_as(true, answer);
    }

    pub(super) fn stop_as(&mut self, moves: bool, answer: mpsc::Sender<Result<Stopped, Refusal>>) {
        let was_paused = self.publisher.current().state == VmState::Paused;
        let stop = move |active: &mut Active| -> Result<Stopped, NotParked> {
            if !was_paused {
                active.pause()?;
            }
            if moves {
                // Here and not at the destination, where the page may be missing: it is sent with the last
                // pages. A guest that stays finds its clocks undisturbed, which is harmless.
                active.disrupt_clocks();
            }
            Ok(Stopped {
                was_paused,
                // A guest that came and never ran has clocks that were never started.
                clocks_at: active.clocks_stopped_at().unwrap_or_else(Instant::now),
            })
        };
        self.lend(stop, move |driver, stopped, _| {
            // If a vCPU does not park in time, `pause` lets all of them run again. The guest is
            // then still in `Copying`, and nothing has to be undone.
            if let (Ok(_), Some(outgoing)) = (&stopped, &mut driver.outgoing) {
                outgoing.state = OutgoingState::Stopped { ran: !was_paused };
            }
            let late = |late: NotParked| Refusal::new("does-not-stop", late.to_string());
            // The engine may have gone.
            let _ = answer.send(stopped.map_err(late));
        });
    }

    pub(crate) fn save_whole(&mut self, tpm: Option<&TpmSnapshot>) -> Result<Vec<u8>, Refusal> {
        self.on()?
            .save(Extent::Whole, tpm)
            .map_err(refused("cannot-be-saved"))
    }

    /// Makes durable all that the guest wrote. The locks of its disks stay here.
    pub(crate) fn flush(&mut self) -> Result<(), Refusal> {
        self.on()?.flush().map_err(refused("cannot-be-handed-over"))
    }

    /// Releases the locks, but for those of the devices `kept`: the guest is given away.
    pub(crate) fn hand_over(&mut self, kept: &[String]) -> Result<(), Refusal> {
        if let Some(outgoing) = &mut self.outgoing {
            // Before it is tried: what failed half-way must be taken back as well.
            outgoing.state = OutgoingState::HandedOver {
                ran: outgoing.state.must_resume(),
            };
        }
        self.consoles.hand_over();
        self.on()?.hand_over(kept);
        Ok(())
    }

    /// Keeps the guest, and resumes it if it ran before. On failure the guest stays paused, and the call may
    /// be repeated.
    pub(crate) fn stay(&mut self) -> Result<(), Refusal> {
        let Some(mut outgoing) = self.outgoing.take() else {
            return Ok(());
        };
        let stayed = self.take_back(&mut outgoing);
        match &stayed {
            Ok(()) if outgoing.state.must_resume() => self.show(VmState::Running),
            Ok(()) => {}
            Err(_) => {
                outgoing.state = OutgoingState::Stranded {
                    ran: outgoing.state.must_resume(),
                    is_handed_over: outgoing.state.is_handed_over(),
                };
                self.outgoing = Some(outgoing);
                self.show(VmState::Paused);
            }
        }
        stayed
    }

    /// Undoes what was done to the guest, last step first: locks and paths must be held again before
    /// it runs, or two machines could write to one disk.
    fn take_back(&mut self, outgoing: &mut Outgoing) -> Result<(), Refusal> {
        if outgoing.state.is_handed_over() {
            self.consoles
                .take_over()
                .map_err(|error| Refusal::new("cannot-be-taken-back", error.to_string()))?;
        }
        let active = self.on()?;
        let ran = outgoing.state.must_resume();
        if outgoing.state.is_handed_over() {
            active
                .take_over()
                .map_err(refused("cannot-be-taken-back"))?;
            // The locks are held again. If the vCPUs fail to start below, the next attempt must
            // start from here.
            outgoing.state = OutgoingState::Stopped { ran };
        }
        if ran {
            active
                .resume()
                .map_err(|error| Refusal::new("cannot-go-on", error.to_string()))?;
        }
        Ok(())
    }

    fn show(&self, state: VmState) {
        if self.publisher.current().state != state {
            self.publisher.update(|status| status.state = state);
        }
    }

    /// Shows a VM whose guest was given away: it does not run here, wherever it is.
    pub(crate) fn show_whereabouts(&mut self, guest: &Whereabouts) {
        if self.outgoing.is_none() {
            return;
        }
        let failure = match guest {
            Whereabouts::Unknown | Whereabouts::AtDestination => None,
            Whereabouts::OutOfReach(why) => Some(Failure {
                code: "destination-lost".to_owned(),
                detail: format!(
                    "the guest moved, and the destination cannot be reached while pages of the \
                     guest are still at the source ({why}): the guest is lost unless the \
                     destination still runs; `resolve-migration ID discard` ends the VM here"
                ),
                vcpu: None,
            }),
        };
        self.publisher.update(|status| {
            status.state = VmState::Paused;
            status.failure = failure;
        });
    }

    /// The guest is elsewhere, or lost.
    pub(crate) fn left(&mut self, sources: &mut Sources<'_>) -> Gone {
        let stage = std::mem::replace(&mut self.stage, Stage::Off);
        // They are the destination's now.
        self.resizes = Resizes::default();
        self.next_machine();
        self.off(End::Requested, sources);
        match stage {
            Stage::On(machine) => Gone::of(machine),
            _ => Gone::already(),
        }
    }

    /// A guest is to come: nothing is done with this VM until it has.
    pub(crate) fn expect(
        &mut self,
        decision: &Decision,
        progress: &Progress,
    ) -> Result<DestinationParts, Refusal> {
        if !matches!(self.stage, Stage::Off) {
            return Err(Refusal::new("vm-exists", "this VM has a guest already"));
        }
        self.next_machine();
        self.progress = Some(progress.clone());
        self.stage = Stage::Expecting(Expected {
            decision: decision.clone(),
            machine: None,
        });
        Ok(DestinationParts {
            caller: Caller {
                machine: self.machine,
                to: self.events.clone(),
            },
            host: Arc::clone(&self.host),
            reporter: self.reporter(),
        })
    }

    /// The machine for the guest that is to come.
    pub(crate) fn provide(&mut self, machine: Machine, consoles: Consoles) {
        if let Stage::Expecting(expected) = &mut self.stage {
            expected.machine = Some(machine);
            self.consoles = consoles;
        }
    }

    pub(super) fn expecting(&mut self) -> Result<&mut Active, Refusal> {
        match &mut self.stage {
            Stage::Expecting(Expected {
                machine: Some(machine),
                ..
            }) => Ok(machine),
            _ => Err(no_machine()),
        }
    }

    pub(crate) fn load_dry_run(&mut self, state: &[u8]) -> Result<Option<LoadedTpm>, Refusal> {
        self.expecting()?
            .load(state, Extent::DryRun)
            .map_err(refused("cannot-be-loaded"))
    }

    pub(crate) fn load_whole(&mut self, state: &[u8]) -> Result<Option<LoadedTpm>, Refusal> {
        self.expecting()?
            .load(state, Extent::Whole)
            .map_err(refused("cannot-be-loaded"))
    }

    /// Takes what only one machine may have, all of it or, of locks, none: the migration may stay in
    /// doubt, and the source is the one that needs them then.
    pub(crate) fn take_over(&mut self) -> Result<(), Refusal> {
        let taken = self.take_all_over();
        if taken.is_err() {
            self.consoles.hand_over();
            if let Ok(active) = self.expecting() {
                active.hand_over(&[]);
            }
        }
        taken
    }

    fn take_all_over(&mut self) -> Result<(), Refusal> {
        self.consoles
            .take_over()
            .map_err(|error| Refusal::new("console-unusable", error.to_string()))?;
        self.expecting()?
            .take_over()
            .map_err(refused("cannot-be-taken-over"))
    }

    /// Resumes the guest that came, unless it stays paused. At the moment `as_of` it had been
    /// stopped for `stopped_for`. Returns the time since which it runs. `resuming` is set from just
    /// before its first instruction: the driver may panic behind that.
    pub(crate) fn arrive(
        &mut self,
        stopped_for: Duration,
        as_of: Instant,
        paused: bool,
        arrival: Arrival,
        resuming: &AtomicBool,
        sources: &mut Sources<'_>,
    ) -> Result<Instant, Refusal> {
        let active = self.expecting()?;
        active.check_memory().map_err(refused("memory-lost"))?;
        let runs = if paused {
            Instant::now()
        } else {
            resuming.store(true, Ordering::Release);
            // All that can fail here comes before the vCPUs are let go.
            active.resume_after(stopped_for, as_of).map_err(|error| {
                resuming.store(false, Ordering::Release);
                Refusal::new("cannot-go-on", error.to_string())
            })?
        };
        // The guest may run from here on, so nothing below may fail. `expecting` has found the
        // stage and the machine above, and only this thread changes them.
        let Stage::Expecting(expected) = std::mem::replace(&mut self.stage, Stage::Off) else {
            return Err(no_machine());
        };
        let Some(active) = expected.machine else {
            return Err(no_machine());
        };
        // After all that can fail: the announcement redirects the guest's traffic to this host, and
        // a failed start would let the guest resume at the source.
        for control in active.devices().controls() {
            if let DeviceHandle::Net(net) = control {
                net.announce();
            }
        }
        let (devices, balloon) = (active.devices().tree(), active.devices().balloon());
        let hotplugged = active.hotplugged();
        self.stage = Stage::On(active);
        self.consoles.watch_all(sources);
        self.set_config(Arc::clone(&self.config));
        self.record_formats();
        self.publisher.update(|status| {
            status.state = match arrival {
                Arrival::Migrated if !paused => VmState::Running,
                // A restored guest was paused when it was saved, so followers see it paused, and then
                // resumed if it runs.
                Arrival::Migrated | Arrival::Restored => VmState::Paused,
            };
            status.arrival = Some(arrival);
            status.devices = devices;
            status.balloon = balloon;
            status.hotplugged = hotplugged;
        });
        if !paused {
            self.show(VmState::Running);
        }
        self.vcpus_arrived();
        self.memory_arrived();
        for port in Port::BOTH {
            self.take_input(port, sources);
        }
        Ok(runs)
    }

    /// The guest does not come.
    pub(crate) fn give_up_expecting(&mut self, sources: &mut Sources<'_>) -> Gone {
        match std::mem::replace(&mut self.stage, Stage::Off) {
            Stage::Expecting(expected) => {
                self.next_machine();
                self.consoles.close(sources);
                expected.machine.map_or_else(Gone::already, Gone::of)
            }
            other => {
                self.stage = other;
                Gone::already()
            }
        }
    }
}

/// A guest that is coming.
pub(super) struct Expected {
    decision: Decision,
    machine: Option<Machine>,
}
