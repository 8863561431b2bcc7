//! The disks that arrive with the memory of a guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::AwaitedBlocks;
use parking_lot::{Condvar, Mutex, RwLock};

use super::postcopy::{LOOK, PostcopyReceiver, missing_pieces};
use crate::disks::{DestinationDisk, IncomingDisk};
use crate::link::Closer;
use crate::message::Refusal;
use crate::pages::{Content, Decoded, PAGE};
use crate::progress::Progress;
use crate::wire::WireError;

/// The disks of a guest that comes. In frames they are numbered behind its blocks of memory.
pub(super) struct IncomingDisks {
    disks: Vec<IncomingDisk>,
    /// The number of the first one in frames.
    first: usize,
    state: RwLock<State>,
    /// Ends reading from the control channel.
    control: Mutex<Option<Closer>>,
    /// Set when the source should be asked for blocks.
    requests: Arc<Requests>,
    /// Why blocks that followed the guest could not be written. The connection ends, and they come again
    /// over the next one.
    unwritten: Mutex<Option<Refusal>>,
    /// Blocks that followed the guest could not be synced. The host may have dropped them: a second sync
    /// that succeeds says nothing of them.
    unsynced: Mutex<Option<Refusal>>,
}

/// Wakes the thread that asks the source for blocks.
#[derive(Default)]
struct Requests {
    are_there: Mutex<bool>,
    changed: Condvar,
}

impl Requests {
    fn set(&self) {
        *self.are_there.lock() = true;
        self.changed.notify_one();
    }

    /// Waits until there are some, but not long.
    fn wait(&self) {
        let mut are_there = self.are_there.lock();
        if !*are_there {
            let _ = self.changed.wait_for(&mut are_there, LOOK);
        }
        *are_there = false;
    }
}

#[derive(Debug)]
enum State {
    Arriving,
    /// Storage failed. What else arrives is thrown away, until the source has heard of it.
    Failed(Refusal),
    /// All blocks have arrived that come before the guest. It may run at any time now: a frame would write
    /// to a disk in use.
    Whole,
    /// The guest runs here, and the blocks that it waits for come.
    Following,
}

impl IncomingDisks {
    pub(super) fn new(disks: Vec<DestinationDisk>, first: usize) -> Self {
        Self {
            disks: disks.into_iter().map(IncomingDisk::new).collect(),
            first,
            state: RwLock::new(State::Arriving),
            control: Mutex::new(None),
            requests: Arc::default(),
            unwritten: Mutex::default(),
            unsynced: Mutex::default(),
        }
    }

    pub(super) fn are_none(&self) -> bool {
        self.disks.is_empty()
    }

    fn get(&self, index: usize) -> Option<&IncomingDisk> {
        self.disks.get(index.checked_sub(self.first)?)
    }

    /// The pages and the name of the disk with this number.
    pub(super) fn find(&self, index: usize) -> Option<(usize, &str)> {
        self.get(index).map(|disk| (disk.pages(), disk.name()))
    }

    /// Has a failure of storage end the wait for the source's next message. The other way the channel
    /// stays open: the source is sent the reason.
    pub(super) fn fail_by(&self, control: Closer) {
        *self.control.lock() = Some(control);
    }

    /// Takes blocks, if they are of a disk. Returns how long requests of the guest waited for them, or `None`
    /// if they are of memory.
    pub(super) fn take(
        &self,
        came: &Decoded<'_>,
        content: Content,
    ) -> Result<Option<Vec<Duration>>, WireError> {
        let Some(disk) = self.get(came.block) else {
            return Ok(None);
        };
        let refused = |why: &str| {
            let why = format!("unexpected blocks of the disk {}: {why}", disk.name());
            Err(WireError::damaged(why))
        };
        // Held during the write: none is in progress once the disks are whole.
        let state = self.state.read();
        let failed = match (&*state, content) {
            (State::Arriving, Content::Later) => {
                disk.announce(came);
                None
            }
            (State::Arriving, _) => disk.apply(came).err(),
            (State::Failed(_), _) => None,
            (State::Following, Content::Data | Content::Zeros) => {
                let Some(blocks) = disk.awaited() else {
                    return refused("all of its blocks were sent before the guest ran here");
                };
                return match disk.fill(blocks, came) {
                    Ok(waited) => Ok(Some(waited)),
                    Err(why) => {
                        self.unwritten.lock().get_or_insert(why);
                        // Ends the channel. The source makes another one, and the blocks come again.
                        Err(WireError::Closed)
                    }
                };
            }
            (State::Whole | State::Following, _) => return refused("the guest is loaded"),
        };
        drop(state);
        if let Some(why) = failed {
            self.fail(why);
        }
        Ok(Some(Vec::new()))
    }

