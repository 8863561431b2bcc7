//! Migrations on Cloud Hypervisor's face, over an engine that ends them when a test says so.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::Service;
use axum::Router;
use axum::body::Body;
use control::fake::Fake;
use control::{
    Accepted, Category, EventLog, Migrate, Migration, Registry, RequestError, SnapshotOf, Spawn,
    VmHandle,
};
use harness::{Answer, CONFIG, call, expect, one_vm, send};
use http::Request;
use serde_json::json;
use spec::{
    AwaitMigration, FindOverlays, ForkVm, HostLimits, MergeSnapshots, MigrationInfo,
    MigrationOutcome, MirrorDisk, OverlayInfo, RestoreConfig, StartMigration, VmConfig,
    VmCoredumpData, VmId, VmSnapshotConfig, VmmPingResponse,
};
use tokio::sync::watch;

const SEND: &str = "PUT /api/v1/vm.send-migration";
const CANCEL: &str = "PUT /api/v1/vm.cancel-migration";
const PROGRESS: &str = "GET /api/v1/vm.migration-progress";

/// A migration in a phase that the test sets.
#[derive(Clone)]
struct Scripted {
    info: Arc<Mutex<MigrationInfo>>,
    over: watch::Sender<bool>,
}

impl Scripted {
    fn new(vm: &VmId, endpoint: &str) -> Self {
        let info = json!({
            "id": "m", "side": "source", "vm": vm, "endpoint": endpoint, "started_ms": 0,
            "elapsed_us": 0, "phase": "precopy", "memory_bytes": 4096, "sent_bytes": 0, "pages": 0,
            "zero_pages": 0, "remaining_pages": 0, "rounds": 1, "dirty_pages_per_second": 0,
            "bytes_per_second": 0, "throttle_percent": 0, "connections": 1, "faults": 0,
            "fault_p50_us": 0, "fault_p99_us": 0,
        });
        Self {
            info: Arc::new(Mutex::new(serde_json::from_value(info).unwrap())),
            over: watch::Sender::new(false),
        }
    }

    fn end(&self, phase: &str) {
        let mut info = self.info.lock().unwrap();
        info.phase = serde_json::from_value(json!(phase)).unwrap();
        self.over.send_replace(true);
    }
}

impl Migration for Scripted {
    fn info(&self) -> MigrationInfo {
        self.info.lock().unwrap().clone()
    }

    fn cancel(&self) -> Result<(), RequestError> {
        self.end("canceled");
        Ok(())
    }

    fn resolve(&self, _: MigrationOutcome) -> Result<(), RequestError> {
        Ok(())
    }

    fn over(&self) -> watch::Receiver<bool> {
        self.over.subscribe()
    }
}

/// Drivers that do nothing, and an engine whose last migration the test holds.
#[derive(Clone, Default)]
struct Engine {
    drivers: Fake,
    last: Arc<Mutex<Option<Scripted>>>,
}

impl Engine {
    fn start(&self, vm: &VmId, endpoint: &str) -> Arc<dyn Migration> {
        let migration = Scripted::new(vm, endpoint);
        *self.last.lock().unwrap() = Some(migration.clone());
        Arc::new(migration)
    }

    fn last(&self) -> Option<Scripted> {
        self.last.lock().unwrap().clone()
    }
}

fn unsupported<T>() -> Result<T, RequestError> {
    Err(RequestError::new(
        Category::Unsupported,
        "not-supported",
        "not in this test",
    ))
}

impl Migrate for Engine {
    fn send(
        &self,
        _: &Registry,
        vm: &VmHandle,
        what: &StartMigration,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        Ok(self.start(vm.id(), &what.destination))
    }

    fn receive(
        &self,
        _: &Registry,
        _: &AwaitMigration,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        unsupported()
    }

    fn accept(
        &self,
        _: &Registry,
        _: &AwaitMigration,
        _: Accepted,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        unsupported()
    }

    fn snapshot(
        &self,
        vm: &VmHandle,
        what: &VmSnapshotConfig,
        _: SnapshotOf,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let snapshot = self.start(vm.id(), &what.destination_url);
        self.last().unwrap().end("completed");
        Ok(snapshot)
    }

    fn merge(&self, _: &MergeSnapshots) -> Result<Arc<dyn Migration>, RequestError> {
        unsupported()
    }

    fn overlays(&self, _: &Registry, _: &FindOverlays) -> Result<Vec<OverlayInfo>, RequestError> {
        unsupported()
    }

    fn core_dump(
        &self,
        vm: &VmHandle,
        what: &VmCoredumpData,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let dump = self.start(vm.id(), &what.destination_url);
        self.last().unwrap().end("completed");
        Ok(dump)
    }

    fn mirror(
        &self,
        vm: &VmHandle,
        disk: &str,
        what: &MirrorDisk,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        assert_eq!(disk, "data");
        Ok(self.start(vm.id(), &what.path))
    }

    fn restore(
        &self,
        _: &Registry,
        _: &VmId,
        _: &RestoreConfig,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        unsupported()
    }

    fn record(
        &self,
        _: &Registry,
        _: &VmId,
        _: &spec::RecordWorkingSet,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        unsupported()
    }

    fn fork(
        &self,
        _: &Registry,
        _: &VmHandle,
        _: &ForkVm,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        unsupported()
    }
}

impl Spawn for Engine {
    fn spawn(
        &self,
        id: &VmId,
        config: Arc<VmConfig>,
        events: EventLog,
    ) -> Result<VmHandle, RequestError> {
        self.drivers.spawn(id, config, events)
    }

    fn host_limits(&self) -> HostLimits {
        self.drivers.host_limits()
    }

