//! Reading a snapshot.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use memory::PageBuffer;
use serde_bytes::ByteBuf;
use xxhash_rust::xxh3::Xxh3;

use super::files::{Folder, check_size};
use super::manifest::{BaseInfo, MAX_MANIFEST, Manifest};
use super::working_set::{MAX_FILE, WorkingSet};
use super::{CHUNK, HASHES, MACHINE, MANIFEST, MEMORY, STATE, VERSION, WORKING_SET, ZEROS, hash};
use crate::decision::Decision;
use crate::message::{BlockInfo, Offer, Refusal};
use crate::pages::{Block, PAGE};
use crate::progress::Progress;

/// Snapshots below an incremental one at most.
const MAX_CHAIN: usize = 32;

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A file cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The manifest is of another format.
    #[error("this is no snapshot of whimbrel: its format is {0:?}")]
    Foreign(String),
    /// The manifest is of a version that this program does not read.
    #[error(
        "the snapshot has version {0} of the format; this program reads versions 1 to {VERSION}"
    )]
    Version(u32),
    /// The content contradicts the manifest, or the manifest itself.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
    /// A base is missing, is another snapshot than the manifest says, or cannot be used.
    #[error("the snapshot is incremental: {0}")]
    Base(String),
    /// Restoring was canceled.
    #[error("restoring was canceled")]
    Canceled,
}

impl RestoreError {
    /// Returns the error in the form of a report, with a stable code.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        let code = match self {
            Self::Host { .. } => "snapshot-unreadable",
            Self::Foreign(_) => "not-a-snapshot",
            Self::Version(_) => "snapshot-version",
            Self::Damaged(_) => "snapshot-damaged",
            Self::Base(_) => "snapshot-base",
            Self::Canceled => "canceled",
        };
        Refusal::new(code, self.to_string())
    }
}

/// A snapshot whose manifest, machine and state were read and checked.
#[derive(Debug)]
pub struct Snapshot {
    manifest: Manifest,
    machine: Vec<u8>,
    state: Vec<u8>,
    memory: File,
    /// Absent if the snapshot is in memory, where nothing damages it.
    hashes: Option<File>,
    dir: PathBuf,
    base: Option<Box<Snapshot>>,
    /// The images of the disks in the manifest, in their order.
    disks: Vec<File>,
    /// The pages that a guest touches first, if they were recorded.
    working_set: Option<WorkingSet>,
}

impl Snapshot {
    /// Opens the snapshot in a folder. Checks everything but the pages of memory and their hashes, which
    /// are checked by what reads them, and the content of disks ([`Snapshot::verify_disks`]).
    ///
    /// # Errors
    /// A file is missing, has another size or content than the manifest says, or the manifest is refused.
    pub fn open(dir: &Path) -> Result<Self, RestoreError> {
        let mut snapshot = Self::open_layer(dir, MAX_CHAIN)?;
        snapshot.working_set = read_working_set(&snapshot);
        Ok(snapshot)
    }

    fn open_layer(dir: &Path, more: usize) -> Result<Self, RestoreError> {
        let (folder, manifest) = read_manifest(dir)?;
        let machine = folder.content(MACHINE, &manifest.machine)?;
        let state = folder.content(STATE, &manifest.state)?;
        let memory_size = manifest.memory_size().unwrap_or(u64::MAX);
        let (memory, size) = folder.file(MEMORY)?;
        check_size(MEMORY, size, memory_size)?;
        let (hashes, size) = folder.file(HASHES)?;
        check_size(HASHES, size, memory_size / PAGE as u64 * 8)?;
        let base = match &manifest.base {
            Some(_) if more == 0 => {
                let why = format!("it is based on more than {MAX_CHAIN} others");
                return Err(RestoreError::Base(why));
            }
            Some(base) => Some(Box::new(open_base(dir, base, &manifest, more - 1)?)),
            None => None,
        };
        let disks = match more {
            MAX_CHAIN => folder.disk_images(&manifest.disks)?,
            // Those of a base are of another moment.
            _ => Vec::new(),
        };
        Ok(Self {
            base,
            disks,
            manifest,
            machine,
            state,
            memory,
            hashes: Some(hashes),
            dir: dir.to_owned(),
            // That of a base is of another moment.
            working_set: None,
        })
    }

    /// A snapshot that is in memory: it can be mapped only.
    pub(super) fn in_memory(
        manifest: Manifest,
        machine: Vec<u8>,
        state: Vec<u8>,
        memory: File,
    ) -> Self {
        Self {
            manifest,
            machine,
            state,
            memory,
            hashes: None,
            dir: PathBuf::new(),
            base: None,
            disks: Vec::new(),
            working_set: None,
        }
    }

