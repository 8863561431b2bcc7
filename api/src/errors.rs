//! Error bodies of Cloud Hypervisor's face: a JSON array of strings, outermost error first.

use axum::body::Body;
use axum::response::Response;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue};
use spec::Problem;

use crate::json::ascii_json;

/// The form of a face's errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Face {
    /// Problem bodies (RFC 9457).
    Service,
    /// Arrays of strings, except for a client that asks for problem bodies.
    CloudHypervisor,
}

/// Names the failed operation of Cloud Hypervisor's face: the second string of its errors.
const FAILURES: &[(&str, &str)] = &[
    ("vmm.ping", "The VMM could not be pinged"),
    ("vmm.shutdown", "The VMM could not shut down"),
    ("vm.create", "The VM could not be created"),
    ("vm.boot", "The VM could not boot"),
    ("vm.delete", "The VM could not be deleted"),
    ("vm.info", "The VM info is not available"),
    ("vm.counters", "The VM counters are not available"),
    ("vm.memory-map", "The VM memory map is not available"),
    ("vm.pause", "The VM could not be paused"),
    ("vm.resume", "The VM could not resume"),
    ("vm.shutdown", "The VM could not shut down"),
    ("vm.reboot", "The VM could not reboot"),
    ("vm.power-button", "The power button could not be pressed"),
    ("vm.nmi", "The NMI could not be sent"),
    ("vm.resize", "The VM could not be resized"),
    ("vm.resize-disk", "The disk could not be resized"),
    ("vm.resize-zone", "The memory zone could not be resized"),
    ("vm.add-device", "The device could not be added to the VM"),
    ("vm.add-disk", "The disk could not be added to the VM"),
    ("vm.add-fs", "The file system could not be added to the VM"),
    (
        "vm.add-net",
        "The network device could not be added to the VM",
    ),
    (
        "vm.add-pmem",
        "The pmem device could not be added to the VM",
    ),
    (
        "vm.add-vdpa",
        "The vDPA device could not be added to the VM",
    ),
    (
        "vm.add-vsock",
        "The vsock device could not be added to the VM",
    ),
    (
        "vm.add-user-device",
        "The user device could not be added to the VM",
    ),
    (
        "vm.add-generic-vhost-user",
        "The vhost-user device could not be added to the VM",
    ),
    (
        "vm.remove-device",
        "The device could not be removed from the VM",
    ),
    ("vm.snapshot", "The VM could not be snapshotted"),
    ("vm.restore", "The VM could not be restored"),
    ("vm.coredump", "The VM could not be coredumped"),
    ("vm.send-migration", "The VM could not be sent"),
    ("vm.receive-migration", "The VM could not be received"),
    (
        "vm.cancel-migration",
        "The VM migration could not be canceled",
    ),
    (
        "vm.migration-progress",
        "The VM migration progress is not available",
    ),
];

/// Whether the client asks for problem bodies by name. `*/*` is no such request: `ch-remote` sends it.
pub(crate) fn wants_problems(headers: &HeaderMap) -> bool {
    let accept = headers.get_all(ACCEPT).iter();
    let mut ranges = accept
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    ranges.any(|range| {
        let media = range.split(';').next().unwrap_or_default().trim();
        media.eq_ignore_ascii_case("application/problem+json")
    })
}

