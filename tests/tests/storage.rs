//! Disks move between services that are processes of their own and share no image, while a guest writes;
//! and the connection is cut, or a side killed, at each frame. Whatever happens, the guest has a disk that
//! is whole, at the side at which it runs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use guest::{Command, DISK_PAGES, Line, Options, Workload, check_disk};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use spec::{
    AwaitMigration, MemoryMode, MigrationOutcome, MigrationPhase, MirrorDisk, NewImageFormat,
    ResolveMigration, StartMigration, StorageMode, VmId, VmState,
};
use tempfile::TempDir;
use tests::{Face, Frame, Proxy, Service, Side, Verdict, built, trials};

/// A bound, and no measure: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(180);
/// Trials at once.
const AT_ONCE: usize = 2;

fn qemu_img(arguments: &[&str]) {
    let run = Process::new("qemu-img").args(arguments).output().unwrap();
    let told = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{arguments:?}: {told}");
}

/// A service of its own for each side, and a guest that writes to its disk at the first.
struct Trial {
    source: Service,
    destination: Service,
    /// The directory for images at the destination.
    images: TempDir,
    vm: VmId,
    port: PathBuf,
    format: &'static str,
}

async fn stage(format: &'static str) -> Trial {
    let images = tempfile::tempdir().unwrap();
    let storage = [
        "--migration-storage".to_owned(),
        images.path().to_string_lossy().into_owned(),
    ];
    let (source, destination) = tokio::join!(
        Service::start(Face::Many),
        Service::start_with(&[], &storage)
    );
    let (source, destination) = (source.unwrap(), destination.unwrap());
    let disk = source.path("disk");
    let port = source.path("port");
    qemu_img(&["create", "-q", "-f", format, disk.to_str().unwrap(), "32M"]);
    let options = Options {
        workload: Workload::Io,
        ..Options::default()
    };
    let (mut config, _) = source.pocket("web", options).unwrap();
    let serial = json!({ "mode": "Socket", "socket": port });
    config.serial = serde_json::from_value(serial).unwrap();
    config.disks = serde_json::from_value(json!([{ "path": disk }])).unwrap();
    config.memory.size = 64 << 20;
    let vm = source.create("web", config).await.unwrap();
    source.client().vms_boot(&vm).await.unwrap();
    let trial = Trial {
        source,
        destination,
        images,
        vm,
        port,
        format,
    };
    trial.writes().await;
    trial
}

/// Blocks that were written and read back, and wrong ones.
fn ask(serial: &mut BufReader<UnixStream>) -> (u64, u64) {
    writeln!(serial.get_mut(), "{}", Command::Io).unwrap();
    let mut text = String::new();
    loop {
        text.clear();
        assert!(serial.read_line(&mut text).unwrap() > 0);
        if let Some(Line::Io { blocks, bad, .. }) = Line::parse(&text) {
            return (blocks, bad);
        }
    }
}

