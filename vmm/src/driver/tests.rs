//! Drivers whose machines hang, on one thread with others.

use std::sync::mpsc::{Sender, channel};

use ::devices::cpus::{DEVICE_CHECK, EJECT, EJECT_REQUEST, EVENT, STATUS};
use ::memory::{DeviceOps, SpaceKind};
use control::{Registry, VmHandle};
use guest::{Options, Workload};
use spec::{ConsoleMode, HotplugMethod, PayloadConfig, ResizeResource, VmResize};

use super::ending::END_PATIENCE;
use super::resize::RESIZE_PATIENCE;
use super::*;
use crate::pool::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(30);

/// Two VMs whose drivers share the only thread for drivers.
mod memory;

struct Lab {
    _dir: tempfile::TempDir,
    callers: crate::pool::Callers,
    registry: Registry,
    vms: [VmHandle; 2],
}

impl Lab {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With VMs of another configuration.
    async fn with(change: impl Fn(&mut spec::VmConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("pocket");
        std::fs::write(&kernel, guest::IMAGE).unwrap();
        let pool = Pool::start(&PoolConfig {
            threads: Some(1),
            ..PoolConfig::default()
        });
        let pool = pool.unwrap();
        let callers = pool.callers().clone();
        let registry = Registry::new(pool);
        let boot = async || {
            let mut config = VmConfig::with_payload(PayloadConfig {
                kernel: Some(kernel.to_string_lossy().into_owned()),
                cmdline: Some(Options::default().to_string()),
                ..PayloadConfig::default()
            });
            config.memory.size = 64 << 20;
            // Room that the guest has no driver for.
            config.memory.hotplug_method = HotplugMethod::VirtioMem;
            config.memory.hotplug_size = Some(128 << 20);
            (config.cpus.boot_vcpus, config.cpus.max_vcpus) = (2, 4);
            config.serial.mode = ConsoleMode::Null;
            change(&mut config);
            let vm = registry.create(None, config).unwrap();
            vm.ask(Request::Boot).await.unwrap();
            vm
        };
        let vms = [boot().await, boot().await];
        Self {
            _dir: dir,
            callers,
            registry,
            vms,
        }
    }

    /// Does something to the first VM's driver.
    fn driver<R: Send + 'static>(&self, f: impl FnOnce(&mut Driver) -> R + Send + 'static) -> R {
        let caller = self.callers.get(self.vms[0].id()).unwrap();
        caller.call(|driver, _| f(driver)).unwrap()
    }

    /// The details of the first VM's events of this name.
    fn events(&self, name: &str) -> Vec<String> {
        let (events, _) = self.registry.events().after(0, Some(self.vms[0].id()));
        let named = events.into_iter().filter(|event| event.event == name);
        named.filter_map(|event| event.detail).collect()
    }

    /// Has work on the first VM's machine hang, as it does when storage does not answer.
    fn hang(&self) -> Sender<()> {
        let (go, held) = channel();
        let work = move |_: &mut Active| held.recv();
        assert!(self.driver(|driver| driver.lend(work, |_, _, _| {})));
        go
    }
}

/// The answer, which comes sooner than a hung machine would let it.
async fn soon<T>(answer: impl Future<Output = T>) -> T {
    let answer = tokio::time::timeout(PATIENCE, answer);
    answer.await.expect("no answer comes")
}

#[tokio::test]
async fn hung_storage_delays_no_other_vm() {
    let lab = Lab::new().await;
    let go = lab.hang();
    // What needs the machine waits for it; others are not on its account.
    let waiting = lab.vms[0].ask_now(Request::Counters);
    soon(lab.vms[1].ask(Request::Counters)).await.unwrap();
    let deleted = lab.registry.delete(lab.vms[0].id().as_str());
    soon(deleted).await.unwrap();
    assert_eq!(soon(waiting).await, Err(RequestError::driver_gone()));
    let (events, _) = lab.registry.events().after(0, Some(lab.vms[0].id()));
    assert!(events.iter().any(|event| event.event == "machine-stuck"));
    soon(lab.vms[1].ask(Request::Pause)).await.unwrap();
    // What it had is given back when the storage answers: the pool's end waits for that.
    drop(go);
}

