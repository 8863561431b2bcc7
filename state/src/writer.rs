//! Writing: from devices to bytes.

use std::collections::BTreeMap;

use crate::error::SaveError;
use crate::path::{InvalidPath, SectionPath};
use crate::{Saved, limits, wire};

/// Collects sections. The same sections give the same bytes in any order of writing.
#[derive(Debug, Default)]
pub struct Writer {
    sections: BTreeMap<SectionPath, (u16, Vec<u8>)>,
    len: usize,
}

impl Writer {
    /// Returns the scope to which the device of this name saves.
    ///
    /// # Errors
    /// `path` is not a valid path.
    pub fn scope(&mut self, path: &str) -> Result<Scope<'_>, InvalidPath> {
        Ok(Scope {
            path: SectionPath::new(path)?,
            writer: self,
        })
    }

    fn put<T: Saved>(&mut self, path: &SectionPath, state: &T) -> Result<(), SaveError> {
        let mut body = Vec::new();
        ciborium::into_writer(state, &mut body).map_err(|error| SaveError::Encode {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        if body.len() > limits::SECTION_LEN {
            return Err(SaveError::TooLong { path: path.clone() });
        }
        if self.sections.contains_key(path) {
            return Err(SaveError::Duplicate(path.clone()));
        }
        let len = self.len + body.len();
        if len > limits::TOTAL_LEN || self.sections.len() == limits::SECTIONS {
            return Err(SaveError::TooMuch { path: path.clone() });
        }
        self.len = len;
        self.sections.insert(path.clone(), (T::VERSION, body));
        Ok(())
    }

    /// Returns the bytes of all sections.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "`put` and `SectionPath` keep counts and lengths below their limits"
    )]
    pub fn finish(self) -> Vec<u8> {
        let mut bytes = wire::header(self.sections.len() as u32);
        for (path, (version, body)) in self.sections {
            let path = path.as_str().as_bytes();
            bytes.extend((path.len() as u16).to_le_bytes());
            bytes.extend(version.to_le_bytes());
            bytes.extend((body.len() as u32).to_le_bytes());
            bytes.extend(wire::section_crc(version, path, &body).to_le_bytes());
            bytes.extend(path);
            bytes.extend(body);
        }
        bytes
    }
}

/// The part of a [`Writer`] below one path.
#[derive(Debug)]
pub struct Scope<'a> {
    writer: &'a mut Writer,
    path: SectionPath,
}

impl Scope<'_> {
    /// Writes the section at this path.
    ///
    /// # Errors
    /// The section exists already, or exceeds a limit.
    pub fn put<T: Saved>(&mut self, state: &T) -> Result<(), SaveError> {
        self.writer.put(&self.path, state)
    }

    /// Returns the scope of a part.
    ///
    /// # Errors
    /// `path` is not a valid path.
    pub fn child(&mut self, name: &str) -> Result<Scope<'_>, InvalidPath> {
        Ok(Scope {
            path: self.path.join(name)?,
            writer: self.writer,
        })
    }
}
