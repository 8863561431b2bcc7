//! Requests that change a VM's devices.
//!
//! Opening the host resources of a new device may take a while, as a file on a network does. A
//! background thread opens them, and the request is answered when it has.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use control::{Ask, Category, NewDevice, Reply, RequestError, VmStatus};
use memory::Pages;
use spec::{
    DiskConfig, ImageType, NetConfig, PciDeviceInfo, VmConfig, VmResizeDisk, VmState, limits,
};
use virtio_devices::TransportEvent;
use virtio_devices::block::ImageFormat;

use super::outgoing::Outgoing;
use super::{Driver, DriverEvent, Stage};
use crate::descriptors;
use crate::devices::{
    DeviceHandle, Devices, LimiterGroups, OpenContext, Opened, ResourceOwner, open,
};
use crate::failure::BuildError;
use crate::guest_event::GuestEvent;
use crate::machine::{Active, Host};
use crate::paths;

/// The interval of the check whether all pages of a guest have arrived.
const PAGES_PATIENCE: Duration = Duration::from_millis(20);

impl Driver {
    /// Adds a device to the running guest, or to the configuration of the next boot.
    pub(super) fn add_device(&mut self, ask: Ask, mut new: NewDevice) {
        if let Err(refused) = self.check_new(&mut new) {
            ask.answer(Err(refused));
            return;
        }
        // The VM is off. In `Building`, `Busy` and `Ending` requests wait in the inbox, and in
        // `Expecting` the driver refuses them.
        let Stage::On(active) = &self.stage else {
            self.keep(new);
            ask.answer(Ok(Reply::Done));
            return;
        };
        let limiters = active.devices().limiters().clone();
        let id = new.id().unwrap_or_default().to_owned();
        // From here on the name and the device count are reserved: `check_new` looks at `opening`
        // too, so parallel requests cannot get one name or exceed the limit.
        self.opening.insert(id.clone(), (ask, new.clone()));
        let (number, events) = (self.machine, self.events.clone());
        let (host, config, name) = (Arc::clone(&self.host), Arc::clone(&self.config), id);
        self.host.background.run(move || {
            let opened = open_beside(&new, &config, &host, &limiters);
            events.send((number, DriverEvent::Opened(name, Box::new(opened))));
        });
    }

    /// Checks a new device, and gives it a name and address if it has none.
    fn check_new(&self, new: &mut NewDevice) -> Result<(), RequestError> {
        let problems = new.problems(&self.config);
        if !problems.is_empty() {
            return Err(RequestError::invalid(problems));
        }
        let count = self.config.device_count();
        if count.saturating_add(self.opening.len()) >= limits::DEVICES {
            let detail = format!("the VM has {} devices, its limit", limits::DEVICES);
            return Err(RequestError::new(
                Category::Conflict,
                "too-many-devices",
                detail,
            ));
        }
        self.check_place(new)?;
        let opening = self.opening.values();
        let is_vsock = |new: &NewDevice| matches!(new, NewDevice::Vsock(_));
        if is_vsock(new)
            && (self.config.vsock.is_some() || opening.into_iter().any(|(_, new)| is_vsock(new)))
        {
            let detail = "the VM has a vsock device already, and a guest uses only one";
            return Err(RequestError::new(
                Category::Conflict,
                "vsock-exists",
                detail,
            ));
        }
        // A removed device leaves the configuration at once, but stays in the machine until its
        // guest ejects it. Its name is in use until then.
        let names = self.config.device_names();
        let on = match &self.stage {
            Stage::On(active) => Some(active.devices()),
            _ => None,
        };
        let taken = |id: &str| {
            names.contains(id)
                || self.opening.contains_key(id)
                || on.is_some_and(|devices| devices.contains(id))
        };
        match new.id() {
            Some(id) if taken(id) => {
                let detail = format!("another device has the id `{id}`");
                Err(RequestError::new(
                    Category::Conflict,
                    "device-exists",
                    detail,
                ))
            }
            _ => {
                new.fill_in(taken);
                Ok(())
            }
        }
    }

