//! Noisy neighbours: one guest does what it can to disturb, another must not notice.
//!
//! The bounds are counts: requests that are answered, heartbeats and pages of a disk that arrive,
//! events, bytes and descriptors that the service keeps. The only times are how long a guest is
//! given to be rebuilt, and a patience that is far above what a loaded machine takes.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

mod stray;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use control::{Registry, Reply, Request, VmHandle};
use guest::{After, Attack, Command, Line, Options, Workload};
use serde_json::json;
use spec::{ConsoleMode, PayloadConfig, VmConfig, VmState};
use vmm::{Pool, PoolConfig};

/// For each answer and each heartbeat of the quiet VM, and for the end of the noisy one.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the storm lasts.
const STORM: Duration = Duration::from_secs(6);
/// Resets of a guest that are served at once, and those that follow in the storm: one a second.
const RESETS_MAX: u64 = 8 + STORM.as_secs() + 2;
/// How often the quiet VM is asked during each attack, at least.
const QUIET_ROUNDS: u32 = 5;
/// Time for an attack to do all its rounds.
const ATTACK_PATIENCE: Duration = Duration::from_secs(120);
/// Memory that an attack may make the service keep. An event that is queued for each port access
/// is more.
const GROWTH_MAX: u64 = 24 << 20;
/// Descriptors that an attack may make the service keep: vsock connections (256), and some that a
/// running device has.
const DESCRIPTORS_MAX: usize = 256 + 64;
/// `device-needs-reset` is recorded 16 times at once, then once in two seconds.
const NEEDS_RESET_AT_ONCE: u64 = 16;
const NEEDS_RESET_INTERVAL: Duration = Duration::from_secs(2);

/// The tests of this file measure the process, so only one runs at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

struct Lab {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Lab {
    /// All drivers on one thread, and all devices on another.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        let pool = Pool::start(&PoolConfig {
            threads: Some(1),
            ..PoolConfig::default()
        });
        let registry = Registry::new(pool.unwrap());
        Self { dir, registry }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    fn config(&self, name: &str, options: &Options) -> VmConfig {
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(self.text("pocket")),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        });
        config.memory.size = 64 << 20;
        // RAM in a memfd is not part of the anonymous memory that the tests measure.
        config.memory.shared = true;
        config.serial.mode = ConsoleMode::File;
        config.serial.file = Some(self.text(name));
        config
    }

    /// Adds a disk with a sparse image of this size.
    fn add_disk(&self, config: &mut VmConfig, name: &str, size: u64) {
        let path = self.text(&format!("{name}.disk"));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let disk = json!([{ "path": path, "image_type": "Raw" }]);
        config.disks = serde_json::from_value(disk).unwrap();
    }

    async fn boot(&self, config: VmConfig) -> VmHandle {
        let vm = self.registry.create(None, config).unwrap();
        vm.ask(Request::Boot).await.unwrap();
        vm
    }

    async fn delete(&self, vm: &VmHandle) {
        let deleted = soon("the end", self.registry.delete(vm.id().as_str())).await;
        deleted.unwrap();
    }

    fn events(&self, vm: &VmHandle) -> (Vec<spec::Event>, Option<control::Missed>) {
        self.registry.events().after(0, Some(vm.id()))
    }

    /// Requires all events of a VM that was created and booted, and nothing else.
    fn check_quiet(&self, vm: &VmHandle) {
        let (events, missed) = self.events(vm);
        let events: Vec<_> = events.iter().map(|event| event.event.as_str()).collect();
        assert_eq!((events, missed), (vec!["created", "booted"], None));
    }
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
async fn reset_storm_is_limited() {
    let _alone = ALONE.lock().await;
    let lab = Lab::new();
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
    let quiet = lab.boot(lab.config("quiet", &beating)).await;
    let noisy = lab.boot(lab.config("noisy", &resetting)).await;
    let log = lab.path("quiet");
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
    lab.delete(&noisy).await;
    // What the noisy guest caused pushed nothing of its neighbour's out.
    lab.check_quiet(&quiet);
}

/// A VM that uses a disk and beats, and is asked about both on its serial port.
struct Quiet {
    vm: VmHandle,
    serial: BufReader<UnixStream>,
    beats: u64,
    blocks: u64,
}

impl Quiet {
    async fn boot(lab: &Lab) -> Self {
        let options = Options {
            workload: Workload::Io,
            heartbeat_ms: Some(20),
            ..Options::default()
        };
        let mut config = lab.config("quiet", &options);
        let socket = lab.text("quiet.serial");
        let serial = json!({ "mode": "Socket", "socket": socket });
        config.serial = serde_json::from_value(serial).unwrap();
        lab.add_disk(&mut config, "quiet", 1 << 20);
        let vm = lab.boot(config).await;
        let serial = UnixStream::connect(socket).unwrap();
        serial.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            vm,
            serial: BufReader::new(serial),
            beats: 0,
            blocks: 0,
        }
    }

    /// Requires an answer of the driver, of the serial port and of the guest, and from the guest
    /// pages of the disk that it wrote and read back, and a heartbeat that was sent meanwhile.
    async fn round(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        assert_eq!(self.vm.status().state, VmState::Running);
        soon("counters", self.vm.ask(Request::Counters))
            .await
            .unwrap();
        let had = self.blocks;
        while self.blocks <= had {
            let ask = format!("{}\n", Command::Io);
            self.serial.get_mut().write_all(ask.as_bytes()).unwrap();
            self.read_until(deadline, |line| matches!(line, Line::Io { .. }));
        }
        let beats = self.beats;
        self.read_until(
            deadline,
            |line| matches!(line, Line::Heartbeat { count, .. } if *count > beats),
        );
    }

    fn read_until(&mut self, deadline: Instant, wanted: impl Fn(&Line) -> bool) {
        let mut text = String::new();
        loop {
            text.clear();
            assert!(self.serial.read_line(&mut text).unwrap() > 0);
            assert!(Instant::now() < deadline, "waited in vain: {text}");
            let Some(line) = Line::parse(&text) else {
                continue;
            };
            let found = wanted(&line);
            match line {
                Line::Heartbeat { count, .. } => self.beats = count,
                Line::Io { blocks, bad, .. } => {
                    assert_eq!(bad, 0, "{text}");
                    self.blocks = blocks;
                }
                _ => {}
            }
            if found {
                return;
            }
        }
    }
}

