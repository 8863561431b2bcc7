//! The way of events: what the machines of several VMs report is merged for their drivers, which
//! record events, while clients read them as they like: late, one VM or all, until they leave.
//!
//! Memory is bounded however often a machine reports. A VM loses no event to what others cause, a
//! reader learns how many are gone, and a request is answered between reports.

#![no_main]

// The module of the VMM itself, without the machine around it.
#[allow(dead_code, reason = "the fuzzer uses a part of the module")]
#[path = "../../vmm/src/guest_event.rs"]
mod guest_event;

use std::collections::HashMap;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use control::{
    EventLog, EventSender, Inbox, Message, Missed, Request, StatusPublisher, VmHandle, connect,
};
use devices::PowerEvent;
use guest_event::{GuestEnd, GuestEvent, Port, Reports};
use libfuzzer_sys::fuzz_target;
use spec::{Event, Failure, PayloadConfig, VmConfig, VmId};
use virtio_devices::TransportEvent;

/// The limits of `control`: events of each VM and of those that are gone, and bytes of a detail.
const KEPT_PER_VM: usize = 128;
const KEPT_AFTER_VMS: usize = 1024;
const DETAIL_MAX: usize = 4096;
/// Devices of each machine.
const DEVICES: u8 = 4;
const VMS: usize = 3;
const READERS: usize = 4;
/// Messages in which a request must be answered whatever the machine reports.
const TURNS: usize = 4;

/// A VM whose driver is the fuzzer.
struct Vm {
    handle: VmHandle,
    inbox: Inbox<Reports, ()>,
    sender: EventSender<Reports, ()>,
    publisher: StatusPublisher,
    machine: u64,
    /// The numbers of all events of this VM.
    recorded: Vec<u64>,
}

/// A client, and the number of the last event that it knows.
struct Reader {
    after: u64,
    vm: Option<usize>,
}

struct World {
    log: EventLog,
    vms: Vec<Vm>,
    readers: Vec<Reader>,
    /// The VM of each event, by number from 1 on.
    all: HashMap<u64, VmId>,
}

impl Vm {
    fn new(log: &EventLog) -> Self {
        let config = Arc::new(VmConfig::with_payload(PayloadConfig::default()));
        let (handle, inbox, sender, publisher) =
            connect(&VmId::unique(), config, log.clone(), || {});
        Self {
            handle,
            inbox,
            sender,
            publisher,
            machine: 1,
            recorded: Vec::new(),
        }
    }
}

fn guest_event(bytes: &mut Unstructured<'_>) -> Result<GuestEvent> {
    Ok(match bytes.int_in_range(0_u8..=7)? {
        0 => GuestEvent::Ejected(bytes.arbitrary()?),
        1 => GuestEvent::Room(*bytes.choose(&Port::BOTH)?),
        2 => GuestEvent::Power(*bytes.choose(&[PowerEvent::Reset, PowerEvent::PowerOff])?),
        3 => GuestEvent::MemoryLost(bytes.arbitrary()?),
        4 => GuestEvent::Failed(Failure {
            code: "fuzz".to_owned(),
            detail: String::new(),
            vcpu: None,
        }),
        5 => GuestEvent::Cpus,
        kind => {
            let id = format!("_disk{}", bytes.int_in_range(0..=DEVICES - 1)?);
            // Some are longer than an event's detail may be, with characters of several bytes.
            let why = "grün\n\"".repeat(bytes.int_in_range(0..=1000)?);
            let event = if kind == 6 {
                TransportEvent::Stalled(why)
            } else {
                TransportEvent::NeedsReset(why)
            };
            GuestEvent::Device(id, event)
        }
    })
}

impl World {
    fn new() -> Self {
        let log = EventLog::default();
        Self {
            vms: (0..VMS).map(|_| Vm::new(&log)).collect(),
            log,
            readers: Vec::new(),
            all: HashMap::new(),
        }
    }

    /// Records an event as a VM's driver does.
    fn record(&mut self, vm: usize, event: &str, detail: Option<String>) {
        let vm = &mut self.vms[vm];
        vm.publisher.record(event, detail);
        let number = self.log.last();
        vm.recorded.push(number);
        self.all.insert(number, vm.handle.id().clone());
    }

    fn drive(&mut self, vm: usize, reports: Reports) {
        assert!(reports.devices.len() <= DEVICES.into());
        for (id, device) in reports.devices {
            if let Some(why) = device.needs_reset {
                self.record(vm, "device-needs-reset", Some(format!("{id}: {why}")));
            }
            if let Some(why) = device.stalled {
                self.record(vm, "device-stalled", Some(why));
            }
        }
        match reports.end {
            Some(GuestEnd::Power(PowerEvent::Reset)) => {
                self.vms[vm].machine += 1;
                self.record(vm, "rebooted", None);
            }
            Some(_) => self.record(vm, "shutdown", None),
            None => {}
        }
    }

    /// One message of a driver's inbox.
    fn turn(&mut self, vm: usize) -> bool {
        match self.vms[vm].inbox.next(|_| true) {
            Some(Message::Reports(reports)) => {
                self.drive(vm, reports);
                true
            }
            Some(Message::Ask(ask)) => {
                ask.answer(Ok(control::Reply::Done));
                true
            }
            _ => false,
        }
    }