    /// Checks the PCI slot that a new device asks for. Other devices may have it, too: those that are
    /// being opened, and those that the next boot brings.
    fn check_place(&self, new: &NewDevice) -> Result<(), RequestError> {
        if new.segment() != 0 && matches!(self.stage, Stage::On(_)) {
            let detail = format!(
                "a device can be added to PCI segment {} while the VM is off only: the guest is \
                 notified of devices in segment 0",
                new.segment()
            );
            let code = "segment-not-hotpluggable";
            return Err(RequestError::new(Category::Conflict, code, detail));
        }
        let Some(slot) = new.slot() else {
            return Ok(());
        };
        let opening = self.opening.values();
        let opening = opening.map(|(_, other)| (other.segment(), other.slot()));
        let configured = self.config.wanted_places().into_values();
        let configured = configured.map(|place| (place.segment, place.slot));
        if configured
            .chain(opening)
            .any(|taken| taken == (new.segment(), Some(slot)))
        {
            let detail = format!("another device has the `pci_device_id` {slot}");
            let code = "pci-slot-taken";
            return Err(RequestError::new(Category::Conflict, code, detail));
        }
        Ok(())
    }

    /// Makes a device part of the configuration.
    fn keep(&mut self, new: NewDevice) {
        let mut config = VmConfig::clone(&self.config);
        new.add_to(&mut config);
        self.set_config(Arc::new(config));
    }

    /// Plugs a device whose host resources were opened, or answers with the error.
    pub(super) fn opened(&mut self, id: &str, opened: Result<Opened, BuildError>) {
        let Some((ask, new)) = self.opening.remove(id) else {
            return;
        };
        let answer = opened.and_then(|opened| self.plug(opened));
        if let Ok(device) = &answer {
            self.keep(new);
            self.record_formats();
            self.show_devices();
            let at = format!("{} at {}", device.id, device.bdf);
            self.publisher.record("device-added", Some(at));
        }
        ask.answer(answer.map(Reply::Added).map_err(|error| (&error).into()));
    }

    fn plug(&mut self, opened: Opened) -> Result<PciDeviceInfo, BuildError> {
        let reporter = self.reporter();
        match &mut self.stage {
            Stage::On(active) => active.add_device(opened, &reporter),
            _ => Err(BuildError::host("plug a device in")(
                io::ErrorKind::NotFound.into(),
            )),
        }
    }

    /// Refuses the additions that are in progress, because their machine has ended.
    pub(super) fn give_up_additions(&mut self) {
        // The threads may still be opening files. Their `Opened` events have the old number, so the
        // driver drops them, which closes the files.
        for (_, (ask, _)) in std::mem::take(&mut self.opening) {
            let detail = "the VM was shut down or reset before the device was added";
            let ended = RequestError::new(Category::Conflict, "machine-ended", detail);
            ask.answer(Err(ended));
        }
    }

    /// Removes a device from the configuration, and asks a running guest to eject it.
    pub(super) fn remove_device(&mut self, id: &str) -> Result<Reply, RequestError> {
        let mut config = VmConfig::clone(&self.config);
        let is_configured = config.remove_device(id);
        if !is_configured && self.config.device_names().contains(id) {
            let detail = format!("`{id}` is part of the machine and cannot be removed");
            return Err(RequestError::new(
                Category::Unprocessable,
                "device-fixed",
                detail,
            ));
        }
        if let Stage::On(active) = &self.stage
            && let Some(at) = active.devices().place(id)
            && at.segment() != 0
        {
            let detail = format!(
                "`{id}` is at {at}, and a guest can eject devices of segment 0 only: shut the VM \
                 down to remove it"
            );
            return Err(RequestError::new(
                Category::Conflict,
                "segment-not-hotpluggable",
                detail,
            ));
        }
        if let Stage::On(active) = &self.stage
            && let Some(at) = active.devices().shared_place(id)
        {
            let detail = format!(
                "`{id}` is at {at} and shares its slot, which a guest can only eject as a whole: \
                 shut the VM down to remove it"
            );
            return Err(RequestError::new(
                Category::Conflict,
                "device-shares-slot",
                detail,
            ));
        }
        // A second request finds the device in the machine only, and asks the guest again: a guest
        // that was still booting may have missed the first notification.
        let is_on = match &mut self.stage {
            Stage::On(active) => active.want_device_back(id),
            _ => false,
        };
        if !is_configured && !is_on {
            return Err(no_such_device(id));
        }
        if is_configured {
            self.set_config(Arc::new(config));
        }
        if is_on {
            self.show_devices();
            self.publisher
                .record("device-removal-requested", Some(id.to_owned()));
        }
        Ok(Reply::Done)
    }

