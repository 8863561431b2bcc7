//! Waiting for a guest from another service, and the endpoints at which this process does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use control::{Category, Migration, Registry, RequestError};
use migration::{Accept, Endpoint, Listener, Policy, Receiving, TlsListener, receive};
use parking_lot::{Condvar, Mutex};
use spec::{AwaitMigration, MigrationSide};

use super::destination::{DestinationHost, GuestOrigin, record_failure};
use super::taps::GivenTaps;
use super::trust::Allowed;
use super::{ActiveMigration, endpoint, invalid, start};
use crate::pool::Pool;

/// How long a migration that is over or canceled may take to give its endpoint up.
const RELIEF: Duration = Duration::from_secs(5);

/// The migrations that have an endpoint of this process.
///
/// A destination whose migration is over keeps answering its source for a while, because the source
/// may have missed the outcome. When a request waits for another migration at the same endpoint, the
/// earlier one is relieved of that: the new session answers sources of earlier migrations from their
/// journals. A migration that was canceled ends at its next step, which the request waits for.
#[derive(Clone, Default)]
pub(crate) struct Endpoints(Arc<(Mutex<Vec<Held>>, Condvar)>);

struct Held {
    endpoint: Endpoint,
    migration: Arc<ActiveMigration>,
}

impl Endpoints {
    /// Has migrations that are over, or about to be, give this endpoint up.
    fn relieve(&self, wanted: &Endpoint) {
        let (all, changed) = &*self.0;
        let deadline = Instant::now() + RELIEF;
        let mut all = all.lock();
        loop {
            let over = all
                .iter()
                .filter(|held| is_ending(&held.migration) && is_same(&held.endpoint, wanted));
            if over.map(|held| held.migration.decision.relieve()).count() == 0 {
                return;
            }
            if changed.wait_until(&mut all, deadline).timed_out() {
                return;
            }
        }
    }

    fn hold(&self, endpoint: Endpoint, migration: &Arc<ActiveMigration>) {
        migration.has_endpoint.store(true, Ordering::Release);
        self.0.0.lock().push(Held {
            endpoint,
            migration: Arc::clone(migration),
        });
    }

    fn release(&self, migration: &Arc<ActiveMigration>) {
        migration.has_endpoint.store(false, Ordering::Release);
        let (all, changed) = &*self.0;
        all.lock()
            .retain(|held| !Arc::ptr_eq(&held.migration, migration));
        changed.notify_all();
    }
}

/// Whether a migration is over, or will be after its present step.
fn is_ending(migration: &ActiveMigration) -> bool {
    migration.decision.is_canceled() || migration.progress.report().phase.is_over()
}

/// Releases the endpoint of a migration, also after a panic.
struct HeldEndpoint {
    migration: Arc<ActiveMigration>,
    endpoints: Endpoints,
}

impl Drop for HeldEndpoint {
    fn drop(&mut self) {
        self.endpoints.release(&self.migration);
    }
}

/// Whether who listens at one is in the way of who listens at the other.
fn is_same(one: &Endpoint, other: &Endpoint) -> bool {
    /// The folder as the host knows it, for the file may be written in several ways.
    fn place(path: &Path) -> Option<PathBuf> {
        let folder = match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            folder => folder?,
        };
        Some(folder.canonicalize().ok()?.join(path.file_name()?))
    }
    match (one, other) {
        (Endpoint::Unix(one), Endpoint::Unix(other)) => {
            one == other || place(one).is_some_and(|one| place(other) == Some(one))
        }
        // By the port alone: an address may stand for all. One more that is over is relieved at worst.
        (Endpoint::Tcp(one), Endpoint::Tcp(other)) => {
            let port = |place: &str| place.rsplit_once(':').map(|(_, port)| port.to_owned());
            port(one) == port(other)
        }
        _ => false,
    }
}

/// A listener whose peers are known to be trusted, as far as a request and the operator say.
pub(super) struct Listening {
    pub(super) accept: Box<dyn Accept>,
    /// The address, with the port that the host chose for port 0.
    pub(super) bound: Endpoint,
    pub(super) allowed: Allowed,
}