/// Replaces the body of a refused request, if it is a problem, by Cloud Hypervisor's form of it.
pub(crate) fn as_strings(response: &mut Response, path: &str) {
    let Some(problem) = response.extensions_mut().remove::<Problem>() else {
        return;
    };
    let body = ascii_json(&strings(&problem, path)).unwrap_or_default();
    *response.body_mut() = Body::from(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // The router has measured the problem; hyper measures what is sent.
    headers.remove(CONTENT_LENGTH);
}

/// The causes of a problem, outermost first, as `ch-remote` prints them.
fn strings(problem: &Problem, path: &str) -> Vec<String> {
    let operation = path.strip_prefix("/api/v1/").unwrap_or_default();
    let failure = FAILURES.iter().find(|(name, _)| *name == operation);
    let mut all = match failure {
        Some((_, failure)) => vec!["Error from API".to_owned(), (*failure).to_owned()],
        None => vec![problem.title.clone()],
    };
    all.push(problem.detail.clone());
    // A single field is in `detail` already; its name may not be.
    all.extend(problem.errors.iter().map(|field| {
        let name = field.pointer.trim_start_matches('/').replace('/', ".");
        match name.as_str() {
            "" => field.detail.clone(),
            name => format!("{name}: {}", field.detail),
        }
    }));
    all
}

/// Rewrites a refusal because of the VM's state: on Cloud Hypervisor's face a VM whose guest has ended is shown
/// as `Created`.
pub(crate) fn show_states(response: &mut Response) {
    let problem = response.extensions_mut().get_mut::<Problem>();
    let Some(problem) = problem.filter(|problem| problem.code == "wrong-state") else {
        return;
    };
    problem.detail = with_states_of_one_vm(&problem.detail);
    let body = ascii_json(&*problem).unwrap_or_default();
    *response.body_mut() = Body::from(body);
    response.headers_mut().remove(CONTENT_LENGTH);
}

/// The text names states and requests, and nothing that a client has chosen.
fn with_states_of_one_vm(detail: &str) -> String {
    let shutdown = spec::VmState::Shutdown.to_string();
    let created = spec::VmState::Created.to_string();
    detail
        .replace(&format!("{created} or {shutdown}"), &created)
        .replace(&shutdown, &created)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_those_that_the_face_shows() {
        use control::{Denied, Verb};
        use spec::VmState::{Created, Running, Shutdown};
        let told = |state, verb| with_states_of_one_vm(&Denied { state, verb }.to_string());
        for (state, verb, expected) in [
            (
                Shutdown,
                Verb::Pause,
                "a VM that is Created cannot be paused: it must be Running",
            ),
            (
                Running,
                Verb::Boot,
                "a VM that is Running cannot be booted: it must be Created",
            ),
            (
                Created,
                Verb::Resume,
                "a VM that is Created cannot be resumed: it must be Paused",
            ),
        ] {
            assert_eq!(told(state, verb), expected);
        }
    }

    #[test]
    fn field_without_a_name_has_no_colon() {
        let mut problem = Problem::new(400, "Bad Request", "unknown-field", "unknown field `x`");
        problem.errors = ["", "/disks/0/path"]
            .map(|pointer| spec::FieldProblem {
                pointer: pointer.to_owned(),
                code: "unknown-field".to_owned(),
                detail: "unknown field `x`".to_owned(),
            })
            .into();
        let strings = strings(&problem, "/api/v1/vm.create");
        assert_eq!(
            strings[3..],
            ["unknown field `x`", "disks.0.path: unknown field `x`"]
        );
    }

    #[test]
    fn only_a_client_that_names_problems_gets_them() {
        let with = |accept: &str| {
            let value = HeaderValue::try_from(accept).unwrap();
            wants_problems(&HeaderMap::from_iter([(ACCEPT, value)]))
        };
        assert!(with("application/json, application/problem+json;q=0.9"));
        assert!(!with("*/*") && !with("application/json") && !with("application/*"));
        assert!(!wants_problems(&HeaderMap::new()));
    }

    #[test]
    fn every_operation_of_the_face_has_a_failure() {
        let document = serde_json::to_value(crate::document()).unwrap();
        for path in document["paths"].as_object().unwrap().keys() {
            let Some(name) = path.strip_prefix("/api/v1/vm") else {
                continue;
            };
            if name.starts_with('.') || name.starts_with("m.") {
                let name = format!("vm{name}");
                assert!(FAILURES.iter().any(|(known, _)| *known == name), "{name}");
            }
        }
    }
}
