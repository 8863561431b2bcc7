//! Messages of the control channel, encoded as CBOR.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use uuid::Uuid;

use crate::link::Stream;
use crate::wire::{self, Kind, Reader, WireError};

/// Identifies the protocol.
const MAGIC: &str = "whimbrel-migration";
/// The versions of the protocol that this program speaks. The greatest goes up whenever a side may
/// send something that an older peer does not know; docs/migration-protocol.md lists what each
/// version added.
pub(crate) const VERSIONS: (u32, u32) = (1, 4);

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Channel {
    /// Messages both ways.
    Control,
    /// Control of a migration that lost its connection: the source asks how the migration stands.
    Again,
    /// Pages, from the source to the destination.
    Ram {
        /// Which of them.
        index: u16,
    },
    /// Pages that are waited for, from the destination to the source.
    Faults,
}

/// The first frame on each connection, from the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hello {
    magic: String,
    /// The least and the greatest version that it speaks.
    versions: (u32, u32),
    pub(crate) migration: Uuid,
    pub(crate) channel: Channel,
}

impl Hello {
    pub(crate) fn new(migration: Uuid, channel: Channel) -> Self {
        Self {
            magic: MAGIC.to_owned(),
            versions: VERSIONS,
            migration,
            channel,
        }
    }

    /// The version that both speak.
    pub(crate) fn version(&self) -> Result<u32, Refusal> {
        let refused = |code: &str, detail| Err(Refusal::new(code, detail));
        if self.magic != MAGIC {
            return refused(
                "not-a-migration",
                "the peer does not speak the migration protocol".to_owned(),
            );
        }
        let (least, most) = self.versions;
        let common = most.min(VERSIONS.1);
        if common < least.max(VERSIONS.0) {
            let (ours_least, ours_most) = VERSIONS;
            let detail = format!(
                "the source supports versions {least} to {most} of the protocol, and the \
                 destination {ours_least} to {ours_most}"
            );
            return refused("protocol-version", detail);
        }
        Ok(common)
    }
}

/// A refusal by one side. The users of both sides see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{detail}")]
pub struct Refusal {
    /// Stable code, for programs.
    pub code: String,
    /// For people.
    pub detail: String,
}

impl Refusal {
    /// Refuses.
    pub fn new(code: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            detail: detail.into(),
        }
    }
}

/// A block of memory, as it is agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockInfo {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub size: u64,
}

/// The VM to migrate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// The VM's name.
    pub vm: String,
    /// The machine's configuration, in a form that the engine does not read.
    pub machine: ByteBuf,
    /// Its memory.
    pub blocks: Vec<BlockInfo>,
    /// RAM channels that the source would like to have.
    pub connections: u16,
    /// Pages may come after the guest.
    pub postcopy: bool,
    /// The memory itself is given to the destination, which is another process of the same host: files
    /// of the blocks follow, in their order.
    pub given: bool,
    /// Hashes of all pages come, to be compared. Since version 2 of the protocol; left out where it is
    /// not asked for, so that an older destination can read the offer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub verify: bool,
    /// The disks whose content is copied: frames name them by numbers behind those of `blocks`. Since
    /// version 3 of the protocol; left out where there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<BlockInfo>,
}

/// From the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToDestination {
    /// A keepalive, answered with [`ToSource::Pong`] of the same number.
    Ping(u64),
    /// Build a machine for this VM.
    Prepare(Box<Offer>),
    /// A round has been sent: it ends on each RAM channel with an `End` frame of this number.
    Round(u32),
    /// A frame with saved state follows: that of a dry run, to be loaded now.
    Guess,
    /// A frame with saved state follows; the last round before it is `round`. With `postcopy`, that round
    /// named the pages that follow the guest. The guest is paused, and was so before the migration if
    /// `paused` is set.
    State {
        round: u32,
        postcopy: bool,
        paused: bool,
    },
    /// The guest is the destination's from now on. It had been paused for `stood_for_ns` when this was sent,
    /// and stays paused if `paused` is set.
    Commit { stood_for_ns: u64, paused: bool },
    /// The guest stays at the source.
    Abort(Refusal),
    /// Acknowledges that the guest runs at the destination.
    Complete,
    /// All pages that were missing have been sent: it ended on each RAM channel with this number.
    PagesSent { round: u32 },
}

