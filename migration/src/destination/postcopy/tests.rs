use std::os::unix::net::UnixStream;
use std::sync::Arc;

use memory::{RamBlock, RamConfig};

use super::*;

fn stream(end: UnixStream) -> Box<dyn Stream> {
    Box::new(end)
}

/// The memory belongs to no machine that could be halted.
fn no_machine() -> Box<dyn Fn() + Send + Sync> {
    Box::new(|| {})
}

/// A thread that gives memory back waits for the watch thread, so that must not wait for it in turn.
#[test]
fn discards_memory_during_postcopy() {
    const PAGES: usize = 512;
    let config = RamConfig::anonymous((PAGES * PAGE) as u64);
    let ram = Arc::new(RamBlock::new(&config).unwrap());
    let (near, _far) = UnixStream::pair().unwrap();
    let blocks = [Block {
        name: "ram".to_owned(),
        ram: Arc::clone(&ram),
    }];
    // Nothing is missing, so every fault takes the path through `later`.
    let missing = vec![DirtyBitmap::new(ram.len())];
    let patience = Duration::from_secs(10);
    let receiver =
        PostcopyReceiver::new(&blocks, missing, stream(near), patience, no_machine()).unwrap();
    assert!(receiver.start());
    let progress = Progress::default();
    std::thread::scope(|scope| {
        scope.spawn(|| receiver.watch(&progress));
        let (done, over) = std::sync::mpsc::channel();
        for first in 0..2 {
            let (done, ram) = (done.clone(), Arc::clone(&ram));
            scope.spawn(move || {
                for round in 0..4_000 {
                    let at = (first + round * 2) % PAGES * PAGE;
                    if first == 0 {
                        ram.discard(at, PAGE).unwrap();
                    } else {
                        // Of the other's, too.
                        let at = round * 7 % PAGES * PAGE;
                        ram.slice(at, 1).unwrap().copy_from(&[1_u8]);
                        ram.discard(at, PAGE).unwrap();
                    }
                }
                done.send(()).unwrap();
            });
        }
        for _ in 0..2 {
            let waited = over.recv_timeout(Duration::from_secs(60));
            if waited.is_err() {
                // The threads cannot be joined.
                eprintln!("memory is not given back");
                std::process::abort();
            }
        }
        receiver.end(&progress);
    });
}

/// A fault that was reported before its page came is looked at after it.
#[test]
fn received_page_is_not_awaited() {
    let config = RamConfig::anonymous(PAGE as u64);
    let ram = Arc::new(RamBlock::new(&config).unwrap());
    let blocks = [Block {
        name: "ram".to_owned(),
        ram,
    }];
    let missing = DirtyBitmap::new(PAGE);
    missing.set_enabled(true);
    missing.mark(0, PAGE);
    let (near, _far) = UnixStream::pair().unwrap();
    let patience = Duration::from_secs(10);
    let receiver =
        PostcopyReceiver::new(&blocks, vec![missing], stream(near), patience, no_machine())
            .unwrap();
    let run = pages::Run {
        block: 0,
        first: 0,
        pages: 1,
    };
    let body = pages::encode_missing(0, &[run]);
    let came = pages::decode_memory(&body, &blocks, pages::Content::Zeros).unwrap();
    assert!(receiver.expect(0, 0), "it is missing");
    receiver.fill(&came, |_, _| true).unwrap();
    assert!(!receiver.expect(0, 0), "it has come");
    assert!(receiver.waited.lock().is_empty());
}

