//! A machine of the fewest parts that the guest runs on: RAM, KVM's interrupt controllers, a
//! serial port, two registers, and ACPI tables that tell of them.

#![expect(
    clippy::panic,
    reason = "a test's machine that does not come up ends the test"
)]

mod firmware;
mod ports;

use std::io::Cursor;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::{Command, Line, Options};
use hypervisor::{Exit, Kicker, Kvm, RunFailure, Vcpu};
use linux_loader::loader::{Elf, KernelLoader, PvhBootCapability};
use memory::{ListenerHandle, RamBlock, RamConfig, RamSlice, SpaceKind, Topology};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

pub(crate) use ports::{Ports, RESET_PORT, RESET_VALUE, SLEEP_PORT, SLEEP_VALUE};

const SERIAL_GSI: u32 = 4;
/// Long, for hosts whose CPU is itself emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// This value went to the sleep control register.
    Sleep(u8),
    /// This value went to the reset register.
    Reset(u8),
    /// A triple fault.
    Shutdown,
    /// A vCPU could not go on.
    Failed(RunFailure),
}

/// Reports of the machine's threads.
pub(crate) enum Event {
    FirstInstruction(Instant),
    Line(Instant, Line),
    End(End),
}

/// The machine to build.
pub(crate) struct Spec {
    pub(crate) options: Options,
    pub(crate) ram_mib: u64,
    /// RAM above 4 GiB.
    pub(crate) high_mib: u64,
    /// Whether RAM is full of rubbish at first.
    pub(crate) rubbish: bool,
    /// vCPUs, all of which ACPI tells of.
    pub(crate) vcpus: u32,
    /// Whether there are ACPI tables.
    pub(crate) acpi: bool,
    /// The command line, in place of the options'.
    pub(crate) text: Option<&'static str>,
}

impl Spec {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            options,
            ram_mib: 64,
            high_mib: 0,
            rubbish: false,
            vcpus: 1,
            acpi: true,
            text: None,
        }
    }
}

/// State that vCPU threads check when they are kicked.
#[derive(Default)]
struct Wishes {
    stop: AtomicBool,
    nmi: AtomicBool,
    /// Held by a thread that keeps the vCPUs out of the guest.
    pause: Mutex<()>,
}

/// A running machine.
pub(crate) struct Machine {
    pub(crate) ram: Arc<RamBlock>,
    pub(crate) started: Instant,
    events: Receiver<Event>,
    seen: Vec<Line>,
    first_instruction: Option<Instant>,
    input: Arc<Mutex<ports::Input>>,
    serial_irq: EventFd,
    wishes: Arc<Wishes>,
    kickers: Vec<Kicker>,
    threads: Vec<JoinHandle<()>>,
    /// Both hold what KVM uses.
    _vm: (hypervisor::Vm, Vec<ListenerHandle>, Topology),
}

impl Machine {
    pub(crate) fn start(spec: &Spec) -> Self {
        let kvm = Kvm::open().expect("these tests need KVM");
        let vm = kvm.create_vm().expect("a VM");
        let (mut topology, ram) = lay_out_memory(spec);
        let listener = topology
            .register(SpaceKind::Memory, 0, vm.memslots())
            .expect("slots");

        let memory = topology.space(SpaceKind::Memory).memory();
        let loaded =
            Elf::load(&*memory, None, &mut Cursor::new(guest::IMAGE), None).expect("an ELF file");
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            panic!("the image has no PVH note");
        };
        let put = |addr: u64, bytes: &[u8]| {
            memory.write_slice(bytes, GuestAddress(addr)).expect("RAM");
        };
        firmware::hand_over(spec, &put);

        let serial_irq = EventFd::new(0).expect("an event descriptor");
        vm.irq_routes()
            .attach(&serial_irq, SERIAL_GSI)
            .expect("an interrupt");
        let cpuid = kvm.supported_cpuid().expect("CPUID");
        let vcpus: Vec<Vcpu> = (0..spec.vcpus)
            .map(|index| {
                let vcpu = vm.create_vcpu(index, index).expect("a vCPU");
                vcpu.set_cpuid(&cpuid).expect("CPUID");
                if index == 0 {
                    firmware::enter(&vcpu, entry.0);
                }
                vcpu
            })
            .collect();