#[tokio::test]
async fn vm_resumes_when_storage_responds() {
    let lab = Lab::new().await;
    let go = lab.hang();
    let waiting = lab.vms[0].ask_now(Request::Pause);
    drop(go);
    assert_eq!(soon(waiting).await, Ok(Reply::Done));
    assert_eq!(lab.vms[0].info().state, VmState::Paused);
    soon(lab.vms[0].ask(Request::Resume)).await.unwrap();
}

#[tokio::test]
async fn vm_boots_after_hung_shutdown() {
    let lab = Lab::new().await;
    let go = lab.hang();
    soon(lab.vms[0].ask(Request::Shutdown)).await.unwrap();
    assert_eq!(lab.vms[0].info().state, VmState::Shutdown);
    soon(lab.vms[0].ask(Request::Boot)).await.unwrap();
    // The machine of before comes back, and does not take the place of this one.
    drop(go);
    soon(lab.vms[0].ask(Request::Pause)).await.unwrap();
    assert_eq!(lab.vms[0].info().state, VmState::Paused);
}

#[tokio::test]
async fn panic_ends_only_its_vm() {
    let lab = Lab::new().await;
    let work = |_: &mut Active| panic!("as a test has it");
    assert!(lab.driver(move |driver| driver.lend(work, |_, (), _| {})));
    let mut status = lab.vms[0].watch();
    let ended = status.wait_for(|status| status.failure.is_some());
    let failure = soon(ended).await.unwrap().failure.clone().unwrap();
    assert_eq!(failure.code, "driver-panicked");
    soon(lab.vms[1].ask(Request::Pause)).await.unwrap();
    soon(lab.vms[0].ask(Request::Boot)).await.unwrap();
}

/// Panics when the guest writes to it.
struct Faulty;

impl DeviceOps for Faulty {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, _: &[u8]) {
        panic!("as a test has it");
    }
}

/// Devices answer on the thread of the vCPU whose guest accesses them.
#[tokio::test]
async fn panic_of_a_device_ends_only_its_vm() {
    const PORT: u16 = 0x5678;
    let lab = Lab::with(|config| {
        let workload = Workload::Exits {
            port: PORT,
            count: u64::MAX,
        };
        let options = Options {
            workload,
            ..Options::default()
        };
        config.payload.cmdline = Some(options.to_string());
    })
    .await;
    let plug = |active: &mut Active| {
        let mut topology = active.topology();
        let mapped = topology.transaction(|tx| -> Result<(), BuildError> {
            let region = tx.device("faulty", 1, Arc::new(Faulty))?;
            Ok(tx.map(SpaceKind::PortIo, PORT.into(), region, 0)?)
        });
        mapped.unwrap();
    };
    assert!(lab.driver(move |driver| driver.lend(plug, |_, (), _| {})));
    let mut status = lab.vms[0].watch();
    let ended = status.wait_for(|status| status.failure.is_some());
    let failure = soon(ended).await.unwrap().failure.clone().unwrap();
    assert_eq!(failure.code, "vcpu-panicked");
    assert!(failure.detail.contains("as a test has it"), "{failure:?}");
    soon(lab.vms[1].ask(Request::Pause)).await.unwrap();
    soon(lab.vms[0].ask(Request::Boot)).await.unwrap();
}

/// The engine panicked behind the commit: the guest may run at its destination. It must not run here, and the VM
/// can be deleted.
#[tokio::test]
async fn abandoned_guest_can_only_be_ended() {
    let lab = Lab::new().await;
    let parts = lab.driver(|driver| {
        let (decision, progress) = (
            ::migration::Decision::default(),
            ::migration::Progress::default(),
        );
        let parts = driver.depart(crate::driver::Purpose::Move, &decision, &progress);
        driver.hand_over(&[]).unwrap();
        parts
    });
    let refused = lab.vms[0].ask(Request::Delete).await.unwrap_err();
    assert_eq!(refused.code, "vm-migrating");
    drop(parts);
    let refused = lab.vms[0].ask(Request::Resume).await.unwrap_err();
    assert_eq!(refused.code, "vm-migrating");
    assert_eq!(lab.vms[0].info().state, spec::VmState::Paused);
    assert_eq!(lab.events("migration-failed").len(), 1);
    lab.vms[0].ask(Request::Delete).await.unwrap();
}

