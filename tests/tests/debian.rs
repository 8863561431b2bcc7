//! An unmodified Debian kernel as guest, driven over REST. Wants a complete KVM: `ci/test e2e`
//! runs it in the rig.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use spec::{
    CpusConfig, DiskConfig, ForkVm, MemoryRestoreMode, MergeSnapshots, MigrationPhase,
    RestoreConfig, StartMigration, VmConfig, VmId, VmRemoveDevice, VmSnapshotConfig, VmState,
};
use tests::debian::BUTTON;
use tests::{Face, Serial, Service, Shell, await_anyone, debian, snapshots};

/// Booting takes seconds on silicon, and a minute or two where the host is emulated.
const BOOTS: Duration = Duration::from_secs(300);

/// Debian, with its serial port in a file of the service.
fn debian(service: &Service, vcpus: u32) -> Result<(VmConfig, Serial)> {
    let serial = Serial::at(service.path("debian.serial"));
    let config = debian::config(CpusConfig::with_vcpus(vcpus), 512 << 20, &serial)?;
    Ok((config, serial))
}

async fn boots_reboots_and_obeys_the_button(vcpus: u32) -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (config, serial) = debian(&service, vcpus)?;
    let vm = service.create("debian", config).await?;
    let client = service.client();

    client.vms_boot(&vm).await?;
    let up = format!("guest: up cpus={vcpus} ");
    service.prints(&vm, &serial, &up, 1, BOOTS).await?;
    // The line after it: then this one is whole.
    let text = service.prints(&vm, &serial, BUTTON, 1, BOOTS).await?;
    for line in text
        .lines()
        .filter(|line| line.contains("Linux version") || line.contains("guest: up"))
    {
        println!("{vcpus} vCPU: {}", line.trim_end());
    }
    assert!(
        text.lines()
            .any(|line| line.contains("Linux version") && line.contains("Debian")),
        "{text}"
    );

    let map = client.vms_memory_map(&vm).await?;
    if vcpus == 1 {
        println!("{map}");
    }
    let flat = map.to_string();
    assert!(
        flat.contains("ram below 4G") && flat.contains("msix-table"),
        "{flat}"
    );

    client.vms_reboot(&vm).await?;
    let text = service.prints(&vm, &serial, &up, 2, BOOTS).await?;
    assert_eq!(text.matches("Linux version").count(), 2, "{text}");
    println!("{vcpus} vCPU: rebooted: it is up again");

    service.prints(&vm, &serial, BUTTON, 2, BOOTS).await?;
    client.vms_power_button(&vm).await?;
    let info = service.reaches(&vm, VmState::Shutdown).await?;
    assert_eq!(info.failure, None);
    let text = serial.text();
    assert!(text.contains("guest: power button"), "{text}");
    println!("{vcpus} vCPU: the guest saw the power button, and powered off");
    Ok(())
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_boots_with_one_vcpu() -> Result<()> {
    boots_reboots_and_obeys_the_button(1).await
}

/// A system that writes files without end, and checks them.
const LOAD: &str = "mkdir /w; cd /w; head -c 1000000 /dev/urandom >kept; sha256sum kept >sums; (while :; do \
    for i in 0 1 2 3; do head -c 100000 /dev/urandom >$i; sha256sum $i >$i.sum; done; \
    for i in 0 1 2 3; do sha256sum -c $i.sum || touch bad; done; echo >>rounds; sleep 0.5; done) >/dev/null 2>&1 &";

/// Waits until the load has checked all its files once more.
async fn works_on(shell: &mut Shell) -> Result<()> {
    let wait = "was=$(cat /w/rounds | wc -l); for i in $(seq 600); do \
        [ $(cat /w/rounds | wc -l) -gt $((was + 1)) ] && break; sleep 0.1; done; \
        [ $(cat /w/rounds | wc -l) -gt $((was + 1)) ] && [ ! -e /w/bad ] && cd /w && sha256sum -c sums";
    shell.run(wait, BOOTS).await?;
    Ok(())
}

