//! Copies of pages that the guest waited for, on their way from the fault thread to the writer.
//!
//! The fault thread must not allocate: to enlarge its heap it would need the lock of the process's
//! memory map for writing, for which Linux lets it wait some milliseconds while another thread protects
//! memory piece by piece, and the guest with it. So all buffers are there before memory is protected.
//! The kernel gives them pages when they are first used.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use memory::PageBuffer;
use parking_lot::{Condvar, Mutex};

use super::super::memory_file::PageSink;
use crate::MigrationError;
use crate::pages::PAGE;

/// Copies that wait for the writer at most: 64 MiB.
pub(super) const MAX_QUEUED: usize = 16 << 10;
/// How long the guest's pages wait for room among them. Then the snapshot fails: storage must not stop a
/// guest.
const STORAGE_PATIENCE: Duration = Duration::from_secs(1);

/// Memory for all copies.
pub(super) fn memory() -> PageBuffer {
    PageBuffer::new(MAX_QUEUED * PAGE)
}

/// A bounded queue of copies.
pub(super) struct Copies<'a> {
    state: Mutex<State<'a>>,
    room: Condvar,
}

struct State<'a> {
    /// Buffers of a page each. The last one that came back is the next that is used.
    spare: Vec<&'a mut [u8]>,
    /// The number of each page in the sink, and its content.
    queued: VecDeque<(usize, &'a mut [u8])>,
    is_over: bool,
}

impl<'a> Copies<'a> {
    pub(super) fn new(memory: &'a mut [u8]) -> Self {
        let spare: Vec<_> = memory.chunks_exact_mut(PAGE).collect();
        let queued = VecDeque::with_capacity(spare.len());
        let state = State {
            spare,
            queued,
            is_over: false,
        };
        Self {
            state: Mutex::new(state),
            room: Condvar::new(),
        }
    }

    /// Returns a buffer for a copy, or `None` if none is needed any more.
    ///
    /// # Errors
    /// The storage took no copy for a second (`storage-too-slow`).
    pub(super) fn buffer(&self) -> Result<Option<&'a mut [u8]>, MigrationError> {
        let deadline = Instant::now() + STORAGE_PATIENCE;
        let mut state = self.state.lock();
        while !state.is_over {
            if let Some(buffer) = state.spare.pop() {
                return Ok(Some(buffer));
            }
            if self.room.wait_until(&mut state, deadline).timed_out() {
                let why = format!(
                    "the storage took no page for {} ms while the guest waited; {} pages are waiting",
                    STORAGE_PATIENCE.as_millis(),
                    state.queued.len()
                );
                return Err(MigrationError::here("storage-too-slow", why));
            }
        }
        Ok(None)
    }

    /// Queues the copy of a page.
    pub(super) fn put(&self, page: usize, content: &'a mut [u8]) {
        self.state.lock().queued.push_back((page, content));
    }

    /// Writes all copies that are queued.
    pub(super) fn write(&self, sink: &mut dyn PageSink) -> Result<(), MigrationError> {
        let next = || self.state.lock().queued.pop_front();
        while let Some((page, content)) = next() {
            sink.put(page, content)?;
            self.state.lock().spare.push(content);
            self.room.notify_one();
        }
        Ok(())
    }

    /// From here on no copy is needed, and the fault thread does not wait for a buffer.
    pub(super) fn end(&self) {
        self.state.lock().is_over = true;
        self.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pages(Vec<(usize, u8)>);

    impl PageSink for Pages {
        fn put(&mut self, first: usize, content: &[u8]) -> Result<(), MigrationError> {
            assert_eq!(content.len(), PAGE);
            self.0.push((first, content[0]));
            Ok(())
        }
    }

    #[test]
    fn copies_are_written_once_and_their_buffers_come_back() {
        let mut memory = vec![0; 2 * PAGE];
        let copies = Copies::new(&mut memory);
        let mut sink = Pages(Vec::new());
        for round in 0..3_usize {
            for page in 0..2 {
                let buffer = copies.buffer().unwrap().unwrap();
                buffer.fill((round * 2 + page) as u8);
                copies.put(page, buffer);
            }
            copies.write(&mut sink).unwrap();
        }
        let written = [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4), (1, 5)];
        assert_eq!(sink.0, written);
    }

    #[test]
    fn storage_that_takes_nothing_is_an_error() {
        let mut memory = vec![0; PAGE];
        let copies = Copies::new(&mut memory);
        copies.put(0, copies.buffer().unwrap().unwrap());
        let full = copies.buffer().unwrap_err();
        assert_eq!(full.refusal().code, "storage-too-slow");
        copies.end();
        assert!(copies.buffer().unwrap().is_none());
    }
}
