//! A busy Debian guest that moves back and forth between two services until the time is over.
//! `ci/test soak MINUTES` runs it in the rig.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::env;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use spec::{CpusConfig, MemoryMode, MigrationInfo, VmConfig, VmState};
use tests::{Machine, Network, ROUTER, RUNS, Service, vsock_echo};
use tokio::time::timeout;

/// The port, in the guest's vsock, that echoes.
const ECHO: u32 = 1234;
const STREAM: u16 = 5002;
/// A migration and all questions about it. [`Machine::migrate`] ends one that makes no progress much
/// earlier, if the services answer.
const ENDS: Duration = Duration::from_secs(1800);

/// Starts the work of the guest. Each worker counts its passes in a file of its name in `/tmp`, appends
/// what it finds wrong to `/tmp/faults`, and ends when `/tmp/end` exists. The pauses leave the one CPU of the
/// emulated host to the services now and then.
/// - `disk` writes files, reads them back past the page cache, and compares their sums;
/// - `memory` rewrites files in memory and checks the sums of those that lay there meanwhile;
/// - `stream` sends numbered lines to the host by TCP, and `end` behind the last.
const WORK: &str = r#"
cat >/tmp/workers <<'WORKERS'
disk() {
  i=0
  while [ ! -e /tmp/end ]; do
    i=$((i + 1)) file=/root/soak.$((i % 8))
    head -c 500000 /dev/urandom >$file && sync $file || echo "disk: pass $i: write" >>/tmp/faults
    want=$(sha256sum <$file)
    got=$(dd if=$file bs=64k iflag=direct 2>/dev/null | sha256sum)
    [ "$want" = "$got" ] || echo "disk: pass $i: wrote $want, read $got" >>/tmp/faults
    echo $i >/tmp/disk; sleep 0.2
  done
  touch /tmp/disk.done
}
memory() {
  i=0
  while [ ! -e /tmp/end ]; do
    i=$((i + 1)) file=/dev/shm/soak.$((i % 16))
    [ $i -le 16 ] || sha256sum --status -c $file.sum || echo "memory: pass $i: $file" >>/tmp/faults
    head -c 1000000 /dev/urandom >$file && sha256sum $file >$file.sum
    echo $i >/tmp/memory; sleep 0.2
  done
  touch /tmp/memory.done
}
stream() {
  (
    i=0
    while [ ! -e /tmp/end ]; do i=$((i + 1)); echo $i; sleep 0.1; done
    echo end
  ) | socat -u - TCP:ROUTER:PORT || echo "stream: socat ended with $?" >>/tmp/faults
  touch /tmp/stream.done
}
WORKERS
. /tmp/workers
for worker in disk memory stream; do ($worker >/dev/null 2>&1 &); done
(socat VSOCK-LISTEN:ECHO,fork EXEC:cat >/dev/null 2>&1 &)
"#;

/// Numbered lines from the guest: any that is lost, doubled or damaged is an error.
struct Stream {
    lines: Arc<AtomicU64>,
    reader: JoinHandle<Result<()>>,
}

impl Stream {
    fn listen() -> Result<Self> {
        let listener = TcpListener::bind((ROUTER, STREAM))?;
        let lines = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&lines);
        let reader = thread::spawn(move || -> Result<()> {
            let (stream, _) = listener.accept()?;
            for (line, number) in BufReader::new(stream).lines().zip(1_u64..) {
                let line = line?;
                if line == "end" {
                    return Ok(());
                }
                ensure!(line == number.to_string(), "line {number} is {line:?}");
                count.store(number, Ordering::Relaxed);
            }
            bail!("the stream closed before its end");
        });
        Ok(Self { lines, reader })
    }

    fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }
}

/// The result of one mode.
#[derive(Debug, Default)]
struct Moves {
    stops_us: Vec<u64>,
    times_us: Vec<u64>,
    failures: BTreeMap<String, u32>,
}

#[derive(Debug, Default)]
struct Tally(BTreeMap<String, Moves>);

