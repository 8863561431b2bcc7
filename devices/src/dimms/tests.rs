use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use state::{Store, Writer};

use super::*;

const START: u64 = 5 << 30;
/// Room for fewer units than there are ways to plug them.
const UNITS: u64 = 12;

fn region() -> AddrRange {
    AddrRange::new(START, UNITS * UNIT).unwrap()
}

fn block(boot: u64) -> DimmBlock {
    DimmBlock::new(region(), boot * UNIT, || {}).unwrap()
}

fn event(block: &DimmBlock) -> Option<u32> {
    let mut data = [0xff; 4];
    block.read(EVENT, &mut data);
    let value = u32::from_le_bytes(data);
    (value != 0).then(|| {
        assert_eq!(value >> 16, u32::from(DEVICE_CHECK));
        value & 0xffff
    })
}

fn answer(block: &DimmBlock, slot: u32, status: u8) {
    let value = u32::from(status) << 24 | u32::from(DEVICE_CHECK) << 16 | slot;
    block.write(STATUS, &value.to_le_bytes());
}

fn register(block: &DimmBlock, offset: u64) -> u64 {
    let mut data = [0xff; 8];
    block.read(offset, &mut data);
    u64::from_le_bytes(data)
}

fn accepted(block: &DimmBlock) -> u64 {
    block.accepted().load(Ordering::Acquire) / UNIT
}

#[test]
fn guest_finds_and_accepts_memory() {
    let changes = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&changes);
    let changed = move || {
        counter.fetch_add(1, Ordering::Relaxed);
    };
    let block = DimmBlock::new(region(), 2 * UNIT, changed).unwrap();
    assert_eq!((accepted(&block), event(&block)), (2, None));
    block.plug(3 * UNIT).unwrap();
    assert_eq!((block.plugged_len(), accepted(&block)), (5 * UNIT, 2));
    // `_STA` reads the size only.
    assert_eq!(register(&block, SLOT_LEN + 8), 3 * UNIT);
    answer(&block, 1, SUCCESS);
    assert_eq!(accepted(&block), 2, "the guest was not notified");
    assert_eq!((event(&block), event(&block)), (Some(1), None));
    assert_eq!(register(&block, SLOT_LEN), START + 2 * UNIT);
    answer(&block, 1, INSERTION_IN_PROGRESS);
    assert_eq!((accepted(&block), block.is_open()), (2, true));
    answer(&block, 1, SUCCESS);
    answer(&block, 1, 1);
    assert_eq!((accepted(&block), block.is_open()), (5, false));
    assert_eq!(changes.load(Ordering::Relaxed), 1);
    assert_eq!(block.take_refusals(), []);
    let empty = [
        register(&block, 2 * SLOT_LEN),
        register(&block, 2 * SLOT_LEN + 8),
    ];
    assert_eq!(empty, [0, 0]);
}

#[test]
fn booting_guest_finds_memory() {
    let block = block(0);
    block.plug(UNIT).unwrap();
    assert_eq!(register(&block, 0), START);
    assert_eq!((accepted(&block), event(&block)), (1, None));
}

#[test]
fn refused_memory_can_be_offered_again() {
    let block = block(1);
    block.plug(UNIT).unwrap();
    event(&block);
    answer(&block, 1, 0x81);
    let refusal = DimmRefusal {
        slot: 1,
        status: 0x81,
    };
    assert_eq!(block.take_refusals(), [refusal]);
    assert_eq!((accepted(&block), block.is_open()), (1, false));
    assert!(block.offer_again());
    assert_eq!(event(&block), Some(1));
    answer(&block, 1, SUCCESS);
    assert_eq!(accepted(&block), 2);
    assert!(!block.offer_again());
}

#[test]
fn slots_and_room_are_bounded() {
    let block = block(0);
    for wrong in [0, 1, UNIT - 1, UNIT + 4096, u64::MAX] {
        assert_eq!(block.plug(wrong), Err(DimmError::Unaligned(wrong)));
    }
    let wanted = (UNITS + 1) * UNIT;
    let no_room = DimmError::NoRoom {
        wanted,
        left: UNITS * UNIT,
    };
    assert_eq!(block.plug(wanted), Err(no_room));
    for _ in 0..SLOTS {
        block.plug(UNIT).unwrap();
    }
    assert_eq!(block.check(UNIT), Err(DimmError::NoSlot));
    assert_eq!(block.plugged_len(), SLOTS as u64 * UNIT);
    assert!(DimmBlock::new(region(), UNIT + 1, || {}).is_err());
}

fn saved(block: &DimmBlock) -> Vec<u8> {
    let mut writer = Writer::default();
    block.save(&mut writer.scope("dimms").unwrap()).unwrap();
    writer.finish()
}

fn load(mut block: &DimmBlock, bytes: &[u8]) -> Result<(), LoadError> {
    let mut store = Store::open(bytes).unwrap();
    block.load(&mut store.scope("dimms").unwrap(), &mut ())
}

