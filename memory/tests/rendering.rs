//! The flat view against a naive model: for each address, walk the tree.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::sync::Arc;

use memory::{
    AddrRange, CommitError, DeviceOps, FlatRange, Label, ListenerError, MemoryListener, RamBlock,
    RamConfig, RamSlice, RegionId, SpaceKind, Target, Topology, TopologyError, Transaction,
    ViewChange,
};
use parking_lot::Mutex;
use proptest::prelude::*;

struct Nobody;

impl DeviceOps for Nobody {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

/// The model's region: the same facts, kept in the simplest way.
#[derive(Clone, Debug)]
struct Model {
    size: u64,
    leaf: bool,
    enabled: bool,
    alias: Option<(usize, u64)>,
    /// (offset, priority, child), in the order of placing.
    children: Vec<(u64, i32, usize)>,
}

/// Which leaf answers at `offset` of region `at`, and at which of its offsets.
fn walk(models: &[Model], at: usize, offset: u64) -> Option<(usize, u64)> {
    let region = &models[at];
    if !region.enabled || offset >= region.size {
        return None;
    }
    if region.leaf {
        return Some((at, offset));
    }
    if let Some((target, shift)) = region.alias {
        return walk(models, target, offset.checked_add(shift)?);
    }
    let mut children: Vec<_> = region.children.iter().enumerate().collect();
    // Sort ascending and walk backwards: of equal priorities the one that was placed last is in
    // front.
    children.sort_by_key(|(order, (_, priority, _))| (*priority, *order));
    children
        .iter()
        .rev()
        .find_map(|(_, (start, _, child))| walk(models, *child, offset.checked_sub(*start)?))
}

#[derive(Clone, Debug)]
enum Edit {
    Create {
        kind: u8,
        size: u64,
        target: prop::sample::Index,
        shift: u64,
    },
    Place {
        child: prop::sample::Index,
        parent: prop::sample::Index,
        offset: u64,
        priority: i32,
    },
    Unplace(prop::sample::Index),
    Enable(prop::sample::Index, bool),
    Commit,
    Abort,
}

/// Small numbers, so that things overlap, and the edges of 64 bits.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0_u64..64, 1 => Just(u64::MAX), 1 => (u64::MAX - 64)..=u64::MAX]
}

fn edit() -> impl Strategy<Value = Edit> {
    use prop::sample::Index;
    prop_oneof![
        4 => (0_u8..4, number(), any::<Index>(), number())
            .prop_map(|(kind, size, target, shift)| Edit::Create { kind, size, target, shift }),
        6 => (any::<Index>(), any::<Index>(), number(), -2_i32..3)
            .prop_map(|(child, parent, offset, priority)| Edit::Place { child, parent, offset, priority }),
        1 => any::<Index>().prop_map(Edit::Unplace),
        1 => (any::<Index>(), any::<bool>()).prop_map(|(at, on)| Edit::Enable(at, on)),
        2 => Just(Edit::Commit),
        1 => Just(Edit::Abort),
    ]
}

/// The tree under test and the model beside it; the ids run in step.
#[derive(Clone)]
struct Pair {
    ids: Vec<RegionId>,
    models: Vec<Model>,
}

impl Pair {
    fn apply(&mut self, tx: &mut Transaction<'_>, edit: &Edit) {
        let name = format!("r{}", self.ids.len());
        let label = || Label::from(name.as_str());
        match edit {
            Edit::Create {
                kind,
                size,
                target,
                shift,
            } => {
                let target = target.index(self.ids.len());
                let created = match kind {
                    0 => tx.container(label(), *size),
                    1 => tx.alias(label(), self.ids[target], *shift, *size),
                    _ => tx.device(label(), *size, Arc::new(Nobody)),
                };
                assert_eq!(created.is_ok(), *size > 0);
                if let Ok(id) = created {
                    self.ids.push(id);
                    self.models.push(Model {
                        size: *size,
                        leaf: *kind > 1,
                        enabled: true,
                        alias: (*kind == 1).then_some((target, *shift)),
                        children: Vec::new(),
                    });
                }
            }
            Edit::Place {
                child,
                parent,
                offset,
                priority,
            } => {
                let (child, parent) = (child.index(self.ids.len()), parent.index(self.ids.len()));
                if tx
                    .place(self.ids[child], self.ids[parent], *offset, *priority)
                    .is_ok()
                {
                    self.models[parent]
                        .children
                        .push((*offset, *priority, child));
                }
            }
            Edit::Unplace(child) => {
                let child = child.index(self.ids.len());
                if tx.unplace(self.ids[child]).is_ok() {
                    for model in &mut self.models {
                        model.children.retain(|(_, _, other)| *other != child);
                    }
                }
            }
            Edit::Enable(at, on) => {
                let at = at.index(self.ids.len());
                tx.set_enabled(self.ids[at], *on).unwrap();
                self.models[at].enabled = *on;
            }
            Edit::Commit | Edit::Abort => {}
        }
    }

