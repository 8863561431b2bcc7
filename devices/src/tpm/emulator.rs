//! The connection to `swtpm`, the TPM emulator of QEMU, libvirt and Cloud Hypervisor.
//!
//! Two sockets reach it. Requests about the TPM as a device go to its control socket, which is a path
//! (swtpm_ioctls(3)). The guest's TPM commands go over a socket pair, of which one end is passed to it.
//! An swtpm that was started with `--terminate` ends when that pair is closed, so a connection is kept
//! over the resets of a VM.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::BUFFER_LEN;
use super::saved::{Blob, Blobs, MAX_BLOB_LEN};

/// How long swtpm may take for a request about the device.
const CONTROL_PATIENCE: Duration = Duration::from_secs(10);
/// How long swtpm may take for a command of the guest. The slowest makes RSA keys.
const COMMAND_PATIENCE: Duration = Duration::from_secs(300);

/// Requests (`CMD_...` of swtpm's `tpm_ioctl.h`).
const GET_CAPABILITY: u32 = 1;
const INIT: u32 = 2;
const GET_ESTABLISHED: u32 = 4;
const GET_STATE: u32 = 12;
const SET_STATE: u32 = 13;
const STOP: u32 = 14;
const SET_DATA_FD: u32 = 16;
const SET_BUFFER_SIZE: u32 = 17;

/// Capabilities (`PTM_CAP_...`) that are needed: those of the requests above.
const NEEDED: u64 = 1 | 1 << 2 | 1 << 10 | 1 << 12 | 1 << 13;
/// Capabilities that moving a TPM's state needs: [`GET_STATE`] and [`SET_STATE`].
const NEEDED_TO_MOVE: u64 = 1 << 8 | 1 << 9;
/// A flag of [`INIT`]: swtpm deletes the file of the volatile state once it has read it.
const DELETE_VOLATILE: u32 = 1;
/// Types of state (`PTM_BLOB_TYPE_...`): what outlives a loss of power, what does not, and what
/// TPM2_Shutdown(STATE) left.
const PERMANENT: u32 = 1;
const VOLATILE: u32 = 2;
const SAVED_STATE: u32 = 3;
/// A flag of state: swtpm has encrypted it, with the key of its option `--migration-key`.
const ENCRYPTED: u32 = 2;
/// A result (`TPM_RETRY`): there is no state of this type.
const NO_STATE: u32 = 0x800;

/// The header of a command and of a response: tag, length, code (TPM 2.0 Library, part 1, 18).
pub(super) const HEADER_LEN: usize = 10;

/// A TPM emulator that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the TPM emulator at {} cannot be used: {why}", path.display())]
pub struct TpmError {
    path: PathBuf,
    why: Why,
}

#[derive(Debug, thiserror::Error)]
enum Why {
    #[error(
        "{0}; start one for each VM by `swtpm socket --tpm2 --tpmstate dir=... --ctrl type=unixio,path=...`"
    )]
    Connect(io::Error),
    #[error("it did not answer the request to {0}: {1}")]
    Request(&'static str, io::Error),
    #[error("it refused to {0} (result {1:#x})")]
    Refused(&'static str, u32),
    #[error("it lacks capabilities that are needed ({:#x})", .0)]
    Lacks(u64),
    #[error("a command of the guest has been in progress for {} ms", .0.as_millis())]
    Busy(Duration),
    #[error("its state of {0} bytes is larger than the {MAX_BLOB_LEN} bytes that are moved")]
    State(u32),
    #[error("it did not answer an earlier request; a reboot of the VM does not help")]
    Broken,
    #[error("its buffer of {0} bytes is smaller than the {BUFFER_LEN} bytes of the guest's")]
    Buffer(u32),
}

/// A TPM emulator. It is a guest's as long as this exists.
pub struct Emulator {
    path: PathBuf,
    control: Mutex<Control>,
    data: Mutex<UnixStream>,
    capabilities: u64,
    /// Data of an answer may be in the pair that belongs to no request.
    is_broken: AtomicBool,
    is_established: AtomicBool,
}

/// The connection to the control socket.
struct Control {
    stream: UnixStream,
    /// An answer is missing, and would be taken for that of the next request.
    is_broken: bool,
}

impl fmt::Debug for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Emulator({})", self.path.display())
    }
}

