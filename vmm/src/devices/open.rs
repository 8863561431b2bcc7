//! Opening what virtio devices stand on: images, taps, sockets.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use control::NewDevice;
use devices::event_loop::EventLoop;
use devices::host_file::FileKind;
use devices::sandbox::{Confinement, ThreadKind};
use memory::RamBlock;
use spec::{
    ConsoleMode, DiskConfig, HostIp, ImageType, LockGranularity, MemoryZone, NetConfig,
    RateLimitGroupConfig, RateLimiterConfig, RngConfig, TokenBucket, VmConfig, VsockConfig,
};
use virtio_devices::balloon::{Balloon, BalloonConfig, BalloonHandle};
use virtio_devices::block::{Block, BlockConfig, BlockHandle, ImageFormat, LockMode, OnError};
use virtio_devices::console::{Console, ConsoleHandle};
use virtio_devices::mem::{Mem, MemConfig, MemHandle};
use virtio_devices::net::{Net, NetHandle, TapAddress, TapIp, TapSource};
use virtio_devices::rate_limiter::{BucketConfig, RateLimits, SharedLimiter};
use virtio_devices::rng::Rng;
use virtio_devices::vsock::Vsock;
use virtio_devices::watchdog::{self, Watchdog};
use virtio_devices::{VirtioDevice, Workers};

use crate::descriptors::Reservation;
use crate::failure::BuildError;
use crate::machine::Host;

/// The name of a tap that is made; `%d` is a number of the host's choice.
const NEW_TAP: &str = "vmtap%d";

/// A device that is ready to be plugged in, and by what it is controlled.
pub(crate) struct Opened {
    pub(crate) id: String,
    pub(crate) device: Box<dyn VirtioDevice>,
    pub(crate) control: DeviceHandle,
    /// The slot that a device which is added to a machine asks for.
    pub(crate) slot: Option<u8>,
    /// Descriptors of a device that is added to a machine; those of the others are the machine's.
    pub(crate) reserved: Vec<Arc<Reservation>>,
    /// The event loop of a device that may wait for storage, and must not have others wait with it.
    pub(crate) own_loop: Option<EventLoop>,
}

impl Opened {
    fn new(id: String, device: impl VirtioDevice + 'static, control: DeviceHandle) -> Self {
        Self {
            id,
            device: Box::new(device),
            control,
            slot: None,
            reserved: Vec::new(),
            own_loop: None,
        }
    }
}

/// Handle for requests to a running device.
pub(crate) enum DeviceHandle {
    None,
    Disk(BlockHandle),
    Net(NetHandle),
    Balloon(BalloonHandle),
    Console(ConsoleHandle),
    Memory(MemHandle),
}

/// The owner of resources that only one machine may hold at a time: locks of images, paths of
/// sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResourceOwner {
    /// The machine that is being built takes them as it opens its devices.
    ThisMachine,
    /// The migration's source holds them: devices take them over at the hand-over.
    Source,
}

/// The sink of a console's output, and the callback for room in its input.
pub(crate) struct ConsoleEnd {
    pub(crate) output: Box<dyn Write + Send>,
    pub(crate) on_room: Box<dyn Fn() + Send + Sync>,
}

/// The memory that a guest plugs and unplugs, and the callback for when it has.
pub(crate) struct MemoryEnd {
    /// Index of the zone.
    pub(crate) zone: usize,
    pub(crate) ram: Arc<RamBlock>,
    /// Guest address of the region.
    pub(crate) addr: u64,
    pub(crate) on_change: Box<dyn Fn() + Send + Sync>,
}

/// Parts of the machine that its devices use.
pub(crate) struct DeviceEnds {
    pub(crate) console: Option<ConsoleEnd>,
    pub(crate) memory: Vec<MemoryEnd>,
    /// Called when the watchdog expires.
    pub(crate) on_watchdog: Box<dyn Fn() + Send + Sync>,
}

/// The limiters that the disks of a machine share, by the names of their groups.
#[derive(Clone, Debug)]
pub(crate) struct LimiterGroups(BTreeMap<String, SharedLimiter>);

