//! The guest on KVM: each workload, each command, each end.

mod machine;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use guest::pattern::PAGE_SIZE;
use guest::{
    After, Check, Command, CommandError, Crash, Key, Line, MAX_CPUS, Options, Order, PortValue,
    TscSource, Workload,
};
use hypervisor::RunFailure;
use machine::{End, Machine, RESET_PORT, RESET_VALUE, SLEEP_PORT, SLEEP_VALUE, Spec};

fn options(workload: Workload) -> Options {
    Options {
        workload,
        ..Options::default()
    }
}

fn dirty(region_mib: u64, rate: Option<u64>, order: Order) -> Options {
    options(Workload::Dirty {
        region_mib: Some(region_mib),
        rate,
        order,
    })
}

fn hello(line: &Line) -> Option<(u32, u64, u64, TscSource)> {
    match *line {
        Line::Hello {
            cpus,
            ram_mib,
            tsc_khz,
            tsc_from,
        } => Some((cpus, ram_mib, tsc_khz, tsc_from)),
        _ => None,
    }
}

fn ready(line: &Line) -> Option<u32> {
    match *line {
        Line::Ready { cpus, .. } => Some(cpus),
        _ => None,
    }
}

fn verified(line: &Line) -> Option<(u64, u64, Option<u64>)> {
    match *line {
        Line::Verified {
            pages,
            bad,
            first_bad,
        } => Some((pages, bad, first_bad.map(|at| at.0))),
        _ => None,
    }
}

fn refused(line: &Line) -> Option<CommandError> {
    match *line {
        Line::Refused { what } => Some(what),
        _ => None,
    }
}

/// The gaps, of the TSC and of kvmclock, and the pages written.
fn report(line: &Line) -> Option<(Duration, Duration, u64)> {
    match *line {
        Line::Report {
            gap_us,
            clock_gap_us,
            writes,
            ..
        } => Some((
            Duration::from_micros(gap_us),
            Duration::from_micros(clock_gap_us),
            writes,
        )),
        _ => None,
    }
}

/// Waits until so many pages were written.
fn await_pages(machine: &mut Machine, wanted: u64) {
    loop {
        machine.send(Command::Report);
        if machine.expect("a report", report).2 >= wanted {
            return;
        }
    }
}

#[test]
fn says_hello_soon_after_its_first_instruction() {
    let mut machine = Machine::start(&Spec::new(Options::default()));
    let (at, (cpus, ram_mib, tsc_khz, tsc_from)) = machine.expect_at("hello", hello);
    let first = machine.first_instruction();
    assert!(first >= machine.started && first < at);
    // 384 KiB below 1 MiB is no RAM.
    assert_eq!((cpus, ram_mib), (1, 63));
    assert_ne!(tsc_from, TscSource::Option);
    assert!(tsc_khz > 100_000, "{tsc_khz}");
    let (ready_at, _) = machine.expect_at("ready", ready);
    println!(
        "from the first KVM_RUN: first instruction {:?}, first line {:?}, ready {:?}",
        first - machine.started,
        at - machine.started,
        ready_at - machine.started
    );
}

#[test]
fn sleeps_by_acpi() {
    let mut machine = Machine::start(&Spec::new(Options::default()));
    machine.expect("ready", ready);
    machine.send(Command::PowerOff);
    assert_eq!(machine.expect_end(), End::Sleep(SLEEP_VALUE));
}

#[test]
fn resets_by_acpi() {
    let mut machine = Machine::start(&Spec::new(Options::default()));
    machine.expect("ready", ready);
    machine.send(Command::Reset);
    assert_eq!(machine.expect_end(), End::Reset(RESET_VALUE));
}

#[test]
fn command_line_replaces_acpi() {
    let options = Options {
        cpus: Some(2),
        tsc_khz: Some(1_234_567),
        reset_port: Some(PortValue {
            port: RESET_PORT,
            value: 0x77,
        }),
        ..Options::default()
    };
    let mut machine = Machine::start(&Spec {
        acpi: false,
        vcpus: 2,
        ..Spec::new(options)
    });
    let (cpus, _, tsc_khz, tsc_from) = machine.expect("hello", hello);
    assert_eq!((cpus, tsc_khz, tsc_from), (2, 1_234_567, TscSource::Option));
    assert_eq!(machine.expect("ready", ready), 2);
    machine.send(Command::PowerOff);
    assert_eq!(machine.expect("a refusal", refused), CommandError::PowerOff);
    machine.send(Command::Reset);
    assert_eq!(machine.expect_end(), End::Reset(0x77));
}

#[test]
fn work_that_ends_can_power_off() {
    let options = Options {
        then: After::PowerOff,
        sleep_port: Some(PortValue {
            port: SLEEP_PORT,
            value: 0x21,
        }),
        ..options(Workload::Exits {
            port: 0x80,
            count: 100,
        })
    };
    let mut machine = Machine::start(&Spec::new(options));
    let count = machine.expect("exits", |line| match *line {
        Line::Exits { count, .. } => Some(count),
        _ => None,
    });
    assert_eq!(count, 100);
    assert_eq!(machine.expect_end(), End::Sleep(0x21));
}