    /// Returns the blocks of each disk that come after the guest, which may run here from now on, or `None` if
    /// there are none.
    pub(super) fn expect(&self) -> Option<Vec<Option<Arc<AwaitedBlocks>>>> {
        let expect = |disk: &IncomingDisk| {
            let requests = Arc::clone(&self.requests);
            disk.expect(move || requests.set())
        };
        let awaited: Vec<_> = self.disks.iter().map(expect).collect();
        awaited.iter().any(Option::is_some).then_some(awaited)
    }

    /// The machine has taken its disks over: blocks that follow are written beside the guest.
    pub(super) fn follow(&self) {
        if self.have_followed() {
            *self.state.write() = State::Following;
        }
    }

    /// The disks with blocks that come after the guest, and their numbers in frames.
    fn awaited(&self) -> impl Iterator<Item = (usize, &IncomingDisk, &Arc<AwaitedBlocks>)> {
        let disks = (self.first..).zip(&self.disks);
        disks.filter_map(|(index, disk)| Some((index, disk, disk.awaited()?)))
    }

    /// Whether blocks come, or came, after the guest.
    pub(super) fn have_followed(&self) -> bool {
        self.awaited().next().is_some()
    }

    /// How many blocks are missing.
    pub(super) fn left(&self) -> usize {
        self.awaited().map(|(_, _, blocks)| blocks.left()).sum()
    }

    /// Why disks cannot be used, if blocks of them are missing that do not come any more. The guest may have
    /// ended, or still run on what has come.
    pub(super) fn incomplete(&self) -> Option<Refusal> {
        let (_, disk, blocks) = self.awaited().find(|(_, _, blocks)| blocks.left() > 0)?;
        let detail = format!(
            "{} KiB of the disk {} were at the source when the migration ended, and do not come any more: \
             the image here is incomplete, and no VM can be booted from it",
            blocks.left() * (PAGE / 1024),
            disk.name()
        );
        Some(Refusal::new("disk-incomplete", detail))
    }

    /// Bits of the blocks that are missing, in pieces: block, first page, words.
    pub(super) fn still_missing(&self) -> Vec<(u32, u64, Vec<u64>)> {
        let pieces = self.awaited().flat_map(|(index, _, blocks)| {
            missing_pieces(u32::try_from(index).unwrap_or(u32::MAX), &blocks.missing())
        });
        pieces.collect()
    }

    /// Asks the source for blocks that requests of the guest wait for, until it is over. On a thread of its
    /// own: the source may be slow to read.
    pub(super) fn ask(&self, receiver: &PostcopyReceiver) {
        while receiver.is_whole() {
            self.requests.wait();
            for (index, _, blocks) in self.awaited() {
                for page in blocks.take_requests() {
                    // Without a connection they are asked for again over the next one.
                    receiver.ask_for(index, page);
                }
            }
        }
    }

    /// There is a connection again.
    pub(super) fn connected(&self) {
        *self.unwritten.lock() = None;
        self.awaited().for_each(|(_, _, blocks)| blocks.ask_again());
    }

    /// Shows what is left.
    pub(super) fn report(&self, progress: &Progress) {
        let left = (self.left() * PAGE) as u64;
        progress.update(|report| report.disk_remaining_bytes = left);
    }

    /// Why blocks that followed the guest could not be stored, if that failed.
    pub(super) fn storage_failure(&self) -> Option<Refusal> {
        let unwritten = self.unwritten.lock().clone();
        unwritten.or_else(|| self.unsynced.lock().clone())
    }

    /// Storage failed. The channel for pages stays open: if it ended, the source would see a lost
    /// connection before it hears the reason.
    fn fail(&self, why: Refusal) {
        let mut state = self.state.write();
        if matches!(*state, State::Arriving) {
            *state = State::Failed(why);
        }
        drop(state);
        if let Some(control) = self.control.lock().take() {
            control.close();
        }
    }

    /// Why storage failed, if it did.
    pub(super) fn failure(&self) -> Option<Refusal> {
        match &*self.state.read() {
            State::Failed(why) => Some(why.clone()),
            State::Arriving | State::Whole | State::Following => None,
        }
    }

    /// All blocks have arrived: no frame changes a disk from here on.
    pub(super) fn end(&self) {
        // The duplicate of the descriptor would keep a lost connection half open.
        *self.control.lock() = None;
        let mut state = self.state.write();
        if matches!(*state, State::Arriving) {
            *state = State::Whole;
        }
    }