    fn check(&self, topology: &Topology) {
        let space = topology.space(SpaceKind::Memory);
        let view = space.view();
        // Ranges must ascend and must not overlap, or the binary search of `find` is wrong.
        let ranges = view.ranges();
        for (a, b) in ranges.iter().zip(&ranges[1.min(ranges.len())..]) {
            assert!(a.range.last() < b.range.first(), "{a:?} {b:?}");
        }
        for addr in (0..200).chain((u64::MAX - 200)..=u64::MAX) {
            // The root has 2^64 addresses, one more than the model can say.
            let expected = walk(&self.models, 0, addr);
            let found = view.find(addr).map(|flat| {
                let at = self.ids.iter().position(|id| *id == flat.region).unwrap();
                (at, flat.offset + (addr - flat.range.first()))
            });
            if addr < u64::MAX {
                assert_eq!(found, expected, "at {addr:#x}");
            }
        }
    }
}

/// Applies every received difference to its copy of the view.
#[derive(Default)]
struct Follower(Mutex<Vec<FlatRange>>);

impl MemoryListener for Follower {
    fn prepare(&self, change: &ViewChange) -> Result<(), ListenerError> {
        let known = self.0.lock();
        assert_eq!(*known, change.old.ranges());
        assert!(change.kept.iter().all(|kept| known.contains(kept)));
        Ok(())
    }

