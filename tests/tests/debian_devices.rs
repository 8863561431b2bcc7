//! An unmodified Debian system on a disk, with its devices, driven over REST. Wants a complete KVM,
//! and the disks of `ci/debian-disk`: `ci/test e2e` runs it in the rig.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};
use spec::{
    BalloonConfig, CpusConfig, DeviceState, DiskConfig, MemoryMode, MemoryRestoreMode, NetConfig,
    VmConfig, VmRemoveDevice, VmResizeDisk, VsockConfig,
};
use tests::{Face, Machine, Network, ROUTER, RUNS, Service, vsock_echo};

const MIB: u64 = 1 << 20;
/// Memory of guests that move: small, as the rig copies slowly.
const SMALL: u64 = 384 * MIB;

fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    Ok(serde_json::from_str(text)?)
}

fn sha256(data: &[u8]) -> String {
    let digest = Sha256::digest(data);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first word of what `sha256sum` prints.
fn sum(printed: &str) -> &str {
    printed.split(' ').next().unwrap_or_default()
}

fn host(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("run {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {text}{error}"
    );
    Ok(text)
}

async fn network(machine: &mut Machine) -> Result<()> {
    machine.run("ping -c 3 192.168.249.1").await?;
    // From the guest to the host.
    let listener = TcpListener::bind("192.168.249.1:5000")?;
    let taken = thread::spawn(move || -> Result<Vec<u8>> {
        let (mut stream, _) = listener.accept()?;
        let mut data = Vec::new();
        stream.read_to_end(&mut data)?;
        Ok(data)
    });
    let send = "head -c 8000000 /dev/urandom >/tmp/out; sha256sum /tmp/out; \
                socat -u FILE:/tmp/out TCP:192.168.249.1:5000";
    let sent = machine.run(send).await?;
    let data = taken.join().unwrap()?;
    ensure!(data.len() == 8_000_000 && sha256(&data) == sum(&sent));
    // And back.
    let listener = TcpListener::bind("192.168.249.1:5001")?;
    let given = thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        Ok(stream.write_all(&data)?)
    });
    let got = machine
        .run("socat -u TCP:192.168.249.1:5001 CREATE:/tmp/in; sha256sum /tmp/in")
        .await?;
    given.join().unwrap()?;
    ensure!(sum(&got) == sum(&sent));
    println!("network: 3 pings, 8 MB there and back by TCP, sums agree");
    Ok(())
}

