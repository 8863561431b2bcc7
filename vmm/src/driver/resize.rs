//! Resizes that need the guest: what was requested, how far the guest is, and its deadline.
//!
//! ```text
//!   begin_resize ──► pending ── the guest has done all of it ──► event `resized`
//!                       │
//!                       └── it refuses, or the deadline passes ──► event `resize-failed`
//! ```
//!
//! One resize of each resource, and of each memory zone, can be pending; another is refused with
//! `resize-pending`. A guest may
//! answer late, in part or never, so a pending resize always ends by its deadline, and what the guest
//! did by then stays done.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use control::{Ask, Category, Reply, RequestError};
use spec::{PendingResize, ResizeResource, VmConfig, VmResize, VmResizeZone};

use super::memory::MemoryPlan;
use super::{Driver, Stage, internal};
use crate::devices::DeviceHandle;

/// How long a guest may take to do what a resize asks for.
pub(super) const RESIZE_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 60 });

/// New sizes, which were checked.
struct Plan {
    vcpus: Option<u32>,
    memory: Option<MemoryPlan>,
    balloon: Option<u64>,
}

/// A resource that a guest has more or less of: one of those of the machine, or a memory zone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Resized {
    pub(super) resource: ResizeResource,
    /// The name of the zone, if the memory has zones.
    pub(super) zone: Option<String>,
}

impl From<ResizeResource> for Resized {
    fn from(resource: ResizeResource) -> Self {
        let zone = None;
        Self { resource, zone }
    }
}

impl fmt::Display for Resized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.zone {
            None => self.resource.fmt(f),
            Some(zone) => write!(f, "{} zone `{zone}`", self.resource),
        }
    }
}

/// The resizes that are pending, at most one of each resource.
#[derive(Default)]
pub(super) struct Resizes(BTreeMap<Resized, Pending>);

struct Pending {
    shown: PendingResize,
    deadline: Instant,
    /// The guest's first refusal of a part.
    refusal: Option<String>,
}

impl Resizes {
    /// Returns when the next of them fails.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.0.values().map(|pending| pending.deadline).min()
    }

    fn shown(&self) -> Vec<PendingResize> {
        self.0
            .values()
            .map(|pending| pending.shown.clone())
            .collect()
    }
}

impl Driver {
    /// Whether a resize of the resource is pending.
    pub(super) fn is_pending(&self, resource: impl Into<Resized>) -> bool {
        self.resizes.0.contains_key(&resource.into())
    }

    /// Fails with `resize-pending` if an earlier resize of the resource is not over.
    pub(super) fn check_no_resize(&self, resource: impl Into<Resized>) -> Result<(), RequestError> {
        let resource = resource.into();
        let Some(pending) = self.resizes.0.get(&resource) else {
            return Ok(());
        };
        let (to, actual) = (pending.shown.to, pending.shown.actual);
        let left = pending.deadline.saturating_duration_since(Instant::now());
        let detail = format!(
            "an earlier resize of the {resource} to {to} is pending: the guest has {actual}, and has \
             {} s left to complete it",
            left.as_secs()
        );
        Err(RequestError::new(
            Category::Pending,
            "resize-pending",
            detail,
        ))
    }

    /// The guest was asked to change the resource. The caller reports its progress with
    /// [`Driver::resize_progressed`].
    pub(super) fn begin_resize(&mut self, resource: impl Into<Resized>, from: u64, to: u64) {
        let resource = resource.into();
        let detail = format!("{resource}: {from} to {to}");
        let pending = Pending {
            shown: PendingResize {
                resource: resource.resource,
                zone: resource.zone.clone(),
                from,
                to,
                actual: from,
            },
            deadline: Instant::now() + RESIZE_PATIENCE,
            refusal: None,
        };
        self.resizes.0.insert(resource, pending);
        self.publisher.record("resize-requested", Some(detail));
        self.show_resizes();
    }

    /// The guest has this much of the resource now. Ends the pending resize if that is what was
    /// requested.
    pub(super) fn resize_progressed(&mut self, resource: impl Into<Resized>, actual: u64) {
        let resource = resource.into();
        let Some(pending) = self.resizes.0.get_mut(&resource) else {
            return;
        };
        pending.shown.actual = actual;
        let (from, to) = (pending.shown.from, pending.shown.to);
        if actual == to {
            self.resizes.0.remove(&resource);
            let detail = format!("{resource}: {from} to {to}");
            self.publisher.record("resized", Some(detail));
        }
        self.show_resizes();
    }

    /// The guest refused a part of the pending resize, if there is one. It may still do the rest.
    pub(super) fn resize_refused(&mut self, resource: impl Into<Resized>, why: &str) {
        if let Some(pending) = self.resizes.0.get_mut(&resource.into()) {
            pending.refusal.get_or_insert_with(|| why.to_owned());
        }
    }

    /// The guest will not do the rest: ends the pending resize, if there is one. A refusal of the guest
    /// is a better reason than `why`.
    pub(super) fn resize_failed(&mut self, resource: impl Into<Resized>, why: &str) {
        let resource = resource.into();
        let Some(pending) = self.resizes.0.remove(&resource) else {
            return;
        };
        let why = pending.refusal.as_deref().unwrap_or(why);
        let PendingResize {
            from, to, actual, ..
        } = pending.shown;
        tracing::warn!(%resource, from, to, actual, why, "a guest did not complete a resize");
        let detail = format!("{resource}: {from} to {to}, stays at {actual}: {why}");
        self.publisher.record("resize-failed", Some(detail));
        self.show_resizes();
    }
}

