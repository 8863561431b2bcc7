//! Saved state loads once and as a whole; invalid state is refused by name.

#![expect(clippy::unwrap_used, reason = "a test that fails here says where")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use state::{LoadError, OpenError, SaveError, Saved, Section, Store, Writer, limits};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    count: u8,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V2 {
    count: u32,
    data: Vec<u8>,
}

impl Saved for V2 {
    const VERSION: u16 = 2;

    fn older(section: &Section<'_>) -> Result<Self, LoadError> {
        let V1 { count } = section.read()?;
        Ok(Self {
            count: count.into(),
            data: Vec::new(),
        })
    }
}

/// Bytes of any content under a version, as a stranger could write them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Any<const VERSION: u16>(Vec<(String, u64)>);

impl<const N: u16> Saved for Any<N> {
    const VERSION: u16 = N;
}

fn saved<T: Saved>(path: &str, state: &T) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.scope(path).unwrap().put(state).unwrap();
    writer.finish()
}

fn load<T: Saved>(bytes: &[u8], path: &str) -> Result<T, LoadError> {
    Store::open(bytes).unwrap().scope(path).unwrap().take()
}

/// Version 1 of the layout, with version 1 of a section, as it was written once and is read for
/// ever.
const GOLDEN: &[u8] = b"WHSTATE\0\x01\0\0\0\x01\0\0\0\x39\x81\x14\x21\
    \x05\0\x01\0\x08\0\0\0\xd5\x46\xaa\xb9timer\xa1\x65count\x07";

#[test]
fn reads_and_writes_first_version() {
    assert_eq!(
        saved("timer", &V1 { count: 7 }).escape_ascii().to_string(),
        GOLDEN.escape_ascii().to_string()
    );
    let upgraded = V2 {
        count: 7,
        data: Vec::new(),
    };
    assert_eq!(load::<V2>(GOLDEN, "timer"), Ok(upgraded));
}

#[test]
fn each_section_is_handed_out_once() {
    let bytes = saved("timer", &V1 { count: 7 });
    let mut store = Store::open(&bytes).unwrap();
    let mut scope = store.scope("timer").unwrap();
    assert_eq!(scope.take(), Ok(V1 { count: 7 }));
    let again = scope.take::<V1>().unwrap_err();
    assert_eq!(again.to_string(), "section timer was taken already");
    let other = scope.child("queue-0").unwrap().take::<V1>().unwrap_err();
    assert_eq!(
        other.to_string(),
        "the saved state has no section timer/queue-0"
    );
    assert_eq!(store.finish(), Ok(()));
}

#[test]
fn rejects_leftover_sections() {
    let mut writer = Writer::default();
    for path in ["c", "a", "b"] {
        writer.scope(path).unwrap().put(&V1 { count: 0 }).unwrap();
    }
    let bytes = writer.finish();
    let mut store = Store::open(&bytes).unwrap();
    store.scope("a").unwrap().take::<V1>().unwrap();
    assert_eq!(
        store.finish().unwrap_err().to_string(),
        "unexpected section b (and 1 more): the machine has no such device"
    );
}

#[test]
fn take_if_there_accepts_missing_section() {
    let bytes = saved("a", &V1 { count: 3 });
    let mut store = Store::open(&bytes).unwrap();
    let absent = store.scope("b").unwrap().take_if_there::<V1>();
    assert_eq!(absent.unwrap(), None);
    let found = store.scope("a").unwrap().take_if_there::<V1>();
    assert_eq!(found.unwrap(), Some(V1 { count: 3 }));
    let again = store.scope("a").unwrap().take_if_there::<V1>();
    assert!(matches!(again.unwrap_err(), LoadError::Taken(_)));
    store.finish().unwrap();
}

#[test]
fn rejects_unknown_versions() {
    let version = |found, latest, bytes: Vec<u8>| {
        let error = match latest {
            1 => load::<V1>(&bytes, "timer").unwrap_err(),
            _ => load::<V2>(&bytes, "timer").unwrap_err(),
        };
        let expected =
            format!("section timer has version {found}; the latest supported version is {latest}");
        assert_eq!(error.to_string(), expected);
    };
    version(
        2,
        1,
        saved(
            "timer",
            &V2 {
                count: 0,
                data: vec![],
            },
        ),
    );
    version(3, 2, saved("timer", &Any::<3>(vec![])));
    version(0, 2, saved("timer", &Any::<0>(vec![])));
}

#[test]
fn rejects_body_of_wrong_version() {
    #[derive(Serialize, Deserialize)]
    struct More {
        count: u8,
        other: u8,
    }
    impl Saved for More {
        const VERSION: u16 = 1;
    }
    let bytes = saved("timer", &More { count: 1, other: 2 });
    let error = load::<V1>(&bytes, "timer").unwrap_err();
    assert!(
        matches!(error, LoadError::Decode { version: 1, .. }),
        "{error}"
    );
    let bytes = saved("timer", &Any::<1>(vec![]));
    assert!(matches!(
        load::<V1>(&bytes, "timer"),
        Err(LoadError::Decode { .. })
    ));
}