impl LimiterGroups {
    /// Those of a new machine, with full buckets.
    pub(crate) fn new(config: &VmConfig) -> Self {
        let groups = config.rate_limit_groups.iter().flatten();
        let limiter = |group: &RateLimitGroupConfig| {
            let limits = rate_limits(Some(&group.rate_limiter_config));
            (group.id.clone(), SharedLimiter::new(limits))
        };
        Self(groups.map(limiter).collect())
    }

    /// Returns the limiter of a disk: its group's, or one of its own.
    fn of_disk(&self, disk: &DiskConfig) -> SharedLimiter {
        let group = disk.rate_limit_group.as_ref();
        // Validation has seen to it that a group that is named exists.
        let shared = group.and_then(|id| self.0.get(id)).cloned();
        shared.unwrap_or_else(|| SharedLimiter::new(rate_limits(disk.rate_limiter_config.as_ref())))
    }
}

/// Host resources for devices.
#[derive(Clone, Copy)]
pub(crate) struct OpenContext<'a> {
    pub(crate) workers: &'a Workers,
    /// Directories below which disk images may name files, besides their own.
    pub(crate) image_dirs: &'a [PathBuf],
    pub(crate) owner: ResourceOwner,
    pub(crate) limiters: &'a LimiterGroups,
    /// The sandbox of threads that serve devices.
    pub(crate) confinement: Confinement,
}

/// The devices of a specification in which they all have names, in the order in which they are put
/// on the bus.
pub(crate) fn all(
    config: &VmConfig,
    ends: DeviceEnds,
    context: OpenContext<'_>,
) -> Result<Vec<Opened>, BuildError> {
    let workers = context.workers;
    let mut all = Vec::new();
    for new in config.disks.iter().flatten() {
        // An error drops what was opened before: locks, taps and sockets go with their devices.
        all.push(disk(new, context)?);
    }
    for new in config.net.iter().flatten() {
        all.push(net(new, workers)?);
    }
    if let Some(new) = &config.vsock {
        all.push(vsock(new, context)?);
    }
    if let Some(new) = &config.balloon {
        all.push(balloon(new, workers));
    }
    let zones = config.memory.all_zones();
    for end in ends.memory {
        let zone = zones.get(end.zone);
        if let Some((zone, id)) = zone.and_then(|zone| Some((zone, zone.device()?))) {
            // Node numbers are small: validation has seen to it.
            let node = config.node_of_zone(zone.id);
            let node = node.and_then(|node| u16::try_from(node).ok());
            all.push(memory(zone, id, node, end, workers));
        }
    }
    if let Some(end) = ends.console {
        all.push(console(config, end, context)?);
    }
    all.push(rng(&config.rng, context)?);
    // Last, so that a VM's other devices keep their places beside it.
    if config.watchdog {
        let device = Watchdog::new(watchdog::TIMEOUT, ends.on_watchdog, workers.clone());
        all.push(Opened::new(
            spec::WATCHDOG.to_owned(),
            device,
            DeviceHandle::None,
        ));
    }
    Ok(all)
}

/// A device that comes later, and has a name.
pub(crate) fn one(new: &NewDevice, context: OpenContext<'_>) -> Result<Opened, BuildError> {
    let (opened, slot) = match new {
        NewDevice::Disk(new) => (disk(new, context)?, new.pci_device_id),
        NewDevice::Net(new) => (net(new, context.workers)?, new.pci_device_id),
        NewDevice::Vsock(new) => (vsock(new, context)?, new.pci_device_id),
    };
    Ok(Opened { slot, ..opened })
}

/// The name, which [`VmConfig::name_devices`] has given.
fn name(id: Option<&String>) -> String {
    id.cloned().unwrap_or_default()
}

fn memory(
    zone: &MemoryZone<'_>,
    id: &str,
    node: Option<u16>,
    end: MemoryEnd,
    workers: &Workers,
) -> Opened {
    let wanted = MemConfig {
        ram: end.ram,
        addr: end.addr,
        block_size: zone.hotplug_unit(),
        node,
        requested: zone.hotplugged(),
    };
    let (device, handle) = Mem::new(wanted, workers.clone(), end.on_change);
    Opened::new(id.to_owned(), device, DeviceHandle::Memory(handle))
}