/// From the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToSource {
    Pong(u64),
    /// The connection is taken; this version is spoken.
    Welcome {
        version: u32,
    },
    Refused(Refusal),
    /// The machine is built; the source may open this many RAM channels.
    Prepared {
        connections: u16,
        postcopy: bool,
    },
    /// The new images of these disks build on images of this host that have the content of the source's
    /// bases: only what is above the bases is sent. Before `Prepared`, and only if the offer named bases;
    /// since version 4 of the protocol.
    HasBases(Vec<String>),
    /// Pages are still arriving: the answer comes when they have.
    Busy,
    /// All pages of this round are in memory.
    RoundDone(u32),
    /// The destination loaded the state of the dry run in `us` microseconds.
    GuessLoaded {
        us: u64,
    },
    /// The guest can resume here at once. The source decides whether it does.
    Ready {
        load_us: u64,
    },
    /// The guest runs here. `us` and `told_us` count from the arrival of `Commit`: to the resume, and to this
    /// answer.
    Running {
        us: u64,
        told_us: u64,
    },
    /// The guest never ran here, and will not.
    NotHere(Refusal),
    /// The destination is ready and waits for `Commit` or `Abort`.
    Waiting,
    /// The guest ran here, and has ended.
    Ended,
    /// Pages of a block of memory or, since version 4, of a disk that are still missing: bit 0 of the first
    /// word is the page `first`. `Prepared` follows the last of these.
    StillMissing {
        block: u32,
        first: u64,
        bits: Vec<u64>,
    },
    /// All pages are there.
    Completed,
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, WireError> {
    let mut rest = body;
    // A peer can nest arrays in a few bytes until the stack overflows. Messages need less depth.
    let message = ciborium::de::from_reader_with_recursion_limit(&mut rest, 16)
        .map_err(|error| WireError::damaged(format!("cannot parse a message: {error}")))?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(WireError::damaged("a message has trailing bytes"))
    }
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let mut body = Vec::new();
    ciborium::into_writer(message, &mut body)
        .map_err(|error| WireError::damaged(format!("cannot encode a message: {error}")))?;
    Ok(body)
}

pub(crate) fn send_hello(to: &mut dyn Stream, hello: &Hello) -> Result<(), WireError> {
    wire::write(to, Kind::Hello, &[&encode(hello)?])
}

pub(crate) fn recv_hello(from: &mut dyn Stream) -> Result<Hello, WireError> {
    let mut reader = Reader::default();
    let (_, body) = reader.read(from, &[Kind::Hello])?;
    decode(body)
}

/// The control channel: messages, and saved state.
pub(crate) struct ControlChannel {
    pub(crate) stream: Box<dyn Stream>,
    reader: Reader,
}

impl ControlChannel {
    pub(crate) fn new(stream: Box<dyn Stream>) -> Self {
        Self {
            stream,
            reader: Reader::default(),
        }
    }

    pub(crate) fn send<T: Serialize>(&mut self, message: &T) -> Result<(), WireError> {
        wire::write(&mut *self.stream, Kind::Control, &[&encode(message)?])
    }

    /// A message, and the saved state that belongs to it, in one go.
    pub(crate) fn send_with_state<T: Serialize>(
        &mut self,
        message: &T,
        state: &[u8],
    ) -> Result<(), WireError> {
        self.send(message)?;
        wire::write(&mut *self.stream, Kind::State, &[state])
    }

    pub(crate) fn recv<T: DeserializeOwned>(&mut self) -> Result<T, WireError> {
        let (_, body) = self.reader.read(&mut *self.stream, &[Kind::Control])?;
        decode(body)
    }

    pub(crate) fn recv_state(&mut self) -> Result<Vec<u8>, WireError> {
        let (_, body) = self.reader.read(&mut *self.stream, &[Kind::State])?;
        Ok(body.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn negotiates_version() {
        let mut hello = Hello::new(Uuid::nil(), Channel::Control);
        assert_eq!(hello.version(), Ok(4));
        hello.versions = (1, 9);
        assert_eq!(hello.version(), Ok(4));
        for older in [1, 2, 3] {
            hello.versions = (1, older);
            assert_eq!(hello.version(), Ok(older));
        }
        hello.versions = (5, 9);
        assert_eq!(hello.version().unwrap_err().code, "protocol-version");
        hello.magic = "http".to_owned();
        assert_eq!(hello.version().unwrap_err().code, "not-a-migration");
    }

    /// An offer that neither verifies nor copies disks has the fields of version 1.
    #[test]
    fn older_peer_reads_an_offer_of_the_old_fields() {
        let offer = |verify, disks: usize| Offer {
            vm: "vm".to_owned(),
            machine: ByteBuf::new(),
            blocks: Vec::new(),
            connections: 1,
            postcopy: false,
            given: false,
            verify,
            disks: vec![
                BlockInfo {
                    name: "disk".to_owned(),
                    size: 512,
                };
                disks
            ],
        };
        let names = |offer: &Offer| -> Vec<String> {
            let value = ciborium::Value::serialized(offer).unwrap();
            let fields = value.into_map().unwrap();
            fields
                .into_iter()
                .map(|(name, _)| name.into_text().unwrap())
                .collect()
        };
        let old = [
            "vm",
            "machine",
            "blocks",
            "connections",
            "postcopy",
            "given",
        ];
        assert_eq!(names(&offer(false, 0)), old);
        assert_eq!(names(&offer(true, 0)).last().unwrap(), "verify");
        assert_eq!(names(&offer(false, 2)).last().unwrap(), "disks");
        for (verify, disks) in [(false, 0), (true, 0), (false, 1), (true, 2)] {
            let read: Offer = decode(&encode(&offer(verify, disks)).unwrap()).unwrap();
            assert_eq!(read, offer(verify, disks));
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode::<Hello>(&body);
            let _ = decode::<ToDestination>(&body);
            let _ = decode::<ToSource>(&body);
        }
    }
}
