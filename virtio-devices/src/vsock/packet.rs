//! Packets (virtio 1.3, 5.10.6).

/// The guest's CID is its own; this is the host's (5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// The operation of a packet (`VIRTIO_VSOCK_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will not receive any more.
pub(super) const NO_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: it will not send any more.
pub(super) const NO_SEND: u32 = 2;

/// A connection, by its two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The header of a packet: `virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind it.
    pub(super) len: u32,
    pub(super) kind: u16,
    /// The operation; `None` if its number is unknown.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    /// Total buffer space of the sender, in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has consumed so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// From the wire.
    pub(super) fn parse(raw: &[u8; HEADER_LEN]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: Op::from_wire(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// To the wire.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut raw = Vec::with_capacity(HEADER_LEN);
        raw.extend(self.src_cid.to_le_bytes());
        raw.extend(self.dst_cid.to_le_bytes());
        for word in [self.src_port, self.dst_port, self.len] {
            raw.extend(word.to_le_bytes());
        }
        raw.extend(self.kind.to_le_bytes());
        raw.extend(self.op.map_or(0, Op::to_wire).to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            raw.extend(word.to_le_bytes());
        }
        raw
    }

    /// The connection that a packet from the guest is of.
    pub(super) fn ports(&self) -> Ports {
        Ports {
            host: self.dst_port,
            guest: self.src_port,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packet_survives_round_trip(raw in prop::array::uniform32(any::<u8>()), rest in prop::array::uniform12(any::<u8>())) {
            let mut whole = [0; HEADER_LEN];
            whole[..32].copy_from_slice(&raw);
            whole[32..].copy_from_slice(&rest);
            let header = Header::parse(&whole);
            let mut again = whole;
            if header.op.is_none() {
                again[30..32].fill(0);
            }
            prop_assert_eq!(header.bytes(), again);
        }
    }
}
