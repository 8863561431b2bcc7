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
use std::time::Duration;

use parking_lot::Mutex;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::BUFFER_LEN;

/// How long swtpm may take for a request about the device.
const CONTROL_PATIENCE: Duration = Duration::from_secs(10);
/// How long swtpm may take for a command of the guest. The slowest makes RSA keys.
const COMMAND_PATIENCE: Duration = Duration::from_secs(300);

/// Requests (`CMD_...` of swtpm's `tpm_ioctl.h`).
const GET_CAPABILITY: u32 = 1;
const INIT: u32 = 2;
const GET_ESTABLISHED: u32 = 4;
const STOP: u32 = 14;
const SET_DATA_FD: u32 = 16;
const SET_BUFFER_SIZE: u32 = 17;

/// Capabilities (`PTM_CAP_...`) that are needed: those of the requests above.
const NEEDED: u64 = 1 | 1 << 2 | 1 << 10 | 1 << 12 | 1 << 13;
/// A flag of [`INIT`]: what a guest had in the TPM's volatile memory is forgotten.
const DELETE_VOLATILE: u32 = 1;

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
        "{0}; start it by `swtpm socket --tpm2 --tpmstate dir=... --ctrl type=unixio,path=...`"
    )]
    Connect(io::Error),
    #[error("it did not answer the request to {0}: {1}")]
    Request(&'static str, io::Error),
    #[error("it refused to {0} (result {1:#x})")]
    Refused(&'static str, u32),
    #[error("it lacks capabilities that are needed ({:#x})", .0)]
    Lacks(u64),
    #[error("its buffer of {0} bytes is smaller than the {BUFFER_LEN} bytes of the guest's")]
    Buffer(u32),
}

/// A TPM emulator. It is a guest's as long as this exists.
pub struct Emulator {
    path: PathBuf,
    control: Mutex<UnixStream>,
    data: Mutex<UnixStream>,
    /// Data of an answer may be in the pair that belongs to no request.
    is_broken: AtomicBool,
    is_established: AtomicBool,
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
    /// When nothing listens there, or what does is no swtpm that serves a TPM 2.0.
    pub fn connect(path: &Path) -> Result<Self, TpmError> {
        let failed = |why| TpmError {
            path: path.to_owned(),
            why,
        };
        let open = || {
            let control = UnixStream::connect(path)?;
            let (ours, theirs) = UnixStream::pair()?;
            for (stream, patience) in [(&control, CONTROL_PATIENCE), (&ours, COMMAND_PATIENCE)] {
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
            }
            Ok((control, ours, theirs))
        };
        let (mut control, ours, theirs) = open().map_err(|error| failed(Why::Connect(error)))?;
        let request = Why::request("list its capabilities");
        let answer = ask(&mut control, GET_CAPABILITY, &[], None).map_err(request);
        let capabilities = u64::from_be_bytes(answer.map_err(failed)?);
        if capabilities & NEEDED != NEEDED {
            return Err(failed(Why::Lacks(NEEDED & !capabilities)));
        }
        let attempt = "take its end of the data connection";
        let answer = ask(&mut control, SET_DATA_FD, &[], Some(theirs.as_fd()));
        let answer = answer.map_err(Why::request(attempt)).map_err(failed)?;
        succeeded(attempt, answer).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            control: Mutex::new(control),
            data: Mutex::new(ours),
            is_broken: AtomicBool::new(false),
            is_established: AtomicBool::new(false),
        })
    }

    /// Switches the TPM off and on again, for a machine that boots. Waits for a command in progress.
    ///
    /// # Errors
    /// When swtpm refuses, or is gone.
    pub fn power_on(&self) -> Result<(), TpmError> {
        // No command of an earlier machine is in progress while this is locked.
        let _data = self.data.lock();
        let mut control = self.control.lock();
        self.start(&mut control).map_err(|why| TpmError {
            path: self.path.clone(),
            why,
        })
    }

    fn start(&self, control: &mut UnixStream) -> Result<(), Why> {
        let attempt = "stop the TPM";
        let answer = ask(control, STOP, &[], None).map_err(Why::request(attempt))?;
        succeeded(attempt, answer)?;
        let attempt = "set the size of its buffer";
        let wanted = (BUFFER_LEN as u32).to_be_bytes();
        // Result, size, least and greatest size.
        let answer = ask(control, SET_BUFFER_SIZE, &wanted, None);
        let answer: [u8; 16] = answer.map_err(Why::request(attempt))?;
        let [result, size, ..] = words(answer);
        succeeded(attempt, result.to_be_bytes())?;
        if (size as usize) < BUFFER_LEN {
            return Err(Why::Buffer(size));
        }
        let attempt = "start the TPM";
        let answer = ask(control, INIT, &DELETE_VOLATILE.to_be_bytes(), None);
        succeeded(attempt, answer.map_err(Why::request(attempt))?)?;
        let attempt = "read the flag of a measured launch";
        // Result, the flag, and padding.
        let answer: [u8; 8] =
            ask(control, GET_ESTABLISHED, &[], None).map_err(Why::request(attempt))?;
        let [r0, r1, r2, r3, flag, ..] = answer;
        succeeded(attempt, [r0, r1, r2, r3])?;
        self.is_established.store(flag != 0, Ordering::Release);
        Ok(())
    }

    /// Whether the TPM has seen a measured launch, as of the last start.
    pub(super) fn is_established(&self) -> bool {
        self.is_established.load(Ordering::Acquire)
    }

    /// Has swtpm execute a command, and returns its response of at most [`BUFFER_LEN`] bytes.
    ///
    /// # Errors
    /// When swtpm is gone or does not answer. The connection is of no use from then on.
    pub(super) fn execute(&self, command: &[u8]) -> io::Result<Vec<u8>> {
        let mut data = self.data.lock();
        if self.is_broken.load(Ordering::Acquire) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        exchange(&mut data, command).inspect_err(|error| {
            self.is_broken.store(true, Ordering::Release);
            let path = self.path.display();
            tracing::warn!(%path, %error, "the TPM emulator does not answer: the guest's TPM fails");
        })
    }
}

impl Why {
    fn request(attempt: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Request(attempt, error)
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

/// Sends a request, with a descriptor if there is one, and reads an answer of N bytes.
fn ask<const N: usize>(
    control: &mut UnixStream,
    request: u32,
    body: &[u8],
    passed: Option<BorrowedFd<'_>>,
) -> io::Result<[u8; N]> {
    let message = [&request.to_be_bytes(), body].concat();
    match passed {
        None => control.write_all(&message)?,
        Some(fd) => {
            let fds = [fd];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control_message = SendAncillaryBuffer::new(&mut space);
            control_message.push(SendAncillaryMessage::ScmRights(&fds));
            let sent = sendmsg(
                &*control,
                &[IoSlice::new(&message)],
                &mut control_message,
                SendFlags::NOSIGNAL,
            )?;
            if sent != message.len() {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
    }
    let mut answer = [0; N];
    control.read_exact(&mut answer)?;
    Ok(answer)
}

fn exchange(data: &mut UnixStream, command: &[u8]) -> io::Result<Vec<u8>> {
    data.write_all(command)?;
    let mut response = vec![0; HEADER_LEN];
    data.read_exact(&mut response)?;
    let len = length(&response).filter(|len| (HEADER_LEN..=BUFFER_LEN).contains(len));
    // What follows cannot be told from the next response.
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
