//! VMs under Pacemaker: status, and drains of nodes. Works on a node of the cluster.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use openapi::Client;

use crate::args::positive;
use crate::print::{self, Printer};

mod drain;
mod pacemaker;

use pacemaker::{NodeState, Status};

/// Commands for a Pacemaker cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Show the nodes and VMs of the cluster.
    Status,
    /// Move all VMs away from a node, then set it to standby. Fails if a VM cannot move, and says why; the others
    /// move, and the node's service runs on.
    ///
    /// VMs that Pacemaker would stop, or stop and start anew, stay where they are. Each VM gets a constraint that
    /// keeps it away from the node, which is lifted when the node is in standby.
    Drain(DrainArguments),
    /// End the standby of a node, lift the constraints of a drain, and wait until the node's service runs.
    Undrain {
        /// The node.
        #[arg(value_name = "NODE")]
        host: String,
        /// Time limit for the start of the node's service.
        #[arg(long, value_name = "S", default_value_t = 300, value_parser = positive())]
        deadline_s: u64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DrainArguments {
    /// The node.
    #[arg(value_name = "NODE")]
    host: String,
    /// Show what Pacemaker would do, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also drain VMs that cannot move while they run: Pacemaker stops them, and starts them anew where it can.
    #[arg(long)]
    force: bool,
    /// Time limit for the moves. Moves that have not ended by then continue.
    #[arg(long, value_name = "S", default_value_t = 3600, value_parser = positive())]
    deadline_s: u64,
}

/// Performs a command. `client` reaches the service of this node, which knows how far its migrations are.
pub(crate) async fn perform(
    command: ClusterCommand,
    client: &Client,
    printer: Printer,
) -> Result<()> {
    match command {
        ClusterCommand::Status => printer.show(&pacemaker::status().await?, describe),
        ClusterCommand::Drain(arguments) => drain::drain(&arguments, client, printer).await,
        ClusterCommand::Undrain { host, deadline_s } => {
            undrain(&host, Duration::from_secs(deadline_s)).await
        }
    }
}

/// Prints the VMs of all nodes.
pub(crate) async fn list(printer: Printer) -> Result<()> {
    printer.show(&pacemaker::status().await?.vms, |vms| list_vms(vms))
}

fn describe(status: &Status) -> String {
    let heads = ["NODE", "STATE", "SERVICE", "VMS"].map(str::to_owned);
    let rows = status.nodes.iter().map(|node| {
        [
            node.name.clone(),
            node.state.text().to_owned(),
            if node.service { "runs" } else { "-" }.to_owned(),
            status.vms_on(&node.name).count().to_string(),
        ]
    });
    let nodes = print::table(std::iter::once(heads).chain(rows));
    format!("{nodes}\n\n{}", list_vms(&status.vms))
}

fn list_vms(vms: &[pacemaker::Vm]) -> String {
    if vms.is_empty() {
        return "no VMs in this cluster".to_owned();
    }
    let heads = ["VM", "STATE", "NODE", "NOTE"].map(str::to_owned);
    let rows = vms.iter().map(|vm| {
        let mut notes = Vec::new();
        if vm.blocked {
            notes.push("blocked by a failed action".to_owned());
        } else if !vm.managed {
            notes.push("unmanaged".to_owned());
        }
        notes.extend(vm.failure.clone());
        [
            vm.resource.clone(),
            vm.role.clone(),
            vm.nodes.join(", "),
            notes.join(": "),
        ]
    });
    print::table(std::iter::once(heads).chain(rows))
}

async fn undrain(host: &str, deadline: Duration) -> Result<()> {
    let status = pacemaker::status().await?;
    let state = status.node(host)?.state;
    pacemaker::set_standby(host, false).await?;
    for vm in &status.vms {
        if status.bans.contains(&pacemaker::ban_id(&vm.resource, host)) {
            pacemaker::lift(&vm.resource, host).await?;
        }
    }
    if matches!(state, NodeState::Offline | NodeState::Unclean) {
        return print::line(&format!(
            "{host} is {}: it may run VMs again when it is back",
            state.text()
        ));
    }
    let serves = async {
        while !pacemaker::status().await?.node(host)?.service {
            tokio::time::sleep(drain::TICK).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(deadline, serves).await {
        Ok(done) => {
            done?;
            print::line(&format!("{host} runs VMs again"))
        }
        Err(_) => bail!(
            "{host} is no longer in standby, but its service does not run after {} s: see `crm_mon -1`",
            deadline.as_secs()
        ),
    }
}
