//! The disks of a VM that a request has copied.

use std::collections::BTreeMap;

use control::RequestError;
use spec::{DiskStorage, StartMigration, StorageMode, VmConfig};

use super::super::invalid;
use super::names::no_image_name;

/// The disks of a VM that are copied, by the request that moves it.
#[derive(Clone, Debug)]
pub(in crate::migrate) struct Selection {
    all: StorageMode,
    others: BTreeMap<String, DiskStorage>,
}

impl Selection {
    /// # Errors
    /// The request names a disk that the VM has not, or one twice, or copies disks with `local`; or the name
    /// of an image is none, or of an image that is not made.
    pub(in crate::migrate) fn new(
        what: &StartMigration,
        config: &VmConfig,
    ) -> Result<Self, RequestError> {
        let has = |id: &str| {
            let mut disks = config.disks.iter().flatten();
            disks.any(|disk| disk.id.as_deref() == Some(id))
        };
        let mut others = BTreeMap::new();
        for disk in what.disks.iter().flatten() {
            if !has(&disk.id) {
                let detail = format!("the VM has no disk {:?}", disk.id);
                return Err(invalid("disks", detail));
            }
            if others.insert(disk.id.clone(), disk.clone()).is_some() {
                let detail = format!("the disk {:?} is named twice", disk.id);
                return Err(invalid("disks", detail));
            }
            let Some(name) = &disk.name else { continue };
            if disk.storage != StorageMode::Copy {
                let detail = format!(
                    "the disk {:?} is shared: only an image that is copied gets a `name` ({name:?})",
                    disk.id
                );
                return Err(invalid("disks", detail));
            }
            if !DiskStorage::is_image_name(name) {
                let detail = no_image_name(name);
                return Err(invalid("disks", detail));
            }
        }
        let selection = Self {
            all: what.storage,
            others,
        };
        let any = config.disks.iter().flatten();
        if what.local && any.flat_map(|disk| &disk.id).any(|id| selection.copies(id)) {
            let detail = "`local` moves the VM within this host, where the other process can use the \
                          same images: it cannot be combined with `storage` copy";
            return Err(invalid("storage", detail.to_owned()));
        }
        Ok(selection)
    }

    pub(super) fn copies(&self, id: &str) -> bool {
        let other = self.others.get(id).map(|disk| disk.storage);
        other.unwrap_or(self.all) == StorageMode::Copy
    }

    /// The name that the image of a disk gets at the destination, if the request chose one.
    pub(super) fn name(&self, id: &str) -> Option<&String> {
        self.others.get(id)?.name.as_ref()
    }
}