/// Memory of this process that no file is behind.
fn anonymous_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = field.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Rounds of an attack, by its last heartbeat.
fn rounds(log: &Path) -> u64 {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let writes = |line| match Line::parse(line) {
        Some(Line::Heartbeat { writes, .. }) => Some(writes),
        _ => None,
    };
    text.lines().rev().find_map(writes).unwrap_or(0)
}

impl Lab {
    /// The configuration of a VM that attacks.
    fn attacker(&self, attack: Attack) -> VmConfig {
        let options = Options {
            workload: Workload::Attack(attack),
            heartbeat_ms: Some(20),
            ..Options::default()
        };
        let mut config = self.config(attack.name(), &options);
        self.add_disk(&mut config, attack.name(), 1 << 30);
        let socket = self.text("attacker.vsock");
        let vsock = json!({ "cid": 3, "socket": socket });
        config.vsock = serde_json::from_value(vsock).unwrap();
        config
    }

    /// Has a guest attack, asks the quiet VM meanwhile, and ends the attacker twice.
    async fn attack(&self, attack: Attack, quiet: &mut Quiet) {
        let memory = anonymous_memory();
        let vm = self.boot(self.attacker(attack)).await;
        let held = descriptors();
        let (start, log) = (Instant::now(), self.path(attack.name()));
        let mut asked = 0;
        while asked < QUIET_ROUNDS || rounds(&log) < rounds_wanted(attack) {
            quiet.round().await;
            asked += 1;
            let grown = anonymous_memory().saturating_sub(memory);
            assert!(grown <= GROWTH_MAX, "{attack}: {grown} bytes more");
            let more = descriptors().saturating_sub(held);
            assert!(more <= DESCRIPTORS_MAX, "{attack}: {more} descriptors more");
            let done = rounds(&log);
            assert!(start.elapsed() < ATTACK_PATIENCE, "{attack}: {done} rounds");
        }
        self.check_traces(attack, &vm, start).await;
        soon("shutdown", vm.ask(Request::Shutdown)).await.unwrap();
        self.delete(&vm).await;
        // Once more, to be deleted while it attacks.
        std::fs::remove_file(&log).unwrap();
        let vm = self.boot(self.attacker(attack)).await;
        soon("an attack", async {
            while rounds(&log) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        self.delete(&vm).await;
        quiet.round().await;
    }

    /// The attack did something to the host, and left no more events than it may.
    async fn check_traces(&self, attack: Attack, vm: &VmHandle, start: Instant) {
        let (events, missed) = self.events(vm);
        assert_eq!(missed, None, "{attack}: {} events are kept", events.len());
        let wants_reset = |event: &&spec::Event| event.event == "device-needs-reset";
        let resets: Vec<_> = events.iter().filter(wants_reset).collect();
        let intervals = start.elapsed().as_secs() / NEEDS_RESET_INTERVAL.as_secs();
        let max = NEEDS_RESET_AT_ONCE + intervals + 2;
        let count = resets.len() as u64;
        assert!(count <= max, "{attack}: {count} events, {max} allowed");
        let says = |why| {
            let mut details = resets.iter().filter_map(|event| event.detail.as_deref());
            details.any(|detail| detail.contains(why))
        };
        let Reply::Counters(counters) = soon("counters", vm.ask(Request::Counters)).await.unwrap()
        else {
            unreachable!("counters were asked for");
        };
        let sum = |name| {
            counters
                .values()
                .filter_map(|all| all.get(name))
                .sum::<u64>()
        };
        match attack {
            Attack::Status | Attack::Requeue => assert!(count > 0, "{attack}"),
            Attack::Chains => assert!(says("is longer than its queue"), "{resets:?}"),
            Attack::Discards => assert!(sum("discards") > 0, "{counters:?}"),
            Attack::Vsock => assert!(sum("tx_packets") > 0, "{counters:?}"),
            Attack::Eject | Attack::SerialReads | Attack::Config => {}
        }
    }
}

/// Rounds of an attack that the quiet VM must survive. Of port accesses there must be so many that
/// an event kept for each exceeds [`GROWTH_MAX`].
fn rounds_wanted(attack: Attack) -> u64 {
    match attack {
        Attack::Eject | Attack::SerialReads => 500,
        _ => 100,
    }
}

#[tokio::test]
async fn no_attack_harms_the_neighbour() {
    let _alone = ALONE.lock().await;
    stray::watch();
    let lab = Lab::new();
    // Connections to it wait in its backlog for ever.
    let port = format!("attacker.vsock_{}", Attack::VSOCK_PORT);
    let _never_accepts = UnixListener::bind(lab.path(&port)).unwrap();
    let mut quiet = Quiet::boot(&lab).await;
    quiet.round().await;
    for attack in Attack::ALL {
        lab.attack(*attack, &mut quiet).await;
    }
    // No event of the quiet VM is lost, and no line of an attack lacks the name of its VM.
    lab.check_quiet(&quiet.vm);
    assert_eq!(stray::lines(), Vec::<String>::new());
}
