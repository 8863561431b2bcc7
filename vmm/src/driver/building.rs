//! Building a machine on a background thread, and what follows when the machine is there.

use std::sync::Arc;
use std::time::Instant;

use ::devices::event_loop::Sources;
use control::{Ask, Reply, RequestError};
use spec::{BootTimeline, Failure, VmConfig, VmState};

use super::{Consoles, Driver, DriverEvent, End, Stage};
use crate::descriptors::{self, Reservation};
use crate::devices::MachineOrigin;
use crate::failure::{self, BuildError};
use crate::guest_event::{Outputs, Port, Reporter};
use crate::machine::{Built, Host, Machine};
use crate::paths;

/// A machine that was built, and the consoles that were opened for it. `None` if those of an earlier machine
/// are kept.
pub(crate) struct Started {
    machine: Machine,
    consoles: Option<Consoles>,
}

impl Driver {
    /// Has a background thread build a machine, while the VM has no other. Its guest writes to these
    /// `outputs`, or to consoles that are opened for it.
    pub(super) fn build(
        &mut self,
        asked: Option<Ask>,
        origin: MachineOrigin,
        outputs: Option<Outputs>,
    ) {
        self.stage = Stage::Building { asked };
        // Before `reporter`, which copies the number: the driver ignores reports with an old one.
        self.next_machine();
        self.asked_at = Instant::now();
        let reporter = self.reporter();
        let (host, config) = (Arc::clone(&self.host), Arc::clone(&self.config));
        let (number, events) = (self.machine, self.events.clone());
        let kept = self.consoles.reserved();
        self.host.background.run(move || {
            let built = start(&host, &config, outputs, &origin, &reporter, kept);
            events.send((number, DriverEvent::Built(Box::new(built))));
        });
    }

    pub(super) fn built(&mut self, built: Result<Started, BuildError>, sources: &mut Sources<'_>) {
        let Stage::Building { asked } = std::mem::replace(&mut self.stage, Stage::Off) else {
            return;
        };
        // The guest first runs here, on the driver's thread. A build that a `Delete` overtook has
        // an old number and never gets here: its machine is dropped without having run.
        let started = built.and_then(|mut started| {
            // Before the guest runs: what it writes has to be copied.
            self.mirrors.follow(started.machine.devices());
            started.machine.resume().map_err(BuildError::from)?;
            Ok(started)
        });
        let answer = match started {
            Ok(Started { machine, consoles }) => {
                if let Some(consoles) = consoles {
                    self.consoles = consoles;
                    self.consoles.watch_all(sources);
                }
                let devices = machine.devices().tree();
                let balloon = machine.devices().balloon();
                let hotplugged = machine.hotplugged();
                let vcpus = machine.plugged_vcpus().count();
                self.stage = Stage::On(machine);
                self.set_config(Arc::clone(&self.config));
                self.record_formats();
                let built_us = self.microseconds(Instant::now());
                self.publisher.update(|status| {
                    let was_on = matches!(status.state, VmState::Running | VmState::Paused);
                    status.reboots = if was_on { status.reboots + 1 } else { 0 };
                    status.state = VmState::Running;
                    status.devices = devices;
                    status.balloon = balloon;
                    status.hotplugged = hotplugged;
                    status.vcpus = Some(vcpus);
                    status.failure = None;
                    status.boot = Some(BootTimeline {
                        built_us,
                        ..BootTimeline::default()
                    });
                });
                self.switch_waiting();
                // What came while there was no machine.
                for port in Port::BOTH {
                    self.take_input(port, sources);
                }
                Ok(Reply::Done)
            }
            Err(error) => {
                // The client that asked gets the reason. A reset's failure has no other reader.
                if asked.is_some() {
                    tracing::info!(%error, "cannot build a machine");
                } else {
                    tracing::warn!(%error, "cannot build a machine");
                }
                let was_on = matches!(
                    self.publisher.current().state,
                    VmState::Running | VmState::Paused
                );
                // After a reset clients still see the VM as running, so its end needs a state and a
                // failure. A first boot that fails leaves the VM as it was before the request.
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
        // It may have been lost since the machine was built, when the report came too early.
        if let Some(failure) = self.find_lost_memory() {
            self.memory_lost(failure, sources);
        }
    }

    /// Returns the failure of the machine if the host has lost a part of its memory.
    pub(super) fn find_lost_memory(&self) -> Option<Failure> {
        let Stage::On(active) = &self.stage else {
            return None;
        };
        let (ram, _) = active.memory();
        ram.check_file();
        ram.first_lost().map(failure::memory_lost)
    }

    /// Ends a machine whose memory the host has lost. One that is being built, or to which a guest
    /// migrates, is looked at before its guest runs.
    pub(super) fn memory_lost(&mut self, mut failure: Failure, sources: &mut Sources<'_>) {
        self.add_progress(&mut failure);
        tracing::error!(detail = failure.detail, "a guest lost memory and is ended");
        self.switch_off(End::Failed(failure), sources);
    }
}

/// Builds a machine and loads its payload, on a background thread: files may be on a network.
fn start(
    host: &Host,
    config: &VmConfig,
    outputs: Option<Outputs>,
    origin: &MachineOrigin,
    reporter: &Reporter,
    kept: Option<Arc<Reservation>>,
) -> Result<Started, BuildError> {
    paths::check(config)?;
    // Before anything is opened: a machine that gets half of its descriptors would fail anywhere.
    let needed = descriptors::of_machine(config, origin.may_wait);
    let reserved = host.descriptors.reserve(needed, kept)?;
    let consoles = match &outputs {
        None => Some(Consoles::open(config, host.terminal)?.keep_reserved(&reserved)),
        Some(_) => None,
    };
    let outputs = outputs
        .or_else(|| consoles.as_ref().map(Consoles::outputs))
        .unwrap_or_default();
    let built = Built::new(host, config, outputs, origin, reporter, reserved)?;
    let machine = Machine::new(built.boot(config)?, &host.background);
    machine.check_memory()?;
    // Last, because it discards the old content of the consoles' files: nothing can be refused any more.
    if let Some(consoles) = &consoles {
        consoles.empty()?;
    }
    Ok(Started { machine, consoles })
}