/// How far a guest's clock is behind the host's, in seconds: between these two.
///
/// A kernel reads the time at its boot, in whole seconds, and is behind from then on by the time that it needed
/// for that: seconds, where the machine is busy.
#[derive(Clone, Copy, Debug)]
struct Lag {
    least: f64,
    most: f64,
}

impl Lag {
    async fn of(shell: &mut Shell) -> Result<Self> {
        let host = || SystemTime::now().duration_since(UNIX_EPOCH);
        let before = host()?.as_secs_f64();
        let guest: f64 = shell.run("date +%s", BOOTS).await?.parse()?;
        let after = host()?.as_secs_f64();
        // The guest's clock was in the second that began at `guest`.
        Ok(Self {
            least: before - guest - 1.0,
            most: after - guest,
        })
    }

    /// Checks that the clock did not stop with the guest: it would be further behind than it was. A second
    /// more or less is an error of two clocks.
    fn stays(self, now: Self) -> Result<()> {
        let is_same = now.least <= self.most + 1.0 && self.least <= now.most + 1.0;
        ensure!(
            is_same,
            "the guest's clock was behind by {self:?}, and is by {now:?}"
        );
        Ok(())
    }

    /// Returns how long a guest must be stopped for [`Lag::stays`] to see a clock that stopped, too, if the
    /// next look takes as long as this one.
    fn shows(self) -> Duration {
        Duration::from_secs_f64(2.0 * (self.most - self.least) + 2.0)
    }
}

/// Checks that the kernel has reseeded its random numbers as often as it became another VM, and returns some.
async fn reseeded(shell: &mut Shell, times: usize) -> Result<String> {
    let log = shell.run("dmesg | grep 'random: ' || true", BOOTS).await?;
    let fork = "crng reseeded due to virtual machine fork";
    ensure!(log.matches(fork).count() == times, "{times} times: {log}");
    let random = "head -c 16 /dev/urandom | hexdump -v -e '/1 \"%02x\"'";
    shell.run(random, BOOTS).await
}

/// Debian under load: a live snapshot and an increment, the system from them in each way of giving it its
/// memory, and its forks. The kernel checks its files, and reseeds its random numbers by the VM generation ID;
/// the cloud kernel has no driver for that.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_comes_back_from_live_snapshots() -> Result<()> {
    const LAST: usize = 1;
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = debian(&service, 1)?;
    config.payload.kernel = config.payload.kernel.map(|kernel| kernel + "-generic");
    // The kernel's messages must not mix with what the shell prints.
    config.payload.cmdline = Some("console=ttyS0 panic=-1 quiet".to_owned());
    config.memory.size = 128 << 20;
    // The rig's kernel can protect shared memory only.
    config.memory.shared = true;
    let serial = service.path("serial");
    config.serial = serde_json::from_value(json!({ "mode": "Socket", "socket": serial }))?;
    let vm = service.create("debian", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    let start = Instant::now();
    let mut shell = Shell::after(&serial, "guest: up", BOOTS).await?;
    println!("up after {:?}", start.elapsed());
    let lag = Lag::of(&mut shell).await?;
    println!("its clock is behind: {lag:?}");
    // It read the time after it was started, and then fell behind by no more than what has passed.
    let booted = start.elapsed().as_secs_f64();
    ensure!(lag.most >= 0.0 && lag.least <= booted, "{lag:?}");
    shell.run(LOAD, BOOTS).await?;
    let mut randoms = vec![reseeded(&mut shell, 0).await?];
    let folder = |n| service.path(format!("snapshot-{n}"));
    for n in 0..=LAST {
        works_on(&mut shell).await?;
        let what = VmSnapshotConfig {
            base_url: (n > 0).then(|| format!("file://{}", folder(n - 1).display())),
            ..snapshots::to(&folder(n))
        };
        let begun = client.vms_snapshot(&vm, &what).await?;
        let taken = snapshots::over(&service, &begun).await;
        ensure!(taken.phase == MigrationPhase::Completed, "{n}: {taken:?}");
        println!(
            "snapshot {n}: {} pages, stop {:?}",
            taken.pages, taken.downtime
        );
    }
    let taken = Instant::now();
    works_on(&mut shell).await?;
    client.vms_delete(&vm).await?;
    let whole = service.path("whole");
    let merge = MergeSnapshots {
        source_url: format!("file://{}", folder(LAST).display()),
        destination_url: format!("file://{}", whole.display()),
    };
    let begun = client.snapshots_merge(&merge).await?;
    let merged = snapshots::over(&service, &begun).await;
    ensure!(merged.phase == MigrationPhase::Completed, "{merged:?}");

    let last = folder(LAST);
    tokio::time::sleep(lag.shows().saturating_sub(taken.elapsed())).await;
    for (mode, dir) in [
        (MemoryRestoreMode::Copy, &last),
        (MemoryRestoreMode::OnDemand, &last),
        (MemoryRestoreMode::Map, &whole),
    ] {
        let what = RestoreConfig {
            memory_restore_mode: mode,
            ..snapshots::from(dir, true)
        };
        let begun = client.vms_restore(&vm, &what).await?;
        let came = snapshots::over(&service, &begun).await;
        ensure!(
            came.phase == MigrationPhase::Completed,
            "{mode:?}: {came:?}"
        );
        let mut shell = Shell::attach(&serial, BOOTS).await?;
        lag.stays(Lag::of(&mut shell).await?)?;
        works_on(&mut shell).await?;
        randoms.push(reseeded(&mut shell, 1).await?);
        if mode == MemoryRestoreMode::Copy {
            randoms.extend(forks_of(&service, &vm).await?);
        }
        shell.type_in("poweroff -f\n").await?;
        let info = service.reaches(&vm, VmState::Shutdown).await?;
        ensure!(info.failure.is_none(), "{mode:?}: {:?}", info.failure);
        client.vms_delete(&vm).await?;
        println!("{mode:?}: the guest's files are whole, and its random numbers its own");
    }
    let count = randoms.len();
    randoms.sort();
    randoms.dedup();
    ensure!(randoms.len() == count, "two guests are alike: {randoms:?}");
    Ok(())
}