    /// The guest has ejected the devices in these PCI slots (bit N: slot N). Another thread takes
    /// them out: their queues stop when storage has answered.
    pub(super) fn ejected(&mut self, slots: u32) {
        let Stage::On(active) = &self.stage else {
            return self.report_again(slots, Vec::new());
        };
        // Requests wait while the machine is lent. With this mask a guest can cause one loan for
        // each removal that a client asked for, and no more.
        let slots = slots & active.devices().leaving_slots();
        // A guest may eject slots without a request, as often as it likes.
        if slots == 0 {
            return;
        }
        let take_out = move |active: &mut Active| {
            let slots = (0_u8..32).filter(|slot| slots & 1 << slot != 0);
            slots
                .filter_map(|slot| active.ejected(slot))
                .collect::<Vec<_>>()
        };
        self.lend(take_out, |driver, all, _| {
            for (id, removed) in all {
                if let Err(error) = removed {
                    tracing::error!(id, %error, "cannot remove a device from the memory map");
                }
                driver.show_devices();
                driver.publisher.record("device-removed", Some(id));
            }
        });
    }

    /// Another thread works on the machine: what the machine reported is handled after that.
    fn report_again(&self, slots: u32, stalled: Vec<(String, String)>) {
        if !matches!(self.stage, Stage::Busy(_)) {
            return;
        }
        // The inbox holds reports back while the stage is `Busy`, so the driver does not spin on
        // these. They merge with newer ones and take no more room.
        let reporter = self.reporter();
        for slot in (0_u8..32).filter(|slot| slots & 1 << slot != 0) {
            reporter.report(GuestEvent::Ejected(slot));
        }
        for (id, why) in stalled {
            reporter.report(GuestEvent::Device(id, TransportEvent::Stalled(why)));
        }
    }

    /// Disks keep requests at which the host failed: the guest is paused until a client resumes it,
    /// and then the requests are tried again.
    pub(super) fn stalled(&mut self, mut stalled: Vec<(String, String)>) {
        let Stage::On(active) = &self.stage else {
            return self.report_again(0, stalled);
        };
        stalled.retain(|(id, _)| active.devices().contains(id));
        if stalled.is_empty() {
            return;
        }
        let (ram, _) = active.memory();
        if ram.pages() == Pages::Awaited {
            // Devices that wait for pages do not stop before those are there.
            let reporter = self.reporter();
            // Another thread waits, because the driver shares its own with other VMs. The end of
            // the machine ends the wait too: it marks the awaited pages as lost.
            self.host.background.run(move || {
                while ram.pages() == Pages::Awaited {
                    std::thread::sleep(PAGES_PATIENCE);
                }
                drop(ram);
                for (id, why) in stalled {
                    reporter.report(GuestEvent::Device(id, TransportEvent::Stalled(why)));
                }
            });
            return;
        }
        // When a migration has stopped the guest, the driver must not show it as paused by its
        // owner: `stay` alone decides whether it runs again.
        let is_stopped = self.publisher.current().state == VmState::Paused
            || self.outgoing.as_ref().is_some_and(Outgoing::is_stopped);
        let pause = move |active: &mut Active| (!is_stopped).then(|| active.pause());
        self.lend(pause, move |driver, paused, _| {
            for (id, why) in stalled {
                tracing::warn!(id, why, "the host failed a disk request of a guest");
                let mut detail = format!("{id}: {why}");
                if let Some(Err(late)) = &paused {
                    tracing::error!(id, %late, "cannot pause a guest whose disk failed");
                    detail = format!("{detail}; the VM is not paused: {late}");
                }
                driver.publisher.record("disk-error", Some(detail));
            }
            if let Some(Ok(())) = paused {
                let paused = |status: &mut VmStatus| status.state = VmState::Paused;
                driver.publisher.update(paused);
            }
        });
    }

