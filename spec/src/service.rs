//! The service's own types: many VMs, problems, the memory map.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits;
use crate::vm::{VmConfig, VmState};

/// Name of a VM: 1 to 64 letters, digits, `-`, `_` and `.`, starting with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
pub struct VmId(String);

/// A name that no VM can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a VM name: 1 to {max} letters, digits, '-', '_' and '.', starting with a letter \
     or digit", max = limits::VM_ID_LEN
)]
pub struct InvalidVmId(String);

impl VmId {
    /// A name that no other VM has.
    #[must_use]
    pub fn unique() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VmId {
    type Error = InvalidVmId;

    fn try_from(name: String) -> Result<Self, InvalidVmId> {
        let good = name.len() <= limits::VM_ID_LEN
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if good {
            Ok(Self(name))
        } else {
            Err(InvalidVmId(name))
        }
    }
}

impl FromStr for VmId {
    type Err = InvalidVmId;

    fn from_str(name: &str) -> Result<Self, InvalidVmId> {
        Self::try_from(name.to_owned())
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A VM to create.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// The VM's name; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<VmId>,
    /// Its configuration.
    pub config: VmConfig,
}

/// A VM in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSummary {
    /// Its name.
    pub id: VmId,
    /// The VM's state.
    pub state: VmState,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Bytes of its memory.
    pub memory: u64,
    /// The socket that serves Cloud Hypervisor's API for this VM alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_socket: Option<String>,
}

/// An event of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Sequence number: increases by one with each event of the service.
    pub sequence: u64,
    /// Time, in milliseconds since 1970.
    pub time_ms: u64,
    /// The VM.
    pub vm: VmId,
    /// The event: `created`, `booted`, `rebooted`, `paused`, `resumed`, `shutdown`, `failed`, `deleted`;
    /// of devices `device-added`, `device-removal-requested`, `device-removed`, `device-needs-reset`,
    /// `disk-error`, `disk-mirroring`, `disk-mirrored`, `disk-mirror-failed`; of the guest's kernel `guest-panic`, `watchdog-expired`; of resizes
    /// `resize-requested`, `resized`, `resize-failed`; of migrations `migrating`, `migrated`,
    /// `migration-failed` (source), `awaited`, `arrived`, `arrival-failed`, `end-deferred` (destination); of snapshots `snapshotting`, `snapshotted`,
    /// `snapshot-failed`, `restoring`, `restored`, `restore-failed`, `forked`, `fork-failed`, `recorded`, `recording-failed`; of core dumps `core-dumping`,
    /// `core-dumped`, `core-dump-failed`. Later versions may have more.
    pub event: String,
    /// Details, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// A problem of one field of a body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldProblem {
    /// JSON pointer to the field (RFC 6901).
    pub pointer: String,
    /// Stable code, for programs.
    pub code: String,
    /// Description, for people.
    pub detail: String,
}

/// Why a request failed (RFC 9457, `application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`; `code` identifies the problem.
    #[serde(rename = "type", default = "about_blank")]
    pub kind: String,
    /// The HTTP status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Stable code, for programs.
    pub code: String,
    /// Description, for people: the request, why it failed, and what to do.
    pub detail: String,
    /// Problems of single fields, if any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldProblem>,
}

fn about_blank() -> String {
    "about:blank".to_owned()
}

impl Problem {
    /// A problem without fields.
    #[must_use]
    pub fn new(status: u16, title: &str, code: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: about_blank(),
            title: title.to_owned(),
            status,
            code: code.to_owned(),
            detail: detail.into(),
            errors: Vec::new(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.detail, self.code)?;
        for error in &self.errors {
            write!(
                f,
                "\n  {}: {} ({})",
                error.pointer, error.detail, error.code
            )?;
        }
        Ok(())
    }
}

/// A region of the memory map's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapNode {
    /// The region's name.
    pub name: String,
    /// The device that owns the region; may be empty.
    pub owner: String,
    /// `container`, `ram`, `rom`, `device` or `alias`.
    pub kind: String,
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
    /// Priority among the regions of its container.
    pub priority: i32,
    /// Whether the region is enabled.
    pub enabled: bool,
    /// For an alias: the region that it shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias_of: Option<MapAlias>,
    /// Regions in it, from the front to the back.
    #[schema(no_recursion)]
    pub children: Vec<MapNode>,
}

/// The part of a region that an alias shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapAlias {
    /// The region.
    pub region: String,
    /// First offset in it.
    pub first: u64,
    /// Last offset in it.
    pub last: u64,
}

/// A range of the flat view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapRange {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
    /// The region that answers.
    pub name: String,
    /// The device that owns the region; may be empty.
    pub owner: String,
    /// `ram`, `rom` or `device`.
    pub kind: String,
    /// Offset of the range in the region.
    pub offset: u64,
}

/// One of a VM's address spaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapSpace {
    /// `memory` or `I/O`.
    pub name: String,
    /// Number of changes of the map so far.
    pub generation: u64,
    /// The tree.
    pub tree: MapNode,
    /// The flat view, ascending.
    pub flat: Vec<MapRange>,
}

/// A VM's address spaces, in the manner of QEMU's `info mtree`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryMap {
    /// Memory and port I/O.
    pub spaces: Vec<MapSpace>,
}

impl MapNode {
    fn print(&self, f: &mut fmt::Formatter<'_>, depth: usize) -> fmt::Result {
        let (first, last, priority) = (self.first, self.last, self.priority);
        write!(
            f,
            "{:indent$}{first:016x}-{last:016x} (prio {priority}, ",
            "",
            indent = depth * 2
        )?;
        match &self.alias_of {
            Some(MapAlias {
                region,
                first,
                last,
            }) => {
                write!(
                    f,
                    "alias): {} @{region} {first:016x}-{last:016x}",
                    self.name
                )?;
            }
            None => write!(f, "{}): {}", self.kind, self.name)?,
        }
        if !self.owner.is_empty() {
            write!(f, " owner {}", self.owner)?;
        }
        writeln!(f, "{}", if self.enabled { "" } else { " [disabled]" })?;
        self.children
            .iter()
            .try_for_each(|child| child.print(f, depth + 1))
    }
}

impl fmt::Display for MemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for space in &self.spaces {
            writeln!(f, "address space: {}", space.name)?;
            space.tree.print(f, 1)?;
            writeln!(
                f,
                "flat view: {} (generation {})",
                space.name, space.generation
            )?;
            for range in &space.flat {
                write!(
                    f,
                    "  {:016x}-{:016x} ({}): {}",
                    range.first, range.last, range.kind, range.name
                )?;
                if range.offset != 0 {
                    write!(f, " @{:x}", range.offset)?;
                }
                writeln!(
                    f,
                    "{}{}",
                    if range.owner.is_empty() {
                        ""
                    } else {
                        " owner "
                    },
                    range.owner
                )?;
            }
        }
        Ok(())
    }
}