fn console(
    config: &VmConfig,
    end: ConsoleEnd,
    context: OpenContext<'_>,
) -> Result<Opened, BuildError> {
    // A file may be on storage that answers late or never. Output is written where the queue is served.
    let may_wait = config.console.mode == ConsoleMode::File;
    let (own_loop, workers) = own_loop("console", may_wait, context)?;
    let id = name(config.console.id.as_ref());
    let (device, handle) = Console::new(end.output, end.on_room, workers);
    Ok(Opened {
        own_loop,
        ..Opened::new(id, device, DeviceHandle::Console(handle))
    })
}

fn rng(config: &RngConfig, context: OpenContext<'_>) -> Result<Opened, BuildError> {
    let limits = rate_limits(config.rate_limiter_config.as_ref());
    let source = Path::new(&config.src);
    // A file may be on storage that answers late or never. The host's own sources answer at once.
    let kind = source.metadata().map(|metadata| FileKind::of(&metadata));
    let may_wait = kind.is_ok_and(|kind| kind == FileKind::Regular);
    let (own_loop, workers) = own_loop("rng", may_wait, context)?;
    let device = Rng::new(source, limits, workers)?;
    Ok(Opened {
        own_loop,
        ..Opened::new(name(config.id.as_ref()), device, DeviceHandle::None)
    })
}

/// Starts an event loop for a device that may wait for storage. Returns the workers that the device uses.
fn own_loop(
    name: &str,
    may_wait: bool,
    context: OpenContext<'_>,
) -> Result<(Option<EventLoop>, Workers), BuildError> {
    let own_loop = may_wait
        .then(|| EventLoop::start_confined(name, ThreadKind::Devices, context.confinement))
        .transpose()
        .map_err(BuildError::host("start a thread"))?;
    let own = own_loop.as_ref().map(|own| own.handle().clone());
    let workers = Workers::new(own.into_iter().collect());
    Ok((own_loop, workers.unwrap_or_else(|| context.workers.clone())))
}

fn vsock(new: &VsockConfig, context: OpenContext<'_>) -> Result<Opened, BuildError> {
    let (path, workers) = (Path::new(&new.socket), context.workers.clone());
    let device = match context.owner {
        ResourceOwner::ThisMachine => Vsock::new(new.cid, path, workers)?,
        ResourceOwner::Source => Vsock::incoming(new.cid, path, workers)?,
    };
    Ok(Opened::new(
        name(new.id.as_ref()),
        device,
        DeviceHandle::None,
    ))
}

fn balloon(new: &spec::BalloonConfig, workers: &Workers) -> Opened {
    let config = BalloonConfig {
        size: new.size,
        deflate_on_oom: new.deflate_on_oom,
        free_page_reporting: new.free_page_reporting,
    };
    let (device, handle) = Balloon::new(&config, workers.clone());
    Opened::new(name(new.id.as_ref()), device, DeviceHandle::Balloon(handle))
}

/// Returns the format that a configuration names, if it is one that is served.
pub(crate) fn image_format(kind: ImageType) -> Option<ImageFormat> {
    match kind {
        ImageType::Raw => Some(ImageFormat::Raw),
        ImageType::Qcow2 => Some(ImageFormat::Qcow2),
        ImageType::FixedVhd | ImageType::Vhdx | ImageType::Unknown => None,
    }
}

/// Returns the part of an image that a configuration has locked.
pub(crate) fn lock_mode(lock: LockGranularity) -> LockMode {
    match lock {
        LockGranularity::ByteRange => LockMode::ByteRange,
        LockGranularity::Full => LockMode::Full,
    }
}

