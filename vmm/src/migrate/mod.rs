//! Migrations: starts the engine's threads and shows them to the API.

mod conflicts;
mod copies;
mod core_dump;
mod destination;
mod freeze;
mod history;
mod journals;
mod mirror;
mod offer;
mod overlays;
mod receive;
mod reported;
mod restore;
mod snapshot;
mod source;
mod standing;
mod storage;
mod taps;
mod threads;
mod trust;

use std::path::Path;
use std::str::FromStr as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use control::{
    Accepted, Category, Migrate, Migration, Registry, RequestError, SnapshotOf, VmHandle,
    not_recording,
};
use hypervisor::arch::{CpuId, kvm_cpuid_entry2};
use migration::snapshot::Recorder;
use migration::{
    Decision, Dial, Endpoint, MAX_CONNECTIONS, Outcome, Phase, Policy, Progress, Report,
    Resolution, Sending, Side, TlsDial, send,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use spec::{
    AwaitMigration, FieldProblem, FindOverlays, ForkVm, MemoryMode, MergeSnapshots,
    MigrationDowntime, MigrationError, MigrationInfo, MigrationOutcome, MigrationPhase,
    MigrationSide, MirrorDisk, OverlayInfo, RecordWorkingSet, RestoreConfig, StartMigration,
    VmConfig, VmCoredumpData, VmId, VmSnapshotConfig,
};
use tokio::sync::watch;

pub(crate) use self::freeze::name_overlay;
pub(crate) use self::journals::Journals;
pub(crate) use self::mirror::MirrorTargets;
pub(crate) use self::receive::Endpoints;
pub use self::snapshot::snapshot_config;
use self::source::{Listed, SourceVm};
use self::storage::{BaseNotes, Selection};
pub(crate) use self::storage::{KnownBases, image_refusal, remove_leftovers};
use self::threads::{Ending, start};
pub use self::trust::MigrationTrust;
use crate::driver::Purpose;
use crate::pool::Pool;

/// The source's description of its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineOffer {
    /// Version of this structure.
    version: u32,
    config: VmConfig,
    /// PCI addresses of the devices: device and function number in a byte.
    places: std::collections::BTreeMap<String, u8>,
    /// Function, index, flags, EAX, EBX, ECX, EDX.
    cpuid: Vec<[u32; 7]>,
    /// The value of `IA32_ARCH_CAPABILITIES`, if CPUID shows that MSR. Absent from older sources.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    arch_capabilities: Option<u64>,
    /// The images of disks whose content is copied, by the disks' names. Absent where there is none.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    images: std::collections::BTreeMap<String, storage::CopiedImage>,
    /// Disks whose images are frozen, in a snapshot. Each VM that is made gets overlays of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    frozen: Vec<String>,
}

const OFFER_VERSION: u32 = 1;

/// How long the answer to `resolve` waits for the engine. A source that is connected decides within the
/// 10 s of its patience.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(15);

fn rows(cpuid: &CpuId) -> Vec<[u32; 7]> {
    let row = |e: &kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
    cpuid.as_slice().iter().map(row).collect()
}

fn cpuid(rows: &[[u32; 7]]) -> Option<CpuId> {
    let entry = |&[function, index, flags, eax, ebx, ecx, edx]: &[u32; 7]| kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let entries: Vec<_> = rows.iter().map(entry).collect();
    CpuId::from_entries(&entries).ok()
}

