use std::cell::Cell;
use std::io::{Read, Seek};
use std::os::unix::net::UnixStream;

use super::*;
use crate::Serial;
use crate::client::UNREAD;
use crate::interrupt::InterruptLine;

fn serial(console: &Console) -> Serial {
    Serial::new(
        InterruptLine::new().unwrap(),
        console.output(),
        |_| {},
        || {},
    )
}

fn guest_writes(serial: &Serial, text: &[u8]) {
    use memory::DeviceOps;
    text.iter().for_each(|byte| serial.write(0, &[*byte]));
}

#[test]
fn late_client_reads_everything() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let mut console = Console::socket(&path).unwrap();
    let serial = serial(&console);
    let mut client = UnixStream::connect(&path).unwrap();
    assert_eq!(console.ready(&serial).len(), 1);
    let text: Vec<u8> = (0..20_000_u32).map(|i| (i % 251) as u8).collect();
    guest_writes(&serial, &text);
    let mut read = vec![0; text.len()];
    let mut at = 0;
    client.set_nonblocking(true).unwrap();
    while at < read.len() {
        match client.read(&mut read[at..]) {
            Ok(len) => at += len,
            // The loop finds that there is room.
            Err(_) => assert!(console.ready(&serial).is_empty()),
        }
    }
    assert!(read == text);
    assert_eq!(serial.counters()[2], ("bytes_lost", 0));
    // Output without a reader is dropped and counted.
    let much = vec![0; UNREAD + 300_000];
    guest_writes(&serial, &much);
    assert!(serial.counters()[2].1 > 0);
}

#[test]
fn a_socket_serves_one_client_and_then_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let mut console = Console::socket(&path).unwrap();
    let serial = serial(&console);
    guest_writes(&serial, b"nobody hears this");
    for text in ["first", "second"] {
        let mut client = UnixStream::connect(&path).unwrap();
        assert!(matches!(console.ready(&serial)[..], [Watch::Begin(_)]));
        guest_writes(&serial, text.as_bytes());
        let mut heard = vec![0; text.len()];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(heard, text.as_bytes());
        let mut turned_away = UnixStream::connect(&path).unwrap();
        assert_eq!(console.ready(&serial), []);
        assert_eq!(turned_away.read(&mut [0]).unwrap(), 0);
        drop(client);
        assert!(matches!(console.ready(&serial)[..], [Watch::End(_)]));
    }
    drop(console);
    assert!(!path.exists());
}

#[test]
fn input_waits_for_guest() {
    let dir = tempfile::tempdir().unwrap();
    let mut console = Console::socket(&dir.path().join("console")).unwrap();
    let serial = serial(&console);
    let mut client = UnixStream::connect(dir.path().join("console")).unwrap();
    client.write_all(&[1; 100]).unwrap();
    console.ready(&serial);
    console.ready(&serial);
    assert!(console.has_more() && serial.room() == 0);
}

/// A guest that has read each byte at once.
#[derive(Default)]
struct FastGuest(Cell<usize>);

impl ConsoleInput for FastGuest {
    fn room(&self) -> usize {
        4096
    }

    fn receive(&self, bytes: &[u8]) -> usize {
        self.0.set(self.0.get() + bytes.len());
        bytes.len()
    }
}

#[test]
fn endless_input_is_taken_in_turns() {
    let (guest, mut file) = (FastGuest::default(), tempfile::tempfile().unwrap());
    file.write_all(&[7; 3 * TURN]).unwrap();
    file.rewind().unwrap();
    for turn in 1..=3 {
        let pumped = pump(&file, &guest);
        assert_eq!((pumped.more, pumped.ended), (true, false));
        assert_eq!(guest.0.get(), turn * TURN);
    }
    assert!(pump(&file, &guest).ended);
}

#[test]
fn delayed_input_arrives() {
    use memory::DeviceOps;
    let serial = serial(&Console::null());
    let (reader, mut writer) = std::io::pipe().unwrap();
    let sent: Vec<u8> = (0..200).collect();
    writer.write_all(&sent).unwrap();
    let mut came = Vec::new();
    // Nothing more is written: what is left can only come from the descriptor.
    while pump(&reader, &serial).more {
        while serial.room() < 64 {
            let mut byte = [0];
            serial.read(0, &mut byte);
            came.extend(byte);
        }
    }
    came.resize_with(sent.len(), || {
        let mut byte = [0];
        serial.read(0, &mut byte);
        byte[0]
    });
    assert_eq!(came, sent);
    drop(writer);
    assert!(pump(&reader, &serial).ended);
}

#[test]
fn unread_pty_output_is_dropped() {
    let console = Console::pty().unwrap();
    assert!(console.pty_path().unwrap().starts_with("/dev/pts"));
    let serial = serial(&console);
    guest_writes(&serial, &[b'x'; 100_000]);
    let lost = serial.counters()[2].1;
    assert!(lost > 0 && lost < 100_000, "{lost}");
}

