//! Numbers for Prometheus (text exposition format, version 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use axum::extract::State;
use axum::response::IntoResponse;
use control::{Reply, Request, VmHandle, VmStatus};
use http::header::CONTENT_TYPE;
use spec::{VmCounters, VmId, VmState};
use tokio::task::JoinSet;

use crate::routes::{Routes, routes};
use crate::service::Service;
use crate::tags::SERVICE;

/// How long the VMs may take to give their counters. Those of others are left out.
const ANSWERS: Duration = Duration::from_secs(1);

/// Counters that also fall.
const GAUGES: &[&str] = &[
    "actual_bytes",
    "guest_available_bytes",
    "guest_caches_bytes",
    "guest_free_bytes",
    "guest_total_bytes",
    "plugged_bytes",
    "requested_bytes",
    "wanted_bytes",
];

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
    let vms = service.registry.list();
    let counters = counters(&vms).await;
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4")],
        render(&service, &vms, &counters),
    )
}

/// Asks all VMs at once for their counters. One that is busy does not hold the others up.
async fn counters(vms: &[VmHandle]) -> BTreeMap<VmId, VmCounters> {
    let mut asked = JoinSet::new();
    for vm in vms {
        let (id, answer) = (vm.id().clone(), vm.ask_now(Request::Counters));
        asked.spawn(async move {
            let answer = tokio::time::timeout(ANSWERS, answer).await;
            match answer {
                Ok(Ok(Reply::Counters(counters))) => Some((id, counters)),
                _ => None,
            }
        });
    }
    asked.join_all().await.into_iter().flatten().collect()
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
        "Memory of the VM: what it boots with and what was plugged, less what its balloon holds.",
        VmStatus::memory_actual_size,
    ),
    (
        "whimbrel_vm_vcpus",
        "gauge",
        "vCPUs of the VM: those that are plugged, or those that it boots with while it is off.",
        |status| {
            let boot = status.config.cpus.boot_vcpus;
            status.vcpus.unwrap_or(boot).into()
        },
    ),
    (
        "whimbrel_vm_reboots_total",
        "counter",
        "Resets of the guest since its boot.",
        |status| status.reboots,
    ),
];

fn render(service: &Service, vms: &[VmHandle], counters: &BTreeMap<VmId, VmCounters>) -> String {
    let vms: Vec<_> = vms
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
    devices(&mut text, counters);
    let name = "whimbrel_api_requests_total";
    family(&mut text, name, "counter", "Requests answered.");
    for (class, count) in service.requests.by_class() {
        line(&mut text, name, "outcome", class, count);
    }
    text
}

/// The counters of devices and vCPUs: a family for each name, `whimbrel_vm_read_bytes_total`.
fn devices(text: &mut String, vms: &BTreeMap<VmId, VmCounters>) {
    let mut families: BTreeMap<&str, Vec<(&VmId, &str, u64)>> = BTreeMap::new();
    for (vm, devices) in vms {
        for (device, counters) in devices {
            for (counter, value) in counters {
                let lines = families.entry(counter).or_default();
                lines.push((vm, device, *value));
            }
        }
    }
    for (counter, lines) in families {
        let (kind, ending) = match GAUGES.contains(&counter) {
            true => ("gauge", ""),
            false => ("counter", "_total"),
        };
        let name = format!("whimbrel_vm_{counter}{ending}");
        let help = format!("`{counter}` of the VM's devices and vCPUs, as in `vm.counters`.");
        family(text, &name, kind, &help);
        for (vm, device, value) in lines {
            let _ = writeln!(text, "{name}{{vm=\"{vm}\",device=\"{device}\"}} {value}");
        }
    }
}

// Writing to a string cannot fail.

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Neither states nor names of VMs hold a character that would have to be escaped.
fn line(text: &mut String, name: &str, label: &str, value: &str, number: u64) {
    let _ = writeln!(text, "{name}{{{label}=\"{value}\"}} {number}");
}