#[test]
fn rejects_unknown_options() {
    let mut machine = Machine::start(&Spec::new(dirty(1 << 20, None, Order::Linear)));
    assert!(
        matches!(machine.expect("a refusal", refused), CommandError::Memory(mib) if mib > 50 && mib < 64)
    );
    machine.send_text("dance\n");
    assert_eq!(machine.expect("a refusal", refused), CommandError::Command);
    machine.send_text(&format!("{}\n", "poweroff".repeat(100)));
    assert_eq!(machine.expect("a refusal", refused), CommandError::Command);
    machine.send(Command::Ping);
    machine.expect("an answer", |line| {
        matches!(line, Line::Alive { .. }).then_some(())
    });
}

#[test]
fn a_command_line_that_is_wrong_is_refused_by_its_key() {
    let spec = Spec {
        text: Some("workload=dirty rate=fast"),
        ..Spec::new(Options::default())
    };
    let mut machine = Machine::start(&spec);
    assert_eq!(
        machine.expect("a refusal", refused),
        CommandError::Option(Key::Rate)
    );
    machine.expect("ready", ready);
}

#[test]
fn counts_with_all_vcpus() {
    for vcpus in [1, 2, MAX_CPUS] {
        let mut machine = Machine::start(&Spec {
            vcpus,
            ..Spec::new(options(Workload::Smp))
        });
        assert_eq!(machine.expect("ready", ready), vcpus);
        let (cpus, count, expected) = machine.expect("a count", |line| match *line {
            Line::Smp {
                cpus,
                count,
                expected,
            } => Some((cpus, count, expected)),
            _ => None,
        });
        assert_eq!((cpus, count), (vcpus, expected));
        assert!(expected > 0);
    }
}

#[test]
fn a_vcpu_that_is_missing_is_named() {
    let options = Options {
        cpus: Some(2),
        ..Options::default()
    };
    let mut machine = Machine::start(&Spec::new(options));
    assert_eq!(machine.expect("a refusal", refused), CommandError::Cpu(1));
    assert_eq!(machine.expect("ready", ready), 1);
}

