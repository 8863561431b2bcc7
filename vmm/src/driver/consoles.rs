//! The host's ends of a VM's serial port and consoles. They outlive machines, so output continues over a
//! reboot.

use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

use ::devices::event_loop::{Interest, Sources};
use ::devices::{Console, ConsoleError, ConsoleInput, Watch};
use spec::{ConsoleEnd, ConsoleMode, VmConfig};

use crate::descriptors::Reservation;
use crate::failure::{BuildError, PortError};
use crate::guest_event::{Outputs, Port};

/// The ends that are open.
#[derive(Default)]
pub(crate) struct Consoles {
    ends: [Option<Console>; 2],
    /// That of the debug console, which has no input.
    debug: Option<Console>,
    watched: Vec<RawFd>,
    /// The descriptors of the VM, also those of its machine: a reset, over which consoles stay, must not
    /// lose them to another VM.
    reserved: Option<Arc<Reservation>>,
}

impl Consoles {
    /// Opens all; [`Self::empty`] empties their files. Opening may take a while, as a file on a network
    /// does. The terminal is the serial port's, if it wants it, and else the console's if
    /// this VM has the terminal `to_itself`; a console without it says nothing.
    pub(crate) fn open(config: &VmConfig, to_itself: bool) -> Result<Self, BuildError> {
        Self::open_by(config, to_itself, open)
    }

    /// Like [`Self::open`], for an incoming migration: files are locked, and sockets have their paths, after
    /// [`Self::take_over`].
    pub(crate) fn open_next(config: &VmConfig, to_itself: bool) -> Result<Self, BuildError> {
        Self::open_by(config, to_itself, open_next)
    }

    /// Empties their files, which loses what an earlier boot wrote.
    pub(super) fn empty(&self) -> Result<(), PortError> {
        let ends = self.ends.iter().chain([&self.debug]);
        for (name, end) in NAMES.into_iter().zip(ends) {
            end.as_ref()
                .map_or(Ok(()), Console::empty)
                .map_err(PortError::of(name))?;
        }
        Ok(())
    }

    /// Takes the paths of sockets and the locks of files from the machine in which the guest was.
    pub(super) fn take_over(&mut self) -> Result<(), PortError> {
        let ends = self.ends.iter_mut().chain([&mut self.debug]);
        for (name, end) in NAMES.into_iter().zip(ends) {
            end.as_mut()
                .map_or(Ok(()), Console::take_over)
                .map_err(PortError::of(name))?;
        }
        Ok(())
    }

    /// Lets the machine to which the guest moves lock the files.
    pub(super) fn hand_over(&mut self) {
        let ends = self.ends.iter_mut().chain([&mut self.debug]).flatten();
        ends.for_each(Console::hand_over);
    }

