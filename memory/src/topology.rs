//! The topology: owner of the region tree, and the only way to change what is published.

use std::sync::Arc;

use crate::change::ViewChange;
use crate::error::{CommitError, ListenerError, TopologyError};
use crate::flat_view::FlatView;
use crate::limits;
use crate::listener::{Entered, ListenerHandle, MemoryListener, Subscription};
use crate::region::{Arena, Kind, Region, RegionId};
use crate::render::{Rendered, render};
use crate::space::{AddressSpace, SpaceKind};
use crate::transaction::Transaction;

/// Counters of commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Commits that changed a map.
    pub commits: u64,
    /// Address spaces that were rendered.
    pub renders: u64,
    /// Calls of listeners.
    pub listener_calls: u64,
}

pub(crate) struct Space {
    pub(crate) root: RegionId,
    reader: AddressSpace,
    /// Ascending by priority; of the same priority, in the order of registration.
    subscriptions: Vec<(i32, Arc<Subscription>)>,
}

/// The two address spaces of a machine, and the tree of regions behind them.
///
/// There is one owner. A map is changed in a [`Transaction`], which borrows the topology for as
/// long as it is open: code that changes the map cannot read it at the same time, so no state in
/// between can be seen.
///
/// ```
/// # use memory::{SpaceKind, Topology};
/// let mut topology = Topology::new();
/// let tx = topology.begin();
/// tx.commit()?;
/// topology.space(SpaceKind::Memory).view();
/// # Ok::<(), memory::CommitError>(())
/// ```
///
/// The same with the last two lines in the other order does not compile (E0502):
///
/// ```compile_fail,E0502
/// # use memory::{SpaceKind, Topology};
/// let mut topology = Topology::new();
/// let tx = topology.begin();
/// topology.space(SpaceKind::Memory).view();
/// tx.commit()?;
/// # Ok::<(), memory::CommitError>(())
/// ```
pub struct Topology {
    pub(crate) arena: Arena,
    pub(crate) spaces: [Space; 2],
    /// Counts placements: later ones are in front of earlier ones of the same priority.
    pub(crate) sequence: u64,
    generation: u64,
    failed: Option<String>,
    stats: Stats,
}

impl Default for Topology {
    fn default() -> Self {
        Self::new()
    }
}

/// Publishes empty views. Devices may hold readers of the spaces that show them: without
/// this the devices and the last views would keep each other alive for ever.
impl Drop for Topology {
    fn drop(&mut self) {
        for space in &self.spaces {
            // A new generation is required: `CachedView` compares only generations, and would keep
            // the old view and its devices.
            let after = space.reader.generation().saturating_add(1);
            let empty = Rendered {
                ranges: Vec::new(),
                ioeventfds: Vec::new(),
            };
            space.reader.publish(Arc::new(FlatView::new(after, empty)));
        }
    }
}

impl Topology {
    /// Two address spaces in which nothing is assigned.
    #[must_use]
    pub fn new() -> Self {
        let mut arena = Arena::default();
        let spaces = SpaceKind::ALL.map(|kind| {
            let root = Region {
                name: Arc::from(kind.to_string()),
                owner: Arc::from(""),
                kind: Kind::Container,
                last: match kind {
                    SpaceKind::Memory => u64::MAX,
                    SpaceKind::PortIo => limits::PORTS - 1,
                },
                enabled: true,
                place: None,
                children: Vec::new(),
                ioeventfds: Vec::new(),
                aliases: 0,
            };
            // An empty arena has room; the id that stands for none cannot come up.
            let none = RegionId {
                index: u32::MAX,
                generation: u32::MAX,
            };
            let root = arena.insert(root).unwrap_or(none);
            Space {
                root,
                reader: AddressSpace::new(),
                subscriptions: Vec::new(),
            }
        });
        arena.keep();
        Self {
            arena,
            spaces,
            sequence: 0,
            generation: 0,
            failed: None,
            stats: Stats::default(),
        }
    }

    /// A reader of one of the spaces.
    #[must_use]
    pub fn space(&self, kind: SpaceKind) -> AddressSpace {
        self.spaces[kind.index()].reader.clone()
    }

