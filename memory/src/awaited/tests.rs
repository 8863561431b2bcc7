//! The map against a naive model: sectors of the image here, of the source's, and what the guest must read.

use proptest::prelude::*;

use super::*;

const SECTOR: usize = 512;
const PER_PAGE: usize = PAGE / SECTOR;
const PAGES: usize = 6;
/// The disk ends within its last page.
const SECTORS: usize = PAGES * PER_PAGE - 3;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// An operation on so many sectors from one on.
    Begin(BlockUse, usize, usize),
    /// An operation or a fill in flight ends, well or not.
    End(usize, bool),
    /// Pages come from the source.
    Fill(usize, usize),
    /// The guest's queue stops: what waits is dropped.
    Forget,
}

fn step() -> impl Strategy<Value = Step> {
    let usage = prop_oneof![Just(BlockUse::Read), Just(BlockUse::Change)];
    prop_oneof![
        4 => (usage, 0..SECTORS, 1_usize..20).prop_map(|(usage, first, count)| {
            Step::Begin(usage, first, count.min(SECTORS - first))
        }),
        4 => (any::<usize>(), 0..5).prop_map(|(which, roll)| Step::End(which, roll > 0)),
        3 => (0..PAGES, 1_usize..4).prop_map(|(first, count)| {
            Step::Fill(first, count.min(PAGES - first))
        }),
        1 => Just(Step::Forget),
    ]
}

/// A change of sectors in flight: the guest's, with a new value, or a fill.
struct Flight {
    claim: Option<Claim>,
    sectors: Range<usize>,
    value: Option<u32>,
}

struct Model {
    blocks: Arc<AwaitedBlocks>,
    waiter: Arc<Waiter>,
    source: Vec<u32>,
    image: Vec<u32>,
    /// The content that a read must find.
    truth: Vec<u32>,
    flights: Vec<Flight>,
    waiting: BTreeMap<u64, (BlockUse, Range<usize>)>,
    next: u32,
}

impl Model {
    fn new(missing: u64) -> Self {
        let bitmap = DirtyBitmap::new(SECTORS * SECTOR);
        bitmap.merge(0, &[missing]);
        let blocks = AwaitedBlocks::new((SECTORS * SECTOR) as u64, bitmap, || {});
        let source: Vec<u32> = (1..=SECTORS as u32).collect();
        let here = |sector: usize| missing & 1 << (sector / PER_PAGE) == 0;
        let image = (0..SECTORS).map(|at| if here(at) { source[at] } else { 0 });
        Self {
            image: image.collect(),
            truth: source.clone(),
            blocks,
            waiter: Waiter::new(|| {}),
            source,
            flights: Vec::new(),
            waiting: BTreeMap::new(),
            next: 1000,
        }
    }

    fn begin(&mut self, usage: BlockUse, sectors: Range<usize>) {
        self.next += 1;
        let ticket = u64::from(self.next);
        let range = BlockRange {
            offset: (sectors.start * SECTOR) as u64,
            len: (sectors.len() * SECTOR) as u64,
            usage,
        };
        let claim = match self.blocks.admit(range, &self.waiter, ticket) {
            Admission::Waits => {
                self.waiting.insert(ticket, (usage, sectors));
                return;
            }
            Admission::Free => None,
            Admission::Claimed(claim) => Some(claim),
        };
        if usage == BlockUse::Change {
            // A part of it is written at once, the rest at the end.
            let half = sectors.start..sectors.start + sectors.len() / 2;
            self.image[half].fill(self.next);
            let value = Some(self.next);
            self.flights.push(Flight {
                claim,
                sectors,
                value,
            });
            return;
        }
        assert!(claim.is_none(), "a read changes nothing");
        for sector in sectors {
            // What is being written at this moment may be old or new.
            let guests = self.flights.iter().filter(|flight| flight.value.is_some());
            if !guests
                .into_iter()
                .any(|flight| flight.sectors.contains(&sector))
            {
                assert_eq!(self.image[sector], self.truth[sector], "sector {sector}");
            }
        }
    }

    fn fill(&mut self, first: usize, pages: usize) {
        for claim in self.blocks.begin_fill(first, pages) {
            let pages = claim.pages();
            let sectors = pages.start * PER_PAGE..SECTORS.min(pages.end * PER_PAGE);
            let (claim, value) = (Some(claim), None);
            self.flights.push(Flight {
                claim,
                sectors,
                value,
            });
        }
    }

    fn end(&mut self, which: usize, is_done: bool) {
        if self.flights.is_empty() {
            return;
        }
        let Flight {
            claim,
            sectors,
            value,
        } = self.flights.remove(which % self.flights.len());
        let before = self.blocks.missing();
        let is_missing = |sector: usize| before.words()[0] & 1 << (sector / PER_PAGE) != 0;
        match value {
            Some(value) if is_done => {
                self.image[sectors.clone()].fill(value);
                self.truth[sectors.clone()].fill(value);
            }
            // A page that is missing still gets its old content; another may be old or new.
            Some(_) => {
                for sector in sectors.clone().filter(|sector| !is_missing(*sector)) {
                    self.truth[sector] = self.image[sector];
                }
            }
            None if is_done => {
                self.image[sectors.clone()].copy_from_slice(&self.source[sectors.clone()]);
            }
            None => self.image[sectors.start] = 9,
        }
        match claim {
            Some(claim) if is_done => drop(claim.done()),
            claim => drop(claim),
        }
        self.again();
    }

    /// Operations that waited ask again.
    fn again(&mut self) {
        for ticket in self.waiter.take_ready() {
            if let Some((usage, sectors)) = self.waiting.remove(&ticket) {
                self.begin(usage, sectors);
            }
        }
    }

