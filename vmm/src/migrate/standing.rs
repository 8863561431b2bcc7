//! The standing receiver: accepts guests from other services for as long as this one runs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use control::{Accepted, Migration, Registry, RequestError};
use migration::{Accept, Arriving, Party, Policy, Standing, Stream, receive_all};
use spec::{AwaitMigration, MigrationSide};

use super::destination::{DestinationHost, GuestOrigin};
use super::receive::{Listening, listen};
use super::{ActiveMigration, Ending, start};
use crate::pool::Pool;

/// A listener that says when it is closed: the receiver settles then, though guests that it accepted
/// may still be on their way.
struct Closing {
    // Dropped first: the endpoint is free before anyone hears so.
    accept: Box<dyn Accept>,
    _settled: Settled,
}

struct Settled(Arc<ActiveMigration>);

impl Drop for Settled {
    fn drop(&mut self) {
        self.0.settled.send_replace(true);
    }
}

impl Accept for Closing {
    fn accept(&mut self, patience: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        self.accept.accept(patience)
    }
}

/// Begins to accept guests.
pub(super) fn begin(
    pool: &Pool,
    registry: &Registry,
    what: &AwaitMigration,
    accepted: Accepted,
) -> Result<Arc<dyn Migration>, RequestError> {
    let Listening {
        accept,
        bound,
        allowed,
    } = listen(pool, what)?;
    let endpoint = bound.to_string();
    let tls = what.tls_dir.is_some();
    let of_endpoint = move |endpoint: &str| {
        Arc::new(ActiveMigration {
            tls,
            ..ActiveMigration::new(MigrationSide::Destination, None, endpoint.to_owned())
        })
    };
    let wait = of_endpoint(&endpoint);
    let ours = Arc::clone(&wait);
    let (limit, journals) = (pool.connection_limit(), pool.journals().clone());
    let host = DestinationHost::new(
        pool,
        registry.clone(),
        Arc::clone(&wait),
        allowed,
        GuestOrigin::Migration,
    )
    .resuming(what.resume);
    let host = host.listed_by(accepted);
    // All lines share one span and so one limit: each offer of a stranger has a number of its own,
    // and would otherwise have a limit of its own.
    let span = tracing::error_span!("receiver", id = %wait.id);
    start("migrate-accept", span, &wait, move || {
        let arrives = |arriving: Arriving<'_>| {
            let moving = of_endpoint(&endpoint);
            let ending = Ending(Arc::clone(&moving));
            // The report has the failure, if it failed.
            let _ = arriving.receive(Party {
                host: &host.of(Arc::clone(&moving)),
                progress: &moving.progress,
                decision: &moving.decision,
                lingers: &|| moving.end(),
            });
            // A refused offer has a line already.
            if moving.vm.lock().is_some() {
                moving.log_end();
            }
            drop(ending);
        };
        tracing::info!(endpoint, "migration: accepting guests");
        let standing = Standing {
            accept: Box::new(Closing {
                accept,
                _settled: Settled(Arc::clone(&ours)),
            }),
            limit: &limit,
            fate: &|id| journals.fate(id),
            arrives: &arrives,
            progress: &ours.progress,
            decision: &ours.decision,
            patience: Policy::default().patience,
        };
        if let Err(why) = receive_all(standing) {
            tracing::error!(endpoint, %why, "migration: no more guests can be accepted");
        }
    })?;
    Ok(wait)
}