#[tokio::test]
async fn boot_is_canceled() {
    for request in [Request::Shutdown, Request::Delete] {
        let lab = Lab::new().await;
        // As if a thread were still building.
        lab.driver(|driver| driver.stage = Stage::Building { asked: None });
        assert_eq!(soon(lab.vms[0].ask(request)).await, Ok(Reply::Done));
        assert_eq!(lab.vms[0].info().state, VmState::Shutdown);
    }
}

#[tokio::test]
async fn stuck_machine_has_a_time_limit() {
    let lab = Lab::new().await;
    let begun = Instant::now();
    let caller = lab.callers.get(lab.vms[0].id()).unwrap();
    caller
        .call(|driver, sources| {
            // The thread that takes the machine apart never says that it is gone.
            driver.switch_off(End::PowerOff, sources);
            driver.next_machine();
        })
        .unwrap();
    let deleted = lab.registry.delete(lab.vms[0].id().as_str());
    soon(deleted).await.unwrap();
    assert!(begun.elapsed() >= END_PATIENCE);
}

#[tokio::test]
async fn resize_ends_when_the_guest_has_done_it() {
    let lab = Lab::new().await;
    let vcpus = ResizeResource::Vcpus;
    lab.driver(move |driver| driver.begin_resize(vcpus, 4, 2));
    lab.driver(move |driver| driver.resize_progressed(vcpus, 3));
    let [pending] = &lab.vms[0].info().pending_resizes[..] else {
        panic!("one resize is pending");
    };
    assert_eq!((pending.from, pending.to, pending.actual), (4, 2, 3));
    let refused = lab.driver(move |driver| driver.check_no_resize(vcpus).unwrap_err());
    assert_eq!(
        (refused.category, &*refused.code),
        (Category::Pending, "resize-pending")
    );
    let other = |driver: &mut Driver| driver.check_no_resize(ResizeResource::Memory);
    assert_eq!(lab.driver(other), Ok(()));
    lab.driver(move |driver| driver.resize_progressed(vcpus, 2));
    assert_eq!(lab.vms[0].info().pending_resizes, []);
    assert_eq!(lab.events("resized"), ["vcpus: 4 to 2"]);
    // The guest changes what it was not asked to change.
    lab.driver(move |driver| driver.resize_progressed(vcpus, 1));
    assert_eq!(lab.vms[0].info().pending_resizes, []);
}

#[tokio::test]
async fn resize_has_a_time_limit() {
    let lab = Lab::new().await;
    let begun = Instant::now();
    let resize = |driver: &mut Driver| {
        driver.begin_resize(ResizeResource::Vcpus, 4, 2);
        driver.resize_progressed(ResizeResource::Vcpus, 3);
    };
    lab.driver(resize);
    // Nothing else wakes the driver.
    let mut status = lab.vms[0].watch();
    let ended = status.wait_for(|status| status.resizes.is_empty());
    soon(ended).await.unwrap();
    assert!(begun.elapsed() >= RESIZE_PATIENCE);
    let why = "vcpus: 4 to 2, stays at 3: the guest did not complete it within 1 s";
    assert_eq!(lab.events("resize-failed"), [why]);
    assert!(lab.events("resized").is_empty());
}

