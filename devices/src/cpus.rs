//! CPU hotplug through ACPI (ACPI 6.5, 8.4 and 6.3): the registers by which the guest's AML finds
//! out which vCPUs are plugged, which came or should go, and by which the guest ejects one and says
//! how it fared.
//!
//! | port | | |
//! |---|---|---|
//! | [`PRESENT`] | read | a bit for each vCPU: whether it is plugged |
//! | [`EVENT`] | read | takes the next notification: vCPU in bits 0-15, code in bits 16-23; 0: none |
//! | [`EJECT`] | write | the guest has let go of this vCPU |
//! | [`STATUS`] | write | `_OST`: vCPU in bits 0-15, code in bits 16-23, status in bits 24-31 |
//!
//! Registers other than [`PRESENT`] have 32 bits; accesses of another width do nothing. A guest can
//! eject only what it was asked to eject, and never vCPU 0, so no sequence of accesses changes more
//! than the requests of the VM's owner allow.

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};

/// vCPUs for which the block has bits.
pub const MAX_CPUS: u32 = 256;
/// Offset of the bits that say which vCPUs are plugged.
pub const PRESENT: u64 = 0;
/// Offset of the register that takes the next notification.
pub const EVENT: u64 = 0x20;
/// Offset of the register to which the guest writes the vCPU that it ejects.
pub const EJECT: u64 = 0x24;
/// Offset of the register for the arguments of `_OST`.
pub const STATUS: u64 = 0x28;
/// Bytes of the registers.
pub const LEN: u64 = 0x2c;

/// Notification code: look whether the vCPU is there (ACPI 6.5, table 5.193).
pub const DEVICE_CHECK: u8 = 1;
/// Notification code: eject the vCPU.
pub const EJECT_REQUEST: u8 = 3;

/// `_OST` status: done (ACPI 6.5, table 6.65).
const SUCCESS: u8 = 0;
/// `_OST` statuses that are no answer yet: ejection is pending (0x84), insertion is in progress (0x80
/// of a device check).
const EJECTION_IN_PROGRESS: u8 = 0x84;
const INSERTION_IN_PROGRESS: u8 = 0x80;

/// A set of vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuSet([u8; (MAX_CPUS / 8) as usize]);

impl CpuSet {
    /// The first `count` vCPUs.
    #[must_use]
    pub fn first(count: u32) -> Self {
        (0..count.min(MAX_CPUS)).collect()
    }

    /// Whether the vCPU is in the set.
    #[must_use]
    pub fn contains(&self, vcpu: u32) -> bool {
        let byte = usize::try_from(vcpu / 8).ok().and_then(|at| self.0.get(at));
        byte.is_some_and(|byte| byte & 1 << (vcpu % 8) != 0)
    }

    /// The vCPUs of the set, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u32> + '_ {
        (0..MAX_CPUS).filter(|vcpu| self.contains(*vcpu))
    }

    /// The number of vCPUs in the set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Whether no vCPU is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    fn insert(&mut self, vcpu: u32) {
        if let Some(byte) = self.byte(vcpu) {
            *byte |= 1 << (vcpu % 8);
        }
    }

    /// Takes the vCPU out, and returns whether it was in.
    fn remove(&mut self, vcpu: u32) -> bool {
        let was_in = self.contains(vcpu);
        if let Some(byte) = self.byte(vcpu) {
            *byte &= !(1 << (vcpu % 8));
        }
        was_in
    }

    fn byte(&mut self, vcpu: u32) -> Option<&mut u8> {
        usize::try_from(vcpu / 8)
            .ok()
            .and_then(|at| self.0.get_mut(at))
    }

    fn is_within(&self, other: &Self) -> bool {
        self.iter().all(|vcpu| other.contains(vcpu))
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(vcpus: I) -> Self {
        let mut set = Self::default();
        vcpus.into_iter().for_each(|vcpu| set.insert(vcpu));
        set
    }
}

/// A guest's answer that it will not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The vCPU.
    pub vcpu: u32,
    /// [`DEVICE_CHECK`] or [`EJECT_REQUEST`].
    pub code: u8,
    /// The status that the guest gave with `_OST`.
    pub status: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    present: CpuSet,
    /// Plugged, of which the guest was not notified yet.
    inserted: CpuSet,
    /// Plugged, of which the guest was notified; it has not said yet how it fared.
    offered: CpuSet,
    /// To be ejected, of which the guest was not notified yet.
    requested: CpuSet,
    /// To be ejected, of which the guest was notified.
    leaving: CpuSet,
    /// Differs, or has differed, from what the machine was built with.
    is_changed: bool,
    refusals: Vec<Refusal>,
}

