//! The budget of file descriptors: what each VM may use, reserved before anything of it is built.
//!
//! The host limits the descriptors of the process (RLIMIT_NOFILE), and all VMs share them. Without a
//! budget, the VM that needs one more fails at a random place; worse, the guest that opens connections
//! takes those that another VM needs for its next reset. So each VM reserves all that it can come to
//! use, also what its guest can cause later, and is refused as a whole if that is not there:
//!
//! ```text
//!  limit ── kept for the service ──┬── reserved by VMs ──┬── available ──┐
//!  0                                                                     RLIMIT_NOFILE
//! ```
//!
//! The numbers below are upper bounds. A test compares them with what a service has open.

use std::fs;
use std::sync::Arc;

use control::NewDevice;
use parking_lot::Mutex;
use rustix::process::{Resource, getrlimit};
use spec::{ConsoleMode, DiskConfig, ImageType, NetConfig, VmConfig};
use virtio_devices::{block, vsock};

/// The service keeps this part of the limit for connections of its API, migrations and its log.
const KEPT_PART: u64 = 4;
/// The most descriptors that the service keeps for itself.
const KEPT_MAX: u64 = 2048;

/// Descriptors of the process, and those that VMs have reserved. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Descriptors(Arc<Ledger>);

#[derive(Debug)]
struct Ledger {
    limit: u64,
    kept: u64,
    reserved: Mutex<u64>,
}

/// Descriptors that belong to a VM until this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    ledger: Arc<Ledger>,
    count: u64,
}

/// A VM needs more descriptors than there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{needed} file descriptors are needed and {available} are available: of the limit of {limit}, VMs have reserved \
     {reserved} and the service keeps {kept}; raise the service's hard limit (RLIMIT_NOFILE, LimitNOFILE= of \
     systemd), or give the VM fewer queues and devices"
)]
pub struct TooFewDescriptors {
    needed: u64,
    available: u64,
    limit: u64,
    reserved: u64,
    kept: u64,
}

impl Descriptors {
    /// Those of this process, some of which are open already.
    pub(crate) fn of_process() -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let open = u64::try_from(open).unwrap_or(u64::MAX);
        Self::new(
            limit,
            open.saturating_add((limit / KEPT_PART).min(KEPT_MAX)),
        )
    }

    fn new(limit: u64, kept: u64) -> Self {
        Self(Arc::new(Ledger {
            limit,
            kept,
            reserved: Mutex::new(0),
        }))
    }

    /// Reserves what a machine needs beyond what its VM has `kept` from the machine before: that cannot be
    /// lost to another VM in a reset. Returns all reservations of the machine.
    pub(crate) fn reserve(
        &self,
        needed: u64,
        kept: Option<Arc<Reservation>>,
    ) -> Result<Vec<Arc<Reservation>>, TooFewDescriptors> {
        let more = needed.saturating_sub(kept.as_ref().map_or(0, |kept| kept.count));
        let mut all: Vec<_> = kept.into_iter().collect();
        if more > 0 {
            all.push(Arc::new(self.take(more)?));
        }
        Ok(all)
    }

    fn take(&self, needed: u64) -> Result<Reservation, TooFewDescriptors> {
        let Ledger { limit, kept, .. } = *self.0;
        let mut reserved = self.0.reserved.lock();
        let available = limit.saturating_sub(kept).saturating_sub(*reserved);
        if needed > available {
            return Err(TooFewDescriptors {
                needed,
                available,
                limit,
                reserved: *reserved,
                kept,
            });
        }
        *reserved += needed;
        Ok(Reservation {
            ledger: Arc::clone(&self.0),
            count: needed,
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut reserved = self.ledger.reserved.lock();
        *reserved = reserved.saturating_sub(self.count);
    }
}

/// Returns the descriptors that a machine of this configuration, with its consoles, can come to use.
/// `may_wait`: its memory may be missing for a time (postcopy).
pub(crate) fn of_machine(config: &VmConfig, may_wait: bool) -> u64 {
    /// KVM's VM; the interrupt line of ACPI.
    const MACHINE: u64 = 2;
    /// A file of memory, and a copy of it that was given.
    const BLOCK: u64 = 2;
    /// An event loop: epoll, a copy of it, and a waker.
    const LOOP: u64 = 3;
    /// userfaultfd and its end; two event loops of its own.
    const WAITING: u64 = 2 + 2 * LOOP;
    /// KVM's vCPU; the account of its thread.
    const VCPU: u64 = 2;
    /// The serial port's interrupt line.
    const SERIAL: u64 = 1;
    let mut needed = MACHINE;
    needed = needed.saturating_add(u64::from(config.cpus.max_vcpus).saturating_mul(VCPU));
    if may_wait {
        needed = needed.saturating_add(WAITING);
    }
    needed = needed.saturating_add(SERIAL + of_end(config.serial.mode));
    if let Some(debug) = &config.debug_console {
        needed = needed.saturating_add(of_end(debug.mode));
    }
    if config.console.mode != ConsoleMode::Off {
        needed = needed.saturating_add(of_queues(2) + of_end(config.console.mode));
        if config.console.mode == ConsoleMode::File {
            needed = needed.saturating_add(LOOP);
        }
    }
    for disk in config.disks.iter().flatten() {
        needed = needed.saturating_add(of_disk(disk));
    }
    for net in config.net.iter().flatten() {
        needed = needed.saturating_add(of_net(net));
    }
    if config.vsock.is_some() {
        needed = needed.saturating_add(of_vsock());
    }
    if config.balloon.is_some() {
        // Inflate, deflate, statistics, free page reporting.
        needed = needed.saturating_add(of_queues(4));
    }
    if config.tpm.is_some() {
        // The control socket, the data connection, and the end of it that is passed on.
        needed = needed.saturating_add(3);
    }
    if config.watchdog {
        needed = needed.saturating_add(of_queues(1));
    }
    for zone in config.memory.all_zones() {
        needed = needed.saturating_add(BLOCK);
        if zone.hotplug_region() > 0 {
            needed = needed.saturating_add(BLOCK);
        }
        if zone.has_virtio_mem() {
            needed = needed.saturating_add(of_queues(1));
        }
    }
    // The source of random numbers, a copy for its task, and the event loop for a source that is a file.
    needed.saturating_add(of_queues(1) + 2 + LOOP)
}

/// Returns the descriptors that `count` new images need: the file, which is locked, one to read and
/// write, and the marker beside it.
pub(crate) fn of_new_images(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX).saturating_mul(3)
}

