//! Memory that is added through ACPI, with a guest that is played by its accesses to the registers.

use ::devices::dimms::{EVENT, STATUS};
use ::migration::{Decision, Progress};
use control::SnapshotOf;
use spec::{ForkVm, HotplugMethod, MigrationPhase, RestoreConfig, VmConfig, VmSnapshotConfig};

use super::*;
use crate::driver::Purpose;
use crate::machine::Clocks;

const MIB: u64 = 1 << 20;
const BOOT: u64 = 64 * MIB;
const UNIT: u64 = 128 * MIB;

async fn lab(room: u64) -> Lab {
    Lab::with(move |config: &mut VmConfig| {
        config.memory.hotplug_method = HotplugMethod::Acpi;
        // As Kata has it: not aligned.
        config.memory.hotplug_size = Some(room * UNIT + 4096);
    })
    .await
}

impl Lab {
    async fn resize_ram(&self, units: u64) -> Result<Reply, RequestError> {
        self.resize_to(Some(BOOT + units * UNIT), None, None).await
    }

    async fn resize_to(
        &self,
        desired_ram: Option<u64>,
        desired_vcpus: Option<u32>,
        desired_balloon: Option<u64>,
    ) -> Result<Reply, RequestError> {
        let sizes = VmResize {
            desired_ram,
            desired_vcpus,
            desired_balloon,
        };
        soon(self.vms[0].ask(Request::Resize(sizes))).await
    }

    /// The slots of which the guest is notified.
    fn offers(&self) -> Vec<u32> {
        let next = || {
            self.driver(|driver| {
                let mut data = [0; 4];
                machine_of(driver).dimms().unwrap().read(EVENT, &mut data);
                let value = u32::from_le_bytes(data);
                (value != 0).then_some(value & 0xffff)
            })
        };
        std::iter::from_fn(next).collect()
    }

    fn answer(&self, slot: u32, status: u8) {
        let value = u32::from(status) << 24 | 1 << 16 | slot;
        self.driver(move |driver| {
            let dimms = machine_of(driver).dimms().unwrap();
            dimms.write(STATUS, &value.to_le_bytes());
        });
        // Calls and reports take turns.
        self.driver(|_| {});
        self.driver(|_| {});
    }

    /// Units that the guest has, that are in the memory map, that the next boot has, and to which a
    /// resize is pending.
    fn memory(&self) -> (u64, u64, u64, Option<u64>) {
        let mapped = self.driver(|driver| {
            let map = crate::machine::memory_map(&machine_of(driver).topology());
            let ranges = map.spaces.iter().flat_map(|space| &space.flat);
            let added = ranges.filter(|range| range.name == "hotplugged ram");
            added.map(|range| range.last - range.first + 1).sum::<u64>()
        });
        let plugged = self.driver(|driver| {
            let (ram, _) = machine_of(driver).memory();
            ram.hotplug(0).unwrap().plugged_len() as u64
        });
        assert_eq!(plugged, mapped);
        let info = self.vms[0].info();
        let pending = info.pending_resizes.first();
        (
            (info.memory_actual_size - BOOT) / UNIT,
            mapped / UNIT,
            info.config.memory.hotplugged_size.unwrap_or(0) / UNIT,
            pending.map(|pending| (pending.to - BOOT) / UNIT),
        )
    }
}

