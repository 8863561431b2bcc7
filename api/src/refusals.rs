//! The refusals that several operations have in common, as the document describes them, and how errors of
//! commands become them.

use std::collections::BTreeMap;

use control::{Category, RequestError, Verb};
use http::StatusCode;
use utoipa::IntoResponses;
use utoipa::openapi::path::Operation;
use utoipa::openapi::{ComponentsBuilder, Content, Ref, RefOr, Response, ResponseBuilder};

use crate::problem::ApiError;

/// The response to every status without one of its own, of the document's components.
pub(crate) const ANY_OTHER: &str = "AnyOther";

const RESPONSES: &str = "#/components/responses/";

/// Each is a type that an operation names among its responses, and a response of the document's components.
macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $status:literal, $description:literal;)*) => {
        $(
            $(#[$doc])*
            pub(crate) struct $name;

            impl IntoResponses for $name {
                fn responses() -> BTreeMap<String, RefOr<Response>> {
                    let named = Ref::from_response_name(stringify!($name));
                    BTreeMap::from([(stringify!($status).to_owned(), named.into())])
                }
            }
        )*

        /// Adds the responses that operations refer to.
        pub(crate) fn describe(components: ComponentsBuilder) -> ComponentsBuilder {
            components$(
                .response(stringify!($name), problem($description))
                .response(concat!("OneVm", stringify!($name)), strings($description))
            )*.response(ANY_OTHER, problem(
                "The request is refused for a reason that is not particular to this operation.",
            ))
        }
    };
}

