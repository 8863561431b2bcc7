//! Drivers whose machines hang, on one thread with others.

use std::sync::mpsc::{Sender, channel};

use control::{Registry, VmHandle};
use guest::Options;
use spec::{ConsoleMode, HotplugMethod, PayloadConfig, ResizeResource, VmResize};

use super::ending::END_PATIENCE;
use super::resize::RESIZE_PATIENCE;
use super::*;
use crate::pool::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(30);

/// Two VMs whose drivers share the only thread for drivers.
struct Lab {
    _dir: tempfile::TempDir,
    callers: crate::pool::Callers,
    registry: Registry,
    vms: [VmHandle; 2],
}

impl Lab {
    async fn new() -> Self {
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
            config.serial.mode = ConsoleMode::Null;
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
    let [pending] = lab.vms[0].info().pending_resizes[..] else {
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
