//! Checking an offer: everything that can be known before anything of this host is touched.
//!
//! ```text
//!   parse ─► validate ─► trust: paths, taps ─► CPUs ─► memory ─► CheckedOffer ─► build
//! ```
//!
//! Nothing is opened for writing, made or emptied before the last of these has passed: a machine is
//! built of a [`CheckedOffer`] only.

use std::collections::BTreeMap;
use std::path::Path;

use ::devices::host_file::{FileKind, Request};
use ::devices::pci::Bdf;
use control::{Registry, RequestError};
use migration::{BlockInfo, Offer, Refusal};
use spec::{CpuProfile, MemoryConfig, VmConfig, VmId};

use super::storage::{self, PlannedImage};
use super::taps::GivenTaps;
use super::trust::Allowed;
use super::{MachineOffer, OFFER_VERSION, cpuid};
use crate::arch::x86_64::cpu_model::CpuModel;
use crate::devices::slots;
use crate::machine::Host;
use crate::machine::ram::{self, BlockPlan};
use crate::{failure, paths};

/// An offer of which nothing is left to be refused but by the host itself.
pub(super) struct CheckedOffer {
    pub(super) vm: VmId,
    pub(super) config: VmConfig,
    /// The configuration with the checked paths.
    pub(super) resolved: VmConfig,
    pub(super) cpu: CpuModel,
    pub(super) on_bus: BTreeMap<String, Bdf>,
    /// The images to make, for disks whose content comes.
    pub(super) images: Vec<PlannedImage>,
    /// Disks of which the VM gets overlays.
    pub(super) frozen: Vec<String>,
}

/// Reads the offered machine, of which nothing but the form is checked yet.
pub(super) fn machine(offer: &Offer) -> Result<MachineOffer, Refusal> {
    let machine: MachineOffer = serde_json::from_slice(&offer.machine)
        .map_err(|error| unreadable(format!("cannot read the offer of a machine: {error}")))?;
    if machine.version != OFFER_VERSION {
        let why = format!(
            "the offer of a machine has version {}; this service reads version {OFFER_VERSION}",
            machine.version
        );
        return Err(unreadable(why));
    }
    Ok(machine)
}

fn unreadable(why: String) -> Refusal {
    Refusal::new("offer-unreadable", why)
}

/// Checks an offer. The VM gets the name `vm`, or else the one that it has at the source.
pub(super) fn check(
    offer: &Offer,
    vm: Option<VmId>,
    registry: &Registry,
    host: &Host,
    allowed: &Allowed,
    taps: &GivenTaps,
) -> Result<CheckedOffer, Refusal> {
    let machine = machine(offer)?;
    let wanted = CpuModel {
        cpuid: cpuid(&machine.cpuid)
            .ok_or_else(|| unreadable("the CPUs have too many CPUID leaves".to_owned()))?,
        arch_capabilities: machine.arch_capabilities,
    };
    let vm = vm.map_or_else(|| offer.vm.parse::<VmId>(), Ok);
    let vm = vm.map_err(|error| unreadable(error.to_string()))?;
    let mut config = machine.config;
    drop_unused_room(offer, &mut config.memory);
    taps.give(&mut config)?;
    config
        .validate(&registry.host_limits())
        .map_err(|found| refusal(RequestError::invalid(found)))?;
    config.name_devices();
    let on_bus = slots::from_offer(&config, &machine.places)
        .map_err(|error| unreadable(error.to_string()))?;
    check_memory(offer, &config).map_err(unreadable)?;
    if registry.get(vm.as_str()).is_ok() {
        let why = format!("a VM {:?} exists already", vm.as_str());
        return Err(Refusal::new("vm-exists", why));
    }
    let images = storage::plan(offer, &machine.images, &vm, &mut config, allowed.storage())?;
    let mut resolved = allowed.check(&config, &images)?;
    GivenTaps::copy(&config, &mut resolved);
    paths::check(&resolved).map_err(|error| {
        let told = failure::told(&error.into());
        Refusal::new(told.code, told.detail)
    })?;
    cpus_are_there(config.cpus.profile, host, &wanted)?;
    if !offer.given {
        memory_is_there(&config)?;
    }
    payload_is_there(&resolved)?;
    Ok(CheckedOffer {
        vm,
        config,
        resolved,
        cpu: wanted,
        on_bus,
        images,
        frozen: machine.frozen,
    })
}