/// Names lists of refusals that several operations share.
macro_rules! groups {
    ($($(#[$doc:meta])* $name:ident = [$($refusal:ident)*];)*) => {
        $(
            $(#[$doc])*
            pub(crate) struct $name;

            impl IntoResponses for $name {
                fn responses() -> BTreeMap<String, RefOr<Response>> {
                    let mut all = BTreeMap::new();
                    $(all.extend($refusal::responses());)*
                    all
                }
            }
        )*
    };
}

groups! {
    /// A body that is not read to its end, or not understood.
    BadBody = [NotUnderstood TooSlow TooLong NotJson];
    /// A configuration that the VM, the host or this version does not take.
    BadConfig = [NotPossible Failed Unsupported];
    /// A command with a body, on the service's own face.
    CommandRefused = [BadBody NoSuchVm WrongState BadConfig];
    /// A device that Cloud Hypervisor's face does not add: its contract has 400 and 500 in place of 422.
    DeviceRefused = [NotValid NotCreated TooSlow WrongState TooLong NotJson NotDone Unsupported];
}

fn problem(description: &str) -> Response {
    let body = Content::new(Some(Ref::from_schema_name("Problem")));
    ResponseBuilder::new()
        .description(description)
        .content("application/problem+json", body)
        .build()
}

/// The response of the same meaning on Cloud Hypervisor's face.
fn strings(description: &str) -> Response {
    let mut response = problem(description);
    let body = Content::new(Some(Ref::from_schema_name("Errors")));
    response
        .content
        .insert("application/json".to_owned(), body.into());
    response
}

/// Refers to the responses of Cloud Hypervisor's face in place of those of the service's own.
pub(crate) fn refer_to_strings(operation: &mut Operation) {
    for response in operation.responses.responses.values_mut() {
        if let RefOr::Ref(named) = response
            && let Some(name) = named.ref_location.strip_prefix(RESPONSES)
        {
            *response = Ref::from_response_name(format!("OneVm{name}")).into();
        }
    }
}

refusals! {
    /// A body that is not understood.
    NotUnderstood = 400, "The body is not JSON, has an unknown or missing field, or a value of \
                          the wrong type.";
    /// A device that Cloud Hypervisor's contract calls not valid.
    NotValid = 400, "The body cannot be parsed, or the configuration is invalid; `errors` lists \
                     every field that is wrong.";
    /// A query that is not understood.
    BadQuery = 400, "The query or `Last-Event-ID` is invalid.";
    /// A body that does not come.
    TooSlow = 408, "The body did not arrive within the time limit.";
    /// One VM a socket.
    NotCreated = 404, "The VM is not created.";
    /// One VM a socket, and a device of it.
    NoSuchDevice = 404, "The VM is not created, or has no such device.";
    /// One VM a socket, and a disk of it.
    NoSuchDisk = 404, "The VM is not created, or has no disk of this name.";
    /// One VM a socket, and a snapshot.
    NoSuchSnapshot = 404, "The folder holds no snapshot that can be read.";
    /// One VM a socket, and its migration.
    NoMigration = 404, "The VM has not been in a migration.";
    /// Many VMs.
    NoSuchVm = 404, "No VM has this name.";
    /// A migration.
    NoSuchMigration = 404, "No migration has this name.";
    /// Cloud Hypervisor's contract says 405 here.
    NotAllowedNow = 405, "The VM is in a state that does not allow this request.";
    /// Everywhere else.
    WrongState = 409, "The VM is in a state that does not allow this request.";
    /// A create.
    Exists = 409, "A VM of this name exists already.";
    /// A body that is too long.
    TooLong = 413, "The body is longer than the limit.";
    /// A body that is certainly no JSON.
    NotJson = 415, "The Content-Type is not JSON.";
    /// Cloud Hypervisor's contract has it for resizes.
    Pending = 429, "An earlier resize of the same resource is pending.";
    /// A configuration that is not possible.
    NotPossible = 422, "The configuration is invalid, or a resource that it names cannot be used; \
                        `errors` lists every field that is wrong.";
    /// A fault of the host or of the service.
    Failed = 500, "An operation of the host failed, or the service itself failed.";
    /// Cloud Hypervisor's contract has this one code for all failures here.
    NotDone = 500, "A resource that the request names cannot be used, an operation of the host \
                    failed, or the service itself failed.";
    /// A capability that is not there.
    Unsupported = 501, "This version of the service does not support the request.";
}

/// How the service's own face, and everything but the state refusals of the other, says no.
impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let status = match error.category {
            Category::NotFound => StatusCode::NOT_FOUND,
            Category::Conflict => StatusCode::CONFLICT,
            Category::Pending => StatusCode::TOO_MANY_REQUESTS,
            Category::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
            Category::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Category::Host | Category::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::with_fields(status, &error.code, error.detail, error.fields)
    }
}

/// How Cloud Hypervisor's face says no to `verb`: its contract documents 405 for some state refusals, where 409
/// would be right, and 400 and 500 for some of what is 422 elsewhere.
pub(crate) fn of_one_vm(verb: Verb, error: RequestError) -> ApiError {
    let has_500 = matches!(verb, Verb::AddDevice | Verb::ResizeDisk | Verb::ResizeZone);
    match (verb, error.category) {
        (_, Category::NotFound) if error.code == "no-such-vm" => not_created(),
        (
            Verb::Pause | Verb::Resume | Verb::Shutdown | Verb::Reboot | Verb::PowerButton,
            Category::Conflict,
        ) => ApiError::not_allowed_now(&error.code, error.detail),
        (Verb::AddDevice, Category::Unprocessable) if !error.fields.is_empty() => {
            with_status(StatusCode::BAD_REQUEST, error)
        }
        (Verb::ResizeDisk, Category::Unprocessable) if error.code == "not-a-disk" => {
            with_status(StatusCode::NOT_FOUND, error)
        }
        (_, Category::Unprocessable) if has_500 => {
            with_status(StatusCode::INTERNAL_SERVER_ERROR, error)
        }
        _ => error.into(),
    }
}

/// The same for a migration: the contract has 500 for one that cannot be, whatever the reason.
pub(crate) fn of_one_vms_migration(mut error: RequestError) -> ApiError {
    for field in &mut error.fields {
        for (own, theirs) in MIGRATION_FIELDS {
            if field.pointer == format!("/{own}") {
                field.pointer = format!("/{theirs}");
                let [own, theirs] = [own, theirs].map(|name| format!("`{name}`"));
                field.detail = field.detail.replace(&own, &theirs);
                error.detail = error.detail.replace(&own, &theirs);
            }
        }
    }
    match error.category {
        Category::NotFound => not_created(),
        Category::Unprocessable => with_status(StatusCode::INTERNAL_SERVER_ERROR, error),
        _ => error.into(),
    }
}

/// Fields of migrations, and the names of the same in Cloud Hypervisor's requests.
const MIGRATION_FIELDS: [(&str, &str); 4] = [
    ("destination", "destination_url"),
    ("listen", "receiver_url"),
    ("max_downtime_ms", "downtime_ms"),
    ("deadline_s", "timeout_s"),
];

/// The same for a snapshot: the contract has 405 for a VM that is not paused.
pub(crate) fn of_one_vms_snapshot(error: RequestError) -> ApiError {
    match error.category {
        Category::Conflict => ApiError::not_allowed_now(&error.code, error.detail),
        _ => of_one_vms_migration(error),
    }
}

/// The same for a restore: the contract has 400 for a snapshot that cannot be used.
pub(crate) fn of_one_vms_restore(error: RequestError) -> ApiError {
    match error.category {
        Category::Unprocessable if error.code == "snapshot-unreadable" => {
            with_status(StatusCode::NOT_FOUND, error)
        }
        Category::Unprocessable => with_status(StatusCode::BAD_REQUEST, error),
        _ => error.into(),
    }
}

fn with_status(status: StatusCode, error: RequestError) -> ApiError {
    ApiError::with_fields(status, &error.code, error.detail, error.fields)
}

/// The socket's one VM is not there.
pub(crate) fn not_created() -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "vm-not-created",
        "the VM is not created; PUT its configuration to /api/v1/vm.create first",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_follow_cloud_hypervisor() {
        use Category::{Conflict, NotFound, Pending, Unprocessable, Unsupported};
        let of = |category, code: &str| RequestError::new(category, code, "it cannot be");
        for (verb, category, code, status) in [
            (Verb::AddDevice, Unprocessable, "disk-unusable", 500),
            (Verb::AddDevice, Conflict, "device-exists", 409),
            (Verb::AddDevice, Unsupported, "unsupported", 501),
            (Verb::ResizeDisk, Unprocessable, "disk-size", 500),
            (Verb::ResizeDisk, Unprocessable, "not-a-disk", 404),
            (Verb::ResizeDisk, NotFound, "no-such-device", 404),
            (Verb::ResizeDisk, Conflict, "wrong-state", 409),
            (Verb::Resize, Unprocessable, "no-balloon", 422),
            (Verb::Resize, Pending, "resize-pending", 429),
            (Verb::ResizeZone, Unprocessable, "no-such-zone", 500),
            (Verb::ResizeZone, Pending, "resize-pending", 429),
            (Verb::Boot, Unprocessable, "disk-unusable", 422),
            (Verb::Boot, Conflict, "wrong-state", 409),
            (Verb::Pause, Conflict, "wrong-state", 405),
        ] {
            let answer = of_one_vm(verb, of(category, code));
            assert_eq!(answer.status(), status, "{verb:?} {category:?} {code}");
        }
        let invalid = || {
            RequestError::invalid(vec![spec::FieldProblem {
                pointer: "/path".to_owned(),
                code: "missing".to_owned(),
                detail: "a disk needs an image".to_owned(),
            }])
        };
        assert_eq!(of_one_vm(Verb::AddDevice, invalid()).status(), 400);
        let told = of_one_vms_migration(of(Category::Unprocessable, "endpoint-unusable"));
        assert_eq!(told.status(), 500);
        for (own, theirs) in MIGRATION_FIELDS {
            let refused = RequestError::invalid(vec![spec::FieldProblem {
                pointer: format!("/{own}"),
                code: "invalid".to_owned(),
                detail: format!("`{own}` must be at least 1"),
            }]);
            let problem = of_one_vms_migration(refused);
            let [field] = problem.fields() else {
                unreachable!("{problem:?}");
            };
            assert_eq!(field.pointer, format!("/{theirs}"));
            assert_eq!(field.detail, format!("`{theirs}` must be at least 1"));
            assert!(problem.detail().ends_with(&field.detail), "{problem:?}");
        }
        let own = ApiError::from(invalid());
        assert_eq!(own.status(), 422, "the service's own face");
    }
}
