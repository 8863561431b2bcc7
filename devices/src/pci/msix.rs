//! MSI-X: interrupts that are messages (PCI Local Bus 3.0, 6.8.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memory::DeviceOps;
use parking_lot::Mutex;

/// Bytes of a table entry.
const ENTRY_LEN: usize = 16;
/// The capability's id.
pub(super) const CAPABILITY: u8 = 0x11;
/// Of the message control register: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Of the message control register: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// What the guest may write of message control.
pub(super) const CONTROL_WRITABLE: u16 = FUNCTION_MASK | ENABLE;
/// The most vectors of a function.
pub(super) const MAX_VECTORS: u16 = 2048;

/// A write to memory that interrupts a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Delivers a function's messages.
pub trait MsiTarget: Send + Sync {
    /// From now on each of these vectors means this message, or none while it is masked.
    /// Called together for all vectors that one access of the guest changes.
    fn route(&self, changes: &[(u16, Option<MsiMessage>)]);
    /// Sends the message of a vector that has one, from any thread.
    fn raise(&self, vector: u16);
}

#[derive(Debug)]
struct Vector {
    /// It has a message.
    routed: AtomicBool,
}

/// What a guest writes.
#[derive(Debug)]
struct Table {
    entries: Vec<[u8; ENTRY_LEN]>,
    control: u16,
    /// What the target knows.
    routed: Vec<Option<MsiMessage>>,
}