#[test]
fn file_console_locks_and_truncates() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "an earlier boot\n").unwrap();
    let mut first = Console::file(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"an earlier boot\n");
    let refused = Console::file(&path).err().unwrap().to_string();
    assert!(refused.contains("is in use by process"), "{refused}");
    first.empty().unwrap();
    guest_writes(&serial(&first), b"one ");
    // A machine to which the guest moves writes behind what is there, once it has the lock.
    let mut second = Console::next_file(&path).unwrap();
    assert!(second.take_over().is_err(), "the first still has it");
    first.hand_over();
    second.take_over().unwrap();
    guest_writes(&serial(&second), b"two");
    assert!(first.take_over().is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"one two");
    drop(second);
    first.take_over().unwrap();
    let null = Console::file(Path::new("/dev/null")).unwrap();
    null.empty().unwrap();
    Console::file(Path::new("/dev/null")).unwrap();
}

/// A service that systemd starts is a session leader without a terminal: the first terminal that it
/// opens without O_NOCTTY becomes its controlling one.
#[test]
fn no_console_becomes_the_controlling_terminal() {
    const INNER: &str = "WHIMBREL_TEST_SESSION_LEADER";
    if std::env::var_os(INNER).is_none() {
        let done = std::process::Command::new("setsid")
            .arg("--wait")
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "console::tests::no_console_becomes_the_controlling_terminal",
            ])
            .env(INNER, "1")
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        return;
    }
    let terminal = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        // Behind the command in parentheses: state, parent, group, session, terminal.
        let fields = stat.rsplit_once(')').unwrap().1.to_owned();
        fields.split_whitespace().nth(4).unwrap().to_owned()
    };
    assert_eq!(terminal(), "0");
    let pty = Console::pty().unwrap();
    assert_eq!(terminal(), "0");
    let file = Console::file(pty.pty_path().unwrap()).unwrap();
    assert_eq!(terminal(), "0");
    drop((pty, file));
}

#[test]
fn names_unwritable_path() {
    let refused = Console::file(Path::new("/nowhere/log"))
        .err()
        .unwrap()
        .to_string();
    assert!(
        refused.starts_with("file cannot be used: /nowhere/log cannot be opened"),
        "{refused}"
    );
    let refused = Console::file(Path::new("/tmp")).err().unwrap().to_string();
    assert_eq!(
        refused,
        "file cannot be used: /tmp is a directory; it must be a regular file or \
         /dev/null or a terminal"
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _first = Console::socket(&path).unwrap();
    assert!(matches!(
        Console::socket(&path),
        Err(ConsoleError::Socket { .. })
    ));
}

#[test]
fn checks_make_nothing_and_refuse_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let _file = Console::file(&at("file")).unwrap();
    let _socket = Console::socket(&at("socket")).unwrap();
    let text = |refused: Result<(), ConsoleError>| refused.err().map(|error| error.to_string());
    for name in ["file", "socket", "none/x", "."] {
        let path = at(name);
        for (checked, opened) in [
            (Console::check_file(&path), Console::file(&path).map(drop)),
            (
                Console::check_socket(&path),
                Console::socket(&path).map(drop),
            ),
        ] {
            assert!(checked.is_err() && opened.is_err(), "{name}");
            if name != "none/x" {
                assert_eq!(text(checked), text(opened));
            }
        }
    }
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    Console::check_file(&at("new")).unwrap();
    Console::check_socket(&at("new")).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), left);
}

#[test]
fn escape_key_leaves_and_other_keys_reach_guest() {
    struct Guest(Mutex<Vec<u8>>);
    impl ConsoleInput for Guest {
        fn room(&self) -> usize {
            8_usize.saturating_sub(self.0.lock().len())
        }
        fn receive(&self, bytes: &[u8]) -> usize {
            self.0.lock().extend(bytes);
            bytes.len()
        }
    }
    let (guest, escape) = (Guest(Mutex::default()), Mutex::default());
    let left = std::sync::atomic::AtomicBool::new(false);
    let has_left = || left.load(std::sync::atomic::Ordering::Relaxed);
    let (reader, mut writer) = io::pipe().unwrap();
    let leave = || left.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut more_after = |keys: &[u8]| {
        writer.write_all(keys).unwrap();
        let typed = Typed {
            to: &guest,
            escape: &escape,
            leave: &leave,
        };
        pump(&reader, &typed).more
    };
    assert!(!more_after(b"ls\x01"));
    assert_eq!(*guest.0.lock(), b"ls");
    assert!(!more_after(b"ab"));
    assert_eq!(*guest.0.lock(), b"ls\x01b");
    assert!(!has_left());
    // Three places are left, and one is for a Ctrl-A: the rest stays in the pipe.
    assert!(more_after(b"1234\x01x"));
    assert_eq!(*guest.0.lock(), b"ls\x01b123");
    guest.0.lock().clear();
    assert!(!more_after(b""));
    assert_eq!(*guest.0.lock(), b"4");
    assert!(has_left());
}
