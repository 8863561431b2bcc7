//! The journals of hand-overs: one file for each side of a migration, in the state directory.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use control::{Category, RequestError};
use migration::{Fate, FileJournal, Journal, Side, Step};
use parking_lot::Mutex;
use uuid::Uuid;

/// Migrations whose last steps a process without a directory remembers.
const REMEMBERED: usize = 256;

/// The last step of a side of a migration.
#[derive(Debug)]
struct Last {
    id: Uuid,
    side: Side,
    step: Step,
    /// The migration is in progress.
    is_in_use: bool,
}

type LastSteps = Arc<Mutex<VecDeque<Last>>>;

/// Journals that are kept at most, of both sides together. The oldest go first: a peer that asks for a
/// migration of which there is no journal hears that it is unknown, and stays in doubt.
const MOST: usize = 1000;

/// Opens and removes journals.
#[derive(Clone, Debug, Default)]
pub(crate) struct Journals {
    directory: Option<PathBuf>,
    remembered: LastSteps,
}

impl Journals {
    /// Keeps journals in `directory`; in none, migrations do not survive the process.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self {
            directory: Some(directory),
            remembered: LastSteps::default(),
        }
    }

    /// Lists the journals on disk, with their steps.
    pub(super) fn list(&self) -> std::io::Result<Vec<(Uuid, Side, Vec<migration::Entry>)>> {
        self.directory
            .as_deref()
            .map_or_else(|| Ok(Vec::new()), FileJournal::list)
    }

    pub(super) fn open(
        &self,
        id: Uuid,
        side: Side,
        vm: &str,
        endpoint: &str,
    ) -> std::io::Result<Box<dyn Journal>> {
        Ok(match &self.directory {
            Some(dir) => {
                let journal = FileJournal::create(dir, id, side, vm)?.at(endpoint);
                // A full directory does not keep a guest from moving.
                if let Err(error) = FileJournal::prune(dir, MOST) {
                    tracing::warn!(%error, "cannot remove old journals of migrations");
                }
                Box::new(journal)
            }
            None => Box::new(Remembered {
                id,
                side,
                steps: Arc::clone(&self.remembered),
            }),
        })
    }

    /// The fate of a migration at its destination, as far as the journal has it.
    pub(super) fn fate(&self, id: Uuid) -> Fate {
        let here = (id, Side::Destination);
        let Some(dir) = &self.directory else {
            let remembered = self.remembered.lock();
            let last = remembered.iter().find(|last| (last.id, last.side) == here);
            return match last {
                Some(last) if !last.is_in_use && last.step == Step::Running => Fate::Ran,
                Some(last) if !last.is_in_use => Fate::NeverRan,
                _ => Fate::Unknown,
            };
        };
        // A migration that is in progress, at another endpoint of this service, has no outcome yet: its
        // last step is no answer. Looked at first, because a session may end at any time.
        if FileJournal::is_in_use(dir, id, Side::Destination) {
            return Fate::Unknown;
        }
        match FileJournal::read(dir, id, Side::Destination) {
            Err(_) => Fate::Unknown,
            // It may have been about to run, and could not.
            Ok(steps) if steps.last().is_some_and(|last| last.step == Step::Running) => Fate::Ran,
            // What was written last may not have reached the disk.
            Ok(steps) if FileJournal::is_of_an_earlier_boot(&steps) => Fate::Unknown,
            Ok(_) => Fate::NeverRan,
        }
    }

    /// Removes the journal of a migration that is over and about which no peer will ask.
    pub(super) fn forget(&self, id: Uuid, side: Side) {
        if let Some(dir) = &self.directory
            && let Err(error) = FileJournal::remove(dir, id, side)
        {
            tracing::warn!(%error, "cannot remove a journal");
        }
    }

    pub(super) fn unwritable(error: &std::io::Error) -> RequestError {
        let detail = format!("the migration's journal cannot be written: {error}");
        RequestError::new(Category::Host, "journal", detail)
    }
}

/// The journal of a process without a directory: its last step, for as long as the process lives. A
/// later session at the same endpoint answers a source from it.
struct Remembered {
    id: Uuid,
    side: Side,
    steps: LastSteps,
}

impl Journal for Remembered {
    fn record(&mut self, step: Step) -> std::io::Result<()> {
        let mut steps = self.steps.lock();
        steps.retain(|last| (last.id, last.side) != (self.id, self.side));
        if steps.len() >= REMEMBERED {
            steps.pop_front();
        }
        steps.push_back(Last {
            id: self.id,
            side: self.side,
            step,
            is_in_use: true,
        });
        Ok(())
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        let mut steps = self.steps.lock();
        let ours = steps
            .iter_mut()
            .filter(|last| (last.id, last.side) == (self.id, self.side));
        ours.for_each(|last| last.is_in_use = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_migrations_without_directory() {
        let (journals, id) = (Journals::default(), Uuid::new_v4());
        assert_eq!(journals.fate(id), Fate::Unknown);
        let mut source = journals.open(id, Side::Source, "vm", "").unwrap();
        source.record(Step::Commit).unwrap();
        assert_eq!(journals.fate(id), Fate::Unknown, "of the other side");
        for (step, fate) in [(Step::Ready, Fate::NeverRan), (Step::Running, Fate::Ran)] {
            let mut journal = journals.open(id, Side::Destination, "vm", "").unwrap();
            journal.record(step).unwrap();
            assert_eq!(journals.fate(id), Fate::Unknown, "it is in progress");
            drop(journal);
            assert_eq!(journals.clone().fate(id), fate);
        }
        for _ in 0..REMEMBERED {
            let other = journals.open(Uuid::new_v4(), Side::Source, "vm", "");
            let mut other = other.unwrap();
            other.record(Step::Prepare).unwrap();
        }
        assert_eq!(journals.fate(id), Fate::Unknown, "it is bounded");
    }
}
