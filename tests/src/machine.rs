//! An unmodified Debian system on a disk, and a shell in it.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use openapi::Client;
use spec::{
    AtDeadline, ConsoleConfig, ConsoleMode, CpusConfig, MemoryMode, MemoryRestoreMode,
    MigrationInfo, MigrationPhase, PayloadConfig, RestoreConfig, SerialConfig, StartMigration,
    VmConfig, VmId, VmResize, VmState,
};

use crate::{Service, Shell, await_anyone, snapshots};

/// Booting takes seconds on silicon, and a minute or two where the host is emulated.
pub const BOOTS: Duration = Duration::from_secs(300);

/// How long a migration may be without progress. Each phase has limits of its own that are shorter.
const STALLS: Duration = Duration::from_secs(180);
/// Time limit of a command that moves some megabytes.
pub const RUNS: Duration = Duration::from_secs(120);

const MIB: u64 = 1 << 20;

/// A machine that boots from a disk, and a shell in it.
#[derive(Debug)]
pub struct Machine {
    /// The service at which it is.
    pub service: Service,
    /// Its name.
    pub vm: VmId,
    shell: Shell,
    serial: std::path::PathBuf,
}

impl Machine {
    /// Boots it at a service, with this disk as its first.
    ///
    /// # Errors
    /// When it does not come to a login; says what the guest printed.
    pub async fn boot(
        service: Service,
        disk: &str,
        change: impl FnOnce(&Service, &mut VmConfig),
    ) -> Result<Self> {
        let guest = env::var("WHIMBREL_DEBIAN_DISK")
            .context("WHIMBREL_DEBIAN_DISK names the folder that ci/debian-disk made")?;
        let serial = service.path("serial.sock");
        let mut config = VmConfig::with_payload(PayloadConfig {
            kernel: Some(format!("{guest}/vmlinuz")),
            initramfs: Some(format!("{guest}/initramfs")),
            cmdline: Some("console=ttyS0 root=/dev/vda rw quiet".to_owned()),
            ..PayloadConfig::default()
        });
        config.cpus = CpusConfig::with_vcpus(2);
        config.memory.size = 768 * MIB;
        config.serial = SerialConfig {
            file: None,
            socket: Some(serial.to_string_lossy().into_owned()),
            mode: ConsoleMode::Socket,
        };
        config.console = ConsoleConfig::with_mode(ConsoleMode::Off);
        config.disks = Some(vec![serde_json::from_str(disk)?]);
        change(&service, &mut config);
        let vm = service.create("debian", config).await?;
        service.client().vms_boot(&vm).await?;
        let shell = match Shell::login(&serial, BOOTS).await {
            Ok(shell) => shell,
            Err(error) => return Err(explain(error, &service, &vm).await),
        };
        Ok(Self {
            service,
            vm,
            shell,
            serial,
        })
    }

    /// A client of its service.
    #[must_use]
    pub fn client(&self) -> &Client {
        self.service.client()
    }

    /// Runs a command in it, and returns what it printed.
    ///
    /// # Errors
    /// When it fails; says how the VM is.
    pub async fn run(&mut self, command: &str) -> Result<String> {
        match self.shell.run(command, RUNS).await {
            Ok(printed) => Ok(printed),
            Err(error) => Err(explain(error, &self.service, &self.vm).await),
        }
    }

    /// Boots it again, after it was powered off.
    ///
    /// # Errors
    /// The same as those of [`Machine::boot`].
    pub async fn boot_again(&mut self) -> Result<()> {
        self.client().vms_boot(&self.vm).await?;
        self.shell = Shell::login(&self.serial, BOOTS).await?;
        Ok(())
    }

    /// Reboots by the guest's own command.
    ///
    /// # Errors
    /// When it does not come to a login again; says how the VM is.
    pub async fn reboot(&mut self) -> Result<()> {
        self.shell.type_in("systemctl reboot\n").await?;
        match self.shell.login_again(BOOTS).await {
            Ok(()) => Ok(()),
            Err(error) => Err(explain(error, &self.service, &self.vm).await),
        }
    }

    /// Presses the power button, and waits for the end.
    ///
    /// # Errors
    /// When it does not come.
    pub async fn power_off(&mut self) -> Result<()> {
        self.client().vms_power_button(&self.vm).await?;
        let ended = self
            .service
            .reaches_within(&self.vm, VmState::Shutdown, BOOTS);
        let info = ended.await?;
        ensure!(info.failure.is_none(), "{:?}", info.failure);
        Ok(())
    }

    /// Returns a counter of a device.
    ///
    /// # Errors
    /// There is no such counter.
    pub async fn counter(&self, device: &str, name: &str) -> Result<i64> {
        let counters = self.client().vms_counters(&self.vm).await?;
        let value = counters.get(device).and_then(|device| device.get(name));
        Ok(i64::try_from(
            *value.with_context(|| format!("{device} counts no {name}"))?,
        )?)
    }

