//! Reading: from bytes to devices.

use std::collections::BTreeMap;

use crate::error::{LoadError, OpenError};
use crate::path::{InvalidPath, SectionPath};
use crate::wire::{self, Cursor};
use crate::{Saved, limits};

/// Saved state that was checked as a whole and hands each section out once. It borrows the bytes and
/// holds only an index of them.
#[derive(Debug)]
pub struct Store<'a> {
    /// Version and body; `None` once the section was taken.
    sections: BTreeMap<SectionPath, Option<(u16, &'a [u8])>>,
}

impl<'a> Store<'a> {
    /// Checks header, limits, names and checksums.
    ///
    /// # Errors
    /// One of them is wrong. Nothing can be loaded then.
    pub fn open(bytes: &'a [u8]) -> Result<Self, OpenError> {
        let mut cursor = Cursor(bytes);
        if cursor.array() != Some(wire::MAGIC) {
            return Err(OpenError::NotState);
        }
        let count = header(&mut cursor)?;
        let most = limits::SECTIONS;
        bounded("sections", u64::from(count), most)?;
        let (mut sections, mut total) = (BTreeMap::new(), 0);
        for _ in 0..count {
            let (path, version, body) = section(&mut cursor)?;
            total += body.len();
            bounded("bytes in sections", total as u64, limits::TOTAL_LEN)?;
            if sections
                .insert(path.clone(), Some((version, body)))
                .is_some()
            {
                return Err(OpenError::Duplicate(path));
            }
        }
        match cursor.0.len() {
            0 => Ok(Self { sections }),
            more => Err(OpenError::Trailing(more)),
        }
    }

    /// Returns the scope from which the device of this name loads.
    ///
    /// # Errors
    /// `path` is not a valid path.
    pub fn scope(&mut self, path: &str) -> Result<LoadScope<'_, 'a>, InvalidPath> {
        Ok(LoadScope {
            path: SectionPath::new(path)?,
            store: self,
        })
    }

    /// Returns the paths of sections that have not been taken, in their order.
    pub fn remaining(&self) -> impl Iterator<Item = &SectionPath> {
        let left = self.sections.iter().filter(|(_, body)| body.is_some());
        left.map(|(path, _)| path)
    }

    /// Ends the load.
    ///
    /// # Errors
    /// A section was not taken.
    pub fn finish(self) -> Result<(), LoadError> {
        let mut left = self.remaining();
        match left.next() {
            None => Ok(()),
            Some(first) => Err(LoadError::LeftOver {
                first: first.clone(),
                more: left.count(),
            }),
        }
    }

    fn take(&mut self, path: &SectionPath) -> Result<Section<'a>, LoadError> {
        let slot = self.sections.get_mut(path);
        let slot = slot.ok_or_else(|| LoadError::Missing(path.clone()))?;
        let (version, body) = slot.take().ok_or_else(|| LoadError::Taken(path.clone()))?;
        Ok(Section {
            path: path.clone(),
            version,
            body,
        })
    }
}

fn bounded(what: &'static str, found: u64, most: usize) -> Result<(), OpenError> {
    if found > most as u64 {
        return Err(OpenError::TooMuch { what, found, most });
    }
    Ok(())
}

/// Reads the header behind the magic number, and returns the number of sections.
fn header(cursor: &mut Cursor<'_>) -> Result<u32, OpenError> {
    let truncated = || OpenError::Truncated("the header");
    let found = cursor.u32().ok_or_else(truncated)?;
    let known = wire::FORMAT;
    // Checked before the checksum: another format may have it elsewhere.
    if found != known {
        return Err(OpenError::Format { found, known });
    }
    let count = cursor.u32().ok_or_else(truncated)?;
    let crc: [u8; 4] = cursor.array().ok_or_else(truncated)?;
    if !wire::header(count).ends_with(&crc) {
        return Err(OpenError::Checksum("the header".into()));
    }
    Ok(count)
}

fn section<'a>(cursor: &mut Cursor<'a>) -> Result<(SectionPath, u16, &'a [u8]), OpenError> {
    let truncated = || OpenError::Truncated("a section");
    let path_len = cursor.u16().ok_or_else(truncated)?;
    let version = cursor.u16().ok_or_else(truncated)?;
    let body_len = cursor.u32().ok_or_else(truncated)?;
    let crc = cursor.u32().ok_or_else(truncated)?;
    bounded("bytes of a path", u64::from(path_len), limits::PATH_LEN)?;
    bounded(
        "bytes in a section",
        u64::from(body_len),
        limits::SECTION_LEN,
    )?;
    let path = cursor.bytes(usize::from(path_len)).ok_or_else(truncated)?;
    let body = cursor.bytes(body_len as usize).ok_or_else(truncated)?;
    let name = String::from_utf8_lossy(path);
    if crc != wire::section_crc(version, path, body) {
        return Err(OpenError::Checksum(format!("section {name:?}")));
    }
    Ok((SectionPath::new(&name)?, version, body))
}