    /// The images of the disks in the manifest, in their order.
    pub(super) fn disk_images(&self) -> &[File] {
        &self.disks
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The pages that a guest touches first, if they were recorded.
    #[must_use]
    pub fn working_set(&self) -> Option<&WorkingSet> {
        self.working_set.as_ref()
    }

    /// The description of the machine.
    pub(super) fn machine(&self) -> &[u8] {
        &self.machine
    }

    /// The state of vCPUs and devices.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Returns the offer of the machine, as a migration's source would make it.
    #[must_use]
    pub fn offer(&self) -> Offer {
        let block = |block: &BlockInfo| BlockInfo {
            name: block.name.clone(),
            size: block.size,
        };
        Offer {
            vm: self.manifest.vm.clone(),
            machine: ByteBuf::from(self.machine.clone()),
            blocks: self.manifest.memory.iter().map(block).collect(),
            connections: 1,
            postcopy: false,
            given: false,
            verify: false,
            disks: Vec::new(),
        }
    }

    pub(super) fn unreadable(&self, name: &str, source: io::Error) -> RestoreError {
        RestoreError::Host {
            path: self.dir.join(name),
            source,
        }
    }

    /// The hashes are checked as a whole, and then trusted: a page is checked against them by itself.
    pub(super) fn check_hashes(&self, decision: &Decision) -> Result<(), RestoreError> {
        self.read_hashes(decision, |_, _| Ok(()))
    }

    /// Reads all hashes in their order, and checks them as a whole at the end. `take` gets them in parts: the
    /// offset into the file, and the content.
    pub(super) fn read_hashes<E: From<RestoreError>>(
        &self,
        decision: &Decision,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut all, mut position) = (Xxh3::new(), 0);
        let mut buffer = PageBuffer::new(CHUNK * PAGE);
        while position < self.manifest.hashes.size {
            if decision.is_canceled() {
                return Err(RestoreError::Canceled.into());
            }
            let left = self.manifest.hashes.size - position;
            let len = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let part = &mut buffer[..len];
            let read = self.hashes()?.read_exact_at(part, position);
            read.map_err(|error| self.unreadable(HASHES, error))?;
            all.update(part);
            take(position, part)?;
            position += len as u64;
        }
        if all.digest() != self.manifest.hashes.hash {
            return Err(damaged(HASHES).into());
        }
        Ok(())
    }

    /// Copies the memory into the blocks of a new machine, which are all zeros, and checks each page.
    ///
    /// # Errors
    /// A page differs from its hash, the host cannot read, or restoring was canceled.
    pub fn fill(
        &self,
        blocks: &[Block],
        progress: &Progress,
        decision: &Decision,
    ) -> Result<(), RestoreError> {
        self.check_blocks(blocks)?;
        self.check_hashes(decision)?;
        self.read_all(progress, decision, |block, offset, content| {
            let block = blocks.get(block).ok_or_else(|| damaged(MEMORY))?;
            let slice = block.ram.slice(offset, content.len());
            slice.ok_or_else(|| damaged(MEMORY))?.copy_from(content);
            Ok(())
        })
    }

    /// Checks all of the memory against its hashes.
    ///
    /// # Errors
    /// A page differs from its hash, the host cannot read, or restoring was canceled.
    pub fn verify(&self, progress: &Progress, decision: &Decision) -> Result<(), RestoreError> {
        self.check_hashes(decision)?;
        self.read_all(progress, decision, |_, _, _| Ok(()))
    }

    /// Checks that a machine has the blocks of memory that the snapshot has.
    pub(super) fn check_blocks(&self, blocks: &[Block]) -> Result<(), RestoreError> {
        let sizes = self.manifest.memory.iter().map(|block| block.size);
        if sizes.eq(blocks.iter().map(|block| block.ram.len() as u64)) {
            return Ok(());
        }
        let why = "the machine has other blocks of memory than the snapshot".to_owned();
        Err(RestoreError::Damaged(why))
    }

