//! Lines, options and commands parse back from their text.

use guest::pattern::{self, Page, WORDS};
use guest::{
    Address, After, Attack, Check, Command, CommandError, Crash, FailedChecks, Key, Line, MAX_CPUS,
    OptionError, Options, Order, Parting, PortValue, TscSource, Workload,
};
use proptest::prelude::*;
use proptest::sample::select;

fn port_values() -> impl Strategy<Value = PortValue> {
    any::<(u16, u8)>().prop_map(|(port, value)| PortValue { port, value })
}

fn workloads() -> impl Strategy<Value = Workload> {
    let some = || proptest::option::of(1..u64::MAX);
    prop_oneof![
        select(vec![
            Workload::Idle,
            Workload::Spin,
            Workload::Touch,
            Workload::Smp,
            Workload::Io,
            Workload::Vsock,
            Workload::Queues,
            Workload::SelfTest
        ]),
        (some(), some(), select(Order::ALL)).prop_map(|(region_mib, rate, order)| {
            Workload::Dirty {
                region_mib,
                rate,
                order,
            }
        }),
        any::<(u16, u64)>().prop_map(|(port, count)| Workload::Exits { port, count }),
        select(Attack::ALL).prop_map(Workload::Attack),
        select(Crash::ALL).prop_map(Workload::Crash),
    ]
}

fn all_options() -> impl Strategy<Value = Options> {
    let some = proptest::option::of::<std::ops::Range<u32>>;
    (
        workloads(),
        some(1..MAX_CPUS + 1),
        some(1..u32::MAX),
        some(1..u32::MAX),
        proptest::array::uniform3(proptest::option::of(port_values())),
        select(After::ALL),
    )
        .prop_map(
            |(
                workload,
                cpus,
                heartbeat_ms,
                tsc_khz,
                [sleep_port, reset_port, button_port],
                then,
            )| {
                Options {
                    workload,
                    cpus,
                    heartbeat_ms,
                    tsc_khz,
                    sleep_port,
                    reset_port,
                    button_port,
                    then,
                }
            },
        )
}

fn refusals() -> impl Strategy<Value = CommandError> {
    prop_oneof![
        select(Key::ALL).prop_map(CommandError::Option),
        any::<u64>().prop_map(CommandError::Memory),
        any::<u32>().prop_map(CommandError::Cpu),
        select(vec![
            CommandError::Command,
            CommandError::PowerOff,
            CommandError::Reset
        ]),
    ]
}

fn lines() -> impl Strategy<Value = Line> {
    let failures = proptest::collection::vec(select(Check::ALL), 0..4).prop_map(|checks| {
        let mut failed = FailedChecks::default();
        checks.into_iter().for_each(|check| failed.insert(check));
        failed
    });
    let addresses = || any::<u64>().prop_map(Address);
    prop_oneof![
        (any::<(u32, u64, u64)>(), select(TscSource::ALL)).prop_map(
            |((cpus, ram_mib, tsc_khz), tsc_from)| Line::Hello {
                cpus,
                ram_mib,
                tsc_khz,
                tsc_from
            }
        ),
        any::<(u32, u64)>().prop_map(|(cpus, free_mib)| Line::Ready { cpus, free_mib }),
        any::<(u64, u64, u64)>().prop_map(|(count, uptime_ms, writes)| Line::Heartbeat {
            count,
            uptime_ms,
            writes
        }),
        any::<u64>().prop_map(|uptime_ms| Line::Alive { uptime_ms }),
        any::<([u64; 6], u32)>().prop_map(
            |([uptime_ms, writes, gap_us, clock_gap_us, interrupts, nmis], gap_cpu)| {
                Line::Report {
                    uptime_ms,
                    writes,
                    gap_us,
                    gap_cpu,
                    clock_gap_us,
                    interrupts,
                    nmis,
                }
            }
        ),
        (any::<(u64, u64)>(), proptest::option::of(addresses())).prop_map(
            |((pages, bad), first_bad)| Line::Verified {
                pages,
                bad,
                first_bad
            }
        ),
        any::<(u64, u64)>().prop_map(|(pages, elapsed_us)| Line::Touched { pages, elapsed_us }),
        any::<(u64, u64)>().prop_map(|(count, elapsed_us)| Line::Exits { count, elapsed_us }),
        any::<(u32, u64, u64)>().prop_map(|(cpus, count, expected)| Line::Smp {
            cpus,
            count,
            expected
        }),
        any::<[u64; 7]>().prop_map(
            |[devices, random, blocks, frames, chars, tpm, bad]| Line::Io {
                devices,
                random,
                blocks,
                frames,
                chars,
                tpm,
                bad
            }
        ),
        (any::<[u64; 4]>(), addresses()).prop_map(|([cid, connections, resets, lost], mac)| {
            Line::Vsock {
                cid,
                mac,
                connections,
                resets,
                lost,
            }
        }),
        failures.prop_map(|failed| Line::SelfTest { failed }),
        any::<u64>().prop_map(|count| Line::Nmi { count }),
        (any::<(u32, u64)>(), addresses(), addresses(), addresses()).prop_map(
            |((cpu, vector), code, rip, address)| Line::Fault {
                cpu,
                vector,
                code,
                rip,
                address
            }
        ),
        any::<(u32, u32)>().prop_map(|(cpu, line)| Line::Panic { cpu, line }),
        refusals().prop_map(|what| Line::Refused { what }),
        select(Parting::ALL).prop_map(|by| Line::Survived { by }),
        select(Parting::ALL).prop_map(|by| Line::Bye { by }),
    ]
}

