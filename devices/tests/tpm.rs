//! The TPM with a real `swtpm` (Debian's package of that name) behind it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that goes wrong panics"
)]

use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use devices::sandbox::Confinement;
use devices::tpm::{Emulator, LoadedTpm, Tpm, TpmSnapshot};
use memory::DeviceOps;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use state::{LoadError, Save as _, Store, Writer};
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

const BASE: u64 = 0xfed4_0000;
const PATIENCE: Duration = Duration::from_secs(30);
/// Registers.
const LOC_STATE: u64 = 0;
const LOC_CTRL: u64 = 8;
const LOC_STS: u64 = 0xc;
const CTRL_REQ: u64 = 0x40;
const CTRL_STS: u64 = 0x44;
const START: u64 = 0x4c;
const BUFFER: u64 = 0x80;

struct Swtpm {
    process: Child,
    socket: PathBuf,
}

impl Swtpm {
    fn start(dir: &Path) -> Self {
        let socket = dir.join("swtpm.sock");
        let process = Command::new("swtpm")
            .args(["socket", "--tpm2", "--tpmstate"])
            .arg(format!("dir={}", dir.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", socket.display()))
            .spawn()
            .expect("swtpm, of the package swtpm");
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < PATIENCE, "swtpm does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        Self { process, socket }
    }

    fn connect(&self) -> Arc<Emulator> {
        Arc::new(Emulator::connect(&self.socket).unwrap())
    }
}

/// Ends the process with the test.
impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn tpm(emulator: &Arc<Emulator>) -> Tpm {
    let report = |why: String| panic!("{why}");
    Tpm::new(BASE, Arc::clone(emulator), Confinement::default(), report).unwrap()
}

fn read(tpm: &Tpm, offset: u64) -> u32 {
    let mut data = [0; 4];
    tpm.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(tpm: &Tpm, offset: u64, value: u32) {
    tpm.write(offset, &value.to_le_bytes());
}

/// Executes a command as Linux's driver does. Returns the response, or `None` if the TPM failed.
fn execute(tpm: &Tpm, command: &[u8]) -> Option<Vec<u8>> {
    write(tpm, CTRL_REQ, 1);
    for (at, part) in (BUFFER..).step_by(4).zip(command.chunks(4)) {
        tpm.write(at, part);
    }
    write(tpm, START, 1);
    let start = Instant::now();
    while read(tpm, START) != 0 {
        assert!(start.elapsed() < PATIENCE, "the TPM is busy");
        std::thread::yield_now();
    }
    if read(tpm, CTRL_STS) & 1 != 0 {
        write(tpm, CTRL_REQ, 2);
        return None;
    }
    let mut header = [0; 10];
    tpm.read(BUFFER, &mut header);
    let len = u32::from_be_bytes(header[2..6].try_into().unwrap());
    let mut response = vec![0; len as usize];
    tpm.read(BUFFER, &mut response);
    write(tpm, CTRL_REQ, 2);
    Some(response)
}

fn command(code: u32, body: &[u8]) -> Vec<u8> {
    let len = 10 + body.len() as u32;
    let mut command = vec![0x80, 1];
    command.extend(len.to_be_bytes());
    command.extend(code.to_be_bytes());
    command.extend(body);
    command
}

/// TPM2_Startup(CLEAR).
fn startup() -> Vec<u8> {
    command(0x144, &[0, 0])
}

/// TPM2_GetRandom of 16 bytes.
fn get_random() -> Vec<u8> {
    command(0x17b, &[0, 16])
}

fn code(response: &[u8]) -> u32 {
    u32::from_be_bytes(response[6..10].try_into().unwrap())
}

#[test]
fn guest_gets_random_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let swtpm = Swtpm::start(dir.path());
    let emulator = swtpm.connect();
    let first = tpm(&emulator);
    // One locality, no measured launch, valid registers; the interface is CRB.
    assert_eq!(read(&first, LOC_STATE), 1 | 1 << 7);
    assert_eq!(read(&first, 0x30) & 0xff, 0x11);
    assert_eq!(read(&first, 0x5c), 0xfed4_0080);
    // Nothing starts before the locality is granted.
    write(&first, START, 1);
    assert_eq!((read(&first, START), read(&first, LOC_STS)), (0, 0));
    write(&first, LOC_CTRL, 1);
    assert_eq!((read(&first, LOC_STS), read(&first, LOC_STATE)), (1, 0x83));

    // TPM_RC_INITIALIZE: the TPM was switched on.
    let early = execute(&first, &get_random()).unwrap();
    assert_eq!(code(&early), 0x100);
    assert_eq!(code(&execute(&first, &startup()).unwrap()), 0);
    let numbers = |tpm: &Tpm| {
        let response = execute(tpm, &get_random()).unwrap();
        assert_eq!((code(&response), response.len()), (0, 28));
        response[12..].to_vec()
    };
    assert_ne!(numbers(&first), numbers(&first));

    // A reset of the VM: another device, and the same connection. The TPM has lost its power.
    drop(first);
    let second = tpm(&emulator);
    assert_eq!(read(&second, LOC_STS), 0);
    write(&second, LOC_CTRL, 1);
    let early = execute(&second, &get_random()).unwrap();
    assert_eq!(code(&early), 0x100);
    assert_eq!(code(&execute(&second, &startup()).unwrap()), 0);
    numbers(&second);
    drop((second, emulator));
    drop(swtpm);
}

#[test]
fn hostile_guest_harms_its_tpm_only() {
    let dir = tempfile::tempdir().unwrap();
    let swtpm = Swtpm::start(dir.path());
    let tpm = tpm(&swtpm.connect());
    write(&tpm, LOC_CTRL, 1);
    for len in [0, 9, 3969, u32::MAX] {
        let mut bad = startup();
        bad[2..6].copy_from_slice(&len.to_be_bytes());
        assert_eq!(execute(&tpm, &bad), None, "{len}");
    }
    // Accesses of any width at any place.
    for offset in [0, 1, 0x3f, 0x4e, 0x7f, 0x80, 0xff9, 0xfff, 0x1000, u64::MAX] {
        for len in 0..9 {
            let mut data = vec![0; len];
            tpm.read(offset, &mut data);
            tpm.write(offset, &data);
        }
    }
    // A command of all bytes that there are, and one that is none: the TPM answers with an error.
    let mut long = vec![0xee; 3968];
    long[2..6].copy_from_slice(&3968_u32.to_be_bytes());
    assert_ne!(code(&execute(&tpm, &long).unwrap()), 0);
    assert_eq!(code(&execute(&tpm, &startup()).unwrap()), 0);
    // The emulator goes: commands fail, and nothing waits.
    drop(swtpm);
    assert_eq!(execute(&tpm, &get_random()), None);
    assert_eq!(execute(&tpm, &get_random()), None);
}

#[test]
fn what_is_no_swtpm_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nothing");
    let refused = Emulator::connect(&path).unwrap_err().to_string();
    assert!(refused.contains("swtpm socket"), "{refused}");
    let listener = UnixListener::bind(&path).unwrap();
    let (told, tell) = channel();
    let fake = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[0; 8]).unwrap();
        tell.recv().unwrap();
    });
    let refused = Emulator::connect(&path).unwrap_err().to_string();
    assert!(refused.contains("lacks capabilities"), "{refused}");
    told.send(()).unwrap();
    fake.join().unwrap();
}

