//! Resizes of the vCPUs.
//!
//! Plugging is done when the guest was notified: the vCPUs are there, and an event tells if the guest
//! does not take one. Unplugging is done when the guest has ejected the vCPUs.

use std::sync::Arc;

use ::devices::cpus::{DEVICE_CHECK, Refusal};
use control::{Category, RequestError};
use spec::{ResizeResource, VmConfig};

use super::{Driver, Stage};

const VCPUS: ResizeResource = ResizeResource::Vcpus;

impl Driver {
    /// Checks whether the VM can be resized to `wanted` vCPUs.
    pub(super) fn check_vcpus(&self, wanted: u32) -> Result<(), RequestError> {
        let max = self.config.cpus.max_vcpus;
        if !(1..=max).contains(&wanted) {
            let detail =
                format!("`desired_vcpus` ({wanted}) must be 1 to the VM's `max_vcpus` ({max})");
            return Err(RequestError::new(
                Category::Unprocessable,
                "vcpus-out-of-range",
                detail,
            ));
        }
        self.check_no_resize(VCPUS)
    }

    /// The number of plugged vCPUs, while there is a machine. Requests wait in the other stages.
    pub(super) fn present_vcpus(&self) -> Option<u32> {
        match &self.stage {
            Stage::On(active) => Some(active.plugged_vcpus().count()),
            _ => None,
        }
    }

    /// Makes the number of vCPUs, which was checked, that of the next machine, and asks the guest to
    /// eject the surplus of `present` vCPUs. Missing ones are plugged by now.
    pub(super) fn resize_vcpus(&mut self, present: Option<u32>, wanted: u32) {
        self.keep_vcpus(wanted);
        let Some(present) = present.filter(|present| *present != wanted) else {
            return;
        };
        self.begin_resize(VCPUS, present.into(), wanted.into());
        if wanted > present {
            self.resize_progressed(VCPUS, wanted.into());
            self.show_vcpus();
        } else if let Stage::On(active) = &mut self.stage {
            active.want_vcpus_back(wanted);
        }
    }

    /// Makes the number part of the configuration.
    fn keep_vcpus(&mut self, count: u32) {
        if self.config.cpus.boot_vcpus != count {
            let mut config = VmConfig::clone(&self.config);
            config.cpus.boot_vcpus = count;
            self.set_config(Arc::new(config));
        }
    }

    /// The guest has ejected vCPUs, or refused what was asked of it.
    pub(super) fn vcpus_answered(&mut self) {
        let Stage::On(active) = &mut self.stage else {
            return self.report_cpus_again();
        };
        let refusals = active.take_vcpu_answers();
        let (present, is_open) = (
            active.plugged_vcpus().count(),
            !active.leaving_vcpus().is_empty(),
        );
        self.show_vcpus();
        self.resize_progressed(VCPUS, present.into());
        for refusal in refusals {
            let why = describe(refusal);
            tracing::warn!(why, "a guest refused to plug or eject a vCPU");
            match refusal.code {
                // One for each vCPU that was plugged, so a guest cannot cause as many as it likes.
                DEVICE_CHECK => self.publisher.record("resize-failed", Some(why)),
                _ => self.resize_refused(VCPUS, &why),
            }
        }
        // Others that were asked may still be ejected.
        if !is_open {
            self.resize_failed(VCPUS, "the guest refused to eject vCPUs");
        }
        if !self.is_pending(VCPUS) {
            // What the guest kept stays, also at the next boot, and what it ejected late is gone.
            self.keep_vcpus(present);
        }
    }

    /// The deadline has passed: the guest need not eject what it has not heard of.
    pub(super) fn withdraw_vcpus(&mut self) {
        if let Stage::On(active) = &mut self.stage {
            active.withdraw_vcpu_requests();
            let present = active.plugged_vcpus().count();
            self.keep_vcpus(present);
        }
    }

    /// A guest came with its vCPUs: what it is asked to eject is pending here from now on.
    pub(super) fn vcpus_arrived(&mut self) {
        let Stage::On(active) = &self.stage else {
            return;
        };
        let (present, leaving) = (active.plugged_vcpus().count(), active.leaving_vcpus());
        let wanted = self.config.cpus.boot_vcpus;
        if !leaving.is_empty() && wanted < present {
            self.begin_resize(VCPUS, present.into(), wanted.into());
        } else {
            // The resize ended at the source after the configuration was sent.
            self.keep_vcpus(present);
        }
        self.show_vcpus();
    }

    /// Shows how many vCPUs the guest has.
    pub(super) fn show_vcpus(&self) {
        let vcpus = match &self.stage {
            Stage::On(active) => Some(active.plugged_vcpus().count()),
            _ => None,
        };
        if self.publisher.current().vcpus != vcpus {
            self.publisher.update(|status| status.vcpus = vcpus);
        }
    }

    /// Another thread has the machine: what the machine reported is handled after that.
    fn report_cpus_again(&self) {
        if matches!(self.stage, Stage::Busy(_)) {
            self.reporter().report(crate::guest_event::GuestEvent::Cpus);
        }
    }
}

/// The refusal in words (ACPI 6.5, tables 6.66 and 6.67).
fn describe(refusal: Refusal) -> String {
    let Refusal { vcpu, code, status } = refusal;
    let verb = match code {
        DEVICE_CHECK => "use",
        _ => "eject",
    };
    let why = match (code, status) {
        (DEVICE_CHECK, 0x81) => ": its driver failed",
        (DEVICE_CHECK, 0x82) | (_, 0x80) => ": it does not support that",
        (_, 0x81) => ": the vCPU is in use",
        (_, 0x82) => ": the vCPU is busy",
        (_, 0x83) => ": something that depends on the vCPU is busy",
        _ => "",
    };
    format!("the guest refused to {verb} vCPU {vcpu}{why} (_OST status {status:#x})")
}