/// A migration, as this side sees it.
struct ActiveMigration {
    id: uuid::Uuid,
    side: MigrationSide,
    vm: Mutex<Option<VmId>>,
    /// The disk that is mirrored.
    disk: Option<String>,
    endpoint: String,
    started_ms: u64,
    /// Whether the connections are encrypted.
    tls: bool,
    /// The stop to aim for, which only a source knows.
    max_downtime_ms: Option<u64>,
    progress: Progress,
    decision: Decision,
    over: watch::Sender<bool>,
    /// Becomes true when it is known whether the VM is there; pages of its memory may follow.
    settled: watch::Sender<bool>,
    /// The VMs that are made from a snapshot.
    makes: Mutex<Vec<VmId>>,
    /// For each base of a copied disk, whether it is copied, and why.
    bases: BaseNotes,
    /// The recording of a working set.
    recorder: Option<Recorder>,
    /// A destination listens, if only to answer a source that missed the outcome.
    has_endpoint: AtomicBool,
    /// An event of the VM that a destination made says that its guest did not come.
    end_is_recorded: AtomicBool,
}

impl ActiveMigration {
    fn new(side: MigrationSide, vm: Option<VmId>, endpoint: String) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let started = since_1970.unwrap_or_default().as_millis();
        Self {
            id: uuid::Uuid::new_v4(),
            side,
            vm: Mutex::new(vm),
            disk: None,
            endpoint,
            started_ms: u64::try_from(started).unwrap_or(u64::MAX),
            tls: false,
            max_downtime_ms: None,
            progress: Progress::default(),
            decision: Decision::default(),
            over: watch::Sender::new(false),
            settled: watch::Sender::new(false),
            makes: Mutex::default(),
            bases: BaseNotes::default(),
            recorder: None,
            has_endpoint: AtomicBool::new(false),
            end_is_recorded: AtomicBool::new(false),
        }
    }
}

impl ActiveMigration {
    /// Nothing follows any more.
    fn end(&self) {
        self.settled.send_replace(true);
        self.over.send_replace(true);
    }

    /// Logs what came of the migration: the last line that it leaves.
    fn log_end(&self) {
        let report = self.progress.report();
        let vm = self.vm.lock().clone();
        tracing::info!(
            migration = %self.id,
            side = ?self.side,
            vm = vm.as_ref().map(VmId::as_str),
            endpoint = self.endpoint,
            phase = %phase(report.phase),
            elapsed_us = report.elapsed_us,
            memory_bytes = report.memory_bytes,
            disk_bytes = report.disk_bytes,
            sent_bytes = report.sent_bytes,
            pages = report.pages,
            zero_pages = report.zero_pages,
            verified_pages = report.verified_pages,
            rounds = report.rounds,
            called_off = report.called_off,
            predicted_downtime_us = report.predicted_downtime_us,
            downtime_us = report.downtime.map(|downtime| downtime.total_us),
            first_instruction_us = report.first_instruction_us,
            working_set_pages = report.working_set_pages,
            working_set_us = report.working_set_us,
            error = report.error.map(|error| error.to_string()),
            "migration: ends"
        );
    }
}

pub(crate) fn phase(phase: Phase) -> MigrationPhase {
    match phase {
        Phase::Connecting => MigrationPhase::Connecting,
        Phase::Preparing => MigrationPhase::Preparing,
        Phase::Precopy => MigrationPhase::Precopy,
        Phase::Stopped => MigrationPhase::Stopped,
        Phase::Copying => MigrationPhase::Copying,
        Phase::HandingOver => MigrationPhase::HandingOver,
        Phase::Postcopy => MigrationPhase::Postcopy,
        Phase::PostcopyPaused => MigrationPhase::PostcopyPaused,
        Phase::InDoubt => MigrationPhase::InDoubt,
        Phase::Completed => MigrationPhase::Completed,
        Phase::Canceled => MigrationPhase::Canceled,
        Phase::Failed => MigrationPhase::Failed,
    }
}

