//! Destinations of older versions.

use super::*;
use crate::wire::{Kind, Reader};

#[test]
fn verify_needs_protocol_version() {
    let policy = Policy {
        verify: true,
        ..policy()
    };
    let (outcome, guest) = migrate(&policy, None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 1);
        assert_eq!(peer.recv_abort(), "verify-unsupported");
    });
    assert_eq!(stayed(&outcome), "verify-unsupported");
    assert!(guest.runs);
    migrate(&policy, None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 2);
        assert!(peer.prepare(1, false).verify);
    });
}

#[test]
fn copied_disks_need_protocol_version() {
    let guest = || {
        let mut guest = MemoryGuest::new(ram(PAGES));
        guest.disks = vec![MemoryDisk::new(4096)];
        guest
    };
    let (outcome, guest_here) = migrate_guest(guest(), &policy(), None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 2);
        assert_eq!(peer.recv_abort(), "storage-copy-unsupported");
    });
    assert_eq!(stayed(&outcome), "storage-copy-unsupported");
    assert!(guest_here.runs);
    migrate_guest(guest(), &policy(), None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 3);
        assert_eq!(peer.prepare(1, false).disks[0].size, 4096);
    });
    // A guest without them speaks with older destinations as before.
    migrate(&policy(), None, |dialed, _| {
        let mut peer = Peer::welcome(dialed, 1);
        assert_eq!(peer.prepare(1, false).disks, []);
    });
}

/// Blocks of disks follow a guest to a destination that knows of that. An older one gets them in the stop.
#[test]
fn older_destination_gets_all_blocks_before_the_guest() {
    for version in [3, 4] {
        let mut guest = MemoryGuest::new(ram(PAGES));
        guest.disks = vec![MemoryDisk::new(3 * PAGE)];
        guest.disks[0].fill(PAGE, PAGE, 5);
        let policy = Policy {
            mode: Mode::Postcopy,
            ..policy()
        };
        let (outcome, _) = migrate_guest(guest, &policy, None, move |dialed, _| {
            let mut peer = Peer::welcome(dialed, version);
            let connections = peer.prepare(2, true).connections;
            for _ in 0..connections {
                assert!(matches!(peer.accept(), Channel::Ram { .. }));
            }
            assert!(peer.until_state());
            peer.say(&ToSource::Refused(Refusal::new("enough", "")));
            let mut frames = Vec::new();
            for stream in &mut peer.channels {
                let (mut reader, kinds) = (
                    Reader::default(),
                    [Kind::Pages, Kind::Zeros, Kind::Missing, Kind::End],
                );
                while let Ok((kind, body)) = reader.read(stream, &kinds) {
                    let block = body.first().copied();
                    frames.extend((kind != Kind::End).then_some((kind, block)));
                }
            }
            let has = |kind| frames.contains(&(kind, Some(1)));
            let (sent, announced) = (has(Kind::Pages), has(Kind::Missing));
            assert_eq!(
                (sent, announced),
                (version == 3, version == 4),
                "{frames:?}"
            );
        });
        assert_eq!(stayed(&outcome), "enough");
    }
}
