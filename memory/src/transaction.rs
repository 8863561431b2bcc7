//! Changing the map: edits that become visible together, or not at all.

use std::sync::Arc;

use crate::error::{CommitError, TopologyError};
use crate::limits;
use crate::range::AddrRange;
use crate::region::{DeviceOps, IoEventFd, Kind, Place, RamSlice, Region, RegionId};
use crate::space::SpaceKind;
use crate::topology::Topology;

/// A region's name and owner, for dumps of the map.
#[derive(Clone, Debug)]
pub struct Label {
    name: Arc<str>,
    owner: Arc<str>,
}

impl From<&str> for Label {
    fn from(name: &str) -> Self {
        Self {
            name: Arc::from(name),
            owner: Arc::from(""),
        }
    }
}

/// Name and owner.
impl From<(&str, &str)> for Label {
    fn from((name, owner): (&str, &str)) -> Self {
        Self {
            name: Arc::from(name),
            owner: Arc::from(owner),
        }
    }
}

/// An open change of a [`Topology`], which it borrows: a value, not a mode. Code that takes part
/// in a change takes `&mut Transaction`, and so nests by passing it down.
///
/// There is one at a time:
///
/// ```
/// # use memory::Topology;
/// let mut topology = Topology::new();
/// let first = topology.begin();
/// first.abort();
/// let second = topology.begin();
/// second.abort();
/// ```
///
/// A second one that is opened before the first has ended does not compile (E0499):
///
/// ```compile_fail,E0499
/// # use memory::Topology;
/// let mut topology = Topology::new();
/// let first = topology.begin();
/// let second = topology.begin();
/// first.abort();
/// second.abort();
/// ```
///
/// A transaction has no way to ask what is at an address: in the middle of a change there is no answer.
/// The readers of the topology have one:
///
/// ```
/// # use memory::{CommitError, SpaceKind, Topology};
/// let mut topology = Topology::new();
/// topology.transaction(|tx| -> Result<(), CommitError> { Ok(()) })?;
/// topology.space(SpaceKind::Memory).view().find(0x1000);
/// # Ok::<(), CommitError>(())
/// ```
///
/// ```compile_fail,E0599
/// # use memory::{CommitError, SpaceKind, Topology};
/// let mut topology = Topology::new();
/// topology.transaction(|tx| -> Result<(), CommitError> { tx.view().find(0x1000); Ok(()) })?;
/// # Ok::<(), CommitError>(())
/// ```
#[must_use = "a transaction that is not committed changes nothing"]
pub struct Transaction<'a> {
    topology: &'a mut Topology,
}

impl<'a> Transaction<'a> {
    pub(crate) fn new(topology: &'a mut Topology) -> Self {
        Self { topology }
    }

    /// Makes all edits visible at once: renders each changed space, asks the listeners, publishes
    /// and tells them. Edits that change nothing cost nothing.
    ///
    /// # Errors
    /// See [`CommitError`]. Unless it is [`CommitError::Failed`], nothing changed.
    pub fn commit(self) -> Result<(), CommitError> {
        let touched = self.touched();
        let result = self.topology.commit(touched);
        // `Failed` comes after the new view is published. Undoing the edits would then make the
        // tree differ from the view that readers use. A topology that failed earlier keeps the
        // edits as well, but never renders again.
        if matches!(result, Ok(()) | Err(CommitError::Failed(_))) {
            self.topology.arena.keep();
        }
        // On the other errors the drop undoes the edits.
        result
    }

    /// Discards the edits.
    pub fn abort(self) {}

    /// The container that is a whole address space.
    #[must_use]
    pub fn root(&self, space: SpaceKind) -> RegionId {
        self.topology.spaces[space.index()].root
    }

    /// A region of `size` bytes that shows nothing but the regions that are placed in it.
    ///
    /// # Errors
    /// Fails if `size` is 0.
    pub fn container(
        &mut self,
        label: impl Into<Label>,
        size: u64,
    ) -> Result<RegionId, TopologyError> {
        self.create(label.into(), size, Kind::Container)
    }

    /// RAM: `size` bytes of a block.
    ///
    /// # Errors
    /// Fails if the slice is not within its block.
    pub fn ram(
        &mut self,
        label: impl Into<Label>,
        slice: RamSlice,
        size: u64,
    ) -> Result<RegionId, TopologyError> {
        check_slice(&slice, size)?;
        self.create(label.into(), size, Kind::Ram(slice))
    }

    /// Memory that the guest can only read: its writes are lost.
    ///
    /// # Errors
    /// Fails if the slice is not within its block.
    pub fn rom(
        &mut self,
        label: impl Into<Label>,
        slice: RamSlice,
        size: u64,
    ) -> Result<RegionId, TopologyError> {
        check_slice(&slice, size)?;
        self.create(label.into(), size, Kind::Rom(slice))
    }