impl Tally {
    /// Counts and prints a migration, and returns whether the guest moved.
    fn count(&mut self, mode: MemoryMode, host: &str, info: &MigrationInfo) -> Result<bool> {
        let moves = self.0.entry(mode.to_string()).or_default();
        if let Some(error) = &info.error {
            *moves.failures.entry(error.code.clone()).or_default() += 1;
            println!("soak: FAILED: {mode} to {host}: {info:?}");
            return Ok(false);
        }
        let stop = info.downtime.context("a guest that moved was stopped")?;
        moves.stops_us.push(stop.total_us);
        moves.times_us.push(info.elapsed_us);
        println!(
            "soak: {mode} to {host}: {} ms, {} rounds, {} pages, {} faults, downtime {} ms (predicted {:?} us)",
            info.elapsed_us / 1000,
            info.rounds,
            info.pages,
            info.faults,
            stop.total_us / 1000,
            info.predicted_downtime_us,
        );
        Ok(true)
    }

    /// Prints a line for each mode, and fails when a migration did.
    fn summarize(&mut self, minutes: u64) -> Result<()> {
        let (mut moved, mut failed) = (0, 0);
        for (mode, moves) in &mut self.0 {
            let failures: u32 = moves.failures.values().sum();
            println!(
                "soak: {mode}: {} moves, {failures} failed {:?}, downtime {}, whole migration {}",
                moves.stops_us.len(),
                moves.failures,
                spread(&mut moves.stops_us),
                spread(&mut moves.times_us),
            );
            moved += moves.stops_us.len();
            failed += failures;
        }
        println!("soak: {minutes} minutes: {moved} moves, {failed} failed");
        ensure!(failed == 0, "{failed} migrations failed: see FAILED above");
        ensure!(moved > 0, "the guest did not move");
        Ok(())
    }
}

/// The least, the median and the most, in milliseconds.
fn spread(times_us: &mut [u64]) -> String {
    times_us.sort_unstable();
    match (
        times_us.first(),
        times_us.get(times_us.len() / 2),
        times_us.last(),
    ) {
        (Some(least), Some(median), Some(most)) => {
            format!("{}/{}/{} ms", least / 1000, median / 1000, most / 1000)
        }
        _ => "-".to_owned(),
    }
}

