//! Pacemaker's own commands, and what their XML says of nodes and VMs.

use std::io::ErrorKind;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use roxmltree::{Document, Node as Element};
use serde::Serialize;
use tokio::process::Command;

/// Time limit of one of Pacemaker's commands.
const PATIENCE: Duration = Duration::from_secs(60);

/// The resource agent of a VM.
const VM_AGENT: &str = "ocf:whimbrel:vm";
/// The resource agent of a node's service.
const HOST_AGENT: &str = "ocf:whimbrel:host";

/// The state of a node: it runs VMs only if it is online.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum NodeState {
    Online,
    Standby,
    Maintenance,
    Pending,
    Unclean,
    Offline,
}

impl NodeState {
    /// The state as a person reads it, after "is".
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Standby => "in standby",
            Self::Maintenance => "in maintenance",
            Self::Pending => "joining the cluster",
            Self::Unclean => "waiting to be fenced",
            Self::Offline => "offline",
        }
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) state: NodeState,
    /// Whether the node's service runs, under the agent `host`.
    pub(super) service: bool,
}

/// An operation as Pacemaker recorded it. Two that are equal are the same run of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Operation {
    pub(super) node: String,
    pub(super) call: String,
    pub(super) at: String,
}

/// A VM's resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Vm {
    pub(super) resource: String,
    pub(super) role: String,
    /// The nodes on which it is active: two during a migration.
    pub(super) nodes: Vec<String>,
    pub(super) managed: bool,
    /// Pacemaker does nothing with it after an action that failed.
    pub(super) blocked: bool,
    /// Why its last action failed.
    pub(super) failure: Option<String>,
    /// Its moves that succeeded, as the nodes that it left remember them.
    #[serde(skip)]
    pub(super) moves: Vec<Operation>,
}

/// The cluster as `crm_mon` shows it at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Status {
    pub(super) nodes: Vec<Node>,
    pub(super) vms: Vec<Vm>,
    #[serde(skip)]
    pub(super) coordinator: Option<String>,
    #[serde(skip)]
    pub(super) bans: Vec<String>,
}

impl Status {
    /// Reads what `crm_mon` prints.
    pub(super) fn read(xml: &str) -> Result<Self> {
        let document = Document::parse(xml).context("crm_mon printed no XML")?;
        let all = |name| document.descendants().filter(move |e| e.has_tag_name(name));
        let resources = |agent| {
            all("resource").filter(move |one| one.attribute("resource_agent") == Some(agent))
        };
        let services: Vec<String> = resources(HOST_AGENT)
            .filter(|one| one.attribute("role") == Some("Started"))
            .flat_map(active_on)
            .collect();
        let nodes = all("nodes").flat_map(|nodes| nodes.children());
        let nodes = nodes.filter(|one| one.has_tag_name("node")).map(|one| {
            let name = text(one, "name")?;
            Ok(Node {
                state: node_state(one),
                service: services.contains(&name),
                name,
            })
        });
        let nodes = nodes.collect::<Result<_>>()?;
        let vms = resources(VM_AGENT).map(|one| {
            let resource = text(one, "id")?;
            Ok(Vm {
                role: text(one, "role")?,
                nodes: active_on(one).collect(),
                managed: is(one, "managed"),
                blocked: is(one, "blocked"),
                failure: all("failure")
                    .filter_map(|f| failure(f, &resource))
                    .next_back(),
                moves: moves(&document, &resource),
                resource,
            })
        });
        let vms = vms.collect::<Result<_>>()?;
        let coordinator = all("current_dc").filter(|dc| is(*dc, "present"));
        let bans = all("ban").filter_map(|ban| ban.attribute("id"));
        Ok(Self {
            nodes,
            vms,
            coordinator: coordinator.filter_map(|dc| text(dc, "name").ok()).next(),
            bans: bans.map(str::to_owned).collect(),
        })
    }

    /// Returns a node, or an error that names those that the cluster has.
    pub(super) fn node(&self, name: &str) -> Result<&Node> {
        let found = self.nodes.iter().find(|node| node.name == name);
        found.with_context(|| {
            let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            format!(
                "{name} is no node of this cluster: it has {}",
                names.join(", ")
            )
        })
    }

    pub(super) fn vm(&self, resource: &str) -> Option<&Vm> {
        self.vms.iter().find(|vm| vm.resource == resource)
    }

    /// The VMs that are active on a node.
    pub(super) fn vms_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Vm> {
        let is_there = move |vm: &&Vm| vm.nodes.iter().any(|one| one == node);
        self.vms.iter().filter(is_there)
    }
}

fn text(element: Element<'_, '_>, attribute: &str) -> Result<String> {
    let value = element.attribute(attribute);
    let value = value.with_context(|| {
        let tag = element.tag_name().name();
        format!("crm_mon printed a <{tag}> without `{attribute}`")
    });
    value.map(str::to_owned)
}

fn is(element: Element<'_, '_>, attribute: &str) -> bool {
    element.attribute(attribute) == Some("true")
}