impl Driver {
    /// Ends the resizes whose deadline has passed. What was asked of the guest is withdrawn.
    pub(super) fn check_resizes(&mut self) {
        // Another thread may have the machine: this is called again when it is back.
        if !matches!(self.stage, Stage::On(_)) {
            return;
        }
        let now = Instant::now();
        let late = self.resizes.0.iter();
        let late: Vec<_> = late
            .filter(|(_, pending)| pending.deadline <= now)
            .map(|(resource, _)| resource.clone())
            .collect();
        for resource in late {
            let why = format!(
                "the guest did not complete it within {} s",
                RESIZE_PATIENCE.as_secs()
            );
            self.resize_failed(resource.clone(), &why);
            match resource.resource {
                ResizeResource::Vcpus => self.withdraw_vcpus(),
                ResizeResource::Memory => self.withdraw_memory(&resource),
            }
        }
    }

    /// The machine that was to be resized ends. The configuration has the requested sizes, with which
    /// the next machine is built.
    pub(super) fn resizes_end_with_machine(&mut self) {
        for (resource, pending) in std::mem::take(&mut self.resizes.0) {
            let PendingResize { from, to, .. } = pending.shown;
            let detail = format!("{resource}: {from} to {to}, by the end of the machine");
            self.publisher.record("resized", Some(detail));
        }
        self.show_resizes();
    }

    fn show_resizes(&self) {
        let shown = self.resizes.shown();
        if self.publisher.current().resizes != shown {
            self.publisher.update(|status| status.resizes = shown);
        }
    }

    /// Changes sizes of the VM, and answers. All are checked before any is changed, and what the host
    /// may lack (vCPUs, memory) comes before what cannot fail.
    pub(super) fn resize(&mut self, ask: Ask, sizes: &VmResize) {
        match self.plan(sizes) {
            Ok(plan) => self.carry_out(ask, plan),
            Err(refused) => ask.answer(Err(refused)),
        }
    }

    /// Changes the size of a memory zone, and answers.
    pub(super) fn resize_zone(&mut self, ask: Ask, zone: &VmResizeZone) {
        let plan = |memory| Plan {
            vcpus: None,
            memory,
            balloon: None,
        };
        match self.plan_zone(zone).map(plan) {
            Ok(plan) => self.carry_out(ask, plan),
            Err(refused) => ask.answer(Err(refused)),
        }
    }

    fn carry_out(&mut self, ask: Ask, plan: Plan) {
        let present = self.present_vcpus();
        let more = plan.vcpus.filter(|wanted| Some(*wanted) > present);
        let added = plan.memory.as_ref().map_or(0, |plan| plan.added);
        if present.is_none() || (more.is_none() && added == 0) {
            self.resize_planned(&plan, present);
            return ask.answer(Ok(Reply::Done));
        }
        // On another thread: a vCPU takes about a millisecond, and memory that is populated longer.
        let grow = move |active: &mut crate::machine::Active| active.grow(more, added);
        self.lend(grow, move |driver, grown, _| {
            if let Err(error) = grown {
                return ask.answer(Err(internal(&error)));
            }
            driver.resize_planned(&plan, present);
            ask.answer(Ok(Reply::Done));
        });
    }

    /// Checks all sizes.
    fn plan(&self, sizes: &VmResize) -> Result<Plan, RequestError> {
        if let Some(vcpus) = sizes.desired_vcpus {
            self.check_vcpus(vcpus)?;
        }
        if let Some(size) = sizes.desired_balloon {
            self.check_balloon(size)?;
        }
        let memory = sizes.desired_ram.map(|size| self.plan_memory(size));
        Ok(Plan {
            vcpus: sizes.desired_vcpus,
            memory: memory.transpose()?.flatten(),
            balloon: sizes.desired_balloon,
        })
    }

    /// Does what cannot fail. `present` vCPUs were plugged when the request came.
    fn resize_planned(&mut self, plan: &Plan, present: Option<u32>) {
        if let Some(vcpus) = plan.vcpus {
            self.resize_vcpus(present, vcpus);
        }
        if let Some(memory) = &plan.memory {
            self.resize_memory(memory);
        }
        if let Some(balloon) = plan.balloon {
            self.resize_balloon(balloon);
        }
    }

    fn check_balloon(&self, size: u64) -> Result<(), RequestError> {
        let refused =
            |code, detail: String| Err(RequestError::new(Category::Unprocessable, code, detail));
        let all = self.all_memory();
        if size > all {
            let detail =
                format!("`desired_balloon` ({size}) is more than the guest's memory ({all} bytes)");
            return refused("balloon-too-large", detail);
        }
        if self.config.balloon.is_none() {
            let detail = "the VM has no balloon: create the VM with one, of size 0";
            return refused("no-balloon", detail.to_owned());
        }
        Ok(())
    }

    fn resize_balloon(&mut self, size: u64) {
        let mut config = VmConfig::clone(&self.config);
        if let Some(balloon) = &mut config.balloon {
            balloon.size = size;
        }
        if let Stage::On(active) = &self.stage {
            for control in active.devices().controls() {
                if let DeviceHandle::Balloon(handle) = control {
                    handle.resize(size);
                }
            }
        }
        self.set_config(std::sync::Arc::new(config));
    }
}
