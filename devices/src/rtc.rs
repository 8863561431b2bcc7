//! The real-time clock of a PC with its battery-backed memory (MC146818), for firmware: EDK2 does not
//! start without one, and takes the size of memory above 4 GiB from it.
//!
//! Port 0 of the device chooses a register, port 1 reads or writes it. The clock runs with the
//! host's, at a distance of whole seconds that a guest sets by writing another time. There are no
//! interrupts: no alarm, no periodic interrupt. So the FADT does not offer the clock to guests, which
//! take the time from kvmclock or from the firmware's services.

use std::time::Duration;

use memory::DeviceOps;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope};
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

/// Ports of the device.
pub const LEN: u64 = 2;
/// Registers, 14 of which are the clock's and the rest memory.
const REGISTERS: usize = 128;

const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_C: usize = 0x0c;
const STATUS_D: usize = 0x0d;
const CENTURY: usize = 0x32;
/// Memory from 16 MiB to 4 GiB in units of 64 KiB: two bytes.
const MEMORY_BELOW: usize = 0x34;
/// Memory from 4 GiB on in units of 64 KiB: three bytes.
const MEMORY_ABOVE: usize = 0x5b;

/// The registers that hold the time.
const CLOCK: [usize; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

/// Status A: the time is about to change.
const UPDATING: u8 = 1 << 7;
/// Status A: a crystal of 32 kHz, no periodic interrupt.
const DIVIDER: u8 = 0x26;
/// Status B: the time is held while the guest sets it.
const SET: u8 = 1 << 7;
/// Status B: numbers are binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Status B: hours count from 0 to 23.
const HOURS_24: u8 = 1 << 1;
/// Hours: the afternoon, of twelve hours.
const AFTERNOON: u8 = 1 << 7;
/// Status D: the battery is good.
const VALID: u8 = 1 << 7;
/// How long before a second ends [`UPDATING`] is set.
const UPDATE: Duration = Duration::from_micros(244);

/// Returns the time since 1970, UTC.
type Now = dyn Fn() -> Duration + Send + Sync;

struct Registers {
    index: u8,
    /// The time's registers are used while the guest sets it, and computed otherwise.
    bytes: [u8; REGISTERS],
    /// The guest's time minus the host's.
    ahead_s: i64,
}

/// The clock and its memory.
pub struct Rtc {
    now: Box<Now>,
    registers: Mutex<Registers>,
}

impl Rtc {
    /// Makes a clock that shows what `now` returns, the time since 1970, for a machine with this much
    /// RAM below and above 4 GiB.
    pub fn new(
        now: impl Fn() -> Duration + Send + Sync + 'static,
        ram_below_4g: u64,
        ram_above_4g: u64,
    ) -> Self {
        let mut bytes = [0; REGISTERS];
        bytes[STATUS_A] = DIVIDER;
        bytes[STATUS_B] = HOURS_24;
        let units = |bytes: u64, most: u64| (bytes >> 16).min(most).to_le_bytes();
        // EDK2 adds 16 MiB to the first count and 4 GiB to the second (QEMU's layout of the CMOS).
        let below = units(ram_below_4g.saturating_sub(16 << 20), 0xffff);
        let above = units(ram_above_4g, 0xff_ffff);
        bytes[MEMORY_BELOW..][..2].copy_from_slice(&below[..2]);
        bytes[MEMORY_ABOVE..][..3].copy_from_slice(&above[..3]);
        Self {
            now: Box::new(now),
            registers: Mutex::new(Registers {
                index: 0,
                bytes,
                ahead_s: 0,
            }),
        }
    }
}

impl Registers {
    fn is_set_by_guest(&self) -> bool {
        self.bytes[STATUS_B] & SET != 0
    }

    fn number(&self, value: u8) -> u8 {
        if self.bytes[STATUS_B] & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    /// The number that a register holds; more than any register's limit if it is no BCD.
    fn parse(&self, value: u8) -> u8 {
        match (self.bytes[STATUS_B] & BINARY, value >> 4, value & 0xf) {
            (0, tens @ 0..=9, ones @ 0..=9) => tens * 10 + ones,
            (0, _, _) => u8::MAX,
            _ => value,
        }
    }

    fn hours(&self, hour: u8) -> u8 {
        if self.bytes[STATUS_B] & HOURS_24 != 0 {
            return self.number(hour);
        }
        // Twelve comes before one.
        let of_twelve = (hour + 11) % 12 + 1;
        self.number(of_twelve) | if hour >= 12 { AFTERNOON } else { 0 }
    }

    fn parse_hours(&self, value: u8) -> u8 {
        if self.bytes[STATUS_B] & HOURS_24 != 0 {
            return self.parse(value);
        }
        match self.parse(value & !AFTERNOON) {
            of_twelve @ 1..=12 => of_twelve % 12 + if value & AFTERNOON != 0 { 12 } else { 0 },
            _ => u8::MAX,
        }
    }

    /// Writes a time into its registers.
    fn put(&mut self, now: Duration) {
        let seconds = i64::try_from(now.as_secs()).unwrap_or(0);
        // A guest's time is within four digits of years: `get` made it.
        let Ok(at) = OffsetDateTime::from_unix_timestamp(seconds.saturating_add(self.ahead_s))
        else {
            return;
        };
        let year = u16::try_from(at.year()).unwrap_or(0);
        for (register, value) in [
            (SECONDS, self.number(at.second())),
            (MINUTES, self.number(at.minute())),
            (HOURS, self.hours(at.hour())),
            (WEEKDAY, self.number(at.weekday().number_from_sunday())),
            (DAY, self.number(at.day())),
            (MONTH, self.number(at.month().into())),
            (YEAR, self.number((year % 100) as u8)),
            (CENTURY, self.number((year / 100 % 100) as u8)),
        ] {
            self.bytes[register] = value;
        }
    }

    /// The time in the registers as seconds since 1970, if it is one.
    fn get(&self) -> Option<i64> {
        let field = |register: usize| self.parse(self.bytes[register]);
        let century = Some(field(CENTURY)).filter(|century| *century < 100)?;
        let year = Some(field(YEAR)).filter(|year| *year < 100)?;
        let month = Month::try_from(field(MONTH)).ok()?;
        let year = i32::from(century) * 100 + i32::from(year);
        let date = Date::from_calendar_date(year, month, field(DAY)).ok()?;
        let hour = self.parse_hours(self.bytes[HOURS]);
        let time = Time::from_hms(hour, field(MINUTES), field(SECONDS)).ok()?;
        Some(
            PrimitiveDateTime::new(date, time)
                .assume_utc()
                .unix_timestamp(),
        )
    }

    /// Sets the clock to what its registers say. What is no time changes nothing.
    fn set_clock(&mut self, now: Duration) {
        let host = i64::try_from(now.as_secs()).unwrap_or(0);
        if let Some(guest) = self.get() {
            self.ahead_s = guest.saturating_sub(host);
        }
    }

    fn read(&mut self, now: Duration) -> u8 {
        let register = usize::from(self.index) % REGISTERS;
        // While SET is 1 the guest's own writes must be read back, and the time must not move under
        // them.
        if CLOCK.contains(&register) && !self.is_set_by_guest() {
            self.put(now);
        }
        match register {
            STATUS_A => {
                // The clock has whole seconds of the host, so it changes with the host's second.
                // Software that sees the bit clear has 244 us to read all registers (MC146818).
                let ends = Duration::from_nanos(now.subsec_nanos().into()) + UPDATE;
                let updating = !self.is_set_by_guest() && ends >= Duration::from_secs(1);
                self.bytes[STATUS_A] & !UPDATING | if updating { UPDATING } else { 0 }
            }
            // No interrupt flags: this clock raises none.
            STATUS_C => 0,
            STATUS_D => VALID,
            register => self.bytes[register],
        }
    }

    fn write(&mut self, value: u8, now: Duration) {
        let register = usize::from(self.index) % REGISTERS;
        let was_set_by_guest = self.is_set_by_guest();
        if !was_set_by_guest {
            // Fields that the guest does not write keep their values of this moment.
            self.put(now);
        }
        match register {
            STATUS_B => {
                self.bytes[STATUS_B] = value;
                // The guest has written all fields behind SET. Taking over each field as it comes
                // would pass through times that do not exist, such as the 31st of a shorter month.
                if was_set_by_guest && !self.is_set_by_guest() {
                    self.set_clock(now);
                }
            }
            STATUS_C | STATUS_D => {}
            register => {
                self.bytes[register] = value;
                if CLOCK.contains(&register) && !was_set_by_guest {
                    self.set_clock(now);
                }
            }
        }
    }
}

impl DeviceOps for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.registers.lock();
        match (offset, data) {
            (0, [byte]) => *byte = registers.index,
            (1, [byte]) => *byte = registers.read((self.now)()),
            (_, data) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers.lock();
        match (offset, data) {
            (0, [byte]) => registers.index = *byte,
            (1, [byte]) => registers.write(*byte, (self.now)()),
            _ => {}
        }
    }
}

/// Saved state, version 1. Frozen.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct V1 {
    index: u8,
    bytes: Vec<u8>,
    ahead_s: i64,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl Save for Rtc {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let mut registers = self.registers.lock();
        if !registers.is_set_by_guest() {
            registers.put((self.now)());
        }
        to.put(&V1 {
            index: registers.index,
            bytes: registers.bytes.to_vec(),
            ahead_s: registers.ahead_s,
        })
    }
}

