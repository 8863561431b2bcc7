//! Mirrors: a disk continues on a copy of its content, or stays as it was.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use migration::testing::{MemoryDisk, disk_name};
use migration::{
    Decision, DestinationDisk, Downtime, Finish, MirroredDisk, Mirroring, Mode, NewImage, Phase,
    Policy, Progress, ReadDisk, Refusal, Report, SourceDisk, mirror,
};
use uuid::Uuid;

use super::{Broken, Image, SIZE, filled, policy};

/// A disk whose guest writes to it once more just before its queues stop.
struct Mirrored {
    disk: Arc<MemoryDisk>,
    /// Cancels the mirror in the stop.
    cancels: Option<Decision>,
    is_switched: bool,
    told: Option<Result<(), Refusal>>,
}

impl MirroredDisk for Mirrored {
    fn start_tracking(&mut self) -> Result<(), Refusal> {
        self.disk.track(true);
        Ok(())
    }

    fn switch(&mut self, finish: Finish) -> Result<Downtime, Refusal> {
        self.disk.fill(SIZE - 512, 512, 99);
        self.disk.fill(8192, 4096, 0);
        if let Some(decision) = &self.cancels {
            decision.cancel().unwrap();
        }
        let downtime = finish()?;
        self.is_switched = true;
        Ok(downtime)
    }

    fn ended(&mut self, outcome: Result<(), &Refusal>) {
        self.told = Some(outcome.map_err(Clone::clone));
    }
}

/// Mirrors a disk. Returns whether it was switched, and the report.
fn mirrored(
    disk: &Arc<MemoryDisk>,
    from: SourceDisk,
    image: &Arc<Image>,
    policy: &Policy,
    [decision, cancels]: [Option<&Decision>; 2],
) -> (bool, Report) {
    let mut at = Mirrored {
        disk: Arc::clone(disk),
        cancels: cancels.cloned(),
        is_switched: false,
        told: None,
    };
    let (progress, other) = (Progress::default(), Decision::default());
    let mirroring = Mirroring {
        id: Uuid::from_u128(2),
        from,
        to: DestinationDisk {
            name: disk_name(0),
            size: SIZE as u64,
            image: Arc::clone(image) as Arc<dyn NewImage>,
        },
        policy,
        progress: &progress,
        decision: decision.unwrap_or(&other),
    };
    let ended = mirror(&mirroring, &mut at);
    let report = progress.report();
    assert_eq!(at.told.unwrap(), ended, "before the report shows it");
    assert_eq!(ended.is_ok(), at.is_switched);
    assert_eq!(ended.err(), report.error);
    (at.is_switched, report)
}

#[test]
fn mirror_has_all_blocks_when_its_disk_switches() {
    let disk = filled();
    disk.fill(1 << 20, 1 << 20, 0);
    let (image, from) = (Image::with_room(u64::MAX), disk.at_source(&disk_name(0)));
    let (_, report) = mirrored(&disk, from, &image, &policy(Mode::Precopy), [None; 2]);
    assert!(image.disk.contents() == disk.contents() && image.disk.is_synced());
    assert_eq!(report.phase, Phase::Completed);
    assert_eq!(
        (report.disk_bytes, report.disk_remaining_bytes),
        (SIZE as u64, 0)
    );
    assert_eq!((report.rounds, report.downtime.unwrap().pages), (1, 2));
    // Zeros are neither read nor written: a hole of the disk is one of its mirror.
    assert!(report.sent_bytes < (SIZE - (1 << 20) + 8192) as u64);
}

#[test]
fn mirror_that_fails_leaves_its_disk() {
    let disk = filled();
    let source = || disk.at_source(&disk_name(0));
    let (policy, room) = (policy(Mode::Precopy), || Image::with_room(u64::MAX));
    let run = |from, image: &Arc<Image>, decisions| {
        let (is_switched, report) = mirrored(&disk, from, image, &policy, decisions);
        assert!(!is_switched);
        (report.phase, report.error.unwrap().code)
    };
    let failed = |code: &str| (Phase::Failed, code.to_owned());
    let full = Image::with_room(1 << 20);
    assert_eq!(run(source(), &full, [None; 2]), failed("disk-full"));
    let content = Arc::new(Broken(Arc::clone(&disk), 3 << 20));
    let shrunk = SourceDisk {
        content,
        ..source()
    };
    assert_eq!(run(shrunk, &room(), [None; 2]), failed("disk-unreadable"));
    // Before its first block, and as the queues stand still.
    let canceled = (Phase::Canceled, "canceled".to_owned());
    let decision = Decision::default();
    decision.cancel().unwrap();
    assert_eq!(run(source(), &room(), [Some(&decision), None]), canceled);
    let late = Decision::default();
    assert_eq!(run(source(), &room(), [Some(&late); 2]), canceled);
}

#[test]
fn mirror_of_a_busy_disk_ends_at_the_deadline() {
    /// Each read is followed by a write to all pages.
    struct Busy(Arc<MemoryDisk>);
    impl ReadDisk for Busy {
        fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, data)?;
            self.0.fill(0, SIZE, 1);
            Ok(())
        }
    }
    let disk = filled();
    let from = SourceDisk {
        content: Arc::new(Busy(Arc::clone(&disk))),
        ..disk.at_source(&disk_name(0))
    };
    let policy = Policy {
        max_downtime: Duration::from_micros(1),
        deadline: Some(Duration::from_millis(50)),
        ..policy(Mode::Precopy)
    };
    let image = Image::with_room(u64::MAX);
    let (is_switched, report) = mirrored(&disk, from, &image, &policy, [None; 2]);
    assert!(!is_switched);
    assert_eq!(report.error.unwrap().code, "does-not-converge");
}
