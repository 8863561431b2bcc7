//! The cost of the memory topology, as Markdown tables: `cargo bench -p tests --bench topology`.
//!
//! Lookups beside vm-memory's own maps; commits; a machine with many devices, committed change by
//! change and all at once, with KVM and without; dirty tracking by both back ends; the gate. Wants
//! `/dev/kvm`. Numbers are medians unless they say otherwise.

#![expect(clippy::unwrap_used, reason = "a benchmark that goes wrong panics")]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use hypervisor::{DirtyBackend, Gate, Kicker, Kvm, MsiVectors, Vm};
use memory::{
    CachedView, DeviceOps, IoEventFd, ListenerHandle, MemoryListener, RamBlock, RamConfig,
    RamSlice, RegionId, SpaceKind, Topology, Transaction,
};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::eventfd::EventFd;

const PAGE: u64 = memory::PAGE_SIZE;
const ROUNDS: usize = 21;
const LOOKUPS: u64 = 20_000;

/// Measures the memory topology. There is nothing to choose.
#[derive(Parser)]
#[command(bin_name = "cargo bench -p tests --bench topology --")]
struct Arguments;

fn main() {
    let Arguments = tests::options();
    lookups_and_commits();
    readers_beside_a_writer();
    many_devices();
    dirty_tracking();
    gate();
}

fn median<T: Copy + PartialOrd>(mut samples: Vec<T>) -> T {
    samples.sort_by(|a, b| a.partial_cmp(b).unwrap());
    samples[samples.len() / 2]
}

fn rounds(mut round: impl FnMut() -> Duration) -> Duration {
    median((0..ROUNDS).map(|_| round()).collect())
}

/// Random addresses, all in RAM, as a rule not the first of their range.
fn lookups(ranges: u64, mut look_up: impl FnMut(u64)) -> Duration {
    let mut random = 1_u64;
    let start = Instant::now();
    for _ in 0..LOOKUPS {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        look_up(random % ranges * 2 * PAGE + (random >> 50) % PAGE);
    }
    start.elapsed()
}

/// Pages of one block, each with a hole behind it, so that none merge.
fn topology(ranges: u64) -> (Topology, RegionId) {
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(ranges * PAGE)).unwrap());
    let mut topology = Topology::new();
    let mut tx = topology.begin();
    let mut last = None;
    for index in 0..ranges {
        let slice = RamSlice {
            block: Arc::clone(&block),
            offset: index * PAGE,
        };
        let region = tx.ram("page", slice, PAGE).unwrap();
        tx.map(SpaceKind::Memory, index * 2 * PAGE, region, 0)
            .unwrap();
        last = Some(region);
    }
    tx.commit().unwrap();
    (topology, last.unwrap())
}