/// Forks a VM that runs, checks its two forks, and returns random numbers of theirs.
async fn forks_of(service: &Service, vm: &VmId) -> Result<Vec<String>> {
    let client = service.client();
    let port = |n: &str| service.path(format!("fork-{n}"));
    let overrides = json!({ "serial": { "mode": "Socket", "socket": port("{n}") } });
    let what = ForkVm {
        count: 2,
        resume: true,
        overrides: serde_json::from_value(overrides)?,
        ..ForkVm::default()
    };
    let begun = client.vms_fork(vm, &what).await?;
    let made = snapshots::over(service, &begun).await;
    ensure!(made.phase == MigrationPhase::Completed, "{made:?}");
    let mut randoms = Vec::new();
    for n in ["1", "2"] {
        let mut shell = Shell::attach(&port(n), BOOTS).await?;
        works_on(&mut shell).await?;
        randoms.push(reseeded(&mut shell, 2).await?);
        client.vms_delete(&format!("{vm}-{n}").parse()?).await?;
    }
    println!("forks: {randoms:?}");
    Ok(randoms)
}

#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_boots_with_two_vcpus() -> Result<()> {
    boots_reboots_and_obeys_the_button(2).await
}

/// The maximum number of devices: a kernel finds those that share slots, and ejects one that has its own.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_finds_64_devices() -> Result<()> {
    const DISKS: usize = 63;
    const USED: &str = "512-byte logical blocks";
    let service = Service::start(Face::Many).await?;
    let (mut config, serial) = debian(&service, 1)?;
    let disk = |i| -> Result<DiskConfig> {
        let path = service.path(format!("{i}.raw"));
        File::create(&path)?.set_len(1 << 20)?;
        Ok(serde_json::from_value(
            json!({ "path": path, "id": format!("disk{i}") }),
        )?)
    };
    config.disks = Some((0..DISKS).map(disk).collect::<Result<_>>()?);
    let vm = service.create("debian", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    service.prints(&vm, &serial, USED, DISKS, BOOTS).await?;
    service.prints(&vm, &serial, BUTTON, 1, BOOTS).await?;

    let remove = |id: &str| VmRemoveDevice { id: id.to_owned() };
    let shared = client.vms_remove_device(&vm, &remove("disk62")).await;
    assert_eq!(shared.unwrap_err().code(), Some("device-shares-slot"));
    client.vms_remove_device(&vm, &remove("disk1")).await?;
    let start = Instant::now();
    loop {
        let tree = client
            .vms_info(&vm)
            .await?
            .device_tree
            .unwrap_or_default()
            .0;
        if !tree.contains_key("disk1") {
            assert_eq!(tree.len(), 63);
            break;
        }
        assert!(start.elapsed() < BOOTS, "{}", serial.text());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let added = client.vms_add_disk(&vm, &disk(DISKS)?).await?;
    let added = added.context("a device of a running guest")?;
    service.prints(&vm, &serial, USED, DISKS + 1, BOOTS).await?;
    println!(
        "64 devices: all found, one removed, another added at {}",
        added.bdf
    );
    Ok(())
}

/// Starts an swtpm that ends with its VM, and waits until it listens.
async fn swtpm(state: &Path, socket: &Path) -> Result<Child> {
    std::fs::create_dir(state)?;
    let process = Command::new("swtpm")
        .args(["socket", "--tpm2", "--terminate", "--tpmstate"])
        .arg(format!("dir={}", state.display()))
        .arg("--ctrl")
        .arg(format!("type=unixio,path={}", socket.display()))
        .spawn()
        .context("start swtpm, of the package swtpm")?;
    let start = Instant::now();
    while !socket.exists() {
        ensure!(start.elapsed() < BOOTS, "swtpm does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(process)
}

/// Waits for an swtpm whose VM has closed its connection: by `--terminate` it ends.
async fn ends(mut swtpm: Child) -> Result<()> {
    let start = Instant::now();
    while swtpm.try_wait()?.is_none() {
        ensure!(start.elapsed() < BOOTS, "swtpm does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A shell command that has the TPM execute a command, whose bytes are in `printf`'s notation, and prints
/// the response in hexadecimal. The response comes from the same descriptor.
fn execute(command: &str) -> String {
    format!(
        "(exec 3<>/dev/tpm0; printf '{command}' >&3; dd bs=99 count=1 <&3 2>/dev/null) | \
         hexdump -v -e '/1 \"%02x\"'"
    )
}

/// The guest's kernel uses a TPM, devices in other PCI segments, and KVM's interfaces though those of
/// Hyper-V are there; also after a move.
#[tokio::test]
#[ignore = "wants a complete KVM: ci/test e2e runs it in the rig"]
async fn debian_finds_tpm_segments_and_kvm() -> Result<()> {
    let service = Service::start(Face::Many).await?;
    let (mut config, _) = debian(&service, 1)?;
    let socket = service.path("swtpm.sock");
    let first = swtpm(&service.path("swtpm"), &socket).await?;
    let serial = service.path("serial");
    config.serial = serde_json::from_value(json!({ "mode": "Socket", "socket": serial }))?;
    config.tpm = Some(serde_json::from_value(json!({ "socket": socket }))?);
    config.platform = Some(serde_json::from_value(json!({ "num_pci_segments": 3 }))?);
    let image = service.path("disk.raw");
    File::create(&image)?.set_len(1 << 20)?;
    let disk = json!([{ "path": image, "pci_segment": 2, "image_type": "Raw" }]);
    config.disks = serde_json::from_value(disk)?;
    config.cpus.kvm_hyperv = true;
    let vm = service.create("debian", config).await?;
    let client = service.client();
    client.vms_boot(&vm).await?;
    let mut shell = Shell::after(&serial, BUTTON, BOOTS).await?;
    let mut run = async |command: &str| {
        let printed = shell.run(command, BOOTS).await;
        println!("{command}: {printed:?}");
        printed
    };
    let version = run("cat /sys/class/tpm/tpm0/tpm_version_major").await?;
    assert_eq!(version, "2");
    // TPM2_GetRandom of eight bytes. The response is a header with result 0, a length and the bytes.
    let random = r"\200\001\000\000\000\014\000\000\001\173\000\010";
    let random = run(&execute(random)).await?;
    assert!(random.starts_with("800100000014000000000008"), "{random}");
    // TPM2_PCR_Extend of PCR 16 by 32 spaces, authorised by an empty password.
    let extend = r"\200\002\000\000\000\101\000\000\001\202\000\000\000\020\000\000\000\011\100\000\000\011
                   \000\000\000\000\000\000\000\000\001\000\013";
    let extend = extend.split_whitespace().collect::<String>() + &r"\040".repeat(32);
    let extended = run(&execute(&extend)).await?;
    assert!(extended.starts_with("80020000001300000000"), "{extended}");
    // TPM2_PCR_Read of PCR 16.
    let read = r"\200\001\000\000\000\024\000\000\001\176\000\000\000\001\000\013\003\000\000\001";
    let pcr = run(&execute(read)).await?;
    assert!(pcr.starts_with("80010000003e00000000"), "{pcr}");
    assert!(!pcr.ends_with(&"00".repeat(32)), "{pcr}");
    let devices = run("ls /sys/bus/pci/devices").await?;
    assert!(
        devices.contains("0001:00:00.0") && devices.contains("0002:00:01.0"),
        "{devices}"
    );
    run("echo written | dd of=/dev/vda conv=fsync").await?;
    assert!(std::fs::read(&image)?.starts_with(b"written"));
    let clocks =
        run("cat /sys/devices/system/clocksource/clocksource0/available_clocksource").await?;
    assert!(clocks.contains("kvm-clock"), "{clocks}");
    // The guest's OS, which Hyper-V's hypercalls want first, and interrupt source 8 of Hyper-V's controller,
    // which KVM does not list. `/dev/cpu/0/msr` has an MSR at the offset of its number.
    let msr = |index: u32| format!("/dev/cpu/0/msr bs=8 count=1 {{}}={}", index / 8);
    let msrs = [
        (
            msr(0x4000_0000),
            r"\001\000\000\000\000\000\000\201",
            "0100000000000081",
        ),
        (
            msr(0x4000_0098),
            r"\060\000\000\000\000\000\000\000",
            "3000000000000000",
        ),
    ];
    for (place, bytes, _) in &msrs {
        let place = place.replace("{}", "seek");
        run(&format!("printf '{bytes}' | dd conv=notrunc of={place}")).await?;
    }
    let cpu = client.vms_cpu(&vm).await?;
    let leaf = |function| cpu.cpuid.iter().find(|leaf| leaf.function == function);
    // `Hv#1`, and KVM's signature.
    assert_eq!(leaf(0x4000_0001).map(|leaf| leaf.eax), Some(0x3123_7648));
    assert_eq!(leaf(0x4000_0100).map(|leaf| leaf.ebx), Some(0x4b4d_564b));

    // On one host the destination's emulator listens at the same path.
    std::fs::remove_file(&socket)?;
    let there = Service::start(Face::Many).await?;
    let second = swtpm(&there.path("swtpm"), &socket).await?;
    let at = await_anyone(format!("unix:{}", there.path("migration").display()));
    let waits = there.client().migrations_receive(&at).await?;
    let away = StartMigration::to(waits.endpoint.clone());
    let begun = client.vms_migrate(&vm, &away).await?;
    let sent = snapshots::over(&service, &begun).await;
    ensure!(sent.phase == MigrationPhase::Completed, "{sent:?}");
    ends(first).await?;
    let mut shell = Shell::attach(&serial, BOOTS).await?;
    assert_eq!(shell.run(&execute(read), BOOTS).await?, pcr);
    for (place, _, expected) in &msrs {
        let place = place.replace("{}", "skip");
        let read = format!("dd if={place} 2>/dev/null | hexdump -v -e '/1 \"%02x\"'");
        assert_eq!(shell.run(&read, BOOTS).await?, *expected, "{place}");
    }
    let written = shell.run("dd if=/dev/vda bs=7 count=1 2>/dev/null", BOOTS);
    assert_eq!(written.await?, "written");
    there.client().vms_delete(&vm).await?;
    ends(second).await?;
    Ok(())
}
