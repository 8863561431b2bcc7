//! The disks that arrive with the memory of a guest.

use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use crate::disks::{DestinationDisk, IncomingDisk};
use crate::link::Closer;
use crate::message::Refusal;
use crate::pages::{Content, Decoded};
use crate::wire::WireError;

/// The disks of a guest that comes. In frames they are numbered behind its blocks of memory.
pub(super) struct IncomingDisks {
    disks: Vec<IncomingDisk>,
    /// The number of the first one in frames.
    first: usize,
    state: RwLock<State>,
    /// Ends reading from the control channel.
    control: Mutex<Option<Closer>>,
}

#[derive(Debug)]
enum State {
    Arriving,
    /// Storage failed. What else arrives is thrown away, until the source has heard of it.
    Failed(Refusal),
    /// All blocks have arrived. The guest may run at any time now: a frame would write to a disk in use.
    Whole,
}

impl IncomingDisks {
    pub(super) fn new(disks: Vec<DestinationDisk>, first: usize) -> Self {
        Self {
            disks: disks.into_iter().map(IncomingDisk::new).collect(),
            first,
            state: RwLock::new(State::Arriving),
            control: Mutex::new(None),
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

    /// Takes blocks, if they are of a disk. Returns false if not.
    pub(super) fn take(&self, came: &Decoded<'_>, content: Content) -> Result<bool, WireError> {
        let Some(disk) = self.get(came.block) else {
            return Ok(false);
        };
        let refused = |why: &str| {
            let why = format!("unexpected blocks of the disk {}: {why}", disk.name());
            Err(WireError::damaged(why))
        };
        if content == Content::Later {
            return refused("disks do not follow a guest");
        }
        // Held during the write: none is in progress once the disks are whole.
        let state = self.state.read();
        let failed = match *state {
            State::Arriving => disk.apply(came).err(),
            State::Failed(_) => None,
            State::Whole => return refused("the guest is loaded"),
        };
        drop(state);
        if let Some(why) = failed {
            self.fail(why);
        }
        Ok(true)
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
            State::Arriving | State::Whole => None,
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
        self.disks.iter().try_for_each(IncomingDisk::sync)?;
        Ok(start.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

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
        assert!(take(0).unwrap());
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
}
