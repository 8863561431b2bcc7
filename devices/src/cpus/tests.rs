use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use state::{Store, Writer};

use super::*;

const MAX: u32 = 5;

fn event(block: &CpuBlock) -> Option<(u8, u32)> {
    let mut data = [0xff; 4];
    block.read(EVENT, &mut data);
    let value = u32::from_le_bytes(data);
    (value != 0).then_some(((value >> 16) as u8, value & 0xffff))
}

fn write(block: &CpuBlock, offset: u64, value: u32) {
    block.write(offset, &value.to_le_bytes());
}

fn status(vcpu: u32, code: u8, status: u8) -> u32 {
    u32::from(status) << 24 | u32::from(code) << 16 | vcpu
}

fn present(block: &CpuBlock) -> Vec<u32> {
    block.present().iter().collect()
}

#[test]
fn guest_ejects_requested_vcpus() {
    let changes = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&changes);
    let block = CpuBlock::new(2, MAX, move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    block.plug(2);
    block.plug(3);
    // Beyond what the machine can have.
    block.plug(MAX);
    let mut bits = [0xff; 3];
    block.read(PRESENT, &mut bits);
    assert_eq!(bits, [0b1111, 0, 0]);
    block.want_back(3);
    // The guest first learns that the vCPU is there.
    let events: Vec<_> = std::iter::from_fn(|| event(&block)).collect();
    let wanted = [(DEVICE_CHECK, 2), (DEVICE_CHECK, 3), (EJECT_REQUEST, 3)];
    assert_eq!(events, wanted);

    for not_asked in [0, 1, 2, MAX, 255, 256, u32::MAX] {
        write(&block, EJECT, not_asked);
    }
    assert_eq!(present(&block), [0, 1, 2, 3]);
    assert_eq!(changes.load(Ordering::Relaxed), 0);
    write(&block, EJECT, 3);
    assert_eq!(present(&block), [0, 1, 2]);
    block.read(PRESENT, &mut bits);
    assert_eq!(bits, [0b111, 0, 0]);
    write(&block, EJECT, 3);
    assert_eq!(changes.load(Ordering::Relaxed), 1);
    block.want_back(0);
    assert!(event(&block).is_none() && block.leaving().is_empty());
}

#[test]
fn refusal_ends_the_request() {
    let block = CpuBlock::new(3, MAX, || {});
    block.want_back(1);
    block.want_back(2);
    // A guest that was not notified cannot have refused.
    write(&block, STATUS, status(1, EJECT_REQUEST, 0x82));
    assert_eq!(block.take_refusals(), []);
    while event(&block).is_some() {}
    write(&block, STATUS, status(1, EJECT_REQUEST, 0x84));
    assert_eq!(
        block.leaving().count(),
        2,
        "an ejection in progress is no refusal"
    );
    write(&block, STATUS, status(1, EJECT_REQUEST, 0x82));
    write(&block, STATUS, status(1, EJECT_REQUEST, 0x82));
    let refusal = Refusal {
        vcpu: 1,
        code: EJECT_REQUEST,
        status: 0x82,
    };
    assert_eq!(block.take_refusals(), [refusal]);
    write(&block, EJECT, 1);
    write(&block, EJECT, 2);
    write(&block, STATUS, status(2, EJECT_REQUEST, 0));
    assert_eq!(
        (present(&block), block.take_refusals()),
        (vec![0, 1], vec![])
    );

    block.plug(2);
    while event(&block).is_some() {}
    write(&block, STATUS, status(2, DEVICE_CHECK, 0x81));
    write(&block, STATUS, status(1, DEVICE_CHECK, 0x81));
    let refused = block.take_refusals();
    assert_eq!((refused.len(), refused[0].vcpu), (1, 2));
}

#[test]
fn withdrawn_request_counts_if_seen() {
    let block = CpuBlock::new(3, MAX, || {});
    block.want_back(1);
    assert_eq!(event(&block), Some((EJECT_REQUEST, 1)));
    block.want_back(2);
    block.withdraw();
    assert_eq!(event(&block), None);
    write(&block, EJECT, 2);
    write(&block, EJECT, 1);
    assert_eq!(present(&block), [0, 2]);
    // Plugged again, it is not to be ejected.
    block.plug(1);
    write(&block, EJECT, 1);
    assert_eq!(present(&block), [0, 1, 2]);
}

fn saved(block: &CpuBlock) -> Vec<u8> {
    let mut writer = Writer::default();
    let snapshot = block.snapshot();
    snapshot.save(&mut writer.scope("cpus").unwrap()).unwrap();
    writer.finish()
}

fn load(block: &CpuBlock, bytes: &[u8]) -> Result<(), LoadError> {
    let mut store = Store::open(bytes).unwrap();
    let mut at = block;
    at.load(&mut store.scope("cpus").unwrap(), &mut ())
}

#[test]
fn rejects_inconsistent_saved_state() {
    let sound = || V1 {
        present: vec![0, 2],
        inserted: vec![],
        offered: vec![2],
        requested: vec![2],
        leaving: vec![],
    };
    let attempt = |change: fn(&mut V1)| {
        let mut state = sound();
        change(&mut state);
        let mut writer = Writer::default();
        writer.scope("cpus").unwrap().put(&state).unwrap();
        let block = CpuBlock::new(1, MAX, || {});
        let loaded = load(&block, &writer.finish());
        assert_eq!(block.snapshot().is_changed(), loaded.is_ok());
        loaded
    };
    attempt(|_| {}).unwrap();
    let wrong: [fn(&mut V1); 7] = [
        |state| state.present = vec![2],
        |state| state.present.push(MAX),
        |state| state.present.push(u32::MAX),
        |state| state.inserted.push(3),
        |state| state.offered.push(3),
        |state| state.requested.push(0),
        |state| state.leaving.push(0),
    ];
    for change in wrong {
        attempt(change).unwrap_err();
    }
    // An earlier version, or a machine that was never resized, saves nothing.
    let block = CpuBlock::new(2, MAX, || {});
    load(&block, &Writer::default().finish()).unwrap();
    assert!(present(&block) == [0, 1] && !block.snapshot().is_changed());
}

