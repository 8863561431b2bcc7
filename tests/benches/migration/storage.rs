//! How fast disks are copied, and what that costs a guest that uses one.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest::{Line, Options, Workload};
use spec::{AwaitMigration, MirrorDisk, StartMigration, StorageMode, VmId};
use tempfile::TempDir;
use tests::Service;

use crate::terminal::Terminal;
use crate::{MIB, guest_config, median_of, ms, over};

/// Bytes of the disk, none of which are zeros.
const DISK: u64 = 512 * MIB;
/// For how long the guest is observed alone.
const ALONE: Duration = Duration::from_secs(2);

/// A guest that writes to its disk, in one of two services on one host.
struct Writing {
    services: [Service; 2],
    vm: VmId,
    /// The service that runs the guest.
    here: usize,
    terminal: Terminal,
    /// All images, on one file system.
    images: TempDir,
}

impl Writing {
    async fn start() -> Result<Self> {
        let images = TempDir::with_prefix("whimbrel-images.")?;
        let storage = images.path().to_string_lossy().into_owned();
        let options = ["--migration-storage".to_owned(), storage];
        let services = [
            Service::start_with(&[], &options).await?,
            Service::start_with(&[], &options).await?,
        ];
        let disk = images.path().join("disk");
        let mut file = File::create(&disk)?;
        let piece = vec![7_u8; 1 << 20];
        (0..DISK / MIB).try_for_each(|_| file.write_all(&piece))?;
        file.sync_all()?;
        let options = Options {
            workload: Workload::Io,
            ..Options::default()
        };
        let kernel = services[0].path("pocket.elf");
        fs::write(&kernel, guest::IMAGE)?;
        let mut config = guest_config(&options, 64 * MIB, 1, &kernel);
        let disk = serde_json::json!([{ "path": disk, "image_type": "Raw" }]);
        config.disks = serde_json::from_value(disk)?;
        let vm = services[0].create("bench", config).await?;
        services[0].client().vms_boot(&vm).await?;
        let terminal = Terminal::of(services[0].client(), &vm).await?;
        Ok(Self {
            services,
            vm,
            here: 0,
            terminal,
            images,
        })
    }

    /// Blocks of 4 KiB that the guest has written and read back.
    fn blocks(&mut self) -> Result<u64> {
        self.terminal.ask(guest::Command::Io)?;
        match self
            .terminal
            .until(|line| matches!(line, Line::Io { .. }))?
        {
            Line::Io { blocks, bad: 0, .. } => Ok(blocks),
            other => anyhow::bail!("blocks were read back wrong: {other:?}"),
        }
    }

    /// The guest's blocks in a second while `during` is awaited, and what that returns.
    async fn rate<R>(
        &mut self,
        during: impl AsyncFnOnce(&mut Self) -> Result<R>,
    ) -> Result<(u64, R)> {
        let (before, start) = (self.blocks()?, Instant::now());
        let result = during(self).await?;
        let us = u64::try_from(start.elapsed().as_micros())?.max(1);
        let blocks = self.blocks()?.saturating_sub(before);
        Ok((blocks.saturating_mul(1_000_000) / us, result))
    }

    async fn image(&self) -> Result<PathBuf> {
        let info = self.services[self.here].client().vms_info(&self.vm).await?;
        let disks = info.config.disks.unwrap_or_default();
        let path = disks.first().and_then(|disk| disk.path.clone());
        Ok(path.unwrap_or_default().into())
    }

    /// Mirrors the disk: MiB in a second, and microseconds for which its requests waited.
    async fn mirror(&mut self, turn: usize) -> Result<(u64, u64)> {
        let old = self.image().await?;
        let new = self.images.path().join(format!("mirror-{turn}"));
        let what = MirrorDisk::at(new.to_string_lossy());
        let client = self.services[self.here].client();
        let begun = client.vms_mirror_disk(&self.vm, "_disk0", &what).await?;
        let info = over(client, &begun).await?;
        fs::remove_file(old)?;
        let stop = info.downtime.unwrap_or_default().total_us;
        Ok((speed(info.elapsed_us), stop))
    }

    /// Moves the guest with its disk to the other service, over a unix socket: MiB in a second.
    async fn go(&mut self) -> Result<u64> {
        let old = self.image().await?;
        let (from, to) = (&self.services[self.here], &self.services[1 - self.here]);
        let at = AwaitMigration::at(format!("unix:{}", to.path("m").display()));
        let waiting = to.client().migrations_receive(&at).await?;
        let what = StartMigration {
            storage: StorageMode::Copy,
            ..StartMigration::to(waiting.endpoint)
        };
        let begun = from.client().vms_migrate(&self.vm, &what).await?;
        let info = over(from.client(), &begun).await?;
        self.here = 1 - self.here;
        self.terminal = Terminal::of(self.services[self.here].client(), &self.vm).await?;
        fs::remove_file(old)?;
        Ok(speed(info.elapsed_us))
    }
}

fn speed(us: u64) -> u64 {
    DISK / MIB * 1_000_000 / us.max(1)
}

/// `cp` and a sync: MiB in a second.
fn cp(from: &Path, to: &Path) -> Result<u64> {
    let start = Instant::now();
    let copied = Process::new("cp")
        .arg("--reflink=never")
        .args([from, to])
        .status()?;
    ensure!(copied.success(), "cp failed");
    File::open(to)?.sync_all()?;
    let us = u64::try_from(start.elapsed().as_micros())?;
    fs::remove_file(to)?;
    Ok(speed(us))
}

/// Copies of a disk whose guest writes to it all the time.
pub(crate) async fn disks(times: usize) -> Result<()> {
    let mut guest = Writing::start().await?;
    let (alone, ()) = guest
        .rate(async |_| {
            tokio::time::sleep(ALONE).await;
            Ok(())
        })
        .await?;
    let [mut copies, mut mirrors, mut stops, mut beside, mut moves] = [const { Vec::new() }; 5];
    for turn in 0..times {
        let image = guest.image().await?;
        copies.push(cp(&image, &guest.images.path().join("copy"))?);
        let (rate, (speed, stop)) = guest.rate(async |guest| guest.mirror(turn).await).await?;
        beside.push(rate);
        mirrors.push(speed);
        stops.push(stop);
        moves.push(guest.go().await?);
    }
    println!(
        "\nA disk of {} MiB, in MiB/s with all syncs: medians of {times}. The guest writes blocks of 4 KiB to \
         it and reads them back: {alone} in a second, alone.\n",
        DISK / MIB
    );
    println!(
        "| `cp` | mirror | move with `--storage copy` | the guest's blocks/s beside a mirror | its disk \
         waits for the switch (ms) |"
    );
    println!("|---|---|---|---|---|");
    println!(
        "| {} | {} | {} | {} | {} |",
        median_of(copies),
        median_of(mirrors),
        median_of(moves),
        median_of(beside),
        ms(median_of(stops))
    );
    Ok(())
}