/// A section that was taken from a [`Store`].
#[derive(Debug)]
pub struct Section<'a> {
    path: SectionPath,
    version: u16,
    body: &'a [u8],
}

impl Section<'_> {
    /// Returns the section's path.
    #[must_use]
    pub fn path(&self) -> &SectionPath {
        &self.path
    }

    /// Returns the version of the type that was saved.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Decodes the section, and converts it from an earlier version if it has one.
    ///
    /// # Errors
    /// The version is not supported, or the body does not match it.
    pub fn read<T: Saved>(&self) -> Result<T, LoadError> {
        if self.version > T::VERSION {
            return Err(self.unknown_version(T::VERSION));
        }
        if self.version < T::VERSION {
            // The first version reports itself as the latest supported one: correct that here.
            return T::older(self).map_err(|error| match error {
                LoadError::Version { .. } => self.unknown_version(T::VERSION),
                other => other,
            });
        }
        let mut rest = self.body;
        let state = ciborium::de::from_reader_with_recursion_limit(&mut rest, limits::NESTING)
            .map_err(|error| self.undecodable(error.to_string()))?;
        match rest.len() {
            0 => Ok(state),
            more => Err(self.undecodable(format!("{more} bytes follow the state"))),
        }
    }

    /// Returns the error for a version later than `latest`.
    #[must_use]
    pub fn unknown_version(&self, latest: u16) -> LoadError {
        LoadError::Version {
            path: self.path.clone(),
            found: self.version,
            latest,
        }
    }

    fn undecodable(&self, reason: String) -> LoadError {
        LoadError::Decode {
            path: self.path.clone(),
            version: self.version,
            reason,
        }
    }
}

/// A copy of the sections of a device. A device that has loaded it, and was not used since, has nothing to
/// load from sections that are [the same](LoadScope::take_same).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionCopy(Vec<(SectionPath, u16, Vec<u8>)>);

/// The part of a [`Store`] below one path.
#[derive(Debug)]
pub struct LoadScope<'s, 'a> {
    store: &'s mut Store<'a>,
    path: SectionPath,
}

impl<'a> LoadScope<'_, 'a> {
    /// Takes the section at this path and decodes it.
    ///
    /// # Errors
    /// The section is missing, was taken already, or cannot be decoded.
    pub fn take<T: Saved>(&mut self) -> Result<T, LoadError> {
        self.store.take(&self.path)?.read()
    }

    /// Takes the section of this place if there is one: for state that not every VM has, or that
    /// earlier versions did not save.
    ///
    /// # Errors
    /// Fails if the section was taken already or cannot be read.
    pub fn take_if_there<T: Saved>(&mut self) -> Result<Option<T>, LoadError> {
        if !self.store.sections.contains_key(&self.path) {
            return Ok(None);
        }
        self.take().map(Some)
    }

    /// The sections of this place and its parts that have not been taken, with versions and bodies.
    fn rest(&self) -> impl Iterator<Item = (&SectionPath, u16, &[u8])> {
        // Other names may stand between a path and its parts: `a`, `a-b`, `a/b`.
        let parts = self.path.parts();
        let (own, below) = (&self.store.sections, &self.store.sections);
        let own = own.get_key_value(&self.path).into_iter();
        let below = below.range(parts.clone()..);
        let below = below.take_while(move |(path, _)| path.as_str().starts_with(parts.as_str()));
        own.chain(below)
            .filter_map(|(path, slot)| slot.map(|(version, body)| (path, version, body)))
    }

    /// Copies the sections of this place and its parts, which stay.
    #[must_use]
    pub fn copy(&self) -> SectionCopy {
        let rest = self.rest();
        SectionCopy(
            rest.map(|(path, version, body)| (path.clone(), version, body.to_vec()))
                .collect(),
        )
    }

    /// Takes the sections of this place and its parts if all of them are as in `copy`, and returns whether
    /// they are.
    pub fn take_same(&mut self, copy: &SectionCopy) -> bool {
        let known = copy.0.iter();
        let known = known.map(|(path, version, body)| (path, *version, body.as_slice()));
        let is_same = self.rest().eq(known);
        if is_same {
            for (path, ..) in &copy.0 {
                if let Some(slot) = self.store.sections.get_mut(path) {
                    *slot = None;
                }
            }
        }
        is_same
    }

    /// Returns the scope of a part.
    ///
    /// # Errors
    /// `path` is not a valid path.
    pub fn child(&mut self, name: &str) -> Result<LoadScope<'_, 'a>, InvalidPath> {
        Ok(LoadScope {
            path: self.path.join(name)?,
            store: self.store,
        })
    }

    /// Returns the error for a section at this path whose values are invalid.
    #[must_use]
    pub fn refuse(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Refused {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }
}