#[test]
fn passes_its_self_test() {
    let mut machine = Machine::start(&Spec::new(options(Workload::SelfTest)));
    let failed = machine.expect("the self-test", |line| match *line {
        Line::SelfTest { failed } => Some(failed),
        _ => None,
    });
    let failed: Vec<_> = Check::ALL
        .iter()
        .filter(|check| failed.contains(**check))
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn touches_and_verifies_all_free_memory() {
    let mut machine = Machine::start(&Spec {
        vcpus: 2,
        ..Spec::new(options(Workload::Touch))
    });
    let touched = machine.expect("touched", |line| match *line {
        Line::Touched { pages, .. } => Some(pages),
        _ => None,
    });
    assert!(touched > 60 * 256, "{touched} pages of 64 MiB");
    assert_eq!(machine.expect("verified", verified), (touched, 0, None));
}

#[test]
fn dirties_at_its_rate_and_knows_every_page() {
    let mut machine = Machine::start(&Spec {
        vcpus: 2,
        ..Spec::new(dirty(4, Some(5000), Order::Scattered))
    });
    machine.expect("ready", ready);
    await_pages(&mut machine, 3000);
    let mut before = 0;
    for _ in 0..10 {
        machine.send(Command::Report);
        let (uptime_ms, writes) = machine.expect("a report", |line| match *line {
            Line::Report {
                uptime_ms, writes, ..
            } => Some((uptime_ms, writes)),
            _ => None,
        });
        // It may be behind, on a busy host, but never ahead. The writes are counted after the time
        // is taken, and any number of them may come in between: the next report's time is theirs.
        assert!(before <= uptime_ms * 5 + 64, "{before} in {uptime_ms} ms");
        before = writes;
    }
    // On a busy host a vCPU may be late by more than it takes the other to write its part.
    let every_page = (0..100).any(|_| {
        machine.send(Command::Verify);
        let (pages, bad, first_bad) = machine.expect("verified", verified);
        assert_eq!((bad, first_bad), (0, None));
        std::thread::sleep(std::time::Duration::from_millis(50));
        pages == 1024
    });
    assert!(every_page, "a part of the region was never written");
}

#[test]
fn dirties_as_fast_as_it_can() {
    let mut machine = Machine::start(&Spec::new(dirty(4, None, Order::Linear)));
    machine.expect("ready", ready);
    await_pages(&mut machine, 2048);
    machine.send(Command::Verify);
    assert_eq!(machine.expect("verified", verified), (1024, 0, None));
}

#[test]
fn detects_changed_byte() {
    let mut machine = Machine::start(&Spec::new(options(Workload::Touch)));
    let (pages, bad, _) = machine.expect("verified", verified);
    assert_eq!(bad, 0);
    let (ram, page) = (Arc::clone(&machine.ram), 40 << 20);
    let flip = |offset: usize| {
        let slice = ram.slice(offset, 1).expect("RAM");
        let mut byte = [0_u8];
        slice.copy_to(&mut byte);
        slice.copy_from(&[byte[0] ^ 0x10]);
    };
    for offset in [0, 8, 16, PAGE_SIZE / 2, PAGE_SIZE - 1] {
        machine.while_paused(|| flip(page + offset));
        machine.send(Command::Verify);
        assert_eq!(
            machine.expect("verified", verified),
            (pages, 1, Some(page as u64)),
            "byte {offset}"
        );
        machine.while_paused(|| flip(page + offset));
    }
    // A whole page in another one's place, and one that is as it was before.
    machine.while_paused(|| {
        let mut content = vec![0_u8; PAGE_SIZE];
        ram.slice(page, PAGE_SIZE)
            .expect("RAM")
            .copy_to(&mut content);
        ram.slice(page + PAGE_SIZE, PAGE_SIZE)
            .expect("RAM")
            .copy_from(&content);
        ram.slice(page + 3 * PAGE_SIZE, PAGE_SIZE)
            .expect("RAM")
            .copy_from(&[0_u8; PAGE_SIZE]);
    });
    machine.send(Command::Verify);
    let first_bad = (page + PAGE_SIZE) as u64;
    assert_eq!(
        machine.expect("verified", verified),
        (pages, 2, Some(first_bad))
    );
}

#[test]
fn a_stop_is_seen_as_a_gap() {
    let mut machine = Machine::start(&Spec {
        vcpus: 2,
        ..Spec::new(options(Workload::Spin))
    });
    machine.expect("ready", ready);
    machine.send(Command::Report);
    machine.expect("a report", report);
    let stop = Duration::from_millis(700);
    machine.while_paused(|| thread::sleep(stop));
    // Each vCPU tells what it has seen; let them all see it.
    thread::sleep(Duration::from_millis(100));
    machine.send(Command::Report);
    let (gap, clock_gap, _) = machine.expect("a report", report);
    assert!(gap >= stop && gap < stop * 8, "{gap:?}");
    assert!(clock_gap >= stop && clock_gap < stop * 8, "{clock_gap:?}");
    machine.send(Command::Report);
    let (gap, _, _) = machine.expect("a report", report);
    assert!(gap < stop, "a report starts anew, and yet: {gap:?}");
}

#[test]
fn its_heart_beats() {
    let options = Options {
        heartbeat_ms: Some(50),
        ..Options::default()
    };
    let mut machine = Machine::start(&Spec::new(options));
    let beat = |line: &Line| match *line {
        Line::Heartbeat {
            count, uptime_ms, ..
        } => Some((count, uptime_ms)),
        _ => None,
    };
    for expected in 1..6 {
        let (count, uptime_ms) = machine.expect("a heartbeat", beat);
        assert_eq!(count, expected);
        // It may be late, on a busy host, but never early.
        assert!(uptime_ms >= 50 * count, "beat {count} at {uptime_ms} ms");
    }
}

#[test]
fn crashes_as_asked() {
    let mut machine = Machine::start(&Spec::new(options(Workload::Crash(Crash::TripleFault))));
    assert_eq!(machine.expect_end(), End::Shutdown);

    let mut machine = Machine::start(&Spec::new(Options::default()));
    machine.expect("ready", ready);
    machine.send(Command::Crash(Crash::Emulation));
    let end = machine.expect_end();
    assert!(
        matches!(end, End::Failed(RunFailure::Emulation { .. })),
        "{end:?}"
    );

    let mut machine = Machine::start(&Spec::new(options(Workload::Crash(Crash::Fault))));
    let (vector, address) = machine.expect("a fault", |line| match *line {
        Line::Fault {
            vector, address, ..
        } => Some((vector, address.0)),
        _ => None,
    });
    assert_eq!((vector, address), (14, 512 << 30));
}

#[test]
fn starts_in_dirty_memory() {
    let spec = Spec {
        vcpus: 2,
        rubbish: true,
        ..Spec::new(options(Workload::Touch))
    };
    let mut machine = Machine::start(&spec);
    assert_eq!(machine.expect("ready", ready), 2);
    assert_eq!(machine.expect("verified", verified).1, 0);
    machine.send(Command::PowerOff);
    assert_eq!(machine.expect_end(), End::Sleep(SLEEP_VALUE));
}

#[test]
fn uses_memory_above_4_gib() {
    let touch = Spec::new(options(Workload::Touch));
    let low = Machine::start(&touch).expect("verified", verified).0;
    let mut machine = Machine::start(&Spec {
        high_mib: 16,
        ..touch
    });
    let (_, ram_mib, ..) = machine.expect("hello", hello);
    assert_eq!(ram_mib, 63 + 16);
    let (pages, bad, _) = machine.expect("verified", verified);
    // Two more directories of page tables are needed to reach it.
    assert_eq!((pages, bad), (low + 16 * 256 - 2, 0));
}

#[test]
fn counts_non_maskable_interrupts() {
    let mut machine = Machine::start(&Spec::new(options(Workload::Spin)));
    machine.expect("ready", ready);
    for expected in 1..4 {
        machine.inject_nmi();
        let count = machine.expect("an NMI", |line| match *line {
            Line::Nmi { count } => Some(count),
            _ => None,
        });
        assert_eq!(count, expected);
    }
}