    /// Reads all of the memory in its order, checks each page, and gives neighbouring pages with content
    /// to `take`: the block's index, the offset into it, and the content.
    pub(super) fn read_all<E: From<RestoreError>>(
        &self,
        progress: &Progress,
        decision: &Decision,
        mut take: impl FnMut(usize, usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let total = self.manifest.memory_size().unwrap_or(0);
        progress.update(|report| {
            report.memory_bytes = total;
            report.remaining_pages = total / PAGE as u64;
        });
        let begun = Instant::now();
        let mut position = 0;
        let mut buffer = PageBuffer::new(CHUNK * PAGE);
        for (index, block) in self.manifest.memory.iter().enumerate() {
            let size = usize::try_from(block.size).map_err(|_| damaged(MEMORY))?;
            for offset in (0..size).step_by(buffer.len()) {
                if decision.is_canceled() {
                    return Err(RestoreError::Canceled.into());
                }
                let len = buffer.len().min(size - offset);
                let at = Place {
                    block: index,
                    offset,
                    position,
                };
                let full = self.read(at, &mut buffer[..len], &mut take)?;
                position += len as u64;
                let pages = (len / PAGE) as u64;
                let us = u64::try_from(begun.elapsed().as_micros())
                    .unwrap_or(u64::MAX)
                    .max(1);
                progress.update(|report| {
                    report.pages += full;
                    report.zero_pages += pages - full;
                    report.sent_bytes += full * PAGE as u64;
                    report.verified_pages += pages;
                    report.remaining_pages = report.remaining_pages.saturating_sub(pages);
                    report.bytes_per_second = position.saturating_mul(1_000_000) / us;
                });
            }
        }
        Ok(())
    }

    /// Reads neighbouring pages, at most [`CHUNK`], and checks those that are not zeros, which `take`
    /// gets. Returns their number.
    pub(super) fn read<E: From<RestoreError>>(
        &self,
        at: Place,
        buffer: &mut [u8],
        mut take: impl FnMut(usize, usize, &[u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        let marks = self.marks(at.position / PAGE as u64, buffer.len() / PAGE)?;
        let (mut page, mut full) = (0, 0);
        for run in marks.chunk_by(|a, b| (*a == ZEROS) == (*b == ZEROS)) {
            let range = page * PAGE..(page + run.len()) * PAGE;
            page += run.len();
            if run.first() == Some(&ZEROS) {
                continue;
            }
            let content = buffer.get_mut(range.clone());
            let content = content.ok_or_else(|| damaged(MEMORY))?;
            self.read_content(content, at.position + range.start as u64, run)?;
            let mut pages = content.chunks_exact(PAGE).zip(run);
            if let Some(index) = pages.position(|(page, mark)| hash(page) != *mark) {
                let name = self.manifest.memory.get(at.block);
                let name = name.map_or("", |block| block.name.as_str());
                let number = (at.offset + range.start) / PAGE + index;
                let why = format!("page {number} of {name} differs from its hash");
                return Err(RestoreError::Damaged(why).into());
            }
            take(at.block, at.offset + range.start, content)?;
            full += run.len() as u64;
        }
        Ok(full)
    }

    /// Reads neighbouring pages that are not zeros: from the base if that has a page of the same hash
    /// there, else from the file.
    fn read_content(
        &self,
        content: &mut [u8],
        position: u64,
        marks: &[u64],
    ) -> Result<(), RestoreError> {
        let own = |content: &mut [u8], position| {
            let read = self.memory.read_exact_at(content, position);
            read.map_err(|error| self.unreadable(MEMORY, error))
        };
        let Some(base) = &self.base else {
            return own(content, position);
        };
        let of_base = base.marks(position / PAGE as u64, marks.len())?;
        let same: Vec<bool> = marks.iter().zip(&of_base).map(|(a, b)| a == b).collect();
        let mut page = 0;
        for run in same.chunk_by(|a, b| a == b) {
            let range = page * PAGE..(page + run.len()) * PAGE;
            let at = position + range.start as u64;
            let part = content.get_mut(range).ok_or_else(|| damaged(MEMORY))?;
            if run.first() == Some(&true) {
                base.read_content(part, at, &of_base[page..page + run.len()])?;
            } else {
                own(part, at)?;
            }
            page += run.len();
        }
        Ok(())
    }

    /// Describes the snapshot in the manifest of one that is based on it.
    pub(super) fn as_base(&self) -> BaseInfo {
        BaseInfo {
            id: self.manifest.id,
            dir: self.dir.clone(),
        }
    }

    /// Reads all hashes, for a snapshot of these blocks that is based on this one.
    pub(super) fn all_marks(
        &self,
        blocks: &[Block],
        decision: &Decision,
    ) -> Result<Vec<u64>, RestoreError> {
        let ours = self.manifest.memory.iter();
        let ours = ours.map(|block| (block.name.as_str(), block.size));
        if !ours.eq(blocks
            .iter()
            .map(|block| (block.name.as_str(), block.ram.len() as u64)))
        {
            let why = "the VM has other blocks of memory than its base".to_owned();
            return Err(RestoreError::Base(why));
        }
        self.check_hashes(decision)?;
        let pages = self.manifest.hashes.size / 8;
        let mut all = Vec::new();
        for first in (0..pages).step_by(CHUNK) {
            let count = (pages - first).min(CHUNK as u64);
            all.extend(self.marks(first, usize::try_from(count).unwrap_or(CHUNK))?);
        }
        Ok(all)
    }

    /// Reads the hashes of neighbouring pages, at most [`CHUNK`], from a page of the file on.
    pub(super) fn marks(&self, first: u64, count: usize) -> Result<Vec<u64>, RestoreError> {
        let mut raw = [0; CHUNK * 8];
        let raw = raw.get_mut(..count * 8).ok_or_else(|| damaged(HASHES))?;
        let read = self.hashes()?.read_exact_at(raw, first * 8);
        read.map_err(|error| self.unreadable(HASHES, error))?;
        let (marks, _) = raw.as_chunks::<8>();
        Ok(marks.iter().map(|mark| u64::from_le_bytes(*mark)).collect())
    }

    fn hashes(&self) -> Result<&File, RestoreError> {
        self.hashes.as_ref().ok_or_else(|| damaged(HASHES))
    }

    /// The file of the memory, to map it.
    pub(super) fn memory(&self) -> Result<File, RestoreError> {
        if self.base.is_some() {
            let why = "its memory is in several files, which cannot be mapped as one (`Map`)";
            return Err(RestoreError::Base(why.to_owned()));
        }
        let duplicate = self.memory.try_clone();
        duplicate.map_err(|error| self.unreadable(MEMORY, error))
    }
}

/// Reads the working set beside a snapshot. One that cannot be used is only logged: without it the restore
/// is slower, and right.
fn read_working_set(snapshot: &Snapshot) -> Option<WorkingSet> {
    let read = || -> Result<WorkingSet, String> {
        let folder = Folder::open(&snapshot.dir).map_err(|error| error.to_string())?;
        let (file, size) = folder
            .file(WORKING_SET)
            .map_err(|error| error.to_string())?;
        if size > MAX_FILE {
            return Err(format!("it has {size} bytes, more than {MAX_FILE}"));
        }
        let mut text = Vec::new();
        // Bounded by the limit, since the file may grow.
        let read = file.take(MAX_FILE).read_to_end(&mut text);
        read.map_err(|error| error.to_string())?;
        let total = snapshot.manifest.memory_size().unwrap_or(0) / PAGE as u64;
        WorkingSet::parse(&text, snapshot.manifest.id, total)
    };
    let path = snapshot.dir.join(WORKING_SET);
    if path.symlink_metadata().is_err() {
        return None;
    }
    let unusable = |why: &String| {
        tracing::warn!(path = %path.display(), why, "the working set is not used");
    };
    read().inspect_err(unusable).ok()
}

/// Opens a snapshot's folder, and reads its manifest.
fn read_manifest(dir: &Path) -> Result<(Folder, Manifest), RestoreError> {
    let folder = Folder::open(dir)?;
    let (mut file, size) = folder.file(MANIFEST)?;
    if size > MAX_MANIFEST {
        let why = format!("the manifest has {size} bytes, more than {MAX_MANIFEST}");
        return Err(RestoreError::Damaged(why));
    }
    let mut text = Vec::new();
    // Bounded by the limit, since the file may grow.
    let read = (&mut file).take(MAX_MANIFEST).read_to_end(&mut text);
    read.map_err(|error| folder.unreadable(MANIFEST, error))?;
    let manifest = Manifest::parse(&text)?;
    Ok((folder, manifest))
}

/// Opens the base of the snapshot in `dir`: beside that folder, or where it was.
fn open_base(
    dir: &Path,
    info: &BaseInfo,
    manifest: &Manifest,
    more: usize,
) -> Result<Snapshot, RestoreError> {
    let beside = dir.parent().zip(info.dir.file_name());
    let beside = beside.map(|(parent, name)| parent.join(name));
    let places = beside.into_iter().chain([info.dir.clone()]);
    // By its manifest alone: opening each place in full would try all places of all bases below it.
    let is_it =
        |place: &PathBuf| read_manifest(place).is_ok_and(|(_, manifest)| manifest.id == info.id);
    let place = places.into_iter().find(is_it).ok_or_else(|| {
        let (id, dir) = (info.id, info.dir.display());
        RestoreError::Base(format!("its base {id} is neither at {dir} nor beside it"))
    })?;
    let found = Snapshot::open_layer(&place, more)?;
    if found.manifest.id != info.id {
        return Err(RestoreError::Base("its base was replaced".to_owned()));
    }
    let blocks = |of: &Manifest| -> Vec<(String, u64)> {
        let all = of.memory.iter();
        all.map(|block| (block.name.clone(), block.size)).collect()
    };
    if blocks(&found.manifest) != blocks(manifest) {
        let why = "its base has other blocks of memory".to_owned();
        return Err(RestoreError::Base(why));
    }
    // Its hashes decide where pages are read; each page is checked against those of the upper layer.
    Ok(found)
}

/// The place of pages.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// The index of their block.
    pub(super) block: usize,
    /// Their offset into the block.
    pub(super) offset: usize,
    /// Their offset into the file.
    pub(super) position: u64,
}

pub(super) fn damaged(name: &str) -> RestoreError {
    RestoreError::Damaged(format!("{name} differs from its hash"))
}