fn mmap(ranges: u64) -> GuestMemoryMmap {
    let all: Vec<_> = (0..ranges)
        .map(|index| (GuestAddress(index * 2 * PAGE), PAGE as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&all).unwrap()
}

fn lookups_and_commits() {
    println!("### Lookup and commit\n");
    println!(
        "| ranges | `FlatView` | `GuestMemoryMmap` | `CachedView` | `AddressSpace` | `GuestMemoryAtomic` | one commit |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|");
    for ranges in [10, 100, 1_000, 10_000] {
        let (mut topology, last) = topology(ranges);
        let (mmap, space) = (mmap(ranges), topology.space(SpaceKind::Memory));
        let atomic = GuestMemoryAtomic::new(mmap.clone());
        let mut cached = CachedView::new(space.clone());
        let each = |round: Duration| round.as_secs_f64() * 1e9 / LOOKUPS as f64;
        // In turns, so that all meet the same noise.
        let mut samples: [Vec<f64>; 5] = Default::default();
        let held = space.memory();
        for _ in 0..ROUNDS {
            samples[4].push(each(lookups(ranges, |addr| {
                black_box(held.find_region(GuestAddress(addr)).is_some());
            })));
            samples[0].push(each(lookups(ranges, |addr| {
                black_box(cached.view().find_region(GuestAddress(addr)).is_some());
            })));
            samples[1].push(each(lookups(ranges, |addr| {
                black_box(space.view().find_region(GuestAddress(addr)).is_some());
            })));
            samples[2].push(each(lookups(ranges, |addr| {
                black_box(mmap.find_region(GuestAddress(addr)).is_some());
            })));
            samples[3].push(each(lookups(ranges, |addr| {
                black_box(atomic.memory().find_region(GuestAddress(addr)).is_some());
            })));
        }
        let mut at = 0;
        let commit = rounds(|| {
            at ^= PAGE;
            let start = Instant::now();
            let mut tx = topology.begin();
            tx.unplace(last).unwrap();
            let at = ranges * 2 * PAGE + at;
            tx.map(SpaceKind::Memory, at, last, 0).unwrap();
            tx.commit().unwrap();
            start.elapsed()
        });
        let [cached, view, mmap, atomic, held] = samples.map(median);
        println!(
            "| {ranges} | {held:.1} ns | {mmap:.1} ns | {cached:.1} ns | {view:.1} ns | {atomic:.1} ns | {:.1} us |",
            commit.as_secs_f64() * 1e6
        );
    }
    println!();
}

/// Nanoseconds a lookup, by eight threads, in batches of 64: median and 99th percentile.
fn readers(space: &memory::AddressSpace, ranges: u64, until: Duration) -> (f64, f64) {
    let samples: Vec<f64> = thread::scope(|scope| {
        let read = |seed: u64| {
            let mut cached = CachedView::new(space.clone());
            let (start, mut samples, mut random) = (Instant::now(), Vec::new(), seed);
            while start.elapsed() < until {
                let batch = Instant::now();
                for _ in 0..64 {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let addr = (random >> 33) % ranges * 2 * PAGE;
                    black_box(cached.view().find_region(GuestAddress(addr)).is_some());
                }
                samples.push(batch.elapsed().as_secs_f64() * 1e9 / 64.0);
            }
            samples
        };
        let threads: Vec<_> = (1..=8)
            .map(|seed| scope.spawn(move || read(seed)))
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut samples = samples;
    samples.sort_by(|a, b| a.partial_cmp(b).unwrap());
    (
        samples[samples.len() / 2],
        samples[samples.len() * 99 / 100],
    )
}

fn readers_beside_a_writer() {
    const RANGES: u64 = 100;
    println!("### Eight reading threads, {RANGES} ranges\n");
    println!("| | p50 | p99 | commits a second |\n|---|---:|---:|---:|");
    let (mut topology, last) = topology(RANGES);
    let space = topology.space(SpaceKind::Memory);
    let until = Duration::from_secs(2);
    let (p50, p99) = readers(&space, RANGES, until);
    println!("| nobody commits | {p50:.1} ns | {p99:.1} ns | 0 |");
    let done = AtomicBool::new(false);
    let ((p50, p99), commits) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (start, mut commits) = (Instant::now(), 0_u64);
            while !done.load(Ordering::Relaxed) {
                let mut tx = topology.begin();
                let at = RANGES * 2 * PAGE + (commits % 2) * PAGE;
                tx.unplace(last).unwrap();
                tx.map(SpaceKind::Memory, at, last, 0).unwrap();
                tx.commit().unwrap();
                commits += 1;
                let due = start + Duration::from_millis(commits);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            commits as f64 / start.elapsed().as_secs_f64()
        });
        let read = readers(&space, RANGES, until);
        done.store(true, Ordering::Relaxed);
        (read, writer.join().unwrap())
    });
    println!("| a writer beside them | {p50:.1} ns | {p99:.1} ns | {commits:.0} |\n");
}

struct Registers;