    /// A request is answered within a few messages of a machine that reports without end.
    fn ask(&mut self, vm: usize) {
        let mut answer = std::pin::pin!(self.vms[vm].handle.ask_now(Request::Counters));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        for _ in 0..TURNS {
            let machine = self.vms[vm].machine;
            let report = (machine, GuestEvent::Room(Port::Serial));
            self.vms[vm].sender.report(report);
            self.turn(vm);
            if answer.as_mut().poll(&mut context).is_ready() {
                return;
            }
        }
        panic!("the request waits behind reports");
    }

    /// Ends a VM, whose history joins those of all that are gone. Another takes its place.
    fn end(&mut self, vm: usize) {
        let id = self.vms[vm].handle.id().clone();
        self.log.record_last(&id, "deleted", None);
        self.all.insert(self.log.last(), id);
        self.vms[vm] = Vm::new(&self.log);
        self.readers.retain(|reader| reader.vm != Some(vm));
    }

    fn read(&mut self, reader: usize) {
        let Reader { after, vm } = self.readers[reader];
        let id = vm.map(|vm| self.vms[vm].handle.id().clone());
        let (events, missed) = self.log.after(after, id.as_ref());
        assert!(events.len() <= VMS * KEPT_PER_VM + KEPT_AFTER_VMS);
        assert!(events.is_sorted_by(|a, b| a.sequence < b.sequence));
        for event in &events {
            assert!(event.sequence > after);
            assert_eq!(Some(&event.vm), self.all.get(&event.sequence));
            let detail = event.detail.as_ref();
            assert!(detail.is_none_or(|detail| detail.len() <= DETAIL_MAX));
            // What a client gets is what was recorded.
            let json = serde_json::to_string(event).expect("an event has a form in JSON");
            let back: Event = serde_json::from_str(&json).expect("the JSON was just written");
            assert_eq!(&back, event);
        }
        match vm {
            Some(vm) => self.check_one(vm, after, &events, missed),
            None => self.check_all(after, &events, missed),
        }
        self.readers[reader].after = self.log.last();
    }

    /// No event of a VM is lost but to later ones of its own.
    fn check_one(&self, vm: usize, after: u64, events: &[Event], missed: Option<Missed>) {
        let recorded = &self.vms[vm].recorded;
        let first_kept = recorded.len().saturating_sub(KEPT_PER_VM);
        let (gone, kept) = recorded.split_at(first_kept);
        let expected: Vec<u64> = kept.iter().copied().filter(|at| *at > after).collect();
        let seen: Vec<u64> = events.iter().map(|event| event.sequence).collect();
        assert_eq!(seen, expected);
        let lost = gone.iter().filter(|at| **at > after).count() as u64;
        // The count is an upper bound, and there is one if anything is gone.
        let count = missed.map_or(0, |missed| missed.count);
        assert!(
            count >= lost,
            "{lost} events are gone, {count} are reported"
        );
    }

    /// Each event is either there or counted.
    fn check_all(&self, after: u64, events: &[Event], missed: Option<Missed>) {
        let count = missed.map_or(0, |missed| missed.count);
        assert_eq!(events.len() as u64 + count, self.log.last() - after);
    }

    fn play(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        while !bytes.is_empty() {
            let vm = bytes.int_in_range(0..=VMS - 1)?;
            match bytes.int_in_range(0_u8..=9)? {
                0..=2 => {
                    // Reports of an earlier machine may still come.
                    let machine = self.vms[vm].machine - u64::from(bytes.ratio(1_u8, 8_u8)?);
                    let event = guest_event(bytes)?;
                    self.vms[vm].sender.report((machine, event));
                }
                3 => drop(self.turn(vm)),
                4 => self.ask(vm),
                5 => {
                    for _ in 0..bytes.int_in_range(0_u8..=200)? {
                        self.record(vm, "paused", None);
                    }
                }
                6 if bytes.ratio(1_u8, 4_u8)? => self.end(vm),
                6 | 7 if self.readers.len() < READERS => {
                    let after = bytes.int_in_range(0..=self.log.last())?;
                    let vm = bytes.arbitrary::<bool>()?.then_some(vm);
                    self.readers.push(Reader { after, vm });
                }
                8 if !self.readers.is_empty() => {
                    let reader = bytes.choose_index(self.readers.len())?;
                    self.readers.swap_remove(reader);
                }
                _ if !self.readers.is_empty() => {
                    let reader = bytes.choose_index(self.readers.len())?;
                    self.read(reader);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let mut world = World::new();
    // An input that is too short leaves out what it does not tell.
    let _ = world.play(&mut Unstructured::new(input));
    for vm in 0..VMS {
        // All reports of a machine are one message.
        let mut messages = 0;
        while world.turn(vm) {
            messages += 1;
        }
        assert!(messages <= 1, "{messages} messages of one machine waited");
    }
    for reader in 0..world.readers.len() {
        world.read(reader);
    }
});