impl Migration for ActiveMigration {
    fn info(&self) -> MigrationInfo {
        let report: Report = self.progress.report();
        let eta = (report.bytes_per_second > 0 && !report.phase.is_over()).then(|| {
            let memory = u128::from(report.remaining_pages) * u128::from(memory::PAGE_SIZE);
            let bytes = memory + u128::from(report.disk_remaining_bytes);
            let us = bytes * 1_000_000 / u128::from(report.bytes_per_second);
            u64::try_from(us).unwrap_or(u64::MAX)
        });
        MigrationInfo {
            id: self.id.to_string(),
            side: self.side,
            vm: self.vm.lock().clone(),
            disk: self.disk.clone(),
            bases: self.bases.all(),
            endpoint: self.endpoint.clone(),
            started_ms: self.started_ms,
            elapsed_us: report.elapsed_us,
            phase: phase(report.phase),
            memory_bytes: report.memory_bytes,
            disk_bytes: report.disk_bytes,
            disk_remaining_bytes: report.disk_remaining_bytes,
            sent_bytes: report.sent_bytes,
            pages: report.pages,
            zero_pages: report.zero_pages,
            verified_pages: report.verified_pages,
            remaining_pages: report.remaining_pages,
            rounds: report.rounds,
            history: report.history.into_iter().map(reported::round).collect(),
            timeline: report.timeline.into_iter().map(reported::step).collect(),
            dirty_pages_per_second: report.dirty_pages_per_second,
            bytes_per_second: report.bytes_per_second,
            throttle_percent: report.throttle_percent,
            connections: report.connections,
            tls: self.tls,
            max_downtime_ms: self.max_downtime_ms,
            eta_us: eta,
            predicted_downtime_us: report.predicted_downtime_us,
            called_off: report.called_off,
            downtime: report.downtime.map(|downtime| MigrationDowntime {
                total_us: downtime.total_us,
                pause_us: downtime.pause_us,
                save_us: downtime.save_us,
                transfer_us: downtime.transfer_us,
                load_us: downtime.load_us,
                hand_over_us: downtime.hand_over_us,
                verify_us: downtime.verify_us,
                protect_us: downtime.protect_us,
                pages: downtime.pages,
            }),
            undecided_us: report.undecided_us,
            faults: report.faults,
            disk_faults: report.disk_faults,
            fault_p50_us: report.fault_p50_us,
            fault_p99_us: report.fault_p99_us,
            first_instruction_us: report.first_instruction_us,
            working_set_pages: report.working_set_pages,
            working_set_us: report.working_set_us,
            error: report.error.map(|error| MigrationError {
                code: error.code,
                detail: error.detail,
            }),
        }
    }

    fn cancel(&self) -> Result<(), RequestError> {
        if self.progress.report().phase.is_over() {
            if self.has_endpoint.load(Ordering::Acquire) {
                // What is left of it is its endpoint, which is free as soon as it is not answered.
                self.decision.relieve();
                return Ok(());
            }
            let detail = "the migration is over";
            return Err(RequestError::new(
                Category::Conflict,
                "migration-over",
                detail,
            ));
        }
        let is_recording = self.recorder.as_ref().is_some_and(Recorder::cancel);
        let canceled = self.decision.cancel();
        if is_recording {
            // Before the commit point this cancels the restore, behind it the recording only.
            return Ok(());
        }
        canceled.map_err(|late| {
            RequestError::new(Category::Conflict, "migration-committed", late.to_string())
        })
    }

    fn resolve(&self, outcome: MigrationOutcome) -> Result<(), RequestError> {
        let resolution = match outcome {
            MigrationOutcome::Run => Resolution::Run,
            MigrationOutcome::Discard => Resolution::Discard,
        };
        if self.decision.resolve(resolution) {
            let acted_on = self.decision.outcome(RESOLVE_PATIENCE);
            return acted_on
                .map_err(|why| RequestError::new(Category::Conflict, &why.code, why.detail));
        }
        let detail = "the migration is not in doubt";
        Err(RequestError::new(
            Category::Conflict,
            "migration-not-in-doubt",
            detail,
        ))
    }

    fn end_recording(&self) -> Result<(), RequestError> {
        let recorder = self.recorder.as_ref();
        match recorder.is_some_and(Recorder::ready) {
            true => Ok(()),
            false => Err(not_recording()),
        }
    }

