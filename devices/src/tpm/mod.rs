//! A TPM 2.0 with the Command Response Buffer interface (TCG PC Client Platform TPM Profile 1.05, 6.5),
//! at the address that PC software expects. `swtpm` executes the commands.
//!
//! ```text
//!   vCPU: registers and buffer ── start ──► thread `tpm` ──► Emulator ──► swtpm
//!                    ▲                          │
//!                    └──── response, idle ◄─────┘
//! ```
//!
//! A command takes up to minutes, so a thread waits for it and not the vCPU. The guest's driver polls
//! the start register; there is no interrupt. There is one locality, 0.
//!
//! The TPM's own state is in swtpm, which hands it out and takes it: [`Tpm::snapshot`] and
//! [`LoadedTpm`].

mod emulator;
mod saved;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use memory::DeviceOps;
use parking_lot::{Condvar, Mutex};

use self::emulator::HEADER_LEN;
pub use self::emulator::{Emulator, TpmError};
pub use self::saved::{LoadedTpm, TpmSnapshot};
use crate::sandbox::{Confinement, ThreadKind};

/// Bytes of the device's registers and buffer.
pub const LEN: u64 = 0x1000;
/// Offset of the control area, which the ACPI table names.
pub const CONTROL_AREA: u64 = 0x40;

/// Registers, by their offsets.
const LOC_STATE: usize = 0x00;
const LOC_CTRL: u64 = 0x08;
const LOC_STS: usize = 0x0c;
const INTF_ID: usize = 0x30;
const CTRL_REQ: u64 = 0x40;
const CTRL_STS: usize = 0x44;
const CTRL_START: usize = 0x4c;
const CMD_SIZE: usize = 0x58;
const CMD_ADDR: usize = 0x5c;
const RSP_SIZE: usize = 0x64;
const RSP_ADDR: usize = 0x68;
const BUFFER: usize = 0x80;

/// Bytes of the buffer for commands and responses.
const BUFFER_LEN: usize = LEN as usize - BUFFER;

/// CRB is the active interface (1), its version 1, transfers of 64 bytes (3), CRB is there, CRB is
/// selected. One locality, no FIFO.
const INTERFACE: u32 = 1 | 1 << 4 | 3 << 11 | 1 << 14 | 1 << 17;
/// The vendor that QEMU shows, IBM.
const VENDOR: u32 = 0x1014;

struct State {
    /// The driver has requested locality 0.
    is_assigned: bool,
    is_idle: bool,
    /// The last command could not be executed.
    has_failed: bool,
    /// A command is being executed: the buffer is the thread's.
    is_busy: bool,
    buffer: Box<[u8; BUFFER_LEN]>,
}

/// The registers and the buffer, which the guest shares with the thread.
struct Registers {
    state: Mutex<State>,
    /// The thread has completed a command.
    completed: Condvar,
}

impl Registers {
    /// Waits until no command is in progress. Returns whether that is so by `deadline`.
    fn wait_idle(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        let is_busy = |state: &mut State| state.is_busy;
        let waited = self
            .completed
            .wait_while_until(&mut state, is_busy, deadline);
        !waited.timed_out()
    }
}

/// A TPM.
pub struct Tpm {
    base: u64,
    shared: Arc<Registers>,
    emulator: Arc<Emulator>,
    commands: SyncSender<Vec<u8>>,
}

impl Tpm {
    /// Makes a TPM whose registers are at `base`, and switches it on. `report` gets the reason if the
    /// thread that talks to the emulator must end, which ends the VM.
    ///
    /// # Errors
    /// Fails if the emulator does not start, or the host gives no thread.
    pub fn new(
        base: u64,
        emulator: Arc<Emulator>,
        confinement: Confinement,
        report: impl Fn(String) + Send + 'static,
    ) -> Result<Self, NewTpmError> {
        emulator.power_on()?;
        let state = State {
            is_assigned: false,
            is_idle: true,
            has_failed: false,
            is_busy: false,
            buffer: Box::new([0; BUFFER_LEN]),
        };
        let shared = Arc::new(Registers {
            state: Mutex::new(state),
            completed: Condvar::new(),
        });
        // One command at a time: the next is accepted when the thread has given the buffer back.
        let (commands, inbox) = sync_channel(1);
        let (registers, executor) = (Arc::clone(&shared), Arc::clone(&emulator));
        let work = move || {
            if let Err(error) = confinement.enter(ThreadKind::Devices) {
                return report(format!("the kernel refused to confine its thread: {error}"));
            }
            execute_all(&inbox, &registers, &executor, confinement, &report);
        };
        std::thread::Builder::new()
            .name("tpm".to_owned())
            .spawn(work)
            .map_err(NewTpmError::Thread)?;
        Ok(Self {
            base,
            shared,
            emulator,
            commands,
        })
    }

    /// The emulator that executes the commands.
    pub fn emulator(&self) -> &Arc<Emulator> {
        &self.emulator
    }