    /// Makes durable all that has arrived. Returns how long it took.
    pub(super) fn sync(&self) -> Result<Duration, Refusal> {
        let start = Instant::now();
        if let Some(why) = &*self.unsynced.lock() {
            return Err(why.clone());
        }
        let follows = matches!(*self.state.read(), State::Following);
        // The others are the machine's alone by then.
        let all = self.disks.iter();
        let mut synced = all.filter(|disk| !follows || disk.awaited().is_some());
        let synced = synced.try_for_each(IncomingDisk::sync);
        synced.inspect_err(|why| {
            if follows {
                *self.unsynced.lock() = Some(why.clone());
            }
        })?;
        Ok(start.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use memory::{Admission, BlockRange, BlockUse, Waiter};

    use super::*;
    use crate::link::Stream as _;
    use crate::pages::{self, PAGE};
    use crate::testing::MemoryDisk;

    fn body(first: u64) -> Vec<u8> {
        let mut body = [2_u32.to_le_bytes(), 1_u32.to_le_bytes()].concat();
        body.extend(first.to_le_bytes());
        body.extend(1_u32.to_le_bytes());
        body.extend([5; PAGE]);
        body
    }

    #[test]
    fn blocks_of_disks_that_come_too_late_are_refused() {
        let image = MemoryDisk::new(2 * PAGE);
        let disks = IncomingDisks::new(vec![image.at_destination("a")], 2);
        let take = |first| {
            let body = body(first);
            let came = pages::decode(&body, Content::Data, |index| disks.find(index)).unwrap();
            disks.take(&came, Content::Data)
        };
        assert_eq!(take(0).unwrap(), Some(Vec::new()));
        assert!(!image.is_synced());
        disks.sync().unwrap();
        assert!(image.is_synced());
        let (control, _peer) = UnixStream::pair().unwrap();
        disks.fail_by(control.read_closer().unwrap());
        disks.end();
        assert!(disks.control.lock().is_none());
        assert!(take(1).is_err());
        let contents = image.contents();
        assert!(contents[..PAGE] == [5; PAGE] && contents[PAGE..] == [0; PAGE]);
    }

    fn at(block: u32, first: u64, pages: u32, data: &[u8]) -> Vec<u8> {
        let mut body = [block.to_le_bytes(), 1_u32.to_le_bytes()].concat();
        body.extend(first.to_le_bytes());
        body.extend(pages.to_le_bytes());
        body.extend(data);
        body
    }

    /// Blocks that follow the guest are written unless it wrote them, also zeros over what a write that
    /// failed has left; and a failure of storage leaves them missing.
    #[test]
    fn blocks_follow_the_guest() {
        let image = MemoryDisk::new(4 * PAGE);
        let disks = IncomingDisks::new(vec![image.at_destination("a")], 2);
        let take = |content, body: &[u8]| {
            let came = pages::decode(body, content, |index| disks.find(index)).unwrap();
            disks.take(&came, content)
        };
        let page = |first, byte| at(2, first, 1, &[byte; PAGE]);
        take(Content::Data, &page(0, 1)).unwrap();
        take(Content::Later, &at(2, 0, 3, &[])).unwrap();
        disks.end();
        let blocks = disks.expect().unwrap().pop().unwrap().unwrap();
        assert_eq!(disks.left(), 3);
        // Not before the machine has the image.
        assert!(take(Content::Data, &page(0, 2)).is_err());
        disks.follow();
        assert!(take(Content::Later, &at(2, 0, 1, &[])).is_err());
        let waiter = Waiter::new(|| {});
        let change = |first: u64| {
            let range = BlockRange {
                offset: first * PAGE as u64,
                len: PAGE as u64,
                usage: BlockUse::Change,
            };
            let Admission::Claimed(claim) = blocks.admit(range, &waiter, 0) else {
                panic!("nothing else uses the page");
            };
            image.fill(first as usize * PAGE, PAGE / 2, 9);
            claim
        };
        // While the guest writes, and behind that.
        let written = change(0);
        assert_eq!(take(Content::Data, &page(0, 2)).unwrap(), Some(Vec::new()));
        let _ = written.done();
        take(Content::Data, &page(0, 3)).unwrap();
        drop(change(1));
        take(Content::Zeros, &at(2, 1, 1, &[])).unwrap();
        assert_eq!(disks.still_missing(), [(2, 0, vec![0b100])]);
        take(Content::Data, &page(2, 4)).unwrap();
        assert_eq!((disks.left(), disks.incomplete()), (0, None));
        let contents = image.contents();
        let (first, rest) = contents.split_at(PAGE);
        assert!(first[..PAGE / 2] == [9; PAGE / 2] && first[PAGE / 2..] == [1; PAGE / 2]);
        assert!(rest[..PAGE] == [0; PAGE] && rest[PAGE..2 * PAGE] == [4; PAGE]);
        // A disk of which all blocks came before the guest gets none behind it.
        assert!(take(Content::Data, &page(3, 5)).unwrap().is_some());
        assert!(image.contents()[3 * PAGE..] == [0; PAGE]);
    }
}