    /// Waits until a balloon holds so many bytes, and gives the guest's memory then, in KiB.
    ///
    /// # Errors
    /// When it does not come to that.
    pub async fn balloon_holds(&mut self, bytes: u64) -> Result<i64> {
        let size = VmResize {
            desired_balloon: Some(bytes),
            ..VmResize::default()
        };
        self.client().vms_resize(&self.vm, &size).await?;
        let start = Instant::now();
        while self.counter("__balloon", "actual_bytes").await? != i64::try_from(bytes)? {
            ensure!(
                start.elapsed() < RUNS,
                "the balloon does not come to {bytes} bytes"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let info = self.client().vms_info(&self.vm).await?;
        ensure!(info.memory_actual_size == 768 * MIB - bytes);
        let total = self.run("awk '/MemTotal/{print $2}' /proc/meminfo").await?;
        Ok(total.parse()?)
    }

    /// Moves it to another service, which is at this address, and returns the service that it left with the
    /// facts of the migration.
    ///
    /// # Errors
    /// When it does not move.
    pub async fn move_to(
        &mut self,
        there: Service,
        address: &str,
        mode: MemoryMode,
    ) -> Result<(Service, MigrationInfo)> {
        let info = self.migrate(&there, address, mode).await?;
        if info.error.is_some() {
            // What it said last.
            let said = self.shell.until("\0", Duration::from_secs(1)).await;
            let error = anyhow!("{info:?}\n{said:?}");
            let error = explain(error, &self.service, &self.vm).await;
            bail!("{error:#}\nand the destination:\n{}", there.log());
        }
        Ok((self.arrive(there).await?, info))
    }

    /// Migrates it to another service, which is at this address, and waits until the migration is over,
    /// whether it moved or not.
    ///
    /// # Errors
    /// When the migration cannot be started or does not end.
    pub async fn migrate(
        &mut self,
        there: &Service,
        address: &str,
        mode: MemoryMode,
    ) -> Result<MigrationInfo> {
        let what = StartMigration {
            mode,
            // So that pages are left to follow.
            max_downtime_ms: if mode == MemoryMode::Hybrid { 1 } else { 2000 },
            // Where all is emulated a guest may write as fast as its memory can be copied.
            deadline_s: 60,
            at_deadline: Some(AtDeadline::Stop),
            // All memory is hashed in the stop.
            stop_limit_ms: Some(180_000),
            verify: true,
            ..StartMigration::to("")
        };
        self.migrate_as(there, address, what).await
    }

    /// Migrates it as `what` says, which lacks the destination, and waits until the migration is over.
    ///
    /// # Errors
    /// The same as those of [`Machine::migrate`].
    pub async fn migrate_as(
        &mut self,
        there: &Service,
        address: &str,
        what: StartMigration,
    ) -> Result<MigrationInfo> {
        let body = await_anyone(format!("tcp:{address}:0"));
        let waiting = there.client().migrations_receive(&body).await?;
        let what = StartMigration {
            destination: waiting.endpoint,
            insecure: true,
            ..what
        };
        let begun = self.client().vms_migrate(&self.vm, &what).await?;
        let name = begun.id.parse()?;
        let (mut last, mut since) = (None, Instant::now());
        loop {
            let info = self.client().migrations_info(&name).await?;
            if info.phase.is_over() {
                return Ok(info);
            }
            let left = (info.remaining_pages, info.disk_remaining_bytes);
            let now = Some((info.phase, info.sent_bytes, left));
            if now != last {
                (last, since) = (now, Instant::now());
            }
            // How long a whole migration takes depends on what else the emulator's host does.
            if since.elapsed() > STALLS {
                let error = anyhow!("the migration makes no progress: {info:?}");
                let error = explain(error, &self.service, &self.vm).await;
                bail!(
                    "{error:#}\nand the destination:\n{}threads:\n{}",
                    there.log(),
                    there.threads()
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Saves it while it is paused, deletes it, and lets it run from the snapshot on, with the images that it
    /// left. Returns the facts of the snapshot.
    ///
    /// # Errors
    /// When it is not saved or restored; says how the VM is.
    pub async fn save_and_restore(&mut self, mode: MemoryRestoreMode) -> Result<MigrationInfo> {
        let dir = self.service.path("snapshot");
        self.client().vms_pause(&self.vm).await?;
        let saved = snapshots::snapshot(&self.service, &self.vm, &dir).await;
        ensure!(saved.phase == MigrationPhase::Completed, "{saved:?}");
        self.client().vms_delete(&self.vm).await?;
        let what = RestoreConfig {
            memory_restore_mode: mode,
            ..snapshots::from(&dir, true)
        };
        let begun = self.client().vms_restore(&self.vm, &what).await?;
        let came = snapshots::over(&self.service, &begun).await;
        ensure!(came.phase == MigrationPhase::Completed, "{came:?}");
        match Shell::attach(&self.serial, RUNS).await {
            Ok(shell) => self.shell = shell,
            Err(error) => return Err(explain(error, &self.service, &self.vm).await),
        }
        Ok(saved)
    }

    /// Follows it to the service that it moved to, and returns the one that it left.
    ///
    /// # Errors
    /// When it does not run there, or its shell does not answer.
    pub async fn arrive(&mut self, there: Service) -> Result<Service> {
        let left = std::mem::replace(&mut self.service, there);
        // A guest that came paused resumes here.
        if self.client().vms_info(&self.vm).await?.state == VmState::Paused {
            self.client().vms_resume(&self.vm).await?;
        }
        self.service.reaches(&self.vm, VmState::Running).await?;
        match Shell::attach(&self.serial, RUNS).await {
            Ok(shell) => self.shell = shell,
            Err(error) => return Err(explain(error, &self.service, &self.vm).await),
        }
        Ok(left)
    }
}

/// Adds to an error how the VM is, above all why its guest failed, what its devices did, and what its
/// service logged.
async fn explain(error: Error, service: &Service, id: &VmId) -> Error {
    let vm = match service.client().vms_info(id).await {
        Ok(info) => format!("the VM is {}, failure: {:?}", info.state, info.failure),
        Err(error) => format!("the VM cannot be asked: {error}"),
    };
    let counters = match service.client().vms_counters(id).await {
        Ok(counters) => format!("counters: {counters:?}"),
        Err(error) => format!("no counters: {error}"),
    };
    anyhow!(
        "{error:#}\n{vm}\n{counters}\n{}threads:\n{}",
        service.log(),
        service.threads()
    )
}