    /// All registers as they are now.
    fn registers(&self, state: &State) -> [u8; BUFFER] {
        const SIZE: u32 = BUFFER_LEN as u32;
        let buffer = self.base + BUFFER as u64;
        let mut registers = [0; BUFFER];
        let mut set = |at: usize, value: u32| {
            if let Some(place) = registers.get_mut(at..at + 4) {
                place.copy_from_slice(&value.to_le_bytes());
            }
        };
        // The first bit is 0 after a measured launch; the last says that the others are valid.
        let unlaunched = u32::from(!self.emulator.is_established());
        set(
            LOC_STATE,
            unlaunched | u32::from(state.is_assigned) << 1 | 1 << 7,
        );
        set(LOC_STS, u32::from(state.is_assigned));
        set(INTF_ID, INTERFACE);
        set(INTF_ID + 4, VENDOR);
        set(
            CTRL_STS,
            u32::from(state.has_failed) | u32::from(state.is_idle) << 1,
        );
        set(CTRL_START, u32::from(state.is_busy));
        set(CMD_SIZE, SIZE);
        set(CMD_ADDR, buffer as u32);
        set(CMD_ADDR + 4, (buffer >> 32) as u32);
        set(RSP_SIZE, SIZE);
        set(RSP_ADDR, buffer as u32);
        set(RSP_ADDR + 4, (buffer >> 32) as u32);
        registers
    }

    /// Hands the command in the buffer to the thread.
    fn start(&self, state: &mut State) {
        // A driver needs the locality first (PTP 1.05, 6.5). While a command is in progress the
        // buffer belongs to the thread, and a second command would get the first one's response.
        if !state.is_assigned || state.is_busy {
            return;
        }
        let len = emulator::length(&state.buffer[..]);
        let len = len.filter(|len| *len >= HEADER_LEN);
        let command = len.and_then(|len| state.buffer.get(..len));
        // A command of an impossible length never reaches the emulator, which would wait for the rest.
        state.has_failed = command.is_none_or(|command| {
            // The channel is empty while no command is being executed.
            self.commands.try_send(command.to_vec()).is_err()
        });
        state.is_busy = !state.has_failed;
    }
}

/// The loop of the thread: ends with the device.
fn execute_all(
    commands: &Receiver<Vec<u8>>,
    registers: &Registers,
    emulator: &Emulator,
    confinement: Confinement,
    report: &impl Fn(String),
) {
    while let Ok(command) = commands.recv() {
        let response = emulator.execute(&command);
        // Without releasing `is_busy`: the VM is about to end, and its guest must not take a
        // half-made response for an answer.
        if let Some(violation) = confinement.violation() {
            return report(violation.to_string());
        }
        let mut state = registers.state.lock();
        state.has_failed = match response {
            Ok(response) => {
                let place = state.buffer.get_mut(..response.len());
                place
                    .map(|place| place.copy_from_slice(&response))
                    .is_none()
            }
            Err(_) => true,
        };
        state.is_busy = false;
        registers.completed.notify_all();
    }
}

/// A TPM cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewTpmError {
    /// The emulator cannot be used.
    #[error(transparent)]
    Emulator(#[from] TpmError),
    /// The host gives no thread.
    #[error("the host refused to start the thread of the TPM: {0}")]
    Thread(#[source] io::Error),
}

impl DeviceOps for Tpm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state.lock();
        let registers = self.registers(&state);
        let bytes = registers.iter().chain(state.buffer.iter());
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0xff);
        for (to, from) in data.iter_mut().zip(bytes.skip(offset)) {
            *to = *from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const REQUEST: u32 = 1;
        const RELINQUISH: u32 = 1 << 1;
        const READY: u32 = 1;
        const GO_IDLE: u32 = 1 << 1;
        const START: u32 = 1;
        let mut state = self.shared.state.lock();
        if state.is_busy {
            // Also a cancellation: the TPM may complete the command normally.
            return;
        }
        if let Some(at) = usize::try_from(offset)
            .ok()
            .and_then(|at| at.checked_sub(BUFFER))
        {
            let end = at.saturating_add(data.len()).min(BUFFER_LEN);
            let place = state.buffer.get_mut(at..end).unwrap_or_default();
            place
                .iter_mut()
                .zip(data)
                .for_each(|(to, from)| *to = *from);
            return;
        }
        // Shorter writes are extended with zeros, and only the low four bytes of longer ones count:
        // the registers have 32 bits.
        let mut value = [0; 4];
        value
            .iter_mut()
            .zip(data)
            .for_each(|(to, from)| *to = *from);
        let value = u32::from_le_bytes(value);
        match offset {
            LOC_CTRL if value & REQUEST != 0 => state.is_assigned = true,
            LOC_CTRL if value & RELINQUISH != 0 => state.is_assigned = false,
            CTRL_REQ if value & READY != 0 => state.is_idle = false,
            CTRL_REQ if value & GO_IDLE != 0 => {
                // A driver goes idle after each command. Here that also clears a failure, so that
                // the guest can try the next command.
                state.is_idle = true;
                state.has_failed = false;
            }
            at if at == CTRL_START as u64 && value & START != 0 => self.start(&mut state),
            _ => {}
        }
    }
}
