//! Memslots under a guest that never stops using them, on `/dev/kvm`, and the planner without.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memory::{ListenerHandle, RamBlock, RamConfig, RegionId, SpaceKind, Topology};
use proptest::prelude::*;

use super::*;
use crate::dirty::DirtyBackend;
use crate::exit::{Exit, ExitHandler};
use crate::kvm::Kvm;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// Real mode, `ds` at [`SHARED`]: for each 256 bytes of 64 KiB, reads a byte, compares it, counts the one
/// behind it up; then writes to port 0x98. A wrong value is reported at port 0x99.
const CODE: &[u8] = &[
    0x31, 0xdb, // start: xor bx, bx
    0x8a, 0x07, // next: mov al, [bx]
    0x3c, 0x5a, // cmp al, 0x5a
    0x75, 0x0d, // jne wrong
    0xfe, 0x47, 0x01, // inc byte [bx + 1]
    0x81, 0xc3, 0x00, 0x01, // add bx, 0x100
    0x75, 0xf1, // jnz next
    0xe6, 0x98, // out 0x98, al
    0xeb, 0xeb, // jmp start
    0xe6, 0x99, // wrong: out 0x99, al
    0xf4, // hlt
];

/// 16 pages that the guest uses all the time.
const SHARED: u64 = 0x1_0000;
const SHARED_LEN: u64 = 0x1_0000;
/// Behind them, 16 more pages of the same block that come and go: with and without them, the slot is another.
const TAIL: u64 = 0x2_0000;
/// And elsewhere, some that move.
const ELSEWHERE: u64 = 0x10_0000;

struct Lab {
    topology: Topology,
    vm: Vm,
    block: Arc<RamBlock>,
    tail: RegionId,
    elsewhere: RegionId,
    /// A page of other memory in the midst of the shared pages.
    patch: RegionId,
    other: Arc<RamBlock>,
    /// A destination's copies of both blocks.
    copies: [Vec<u8>; 2],
    _slots: ListenerHandle,
}

impl Lab {
    fn new() -> Self {
        Self::with(DirtyBackend::Log)
    }

    fn with(dirty: DirtyBackend) -> Self {
        let kvm = Kvm::open().expect("these tests need /dev/kvm");
        let vm = kvm.create_vm_with(dirty).unwrap();
        let mut topology = Topology::new();
        let slots = topology
            .register(SpaceKind::Memory, 0, vm.memslots())
            .unwrap();
        let code = Arc::new(RamBlock::new(&RamConfig::anonymous(PAGE_SIZE)).unwrap());
        let block = Arc::new(RamBlock::new(&RamConfig::anonymous(3 * SHARED_LEN)).unwrap());
        let len = usize::try_from(SHARED_LEN).unwrap();
        code.slice(0, CODE.len()).unwrap().copy_from(CODE);
        block.slice(0, len).unwrap().copy_from(&vec![0x5a_u8; len]);

        let mut tx = topology.begin();
        let code = tx
            .ram(
                "code",
                RamSlice {
                    block: code,
                    offset: 0,
                },
                PAGE_SIZE,
            )
            .unwrap();
        tx.map(SpaceKind::Memory, 0, code, 0).unwrap();
        let mut part = |name: &str, at: u64, offset: u64| {
            let slice = RamSlice {
                block: Arc::clone(&block),
                offset,
            };
            let region = tx.ram(name, slice, SHARED_LEN).unwrap();
            tx.map(SpaceKind::Memory, at, region, 0).unwrap();
            region
        };
        part("shared", SHARED, 0);
        let tail = part("tail", TAIL, SHARED_LEN);
        let elsewhere = part("elsewhere", ELSEWHERE, 2 * SHARED_LEN);
        let other = Arc::new(RamBlock::new(&RamConfig::anonymous(PAGE_SIZE)).unwrap());
        other.slice(0, 4096).unwrap().copy_from(&[0x5a_u8; 4096]);
        let slice = RamSlice {
            block: Arc::clone(&other),
            offset: 0,
        };
        let patch = tx.ram("patch", slice, PAGE_SIZE).unwrap();
        tx.map(SpaceKind::Memory, SHARED + 5 * PAGE_SIZE, patch, 1)
            .unwrap();
        tx.set_enabled(patch, false).unwrap();
        tx.commit().unwrap();
        let copies = [&block, &other].map(|block| vec![0; block.len()]);
        Self {
            topology,
            vm,
            block,
            tail,
            elsewhere,
            patch,
            other,
            copies,
            _slots: slots,
        }
    }

