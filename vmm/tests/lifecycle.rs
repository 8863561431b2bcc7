//! A whole machine on `/dev/kvm`: the pocket guest, driven through a handle.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use control::{Registry, Reply, Request, VmHandle};
use guest::{After, Crash, Line, Options, PortValue, Workload};
use spec::{ConsoleMode, CpusConfig, DebugConsoleConfig, PayloadConfig, VmConfig, VmState};
use vmm::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(30);

struct Lab {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        Self {
            dir,
            registry: Registry::new(Pool::start(&PoolConfig::default()).unwrap()),
        }
    }

    fn config(&self, name: &str, options: &Options, vcpus: u32) -> (VmConfig, PathBuf) {
        let log = self.dir.path().join(name);
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(
                self.dir
                    .path()
                    .join("pocket")
                    .to_string_lossy()
                    .into_owned(),
            ),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        });
        config.cpus = CpusConfig::with_vcpus(vcpus);
        config.memory.size = 64 << 20;
        config.serial.mode = ConsoleMode::File;
        config.serial.file = Some(log.to_string_lossy().into_owned());
        (config, log)
    }

    async fn boot(&self, name: &str, options: &Options, vcpus: u32) -> (VmHandle, PathBuf) {
        let (config, log) = self.config(name, options, vcpus);
        let vm = self.registry.create(None, config).unwrap();
        vm.ask(Request::Boot).await.unwrap();
        (vm, log)
    }
}

fn lines(log: &Path) -> Vec<Line> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().filter_map(Line::parse).collect()
}

