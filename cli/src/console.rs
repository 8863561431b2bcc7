//! `console` and `logs`: the host's end of a VM's serial port or virtio console.
//!
//! The VMM names that end in the VM's configuration: a pseudo terminal, a unix socket or a file. The
//! commands open it themselves, so they run on the VM's host.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use spec::{ConsoleMode, VmConfig};
use terminal::{Escape, RawMode};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::PortName;
use crate::print;

/// Pause between two looks at a file that is followed.
const POLL: Duration = Duration::from_millis(200);

/// The host's end of a port.
#[derive(Debug, PartialEq)]
enum HostEnd {
    Terminal(PathBuf),
    Socket(PathBuf),
    File(PathBuf),
}

/// Returns the port's name in messages, its mode and its end on the host, if it has one.
fn host_end(config: &VmConfig, port: PortName) -> (&'static str, ConsoleMode, Option<HostEnd>) {
    let (name, mode, file, socket) = match port {
        PortName::Serial => {
            let serial = &config.serial;
            ("serial", serial.mode, &serial.file, &serial.socket)
        }
        PortName::Console => {
            let console = &config.console;
            ("console", console.mode, &console.file, &console.socket)
        }
    };
    let end = match mode {
        ConsoleMode::Pty => file.as_ref().map(|path| HostEnd::Terminal(path.into())),
        ConsoleMode::File => file.as_ref().map(|path| HostEnd::File(path.into())),
        ConsoleMode::Socket => socket.as_ref().map(|path| HostEnd::Socket(path.into())),
        _ => None,
    };
    (name, mode, end)
}

/// Finds the end of `wanted`, or of the first port that has one of the kind which `fits`.
fn find(
    config: &VmConfig,
    wanted: Option<PortName>,
    fits: fn(&HostEnd) -> bool,
    advice: &str,
) -> Result<HostEnd> {
    let both = [PortName::Serial, PortName::Console];
    let mut modes = Vec::new();
    for port in both
        .into_iter()
        .filter(|port| wanted.is_none_or(|wanted| wanted == *port))
    {
        let (name, mode, end) = host_end(config, port);
        match end {
            Some(end) if fits(&end) => return Ok(end),
            None if mode == ConsoleMode::Pty => {
                modes.push(format!("{name}.mode is Pty (opened at boot)"));
            }
            _ => modes.push(format!("{name}.mode is {mode:?}")),
        }
    }
    bail!("{}: {advice}", modes.join(", "))
}

/// Connects standard input and output to the VM's serial port or console until the user leaves or the
/// VM closes it.
pub(crate) async fn connect(config: &VmConfig, wanted: Option<PortName>) -> Result<()> {
    let advice = "`console` needs mode Pty or Socket; `logs` shows what was written to a file";
    let end = find(
        config,
        wanted,
        |end| !matches!(end, HostEnd::File(_)),
        advice,
    )?;
    let (reader, writer): (Box<dyn Read + Send>, Box<dyn Write + Send>) = match &end {
        HostEnd::Socket(path) => {
            let stream = UnixStream::connect(path)
                .with_context(|| format!("cannot connect to {}", path.display()))?;
            (Box::new(stream.try_clone()?), Box::new(stream))
        }
        HostEnd::Terminal(path) | HostEnd::File(path) => {
            // Without O_NOCTTY the guest's terminal could become this process's controlling one.
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = rustix::fs::open(path, flags, Mode::empty())
                .map(File::from)
                .with_context(|| format!("cannot open {}", path.display()))?;
            (Box::new(file.try_clone()?), Box::new(file))
        }
    };
    let by_hand = io::stdin().is_terminal();
    if by_hand {
        eprintln!("wh-remote: connected; Ctrl-A x leaves, Ctrl-A a sends Ctrl-A");
    }
    let raw = by_hand.then(RawMode::enter).transpose();
    let raw = raw.context("cannot set the terminal to raw mode")?;
    let outcome = relay(reader, writer, by_hand).await;
    drop(raw);
    if by_hand {
        eprintln!();
    }
    outcome
}

/// The end of a connection.
enum Ended {
    /// The user pressed the escape key.
    Left,
    /// The VM's side closed.
    Closed,
    Failed(io::Error),
}

