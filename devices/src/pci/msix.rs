//! MSI-X: interrupts that are messages (PCI Local Bus 3.0, 6.8.2).
//!
//! A device raises a vector by a call of its [`MsiTarget`] alone, whatever the guest does to the
//! vector meanwhile. The target has two states for a vector, with a message and without, and
//! *counts* what is raised while there is none. A flag here that said which is the case would be
//! out of date when the device acts on it, and its interrupt lost: a queue then waits for good.

use std::sync::Arc;

use memory::DeviceOps;
use memory::sync::Mutex;

/// Bytes of a table entry.
const ENTRY_LEN: usize = 16;
/// The capability's id.
pub(super) const CAPABILITY: u8 = 0x11;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is enabled.
const ENABLE: u16 = 1 << 15;
/// Bits of message control that the guest may write.
pub(super) const CONTROL_WRITABLE: u16 = FUNCTION_MASK | ENABLE;
/// The most vectors of a function.
pub(super) const MAX_VECTORS: u16 = 2048;

/// A write to memory that interrupts a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Delivers a function's messages. No vector has a message at first.
pub trait MsiTarget: Send + Sync {
    /// From now on each of these vectors means this message, or none while it is masked.
    /// Called together for all vectors that one access of the guest changes.
    ///
    /// A vector that gets a message, and was raised while it had none, is raised again. A vector
    /// that loses its message has sent, on return, what was raised before.
    fn route(&self, changes: &[(u16, Option<MsiMessage>)]);
    /// Sends the vector's message, from any thread; without one, remembers that it should.
    fn raise(&self, vector: u16);
    /// Returns whether a vector without a message remembers that it was raised, and makes it
    /// forget. False for a vector with a message.
    fn take_pending(&self, vector: u16) -> bool;
}

/// Registers that the guest writes.
#[derive(Debug)]
struct Table {
    entries: Vec<[u8; ENTRY_LEN]>,
    control: u16,
    /// The function may write to memory, and so send messages: bus mastering is on.
    is_master: bool,
    /// The messages that the target has.
    routed: Vec<Option<MsiMessage>>,
}

