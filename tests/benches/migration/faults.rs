//! The least cost of a missing page, here and over TCP, for comparison with a postcopy guest's waits.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
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
    Ok(quantiles(waits))
}

/// p50 and p99.
fn quantiles(mut waits: Vec<u64>) -> (u64, u64) {
    waits.sort_unstable();
    (waits[waits.len() / 2], waits[waits.len() * 99 / 100])
}

/// The argument with which this program answers requests for pages at an address.
pub(crate) const ECHO: &str = "--echo";
/// The length of a request, as of ours with its header.
const REQUEST: usize = 24;

/// Sends a page for each request, until the other side closes.
pub(crate) fn echo(address: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut request = [0; REQUEST];
    while stream.read_exact(&mut request).is_ok() {
        stream.write_all(&[7; PAGE_SIZE as usize])?;
    }
    Ok(())
}

/// How long a page of another process takes over loopback TCP, in microseconds: p50 and p99.
pub(crate) fn ping_pong() -> Result<(u64, u64)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let mut other = Command::new(std::env::current_exe()?)
        .args([ECHO, &address])
        .spawn()?;
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut page = [0; PAGE_SIZE as usize];
    let mut waits = Vec::with_capacity(PAGES);
    for _ in 0..PAGES {
        let start = Instant::now();
        stream.write_all(&[1; REQUEST])?;
        stream.read_exact(&mut page)?;
        waits.push(u64::try_from(start.elapsed().as_micros())?);
    }
    drop(stream);
    other.wait()?;
    Ok(quantiles(waits))
}