    /// Returns the counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Returns why the topology refuses all changes, if a commit has failed.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Opens a transaction. Dropped without a commit, it changes nothing.
    pub fn begin(&mut self) -> Transaction<'_> {
        Transaction::new(self)
    }

    /// Changes the map as `change` says and commits once; when `change` fails, nothing changed.
    ///
    /// ```
    /// # use memory::{SpaceKind, Topology, RamBlock, RamConfig, RamSlice, CommitError, TopologyError};
    /// # use std::sync::Arc;
    /// # #[derive(Debug, thiserror::Error)] enum Error {
    /// #     #[error(transparent)] Change(#[from] TopologyError),
    /// #     #[error(transparent)] Commit(#[from] CommitError),
    /// # }
    /// let mut topology = Topology::new();
    /// let block = Arc::new(RamBlock::new(&RamConfig::anonymous(1 << 20))?);
    /// topology.transaction(|tx| -> Result<_, Error> {
    ///     let ram = tx.ram("ram", RamSlice { block, offset: 0 }, 1 << 20)?;
    ///     Ok(tx.map(SpaceKind::Memory, 0, ram, 0)?)
    /// })?;
    /// let space = topology.space(SpaceKind::Memory);
    /// space.view().write(0x1000, b"hello");
    /// let mut read = [0; 5];
    /// space.view().read(0x1000, &mut read);
    /// assert_eq!(&read, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The error of `change`, or of the commit.
    pub fn transaction<T, E: From<CommitError>>(
        &mut self,
        change: impl FnOnce(&mut Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut tx = self.begin();
        let value = change(&mut tx)?;
        tx.commit()?;
        Ok(value)
    }

    /// Registers `listener` for each commit that changes this space, called after listeners with a
    /// lower priority. It is called at once with the present map as if that had just been added.
    ///
    /// # Errors
    /// Fails if the listener refuses the present map, or fails to apply it.
    pub fn register(
        &mut self,
        kind: SpaceKind,
        priority: i32,
        listener: Arc<dyn MemoryListener>,
    ) -> Result<ListenerHandle, CommitError> {
        self.check()?;
        let space = &mut self.spaces[kind.index()];
        // Replay before the subscription joins the list: a listener that refuses is not called
        // again and leaves nothing to undo. `&mut self` keeps a commit from coming in between.
        let replay = ViewChange::between(
            Arc::new(FlatView::empty()),
            Arc::clone(&space.reader.view()),
        );
        if !replay.is_empty() {
            listener.prepare(&replay).map_err(CommitError::Refused)?;
            self.stats.listener_calls += 1;
            // A failure here does not fail the topology: the published view did not change, and the
            // other listeners agree with it.
            listener
                .apply(&replay)
                .map_err(|why| CommitError::Failed(why.to_string()))?;
        }
        let subscription = Subscription::new(listener);
        let at = space
            .subscriptions
            .partition_point(|(other, _)| *other <= priority);
        space
            .subscriptions
            .insert(at, (priority, Arc::clone(&subscription)));
        Ok(ListenerHandle { subscription })
    }

    fn check(&self) -> Result<(), CommitError> {
        match &self.failed {
            Some(why) => Err(CommitError::Failed(why.clone())),
            None => Ok(()),
        }
    }

    /// Renders the spaces that are `touched`, has the listeners prepare, publishes, and has the listeners
    /// apply.
    pub(crate) fn commit(&mut self, touched: [bool; 2]) -> Result<(), CommitError> {
        self.check()?;
        // Render every space before asking any listener: a tree that cannot be rendered must change
        // nothing. An early return drops `changes`, which also leaves each entered subscription.
        let mut changes = Vec::new();
        for (index, space) in self
            .spaces
            .iter_mut()
            .enumerate()
            .filter(|(i, _)| touched[*i])
        {
            self.stats.renders += 1;
            let rendered = render(&self.arena, space.root)?;
            // `self.generation` advances only when all listeners have agreed. A refused commit's
            // number is used again, which is safe: no view with it was published.
            let new = Arc::new(FlatView::new(self.generation + 1, rendered));
            let change = ViewChange::between(Arc::clone(&space.reader.view()), new);
            if change.is_empty() {
                continue;
            }
            space
                .subscriptions
                .retain(|(_, subscription)| !subscription.is_closed());
            // Enter now and leave when this function returns: dropping a handle on another thread
            // waits for that. So no listener that agreed in `prepare` misses `apply` because its
            // handle was dropped.
            let entered: Vec<Entered> = space
                .subscriptions
                .iter()
                .filter_map(|(_, s)| s.enter())
                .collect();
            changes.push((index, change, entered));
        }
        if changes.is_empty() {
            return Ok(());
        }
        for_each_listener(&changes, |listener, change| listener.prepare(change))
            .map_err(CommitError::Refused)?;

        // From here on the commit cannot be taken back. Publish before `apply`: once a listener has
        // removed a memslot, a guest access there exits and must find the new view. `changes` holds
        // the old views until the end, so RAM stays mapped until every listener has let it go.
        self.generation += 1;
        self.stats.commits += 1;
        for (index, change, entered) in &changes {
            self.stats.listener_calls += entered.len() as u64;
            self.spaces[*index].reader.publish(Arc::clone(&change.new));
        }
        for_each_listener(&changes, |listener, change| listener.apply(change)).map_err(|why| {
            // The listeners before this one have changed and those after it have not. There is no
            // call that takes an applied change back, so no further commit can be correct.
            let why = why.to_string();
            self.failed = Some(why.clone());
            CommitError::Failed(why)
        })
    }

    /// Returns the region with this id.
    pub(crate) fn region(&self, id: RegionId) -> Result<&Region, TopologyError> {
        self.arena.get(id)
    }
}

fn for_each_listener(
    changes: &[(usize, ViewChange, Vec<Entered>)],
    notify: impl Fn(&dyn MemoryListener, &ViewChange) -> Result<(), ListenerError>,
) -> Result<(), ListenerError> {
    for (_, change, entered) in changes {
        for listener in entered.iter().filter_map(Entered::listener) {
            notify(listener, change)?;
        }
    }
    Ok(())
}

impl std::fmt::Debug for Topology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Topology(generation {})", self.generation)
    }
}
