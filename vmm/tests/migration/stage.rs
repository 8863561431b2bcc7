//! Two pools on `/dev/kvm`, and a pocket guest whose serial port a test can read and write.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use control::{Migration, Registry, Request};
use guest::{Command, Line, Options, Order, Workload};
use spec::{
    AwaitMigration, MigrationInfo, MigrationPhase, PayloadConfig, StartMigration, VmConfig,
};
use vmm::{Pool, PoolConfig};

/// How long a guest or a migration may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Stage {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) here: Registry,
    pub(crate) there: Registry,
}

/// The guest's serial port. A thread reads it all the time, because unread output is lost.
pub(crate) struct Console {
    stream: UnixStream,
    lines: Receiver<String>,
}

impl Console {
    pub(crate) fn connect(path: &Path) -> Self {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let reader = BufReader::new(stream.try_clone().unwrap());
        let (sender, lines) = channel();
        // The thread ends when the `Console` is dropped.
        std::thread::spawn(move || {
            let mut lines = reader.lines().map_while(Result::ok);
            lines.try_for_each(|line| sender.send(line))
        });
        Self { stream, lines }
    }

    pub(crate) fn until<R>(&mut self, pick: impl Fn(&Line) -> Option<R>) -> R {
        loop {
            let text = self.lines.recv_timeout(PATIENCE).unwrap();
            if let Some(line) = Line::parse(&text) {
                assert!(
                    !matches!(line, Line::Fault { .. } | Line::Panic { .. }),
                    "{text}"
                );
                if let Some(picked) = pick(&line) {
                    return picked;
                }
            }
        }
    }

    pub(crate) fn ask<R>(&mut self, command: Command, pick: impl Fn(&Line) -> Option<R>) -> R {
        self.send(command);
        self.until(pick)
    }

    /// Gives the guest a command, and does not wait for an answer.
    pub(crate) fn send(&mut self, command: Command) {
        let text = format!("{command}\n");
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// Lets the guest check its memory, and returns the number of pages. Panics if one is not as it was
    /// written.
    pub(crate) fn verify(&mut self) -> u64 {
        let (pages, bad) = self.ask(Command::Verify, |line| match line {
            Line::Verified { pages, bad, .. } => Some((*pages, *bad)),
            _ => None,
        });
        assert_eq!(bad, 0, "of {pages} pages");
        pages
    }

    /// Returns the longest gap in the guest's TSC since the last call, in microseconds.
    pub(crate) fn gap(&mut self) -> u64 {
        self.ask(Command::Report, |line| match line {
            Line::Report { gap_us, .. } => Some(*gap_us),
            _ => None,
        })
    }
}

pub(crate) fn registry() -> Registry {
    Registry::new(Pool::start(&PoolConfig::default()).unwrap())
}

impl Stage {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pocket"), guest::IMAGE).unwrap();
        Self {
            dir,
            here: registry(),
            there: registry(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    pub(crate) fn config(&self, rate: u64, vcpus: u32) -> VmConfig {
        let workload = Workload::Dirty {
            region_mib: Some(32),
            rate: Some(rate),
            order: Order::Linear,
        };
        let options = Options {
            workload,
            heartbeat_ms: Some(20),
            ..Options::default()
        };
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(self.path("pocket")),
            cmdline: Some(options.to_string()),
            ..PayloadConfig::default()
        });
        config.cpus = spec::CpusConfig::with_vcpus(vcpus);
        config.memory.size = 64 << 20;
        let serial = serde_json::json!({ "mode": "Socket", "socket": self.path("serial") });
        config.serial = serde_json::from_value(serial).unwrap();
        config
    }

    pub(crate) async fn boot(&self, config: VmConfig) -> Console {
        let vm = self
            .here
            .create(Some("pocket".parse().unwrap()), config)
            .unwrap();
        vm.ask(Request::Boot).await.unwrap();
        let mut console = Console::connect(Path::new(&self.path("serial")));
        console.until(|line| matches!(line, Line::Heartbeat { .. }).then_some(()));
        console
    }

    /// Begins a migration, and returns both of its sides.
    pub(crate) fn begin(&self, with: impl FnOnce(&mut StartMigration)) -> [Arc<dyn Migration>; 2] {
        let listen = format!("unix:{}", self.path("migration"));
        let awaiting = AwaitMigration {
            once: true,
            ..AwaitMigration::at(listen)
        };
        let receive = self.there.receive_migration(&awaiting).unwrap();
        let mut what = StartMigration::to(receive.info().endpoint);
        what.verify = true;
        with(&mut what);
        let send = self.here.send_migration("pocket", &what).unwrap();
        [send, receive]
    }

    pub(crate) async fn migrate(
        &self,
        with: impl FnOnce(&mut StartMigration),
    ) -> [MigrationInfo; 2] {
        let both = self.begin(with);
        for side in &both {
            over(&**side).await;
            if side.info().phase != MigrationPhase::Completed {
                println!("it did not move: {:?}", side.info());
            }
        }
        both.map(|side| side.info())
    }
}

/// Waits until one side of a migration has ended.
pub(crate) async fn over(migration: &dyn Migration) {
    let mut over = migration.over();
    let waited = tokio::time::timeout(PATIENCE, over.wait_for(|over| *over)).await;
    waited
        .unwrap_or_else(|_| unreachable!("{:?}", migration.info()))
        .unwrap();
}

/// Checks in which phase one side of a migration is.
#[track_caller]
pub(crate) fn assert_phase(side: &dyn Migration, phase: MigrationPhase) {
    let info = side.info();
    assert_eq!(info.phase, phase, "{info:?}");
}
