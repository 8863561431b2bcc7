//! Guests whose memory is in huge pages of the host. `ci/test e2e` runs them in the rig, whose pool of huge pages
//! is ours alone.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use spec::{MemoryMode, MigrationPhase, StartMigration, VmId};
use tests::{Face, Service, await_anyone, dirtier};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
/// Memory of the guest, at each of two services.
const MEMORY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(300);

fn reserve() -> Result<()> {
    fs::write(POOL, "80").with_context(|| format!("cannot write {POOL}"))?;
    let free: u64 = fs::read_to_string(FREE)?.trim().parse()?;
    ensure!(
        free * (2 << 20) >= 2 * MEMORY,
        "the host has {free} huge pages"
    );
    Ok(())
}

/// A huge page cannot be filled page by page, so that such memory cannot follow its guest: the default mode
/// slows the guest down, and one that asks for postcopy is refused while the guest runs.
#[tokio::test]
#[ignore = "reserves huge pages of the host: ci/test e2e runs it in the rig"]
async fn guest_that_writes_too_fast_is_slowed_down() -> Result<()> {
    reserve()?;
    let here = Service::start(Face::Many).await?;
    let there = Service::start(Face::Many).await?;
    let (mut config, serial) = here.pocket("guest", dirtier::options(16, 20_000, 100))?;
    config.memory.size = MEMORY;
    config.memory.hugepages = true;
    let vm = here.create("guest", config).await?;
    here.client().vms_boot(&vm).await?;
    here.prints(&vm, &serial, "heartbeat", 3, PATIENCE).await?;
    for mode in [MemoryMode::Postcopy, MemoryMode::Auto] {
        let receive = await_anyone("tcp:127.0.0.1:0");
        let waiting = there.client().migrations_receive(&receive).await?;
        let what = StartMigration {
            mode,
            max_bandwidth: Some(16 << 20),
            max_downtime_ms: 50,
            insecure: true,
            ..StartMigration::to(waiting.endpoint.clone())
        };
        let begun = here.client().vms_migrate(&vm, &what).await?;
        let id: VmId = begun.id.parse()?;
        let sent = here
            .until(&id, PATIENCE, |info| info.phase.is_over())
            .await?;
        if mode == MemoryMode::Postcopy {
            let error = sent
                .error
                .context("memory in huge pages followed its guest")?;
            assert_eq!(error.code, "no-postcopy", "{error:?}");
            // Then the machine that was made there is gone, too.
            let id: VmId = waiting.id.parse()?;
            there
                .until(&id, PATIENCE, |info| info.phase.is_over())
                .await?;
            continue;
        }
        assert_eq!(sent.phase, MigrationPhase::Completed, "{sent:?}");
        assert!(sent.throttle_percent > 0, "{sent:?}");
        println!(
            "slowed down by {} % in {} rounds",
            sent.throttle_percent, sent.rounds
        );
    }
    Ok(())
}
