use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use control::{Registry, Request, VmHandle};
use guest::{Options, Workload};
use spec::{ConsoleMode, PayloadConfig, VmConfig, VmState};
use vmm::{Pool, PoolConfig};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// The filters of guests' threads, which trap. The test process itself is not confined.
fn trapping() -> Confinement {
    static ONCE: OnceLock<Confinement> = OnceLock::new();
    *ONCE.get_or_init(|| {
        trap::install().unwrap();
        prepare(SeccompAction::Trap).unwrap()
    })
}

/// Does something on a thread of this kind, which is confined.
fn on<R: Send + 'static>(kind: ThreadKind, work: impl FnOnce() -> R + Send + 'static) -> R {
    let confinement = trapping();
    let thread = thread::Builder::new().name("confined".to_owned());
    let confined = move || {
        confinement.enter(kind).unwrap();
        work()
    };
    thread.spawn(confined).unwrap().join().unwrap()
}

fn refused(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

/// Asserts that the calling thread was refused a call of this name since it was last asked.
fn assert_violated(name: &str) {
    let violation = trapping().violation().expect("no violation was noted");
    assert_eq!(violation.thread, "confined");
    assert!(violation.syscall.starts_with(name), "{violation}");
}

#[test]
fn forbidden_calls_fail_and_are_noted() {
    for kind in [ThreadKind::Vcpu, ThreadKind::Devices] {
        on(kind, || {
            assert!(refused(&File::open("/etc/passwd").unwrap_err()));
            assert_violated("openat (");
            assert!(refused(&UdpSocket::bind("127.0.0.1:0").unwrap_err()));
            assert_violated("socket (");
            assert!(refused(&std::fs::remove_file("/nonexistent").unwrap_err()));
            assert_violated("unlink");
            assert_eq!(trapping().violation(), None, "it is noted once");
        });
    }
}

#[test]
fn a_thread_inherits_the_rules_of_the_thread_that_starts_it() {
    on(ThreadKind::Vcpu, || {
        let inherits = || File::open("/etc/passwd").is_err();
        assert!(thread::spawn(inherits).join().unwrap());
        // The note is the other thread's.
        assert_eq!(trapping().violation(), None);
    });
}

#[test]
fn a_confined_thread_works_and_panics() {
    for kind in [ThreadKind::Vcpu, ThreadKind::Devices] {
        let (mut near, mut far) = io::pipe().unwrap();
        on(kind, move || {
            far.write_all(b"x").unwrap();
            near.read_exact(&mut [0]).unwrap();
            let large = vec![1_u8; 64 << 20];
            assert_eq!(large.last(), Some(&1));
            assert!(thread::spawn(|| panic!("as a test has it")).join().is_err());
            assert_eq!(trapping().violation(), None);
        });
    }
}

#[test]
fn the_process_works_and_starts_no_program() {
    trapping();
    let process = compile(Scope::Process, SeccompAction::Trap).unwrap();
    let confined = move || {
        apply_filter(&without_clone3().unwrap()).unwrap();
        apply_filter(&process).unwrap();
        assert!(File::open("/etc/passwd").is_ok());
        assert!(UdpSocket::bind("127.0.0.1:0").is_ok());
        thread::spawn(|| {}).join().unwrap();
        assert_eq!(trapping().violation(), None);
        assert!(rustix::process::chroot("/").is_err());
        let violation = trapping().violation().unwrap();
        assert!(violation.syscall.starts_with("chroot ("), "{violation}");
    };
    thread::spawn(confined).join().unwrap();
}

#[test]
fn other_modes_refuse_without_a_note() {
    for mode in SeccompMode::value_variants() {
        let Some(refusal) = mode.refusal() else {
            continue;
        };
        for scope in [Scope::Process, Scope::Vcpu, Scope::Devices] {
            // The kernel's limit (BPF_MAXINSNS).
            assert!(compile(scope, refusal.clone()).unwrap().len() <= 4096);
        }
    }
    for scope in [Scope::Process, Scope::Vcpu, Scope::Devices] {
        let filter = compile(scope, SeccompMode::Errno.refusal().unwrap()).unwrap();
        let confined = move || {
            apply_filter(&without_clone3().unwrap()).unwrap();
            apply_filter(&filter).unwrap();
            assert!(refused(&Command::new("/bin/true").spawn().unwrap_err()));
            assert_eq!(File::open("/etc/passwd").is_ok(), scope == Scope::Process);
            assert_eq!(trapping().violation(), None);
        };
        thread::spawn(confined).join().unwrap();
    }
}

/// The sandbox, and a guest that has taken over a thread: once armed, the next thread with this name
/// makes a forbidden call while it works for a VM.
#[derive(Debug)]
struct TakenOver {
    sandbox: Confinement,
    armed: Mutex<Option<&'static str>>,
}

impl Sandbox for TakenOver {
    fn enter(&self, kind: ThreadKind) -> io::Result<()> {
        self.sandbox.enter(kind)
    }

    fn violation(&self) -> Option<Violation> {
        let mut armed = self.armed.lock().unwrap();
        let thread = thread::current();
        let name = thread.name().unwrap_or_default();
        if armed.is_some_and(|prefix| name.starts_with(prefix)) {
            *armed = None;
            assert!(refused(&File::open("/etc/passwd").unwrap_err()));
        }
        self.sandbox.violation()
    }
}

async fn boot(
    registry: &Registry,
    dir: &Path,
    name: &str,
    workload: Workload,
) -> (VmHandle, PathBuf) {
    let kernel = dir.join("pocket");
    std::fs::write(&kernel, guest::IMAGE).unwrap();
    let options = Options {
        workload,
        heartbeat_ms: Some(20),
        ..Options::default()
    };
    let log = dir.join(name);
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_string_lossy().into_owned()),
        cmdline: Some(options.to_string()),
        ..PayloadConfig::default()
    });
    config.memory.size = 64 << 20;
    config.serial.mode = ConsoleMode::File;
    config.serial.file = Some(log.to_string_lossy().into_owned());
    let vm = registry.create(None, config).unwrap();
    vm.ask(Request::Boot).await.unwrap();
    (vm, log)
}