    fn over(&self) -> watch::Receiver<bool> {
        self.over.subscribe()
    }

    fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    fn vms(&self) -> Vec<VmId> {
        let made = self.makes.lock().clone();
        match made.is_empty() {
            true => self.vm.lock().clone().into_iter().collect(),
            false => made,
        }
    }
}

fn endpoint(field: &str, text: &str) -> Result<Endpoint, RequestError> {
    Endpoint::from_str(text).map_err(|error| invalid(field, error.to_string()))
}

fn invalid(field: &str, detail: String) -> RequestError {
    RequestError::invalid(vec![FieldProblem {
        pointer: format!("/{field}"),
        code: "invalid".to_owned(),
        detail,
    }])
}

fn positive(field: &str, value: u64) -> Result<u64, RequestError> {
    match value {
        0 => Err(invalid(field, format!("`{field}` must be at least 1"))),
        some => Ok(some),
    }
}

fn milliseconds(field: &str, value: Option<u64>) -> Result<Option<Duration>, RequestError> {
    let value = value.map(|value| positive(field, value).map(Duration::from_millis));
    value.transpose()
}

fn policy(what: &StartMigration) -> Result<Policy, RequestError> {
    if let Some(connections) = what.connections
        && !(1..=MAX_CONNECTIONS).contains(&connections)
    {
        let detail = format!("`connections` ({connections}) must be 1 to {MAX_CONNECTIONS}");
        return Err(invalid("connections", detail));
    }
    if what.local && !what.destination.starts_with("unix:") {
        let detail = "`local` needs a destination `unix:PATH` on this host";
        return Err(invalid("local", detail.to_owned()));
    }
    if let Some(bandwidth) = what.max_bandwidth {
        positive("max_bandwidth", bandwidth)?;
    }
    Ok(Policy {
        max_downtime: Duration::from_millis(positive("max_downtime_ms", what.max_downtime_ms)?),
        deadline: Some(Duration::from_secs(positive(
            "deadline_s",
            what.deadline_s,
        )?)),
        at_deadline: match what.at_deadline() {
            spec::AtDeadline::Cancel => migration::AtDeadline::Cancel,
            spec::AtDeadline::Throttle => migration::AtDeadline::Throttle,
            spec::AtDeadline::Postcopy => migration::AtDeadline::Postcopy,
            spec::AtDeadline::Stop => migration::AtDeadline::Stop,
        },
        mode: match what.mode {
            MemoryMode::Auto => migration::Mode::Auto,
            MemoryMode::Precopy => migration::Mode::Precopy,
            MemoryMode::Hybrid => migration::Mode::Hybrid,
            MemoryMode::Postcopy => migration::Mode::Postcopy,
        },
        connections: what.connections,
        max_bandwidth: what.max_bandwidth,
        local: what.local,
        resume: what.resume,
        verify: what.verify,
        stop_limit: milliseconds("stop_limit_ms", what.stop_limit_ms)?,
        hold: milliseconds("hold_ms", what.hold_ms)?,
        ..Policy::default()
    })
}

impl Migrate for Pool {
    fn history(&self) -> Vec<Arc<dyn Migration>> {
        history::all(self.journals())
    }

