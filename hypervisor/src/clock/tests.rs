//! The arithmetic of a stop, on simulated hosts whose clocks the test moves.

use std::cell::Cell;

use proptest::prelude::*;

use super::*;

/// How a simulated host treats `KVM_VCPU_TSC_OFFSET`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attribute {
    Works,
    Missing,
    /// Accepted, without effect.
    Ignored,
}

/// A host with one vCPU. Every access to a clock takes time.
#[derive(Debug)]
struct Host {
    boot: Instant,
    now_ns: Cell<u64>,
    access_ns: u64,
    host_khz: u32,
    guest_khz: u32,
    tsc_at_boot: u64,
    offset: Cell<u64>,
    attribute: Attribute,
    msr_writes: Cell<u32>,
}

impl Host {
    fn access(&self) {
        self.sleep(self.access_ns);
    }

    fn sleep(&self, ns: u64) {
        self.now_ns.set(self.now_ns.get() + ns);
    }

    fn scaled(&self, khz: u32) -> u64 {
        self.tsc_at_boot
            .wrapping_add(ticks(Duration::from_nanos(self.now_ns.get()), khz))
    }

    /// The guest's TSC, without taking time.
    fn guest_tsc(&self) -> u64 {
        self.scaled(self.guest_khz).wrapping_add(self.offset.get())
    }

    fn sample(&self) -> ClockSample {
        ClockSample {
            kvmclock_ns: None,
            host_tsc: self.scaled(self.host_khz),
            taken_at: self.boot + Duration::from_nanos(self.now_ns.get()),
        }
    }
}

impl Counter for Host {
    fn host_tsc(&self) -> u64 {
        self.access();
        self.scaled(self.host_khz)
    }

    fn now(&self) -> Instant {
        self.boot + Duration::from_nanos(self.now_ns.get())
    }

    fn tsc(&self) -> Result<u64, KvmError> {
        self.access();
        Ok(self.guest_tsc())
    }

    fn set_tsc(&self, value: u64) -> Result<(), KvmError> {
        self.msr_writes.set(self.msr_writes.get() + 1);
        self.offset
            .set(value.wrapping_sub(self.scaled(self.guest_khz)));
        Ok(())
    }

    fn offset(&self) -> Option<u64> {
        match self.attribute {
            Attribute::Works => Some(self.offset.get()),
            Attribute::Missing => None,
            Attribute::Ignored => Some(0),
        }
    }

    fn set_offset(&self, offset: u64) -> io::Result<()> {
        match self.attribute {
            Attribute::Works => self.offset.set(offset),
            Attribute::Missing => return Err(io::ErrorKind::Unsupported.into()),
            Attribute::Ignored => {}
        }
        Ok(())
    }
}

fn attribute() -> impl Strategy<Value = Attribute> {
    prop_oneof![
        Just(Attribute::Works),
        Just(Attribute::Missing),
        Just(Attribute::Ignored)
    ]
}

/// Hosts that booted more than ten seconds ago: earlier, counters of unlike frequencies have not yet moved
/// apart by more than the time of two accesses, so that a scaled counter is taken for a plain one.
fn host(guest_khz: u32) -> impl Strategy<Value = Host> {
    let khz = prop_oneof![Just(guest_khz), 1_000_000_u32..5_000_000];
    (
        any::<u64>(),
        any::<u64>(),
        attribute(),
        khz,
        10_000_000_000..20_000_000_000_u64,
    )
        .prop_map(
            move |(tsc_at_boot, offset, attribute, host_khz, now_ns)| Host {
                boot: Instant::now(),
                now_ns: Cell::new(now_ns),
                access_ns: 700,
                host_khz,
                guest_khz,
                tsc_at_boot,
                offset: Cell::new(offset),
                attribute,
                msr_writes: Cell::new(0),
            },
        )
}

proptest! {
    /// Between the two samples the guest's TSC advances by exactly the stop, however long saving,
    /// loading and each access take, and whatever the two hosts' TSCs are.
    #[test]
    fn a_stop_is_counted_once(
        (source, destination) in (1_000_000_u32..5_000_000).prop_flat_map(|khz| (host(khz), host(khz))),
        saving_ns in 0..3_000_000_000_u64,
        on_the_way_ns in 0..10_000_000_000_u64,
        loading_ns in 0..3_000_000_000_u64,
    ) {
        let khz = source.guest_khz;
        let (stopped, stopped_tsc) = (source.sample(), source.guest_tsc());
        source.sleep(saving_ns);
        let saved = tsc_at(&source, &stopped, khz).unwrap();
        // A tick of rounding, where the time is measured and not the counter.
        prop_assert!(saved.wrapping_sub(stopped_tsc).wrapping_add(1) <= 2, "{saved} {stopped_tsc}");

        let resumed = destination.sample();
        let at_resume = destination.now_ns.get();
        destination.sleep(loading_ns);
        let stopped_for = Duration::from_nanos(saving_ns + on_the_way_ns);
        let wanted = saved.wrapping_add(ticks(stopped_for, khz));
        set_tsc_at(&destination, &resumed, wanted, khz).unwrap();

        let since = Duration::from_nanos(destination.now_ns.get() - at_resume);
        let expected = stopped_tsc.wrapping_add(ticks(stopped_for + since, khz));
        let error = destination.guest_tsc().wrapping_sub(expected).cast_signed();
        prop_assert!(error.abs() <= 4, "off by {error} ticks");
    }

    /// If the attribute works and the TSC is not scaled, only the attribute sets the value: KVM would
    /// round a written TSC to that of other vCPUs.
    #[test]
    fn uses_tsc_offset_if_present(host in host(2_000_000), tsc in any::<u64>()) {
        let (sample, is_plain) = (host.sample(), host.host_khz == host.guest_khz);
        set_tsc_at(&host, &sample, tsc, host.guest_khz).unwrap();
        let by_offset = host.msr_writes.get() == 0;
        prop_assert_eq!(by_offset, is_plain && host.attribute == Attribute::Works);
        if by_offset {
            prop_assert_eq!(host.offset.get(), tsc.wrapping_sub(sample.host_tsc));
        }
    }
}

#[test]
fn a_stop_of_centuries_does_not_overflow() {
    assert_eq!(ticks(Duration::MAX, u32::MAX), u64::MAX);
    assert_eq!(ticks(Duration::from_micros(1), 2_596_122), 2596);
}
