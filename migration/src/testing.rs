//! For tests and benchmarks: certificates, in directories as Cloud Hypervisor's users have them, a
//! peer that speaks the protocol frame by frame, and a guest of memory alone.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::new_without_default,
    clippy::panic,
    reason = "tests"
)]

mod guest;
mod unreadable;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde::Serialize;
use uuid::Uuid;

use crate::link::{Dial, Stream};
use crate::message::{self, Channel, ControlChannel, Hello, Offer, ToDestination, ToSource};
use crate::wire::WireError;

pub use self::guest::{
    MemoryDisk, MemoryGuest, Moment, blocks, contents, disk_name, fill_page, ram,
};
pub use self::unreadable::UnreadableFaults;

/// A certificate authority for tests.
pub struct Issuer(CertifiedIssuer<'static, KeyPair>);

impl Issuer {
    /// Another one.
    #[must_use]
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes what a host needs of this name that trusts this issuer: its certificates for both sides are
    /// signed by `signer`.
    pub fn equip(&self, dir: &Path, host: &str, signer: &Self) {
        let write = |name: &str, text: String| fs::write(dir.join(name), text).unwrap();
        write("ca-cert.pem", self.0.pem());
        for side in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &signer.0).unwrap();
            write(&format!("{side}-cert.pem"), certificate.pem());
            write(&format!("{side}-key.pem"), key.serialize_pem());
        }
    }
}

/// One end of a connection that speaks the protocol frame by frame: well, or not.
///
/// Messages are given as anything that serializes as they do, such as `json!({ "Ping": 1 })`, so that a
/// test can also send what the engine never would.
pub struct Peer(ControlChannel);

/// The other side of a [`Peer`] that says nothing fails the test, and does not hang it.
const PATIENCE: Duration = Duration::from_secs(120);

impl Peer {
    fn dial(dial: &dyn Dial, id: Uuid, channel: Channel) -> Self {
        let mut stream = dial.dial().unwrap();
        stream.set_patience(PATIENCE).unwrap();
        message::send_hello(&mut *stream, &Hello::new(id, channel)).unwrap();
        Self(ControlChannel::new(stream))
    }

    /// Connects as a source that has a guest to offer.
    #[must_use]
    pub fn control(to: &dyn Dial, id: Uuid) -> Self {
        Self::dial(to, id, Channel::Control)
    }

    /// Connects as a source that asks how its migration stands.
    #[must_use]
    pub fn again(to: &dyn Dial, id: Uuid) -> Self {
        Self::dial(to, id, Channel::Again)
    }

    /// Connects a RAM channel.
    #[must_use]
    pub fn ram(to: &dyn Dial, id: Uuid, index: u16) -> Self {
        Self::dial(to, id, Channel::Ram { index })
    }

    /// Connects the channel over which pages are asked for.
    #[must_use]
    pub fn faults(to: &dyn Dial, id: Uuid) -> Self {
        Self::dial(to, id, Channel::Faults)
    }

    /// Takes a connection as a destination does, with its `Hello`. Returns the migration that it is of.
    #[must_use]
    pub fn accepted(mut stream: Box<dyn Stream>) -> (Self, Uuid) {
        stream.set_patience(PATIENCE).unwrap();
        let hello = message::recv_hello(&mut *stream).unwrap();
        (Self(ControlChannel::new(stream)), hello.migration)
    }

    /// Sends a message. False if the connection is gone.
    pub fn say<T: Serialize + ?Sized>(&mut self, message: &T) -> bool {
        self.0.send(&message).is_ok()
    }

    /// Sends an offer. False if the connection is gone.
    pub fn offer(&mut self, offer: &Offer) -> bool {
        self.say(&ToDestination::Prepare(Box::new(offer.clone())))
    }

    /// Sends a frame of any kind, with a right checksum. False if the connection is gone.
    pub fn frame(&mut self, kind: u16, body: &[u8]) -> bool {
        let mut frame = kind.to_le_bytes().to_vec();
        frame.extend([0, 0]);
        frame.extend((body.len() as u32).to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&frame);
        crc.update(body);
        frame.extend(crc.finalize().to_le_bytes());
        frame.extend(body);
        self.0.stream.write_all(&frame).is_ok()
    }

    /// Sends bytes as they are. False if the connection is gone.
    pub fn bytes(&mut self, bytes: &[u8]) -> bool {
        self.0.stream.write_all(bytes).is_ok()
    }

    /// Receives a message of a destination, as text: `Welcome { version: 1 }`.
    ///
    /// # Errors
    /// The connection ended.
    pub fn recv(&mut self) -> Result<String, WireError> {
        Ok(format!("{:?}", self.0.recv::<ToSource>()?))
    }

    /// Receives a source's offer.
    #[must_use]
    pub fn recv_offer(&mut self) -> Offer {
        match self.0.recv::<ToDestination>().unwrap() {
            ToDestination::Prepare(offer) => *offer,
            other => panic!("{other:?} is no offer"),
        }
    }
}