impl Emulator {
    /// Connects to swtpm at its control socket. The TPM is off until [`Emulator::power_on`].
    ///
    /// # Errors
    /// Fails if nothing listens there, or what does is no swtpm that serves a TPM 2.0.
    pub fn connect(path: &Path) -> Result<Self, TpmError> {
        let failed = |why| TpmError {
            path: path.to_owned(),
            why,
        };
        let open = || {
            let control = UnixStream::connect(path)?;
            let (ours, theirs) = UnixStream::pair()?;
            for (stream, patience) in [(&control, CONTROL_PATIENCE), (&ours, COMMAND_PATIENCE)] {
                // swtpm is another process, which may hang. No thread of the VM waits for it
                // without an end.
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
            }
            Ok((control, ours, theirs))
        };
        let (control, ours, theirs) = open().map_err(|error| failed(Why::Connect(error)))?;
        let mut control = Control {
            stream: control,
            is_broken: false,
        };
        let attempt = "list its capabilities (does it serve another VM?)";
        let answer = control.ask(attempt, GET_CAPABILITY, &[], None);
        let capabilities = u64::from_be_bytes(answer.map_err(failed)?);
        if capabilities & NEEDED != NEEDED {
            return Err(failed(Why::Lacks(NEEDED & !capabilities)));
        }
        let attempt = "take its end of the data connection";
        // swtpm has one data connection: commands reach this TPM over the pair and from no other
        // VM.
        let answer = control.ask(attempt, SET_DATA_FD, &[], Some(theirs.as_fd()));
        succeeded(attempt, answer.map_err(failed)?).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            control: Mutex::new(control),
            data: Mutex::new(ours),
            capabilities,
            is_broken: AtomicBool::new(false),
            is_established: AtomicBool::new(false),
        })
    }

    fn failed(&self) -> impl Fn(Why) -> TpmError {
        |why| TpmError {
            path: self.path.clone(),
            why,
        }
    }

    /// Switches the TPM off and on again, for a machine that boots. Waits for a command in progress.
    ///
    /// # Errors
    /// Fails if swtpm refuses, or is gone.
    pub fn power_on(&self) -> Result<(), TpmError> {
        // No command of an earlier machine is in progress while this is locked.
        let _data = self.data.lock();
        let mut control = self.control.lock();
        let mut start = || {
            control.stop()?;
            // An incoming guest that ended before the TPM was started has left its volatile state,
            // which swtpm would take for that of the guest that boots.
            if self.check_movable().is_ok() {
                control.set_state(VOLATILE, &Blob::default())?;
            }
            self.start(&mut control)
        };
        start().map_err(self.failed())
    }

    fn start(&self, control: &mut Control) -> Result<(), Why> {
        let attempt = "set the size of its buffer";
        let wanted = (BUFFER_LEN as u32).to_be_bytes();
        // Result, size, least and greatest size.
        let answer: [u8; 16] = control.ask(attempt, SET_BUFFER_SIZE, &wanted, None)?;
        let [result, size, ..] = words(answer);
        succeeded(attempt, result.to_be_bytes())?;
        // swtpm rounds to what its TPM can do. With a smaller buffer it would refuse commands that
        // the guest was shown room for.
        if (size as usize) < BUFFER_LEN {
            return Err(Why::Buffer(size));
        }
        let attempt = "start the TPM";
        let answer = control.ask(attempt, INIT, &DELETE_VOLATILE.to_be_bytes(), None)?;
        succeeded(attempt, answer)?;
        let attempt = "read the flag of a measured launch";
        // Result, the flag, and padding.
        let answer: [u8; 8] = control.ask(attempt, GET_ESTABLISHED, &[], None)?;
        let [r0, r1, r2, r3, flag, ..] = answer;
        succeeded(attempt, [r0, r1, r2, r3])?;
        self.is_established.store(flag != 0, Ordering::Release);
        Ok(())
    }

    /// The error of a wait for a command in progress.
    pub(super) fn busy(&self, patience: Duration) -> TpmError {
        self.failed()(Why::Busy(patience))
    }

    /// Fails unless swtpm can hand out and take state.
    fn check_movable(&self) -> Result<(), Why> {
        let lacking = NEEDED_TO_MOVE & !self.capabilities;
        match lacking {
            0 => Ok(()),
            lacking => Err(Why::Lacks(lacking)),
        }
    }

    /// Reads the state of the TPM, which continues. Waits for a command in progress, at most until
    /// `deadline`, the end of a wait of `patience`. swtpm may take as long for each answer.
    ///
    /// # Errors
    /// Fails if a command takes longer, or swtpm refuses or is gone.
    pub(super) fn state(&self, patience: Duration, deadline: Instant) -> Result<Blobs, TpmError> {
        let read = || {
            self.check_movable()?;
            let data = self.data.try_lock_until(deadline);
            let _data = data.ok_or(Why::Busy(patience))?;
            let mut control = self.control.lock();
            // The guest may be stopped meanwhile.
            control.set_patience(patience)?;
            let blobs = control.blobs();
            // Also after a refusal: the TPM stays in use, and a later request may take longer.
            control.set_patience(CONTROL_PATIENCE)?;
            blobs
        };
        read().map_err(self.failed())
    }

    /// Replaces all state of the TPM, which continues from there.
    ///
    /// # Errors
    /// Fails if swtpm refuses the state, or is gone. The TPM is of no use then.
    pub(super) fn replace_state(&self, blobs: &Blobs) -> Result<(), TpmError> {
        let write = || {
            self.check_movable()?;
            let _data = self.data.lock();
            let mut control = self.control.lock();
            control.stop()?;
            // The order in which QEMU sets them.
            for (kind, blob) in [
                (PERMANENT, &blobs.permanent),
                (VOLATILE, &blobs.volatile),
                (SAVED_STATE, &blobs.saved),
            ] {
                control.set_state(kind, blob)?;
            }
            self.start(&mut control)
        };
        write().map_err(self.failed())
    }

    /// Whether the TPM has seen a measured launch, as of the last start.
    pub(super) fn is_established(&self) -> bool {
        self.is_established.load(Ordering::Acquire)
    }

    /// Has swtpm execute a command, and returns its response of at most [`BUFFER_LEN`] bytes.
    ///
    /// # Errors
    /// Fails if swtpm is gone or does not answer. The connection is of no use from then on.
    pub(super) fn execute(&self, command: &[u8]) -> io::Result<Vec<u8>> {
        let mut data = self.data.lock();
        if self.is_broken.load(Ordering::Acquire) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        exchange(&mut data, command).inspect_err(|error| {
            // The next bytes of the stream may be the late rest of this answer. A guest must not
            // get another command's response.
            self.is_broken.store(true, Ordering::Release);
            let path = self.path.display();
            tracing::warn!(%path, %error, "the TPM emulator does not answer: the guest's TPM fails");
        })
    }
}

