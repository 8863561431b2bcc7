//! The virtio devices of a machine: what a specification asks for, built and plugged in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use memory::Transaction;
use spec::{
    DeviceNode, DiskConfig, ImageType, LockGranularity, NetConfig, RateLimiterConfig, TokenBucket,
    VmConfig,
};
use virtio_devices::block::{Block, BlockConfig, BlockHandle, ImageFormat, LockMode};
use virtio_devices::net::{Net, NetHandle, TapAddress, TapSource};
use virtio_devices::rate_limiter::{BucketConfig, RateLimits};
use virtio_devices::rng::Rng;
use virtio_devices::{VirtioDevice, Workers};

use crate::driver::Reporter;
use crate::failure::BuildError;
use crate::pci::{PciHost, Plugged};

/// The name of a tap that is made; `%d` is a number of the host's choice.
const NEW_TAP: &str = "vmtap%d";

/// As Cloud Hypervisor names the one of a VM.
const RNG: &str = "__rng";

/// The devices on a machine's PCI bus.
pub(crate) struct Devices {
    #[expect(dead_code, reason = "devices do not come later yet")]
    host: PciHost,
    plugged: BTreeMap<String, (Plugged, Control)>,
}

/// What a device can be asked while it runs.
#[expect(dead_code, reason = "nothing is asked of them yet")]
enum Control {
    None,
    Disk(BlockHandle),
    Net(NetHandle),
}

impl Devices {
    /// All that the specification asks for, as part of a change of the map.
    pub(crate) fn build(
        mut host: PciHost,
        tx: &mut Transaction<'_>,
        config: &VmConfig,
        workers: &Workers,
        reporter: &Reporter,
    ) -> Result<Self, BuildError> {
        let mut plugged = BTreeMap::new();
        for Wanted {
            id,
            device,
            control,
        } in wanted(config, workers)?
        {
            let device = host.plug(tx, &id, device, reporter)?;
            plugged.insert(id, (device, control));
        }
        Ok(Self { host, plugged })
    }

    /// On return no device reads or writes guest memory. vCPUs are parked.
    pub(crate) fn pause(&self) {
        self.plugged
            .values()
            .for_each(|(plugged, _)| plugged.device.pause());
    }

    /// Lets the devices go on.
    pub(crate) fn resume(&self) {
        self.plugged
            .values()
            .for_each(|(plugged, _)| plugged.device.resume());
    }

    /// What each device counts.
    pub(crate) fn counters(&self) -> impl Iterator<Item = (&String, Vec<(&'static str, u64)>)> {
        let counted = |(id, (plugged, _)): (_, &(Plugged, _))| (id, plugged.device.counters());
        self.plugged.iter().map(counted)
    }

    /// As the API shows them.
    pub(crate) fn tree(&self) -> BTreeMap<String, DeviceNode> {
        let node = |(id, (plugged, _)): (&String, &(Plugged, _))| {
            let node = DeviceNode {
                id: id.clone(),
                resources: Vec::new(),
                children: Vec::new(),
                pci_bdf: Some(plugged.bdf.to_string()),
            };
            (id.clone(), node)
        };
        self.plugged.iter().map(node).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // Their tasks run on loops that outlive the machine.
        self.pause();
    }
}

/// A device that is wanted, and by what it is controlled.
struct Wanted {
    id: String,
    device: Box<dyn VirtioDevice>,
    control: Control,
}

/// The devices of a specification, in the order in which they are put on the bus.
fn wanted(config: &VmConfig, workers: &Workers) -> Result<Vec<Wanted>, BuildError> {
    let mut all = Vec::new();
    for (i, disk) in config.disks.iter().flatten().enumerate() {
        let id = disk.id.clone().unwrap_or_else(|| format!("_disk{i}"));
        all.push(self::disk(id, disk, workers)?);
    }
    for (i, net) in config.net.iter().flatten().enumerate() {
        let id = net.id.clone().unwrap_or_else(|| format!("_net{i}"));
        all.push(self::net(id, net, workers)?);
    }
    let rng = Rng::new(Path::new(&config.rng.src), workers.clone())?;
    all.push(Wanted {
        id: config.rng.id.clone().unwrap_or_else(|| RNG.to_owned()),
        device: Box::new(rng),
        control: Control::None,
    });
    Ok(all)
}

fn disk(id: String, disk: &DiskConfig, workers: &Workers) -> Result<Wanted, BuildError> {
    let config = BlockConfig {
        // Validation has seen to it that there is one.
        path: disk.path.clone().unwrap_or_default().into(),
        readonly: disk.readonly,
        direct: disk.direct,
        format: disk.image_type.and_then(|kind| match kind {
            ImageType::Raw => Some(ImageFormat::Raw),
            ImageType::Qcow2 => Some(ImageFormat::Qcow2),
            ImageType::FixedVhd | ImageType::Vhdx | ImageType::Unknown => None,
        }),
        backing_files: disk.backing_files,
        queues: u16::try_from(disk.num_queues).unwrap_or(1),
        queue_size: disk.queue_size,
        serial: disk.serial.clone().unwrap_or_else(|| id.clone()),
        sparse: disk.sparse,
        lock: match disk.lock_granularity {
            LockGranularity::ByteRange => LockMode::ByteRange,
            LockGranularity::Full => LockMode::Full,
        },
        limits: rate_limits(disk.rate_limiter_config.as_ref()),
    };
    let (device, handle) = Block::new(&config, workers.clone())?;
    Ok(Wanted {
        id,
        device: Box::new(device),
        control: Control::Disk(handle),
    })
}

fn net(id: String, net: &NetConfig, workers: &Workers) -> Result<Wanted, BuildError> {
    // Validation has seen to it that addresses are addresses.
    let mac = |text: &Option<String>| text.as_deref().and_then(spec::parse_mac);
    let name = net.tap.clone().unwrap_or_else(|| NEW_TAP.to_owned());
    // One that is there has been set up by somebody who knows why.
    let is_there = Path::new("/sys/class/net").join(&name).exists();
    let ip = net.ip.parse().ok().zip(net.mask.parse().ok());
    let config = virtio_devices::net::NetConfig {
        tap: TapSource::Name(name),
        address: TapAddress {
            ip: ip.filter(|_| !is_there),
            mac: mac(&net.host_mac),
            mtu: net.mtu,
        },
        mac: match mac(&net.mac) {
            Some(mac) => mac,
            None => random_mac().map_err(BuildError::host("give random numbers"))?,
        },
        mtu: net.mtu,
        pairs: u16::try_from(net.num_queues / 2).unwrap_or(1),
        queue_size: net.queue_size,
        offload_csum: net.offload_csum,
        offload_tso: net.offload_tso,
        limits: rate_limits(net.rate_limiter_config.as_ref()),
    };
    let (device, handle) = Net::new(config, workers.clone())?;
    Ok(Wanted {
        id,
        device: Box::new(device),
        control: Control::Net(handle),
    })
}

/// An address of nobody's: locally administered (IEEE 802, 8.2).
fn random_mac() -> std::io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    File::open("/dev/urandom")?.read_exact(&mut mac)?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

fn rate_limits(config: Option<&RateLimiterConfig>) -> RateLimits {
    let bucket = |bucket: &TokenBucket| BucketConfig {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time: Duration::from_millis(bucket.refill_time),
    };
    RateLimits {
        bandwidth: config.and_then(|config| config.bandwidth.as_ref().map(bucket)),
        ops: config.and_then(|config| config.ops.as_ref().map(bucket)),
    }
}
