//! The memory map in the form of the API.

use memory::{FlatNode, SpaceKind, Topology, TreeNode};
use spec::{MapAlias, MapNode, MapRange, MapSpace, MemoryMap};

pub(crate) fn of(topology: &Topology) -> MemoryMap {
    let space = |kind: SpaceKind| {
        let (generation, flat) = topology.flat(kind);
        Some(MapSpace {
            name: kind.to_string(),
            generation,
            tree: node(topology.tree(kind)?),
            flat: flat.into_iter().map(range).collect(),
        })
    };
    MemoryMap {
        spaces: SpaceKind::ALL.into_iter().filter_map(space).collect(),
    }
}

fn node(tree: TreeNode) -> MapNode {
    MapNode {
        name: tree.name,
        owner: tree.owner,
        kind: tree.kind.to_owned(),
        first: tree.range.first(),
        last: tree.range.last(),
        priority: tree.priority,
        enabled: tree.enabled,
        alias_of: tree.alias_of.map(|(region, part)| MapAlias {
            region,
            first: part.first(),
            last: part.last(),
        }),
        children: tree.children.into_iter().map(node).collect(),
    }
}

fn range(flat: FlatNode) -> MapRange {
    MapRange {
        first: flat.range.first(),
        last: flat.range.last(),
        name: flat.name,
        owner: flat.owner,
        kind: flat.kind.to_owned(),
        offset: flat.offset,
    }
}