#[tokio::test]
async fn guest_without_a_driver_keeps_its_memory() {
    let lab = Lab::new().await;
    let resize = || {
        let sizes = VmResize {
            desired_ram: Some(96 << 20),
            ..VmResize::default()
        };
        soon(lab.vms[0].ask(Request::Resize(sizes)))
    };
    resize().await.unwrap();
    let hotplugged = || lab.vms[0].info().config.memory.hotplugged_size;
    assert_eq!(hotplugged(), Some(32 << 20));
    let mut status = lab.vms[0].watch();
    let ended = status.wait_for(|status| status.resizes.is_empty());
    soon(ended).await.unwrap();
    // The driver ends its turn.
    lab.driver(|_| ());
    let why = "memory: 67108864 to 100663296, stays at 67108864: the guest did not complete it within 1 s";
    assert_eq!(lab.events("resize-failed"), [why]);
    assert_eq!(
        hotplugged(),
        None,
        "the next machine begins with what the guest has"
    );
    // It may be asked again.
    resize().await.unwrap();
}

#[tokio::test]
async fn reboot_ends_a_resize() {
    let lab = Lab::new().await;
    lab.driver(|driver| driver.begin_resize(ResizeResource::Memory, 1 << 30, 1 << 29));
    soon(lab.vms[0].ask(Request::Reboot)).await.unwrap();
    assert_eq!(lab.vms[0].info().pending_resizes, []);
    let ended = "memory: 1073741824 to 536870912, by the end of the machine";
    assert_eq!(lab.events("resized"), [ended]);
    assert!(lab.events("resize-failed").is_empty());
}

impl Lab {
    async fn resize(&self, vcpus: u32) -> Result<Reply, RequestError> {
        let sizes = spec::VmResize {
            desired_vcpus: Some(vcpus),
            ..spec::VmResize::default()
        };
        soon(self.vms[0].ask(Request::Resize(sizes))).await
    }

    /// Has the guest read its next notification: a code and a vCPU.
    fn notification(&self) -> Option<(u8, u32)> {
        self.driver(|driver| {
            let mut data = [0; 4];
            machine_of(driver).parts.cpus.read(EVENT, &mut data);
            let value = u32::from_le_bytes(data);
            (value != 0).then_some(((value >> 16) as u8, value & 0xffff))
        })
    }

    fn notifications(&self) -> Vec<(u8, u32)> {
        std::iter::from_fn(|| self.notification()).collect()
    }

    /// Has the guest write to a register of vCPU hotplug.
    fn guest_writes(&self, register: u64, value: u32) {
        self.driver(move |driver| {
            let block = &machine_of(driver).parts.cpus;
            block.write(register, &value.to_le_bytes());
        });
    }

    /// The numbers of vCPUs that the guest has, that the next boot starts, and that are shown as pending.
    fn vcpus(&self) -> (Option<u32>, u32, Vec<u64>) {
        // Calls and reports take turns: behind two calls the reports of before were handled.
        self.driver(|_| {});
        self.driver(|_| {});
        let info = self.vms[0].info();
        let pending = info.pending_resizes.iter().map(|pending| pending.to);
        let boot = info.config.cpus.boot_vcpus;
        (info.vcpus_actual_count, boot, pending.collect())
    }

    /// The numbers of the vCPUs that have threads which run the guest.
    fn threads(&self) -> Vec<u32> {
        self.driver(|driver| {
            machine_of(driver)
                .vcpus
                .plugged()
                .map(|(index, _)| index)
                .collect()
        })
    }
}

fn machine_of(driver: &mut Driver) -> &mut Active {
    match &mut driver.stage {
        Stage::On(machine) => machine,
        _ => panic!("there is no machine"),
    }
}

