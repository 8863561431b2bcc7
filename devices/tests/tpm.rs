//! The TPM with a real `swtpm` (Debian's package of that name) behind it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that goes wrong panics"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use devices::sandbox::Confinement;
use devices::tpm::{Emulator, Tpm};
use memory::DeviceOps;

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

    fn end(mut self) {
        let _ = self.process.kill();
        self.process.wait().unwrap();
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
    swtpm.end();
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
    swtpm.end();
    assert_eq!(execute(&tpm, &get_random()), None);
    assert_eq!(execute(&tpm, &get_random()), None);
}

#[test]
fn what_is_no_swtpm_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nothing");
    let refused = Emulator::connect(&path).unwrap_err().to_string();
    assert!(refused.contains("swtpm socket"), "{refused}");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let (told, tell) = channel();
    let fake = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut stream, &[0; 8]).unwrap();
        tell.recv().unwrap();
    });
    let refused = Emulator::connect(&path).unwrap_err().to_string();
    assert!(refused.contains("lacks capabilities"), "{refused}");
    told.send(()).unwrap();
    fake.join().unwrap();
}
