//! Moving VMs between services.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use control::{Migration, RequestError};
use http::header::LOCATION;
use http::{HeaderMap, HeaderValue, StatusCode};
use spec::{
    AtDeadline, AwaitMigration, MemoryMode, MigrationInfo, MigrationMode, MigrationPhase,
    MigrationProgress, ReceiveMigrationData, RefusedField, ResolveMigration, SendMigrationData,
    StartMigration, TimeoutStrategy, VmId,
};

use crate::answer::Answer;
use crate::extract::{Json, JsonAndTaps, Named};
use crate::one_vm::OneVm;
use crate::problem::ApiError;
use crate::refusals::{
    Exists, Failed, NoMigration, NoSuchMigration, NoSuchVm, NotCreated, NotDone, NotJson,
    NotPossible, NotUnderstood, TooLong, TooSlow, Unsupported, WrongState, of_one_vms_migration,
};
use crate::routes::{Routes, routes};
use crate::service::Service;
use crate::tags::{MIGRATIONS, ONE_VM};

pub(crate) fn routes() -> Routes<Service> {
    Routes::default()
        .routes(routes!(start))
        .routes(routes!(list, receive))
        .routes(routes!(info, cancel))
        .routes(routes!(resolve))
}

pub(crate) fn one_vm_routes() -> Routes<OneVm> {
    Routes::default()
        .routes(routes!(send_one))
        .routes(routes!(receive_one))
        .routes(routes!(cancel_one))
        .routes(routes!(progress_one))
}

type Begun = Result<Arc<dyn Migration>, RequestError>;

/// Begins one. The machine's driver is asked, which is a matter of microseconds but for its being busy.
pub(crate) async fn begin(
    begin: impl FnOnce() -> Begun + Send + 'static,
    refuse: fn(RequestError) -> ApiError,
) -> Result<Arc<dyn Migration>, ApiError> {
    let begun = tokio::task::spawn_blocking(begin).await;
    let failed = |_| {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the service failed to start the migration",
        )
    };
    begun.map_err(failed)?.map_err(refuse)
}

pub(crate) fn created(info: MigrationInfo) -> Response {
    let location = HeaderValue::try_from(format!("/api/v1/migrations/{}", info.id));
    let mut response = (StatusCode::CREATED, Answer(info)).into_response();
    // It is made of characters that a header may hold.
    if let Ok(location) = location {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

/// Answers as [`created`], for a migration or restore that makes a VM here: it gets its socket when it is
/// there.
pub(crate) fn created_with_socket(service: Service, begun: Arc<dyn Migration>) -> Response {
    let info = begun.info();
    tokio::spawn(give_socket(service, begun));
    created(info)
}

/// Start moving a VM to another service, which must be waiting for it.
#[utoipa::path(
    post, path = "/api/v1/vms/{id}/migrations", operation_id = "migrateVm", tag = MIGRATIONS, request_body = StartMigration,
    params(("id" = VmId, Path, description = "The VM's name.")),
    responses(
        (status = 201, description = "The migration has started.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, NoSuchVm, TooSlow, WrongState, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn start(
    State(service): State<Service>,
    Named(id): Named,
    Json(body): Json<StartMigration>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let begun = begin(
        move || registry.send_migration(id.as_str(), &body),
        ApiError::from,
    )
    .await?;
    Ok(created(begun.info()))
}

/// Wait for a VM that another service sends.
#[utoipa::path(
    post, path = "/api/v1/migrations", operation_id = "receiveMigration", tag = MIGRATIONS, request_body = AwaitMigration,
    responses(
        (status = 201, description = "The service is waiting for the VM.", body = MigrationInfo,
         headers(("Location" = String, description = "Its path."))),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotPossible, Failed, Unsupported,
    ),
)]
async fn receive(
    State(service): State<Service>,
    JsonAndTaps(body): JsonAndTaps<AwaitMigration>,
) -> Result<Response, ApiError> {
    let registry = service.registry.clone();
    let begun = begin(move || registry.receive_migration(&body), ApiError::from).await?;
    Ok(created_with_socket(service, begun))
}

/// A VM that came gets a socket of its own, as one that is created does.
pub(crate) async fn give_socket(service: Service, migration: Arc<dyn Migration>) {
    // It lives as long as the migration.
    let _ = migration.settled().wait_for(|settled| *settled).await;
    let info = migration.info();
    let (MigrationPhase::Completed | MigrationPhase::Postcopy, Some(sockets)) =
        (info.phase, &service.sockets)
    else {
        return;
    };
    for vm in migration.vms() {
        if let Err(error) = sockets.open(&vm).await {
            tracing::warn!(%vm, %error, "cannot open the API socket of a VM that arrived");
        }
    }
}

/// List the migrations in progress and the last ones that have ended.
#[utoipa::path(
    get, path = "/api/v1/migrations", operation_id = "listMigrations", tag = MIGRATIONS,
    responses((status = 200, description = "Oldest first.", body = [MigrationInfo])),
)]
async fn list(State(service): State<Service>) -> Answer<Vec<MigrationInfo>> {
    let all = service.registry.migrations();
    Answer(all.iter().map(|migration| migration.info()).collect())
}