/// Listens where a request says, for those whom it trusts.
pub(super) fn listen(pool: &Pool, what: &AwaitMigration) -> Result<Listening, RequestError> {
    let wanted = endpoint("listen", &what.listen)?;
    let trust = pool.trust();
    trust.check_plaintext(&wanted, what.tls_dir.is_some(), what.insecure)?;
    let allowed = trust.allowed(&wanted, what)?;
    let peers = match &what.tls_dir {
        Some(dir) => Some((dir, trust.peers(what)?)),
        None => None,
    };
    let unusable = |error: std::io::Error| {
        let detail = format!("cannot listen at {wanted}: {error}");
        RequestError::new(Category::Unprocessable, "endpoint-unusable", detail)
    };
    pool.endpoints().relieve(&wanted);
    let listener = Listener::bind(&wanted).map_err(unusable)?;
    let bound = listener.endpoint().map_err(unusable)?;
    let accept: Box<dyn Accept> = match peers {
        None => Box::new(listener),
        Some((dir, peers)) => {
            let listener = TlsListener::new(listener, Path::new(dir), peers);
            Box::new(listener.map_err(|error| invalid("tls_dir", error.to_string()))?)
        }
    };
    Ok(Listening {
        accept,
        bound,
        allowed,
    })
}

/// Begins to wait for a guest.
pub(super) fn begin(
    pool: &Pool,
    registry: &Registry,
    what: &AwaitMigration,
) -> Result<Arc<dyn Migration>, RequestError> {
    if let Some(vm) = &what.vm
        && registry.get(vm.as_str()).is_ok()
    {
        let detail = format!("a VM {:?} exists already", vm.as_str());
        return Err(RequestError::new(Category::Conflict, "vm-exists", detail));
    }
    let Listening {
        accept,
        bound,
        allowed,
    } = listen(pool, what)?;
    let moving = Arc::new(ActiveMigration {
        tls: what.tls_dir.is_some(),
        ..ActiveMigration::new(
            MigrationSide::Destination,
            what.vm.clone(),
            bound.to_string(),
        )
    });
    let host = DestinationHost::new(
        pool,
        registry.clone(),
        Arc::clone(&moving),
        allowed,
        GuestOrigin::Migration,
    )
    .resuming(what.resume)
    .with_taps(GivenTaps::new(what.net_fds.as_ref()));
    let (limit, once) = (pool.connection_limit(), what.once);
    let (ours, endpoints) = (Arc::clone(&moving), pool.endpoints());
    let (asked, registry) = (what.vm.clone(), registry.clone());
    // The VM is not known before an offer is accepted.
    let span = tracing::error_span!("migration", id = %moving.id);
    let held = HeldEndpoint {
        migration: Arc::clone(&moving),
        endpoints: endpoints.clone(),
    };
    endpoints.hold(bound, &moving);
    start("migrate-in", span, &moving, move || {
        let held = held;
        // Dropped before `held`: the endpoint is free before anyone hears so.
        let mut accept = accept;
        let record_end = || {
            // A VM that came may have ended before all of it was here, also if the request named none.
            let vm = asked.clone().or_else(|| ours.vm.lock().clone());
            if let Some(vm) = &vm {
                record_failure(&ours, &registry, vm, GuestOrigin::Migration);
            }
        };
        let receiving = Receiving {
            accept: &mut *accept,
            host: &host,
            progress: &ours.progress,
            decision: &ours.decision,
            limit: &limit,
            once,
            patience: Policy::default().patience,
            lingers: &|| {
                record_end();
                ours.end();
            },
        };
        tracing::info!(
            migration = %ours.id,
            endpoint = ours.endpoint,
            "migration: waiting for a source"
        );
        if let Some(vm) = &asked {
            let detail = format!("at {}", ours.endpoint);
            registry.record(vm, "awaited", Some(detail));
        }
        // The report has the failure, if it failed.
        let _ = receive(receiving);
        record_end();
        ours.log_end();
        drop(accept);
        drop(held);
    })?;
    Ok(moving)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_endpoints_compare_equal() {
        let dir = tempfile::tempdir().unwrap();
        let unix = |name: &str| Endpoint::Unix(dir.path().join(name));
        std::fs::create_dir(dir.path().join("d")).unwrap();
        assert!(is_same(&unix("m"), &unix("m")));
        assert!(is_same(&unix("m"), &unix("d/../m")));
        assert!(!is_same(&unix("m"), &unix("d/m")));
        let tcp = |place: &str| Endpoint::Tcp(place.to_owned());
        assert!(is_same(&tcp("0.0.0.0:7000"), &tcp("host-b:7000")));
        assert!(!is_same(&tcp("0.0.0.0:7000"), &tcp("0.0.0.0:7001")));
        assert!(!is_same(&unix("m"), &tcp("h:1")));
    }
}
