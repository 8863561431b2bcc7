//! The source's VM, as the migration engine sees it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::devices::tpm::TpmSnapshot;
use control::{Registry, VmHandle};
use migration::{
    Block, BlockInfo, Offer, Outcome, Refusal, Source, SourceDisk, Stopped, Whereabouts,
};
use spec::VmId;
use uuid::Uuid;

use super::freeze::DiskFreeze;
use super::storage::{BaseReader, CopiedDisk, KnownBases, Selection, pre_sync};
use super::{ActiveMigration, MachineOffer, OFFER_VERSION, rows};
use crate::driver::{Caller, Driver, SourceParts};

/// How long a command of the guest's TPM, and each answer of its emulator, may take while the guest
/// runs.
const TPM_PATIENCE: Duration = Duration::from_secs(10);
/// The same while the guest is stopped: if that is not enough, the guest stays and resumes.
const TPM_PATIENCE_STOPPED: Duration = Duration::from_secs(2);

pub(super) struct SourceVm {
    vm: VmId,
    parts: SourceParts,
    /// Present if the guest leaves the service.
    listed: Option<Listed>,
    tracking: bool,
    /// The disks that are copied, or why they cannot be.
    copied: Result<Vec<CopiedDisk>, Refusal>,
    /// The destination can say which bases of these it has.
    offers_bases: bool,
    /// The migration that shows what becomes of bases.
    moving: Option<Arc<ActiveMigration>>,
    /// Disks whose images are frozen at the moment of a snapshot.
    frozen: Vec<String>,
}

/// A VM in the list of a service, which leaves it for a destination.
pub(super) struct Listed {
    pub(super) registry: Registry,
    pub(super) vm: VmHandle,
    pub(super) destination: String,
}

impl SourceVm {
    fn places(&self) -> BTreeMap<String, u8> {
        let all = self.parts.places.iter();
        all.map(|(id, at)| (id.clone(), at.devfn())).collect()
    }

    pub(super) fn new(vm: VmId, parts: SourceParts) -> Self {
        Self {
            vm,
            parts,
            listed: None,
            tracking: false,
            copied: Ok(Vec::new()),
            offers_bases: false,
            moving: None,
            frozen: Vec::new(),
        }
    }

    pub(super) fn moving(
        vm: VmId,
        parts: SourceParts,
        listed: Listed,
        selection: &Selection,
    ) -> Self {
        let copied = CopiedDisk::all(&parts.disks, selection);
        let mut source = Self::new(vm, parts);
        source.copied = copied;
        source.listed = Some(listed);
        source
    }

    /// Reads the bases of copied disks, so that a destination can compare its own.
    pub(super) fn identify_bases(
        &mut self,
        known: &Arc<KnownBases>,
        moving: &Arc<ActiveMigration>,
    ) {
        let reader = BaseReader {
            known,
            decision: &moving.decision,
            notes: &moving.bases,
        };
        let copied = self.copied.iter_mut().flatten();
        copied.for_each(|disk| reader.identify(disk));
        self.moving = Some(Arc::clone(moving));
    }

    /// Returns the VM, of whose disks these are frozen for a snapshot.
    pub(super) fn freezing(mut self, disks: Vec<String>) -> Self {
        self.frozen = disks;
        self
    }

    /// Returns the freeze of these disks, for the snapshot with this identity.
    pub(super) fn freeze(&self, id: Uuid) -> DiskFreeze {
        DiskFreeze::new(self.parts.caller.clone(), id, self.frozen.clone())
    }

    /// Reads the state of the TPM, if the machine has one.
    fn tpm(&self, patience: Duration) -> Result<Option<TpmSnapshot>, Refusal> {
        let tpm = self.parts.tpm.as_ref();
        let snapshot = tpm.map(|tpm| tpm.snapshot(patience)).transpose();
        snapshot.map_err(|error| Refusal::new("tpm-unusable", error.to_string()))
    }

    /// Returns what ends the operation while others use this: see [`Self::end`].
    pub(super) fn ending(&self) -> Ending {
        Ending(self.parts.caller.clone())
    }