/// Returns the descriptors for blocks that follow a guest: an event for each queue of a disk.
pub(crate) fn of_late_blocks(config: &VmConfig) -> u64 {
    let disks = config.disks.iter().flatten();
    let queues = disks.map(|disk| disk.num_queues as u64);
    queues.fold(0, u64::saturating_add)
}

/// Returns the descriptors that a device can come to use.
pub(crate) fn of_device(new: &NewDevice) -> u64 {
    match new {
        NewDevice::Disk(disk) => of_disk(disk),
        NewDevice::Net(net) => of_net(net),
        NewDevice::Vsock(_) => of_vsock(),
    }
}

/// The event descriptors of a virtio device: a kick and a message for each queue, and the message for
/// changes of its configuration.
fn of_queues(queues: u64) -> u64 {
    queues.saturating_mul(2).saturating_add(1)
}

/// The host's end of a console.
fn of_end(mode: ConsoleMode) -> u64 {
    match mode {
        ConsoleMode::Off | ConsoleMode::Null | ConsoleMode::Tty => 0,
        // With its lock, and for output.
        ConsoleMode::File => 2,
        // The slave is open while it is set up.
        ConsoleMode::Pty => 2,
        // The listener and its lock; a client, a copy to read from, and one that is turned away.
        ConsoleMode::Socket => 6,
    }
}

fn of_disk(disk: &DiskConfig) -> u64 {
    /// The image with its lock, a copy to read and write, and both again while it is opened anew in a
    /// hand-over.
    const IMAGE: u64 = 4;
    /// An io_uring, its event descriptor and a copy of the image; or an event descriptor of threads.
    const QUEUE: u64 = 4;
    let queues = disk.num_queues as u64;
    let mut files = IMAGE;
    if disk.image_type != Some(ImageType::Raw) {
        let below = if disk.backing_files {
            block::MAX_BACKING as u64
        } else {
            0
        };
        // Each with its lock. An image that is detected may be a qcow2 one.
        files += 2 * (below + u64::from(disk.data_files));
    }
    of_queues(queues)
        .saturating_add(queues.saturating_mul(QUEUE))
        .saturating_add(files)
}

