//! From devices to bytes.

use std::collections::BTreeMap;

use crate::error::SaveError;
use crate::path::{InvalidPath, SectionPath};
use crate::{Saved, limits, wire};

/// Collects sections. The same sections give the same bytes, in whatever order they came.
#[derive(Debug, Default)]
pub struct Writer {
    sections: BTreeMap<SectionPath, (u16, Vec<u8>)>,
    len: usize,
}

impl Writer {
    /// Where the device of this name saves.
    ///
    /// # Errors
    /// When it is no name.
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

    /// The bytes of all sections.
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

/// A place in a [`Writer`] under one name.
#[derive(Debug)]
pub struct Scope<'a> {
    writer: &'a mut Writer,
    path: SectionPath,
}

impl Scope<'_> {
    /// Puts the section of this place.
    ///
    /// # Errors
    /// When there is one already, or it does not fit.
    pub fn put<T: Saved>(&mut self, state: &T) -> Result<(), SaveError> {
        self.writer.put(&self.path, state)
    }

    /// The place of a part.
    ///
    /// # Errors
    /// When it is no name.
    pub fn child(&mut self, name: &str) -> Result<Scope<'_>, InvalidPath> {
        Ok(Scope {
            path: self.path.join(name)?,
            writer: self.writer,
        })
    }
}
