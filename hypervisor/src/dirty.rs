//! The two ways in which KVM reports dirty pages: a bitmap for each memslot, or a ring for each vCPU.
//!
//! Both end in the RAM blocks' dirty bitmaps, by [`MemSlots::harvest`](crate::MemSlots::harvest)
//! and when a slot is deleted, so that callers see no difference:
//!
//! | | log | ring |
//! |---|---|---|
//! | a harvest costs | by memory size, a bit a page | by pages written |
//! | starting costs | nothing a page (`INITIALLY_SET`) | the kernel protects all pages |
//! | many pages written | costs no more | vCPUs leave the guest to have theirs emptied |
//!
//! A vCPU's ring is looked at before it enters the guest. A host that emulates long stretches of a
//! guest without entering it can overrun a ring, and KVM does not say so: the log is the default.
//!
//! The log is used with *manual protection* where the host has it: reading a slot's bits does not
//! protect its pages again, `KVM_CLEAR_DIRTY_LOG` does, in pieces, so that the guest waits for one
//! piece only (Linux, Documentation/virt/kvm/api.rst, 4.117 and 7.18; rings: 8.29).

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_PAGE_OFFSET,
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use memory::PAGE_SIZE;
use parking_lot::Mutex;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use crate::kvm::{Capabilities, KvmError};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Pages that one `KVM_CLEAR_DIRTY_LOG` protects at most, while which the guest cannot fault:
/// 64 MiB. A multiple of 64, as KVM wants it.
const CLEAR_PIECE: usize = 16 << 10;
/// Words of a log's bitmap that such a piece has.
const PIECE_WORDS: usize = CLEAR_PIECE / 64;

/// The way in which KVM reports a VM's dirty pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyBackend {
    /// By a bitmap for each memslot.
    #[default]
    Log,
    /// By a ring for each vCPU.
    Ring {
        /// Pages that a vCPU can write before its ring must be emptied: a power of two, at least 1024.
        entries: u32,
    },
}

/// A page that the guest wrote: the memslot's number, and the page in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) slot: u32,
    pub(crate) page: u64,
}

/// The back end that a VM uses.
#[derive(Debug)]
pub(crate) enum Tracking {
    Log {
        /// Pages are protected again by us.
        manual: bool,
        /// All bits of a slot are set when its logging starts.
        initially_set: bool,
    },
    Ring(Rings),
}

impl Tracking {
    /// Switches a new VM, which has no vCPUs yet, to this back end.
    pub(crate) fn enable(
        vm: &Arc<VmFd>,
        backend: DirtyBackend,
        capabilities: &Capabilities,
    ) -> Result<Self, KvmError> {
        match backend {
            DirtyBackend::Log => enable_log(vm, capabilities),
            DirtyBackend::Ring { entries } => {
                enable_ring(vm, entries, capabilities)?;
                Ok(Self::Ring(Rings {
                    vm: Arc::clone(vm),
                    entries,
                    rings: Mutex::default(),
                    overrun: AtomicBool::new(false),
                }))
            }
        }
    }
}

fn enable_log(vm: &VmFd, capabilities: &Capabilities) -> Result<Tracking, KvmError> {
    let offered = capabilities.manual_dirty_protect;
    let manual = offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
    let initially_set = manual && offered & KVM_DIRTY_LOG_INITIALLY_SET != 0;
    if manual {
        let both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        enable(
            vm,
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            u64::from(offered & both),
        )
        .map_err(KvmError::new("enable write protection by the VMM"))?;
    }
    Ok(Tracking::Log {
        manual,
        initially_set,
    })
}

fn enable_ring(vm: &VmFd, entries: u32, capabilities: &Capabilities) -> Result<(), KvmError> {
    let bytes = u64::from(entries) * size_of::<Entry>() as u64;
    let most = capabilities.dirty_ring_bytes as u64;
    let attempt = format!("enable dirty rings of {entries} entries");
    // KVM keeps up to 576 entries of a ring in reserve (64, and 512 for a full PML buffer) and
    // refuses a ring that is smaller; 1024 is the next power of two.
    if !entries.is_power_of_two() || entries < 1024 || bytes > most {
        let why = format!(
            "the number of entries must be a power of two, and a ring at most {most} bytes"
        );
        let invalid = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Err(KvmError::other(attempt, invalid));
    }
    let cap = if capabilities.dirty_ring_acq_rel {
        KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    } else {
        KVM_CAP_DIRTY_LOG_RING
    };
    enable(vm, cap, bytes).map_err(KvmError::new(attempt))
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
}

