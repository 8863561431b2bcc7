//! The offer of a guest, for peers that make it in the source's place.

use std::time::Duration;

use migration::testing::Peer;
use migration::{Accept as _, Endpoint, Listener, Offer};
use serde_json::json;
use spec::{MigrationInfo, StartMigration, VmId};
use tests::Service;

/// A bound, and no measure: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(300);

/// Captures the source's offer: a hostile destination listens, and refuses it.
pub(crate) async fn capture(source: &Service, vm: &VmId) -> Offer {
    let at = Endpoint::Unix(source.path("captured"));
    let mut listener = Listener::bind(&at).unwrap();
    let what = StartMigration::to(at.to_string());
    let begun = source.client().vms_migrate(vm, &what).await.unwrap();
    let stream = listener.accept(PATIENCE).unwrap().unwrap();
    let (mut peer, _) = Peer::accepted(stream);
    assert!(peer.say(&json!({ "Welcome": { "version": 1 } })));
    let offer = peer.recv_offer();
    assert!(peer.say(&json!({ "Refused": { "code": "no", "detail": "no" } })));
    let is_over = |info: &MigrationInfo| info.phase.is_over();
    let begun = begun.id.parse().unwrap();
    source.until(&begun, PATIENCE, is_over).await.unwrap();
    offer
}