    fn send(
        &self,
        registry: &Registry,
        vm: &VmHandle,
        what: &StartMigration,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        let policy = policy(what)?;
        let place = endpoint("destination", &what.destination)?;
        self.trust()
            .check_plaintext(&place, what.tls_dir.is_some(), what.insecure)?;
        let shown = place.to_string();
        let dial: Box<dyn Dial> = match &what.tls_dir {
            None => Box::new(place),
            Some(dir) => {
                let dial = TlsDial::new(place, Path::new(dir));
                Box::new(dial.map_err(|error| invalid("tls_dir", error.to_string()))?)
            }
        };
        let selection = Selection::new(what, &vm.info().config)?;
        let id = vm.id().clone();
        let moving = Arc::new(ActiveMigration {
            tls: what.tls_dir.is_some(),
            max_downtime_ms: Some(what.max_downtime_ms),
            ..ActiveMigration::new(MigrationSide::Source, Some(id.clone()), shown)
        });
        let caller = self.caller(&id).ok_or_else(RequestError::driver_gone)?;
        let (decision, progress) = (moving.decision.clone(), moving.progress.clone());
        let parts =
            caller.call(move |driver, _| driver.depart(Purpose::Move, &decision, &progress));
        let parts = parts.map_err(|_| RequestError::driver_gone())??;
        let journals = self.journals().clone();
        let mut journal = journals
            .open(moving.id, Side::Source, id.as_str(), &moving.endpoint)
            .map_err(|error| Journals::unwritable(&error))?;
        let (registry, vm, ours) = (registry.clone(), vm.clone(), Arc::clone(&moving));
        let known = Arc::clone(self.known_bases());
        let span = tracing::error_span!("vm", %id);
        start("migrate-out", span, &moving, move || {
            let memory = parts.ram.plugged_len();
            tracing::info!(
                migration = %ours.id,
                vm = id.as_str(),
                endpoint = ours.endpoint,
                mode = ?policy.mode,
                memory_bytes = memory,
                verify = policy.verify,
                "migration: begins"
            );
            let listed = Listed {
                registry,
                vm,
                destination: ours.endpoint.clone(),
            };
            let mut source = SourceVm::moving(id.clone(), parts, listed, &selection);
            // Before it connects: a destination does not wait for long.
            source.identify_bases(&known, &ours);
            let sending = Sending {
                id: ours.id,
                policy: &policy,
                dial: &*dial,
                journal: &mut *journal,
                progress: &ours.progress,
                decision: &ours.decision,
            };
            let outcome = send(sending, &mut source);
            ours.log_end();
            drop(source);
            if let Outcome::Stayed {
                pending_abort: Some(pending_abort),
                ..
            } = outcome
            {
                ours.end();
                pending_abort.send(&*dial);
            }
            journals.forget(ours.id, Side::Source);
        })?;
        Ok(moving)
    }

    fn receive(
        &self,
        registry: &Registry,
        what: &AwaitMigration,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        receive::begin(self, registry, what)
    }

    fn accept(
        &self,
        registry: &Registry,
        what: &AwaitMigration,
        accepted: Accepted,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        standing::begin(self, registry, what, accepted)
    }

    fn snapshot(
        &self,
        vm: &VmHandle,
        what: &VmSnapshotConfig,
        of: SnapshotOf,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        snapshot::take(self, vm, what, of)
    }

    fn merge(&self, what: &MergeSnapshots) -> Result<Arc<dyn Migration>, RequestError> {
        snapshot::merge_chain(what, &self.host().image_dirs)
    }

    fn overlays(
        &self,
        registry: &Registry,
        what: &FindOverlays,
    ) -> Result<Vec<OverlayInfo>, RequestError> {
        overlays::find(registry, what)
    }

    fn core_dump(
        &self,
        vm: &VmHandle,
        what: &VmCoredumpData,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        core_dump::begin(self, vm, what)
    }

    fn mirror(
        &self,
        vm: &VmHandle,
        disk: &str,
        what: &MirrorDisk,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        mirror::begin(self, vm, disk, what)
    }

    fn restore(
        &self,
        registry: &Registry,
        vm: &VmId,
        what: &RestoreConfig,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        restore::begin_restore(self, registry, vm, what)
    }

    fn record(
        &self,
        registry: &Registry,
        vm: &VmId,
        what: &RecordWorkingSet,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        restore::begin_recording(self, registry, vm, what)
    }

    fn fork(
        &self,
        registry: &Registry,
        vm: &VmHandle,
        what: &ForkVm,
    ) -> Result<Arc<dyn Migration>, RequestError> {
        restore::begin_fork(self, registry, vm, what)
    }
}
