//! Descriptors that another program opened, as a part of a configuration.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use crate::device::NetConfig;

/// Descriptors that came along with a request.
///
/// They are of this process: what is written of them is how many there are, each as -1, and what
/// is read holds none.
#[derive(Clone, Debug)]
pub struct Descriptors {
    held: Vec<Arc<OwnedFd>>,
    told: usize,
}

impl Descriptors {
    /// These.
    #[must_use]
    pub fn new(held: Vec<OwnedFd>) -> Self {
        Self {
            told: held.len(),
            held: held.into_iter().map(Arc::new).collect(),
        }
    }

    /// How many there are, here or elsewhere.
    #[must_use]
    pub fn count(&self) -> usize {
        self.told
    }

    /// Whether they are here, and not only written of.
    #[must_use]
    pub fn are_here(&self) -> bool {
        self.told == self.held.len()
    }

    /// Others for the same, for a user that will close them.
    ///
    /// # Errors
    /// Fails if the host has none left.
    pub fn duplicate(&self) -> io::Result<Vec<OwnedFd>> {
        self.held.iter().map(|fd| fd.try_clone()).collect()
    }
}

impl NetConfig {
    /// The queues of its tap, if they are descriptors.
    #[must_use]
    pub fn tap_descriptors(&self) -> Option<&Descriptors> {
        self.fds.as_ref().filter(|fds| fds.count() > 0)
    }
}

/// Descriptors for the tap of an interface that comes with a guest, from a snapshot or another service.
///
/// They come with the request over a unix socket (SCM_RIGHTS), in the order of these entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoredNetConfig {
    /// The interface.
    pub id: String,
    /// Number of descriptors for it, one for each queue pair.
    #[serde(default)]
    pub num_fds: usize,
    /// The descriptors. The numbers in the body are ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<i32>>)]
    pub fds: Option<Descriptors>,
}

/// Those that are the very same.
impl PartialEq for Descriptors {
    fn eq(&self, other: &Self) -> bool {
        let both = self.held.iter().zip(&other.held);
        self.told == other.told
            && self.held.len() == other.held.len()
            && both.into_iter().all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

impl Eq for Descriptors {}

impl Serialize for Descriptors {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(std::iter::repeat_n(-1, self.told))
    }
}

impl<'de> Deserialize<'de> for Descriptors {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let numbers = Vec::<i32>::deserialize(from)?;
        Ok(Self {
            held: Vec::new(),
            told: numbers.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_serialize_as_count() {
        let open = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let two = Descriptors::new(vec![open(), open()]);
        assert_eq!(two.duplicate().unwrap().len(), 2);
        assert!(two.are_here() && two == two.clone());
        assert_ne!(two, Descriptors::new(vec![open(), open()]));
        let text = serde_json::to_string(&two).unwrap();
        assert_eq!(text, "[-1,-1]");
        let read: Descriptors = serde_json::from_str(&text).unwrap();
        assert_eq!(read.count(), 2);
        assert!(!read.are_here() && read != two);
    }
}