/// Return the state of a migration.
#[utoipa::path(
    get, path = "/api/v1/migrations/{id}", operation_id = "getMigration", tag = MIGRATIONS,
    params(("id" = String, Path, description = "The migration's name.")),
    responses(
        (status = 200, description = "The state of the migration.", body = MigrationInfo),
        NoSuchMigration,
    ),
)]
async fn info(
    State(service): State<Service>,
    Path(id): Path<String>,
) -> Result<Answer<MigrationInfo>, ApiError> {
    Ok(Answer(service.registry.migration(&id)?.info()))
}

/// Cancel a migration. The guest stays at the source.
///
/// A destination whose migration has ended keeps listening for about a minute if its source may
/// have missed the outcome. This request frees its endpoint at once; the source gets its answer
/// when a service waits for a migration at that endpoint again.
#[utoipa::path(
    delete, path = "/api/v1/migrations/{id}", operation_id = "cancelMigration", tag = MIGRATIONS,
    params(("id" = String, Path, description = "The migration's name.")),
    responses(
        (status = 204, description = "The migration is canceled, and ends at its next step."),
        NoSuchMigration, WrongState,
    ),
)]
async fn cancel(
    State(service): State<Service>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    service.registry.migration(&id)?.cancel()?;
    Ok(StatusCode::NO_CONTENT)
}

/// Decide where the guest of a migration in doubt runs.
///
/// Before deciding that the guest runs here, make sure that it runs nowhere else. If it cannot run here
/// now, because another process has locked a disk for instance, the answer is 409 with the reason. The
/// migration stays in doubt, and can be resolved again.
#[utoipa::path(
    post, path = "/api/v1/migrations/{id}/resolve", operation_id = "resolveMigration", tag = MIGRATIONS, request_body = ResolveMigration,
    params(("id" = String, Path, description = "The migration's name.")),
    responses(
        (status = 204, description = "The decision was accepted."),
        NotUnderstood, NoSuchMigration, TooSlow, WrongState, TooLong, NotJson,
    ),
)]
async fn resolve(
    State(service): State<Service>,
    Path(id): Path<String>,
    Json(body): Json<ResolveMigration>,
) -> Result<StatusCode, ApiError> {
    let migration = service.registry.migration(&id)?;
    let resolved = tokio::task::spawn_blocking(move || migration.resolve(body.outcome));
    resolved.await.map_err(|error| {
        tracing::error!(%error, "a migration could not be resolved");
        ApiError::internal()
    })??;
    Ok(StatusCode::NO_CONTENT)
}

/// Waits until it is known how it ends, and says that. Pages of a restored VM's memory may follow.
pub(crate) async fn wait(migration: &dyn Migration) -> Result<StatusCode, ApiError> {
    // Held by us, so it does not go.
    let _ = migration.settled().wait_for(|settled| *settled).await;
    let info = migration.info();
    if let MigrationPhase::Completed | MigrationPhase::Postcopy = info.phase {
        return Ok(StatusCode::NO_CONTENT);
    }
    let error = info.error;
    let (code, detail) = error.map_or_else(
        || ("failed".to_owned(), "the migration failed".to_owned()),
        |error| (error.code, error.detail),
    );
    Err(ApiError::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        &code,
        detail,
    ))
}

/// Returns how long the client waits for the end of what it asks for: the preference `wait`, in
/// seconds (RFC 7240, section 4.3).
fn wait_preference(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all("prefer").iter();
    let mut preferences = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    preferences.find_map(|preference| {
        let (name, value) = preference.split(';').next()?.split_once('=')?;
        let is_wait = name.trim().eq_ignore_ascii_case("wait");
        let seconds = value.trim().trim_matches('"').parse().ok();
        seconds.filter(|_| is_wait).map(Duration::from_secs)
    })
}