    /// Takes what is dirty to the copies, as a migration does.
    fn copy_dirty(&mut self) {
        self.vm.memslots().harvest().unwrap();
        for (block, copy) in [&self.block, &self.other].into_iter().zip(&mut self.copies) {
            for (first, count) in block.dirty().take().runs() {
                let (at, len) = (first * 4096, count * 4096);
                let slice = block.slice(at, len).unwrap();
                slice.copy_to(&mut copy[at..at + len]);
            }
        }
    }

    fn contents(&self) -> [Vec<u8>; 2] {
        [&self.block, &self.other].map(|block| {
            let mut bytes = vec![0_u8; block.len()];
            block.slice(0, bytes.len()).unwrap().copy_to(&mut bytes);
            bytes
        })
    }

    fn vcpu(&self, index: u32) -> Vcpu {
        let vcpu = self.vm.create_vcpu(index, index).unwrap();
        let mut sregs = vcpu.sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        (sregs.ds.base, sregs.ds.selector) = (SHARED, 0x1000);
        vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_bindings::kvm_regs {
            rip: 0,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        vcpu.set_runnable().unwrap();
        vcpu
    }

    /// Changes the slots `times` times while two vCPUs use them, or until one of them saw a hole:
    /// splits and merges them, takes some and moves some. Where dirty pages are tracked, takes them
    /// from time to time.
    fn churn(&mut self, times: u64) -> Seen {
        let seen = Arc::new(Seen::default());
        let vcpus: Vec<_> = (0..2).map(|index| self.vcpu(index)).collect();
        let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
        let done = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|mut vcpu| {
                let (mut seen, done) = (Watch(Arc::clone(&seen)), Arc::clone(&done));
                thread::spawn(move || {
                    while !done.load(Ordering::SeqCst) {
                        match vcpu.run(&mut seen) {
                            Exit::Handled | Exit::Interrupted => {}
                            other => {
                                seen.0.ends.fetch_add(1, Ordering::SeqCst);
                                return Some(other);
                            }
                        }
                    }
                    None
                })
            })
            .collect();
        for step in 0..times {
            let mut tx = self.topology.begin();
            tx.set_enabled(self.tail, step % 2 == 0).unwrap();
            tx.set_enabled(self.patch, step % 7 < 3).unwrap();
            if step % 3 == 0 {
                let at = ELSEWHERE + (step % 5) * SHARED_LEN;
                tx.unplace(self.elsewhere).unwrap();
                tx.map(SpaceKind::Memory, at, self.elsewhere, 0).unwrap();
            }
            tx.commit().unwrap();
            if seen.holes() > 0 {
                break;
            }
            if step % 16 == 0 && self.block.dirty().is_enabled() {
                self.copy_dirty();
            }
        }
        let enough = Instant::now() + Duration::from_secs(20);
        while seen.holes() == 0 && seen.rounds.load(Ordering::SeqCst) < 4 && Instant::now() < enough
        {
            thread::sleep(Duration::from_millis(1));
        }
        done.store(true, Ordering::SeqCst);
        for thread in threads {
            while !thread.is_finished() {
                kickers.iter().for_each(crate::kick::Kicker::kick);
                thread::sleep(Duration::from_millis(1));
            }
            if let Some(end) = thread.join().unwrap() {
                eprintln!("a vCPU ended: {end:?}");
            }
        }
        Arc::into_inner(seen).unwrap()
    }
}

#[derive(Debug, Default)]
struct Seen {
    rounds: AtomicU64,
    wrong: AtomicU64,
    exits: AtomicU64,
    ends: AtomicU64,
}

impl Seen {
    fn holes(&self) -> u64 {
        [&self.wrong, &self.exits, &self.ends]
            .iter()
            .map(|n| n.load(Ordering::SeqCst))
            .sum()
    }
}

struct Watch(Arc<Seen>);

impl ExitHandler for Watch {
    fn io_read(&mut self, _: u16, _: &mut [u8]) {}

    fn io_write(&mut self, port: u16, _: &[u8]) {
        let counter = if port == 0x98 {
            &self.0.rounds
        } else {
            &self.0.wrong
        };
        counter.fetch_add(1, Ordering::SeqCst);
    }

    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.0.exits.fetch_add(1, Ordering::SeqCst);
    }

    fn mmio_write(&mut self, _: u64, _: &[u8]) {
        self.0.exits.fetch_add(1, Ordering::SeqCst);
    }
}

