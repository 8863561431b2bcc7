//! The channels of one migration in progress: a slot for each, and no queue.

use std::time::Instant;

use uuid::Uuid;

use crate::link::{Closer, Stream};
use crate::message::{Channel, Refusal};

/// A connection for a migration in progress.
pub(super) enum Arrived {
    Ram(u16, Box<dyn Stream>),
    Faults(Box<dyn Stream>),
    /// A source that lost its control channel, and asks.
    Again(Box<dyn Stream>),
}

/// A place for one connection.
enum Slot {
    Free,
    Arrived(Box<dyn Stream>),
    Taken,
}

impl Slot {
    /// Gives the connection back if the place is not free.
    fn put(&mut self, stream: Box<dyn Stream>) -> Result<(), Box<dyn Stream>> {
        match self {
            Self::Free => {
                *self = Self::Arrived(stream);
                Ok(())
            }
            Self::Arrived(_) | Self::Taken => Err(stream),
        }
    }

    fn take(&mut self) -> Option<Box<dyn Stream>> {
        match std::mem::replace(self, Self::Taken) {
            Self::Arrived(stream) => Some(stream),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// The channels of a migration in progress.
pub(super) struct Slots {
    pub(super) id: Uuid,
    /// The outcome is known, and only a source that missed it may still come: another migration may
    /// take the place of this one.
    pub(super) lingers: bool,
    /// A connection to close at a time, if it is still this one.
    pub(super) timer: Option<(Instant, Closer)>,
    rams: Vec<Slot>,
    faults: Slot,
    /// Only the newest: a source that asks again has given up the connection before.
    again: Option<Box<dyn Stream>>,
    /// Once the destination is ready, a source that lost it may ask.
    pub(super) may_ask: bool,
}

impl Slots {
    pub(super) fn new(id: Uuid, rams: u16) -> Self {
        Self {
            id,
            lingers: false,
            timer: None,
            rams: (0..rams).map(|_| Slot::Free).collect(),
            faults: Slot::Free,
            again: None,
            may_ask: false,
        }
    }

    /// Makes room for new RAM and faults channels, in place of those that were lost.
    pub(super) fn reopen(&mut self) {
        self.rams.iter_mut().for_each(|slot| *slot = Slot::Free);
        self.faults = Slot::Free;
    }

    /// Puts a connection into its slot, or gives it back.
    pub(super) fn put(
        &mut self,
        channel: Channel,
        stream: Box<dyn Stream>,
    ) -> Result<(), Box<dyn Stream>> {
        match channel {
            Channel::Ram { index } => match self.rams.get_mut(usize::from(index)) {
                Some(slot) => slot.put(stream),
                None => Err(stream),
            },
            Channel::Faults => self.faults.put(stream),
            Channel::Again if self.may_ask => {
                // The older connection, if any, is dropped here, which closes it.
                self.again = Some(stream);
                Ok(())
            }
            Channel::Again | Channel::Control => Err(stream),
        }
    }

    pub(super) fn take(&mut self) -> Option<Arrived> {
        // First: a source that asks anew has given up the channels that it made before.
        if let Some(stream) = self.again.take() {
            return Some(Arrived::Again(stream));
        }
        if let Some(stream) = self.faults.take() {
            return Some(Arrived::Faults(stream));
        }
        let mut rams = (0..).zip(&mut self.rams);
        rams.find_map(|(index, slot)| Some(Arrived::Ram(index, slot.take()?)))
    }
}

/// The answer to a connection that fits no slot.
pub(super) fn no_slot(channel: Channel) -> Refusal {
    let detail = match channel {
        Channel::Ram { index } => format!("unexpected RAM channel {index}"),
        Channel::Faults => "unexpected faults channel".to_owned(),
        Channel::Again | Channel::Control => "the migration is still in progress".to_owned(),
    };
    Refusal::new("out-of-order", detail)
}