/// TPM2_PCR_Extend of PCR 16 by 32 bytes, authorised by an empty password.
fn extend(with: u8) -> Vec<u8> {
    let mut extend = command(0x182, &[0, 0, 0, 16, 0, 0, 0, 9]);
    extend[1] = 2;
    extend.extend([0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0xb]);
    extend.extend([with; 32]);
    let len = extend.len() as u32;
    extend[2..6].copy_from_slice(&len.to_be_bytes());
    extend
}

/// The value of PCR 16.
fn pcr(tpm: &Tpm) -> Vec<u8> {
    let read = command(0x17e, &[0, 0, 0, 1, 0, 0xb, 3, 0, 0, 1]);
    let response = execute(tpm, &read).unwrap();
    assert_eq!(code(&response), 0);
    response[response.len() - 32..].to_vec()
}

fn bytes(snapshot: &TpmSnapshot) -> Vec<u8> {
    let mut writer = Writer::default();
    snapshot.save(&mut writer.scope("tpm").unwrap()).unwrap();
    writer.finish()
}

fn load(tpm: &Tpm, saved: &[u8]) -> Result<LoadedTpm, LoadError> {
    let mut store = Store::open(saved).unwrap();
    tpm.load(&mut store.scope("tpm").unwrap())
}

#[test]
fn state_moves_to_another_emulator() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, destination) = (Swtpm::start(here.path()), Swtpm::start(there.path()));
    let (first, other) = (source.connect(), destination.connect());
    let (first, second) = (tpm(&first), tpm(&other));
    write(&first, LOC_CTRL, 1);
    assert_eq!(code(&execute(&first, &startup()).unwrap()), 0);
    assert_eq!(code(&execute(&first, &extend(0x11)).unwrap()), 0);
    let value = pcr(&first);
    assert_ne!(value, [0; 32]);
    let early = bytes(&first.snapshot(PATIENCE).unwrap());
    // The dry run changes nothing at the source, and is replaced by what comes last.
    load(&second, &early).unwrap().install().unwrap();
    assert_eq!(pcr(&second), value);
    assert_eq!(code(&execute(&first, &extend(0x22)).unwrap()), 0);
    let value = pcr(&first);
    let last = bytes(&first.snapshot(PATIENCE).unwrap());
    load(&second, &last).unwrap().install().unwrap();
    let read_all = |tpm: &Tpm| {
        let mut all = vec![0; 0x1000];
        tpm.read(0, &mut all);
        all
    };
    assert!(
        read_all(&second) == read_all(&first),
        "registers and buffer"
    );
    assert_eq!(pcr(&second), value);
    // The guest may stay: its TPM works as before.
    assert_eq!(pcr(&first), value);

    // A boot starts with an empty PCR, also if a guest came and was gone before it ran.
    drop(second);
    let third = tpm(&other);
    write(&third, LOC_CTRL, 1);
    assert_eq!(code(&execute(&third, &get_random()).unwrap()), 0x100);
    assert_eq!(code(&execute(&third, &startup()).unwrap()), 0);
    assert_eq!(pcr(&third), [0; 32]);
    drop((first, third, other));
    drop(source);
    drop(destination);
}

