//! Taps whose descriptors come with the request for a guest.
//!
//! Descriptors are of one process, so that an offer only says how many an interface had. Whoever asks
//! for the guest here sends others for the same number of queues.

use std::sync::Arc;

use migration::Refusal;
use spec::{RestoredNetConfig, VmConfig};

/// Descriptors for the interfaces of a guest that comes, by their ids.
#[derive(Clone, Debug, Default)]
pub(super) struct GivenTaps(Arc<[RestoredNetConfig]>);

impl GivenTaps {
    pub(super) fn new(given: Option<&Vec<RestoredNetConfig>>) -> Self {
        Self(given.into_iter().flatten().cloned().collect())
    }

    /// Whether there are any.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives the interfaces of an offered configuration their descriptors. The number of them is checked
    /// with the rest of the configuration.
    ///
    /// # Errors
    /// An entry names no interface, or one twice, or an interface lacks its descriptors.
    pub(super) fn give(&self, config: &mut VmConfig) -> Result<(), Refusal> {
        let mut nets: Vec<_> = config.net.iter_mut().flatten().collect();
        for (index, given) in self.0.iter().enumerate() {
            let id = &given.id;
            if self.0.iter().take(index).any(|other| other.id == *id) {
                let why = format!("`net_fds` names the interface {id:?} twice");
                return Err(Refusal::new("invalid-configuration", why));
            }
            let net = nets.iter_mut().find(|net| net.id.as_ref() == Some(id));
            let net = net.ok_or_else(|| {
                let why = format!("`net_fds` names {id:?}, and the VM has no such interface");
                Refusal::new("no-such-device", why)
            })?;
            if given.fds.as_ref().is_some_and(|fds| fds.count() > 0) {
                net.fds.clone_from(&given.fds);
                net.tap = None;
            }
        }
        let mut lacking = nets.iter().filter_map(|net| {
            let fds = net.tap_descriptors().filter(|fds| !fds.are_here())?;
            Some((net.id.as_deref().unwrap_or_default(), fds.count()))
        });
        let Some((id, count)) = lacking.next() else {
            return Ok(());
        };
        let why = format!(
            "the tap of `{id}` was passed as descriptors, which are of another process: send {count} \
             with the request (`net_fds`), or name a tap (`overrides.net`)"
        );
        Err(Refusal::new("tap-by-descriptors", why))
    }

    /// Gives the interfaces of a copy of a configuration their descriptors, which get lost on the way
    /// through JSON.
    pub(super) fn copy(from: &VmConfig, to: &mut VmConfig) {
        let nets = to.net.iter_mut().flatten();
        for (net, given) in nets.zip(from.net.iter().flatten()) {
            net.fds.clone_from(&given.fds);
        }
    }
}

#[cfg(test)]
mod tests {
    use spec::{Descriptors, PayloadConfig};

    use super::*;

    fn config() -> VmConfig {
        let mut config = VmConfig::with_payload(PayloadConfig::default());
        let nets = serde_json::json!([
            { "id": "a", "fds": [-1, -1], "num_queues": 4 },
            { "id": "b", "tap": "tap0" },
        ]);
        config.net = serde_json::from_value(nets).unwrap();
        config
    }

    fn given(entries: &[(&str, usize)]) -> GivenTaps {
        let open = |_| std::fs::File::open("/dev/null").unwrap().into();
        let entry = |(id, count): &(&str, usize)| RestoredNetConfig {
            id: (*id).to_owned(),
            num_fds: *count,
            fds: Some(Descriptors::new((0..*count).map(open).collect())),
        };
        GivenTaps::new(Some(&entries.iter().map(entry).collect()))
    }

    #[test]
    fn interfaces_get_their_descriptors() {
        let mut full = config();
        given(&[("b", 1), ("a", 2)]).give(&mut full).unwrap();
        let told = |config: &VmConfig| -> Vec<_> {
            let nets = config.net.iter().flatten();
            let fds = nets.map(|net| (net.tap.clone(), net.tap_descriptors().cloned().unwrap()));
            fds.map(|(tap, fds)| (tap, fds.count(), fds.are_here()))
                .collect()
        };
        assert_eq!(told(&full), [(None, 2, true), (None, 1, true)]);
        let text = serde_json::to_vec(&full).unwrap();
        let mut read: VmConfig = serde_json::from_slice(&text).unwrap();
        assert_eq!(told(&read), [(None, 2, false), (None, 1, false)]);
        GivenTaps::copy(&full, &mut read);
        assert_eq!(read, full);
    }

    #[test]
    fn descriptors_that_are_missing_or_not_wanted_are_refused() {
        for (entries, code, why) in [
            (&[][..], "tap-by-descriptors", "send 2"),
            (&[("a", 0)], "tap-by-descriptors", "`a`"),
            (&[("b", 1)], "tap-by-descriptors", "`a`"),
            (&[("a", 2), ("c", 1)], "no-such-device", "\"c\""),
            (&[("a", 1), ("a", 1)], "invalid-configuration", "twice"),
        ] {
            let refused = given(entries).give(&mut config()).unwrap_err();
            assert_eq!(refused.code, code, "{refused:?}");
            assert!(refused.detail.contains(why), "{refused:?}");
        }
        // An interface with a tap's name needs none.
        let mut named = config();
        named.net.as_mut().unwrap().remove(0);
        given(&[]).give(&mut named).unwrap();
    }
}
