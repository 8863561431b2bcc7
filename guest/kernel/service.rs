//! Duties of the first vCPU beside its work: commands, heartbeats, and the lines at a workload's end.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::apic;
use crate::clock;
use crate::cpu;
use crate::io;
use crate::line::{Address, Line, Parting, CommandError};
use crate::options::{After, Command, Crash, Workload};
use crate::serial::{self, Input};
use crate::virtio;
use crate::work::{SMP_COUNTS, Work};

/// Input is looked at this often where its interrupt does not come, and at most so often.
const POLL_US: u64 = 100_000;
const POLL_US_MIN: u64 = 10_000;

pub struct Service {
    work: &'static Work,
    input: Input,
    polled: u64,
    interrupts: u64,
    next_beat: Option<u64>,
    beats: u64,
    nmis: u64,
    /// A request to verify is not answered yet.
    verifying: bool,
    /// The line for the workload's end was printed.
    told: bool,
    finished: bool,
}

impl Service {
    pub fn new(work: &'static Work) -> Self {
        let mut service = Self {
            work,
            input: Input::new(),
            polled: 0,
            interrupts: 0,
            next_beat: None,
            beats: 0,
            nmis: 0,
            verifying: false,
            told: false,
            finished: false,
        };
        service.next_beat = service.beat_period().map(|period| work.began + period);
        service
    }

    fn beat_period(&self) -> Option<u64> {
        let ms = self.work.options.heartbeat_ms?;
        Some(clock::us_to_tsc(u64::from(ms) * 1000))
    }

    /// Does what is due; answers when to look again.
    pub fn serve(&mut self, now: u64) -> u64 {
        self.tell_nmis();
        self.beat(now);
        if self.verifying {
            self.tell_verified();
        } else if !self.told && self.work.blocks.iter().all(|cpu| cpu.done.load(Acquire)) {
            self.told = true;
            self.tell_done(now);
        } else if self.told && !self.finished {
            self.finished = true;
            self.finish();
        }
        if let Workload::Crash(crash) = self.work.options.workload {
            self.crash(crash);
        }
        let next_poll = self.poll(now);
        self.next_beat.unwrap_or(u64::MAX).min(next_poll)
    }

