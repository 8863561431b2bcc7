//! The files of a snapshot's memory: pages in any order, and their hashes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Instant;

use super::manifest::FileInfo;
use super::write::{Folder, Writing, host};
use super::{HASHES, MEMORY, ZEROS, hashes};
use crate::MigrationError;
use crate::pages::{Block, PAGE};
use crate::progress::{Progress, micros};

/// Receives the pages of a guest's memory, each once and in any order.
pub(super) trait PageSink {
    /// Takes neighbouring pages, of which the first has the number `first` in all of the memory.
    fn put(&mut self, first: usize, content: &[u8]) -> Result<(), MigrationError>;
}

/// The memory and the hashes while they are written. Each page is put once.
pub(super) struct MemoryFile<'a> {
    memory: File,
    memory_path: PathBuf,
    hashes: File,
    hashes_path: PathBuf,
    /// The hash of each page that was put.
    marks: Vec<u64>,
    /// The hashes of the base's pages; empty without a base.
    base: Vec<u64>,
    put: u64,
    progress: &'a Progress,
    /// When the first page was put.
    begun: Option<Instant>,
}

/// The place of a page's content.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zeros,
    /// The base has a page of the same hash at this place.
    OfBase,
    Own,
}

impl<'a> MemoryFile<'a> {
    pub(super) fn create(
        folder: &mut Folder,
        blocks: &[Block],
        writing: &Writing<'a>,
    ) -> Result<Self, MigrationError> {
        let progress = writing.progress;
        let base = match writing.base {
            Some(base) => base.all_marks(blocks, writing.decision),
            None => Ok(Vec::new()),
        };
        let base = base.map_err(|error| {
            let why = error.refusal();
            MigrationError::here("base-mismatch", format!("the base: {}", why.detail))
        })?;
        let (memory, memory_path) = folder.create(MEMORY)?;
        let (hashes, hashes_path) = folder.create(HASHES)?;
        let total: usize = blocks.iter().map(|block| block.ram.len()).sum();
        memory
            .set_len(total as u64)
            .map_err(|error| host("write", &memory_path, &error))?;
        progress.update(|report| {
            report.memory_bytes = total as u64;
            report.remaining_pages = (total / PAGE) as u64;
        });
        Ok(Self {
            memory,
            memory_path,
            hashes,
            hashes_path,
            marks: vec![ZEROS; total / PAGE],
            base,
            put: 0,
            progress,
            begun: None,
        })
    }

    /// Writes the hashes, and makes both files durable.
    pub(super) fn finish(self) -> Result<FileInfo, MigrationError> {
        let marks = self.marks.iter();
        let bytes: Vec<u8> = marks.flat_map(|mark| mark.to_le_bytes()).collect();
        let written = |file: &File| -> io::Result<()> {
            file.set_len(bytes.len() as u64)?;
            for (index, part) in bytes.chunks(PAGE).enumerate() {
                // The hashes of memory that is not plugged are holes, too.
                if part.iter().any(|byte| *byte != 0) {
                    file.write_all_at(part, (index * PAGE) as u64)?;
                }
            }
            file.sync_all()
        };
        written(&self.hashes).map_err(|error| host("write", &self.hashes_path, &error))?;
        self.memory
            .sync_all()
            .map_err(|error| host("write", &self.memory_path, &error))?;
        Ok(FileInfo::of(&bytes))
    }
}

impl PageSink for MemoryFile<'_> {
    fn put(&mut self, first: usize, content: &[u8]) -> Result<(), MigrationError> {
        let pages = content.len() / PAGE;
        let end = first.saturating_add(pages);
        let marks = self.marks.get_mut(first..end);
        let marks = marks.ok_or_else(|| MigrationError::here("machine-gone", "no memory"))?;
        for (mark, hash) in marks.iter_mut().zip(hashes(content)) {
            *mark = hash;
        }
        // Neighbouring pages with content in one write; pages of zeros and those of the base stay holes.
        let kinds = marks.iter().enumerate().map(|(page, mark)| match *mark {
            ZEROS => Kind::Zeros,
            mark if self.base.get(first + page) == Some(&mark) => Kind::OfBase,
            _ => Kind::Own,
        });
        let kinds: Vec<Kind> = kinds.collect();
        let mut page = 0;
        let (mut zeros, mut own) = (0, 0);
        for run in kinds.chunk_by(|a, b| a == b) {
            let range = page * PAGE..(page + run.len()) * PAGE;
            let at = ((first + page) * PAGE) as u64;
            page += run.len();
            match run[0] {
                Kind::OfBase => {}
                Kind::Zeros => zeros += run.len() as u64,
                Kind::Own => {
                    own += run.len() as u64;
                    self.memory
                        .write_all_at(&content[range], at)
                        .map_err(|error| host("write", &self.memory_path, &error))?;
                }
            }
        }
        let pages = pages as u64;
        self.put += pages;
        let rate = (self.put * PAGE as u64).saturating_mul(1_000_000);
        let begun = self.begun.get_or_insert_with(Instant::now);
        let rate = rate / micros(begun.elapsed()).max(1);
        self.progress.update(|report| {
            report.zero_pages += zeros;
            report.pages += own;
            report.sent_bytes += own * PAGE as u64;
            report.remaining_pages = report.remaining_pages.saturating_sub(pages);
            report.bytes_per_second = rate;
        });
        Ok(())
    }
}
