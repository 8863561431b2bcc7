//! The program: a service for many VMs, one VM in a command, and a demonstration.

#![forbid(unsafe_code)]

mod args;
mod cloud_hypervisor;
mod demo;
mod descriptors;
mod event_monitor;
mod generate;
mod inherited;
mod logging;
mod one;
mod serve;
mod signals;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use crate::args::{Arguments, Command};

fn main() -> ExitCode {
    let program = std::env::args_os().next();
    let command = cloud_hypervisor::command(Arguments::command(), program.as_deref());
    let matches = command.get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let started = cloud_hypervisor::check(&matches)
        .and_then(|()| arguments.check())
        .and_then(|()| logging::start(&arguments.logging));
    // Dropped last: it writes the lines that wait.
    let _log = match started {
        Ok(log) => log,
        Err(error) => {
            eprintln!("whimbrel: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!("{error:#}");
    }
    let done = match arguments.command {
        Some(Command::Serve(serve)) => serve::run(&serve),
        Some(Command::Run(run)) => run.config().and_then(|config| one::run(&run.vm, config)),
        Some(Command::Demo) => demo::run(),
        Some(Command::Completions { shell }) => generate::completions(shell),
        Some(Command::Man { directory }) => generate::man_pages(&directory),
        None => {
            let vm = &arguments.vm;
            vm.config(None).and_then(|config| one::run(vm, config))
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("whimbrel: {error:#}");
        ExitCode::FAILURE
    })
}