#[tokio::test]
async fn vcpus_come_and_go() {
    let lab = Lab::new().await;
    for _ in 0..2 {
        assert_eq!(lab.vcpus(), (Some(2), 2, vec![]));
        lab.resize(4).await.unwrap();
        assert_eq!(lab.vcpus(), (Some(4), 4, vec![]));
        let news = [(DEVICE_CHECK, 2), (DEVICE_CHECK, 3)];
        assert_eq!(lab.notifications(), news);
        assert_eq!(lab.threads(), [0, 1, 2, 3]);
        lab.guest_writes(EJECT, 3);
        assert_eq!(lab.vcpus().0, Some(4), "no vCPU was to be ejected");

        lab.resize(2).await.unwrap();
        assert_eq!(lab.vcpus(), (Some(4), 2, vec![2]));
        let refused = lab.resize(3).await.unwrap_err();
        assert_eq!(
            (refused.category, &*refused.code),
            (Category::Pending, "resize-pending")
        );
        let asked = [(EJECT_REQUEST, 2), (EJECT_REQUEST, 3)];
        assert_eq!(lab.notifications(), asked);
        lab.guest_writes(EJECT, 2);
        assert_eq!(lab.vcpus(), (Some(3), 2, vec![2]));
        for vcpu in [0, 1, 2, 4, u32::MAX] {
            lab.guest_writes(EJECT, vcpu);
        }
        assert_eq!(lab.threads(), [0, 1, 3]);
        lab.guest_writes(EJECT, 3);
        assert_eq!(lab.vcpus(), (Some(2), 2, vec![]));
        // All vCPUs park, and those that were ejected are not waited for.
        soon(lab.vms[0].ask(Request::Pause)).await.unwrap();
        soon(lab.vms[0].ask(Request::Resume)).await.unwrap();
    }
    assert_eq!(lab.events("resized").last().unwrap(), "vcpus: 4 to 2");
    // Also while the guest is paused, and what there is survives a reset.
    soon(lab.vms[0].ask(Request::Pause)).await.unwrap();
    lab.resize(3).await.unwrap();
    soon(lab.vms[0].ask(Request::Resume)).await.unwrap();
    soon(lab.vms[0].ask(Request::Reboot)).await.unwrap();
    assert_eq!(lab.vcpus(), (Some(3), 3, vec![]));
    assert_eq!(lab.threads(), [0, 1, 2]);
    for wrong in [0, 5] {
        let refused = lab.resize(wrong).await.unwrap_err();
        assert_eq!(refused.code, "vcpus-out-of-range");
    }
    soon(lab.vms[0].ask(Request::Shutdown)).await.unwrap();
    lab.resize(1).await.unwrap();
    let info = lab.vms[0].info();
    assert_eq!(
        (info.vcpus_actual_count, info.config.cpus.boot_vcpus),
        (None, 1)
    );
}

#[tokio::test]
async fn guest_keeps_the_vcpus_that_it_refuses_to_eject() {
    let lab = Lab::new().await;
    lab.resize(4).await.unwrap();
    lab.notifications();
    lab.resize(1).await.unwrap();
    lab.notifications();
    let busy = |vcpu| 0x82 << 24 | u32::from(EJECT_REQUEST) << 16 | vcpu;
    lab.guest_writes(STATUS, busy(2));
    assert_eq!(lab.vcpus(), (Some(4), 1, vec![1]), "others may still go");
    lab.guest_writes(EJECT, 3);
    lab.guest_writes(EJECT, 1);
    assert_eq!(lab.vcpus(), (Some(2), 2, vec![]));
    assert_eq!(lab.threads(), [0, 2]);
    let why = "vcpus: 4 to 1, stays at 2: the guest refused to eject vCPU 2: the vCPU is busy \
               (_OST status 0x82)";
    assert_eq!(lab.events("resize-failed"), [why]);
    // The lowest that is free comes first.
    lab.resize(3).await.unwrap();
    assert_eq!(lab.notifications(), [(DEVICE_CHECK, 1)]);
    lab.guest_writes(STATUS, 0x81 << 24 | u32::from(DEVICE_CHECK) << 16 | 1);
    assert_eq!(lab.vcpus().0, Some(3));
    let last = lab.events("resize-failed").pop().unwrap();
    assert!(
        last.starts_with("the guest refused to use vCPU 1"),
        "{last}"
    );
}