#[test]
fn nesting_is_limited() {
    #[derive(Debug, Serialize, Deserialize)]
    struct Deep(Vec<Deep>);
    impl Saved for Deep {
        const VERSION: u16 = 1;
    }
    let deep = |levels: usize| (1..levels).fold(Deep(vec![]), |inner, _| Deep(vec![inner]));
    assert!(load::<Deep>(&saved("d", &deep(limits::NESTING)), "d").is_ok());
    let error = load::<Deep>(&saved("d", &deep(limits::NESTING + 1)), "d").unwrap_err();
    assert!(matches!(error, LoadError::Decode { .. }), "{error}");
}

#[test]
fn writer_obeys_store_limits() {
    let mut writer = Writer::default();
    let long = Any::<1>(vec![("x".repeat(limits::SECTION_LEN), 0)]);
    let error = writer.scope("a").unwrap().put(&long).unwrap_err();
    assert_eq!(error.to_string(), "section a is longer than 1048576 bytes");
    for i in 0..limits::SECTIONS {
        let path = format!("device-{i}");
        writer.scope(&path).unwrap().put(&V1 { count: 0 }).unwrap();
    }
    let again = writer.scope("device-0").unwrap().put(&V1 { count: 0 });
    assert!(matches!(again, Err(SaveError::Duplicate(_))));
    let more = writer.scope("one-more").unwrap().put(&V1 { count: 0 });
    assert!(matches!(more, Err(SaveError::TooMuch { .. })));
    let bytes = writer.finish();
    assert_eq!(
        Store::open(&bytes).unwrap().remaining().count(),
        limits::SECTIONS
    );
}

#[test]
fn names_are_checked() {
    for bad in ["", "/a", "a/", "a//b", "a b", "ä", &"a".repeat(129)] {
        assert!(Writer::default().scope(bad).is_err(), "{bad:?}");
    }
    let mut writer = Writer::default();
    let mut scope = writer.scope("pci/0000:00:01.0").unwrap();
    assert!(scope.child("").is_err());
    assert!(scope.child(&"q".repeat(limits::PATH_LEN)).is_err());
}

/// Writes the checksum of the header or of the first section anew, as a hostile peer would.
fn sealed(mut bytes: Vec<u8>, change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut bytes);
    let crc = crc32fast::hash(&bytes[..16]);
    bytes[16..20].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// A section `timer` of version 2 with this body, under checksums that are right.
fn forged(body: &[u8]) -> Vec<u8> {
    let mut all = GOLDEN[..24].to_vec();
    all[22] = 2;
    all.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&5u64.to_le_bytes());
    crc.update(&(body.len() as u64).to_le_bytes());
    crc.update(&2u16.to_le_bytes());
    crc.update(b"timer");
    crc.update(body);
    all.extend(crc.finalize().to_le_bytes());
    all.extend(b"timer");
    all.extend(body);
    all
}

#[test]
fn rejects_malformed_bytes() {
    let open = |bytes: &[u8]| Store::open(bytes).unwrap_err();
    assert_eq!(open(b"{}"), OpenError::NotState);
    assert_eq!(open(&GOLDEN[..12]), OpenError::Truncated("the header"));
    let changed = |change: fn(&mut Vec<u8>)| sealed(GOLDEN.to_vec(), change);
    assert_eq!(
        open(&changed(|bytes| bytes[8] = 9)),
        OpenError::Format { found: 9, known: 1 }
    );
    assert!(matches!(
        open(&changed(|bytes| bytes[15] = 0xff)),
        OpenError::TooMuch {
            what: "sections",
            ..
        }
    ));
    // The section's lengths, with the body no longer than it is.
    assert!(matches!(
        open(&changed(|bytes| bytes[27] = 0xff)),
        OpenError::TooMuch {
            what: "bytes in a section",
            ..
        }
    ));
    assert!(matches!(
        open(&changed(|bytes| bytes[21] = 0xff)),
        OpenError::TooMuch {
            what: "bytes of a path",
            ..
        }
    ));
    assert_eq!(
        open(&changed(|bytes| bytes.push(0))),
        OpenError::Trailing(1)
    );
    let twice = changed(|bytes| {
        bytes[12] = 2;
        bytes.extend_from_within(20..);
    });
    assert_eq!(open(&twice).to_string(), "section timer occurs twice");
}

