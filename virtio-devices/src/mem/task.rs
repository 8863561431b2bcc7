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

    /// Returns the queue's state. A request that is half done is done first: the next device would
    /// find blocks in it that are not as the driver knows them.
    pub(super) fn finish(mut self) -> QueueState {
        if let Some((chain, mut job)) = self.ongoing.take() {
            let answer = loop {
                if let Some(answer) = self.shared.advance(&mut job, u64::MAX) {
                    break answer;
                }
            };
            let done = answer_chain(&mut self.queue, &chain, answer);
            if let Err(error) = done.and_then(|()| self.queue.notify()) {
                self.queue.broken(&error);
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
