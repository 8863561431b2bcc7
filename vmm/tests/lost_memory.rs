//! Memory that the host cannot give any more ends its VM, and nothing else. On `/dev/kvm`, with the
//! pocket guest.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::time::{Duration, Instant};

use control::{Registry, Request, VmHandle};
use guest::{Options, Order, Workload};
use spec::{PayloadConfig, VmConfig, VmState};
use vmm::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

async fn boot(registry: &Registry, kernel: &str, size: u64, shared: bool) -> VmHandle {
    let options = Options {
        workload: Workload::Dirty {
            region_mib: Some(8),
            rate: Some(1000),
            order: Order::Linear,
        },
        heartbeat_ms: Some(20),
        ..Options::default()
    };
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_owned()),
        cmdline: Some(options.to_string()),
        ..PayloadConfig::default()
    });
    config.memory.size = size;
    config.memory.shared = shared;
    let vm = registry.create(None, config).unwrap();
    vm.ask(Request::Boot).await.unwrap();
    vm
}

/// Memory by which the one VM that loses it is found.
const SIZE: u64 = 73 * MIB;

/// Takes all memory from the VM that has `SIZE` of it, as a file that shrinks does.
fn truncate_memory() {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut truncated = 0;
    for path in open.map(|entry| entry.path()) {
        let is_ram = std::fs::read_link(&path)
            .is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:guest-ram"));
        if is_ram && path.metadata().is_ok_and(|file| file.len() == SIZE) {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.set_len(0).unwrap();
            truncated += 1;
        }
    }
    assert!(truncated > 0);
}

async fn ended(vm: &VmHandle) -> spec::Failure {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < PATIENCE, "the VM goes on");
        let status = vm.status();
        if status.state == VmState::Shutdown {
            return status.failure.clone().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn lost_memory_ends_only_its_vm() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("pocket").to_string_lossy().into_owned();
    std::fs::write(&kernel, guest::IMAGE).unwrap();
    let registry = Registry::new(Pool::start(&PoolConfig::default()).unwrap());
    let other = boot(&registry, &kernel, 64 * MIB, false).await;
    memory::testing::unseal();
    let vm = boot(&registry, &kernel, SIZE, true).await;
    truncate_memory();
    let failure = ended(&vm).await;
    assert_eq!(failure.code, "memory-lost", "{}", failure.detail);
    // The VM has new memory with its next machine.
    vm.ask(Request::Boot).await.unwrap();
    assert_eq!(vm.info().state, VmState::Running);
    registry.delete(vm.id().as_str()).await.unwrap();
    assert_eq!(other.info().state, VmState::Running);
}

#[tokio::test]
async fn missing_huge_pages_fail_the_boot() {
    let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(pool).unwrap_or_default();
    let free: u64 = free.trim().parse().unwrap_or(0);
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("pocket").to_string_lossy().into_owned();
    std::fs::write(&kernel, guest::IMAGE).unwrap();
    let registry = Registry::new(Pool::start(&PoolConfig::default()).unwrap());
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel),
        ..PayloadConfig::default()
    });
    // More than there is, whatever there is.
    config.memory.size = (free + 64) * 2 * MIB;
    config.memory.hugepages = true;
    let vm = registry.create(None, config).unwrap();
    let refused = vm.ask(Request::Boot).await.unwrap_err();
    assert_eq!(refused.code, "no-memory", "{refused}");
    assert!(refused.detail.contains("huge pages"), "{refused}");
    assert_eq!(vm.info().state, VmState::Created);
}