proptest! {
    #[test]
    fn options_survive_the_command_line(options in all_options()) {
        let text = options.to_string();
        prop_assert_eq!(Options::parse(&text), Ok(options), "{}", text);
    }

    #[test]
    fn ignores_foreign_options(options in all_options(), before in "[a-z.]{1,9}(=[a-z0-9,]{0,9})?") {
        prop_assume!(before.split('=').next().and_then(Key::parse).is_none());
        let text = format!("{before} {options} {before}");
        prop_assert_eq!(Options::parse(&text), Ok(options), "{}", text);
    }

    #[test]
    fn lines_survive_the_serial_port(line in lines()) {
        let text = line.to_string();
        prop_assert!(text.is_ascii() && !text.contains(['\r', '\n']), "{}", text);
        prop_assert_eq!(Line::parse(&text), Some(line), "{}", text);
        prop_assert_eq!(Line::parse(&format!("{text}\r\n")), Some(line), "{}", text);
    }

    #[test]
    fn rejects_incomplete_lines(line in lines()) {
        let text = line.to_string();
        let (all_but_last, _) = text.rsplit_once(' ').unwrap();
        prop_assert_eq!(Line::parse(all_but_last), None);
        let (too_long, without_prefix) = (format!("{text} more=1"), &text["pocket: ".len()..]);
        prop_assert_eq!(Line::parse(&too_long), None);
        prop_assert_eq!(Line::parse(without_prefix), None);
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in ".{0,200}") {
        let _ = (Line::parse(&text), Command::parse(&text), Options::parse(&text));
        let _ = Line::parse(&format!("pocket: {text}"));
    }

    #[test]
    fn pattern_is_unique_per_page_and_generation(
        page in 0..1_u64 << 40, generation in 1..u64::MAX, other in any::<(u64, u64)>(),
    ) {
        let mut content: Page = [0; WORDS];
        pattern::fill(&mut content, page << 12, generation);
        prop_assert!(pattern::matches(&content, page << 12, generation));
        prop_assert!(!pattern::matches(&content, page << 12, generation - 1));
        prop_assert!(!pattern::matches(&content, (page << 12) + 4096, generation));
        if other != (page << 12, generation) {
            prop_assert!(!pattern::matches(&content, other.0, other.1));
        }
    }

    #[test]
    fn one_flipped_bit_is_found(word in 0..WORDS, bit in 0..64, page in 0..1_u64 << 40, generation: u64) {
        let mut content: Page = [0; WORDS];
        pattern::fill(&mut content, page << 12, generation);
        content[word] ^= 1_u64 << bit;
        prop_assert!(!pattern::matches(&content, page << 12, generation));
    }

    #[test]
    fn counter_names_generation(slots in 1..50_u64, writes in 0..500_u64) {
        let mut counted = vec![0; usize::try_from(slots).unwrap()];
        for write in 0..writes {
            counted[usize::try_from(write % slots).unwrap()] += 1;
        }
        for (slot, count) in (0..).zip(counted) {
            prop_assert_eq!(pattern::generation(writes, slot, slots), count);
        }
    }
}

#[test]
fn commands_survive_the_serial_port() {
    let crashes = Crash::ALL.iter().copied().map(Command::Crash);
    let others = [
        Command::Ping,
        Command::Report,
        Command::Io,
        Command::Verify,
        Command::PowerOff,
        Command::Reset,
    ];
    for command in crashes.chain(others) {
        assert_eq!(Command::parse(&format!("{command}\r\n")), Some(command));
    }
    assert_eq!(Command::parse("reboot"), Some(Command::Reset));
    assert_eq!(Command::parse("power off"), None);
}

#[test]
fn a_wrong_value_is_refused_by_its_key() {
    for (text, key) in [
        ("workload=nap", Key::Workload),
        ("cpus=0", Key::Cpus),
        ("cpus=65", Key::Cpus),
        ("rate=0", Key::Rate),
        ("rate=fast", Key::Rate),
        ("region_mib=-1", Key::RegionMib),
        ("heartbeat_ms=4294967296", Key::HeartbeatMs),
        ("tsc_khz=0", Key::TscKhz),
        ("port=0x10000", Key::Port),
        ("count=", Key::Count),
        ("order=random", Key::Order),
        ("attack=kindly", Key::Attack),
        ("crash=softly", Key::Crash),
        ("sleep_port=0x600", Key::SleepPort),
        ("button_port=0x604:256", Key::ButtonPort),
        ("reset_port=0x600:256", Key::ResetPort),
        ("then=sleep", Key::Then),
    ] {
        assert_eq!(Options::parse(text), Err(OptionError(key)), "{text}");
    }
    assert_eq!(Options::parse("cpus=2 cpus=3").unwrap().cpus, Some(3));
}
