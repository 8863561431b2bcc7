//! Drivers without machines: they answer as [`admit`](crate::admit) says and do nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use spec::{
    CpuCheck, CpuDescription, HostCpu, HostLimits, MemoryMap, PciDeviceInfo, VmConfig, VmCounters,
    VmId, VmState,
};

use crate::admission::admit;
use crate::error::{Category, RequestError};
use crate::events::EventLog;
use crate::handle::{Message, Reply, VmHandle, connect};
use crate::registry::Spawn;
use crate::request::Request;
use crate::status::StatusPublisher;

/// How the fake drivers behave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fake {
    /// They think so long about each request.
    pub delay: Duration,
    /// Every boot fails.
    pub fail_boot: bool,
    /// Host resources of devices cannot be opened.
    pub fail_devices: bool,
    /// They panic at an NMI.
    pub die_at_nmi: bool,
}

impl Spawn for Fake {
    fn spawn(
        &self,
        id: &VmId,
        config: Arc<VmConfig>,
        events: EventLog,
    ) -> Result<VmHandle, RequestError> {
        let (wake, woken) = channel();
        let (handle, mut inbox, _, publisher) = connect::<(), ()>(id, config, events, move || {
            let _ = wake.send(());
        });
        let fake = *self;
        thread::spawn(move || {
            while woken.recv().is_ok() {
                while let Some(message) = inbox.next(|_| true) {
                    let Message::Ask(ask) = message else { return };
                    thread::sleep(fake.delay);
                    if ask.request == Request::Nmi && fake.die_at_nmi {
                        return;
                    }
                    let answer = fake.perform(&ask.request, &publisher);
                    let ended = ask.request == Request::Delete;
                    ask.answer(answer);
                    if ended {
                        return;
                    }
                }
            }
        });
        Ok(handle)
    }

    fn host_limits(&self) -> HostLimits {
        HostLimits {
            max_vcpus: 16,
            max_memory: 1 << 40,
            host_cpus: 64,
        }
    }

    fn host_cpu(&self) -> HostCpu {
        HostCpu::default()
    }

    /// Knows no leaf, so that it lacks each.
    fn check_cpu(&self, guest: &CpuDescription) -> Result<CpuCheck, RequestError> {
        let leaf = |leaf: &spec::CpuidLeaf| format!("CPUID.{:X}H", leaf.function);
        let lacking = guest.cpuid.iter().map(leaf).collect();
        Ok(CpuCheck { lacking })
    }
}

impl Fake {
    fn perform(
        &self,
        request: &Request,
        publisher: &StatusPublisher,
    ) -> Result<Reply, RequestError> {
        admit(publisher.current().state, request.verb())?;
        let become_state = |state| {
            publisher.update(|status| status.state = state);
            Ok(Reply::Done)
        };
        if let Request::AddDevice(new) = request {
            let config = publisher.current().config;
            let problems = new.problems(&config);
            if !problems.is_empty() {
                return Err(RequestError::invalid(problems));
            }
        }
        match request {
            Request::AddDevice(_) | Request::ResizeDisk(_) if self.fail_devices => Err(
                RequestError::new(Category::Unprocessable, "disk-unusable", "no such image"),
            ),
            Request::Boot if self.fail_boot => Err(RequestError::new(
                Category::Unprocessable,
                "kernel-missing",
                "no such kernel",
            )),
            Request::Boot | Request::Resume => become_state(VmState::Running),
            Request::Pause => become_state(VmState::Paused),
            Request::Shutdown => become_state(VmState::Shutdown),
            Request::Reboot => {
                publisher.update(|status| {
                    status.state = VmState::Running;
                    status.reboots += 1;
                });
                Ok(Reply::Done)
            }
            Request::Counters => {
                let of = |name: &str, value| BTreeMap::from([(name.to_owned(), value)]);
                let disk = ("_disk0".to_owned(), of("read_bytes", 7));
                let balloon = ("__balloon".to_owned(), of("actual_bytes", 3));
                Ok(Reply::Counters(VmCounters::from([disk, balloon])))
            }
            Request::MemoryMap => Ok(Reply::MemoryMap(MemoryMap { spaces: Vec::new() })),
            Request::Cpu => Ok(Reply::Cpu(Box::default())),
            Request::AddDevice(new) if publisher.current().state != VmState::Shutdown => {
                Ok(Reply::Added(PciDeviceInfo {
                    id: new.id().unwrap_or("_new0").to_owned(),
                    bdf: "0000:00:05.0".to_owned(),
                }))
            }
            Request::Resize(sizes) => {
                publisher.update(|status| {
                    status.vcpus = sizes.desired_vcpus.or(status.vcpus);
                    if let Some(ram) = sizes.desired_ram {
                        let more = ram.saturating_sub(status.config.memory.boot_size());
                        status.hotplugged = vec![Arc::new(AtomicU64::new(more))];
                    }
                });
                Ok(Reply::Done)
            }
            Request::AddDevice(_)
            | Request::RemoveDevice(_)
            | Request::ResizeZone(_)
            | Request::ResizeDisk(_)
            | Request::Delete
            | Request::PowerButton
            | Request::Nmi => Ok(Reply::Done),
        }
    }
}