impl Load for &Rtc {
    /// A machine that was saved by a version without this device keeps the clock of a new machine.
    fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
        let Some(V1 {
            index,
            bytes,
            ahead_s,
        }) = from.take_if_there()?
        else {
            return Ok(());
        };
        let bytes = <[u8; REGISTERS]>::try_from(bytes)
            .map_err(|bytes| from.refuse(format!("{} registers, not 128", bytes.len())))?;
        *self.registers.lock() = Registers {
            index,
            bytes,
            ahead_s,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    fn at(rtc: &Rtc, register: usize) -> u8 {
        let mut data = [0];
        rtc.write(0, &[register as u8]);
        rtc.read(1, &mut data);
        data[0]
    }

    fn put(rtc: &Rtc, register: usize, value: u8) {
        // Bit 7 masks NMIs and is no part of the number.
        rtc.write(0, &[register as u8 | 0x80]);
        rtc.write(1, &[value]);
    }

    fn clock(rtc: &Rtc) -> [u8; 8] {
        CLOCK.map(|register| at(rtc, register))
    }

    /// 2026-11-25 (a Wednesday) 23:59:58 UTC.
    const EVENING: u64 = 1_795_651_198;

    fn rtc() -> (Rtc, Arc<AtomicU64>) {
        let now = Arc::new(AtomicU64::new(EVENING * 1000));
        let from = Arc::clone(&now);
        let now_ms = move || Duration::from_millis(from.load(Ordering::Relaxed));
        (Rtc::new(now_ms, 1 << 30, 5 << 30), now)
    }

    #[test]
    fn shows_time_in_every_format() {
        let (rtc, now) = rtc();
        assert_eq!(clock(&rtc), [0x58, 0x59, 0x23, 4, 0x25, 0x11, 0x26, 0x20]);
        put(&rtc, STATUS_B, BINARY);
        assert_eq!(clock(&rtc), [58, 59, 11 | AFTERNOON, 4, 25, 11, 26, 20]);
        now.fetch_add(2000, Ordering::Relaxed);
        assert_eq!(clock(&rtc), [0, 0, 12, 5, 26, 11, 26, 20]);
        put(&rtc, STATUS_B, 0);
        assert_eq!(at(&rtc, HOURS), 0x12);
        assert_eq!(at(&rtc, STATUS_D), VALID);
        assert_eq!(at(&rtc, STATUS_A) & UPDATING, 0);
        now.fetch_add(999, Ordering::Relaxed);
        assert_eq!(at(&rtc, STATUS_A) & UPDATING, 0);
    }

    #[test]
    fn shows_that_the_time_is_about_to_change() {
        let rtc = Rtc::new(|| Duration::new(EVENING, 999_800_000), 1 << 30, 0);
        assert_eq!(at(&rtc, STATUS_A), DIVIDER | UPDATING);
        put(&rtc, STATUS_B, SET | HOURS_24);
        assert_eq!(at(&rtc, STATUS_A), DIVIDER, "it is held");
    }

    #[test]
    fn guest_sets_the_time() {
        let (rtc, now) = rtc();
        put(&rtc, STATUS_B, SET | HOURS_24);
        now.fetch_add(60_000, Ordering::Relaxed);
        assert_eq!(at(&rtc, SECONDS), 0x58, "the time is held");
        for (register, value) in [(HOURS, 0x12), (DAY, 0x29), (MONTH, 2), (YEAR, 0x28)] {
            put(&rtc, register, value);
        }
        put(&rtc, STATUS_B, HOURS_24);
        now.fetch_add(2_000, Ordering::Relaxed);
        // 2028 is a leap year; the day of the week comes from the date.
        assert_eq!(clock(&rtc), [0, 0, 0x13, 3, 0x29, 2, 0x28, 0x20]);
        // A single register, without holding the time.
        put(&rtc, MINUTES, 0x30);
        assert_eq!(clock(&rtc)[..3], [0, 0x30, 0x13]);
        put(&rtc, MONTH, 0x13);
        put(&rtc, DAY, 0x3f);
        assert_eq!(
            clock(&rtc),
            [0, 0x30, 0x13, 3, 0x29, 2, 0x28, 0x20],
            "what is no time changes nothing"
        );
    }

    #[test]
    fn memory_has_sizes_and_keeps_bytes() {
        let (rtc, _) = rtc();
        let units = |from: usize, len: usize| {
            (0..len).fold(0, |all, i| all | u64::from(at(&rtc, from + i)) << (8 * i))
        };
        assert_eq!(units(MEMORY_BELOW, 2) << 16, (1 << 30) - (16 << 20));
        assert_eq!(units(MEMORY_ABOVE, 3) << 16, 5 << 30);
        put(&rtc, 0x40, 0xa5);
        assert_eq!(at(&rtc, 0x40), 0xa5);
        rtc.write(0, &[0x40, 0x40]);
        rtc.write(1, &[]);
        let mut wide = [0; 2];
        rtc.read(1, &mut wide);
        assert_eq!(wide, [0xff; 2]);
        let large = Rtc::new(|| Duration::ZERO, u64::MAX, u64::MAX);
        assert_eq!(at(&large, MEMORY_ABOVE + 2), 0xff);
    }

    proptest! {
        #[test]
        fn no_access_panics(
            accesses in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u8>()), 0..200),
            start in any::<u64>(),
        ) {
            let rtc = Rtc::new(move || Duration::from_secs(start), 0, 0);
            for (write, register, value) in accesses {
                if write { put(&rtc, register.into(), value) } else { at(&rtc, register.into()); }
            }
        }
    }
}
