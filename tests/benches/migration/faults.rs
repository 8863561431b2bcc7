//! The least cost of a missing page, for comparison with a postcopy guest's waits.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use memory::{Fault, PAGE_SIZE, RamBlock, RamConfig, UserFaults};

const PAGES: usize = 4096;

/// How long who touches a page waits for another thread to fill it, in microseconds: p50 and p99.
pub(crate) fn bare() -> Result<(u64, u64)> {
    let page = usize::try_from(PAGE_SIZE)?;
    let config = RamConfig {
        thp: false,
        ..RamConfig::anonymous(PAGES as u64 * PAGE_SIZE)
    };
    let ram = Arc::new(RamBlock::new(&config)?);
    let faults = Arc::new(UserFaults::new(vec![Arc::clone(&ram)])?);
    let server = Arc::clone(&faults);
    let filler = thread::spawn(move || -> Result<()> {
        let mut filled = 0;
        while filled < PAGES {
            for fault in server.wait(Duration::from_secs(1))? {
                if let Fault::Missing(block, page) = fault {
                    server.fill(block, page, &[7; PAGE_SIZE as usize])?;
                    filled += 1;
                }
            }
        }
        Ok(())
    });
    let mut waits = Vec::with_capacity(PAGES);
    for index in 0..PAGES {
        // Scattered, and each once.
        let at = index * 1009 % PAGES * page;
        let start = Instant::now();
        let mut byte = [0_u8];
        ram.slice(at, 1)
            .context("a page of the block")?
            .copy_to(&mut byte[..]);
        waits.push(u64::try_from(start.elapsed().as_micros())?);
    }
    filler
        .join()
        .map_err(|_| anyhow::anyhow!("the filler failed"))??;
    waits.sort_unstable();
    Ok((waits[PAGES / 2], waits[PAGES * 99 / 100]))
}