/// The registers. Interrupting the guest, so that it reads them, is the caller's.
pub struct CpuBlock {
    max: u32,
    state: Mutex<State>,
    changed: Box<dyn Fn() + Send + Sync>,
}

impl CpuBlock {
    /// Makes the registers of a machine with `boot` of at most `max` vCPUs. Calls `changed` when the
    /// guest has ejected a vCPU or refused to, or refused one that was plugged.
    pub fn new(boot: u32, max: u32, changed: impl Fn() + Send + Sync + 'static) -> Self {
        let max = max.min(MAX_CPUS);
        let state = State {
            present: CpuSet::first(boot.min(max)),
            ..State::default()
        };
        Self {
            max,
            state: Mutex::new(state),
            changed: Box::new(changed),
        }
    }

    /// The vCPUs that are plugged.
    pub fn present(&self) -> CpuSet {
        self.state.lock().present
    }

    /// The plugged vCPUs that the guest should eject.
    pub fn leaving(&self) -> CpuSet {
        let state = self.state.lock();
        state.requested.iter().chain(state.leaving.iter()).collect()
    }

    /// The vCPU is plugged from now on, and no longer to be ejected.
    pub fn plug(&self, vcpu: u32) {
        if vcpu >= self.max {
            return;
        }
        let mut state = self.state.lock();
        state.is_changed = true;
        // An open request to eject would take away at once what the owner has just plugged.
        state.forget(vcpu);
        state.present.insert(vcpu);
        state.inserted.insert(vcpu);
    }

    /// The guest should eject the vCPU, which is plugged and not vCPU 0.
    pub fn want_back(&self, vcpu: u32) {
        let mut state = self.state.lock();
        if vcpu == 0 || !state.present.contains(vcpu) {
            return;
        }
        state.is_changed = true;
        state.requested.insert(vcpu);
    }

    /// The guest need not eject anything any more. What it was notified of it may still eject: a guest
    /// that has begun cannot be stopped.
    pub fn withdraw(&self) {
        self.state.lock().requested = CpuSet::default();
    }

    /// Takes the refusals of the guest since the last call, at most one for each request.
    pub fn take_refusals(&self) -> Vec<Refusal> {
        std::mem::take(&mut self.state.lock().refusals)
    }
}

impl State {
    /// Takes the next notification of the guest. Insertions come first: a guest that does not know a
    /// vCPU yet would ignore the request to eject it.
    fn next_event(&mut self) -> u32 {
        let next = |unseen: &mut CpuSet, seen: &mut CpuSet, code: u8| {
            let vcpu = unseen.iter().next()?;
            unseen.remove(vcpu);
            seen.insert(vcpu);
            Some(u32::from(code) << 16 | vcpu)
        };
        // The sets are bit maps, so however often the owner asks, each vCPU has one open
        // notification of a kind, and the guest's loop over [`EVENT`] ends.
        next(&mut self.inserted, &mut self.offered, DEVICE_CHECK)
            .or_else(|| next(&mut self.requested, &mut self.leaving, EJECT_REQUEST))
            .unwrap_or(0)
    }

    /// Returns whether the guest was asked to eject the vCPU, and so has.
    fn eject(&mut self, vcpu: u32) -> bool {
        // A guest may eject a vCPU before it takes the notification: it looked at `_STA` on its
        // own. What was never asked for is refused, or a guest could shrink the machine that its
        // owner pays for.
        if !self.requested.contains(vcpu) && !self.leaving.contains(vcpu) {
            return false;
        }
        self.forget(vcpu);
        self.present.remove(vcpu)
    }

    /// Nothing is asked of the guest about the vCPU any more.
    fn forget(&mut self, vcpu: u32) {
        let all = [
            &mut self.inserted,
            &mut self.offered,
            &mut self.requested,
            &mut self.leaving,
        ];
        for set in all {
            set.remove(vcpu);
        }
    }

