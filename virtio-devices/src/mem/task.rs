//! The work on a memory device's queue.

use std::io;
use std::sync::Arc;

use devices::event_loop::Interest;

use super::Shared;
use super::request::{ANSWER, Answer, Begun, Job, REQUEST};
use crate::limits::TURN_BYTES;
use crate::queue::{Budget, Chain, Queue, QueueError, QueueState, Served};
use crate::worker::{QueueTask, TaskEvent, TaskFlow, TaskSources};

/// Requests of one turn.
const CHAINS: usize = 8;
/// Bytes of memory that one turn plugs or unplugs: the host frees them in about a millisecond.
const STEP: u64 = 32 << 20;

/// Serves the queue.
pub(super) struct MemTask {
    queue: Queue,
    shared: Arc<Shared>,
    /// A request of which a part is done, the latest that was taken.
    ongoing: Option<(Chain, Job)>,
}

impl MemTask {
    pub(super) fn new(queue: Queue, shared: &Arc<Shared>) -> Self {
        Self {
            queue,
            shared: Arc::clone(shared),
            ongoing: None,
        }
    }

    /// Returns the queue's state. A request that is half done is ended, or goes back to the queue and is
    /// repeated where the state is loaded: see [`Shared::stop`].
    pub(super) fn finish(mut self) -> QueueState {
        if let Some((chain, job)) = self.ongoing.take() {
            match self.shared.stop(job) {
                Some(answer) => {
                    let done = answer_chain(&mut self.queue, &chain, answer);
                    if let Err(error) = done.and_then(|()| self.queue.notify()) {
                        self.queue.broken(&error);
                    }
                }
                None => self.queue.unpop(),
            }
        }
        self.queue.state()
    }

    pub(super) fn state(&self) -> QueueState {
        let mut state = self.queue.state();
        if self.ongoing.is_some() {
            // The chain in hand counts as not taken: its request is repeated where the state is
            // loaded.
            state.next_avail = state.next_avail.wrapping_sub(1);
        }
        state
    }
}

fn answer_chain(queue: &mut Queue, chain: &Chain, answer: Answer) -> Result<(), QueueError> {
    chain.write(0, &answer.encode())?;
    queue.push(chain.head(), ANSWER as u32)
}

impl QueueTask for MemTask {
    fn watch(&mut self, sources: &mut TaskSources<'_, '_>) -> io::Result<()> {
        sources.watch(Arc::clone(self.queue.kick()), 0, Interest::Read)
    }

    fn call(&mut self, _: TaskEvent, _: &mut TaskSources<'_, '_>) -> Result<TaskFlow, QueueError> {
        self.turn()
    }
}

impl MemTask {
    fn turn(&mut self) -> Result<TaskFlow, QueueError> {
        let Self {
            queue,
            shared,
            ongoing,
        } = self;
        // Requests are done in order: the queue gives no other chain before this one is answered.
        if let Some((chain, job)) = ongoing {
            let Some(answer) = shared.advance(job, STEP) else {
                return Ok(TaskFlow::Again);
            };
            answer_chain(queue, chain, answer)?;
            *ongoing = None;
        }
        queue.turn(Budget::new(CHAINS), |queue, chain| {
            let mut raw = [0; REQUEST];
            chain.read(0, &mut raw)?;
            // Before anything is done: what is done needs an answer.
            chain.writable(0, ANSWER)?;
            let answer = match shared.begin(&raw) {
                Begun::Answered(answer) => Some(answer),
                Begun::Job(mut job) => {
                    let answer = shared.advance(&mut job, STEP);
                    if answer.is_none() {
                        *ongoing = Some((chain, job));
                        // The rest is for the next turns.
                        return Ok(Served::Bytes(TURN_BYTES));
                    }
                    answer
                }
            };
            if let Some(answer) = answer {
                answer_chain(queue, &chain, answer)?;
            }
            Ok(Served::Bytes(TURN_BYTES / CHAINS as u64))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use memory::{RamBlock, RamConfig};

    use super::super::request::{
        VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_UNPLUG, VIRTIO_MEM_REQ_UNPLUG_ALL,
    };
    use super::super::{MIN_BLOCK, Mem, MemConfig};
    use super::*;
    use crate::testing::{TestBuffer, TestGuest, TestQueue, transport, workers};

    /// A stop does not wait for the host to find or free all that a request names. What is not done is
    /// repeated, unless the repetition would be refused.
    #[test]
    fn stop_in_a_long_request_does_no_more_of_it() {
        const BLOCKS: u64 = 4 * STEP / MIN_BLOCK;
        let (_event_loop, workers) = workers();
        let ram = RamBlock::new(&RamConfig {
            hotplug: true,
            ..RamConfig::anonymous(BLOCKS * MIN_BLOCK)
        });
        let config = MemConfig {
            ram: Arc::new(ram.unwrap()),
            addr: 1 << 32,
            block_size: MIN_BLOCK,
            node: None,
            requested: BLOCKS * MIN_BLOCK,
        };
        let (device, _) = Mem::new(config, workers, || {});
        let shared = &device.shared;
        let mut guest = TestGuest::new(1 << 20);
        let (transport, _) = transport();
        let mut driver = TestQueue::new(&mut guest, 0, 8);
        let answer = guest.alloc(ANSWER as u64);
        let mut state = QueueState::default();
        let all = BLOCKS * MIN_BLOCK;
        for (kind, when_stopped, in_the_end) in [
            (VIRTIO_MEM_REQ_PLUG, Some(0), all),
            (VIRTIO_MEM_REQ_UNPLUG_ALL, Some(all - STEP), 0),
            (VIRTIO_MEM_REQ_PLUG, Some(0), all),
            (VIRTIO_MEM_REQ_UNPLUG, None, 0),
        ] {
            let mut raw = [0; REQUEST];
            raw[..2].copy_from_slice(&kind.to_le_bytes());
            raw[8..16].copy_from_slice(&(1_u64 << 32).to_le_bytes());
            raw[16..18].copy_from_slice(&(BLOCKS as u16).to_le_bytes());
            let request = guest.put(&raw);
            driver.send(&[
                TestBuffer::new(request, REQUEST as u32, false),
                TestBuffer::new(answer, ANSWER as u32, true),
            ]);
            let mut task = MemTask::new(driver.device_side(&transport, state), shared);
            assert_eq!(task.turn().unwrap(), TaskFlow::Again);
            let stopped = task.finish();
            let plugged = shared.plugged.load(Ordering::Relaxed);
            assert_eq!(plugged, shared.ram.plugged_len() as u64);
            if let Some(when_stopped) = when_stopped {
                assert_eq!((plugged, stopped), (when_stopped, state), "{kind}");
                let mut task = MemTask::new(driver.device_side(&transport, stopped), shared);
                while task.turn().unwrap() == TaskFlow::Again {}
                state = task.finish();
            } else {
                state = stopped;
            }
            assert_eq!(driver.take_used().unwrap().1, ANSWER as u32);
            assert_eq!(guest.read(answer, 1), [0], "{kind}: acknowledged");
            assert_eq!(shared.ram.plugged_len() as u64, in_the_end, "{kind}");
        }
    }
}