#[test]
fn detects_every_flipped_bit_and_truncation() {
    for bit in 0..GOLDEN.len() * 8 {
        let mut bytes = GOLDEN.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Store::open(&bytes).is_err(), "bit {bit}");
    }
    for len in 0..GOLDEN.len() {
        assert!(Store::open(&GOLDEN[..len]).is_err(), "length {len}");
    }
}

proptest! {
    #[test]
    fn round_trip(
        sections in prop::collection::btree_map("[a-z0-9]{1,8}(/[a-z0-9-]{1,8}){0,3}", (any::<u32>(), any::<Vec<u8>>()), 0..20),
    ) {
        let sections: BTreeMap<String, V2> = sections
            .into_iter()
            .map(|(path, (count, data))| (path, V2 { count, data }))
            .collect();
        let write = |paths: &mut dyn Iterator<Item = (&String, &V2)>| {
            let mut writer = Writer::default();
            for (path, state) in paths {
                writer.scope(path).unwrap().put(state).unwrap();
            }
            writer.finish()
        };
        let bytes = write(&mut sections.iter());
        prop_assert_eq!(&bytes, &write(&mut sections.iter().rev()));
        let mut store = Store::open(&bytes).unwrap();
        for (path, state) in &sections {
            prop_assert_eq!(&store.scope(path).unwrap().take::<V2>().unwrap(), state);
        }
        prop_assert_eq!(store.finish(), Ok(()));
    }

    /// Beyond a header that is right, so that more than the magic is tried.
    #[test]
    fn no_bytes_make_it_panic(count in 0u32..4, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut all = GOLDEN[..16].to_vec();
        all[12..16].copy_from_slice(&count.to_le_bytes());
        all.extend([0; 4]);
        let mut all = sealed(all, |_| {});
        all.extend(&bytes);
        let opened = Store::open(&all);
        // A checksum of 32 bits is not met by chance.
        prop_assert_eq!(opened.is_ok(), count == 0 && bytes.is_empty());
    }

    /// A body that a peer made up, under a checksum that is right.
    #[test]
    fn no_body_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..64)) {
        let all = forged(&body);
        let mut store = Store::open(&all).unwrap();
        match store.scope("timer").unwrap().take::<V2>() {
            Ok(read) => prop_assert_eq!(load::<V2>(&saved("timer", &read), "timer"), Ok(read)),
            Err(error) => prop_assert!(matches!(error, LoadError::Decode { .. }), "{}", error),
        }
    }
}

/// Lengths in CBOR that promise far more than the section holds cost no memory.
#[test]
fn rejects_wrong_lengths() {
    for lie in [
        &b"\xa2\x65count\x01\x64data\x9b\x7f\xff\xff\xff\xff\xff\xff\xff"[..],
        b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let all = forged(lie);
        assert!(matches!(
            load::<V2>(&all, "timer"),
            Err(LoadError::Decode { .. })
        ));
    }
}

/// A device takes sections by a copy only if all of its own are the same, and no other's.
#[test]
fn same_sections_are_taken_by_a_copy() {
    const FIRST: [(&str, u8); 5] = [("a", 1), ("a-b", 2), ("a/b", 3), ("a/b/c", 4), ("ab", 5)];
    let write = |sections: &[(&str, u8)]| {
        let mut writer = Writer::default();
        for (path, count) in sections {
            let count = *count;
            writer.scope(path).unwrap().put(&V1 { count }).unwrap();
        }
        writer.finish()
    };
    let left = |store: &Store<'_>| -> Vec<_> {
        let left = store.remaining();
        left.map(|path| path.as_str().to_owned()).collect()
    };
    let bytes = write(&FIRST);
    let mut store = Store::open(&bytes).unwrap();
    let copy = store.scope("a").unwrap().copy();
    assert_eq!(left(&store).len(), 5, "a copy takes nothing");
    assert!(store.scope("a").unwrap().take_same(&copy));
    assert_eq!(left(&store), ["a-b", "ab"]);
    assert!(!store.scope("a").unwrap().take_same(&copy), "taken already");

    let others = write(&[("a", 1), ("a-b", 7), ("a/b", 3), ("a/b/c", 4), ("ab", 7)]);
    let mut store = Store::open(&others).unwrap();
    assert!(store.scope("a").unwrap().take_same(&copy));
    for changed in [
        &[("a", 1), ("a/b", 3), ("a/b/c", 7)][..],
        &[("a", 1), ("a/b", 3)],
        &[("a", 1), ("a/b", 3), ("a/b/c", 4), ("a/d", 6)],
        &[("a/b", 3), ("a/b/c", 4)],
    ] {
        let bytes = write(changed);
        let mut store = Store::open(&bytes).unwrap();
        let before = left(&store);
        assert!(!store.scope("a").unwrap().take_same(&copy), "{changed:?}");
        assert_eq!(left(&store), before);
    }
}
