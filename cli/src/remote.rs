//! Performs commands by requests to a service, or to the socket of one VM.

use std::io::{IsTerminal as _, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use openapi::{Client, News};
use spec::{
    CreateVm, FindOverlays, ForkVm, MergeSnapshots, MirrorDisk, PciDeviceInfo,
    ReceiveMigrationData, RecordWorkingSet, ResolveMigration, RestoreConfig, SendMigrationData,
    VmAddUserDevice, VmConfig, VmCoredumpData, VmId, VmRemoveDevice, VmResize, VmResizeDisk,
    VmResizeZone, VmSnapshotConfig, options,
};

use crate::args::{Arguments, Command, ResizeArguments, SnapshotCommand};
use crate::cluster;
use crate::console;
use crate::cpu::{self, CpuCommand, Place};
use crate::describe;
use crate::migrate;
use crate::print::{self, Printer};
use crate::summary::summary;

/// How often `resize --wait` asks how far the guest is.
const RESIZE_POLL: Duration = Duration::from_millis(200);

/// A VMM, and one of its VMs if it has many.
pub(crate) struct Remote {
    client: Client,
    token_file: Option<PathBuf>,
    vm: Option<VmId>,
    printer: Printer,
}

/// The token file counts over TCP only: the variable that names it may be set for all calls.
fn client(place: &Place, token_file: Option<&Path>) -> Result<Client> {
    let address = match place {
        Place::Socket(path) => return Ok(Client::unix(path)),
        Place::Tcp(address) => *address,
    };
    let client = Client::tcp(address);
    let Some(path) = token_file else {
        return Ok(client);
    };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the token file {}", path.display()))?;
    let token = text
        .parse()
        .with_context(|| format!("in the token file {}", path.display()))?;
    Ok(client.with_token(token))
}

/// Returns a client for what is answered when it is done, which may take hours.
fn patient(client: &Client) -> Client {
    client.clone().waiting(Duration::from_secs(7 * 24 * 3600))
}

/// Calls the method for one of many VMs, or that for the socket's own.
macro_rules! on_vm {
    ($self:ident, $many:ident, $one:ident $(, $body:expr)?) => {
        match &$self.vm {
            Some(id) => $self.client.$many(id $(, $body)?).await.map_err(anyhow::Error::from),
            None => $self.client.$one($($body)?).await.map_err(anyhow::Error::from),
        }
    };
}

impl Remote {
    pub(crate) fn new(arguments: &Arguments) -> Result<Self> {
        let place = match (arguments.tcp, &arguments.api_socket) {
            (Some(address), _) => Place::Tcp(address),
            (None, Some(path)) => Place::Socket(path.clone()),
            (None, None) => Place::Socket(openapi::default_socket()),
        };
        Ok(Self {
            client: client(&place, arguments.token_file.as_deref())?,
            token_file: arguments.token_file.clone(),
            vm: arguments.vm.clone(),
            printer: Printer::new(arguments.json),
        })
    }

    /// Performs a command. Those for a VM's state and devices are here, the others in the functions below.
    pub(crate) async fn perform(&self, command: Command) -> Result<()> {
        match command {
            Command::Create { path } => self.create(&path).await,
            Command::Boot => on_vm!(self, vms_boot, vm_boot),
            Command::Start { path } => self.start(&path).await,
            Command::Console(port) => {
                let info = on_vm!(self, vms_info, vm_info)?;
                console::connect(&info.config, port.port).await
            }
            Command::Logs { follow, port } => {
                let info = on_vm!(self, vms_info, vm_info)?;
                console::logs(&info.config, port.port, follow).await
            }
            Command::Pause => on_vm!(self, vms_pause, vm_pause),
            Command::Resume => on_vm!(self, vms_resume, vm_resume),
            Command::Reboot => on_vm!(self, vms_reboot, vm_reboot),
            Command::Shutdown => on_vm!(self, vms_shutdown, vm_shutdown),
            Command::Delete => on_vm!(self, vms_delete, vm_delete),
            Command::PowerButton => on_vm!(self, vms_power_button, vm_power_button),
            Command::Nmi => on_vm!(self, vms_nmi, vm_nmi),
            Command::Info => self
                .printer
                .show(&on_vm!(self, vms_info, vm_info)?, print::info),
            Command::Counters => self
                .printer
                .show(&on_vm!(self, vms_counters, vm_counters)?, print::counters),
            Command::MemoryMap => self.printer.show(
                &on_vm!(self, vms_memory_map, vm_memory_map)?,
                ToString::to_string,
            ),
            Command::Cpu(command) => self.cpu(command).await,
            Command::Resize(sizes) => self.resize(&sizes).await,
            Command::ResizeDisk { disk, size } => {
                let body = VmResizeDisk {
                    id: disk,
                    desired_size: size,
                };
                on_vm!(self, vms_resize_disk, vm_resize_disk, &body)
            }
            Command::ResizeZone { id, size } => {
                let body = VmResizeZone {
                    id,
                    desired_ram: size,
                };
                on_vm!(self, vms_resize_zone, vm_resize_zone, &body)
            }
            Command::AddDisk { options } => {
                let body = options::DISK.read(&options)?;
                self.added(on_vm!(self, vms_add_disk, vm_add_disk, &body)?)
            }
            Command::AddNet { options } => {
                let body = options::NET.read(&options)?;
                self.added(on_vm!(self, vms_add_net, vm_add_net, &body)?)
            }
            Command::AddVsock { options } => {
                let body = options::VSOCK.read(&options)?;
                self.added(on_vm!(self, vms_add_vsock, vm_add_vsock, &body)?)
            }
            Command::RemoveDevice { id } => {
                let body = VmRemoveDevice { id };
                on_vm!(self, vms_remove_device, vm_remove_device, &body)
            }
            other => self.perform_move(other).await,
        }
    }

    /// Commands that move, save, restore or copy a VM or its disks.
    async fn perform_move(&self, command: Command) -> Result<()> {
        match command {
            Command::MirrorDisk { disk, to, detach } => self.mirror(&disk, &to, detach).await,
            Command::Migrate(arguments) => {
                migrate::migrate(&self.client, self.vm.as_ref(), &arguments, self.printer).await
            }
            Command::Receive(arguments) => {
                migrate::receive(&self.client, self.vm.as_ref(), &arguments, self.printer).await
            }
            Command::Snapshot {
                command: Some(command),
                ..
            } => self.perform_on_snapshots(command).await,
            Command::Snapshot {
                command: None,
                destination_url,
                base,
                disks,
                max_downtime_ms,
                deadline_s,
                max_bandwidth,
            } => {
                let destination = destination_url.context("snapshot needs a folder")?;
                self.snapshot(&VmSnapshotConfig {
                    destination_url: url(&destination),
                    base_url: base.as_deref().map(url),
                    disks: disks.into(),
                    max_downtime_ms,
                    deadline_s,
                    max_bandwidth,
                })
                .await
            }
            Command::Coredump { destination_url } => self.core_dump(&destination_url).await,
            Command::Restore { options, overrides } => {
                self.restore(&options, overrides.as_deref()).await
            }
            Command::Describe { snapshot } => {
                let manifest = describe::manifest(&snapshot)?;
                print::line(&serde_json::to_string_pretty(&manifest)?)
            }
            Command::Fork {
                count,
                name,
                resume,
                overrides,
                disks,
            } => {
                let Some(vm) = &self.vm else {
                    bail!("fork needs --vm ID, on a service's socket");
                };
                let overrides = overrides.as_deref().map(read_json).transpose()?;
                let body = ForkVm {
                    count,
                    name,
                    resume,
                    overrides: overrides.unwrap_or_default(),
                    disks: disks.into(),
                };
                let begins = self.client.vms_fork(vm, &body);
                migrate::follow(&self.client, begins, self.printer).await
            }
            other => self.perform_on_service(other).await,
        }
    }

    /// Commands for the service and its migrations.
    async fn perform_on_service(&self, command: Command) -> Result<()> {
        match command {
            Command::Ping => self.printer.show(&self.client.ping().await?, print::ping),
            Command::Ls { all: true } => cluster::list(self.printer).await,
            Command::Ls { all: false } => self
                .printer
                .show(&self.client.vms_list().await?, |vms| print::list(vms)),
            Command::Cluster(command) => {
                cluster::perform(command, &self.client, self.printer).await
            }
            Command::Migrations => self
                .printer
                .show(&self.client.migrations_list().await?, |all| {
                    print::migrations(all)
                }),
            Command::Migration { id } => self
                .printer
                .show(&self.client.migrations_info(&id).await?, summary),
            Command::CancelMigration { id } => {
                self.client.migrations_cancel(&id).await.map_err(Into::into)
            }
            Command::ResolveMigration { id, outcome } => {
                let body = ResolveMigration {
                    outcome: outcome.into(),
                };
                let resolved = self.client.migrations_resolve(&id, &body).await;
                resolved.map_err(Into::into)
            }
            Command::Events { after } => self.events(after).await,
            Command::Openapi => {
                let document = self.client.openapi().await?;
                print::line(&serde_json::to_string_pretty(&document)?)
            }
            Command::ShutdownVmm if self.vm.is_some() => {
                bail!("shutdown-vmm ends the service with all its VMs; omit --vm, or use delete")
            }
            Command::ShutdownVmm => self.client.shut_service_down().await.map_err(Into::into),
            other => self.perform_on_one(other).await,
        }
    }

    async fn create(&self, path: &str) -> Result<()> {
        let config: VmConfig = read_json(path)?;
        match &self.vm {
            Some(id) => {
                self.client
                    .vms_create(&CreateVm {
                        id: Some(id.clone()),
                        config,
                    })
                    .await?;
            }
            None => self.client.vm_create(&config).await?,
        }
        Ok(())
    }

    async fn snapshot(&self, body: &VmSnapshotConfig) -> Result<()> {
        match &self.vm {
            Some(vm) => {
                let begins = self.client.vms_snapshot(vm, body);
                migrate::follow(&self.client, begins, self.printer).await
            }
            None => Ok(patient(&self.client).vm_snapshot(body).await?),
        }
    }

    async fn perform_on_snapshots(&self, command: SnapshotCommand) -> Result<()> {
        let vm = || {
            let vm = self.vm.as_ref();
            vm.context("recording needs --vm ID, on a service's socket")
        };
        match command {
            SnapshotCommand::Merge {
                source_url,
                destination_url,
            } => {
                let body = MergeSnapshots {
                    source_url: url(&source_url),
                    destination_url: url(&destination_url),
                };
                let begins = self.client.snapshots_merge(&body);
                migrate::follow(&self.client, begins, self.printer).await
            }
            SnapshotCommand::Overlays { path, remove } => {
                let found = self.client.overlays(&FindOverlays { path, remove }).await?;
                self.printer.show(&found, |found| print::overlays(found))
            }
            SnapshotCommand::Record {
                source_url,
                limit,
                overrides,
            } => {
                let body = RecordWorkingSet {
                    source_url: url(&source_url),
                    limit_s: limit,
                    overrides: overrides.as_deref().map(read_json).transpose()?,
                };
                let begins = self.client.vms_record(vm()?, &body);
                migrate::follow(&self.client, begins, self.printer).await
            }
            SnapshotCommand::StopRecording => Ok(self.client.vms_stop_recording(vm()?).await?),
        }
    }

    async fn mirror(&self, disk: &str, to: &str, detach: bool) -> Result<()> {
        let Some(vm) = &self.vm else {
            bail!("mirror-disk needs --vm ID, on a service's socket");
        };
        if let Some(problem) = spec::check_device_name("", disk) {
            bail!("{}", problem.detail);
        }
        let body: MirrorDisk = options::MIRROR.read(&with_key("path", to))?;
        let begins = self.client.vms_mirror_disk(vm, disk, &body);
        if detach {
            return self.printer.show(&begins.await?, |info| info.id.clone());
        }
        migrate::follow(&self.client, begins, self.printer).await
    }

    async fn core_dump(&self, destination: &str) -> Result<()> {
        let body = VmCoredumpData {
            destination_url: url(destination),
        };
        match &self.vm {
            Some(vm) => {
                let begins = self.client.vms_core_dump(vm, &body);
                migrate::follow(&self.client, begins, self.printer).await
            }
            None => Ok(patient(&self.client).vm_coredump(&body).await?),
        }
    }

    async fn restore(&self, text: &str, overrides: Option<&str>) -> Result<()> {
        let mut body: RestoreConfig = options::RESTORE.read(&with_key("source_url", text))?;
        body.overrides = overrides.map(read_json).transpose()?;
        body.source_url = url(&body.source_url);
        match &self.vm {
            Some(vm) => {
                let begins = self.client.vms_restore(vm, &body);
                migrate::follow(&self.client, begins, self.printer).await
            }
            None => Ok(patient(&self.client).vm_restore(&body).await?),
        }
    }

    async fn cpu(&self, command: CpuCommand) -> Result<()> {
        let there = |place: &Place| client(place, self.token_file.as_deref());
        match command {
            CpuCommand::Host => self.printer.show(&self.client.host_cpu().await?, cpu::host),
            CpuCommand::Baseline { hosts } => cpu::baseline(&hosts, there, self.printer).await,
            CpuCommand::Check(arguments) => {
                let Some(id) = &self.vm else {
                    bail!("`cpu check` is for a VM of a service: name it with --vm");
                };
                let guest = self.client.vms_cpu(id).await?;
                let host = &arguments.host;
                cpu::check(&guest, host, &there(host)?, self.printer).await
            }
        }
    }

    /// Creates the VM and boots it.
    async fn start(&self, path: &str) -> Result<()> {
        self.create(path).await?;
        let booted = on_vm!(self, vms_boot, vm_boot);
        if booted.is_err() {
            // Created by this command: the user starts again with a better file, under the same name.
            let deleted = on_vm!(self, vms_delete, vm_delete);
            deleted.context("the VM cannot be booted, nor deleted again")?;
        }
        booted
    }

    async fn events(&self, after: Option<u64>) -> Result<()> {
        let mut events = self.client.events(after, self.vm.as_ref()).await?;
        if after.is_none() && std::io::stderr().is_terminal() {
            eprintln!(
                "wh-remote: waiting for events; `--after 0` begins with the oldest, Ctrl-C ends"
            );
        }
        while let Some(news) = events.next().await? {
            match news {
                News::Happened(event) => self.printer.show_line(&event, print::event)?,
                News::Missed { oldest, count } => {
                    let count = count.map_or(String::new(), |count| format!(" ({count})"));
                    eprintln!("wh-remote: events before {oldest} are no longer kept{count}");
                }
            }
        }
        Ok(())
    }

    /// Commands for a socket that serves one VM only.
    async fn perform_on_one(&self, command: Command) -> Result<()> {
        if let Some(vm) = &self.vm {
            bail!(
                "this command does not work with --vm: use the VM's own socket, which `wh-remote \
                 ls` shows for {vm}, and omit --vm"
            );
        }
        let client = &self.client;
        let added = match command {
            Command::SendMigration { local, options } => {
                let body = send(local, &options)?;
                return migrate::send(client, &patient(client), &body).await;
            }
            Command::ReceiveMigration { options } => {
                return patient(client)
                    .vm_receive_migration(&receive(&options)?)
                    .await
                    .map_err(Into::into);
            }
            Command::AddDevice { options } => {
                client
                    .vm_add_device(&options::DEVICE.read(&options)?)
                    .await?
            }
            Command::AddFs { options } => client.vm_add_fs(&options::FS.read(&options)?).await?,
            Command::AddPmem { options } => {
                client.vm_add_pmem(&options::PMEM.read(&options)?).await?
            }
            Command::AddUserDevice { options } => {
                let body: VmAddUserDevice = options::USER_DEVICE.read(&options)?;
                client.vm_add_user_device(&body).await?
            }
            Command::AddVdpa { options } => {
                client.vm_add_vdpa(&options::VDPA.read(&options)?).await?
            }
            other => bail!("{other:?} needs a service's socket, and this one serves a single VM"),
        };
        self.added(added)
    }

    /// Resizes the VM, and shows on standard error how far its guest is until it is done.
    async fn resize(&self, sizes: &ResizeArguments) -> Result<()> {
        on_vm!(self, vms_resize, vm_resize, &resize(sizes))?;
        match sizes.wait {
            true => self.wait_for_resize(sizes.cpus).await,
            false => Ok(()),
        }
    }

    async fn wait_for_resize(&self, vcpus: Option<u32>) -> Result<()> {
        let mut last = None;
        loop {
            let info = on_vm!(self, vms_info, vm_info)?;
            let Some(pending) = info.pending_resizes.first() else {
                return match (vcpus, info.vcpus_actual_count) {
                    (Some(wanted), Some(actual)) if actual != wanted => {
                        bail!("the guest stays at {actual} vCPUs: `wh-remote events` says why")
                    }
                    _ => Ok(()),
                };
            };
            if last.as_ref() != Some(pending) {
                eprintln!("{}", print::pending(pending));
                last = Some(pending.clone());
            }
            tokio::time::sleep(RESIZE_POLL).await;
        }
    }

    fn added(&self, device: Option<PciDeviceInfo>) -> Result<()> {
        match device {
            Some(device) => self
                .printer
                .show(&device, |device| format!("{} at {}", device.id, device.bdf)),
            None => Ok(()),
        }
    }
}

fn resize(sizes: &ResizeArguments) -> VmResize {
    VmResize {
        desired_vcpus: sizes.cpus,
        desired_ram: sizes.memory,
        desired_balloon: sizes.balloon,
    }
}

/// Reads a JSON file; `-` is standard input.
fn read_json<T: serde::de::DeserializeOwned>(path: &str) -> Result<T> {
    let mut text = Vec::new();
    if path == "-" {
        std::io::stdin()
            .read_to_end(&mut text)
            .context("cannot read standard input")?;
    } else {
        text = std::fs::read(path).with_context(|| format!("cannot read {path}"))?;
    }
    let name = if path == "-" { "standard input" } else { path };
    spec::parse(&text).with_context(|| format!("in {name}"))
}

/// A path of the VM's host as a URL.
fn url(text: &str) -> String {
    if text.starts_with('/') {
        format!("file://{text}")
    } else {
        text.to_owned()
    }
}

/// A URL alone, or options of which one is the URL.
fn with_key(key: &str, text: &str) -> String {
    if text
        .split(',')
        .any(|part| part.starts_with(&format!("{key}=")))
    {
        text.to_owned()
    } else {
        format!("{key}={text}")
    }
}

fn send(local: bool, text: &str) -> Result<SendMigrationData> {
    let mut data: SendMigrationData =
        options::SEND_MIGRATION.read(&with_key("destination_url", text))?;
    data.local |= local;
    Ok(data)
}

fn receive(text: &str) -> Result<ReceiveMigrationData> {
    Ok(options::RECEIVE_MIGRATION.read(&with_key("receiver_url", text))?)
}

#[cfg(test)]
mod tests {
    use spec::{MigrationMode, TimeoutStrategy};

    use super::*;

    #[test]
    fn migrations_in_both_forms() {
        let copy = send(false, "destination_url=unix:/m,storage=copy").unwrap();
        assert_eq!(copy.storage, spec::StorageMode::Copy);
        assert!(send(false, "destination_url=unix:/m,storage=all").is_err());
        assert_eq!(
            send(true, "unix:/m").unwrap(),
            send(false, "destination_url=unix:/m,local=on").unwrap()
        );
        let all =
            "destination_url=tcp:h:1,downtime_ms=5,timeout_strategy=ignore,memory_mode=postcopy";
        let all = send(false, all).unwrap();
        assert_eq!(
            (all.downtime_ms, all.timeout_strategy),
            (5, TimeoutStrategy::Ignore)
        );
        assert_eq!(all.memory_mode, MigrationMode::Postcopy);
        assert_eq!(receive("unix:/m").unwrap().receiver_url, "unix:/m");
    }
}