/// The answers of a fake swtpm to requests that read or set state.
#[derive(Clone, Copy)]
enum Fake {
    /// Answers with this header, and with the bytes that it announces.
    State { result: u32, len: u32, sent: usize },
    /// Answers with the result alone.
    Refuses(u32),
    /// Takes no state.
    RefusesToTake(u32),
    /// Answers nothing.
    Silent,
    /// Answers after a while, with a byte of state.
    Slow,
}

/// How long a slow emulator takes, and a patience that it exhausts.
const LONG: Duration = Duration::from_millis(100);
const SHORT: Duration = Duration::from_millis(50);

/// Reads a command of a request, and keeps the descriptor that comes with it. Returns false at the end.
fn next(stream: &UnixStream, command: &mut [u8; 4], kept: &mut Vec<OwnedFd>) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(command)];
    let got = recvmsg(stream, parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            kept.extend(fds);
        }
    }
    assert!([0, 4].contains(&got.bytes), "a request is sent at once");
    got.bytes > 0
}

/// Serves one connection as `fake` says. Commands of the guest are never answered.
fn serve(mut stream: UnixStream, fake: Fake) {
    let word = |value: u32| value.to_be_bytes();
    let (mut command, mut kept) = ([0; 4], Vec::new());
    while next(&stream, &mut command, &mut kept) {
        let mut body = |len: usize| {
            let mut body = vec![0; len];
            stream.read_exact(&mut body).unwrap();
            body
        };
        let answer = match u32::from_be_bytes(command) {
            1 => 0xffff_u64.to_be_bytes().to_vec(),
            2 => {
                body(4);
                vec![0; 4]
            }
            4 => vec![0; 8],
            12 => {
                body(12);
                match fake {
                    Fake::State { result, len, sent } => {
                        let mut answer = [result, 0, len, len].map(word).concat();
                        answer.extend(vec![7; sent]);
                        answer
                    }
                    Fake::Refuses(result) => word(result).to_vec(),
                    Fake::RefusesToTake(_) | Fake::Slow => {
                        if let Fake::Slow = fake {
                            std::thread::sleep(LONG);
                        }
                        let mut answer = [0, 0, 1, 1].map(word).concat();
                        answer.push(9);
                        answer
                    }
                    Fake::Silent => continue,
                }
            }
            13 => {
                let head = body(12);
                let len = u32::from_be_bytes(head[8..].try_into().unwrap());
                body(len as usize);
                match fake {
                    Fake::RefusesToTake(result) if len > 0 => word(result).to_vec(),
                    _ => vec![0; 4],
                }
            }
            14 => {
                if let Fake::Refuses(_) = fake {
                    std::thread::sleep(LONG);
                }
                vec![0; 4]
            }
            17 => {
                body(4);
                [0, 3968, 1, 4096].map(word).concat()
            }
            _ => vec![0; 4],
        };
        stream.write_all(&answer).unwrap();
    }
}