/// Replacements in the long tests.
const MANY: u64 = 20_000;

#[test]
fn no_hole_while_slots_are_replaced() {
    let mut lab = Lab::new();
    let seen = lab.churn(MANY);
    assert_eq!(seen.holes(), 0, "{seen:?}");
    assert!(seen.rounds.load(Ordering::SeqCst) >= 4, "{seen:?}");
    assert!(lab.vm.memslots().stats().gate_closings >= MANY - 1);
}

#[test]
fn hole_without_the_gate() {
    let mut lab = Lab::new();
    lab.vm.memslots().ungated.store(true, Ordering::Relaxed);
    let seen = lab.churn(200_000);
    assert!(seen.holes() > 0, "{seen:?}");
}

fn no_dirty_page_is_lost(dirty: DirtyBackend) {
    let mut lab = Lab::with(dirty);
    lab.vm.memslots().track_dirty(true).unwrap();
    lab.copy_dirty();
    // What the map does not show is dirty when it comes to be shown.
    let (copies, contents) = (&lab.copies, lab.contents());
    assert!(copies[0] == contents[0], "all is dirty at first");
    assert!(copies[1] != contents[1]);
    let seen = lab.churn(MANY);
    assert_eq!(seen.holes(), 0, "{seen:?}");
    assert!(seen.rounds.load(Ordering::SeqCst) >= 4, "{seen:?}");
    // The vCPUs stand: what is dirty now is the last of it.
    lab.copy_dirty();
    let (copies, contents) = (&lab.copies, lab.contents());
    for (copy, block) in copies.iter().zip(&contents) {
        let differs = |page: &usize| copy[page * 4096..][..4096] != block[page * 4096..][..4096];
        let lost: Vec<usize> = (0..copy.len() / 4096).filter(differs).collect();
        assert_eq!(
            lost, [0_usize; 0],
            "pages that were written and are not dirty"
        );
    }
    lab.vm.memslots().track_dirty(false).unwrap();
    assert_eq!(lab.block.dirty().count(), 0, "nobody wrote since");
    let memslots = lab.vm.memslots();
    assert!(!lab.block.dirty().is_enabled() && memslots.stats().dirty_ioctls > 0);
}

#[test]
fn log_keeps_every_dirty_page() {
    no_dirty_page_is_lost(DirtyBackend::Log);
}

#[test]
fn rings_keep_every_dirty_page() {
    // The largest there is: a KVM that emulates much of a guest overruns small ones.
    no_dirty_page_is_lost(DirtyBackend::Ring { entries: 65536 });
}

/// A guest that writes more pages than a ring has entries: its vCPU leaves, and comes back.
#[test]
fn a_ring_that_is_full_is_emptied() {
    let kvm = Kvm::open().expect("these tests need /dev/kvm");
    let vm = kvm
        .create_vm_with(DirtyBackend::Ring { entries: 1024 })
        .unwrap();
    let mut topology = Topology::new();
    let _slots = topology
        .register(SpaceKind::Memory, 0, vm.memslots())
        .unwrap();
    let len: u64 = 16 << 20;
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(len)).unwrap());
    // Protected mode, flat: writes to each page from 64 KiB on, and tells port 0x98 of each: KVM
    // looks at its rings before it enters the guest, and some emulate much of a guest in one go.
    let code: &[u8] = &[
        0xbb, 0x00, 0x00, 0x01, 0x00, // mov ebx, 0x10000
        0xfe, 0x03, // next: inc byte [ebx]
        0xe6, 0x98, // out 0x98, al
        0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, // add ebx, 0x1000
        0x81, 0xfb, 0x00, 0x00, 0x00, 0x01, // cmp ebx, 0x1000000
        0x72, 0xee, // jb next
        0xf4, // hlt
    ];
    block.slice(0, code.len()).unwrap().copy_from(code);
    let mut tx = topology.begin();
    let slice = RamSlice {
        block: Arc::clone(&block),
        offset: 0,
    };
    let ram = tx.ram("ram", slice, len).unwrap();
    tx.map(SpaceKind::Memory, 0, ram, 0).unwrap();
    tx.commit().unwrap();
    let slots = vm.memslots();
    slots.track_dirty(true).unwrap();
    drop(block.dirty().take());

    let mut vcpu = vm.create_vcpu(0, 0).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        (segment.base, segment.limit, segment.g, segment.db) = (0, 0xffff_ffff, 1, 1);
        segment.selector = 8;
    }
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rip: 0,
        rflags: 2,
        ..Default::default()
    })
    .unwrap();
    let seen = Arc::new(Seen::default());
    let mut watch = Watch(Arc::clone(&seen));
    while seen.rounds.load(Ordering::SeqCst) < 4096 - 16 {
        assert_eq!(vcpu.run(&mut watch), Exit::Handled);
    }
    assert_eq!(seen.holes(), 0);
    slots.harvest().unwrap();
    // A CPU may mark its code as used, too.
    let dirty = (16..4096).filter(|page| block.dirty().is_dirty(page * 4096));
    assert_eq!(dirty.count(), 4096 - 16);
    assert!(slots.stats().dirty_ioctls >= 4);
}

