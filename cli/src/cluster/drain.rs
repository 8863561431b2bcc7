//! Moves the VMs of a node away, by constraints, and then sets the node to standby.
//!
//! Standby alone would do both in one, but not safely: it ends the node's service as soon as no VM is in the way, and
//! a VM whose move has failed is not in the way, as Pacemaker manages it no longer. The service that ends takes that
//! guest along. So the service stays until the last VM has left.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, stderr};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use openapi::Client;
use serde::Serialize;
use spec::VmId;

use super::DrainArguments;
use super::pacemaker::{self, Action, NodeState, Status, Vm};
use crate::print::{self, Printer};

/// Interval between two looks at the cluster. Each runs three of Pacemaker's commands.
pub(super) const TICK: Duration = Duration::from_millis(500);

/// The last failure of each VM, by its resource.
type Failures = BTreeMap<String, String>;

/// Looks at a cluster that does not know where a VM is. Pacemaker probes it within that time.
const PROBES: u32 = 60;

/// The part of the progress bar that a VM has.
const STEPS: u64 = 1000;

/// Pacemaker's plan for a VM that may not stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "action")]
enum Step {
    /// Moves while it runs.
    Migrate { to: String },
    /// Is stopped, and started anew.
    Restart { to: String, why: String },
    /// Is stopped, and not started.
    Stop { why: String },
    /// Stays.
    Stay { why: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Planned {
    vm: String,
    #[serde(flatten)]
    step: Step,
}

/// The place of a VM after a drain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
enum Outcome {
    Moved { to: String },
    Restarted { to: String },
    Stopped,
    Stayed { why: String },
}

#[derive(Debug, Serialize)]
struct Ended {
    vm: String,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Serialize)]
struct Report {
    node: String,
    standby: bool,
    vms: Vec<Ended>,
}

impl Planned {
    fn line(&self, host: &str) -> String {
        let vm = &self.vm;
        match &self.step {
            Step::Migrate { to } => format!("{vm}: moves to {to} while it runs"),
            Step::Restart { to, why } => format!("{vm}: would start anew on {to}: {why}"),
            Step::Stop { why } => format!("{vm}: would be stopped: {why}"),
            Step::Stay { why } => format!("{vm}: stays on {host}: {why}"),
        }
    }

    /// Returns whether the drain touches the VM.
    fn leaves(&self, is_forced: bool) -> bool {
        match self.step {
            Step::Migrate { .. } => true,
            Step::Restart { .. } | Step::Stop { .. } => is_forced,
            Step::Stay { .. } => false,
        }
    }
}

impl Ended {
    fn line(&self, host: &str) -> String {
        let vm = &self.vm;
        match &self.outcome {
            Outcome::Moved { to } => format!("{vm}: moved to {to}"),
            Outcome::Restarted { to } => format!("{vm}: started anew on {to}"),
            Outcome::Stopped => format!("{vm}: stopped"),
            Outcome::Stayed { why } => format!("{vm}: stays on {host}: {why}"),
        }
    }