/// The host may back a page that is written with a huge page, of which all others are there, too.
#[test]
fn neighbours_of_received_page_are_missing() {
    const PAGES: usize = 4096;
    let config = RamConfig::anonymous((PAGES * PAGE) as u64);
    let ram = Arc::new(RamBlock::new(&config).unwrap());
    for page in (0..PAGES).step_by(64) {
        ram.slice(page * PAGE, PAGE)
            .unwrap()
            .copy_from(&[7_u8; PAGE]);
    }
    let missing = DirtyBitmap::new(ram.len());
    missing.set_enabled(true);
    for page in (0..PAGES).filter(|page| page % 64 != 0) {
        missing.mark(page * PAGE, PAGE);
    }
    let blocks = [Block {
        name: "ram".to_owned(),
        ram: Arc::clone(&ram),
    }];
    let (near, _far) = UnixStream::pair().unwrap();
    let patience = Duration::from_secs(10);
    let receiver =
        PostcopyReceiver::new(&blocks, vec![missing], stream(near), patience, no_machine())
            .unwrap();
    for page in [1, 63, 65, 1000, PAGES - 1] {
        let reader = Arc::clone(&ram);
        let read = std::thread::spawn(move || {
            let mut byte = [9_u8];
            reader.slice(page * PAGE, 1).unwrap().copy_to(&mut byte[..]);
            byte[0]
        });
        // If a huge page had brought this page along, the read would raise no fault, and the
        // wait would return nothing.
        let faults = receiver.faults.wait(patience).unwrap();
        assert_eq!(faults, [Fault::Missing(0, page)]);
        receiver.faults.fill(0, page, &[3; PAGE]).unwrap();
        assert_eq!(read.join().unwrap(), 3);
    }
    let mut byte = [9_u8];
    ram.slice(64 * PAGE, 1).unwrap().copy_to(&mut byte[..]);
    assert_eq!(byte, [7], "what came is there");
    receiver.faults.end().unwrap();
}

/// A duty towards memory that is given back during postcopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    /// Threads that wait for a page that is gone are woken.
    Wake,
    /// A page that is gone counts as received.
    Received,
}

/// A content that the source has of each page.
const OLD: u8 = 7;

/// Memory of which every page is missing.
fn all_missing(pages: usize, shared: bool) -> (Arc<RamBlock>, [Block; 1], PostcopyReceiver) {
    let config = RamConfig {
        shared,
        ..RamConfig::anonymous((pages * PAGE) as u64)
    };
    let ram = Arc::new(RamBlock::new(&config).unwrap());
    let blocks = [Block {
        name: "ram".to_owned(),
        ram: Arc::clone(&ram),
    }];
    let missing = DirtyBitmap::new(ram.len());
    missing.mark_all();
    let (near, mut far) = UnixStream::pair().unwrap();
    // Nothing answers what is asked for: the tests bring the pages.
    std::thread::spawn(move || std::io::copy(&mut far, &mut std::io::sink()));
    let patience = Duration::from_secs(10);
    let receiver =
        PostcopyReceiver::new(&blocks, vec![missing], stream(near), patience, no_machine())
            .unwrap();
    assert!(receiver.start());
    (ram, blocks, receiver)
}

/// A page comes from the source.
fn bring(receiver: &PostcopyReceiver, blocks: &[Block], page: usize) {
    let run = pages::Run {
        block: 0,
        first: page as u64,
        pages: 1,
    };
    let body = [pages::encode_missing(0, &[run]), vec![OLD; PAGE]].concat();
    let came = pages::decode_memory(&body, blocks, pages::Content::Data).unwrap();
    receiver.fill(&came, |_, _| true).unwrap();
}

fn first_byte(ram: &RamBlock, page: usize) -> u8 {
    let mut byte = [1_u8];
    ram.slice(page * PAGE, 1).unwrap().copy_to(&mut byte[..]);
    byte[0]
}

/// Returns the byte that a thread finds which waits for a page while the page is given back and then comes
/// from the source (`None`: the thread still waits), and what is there at the end.
fn give_back_a_page_that_is_waited_for(neglected: Option<Duty>) -> (Option<u8>, usize, u8) {
    let (ram, blocks, mut receiver) = all_missing(4, false);
    receiver.neglected = neglected;
    let progress = Progress::default();
    std::thread::scope(|scope| {
        scope.spawn(|| receiver.watch(&progress));
        let (found, result) = std::sync::mpsc::channel();
        let reader = Arc::clone(&ram);
        scope.spawn(move || found.send(first_byte(&reader, 1)));
        while receiver.waited.lock().is_empty() {
            std::thread::yield_now();
        }
        ram.discard(PAGE, PAGE).unwrap();
        if neglected == Some(Duty::Received) {
            // The waiting thread has got zeros: they go, and the page is missing as before.
            let _ = result.recv();
            ram.discard(PAGE, PAGE).unwrap();
        }
        bring(&receiver, &blocks, 1);
        let limit = match neglected {
            None => Duration::from_secs(60),
            Some(_) => Duration::from_millis(300),
        };
        let found = result.recv_timeout(limit).ok();
        let left = receiver.left();
        // This wakes all that still wait.
        receiver.end(&progress);
        (found, left, first_byte(&ram, 1))
    })
}

