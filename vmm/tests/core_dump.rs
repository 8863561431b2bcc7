//! A core dump of the pocket guest on `/dev/kvm`, as gdb reads it.

#![expect(clippy::unwrap_used, reason = "a test that goes wrong panics")]

use std::path::Path;
use std::process::Command;

use control::{Registry, Request};
use spec::{CpusConfig, MigrationPhase, PayloadConfig, VmConfig, VmCoredumpData};
use vmm::{Pool, PoolConfig};

/// Returns what gdb says of a core.
fn gdb(core: &Path, commands: &[String]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.args(["--batch", "--nx", "--core"]).arg(core);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let run = gdb.output().expect("gdb, of the package gdb");
    let (said, errors) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    format!("{said}{errors}")
}

/// The first segment of an ELF file that is loaded: its guest address, and its content.
fn first_segment(elf: &[u8]) -> (u64, &[u8]) {
    let long = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let mut at = usize::try_from(long(32)).unwrap();
    while elf[at..at + 4] != 1_u32.to_le_bytes() {
        at += 56;
    }
    let offset = usize::try_from(long(at + 8)).unwrap();
    let len = usize::try_from(long(at + 32)).unwrap();
    (long(at + 24), &elf[offset..offset + len])
}

#[tokio::test]
async fn gdb_reads_registers_and_memory_of_a_dump() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("pocket");
    std::fs::write(&kernel, guest::IMAGE).unwrap();
    let registry = Registry::new(Pool::start(&PoolConfig::default()).unwrap());
    let mut config = VmConfig::with_payload(PayloadConfig {
        kernel: Some(kernel.to_string_lossy().into_owned()),
        cmdline: Some(guest::Options::default().to_string()),
        ..PayloadConfig::default()
    });
    config.cpus = CpusConfig::with_vcpus(2);
    // Two ranges of RAM, almost all of which are holes of the file.
    config.memory.size = 4 << 30;
    config.memory.reserve = false;
    let vm = registry.create(None, config).unwrap();
    vm.ask(Request::Boot).await.unwrap();
    let core = dir.path().join("core");
    let what = VmCoredumpData {
        destination_url: format!("file://{}", core.display()),
    };
    let dump = || registry.core_dump(vm.id().as_str(), &what);
    let running = dump().map(drop).unwrap_err();
    assert_eq!(running.code, "wrong-state");
    vm.ask(Request::Pause).await.unwrap();
    let dumped = dump().unwrap();
    dumped.over().wait_for(|over| *over).await.unwrap();
    assert_eq!(dumped.info().phase, MigrationPhase::Completed);
    // What is there is kept, and the guest is free in either case.
    let again = dump().unwrap();
    again.over().wait_for(|over| *over).await.unwrap();
    assert_eq!(again.info().error.unwrap().code, "file-exists");
    vm.ask(Request::Resume).await.unwrap();
    vm.ask(Request::Delete).await.unwrap();

    let (addr, content) = first_segment(guest::IMAGE);
    let at = [0, content.len() / 16 * 8];
    let long = |at: usize| u64::from_le_bytes(content[at..at + 8].try_into().unwrap());
    let mut commands = vec![
        "info threads".to_owned(),
        "print/x $rip != 0 || $cs != 0".to_owned(),
        "print $eflags & 2".to_owned(),
    ];
    commands.extend(at.map(|at| format!("x/1xg {}", addr + at as u64)));
    // Beyond the gap below 4 GiB.
    commands.push(format!("x/1xg {}", 1_u64 << 32));
    let said = gdb(&core, &commands);
    let threads = said
        .lines()
        .filter(|line| line.contains("Thread") || line.contains("LWP"));
    assert!(threads.count() >= 2, "{said}");
    for expected in [
        "$1 = 0x1".to_owned(),
        format!("{:#018x}", long(at[0])),
        format!("{:#018x}", long(at[1])),
        format!("{:#x}:\t{:#018x}", 1_u64 << 32, 0),
    ] {
        assert!(said.contains(&expected), "no {expected} in\n{said}");
    }
}
