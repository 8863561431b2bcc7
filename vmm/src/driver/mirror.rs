//! Mirrors of disks, as the driver sees them: which are in progress, what they exclude, and the switch.
//!
//! The engine copies on a thread of its own. The end of the machine ends a mirror (`guest-ended`), and the
//! disk keeps its image, which has all that the guest wrote. Over a reset a mirror continues: it waits while there is
//! no machine, and tracks the disk of the next one from before its guest runs.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use control::{Category, Request, RequestError};
use memory::Pages;
use migration::{Decision, Downtime, Finish, Refusal};
use spec::{DiskConfig, ImageType, VmConfig, VmState};
use uuid::Uuid;
use virtio_devices::block::{CreatedImage, DiskAccess};

use super::migration::{PAGES_ARRIVING, no_machine};
use super::{Caller, Driver, Stage};
use crate::descriptors;
use crate::devices::{DeviceHandle, Devices};
use crate::machine::Active;

/// The mirrors in progress, by the names of their disks.
#[derive(Default)]
pub(super) struct Mirrors {
    active: BTreeMap<String, ActiveMirror>,
    /// The machine is being replaced by another.
    is_resetting: bool,
}

struct ActiveMirror {
    id: Uuid,
    target: PathBuf,
    decision: Decision,
    access: DiskAccess,
    /// The switch of the disk, which waits for the next machine.
    switch: Option<Switch>,
}

impl Drop for ActiveMirror {
    fn drop(&mut self) {
        // The engine may be waiting for the next machine.
        self.access.end();
    }
}

impl Mirrors {
    /// The machine is replaced by another, in which the disks are the same.
    pub(super) fn await_reset(&mut self) {
        self.is_resetting = true;
        for mirror in self.active.values() {
            mirror.access.await_reset();
        }
    }

    /// The machine ends. Unless another follows, its disks keep the images that they have.
    pub(super) fn end_with_machine(&mut self) {
        if !self.is_resetting {
            self.end();
        }
    }

    /// The VM has no machine, and gets none. A mirror whose disk is just being switched is too late for that:
    /// its disk was not served since, so that both images are equal.
    pub(super) fn end(&mut self) {
        self.is_resetting = false;
        for (disk, mirror) in std::mem::take(&mut self.active) {
            let why = format!(
                "the guest has ended: the disk {disk} keeps its image, which has all that the guest wrote"
            );
            let _ = mirror.decision.interrupt(Refusal::new("guest-ended", why));
        }
    }

    /// The next machine is there, and its guest has not run.
    pub(super) fn follow(&mut self, devices: &Devices) {
        self.is_resetting = false;
        let mut ended = Vec::new();
        for (disk, mirror) in &self.active {
            let followed = match devices.control(disk) {
                Some(DeviceHandle::Disk(handle)) => mirror.access.follow(handle),
                _ => Err(io::ErrorKind::NotFound.into()),
            };
            if let Err(error) = followed {
                let why = format!("the disk {disk} is another one since a reset: {error}");
                let _ = mirror.decision.interrupt(Refusal::new("disk-changed", why));
                ended.push(disk.clone());
            }
        }
        for disk in ended {
            self.active.remove(&disk);
        }
    }

    fn get(&mut self, id: Uuid) -> Option<&mut ActiveMirror> {
        self.active.values_mut().find(|mirror| mirror.id == id)
    }
}

/// A disk to switch, and the copying of its last blocks.
struct Switch {
    to: Successor,
    finish: Finish,
    answer: mpsc::Sender<Result<Downtime, Refusal>>,
}

/// A mirror to begin.
pub(crate) struct NewMirror {
    pub(crate) id: Uuid,
    pub(crate) disk: String,
    pub(crate) target: PathBuf,
    pub(crate) decision: Decision,
}

/// The parts of the machine that a mirror needs.
pub(crate) struct MirrorParts {
    pub(crate) caller: Caller,
    pub(crate) access: DiskAccess,
    pub(crate) config: DiskConfig,
    /// Ends the driver's part of the mirror.
    pub(crate) listed: ListedMirror,
}

/// A mirror that the driver knows of, until this is dropped. Not to be dropped by the driver's thread.
pub(crate) struct ListedMirror {
    caller: Caller,
    disk: String,
    id: Uuid,
}

impl Drop for ListedMirror {
    fn drop(&mut self) {
        let (disk, id) = (std::mem::take(&mut self.disk), self.id);
        // The call fails if the driver has ended, and the mirror with it.
        let _ = self.caller.call(move |driver, _| {
            let all = &mut driver.mirrors.active;
            // Behind the switch another mirror of the disk may have begun.
            if all.get(&disk).is_some_and(|mirror| mirror.id == id) {
                all.remove(&disk);
            }
        });
    }
}

