//! Overlays beside an image, and which of them nothing uses.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An image whose overlays are listed, or removed if nothing uses them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FindOverlays {
    /// Absolute path of the image on the service's host, or of one of its overlays. The file may be gone.
    pub path: String,
    /// Remove the overlays that nothing uses, and those that nothing uses then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub remove: bool,
}

/// How an overlay is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum OverlayState {
    /// By nothing: it may be removed.
    Unused,
    /// By a VM, a tool or an operation.
    InUse,
    /// By another image that is on top of it.
    Backing,
    /// By a snapshot.
    Snapshot,
    /// By nothing: it was removed.
    Removed,
}

/// An overlay beside an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OverlayInfo {
    /// Its path.
    pub path: String,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// How it is used.
    pub state: OverlayState,
    /// The user that keeps it, and what is to be done if that user is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