impl Table {
    fn wanted(&self, vector: usize) -> Option<MsiMessage> {
        // PCI Local Bus 3.0, 6.2.2 and 6.8.2: no message without the enable bit, none while the
        // function is masked, and none without bus mastering, since a message is a write to memory.
        if !self.is_master || self.control & (ENABLE | FUNCTION_MASK) != ENABLE {
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
/// unmasks it. So does one that is raised while MSI-X or bus mastering is off.
pub struct Msix {
    table: Mutex<Table>,
    count: u16,
    target: Arc<dyn MsiTarget>,
}

impl Msix {
    /// Creates a table of `vectors` (at most 2048), all masked.
    pub(super) fn new(vectors: u16, target: Arc<dyn MsiTarget>) -> Arc<Self> {
        // 2048 is what 11 bits of message control can say (6.8.2.3).
        let vectors = vectors.clamp(1, MAX_VECTORS);
        let count = usize::from(vectors);
        let mut entry = [0; ENTRY_LEN];
        entry[12] = 1;
        Arc::new(Self {
            table: Mutex::new(Table {
                entries: vec![entry; count],
                control: 0,
                is_master: false,
                routed: vec![None; count],
            }),
            count: vectors,
            target,
        })
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Interrupts the guest, now or as soon as it unmasks the vector. One that is not there is
    /// ignored.
    pub fn raise(&self, vector: u16) {
        if vector < self.count {
            self.target.raise(vector);
        }
    }

    /// The pending bits of 64 vectors from `first` on. The table is locked, so that no vector gets
    /// a message between the two calls of the target, of which the second sets the bit again.
    fn pending(&self, table: &Table, first: u16) -> u64 {
        let vectors = (first..self.count).take(64);
        // Only masked vectors can be pending. `take_pending` of a routed one would race with the
        // kernel's injection.
        let masked =
            vectors.filter(|vector| matches!(table.routed.get(usize::from(*vector)), Some(None)));
        masked.fold(0, |bits, vector| {
            if !self.target.take_pending(vector) {
                return bits;
            }
            self.target.raise(vector);
            bits | 1 << (vector - first)
        })
    }

    /// The guest wrote message control, or the command register.
    pub(super) fn set_control(&self, control: u16, is_master: bool) {
        let mut table = self.table.lock();
        // Each write to configuration space comes here. Routes cost a system call, so an unchanged
        // control does nothing.
        if (table.control, table.is_master) != (control, is_master) {
            (table.control, table.is_master) = (control, is_master);
            let all = 0..table.entries.len();
            self.follow(&mut table, all);
        }
    }

    /// Tells the target of these vectors, which delivers what was pending.
    fn follow(&self, table: &mut Table, vectors: std::ops::Range<usize>) {
        let mut changes = Vec::new();
        for vector in vectors {
            let wanted = table.wanted(vector);
            let (Some(routed), Ok(index)) = (table.routed.get_mut(vector), u16::try_from(vector))
            else {
                break;
            };
            // Linux masks and unmasks around each change of an entry: an unchanged message needs no
            // call of the kernel.
            if *routed != wanted {
                *routed = wanted;
                changes.push((index, wanted));
            }
        }
        if !changes.is_empty() {
            // Under the table's lock: two vCPUs that change one entry must reach the target in the
            // order in which the table has them.
            self.target.route(&changes);
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

    /// Masks all vectors, as after power-on.
    pub(super) fn reset(&self) {
        let mut entry = [0; ENTRY_LEN];
        entry[12] = 1;
        self.restore(&vec![entry; self.count.into()], &[], 0, false);
    }

    /// Table and pending bits as they are.
    pub(super) fn save(&self) -> (Vec<[u8; ENTRY_LEN]>, Vec<u64>) {
        let table = self.table.lock();
        let firsts = (0..self.count).step_by(64);
        let pending = firsts.map(|first| self.pending(&table, first));
        (table.entries.clone(), pending.collect())
    }

    /// Table, pending bits, control and bus mastering as they were.
    pub(super) fn restore(
        &self,
        entries: &[[u8; ENTRY_LEN]],
        pending: &[u64],
        control: u16,
        is_master: bool,
    ) {
        let mut table = self.table.lock();
        for (entry, was) in table.entries.iter_mut().zip(entries) {
            *entry = *was;
        }
        // Interrupts that are pending here belong to another guest, or to a trial load.
        for vector in 0..self.count {
            self.target.take_pending(vector);
        }
        (table.control, table.is_master) = (control, is_master);
        let all = 0..table.entries.len();
        self.follow(&mut table, all);
        for (vector, word, bit) in (0..self.count).map(|vector| (vector, vector / 64, vector % 64))
        {
            if pending
                .get(usize::from(word))
                .is_some_and(|word| word >> bit & 1 != 0)
            {
                self.target.raise(vector);
            }
        }
    }
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Msix({} vectors)", self.count)
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
        let table = self.0.table.lock();
        // The bits of the word that was looked at last.
        let mut word = (u16::MAX, [0; 8]);
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = u16::try_from(at / 8 * 64).unwrap_or(u16::MAX);
            if word.0 != first {
                word = (first, self.0.pending(&table, first).to_le_bytes());
            }
            *byte = word.1[(at % 8) as usize];
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

/// `cargo test -p devices --features loom --lib model`
#[cfg(all(test, feature = "loom"))]
mod model {
    use loom::thread;

    use super::*;

    const CONTROL: u16 = ENABLE;

    /// KVM's irqfd: a counter that raises the vector while it is attached. The injection may come
    /// later, on a kernel thread, and by the message of that moment; a detach waits for it.
    #[derive(Default)]
    struct Irqfd {
        has_message: bool,
        count: u32,
        to_inject: bool,
        injected: u32,
        lost: u32,
    }

    impl Irqfd {
        fn inject(&mut self) {
            if std::mem::take(&mut self.to_inject) {
                match self.has_message {
                    true => self.injected += 1,
                    false => self.lost += 1,
                }
            }
        }
    }

    #[derive(Default)]
    struct Target(Mutex<Irqfd>);

    impl MsiTarget for Target {
        fn route(&self, changes: &[(u16, Option<MsiMessage>)]) {
            for (_, message) in changes {
                let mut irqfd = self.0.lock();
                if message.is_none() {
                    irqfd.inject();
                }
                irqfd.has_message = message.is_some();
                if irqfd.has_message && irqfd.count > 0 {
                    irqfd.count = 0;
                    irqfd.to_inject = true;
                }
            }
        }

        fn raise(&self, _: u16) {
            let mut irqfd = self.0.lock();
            match irqfd.has_message {
                true => irqfd.to_inject = true,
                false => irqfd.count += 1,
            }
        }

        fn take_pending(&self, _: u16) -> bool {
            let mut irqfd = self.0.lock();
            !irqfd.has_message && std::mem::take(&mut irqfd.count) > 0
        }
    }

    fn unmasked() -> (Arc<Target>, Arc<Msix>) {
        let target = Arc::new(Target::default());
        let msix = Msix::new(1, Arc::clone(&target) as Arc<dyn MsiTarget>);
        msix.restore(&[[0; ENTRY_LEN]], &[], CONTROL, true);
        (target, msix)
    }

    /// A guest that moves an interrupt to another CPU: mask, unmask. The device raises it once,
    /// and the guest looks for pending bits.
    #[test]
    fn interrupt_survives_mask_and_unmask() {
        loom::model(|| {
            let (target, msix) = unmasked();
            let device = {
                let msix = Arc::clone(&msix);
                thread::spawn(move || msix.raise(0))
            };
            msix.set_control(CONTROL | FUNCTION_MASK, true);
            msix.pba().read(0, &mut [0; 8]);
            msix.set_control(CONTROL, true);
            device.join().unwrap();
            let mut irqfd = target.0.lock();
            irqfd.inject();
            assert_eq!((irqfd.injected > 0, irqfd.lost), (true, 0));
        });
    }

    /// A device that is raised while its registers are saved: the interrupt was sent, or the saved
    /// state or a later one has it.
    #[test]
    fn interrupt_survives_save() {
        loom::model(|| {
            let (target, msix) = unmasked();
            msix.set_control(CONTROL | FUNCTION_MASK, true);
            let device = {
                let msix = Arc::clone(&msix);
                thread::spawn(move || msix.raise(0))
            };
            drop(msix.save());
            device.join().unwrap();
            assert_eq!(msix.save().1, [1]);
            assert_eq!(target.0.lock().injected, 0);
        });
    }
}