impl Lab {
    /// Moves the first VM to one of another name.
    async fn move_first(&mut self) {
        use spec::{AwaitMigration, MigrationPhase, StartMigration};
        let awaiting = AwaitMigration {
            once: true,
            vm: Some("moved".parse().unwrap()),
            ..AwaitMigration::at(format!("unix:{}/migration", self._dir.path().display()))
        };
        let receive = self.registry.receive_migration(&awaiting).unwrap();
        let what = StartMigration::to(receive.info().endpoint);
        let send = self
            .registry
            .send_migration(self.vms[0].id().as_str(), &what);
        for side in [send.unwrap(), receive] {
            let mut over = side.over();
            soon(over.wait_for(|over| *over)).await.unwrap();
            let info = side.info();
            assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
        }
        self.vms[0] = self.registry.get("moved").unwrap();
    }
}

#[tokio::test]
async fn guest_moves_with_requests_to_eject_vcpus() {
    let mut lab = Lab::new().await;
    lab.resize(4).await.unwrap();
    lab.notifications();
    lab.resize(2).await.unwrap();
    assert_eq!(lab.notification(), Some((EJECT_REQUEST, 2)));
    lab.move_first().await;
    assert_eq!(lab.vcpus(), (Some(4), 2, vec![2]));
    assert_eq!(lab.threads(), [0, 1, 2, 3]);
    let unseen = [(EJECT_REQUEST, 3)];
    assert_eq!(lab.notifications(), unseen, "the guest has taken the other");
    lab.guest_writes(EJECT, 2);
    lab.guest_writes(EJECT, 3);
    assert_eq!(lab.vcpus(), (Some(2), 2, vec![]));
    lab.resize(4).await.unwrap();
    assert_eq!(lab.threads(), [0, 1, 2, 3]);
    assert_eq!(lab.events("resize-failed"), [""; 0]);
}

#[tokio::test]
async fn guest_ejects_a_vcpu_between_dry_run_and_stop() {
    let mut lab = Lab::new().await;
    lab.resize(4).await.unwrap();
    lab.notifications();
    lab.resize(2).await.unwrap();
    let dry_run = lab.driver(|driver| driver.save_dry_run(None)).unwrap();
    lab.guest_writes(EJECT, 3);
    soon(lab.vms[0].ask(Request::Pause)).await.unwrap();
    let whole = lab.driver(|driver| driver.save_whole(None)).unwrap();

    // The other VM, of the same configuration, takes what was saved.
    lab.vms.swap(0, 1);
    soon(lab.vms[0].ask(Request::Pause)).await.unwrap();
    let load = |lab: &Lab, state: Vec<u8>, extent| {
        lab.driver(move |driver| machine_of(driver).load(&state, extent))
            .unwrap();
        lab.threads()
    };
    assert_eq!(load(&lab, dry_run, machine::Extent::DryRun), [0, 1, 2, 3]);
    assert_eq!(load(&lab, whole, machine::Extent::Whole), [0, 1, 2]);
    // A vCPU that comes before the clocks count gets one as well.
    lab.resize(4).await.unwrap();
    soon(lab.vms[0].ask(Request::Resume)).await.unwrap();
    assert_eq!(lab.threads(), [0, 1, 2, 3]);
}

#[tokio::test]
async fn late_eject_is_honored() {
    let lab = Lab::new().await;
    lab.resize(4).await.unwrap();
    lab.notifications();
    lab.resize(2).await.unwrap();
    assert_eq!(lab.notification(), Some((EJECT_REQUEST, 2)));
    let mut status = lab.vms[0].watch();
    let ended = status.wait_for(|status| status.resizes.is_empty());
    soon(ended).await.unwrap();
    assert_eq!(lab.vcpus(), (Some(4), 4, vec![]), "the VM is as before");
    assert_eq!(lab.events("resize-failed").len(), 1);
    // What the guest had not read is withdrawn.
    assert_eq!(lab.notifications(), []);
    lab.guest_writes(EJECT, 3);
    assert_eq!(lab.vcpus().0, Some(4));
    lab.guest_writes(EJECT, 2);
    assert_eq!(lab.vcpus(), (Some(3), 3, vec![]));
}