#[derive(Clone, Debug)]
enum Step {
    Plug(u32),
    WantBack(u32),
    Withdraw,
    Event,
    Eject(u32),
    Status(u32),
    Odd(u64, Vec<u8>),
    Read(u64, usize),
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    let vcpu = || prop_oneof![9 => 0..MAX + 1, 1 => any::<u32>()];
    let answer = prop_oneof![
        (
            0..MAX,
            0_u8..5,
            prop_oneof![Just(0), Just(0x80), Just(0x82), Just(0x84)]
        )
            .prop_map(|(vcpu, code, with)| status(vcpu, code, with)),
        any::<u32>(),
    ];
    prop_oneof![
        vcpu().prop_map(Step::Plug),
        vcpu().prop_map(Step::WantBack),
        Just(Step::Withdraw),
        Just(Step::Event),
        vcpu().prop_map(Step::Eject),
        answer.prop_map(Step::Status),
        (0..64_u64, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(at, data)| Step::Odd(at, data)),
        (0..64_u64, 0..9_usize).prop_map(|(at, len)| Step::Read(at, len)),
        Just(Step::Move),
    ]
}

/// The model of one vCPU.
#[derive(Default)]
struct Model {
    present: BTreeSet<u32>,
    /// Notifications that the guest has not taken.
    unseen: BTreeSet<(u8, u32)>,
    /// Notifications that the guest has taken and not answered.
    open: BTreeSet<(u8, u32)>,
    refusals: usize,
}

impl Model {
    fn plug(&mut self, vcpu: u32) {
        self.forget(vcpu);
        self.present.insert(vcpu);
        self.unseen.insert((DEVICE_CHECK, vcpu));
    }

    fn forget(&mut self, vcpu: u32) {
        self.unseen.retain(|(_, other)| *other != vcpu);
        self.open.retain(|(_, other)| *other != vcpu);
    }

    fn eject(&mut self, vcpu: u32) {
        let request = (EJECT_REQUEST, vcpu);
        if self.unseen.contains(&request) || self.open.contains(&request) {
            self.forget(vcpu);
            self.present.remove(&vcpu);
        }
    }

    fn answer(&mut self, value: u32) {
        let (vcpu, code, with) = (value & 0xffff, (value >> 16) as u8, (value >> 24) as u8);
        let is_final = match code {
            DEVICE_CHECK => with != 0x80,
            EJECT_REQUEST => with != 0x84 && with != 0,
            _ => false,
        };
        let is_unseen = self.unseen.contains(&(code, vcpu));
        if is_final && !is_unseen && self.open.remove(&(code, vcpu)) && with != 0 {
            self.refusals += 1;
        }
    }
}

proptest! {
    /// Whatever the guest does, the registers do no more than the owner asked for.
    #[test]
    fn agrees_with_a_naive_model(steps in prop::collection::vec(step(), 0..200)) {
        let mut block = CpuBlock::new(2, MAX, || {});
        let mut model = Model {
            present: BTreeSet::from([0, 1]),
            ..Model::default()
        };
        let mut refusals = 0;
        for step in steps {
            match step {
                Step::Plug(vcpu) => {
                    block.plug(vcpu);
                    if vcpu < MAX {
                        model.plug(vcpu);
                    }
                }
                Step::WantBack(vcpu) => {
                    block.want_back(vcpu);
                    if vcpu != 0 && model.present.contains(&vcpu) {
                        model.unseen.insert((EJECT_REQUEST, vcpu));
                    }
                }
                Step::Withdraw => {
                    block.withdraw();
                    model.unseen.retain(|(code, _)| *code != EJECT_REQUEST);
                }
                Step::Event => {
                    let wanted = model.unseen.pop_first();
                    prop_assert_eq!(event(&block), wanted);
                    model.open.extend(wanted);
                }
                Step::Eject(vcpu) => {
                    write(&block, EJECT, vcpu);
                    model.eject(vcpu);
                }
                Step::Status(value) => {
                    write(&block, STATUS, value);
                    model.answer(value);
                }
                Step::Odd(at, data) if data.len() != 4 || (at != EJECT && at != STATUS) => {
                    block.write(at, &data);
                }
                Step::Odd(..) => {}
                Step::Read(at, len) if at != EVENT => {
                    let mut data = vec![0xff; len];
                    block.read(at, &mut data);
                    let first = if at == 0 { model.present.iter().fold(0, |bits, v| bits | 1 << v) } else { 0 };
                    let wanted = data.iter().enumerate().all(|(i, byte)| *byte == if i == 0 { first } else { 0 });
                    prop_assert!(wanted, "{:?} at {}", data, at);
                }
                Step::Read(..) => {}
                Step::Move => {
                    let there = CpuBlock::new(1, MAX, || {});
                    refusals += block.take_refusals().len();
                    load(&there, &saved(&block)).unwrap();
                    prop_assert_eq!(saved(&there), saved(&block));
                    block = there;
                }
            }
            prop_assert_eq!(present(&block), model.present.iter().copied().collect::<Vec<_>>());
            prop_assert!(block.present().contains(0));
        }
        refusals += block.take_refusals().len();
        prop_assert_eq!(refusals, model.refusals);
    }
}