impl DeviceOps for Registers {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

/// Queues and MSI-X vectors of a device.
type Shape = (u16, u16);

/// 8 NICs with 16 queue pairs each, and a queue for control; 16 disks with 4 queues each.
fn shapes() -> Vec<Shape> {
    let nics = std::iter::repeat_n((33, 34), 8);
    nics.chain(std::iter::repeat_n((4, 5), 16)).collect()
}

/// One step of a load.
type Change = Box<dyn FnOnce(&mut Transaction<'_>)>;

/// A machine whose devices are there and not yet shown.
struct Machine {
    topology: Topology,
    devices: Vec<(RegionId, RegionId, Shape)>,
    doorbells: Vec<Arc<EventFd>>,
    vectors: Vec<MsiVectors>,
    kvm: Option<Vm>,
    _listeners: Vec<ListenerHandle>,
}

fn machine(with_kvm: bool) -> Machine {
    let mut topology = Topology::new();
    let kvm = with_kvm.then(|| Kvm::open().unwrap().create_vm().unwrap());
    let mut listeners = Vec::new();
    if let Some(vm) = &kvm {
        let slots: Arc<dyn MemoryListener> = vm.memslots();
        listeners.push(topology.register(SpaceKind::Memory, 0, slots).unwrap());
        let doorbells = vm.ioeventfds(SpaceKind::Memory);
        listeners.push(topology.register(SpaceKind::Memory, 10, doorbells).unwrap());
    }
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(1 << 30)).unwrap());
    let mut tx = topology.begin();
    let ram = tx
        .ram("ram", RamSlice { block, offset: 0 }, 1 << 30)
        .unwrap();
    tx.map(SpaceKind::Memory, 0, ram, 0).unwrap();
    let mut devices = Vec::new();
    for shape in shapes() {
        let bar = tx.container("bar", 0x8000).unwrap();
        let part = |tx: &mut Transaction<'_>, at: u64| {
            let region = tx.device("registers", PAGE, Arc::new(Registers)).unwrap();
            tx.place(region, bar, at, 0).unwrap();
            region
        };
        for at in [0, 0x1000, 0x2000, 0x4000, 0x7000] {
            part(&mut tx, at);
        }
        devices.push((bar, part(&mut tx, 0x3000), shape));
    }
    tx.commit().unwrap();
    let queues: u16 = shapes().iter().map(|(queues, _)| queues).sum();
    let vectors = |vm: &Vm| {
        let each = shapes().into_iter();
        each.map(|(_, count)| vm.irq_routes().vectors(count).unwrap())
            .collect()
    };
    Machine {
        topology,
        devices,
        doorbells: (0..queues)
            .map(|_| Arc::new(EventFd::new(0).unwrap()))
            .collect(),
        vectors: kvm.as_ref().map(vectors).unwrap_or_default(),
        kvm,
        _listeners: listeners,
    }
}

impl Machine {
    /// Shows every BAR, enables every queue, routes every vector; commits now and then, or once.
    fn load(&mut self, each: bool) -> Duration {
        let devices = self.devices.clone();
        let mut doorbells = self.doorbells.clone().into_iter();
        let start = Instant::now();
        let mut changes: Vec<Change> = Vec::new();
        for (index, (bar, notify, (queues, _))) in (0_u64..).zip(devices) {
            changes.push(Box::new(move |tx| {
                let at = (4 << 30) + index * 0x8000;
                tx.map(SpaceKind::Memory, at, bar, -1).unwrap();
            }));
            for (queue, fd) in (0_u64..queues.into()).zip(&mut doorbells) {
                changes.push(Box::new(move |tx| {
                    let doorbell = IoEventFd {
                        offset: queue * 4,
                        width: 2,
                        datamatch: None,
                        fd,
                    };
                    tx.add_ioeventfd(notify, doorbell).unwrap();
                }));
            }
        }
        let message = |vector: u16| Some((0xfee0_0000, u32::from(vector % 200) + 32));
        if each {
            for change in changes {
                let mut tx = self.topology.begin();
                change(&mut tx);
                tx.commit().unwrap();
            }
            for (device, (_, count)) in self.vectors.iter().zip(shapes()) {
                for vector in 0..count {
                    device.route([(vector, message(vector))]).unwrap();
                }
            }
        } else {
            let mut tx = self.topology.begin();
            changes.into_iter().for_each(|change| change(&mut tx));
            tx.commit().unwrap();
            if let Some(vm) = &self.kvm {
                let all = self.vectors.iter().zip(shapes());
                let all = all.flat_map(|(device, (_, count))| {
                    (0..count).map(move |vector| (device, (vector, message(vector))))
                });
                vm.irq_routes().batch(all).unwrap();
            }
        }
        start.elapsed()
    }
}

