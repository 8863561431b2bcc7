use memory::{CommitError, Topology};

fn main() {
    let mut topology = Topology::new();
    let _ = topology.transaction(|tx| -> Result<(), CommitError> {
        tx.view().find(0x1000);
        Ok(())
    });
}
