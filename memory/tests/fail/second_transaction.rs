use memory::Topology;

fn main() {
    let mut topology = Topology::new();
    let outer = topology.begin();
    let inner = topology.begin();
    inner.abort();
    outer.abort();
}
