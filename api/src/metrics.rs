//! Numbers for Prometheus (text exposition format, version 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use axum::extract::State;
use axum::response::IntoResponse;
use control::VmStatus;
use http::header::CONTENT_TYPE;
use spec::VmState;

use crate::routes::{Routes, routes};
use crate::service::Service;
use crate::tags::SERVICE;

pub(crate) fn routes() -> Routes<Service> {
    Routes::default().routes(routes!(metrics))
}

/// Return the service's metrics, for Prometheus.
#[utoipa::path(
    get, path = "/api/v1/metrics", operation_id = "getMetrics", tag = SERVICE,
    responses(
        (status = 200, description = "Metrics in Prometheus' text format.", body = String,
         content_type = "text/plain"),
    ),
)]
async fn metrics(State(service): State<Service>) -> impl IntoResponse {
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4")],
        render(&service),
    )
}

/// A metric that each VM has: its name, kind and help, and how its value is read.
type VmMetric = (
    &'static str,
    &'static str,
    &'static str,
    fn(&VmStatus) -> u64,
);

const VM_METRICS: [VmMetric; 3] = [
    (
        "whimbrel_vm_memory_bytes",
        "gauge",
        "Memory of the VM.",
        |status| status.config.memory.boot_size(),
    ),
    ("whimbrel_vm_vcpus", "gauge", "vCPUs of the VM.", |status| {
        status.config.cpus.boot_vcpus.into()
    }),
    (
        "whimbrel_vm_reboots_total",
        "counter",
        "Resets of the guest since its boot.",
        |status| status.reboots,
    ),
];

fn render(service: &Service) -> String {
    let vms: Vec<_> = service
        .registry
        .list()
        .iter()
        .map(|vm| (vm.id().clone(), vm.status()))
        .collect();
    // All states, also those that no VM has: a series that vanishes would look like a missing value.
    let states = [
        VmState::Created,
        VmState::Running,
        VmState::Paused,
        VmState::Shutdown,
    ];
    let mut by_state: BTreeMap<String, u64> =
        states.iter().map(|state| (state.to_string(), 0)).collect();
    for (_, status) in &vms {
        *by_state.entry(status.state.to_string()).or_default() += 1;
    }
    let mut text = String::new();
    let name = "whimbrel_vms";
    family(&mut text, name, "gauge", "VMs, by state.");
    for (state, count) in by_state {
        line(&mut text, name, "state", &state, count);
    }
    for (name, kind, help, value) in VM_METRICS {
        family(&mut text, name, kind, help);
        for (id, status) in &vms {
            line(&mut text, name, "vm", id.as_str(), value(status));
        }
    }
    let name = "whimbrel_api_requests_total";
    family(&mut text, name, "counter", "Requests answered.");
    for (class, count) in service.requests.by_class() {
        line(&mut text, name, "outcome", class, count);
    }
    text
}

// Writing to a string cannot fail.

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Neither states nor names of VMs hold a character that would have to be escaped.
fn line(text: &mut String, name: &str, label: &str, value: &str, number: u64) {
    let _ = writeln!(text, "{name}{{{label}=\"{value}\"}} {number}");
}
