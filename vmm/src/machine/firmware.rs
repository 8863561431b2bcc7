//! The clocks that firmware needs. Every machine has them: a kernel may be a firmware in disguise, and
//! a guest that moves finds them where it goes.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ::devices::{PmTimer, Rtc, pm_timer, rtc};
use memory::{AddrRange, Transaction};
use state::{Load as _, LoadError, Save as _, SaveError, Store, Writer};

use super::platform::map_port;
use crate::arch::x86_64::layout::{self, Layout};
use crate::failure::BuildError;

/// A real-time clock and a timer.
pub(crate) struct FirmwareClocks {
    rtc: Arc<Rtc>,
    pm_timer: Arc<PmTimer>,
}

impl FirmwareClocks {
    /// Makes the clocks and maps their ports.
    pub(super) fn map(tx: &mut Transaction<'_>, layout: &Layout) -> Result<Self, BuildError> {
        // The clock counts RAM above 4 GiB, which is all but the first range.
        let high = layout.ram().into_iter().skip(1);
        let high = high.filter_map(AddrRange::len).sum();
        let utc = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
        };
        let rtc = Arc::new(Rtc::new(utc, layout.low_ram_end(), high));
        map_port(
            tx,
            ("registers", "rtc"),
            layout::RTC_PORT,
            rtc::LEN,
            Arc::clone(&rtc) as _,
        )?;
        let start = Instant::now();
        let pm_timer = Arc::new(PmTimer::new(move || start.elapsed()));
        map_port(
            tx,
            ("register", "pm-timer"),
            layout::PM_TIMER_PORT,
            pm_timer::LEN,
            Arc::clone(&pm_timer) as _,
        )?;
        Ok(Self { rtc, pm_timer })
    }

    pub(super) fn save(&self, writer: &mut Writer) -> Result<(), SaveError> {
        self.rtc.save(&mut writer.scope("rtc")?)?;
        self.pm_timer.save(&mut writer.scope("pm-timer")?)
    }

    pub(super) fn load(&self, store: &mut Store<'_>) -> Result<(), LoadError> {
        (&*self.rtc).load(&mut store.scope("rtc")?, &mut ())?;
        (&*self.pm_timer).load(&mut store.scope("pm-timer")?, &mut ())
    }
}