async fn until(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn beating() -> Options {
    Options {
        heartbeat_ms: Some(20),
        ..Options::default()
    }
}

/// The bytes of one port reach its file, those of the next port nothing.
#[tokio::test]
async fn debug_console_takes_what_the_guest_writes() {
    let lab = Lab::new();
    let debug = lab.dir.path().join("debug");
    let wrote = |log: &Path| {
        let done = |line| matches!(line, Line::Exits { count: 500, .. });
        lines(log).into_iter().any(done)
    };
    for (name, port, iobase) in [("usual", 0xe9, None), ("other", 0x402, Some(0x402))] {
        for (name, port, expected) in [
            (name.to_owned(), port, 500),
            (format!("{name}-next"), port + 1, 0),
        ] {
            let options = Options {
                workload: Workload::Exits { port, count: 500 },
                ..Options::default()
            };
            let (mut config, log) = lab.config(&name, &options, 1);
            config.debug_console = Some(DebugConsoleConfig {
                file: Some(debug.to_string_lossy().into_owned()),
                mode: ConsoleMode::File,
                iobase,
            });
            let vm = lab.registry.create(None, config).unwrap();
            vm.ask(Request::Boot).await.unwrap();
            until("the writes", || wrote(&log)).await;
            assert_eq!(std::fs::read(&debug).unwrap(), vec![0; expected], "{name}");
            vm.ask(Request::Delete).await.unwrap();
        }
    }
}

#[tokio::test]
async fn guest_lifecycle() {
    let lab = Lab::new();
    let (vm, log) = lab.boot("log", &beating(), 2).await;
    until("a heartbeat", || lines(&log).len() > 3).await;
    let boot = vm.info().boot.unwrap();
    assert!(boot.first_debug_port_us.is_some() && boot.first_serial_us > boot.first_debug_port_us);

    vm.ask(Request::Pause).await.unwrap();
    let before = lines(&log).len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(
        (lines(&log).len(), vm.info().state),
        (before, VmState::Paused)
    );
    let Reply::MemoryMap(map) = vm.ask(Request::MemoryMap).await.unwrap() else {
        panic!("no map")
    };
    assert!(map.to_string().contains("ram below 4G"), "{map}");

    vm.ask(Request::Resume).await.unwrap();
    until("a heartbeat after the pause", || lines(&log).len() > before).await;
    let hellos = || {
        lines(&log)
            .iter()
            .filter(|line| matches!(line, Line::Hello { .. }))
            .count()
    };
    assert_eq!(hellos(), 1);
    vm.ask(Request::Reboot).await.unwrap();
    assert_eq!(vm.status().reboots, 1);
    vm.ask(Request::Shutdown).await.unwrap();
    assert_eq!(vm.info().state, VmState::Shutdown);
    vm.ask(Request::Boot).await.unwrap();
    until("a hello of the second boot", || hellos() == 1).await;
    lab.registry.delete(vm.id().as_str()).await.unwrap();
}

#[tokio::test]
async fn guest_memory_is_intact() {
    let lab = Lab::new();
    let options = Options {
        workload: Workload::Touch,
        then: After::PowerOff,
        ..Options::default()
    };
    let (vm, log) = lab.boot("log", &options, 2).await;
    until("the guest to power off", || {
        vm.info().state == VmState::Shutdown
    })
    .await;
    assert_eq!(vm.info().failure, None);
    let verified = lines(&log).into_iter().find_map(|line| match line {
        Line::Verified { pages, bad, .. } => Some((pages > 0, bad)),
        _ => None,
    });
    assert_eq!(verified, Some((true, 0)), "{:?}", lines(&log));
}

/// A guest that watches the power button ends by itself; one that does not stays.
#[tokio::test]
async fn power_button_reaches_guest() {
    let lab = Lab::new();
    let watching = Options {
        button_port: Some(PortValue {
            port: 0x604,
            value: devices::power::POWER_BUTTON,
        }),
        ..beating()
    };
    let (vm, log) = lab.boot("watching", &watching, 1).await;
    let (other, other_log) = lab.boot("other", &beating(), 1).await;
    until("heartbeats", || {
        lines(&log).len() > 3 && lines(&other_log).len() > 3
    })
    .await;
    other.ask(Request::PowerButton).await.unwrap();
    assert_eq!(
        vm.info().state,
        VmState::Running,
        "its button was not pressed"
    );
    vm.ask(Request::PowerButton).await.unwrap();
    until("the guest to power off", || {
        vm.info().state == VmState::Shutdown
    })
    .await;
    assert!(vm.status().by_guest && vm.info().failure.is_none());
    let before = lines(&other_log).len();
    until("a heartbeat of the other", || {
        lines(&other_log).len() > before
    })
    .await;
}

#[tokio::test]
async fn failed_guest_is_explained() {
    let lab = Lab::new();
    let (neighbour, log) = lab.boot("neighbour", &beating(), 1).await;
    for (crash, code) in [
        (Crash::TripleFault, "triple-fault"),
        (Crash::Emulation, "emulation-failure"),
    ] {
        let options = Options {
            workload: Workload::Crash(crash),
            ..Options::default()
        };
        let (vm, _) = lab.boot("failing", &options, 1).await;
        until("the guest to fail", || vm.info().state != VmState::Running).await;
        let failure = vm.info().failure;
        // A host with a complete KVM runs what another cannot emulate.
        if crash == Crash::TripleFault || failure.is_some() {
            let failure = failure.unwrap();
            assert_eq!(failure.code, code);
            assert!(!failure.detail.contains("migration"), "{failure:?}");
        }
    }
    let before = lines(&log).len();
    until("a heartbeat of the neighbour", || {
        lines(&log).len() > before
    })
    .await;
    assert_eq!(neighbour.info().state, VmState::Running);
}

/// Every way to reset or to power off ends the guest at that very instruction: a guest that runs on
/// behind it would say so.
#[tokio::test]
async fn guest_stops_at_final_instruction() {
    let lab = Lab::new();
    let port = |port, value| Some(PortValue { port, value });
    // ACPI's register, the keyboard controller's line, the chipset's reset control register.
    for (name, reset_port) in [
        ("acpi", None),
        ("i8042", port(0x64, 0xfe)),
        ("cf9", port(0xcf9, 0x06)),
    ] {
        let options = Options {
            workload: Workload::Smp,
            then: After::Reset,
            reset_port,
            ..Options::default()
        };
        let (vm, log) = lab.boot(name, &options, 2).await;
        until("some resets", || vm.status().reboots >= 3).await;
        vm.ask(Request::Shutdown).await.unwrap();
        ends_at_once(&log);
    }
    let options = Options {
        workload: Workload::Smp,
        then: After::PowerOff,
        ..Options::default()
    };
    for _ in 0..5 {
        let (vm, log) = lab.boot("poweroff", &options, 2).await;
        until("the power to be off", || {
            vm.info().state == VmState::Shutdown
        })
        .await;
        ends_at_once(&log);
    }
}

fn ends_at_once(log: &Path) {
    let said = lines(log);
    assert!(said.iter().any(|line| matches!(line, Line::Bye { .. })));
    let survived = |line: &&Line| matches!(line, Line::Survived { .. });
    assert_eq!(said.iter().find(survived), None);
}

#[tokio::test]
async fn names_unbootable_payloads() {
    let lab = Lab::new();
    let path = |name: &str| lab.dir.path().join(name).to_string_lossy().into_owned();
    std::fs::write(path("empty"), "").unwrap();
    std::fs::write(path("text"), "not a kernel, but long enough to look at").unwrap();
    std::fs::write(path("cut"), &guest::IMAGE[..guest::IMAGE.len() / 3]).unwrap();
    std::fs::write(path("large"), vec![0; 80 << 20]).unwrap();
    std::fs::create_dir(path("directory")).unwrap();
    let (good, _) = lab.config("log", &beating(), 1);
    let (kernel, none) = (|name: &str| (path(name), None), None::<String>);
    for ((kernel, initramfs), code, says) in [
        (kernel("missing"), "kernel-unreadable", "missing"),
        (
            kernel("directory"),
            "kernel-unreadable",
            "is a directory; it must be a regular file",
        ),
        (kernel("empty"), "kernel-unreadable", "is empty"),
        (
            kernel("text"),
            "not-a-kernel",
            "neither an ELF file nor a bzImage",
        ),
        (kernel("cut"), "not-a-kernel", "cut"),
        (
            (path("pocket"), Some(path("missing"))),
            "initramfs-unreadable",
            "missing",
        ),
        (
            (path("pocket"), Some(path("large"))),
            "initramfs-too-large",
            "does not fit",
        ),
        ((path("pocket"), none.clone()), "", ""),
    ] {
        let mut config = good.clone();
        config.payload.kernel = Some(kernel);
        config.payload.initramfs = initramfs;
        let vm = lab.registry.create(None, config).unwrap();
        let booted = vm.ask(Request::Boot).await;
        if code.is_empty() {
            booted.unwrap();
            continue;
        }
        let refused = booted.unwrap_err();
        assert_eq!(refused.code, code, "{refused}");
        assert!(refused.detail.contains(says), "{refused}");
        assert_eq!(vm.info().state, VmState::Created);
    }
}