fn active_on<'a>(resource: Element<'a, 'a>) -> impl Iterator<Item = String> + 'a {
    let nodes = resource.children().filter(|one| one.has_tag_name("node"));
    nodes.filter_map(|one| one.attribute("name").map(str::to_owned))
}

fn node_state(node: Element<'_, '_>) -> NodeState {
    // The first that keeps VMs away. A node that is unclean may be shown as online, too.
    match () {
        () if is(node, "unclean") => NodeState::Unclean,
        () if !is(node, "online") => NodeState::Offline,
        () if is(node, "pending") => NodeState::Pending,
        () if is(node, "maintenance") => NodeState::Maintenance,
        () if is(node, "standby") || is(node, "standby_onfail") => NodeState::Standby,
        () => NodeState::Online,
    }
}

/// Describes a failed action, if it is one of the resource.
fn failure(failure: Element<'_, '_>, resource: &str) -> Option<String> {
    let task = failure.attribute("task")?;
    let interval = failure.attribute("interval").unwrap_or("0");
    (failure.attribute("op_key")? == format!("{resource}_{task}_{interval}")).then_some(())?;
    // Pacemaker 2.1.5 keeps no reason for a failed migrate_to. `whimbrel-failed-VM` has it then.
    let reason = failure
        .attribute("exitreason")
        .filter(|one| !one.is_empty());
    let reason = reason.or_else(|| failure.attribute("exitstatus"));
    let node = failure.attribute("node").unwrap_or_default();
    Some(format!("{task} on {node}: {}", reason.unwrap_or_default()))
}

/// The last `migrate_to` of a resource on each node, if it succeeded.
fn moves(document: &Document<'_>, resource: &str) -> Vec<Operation> {
    let histories = document.descendants().filter(|one| {
        one.has_tag_name("resource_history") && one.attribute("id") == Some(resource)
    });
    let moved = histories.flat_map(|history| {
        let node = history.parent().and_then(|node| node.attribute("name"));
        let moved = history.children().filter(|one| {
            one.attribute("task") == Some("migrate_to") && one.attribute("rc") == Some("0")
        });
        moved.map(move |one| Operation {
            node: node.unwrap_or_default().to_owned(),
            call: one.attribute("call").unwrap_or_default().to_owned(),
            at: one
                .attribute("last-rc-change")
                .unwrap_or_default()
                .to_owned(),
        })
    });
    moved.collect()
}

/// A planned action of the scheduler on a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Action {
    pub(super) resource: String,
    pub(super) action: String,
    pub(super) destination: Option<String>,
}

/// Reads the actions that `crm_simulate --run` prints.
pub(super) fn actions(xml: &str) -> Result<Vec<Action>> {
    let document = Document::parse(xml).context("crm_simulate printed no XML")?;
    let planned = document
        .descendants()
        .filter(|one| one.has_tag_name("rsc_action"));
    let planned = planned.map(|one| {
        Ok(Action {
            resource: text(one, "resource")?,
            action: text(one, "action")?,
            destination: one.attribute("dest").map(str::to_owned),
        })
    });
    planned.collect()
}

/// Asks for nodes and VMs. The reasons of failed moves are those that the agent `vm` noted.
pub(super) async fn status() -> Result<Status> {
    let xml = run("crm_mon", &["--one-shot", "--output-as=xml"], None).await?;
    let mut status = Status::read(&xml)?;
    for vm in status.vms.iter_mut().filter(|vm| vm.failure.is_some()) {
        if let Some(reason) = move_error(vm).await {
            vm.failure = Some(reason);
        }
    }
    Ok(status)
}

/// The reason that the agent noted at the node where the VM stayed.
async fn move_error(vm: &Vm) -> Option<String> {
    let name = format!("whimbrel-failed-{}", vm.resource);
    let words = ["--query", "--all", "--name", &name, "--output-as=xml"];
    // The attribute does not exist where no move failed.
    let xml = run("attrd_updater", &words, None).await.ok()?;
    noted(&xml)
}

fn noted(xml: &str) -> Option<String> {
    let document = Document::parse(xml).ok()?;
    let attributes = document
        .descendants()
        .filter(|one| one.has_tag_name("attribute"));
    let mut values = attributes.filter_map(|one| one.attribute("value"));
    values.find(|one| !one.is_empty()).map(str::to_owned)
}

/// Returns the actions that Pacemaker would take at this moment.
pub(super) async fn pending() -> Result<Vec<Action>> {
    let words = ["--live-check", "--run", "--output-as=xml"];
    actions(&run("crm_simulate", &words, None).await?)
}