    fn apply(&self, change: &ViewChange) -> Result<(), ListenerError> {
        let mut known = self.0.lock();
        for gone in &change.removed {
            let at = known
                .iter()
                .position(|known| known == gone)
                .expect("it was there");
            known.remove(at);
        }
        assert_eq!(
            *known, change.kept,
            "what was not removed is reported as kept"
        );
        for new in &change.added {
            let at = known.partition_point(|known| known.range < new.range);
            known.insert(at, new.clone());
        }
        assert_eq!(*known, change.new.ranges());
        assert!(
            change
                .removed
                .iter()
                .is_sorted_by_key(|r| std::cmp::Reverse(r.range.first()))
        );
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn flat_view_matches_tree(
        transactions in prop::collection::vec(prop::collection::vec(edit(), 1..30), 1..6)
    ) {
        let mut topology = Topology::new();
        let root = topology.begin().root(SpaceKind::Memory);
        let mut pair = Pair {
            ids: vec![root],
            models: vec![Model { size: u64::MAX, leaf: false, enabled: true, alias: None, children: vec![] }],
        };
        let follower = Arc::new(Follower::default());
        let _handle = topology.register(SpaceKind::Memory, 0, follower).unwrap();
        for edits in &transactions {
            let before = pair.clone();
            let mut tx = topology.begin();
            for edit in edits {
                pair.apply(&mut tx, edit);
                if matches!(edit, Edit::Abort) { break; }
            }
            if edits.iter().any(|edit| matches!(edit, Edit::Abort)) {
                tx.abort();
                pair = before;
            } else {
                // A commit that cannot be rendered undoes all edits of its transaction, and so must
                // the model.
                match tx.commit() {
                    Ok(()) => {}
                    Err(CommitError::Render(_)) => pair = before,
                    Err(other) => panic!("{other}"),
                }
            }
            pair.check(&topology);
        }
    }
}

fn device(tx: &mut Transaction<'_>, name: &str, size: u64) -> RegionId {
    tx.device(name, size, Arc::new(Nobody)).unwrap()
}

#[test]
fn priorities_count_within_a_container() {
    let mut topology = Topology::new();
    let (mut low, mut high) = (None, None);
    topology
        .transaction(|tx| -> Result<_, CommitError> {
            let front = tx.container("front", 0x100).unwrap();
            let inner = device(tx, "inner", 0x10);
            let outer = device(tx, "outer", 0x100);
            tx.place(inner, front, 0, -1000).unwrap();
            tx.map(SpaceKind::Memory, 0, front, 1).unwrap();
            tx.map(SpaceKind::Memory, 0, outer, 0).unwrap();
            (low, high) = (Some(inner), Some(outer));
            Ok(())
        })
        .unwrap();
    let space = topology.space(SpaceKind::Memory);
    let view = space.view();
    assert_eq!(Some(view.find(0xf).unwrap().region), low);
    assert_eq!(Some(view.find(0x10).unwrap().region), high);
}

#[test]
fn a_commit_without_a_change_does_no_work() {
    let mut topology = Topology::new();
    let region = {
        let mut tx = topology.begin();
        let region = device(&mut tx, "d", 0x1000);
        tx.map(SpaceKind::Memory, 0x1000, region, 0).unwrap();
        tx.commit().unwrap();
        region
    };
    let before = (
        topology.stats(),
        topology.space(SpaceKind::Memory).generation(),
    );
    topology.begin().commit().unwrap();
    let mut tx = topology.begin();
    tx.set_enabled(region, true).unwrap();
    tx.commit().unwrap();
    assert_eq!(
        (
            topology.stats(),
            topology.space(SpaceKind::Memory).generation()
        ),
        before
    );

    let mut tx = topology.begin();
    tx.unplace(region).unwrap();
    tx.map(SpaceKind::Memory, 0x3000, region, 0).unwrap();
    tx.commit().unwrap();
    let after = topology.stats();
    assert_eq!(after.commits, before.0.commits + 1);
    assert_eq!(
        after.renders,
        before.0.renders + 1,
        "the I/O space did not change"
    );
}

#[test]
fn rejects_impossible_edits() {
    let mut topology = Topology::new();
    let block = Arc::new(RamBlock::new(&RamConfig::anonymous(0x1000)).unwrap());
    let mut tx = topology.begin();
    assert!(matches!(
        tx.container("c", 0),
        Err(TopologyError::Extent { .. })
    ));
    let outside = RamSlice {
        block,
        offset: 0x800,
    };
    assert!(matches!(
        tx.ram("r", outside, 0x801),
        Err(TopologyError::OutsideBlock { .. })
    ));
    let container = tx.container("c", 0x1000).unwrap();
    let inner = tx.container("i", 0x1000).unwrap();
    let alias = tx.alias("a", container, 0, 0x1000).unwrap();
    tx.place(inner, container, 0, 0).unwrap();
    assert_eq!(
        tx.place(inner, container, 0, 0),
        Err(TopologyError::AlreadyPlaced("i".into()))
    );
    assert_eq!(
        tx.place(alias, inner, 0, 0),
        Err(TopologyError::Cycle("a".into()))
    );
    assert_eq!(
        tx.place(container, container, 0, 0),
        Err(TopologyError::Cycle("c".into()))
    );
    assert_eq!(
        tx.place(container, alias, 0, 0),
        Err(TopologyError::NotAContainer("a".into()))
    );
    let end = tx.map(SpaceKind::Memory, u64::MAX, container, 0);
    assert!(matches!(end, Err(TopologyError::Extent { .. })));
    assert_eq!(tx.destroy(container), Err(TopologyError::InUse("c".into())));
    tx.unplace(inner).unwrap();
    tx.destroy(inner).unwrap();
    assert_eq!(tx.unplace(inner), Err(TopologyError::NoSuchRegion(inner)));
    tx.commit().unwrap();
    assert!(topology.space(SpaceKind::Memory).view().ranges().is_empty());
}

#[test]
fn rejects_oversized_alias_trees() {
    let mut topology = Topology::new();
    let mut tx = topology.begin();
    let mut last = tx.container("leaf", 0x1000).unwrap();
    let leaf = device(&mut tx, "d", 0x10);
    tx.place(leaf, last, 0, 0).unwrap();
    for _ in 0..24 {
        let (a, b) = (
            tx.alias("a", last, 0, 0x1000),
            tx.alias("b", last, 0, 0x1000),
        );
        let next = tx.container("c", 0x1000).unwrap();
        let placed = tx
            .place(a.unwrap(), next, 0, 0)
            .and_then(|()| tx.place(b.unwrap(), next, 0, 1));
        if placed.is_err() {
            break;
        }
        last = next;
    }
    let placed = tx.map(SpaceKind::Memory, 0, last, 0);
    let committed = tx.commit();
    assert!(placed.is_err() || matches!(committed, Err(CommitError::Render(_))));
}

#[test]
fn adjacent_slices_become_one_range() {
    let mut topology = Topology::new();
    let mut tx = topology.begin();
    let (region, hole) = (device(&mut tx, "d", 0x100), device(&mut tx, "hole", 0x10));
    tx.map(SpaceKind::Memory, 0, region, 0).unwrap();
    tx.map(SpaceKind::Memory, 0x40, hole, 1).unwrap();
    tx.commit().unwrap();
    assert_eq!(topology.space(SpaceKind::Memory).view().ranges().len(), 3);
    let mut tx = topology.begin();
    tx.unplace(hole).unwrap();
    tx.commit().unwrap();
    let space = topology.space(SpaceKind::Memory);
    let view = space.view();
    assert_eq!(view.ranges().len(), 1);
    assert!(matches!(view.ranges()[0].target, Target::Device(_)));
    assert_eq!(view.ranges()[0].range, AddrRange::new(0, 0x100).unwrap());
}