    fn check_requests(&mut self) {
        let (missing, requests) = (self.blocks.missing(), self.blocks.take_requests());
        for page in requests {
            assert!(
                missing.words()[0] & 1 << page != 0,
                "page {page} is present"
            );
            let waits = |(_, sectors): &(BlockUse, Range<usize>)| {
                (sectors.start / PER_PAGE..=(sectors.end - 1) / PER_PAGE).contains(&page)
            };
            assert!(
                self.waiting.values().any(waits),
                "nothing waits for page {page}"
            );
        }
        assert_eq!(self.blocks.left(), missing.count());
    }
}

proptest! {
    /// No read finds what is in the place of a missing page, no page that comes late replaces what the guest
    /// wrote, and all that waits is served once all pages are there.
    #[test]
    fn agrees_with_a_naive_model(
        missing in 0_u64..1 << PAGES,
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let mut model = Model::new(missing);
        for step in steps {
            match step {
                Step::Begin(usage, first, count) => model.begin(usage, first..first + count),
                Step::End(which, is_done) => model.end(which, is_done),
                Step::Fill(first, count) => model.fill(first, count),
                Step::Forget => {
                    model.blocks.forget(&model.waiter);
                    model.waiting.clear();
                }
            }
            model.check_requests();
        }
        // The rest of the background copy.
        while !model.flights.is_empty() || model.blocks.left() > 0 {
            model.fill(0, PAGES);
            model.end(0, true);
        }
        prop_assert!(model.waiting.is_empty());
        prop_assert!(model.image == model.truth);
    }
}

#[test]
fn only_lost_requests_are_repeated() {
    let mut model = Model::new(0b1111);
    model.begin(BlockUse::Read, 0..2 * PER_PAGE);
    assert_eq!(model.blocks.take_requests(), [0, 1]);
    assert!(model.blocks.take_requests().is_empty());
    let [claim] = <[Claim; 1]>::try_from(model.blocks.begin_fill(0, 1)).unwrap();
    assert_eq!(claim.done().len(), 1, "how long it was waited for");
    model.blocks.ask_again();
    assert_eq!(model.blocks.take_requests(), [1]);
    // A write within a page needs that page, and one of whole pages none.
    model.begin(BlockUse::Change, 3 * PER_PAGE + 1..4 * PER_PAGE);
    model.begin(BlockUse::Change, 2 * PER_PAGE..3 * PER_PAGE);
    assert_eq!(model.blocks.take_requests(), [3]);
    assert_eq!(model.flights.len(), 1);
}

/// A guest can have thousands of operations that wait, and thousands in flight. The end of one must not
/// look at all pairs of them, with the map locked.
#[test]
fn end_looks_at_operations_on_its_pages_only() {
    const MANY: usize = 64;
    let missing = DirtyBitmap::new(MANY * PAGE);
    missing.merge(0, &[u64::MAX]);
    let blocks = AwaitedBlocks::new((MANY * PAGE) as u64, missing, || {});
    let waiter = Waiter::new(|| {});
    let change = |page: usize| BlockRange {
        offset: (page * PAGE) as u64,
        len: PAGE_SIZE,
        usage: BlockUse::Change,
    };
    let claim = |page: usize| match blocks.admit(change(page), &waiter, 0) {
        Admission::Claimed(claim) => claim,
        other => panic!("{other:?}"),
    };
    let claims: Vec<Claim> = (0..MANY).map(claim).collect();
    for page in 0..MANY {
        let admitted = blocks.admit(change(page), &waiter, page as u64);
        assert!(matches!(admitted, Admission::Waits));
    }
    blocks.looks.store(0, Ordering::Relaxed);
    for (page, claim) in claims.into_iter().enumerate() {
        drop(claim.done());
        assert_eq!(waiter.take_ready(), [page as u64]);
    }
    assert_eq!(blocks.looks.load(Ordering::Relaxed), MANY);
}

/// A guest can have thousands of operations that wait, beside thousands in flight. Asking for the pages of one
/// more must not look at all of them, with the map locked.
#[test]
fn requests_look_at_pages_that_are_due_only() {
    const MANY: usize = 1024;
    let missing = DirtyBitmap::new(2 * MANY * PAGE);
    missing.merge(0, &[u64::MAX; 2 * MANY / 64]);
    let blocks = AwaitedBlocks::new((2 * MANY * PAGE) as u64, missing, || {});
    let waiter = Waiter::new(|| {});
    let range = |page: usize, usage| BlockRange {
        offset: (page * PAGE) as u64,
        len: PAGE_SIZE,
        usage,
    };
    let mut claims = Vec::new();
    blocks.looks.store(0, Ordering::Relaxed);
    for page in 0..MANY {
        match blocks.admit(range(page, BlockUse::Change), &waiter, 0) {
            Admission::Claimed(claim) => claims.push(claim),
            other => panic!("{other:?}"),
        }
        let read = range(MANY + page, BlockUse::Read);
        assert!(matches!(blocks.admit(read, &waiter, 1), Admission::Waits));
        // One that waits for the write.
        let read = range(page, BlockUse::Read);
        assert!(matches!(blocks.admit(read, &waiter, 2), Admission::Waits));
        assert_eq!(blocks.take_requests(), [MANY + page]);
    }
    // A look at each operation as it comes, and one at each page.
    assert_eq!(blocks.looks.load(Ordering::Relaxed), 5 * MANY);
    // A write that fails leaves its page missing.
    drop(claims.pop());
    assert_eq!(blocks.take_requests(), [MANY - 1]);
    assert!(blocks.take_requests().is_empty());
}