/// Returns the actions that Pacemaker would take if these resources were kept away from a node. Changes nothing: the scheduler
/// works on a copy of the cluster's information base.
pub(super) async fn pending_with_bans(resources: &[&str], node: &str) -> Result<Vec<Action>> {
    let base = run("cibadmin", &["--query"], None).await?;
    // Readable by its owner only: it may hold the passwords of fence devices.
    let copy = tempfile::NamedTempFile::with_prefix("wh-remote-plan.")?;
    std::fs::write(copy.path(), base)?;
    ban(resources, node, Some(copy.path())).await?;
    let path = copy
        .path()
        .to_str()
        .context("the temporary directory's path is not UTF-8")?;
    let words = ["--xml-file", path, "--run", "--output-as=xml"];
    actions(&run("crm_simulate", &words, None).await?)
}

/// Keeps resources away from a node, in the cluster or in a copy of its information base.
///
/// The constraints are those of `crm_resource --ban`, but all in one change: a change that comes while Pacemaker moves
/// a VM makes it plan anew, and for the VM on its way that may be a stop and a start.
pub(super) async fn ban(resources: &[&str], node: &str, copy: Option<&Path>) -> Result<()> {
    if resources.is_empty() {
        return Ok(());
    }
    let xml = bans(resources, node)?;
    let words = [
        "--modify",
        "--allow-create",
        "--scope",
        "constraints",
        "--xml-text",
        &xml,
    ];
    run("cibadmin", &words, copy).await.map(drop)
}

fn bans(resources: &[&str], node: &str) -> Result<String> {
    let is_plain = |name: &str| !name.contains(['<', '>', '&', '"', '\'']);
    let mut xml = "<constraints>".to_owned();
    for resource in resources {
        // Pacemaker refuses names that need quotes in XML. One that does not is not ours to repair.
        ensure!(
            is_plain(resource) && is_plain(node),
            "the name {resource} or {node} cannot be written in XML"
        );
        let id = ban_id(resource, node);
        xml.push_str(&format!(
            r#"<rsc_location id="{id}" rsc="{resource}" role="Started" node="{node}" score="-INFINITY"/>"#
        ));
    }
    xml.push_str("</constraints>");
    Ok(xml)
}

/// The name of the constraint that `ban` makes.
pub(super) fn ban_id(resource: &str, node: &str) -> String {
    format!("cli-ban-{resource}-on-{node}")
}

/// Lifts what `ban` did.
pub(super) async fn lift(resource: &str, node: &str) -> Result<()> {
    let words = ["--clear", "--resource", resource, "--node", node];
    run("crm_resource", &words, None).await.map(drop)
}

/// Sets a node to standby, or ends that.
pub(super) async fn set_standby(node: &str, is_on: bool) -> Result<()> {
    let value: &[&str] = if is_on {
        &["--update", "on"]
    } else {
        &["--delete"]
    };
    let words = ["--node", node, "--name", "standby"];
    let words = [&words, value].concat();
    run("crm_attribute", &words, None).await.map(drop)
}

/// Returns whether the coordinator waits for nothing and has nothing to do.
pub(super) async fn is_idle(coordinator: &str) -> Result<bool> {
    let words = ["--status", coordinator, "--output-as=xml"];
    Ok(controller_state(&run("crmadmin", &words, None).await?).as_deref() == Some("S_IDLE"))
}

fn controller_state(xml: &str) -> Option<String> {
    let document = Document::parse(xml).ok()?;
    let found = document
        .descendants()
        .find(|one| one.has_tag_name("crmd"))?;
    found.attribute("state").map(str::to_owned)
}

/// Runs a command, and returns what it printed.
async fn run(program: &str, words: &[&str], copy: Option<&Path>) -> Result<String> {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    // Set in the shells of `crm_shadow`: a drain is never one of a copy.
    command.env_remove("CIB_shadow").env_remove("CIB_file");
    if let Some(copy) = copy {
        command.env("CIB_file", copy);
    }
    let done = tokio::time::timeout(PATIENCE, command.output()).await;
    let done = done
        .with_context(|| format!("{program} has not answered within {} s", PATIENCE.as_secs()))?;
    let done = match done {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "{program} is not installed, or not in PATH: `wh-remote cluster` works on a node of a \
             Pacemaker cluster, as root"
        ),
        done => done.with_context(|| format!("cannot run {program}"))?,
    };
    let printed = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() {
        return Ok(printed);
    }
    let said = complaint(&printed).unwrap_or_else(|| {
        let said = String::from_utf8_lossy(&done.stderr);
        said.trim().replace('\n', "; ")
    });
    bail!("{program}: {said} (is Pacemaker running on this host, and is this user root?)")
}

/// The errors in a command's XML.
fn complaint(xml: &str) -> Option<String> {
    let document = Document::parse(xml).ok()?;
    let status = document
        .descendants()
        .find(|one| one.has_tag_name("status"))?;
    let errors = status.descendants().filter(|one| one.has_tag_name("error"));
    let errors: Vec<&str> = errors.filter_map(|one| one.text()).map(str::trim).collect();
    match errors.is_empty() {
        true => status.attribute("message").map(str::to_owned),
        false => Some(errors.join("; ")),
    }
}

#[cfg(test)]
mod tests;
