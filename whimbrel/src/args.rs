//! The command line.

mod migration;

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use api::{ClaimedVersion, TcpAccess};
use clap::{Args, Parser, Subcommand};
use spec::{
    ConsoleConfig, ConsoleMode, MemoryConfig, PayloadConfig, RestoreConfig, SerialConfig, VmConfig,
    options,
};

pub(crate) use self::migration::MigrationArguments;
use crate::accept::AcceptArguments;
use crate::cloud_hypervisor::CLAIM_VARIABLE;
use crate::inherited::{self, ApiSocket};
use crate::logging::LoggingArguments;
use crate::sandbox::{Rule, SeccompMode};

/// A virtual machine monitor for KVM with live migration between hosts.
///
/// `whimbrel serve` runs a service for many VMs, `whimbrel run` one VM in one command. Without a
/// subcommand it accepts the command line of Cloud Hypervisor and behaves the same.
#[derive(Debug, Parser)]
#[command(name = "whimbrel", version)]
#[command(after_help = "\
Examples:
  whimbrel demo                                   show a boot and live migrations; needs only /dev/kvm
  whimbrel serve --socket /run/whimbrel.sock      a service, used with wh-remote or over REST
  whimbrel run vm.json                            one VM from its configuration file
  whimbrel run --kernel vmlinuz --initramfs initrd --cmdline console=ttyS0
  whimbrel --api-socket /tmp/vm.sock              one VM, created and booted over its API")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) vm: VmArguments,
    #[command(flatten)]
    pub(crate) logging: LoggingArguments,
    #[command(flatten)]
    pub(crate) sandbox: SandboxArguments,
    /// Version of Cloud Hypervisor to claim on sockets that speak its API, and under the name
    /// `cloud-hypervisor` in --version. Before 53, `vm.send-migration` is answered when the migration
    /// is over, from then on when it has started.
    #[arg(long, value_name = "VERSION", default_value_t, global = true, env = CLAIM_VARIABLE)]
    pub(crate) claim_version: ClaimedVersion,
}

impl Arguments {
    /// The options of a VM belong to the program without a subcommand: before one they would say
    /// nothing.
    pub(crate) fn check(&self) -> Result<()> {
        if self.command.is_some() && self.vm.is_given() {
            bail!("options of a VM are given before a subcommand: put them after `run`");
        }
        if !self.sandbox.landlock_rules.is_empty() && !self.sandbox.landlock {
            bail!("--landlock-rules has no effect without --landlock");
        }
        Ok(())
    }