impl Table {
    fn wanted(&self, vector: usize) -> Option<MsiMessage> {
        if self.control & (ENABLE | FUNCTION_MASK) != ENABLE {
            return None;
        }
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, masked, ..] =
            *self.entries.get(vector)?;
        (masked & 1 == 0).then_some(MsiMessage {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }
}

/// A function's vectors.
///
/// A vector that is raised while it is masked becomes *pending*, and is delivered when the guest
/// unmasks it.
pub struct Msix {
    table: Mutex<Table>,
    vectors: Vec<Vector>,
    pending: Vec<AtomicU64>,
    target: Arc<dyn MsiTarget>,
}

impl Msix {
    /// So many vectors, all masked; 2048 at most.
    pub(super) fn new(vectors: u16, target: Arc<dyn MsiTarget>) -> Arc<Self> {
        let count = usize::from(vectors.clamp(1, MAX_VECTORS));
        let mut entry = [0; ENTRY_LEN];
        entry[12] = 1;
        Arc::new(Self {
            table: Mutex::new(Table {
                entries: vec![entry; count],
                control: 0,
                routed: vec![None; count],
            }),
            vectors: (0..count)
                .map(|_| Vector {
                    routed: AtomicBool::new(false),
                })
                .collect(),
            pending: (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            target,
        })
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(MAX_VECTORS)
    }

    /// Interrupts the guest, now or as soon as it unmasks the vector. One that is not there is
    /// ignored.
    pub fn raise(&self, vector: u16) {
        let Some(state) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        if state.routed.load(Ordering::SeqCst) {
            self.target.raise(vector);
            return;
        }
        self.pend(vector);
        // Unmasked in between: whoever takes the pending bit delivers it.
        if state.routed.load(Ordering::SeqCst) && self.take_pending(vector) {
            self.target.raise(vector);
        }
    }

    fn pend(&self, vector: u16) {
        if let Some(word) = self.pending.get(usize::from(vector / 64)) {
            word.fetch_or(1 << (vector % 64), Ordering::SeqCst);
        }
    }

    fn take_pending(&self, vector: u16) -> bool {
        let bit = 1 << (vector % 64);
        let word = self.pending.get(usize::from(vector / 64));
        word.is_some_and(|word| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0)
    }

    /// The guest wrote message control.
    pub(super) fn set_control(&self, control: u16) {
        let mut table = self.table.lock();
        if table.control != control {
            table.control = control;
            let all = 0..table.entries.len();
            self.follow(&mut table, all);
        }
    }

    /// Tells the target of these vectors, and delivers what was pending.
    fn follow(&self, table: &mut Table, vectors: std::ops::Range<usize>) {
        let mut changes = Vec::new();
        for vector in vectors {
            let wanted = table.wanted(vector);
            let (Some(routed), Ok(index)) = (table.routed.get_mut(vector), u16::try_from(vector))
            else {
                break;
            };
            if *routed != wanted {
                *routed = wanted;
                changes.push((index, wanted));
            }
        }
        if changes.is_empty() {
            return;
        }
        let routed = |vector: u16, is: bool| {
            if let Some(state) = self.vectors.get(usize::from(vector)) {
                state.routed.store(is, Ordering::SeqCst);
            }
        };
        // A vector that is being masked is marked first, and one that is unmasked last, so that
        // nobody raises what the target does not have.
        let masked = changes.iter().filter(|(_, message)| message.is_none());
        masked.for_each(|(vector, _)| routed(*vector, false));
        self.target.route(&changes);
        for (vector, _) in changes.iter().filter(|(_, message)| message.is_some()) {
            routed(*vector, true);
            if self.take_pending(*vector) {
                self.target.raise(*vector);
            }
        }
    }

    /// The registers in which the guest writes messages.
    #[must_use]
    pub fn table(self: &Arc<Self>) -> MsixTable {
        MsixTable(Arc::clone(self))
    }

    /// The registers in which the guest sees what is pending.
    #[must_use]
    pub fn pba(self: &Arc<Self>) -> MsixPba {
        MsixPba(Arc::clone(self))
    }

    /// As after power-on.
    pub(super) fn reset(&self) {
        let count = self.vectors.len();
        let mut entry = [0; ENTRY_LEN];
        entry[12] = 1;
        self.restore(&vec![entry; count], &vec![0; self.pending.len()], 0);
    }

    /// Table and pending bits as they are.
    pub(super) fn save(&self) -> (Vec<[u8; ENTRY_LEN]>, Vec<u64>) {
        let table = self.table.lock();
        let pending = self.pending.iter().map(|word| word.load(Ordering::SeqCst));
        (table.entries.clone(), pending.collect())
    }

    /// Table, pending bits and control as they were; of the right lengths.
    pub(super) fn restore(&self, entries: &[[u8; ENTRY_LEN]], pending: &[u64], control: u16) {
        let mut table = self.table.lock();
        for (entry, was) in table.entries.iter_mut().zip(entries) {
            *entry = *was;
        }
        for (word, was) in self.pending.iter().zip(pending) {
            word.store(*was, Ordering::SeqCst);
        }
        table.control = control;
        let all = 0..table.entries.len();
        self.follow(&mut table, all);
    }
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Msix({} vectors)", self.vectors.len())
    }
}

/// The MSI-X table of a function.
pub struct MsixTable(Arc<Msix>);

impl DeviceOps for MsixTable {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let table = self.0.table.lock();
        for (byte, at) in data
            .iter_mut()
            .zip(usize::try_from(offset).unwrap_or(usize::MAX)..)
        {
            let entry = table.entries.get(at / ENTRY_LEN);
            *byte = entry.map_or(0, |entry| entry[at % ENTRY_LEN]);
        }
    }

    /// The specification asks for accesses of four or eight aligned bytes; any other is taken for
    /// the bytes that it has. A message takes effect when it is written whole, as a masked one is.
    fn write(&self, offset: u64, data: &[u8]) {
        let mut table = self.0.table.lock();
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, at) in data.iter().zip(first..) {
            let Some(entry) = table.entries.get_mut(at / ENTRY_LEN) else {
                break;
            };
            // All but the mask bit of vector control is reserved.
            entry[at % ENTRY_LEN] = match at % ENTRY_LEN {
                12 => byte & 1,
                13..ENTRY_LEN => 0,
                _ => *byte,
            };
        }
        let last = first.saturating_add(data.len().saturating_sub(1));
        let touched = first / ENTRY_LEN..(last / ENTRY_LEN).saturating_add(1);
        self.0.follow(&mut table, touched);
    }
}

/// The pending bits of a function: the guest can only read them.
pub struct MsixPba(Arc<Msix>);

impl DeviceOps for MsixPba {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data
            .iter_mut()
            .zip(usize::try_from(offset).unwrap_or(usize::MAX)..)
        {
            let word = self.0.pending.get(at / 8);
            *byte = word.map_or(0, |word| word.load(Ordering::SeqCst).to_le_bytes()[at % 8]);
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}