fn devices(service: &Service, config: &mut VmConfig) {
    config.memory.size = 256 << 20;
    config.cpus = CpusConfig::with_vcpus(2);
    config.net = Some(vec![serde_json::from_str(r#"{"tap":"tap0"}"#).unwrap()]);
    let socket = service.path("vsock").to_string_lossy().into_owned();
    config.vsock =
        Some(serde_json::from_str(&format!(r#"{{"cid":7,"socket":"{socket}"}}"#)).unwrap());
}

/// Checks that each worker of the guest made a pass since the last call, and that none found a fault.
async fn works(machine: &mut Machine, stream: &Stream, before: u64) -> Result<u64> {
    let passes = "for worker in disk memory; do \
         before=$(cat /tmp/$worker.before 2>/dev/null || echo 0); \
         for i in $(seq 300); do [ \"$(cat /tmp/$worker 2>/dev/null || echo 0)\" -gt $before ] && break; sleep 0.2; done; \
         cat /tmp/$worker; [ \"$(cat /tmp/$worker)\" -gt $before ] && cp /tmp/$worker /tmp/$worker.before || exit 1; done; \
         cat /tmp/faults 2>/dev/null; [ ! -e /tmp/faults ]";
    machine.run(&format!("({passes})")).await?;
    // A kernel whose vCPUs are not run in time complains of that, which is no fault of its own.
    let said = machine
        .run("dmesg | grep -iE 'oops|BUG: (unable|kernel|bad)|general protection|i/o error|ext4-fs error' || true")
        .await?;
    ensure!(said.is_empty(), "the guest's kernel says:\n{said}");
    let start = Instant::now();
    while stream.lines() <= before {
        let over = stream.reader.is_finished() || start.elapsed() > RUNS;
        ensure!(!over, "no line after {before} by TCP");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(stream.lines())
}

#[tokio::test]
#[ignore = "wants a complete KVM, and takes WHIMBREL_SOAK_MINUTES: ci/test soak runs it in the rig"]
async fn debian_moves_back_and_forth() -> Result<()> {
    let minutes: u64 = env::var("WHIMBREL_SOAK_MINUTES")
        .context("WHIMBREL_SOAK_MINUTES is how long the guest moves")?
        .parse()?;
    let mut tally = Tally::default();
    let outcome = back_and_forth(minutes, &mut tally).await;
    // Printed whatever the outcome.
    let tallied = tally.summarize(minutes);
    outcome?;
    tallied
}

async fn back_and_forth(minutes: u64, tally: &mut Tally) -> Result<()> {
    let hosts = ["north", "south"];
    let network = Network::with_hosts(&hosts)?;
    let [here, mut there] = [
        Service::start_on(hosts[0]).await?,
        Service::start_on(hosts[1]).await?,
    ];
    let disk = r#"{"path":"/dev/vda","image_type":"Raw","num_queues":2}"#;
    let mut machine = Machine::boot(here, disk, devices).await?;
    let socket = machine.service.path("vsock");
    // A login comes before the network does.
    machine
        .run(&format!("(for i in $(seq 60); do ping -c 1 -W 1 {ROUTER} >/dev/null 2>&1 && exit 0; sleep 0.5; done; ip addr; false)"))
        .await?;
    let stream = Stream::listen()?;
    let work = WORK
        .replace("ROUTER", ROUTER)
        .replace("PORT", &STREAM.to_string())
        .replace("ECHO", &ECHO.to_string());
    machine.run(&work).await?;

    let (mut lines, mut at) = (0, 0);
    let modes = [
        MemoryMode::Precopy,
        MemoryMode::Hybrid,
        MemoryMode::Postcopy,
    ];
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    for mode in modes.into_iter().cycle() {
        if Instant::now() > end {
            break;
        }
        let host = hosts[1 - at];
        let address = network.address(host)?;
        // Bounded here too: a service that does not answer has no limit of its own.
        let migrated = timeout(ENDS, machine.migrate(&there, &address, mode)).await;
        let Ok(info) = migrated else {
            bail!(
                "{mode} to {host}: a service does not answer\nsource:\n{}{}\ndestination:\n{}{}",
                machine.service.log(),
                machine.service.threads(),
                there.log(),
                there.threads()
            );
        };
        let info = info?;
        if tally.count(mode, host, &info)? {
            there = machine.arrive(there).await?;
            at = 1 - at;
            ensure!(there.client().vms_list().await?.is_empty());
        } else {
            // The guest must still run where it was: the next checks would fail if it does not.
            let left = machine.client().vms_info(&machine.vm).await?;
            ensure!(
                left.state == VmState::Running,
                "after a failed migration the VM is {}: {:?}\nsource:\n{}\ndestination:\n{}",
                left.state,
                left.failure,
                machine.service.log(),
                there.log()
            );
        }
        lines = works(&mut machine, &stream, lines).await?;
        vsock_echo(&socket, ECHO).await?;
    }
    machine.run("touch /tmp/end").await?;
    let passes = machine
        .run(
            "(for i in $(seq 300); do [ -e /tmp/disk.done ] && [ -e /tmp/memory.done ] && [ -e /tmp/stream.done ] && break; \
             sleep 0.2; done; cat /tmp/faults 2>/dev/null; \
             [ ! -e /tmp/faults ] && [ -e /tmp/disk.done ] && [ -e /tmp/memory.done ] && [ -e /tmp/stream.done ] && \
             echo $(cat /tmp/disk) passes of the disk, $(cat /tmp/memory) of memory)",
        )
        .await?;
    let lines = stream.lines();
    let start = Instant::now();
    while !stream.reader.is_finished() {
        ensure!(start.elapsed() < RUNS, "no end of the stream by TCP");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stream.reader.join().unwrap()?;
    println!("soak: {passes}, {lines} lines by TCP: all whole");
    machine.power_off().await
}