    /// Returns whether the guest refuses with this what it was asked.
    fn answer(&mut self, value: u32) -> bool {
        let [_, _, code, status] = value.to_le_bytes();
        let vcpu = value & 0xffff;
        let was_asked = match (code, status) {
            (DEVICE_CHECK, INSERTION_IN_PROGRESS) | (EJECT_REQUEST, EJECTION_IN_PROGRESS) => false,
            // An answer to an earlier notification, if the guest did not take the last one yet.
            (DEVICE_CHECK, _) => !self.inserted.contains(vcpu) && self.offered.remove(vcpu),
            (EJECT_REQUEST, SUCCESS) => false,
            (EJECT_REQUEST, _) => !self.requested.contains(vcpu) && self.leaving.remove(vcpu),
            _ => false,
        };
        let is_refused = was_asked && status != SUCCESS;
        if is_refused {
            // At most two for each vCPU: a plug or a request to eject comes before another.
            self.refusals.push(Refusal { vcpu, code, status });
        }
        is_refused
    }
}

impl DeviceOps for CpuBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut state = self.state.lock();
        if offset == EVENT {
            if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
                *data = state.next_event().to_le_bytes();
            }
            return;
        }
        // ACPI reads the bits byte by byte. An access that crosses into the next register sees
        // zeros there.
        for (at, byte) in (offset..EVENT).zip(data) {
            let present = usize::try_from(at).ok();
            let present = present.and_then(|at| state.present.0.get(at));
            *byte = present.copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return;
        };
        let mut state = self.state.lock();
        let is_changed = match offset {
            EJECT => state.eject(value),
            STATUS => state.answer(value),
            _ => false,
        };
        // Not under the lock: the callback may come back into this block.
        drop(state);
        if is_changed {
            (self.changed)();
        }
    }
}

/// Saved state, version 1: sets of vCPUs, ascending. Frozen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    present: Vec<u32>,
    inserted: Vec<u32>,
    offered: Vec<u32>,
    requested: Vec<u32>,
    leaving: Vec<u32>,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

/// The saved part of the registers, all of one moment.
pub struct CpuSnapshot(State);

impl CpuSnapshot {
    /// The vCPUs that are plugged.
    #[must_use]
    pub fn present(&self) -> CpuSet {
        self.0.present
    }

    /// Whether the registers need to be saved: whether a vCPU was ever plugged or asked for since the
    /// machine was built. Otherwise the machine's configuration says all.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.0.is_changed
    }
}

impl CpuBlock {
    /// Copies the saved part. The guest may run meanwhile.
    pub fn snapshot(&self) -> CpuSnapshot {
        CpuSnapshot(self.state.lock().clone())
    }
}

impl Save for CpuSnapshot {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let list = |set: &CpuSet| set.iter().collect::<Vec<_>>();
        to.put(&V1 {
            present: list(&self.0.present),
            inserted: list(&self.0.inserted),
            offered: list(&self.0.offered),
            requested: list(&self.0.requested),
            leaving: list(&self.0.leaving),
        })
    }
}

impl Load for &CpuBlock {
    /// Loads the registers. Without saved ones they stay as the machine was built.
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        let Some(saved) = from.take_if_there::<V1>()? else {
            return Ok(());
        };
        let all = [
            &saved.present,
            &saved.inserted,
            &saved.offered,
            &saved.requested,
            &saved.leaving,
        ];
        // `CpuSet::insert` ignores what is out of range. Unchecked, a vCPU of a larger machine
        // would silently vanish from the loaded one.
        if all.into_iter().flatten().any(|vcpu| *vcpu >= self.max) {
            let why = format!("a vCPU of which the machine can have {}", self.max);
            return Err(from.refuse(why));
        }
        let set = |list: Vec<u32>| list.into_iter().collect::<CpuSet>();
        let state = State {
            present: set(saved.present),
            inserted: set(saved.inserted),
            offered: set(saved.offered),
            requested: set(saved.requested),
            leaving: set(saved.leaving),
            is_changed: true,
            refusals: Vec::new(),
        };
        // What `plug`, `want_back` and the guest's accesses keep true.
        let open = [
            state.inserted,
            state.offered,
            state.requested,
            state.leaving,
        ];
        let is_consistent = state.present.contains(0)
            && !state.requested.contains(0)
            && !state.leaving.contains(0)
            && open.iter().all(|set| set.is_within(&state.present));
        if !is_consistent {
            return Err(from.refuse("sets of vCPUs that contradict each other"));
        }
        // All checks have passed: a refused load leaves the registers of the trial machine as they
        // were.
        *self.state.lock() = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