    /// Makes the formats of images that were detected part of the configuration, before the guest can
    /// write to the images: no later machine detects them again, here or elsewhere.
    pub(super) fn record_formats(&mut self) {
        let Stage::On(active) = &self.stage else {
            return;
        };
        if let Some(config) = with_formats(active.devices(), &self.config) {
            self.set_config(Arc::new(config));
        }
    }

    fn show_devices(&self) {
        if let Stage::On(active) = &self.stage {
            let devices = active.devices().tree();
            self.publisher.update(|status| status.devices = devices);
        }
    }
}

/// Opens the host resources of a new device, unless it names a file that the VM uses already.
fn open_beside(
    new: &NewDevice,
    config: &VmConfig,
    host: &Host,
    limiters: &LimiterGroups,
) -> Result<Opened, BuildError> {
    let mut with_it = config.clone();
    new.clone().add_to(&mut with_it);
    paths::check(&with_it)?;
    let context = OpenContext {
        workers: &host.workers,
        image_dirs: &host.image_dirs,
        owner: ResourceOwner::ThisMachine,
        limiters,
        confinement: host.confinement,
    };
    let needed = descriptors::of_device(new);
    let reserved = host.descriptors.reserve(needed, None)?;
    let opened = open::one(new, context)?;
    Ok(Opened { reserved, ..opened })
}

/// The configuration with the formats of images that were detected, if any was.
fn with_formats(devices: &Devices, config: &VmConfig) -> Option<VmConfig> {
    // A guest can write a qcow2 header into a raw image. A machine that detected the format anew
    // would then trust that header as metadata.
    let is_open = |disk: &DiskConfig| disk.image_type.is_none();
    if !config.disks.iter().flatten().any(is_open) {
        return None;
    }
    let mut config = config.clone();
    for disk in config.disks.iter_mut().flatten() {
        let control = disk.id.as_deref().and_then(|id| devices.control(id));
        if let (None, Some(DeviceHandle::Disk(handle))) = (disk.image_type, control) {
            disk.image_type = Some(match handle.format() {
                ImageFormat::Raw => ImageType::Raw,
                ImageFormat::Qcow2 => ImageType::Qcow2,
            });
            disk.image_type_detected = true;
        }
    }
    Some(config)
}

/// Fills in the names of taps that were made.
pub(super) fn show_taps(devices: &Devices, config: &mut Arc<VmConfig>) {
    let unnamed = |net: &NetConfig| net.tap.is_none();
    if !config.net.iter().flatten().any(unnamed) {
        return;
    }
    for net in Arc::make_mut(config).net.iter_mut().flatten() {
        let control = net.id.as_deref().and_then(|id| devices.control(id));
        if let (None, Some(DeviceHandle::Net(handle))) = (&net.tap, control) {
            net.tap = handle.tap().map(str::to_owned);
        }
    }
}

/// Resizes a disk of a machine.
pub(super) fn resize_disk(devices: &Devices, disk: &VmResizeDisk) -> Result<(), RequestError> {
    let refused = |detail| RequestError::new(Category::Unprocessable, "disk-size", detail);
    match devices.control(&disk.id) {
        None => Err(no_such_device(&disk.id)),
        Some(DeviceHandle::Disk(handle)) => handle
            .resize(disk.desired_size)
            .map_err(|error| refused(format!("`{}` cannot be resized: {error}", disk.id))),
        Some(_) => {
            let detail = format!("`{}` is not a disk", disk.id);
            Err(RequestError::new(
                Category::Unprocessable,
                "not-a-disk",
                detail,
            ))
        }
    }
}

fn no_such_device(id: &str) -> RequestError {
    let detail = format!("the VM has no device `{id}`");
    RequestError::new(Category::NotFound, "no-such-device", detail)
}