    fn poll(&mut self, now: u64) -> u64 {
        let interrupts = cpu::this().interrupts.load(Relaxed);
        let wait = if interrupts == self.interrupts {
            POLL_US
        } else {
            POLL_US_MIN
        };
        let due = self.polled + clock::us_to_tsc(wait);
        if now < due {
            return due;
        }
        self.polled = now;
        self.interrupts = interrupts;
        if let Some(button) = self.work.options.button_port
            && cpu::in8(button.port) & button.value != 0
        {
            self.power_off();
        }
        // Taken out while it calls back: `obey` needs all of the service.
        let mut input = core::mem::replace(&mut self.input, Input::new());
        input.poll(|line| match Command::parse(line) {
            Some(command) => self.obey(command),
            None => serial::say(&Line::Refused {
                what: CommandError::Command,
            }),
        });
        self.input = input;
        now + clock::us_to_tsc(POLL_US)
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Ping => serial::say(&Line::Alive {
                uptime_ms: clock::uptime_ms(),
            }),
            Command::Report => self.report(),
            Command::Io => serial::say(&io::COUNTS.line()),
            Command::Verify => self.verify(),
            Command::PowerOff => self.power_off(),
            Command::Reset => self.reset(),
            Command::Crash(crash) => self.crash(crash),
        }
    }

    fn beat(&mut self, now: u64) {
        let (Some(due), Some(period)) = (self.next_beat, self.beat_period()) else {
            return;
        };
        if now < due {
            return;
        }
        self.beats += 1;
        // What was missed in a stop is not made up for.
        self.next_beat = Some((due + period).max(now));
        serial::say(&Line::Heartbeat {
            count: self.beats,
            uptime_ms: clock::uptime_ms(),
            writes: self.work.writes(),
        });
    }

    fn tell_nmis(&mut self) {
        let count = self
            .work
            .blocks
            .iter()
            .map(|cpu| cpu.nmis.load(Relaxed))
            .sum();
        if count != self.nmis {
            self.nmis = count;
            serial::say(&Line::Nmi { count });
        }
    }

    fn report(&self) {
        let (mut gap, mut gap_cpu, mut clock_gap_ns, mut interrupts) = (0, 0, 0, 0);
        for cpu in self.work.blocks.iter() {
            let seen = cpu.gap_tsc.swap(0, Relaxed);
            if seen > gap {
                (gap, gap_cpu) = (seen, cpu.index);
            }
            clock_gap_ns = cpu.gap_clock_ns.swap(0, Relaxed).max(clock_gap_ns);
            interrupts += cpu.interrupts.load(Relaxed);
        }
        serial::say(&Line::Report {
            uptime_ms: clock::uptime_ms(),
            writes: self.work.writes(),
            gap_us: clock::tsc_to_ns(gap) / 1000,
            gap_cpu,
            clock_gap_us: clock_gap_ns / 1000,
            interrupts,
            nmis: self.nmis,
        });
    }

    fn verify(&mut self) {
        if !self.verifying {
            self.verifying = true;
            // Each vCPU answers when its own count differs, between two pages that it writes.
            self.work.verify.fetch_add(1, Release);
            apic::wake_others();
        }
    }

    fn tell_verified(&mut self) {
        let asked = self.work.verify.load(Relaxed);
        if self
            .work
            .blocks
            .iter()
            .any(|cpu| cpu.verified.load(Acquire) != asked)
        {
            return;
        }
        self.verifying = false;
        let (mut pages, mut bad, mut first_bad) = (0, 0, u64::MAX);
        for cpu in self.work.blocks.iter() {
            pages += cpu.verified_pages.load(Relaxed);
            bad += cpu.verified_bad.load(Relaxed);
            first_bad = first_bad.min(cpu.verified_first.load(Relaxed));
        }
        let first_bad = Some(Address(first_bad)).filter(|_| bad > 0);
        serial::say(&Line::Verified {
            pages,
            bad,
            first_bad,
        });
    }

    fn tell_done(&mut self, now: u64) {
        let elapsed_us = clock::tsc_to_ns(now.saturating_sub(self.work.began)) / 1000;
        let written = self.work.writes();
        match self.work.options.workload {
            Workload::Touch => {
                serial::say(&Line::Touched {
                    pages: written,
                    elapsed_us,
                });
                self.verify();
            }
            Workload::Exits { .. } => serial::say(&Line::Exits {
                count: written,
                elapsed_us,
            }),
            Workload::Smp => {
                let cpus = self.work.blocks.count();
                let count = self.work.counter.load(Relaxed);
                serial::say(&Line::Smp {
                    cpus,
                    count,
                    expected: u64::from(cpus) * SMP_COUNTS,
                });
            }
            // The workload printed its own line, or has no end.
            Workload::SelfTest
            | Workload::Idle
            | Workload::Io
            | Workload::Vsock
            | Workload::Queues
            | Workload::Spin
            | Workload::Dirty { .. }
            | Workload::Attack(_)
            | Workload::Crash(_) => {}
        }
    }

    fn finish(&self) {
        match self.work.options.then {
            After::Stay => {}
            After::PowerOff => self.power_off(),
            After::Reset => self.reset(),
        }
    }

    fn power_off(&self) {
        match self.work.platform.sleep {
            Some(register) => {
                serial::say(&Line::Bye {
                    by: Parting::PowerOff,
                });
                // Does not return where the register works: the line behind it says that the guest
                // survived.
                register.write();
                serial::say(&Line::Survived {
                    by: Parting::PowerOff,
                });
            }
            None => serial::say(&Line::Refused {
                what: CommandError::PowerOff,
            }),
        }
    }

    fn reset(&self) {
        match self.work.platform.reset {
            Some(register) => {
                serial::say(&Line::Bye { by: Parting::Reset });
                register.write();
                serial::say(&Line::Survived { by: Parting::Reset });
            }
            None => serial::say(&Line::Refused {
                what: CommandError::Reset,
            }),
        }
    }

    fn crash(&self, crash: Crash) {
        serial::say(&Line::Bye { by: Parting::Crash });
        match crash {
            Crash::TripleFault => cpu::triple_fault(),
            Crash::Emulation => cpu::emulation_failure(),
            Crash::Fault => cpu::fault(),
            Crash::Panic => {
                virtio::report_panic();
                cpu::fault()
            }
        }
    }
}