/// Write-protects the pages of a memslot whose `bits` are set, so that KVM logs the next write to
/// them. What was written before is in `bits`, and not in KVM's log any more.
pub(crate) fn clear_log(
    vm: &VmFd,
    slot: u32,
    pages: usize,
    bits: &mut [u64],
) -> Result<(), kvm_ioctls::Error> {
    // KVM wants the first page to be a multiple of 64, and the count too, unless the piece ends at
    // the end of the slot. Only the last piece is shorter, so every piece fits that rule.
    for (index, piece) in bits.chunks_mut(PIECE_WORDS).enumerate() {
        if piece.iter().all(|word| *word == 0) {
            continue;
        }
        let first = index * CLEAR_PIECE;
        let count = CLEAR_PIECE.min(pages.saturating_sub(first));
        let clear = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(count).unwrap_or(u32::MAX),
            first_page: first as u64,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: piece.as_mut_ptr().cast(),
            },
        };
        // SAFETY: `clear` names a bitmap with a bit for each of `num_pages`, rounded up to words.
        let done = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) };
        if done != 0 {
            return Err(kvm_ioctls::Error::last());
        }
    }
    Ok(())
}

/// `struct kvm_dirty_gfn`.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    /// The page in the slot, low half first: both are written before `flags` is.
    page: [AtomicU32; 2],
}

const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

/// One vCPU's ring, mapped.
#[derive(Debug)]
struct Ring {
    entries: NonNull<Entry>,
    len: u32,
    /// The entry that comes next; the lock also keeps harvesters apart.
    next: Mutex<u32>,
}

// SAFETY: the mapping is shared with the kernel and only accessed by atomics; it is unmapped by
// the last owner.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, len: u32) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE.cast_signed();
        // SAFETY: a new mapping, at a place of the kernel's choice.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize * size_of::<Entry>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self {
            entries,
            len,
            next: Mutex::new(0),
        })
    }

    /// Takes all entries. Returns false if there are so many that KVM may have written some
    /// over others: it keeps a few free, unless it emulates a guest for long stretches.
    fn take(&self, written: &mut Vec<Written>) -> bool {
        let mut next = self.next.lock();
        for _ in 0..self.len {
            // `next` runs freely and wraps at 2^32. `len` is a power of two, so the index stays
            // right.
            let index = (*next & (self.len - 1)) as usize;
            // SAFETY: the index is below `len`, which is what is mapped.
            let entry = unsafe { self.entries.add(index).as_ref() };
            // Acquire pairs with KVM's publication of the flag: slot and page, which we read next,
            // are then the values that KVM wrote before it.
            if entry.flags.load(Ordering::Acquire) != DIRTY {
                return true;
            }
            let [low, high] = [0, 1].map(|half: usize| entry.page[half].load(Ordering::Relaxed));
            written.push(Written {
                // The upper half is the address space: there is but one without SMM.
                slot: entry.slot.load(Ordering::Relaxed) & 0xffff,
                page: u64::from(high) << 32 | u64::from(low),
            });
            // Release: our reads above finish first. After this store KVM may reset the entry and
            // reuse it for another page.
            entry.flags.store(HARVESTED, Ordering::Release);
            *next = next.wrapping_add(1);
        }
        false
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped with this length by `map`, and no longer in use.
        unsafe {
            libc::munmap(
                self.entries.as_ptr().cast(),
                self.len as usize * size_of::<Entry>(),
            );
        }
    }
}

/// The rings of a VM's vCPUs.
#[derive(Debug)]
pub(crate) struct Rings {
    vm: Arc<VmFd>,
    entries: u32,
    rings: Mutex<Vec<Ring>>,
    /// A ring has overrun: the set of dirty pages is no longer known.
    overrun: AtomicBool,
}

impl Rings {
    /// Maps the ring of a new vCPU.
    pub(crate) fn add(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let ring = Ring::map(vcpu, self.entries)
            .map_err(|error| KvmError::other("map a vCPU's dirty ring", error))?;
        self.rings.lock().push(ring);
        Ok(())
    }

    /// Empties all rings, and has KVM report the next write to their pages.
    ///
    /// # Errors
    /// KVM lost entries, now or earlier. The caller must stop relying on the rings.
    pub(crate) fn take(&self) -> Result<Vec<Written>, KvmError> {
        let mut written = Vec::new();
        let rings = self.rings.lock();
        for ring in rings.iter() {
            if !ring.take(&mut written) {
                self.overrun.store(true, Ordering::Relaxed);
            }
        }
        // The flag stays set. A later harvest that finds few entries would look complete, although
        // the lost pages are still missing.
        if self.overrun.load(Ordering::Relaxed) {
            let lost = io::Error::other("a dirty ring overflowed, so dirty pages were lost");
            return Err(KvmError::other("collect dirty pages from the rings", lost));
        }
        // The reset protects the pages again, so it comes before the caller copies them: a later
        // write then makes a new entry. KVM stops at the first entry that is not HARVESTED, so
        // entries that vCPUs add meanwhile stay for the next harvest.
        if !written.is_empty() {
            // SAFETY: takes no argument.
            let reset = unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS()) };
            if reset < 0 {
                let error = io::Error::last_os_error();
                return Err(KvmError::other("reset the dirty rings", error));
            }
        }
        Ok(written)
    }
}