#[test]
fn page_that_is_gone_wakes_its_waiters() {
    assert_eq!(give_back_a_page_that_is_waited_for(None), (Some(0), 3, 0));
}

/// Pages of one frame are filled together, but for those that are not missing or not admitted; in a frame
/// of several runs each page gets its own content.
#[test]
fn runs_are_filled_around_pages_that_are_not_wanted() {
    const PAGES: usize = 32;
    for (shared, content) in [
        (false, pages::Content::Data),
        (false, pages::Content::Zeros),
        (true, pages::Content::Data),
        (true, pages::Content::Zeros),
    ] {
        let (ram, blocks, receiver) = all_missing(PAGES, shared);
        let progress = Progress::default();
        // Here already: the receiver has it as received.
        receiver.fill_page(0, 6, Some(&[9; PAGE])).unwrap();
        let run = |first, pages| pages::Run {
            block: 0,
            first,
            pages,
        };
        // From 2 to 11, and from 20 to 24.
        let mut body = pages::encode_missing(0, &[run(2, 10), run(20, 5)]);
        if content == pages::Content::Data {
            for page in (2..12).chain(20..25) {
                body.extend([page + 100; PAGE]);
            }
        }
        let came = pages::decode_memory(&body, &blocks, content).unwrap();
        let mut asked = Vec::new();
        let admitted = |page, data: Option<&[u8; PAGE]>| {
            asked.push((page, data.map_or(0, |data| data[0])));
            page != 9 && page != 22
        };
        receiver.fill(&came, admitted).unwrap();
        let byte = |page: usize| match content {
            pages::Content::Data => page as u8 + 100,
            _ => 0,
        };
        let all = (2..12).chain(20..25).filter(|page| *page != 6);
        assert!(
            asked
                .into_iter()
                .eq(all.clone().map(|page| (page, byte(page))))
        );
        let filled: Vec<_> = all.filter(|page| *page != 9 && *page != 22).collect();
        assert_eq!(receiver.left(), PAGES - 1 - filled.len());
        receiver.end(&progress);
        let found = (0..PAGES).map(|page| first_byte(&ram, page));
        let expected = (0..PAGES).map(|page| match page {
            6 => 9,
            page if filled.contains(&page) => byte(page),
            _ => 0,
        });
        assert!(found.eq(expected), "{content:?}");
    }
}

/// Events of the memory cannot be read: the guest is halted before a thread that waits is let go.
#[test]
fn unreadable_faults_end_the_guest_and_all_waits() {
    let unreadable = crate::testing::UnreadableFaults::new();
    let (ram, _, mut receiver) = all_missing(4, false);
    let memory = Arc::clone(&ram);
    receiver.halt = Box::new(move || memory.lose_awaited());
    let progress = Progress::default();
    std::thread::scope(|scope| {
        scope.spawn(|| receiver.watch(&progress));
        let (found, result) = std::sync::mpsc::channel();
        let reader = Arc::clone(&ram);
        scope.spawn(move || found.send((first_byte(&reader, 1), reader.pages())));
        while receiver.waited.lock().is_empty() {
            std::thread::yield_now();
        }
        unreadable.fail();
        // The next event, behind which the thread of the first would wait as well.
        let reader = Arc::clone(&ram);
        scope.spawn(move || first_byte(&reader, 2));
        let found = result.recv_timeout(Duration::from_secs(60));
        let why = receiver.failure();
        receiver.end(&progress);
        assert_eq!(found, Ok((0, memory::Pages::Lost)));
        assert_eq!(why.unwrap().code, "pages-not-served");
    });
}

/// The rules are needed: without either of them a thread waits for ever, or old content comes back.
#[test]
fn neglected_duties_are_noticed() {
    let (found, ..) = give_back_a_page_that_is_waited_for(Some(Duty::Wake));
    assert_eq!(
        found, None,
        "the thread waits for a page that does not come"
    );
    let (_, _, at_last) = give_back_a_page_that_is_waited_for(Some(Duty::Received));
    assert_eq!(at_last, OLD, "the source's content comes back");
}

