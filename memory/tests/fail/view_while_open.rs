use memory::{SpaceKind, Topology};

fn main() {
    let mut topology = Topology::new();
    let tx = topology.begin();
    let space = topology.space(SpaceKind::Memory);
    tx.commit().unwrap();
    drop(space.view());
}