/// Start sending the VM to a service that waits for it. The response is sent at once.
///
/// The end is shown by `vm.migration-progress` and by an event. As Cloud Hypervisor before version 53
/// did, the response is sent when the migration is over if the service was started with an older
/// `--claim-version`, or if the request has the preference `wait`.
#[utoipa::path(
    put, path = "/api/v1/vm.send-migration", operation_id = "vmSendMigration", tag = ONE_VM, request_body = SendMigrationData,
    params(("Prefer" = Option<String>, Header, description = "`wait=SECONDS` (RFC 7240): send the response when the \
        migration is over, at the latest after this time.")),
    responses(
        (status = 204, description = "The migration has started, or is over."),
        NotUnderstood, NotCreated, TooSlow, WrongState, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn send_one(
    State(vm): State<OneVm>,
    headers: HeaderMap,
    Json(body): Json<SendMigrationData>,
) -> Result<StatusCode, ApiError> {
    let what = StartMigration {
        mode: match body.memory_mode {
            MigrationMode::Precopy => MemoryMode::Precopy,
            MigrationMode::Postcopy => MemoryMode::Postcopy,
        },
        max_downtime_ms: body.downtime_ms,
        deadline_s: body.timeout_s,
        at_deadline: Some(match body.timeout_strategy {
            TimeoutStrategy::Cancel => AtDeadline::Cancel,
            TimeoutStrategy::Ignore => AtDeadline::Stop,
        }),
        // The contract allows more than are of use.
        connections: u16::try_from(body.connections).ok().map(|n| n.min(16)),
        local: body.local,
        tls_dir: body.tls_dir,
        storage: body.storage,
        ..StartMigration::to(body.destination_url)
    };
    let (registry, id) = (vm.registry.clone(), vm.id.clone());
    let begun = begin(
        move || registry.send_migration(id.as_str(), &what),
        of_one_vms_migration,
    );
    let begun = begun.await?;
    match wait_preference(&headers) {
        // The client follows a longer one by events, as without the preference.
        Some(longest) => {
            let over = tokio::time::timeout(longest, wait(&*begun)).await;
            over.unwrap_or(Ok(StatusCode::NO_CONTENT))
        }
        None if vm.claim.sends_at_once() => Ok(StatusCode::NO_CONTENT),
        None => wait(&*begun).await,
    }
}

/// Returns the VM's newest migration.
fn of_one(vm: &OneVm) -> Result<Arc<dyn Migration>, ApiError> {
    vm.registry.latest_migration(&vm.id).ok_or_else(|| {
        ApiError::new(
            StatusCode::NOT_FOUND,
            "no-migration",
            "the VM has not been in a migration since the service started",
        )
    })
}

/// Cancel the VM's migration, at its source or its destination. The guest stays at the source.
///
/// The response says that the request was accepted. The migration ends at its next step, which
/// `vm.migration-progress` and an event show. Once the guest is being handed over, the request is refused.
#[utoipa::path(
    put, path = "/api/v1/vm.cancel-migration", operation_id = "vmCancelMigration", tag = ONE_VM,
    responses(
        (status = 204, description = "The migration is canceled, and ends at its next step."),
        NoMigration, WrongState,
    ),
)]
async fn cancel_one(State(vm): State<OneVm>) -> Result<StatusCode, ApiError> {
    let migration = of_one(&vm)?;
    // `cancel` of a destination that is over would free its endpoint, which is not asked for here.
    if migration.info().phase.is_over() {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "migration-over",
            "the VM's migration is over",
        ));
    }
    migration.cancel()?;
    Ok(StatusCode::NO_CONTENT)
}

/// Return the progress of the VM's migration, or how its last one ended.
#[utoipa::path(
    get, path = "/api/v1/vm.migration-progress", operation_id = "vmMigrationProgress", tag = ONE_VM,
    responses(
        (status = 200, description = "The progress of the newest migration.", body = MigrationProgress),
        NoMigration,
    ),
)]
async fn progress_one(State(vm): State<OneVm>) -> Result<Answer<MigrationProgress>, ApiError> {
    of_one(&vm).map(|migration| Answer(MigrationProgress::from(&migration.info())))
}

/// Receive a VM from another service. The response is sent when the VM has arrived.
#[utoipa::path(
    put, path = "/api/v1/vm.receive-migration", operation_id = "vmReceiveMigration", tag = ONE_VM, request_body = ReceiveMigrationData,
    responses(
        (status = 204, description = "The VM has arrived."),
        NotUnderstood, TooSlow, Exists, TooLong, NotJson, NotDone, Unsupported,
    ),
)]
async fn receive_one(
    State(vm): State<OneVm>,
    JsonAndTaps(body): JsonAndTaps<ReceiveMigrationData>,
) -> Result<StatusCode, ApiError> {
    if let Some(refused) = RefusedField::first_of("vm.receive-migration", &body) {
        return Err(ApiError::not_implemented(refused.what));
    }
    // The contract has no fields for trust: what the program was started with decides.
    let what = AwaitMigration {
        vm: Some(vm.id.clone()),
        tls_dir: body.tls_dir,
        net_fds: body.net_fds,
        // Its clients wait for the answer, and read no reports.
        once: true,
        ..AwaitMigration::at(body.receiver_url)
    };
    let registry = vm.registry.clone();
    let begun = begin(
        move || registry.receive_migration(&what),
        of_one_vms_migration,
    )
    .await?;
    wait(&*begun).await
}
