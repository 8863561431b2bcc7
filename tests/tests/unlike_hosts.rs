//! Two hosts with different CPUs, joined by a network cable: `ci/test e2e` runs one rig for each of these
//! tests, at the same time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use spec::{CpuProfile, CpusConfig, MigrationPhase, StartMigration, VmConfig, VmId, VmState};
use tests::debian::BUTTON;
use tests::{Face, Serial, Service, debian};

/// A rig starts, or Debian boots: a minute or two, where two emulators share the machine.
const PATIENCE: Duration = Duration::from_secs(400);
/// The rig's host 1.
const RECEIVER: &str = "tcp:10.0.0.1:7000";
/// The same file on both hosts, as on storage that they share.
const SERIAL: &str = "/tmp/debian.serial";
const GUEST: &str = "debian";

fn debian(profile: CpuProfile) -> Result<VmConfig> {
    let cpus = CpusConfig {
        profile,
        ..CpusConfig::with_vcpus(1)
    };
    debian::config(cpus, 256 << 20, &Serial::at(SERIAL))
}

/// The older host: takes the guest that sees no more than both have, and ends it by its power button.
#[tokio::test]
#[ignore = "wants a complete KVM and another host: ci/test e2e runs it in the rig"]
async fn older_host_receives() -> Result<()> {
    let arguments = [
        "--accept-migrations",
        RECEIVER,
        "--migration-insecure",
        "--migration-allow",
        "/",
    ]
    .map(str::to_owned);
    let service = Service::start_with(&[], &arguments).await?;
    let client = service.client();
    let host = client.host_cpu().await?;
    let lacks = |profile: CpuProfile| {
        let mut fits = host.profiles.iter();
        fits.find(|fit| fit.profile == profile)
            .map_or(0, |fit| fit.lacking.len())
    };
    ensure!(
        lacks(CpuProfile::V2) == 0 && lacks(CpuProfile::V3) > 0,
        "{host:?}"
    );
    let vm: VmId = GUEST.parse()?;
    let start = Instant::now();
    let running = loop {
        match client.vms_info(&vm).await {
            Ok(info) if info.state == VmState::Running => break info,
            _ if start.elapsed() > PATIENCE => bail!("no guest came:\n{}", service.log()),
            _ => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    };
    assert_eq!(running.config.cpus.profile, CpuProfile::V2);
    let seen = client.vms_cpu(&vm).await?;
    assert!(
        seen.features.iter().any(|feature| feature == "sse4_2"),
        "{seen:?}"
    );
    assert!(
        seen.features.iter().all(|feature| feature != "avx"),
        "{seen:?}"
    );
    client.vms_power_button(&vm).await?;
    let info = service.reaches(&vm, VmState::Shutdown).await?;
    assert_eq!(info.failure, None);
    let text = Serial::at(SERIAL).text();
    assert!(text.contains("guest: power button"), "{text}");
    println!("the guest runs here, and obeys its power button");
    Ok(())
}

/// The newer host: its guest that sees all cannot move, and one with `x86-64-v2` does.
#[tokio::test]
#[ignore = "wants a complete KVM and another host: ci/test e2e runs it in the rig"]
async fn newer_host_sends() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let client = service.client();
    // Each leaves the same text in the serial file.
    for profile in [CpuProfile::Host, CpuProfile::V2] {
        let vm = service.create(GUEST, debian(profile)?).await?;
        client.vms_boot(&vm).await?;
        service
            .prints(&vm, &Serial::at(SERIAL), BUTTON, 1, PATIENCE)
            .await?;
        let what = StartMigration {
            insecure: true,
            ..StartMigration::to(RECEIVER.to_owned())
        };
        let start = Instant::now();
        let ended = loop {
            let begun = client.vms_migrate(&vm, &what).await?;
            let ended = service
                .until(&begun.id.parse()?, PATIENCE, |info| info.phase.is_over())
                .await?;
            let why = ended.error.as_ref().map(|error| error.code.as_str());
            // The other rig may not have started its service yet.
            if why != Some("unreachable") || start.elapsed() > PATIENCE {
                break ended;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        if profile == CpuProfile::V2 {
            assert_eq!(ended.phase, MigrationPhase::Completed, "{ended:?}");
            break;
        }
        let error = ended.error.context("a guest that sees AVX2 moved")?;
        assert_eq!(error.code, "cpu-lacks-features", "{error:?}");
        assert!(error.detail.contains("avx2"), "{error:?}");
        println!("refused: {}", error.detail);
        assert_eq!(client.vms_info(&vm).await?.state, VmState::Running);
        client.vms_delete(&vm).await?;
        std::fs::remove_file(SERIAL)?;
    }
    println!("the guest has moved");
    Ok(())
}