async fn relay(
    mut reader: Box<dyn Read + Send>,
    mut writer: Box<dyn Write + Send>,
    by_hand: bool,
) -> Result<()> {
    let (ended, mut end) = mpsc::unbounded_channel();
    let from_guest = ended.clone();
    // Threads, since standard input and terminals block. They end with the process: nothing can wake a
    // read of a terminal.
    thread::spawn(move || {
        let _ = from_guest.send(match copy_output(&mut reader) {
            Ok(()) => Ended::Closed,
            Err(error) => Ended::Failed(error),
        });
    });
    thread::spawn(move || match copy_input(&mut writer, by_hand) {
        Ok(true) => {
            let _ = ended.send(Ended::Left);
        }
        // The end of a script's input is not the end of the guest's output.
        Ok(false) => {}
        Err(error) => {
            let _ = ended.send(Ended::Failed(error));
        }
    });
    // The caller restores the terminal before the process ends.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::select! {
        end = end.recv() => match end {
            Some(Ended::Left) | None => Ok(()),
            Some(Ended::Closed) => {
                eprintln!("\r\nwh-remote: the VM closed the console; it serves one client at a time");
                Ok(())
            }
            Some(Ended::Failed(error)) => Err(error.into()),
        },
        _ = terminate.recv() => bail!("ended by SIGTERM"),
        _ = hang_up.recv() => bail!("ended by SIGHUP"),
    }
}

/// Prints the guest's output until its end.
fn copy_output(from: &mut dyn Read) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                stdout.write_all(&buffer[..len])?;
                stdout.flush()?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A pseudo terminal whose other side was closed.
            Err(error) if is_closed_terminal(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn is_closed_terminal(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// Sends standard input to the guest. Returns `true` if the user left, `false` at the end of the input.
fn copy_input(to: &mut dyn Write, by_hand: bool) -> io::Result<bool> {
    let mut stdin = io::stdin().lock();
    let mut escape = Escape::default();
    let mut buffer = [0; 1024];
    loop {
        let len = match stdin.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if by_hand {
            let (keys, leave) = escape.filter(&buffer[..len]);
            to.write_all(&keys)?;
            if leave {
                return Ok(true);
            }
        } else {
            to.write_all(&buffer[..len])?;
        }
    }
}

/// Prints the file of the VM's serial port or console, and with `follow` what is added to it.
pub(crate) async fn logs(config: &VmConfig, wanted: Option<PortName>, follow: bool) -> Result<()> {
    let advice = "`logs` needs mode File; `console` connects to a Pty or Socket";
    let end = find(
        config,
        wanted,
        |end| matches!(end, HostEnd::File(_)),
        advice,
    )?;
    let (HostEnd::File(path) | HostEnd::Terminal(path) | HostEnd::Socket(path)) = end;
    let read = || format!("cannot read {}", path.display());
    let mut file = File::open(&path).with_context(read)?;
    let mut position = 0;
    loop {
        // A boot empties the file.
        if file.metadata().with_context(read)?.len() < position {
            position = file.seek(SeekFrom::Start(0)).with_context(read)?;
        }
        let mut part = Vec::new();
        // A part at a time, since the file may be large.
        let len = (&file)
            .take(1 << 16)
            .read_to_end(&mut part)
            .with_context(read)?;
        position += len as u64;
        print::raw(&part)?;
        if len == 0 {
            if !follow {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> VmConfig {
        serde_json::from_str(&format!(r#"{{"payload":{{"kernel":"/k"}},{text}}}"#)).unwrap()
    }

    #[test]
    fn serial_port_comes_before_console() {
        let both = config(
            r#""serial":{"mode":"Pty","file":"/dev/pts/7"},"console":{"mode":"Socket","socket":"/c"}"#,
        );
        let end = |wanted| find(&both, wanted, |_| true, "").unwrap();
        assert_eq!(end(None), HostEnd::Terminal("/dev/pts/7".into()));
        assert_eq!(end(Some(PortName::Console)), HostEnd::Socket("/c".into()));
    }

    #[test]
    fn refusal_names_modes_and_remedy() {
        let file = config(r#""serial":{"mode":"File","file":"/log"},"console":{"mode":"Off"}"#);
        let refused = find(
            &file,
            None,
            |end| !matches!(end, HostEnd::File(_)),
            "use `logs`",
        );
        assert_eq!(
            refused.unwrap_err().to_string(),
            "serial.mode is File, console.mode is Off: use `logs`"
        );
        let pty = config(r#""serial":{"mode":"Pty"},"console":{"mode":"Off"}"#);
        let refused = find(&pty, None, |_| true, "boot it").unwrap_err();
        assert!(
            refused
                .to_string()
                .starts_with("serial.mode is Pty (opened at boot)"),
            "{refused}"
        );
    }
}