    /// The guest stays as it is, and `event` is recorded of it.
    pub(super) fn end(&self, event: &'static str, detail: String) {
        self.ending().end(event, detail);
    }

    /// Returns since when the clocks of a guest that is paused are stopped. Those of a restored guest that
    /// never ran count from now on.
    pub(super) fn clocks_stopped_at(&self) -> Result<Instant, Refusal> {
        let stopped = self.parts.caller.attempt(Driver::clocks_stopped_at)?;
        Ok(stopped.unwrap_or_else(Instant::now))
    }

    /// Stops the guest for a live snapshot.
    pub(super) fn stop_to_image(&self) -> Result<Stopped, Refusal> {
        self.parts.caller.attempt_later(Driver::stop_to_image)
    }

    /// Resumes the guest, of which a live snapshot has the state.
    pub(super) fn resume_imaged(&self) -> Result<(), Refusal> {
        self.parts.caller.attempt(Driver::resume_imaged)
    }
}

/// Ends a migration or snapshot whose guest stays.
pub(super) struct Ending(Caller);

impl Ending {
    pub(super) fn end(&self, event: &'static str, detail: String) {
        let stayed = self.0.attempt(Driver::stay);
        // If the machine is gone, so is what there would be to tidy up. The VM may still be there: a
        // guest can be reset while a live snapshot of it is written.
        if let Err(error) = stayed {
            tracing::debug!(%error, "the guest of a migration or snapshot is not there");
        }
        let caller = self.0.for_any_machine();
        let _ = caller.call(move |driver, _| driver.record(event, detail));
    }
}

fn info(block: &Block) -> BlockInfo {
    BlockInfo {
        name: block.name.clone(),
        size: block.ram.len() as u64,
    }
}

fn kvm(error: &hypervisor::KvmError) -> Refusal {
    Refusal::new("kvm-refused", error.to_string())
}

impl Source for SourceVm {
    fn offer(&mut self) -> Result<Offer, Refusal> {
        let copied = self.copied.as_ref().map_err(Clone::clone)?;
        let image = |disk: &CopiedDisk| disk.for_offer(self.offers_bases);
        let images = copied.iter().map(image).collect();
        let cpu = self.parts.caller.attempt(Driver::cpu_model)?;
        let machine = MachineOffer {
            version: OFFER_VERSION,
            config: spec::VmConfig::clone(&self.parts.config),
            places: self.places(),
            cpuid: rows(&cpu.cpuid),
            arch_capabilities: cpu.visible_arch_capabilities(),
            images,
            frozen: self.frozen.clone(),
        };
        let machine = serde_json::to_vec(&machine)
            .map_err(|error| Refusal::new("cannot-be-saved", error.to_string()))?;
        Ok(Offer {
            vm: self.vm.as_str().to_owned(),
            machine: machine.into(),
            blocks: self.blocks().iter().map(info).collect(),
            connections: 1,
            postcopy: false,
            given: false,
            verify: false,
            // The engine lists them.
            disks: Vec::new(),
        })
    }

    fn blocks(&self) -> Vec<Block> {
        self.parts.ram.blocks()
    }

    fn disks(&self) -> Vec<SourceDisk> {
        // If they cannot be copied, the offer fails.
        let copied = self.copied.iter().flatten();
        copied.map(CopiedDisk::for_engine).collect()
    }

    fn may_offer_bases(&mut self) {
        self.offers_bases = true;
        if let (Ok(copied), Some(moving)) = (&self.copied, &self.moving) {
            // Until it says otherwise.
            BaseReader::answered(&moving.bases, copied, &[]);
        }
    }