#[tokio::test]
async fn memory_is_added_and_stays_until_a_reboot() {
    let lab = lab(6).await;
    assert_eq!(lab.memory(), (0, 0, 0, None));
    lab.resize_ram(2).await.unwrap();
    assert_eq!(lab.memory(), (0, 2, 2, Some(2)));
    let refused = lab.resize_ram(3).await.unwrap_err();
    assert_eq!(refused.code, "resize-pending");
    assert_eq!(lab.offers(), [0]);
    lab.answer(0, 0);
    assert_eq!(lab.memory(), (2, 2, 2, None));
    assert_eq!(lab.events("resized"), ["memory: 67108864 to 335544320"]);

    // The guest does not take it at first.
    lab.resize_ram(3).await.unwrap();
    assert_eq!(lab.offers(), [1]);
    lab.answer(1, 0x81);
    assert_eq!(lab.memory(), (2, 3, 3, None));
    let [failed] = &lab.events("resize-failed")[..] else {
        panic!("one resize has failed");
    };
    assert!(
        failed.ends_with("its driver failed (_OST status 0x81)"),
        "{failed}"
    );
    lab.resize_ram(3).await.unwrap();
    assert_eq!((lab.memory(), lab.offers()), ((2, 3, 3, Some(3)), vec![1]));
    lab.answer(1, 0);
    assert_eq!(lab.memory(), (3, 3, 3, None));

    // Less: from the next boot on.
    lab.resize_ram(1).await.unwrap();
    assert_eq!(lab.memory(), (3, 3, 1, None));
    assert_eq!(lab.events("resize-failed").len(), 2);
    soon(lab.vms[0].ask(Request::Reboot)).await.unwrap();
    assert_eq!((lab.memory(), lab.offers()), ((1, 1, 1, None), vec![]));
}

#[tokio::test]
async fn silent_guest_may_take_memory_late() {
    let lab = lab(1).await;
    lab.resize_ram(1).await.unwrap();
    let mut status = lab.vms[0].watch();
    let ended = status.wait_for(|status| status.resizes.is_empty());
    soon(ended).await.unwrap();
    assert_eq!(lab.memory(), (0, 1, 1, None));
    assert_eq!(lab.events("resize-failed").len(), 1);
    assert_eq!(lab.offers(), [0]);
    lab.answer(0, 0);
    assert_eq!(lab.memory(), (1, 1, 1, None));
}

#[tokio::test]
async fn slots_for_memory_are_bounded() {
    let lab = lab(16).await;
    for slot in 0..8_u32 {
        lab.resize_ram(u64::from(slot) + 1).await.unwrap();
        assert_eq!(lab.offers(), [slot]);
        lab.answer(slot, 0);
    }
    let refused = lab.resize_ram(9).await.unwrap_err();
    assert_eq!(refused.code, "memory-slots-used");
    assert_eq!(lab.memory(), (8, 8, 8, None));
    soon(lab.vms[0].ask(Request::Reboot)).await.unwrap();
    lab.resize_ram(9).await.unwrap();
    assert_eq!(lab.memory(), (8, 9, 9, Some(9)));
}

#[tokio::test]
async fn refused_resize_changes_nothing() {
    let lab = lab(2).await;
    let shown = || {
        let info = lab.vms[0].info();
        (info.config, info.vcpus_actual_count, info.pending_resizes)
    };
    let before = shown();
    let ram = Some(BOOT + UNIT);
    let wrong = [
        (ram, Some(4), Some(0), "no-balloon"),
        (ram, Some(5), None, "vcpus-out-of-range"),
        (Some(BOOT + 3 * UNIT), Some(4), None, "memory-too-large"),
        (Some(BOOT + UNIT / 2), Some(4), None, "memory-unaligned"),
        (Some(BOOT - UNIT / 4), Some(4), None, "memory-too-small"),
    ];
    for (ram, vcpus, balloon, code) in wrong {
        let refused = lab.resize_to(ram, vcpus, balloon).await.unwrap_err();
        assert_eq!(refused.code, code);
    }
    // The vCPU fails when the memory is there: nothing has a clock that it could follow.
    let failed = lab.driver(|driver| {
        let machine = machine_of(driver);
        let none = Clocks::Loaded {
            kvmclock_ns: None,
            vcpus: std::collections::BTreeMap::new(),
            since: None,
        };
        let clocks = std::mem::replace(&mut machine.clocks, none);
        let failed = machine.grow(Some(3), UNIT);
        machine.clocks = clocks;
        failed
    });
    assert!(failed.is_err());
    assert_eq!(lab.memory(), (0, 0, 0, None));
    assert_eq!((lab.offers(), lab.threads().len()), (vec![], 2));
    assert_eq!(shown(), before);
    lab.resize_to(ram, Some(4), None).await.unwrap();
    assert_eq!((lab.memory(), lab.threads().len()), ((0, 1, 1, Some(1)), 4));
}