    fn open_by(config: &VmConfig, to_itself: bool, open: Open) -> Result<Self, BuildError> {
        let [serial, console, debug] = config.console_ends();
        let mode = match console.mode {
            ConsoleMode::Tty if serial.mode == ConsoleMode::Tty || !to_itself => ConsoleMode::Null,
            mode => mode,
        };
        let open = |end: &ConsoleEnd<'_>, mode| {
            open(mode, end.file, end.socket).map_err(PortError::of(end.name))
        };
        Ok(Self {
            ends: [open(&serial, serial.mode)?, open(&console, mode)?],
            debug: match debug.mode {
                // It leaves the terminal's input to the others.
                ConsoleMode::Tty => Some(Console::stdout().map_err(PortError::of(debug.name))?),
                mode => open(&debug, mode)?,
            },
            watched: Vec::new(),
            reserved: None,
        })
    }

    /// Keeps the descriptors of the first machine for those that follow it.
    pub(crate) fn keep_reserved(mut self, reserved: &[Arc<Reservation>]) -> Self {
        self.reserved = reserved.first().cloned();
        self
    }

    pub(super) fn reserved(&self) -> Option<Arc<Reservation>> {
        self.reserved.clone()
    }

    fn end(&self, port: Port) -> Option<&Console> {
        self.ends[port as usize].as_ref()
    }

    pub(crate) fn outputs(&self) -> Outputs {
        Outputs {
            serial: self.end(Port::Serial).map(Console::output),
            console: self.end(Port::Console).map(Console::output),
            debug: self.debug.as_ref().map(Console::output),
        }
    }

    /// Fills in the paths of pseudo terminals.
    pub(super) fn show(&self, config: &mut VmConfig) {
        let fields = [&mut config.serial.file, &mut config.console.file];
        let debug = config.debug_console.as_mut();
        let fields = fields.into_iter().chain(debug.map(|debug| &mut debug.file));
        for (file, end) in fields.zip(self.ends.iter().chain([&self.debug])) {
            if let Some(path) = end.as_ref().and_then(Console::pty_path) {
                *file = Some(path.to_string_lossy().into_owned());
            }
        }
    }

    pub(super) fn watch_all(&mut self, sources: &mut Sources<'_>) {
        for port in Port::BOTH {
            let fds = self.end(port).map(Console::sources);
            for fd in fds.into_iter().flatten() {
                self.watch(port, fd, sources);
            }
        }
    }

    fn watch(&mut self, port: Port, fd: RawFd, sources: &mut Sources<'_>) {
        // A client that reads makes room for what it had not read before.
        match sources.watch(fd, port as usize, Interest::Both) {
            Ok(()) => self.watched.push(fd),
            // A file as standard input, which has no moment of being ready.
            Err(error) => tracing::debug!(fd, %error, "this console has no input"),
        }
    }

    /// Closes all.
    pub(super) fn close(&mut self, sources: &mut Sources<'_>) {
        // Before the ends close their descriptors: the host may reuse a closed number at once, and
        // `forget` would then act on another file.
        self.watched.drain(..).for_each(|fd| sources.forget(fd));
        self.ends = [None, None];
        self.debug = None;
        self.reserved = None;
    }

    /// Passes on what there is, as far as the guest has room.
    pub(super) fn take_input(
        &mut self,
        port: Port,
        to: &dyn ConsoleInput,
        sources: &mut Sources<'_>,
    ) {
        let Some(end) = &mut self.ends[port as usize] else {
            return;
        };
        let mut watches = end.ready(to);
        // A new client may have written before it was watched.
        if !watches.is_empty() {
            watches.extend(end.ready(to));
        }
        // In the order of the list: a new client may have the descriptor number of the one that
        // has just left, so its `Begin` must follow that `End`.
        for watch in watches {
            match watch {
                Watch::Begin(fd) => self.watch(port, fd, sources),
                Watch::End(fd) => {
                    sources.forget(fd);
                    self.watched.retain(|watched| *watched != fd);
                }
            }
        }
    }

    /// Whether there is input for which the guest had no room.
    pub(super) fn has_more(&self, port: Port) -> bool {
        self.end(port).is_some_and(Console::has_more)
    }
}

/// The fields of the ends in a configuration, in the order of [`VmConfig::console_ends`].
const NAMES: [&str; 3] = ["serial", "console", "debug_console"];

type Open =
    fn(ConsoleMode, Option<&String>, Option<&String>) -> Result<Option<Console>, ConsoleError>;

fn open_next(
    mode: ConsoleMode,
    file: Option<&String>,
    socket: Option<&String>,
) -> Result<Option<Console>, ConsoleError> {
    match (mode, file, socket) {
        (ConsoleMode::File, Some(path), _) => Ok(Some(Console::next_file(Path::new(path))?)),
        (ConsoleMode::Socket, _, Some(path)) => Ok(Some(Console::next_socket(Path::new(path))?)),
        _ => open(mode, file, socket),
    }
}

fn open(
    mode: ConsoleMode,
    file: Option<&String>,
    socket: Option<&String>,
) -> Result<Option<Console>, ConsoleError> {
    // Validation has seen to it that there is a path where one is needed.
    let path = |path: Option<&String>| Path::new(path.map_or("", String::as_str)).to_owned();
    Ok(Some(match mode {
        ConsoleMode::Off => return Ok(None),
        ConsoleMode::Null => Console::null(),
        ConsoleMode::File => Console::file(&path(file))?,
        ConsoleMode::Tty => Console::tty()?,
        ConsoleMode::Pty => Console::pty()?,
        ConsoleMode::Socket => Console::socket(&path(socket))?,
    }))
}