#[test]
fn rejects_inconsistent_saved_state() {
    let attempt = |change: fn(&mut V1)| {
        let mut state = V1 {
            addr: START,
            sizes: vec![UNIT, 2 * UNIT, UNIT],
            inserted: vec![2],
            offered: vec![],
            refused: vec![1],
        };
        change(&mut state);
        let mut writer = Writer::default();
        writer.scope("dimms").unwrap().put(&state).unwrap();
        let block = block(5);
        let loaded = load(&block, &writer.finish());
        let wanted = if loaded.is_ok() { 4 } else { 5 };
        assert_eq!(block.plugged_len(), wanted * UNIT);
        loaded
    };
    attempt(|_| {}).unwrap();
    let wrong: [fn(&mut V1); 9] = [
        |state| state.addr += 1,
        |state| state.sizes[1] = 0,
        |state| state.sizes[1] += 4096,
        |state| state.sizes[1] = u64::MAX - UNIT + 1,
        |state| state.sizes[1] = UNITS * UNIT,
        |state| state.sizes.extend([UNIT; SLOTS]),
        |state| state.inserted.push(3),
        |state| state.offered.push(2),
        |state| state.refused.push(u32::MAX),
    ];
    for change in wrong {
        attempt(change).unwrap_err();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Plug(u64),
    OfferAgain,
    Event,
    Answer(u32, u8, u8),
    Odd(u64, Vec<u8>),
    Read(u64, usize),
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    let status = prop_oneof![Just(0), Just(1), Just(0x80), Just(0x81), any::<u8>()];
    let slot = prop_oneof![9 => 0..SLOTS as u32 + 1, 1 => any::<u32>()];
    prop_oneof![
        (0..4_u64, prop_oneof![9 => Just(0), 1 => Just(4096_u64)])
            .prop_map(|(units, more)| Step::Plug(units * UNIT + more)),
        Just(Step::OfferAgain),
        Just(Step::Event),
        (slot, 0..3_u8, status).prop_map(|(slot, code, status)| Step::Answer(slot, code, status)),
        (0..LEN + 8, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(at, data)| Step::Odd(at, data)),
        (0..LEN + 8, 0..17_usize).prop_map(|(at, len)| Step::Read(at, len)),
        Just(Step::Move),
    ]
}

/// The model: the bytes of each slot, and whether it is waiting (0), offered (1), refused
/// (2) or used (3).
#[derive(Default)]
struct Model {
    slots: Vec<(u64, u8)>,
    refusals: usize,
}

impl Model {
    fn plugged(&self) -> u64 {
        self.slots.iter().map(|(len, _)| len).sum()
    }

    /// The registers as bytes.
    fn registers(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut at = START;
        for (len, _) in &self.slots {
            bytes.extend(at.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            at += len;
        }
        bytes.resize(LEN as usize + 64, 0);
        bytes
    }
}

proptest! {
    /// Whatever the guest does, it has no more than the owner plugged, and all of it stays.
    #[test]
    fn agrees_with_a_naive_model(steps in prop::collection::vec(step(), 0..100)) {
        let mut block = block(1);
        let mut model = Model { slots: vec![(UNIT, 3)], refusals: 0 };
        let mut refusals = 0;
        for step in steps {
            match step {
                Step::Plug(len) => {
                    let fits = len > 0 && len % UNIT == 0 && model.slots.len() < SLOTS
                        && model.plugged() + len <= UNITS * UNIT;
                    prop_assert_eq!(block.plug(len).is_ok(), fits);
                    if fits {
                        model.slots.push((len, 0));
                    }
                }
                Step::OfferAgain => {
                    let open = model.slots.iter_mut().filter(|(_, stage)| *stage != 3);
                    prop_assert_eq!(block.offer_again(), open.map(|slot| slot.1 = 0).count() > 0);
                }
                Step::Event => {
                    let next = model.slots.iter().position(|(_, stage)| *stage == 0);
                    prop_assert_eq!(event(&block), next.map(|slot| slot as u32));
                    next.into_iter().for_each(|slot| model.slots[slot].1 = 1);
                }
                Step::Answer(slot, code, status) => {
                    let value = u32::from(status) << 24 | u32::from(code) << 16 | slot & 0xffff;
                    block.write(STATUS, &value.to_le_bytes());
                    let slot = model.slots.get_mut((slot & 0xffff) as usize);
                    if let Some((_, stage @ 1)) = slot && code == 1 && status != 0x80 {
                        *stage = if status == 0 { 3 } else { 2 };
                        model.refusals += usize::from(status != 0);
                    }
                }
                Step::Odd(at, data) => if at != STATUS || data.len() != 4 {
                    block.write(at, &data);
                },
                Step::Read(at, len) => if at != EVENT || len != 4 {
                    let mut data = vec![0xff; len];
                    block.read(at, &mut data);
                    let end = (at / SLOT_LEN + 1) * SLOT_LEN;
                    for (byte, at) in data.into_iter().zip(at..) {
                        let wanted = model.registers()[at as usize];
                        prop_assert_eq!(byte, if at < end { wanted } else { 0 });
                    }
                    if at < EVENT && at % SLOT_LEN < 8
                        && let Some((_, stage @ 0)) = model.slots.get_mut((at / SLOT_LEN) as usize)
                    {
                        *stage = 3;
                    }
                },
                Step::Move => {
                    refusals += block.take_refusals().len();
                    let there = self::block(4);
                    load(&there, &saved(&block)).unwrap();
                    prop_assert_eq!(saved(&there), saved(&block));
                    block = there;
                }
            }
            prop_assert_eq!(block.plugged_len(), model.plugged());
            let used = model.slots.iter().filter(|(_, stage)| *stage == 3);
            prop_assert_eq!(accepted(&block) * UNIT, used.map(|(len, _)| len).sum::<u64>());
            prop_assert_eq!(block.is_open(), model.slots.iter().any(|(_, stage)| *stage < 2));
        }
        refusals += block.take_refusals().len();
        prop_assert_eq!(refusals, model.refusals);
    }
}
