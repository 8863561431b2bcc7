//! A noisy neighbour: one guest does what it can to disturb, another must not notice.
//!
//! The bounds are those of the design and not of speed: how often a guest is rebuilt, and answers
//! within a patience that is far above what a loaded machine takes.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::path::Path;
use std::time::{Duration, Instant};

use control::{Registry, Request, VmHandle};
use guest::{After, Line, Options, Workload};
use spec::{ConsoleMode, PayloadConfig, VmConfig};
use vmm::{Pool, PoolConfig};

/// For each answer and each heartbeat of the quiet VM, and for the end of the noisy one.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the storm lasts.
const STORM: Duration = Duration::from_secs(6);
/// Resets of a guest that are served at once, and those that follow in the storm: one a second.
const RESETS_MAX: u64 = 8 + STORM.as_secs() + 2;

async fn boot(registry: &Registry, dir: &Path, name: &str, options: &Options) -> VmHandle {
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(path("pocket")),
        cmdline: Some(options.to_string()),
        ..PayloadConfig::default()
    });
    config.memory.size = 64 << 20;
    config.serial.mode = ConsoleMode::File;
    config.serial.file = Some(path(name));
    let vm = registry.create(None, config).unwrap();
    vm.ask(Request::Boot).await.unwrap();
    vm
}

fn heartbeats(log: &Path) -> usize {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines = text.lines().filter_map(Line::parse);
    lines
        .filter(|line| matches!(line, Line::Heartbeat { .. }))
        .count()
}

async fn soon<T>(what: &str, done: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, done).await;
    done.map_err(|_| format!("waited in vain for {what}"))
        .unwrap()
}

#[tokio::test]
async fn a_reset_storm_is_spread_and_the_neighbour_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
    // Both drivers on one thread, and all devices on another.
    let pool = Pool::start(&PoolConfig {
        threads: Some(1),
        ..PoolConfig::default()
    });
    let registry = Registry::new(pool.unwrap());
    let beating = Options {
        heartbeat_ms: Some(20),
        ..Options::default()
    };
    // Its work is over at once, and then it resets.
    let resetting = Options {
        workload: Workload::Exits {
            port: 0x80,
            count: 1,
        },
        then: After::Reset,
        ..Options::default()
    };
    let quiet = boot(&registry, dir.path(), "quiet", &beating).await;
    let noisy = boot(&registry, dir.path(), "noisy", &resetting).await;
    let log = dir.path().join("quiet");
    let start = Instant::now();
    while start.elapsed() < STORM {
        let before = heartbeats(&log);
        soon("counters", quiet.ask(Request::Counters))
            .await
            .unwrap();
        soon("a heartbeat", async {
            while heartbeats(&log) == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
    let resets = noisy.status().reboots;
    // The time that the last round took counts, too.
    let max = RESETS_MAX + (start.elapsed() - STORM).as_secs();
    assert!(
        (1..=max).contains(&resets),
        "{resets} resets, {max} allowed"
    );
    soon("the end", registry.delete(noisy.id().as_str()))
        .await
        .unwrap();
    // What the noisy guest caused pushed nothing of its neighbour's out.
    let (events, missed) = registry.events().after(0, Some(quiet.id()));
    let events: Vec<_> = events.iter().map(|event| event.event.as_str()).collect();
    assert_eq!((events, missed), (vec!["created", "booted"], None));
}
