//! How fast memory moves.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use guest::{After, Line, Options, Workload};
use migration::testing::Issuer;
use spec::{AwaitMigration, StartMigration, VmId};
use tempfile::TempDir;
use tests::{Face, Service, await_anyone};

use crate::terminal::Terminal;
use crate::{MIB, guest_config, median_of, over};

const MEMORY: u64 = 1024 * MIB;

/// A guest that stands about in one of two services.
struct Moving {
    services: [Service; 2],
    vm: VmId,
    /// The service that runs the guest.
    here: usize,
    certificates: TempDir,
}

impl Moving {
    async fn start(memory: u64, workload: Workload) -> Result<Self> {
        let services = [
            Service::start(Face::Many).await?,
            Service::start(Face::Many).await?,
        ];
        let options = Options {
            workload,
            heartbeat_ms: Some(1000),
            then: After::Stay,
            ..Options::default()
        };
        let kernel = services[0].path("pocket.elf");
        std::fs::write(&kernel, guest::IMAGE)?;
        let config = guest_config(&options, memory, 1, &kernel);
        let vm = services[0].create("bench", config).await?;
        services[0].client().vms_boot(&vm).await?;
        let terminal = Terminal::of(services[0].client(), &vm).await?;
        terminal.until(|line| match workload {
            Workload::Touch => matches!(line, Line::Touched { .. }),
            _ => matches!(line, Line::Heartbeat { .. }),
        })?;
        let certificates = TempDir::with_prefix("whimbrel-tls.")?;
        let issuer = Issuer::new();
        issuer.equip(certificates.path(), "127.0.0.1", &issuer);
        Ok(Self {
            services,
            vm,
            here: 0,
            certificates,
        })
    }

    /// To the other service: bytes that were sent, and microseconds.
    async fn go(&mut self, connections: Option<u16>, tls: bool) -> Result<(u64, u64)> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let tls_dir = tls.then(|| text(self.certificates.path()));
        let (from, to) = (&self.services[self.here], &self.services[1 - self.here]);
        let waiting = AwaitMigration {
            tls_dir: tls_dir.clone(),
            tls_peers: Some(vec!["*".to_owned()]),
            ..await_anyone("tcp:127.0.0.1:0")
        };
        let waiting = to.client().migrations_receive(&waiting).await?;
        let what = StartMigration {
            connections,
            tls_dir,
            insecure: true,
            ..StartMigration::to(waiting.endpoint)
        };
        let begun = from.client().vms_migrate(&self.vm, &what).await?;
        let sent = over(from.client(), &begun).await?;
        self.here = 1 - self.here;
        Ok((sent.sent_bytes, sent.elapsed_us.max(1)))
    }
}

/// Memory with something in every page, over one connection and more, beside a plain copy over as many.
pub(crate) async fn pages(times: usize) -> Result<()> {
    println!(
        "\nThroughput over loopback TCP, in MiB/s: medians of {times}, 1 GiB without a page of zeros.\n"
    );
    println!(
        "| connections | plain copy over as many sockets | pages | ratio | pages, TLS | ratio |"
    );
    println!("|---|---|---|---|---|---|");
    let mut guest = Moving::start(MEMORY, Workload::Touch).await?;
    for connections in [1, 2, 4] {
        let (mut copies, mut clear, mut secret) = (Vec::new(), Vec::new(), Vec::new());
        // One kind after the other, and the first of each not counted: each finds the memory that the one
        // before gave back, where the host would take long to find as much anew.
        for turn in 0..=times {
            let speed = copy(connections, MEMORY)? / MIB;
            copies.extend((turn > 0).then_some(speed));
        }
        for (tls, speeds) in [(false, &mut clear), (true, &mut secret)] {
            for turn in 0..=times {
                let (bytes, us) = guest.go(Some(connections), tls).await?;
                speeds.extend((turn > 0).then_some(bytes * 1_000_000 / us / MIB));
            }
        }
        let [copies, clear, secret] = [copies, clear, secret].map(median_of);
        let ratio = |speed: u64| {
            let percent = u32::try_from(speed * 100 / copies.max(1)).unwrap_or(u32::MAX);
            f64::from(percent) / 100.0
        };
        println!(
            "| {connections} | {copies} | {clear} | {:.2} | {secret} | {:.2} |",
            ratio(clear),
            ratio(secret)
        );
    }
    Ok(())
}

/// Bytes in a second over so many sockets, in pieces as long as ours, from memory that is there to memory
/// that is taken from the host, as by a migration.
fn copy(connections: u16, bytes: u64) -> Result<u64> {
    const PIECE: usize = 256 << 10;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let share = usize::try_from(bytes / u64::from(connections))?;
    let memory = vec![7_u8; share];
    let start = Instant::now();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..connections {
            let mut near = TcpStream::connect(address)?;
            let (mut far, _) = listener.accept()?;
            let memory = &memory;
            threads.push(scope.spawn(move || -> Result<()> {
                let mut pieces = memory.chunks(PIECE);
                Ok(pieces.try_for_each(|piece| near.write_all(piece))?)
            }));
            threads.push(scope.spawn(move || -> Result<()> {
                let mut memory = vec![0_u8; share];
                far.read_exact(&mut memory)?;
                ensure!(memory.last() == Some(&7));
                Ok(())
            }));
        }
        let failed = |_| anyhow::anyhow!("a copy failed");
        let mut ends = threads.into_iter().map(thread::ScopedJoinHandle::join);
        ends.try_for_each(|end| end.map_err(failed)?)
    })?;
    let us = u64::try_from(start.elapsed().as_micros())?.max(1);
    Ok(bytes.saturating_mul(1_000_000) / us)
}
