//! The driver's part in a snapshot and in the restore of a guest, beyond a migration's steps.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use migration::snapshot::Core;
use migration::{Refusal, Stopped};
use spec::{DiskConfig, VmConfig};
use virtio_devices::block::{BlockHandle, ImageError, PlannedOverlay};

use super::Driver;
use super::migration::{no_machine, refused};
use super::outgoing::OutgoingState;
use crate::descriptors;
use crate::devices::DeviceHandle;
use crate::machine::Active;
use crate::migrate::name_overlay;

impl Driver {
    /// Stops the guest for a live snapshot, on another thread, and answers when its clocks stopped.
    pub(crate) fn stop_to_image(&mut self, answer: mpsc::Sender<Result<Stopped, Refusal>>) {
        self.stop_as(false, answer);
    }

    /// A live snapshot has the guest's state, and its memory is protected: the guest runs again, if it did
    /// before.
    pub(crate) fn resume_imaged(&mut self) -> Result<(), Refusal> {
        self.resume_as(OutgoingState::Imaged)
    }

    /// Resumes a guest whose stop took too long. Its migration continues.
    pub(crate) fn resume_copying(&mut self) -> Result<(), Refusal> {
        self.resume_as(OutgoingState::Copying)
    }

    fn resume_as(&mut self, state: OutgoingState) -> Result<(), Refusal> {
        let outgoing = self.outgoing.as_ref().ok_or_else(no_machine)?;
        if outgoing.state.must_resume() {
            let resumed = self.on()?.resume();
            resumed.map_err(|error| Refusal::new("cannot-go-on", error.to_string()))?;
        }
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.state = state;
        }
        Ok(())
    }

    /// Tells a guest that comes from a snapshot that it is another copy. At the moment `as_of` its clocks
    /// had been stopped for `stopped_for`.
    pub(crate) fn announce_generation(
        &mut self,
        stopped_for: Duration,
        as_of: Instant,
    ) -> Result<(), Refusal> {
        self.expecting()?.announce_generation(stopped_for, as_of);
        Ok(())
    }

    /// Returns the registers and the memory of a paused guest, for a core dump.
    pub(crate) fn core(&mut self) -> Result<Core, Refusal> {
        self.on()?.core().map_err(refused("cannot-be-dumped"))
    }

    /// Returns since when the clocks of a guest that is paused are stopped.
    pub(crate) fn clocks_stopped_at(&mut self) -> Result<Option<Instant>, Refusal> {
        Ok(self.on()?.clocks_stopped_at())
    }
}

/// An overlay that was created for a disk.
#[derive(Clone, Debug)]
pub(crate) struct NewOverlay {
    pub(crate) disk: String,
    pub(crate) path: PathBuf,
}

/// A disk that continues on an overlay, and can return as long as the guest does not run. The machine has
/// the images, so that none is locked longer than the machine lives.
pub(crate) struct SwitchedDisk {
    pub(crate) overlay: NewOverlay,
    /// Its configuration before.
    was: DiskConfig,
}

impl Driver {
    /// Returns the overlays to create for disks, with this end of their names.
    pub(crate) fn plan_overlays(
        &mut self,
        wanted: &[String],
        suffix: &str,
    ) -> Result<Vec<(String, PlannedOverlay)>, Refusal> {
        let active = self.on()?;
        let plan = |id: &String| {
            let planned = disk(active, id)?.plan_overlay(suffix);
            Ok((id.clone(), planned.map_err(|error| no_overlay(&error))?))
        };
        wanted.iter().map(plan).collect()
    }