    fn host_cpu(&self) -> spec::HostCpu {
        self.drivers.host_cpu()
    }

    fn check_cpu(&self, guest: &spec::CpuDescription) -> Result<spec::CpuCheck, RequestError> {
        self.drivers.check_cpu(guest)
    }

    fn mover(&self) -> Option<&dyn Migrate> {
        Some(self)
    }
}

/// A booted VM's socket that claims this version of Cloud Hypervisor.
async fn claiming(version: &str) -> (Engine, Router) {
    let engine = Engine::default();
    let about = VmmPingResponse {
        build_version: "v0.1.0".to_owned(),
        version: "0.1.0".to_owned(),
        pid: 42,
        features: vec![],
    };
    let service = Service::new(Registry::new(engine.clone()), about);
    let router = one_vm(&service.claiming(version.parse().unwrap()));
    expect(&router, "PUT /api/v1/vm.create", CONFIG, 204).await;
    expect(&router, "PUT /api/v1/vm.boot", "", 204).await;
    (engine, router)
}

fn body() -> String {
    json!({ "destination_url": "unix:/m" }).to_string()
}

/// Sends the VM with a preference, and ends the migration once the handler waits for that. Returns the
/// answer and whether it came before the end.
async fn sent(version: &str, prefer: Option<&str>, phase: &str) -> (Answer, bool) {
    let (engine, router) = claiming(version).await;
    let mut request = Request::put("/api/v1/vm.send-migration");
    if let Some(prefer) = prefer {
        request = request.header("prefer", prefer);
    }
    let request = request.body(Body::from(body())).unwrap();
    let answering = tokio::spawn(async move { send(&router, request).await });
    loop {
        if answering.is_finished() {
            return (answering.await.unwrap(), true);
        }
        let is_awaited = |migration: &Scripted| migration.over.receiver_count() > 0;
        if let Some(migration) = engine.last().filter(is_awaited) {
            migration.end(phase);
            return (answering.await.unwrap(), false);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn answer_comes_at_once_from_version_53_on() {
    for version in ["54.0.0", "53.0"] {
        let (answer, early) = sent(version, None, "completed").await;
        assert_eq!((answer.status.as_u16(), early), (204, true), "{version}");
    }
}

#[tokio::test]
async fn older_claim_or_preference_has_the_answer_at_the_end() {
    for (version, prefer) in [
        ("52.0", None),
        ("35.1", None),
        ("54.0.0", Some("wait=600")),
        ("54.0.0", Some("respond-async; x=1, Wait=\"600\"")),
    ] {
        for (phase, status) in [("completed", 204), ("failed", 500)] {
            let (answer, early) = sent(version, prefer, phase).await;
            let got = (answer.status.as_u16(), early);
            assert_eq!(got, (status, false), "{version} {prefer:?}");
        }
    }
}

#[tokio::test]
async fn preference_limits_the_wait() {
    for prefer in ["wait", "wait=-1", "wait=soon", "return=minimal"] {
        let (answer, early) = sent("54.0.0", Some(prefer), "completed").await;
        assert_eq!((answer.status.as_u16(), early), (204, true), "{prefer}");
    }
    // Nothing ends this one.
    let (_engine, router) = claiming("51.0").await;
    let request = Request::put("/api/v1/vm.send-migration").header("prefer", "wait=0");
    let answer = send(&router, request.body(Body::from(body())).unwrap()).await;
    assert_eq!(answer.status.as_u16(), 204);
}

#[tokio::test]
async fn migration_is_followed_and_canceled() {
    let (engine, router) = claiming("54.0.0").await;
    expect(&router, PROGRESS, "", 404).await;
    expect(&router, CANCEL, "", 404).await;
    // A snapshot is no migration to these clients.
    let snapshot = json!({ "destination_url": "file:///s" }).to_string();
    let taken = call(&router, "PUT /api/v1/vm.snapshot", &snapshot).await;
    assert_eq!(taken.status.as_u16(), 204, "{taken:?}");
    let dump = json!({ "destination_url": "file:///core" }).to_string();
    expect(&router, "PUT /api/v1/vm.coredump", &dump, 204).await;
    expect(&router, PROGRESS, "", 404).await;

    expect(&router, SEND, &body(), 204).await;
    let progress = expect(&router, PROGRESS, "", 200).await.json();
    assert_eq!(progress["state"]["Ongoing"]["phase"], "MemoryPrecopy");
    assert_eq!(
        progress["memory_transmission_info"]["memory_bytes_total"],
        4096
    );
    expect(&router, CANCEL, "", 204).await;
    let progress = expect(&router, PROGRESS, "", 200).await.json();
    assert_eq!(progress["state"], json!({ "Cancelled": {} }));
    let late = expect(&router, CANCEL, "", 409).await;
    assert_eq!(late.code(), "migration-over");

    expect(&router, SEND, &body(), 204).await;
    engine.last().unwrap().end("completed");
    // The VM has gone with it, and its end is still shown.
    expect(&router, "PUT /api/v1/vm.delete", "", 204).await;
    let progress = expect(&router, PROGRESS, "", 200).await.json();
    assert_eq!(progress["state"], json!({ "Finished": {} }));
}

#[tokio::test]
async fn ping_shows_the_claimed_version_and_the_own() {
    let (_, router) = claiming("51.1").await;
    let ping = expect(&router, "GET /api/v1/vmm.ping", "", 200)
        .await
        .json();
    assert_eq!(ping["version"], "51.1.0");
    assert_eq!(ping["build_version"], "v51.1.0-whimbrel-0.1.0");
}
