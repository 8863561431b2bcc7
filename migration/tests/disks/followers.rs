//! Blocks that follow the guest: storage that fails behind the hand-over, and sources that announce what they
//! must not.

use super::*;

/// Blocks for which the destination has no room are missing until it has. Both sides say so.
#[test]
fn full_storage_holds_up_blocks_that_follow() {
    let disk = filled();
    let mut guest = Guest::new(disk.at_source(&disk_name(0)));
    let image = Image::with_room(1 << 20);
    let policy = Policy {
        patience: Duration::from_secs(3),
        ..policy(Mode::Postcopy)
    };
    let (dialer, mut acceptor) = Dialer::new();
    let reports = [Progress::default(), Progress::default()];
    let (far, patience) = (reports[1].clone(), policy.patience);
    let place = Place {
        image: Arc::clone(&image),
        discarded: Arc::default(),
    };
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            receive(Receiving {
                accept: &mut acceptor,
                limit: &ConnectionLimit::default(),
                once: true,
                host: &place,
                progress: &far,
                decision: &Decision::default(),
                patience,
                lingers: &|| {},
            })
        });
        let watched = &reports;
        let more = &image;
        let operator = scope.spawn(move || {
            let start = Instant::now();
            let is_full = |progress: &Progress| {
                let error = progress.report().error;
                error.is_some_and(|why| why.code == "disk-full")
            };
            let mut seen = [false; 2];
            while seen != [true; 2] {
                assert!(start.elapsed() < PATIENCE, "{:?}", watched[1].report());
                for (seen, side) in seen.iter_mut().zip(watched) {
                    *seen |= is_full(side);
                }
                thread::sleep(Duration::from_millis(1));
            }
            assert!(watched[1].report().disk_remaining_bytes > 0);
            more.room.store(u64::MAX, Ordering::SeqCst);
        });
        let sending = Sending {
            id: Uuid::from_u128(1),
            policy: &policy,
            dial: &*dialer,
            journal: &mut NoJournal,
            progress: &reports[0],
            decision: &Decision::default(),
        };
        assert_eq!(send(sending, &mut guest), Outcome::Moved);
        operator.join().unwrap();
        receiver.join().unwrap().unwrap();
    });
    assert!(disk.contents() == image.disk.contents());
    assert!(image.disk.is_synced());
    assert_eq!(reports[1].report().disk_remaining_bytes, 0);
}

/// Blocks that would follow a guest whose memory does not.
#[test]
fn blocks_do_not_follow_in_precopy() {
    let image = Image::with_room(u64::MAX);
    let Accepted {
        receiver,
        mut source,
        mut ram,
    } = accept_by_hand(&image, true);
    let mut body = [1_u32.to_le_bytes(), 1_u32.to_le_bytes()].concat();
    body.extend(0_u64.to_le_bytes());
    body.extend(1_u32.to_le_bytes());
    assert!(ram.frame(19, &body) && ram.frame(18, &1_u32.to_le_bytes()));
    let state = json!({ "State": { "round": 1, "postcopy": false, "paused": false } });
    assert!(source.say(&state) && source.frame(3, &[]));
    let told = source.recv().unwrap();
    assert!(told.contains("stream-damaged"), "{told}");
    assert_eq!(receiver.join().unwrap().unwrap_err().code, "stream-damaged");
}