async fn until(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_violation_ends_one_vm_and_no_other() {
    let attack: &'static TakenOver = Box::leak(Box::new(TakenOver {
        sandbox: trapping(),
        armed: Mutex::new(None),
    }));
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::start(&PoolConfig {
        threads: Some(1),
        confinement: Confinement::new(attack),
        ..PoolConfig::default()
    });
    let registry = Registry::new(pool.unwrap());
    let (bystander, log) = boot(&registry, dir.path(), "bystander", Workload::Idle).await;
    let length = || std::fs::metadata(&log).map_or(0, |log| log.len());
    for thread in ["pool-", "vcpu"] {
        let name = format!("victim-of-{thread}");
        let (victim, _) = boot(&registry, dir.path(), &name, Workload::Io).await;
        // The bystander is paused for the attack: its vCPU's thread has the same name.
        bystander.ask(Request::Pause).await.unwrap();
        *attack.armed.lock().unwrap() = Some(thread);
        until("the end of the victim", || {
            victim.info().state == VmState::Shutdown
        })
        .await;
        bystander.ask(Request::Resume).await.unwrap();
        let failure = victim.info().failure.unwrap();
        assert_eq!(failure.code, "sandbox-violation");
        assert!(failure.detail.contains(thread), "{}", failure.detail);
        assert!(failure.detail.contains("openat ("), "{}", failure.detail);
        assert_eq!(bystander.info().state, VmState::Running);
        let before = length();
        until("the bystander's heartbeat", || length() > before).await;
        // A client can boot the VM again.
        victim.ask(Request::Boot).await.unwrap();
        victim.ask(Request::Delete).await.unwrap();
    }
    registry.delete_all().await;
}