/// The image that takes the place of a disk's.
pub(crate) struct Successor {
    /// The mirror that made it.
    pub(crate) mirror: Uuid,
    pub(crate) disk: String,
    pub(crate) image: Arc<CreatedImage>,
    /// The final path of the image.
    pub(crate) path: PathBuf,
    pub(crate) image_type: ImageType,
    /// The image has the format that was detected, and not one that was asked for.
    pub(crate) keeps_format: bool,
}

impl Successor {
    fn is_detected(&self, disk: &DiskConfig) -> bool {
        self.keeps_format && disk.image_type_detected
    }

    /// Has the disk's configuration name the image, which builds on no other.
    fn name_in(&self, disk: &mut DiskConfig) {
        disk.image_type_detected = self.is_detected(disk);
        // It is that of a request, which is UTF-8.
        disk.path = Some(self.path.to_string_lossy().into_owned());
        disk.image_type = Some(self.image_type);
        (disk.backing_files, disk.data_files) = (false, false);
    }
}

fn no_such_disk(id: &str) -> RequestError {
    let detail = format!("the VM has no disk `{id}`");
    RequestError::new(Category::NotFound, "no-such-disk", detail)
}

fn conflict(code: &str, detail: impl Into<String>) -> RequestError {
    RequestError::new(Category::Conflict, code, detail)
}

impl Driver {
    /// Fails with `disk-mirroring` if a disk of the VM is being mirrored.
    pub(super) fn check_no_mirror(&self) -> Result<(), RequestError> {
        match self.mirrors.active.iter().next() {
            Some((disk, mirror)) => Err(mirroring(disk, mirror)),
            None => Ok(()),
        }
    }

    /// Why a request cannot be done while a disk is mirrored, if it cannot.
    pub(super) fn refused_while_mirroring(&self, request: &Request) -> Option<RequestError> {
        let disk = match request {
            Request::RemoveDevice(device) => &device.id,
            Request::ResizeDisk(disk) => &disk.id,
            // The end of the machine ends mirrors. The others change no disk that is there, and neither does
            // a reset.
            Request::Boot
            | Request::Pause
            | Request::Resume
            | Request::Reboot
            | Request::Shutdown
            | Request::Delete
            | Request::PowerButton
            | Request::Nmi
            | Request::Counters
            | Request::MemoryMap
            | Request::Cpu
            | Request::AddDevice(_)
            | Request::Resize(_)
            | Request::ResizeZone(_) => return None,
        };
        let mirror = self.mirrors.active.get(disk)?;
        Some(mirroring(disk, mirror))
    }

    /// A disk begins to be mirrored.
    pub(crate) fn begin_mirror(&mut self, new: NewMirror) -> Result<MirrorParts, RequestError> {
        let Some(config) = disk_config(&self.config, &new.disk).cloned() else {
            return Err(no_such_disk(&new.disk));
        };
        if let Some(outgoing) = &self.outgoing {
            return Err(conflict("vm-migrating", outgoing.busy()));
        }
        let Stage::On(active) = &self.stage else {
            let state = self.publisher.current().state;
            let detail = format!(
                "a disk is mirrored while its VM is Running or Paused, and this one is {state}: copy the \
                 image with `qemu-img convert` instead"
            );
            return Err(conflict("wrong-state", detail));
        };
        if let Some(mirror) = self.mirrors.active.get(&new.disk) {
            return Err(mirroring(&new.disk, mirror));
        }
        let devices = active.devices();
        if devices.is_leaving(&new.disk) {
            let detail = format!("the VM's guest was asked to eject the disk `{}`", new.disk);
            return Err(conflict("device-leaving", detail));
        }
        if active.memory().0.pages() != Pages::There {
            // The queues of the disk may wait for a page, and the switch would wait for the queues.
            return Err(conflict("pages-arriving", PAGES_ARRIVING));
        }
        let Some(DeviceHandle::Disk(handle)) = devices.control(&new.disk) else {
            return Err(no_such_disk(&new.disk));
        };
        let access = handle.access();
        // For any machine: the mirror continues over a reset.
        let caller = Caller::new(self.events.clone());
        let parts = MirrorParts {
            access: access.clone(),
            config,
            listed: ListedMirror {
                caller: caller.clone(),
                disk: new.disk.clone(),
                id: new.id,
            },
            caller,
        };
        let mirror = ActiveMirror {
            id: new.id,
            target: new.target,
            decision: new.decision,
            access,
            switch: None,
        };
        self.mirrors.active.insert(new.disk, mirror);
        Ok(parts)
    }