    /// Returns whether the VM ended as the plan said.
    fn is_as_planned(&self, plan: &[Planned]) -> bool {
        let planned = plan.iter().find(|one| one.vm == self.vm);
        let may_stop = matches!(
            planned.map(|one| &one.step),
            Some(Step::Restart { .. } | Step::Stop { .. })
        );
        match self.outcome {
            Outcome::Moved { .. } => true,
            Outcome::Restarted { .. } | Outcome::Stopped => may_stop,
            Outcome::Stayed { .. } => false,
        }
    }
}

/// Drains a node.
pub(super) async fn drain(
    arguments: &DrainArguments,
    client: &Client,
    printer: Printer,
) -> Result<()> {
    let host = arguments.host.as_str();
    let before = pacemaker::status().await?;
    let state = before.node(host)?.state;
    ensure!(
        matches!(state, NodeState::Online | NodeState::Standby),
        "{host} is {}: nothing can move away from it",
        state.text()
    );
    let vms: Vec<&str> = before.vms_on(host).map(|vm| vm.resource.as_str()).collect();
    let plan = plan(
        &before,
        host,
        &pacemaker::pending_with_bans(&vms, host).await?,
    );
    let held: Vec<&Planned> = plan
        .iter()
        .filter(|one| !one.leaves(arguments.force))
        .collect();
    if arguments.dry_run {
        printer.show(&plan, |plan| {
            lines(plan.iter().map(|one| one.line(host)), "no VMs")
        })?;
        ensure!(
            held.is_empty(),
            "{} of {} VMs cannot move",
            held.len(),
            plan.len()
        );
        return Ok(());
    }
    if !printer.is_json() {
        print::line(&lines(plan.iter().map(|one| one.line(host)), "no VMs"))?;
    }
    let leaving: Vec<&str> = plan
        .iter()
        .filter(|one| one.leaves(arguments.force))
        .map(|one| one.vm.as_str())
        .collect();
    let bar = bar(leaving.len());
    let deadline = Duration::from_secs(arguments.deadline_s);
    let moved = tokio::select! {
        moved = move_away(&leaving, host, client, &bar) => Ok(moved?),
        () = tokio::time::sleep(deadline) => Err("the deadline has passed"),
        signal = tokio::signal::ctrl_c() => { signal?; Err("interrupted") }
    };
    bar.finish_and_clear();
    match moved {
        Ok(failures) => finish(&before, host, &plan, &failures, printer).await,
        Err(what) => bail!(
            "{what}: {}",
            left_behind(&pacemaker::status().await?, host, &leaving)
        ),
    }
}

/// Returns whether a VM of the plan that should run is active nowhere.
///
/// The VM may run on the node all the same: while Pacemaker forgets a failed move, it knows of the VM only what its
/// probes have found by then. A standby would end the service under that guest.
fn is_any_lost(status: &Status, plan: &[Planned]) -> bool {
    plan.iter().any(|one| {
        let may_end = matches!(one.step, Step::Stop { .. });
        let vm = status.vm(&one.vm);
        !may_end && vm.is_some_and(|vm| vm.nodes.is_empty())
    })
}

/// Returns the status of the cluster when each VM has a place, or as it is after a while.
async fn settled(plan: &[Planned]) -> Result<Status> {
    for _ in 0..PROBES {
        let status = pacemaker::status().await?;
        if !is_any_lost(&status, plan) {
            return Ok(status);
        }
        tokio::time::sleep(TICK).await;
    }
    pacemaker::status().await
}

/// Sets the node to standby if no VM is left, and reports.
async fn finish(
    before: &Status,
    host: &str,
    plan: &[Planned],
    failures: &Failures,
    printer: Printer,
) -> Result<()> {
    let mut after = settled(plan).await?;
    for vm in after.vms.iter_mut().filter(|vm| vm.failure.is_none()) {
        vm.failure = failures.get(&vm.resource).cloned();
    }
    let standby = after.vms_on(host).next().is_none() && !is_any_lost(&after, plan);
    if standby {
        pacemaker::set_standby(host, true).await?;
        for one in plan {
            if after.bans.contains(&pacemaker::ban_id(&one.vm, host)) {
                pacemaker::lift(&one.vm, host).await?;
            }
        }
    }
    let report = Report {
        node: host.to_owned(),
        standby,
        vms: outcomes(before, &after, host, plan),
    };
    let bad = report
        .vms
        .iter()
        .filter(|one| !one.is_as_planned(plan))
        .count();
    printer.show(&report, |report| {
        let end = if report.standby {
            "is in standby"
        } else {
            "is not in standby"
        };
        let ends = report.vms.iter().map(|one| one.line(host));
        format!(
            "{}{host} {end}",
            ends.map(|line| line + "\n").collect::<String>()
        )
    })?;
    match (bad, standby) {
        (0, _) => Ok(()),
        (bad, true) => bail!("{bad} of {} VMs did not keep running", report.vms.len()),
        (bad, false) => bail!(
            "{bad} of {} VMs did not move; {}",
            report.vms.len(),
            how_to_go_on(host)
        ),
    }
}

/// Keeps the VMs away from the node, and waits until Pacemaker has nothing more to do with them. Returns the failures
/// that Pacemaker has shown meanwhile: it forgets them when the agent `host` has it try again.
async fn move_away(
    leaving: &[&str],
    host: &str,
    client: &Client,
    bar: &ProgressBar,
) -> Result<Failures> {
    let mut failures = Failures::new();
    pacemaker::ban(leaving, host, None).await?;
    while !leaving.is_empty() {
        // The plan first: an action that begins in between is then still in the plan, or the coordinator is busy with
        // it. Asked the other way round, it would be in neither answer.
        let is_planned = |action: &Action| leaving.contains(&action.resource.as_str());
        let is_pending = pacemaker::pending().await?.iter().any(is_planned);
        let status = pacemaker::status().await?;
        for vm in &status.vms {
            if let Some(failure) = &vm.failure {
                failures.insert(vm.resource.clone(), failure.clone());
            }
        }
        show(bar, &status, host, leaving, client).await;
        if let (false, Some(coordinator)) = (is_pending, &status.coordinator)
            && pacemaker::is_idle(coordinator).await?
        {
            break;
        }
        tokio::time::sleep(TICK).await;
    }
    Ok(failures)
}

fn plan(status: &Status, host: &str, actions: &[Action]) -> Vec<Planned> {
    let planned = status.vms_on(host).map(|vm| Planned {
        vm: vm.resource.clone(),
        step: step(status, host, vm, actions),
    });
    planned.collect()
}

fn step(status: &Status, host: &str, vm: &Vm, actions: &[Action]) -> Step {
    let found = actions.iter().find(|one| one.resource == vm.resource);
    let Some(Action {
        action,
        destination,
        ..
    }) = found
    else {
        return Step::Stay {
            why: why_it_stays(vm),
        };
    };
    match (action.as_str(), destination) {
        ("migrate", Some(to)) => Step::Migrate { to: to.clone() },
        (_, Some(to)) => Step::Restart {
            why: why_it_restarts(status, to),
            to: to.clone(),
        },
        (_, None) => Step::Stop {
            why: why_it_has_no_place(status, host),
        },
    }
}

fn why_it_stays(vm: &Vm) -> String {
    match (&vm.failure, vm.blocked, vm.managed) {
        (Some(failure), true, _) => failure.clone(),
        (None, true, _) => "a failed action blocks it".to_owned(),
        (_, false, false) => "Pacemaker does not manage it".to_owned(),
        (Some(failure), ..) => failure.clone(),
        (None, ..) => "Pacemaker does not move it".to_owned(),
    }
}

fn why_it_restarts(status: &Status, to: &str) -> String {
    let serves = status.node(to).is_ok_and(|node| node.service);
    match serves {
        true => "it has no allow-migrate=true, or needs a resource that moves with it".to_owned(),
        false => format!("the service of {to} does not run yet"),
    }
}

fn why_it_has_no_place(status: &Status, host: &str) -> String {
    let others = status.nodes.iter().filter(|node| node.name != host);
    let reasons: Vec<String> = others
        .map(|node| match (node.state, node.service) {
            (NodeState::Online, true) => {
                format!("{} is ruled out by a constraint or its capacity", node.name)
            }
            (NodeState::Online, false) => format!("the service of {} does not run", node.name),
            (state, _) => format!("{} is {}", node.name, state.text()),
        })
        .collect();
    match reasons.is_empty() {
        true => "the cluster has no other node".to_owned(),
        false => reasons.join(", "),
    }
}

fn outcomes(before: &Status, after: &Status, host: &str, plan: &[Planned]) -> Vec<Ended> {
    let planned = plan.iter().map(|one| Ended {
        vm: one.vm.clone(),
        outcome: outcome(before, after, host, one),
    });
    let is_new = |vm: &&Vm| plan.iter().all(|one| one.vm != vm.resource);
    let came = after.vms_on(host).filter(is_new).map(|vm| Ended {
        vm: vm.resource.clone(),
        outcome: Outcome::Stayed {
            why: "it came during the drain".to_owned(),
        },
    });
    planned.chain(came).collect()
}

fn outcome(before: &Status, after: &Status, host: &str, planned: &Planned) -> Outcome {
    let Some(vm) = after.vm(&planned.vm) else {
        return Outcome::Stopped;
    };
    if vm.nodes.iter().any(|node| node == host) {
        let why = match &planned.step {
            Step::Restart { to, why } => format!("it would start anew on {to}: {why}"),
            Step::Stop { why } => format!("it has no other place: {why}"),
            Step::Migrate { .. } | Step::Stay { .. } => why_it_stays(vm),
        };
        return Outcome::Stayed { why };
    }
    let Some(to) = vm.nodes.first() else {
        return Outcome::Stopped;
    };
    // Not whether Pacemaker called `start` there: it may do that for a guest that has arrived, which then runs on.
    let known = before.vm(&planned.vm).map(|vm| &vm.moves);
    let is_new = |one: &&pacemaker::Operation| known.is_none_or(|known| !known.contains(one));
    let to = to.clone();
    match vm.moves.iter().filter(is_new).any(|one| one.node == host) {
        true => Outcome::Moved { to },
        false => Outcome::Restarted { to },
    }
}

/// Describes the state of a drain that did not end.
fn left_behind(status: &Status, host: &str, leaving: &[&str]) -> String {
    let is_left = |vm: &&&str| status.vms_on(host).any(|one| one.resource == **vm);
    let left = leaving.iter().filter(is_left).count();
    format!(
        "{} of {} VMs have left {host}, which is not in standby; Pacemaker moves the others. {}",
        leaving.len().saturating_sub(left),
        leaving.len(),
        how_to_go_on(host)
    )
}

fn how_to_go_on(host: &str) -> String {
    format!(
        "`wh-remote cluster drain {host}` continues, `wh-remote cluster undrain {host}` lets VMs run there again"
    )
}

fn lines(all: impl Iterator<Item = String>, otherwise: &str) -> String {
    let all: Vec<String> = all.collect();
    match all.is_empty() {
        true => otherwise.to_owned(),
        false => all.join("\n"),
    }
}

fn bar(vms: usize) -> ProgressBar {
    if vms == 0 || !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new((vms as u64).saturating_mul(STEPS));
    if let Ok(style) = ProgressStyle::with_template("[{bar:32}] {percent} % {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Draws how far the drain is. The service of this node knows the state of migrations that begin or end here.
async fn show(bar: &ProgressBar, status: &Status, host: &str, leaving: &[&str], client: &Client) {
    let is_gone = |vm: &&&str| status.vms_on(host).all(|one| one.resource != **vm);
    let gone = leaving.iter().filter(is_gone).count();
    let mut position = (gone as u64).saturating_mul(STEPS);
    let mut message = format!("{gone} of {} VMs have moved", leaving.len());
    // Only for show: Pacemaker says when they have moved.
    for info in client.migrations_list().await.unwrap_or_default() {
        let vm = info.vm.as_ref().map_or("", VmId::as_str);
        let is_here = leaving.iter().any(|one| *one == vm && !is_gone(&one));
        if info.phase.is_over() || !is_here || info.memory_bytes == 0 {
            continue;
        }
        let left = info.remaining_pages.saturating_mul(spec::limits::PAGE);
        let done = info.memory_bytes.saturating_sub(left);
        let part = u128::from(done) * u128::from(STEPS) / u128::from(info.memory_bytes);
        position = position.saturating_add(u64::try_from(part).unwrap_or(STEPS).min(STEPS));
        message.push_str(&format!("; {vm}: {}", info.phase));
    }
    bar.set_position(position);
    bar.set_message(message);
}

#[cfg(test)]
mod tests;