impl Control {
    /// Sends a request, with a descriptor if there is one, and reads an answer of N bytes.
    fn ask<const N: usize>(
        &mut self,
        attempt: &'static str,
        request: u32,
        body: &[u8],
        passed: Option<BorrowedFd<'_>>,
    ) -> Result<[u8; N], Why> {
        self.exchange(attempt, |stream| {
            send(stream, request, body, passed)?;
            let mut answer = [0; N];
            stream.read_exact(&mut answer)?;
            Ok(answer)
        })
    }

    /// Sets how long an answer may take.
    fn set_patience(&self, patience: Duration) -> Result<(), Why> {
        let set = self.stream.set_read_timeout(Some(patience));
        set.map_err(|error| Why::Request("answer in time", error))
    }

    /// Sends a request and reads its answer by `work`. If that fails, no further request is sent.
    fn exchange<R>(
        &mut self,
        attempt: &'static str,
        work: impl FnOnce(&mut UnixStream) -> io::Result<R>,
    ) -> Result<R, Why> {
        if self.is_broken {
            return Err(Why::Broken);
        }
        work(&mut self.stream).map_err(|error| {
            self.is_broken = true;
            Why::Request(attempt, error)
        })
    }

    fn stop(&mut self) -> Result<(), Why> {
        let attempt = "stop the TPM";
        let answer = self.ask(attempt, STOP, &[], None)?;
        succeeded(attempt, answer)
    }