fn disk(disk: &DiskConfig, context: OpenContext<'_>) -> Result<Opened, BuildError> {
    let id = name(disk.id.as_ref());
    let config = BlockConfig {
        // Validation has seen to it that there is one.
        path: disk.path.clone().unwrap_or_default().into(),
        readonly: disk.readonly,
        direct: disk.direct,
        format: disk.image_type.and_then(image_format),
        is_detected: disk.image_type_detected,
        backing_files: disk.backing_files,
        data_files: disk.data_files,
        image_dirs: context.image_dirs.to_vec(),
        queues: u16::try_from(disk.num_queues).unwrap_or(1),
        queue_size: disk.queue_size,
        serial: disk.serial.clone().unwrap_or_else(|| id.clone()),
        sparse: disk.sparse,
        lock: lock_mode(disk.lock_granularity),
        is_incoming: context.owner == ResourceOwner::Source,
        limiter: context.limiters.of_disk(disk),
        on_error: match disk.on_error {
            spec::OnError::Report => OnError::Report,
            spec::OnError::Pause => OnError::Pause,
        },
    };
    let (device, handle) = Block::new(&config, context.workers.clone())?;
    Ok(Opened::new(id, device, DeviceHandle::Disk(handle)))
}

/// Checks that a disk's image can be used, which is opened, locked and closed again.
pub(crate) fn check_disk(config: &DiskConfig, host: &Host) -> Result<(), BuildError> {
    let context = OpenContext {
        workers: &host.workers,
        image_dirs: &host.image_dirs,
        owner: ResourceOwner::ThisMachine,
        limiters: &LimiterGroups(BTreeMap::new()),
        confinement: host.confinement,
    };
    disk(config, context).map(drop)
}

fn net(net: &NetConfig, workers: &Workers) -> Result<Opened, BuildError> {
    // Validation has seen to it that addresses are addresses, and naming that the guest's is there.
    let mac = |text: &Option<String>| text.as_deref().and_then(spec::parse_mac);
    // An existing tap keeps the settings that its creator chose.
    let (tap, is_there) = match net.tap_descriptors() {
        Some(fds) => {
            // The configuration keeps its own, for the next machine.
            let ours = fds.duplicate();
            let ours = ours.map_err(BuildError::host("duplicate the descriptors of a tap"))?;
            (TapSource::Descriptors(ours), true)
        }
        None => {
            let name = net.tap.clone().unwrap_or_else(|| NEW_TAP.to_owned());
            // Looked at before the tap is opened, which would create it.
            let is_there = Path::new("/sys/class/net").join(&name).exists();
            // A pattern such as `tap%d` asks for a new one.
            if !is_there && net.tap.is_some() && !name.contains('%') {
                tracing::warn!(
                    tap = name,
                    "a new tap is made: there is no interface of the configured name"
                );
            }
            (TapSource::Name(name), is_there)
        }
    };
    let ip = net.host_ip().ok().flatten().map(|ip| match ip {
        HostIp::V4(ip, mask) => TapIp::V4(ip, mask),
        HostIp::V6(ip, prefix) => TapIp::V6(ip, prefix),
    });
    let config = virtio_devices::net::NetConfig {
        tap,
        address: TapAddress {
            ip: ip.filter(|_| !is_there),
            mac: mac(&net.host_mac),
            mtu: net.mtu,
        },
        mac: mac(&net.mac).unwrap_or_default(),
        mtu: net.mtu,
        pairs: u16::try_from(net.num_queues / 2).unwrap_or(1),
        queue_size: net.queue_size,
        offload_csum: net.offload_csum,
        offload_tso: net.offload_tso,
        limits: rate_limits(net.rate_limiter_config.as_ref()),
    };
    let (device, handle) = Net::new(config, workers.clone())?;
    Ok(Opened::new(
        name(net.id.as_ref()),
        device,
        DeviceHandle::Net(handle),
    ))
}

fn rate_limits(config: Option<&RateLimiterConfig>) -> RateLimits {
    // As in Cloud Hypervisor, a bucket of no size or that fills in no time is off.
    let bucket = |bucket: &TokenBucket| {
        let is_on = bucket.size > 0 && bucket.refill_time > 0;
        is_on.then(|| BucketConfig {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst.unwrap_or(0),
            refill_time: Duration::from_millis(bucket.refill_time),
        })
    };
    RateLimits {
        bandwidth: config.and_then(|config| config.bandwidth.as_ref().and_then(bucket)),
        ops: config.and_then(|config| config.ops.as_ref().and_then(bucket)),
    }
}

#[cfg(test)]
mod tests {
    use virtio_devices::testing;

    use super::*;