    /// Has disks of a paused guest continue on overlays, on another thread: all of them, or none.
    pub(crate) fn switch_disks(
        &mut self,
        overlays: Vec<NewOverlay>,
        answer: mpsc::Sender<Result<Vec<SwitchedDisk>, Refusal>>,
    ) {
        let mut config = VmConfig::clone(&self.config);
        let mut wanted = Vec::new();
        for overlay in overlays {
            let mut disks = config.disks.iter_mut().flatten();
            let disk = disks.find(|disk| disk.id.as_ref() == Some(&overlay.disk));
            let Some(disk) = disk else { continue };
            wanted.push((overlay.clone(), disk.clone()));
            name_overlay(disk, &overlay.path);
        }
        let more = descriptors::of_machine(&config, false)
            .saturating_sub(descriptors::of_machine(&self.config, false));
        let reserved = match self.host.descriptors.reserve(more, None) {
            Ok(reserved) => reserved,
            Err(error) => {
                let _ = answer.send(Err(Refusal::new("too-few-descriptors", error.to_string())));
                return;
            }
        };
        let switch = move |active: &mut Active| {
            let switched = switch_all(active, wanted)?;
            active.keep_descriptors(reserved);
            Ok(switched)
        };
        self.lend(switch, move |driver, switched, _| {
            if switched.is_ok() {
                driver.set_config(Arc::new(config));
            }
            let _ = answer.send(switched);
        });
    }

    /// The disks continue on their overlays for good.
    pub(crate) fn keep_overlays(&mut self) -> Result<(), Refusal> {
        for control in self.on()?.devices().controls() {
            if let DeviceHandle::Disk(handle) = control {
                handle.keep_overlay();
            }
        }
        Ok(())
    }

    /// Undoes [`Driver::switch_disks`]. The guest has not run since.
    pub(crate) fn switch_disks_back(
        &mut self,
        disks: Vec<SwitchedDisk>,
        answer: mpsc::Sender<Result<(), Refusal>>,
    ) {
        let mut config = VmConfig::clone(&self.config);
        for SwitchedDisk { was, .. } in &disks {
            let mut all = config.disks.iter_mut().flatten();
            if let Some(disk) = all.find(|disk| disk.id == was.id) {
                disk.clone_from(was);
            }
        }
        let back = move |active: &mut Active| {
            disks.iter().try_for_each(|switched| {
                let back = disk(active, &switched.overlay.disk)?.switch_back();
                back.map_err(|error| Refusal::new("no-overlay", error.to_string()))
            })
        };
        self.lend(back, move |driver, back, _| {
            if back.is_ok() {
                driver.set_config(Arc::new(config));
            }
            let _ = answer.send(back);
        });
    }
}

fn no_overlay(error: &ImageError) -> Refusal {
    Refusal::new("no-overlay", error.to_string())
}

fn disk<'a>(active: &'a Active, id: &str) -> Result<&'a BlockHandle, Refusal> {
    match active.devices().control(id) {
        Some(DeviceHandle::Disk(handle)) => Ok(handle),
        _ => Err(Refusal::new(
            "no-overlay",
            format!("the VM has no disk {id}"),
        )),
    }
}

fn switch_all(
    active: &Active,
    wanted: Vec<(NewOverlay, DiskConfig)>,
) -> Result<Vec<SwitchedDisk>, Refusal> {
    let mut opened = Vec::new();
    // Open all before the first is switched: opening fails more often, and then nothing has changed.
    for (overlay, was) in wanted {
        let image = disk(active, &overlay.disk)?.open_overlay(&overlay.path);
        opened.push((
            image.map_err(|error| no_overlay(&error))?,
            SwitchedDisk { overlay, was },
        ));
    }
    let mut switched: Vec<SwitchedDisk> = Vec::new();
    for (image, disk_of_it) in opened {
        let Err(error) = image.switch() else {
            switched.push(disk_of_it);
            continue;
        };
        // All disks or none: a snapshot of some of them would be of no moment of the guest.
        for SwitchedDisk { overlay, .. } in &switched {
            if let Err(error) = disk(active, &overlay.disk)?.switch_back() {
                tracing::error!(%error, disk = overlay.disk, "a disk stays on its overlay");
            }
        }
        return Err(no_overlay(&error));
    }
    Ok(switched)
}