    /// `size` bytes (or ports) that a device answers.
    ///
    /// # Errors
    /// Fails if `size` is 0.
    pub fn device(
        &mut self,
        label: impl Into<Label>,
        size: u64,
        ops: Arc<dyn DeviceOps>,
    ) -> Result<RegionId, TopologyError> {
        self.create(label.into(), size, Kind::Device(ops))
    }

    /// A window of `size` bytes on another region, from `offset` in it on.
    ///
    /// # Errors
    /// Fails if `target` does not exist.
    pub fn alias(
        &mut self,
        label: impl Into<Label>,
        target: RegionId,
        offset: u64,
        size: u64,
    ) -> Result<RegionId, TopologyError> {
        // Check first: an error after `create` would leave a region behind without an owner.
        self.topology.arena.get(target)?;
        let alias = self.create(label.into(), size, Kind::Alias { target, offset })?;
        // The target has no list of its aliases. The count is what makes `destroy` refuse it, and
        // what makes a commit render both spaces when it changes.
        self.topology.arena.get_mut(target)?.aliases += 1;
        Ok(alias)
    }

    fn create(&mut self, label: Label, size: u64, kind: Kind) -> Result<RegionId, TopologyError> {
        let Some(last) = size.checked_sub(1) else {
            return Err(TopologyError::Extent {
                name: label.name.to_string(),
                offset: 0,
                size,
            });
        };
        self.topology.arena.insert(Region {
            name: label.name,
            owner: label.owner,
            kind,
            last,
            enabled: true,
            place: None,
            children: Vec::new(),
            ioeventfds: Vec::new(),
            aliases: 0,
        })
    }

    /// Places a region in a whole space. See [`Transaction::place`].
    ///
    /// # Errors
    /// As [`Transaction::place`].
    pub fn map(
        &mut self,
        space: SpaceKind,
        addr: u64,
        region: RegionId,
        priority: i32,
    ) -> Result<(), TopologyError> {
        self.place(region, self.root(space), addr, priority)
    }

    /// Places a region in a container, `offset` from its start. Where it overlaps others *of the
    /// same container*, the higher priority is in front, and of the same priority the one that
    /// was placed last. What is past the container's end does not show.
    ///
    /// # Errors
    /// Fails if the region is placed already, `container` is no container, the region's end would be past
    /// the last address, or the region would contain itself.
    pub fn place(
        &mut self,
        region: RegionId,
        container: RegionId,
        offset: u64,
        priority: i32,
    ) -> Result<(), TopologyError> {
        let placed = self.topology.arena.get(region)?;
        let name = || placed.name.to_string();
        if placed.place.is_some()
            || self
                .topology
                .spaces
                .iter()
                .any(|space| space.root == region)
        {
            return Err(TopologyError::AlreadyPlaced(name()));
        }
        check_extent(placed, offset)?;
        let holder = self.topology.arena.get(container)?;
        if !matches!(holder.kind, Kind::Container) {
            return Err(TopologyError::NotAContainer(holder.name.to_string()));
        }
        // `touched` and `Topology::tree` follow containers without a limit: a cycle would never end
        // there. `alias` needs no such check, because a new alias is in no container yet.
        if self.reaches(region, container, 0) {
            return Err(TopologyError::Cycle(name()));
        }
        self.topology.sequence += 1;
        let sequence = self.topology.sequence;
        let place = Place {
            parent: container,
            offset,
            priority,
            sequence,
        };
        self.topology.arena.get_mut(region)?.place = Some(place);
        // The search reads the arena through `self`, so the list leaves the arena for that long.
        // The strict comparison puts the new region in front of older ones with the same priority.
        let front_to_back: Vec<_> =
            std::mem::take(&mut self.topology.arena.get_mut(container)?.children);
        let at = front_to_back.partition_point(|child| self.priority(*child) > Some(priority));
        let children = &mut self.topology.arena.get_mut(container)?.children;
        *children = front_to_back;
        children.insert(at, region);
        Ok(())
    }

    fn priority(&self, region: RegionId) -> Option<i32> {
        self.topology
            .arena
            .get(region)
            .ok()?
            .place
            .map(|place| place.priority)
    }

    /// Whether `to` shows in `from`, through containers or aliases. Also true if the tree is too deep
    /// to search, which no tree may be.
    fn reaches(&self, from: RegionId, to: RegionId, depth: usize) -> bool {
        if from == to || depth > limits::DEPTH {
            return true;
        }
        match self.topology.arena.get(from) {
            Ok(Region {
                kind: Kind::Alias { target, .. },
                ..
            }) => self.reaches(*target, to, depth + 1),
            Ok(region) => region
                .children
                .iter()
                .any(|child| self.reaches(*child, to, depth + 1)),
            Err(_) => false,
        }
    }