/// A page is given back while it is being filled.
#[test]
fn page_that_comes_as_it_goes_is_dropped() {
    const PAGES: usize = 512;
    for shared in [false, true] {
        let (ram, blocks, receiver) = all_missing(PAGES, shared);
        let progress = Progress::default();
        for page in 0..PAGES {
            std::thread::scope(|scope| {
                // This thread waits for the watch, which does not run yet, and the next one for this.
                scope.spawn(|| ram.discard(page * PAGE, PAGE).unwrap());
                while !receiver.faults.poll(Duration::from_secs(10)).unwrap() {}
                scope.spawn(|| bring(&receiver, &blocks, page));
                std::thread::yield_now();
                let mut later = Vec::new();
                let touched = receiver.next_faults(Duration::ZERO, &mut later).unwrap();
                assert!(touched.is_empty() && later.is_empty());
            });
        }
        assert_eq!(receiver.left(), 0);
        receiver.end(&progress);
        let stale = (0..PAGES).filter(|page| first_byte(&ram, *page) != 0);
        assert_eq!(stale.count(), 0, "of {PAGES} pages");
    }
}

/// Threads read and give back, and pages come, in orders that a generator chooses.
#[test]
fn no_page_is_stale_and_no_thread_waits() {
    const PAGES: usize = 256;
    for seed in 0..24_u64 {
        let (ram, blocks, receiver) = all_missing(PAGES, seed % 2 == 1);
        let order = |salt: u64| {
            let mut pages: Vec<usize> = (0..PAGES).collect();
            pages.sort_by_key(|page| {
                let mixed = (*page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                (mixed ^ (seed << 8 | salt)).wrapping_mul(0xd134_2543_de82_ef95) >> 20
            });
            pages
        };
        // Every second page is given back.
        let goes = |page: usize| page.is_multiple_of(2);
        let progress = Progress::default();
        std::thread::scope(|scope| {
            scope.spawn(|| receiver.watch(&progress));
            let (done, over) = std::sync::mpsc::channel();
            let readers = (0..3).map(|salt| {
                let (done, ram, order) = (done.clone(), &ram, order(salt));
                scope.spawn(move || {
                    for page in order {
                        let found = first_byte(ram, page);
                        let fits = found == OLD || found == 0 && goes(page);
                        done.send(fits.then_some(()).ok_or(page)).unwrap();
                    }
                });
            });
            readers.for_each(drop);
            let (giver, ram) = (done.clone(), &ram);
            scope.spawn(move || {
                for page in order(3).into_iter().filter(|page| goes(*page)) {
                    ram.discard(page * PAGE, PAGE).unwrap();
                    let found = first_byte(ram, page);
                    giver.send((found == 0).then_some(()).ok_or(page)).unwrap();
                }
            });
            let (bringer, receiver, blocks) = (done.clone(), &receiver, &blocks);
            scope.spawn(move || {
                for page in order(4) {
                    bring(receiver, blocks, page);
                    bringer.send(Ok(())).unwrap();
                }
            });
            let mut failed = None;
            for _ in 0..4 * PAGES + PAGES / 2 {
                match over.recv_timeout(Duration::from_secs(60)) {
                    Ok(Ok(())) => {}
                    Ok(Err(page)) => failed = Some(format!("page {page} is stale")),
                    Err(_) => {
                        failed = Some("a thread waits for a page".to_owned());
                        break;
                    }
                }
            }
            let left = receiver.left();
            let waited = receiver.waited.lock().len();
            receiver.end(&progress);
            assert_eq!((failed, left, waited), (None, 0, 0), "seed {seed}");
        });
        let kept = (0..PAGES).filter(|page| first_byte(&ram, *page) == OLD);
        assert!(
            kept.eq((0..PAGES).filter(|page| !goes(*page))),
            "seed {seed}"
        );
    }
}

/// An operator may decide again that the guest runs here, if it could not the first time.
#[test]
fn start_is_tried_again() {
    let ram = Arc::new(RamBlock::new(&RamConfig::anonymous(PAGE as u64)).unwrap());
    let missing = vec![DirtyBitmap::new(ram.len())];
    let blocks = [Block {
        name: "ram".to_owned(),
        ram,
    }];
    let (near, _far) = UnixStream::pair().unwrap();
    let patience = Duration::from_secs(10);
    let receiver =
        PostcopyReceiver::new(&blocks, missing, stream(near), patience, no_machine()).unwrap();
    assert!(receiver.start() && receiver.start());
    receiver.end(&Progress::default());
    assert!(!receiver.start());
}
