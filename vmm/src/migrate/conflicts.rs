//! What VMs have in common and must not: files, sockets and taps.
//!
//! Forks are checked before anything happens to their VM. From the freeze of its disks on there is no way back
//! for it: it continues on overlays, also if its forks cannot be made.

use std::collections::HashMap;

use ::devices::Console;
use ::devices::host_file::Identity;
use control::Registry;
use migration::{Offer, Refusal};
use spec::{ConsoleMode, PathUse, VmConfig, VmId, VmState};
use virtio_devices::vsock::Vsock;

use super::offer::{self, CheckedOffer};
use super::taps::GivenTaps;
use super::trust::Allowed;
use crate::devices::open;
use crate::failure::{self, BuildError, PortError};
use crate::machine::Host;

/// The use of a file, socket or tap by a VM.
struct User {
    vm: VmId,
    /// The field of its configuration.
    field: String,
    is_shared: bool,
}

/// The files, sockets and taps of VMs.
#[derive(Default)]
struct Users {
    paths: HashMap<Identity, User>,
    taps: HashMap<String, User>,
}

/// A file, socket or tap that two VMs name.
struct Conflict<'a> {
    field: String,
    name: String,
    other: &'a User,
}

impl Users {
    /// Adds those of a VM. Of several users of one file, one that writes is kept.
    fn add(&mut self, vm: &VmId, config: &VmConfig) {
        for (identity, user, _) in paths(vm, config) {
            let kept = self.paths.get(&identity);
            if kept.is_none_or(|kept| kept.is_shared) {
                self.paths.insert(identity, user);
            }
        }
        for (tap, user) in taps(vm, config) {
            self.taps.entry(tap).or_insert(user);
        }
    }

    /// Finds something that this VM cannot have because another has it.
    fn conflict(&self, vm: &VmId, config: &VmConfig) -> Option<Conflict<'_>> {
        let path = paths(vm, config).find_map(|(identity, user, name)| {
            let other = self.paths.get(&identity)?;
            let field = user.field;
            let conflict = Conflict { field, name, other };
            (!(user.is_shared && other.is_shared)).then_some(conflict)
        });
        path.or_else(|| {
            taps(vm, config).find_map(|(name, user)| {
                let other = self.taps.get(&name)?;
                let (field, name) = (user.field, format!("the tap {name}"));
                Some(Conflict { field, name, other })
            })
        })
    }
}

/// The files and sockets that a VM names, each with its path. Devices that any number of users share are none.
fn paths<'a>(
    vm: &'a VmId,
    config: &'a VmConfig,
) -> impl Iterator<Item = (Identity, User, String)> + use<'a> {
    config.paths().into_iter().filter_map(|named| {
        let user = User {
            vm: vm.clone(),
            field: field(&named.pointer),
            is_shared: named.used == PathUse::Read,
        };
        Some((
            Identity::of(named.path.as_ref())?,
            user,
            named.path.to_owned(),
        ))
    })
}

/// The taps that a VM names. A pattern such as `tap%d` names none.
fn taps<'a>(vm: &'a VmId, config: &'a VmConfig) -> impl Iterator<Item = (String, User)> + use<'a> {
    let nets = config.net.iter().flatten().enumerate();
    nets.filter_map(|(index, net)| {
        let tap = net.tap.clone().filter(|tap| !tap.contains('%'))?;
        let user = User {
            vm: vm.clone(),
            field: format!("net.{index}.tap"),
            is_shared: false,
        };
        Some((tap, user))
    })
}