    fn leave_out_bases(&mut self, disks: &[String]) -> Result<(), Refusal> {
        let copied = self.copied.as_ref().map_err(Clone::clone)?;
        for name in disks {
            let disk = copied.iter().find(|disk| disk.id() == name);
            if !self.offers_bases || !disk.is_some_and(CopiedDisk::leave_out_base) {
                let why = format!("the destination has a base of {name:?}, and none was offered");
                return Err(Refusal::new("bases-unexpected", why));
            }
        }
        if let Some(moving) = &self.moving {
            BaseReader::answered(&moving.bases, copied, disks);
        }
        Ok(())
    }

    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.copied
            .iter()
            .flatten()
            .try_for_each(CopiedDisk::start)?;
        let memslots = &self.parts.memslots;
        memslots.track_dirty(true).map_err(|error| kvm(&error))?;
        self.tracking = true;
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), Refusal> {
        self.copied.iter().flatten().for_each(CopiedDisk::stop);
        let memslots = &self.parts.memslots;
        memslots.track_dirty(false).map_err(|error| kvm(&error))?;
        self.tracking = false;
        Ok(())
    }

    fn harvest(&mut self) -> Result<(), Refusal> {
        self.parts.memslots.harvest().map_err(|error| kvm(&error))
    }

    fn throttle(&mut self, percent: u8) {
        self.parts.throttle.set(percent);
    }

    fn dry_run(&mut self) -> Result<Vec<u8>, Refusal> {
        let tpm = self.tpm(TPM_PATIENCE)?;
        let caller = &self.parts.caller;
        caller.attempt(move |driver| driver.save_dry_run(tpm.as_ref()))
    }

    fn pre_sync(&mut self) {
        // What the host has cached of the disks' images has to be on the storage when the guest is handed
        // over: the most of it is written now.
        for (id, disk) in &self.parts.disks {
            pre_sync(id, disk);
        }
        // A command of the TPM that is in progress at the stop would lengthen it.
        if let Some(tpm) = &self.parts.tpm {
            tpm.wait_idle(TPM_PATIENCE);
        }
    }

    fn stop(&mut self) -> Result<Stopped, Refusal> {
        self.parts.caller.attempt_later(Driver::stop_to_move)
    }

    fn save(&mut self) -> Result<Vec<u8>, Refusal> {
        let tpm = self.tpm(TPM_PATIENCE_STOPPED)?;
        let caller = &self.parts.caller;
        caller.attempt(move |driver| driver.save_whole(tpm.as_ref()))
    }

    fn flush(&mut self) -> Result<(), Refusal> {
        self.parts.caller.attempt(Driver::flush)
    }

    fn hand_over(&mut self) -> Result<(), Refusal> {
        // The destination has images of its own for the disks that are copied. Those here stay locked: blocks
        // of them may follow the guest, and must not change until they have.
        let copied = self.copied.iter().flatten().map(CopiedDisk::id);
        let kept: Vec<String> = copied.map(str::to_owned).collect();
        let caller = &self.parts.caller;
        caller.attempt(move |driver| driver.hand_over(&kept))
    }

    fn show(&mut self, guest: &Whereabouts) {
        let guest = guest.clone();
        // If the machine is gone, there is nothing to show.
        let _ = self
            .parts
            .caller
            .call(move |driver, _| driver.show_whereabouts(&guest));
    }

    fn resume_copying(&mut self) -> Result<(), Refusal> {
        self.parts.caller.attempt(Driver::resume_copying)
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        self.parts.caller.attempt(Driver::stay)
    }

    fn gone(&mut self) {
        // The machine may be gone already.
        if let Ok(gone) = self.parts.caller.call(Driver::left) {
            gone.wait();
        }
    }

    fn ended(&mut self, outcome: &Outcome) {
        match (outcome, self.listed.take()) {
            (Outcome::Moved, Some(listed)) => {
                let detail = format!("to {}", listed.destination);
                listed.registry.forget(&listed.vm, "migrated", Some(detail));
            }
            (Outcome::Lost(why), Some(listed)) => {
                let detail = Some(why.detail.clone());
                let registry = &listed.registry;
                registry.forget(&listed.vm, "migration-failed", detail);
            }
            (Outcome::Moved | Outcome::Lost(_), None) => {}
            // It can be migrated again, and its owner may read why it was not.
            (Outcome::Stayed { why, .. }, _) => self.end("migration-failed", why.detail.clone()),
        }
    }
}

impl Drop for SourceVm {
    fn drop(&mut self) {
        if self.tracking
            && let Err(error) = self.parts.memslots.track_dirty(false)
        {
            tracing::debug!(%error, "cannot stop tracking the dirty pages of a machine");
        }
    }
}
