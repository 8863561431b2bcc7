//! Numbers for Prometheus (text exposition format, version 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use axum::extract::State;
use axum::response::IntoResponse;
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

fn render(service: &Service) -> String {
    let vms: Vec<_> = service
        .registry
        .list()
        .iter()
        .map(|vm| (vm.id().clone(), vm.status()))
        .collect();
    let states = [
        VmState::Created,
        VmState::Running,
        VmState::Paused,
        VmState::Shutdown,
    ];
    let mut by_state: BTreeMap<String, usize> =
        states.iter().map(|state| (state.to_string(), 0)).collect();
    for (_, status) in &vms {
        *by_state.entry(status.state.to_string()).or_default() += 1;
    }
    let mut text = String::new();
    family(&mut text, "whimbrel_vms", "gauge", "VMs, by state.");
    for (state, count) in by_state {
        line(&mut text, "whimbrel_vms", "state", &state, count as u64);
    }
    family(
        &mut text,
        "whimbrel_vm_memory_bytes",
        "gauge",
        "Memory of the VM.",
    );
    for (id, status) in &vms {
        line(
            &mut text,
            "whimbrel_vm_memory_bytes",
            "vm",
            id.as_str(),
            status.config.memory.boot_size(),
        );
    }
    family(&mut text, "whimbrel_vm_vcpus", "gauge", "vCPUs of the VM.");
    for (id, status) in &vms {
        let vcpus = u64::from(status.config.cpus.boot_vcpus);
        line(&mut text, "whimbrel_vm_vcpus", "vm", id.as_str(), vcpus);
    }
    family(
        &mut text,
        "whimbrel_vm_reboots_total",
        "counter",
        "Resets of the guest since its boot.",
    );
    for (id, status) in &vms {
        line(
            &mut text,
            "whimbrel_vm_reboots_total",
            "vm",
            id.as_str(),
            status.reboots,
        );
    }
    family(
        &mut text,
        "whimbrel_api_requests_total",
        "counter",
        "Requests answered.",
    );
    for (class, count) in service.requests.by_class() {
        line(
            &mut text,
            "whimbrel_api_requests_total",
            "outcome",
            class,
            count,
        );
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
