//! The journals of hand-overs: one file for each side of a migration, in the state directory.

use std::path::{Path, PathBuf};

use control::{Category, RequestError};
use migration::{FileJournal, Journal, NoJournal, Side};

/// Journals that are kept at most, of both sides together. The oldest go first: a peer that asks for a
/// migration of which there is no journal hears that it is unknown, and stays in doubt.
const MOST: usize = 1000;

/// Opens and removes journals.
#[derive(Clone, Debug)]
pub(crate) struct Journals(Option<PathBuf>);

impl Journals {
    /// Keeps journals in `directory`; in none, migrations do not survive the process.
    pub(super) fn new(directory: Option<&Path>) -> Self {
        Self(directory.map(Path::to_owned))
    }

    /// Lists the journals on disk, with their steps.
    pub(super) fn list(&self) -> std::io::Result<Vec<(uuid::Uuid, Side, Vec<migration::Entry>)>> {
        self.0
            .as_deref()
            .map_or_else(|| Ok(Vec::new()), FileJournal::list)
    }

    pub(super) fn open(
        &self,
        id: uuid::Uuid,
        side: Side,
        vm: &str,
    ) -> std::io::Result<Box<dyn Journal>> {
        match &self.0 {
            Some(dir) => {
                let journal = FileJournal::create(dir, id, side, vm)?;
                // A full directory does not keep a guest from moving.
                if let Err(error) = FileJournal::prune(dir, MOST) {
                    tracing::warn!(%error, "old journals of migrations cannot be removed");
                }
                Ok(Box::new(journal))
            }
            None => Ok(Box::new(NoJournal)),
        }
    }

    /// Whether a migration in progress writes this journal.
    pub(super) fn is_in_use(&self, id: uuid::Uuid, side: Side) -> bool {
        self.0
            .as_deref()
            .is_some_and(|dir| FileJournal::is_in_use(dir, id, side))
    }

    /// Removes the journal of a migration that is over and about which no peer will ask.
    pub(super) fn forget(&self, id: uuid::Uuid, side: Side) {
        if let Some(dir) = &self.0
            && let Err(error) = FileJournal::remove(dir, id, side)
        {
            tracing::warn!(%error, "a journal cannot be removed");
        }
    }

    pub(super) fn unwritable(error: &std::io::Error) -> RequestError {
        let detail = format!("the migration's journal cannot be written: {error}");
        RequestError::new(Category::Host, "journal", detail)
    }
}