    /// Returns the configuration of the VM on the command line; `None` where there is none.
    pub(crate) fn vm_config(&self) -> Result<Option<VmConfig>> {
        match &self.command {
            Some(Command::Run(run)) => run.config(),
            None => {
                let mut config = self.vm.config(None)?;
                // It is Cloud Hypervisor's command line.
                if let Some(config) = &mut config {
                    config.cpus.fill_in_for_cloud_hypervisor();
                }
                Ok(config)
            }
            Some(_) => Ok(None),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a service for many VMs, driven over REST.
    Serve(Box<ServeArguments>),
    /// Run one VM, and end when its guest powers off.
    Run(Box<RunArguments>),
    /// Boot a small guest over REST, move it between two services, and show each step. Needs only
    /// /dev/kvm.
    Demo,
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write man pages.
    Man {
        /// Directory of the pages.
        directory: PathBuf,
    },
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct SandboxArguments {
    /// Action at a system call that no thread of this kind makes unless it is attacked. There is a
    /// list of calls for the process, and stricter ones for the threads of vCPUs and devices.
    #[arg(long, value_name = "MODE", default_value = "true", global = true)]
    pub(crate) seccomp: SeccompMode,
    /// Let the kernel deny (by Landlock) every file that the VM on the command line, the service's own
    /// files and --landlock-rules do not name. Fails on a kernel without Landlock.
    #[arg(long, global = true)]
    pub(crate) landlock: bool,
    /// Paths that stay open for VMs and devices that clients add later: path=PATH,access=rw. A path stands for
    /// all that is below it; access is r, or w for writing as well and making files.
    #[arg(long, value_name = "RULE", num_args = 1.., global = true)]
    pub(crate) landlock_rules: Vec<Rule>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// Socket of the service. [default: whimbrel.sock in $XDG_RUNTIME_DIR, or in /run]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Serve on this TCP address as well. Loopback only, as the API is not encrypted: reach it from
    /// elsewhere by ssh, or a proxy with TLS. Wants --api-token-file.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) tcp: Option<SocketAddr>,
    /// File with the token that clients must show over TCP: one line of 32 to 512 characters that only
    /// the service's user can read, as of `openssl rand -hex 32`.
    #[arg(long, value_name = "PATH", requires = "tcp")]
    pub(crate) api_token_file: Option<PathBuf>,
    /// Serve over TCP without a token: every user of this host can then do what the service's user can.
    #[arg(long, requires = "tcp", conflicts_with = "api_token_file")]
    pub(crate) api_insecure: bool,
    /// Directory of the service's files. For each VM, the socket `vms/ID.sock` in it serves Cloud
    /// Hypervisor's API. [default: the socket's path without its extension]
    #[arg(long, value_name = "PATH")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Directory below which a disk image may name a backing file or data file, besides the image's
    /// own directory. Can be repeated.
    #[arg(long, value_name = "DIR")]
    pub(crate) image_dir: Vec<PathBuf>,
    /// Number of threads for the VMs' devices, 1 to 1024. [default: the number of CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    #[command(flatten)]
    pub(crate) migration: MigrationArguments,
    #[command(flatten)]
    pub(crate) accept: AcceptArguments,
}

/// Checks that each path of an option is a directory that this process can see.
pub(crate) fn check_directories<'a>(
    option: &str,
    paths: impl IntoIterator<Item = &'a PathBuf>,
) -> Result<()> {
    for path in paths {
        let shown = path.display();
        match path.metadata() {
            Ok(found) if found.is_dir() => {}
            Ok(_) => bail!("{option} {shown}: the path is not a directory"),
            Err(error) => return Err(error).with_context(|| format!("{option} {shown}")),
        }
    }
    Ok(())
}

impl ServeArguments {
    /// Returns the TCP address to serve on, if there is one, and who may use it.
    pub(crate) fn tcp_access(&self) -> Result<Option<(SocketAddr, TcpAccess)>> {
        let Some(address) = self.tcp else {
            return Ok(None);
        };
        // Before the token, which would not help.
        if !address.ip().is_loopback() {
            bail!(api::ListenError::NotLoopback(address));
        }
        let access = match &self.api_token_file {
            Some(path) => api::token_file(path)?.into(),
            None if self.api_insecure => TcpAccess::AnyLocalUser,
            None => bail!(
                "--tcp {address}: every user of this host could drive the service; give --api-token-file PATH \
                 with a token for its clients, or --api-insecure to serve them all"
            ),
        };
        Ok(Some((address, access)))
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// JSON file with the VM's configuration, as `wh-remote create` takes; `-` is standard input. In place
    /// of the options below that describe a VM.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) vm: VmArguments,
}

impl RunArguments {
    /// Returns the VM's configuration, from the file or the options. Without a `serial` in the options, the
    /// serial port is this terminal: a person who runs a VM by hand wants to see it.
    pub(crate) fn config(&self) -> Result<Option<VmConfig>> {
        let Some(file) = &self.file else {
            return self.vm.config(Some(ConsoleMode::Tty));
        };
        if self.vm.describes_a_vm() {
            bail!(
                "{}: a file and options that describe a VM exclude each other",
                file.display()
            );
        }
        let mut body = Vec::new();
        let read = match file.to_str() {
            Some("-") => io::stdin().read_to_end(&mut body),
            _ => File::open(file).and_then(|mut file| file.read_to_end(&mut body)),
        };
        read.with_context(|| format!("cannot read {}", file.display()))?;
        let config = spec::parse(&body).with_context(|| format!("in {}", file.display()))?;
        Ok(Some(config))
    }
}

/// The options of Cloud Hypervisor's command line.
#[derive(Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "VM")]
pub(crate) struct VmArguments {
    /// Socket that serves Cloud Hypervisor's API for this VM.
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: Option<String>,
    /// Kernel to boot: an ELF vmlinux or a bzImage.
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: Option<String>,
    /// Firmware to boot in place of a kernel: an ELF file with a PVH note, as EDK2's CLOUDHV.fd.
    #[arg(long, value_name = "PATH")]
    pub(crate) firmware: Option<String>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Initial RAM file system.
    #[arg(long, value_name = "PATH")]
    pub(crate) initramfs: Option<String>,
    // As an attribute: in a comment its brackets would be links.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "vCPUs: a number (default 1), or boot=N,max=N,topology=T:C:D:P,affinity=[V@[CPUS]],\
                max_phys_bits=N"
    )]
    pub(crate) cpus: Option<String>,
    /// Memory (default 512 MiB):
    /// size=SIZE,shared=on,hugepages=on,hugepage_size=SIZE,prefault=on,mergeable=on,thp=off.
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) memory: Option<String>,
    /// Memory of several zones, in place of one --memory size:
    /// id=NAME,size=SIZE,host_numa_node=N,shared=on,hugepages=on,hugepage_size=SIZE,prefault=on,
    /// reserve=on,mergeable=on, and to resize the zone later (`wh-remote resize-zone`)
    /// hotplug_size=SIZE,hotplugged_size=SIZE with --memory size=0,hotplug_method=virtio-mem.
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    pub(crate) memory_zone: Vec<String>,
    // As an attribute: in a comment its brackets would be links.
    #[arg(
        long,
        value_name = "OPTIONS",
        num_args = 1..,
        help = "NUMA nodes of the guest: guest_numa_id=N,cpus=[CPUS],memory_zones=[NAMES],\
                distances=[N@DISTANCE,...],pci_segments=[SEGMENTS]. Each vCPU and each memory zone is in \
                one node; without --memory-zone all memory is the zone mem0. Distances are 20 unless given"
    )]
    pub(crate) numa: Vec<String>,
    /// Serial port: off, null, pty, tty, file=PATH or socket=PATH.
    #[arg(long, value_name = "MODE")]
    pub(crate) serial: Option<String>,
    /// Virtio console, hvc0 in a Linux guest: off, null, tty, pty, file=PATH or socket=PATH. If
    /// both use `tty`, the serial port gets the terminal.
    #[arg(long, value_name = "MODE")]
    pub(crate) console: Option<String>,
    /// Disks: path=PATH,readonly=on,direct=on,image_type=qcow2,backing_files=on,data_files=on,num_queues=N,queue_size=N,
    /// serial=TEXT,id=NAME,on_error=pause,bw_size=BYTES,bw_refill_time=MS,ops_size=N,ops_refill_time=MS,
    /// rate_limit_group=NAME.
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    pub(crate) disk: Vec<String>,
    /// Directory below which a disk image may name a backing file or data file, besides the image's
    /// own directory. Can be repeated.
    #[arg(long, value_name = "DIR")]
    pub(crate) image_dir: Vec<PathBuf>,
    /// Limits that several disks share: id=NAME,bw_size=BYTES,bw_refill_time=MS,ops_size=N,ops_refill_time=MS.
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    pub(crate) rate_limit_group: Vec<String>,
    /// Network interfaces:
    /// tap=NAME,mac=MAC,ip=ADDRESS,mask=MASK,mtu=N,num_queues=N,queue_size=N,id=NAME. A tap that
    /// does not exist is created.
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    pub(crate) net: Vec<String>,
    /// Source of random numbers: src=PATH,bw_size=BYTES,bw_refill_time=MS,ops_size=N,ops_refill_time=MS.
    /// [default: src=/dev/urandom]
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) rng: Option<String>,
    /// Memory balloon: size=SIZE,deflate_on_oom=on,free_page_reporting=on.
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) balloon: Option<String>,
    /// Shared file systems. (Not supported by this version.)
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    pub(crate) fs: Vec<String>,
    /// Persistent memory. (Not supported by this version.)
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    pub(crate) pmem: Vec<String>,
    /// Socket between guest and host: cid=N,socket=PATH.
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) vsock: Option<String>,
    // As an attribute: in a comment its brackets would be links.
    #[arg(
        long,
        value_name = "OPTIONS",
        help = "Platform: num_pci_segments=N,system_serial_number=TEXT,system_uuid=UUID,oem_strings=[TEXT,...],\
                system_manufacturer=TEXT,system_product_name=TEXT,system_version=TEXT,system_family=TEXT,\
                system_sku_number=TEXT,chassis_asset_tag=TEXT"
    )]
    pub(crate) platform: Option<String>,
    /// PCI segments' shares of the address windows:
    /// pci_segment=N,mmio32_aperture_weight=N,mmio64_aperture_weight=N.
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    pub(crate) pci_segment: Vec<String>,
    /// TPM 2.0 that swtpm emulates: socket=PATH, swtpm's control socket.
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) tpm: Option<String>,
    /// A virtio watchdog: the VM is reset when its guest's driver has not pinged for 30 s.
    #[arg(long)]
    pub(crate) watchdog: bool,
    /// A panic notifier: a guest's panic becomes an event.
    #[arg(long)]
    pub(crate) pvpanic: bool,
    /// Report events here, as JSON in Cloud Hypervisor's form: path=PATH or fd=N.
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) event_monitor: Option<String>,
    /// Make the VM from a snapshot, in place of the options that describe a VM:
    /// source_url=file:///PATH,resume=on. Without resume=on it is paused. Interfaces whose taps were
    /// passed as descriptors get others by number: `net_fds=[ID@[N,N],ID@[N]]`.
    #[arg(long, value_name = "OPTIONS")]
    pub(crate) restore: Option<String>,
    /// Keep running when the guest powers off: the VM can be booted again over the API.
    #[arg(long)]
    pub(crate) no_shutdown: bool,
    /// Debug console, an I/O port for the text of firmware: off, null, tty, pty or file=PATH, with
    /// iobase=PORT (default 0xe9).
    #[arg(long, value_name = "MODE")]
    pub(crate) debug_console: Option<String>,
    #[command(flatten)]
    pub(crate) migration: MigrationArguments,
}

