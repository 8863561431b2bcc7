//! The map for people, as plain data: the tree and the flat view, what QEMU's `info mtree` and `info mtree -f` show.

use crate::flat_view::Target;
use crate::range::AddrRange;
use crate::region::{Kind, RegionId};
use crate::space::SpaceKind;
use crate::topology::Topology;

/// A region and what is in it, as [`Topology::tree`] gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeNode {
    /// The region's name.
    pub name: String,
    /// The region's owner; may be empty.
    pub owner: String,
    /// `container`, `ram`, `rom`, `device` or `alias`.
    pub kind: &'static str,
    /// The addresses it would have if its containers showed all of it.
    pub range: AddrRange,
    /// Among the regions of its container.
    pub priority: i32,
    /// Whether it shows at all.
    pub enabled: bool,
    /// For an alias: the region, and the part of it that the alias shows.
    pub alias_of: Option<(String, AddrRange)>,
    /// The children, by descending priority.
    pub children: Vec<TreeNode>,
}

/// A range of a flat view, as [`Topology::flat`] gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatNode {
    /// The addresses.
    pub range: AddrRange,
    /// The region that answers.
    pub name: String,
    /// The region's owner; may be empty.
    pub owner: String,
    /// `ram`, `rom` or `device`.
    pub kind: &'static str,
    /// Offset of the range in the region.
    pub offset: u64,
}

impl Topology {
    /// The region tree of a space, with absolute addresses.
    #[must_use]
    pub fn tree(&self, space: SpaceKind) -> Option<TreeNode> {
        self.node(self.spaces[space.index()].root, 0, 0)
    }

    fn node(&self, id: RegionId, base: u64, priority: i32) -> Option<TreeNode> {
        let region = self.arena.get(id).ok()?;
        let at = |base: u64, last: u64| AddrRange::from_bounds(base, base.saturating_add(last));
        let alias_of = match region.kind {
            Kind::Alias { target, offset } => {
                let target = self.arena.get(target).ok()?;
                Some((target.name.to_string(), at(offset, region.last)?))
            }
            _ => None,
        };
        let children = region.children.iter().filter_map(|child| {
            let place = self.arena.get(*child).ok()?.place?;
            self.node(*child, base.saturating_add(place.offset), place.priority)
        });
        Some(TreeNode {
            name: region.name.to_string(),
            owner: region.owner.to_string(),
            kind: region.kind.name(),
            range: at(base, region.last)?,
            priority,
            enabled: region.enabled,
            alias_of,
            children: children.collect(),
        })
    }

    /// The flat view of a space that is in force, and its generation.
    #[must_use]
    pub fn flat(&self, space: SpaceKind) -> (u64, Vec<FlatNode>) {
        let reader = self.space(space);
        let view = reader.view();
        let nodes = view.ranges().iter().map(|flat| {
            let region = self.arena.get(flat.region).ok();
            FlatNode {
                range: flat.range,
                name: region.map_or_else(String::new, |region| region.name.to_string()),
                owner: region.map_or_else(String::new, |region| region.owner.to_string()),
                kind: match flat.target {
                    Target::Ram(_) => "ram",
                    Target::Rom(_) => "rom",
                    Target::Device(_) => "device",
                },
                offset: flat.offset,
            }
        });
        (view.generation(), nodes.collect())
    }
}
