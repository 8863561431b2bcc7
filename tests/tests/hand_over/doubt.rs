//! VMs of whose guest the place is not known.

use std::time::Duration;

use openapi::News;
use spec::{MigrationOutcome, ResolveMigration, VmId, VmState};
use tests::Service;

/// Nothing can be done with a VM of whose guest the place is not known, and the refusal says what helps.
pub(crate) async fn refused_with_advice(at: &Service, vm: &VmId) {
    let client = at.client();
    let mut refused = vec![client.vms_delete(vm).await];
    // A destination in doubt has not begun to run its guest, and `resume` is refused for its state.
    if client.vms_info(vm).await.unwrap().state == VmState::Paused {
        refused.push(client.vms_resume(vm).await);
    }
    for refused in refused {
        let told = refused.unwrap_err().to_string();
        assert!(told.contains("resolve-migration ID discard"), "{told}");
    }
}

/// Waits until an event of the VM is in the log.
pub(crate) async fn happened(at: &Service, vm: &VmId, name: &str) {
    let mut events = at.client().events(Some(0), Some(vm)).await.unwrap();
    loop {
        let next = tokio::time::timeout(Duration::from_secs(60), events.next()).await;
        match next.unwrap().unwrap() {
            Some(News::Happened(event)) if event.event == name => return,
            Some(_) => {}
            None => unreachable!("the events of {vm} ended"),
        }
    }
}

pub(crate) async fn resolve(at: &Service, id: &VmId, outcome: MigrationOutcome) {
    let body = ResolveMigration { outcome };
    at.client().migrations_resolve(id, &body).await.unwrap();
}