    /// Takes a region out of its container. It stays to be placed again.
    ///
    /// # Errors
    /// Fails if the region is in no container.
    pub fn unplace(&mut self, region: RegionId) -> Result<(), TopologyError> {
        let placed = self.topology.arena.get_mut(region)?;
        let name = Arc::clone(&placed.name);
        let Some(place) = placed.place.take() else {
            return Err(TopologyError::NotPlaced(name.to_string()));
        };
        self.topology
            .arena
            .get_mut(place.parent)?
            .children
            .retain(|child| *child != region);
        Ok(())
    }

    /// Shows or hides a region and all that is in it.
    ///
    /// # Errors
    /// Fails if there is no such region.
    pub fn set_enabled(&mut self, region: RegionId, enabled: bool) -> Result<(), TopologyError> {
        if self.topology.arena.get(region)?.enabled != enabled {
            self.topology.arena.get_mut(region)?.enabled = enabled;
        }
        Ok(())
    }

    /// Destroys a region. Its id is invalid from then on.
    ///
    /// # Errors
    /// Fails if the region is in a container, contains others, or an alias shows it.
    pub fn destroy(&mut self, region: RegionId) -> Result<(), TopologyError> {
        let going = self.topology.arena.get(region)?;
        let is_root = self
            .topology
            .spaces
            .iter()
            .any(|space| space.root == region);
        if is_root || going.place.is_some() || !going.children.is_empty() || going.aliases > 0 {
            return Err(TopologyError::InUse(going.name.to_string()));
        }
        if let Kind::Alias { target, .. } = going.kind {
            self.topology.arena.get_mut(target)?.aliases -= 1;
        }
        self.topology.arena.remove(region)
    }

    /// Adds a doorbell to a device region.
    ///
    /// # Errors
    /// The doorbell is outside the region, has an invalid width, or matches the same writes as an
    /// existing one.
    pub fn add_ioeventfd(
        &mut self,
        region: RegionId,
        doorbell: IoEventFd,
    ) -> Result<(), TopologyError> {
        let device = self.topology.arena.get_mut(region)?;
        let refused = |reason| TopologyError::Doorbell {
            name: device.name.to_string(),
            offset: doorbell.offset,
            reason,
        };
        if !matches!(device.kind, Kind::Device(_)) {
            return Err(refused("only device regions can have doorbells"));
        }
        if !matches!(doorbell.width, 0 | 1 | 2 | 4 | 8) {
            return Err(refused("the width must be 0, 1, 2, 4 or 8 bytes"));
        }
        if doorbell.width == 0 && doorbell.datamatch.is_some() {
            return Err(refused(
                "a doorbell of any width (0) cannot have a datamatch",
            ));
        }
        let bytes = AddrRange::new(doorbell.offset, u64::from(doorbell.width.max(1)));
        if !bytes.is_some_and(|bytes| device.extent().covers(bytes)) {
            return Err(refused("the bytes are not within the region"));
        }
        // KVM_IOEVENTFD refuses the same collisions with EEXIST, but only while the commit is
        // applied. That would end the topology, so the edit is where the check belongs.
        let clashes = device.ioeventfds.iter().any(|other| {
            other.offset == doorbell.offset
                && (other.width == doorbell.width || other.width == 0 || doorbell.width == 0)
                && (other.datamatch == doorbell.datamatch
                    || other.datamatch.is_none()
                    || doorbell.datamatch.is_none())
        });
        if clashes {
            return Err(refused("another doorbell matches the same writes"));
        }
        device.ioeventfds.push(doorbell);
        Ok(())
    }

    /// Returns, for each space, whether an edited region may show in it.
    fn touched(&self) -> [bool; 2] {
        let mut spaces = [false; 2];
        for id in self.topology.arena.touched() {
            // Follow the containers as they are now. The former container of a region that moved is
            // found on its own: `unplace` edited it, too.
            let mut at = Some(id);
            while let Some(id) = at {
                if let Some(index) = self
                    .topology
                    .spaces
                    .iter()
                    .position(|space| space.root == id)
                {
                    spaces[index] = true;
                }
                at = match self.topology.region(id) {
                    // An alias may show it in either space: render both.
                    Ok(region) if region.aliases > 0 => return [true; 2],
                    Ok(region) => region.place.map(|place| place.parent),
                    Err(_) => None,
                };
            }
        }
        spaces
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // After a commit there is nothing left to undo.
        self.topology.arena.undo();
    }
}

impl std::fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Transaction")
    }
}

fn check_slice(slice: &RamSlice, size: u64) -> Result<(), TopologyError> {
    let block = slice.block.len() as u64;
    match slice.offset.checked_add(size) {
        Some(end) if end <= block => Ok(()),
        _ => Err(TopologyError::OutsideBlock {
            offset: slice.offset,
            size,
            block,
        }),
    }
}

fn check_extent(region: &Region, offset: u64) -> Result<(), TopologyError> {
    match offset.checked_add(region.last) {
        Some(_) => Ok(()),
        None => Err(TopologyError::Extent {
            name: region.name.to_string(),
            offset,
            size: region.last.saturating_add(1),
        }),
    }
}