    /// Reads the state of all types.
    fn blobs(&mut self) -> Result<Blobs, Why> {
        Ok(Blobs {
            permanent: self.state(PERMANENT)?,
            volatile: self.state(VOLATILE)?,
            saved: self.state(SAVED_STATE)?,
        })
    }

    /// Reads the state of this type; empty if there is none.
    fn state(&mut self, kind: u32) -> Result<Blob, Why> {
        const HEADER: usize = 16;
        let attempt = "hand out its state";
        // No flags, so that state which it encrypts stays encrypted; the type; the offset.
        let request = [0, kind, 0].map(u32::to_be_bytes).concat();
        let header = self.exchange(attempt, |stream| {
            send(stream, GET_STATE, &request, None)?;
            // A refusal has the whole header or the result alone, depending on its reason. Both come at
            // once, so that nothing of either stays behind.
            let mut header = [0; HEADER];
            // A signal ends a read with a timeout, whatever its handler asks for (signal(7)).
            let len = retry_on_intr(|| rustix::io::read(&*stream, &mut header))?;
            let is_refused = len == 4 && header[..4] != [0; 4];
            if !is_refused {
                stream.read_exact(header.get_mut(len..).unwrap_or_default())?;
            }
            Ok(header)
        })?;
        // Result, flags, bytes from the offset on, bytes that follow.
        let [result, flags, _, len] = words(header);
        if result & NO_STATE == 0 {
            succeeded(attempt, result.to_be_bytes())?;
        }
        if len as usize > MAX_BLOB_LEN {
            // They follow, and are not read.
            self.is_broken = true;
            return Err(Why::State(len));
        }
        let bytes = self.exchange(attempt, |stream| {
            let mut bytes = vec![0; len as usize];
            stream.read_exact(&mut bytes)?;
            Ok(bytes)
        })?;
        Ok(Blob::new(flags & ENCRYPTED != 0, bytes))
    }

    /// Sets the state of this type, of a TPM that is stopped. An empty one is deleted.
    fn set_state(&mut self, kind: u32, blob: &Blob) -> Result<(), Why> {
        let attempt = "take the state of a TPM";
        let flags = if blob.is_encrypted() { ENCRYPTED } else { 0 };
        let bytes = blob.bytes();
        let head = [flags, kind, bytes.len() as u32].map(u32::to_be_bytes);
        let request = [&head.concat(), bytes].concat();
        let answer = self.ask(attempt, SET_STATE, &request, None)?;
        succeeded(attempt, answer)
    }
}

fn words(bytes: [u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    words
}

fn succeeded(attempt: &'static str, result: [u8; 4]) -> Result<(), Why> {
    match u32::from_be_bytes(result) {
        0 => Ok(()),
        result => Err(Why::Refused(attempt, result)),
    }
}

/// Sends a request, with a descriptor if there is one.
fn send(
    stream: &mut UnixStream,
    request: u32,
    body: &[u8],
    passed: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let message = [&request.to_be_bytes(), body].concat();
    let Some(fd) = passed else {
        return stream.write_all(&message);
    };
    let fds = [fd];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control_message = SendAncillaryBuffer::new(&mut space);
    control_message.push(SendAncillaryMessage::ScmRights(&fds));
    let parts = [IoSlice::new(&message)];
    let sent =
        retry_on_intr(|| sendmsg(&*stream, &parts, &mut control_message, SendFlags::NOSIGNAL))?;
    match sent == message.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

fn exchange(data: &mut UnixStream, command: &[u8]) -> io::Result<Vec<u8>> {
    data.write_all(command)?;
    let mut response = vec![0; HEADER_LEN];
    data.read_exact(&mut response)?;
    let len = length(&response).filter(|len| (HEADER_LEN..=BUFFER_LEN).contains(len));
    // Of an impossible length the end is unknown, and so is the start of the next response.
    let len = len.ok_or(io::ErrorKind::InvalidData)?;
    response.resize(len, 0);
    data.read_exact(response.get_mut(HEADER_LEN..).unwrap_or_default())?;
    Ok(response)
}

/// The length that a command or response says it has.
pub(super) fn length(message: &[u8]) -> Option<usize> {
    let bytes = message.get(2..6)?.try_into().ok()?;
    usize::try_from(u32::from_be_bytes(bytes)).ok()
}
