//! Copies of disks in a snapshot, and the VMs that are made from it.

use std::time::Duration;

use control::{Category, RequestError};
use migration::snapshot::Snapshot;
use migration::{Offer, Policy, Refusal, SourceDisk};
use spec::{ImageType, SnapshotDisks, VmConfig, VmSnapshotConfig};
use virtio_devices::block::DiskAccess;

use super::storage::CopiedDisk;
use super::{invalid, offer, positive};

const MAX_DOWNTIME_MS: u64 = 300;
const DEADLINE_S: u64 = 3600;

/// Returns the policy for the rounds beside a running guest.
pub(super) fn policy(what: &VmSnapshotConfig) -> Result<Policy, RequestError> {
    for (field, value) in [
        ("max_downtime_ms", what.max_downtime_ms),
        ("deadline_s", what.deadline_s),
        ("max_bandwidth", what.max_bandwidth),
    ] {
        if value.is_some() && what.disks != SnapshotDisks::Copy {
            let detail =
                format!("`{field}` is for copies of disks: it needs `disks` set to `Copy`");
            return Err(invalid(field, detail));
        }
    }
    rounds_policy(
        what.max_downtime_ms.unwrap_or(MAX_DOWNTIME_MS),
        what.deadline_s.unwrap_or(DEADLINE_S),
        what.max_bandwidth,
    )
}

/// Returns the policy for the rounds in which disks of a running guest are copied.
pub(super) fn rounds_policy(
    max_downtime_ms: u64,
    deadline_s: u64,
    max_bandwidth: Option<u64>,
) -> Result<Policy, RequestError> {
    if let Some(bandwidth) = max_bandwidth {
        positive("max_bandwidth", bandwidth)?;
    }
    Ok(Policy {
        max_downtime: Duration::from_millis(positive("max_downtime_ms", max_downtime_ms)?),
        deadline: Some(Duration::from_secs(positive("deadline_s", deadline_s)?)),
        max_bandwidth,
        ..Policy::default()
    })
}

/// Fails if a fork is to have copies of disks.
pub(super) fn check_fork(disks: SnapshotDisks) -> Result<(), RequestError> {
    if disks != SnapshotDisks::Copy {
        return Ok(());
    }
    let detail = "a fork has no folder for copies of disks (`disks` set to `Copy`): fork with \
                  `Overlay`, or restore from a snapshot with copies";
    Err(RequestError::new(
        Category::Unsupported,
        "not-supported",
        detail,
    ))
}

/// The disks of a machine that a snapshot copies. They are tracked until this is dropped.
pub(super) struct DiskCopies(Vec<CopiedDisk>);

impl DiskCopies {
    /// Returns the disks that can be written, if they are to be copied.
    pub(super) fn of(
        config: &VmConfig,
        disks: &[(String, DiskAccess)],
        what: SnapshotDisks,
    ) -> Result<Self, Refusal> {
        let mut copies = Vec::new();
        if what == SnapshotDisks::Copy {
            for disk in config.disks.iter().flatten().filter(|disk| !disk.readonly) {
                let id = disk.id.as_deref().unwrap_or_default();
                let found = disks.iter().find(|(name, _)| name == id);
                let (_, access) = found.ok_or_else(|| {
                    let why = format!(
                        "the disk {id} is served by another program (`vhost_user`), which alone can copy it"
                    );
                    Refusal::new("disk-not-copied", why)
                })?;
                copies.push((id, access));
            }
        }
        CopiedDisk::check_sizes(copies.iter().copied())?;
        let copies = copies.iter().map(|(id, access)| CopiedDisk::of(id, access));
        copies.collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn names(&self) -> Vec<String> {
        let disks = self.for_engine().into_iter();
        disks.map(|disk| disk.name).collect()
    }

    pub(super) fn for_engine(&self) -> Vec<SourceDisk> {
        self.0.iter().map(CopiedDisk::for_engine).collect()
    }

    pub(super) fn start(&self) -> Result<(), Refusal> {
        self.0.iter().try_for_each(CopiedDisk::start)
    }

    pub(super) fn stop(&self) {
        self.0.iter().for_each(CopiedDisk::stop);
    }
}

/// Returns a configuration without the disks that are copied. The snapshot needs the images of all others.
pub(super) fn without(config: &VmConfig, copied: &[String]) -> VmConfig {
    let mut config = config.clone();
    if let Some(disks) = &mut config.disks {
        disks.retain(|disk| disk.id.as_ref().is_none_or(|id| !copied.contains(id)));
    }
    config
}

/// Returns the offer of a snapshot's machine, whose copied disks are frozen images in its folder: each VM
/// that is made gets an overlay of its own, as of images that were frozen.
pub(super) fn offer_of(snapshot: &Snapshot) -> Result<Offer, Refusal> {
    let mut offer = snapshot.offer();
    if snapshot.manifest().disks.is_empty() {
        return Ok(offer);
    }
    let mut machine = offer::machine(&offer)?;
    for (copy, path) in snapshot.disks() {
        let damaged = |why: &str| {
            let why = format!("the copy of the disk {:?}: {why}", copy.name);
            Refusal::new("snapshot-damaged", why)
        };
        let mut disks = machine.config.disks.iter_mut().flatten();
        let disk = disks.find(|disk| disk.id.as_ref() == Some(&copy.name));
        let disk = disk.ok_or_else(|| damaged("the snapshot's VM has no such disk"))?;
        let path = path.into_os_string().into_string();
        disk.path = Some(path.map_err(|_| damaged("its path is not UTF-8"))?);
        disk.image_type = Some(ImageType::Raw);
        disk.image_type_detected = false;
        (disk.backing_files, disk.data_files) = (false, false);
        if !machine.frozen.contains(&copy.name) {
            machine.frozen.push(copy.name.clone());
        }
    }
    let text = serde_json::to_vec(&machine);
    let text = text.map_err(|error| Refusal::new("offer-unreadable", error.to_string()))?;
    offer.machine = text.into();
    Ok(offer)
}

#[cfg(test)]
mod tests {
    use spec::PayloadConfig;

    use super::*;

    fn config(disks: serde_json::Value) -> VmConfig {
        let mut config = VmConfig::with_payload(PayloadConfig::default());
        config.disks = serde_json::from_value(disks).unwrap();
        config
    }

    /// The back end of a vhost-user disk is another program, so that the machine has no access to it.
    #[test]
    fn disk_of_a_back_end_is_refused_by_name() {
        let back_end = serde_json::json!([
            { "id": "root", "path": "/r", "readonly": true },
            { "id": "data", "vhost_user": true, "vhost_socket": "/s" },
        ]);
        let config = config(back_end);
        let refused = DiskCopies::of(&config, &[], SnapshotDisks::Copy).err();
        let refused = refused.unwrap();
        assert_eq!(refused.code, "disk-not-copied");
        assert!(refused.detail.contains("data"), "{refused:?}");
        for what in [SnapshotDisks::None, SnapshotDisks::Overlay] {
            assert_eq!(DiskCopies::of(&config, &[], what).unwrap().count(), 0);
        }
    }

    #[test]
    fn needs_the_images_that_are_not_copied() {
        let all = serde_json::json!([{ "id": "a", "path": "/a" }, { "id": "b", "path": "/b" }]);
        let left = without(&config(all), &["a".to_owned()]);
        let left = left.disks.unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].id.as_deref(), Some("b"));
    }
}