fn of_net(net: &NetConfig) -> u64 {
    /// A queue of the tap, and copies that each direction watches.
    const PAIR: u64 = 3;
    /// A socket to set the tap up.
    const SET_UP: u64 = 1;
    // With the queue for control.
    let queues = (net.num_queues as u64).saturating_add(1);
    let pairs = (net.num_queues as u64 / 2).max(1);
    // Descriptors that came with the request stay open for the next machine.
    let given = net.tap_descriptors().map_or(0, |fds| fds.count() as u64);
    of_queues(queues)
        .saturating_add(pairs.saturating_mul(PAIR))
        .saturating_add(SET_UP + given)
}

fn of_vsock() -> u64 {
    /// The listener and a copy of it; a client that is turned away, and a connection that is made.
    const SOCKET: u64 = 4;
    of_queues(3) + SOCKET + vsock::MAX_CONNECTIONS as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy as _, any};
    use proptest::test_runner::TestRunner;
    use spec::PayloadConfig;

    use super::*;

    fn reserved(descriptors: &Descriptors) -> u64 {
        *descriptors.0.reserved.lock()
    }

    /// Any number of VMs come and go in any order.
    #[test]
    fn vms_never_reserve_more_than_there_is() {
        let steps = proptest::collection::vec((any::<bool>(), 0..60_u64), 0..200);
        let runs = steps.prop_map(|steps| {
            let descriptors = Descriptors::new(200, 50);
            let mut vms: Vec<(u64, Vec<Arc<Reservation>>)> = Vec::new();
            for (comes, number) in steps {
                if comes {
                    let sum: u64 = vms.iter().map(|(count, _)| count).sum();
                    match descriptors.reserve(number, None) {
                        Ok(reservation) => vms.push((number, reservation)),
                        Err(refused) => {
                            assert!(number > refused.available);
                            assert_eq!((refused.needed, refused.available), (number, 150 - sum));
                        }
                    }
                } else if !vms.is_empty() {
                    let index = usize::try_from(number).unwrap() % vms.len();
                    vms.swap_remove(index);
                }
                let sum: u64 = vms.iter().map(|(count, _)| count).sum();
                assert_eq!(reserved(&descriptors), sum);
                assert!(sum <= 150);
            }
            drop(vms);
            reserved(&descriptors)
        });
        let mut runner = TestRunner::default();
        runner
            .run(&runs, |left| {
                assert_eq!(left, 0);
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn reset_keeps_what_the_vm_has() {
        let descriptors = Descriptors::new(150, 50);
        let first = descriptors.reserve(60, None).unwrap();
        let kept = first.first().cloned();
        // The old machine is gone, and another VM takes all that is left.
        drop(first);
        let other = descriptors.reserve(40, None).unwrap();
        let again = descriptors.reserve(60, kept.clone()).unwrap();
        assert_eq!(reserved(&descriptors), 100);
        // With one device more, only that is missing.
        let refused = descriptors.reserve(61, kept.clone()).unwrap_err();
        assert_eq!((refused.needed, refused.available), (1, 0));
        drop((again, other, kept));
        assert_eq!(reserved(&descriptors), 0);
    }

    #[test]
    fn error_names_needed_available_and_limit() {
        let refused = Descriptors::new(1024, 300).reserve(800, None).unwrap_err();
        let text = refused.to_string();
        for part in [
            "800 file",
            "724 are available",
            "limit of 1024",
            "keeps 300",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn queues_vcpus_and_devices_count() {
        let mut config = VmConfig::with_payload(PayloadConfig::default());
        let mut last = of_machine(&config, false);
        let mut grows = |config: &VmConfig, by: u64| {
            let now = of_machine(config, false);
            assert_eq!(now - last, by);
            last = now;
        };
        config.cpus.max_vcpus += 7;
        grows(&config, 7 * 2);
        let text = r#"{"path": "/disk", "image_type": "Raw", "num_queues": 1}"#;
        let mut disk: DiskConfig = serde_json::from_str(text).unwrap();
        config.disks = Some(vec![disk.clone()]);
        grows(&config, 3 + 4 + 4);
        disk.num_queues = 16;
        config.disks = Some(vec![disk]);
        grows(&config, 15 * (2 + 4));
        config.console.mode = ConsoleMode::Null;
        last = of_machine(&config, false);
        config.console.mode = ConsoleMode::File;
        // The file with its lock, and the event loop.
        assert_eq!(of_machine(&config, false) - last, 2 + 3);
        // Nothing that a request can hold overflows.
        config.cpus.max_vcpus = u32::MAX;
        config.disks.as_mut().unwrap()[0].num_queues = usize::MAX;
        assert!(of_machine(&config, true) > u64::from(u32::MAX));
    }
}