fn fake(dir: &Path, fake: Fake) -> (Arc<Emulator>, std::thread::JoinHandle<()>) {
    let path = dir.join("fake");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || serve(listener.accept().unwrap().0, fake));
    (Arc::new(Emulator::connect(&path).unwrap()), server)
}

#[test]
fn faults_of_the_emulator_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let huge = Fake::State {
        result: 0,
        len: u32::MAX,
        sent: 0,
    };
    for (kind, named, again) in [
        (huge, "4294967295 bytes is larger than", "earlier request"),
        (
            Fake::Refuses(0xa),
            "refused to hand out its state (result 0xa)",
            "result 0xa",
        ),
        (
            Fake::Silent,
            "did not answer the request to hand out its state",
            "earlier request",
        ),
    ] {
        let (emulator, server) = fake(dir.path(), kind);
        let tpm = tpm(&emulator);
        for expected in [named, again] {
            let refused = tpm.snapshot(SHORT).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
        if let Fake::Refuses(_) = kind {
            // The patience of the snapshot ends with it.
            emulator.power_on().unwrap();
        }
        drop((tpm, emulator));
        server.join().unwrap();
    }

    // No state is a TPM's, and the rest is taken or refused by swtpm.
    let none = Fake::State {
        result: 0x800,
        len: 0,
        sent: 0,
    };
    let (emulator, server) = fake(dir.path(), none);
    let without = tpm(&emulator);
    let saved = bytes(&without.snapshot(SHORT).unwrap());
    let refused = load(&without, &saved).unwrap_err().to_string();
    assert!(refused.contains("without permanent state"), "{refused}");
    drop((without, emulator));
    server.join().unwrap();
    let (emulator, server) = fake(dir.path(), Fake::RefusesToTake(3));
    let refusing = tpm(&emulator);
    let saved = bytes(&refusing.snapshot(SHORT).unwrap());
    let refused = load(&refusing, &saved).unwrap().install();
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("refused to take the state of a TPM (result 0x3)"),
        "{refused}"
    );
    drop((refusing, emulator));
    server.join().unwrap();
}

#[test]
fn state_is_not_read_during_a_command() {
    let dir = tempfile::tempdir().unwrap();
    let kind = Fake::State {
        result: 0,
        len: 1,
        sent: 1,
    };
    let (emulator, _server) = fake(dir.path(), kind);
    let tpm = tpm(&emulator);
    tpm.snapshot(SHORT).unwrap();
    write(&tpm, LOC_CTRL, 1);
    write(&tpm, CTRL_REQ, 1);
    tpm.write(BUFFER, &startup());
    write(&tpm, START, 1);
    assert_eq!(read(&tpm, START), 1);
    let refused = tpm.snapshot(SHORT).unwrap_err().to_string();
    assert!(refused.contains("in progress for 50 ms"), "{refused}");
}

extern "C" fn ignore_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[test]
fn signals_do_not_break_the_connection() {
    let signal = SIGRTMIN() + 3;
    register_signal_handler(signal, ignore_signal).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (emulator, server) = fake(dir.path(), Fake::Slow);
    let tpm = tpm(&emulator);
    let reader = std::thread::spawn(move || tpm.snapshot(PATIENCE).map(drop));
    while !reader.is_finished() {
        // The thread may have ended by now.
        let _ = reader.kill(signal);
        std::thread::sleep(Duration::from_millis(1));
    }
    reader.join().unwrap().unwrap();
    drop(emulator);
    server.join().unwrap();
}