impl VmArguments {
    fn is_given(&self) -> bool {
        *self != Self::default()
    }

    /// Whether an option besides those for the program itself is given.
    fn describes_a_vm(&self) -> bool {
        let program = Self {
            api_socket: self.api_socket.clone(),
            image_dir: self.image_dir.clone(),
            event_monitor: self.event_monitor.clone(),
            no_shutdown: self.no_shutdown,
            restore: self.restore.clone(),
            migration: self.migration.clone(),
            ..Self::default()
        };
        // Compared as a whole, so that an option that is added later counts as one that describes a
        // VM, unless it is listed above.
        *self != program
    }

    /// Returns the API's socket, if one is given.
    pub(crate) fn api_socket(&self) -> Result<Option<ApiSocket>> {
        self.api_socket.as_deref().map(ApiSocket::parse).transpose()
    }

    /// The snapshot to restore, if there is one.
    pub(crate) fn snapshot(&self) -> Result<Option<RestoreConfig>> {
        let Some(text) = &self.restore else {
            return Ok(None);
        };
        if self.describes_a_vm() {
            bail!("--restore and options that describe a VM exclude each other");
        }
        Ok(Some(inherited::restore(text)?))
    }

    /// The VM's configuration, if there is something to boot.
    pub(crate) fn config(&self, serial_mode: Option<ConsoleMode>) -> Result<Option<VmConfig>> {
        if self.kernel.is_none() && self.firmware.is_none() {
            return Ok(None);
        }
        let mut config = VmConfig::with_payload(PayloadConfig {
            firmware: self.firmware.clone(),
            kernel: self.kernel.clone(),
            cmdline: self.cmdline.clone(),
            initramfs: self.initramfs.clone(),
            ..PayloadConfig::default()
        });
        config.serial = match (&self.serial, serial_mode) {
            (Some(text), _) => options::serial(text)?,
            (None, Some(mode)) => SerialConfig::with_mode(mode),
            (None, None) => SerialConfig::default(),
        };
        config.console = match &self.console {
            Some(text) => options::console(text)?,
            None => ConsoleConfig::default(),
        };
        let debug = self.debug_console.as_deref();
        config.debug_console = debug.map(options::debug_console).transpose()?;
        if let Some(text) = &self.cpus {
            config.cpus = options::cpus(text)?;
        }
        if let Some(text) = &self.memory {
            config.memory = options::memory(text)?;
        } else if !self.memory_zone.is_empty() {
            // With zones the size is theirs: the default of 512 MiB would be one zone more.
            config.memory = MemoryConfig::with_size(0);
        }
        config.memory.zones = many(&self.memory_zone, &options::MEMORY_ZONE)?;
        config.numa = many(&self.numa, &options::NUMA)?;
        config.rate_limit_groups = many(&self.rate_limit_group, &options::RATE_LIMIT_GROUP)?;
        config.disks = many(&self.disk, &options::DISK)?;
        config.net = match self.net.as_slice() {
            [] => None,
            texts => Some(
                texts
                    .iter()
                    .map(|text| inherited::net(text))
                    .collect::<Result<_>>()?,
            ),
        };
        config.fs = many(&self.fs, &options::FS)?;
        config.pmem = many(&self.pmem, &options::PMEM)?;
        if let Some(text) = &self.rng {
            config.rng = options::RNG.read(text)?;
        }
        config.balloon = self
            .balloon
            .as_deref()
            .map(|t| options::BALLOON.read(t))
            .transpose()?;
        config.vsock = self
            .vsock
            .as_deref()
            .map(|t| options::VSOCK.read(t))
            .transpose()?;
        config.platform = self
            .platform
            .as_deref()
            .map(|t| options::PLATFORM.read(t))
            .transpose()?;
        config.pci_segments = many(&self.pci_segment, &options::PCI_SEGMENT)?;
        config.tpm = self
            .tpm
            .as_deref()
            .map(|t| options::TPM.read(t))
            .transpose()?;
        config.watchdog = self.watchdog;
        config.pvpanic = self.pvpanic;
        Ok(Some(config))
    }
}

fn many<T: serde::de::DeserializeOwned>(
    texts: &[String],
    kind: &options::OptionKind,
) -> Result<Option<Vec<T>>> {
    if texts.is_empty() {
        return Ok(None);
    }
    let all = texts
        .iter()
        .map(|text| kind.read(text))
        .collect::<Result<_, _>>();
    all.map(Some).context("the command line cannot be read")
}

#[cfg(test)]
mod tests;
