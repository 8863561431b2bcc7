//! The sandbox: what the kernel lets this process and its threads do.
//!
//! | layer | for | ends when violated |
//! |---|---|---|
//! | `no_new_privs` | the process | - |
//! | capabilities ([`capabilities`]) | each thread | the call |
//! | files ([`files`]), with `--landlock` | the process | the call |
//! | system calls of the process ([`filters`]) | each thread | the call |
//! | system calls of guests' threads | vCPUs, device loops | the call, then the VM |
//!
//! The process enters before it has threads that matter; guests' threads enter the stricter lists by
//! the hook [`vmm::Sandbox`], before they touch a guest. Threads inherit the lists of the thread that
//! starts them, so nothing escapes by starting threads.

mod capabilities;
mod files;
mod filters;
#[cfg(test)]
mod tests;
mod trap;

use std::io;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::thread::CapabilitySet;
use seccompiler::{BpfProgram, SeccompAction, apply_filter, apply_filter_all_threads};
use spec::VmConfig;
use vmm::{Confinement, Sandbox, ThreadKind, Violation};

use self::files::{Extent, restrict};
pub(crate) use self::files::{Rule, of_vm};
use self::filters::{Scope, compile, without_clone3};
use crate::args::{Arguments, Command};
use crate::{one, serve};

/// Action at a system call that a thread may not make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SeccompMode {
    /// The call fails, is logged, and ends the VM for which the thread works.
    #[default]
    True,
    /// The call is done; the kernel logs it (see `dmesg`, or the audit log).
    Log,
    /// The call fails with EPERM, and nothing else happens.
    Errno,
    /// No filters, and no rights are given up.
    False,
}

impl SeccompMode {
    fn refusal(self) -> Option<SeccompAction> {
        match self {
            Self::True => Some(SeccompAction::Trap),
            Self::Log => Some(SeccompAction::Log),
            Self::Errno => Some(SeccompAction::Errno(libc::EPERM.unsigned_abs())),
            Self::False => None,
        }
    }
}

/// The filters of the threads that handle guests' data.
#[derive(Debug)]
struct Seccomp {
    vcpu: BpfProgram,
    devices: BpfProgram,
}

static SECCOMP: OnceLock<Seccomp> = OnceLock::new();

/// Gives up rights that the program never needs, for good. Called before there are other threads:
/// capabilities are each thread's own.
pub(crate) fn drop_rights(mode: SeccompMode) -> Result<()> {
    if mode == SeccompMode::False {
        return Ok(());
    }
    // Not even a program with the set-user-ID bit gets more rights than this process has.
    rustix::thread::set_no_new_privs(true).context("cannot set no_new_privs")?;
    capabilities::drop_unneeded().context("cannot drop capabilities")
}

/// Denies all files that the command line does not need, for good, where it or the configuration of its
/// VM asks for that. Called before there are other threads: Landlock restricts each thread of its own.
pub(crate) fn restrict_files(
    arguments: &Arguments,
    mut vm: Option<&mut VmConfig>,
) -> Result<Extent> {
    let (asked, extra) = asked_by(vm.as_deref_mut())?;
    if !arguments.sandbox.landlock && !asked {
        if !extra.is_empty() {
            bail!("landlock_rules has no effect without landlock_enable or --landlock");
        }
        return Ok(Extent::NotAsked);
    }
    let vm = vm.as_deref();
    let (mut rules, image_dirs, migration) = match &arguments.command {
        Some(Command::Serve(serve)) => (serve::files(serve)?, &serve.image_dir, &serve.migration),
        Some(Command::Run(run)) => {
            let vm_arguments = &run.vm;
            let files = one::files(vm_arguments, vm)?;
            (files, &vm_arguments.image_dir, &vm_arguments.migration)
        }
        None => {
            let vm_arguments = &arguments.vm;
            let files = one::files(vm_arguments, vm)?;
            (files, &vm_arguments.image_dir, &vm_arguments.migration)
        }
        Some(_) => bail!("--landlock is for `serve`, `run` and a VM on the command line"),
    };
    rules.extend(image_dirs.iter().map(|dir| Rule::reading(dir)));
    rules.extend(migration.migration_storage.as_deref().map(Rule::folder));
    let log = arguments.logging.log_file.as_deref();
    rules.extend(log.map(Rule::maker_of));
    rules.extend(arguments.sandbox.landlock_rules.iter().cloned());
    rules.extend(extra);
    restrict(&rules)
}

/// Takes Landlock's fields out of a configuration: the process is restricted, wherever the VM moves, and
/// a later configuration cannot change that.
fn asked_by(vm: Option<&mut VmConfig>) -> Result<(bool, Vec<Rule>)> {
    let Some(vm) = vm else {
        return Ok((false, Vec::new()));
    };
    let rules = vm.landlock_rules.take().unwrap_or_default();
    let rules = rules.iter().map(Rule::try_from).collect::<Result<_>>()?;
    Ok((std::mem::take(&mut vm.landlock_enable), rules))
}

/// Confines the process, for good, and returns the means to confine guests' threads further.
pub(crate) fn enter(mode: SeccompMode) -> Result<Confinement> {
    let Some(refusal) = mode.refusal() else {
        return Ok(Confinement::default());
    };
    let confinement = prepare(refusal.clone())?;
    if mode == SeccompMode::True {
        trap::install()?;
    }
    let process =
        compile(Scope::Process, refusal).context("cannot compile the process's filter")?;
    // All threads at once: the runtime of logging has some already. Of two filters the stricter
    // answer counts, so `clone3` fails with ENOSYS and the C library falls back.
    for filter in [&without_clone3()?, &process] {
        apply_filter_all_threads(filter).context(
            "the kernel refuses a system call filter (CONFIG_SECCOMP_FILTER); --seccomp false runs without",
        )?;
    }
    Ok(confinement)
}

/// Compiles the filters of guests' threads, once.
fn prepare(refusal: SeccompAction) -> Result<Confinement> {
    let seccomp = Seccomp {
        vcpu: compile(Scope::Vcpu, refusal.clone()).context("cannot compile the vCPUs' filter")?,
        devices: compile(Scope::Devices, refusal).context("cannot compile the devices' filter")?,
    };
    Ok(Confinement::new(SECCOMP.get_or_init(|| seccomp)))
}

impl Sandbox for Seccomp {
    fn enter(&self, kind: ThreadKind) -> io::Result<()> {
        let (filter, rights) = match kind {
            ThreadKind::Vcpu => (&self.vcpu, CapabilitySet::empty()),
            ThreadKind::Devices => (&self.devices, capabilities::OF_DEVICES),
            ThreadKind::Drivers => return Ok(()),
        };
        // Before the filter, which does not allow `capset`.
        capabilities::keep(rights)?;
        apply_filter(filter).map_err(io::Error::other)
    }

    fn violation(&self) -> Option<Violation> {
        let call = trap::take()?;
        let thread = std::thread::current();
        Some(Violation {
            thread: thread.name().unwrap_or("unnamed").to_owned(),
            syscall: call_name(call),
        })
    }
}

/// The name and number of a system call, as in `ptrace (101)`.
fn call_name(number: i64) -> String {
    let call = usize::try_from(number).ok().and_then(syscalls::Sysno::new);
    match call {
        Some(call) => format!("{} ({number})", call.name()),
        None => number.to_string(),
    }
}
