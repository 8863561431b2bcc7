//! Endpoints of migrations that are over: their sources may have missed the outcome, and the operator
//! may wait for another guest there.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use spec::{AwaitMigration, MigrationInfo, MigrationPhase, StartMigration, VmId, VmState};
use tests::{Face, Frame, Proxy, Service, Side, Verdict, await_anyone, dirtier};

const PATIENCE: Duration = Duration::from_secs(60);

/// Two services, the first with a guest, and a proxy between them.
struct Pair {
    source: Service,
    destination: Service,
    vm: VmId,
    port: PathBuf,
    /// The endpoint of the destination.
    path: PathBuf,
    sent: VmId,
    received: VmId,
}

fn name(info: &MigrationInfo) -> VmId {
    info.id.parse().unwrap()
}

async fn await_at(at: &Service, path: &Path) -> VmId {
    let body = AwaitMigration::at(format!("unix:{}", path.display()));
    name(&at.client().migrations_receive(&body).await.unwrap())
}

async fn over(at: &Service, id: &VmId) -> MigrationPhase {
    let info = at.until(id, PATIENCE, |info| info.phase.is_over()).await;
    info.unwrap().phase
}

impl Pair {
    /// Begins to move the guest; `judge` gets the source's process, and a mark that is set once the order
    /// to migrate was answered.
    async fn begin<J>(judge: impl FnOnce(u32, Arc<AtomicBool>) -> J) -> Self
    where
        J: Fn(&Frame) -> Verdict + Send + Sync + 'static,
    {
        let (source, destination) =
            tokio::join!(Service::start(Face::Many), Service::start(Face::Many));
        let (source, destination) = (source.unwrap(), destination.unwrap());
        let (vm, port) = dirtier::boot(&source).await.unwrap();
        let (way, path) = (source.path("to"), destination.path("at"));
        let received = await_at(&destination, &path).await;
        // A migration that is not over keeps its endpoint.
        let again = AwaitMigration::at(format!("unix:{}", path.display()));
        let refused = destination.client().migrations_receive(&again).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("listens there already"), "{refused}");
        let begun = Arc::new(AtomicBool::new(false));
        Proxy::between(&way, &path, judge(source.pid(), begun.clone())).unwrap();
        let what = StartMigration::to(format!("unix:{}", way.display()));
        let sent = name(&source.client().vms_migrate(&vm, &what).await.unwrap());
        begun.store(true, Ordering::SeqCst);
        let phase = over(&destination, &received).await;
        assert_eq!(phase, MigrationPhase::Completed);
        Self {
            source,
            destination,
            vm,
            port,
            path,
            sent,
            received,
        }
    }

    async fn runs_at_destination(&self) {
        let info = self.destination.client().vms_info(&self.vm).await.unwrap();
        assert_eq!(info.state, VmState::Running);
        dirtier::check(&self.port).await.unwrap();
    }
}

fn is_running(frame: &Frame) -> bool {
    (frame.from, frame.name.as_str()) == (Side::Destination, "Running")
}

fn until_set(mark: &AtomicBool) {
    while !mark.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
}

/// The source misses the outcome, and before it asks, the operator waits for another guest at the same
/// path. The new session takes the path over, and answers for the one before.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_wait_takes_the_endpoint_over_and_answers_the_old_source() {
    let (fell, taken) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
    let is_taken = taken.clone();
    let pair = Pair::begin(|_, _| {
        move |frame: &Frame| {
            if is_running(frame) {
                fell.store(true, Ordering::SeqCst);
                return Verdict::Cut;
            }
            // The source asks again, and is held up on the way.
            if fell.load(Ordering::SeqCst) {
                until_set(&is_taken);
            }
            Verdict::Pass
        }
    })
    .await;
    let second = await_at(&pair.destination, &pair.path).await;
    taken.store(true, Ordering::SeqCst);
    assert_eq!(
        over(&pair.source, &pair.sent).await,
        MigrationPhase::Completed
    );
    assert!(pair.source.client().vms_list().await.unwrap().is_empty());
    pair.runs_at_destination().await;
    // The question did not use the new wait up; that can be canceled, and the first is over.
    let client = pair.destination.client();
    let info = client.migrations_info(&second).await.unwrap();
    assert_eq!(info.phase, MigrationPhase::Connecting);
    let refused = client.migrations_cancel(&pair.received).await;
    assert!(refused.unwrap_err().to_string().contains("is over"));
    client.migrations_cancel(&second).await.unwrap();
    over(&pair.destination, &second).await;
}

/// A wait that is called off is about to give its endpoint up: the next wait there takes it over.
#[tokio::test]
async fn an_endpoint_is_free_once_its_wait_is_canceled() {
    let service = Service::start(Face::Many).await.unwrap();
    let unix = format!("unix:{}", service.path("at").display());
    for listen in [unix.as_str(), "tcp:127.0.0.1:0"] {
        let mut wanted = await_anyone(listen);
        for _ in 0..3 {
            let waiting = service.client().migrations_receive(&wanted).await.unwrap();
            let canceled = service.client().migrations_cancel(&name(&waiting)).await;
            canceled.unwrap();
            // With the port that the host chose.
            wanted.listen = waiting.endpoint;
        }
    }
}

/// The source is dead and asks nothing: the operator frees the endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_is_freed_when_a_migration_that_is_over_is_deleted() {
    let pair = Pair::begin(|source, begun| {
        move |frame: &Frame| {
            if is_running(frame) {
                until_set(&begun);
                let pid = i32::try_from(source).ok().and_then(Pid::from_raw);
                kill_process(pid.unwrap(), Signal::KILL).unwrap();
                return Verdict::Cut;
            }
            Verdict::Pass
        }
    })
    .await;
    let client = pair.destination.client();
    assert!(pair.path.exists(), "it answers its source still");
    client.migrations_cancel(&pair.received).await.unwrap();
    let start = Instant::now();
    // As long as there is something to free, this is accepted.
    let refused = loop {
        match client.migrations_cancel(&pair.received).await {
            Ok(()) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(refused) => break refused.to_string(),
        }
        assert!(start.elapsed() < PATIENCE);
    };
    assert!(refused.contains("is over"), "{refused}");
    assert!(!pair.path.exists());
    pair.runs_at_destination().await;
}