impl Lab {
    /// Waits for the end of an operation.
    async fn completed(&self, of: std::sync::Arc<dyn control::Migration>) {
        let mut over = of.over();
        soon(over.wait_for(|over| *over)).await.unwrap();
        let info = of.info();
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
    }

    /// Checks that the first VM's guest has four vCPUs and one of two units of memory, and that it has not
    /// answered for the other.
    fn has_grown(&self) {
        assert_eq!(self.memory(), (1, 2, 2, Some(2)));
        assert_eq!(self.threads(), [0, 1, 2, 3]);
        assert_eq!(self.vcpus(), (Some(4), 4, vec![BOOT + 2 * UNIT]));
    }
}

#[tokio::test]
async fn copies_of_a_guest_have_what_was_added() {
    let mut lab = lab(3).await;
    lab.resize_to(Some(BOOT + UNIT), Some(4), None)
        .await
        .unwrap();
    assert_eq!(lab.offers(), [0]);
    lab.answer(0, 0);
    lab.resize_ram(2).await.unwrap();
    lab.has_grown();
    soon(lab.vms[0].ask(Request::Pause)).await.unwrap();
    let id = lab.vms[0].id().clone();
    let url = format!("file://{}", lab._dir.path().join("snapshot").display());
    let what = VmSnapshotConfig::to(url.clone());
    let taken = lab
        .registry
        .take_snapshot(id.as_str(), &what, SnapshotOf::Paused);
    lab.completed(taken.unwrap()).await;
    let what = ForkVm {
        name: Some("fork".parse().unwrap()),
        ..ForkVm::default()
    };
    let forked = lab.registry.fork(id.as_str(), &what).unwrap();
    lab.completed(forked).await;
    let body = serde_json::json!({ "source_url": url });
    let what: RestoreConfig = serde_json::from_value(body).unwrap();
    let restored = "restored".parse().unwrap();
    lab.completed(lab.registry.restore(&restored, &what).unwrap())
        .await;
    for copy in ["fork-1", "restored"] {
        lab.vms[0] = lab.registry.get(copy).unwrap();
        lab.has_grown();
        // The guest had not taken this notification, and takes it here.
        assert_eq!(lab.offers(), [1], "{copy}");
        lab.answer(1, 0);
        assert_eq!(lab.memory(), (2, 2, 2, None), "{copy}");
        lab.resize_ram(3).await.unwrap();
        assert_eq!((lab.memory(), lab.offers()), ((2, 3, 3, Some(3)), vec![2]));
    }
}

#[tokio::test]
async fn guest_that_moves_keeps_its_size() {
    let lab = lab(2).await;
    let begun = lab.driver(|driver| {
        let (decision, progress) = (Decision::default(), Progress::default());
        driver.depart(Purpose::Move, &decision, &progress)
    });
    let parts = begun.unwrap();
    let refused = lab.resize_ram(1).await.unwrap_err();
    assert_eq!(refused.code, "vm-migrating");
    assert_eq!(lab.memory(), (0, 0, 0, None));
    // As when the engine could not begin, or panicked: the VM is free again.
    drop(parts);
    lab.driver(|driver| assert!(driver.outgoing.is_none()));
    lab.resize_ram(1).await.unwrap();
    assert_eq!(lab.memory(), (0, 1, 1, Some(1)));
}

#[tokio::test]
async fn balloon_may_take_what_was_added() {
    let lab = Lab::with(|config: &mut VmConfig| {
        config.memory.hotplug_method = HotplugMethod::Acpi;
        config.memory.hotplug_size = Some(2 * UNIT);
        config.balloon = serde_json::from_str(r#"{"size":0}"#).unwrap();
    })
    .await;
    let balloon = async |size| lab.resize_to(None, None, Some(size)).await;
    let refused = balloon(BOOT + UNIT).await.unwrap_err();
    assert_eq!(refused.code, "balloon-too-large");
    lab.resize_ram(1).await.unwrap();
    balloon(BOOT + UNIT).await.unwrap();
    let refused = balloon(BOOT + UNIT + 4096).await.unwrap_err();
    assert_eq!(refused.code, "balloon-too-large");
}