/// Removes the room for hotplugged memory that a guest does not have: versions without memory hotplug
/// by ACPI accepted `hotplug_size` with that method, and built machines without the room. Here, too,
/// the machine has none, so that its map is the guest's; the next boot finds none either.
fn drop_unused_room(offer: &Offer, memory: &mut MemoryConfig) {
    if memory.has_dimms() && memory.hotplugged() == 0 && offer.blocks.len() == 1 {
        memory.hotplug_size = None;
    }
}

/// Checks that the offered blocks of memory are those of the configuration.
fn check_memory(offer: &Offer, config: &VmConfig) -> Result<(), String> {
    let wanted = ram::plan(&config.memory);
    let is_it = |(block, plan): (&BlockInfo, &BlockPlan)| {
        (&block.name, block.size) == (&plan.name, plan.size)
    };
    if offer.blocks.len() == wanted.len() && offer.blocks.iter().zip(&wanted).all(is_it) {
        return Ok(());
    }
    let list = |blocks: &mut dyn Iterator<Item = (&str, u64)>| {
        let all: Vec<_> = blocks
            .map(|(name, size)| format!("{name:?} of {size} bytes"))
            .collect();
        all.join(", ")
    };
    let offered = &mut offer
        .blocks
        .iter()
        .map(|block| (block.name.as_str(), block.size));
    Err(format!(
        "the offered memory ({}) does not match the configuration ({})",
        list(offered),
        list(&mut wanted.iter().map(|plan| (plan.name.as_str(), plan.size)))
    ))
}

/// The refusal of a request, with all its fields, for the other side.
pub(super) fn refusal(error: RequestError) -> Refusal {
    let mut detail = error.detail;
    for field in &error.fields {
        detail = format!("{detail}; {}: {}", field.pointer, field.detail);
    }
    Refusal::new(error.code, detail)
}

fn cpus_are_there(profile: CpuProfile, host: &Host, wanted: &CpuModel) -> Result<(), Refusal> {
    let lacking = host.lacking(profile, wanted);
    let lacking = lacking.map_err(|why| Refusal::new("hyperv-unavailable", why.to_string()))?;
    if lacking.is_empty() {
        return Ok(());
    }
    let detail = format!(
        "the CPUs of this host lack features that the guest uses: {}",
        lacking.join(", ")
    );
    Err(Refusal::new("cpu-lacks-features", detail))
}

/// Checks that the files are readable from which the guest would boot anew. They are read by a reset only.
fn payload_is_there(config: &VmConfig) -> Result<(), Refusal> {
    let payload = &config.payload;
    let files = [
        ("kernel", &payload.kernel),
        ("firmware", &payload.firmware),
        ("initramfs", &payload.initramfs),
    ];
    for (what, path) in files {
        if let Some(path) = path
            && let Err(error) = Request::read(Path::new(path), &[FileKind::Regular]).open()
        {
            let detail = format!(
                "the guest's {what}, which a reboot needs, cannot be read on this host: {error}"
            );
            return Err(Refusal::new("payload-missing", detail));
        }
    }
    Ok(())
}

/// The host has room for the guest's memory. Huge pages are reserved when the machine is made.
fn memory_is_there(config: &VmConfig) -> Result<(), Refusal> {
    let told = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    // KiB.
    let field = |name: &str| -> Option<u64> {
        let line = told.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    // A host that does not tell is not in the way.
    let Some(available) = field("MemAvailable:") else {
        return Ok(());
    };
    let available = available.saturating_add(field("SwapFree:").unwrap_or(0)) << 10;
    let zones = config.memory.all_zones().into_iter();
    let needed = zones
        .filter(|zone| !zone.hugepages)
        .map(|zone| zone.size.saturating_add(zone.hotplugged()))
        .fold(0, u64::saturating_add);
    if needed > available {
        let detail = format!(
            "the guest has {} MiB of memory, and this host has {} MiB available",
            needed >> 20,
            available >> 20
        );
        return Err(Refusal::new("memory-short", detail));
    }
    Ok(())
}