    /// Switches disks whose mirrors were done while there was no machine: each as a call of its own, as the
    /// first one lends the machine.
    pub(super) fn switch_waiting(&mut self) {
        for mirror in self.mirrors.active.values_mut() {
            if let Some(Switch { to, finish, answer }) = mirror.switch.take() {
                Caller::new(self.events.clone())
                    .send(move |driver, _| driver.switch_disk(to, finish, answer));
            }
        }
    }

    /// Has a disk continue on another image, on another thread. Only the queues of this disk stop while
    /// `finish` copies the last blocks. Waits for the next machine if this one is reset.
    pub(crate) fn switch_disk(
        &mut self,
        to: Successor,
        finish: Finish,
        answer: mpsc::Sender<Result<Downtime, Refusal>>,
    ) {
        let is_resetting = self.mirrors.is_resetting;
        let Some(mirror) = self.mirrors.get(to.mirror) else {
            // It ended with the machine.
            let _ = answer.send(Err(no_machine()));
            return;
        };
        if is_resetting {
            mirror.switch = Some(Switch { to, finish, answer });
            return;
        }
        let mut config = VmConfig::clone(&self.config);
        let mut disks = config.disks.iter_mut().flatten();
        let Some(disk) = disks.find(|disk| disk.id.as_ref() == Some(&to.disk)) else {
            let detail = no_such_disk(&to.disk).detail;
            let _ = answer.send(Err(Refusal::new("no-such-disk", detail)));
            return;
        };
        let is_detected = to.is_detected(disk);
        to.name_in(disk);
        let more = descriptors::of_machine(&config, false)
            .saturating_sub(descriptors::of_machine(&self.config, false));
        let reserved = match self.host.descriptors.reserve(more, None) {
            Ok(reserved) => reserved,
            Err(error) => {
                let _ = answer.send(Err(Refusal::new("too-few-descriptors", error.to_string())));
                return;
            }
        };
        // No request pauses or resumes the VM while the machine is lent.
        let runs = self.publisher.current().state != VmState::Paused;
        let id = to.disk.clone();
        let switch = move |active: &mut Active| {
            let start = Instant::now();
            if runs {
                active.devices().pause_one(&to.disk);
            }
            let switched = switch(active, &to, is_detected, start, finish);
            if switched.is_ok() {
                active.keep_descriptors(reserved);
            }
            (start, switched)
        };
        self.lend(switch, move |driver, (start, switched), _| {
            // First: all that the guest writes from here on is in the image that the configuration names.
            // If the machine ends before this, no write was served since the last block was copied, and
            // the image that the configuration still names has all of them.
            if switched.is_ok() {
                driver.set_config(Arc::new(config));
                driver.mirrors.active.remove(&id);
            }
            if let (true, Stage::On(active)) = (runs, &driver.stage) {
                active.devices().resume_one(&id);
            }
            let total_us = micros(start);
            let _ = answer.send(switched.map(|stop| Downtime { total_us, ..stop }));
        });
    }
}

/// Copies the last blocks, and switches the disk, whose queues stopped since `start`.
fn switch(
    active: &Active,
    to: &Successor,
    is_detected: bool,
    start: Instant,
    finish: Finish,
) -> Result<Downtime, Refusal> {
    let Some(DeviceHandle::Disk(handle)) = active.devices().control(&to.disk) else {
        return Err(Refusal::new("no-such-disk", no_such_disk(&to.disk).detail));
    };
    let pause_us = micros(start);
    let copied = finish()?;
    let opening = Instant::now();
    let switched = handle.switch_to(&to.image, &to.path, is_detected);
    switched.map_err(|error| crate::migrate::image_refusal(&error))?;
    Ok(Downtime {
        pause_us,
        hand_over_us: micros(opening),
        ..copied
    })
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn disk_config<'a>(config: &'a VmConfig, id: &str) -> Option<&'a DiskConfig> {
    let mut disks = config.disks.iter().flatten();
    disks.find(|disk| disk.id.as_deref() == Some(id))
}

fn mirroring(disk: &str, mirror: &ActiveMirror) -> RequestError {
    let detail = format!(
        "the disk `{disk}` is being mirrored to {}: wait until migration {} ends, or cancel it",
        mirror.target.display(),
        mirror.id
    );
    conflict("disk-mirroring", detail)
}