#[cfg(test)]
mod tests {
    use spec::PayloadConfig;

    use super::*;
    use crate::registry::Registry;

    fn config() -> VmConfig {
        VmConfig::with_payload(PayloadConfig {
            kernel: Some("/k".into()),
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn vm_lifecycle() {
        let registry = Registry::new(Fake::default());
        let vm = registry.create(None, config()).unwrap();
        vm.ask(Request::Boot).await.unwrap();
        assert_eq!(vm.info().state, VmState::Running);
        let denied = vm.ask(Request::Resume).await.unwrap_err();
        assert_eq!(
            (denied.category, denied.code.as_str()),
            (Category::Conflict, "wrong-state")
        );
        registry.delete(vm.id().as_str()).await.unwrap();
        assert_eq!(
            vm.ask(Request::Boot).await,
            Err(RequestError::driver_gone())
        );
        assert!(registry.list().is_empty());
        let events: Vec<_> = registry
            .events()
            .after(0, None)
            .0
            .into_iter()
            .map(|e| e.event)
            .collect();
        assert_eq!(events, ["created", "booted", "deleted"]);
    }

    type FakeInbox = crate::handle::Inbox<(), ()>;

    /// Drivers that answer when the test does.
    #[derive(Clone, Default)]
    struct ByHand(Arc<parking_lot::Mutex<Vec<FakeInbox>>>);

    impl Spawn for ByHand {
        fn spawn(
            &self,
            id: &VmId,
            config: Arc<VmConfig>,
            events: EventLog,
        ) -> Result<VmHandle, RequestError> {
            let (handle, inbox, ..) = connect::<(), ()>(id, config, events, || {});
            self.0.lock().push(inbox);
            Ok(handle)
        }

        fn host_limits(&self) -> HostLimits {
            Fake::default().host_limits()
        }

        fn host_cpu(&self) -> HostCpu {
            HostCpu::default()
        }

        fn check_cpu(&self, guest: &CpuDescription) -> Result<CpuCheck, RequestError> {
            Fake::default().check_cpu(guest)
        }
    }

    /// A request or migration that ends late leaves a VM alone that has got the name meanwhile.
    #[tokio::test]
    async fn only_the_vm_that_was_meant_is_forgotten() {
        let drivers = ByHand::default();
        let registry = Registry::new(drivers.clone());
        let name: VmId = "one".parse().unwrap();
        let first = registry.create(Some(name.clone()), config()).unwrap();
        let mut late = std::pin::pin!(registry.delete("one"));
        let asked = std::future::poll_fn(|context| {
            std::task::Poll::Ready(late.as_mut().poll(context).is_pending())
        });
        assert!(asked.await);
        registry.forget(&first, "migrated", None);
        let second = registry.create(Some(name), config()).unwrap();
        let Some(Message::Ask(ask)) = drivers.0.lock()[0].next(|_| true) else {
            panic!("no request");
        };
        ask.answer(Ok(Reply::Done));
        late.await.unwrap();
        registry.forget(&first, "migrated", None);
        assert!(registry.get("one").unwrap().is_same(&second));
        let (events, _) = registry.events().after(0, None);
        let events: Vec<_> = events.into_iter().map(|event| event.event).collect();
        assert_eq!(events, ["created", "migrated", "created"]);
    }

    #[tokio::test]
    async fn rejects_duplicate_names_and_bad_configs() {
        let registry = Registry::new(Fake::default());
        let name: VmId = "one".parse().unwrap();
        registry.create(Some(name.clone()), config()).unwrap();
        assert_eq!(
            registry.create(Some(name), config()).unwrap_err().code,
            "vm-exists"
        );
        let mut bad = config();
        bad.memory.size = 1;
        assert_eq!(
            registry.create(None, bad).unwrap_err().code,
            "invalid-configuration"
        );
        assert_eq!(registry.get("two").unwrap_err().code, "no-such-vm");
        assert_eq!(registry.get("../two").unwrap_err().code, "no-such-vm");
    }

    #[tokio::test]
    async fn vm_of_dead_driver_can_be_deleted() {
        let registry = Registry::new(Fake {
            die_at_nmi: true,
            ..Fake::default()
        });
        let vm = registry.create(None, config()).unwrap();
        assert_eq!(vm.ask(Request::Nmi).await, Err(RequestError::driver_gone()));
        // Its inbox goes first, and its status says so a moment later.
        vm.watch().wait_for(|status| status.ended).await.unwrap();
        registry.delete(vm.id().as_str()).await.unwrap();
    }
}
