//! The state of a TPM: the registers, and what swtpm keeps.
//!
//! ```text
//!   swtpm ── snapshot ──► TpmSnapshot ── save ══ bytes ══► load ──► LoadedTpm ── install ──► swtpm
//! ```
//!
//! `snapshot` and `install` wait for swtpm, another process, and belong on a thread that may wait.
//! Saving and loading wait for nothing. The TPM that was saved continues until its machine ends, so
//! that its guest can stay where it is.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use state::{LoadError, LoadScope, Save, SaveError, Saved, Scope};

use super::{BUFFER_LEN, Emulator, Registers, Tpm, TpmError};

/// Bytes of one kind of state that are moved at most: a TPM of libtpms has 128 KiB of memory for what
/// is permanent.
pub(super) const MAX_BLOB_LEN: usize = 256 << 10;

// All three, and the registers, are one section.
const _: () = assert!(3 * MAX_BLOB_LEN + 2 * BUFFER_LEN < state::limits::SECTION_LEN);

/// State of one kind, as swtpm gave it.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Blob {
    is_encrypted: bool,
    bytes: ByteBuf,
}

impl Blob {
    pub(super) fn new(is_encrypted: bool, bytes: Vec<u8>) -> Self {
        Self {
            is_encrypted,
            bytes: ByteBuf::from(bytes),
        }
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.is_encrypted
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// All that swtpm keeps of a TPM.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Blobs {
    pub(super) permanent: Blob,
    pub(super) volatile: Blob,
    pub(super) saved: Blob,
}

/// Saved state, version 1. Frozen. No command is in progress.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    is_assigned: bool,
    is_idle: bool,
    has_failed: bool,
    buffer: ByteBuf,
    emulator: Blobs,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

/// A TPM as it was at one moment.
#[derive(Clone)]
pub struct TpmSnapshot(V1);

impl fmt::Debug for TpmSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The guest's secrets do not belong in a log.
        f.write_str("TpmSnapshot")
    }
}

impl Save for TpmSnapshot {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        to.put(&self.0)
    }
}

impl Tpm {
    /// Waits until no command is in progress, for `patience` at most. The guest may start the next.
    pub fn wait_idle(&self, patience: Duration) {
        self.shared.wait_idle(Instant::now() + patience);
    }

    /// Reads the state of the TPM and of its registers. If the guest is not paused, they may be of
    /// different moments. Waits for a command in progress, for `patience` at most.
    ///
    /// # Errors
    /// Fails if the command takes longer, or swtpm refuses to hand out its state or is gone.
    pub fn snapshot(&self, patience: Duration) -> Result<TpmSnapshot, TpmError> {
        let deadline = Instant::now() + patience;
        if !self.shared.wait_idle(deadline) {
            return Err(self.emulator.busy(patience));
        }
        // Before the registers are locked: swtpm may take seconds, and a vCPU that polls a register
        // must not wait for it.
        let emulator = self.emulator.state(patience, deadline)?;
        let state = self.shared.state.lock();
        Ok(TpmSnapshot(V1 {
            is_assigned: state.is_assigned,
            is_idle: state.is_idle,
            has_failed: state.has_failed,
            buffer: ByteBuf::from(&state.buffer[..]),
            emulator,
        }))
    }

    /// Reads saved state and checks it. The registers change with [`LoadedTpm::install`].
    ///
    /// # Errors
    /// The state is missing, or cannot be that of a TPM.
    pub fn load(&self, from: &mut LoadScope<'_, '_>) -> Result<LoadedTpm, LoadError> {
        let saved: V1 = from.take()?;
        if saved.buffer.len() != BUFFER_LEN {
            let len = saved.buffer.len();
            let why = format!("a TPM's buffer of {len} bytes, not {BUFFER_LEN}");
            return Err(from.refuse(why));
        }
        let Blobs {
            permanent,
            volatile,
            saved: shutdown,
        } = &saved.emulator;
        let blobs = [permanent, volatile, shutdown];
        if let Some(blob) = blobs.iter().find(|blob| blob.bytes.len() > MAX_BLOB_LEN) {
            let len = blob.bytes.len();
            let why = format!("{len} bytes of a TPM's state, more than {MAX_BLOB_LEN}");
            return Err(from.refuse(why));
        }
        if permanent.bytes.is_empty() {
            // swtpm would make another TPM.
            return Err(from.refuse("a TPM without permanent state"));
        }
        Ok(LoadedTpm {
            saved,
            registers: Arc::clone(&self.shared),
            emulator: Arc::clone(&self.emulator),
        })
    }
}

/// State that was loaded, and that the TPM does not have yet.
#[must_use = "the TPM continues from this state only after `install`"]
pub struct LoadedTpm {
    saved: V1,
    registers: Arc<Registers>,
    emulator: Arc<Emulator>,
}

impl fmt::Debug for LoadedTpm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoadedTpm")
    }
}

impl LoadedTpm {
    /// Gives the TPM this state, in place of all that it had. The guest is paused.
    ///
    /// # Errors
    /// Fails if swtpm does not take the state, or is gone. The TPM is of no use then.
    pub fn install(self) -> Result<(), TpmError> {
        self.emulator.replace_state(&self.saved.emulator)?;
        let mut state = self.registers.state.lock();
        state.is_assigned = self.saved.is_assigned;
        state.is_idle = self.saved.is_idle;
        state.has_failed = self.saved.has_failed;
        state.is_busy = false;
        // The lengths are equal: `load` has checked them.
        let bytes = state.buffer.iter_mut().zip(self.saved.buffer);
        bytes.for_each(|(to, from)| *to = from);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use state::{Store, Writer};

    use super::*;

    fn saved(bytes: usize) -> V1 {
        let blob = |len: usize, seed: u8| Blob::new(false, vec![seed; len]);
        V1 {
            is_assigned: true,
            is_idle: true,
            has_failed: false,
            buffer: ByteBuf::from(vec![0x5a; BUFFER_LEN]),
            emulator: Blobs {
                permanent: blob(bytes, 1),
                volatile: blob(40, 2),
                saved: blob(0, 0),
            },
        }
    }

    /// The bytes of version 1, which are read for ever.
    #[test]
    fn saved_state_is_stable() {
        let save = |saved: V1| {
            let mut writer = Writer::default();
            let mut scope = writer.scope("tpm").unwrap();
            TpmSnapshot(saved).save(&mut scope).unwrap();
            writer.finish()
        };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tpm.v1");
        if !path.exists() && std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, save(saved(80))).unwrap();
        }
        let golden = fs::read(path).unwrap();
        assert!(golden == save(saved(80)));
        let mut store = Store::open(&golden).unwrap();
        let read: V1 = store.scope("tpm").unwrap().take().unwrap();
        store.finish().unwrap();
        assert!(golden == save(read));
    }
}