impl Trial {
    /// Waits until the guest has gone round its pages twice more, and has read back what it wrote.
    async fn writes(&self) {
        let port = self.port.clone();
        let waited = tokio::task::spawn_blocking(move || {
            let mut serial = BufReader::new(UnixStream::connect(port).unwrap());
            serial.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
            let (start, mut first) = (Instant::now(), None);
            loop {
                let (blocks, bad) = ask(&mut serial);
                assert_eq!(bad, 0, "blocks were read back wrong");
                if blocks >= *first.get_or_insert(blocks) + 2 * DISK_PAGES as u64 {
                    return;
                }
                assert!(start.elapsed() < PATIENCE, "{blocks} blocks");
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        waited.await.unwrap();
    }

    /// Starts a migration through a proxy. Returns its number at each side.
    async fn begin(
        &self,
        judge: impl Fn(&Frame) -> Verdict + Send + Sync + 'static,
        mode: MemoryMode,
        max_bandwidth: Option<u64>,
    ) -> [VmId; 2] {
        let [to, at] = [self.source.path("to"), self.source.path("at")];
        let awaiting = AwaitMigration::at(format!("unix:{}", at.display()));
        let client = self.destination.client();
        let received = client.migrations_receive(&awaiting).await.unwrap();
        Proxy::between(&to, &at, judge).unwrap();
        let what = StartMigration {
            mode,
            connections: Some(1),
            storage: StorageMode::Copy,
            max_bandwidth,
            ..StartMigration::to(format!("unix:{}", to.display()))
        };
        let client = self.source.client();
        let sent = client.vms_migrate(&self.vm, &what).await.unwrap();
        [sent, received].map(|migration| migration.id.parse().unwrap())
    }

    /// Images that the destination made.
    fn made(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.images.path()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// The guest runs at this side, whose disk it uses: no page is torn, or older than a round.
    async fn runs_on(&self, at: &Service, disk: &Path) {
        let info = at.client().vms_info(&self.vm).await.unwrap();
        assert_eq!(info.state, VmState::Running);
        let named = info.config.disks.unwrap()[0].path.clone();
        assert_eq!(named.as_deref(), disk.to_str());
        self.writes().await;
        at.client().vms_shutdown(&self.vm).await.unwrap();
        let flat = disk.with_extension("flat");
        let (from, to) = (disk.to_str().unwrap(), flat.to_str().unwrap());
        qemu_img(&["convert", "-f", self.format, "-O", "raw", from, to]);
        if self.format == "qcow2" {
            qemu_img(&["check", "-q", from]);
        }
        let bytes = fs::read(&flat).unwrap();
        fs::remove_file(&flat).unwrap();
        check_disk(&bytes, DISK_PAGES).unwrap();
    }

    async fn runs_at_source(&self) {
        self.runs_on(&self.source, &self.source.path("disk")).await;
    }

    async fn runs_at_destination(&self) {
        let name = format!("web-_disk0.{}", self.format);
        self.runs_at_destination_on(&name).await;
    }

    async fn runs_at_destination_on(&self, name: &str) {
        let made = self.made();
        assert_eq!(made.len(), 1, "{made:?}");
        assert_eq!(
            made[0].file_name().and_then(|name| name.to_str()),
            Some(name)
        );
        self.runs_on(&self.destination, &made[0]).await;
    }
}

/// Action of the proxy at a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    Cut,
    Corrupt,
    Kill(Side),
}

/// The side at which the guest is at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    AtSource,
    AtDestination,
    /// Gone with its source.
    Nowhere,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    mode: MemoryMode,
    frame: (Side, &'static str, usize),
    blow: Blow,
    ends: Ends,
}

fn judge(case: Case, pids: [u32; 2], begun: Arc<AtomicBool>) -> impl Fn(&Frame) -> Verdict {
    let fell = AtomicBool::new(false);
    move |frame| {
        let here = (frame.from, frame.name.as_str(), frame.before) == case.frame;
        if !here || fell.swap(true, Ordering::SeqCst) {
            return Verdict::Pass;
        }
        while !begun.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        match case.blow {
            Blow::Cut => Verdict::Cut,
            Blow::Corrupt => Verdict::Corrupt,
            Blow::Kill(side) => {
                let pid = pids[usize::from(side == Side::Destination)];
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
                kill_process(pid, Signal::KILL).unwrap();
                std::thread::sleep(Duration::from_millis(30));
                Verdict::Cut
            }
        }
    }
}

async fn run(case: Case) {
    let mut trial = stage("qcow2").await;
    let begun = Arc::new(AtomicBool::new(false));
    let pids = [trial.source.pid(), trial.destination.pid()];
    let judge = judge(case, pids, Arc::clone(&begun));
    let [sent, received] = trial.begin(judge, case.mode, None).await;
    begun.store(true, Ordering::SeqCst);
    match case.blow {
        Blow::Kill(Side::Source) => drop(trial.source.ended(PATIENCE).await.unwrap()),
        Blow::Kill(Side::Destination) => drop(trial.destination.ended(PATIENCE).await.unwrap()),
        Blow::Cut | Blow::Corrupt => {}
    }
    let is_over = |info: &spec::MigrationInfo| info.phase.is_over();
    if case.blow != Blow::Kill(Side::Source) {
        let info = trial.source.until(&sent, PATIENCE, is_over).await.unwrap();
        let moved = info.phase == MigrationPhase::Completed;
        assert_eq!(moved, case.ends == Ends::AtDestination, "{info:?}");
    }
    if case.blow != Blow::Kill(Side::Destination) {
        let info = trial
            .destination
            .until(&received, PATIENCE, is_over)
            .await
            .unwrap();
        let came = info.phase == MigrationPhase::Completed;
        assert_eq!(came, case.ends == Ends::AtDestination, "{info:?}");
        if !came {
            let made = trial.made();
            assert!(made.is_empty(), "the guest did not come: {made:?}");
        }
    }
    if case.blow == Blow::Kill(Side::Destination) {
        // The image is still marked as one on which no guest has run.
        assert_eq!(trial.made().len(), 2);
        let storage = trial.images.path().to_string_lossy().into_owned();
        let next = Service::start_with(&[], &["--migration-storage".to_owned(), storage]).await;
        next.unwrap();
        assert_eq!(trial.made(), [""; 0].map(PathBuf::from));
    }
    match case.ends {
        Ends::AtSource => trial.runs_at_source().await,
        Ends::AtDestination => trial.runs_at_destination().await,
        Ends::Nowhere => {}
    }
}

async fn all(cases: Vec<Case>) {
    trials(cases, AT_ONCE, run).await;
}

/// The frames of a migration with a disk until the answer to the last state: the first round is the
/// disk's.
const BEFORE_READY: [(Side, &str, usize); 9] = [
    (Side::Destination, "Prepared", 0),
    (Side::Source, "Pages", 0),
    (Side::Source, "Pages", 2),
    (Side::Source, "End", 0),
    (Side::Source, "Round", 0),
    (Side::Destination, "RoundDone", 0),
    (Side::Source, "SavedState", 0),
    (Side::Source, "Round", 1),
    (Side::Source, "SavedState", 1),
];

#[tokio::test(flavor = "multi_thread")]
async fn disk_stays_whole_where_the_stream_ends() {
    let mode = MemoryMode::Precopy;
    let early = BEFORE_READY
        .into_iter()
        .chain([(Side::Destination, "Ready", 0)]);
    let cut = early.map(|frame| (frame, Blow::Cut, Ends::AtSource));
    let others = [
        ((Side::Source, "Pages", 1), Blow::Corrupt, Ends::AtSource),
        ((Side::Source, "Commit", 0), Blow::Cut, Ends::AtDestination),
        (
            (Side::Destination, "Running", 0),
            Blow::Cut,
            Ends::AtDestination,
        ),
    ];
    let precopy = cut.chain(others).map(|(frame, blow, ends)| Case {
        mode,
        frame,
        blow,
        ends,
    });
    let postcopy = [
        ((Side::Source, "Missing", 0), Ends::AtSource),
        ((Side::Source, "PagesSent", 0), Ends::AtDestination),
    ];
    let postcopy = postcopy.map(|(frame, ends)| Case {
        mode: MemoryMode::Postcopy,
        frame,
        blow: Blow::Cut,
        ends,
    });
    all(precopy.chain(postcopy).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_stays_whole_where_a_side_dies() {
    let frames = [
        (Side::Source, "Pages", 0),
        (Side::Destination, "RoundDone", 0),
        (Side::Source, "SavedState", 1),
    ];
    let mode = MemoryMode::Precopy;
    let case = |frame, side, ends| Case {
        mode,
        frame,
        blow: Blow::Kill(side),
        ends,
    };
    let cases = frames.into_iter().flat_map(|frame| {
        [
            case(frame, Side::Destination, Ends::AtSource),
            case(frame, Side::Source, Ends::Nowhere),
        ]
    });
    all(cases.collect()).await;
}

/// Bytes in a second by which the rest of the disk follows slowly.
const SLOW: u64 = 256 << 10;

/// Each connection is lost behind some frames of pages that follow the guest, which uses its disk.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_follow_over_connections_that_are_lost() {
    let trial = stage("qcow2").await;
    let (runs, passed, cuts) = (
        AtomicBool::new(false),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    let lost = Arc::new(cuts);
    let cuts = Arc::clone(&lost);
    let judge = move |frame: &Frame| {
        runs.fetch_or(frame.name == "Running", Ordering::SeqCst);
        let is_late = runs.load(Ordering::SeqCst) && frame.name == "Pages";
        let count = passed.fetch_add(usize::from(is_late), Ordering::SeqCst);
        // The first frame, and then after more and more of them.
        let next = [0, 2, 7, 18].get(cuts.load(Ordering::SeqCst));
        match next {
            Some(next) if is_late && count >= *next => {
                cuts.fetch_add(1, Ordering::SeqCst);
                passed.store(0, Ordering::SeqCst);
                Verdict::Cut
            }
            _ => Verdict::Pass,
        }
    };
    let [sent, received] = trial
        .begin(judge, MemoryMode::Postcopy, Some(4 * SLOW))
        .await;
    let is_over = |info: &spec::MigrationInfo| info.phase.is_over();
    for (side, id) in [(&trial.source, &sent), (&trial.destination, &received)] {
        let info = side.until(id, PATIENCE, is_over).await.unwrap();
        assert_eq!(info.phase, MigrationPhase::Completed, "{info:?}");
    }
    assert!(
        lost.load(Ordering::SeqCst) > 1,
        "{lost:?} connections were lost"
    );
    trial.runs_at_destination().await;
}

/// A side dies while blocks follow the guest. What is missing is read by nothing, at no time.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_are_lost_are_not_read() {
    for dies in [Side::Source, Side::Destination] {
        let mut trial = stage("raw").await;
        let judge = |_: &Frame| Verdict::Pass;
        let [sent, received] = trial.begin(judge, MemoryMode::Postcopy, Some(SLOW)).await;
        let follows = |info: &spec::MigrationInfo| {
            assert!(!info.phase.is_over(), "{info:?}");
            info.phase == MigrationPhase::Postcopy && info.disk_remaining_bytes > 0
        };
        let at = &trial.destination;
        at.until(&received, PATIENCE, follows).await.unwrap();
        let pid = match dies {
            Side::Source => trial.source.pid(),
            Side::Destination => trial.destination.pid(),
        };
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
        let before = fs::read(trial.source.path("disk")).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        let (left, id) = match dies {
            Side::Source => (&trial.destination, &received),
            Side::Destination => (&trial.source, &sent),
        };
        let is_paused = |info: &spec::MigrationInfo| info.phase == MigrationPhase::PostcopyPaused;
        left.until(id, PATIENCE, is_paused).await.unwrap();
        let discard = ResolveMigration {
            outcome: MigrationOutcome::Discard,
        };
        left.client()
            .migrations_resolve(id, &discard)
            .await
            .unwrap();
        let is_over = |info: &spec::MigrationInfo| info.phase.is_over();
        let over = left.until(id, PATIENCE, is_over).await.unwrap();
        if dies == Side::Destination {
            assert_eq!(over.phase, MigrationPhase::Failed, "{over:?}");
            assert_eq!(over.error.unwrap().code, "resolved");
        }
        assert!(left.client().vms_list().await.unwrap().is_empty());
        // The image has what the guest wrote here, and is not whole. The next service leaves it.
        if dies == Side::Destination {
            trial.destination.ended(PATIENCE).await.unwrap();
        }
        let storage = trial.images.path().to_string_lossy().into_owned();
        let next = Service::start_with(&[], &["--migration-storage".to_owned(), storage]).await;
        let next = next.unwrap();
        let mut made = trial.made();
        made.sort();
        let names = ["web-_disk0.raw", "web-_disk0.raw.incomplete"];
        assert_eq!(made, names.map(|name| trial.images.path().join(name)));
        let (mut config, _) = next.pocket("next", Options::default()).unwrap();
        config.disks = serde_json::from_value(json!([{ "path": made[0] }])).unwrap();
        let vm = next.create("next", config).await.unwrap();
        let refused = next.client().vms_boot(&vm).await.unwrap_err().to_string();
        assert!(refused.contains("is incomplete"), "{refused}");
        // That of the source is as it was when the guest moved.
        let disk = fs::read(trial.source.path("disk")).unwrap();
        assert!(disk == before);
        check_disk(&disk, DISK_PAGES).unwrap();
    }
}

/// A raw image and a qcow2 image move by `wh-remote`.
#[tokio::test(flavor = "multi_thread")]
async fn disk_moves_by_the_command_line() {
    for (format, how, name) in [
        ("raw", ["--storage", "copy"], "web-_disk0.raw"),
        (
            "qcow2",
            ["--disk-storage", "_disk0=copy:root.img"],
            "root.img",
        ),
    ] {
        let trial = stage(format).await;
        let address = format!("unix:{}", trial.source.path("at").display());
        let remote = |at: &Service| {
            let mut command = Process::new(built("wh-remote").unwrap());
            command.arg("--api-socket").arg(at.socket());
            command
        };
        let mut receiving = remote(&trial.destination)
            .args(["receive", &address])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let socket = trial.source.path("at");
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let sent = remote(&trial.source)
            .args(["--vm", "web", "migrate", &address])
            .args(how)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&sent.stdout).into_owned();
        let error = String::from_utf8_lossy(&sent.stderr).into_owned();
        assert!(sent.status.success(), "{told}{error}");
        assert!(told.contains("32 MiB, of which 32 copied"), "{told}");
        assert!(receiving.wait().unwrap().success());
        let before = fs::read(trial.source.path("disk")).unwrap();
        trial.runs_at_destination_on(name).await;
        assert!(fs::read(trial.source.path("disk")).unwrap() == before);
    }
}

/// A disk continues on a new image by `wh-remote`, which is interrupted first; and the service that is
/// killed meanwhile leaves the disk whole, and no image that looks whole.
#[tokio::test(flavor = "multi_thread")]
async fn disk_is_mirrored_by_the_command_line() {
    let mut trial = stage("raw").await;
    let [old, new] = ["disk", "mirror"].map(|name| trial.source.path(name));
    let partial = trial.source.path("mirror.partial");
    let remote = |trial: &Trial, to: &Path, options: &str| {
        let mut command = Process::new(built("wh-remote").unwrap());
        command.arg("--api-socket").arg(trial.source.socket());
        let to = format!("{}{options}", to.display());
        command.args(["--vm", "web", "mirror-disk", "_disk0", "--to", &to]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let started = async || {
        let start = Instant::now();
        while !partial.exists() {
            assert!(start.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let told = |output: std::process::Output| {
        let told = [output.stdout, output.stderr].map(|told| String::from_utf8(told).unwrap());
        (output.status.success(), told.concat())
    };
    let slow = remote(&trial, &new, ",max_bandwidth=16K");
    started().await;
    let pid = i32::try_from(slow.id()).ok().and_then(Pid::from_raw);
    kill_process(pid.unwrap(), Signal::INT).unwrap();
    let (done, text) = told(slow.wait_with_output().unwrap());
    assert!(
        !done && text.contains("canceled: disk _disk0 of web"),
        "{text}"
    );
    assert!(!partial.exists() && !new.exists());
    trial.writes().await;

    let to_qcow2 = remote(&trial, &new, ",format=qcow2");
    let (done, text) = told(to_qcow2.wait_with_output().unwrap());
    assert!(
        done && text.contains("completed: disk _disk0 of web to file://"),
        "{text}"
    );
    assert!(text.contains("stop         of the disk"), "{text}");
    trial.format = "qcow2";
    trial.runs_on(&trial.source, &new).await;
    trial.source.client().vms_boot(&trial.vm).await.unwrap();
    trial.writes().await;

    // Back to a new image of the first name.
    fs::remove_file(&old).unwrap();
    let slow = MirrorDisk {
        format: Some(NewImageFormat::Raw),
        max_bandwidth: Some(16 << 10),
        ..MirrorDisk::at(old.to_str().unwrap())
    };
    let client = trial.source.client();
    client
        .vms_mirror_disk(&trial.vm, "_disk0", &slow)
        .await
        .unwrap();
    let config = client.vms_info(&trial.vm).await.unwrap().config;
    let pid = i32::try_from(trial.source.pid())
        .ok()
        .and_then(Pid::from_raw);
    kill_process(pid.unwrap(), Signal::KILL).unwrap();
    trial.source.ended(PATIENCE).await.unwrap();
    let left = trial.source.path("disk.partial");
    assert!(!old.exists() && left.exists());
    let flat = trial.source.path("flat");
    let (from, to) = (new.to_str().unwrap(), flat.to_str().unwrap());
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", from, to]);
    check_disk(&fs::read(&flat).unwrap(), DISK_PAGES).unwrap();

    // The next mirror to that path replaces what the killed service left.
    trial.source.start_again().await.unwrap();
    trial.source.create("web", config).await.unwrap();
    trial.source.client().vms_boot(&trial.vm).await.unwrap();
    let to_raw = remote(&trial, &old, ",format=raw");
    let (done, text) = told(to_raw.wait_with_output().unwrap());
    assert!(done, "{text}");
    assert!(!left.exists() && !trial.source.path("disk.partial.incoming").exists());
    trial.format = "raw";
    trial.runs_on(&trial.source, &old).await;
}