    #[test]
    fn disks_of_a_group_share_its_limiter() {
        let config: VmConfig = serde_json::from_str(
            r#"{"payload":{},"rate_limit_groups":[
                {"id":"g","rate_limiter_config":{"ops":{"size":2,"refill_time":1000000}}}]}"#,
        )
        .unwrap();
        let groups = LimiterGroups::new(&config);
        let of = |disk: &str| groups.of_disk(&serde_json::from_str(disk).unwrap()).lend();
        let (one, other) = (
            of(r#"{"rate_limit_group":"g"}"#),
            of(r#"{"rate_limit_group":"g"}"#),
        );
        one.begin(1).unwrap();
        other.begin(1).unwrap();
        one.begin(1).unwrap_err();
        of("{}").begin(1).unwrap();
        of(r#"{"rate_limiter_config":{"ops":{"size":1,"refill_time":1000000}}}"#)
            .begin(1)
            .unwrap();
    }

    #[test]
    fn zero_bucket_is_unlimited() {
        let bucket = |size, refill_time| TokenBucket {
            size,
            one_time_burst: None,
            refill_time,
        };
        let limits = |bandwidth, ops| {
            let (bandwidth, ops) = (Some(bandwidth), Some(ops));
            rate_limits(Some(&RateLimiterConfig { bandwidth, ops }))
        };
        let off = limits(bucket(0, 100), bucket(100, 0));
        assert_eq!(off, RateLimits::default());
        let on = limits(bucket(1, 1), bucket(0, 0));
        assert!(on.bandwidth.is_some() && on.ops.is_none());
    }

    /// The name of the thread that writes what a guest says to its console.
    fn console_thread(mode: ConsoleMode) -> String {
        struct Output(std::sync::mpsc::Sender<String>);
        impl Write for Output {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let name = std::thread::current().name().unwrap().to_owned();
                self.0.send(name).unwrap();
                Ok(bytes.len())
            }

            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (event_loop, workers) = testing::workers();
        let mut config = VmConfig::with_payload(spec::PayloadConfig::default());
        config.console.mode = mode;
        let (output, written) = std::sync::mpsc::channel();
        let end = ConsoleEnd {
            output: Box::new(Output(output)),
            on_room: Box::new(|| {}),
        };
        let context = OpenContext {
            workers: &workers,
            image_dirs: &[],
            owner: ResourceOwner::ThisMachine,
            limiters: &LimiterGroups::new(&config),
            confinement: Confinement::default(),
        };
        let mut opened = console(&config, end, context).unwrap();
        let mut guest = testing::TestGuest::new(1 << 20);
        let (transport, _) = testing::transport();
        // The queue for output.
        let mut driver = testing::TestQueue::new(&mut guest, 1, 8);
        let text = guest.put(b"text");
        opened.device.activate(0, &transport).unwrap();
        let queue = driver.device_side(&transport, virtio_devices::QueueState::default());
        opened.device.start_queue(queue).unwrap();
        driver.send(&[testing::TestBuffer::new(text, 4, false)]);
        driver.wait_used();
        opened.device.stop_queue(1);
        drop((opened, event_loop));
        written.recv().unwrap()
    }

    /// Other devices, also of other VMs, must not wait for the storage of a file of random numbers.
    #[test]
    fn entropy_from_a_file_has_a_thread_of_its_own() {
        let (_event_loop, workers) = testing::workers();
        let mut config = VmConfig::with_payload(spec::PayloadConfig::default());
        let limiters = LimiterGroups::new(&config);
        let context = OpenContext {
            workers: &workers,
            image_dirs: &[],
            owner: ResourceOwner::ThisMachine,
            limiters: &limiters,
            confinement: Confinement::default(),
        };
        for (source, own) in [("/dev/urandom", false), ("/proc/self/exe", true)] {
            config.rng.src = source.to_owned();
            let opened = rng(&config.rng, context).unwrap();
            assert_eq!(opened.own_loop.is_some(), own, "{source}");
        }
    }

    /// Other devices, also of other VMs, must not wait for the storage of a console's file.
    #[test]
    fn console_with_a_file_has_a_thread_of_its_own() {
        assert_eq!(console_thread(ConsoleMode::Null), "test");
        assert_eq!(console_thread(ConsoleMode::File), "console");
    }
}
