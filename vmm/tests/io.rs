//! The pocket guest drives the devices of its machine on `/dev/kvm`, while the machine is paused and
//! resumed repeatedly. All data are checked, in the guest and here. Needs `/dev/net/tun` and
//! CAP_NET_ADMIN.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use control::{Registry, Request};
use guest::pattern::{self, WORDS};
use guest::{Command, DISK_PAGES, Line, Options, Workload};
use spec::{PayloadConfig, VmConfig};
use vmm::{Pool, PoolConfig};

const PATIENCE: Duration = Duration::from_secs(60);
const DATAGRAMS: u32 = 200;
const TYPED: usize = 4000;
const STOPS: usize = 1000;

/// Sends datagrams to the guest, each until it comes back.
fn exchange_datagrams(done: &AtomicBool) -> u32 {
    let socket = UdpSocket::bind("10.214.1.1:0").unwrap();
    socket.connect("10.214.1.2:7").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let start = Instant::now();
    let mut answered = 0;
    while answered < DATAGRAMS {
        assert!(start.elapsed() < PATIENCE, "{answered} datagrams came back");
        let sent: Vec<u8> = (0..600_u32)
            .map(|i| (i * 7 + answered * 13) as u8)
            .collect();
        socket.send(&sent).unwrap();
        let mut back = [0; 2048];
        // What was on its way while the machine stood may come late, or never.
        while let Ok(len) = socket.recv(&mut back) {
            if back[..len] == sent {
                answered += 1;
                break;
            }
        }
    }
    done.store(true, Ordering::SeqCst);
    answered
}

/// Types, and reads what comes back.
fn type_on_console(path: &Path) {
    let mut console = UnixStream::connect(path).unwrap();
    console.set_read_timeout(Some(PATIENCE)).unwrap();
    let typed: Vec<u8> = (0..TYPED).map(|i| b'a' + (i % 26) as u8).collect();
    let mut reader = console.try_clone().unwrap();
    let copy = typed.clone();
    let writer = thread::spawn(move || {
        for part in copy.chunks(100) {
            console.write_all(part).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
    });
    let mut back = vec![0; TYPED];
    reader.read_exact(&mut back).unwrap();
    assert!(back == typed);
    writer.join().unwrap();
}

/// Asks the guest how far it is.
fn ask(serial: &mut BufReader<UnixStream>) -> Line {
    serial
        .get_mut()
        .write_all(format!("{}\n", Command::Io).as_bytes())
        .unwrap();
    let mut text = String::new();
    loop {
        text.clear();
        assert!(serial.read_line(&mut text).unwrap() > 0);
        match Line::parse(&text) {
            Some(line @ Line::Io { .. }) => return line,
            Some(Line::Refused { what }) => unreachable!("{what:?}"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn devices_survive_pause_and_resume() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    std::fs::write(path("pocket"), guest::IMAGE).unwrap();
    let disk = std::fs::File::create(path("disk")).unwrap();
    disk.set_len(DISK_PAGES as u64 * 4096).unwrap();
    let options = Options {
        workload: Workload::Io,
        ..Options::default()
    };
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(path("pocket")),
        cmdline: Some(options.to_string()),
        ..PayloadConfig::default()
    });
    let json = |value| serde_json::from_value(value).unwrap();
    config.memory.size = 64 << 20;
    config.serial =
        serde_json::from_value(serde_json::json!({ "mode": "Socket", "socket": path("serial") }))
            .unwrap();
    config.console =
        serde_json::from_value(serde_json::json!({ "mode": "Socket", "socket": path("console") }))
            .unwrap();
    config.disks = json(serde_json::json!([{ "path": path("disk") }]));
    config.net = Some(vec![
        serde_json::from_str(r#"{"ip":"10.214.1.1","mask":"255.255.255.0"}"#).unwrap(),
    ]);
    let registry = Registry::new(Pool::start(&PoolConfig::default()).unwrap());
    let vm = registry.create(None, config).unwrap();
    vm.ask(Request::Boot).await.unwrap();
    let serial = UnixStream::connect(path("serial")).unwrap();
    serial.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut serial = BufReader::new(serial);

    let done = Arc::new(AtomicBool::new(false));
    let net_done = Arc::clone(&done);
    let console = path("console");
    let net = thread::spawn(move || exchange_datagrams(&net_done));
    let typing = thread::spawn(move || type_on_console(Path::new(&console)));
    let mut stops = 0;
    let start = Instant::now();
    loop {
        for _ in 0..10 {
            vm.ask(Request::Pause).await.unwrap();
            vm.ask(Request::Resume).await.unwrap();
            stops += 1;
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        let told = ask(&mut serial);
        let Line::Io {
            random,
            blocks,
            bad,
            ..
        } = told
        else {
            unreachable!("it is asked for that");
        };
        assert_eq!(bad, 0, "after {stops} stops");
        let is_enough = stops >= STOPS && blocks > 3 * DISK_PAGES as u64 && random > 10_000;
        if is_enough && done.load(Ordering::SeqCst) && typing.is_finished() {
            break;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "after {stops} stops: {told}, {} typed",
            typing.is_finished()
        );
    }
    typing.join().unwrap();
    assert_eq!(net.join().unwrap(), DATAGRAMS);
    let Line::Io {
        frames, chars, bad, ..
    } = ask(&mut serial)
    else {
        unreachable!("it is asked for that");
    };
    assert!(frames > u64::from(DATAGRAMS), "{frames} frames");
    assert_eq!((chars, bad), (TYPED as u64, 0));

    // What is on the disk is what the guest wrote, as seen from here.
    vm.ask(Request::Pause).await.unwrap();
    let bytes = std::fs::read(path("disk")).unwrap();
    let mut generations = Vec::new();
    for (slot, raw) in bytes.chunks_exact(4096).enumerate() {
        let mut page = [0_u64; WORDS];
        for (word, raw) in page.iter_mut().zip(raw.chunks_exact(8)) {
            *word = u64::from_ne_bytes(raw.try_into().unwrap());
        }
        assert!(pattern::matches(&page, slot as u64, page[0]), "page {slot}");
        generations.push(page[0]);
    }
    let (least, most) = (generations.iter().min(), generations.iter().max());
    assert!(most.unwrap() - least.unwrap() <= 1, "{least:?} to {most:?}");
    println!("{stops} stops, {frames} frames, {chars} characters, {most:?} times round the disk");
}