fn many_devices() {
    println!("### 8 NICs of 16 queue pairs and 16 disks of 4 queues: every BAR shown, every queue");
    println!("enabled, every vector routed\n");
    println!("| | renders | listener calls | KVM calls | time with KVM | our own code |");
    println!("|---|---:|---:|---:|---:|---:|");
    let mut times = Vec::new();
    for (name, each) in [("a commit after each change", true), ("one commit", false)] {
        let repeat = if each { 5 } else { ROUNDS };
        let (mut with, mut without) = (Vec::new(), Vec::new());
        let mut counts = String::new();
        for _ in 0..repeat {
            let mut machine = machine(true);
            let before = machine.topology.stats();
            let calls = |machine: &Machine| {
                let vm = machine.kvm.as_ref().unwrap();
                vm.memslots().stats().ioctls + vm.irq_routes().calls()
            };
            let calls_before = calls(&machine);
            with.push(machine.load(each).as_secs_f64());
            let after = machine.topology.stats();
            // One call for each doorbell either way: KVM takes them one by one.
            let kvm = calls(&machine) - calls_before + machine.doorbells.len() as u64;
            counts = format!(
                "{} | {} | {kvm}",
                after.renders - before.renders,
                after.listener_calls - before.listener_calls
            );
            without.push(self::machine(false).load(each).as_secs_f64());
        }
        let (with, without) = (median(with), median(without));
        println!(
            "| {name} | {counts} | {:.2} ms | {:.3} ms |",
            with * 1e3,
            without * 1e3
        );
        times.push((with, without));
    }
    println!(
        "\nRatio: {:.1} with KVM, {:.0} of our own code.\n",
        times[0].0 / times[1].0,
        times[0].1 / times[1].1
    );
}

fn dirty_tracking() {
    println!("### Dirty tracking\n");
    println!("| memory | back end | start | first harvest: all pages | another, nothing written |");
    println!("|---:|---|---:|---:|---:|");
    let kvm = Kvm::open().unwrap();
    for gib in [1, 16] {
        for (name, backend) in [
            ("log", DirtyBackend::Log),
            ("rings", DirtyBackend::Ring { entries: 65536 }),
        ] {
            let mut samples: [Vec<f64>; 3] = Default::default();
            for _ in 0..7 {
                let vm = kvm.create_vm_with(backend).unwrap();
                let mut topology = Topology::new();
                let slots = vm.memslots();
                let listener: Arc<dyn MemoryListener> = vm.memslots();
                let _handle = topology.register(SpaceKind::Memory, 0, listener).unwrap();
                let size = gib << 30;
                let block = Arc::new(RamBlock::new(&RamConfig::anonymous(size)).unwrap());
                let mut tx = topology.begin();
                let ram = tx.ram("ram", RamSlice { block, offset: 0 }, size).unwrap();
                tx.map(SpaceKind::Memory, 0, ram, 0).unwrap();
                tx.commit().unwrap();
                let mut time = |index: usize, act: &dyn Fn()| {
                    let start = Instant::now();
                    act();
                    samples[index].push(start.elapsed().as_secs_f64() * 1e6);
                };
                time(0, &|| slots.track_dirty(true).unwrap());
                time(1, &|| slots.harvest().unwrap());
                time(2, &|| slots.harvest().unwrap());
            }
            let [start, first, idle] = samples.map(median);
            println!("| {gib} GiB | {name} | {start:.0} us | {first:.0} us | {idle:.1} us |");
        }
    }
    println!();
}

fn gate() {
    const PASSES: u32 = 1_000_000;
    let gate = Gate::default();
    let seat = gate.seat(Kicker::default());
    let pass = rounds(|| {
        let start = Instant::now();
        for _ in 0..PASSES {
            gate.enter(&seat);
            black_box(&seat);
            gate.leave(&seat);
        }
        start.elapsed() / PASSES
    });
    let empty = rounds(|| {
        let start = Instant::now();
        for _ in 0..PASSES {
            black_box(&seat);
        }
        start.elapsed() / PASSES
    });
    let close = rounds(|| {
        let start = Instant::now();
        for _ in 0..1000 {
            drop(black_box(gate.close()));
        }
        start.elapsed() / 1000
    });
    println!("### The gate\n");
    println!("| | |\n|---|---:|");
    println!(
        "| into the guest and out again | {} ns |",
        pass.saturating_sub(empty).as_nanos()
    );
    println!(
        "| closed and opened, nobody inside | {} ns |",
        close.as_nanos()
    );
}