#[test]
fn rejects_invalid_ring_sizes() {
    let kvm = Kvm::open().expect("these tests need /dev/kvm");
    for entries in [0, 1000, 1 << 30] {
        let refused = kvm
            .create_vm_with(DirtyBackend::Ring { entries })
            .unwrap_err();
        assert!(refused.to_string().contains("power of two"), "{refused}");
    }
}

#[test]
fn rom_is_removed_while_logging() {
    let mut lab = Lab::new();
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(PAGE_SIZE)).unwrap());
    let mut tx = lab.topology.begin();
    let rom = tx
        .rom("rom", RamSlice { block, offset: 0 }, PAGE_SIZE)
        .unwrap();
    tx.map(SpaceKind::Memory, 0x20_0000, rom, 0).unwrap();
    tx.commit().unwrap();
    let slots = lab.vm.memslots();
    slots.track_dirty(true).unwrap();
    slots.harvest().unwrap();
    let mut tx = lab.topology.begin();
    tx.unplace(rom).unwrap();
    tx.commit().unwrap();
    assert_eq!(lab.topology.failure(), None);
}

#[test]
fn unmappable_change_keeps_old_map() {
    let mut lab = Lab::new();
    let mut tx = lab.topology.begin();
    let slice = RamSlice {
        block: Arc::clone(&lab.block),
        offset: 0,
    };
    let odd = tx.ram("odd", slice, 0x1800).unwrap();
    tx.map(SpaceKind::Memory, 0x30_0000, odd, 0).unwrap();
    let refused = tx.commit().unwrap_err().to_string();
    assert!(
        refused.contains("page boundaries") && refused.contains("0x300000"),
        "{refused}"
    );
    assert_eq!(lab.topology.failure(), None);
    assert!(
        lab.topology
            .space(SpaceKind::Memory)
            .view()
            .find(0x30_0000)
            .is_none()
    );
}

/// Slots for each page of 16 that is there, all from one block.
fn slots_of(block: &Arc<RamBlock>, there: u16) -> Vec<Slot> {
    let page = |index: u64| Slot {
        range: AddrRange::new(index * PAGE_SIZE, PAGE_SIZE).unwrap(),
        slice: RamSlice {
            block: Arc::clone(block),
            offset: index * PAGE_SIZE,
        },
        readonly: false,
    };
    let mut slots: Vec<Slot> = Vec::new();
    for next in (0..16).filter(|index| there >> index & 1 == 1).map(page) {
        match slots.last_mut() {
            Some(last) if last.is_continued_by(&next) => *last = last.joined(&next).unwrap(),
            _ => slots.push(next),
        }
    }
    slots
}

proptest! {
    #[test]
    fn plan_changes_only_what_differs(maps in prop::collection::vec(any::<u16>(), 1..20)) {
        let block = Arc::new(RamBlock::new(&RamConfig::anonymous(16 * PAGE_SIZE)).unwrap());
        let mut in_force: Vec<Option<Slot>> = Vec::new();
        for there in maps {
            let wanted = slots_of(&block, there);
            let plan = plan(&in_force, &wanted);
            for number in plan.remove {
                let gone = in_force[number].take().unwrap();
                prop_assert!(!wanted.contains(&gone), "what both maps have stays");
            }
            in_force.extend(plan.add.into_iter().map(Some));
            let mut now: Vec<_> = in_force.iter().flatten().cloned().collect();
            now.sort_by_key(|slot| slot.range);
            prop_assert_eq!(now, wanted);
        }
    }
}