/// `serial.file`, of `/serial/file`.
fn field(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

/// Checks that these VMs can be made beside the VM `parent`, whose disks `frozen` will be read only. Opens
/// images and files, and closes them.
///
/// What only the host can refuse when the machines are made is not found: memory, descriptors, taps of other
/// programs.
pub(super) fn check_forks(
    (parent, config): (&VmId, &VmConfig),
    frozen: &[String],
    offers: &[Offer],
    registry: &Registry,
    host: &Host,
) -> Result<(), Refusal> {
    let mut parents = config.clone();
    share(&mut parents, frozen);
    // Its emulator is connected, and another one may listen at the path by now.
    parents.tpm = None;
    let mut users = Users::default();
    users.add(parent, &parents);
    let mut others = Users::default();
    for (id, config) in running(registry, parent) {
        // Programs of the host show by their locks and sockets; a tap shows nothing.
        for (tap, user) in taps(&id, &config) {
            others.taps.entry(tap).or_insert(user);
        }
    }
    for offer in offers {
        let given = Offer {
            given: true,
            ..offer.clone()
        };
        let named = |why: Refusal| match offers.len() {
            1 => why,
            _ => Refusal::new(&why.code, format!("VM {}: {}", offer.vm, why.detail)),
        };
        let checked = offer::check(
            &given,
            None,
            registry,
            host,
            &Allowed::all(),
            &GivenTaps::default(),
        );
        let CheckedOffer {
            vm,
            mut resolved,
            frozen,
            ..
        } = checked.map_err(named)?;
        share(&mut resolved, &frozen);
        let conflict = users.conflict(&vm, &resolved);
        if let Some(Conflict { field, name, other }) =
            conflict.or_else(|| others.conflict(&vm, &resolved))
        {
            let why = format!(
                "`{field}` names {name}, which the VM {} has as `{}`: each VM needs its own \
                 (`overrides`, with `{{n}}` for the number of the VM)",
                other.vm, other.field
            );
            return Err(named(Refusal::new("file-in-use", why)));
        }
        opened(&resolved, &frozen, host).map_err(|error| {
            let told = failure::told(&error);
            let detail = told.detail + &advice(registry, &vm, &resolved);
            named(Refusal::new(told.code, detail))
        })?;
        users.add(&vm, &resolved);
    }
    Ok(())
}

/// Has a configuration read these disks, which get an overlay.
fn share(config: &mut VmConfig, frozen: &[String]) {
    for disk in config.disks.iter_mut().flatten() {
        disk.readonly |= disk.id.as_ref().is_some_and(|id| frozen.contains(id));
    }
}

/// Opens what a machine would, and closes it. Disks that get an overlay are not opened: the base of the
/// overlay is what the VM has open now.
fn opened(config: &VmConfig, frozen: &[String], host: &Host) -> Result<(), BuildError> {
    for end in config.console_ends() {
        let checked = match (end.mode, end.file, end.socket) {
            (ConsoleMode::File, Some(path), _) => Console::check_file(path.as_ref()),
            (ConsoleMode::Socket, _, Some(path)) => Console::check_socket(path.as_ref()),
            _ => Ok(()),
        };
        checked.map_err(PortError::of(end.name))?;
    }
    if let Some(vsock) = &config.vsock {
        Vsock::check(vsock.socket.as_ref())?;
    }
    let disks = config.disks.iter().flatten();
    let is_frozen = |id: &Option<String>| id.as_ref().is_some_and(|id| frozen.contains(id));
    for disk in disks.filter(|disk| !is_frozen(&disk.id)) {
        open::check_disk(disk, host)?;
    }
    Ok(())
}

/// The codes of refusals because of a file, socket or tap that may have another user.
const IN_USE: [&str; 6] = [
    "file-in-use",
    "disk-in-use",
    "console-unusable",
    "vsock-unusable",
    "tap-unusable",
    "tpm-unusable",
];

/// Returns what helps a client whose VM cannot be made because of something that is in use.
pub(super) fn helped(why: Refusal, registry: &Registry, vm: &VmId, config: &VmConfig) -> Refusal {
    if !IN_USE.contains(&why.code.as_str()) {
        return why;
    }
    let advice = advice(registry, vm, config);
    Refusal::new(why.code, why.detail + &advice)
}

/// Names the VM of this service that uses a file, socket or tap of this configuration, and what can be done.
fn advice(registry: &Registry, vm: &VmId, config: &VmConfig) -> String {
    let mut users = Users::default();
    for (id, config) in running(registry, vm) {
        users.add(&id, &config);
    }
    match users.conflict(vm, config) {
        Some(Conflict { field, other, .. }) => format!(
            "; the VM {} of this service has it as `{}`: give the new VM another `{field}` \
             (`overrides`, `--overrides FILE`)",
            other.vm, other.field
        ),
        None => "; `overrides` (`--overrides FILE`) can name another".to_owned(),
    }
}

/// The other VMs of the service that have a machine.
fn running(registry: &Registry, other_than: &VmId) -> Vec<(VmId, VmConfig)> {
    let vms = registry.list().into_iter();
    let vms = vms.filter(|vm| vm.id() != other_than);
    vms.filter_map(|vm| {
        let info = vm.info();
        let is_on = matches!(info.state, VmState::Running | VmState::Paused);
        is_on.then(|| (vm.id().clone(), info.config))
    })
    .collect()
}
