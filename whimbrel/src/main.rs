//! The program: a service for many VMs, one VM in a command, and a demonstration.

#![deny(unsafe_code)]

mod accept;
mod args;
mod cloud_hypervisor;
mod demo;
mod descriptors;
mod event_monitor;
mod generate;
mod inherited;
mod logging;
mod one;
mod sandbox;
mod serve;
mod signals;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use openapi::with_causes;

use crate::args::{Arguments, Command};
use crate::one::User;

fn main() -> ExitCode {
    let program = std::env::args_os().next();
    let variable = std::env::var_os(cloud_hypervisor::CLAIM_VARIABLE);
    let claim = cloud_hypervisor::claimed(std::env::args_os(), variable);
    let command = cloud_hypervisor::command(Arguments::command(), program.as_deref(), claim);
    let matches = command.get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let started = cloud_hypervisor::check(&matches)
        .and_then(|()| arguments.check())
        // Before any file of the command line is read: a parser under attack has none of these rights.
        .and_then(|()| sandbox::drop_rights(arguments.sandbox.seccomp))
        // Read before files are denied: the rules follow from it, and standard input comes once.
        .and_then(|()| arguments.vm_config())
        .and_then(|mut vm| Ok((sandbox::restrict_files(&arguments, vm.as_mut())?, vm)))
        .and_then(|(extent, vm)| Ok((extent, vm, logging::start(&arguments.logging)?)));
    // Dropped last: it writes the lines that wait.
    let (restricted, vm, _log) = match started {
        Ok(started) => started,
        Err(error) => {
            eprintln!("whimbrel: {}", with_causes(error.as_ref()));
            return ExitCode::FAILURE;
        }
    };
    restricted.log();
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!("{error:#}");
    }
    // Before there are threads that handle what guests and clients send.
    let confine = || sandbox::enter(arguments.sandbox.seccomp);
    let claim = arguments.claim_version;
    let done = match arguments.command {
        Some(Command::Serve(serve)) => {
            confine().and_then(|sandbox| serve::run(&serve, claim, sandbox))
        }
        Some(Command::Run(run)) => {
            confine().and_then(|sandbox| one::run(&run.vm, vm, claim, sandbox, User::Person))
        }
        Some(Command::Demo) => confine().and_then(demo::run),
        Some(Command::Completions { shell }) => generate::completions(shell),
        Some(Command::Man { directory }) => generate::man_pages(&directory),
        None => {
            confine().and_then(|sandbox| one::run(&arguments.vm, vm, claim, sandbox, User::Program))
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("whimbrel: {}", with_causes(error.as_ref()));
        ExitCode::FAILURE
    })
}