async fn vsock(machine: &mut Machine, socket: &Path) -> Result<()> {
    machine
        .run("(socat VSOCK-LISTEN:1234,fork EXEC:cat >/dev/null 2>&1 &)")
        .await?;
    vsock_echo(socket, 1234).await?;
    let path = format!("{}_52", socket.display());
    // Of the last time.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(path)?;
    let heard = thread::spawn(move || -> Result<String> {
        let (mut stream, _) = listener.accept()?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    machine
        .run("echo from the guest | socat -u STDIN VSOCK-CONNECT:2:52")
        .await?;
    ensure!(heard.join().unwrap()? == "from the guest\n");
    println!("vsock: 300 kB echoed by the guest, and a line from it");
    Ok(())
}

async fn hot_disk(machine: &mut Machine) -> Result<()> {
    let image = machine.service.path("hot.qcow2");
    let image = image.to_str().context("a path in UTF-8")?.to_owned();
    host("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"])?;
    let disk: DiskConfig = json(&format!(
        r#"{{"path":"{image}","id":"hot","image_type":"Qcow2"}}"#
    ))?;
    let start = Instant::now();
    let (client, vm) = (machine.client(), &machine.vm);
    let added = client.vms_add_disk(vm, &disk).await?.context("a device")?;
    let again = client.vms_add_disk(vm, &disk).await.unwrap_err();
    ensure!(again.code() == Some("device-exists"), "{again}");
    let wait = "for i in $(seq 300); do [ -b /dev/vdb ] && break; sleep 0.1; done; cat /sys/block/vdb/size";
    ensure!(machine.run(wait).await? == "131072");
    let usable = start.elapsed();
    let resize = VmResizeDisk {
        id: "hot".to_owned(),
        desired_size: 96 * MIB,
    };
    machine
        .client()
        .vms_resize_disk(&machine.vm, &resize)
        .await?;
    let wait = "for i in $(seq 300); do [ $(cat /sys/block/vdb/size) = 196608 ] && break; sleep 0.1; done; \
                cat /sys/block/vdb/size";
    ensure!(machine.run(wait).await? == "196608");
    let fill = "mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && head -c 20000000 /dev/urandom >/mnt/data && \
                sha256sum /mnt/data && umount /mnt";
    let filled = machine.run(fill).await?;

    let remove = VmRemoveDevice {
        id: "hot".to_owned(),
    };
    let (client, vm) = (machine.client(), &machine.vm);
    client.vms_remove_device(vm, &remove).await?;
    let start = Instant::now();
    loop {
        let tree = client.vms_info(vm).await?.device_tree.unwrap_or_default().0;
        match tree.get("hot").map(|device| device.state) {
            None => break,
            Some(DeviceState::Leaving) if start.elapsed() < RUNS => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Some(state) => bail!("the device is {state:?} after {:?}", start.elapsed()),
        }
    }
    ensure!(
        machine
            .run("ls /sys/block")
            .await?
            .split_whitespace()
            .all(|name| name != "vdb")
    );
    let gone = machine
        .client()
        .vms_remove_device(&machine.vm, &remove)
        .await;
    ensure!(gone.unwrap_err().code() == Some("no-such-device"));

    host("qemu-img", &["check", &image])?;
    let raw = format!("{image}.raw");
    host("qemu-img", &["convert", "-O", "raw", &image, &raw])?;
    let data = format!("{image}.data");
    host("debugfs", &["-R", &format!("dump /data {data}"), &raw])?;
    ensure!(sha256(&fs::read(&data)?) == sum(&filled));
    println!(
        "hot disk: {} in the guest after {} ms, resized, formatted, filled, removed; contents verified from the host",
        added.bdf,
        usable.as_millis()
    );
    Ok(())
}

async fn balloon(machine: &mut Machine) -> Result<()> {
    let all = machine.balloon_holds(0).await?;
    let less = machine.balloon_holds(256 * MIB).await?;
    ensure!(all - less == 256 * 1024, "{all} KiB, then {less} KiB");
    ensure!(machine.counter("__balloon", "inflated_bytes").await? >= 256 << 20);
    ensure!(machine.balloon_holds(0).await? == all);
    println!(
        "balloon: the guest has {all} KiB, {less} KiB with 256 MiB in it, and {all} KiB again"
    );
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_on_a_raw_disk_uses_every_device() -> Result<()> {
    let mut socket = None;
    let disk = r#"{"path":"/dev/vda","image_type":"Raw","num_queues":2}"#;
    let service = Service::start(Face::Many).await?;
    let mut machine = Machine::boot(service, disk, |service, config| {
        let path = service.path("vsock.sock");
        let text = path.to_string_lossy().into_owned();
        socket = Some(path);
        config.vsock = json::<VsockConfig>(&format!(r#"{{"cid":3,"socket":"{text}"}}"#)).ok();
        config.net = json::<NetConfig>(r#"{"num_queues":4,"ip":"192.168.249.1"}"#)
            .ok()
            .map(|net| vec![net]);
        config.balloon = json::<BalloonConfig>(r#"{"size":0}"#).ok();
    })
    .await?;
    println!(
        "raw: {}",
        machine
            .run("uname -v; findmnt -no SOURCE /")
            .await?
            .replace('\n', ", ")
    );
    // `cpus.nested` is off by default; the host has SVM.
    let seen = "grep -cwE 'svm|vmx' /proc/cpuinfo || true";
    ensure!(machine.run(seen).await?.trim() == "0");
    network(&mut machine).await?;
    vsock(&mut machine, &socket.context("a socket")?).await?;
    hot_disk(&mut machine).await?;
    balloon(&mut machine).await?;
    // All of it works across a pause.
    let (client, vm) = (machine.client(), &machine.vm);
    client.vms_pause(vm).await?;
    client.vms_resume(vm).await?;
    machine
        .run("dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct && ping -c 1 192.168.249.1")
        .await?;
    ensure!(machine.counter("_disk0", "errors").await? == 0);
    machine.power_off().await
}

/// The system is saved while it writes to its disk, and from the snapshot it writes on: the file is whole.
async fn comes_back_with_its_disk(machine: &mut Machine) -> Result<()> {
    let write = "(for i in $(seq 0 29); do head -c 100000 /dev/urandom | tee -a /root/load | sha256sum >>/tmp/sums; \
                 sleep 0.1; done; touch /tmp/written) >/dev/null 2>&1 &";
    machine.run(write).await?;
    let written = machine.save_and_restore(MemoryRestoreMode::Map).await?;
    let check = "for i in $(seq 600); do [ -e /tmp/written ] && break; sleep 0.1; done; \
                 sync; echo 3 >/proc/sys/vm/drop_caches; for i in $(seq 0 29); do \
                 dd if=/root/load bs=100000 skip=$i count=1 2>/dev/null | sha256sum; done | cmp - /tmp/sums && \
                 sha256sum /root/kept >/dev/null && wc -c </root/load; dmesg | grep -ci 'ext4-fs error\\|i/o error' || true";
    let checked = machine.run(check).await?;
    // The shell may add that the writer is done.
    ensure!(checked.starts_with("3000000\n0"), "{checked}");
    println!(
        "qcow2: saved while it wrote ({} pages), and restored with its disk",
        written.pages
    );
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_on_a_qcow2_disk_boots_and_keeps_what_it_wrote() -> Result<()> {
    let disk = r#"{"path":"/dev/vdb","image_type":"Qcow2"}"#;
    let small = |_: &Service, config: &mut VmConfig| config.memory.size = SMALL;
    let service = Service::start(Face::Many).await?;
    let mut machine = Machine::boot(service, disk, small).await?;
    let write = "head -c 20000000 /dev/urandom >/root/kept && sha256sum /root/kept && sync";
    let written = machine.run(write).await?;
    machine.power_off().await?;
    machine.boot_again().await?;
    let kept = machine.run("sha256sum /root/kept").await?;
    ensure!(sum(&kept) == sum(&written), "{written} {kept}");
    println!("qcow2: {kept}, after another boot");
    comes_back_with_its_disk(&mut machine).await?;
    // The image's tables are another's to change now.
    let write = "head -c 20000000 /dev/urandom >/root/more && sha256sum /root/more";
    let written = machine.run(write).await?;
    let (_left, _) = machine
        .move_to(
            Service::start(Face::Many).await?,
            "127.0.0.1",
            MemoryMode::Precopy,
        )
        .await?;
    let check = "sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum /root/more /root/kept";
    let there = machine.run(check).await?;
    ensure!(
        there.starts_with(sum(&written)) && there.contains(sum(&kept)),
        "{there}"
    );
    machine
        .run("head -c 20000000 /dev/urandom >/root/there && sync")
        .await?;
    println!("qcow2: moved to another service with what it wrote");
    machine.power_off().await
}

/// The guest moves from one host to another and back, each with a network of its own, while it writes a
/// file and sends a stream of lines: both come out whole.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_moves_while_it_works() -> Result<()> {
    const LINES: usize = 300;
    const PIECES: usize = 150;
    let disk = r#"{"path":"/dev/vda","image_type":"Raw"}"#;
    let network = Network::with_hosts(&["north", "south"])?;
    let service = Service::start_on("north").await?;
    let mut machine = Machine::boot(service, disk, |service, config| {
        config.memory.size = SMALL;
        // The emulated host has one CPU, which the guest shares with both services and this test.
        config.cpus = CpusConfig::with_vcpus(1);
        config.net = Some(vec![json(r#"{"tap":"tap0"}"#).unwrap()]);
        let socket = service.path("vsock").to_string_lossy().into_owned();
        config.vsock = Some(json(&format!(r#"{{"cid":7,"socket":"{socket}"}}"#)).unwrap());
    })
    .await?;
    let socket = machine.service.path("vsock");
    vsock(&mut machine, &socket).await?;
    // A login comes before the network does.
    machine
        .run(&format!(
            "(for i in $(seq 60); do ping -c 1 -W 1 {ROUTER} >/dev/null 2>&1 && exit 0; sleep 0.5; done; ip addr; false)"
        ))
        .await?;
    let listener = TcpListener::bind((ROUTER, 5002))?;
    let stream = thread::spawn(move || -> Result<String> {
        let (mut stream, _) = listener.accept()?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    machine
        .run(&format!(
            "(for i in $(seq {LINES}); do echo line $i; sleep 0.1; done | \
             socat -d -d -u - TCP:{ROUTER}:5002 2>/tmp/socat; echo stream $? >/tmp/streamed) >/dev/null 2>&1 & \
             (for i in $(seq {PIECES}); do head -c 50000 /dev/urandom | tee -a /root/file | sha256sum >>/tmp/sums; \
             sleep 0.2; done; touch /tmp/written) >/dev/null 2>&1 & true"
        ))
        .await?;
    let mut left = Vec::new();
    for (host, mode) in [
        ("south", MemoryMode::Precopy),
        ("north", MemoryMode::Hybrid),
    ] {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let there = Service::start_on(host).await?;
        let address = network.address(host)?;
        let (before, info) = machine.move_to(there, &address, mode).await?;
        ensure!(before.client().vms_list().await?.is_empty());
        let stop = info.downtime.context("a guest that moved was stopped")?;
        println!(
            "{mode} to {host}: moved in {} ms, {} rounds: {stop:?}, predicted {:?} us",
            info.elapsed_us / 1000,
            info.rounds,
            info.predicted_downtime_us
        );
        // Its folder holds the sockets' paths.
        left.push(before);
        machine.run("true").await?;
    }
    vsock(&mut machine, &socket).await?;
    machine
        .run(
            "(for i in $(seq 300); do [ -e /tmp/written ] && [ -e /tmp/streamed ] && exit 0; sleep 0.2; done; \
             ls /tmp; tail -5 /tmp/socat; ip neigh; ss -tno; false)",
        )
        .await?;
    let ended = machine.run("cat /tmp/streamed; tail -5 /tmp/socat").await?;
    ensure!(ended.starts_with("stream 0"), "{ended}");
    let text = stream.join().unwrap()?;
    let expected: String = (1..=LINES).map(|i| format!("line {i}\n")).collect();
    ensure!(text == expected, "the stream has {} bytes", text.len());
    let check = format!(
        "sync; echo 3 >/proc/sys/vm/drop_caches; for i in $(seq 0 {}); do \
         dd if=/root/file bs=50000 skip=$i count=1 2>/dev/null | sha256sum; done | cmp - /tmp/sums && wc -c </root/file",
        PIECES - 1
    );
    let written = machine.run(&check).await?;
    ensure!(written == (PIECES * 50_000).to_string(), "{written}");
    let log = machine
        .run("dmesg | grep -i 'rcu.*stall\\|clocksource.*unstable\\|i/o error' || true")
        .await?;
    // Of time it may complain: the emulated host's is not even.
    println!("the guest's kernel says: {log:?}");
    ensure!(!log.to_lowercase().contains("i/o error"), "{log}");
    println!("file of {written} bytes and stream of {LINES} lines are whole");
    machine.power_off().await
}