        let (sender, events) = mpsc::channel();
        let input = Arc::new(Mutex::default());
        let wishes = Arc::<Wishes>::default();
        let kickers = vcpus.iter().map(Vcpu::kicker).collect();
        let line = Arc::new(Mutex::default());
        let started = Instant::now();
        let threads = vcpus
            .into_iter()
            .map(|vcpu| {
                let ports = Ports::new(sender.clone(), Arc::clone(&input), Arc::clone(&line));
                let (wishes, sender) = (Arc::clone(&wishes), sender.clone());
                thread::spawn(move || run(vcpu, ports, &wishes, &sender))
            })
            .collect();
        Self {
            ram,
            started,
            events,
            seen: Vec::new(),
            first_instruction: None,
            input,
            serial_irq,
            wishes,
            kickers,
            threads,
            _vm: (vm, vec![listener], topology),
        }
    }

    /// Waits for a line that `wanted` takes.
    pub(crate) fn expect<T>(&mut self, what: &str, wanted: impl FnMut(&Line) -> Option<T>) -> T {
        self.expect_at(what, wanted).1
    }

    /// Waits for a line that `wanted` takes, and says when it was whole.
    pub(crate) fn expect_at<T>(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Line) -> Option<T>,
    ) -> (Instant, T) {
        loop {
            match self.next_event(what) {
                Event::Line(at, line) => {
                    if let Some(value) = wanted(&line) {
                        return (at, value);
                    }
                }
                Event::FirstInstruction(_) => {}
                Event::End(end) => {
                    panic!("it ended ({end:?}) before {what}; it said {:#?}", self.seen)
                }
            }
        }
    }

    /// Waits for the end.
    pub(crate) fn expect_end(&mut self) -> End {
        loop {
            if let Event::End(end) = self.next_event("its end") {
                return end;
            }
        }
    }

    fn next_event(&mut self, what: &str) -> Event {
        let event = match self.events.recv_timeout(PATIENCE) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                panic!("it did not come to {what}; it said {:#?}", self.seen)
            }
        };
        match &event {
            Event::Line(_, line) => self.seen.push(*line),
            Event::FirstInstruction(at) => self.first_instruction = Some(*at),
            Event::End(_) => {}
        }
        event
    }

    /// When the first instruction ran, once a later event has been waited for.
    pub(crate) fn first_instruction(&self) -> Instant {
        self.first_instruction
            .expect("no first instruction was seen")
    }

    /// Sends a command.
    pub(crate) fn send(&self, command: Command) {
        self.send_text(&format!("{command}\r"));
    }

    pub(crate) fn send_text(&self, text: &str) {
        self.input.lock().expect("no panic").extend(text.bytes());
        self.serial_irq.write(1).expect("an interrupt");
    }

    /// Gives a vCPU a non-maskable interrupt.
    pub(crate) fn inject_nmi(&self) {
        self.wishes.nmi.store(true, Ordering::SeqCst);
        self.kickers[0].kick();
    }

    /// Keeps all vCPUs out of the guest for a while, and does something meanwhile.
    pub(crate) fn while_paused<T>(&self, action: impl FnOnce() -> T) -> T {
        let _paused = self.wishes.pause.lock().expect("no panic");
        for kicker in &self.kickers {
            kicker.kick();
        }
        // A vCPU that was kicked waits for the lock; there is nothing that tells when it does.
        thread::sleep(Duration::from_millis(20));
        action()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.wishes.stop.store(true, Ordering::SeqCst);
        for kicker in &self.kickers {
            kicker.kick();
        }
        for thread in self.threads.drain(..) {
            // Its panic is on the test's output already.
            let _ = thread.join();
        }
    }
}

fn lay_out_memory(spec: &Spec) -> (Topology, Arc<RamBlock>) {
    let mut topology = Topology::new();
    let mut tx = topology.begin();
    let mut put_ram = |addr: u64, size: u64| {
        let block = Arc::new(RamBlock::new(&RamConfig::anonymous(size)).expect("RAM"));
        let slice = RamSlice {
            block: Arc::clone(&block),
            offset: 0,
        };
        let region = tx.ram("ram", slice, size).expect("a region");
        tx.map(SpaceKind::Memory, addr, region, 0).expect("a place");
        block
    };
    let ram = put_ram(0, spec.ram_mib << 20);
    if spec.high_mib > 0 {
        put_ram(firmware::HIGH_RAM, spec.high_mib << 20);
    }
    if spec.rubbish {
        let all = ram.slice(0, ram.len()).expect("RAM");
        all.copy_from(&vec![0xa5_u8; ram.len()]);
    }
    tx.commit().expect("a map");
    (topology, ram)
}

fn run(mut vcpu: Vcpu, mut ports: Ports, wishes: &Wishes, events: &Sender<Event>) {
    while !wishes.stop.load(Ordering::SeqCst) {
        let end = match vcpu.run(&mut ports) {
            Exit::Handled => ports.end.take(),
            Exit::Interrupted => {
                drop(wishes.pause.lock());
                if wishes.nmi.swap(false, Ordering::SeqCst) {
                    vcpu.nmi().expect("an NMI");
                }
                None
            }
            Exit::Shutdown => Some(End::Shutdown),
            Exit::Failed(why) => Some(End::Failed(why)),
        };
        if let Some(end) = end {
            // The receiver may be gone.
            let _ = events.send(Event::End(end));
            return;
        }
    }
}
