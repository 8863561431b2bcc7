//! Errors of changes to the topology.

use crate::range::AddrRange;
use crate::region::RegionId;

/// An edit that is not possible. Its transaction can continue without the edit, or be
/// aborted; the map in force is the old one until a commit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// The topology has no region with this id, or the region was destroyed.
    #[error("{0:?} does not exist")]
    NoSuchRegion(RegionId),
    /// Zero bytes, or an end past the last 64-bit address.
    #[error(
        "region {name:?} of {size:#x} bytes at {offset:#x} is empty or exceeds 64-bit addresses"
    )]
    Extent {
        /// The region's name.
        name: String,
        /// The requested offset.
        offset: u64,
        /// Bytes asked for.
        size: u64,
    },
    /// A slice that is not within its RAM block.
    #[error(
        "a slice of {size:#x} bytes at offset {offset:#x} is not within its RAM block of \
         {block:#x} bytes"
    )]
    OutsideBlock {
        /// Start of the slice.
        offset: u64,
        /// Bytes of the slice.
        size: u64,
        /// Bytes of the block.
        block: u64,
    },
    /// The region is in a container already.
    #[error("region {0:?} is already in a container")]
    AlreadyPlaced(String),
    /// The region is in no container.
    #[error("region {0:?} is not in a container")]
    NotPlaced(String),
    /// Only containers hold others.
    #[error("region {0:?} is not a container")]
    NotAContainer(String),
    /// The region would be inside itself, through containers or aliases.
    #[error("region {0:?} would contain itself")]
    Cycle(String),
    /// The region is in a container, has children, or is the target of an alias.
    #[error("region {0:?} is in use")]
    InUse(String),
    /// Two doorbells of one region that the hypervisor could not tell apart, or one that is not
    /// within its region or of an odd width.
    #[error("invalid doorbell at {offset:#x} of region {name:?}: {reason}")]
    Doorbell {
        /// The region's name.
        name: String,
        /// The requested offset.
        offset: u64,
        /// Why not.
        reason: &'static str,
    },
    /// More regions than ids.
    #[error("the topology is full")]
    TooMany,
}

/// A commit that failed, before or during its application.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The tree is nested too deeply, or aliases make it too large, to be rendered. The old map
    /// is in force.
    #[error("the region tree cannot be rendered: {0}")]
    Render(&'static str),
    /// A listener refuses the change. The old map is in force.
    #[error("the change was refused: {0}")]
    Refused(#[source] ListenerError),
    /// A listener failed in the middle of the change. Listeners may disagree about the map, and
    /// the topology refuses all further changes.
    #[error("the memory map was changed only in part: {0}")]
    Failed(String),
}

/// The reason why a listener refuses a change, and the addresses that it is about.
#[derive(Debug, thiserror::Error)]
#[error("{reason}{}", at.map_or_else(String::new, |at| format!(" (at {at})")))]
pub struct ListenerError {
    /// Which addresses it is about, if any.
    pub at: Option<AddrRange>,
    /// The reason.
    pub reason: String,
}

impl ListenerError {
    /// About the map as a whole.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            at: None,
            reason: reason.into(),
        }
    }

    /// About these addresses.
    pub fn at(at: AddrRange, reason: impl Into<String>) -> Self {
        Self {
            at: Some(at),
            reason: reason.into(),
        }
    }
}
