//! The command line: `ch-remote`'s, and commands for many VMs.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use spec::{MAX_FORKS, SnapshotDisks, VmId};

use crate::cluster::ClusterCommand;
use crate::cpu::CpuCommand;
use crate::migrate::{MigrateArguments, Outcome, ReceiveArguments};

/// Treatment of the disks of a VM of which a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Disks {
    /// They are left as they are.
    None,
    /// Each image is frozen, and the VM continues on a qcow2 overlay beside it.
    Overlay,
    /// The snapshot has a copy of each disk. The VM keeps its images.
    Copy,
}

impl From<Disks> for SnapshotDisks {
    fn from(disks: Disks) -> Self {
        match disks {
            Disks::None => Self::None,
            Disks::Overlay => Self::Overlay,
            Disks::Copy => Self::Copy,
        }
    }
}

/// Commands for snapshots that exist.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Write a snapshot that needs no base from an increment and its bases, and wait until it is complete.
    /// They stay as they are. Ctrl-C cancels. Needs a service's socket.
    Merge {
        /// The increment, on the service's host: file:///PATH, or an absolute path.
        #[arg(value_name = "URL")]
        source_url: String,
        /// The folder of the new snapshot. Made if it does not exist.
        #[arg(value_name = "URL")]
        destination_url: String,
    },
    /// List the overlays beside an image, and what uses each. Overlays of frozen disks stay when their VM is
    /// deleted. A VM that another service has created and not booted is not known as a user. Needs a
    /// service's socket.
    Overlays {
        /// The image, on the service's host, or one of its overlays.
        #[arg(value_name = "PATH")]
        path: String,
        /// Remove those that no VM, image or snapshot uses. Before that, boot what other services have
        /// created on them: only a VM that is on protects its overlay from this service.
        #[arg(long)]
        remove: bool,
    },
    /// Make the VM from a snapshot, and record which pages its guest touches until `stop-recording`. Later
    /// restores with OnDemand and Map bring these pages first. Waits until the record is written; the VM
    /// stays. Ctrl-C ends the recording without a record. Needs --vm ID.
    Record {
        /// The folder of the snapshot: file:///PATH, or an absolute path. The record is written there.
        #[arg(value_name = "URL")]
        source_url: String,
        /// Seconds after which the recording ends by itself.
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
        limit: u32,
        /// JSON file of what differs from the VM that was saved: disks, taps, sockets; - for standard input.
        #[arg(long, value_name = "FILE")]
        overrides: Option<String>,
    },
    /// Say that the guest of the VM is ready: `record` writes what was touched so far. Needs --vm ID.
    StopRecording,
}

/// Drives a virtual machine over the REST API.
///
/// With --api-socket alone, commands go to a socket that serves one VM, as with `ch-remote`. With
/// --vm, they go to one VM of a service.
#[derive(Debug, Parser)]
#[command(name = "wh-remote", version)]
#[command(after_help = "\
Examples:
  wh-remote --api-socket /tmp/vm.sock create vm.json      a socket that serves one VM
  wh-remote --api-socket /tmp/vm.sock boot
  wh-remote ls                                            list the VMs of the service
  wh-remote --vm web create vm.json                       use one of them
  wh-remote --vm web boot
  wh-remote --vm web start vm.json                        both of them in one
  wh-remote --vm web console                              its serial port; Ctrl-A x leaves
  wh-remote --vm web logs -f                              ... if that goes to a file
  wh-remote --api-socket /run/b.sock receive unix:/run/way --detach
  wh-remote --vm web migrate unix:/run/way                move it there
  wh-remote --tcp 127.0.0.1:8080 --token-file token ls    over TCP
  wh-remote --vm web info --json | jq .state

Paths in options, URLs and JSON files are those of the service's host, and are sent as they are written.
The service resolves a relative one below its own working directory: use absolute paths.")]
pub(crate) struct Arguments {
    /// The API socket. [default: the service's, whimbrel.sock in $XDG_RUNTIME_DIR, or in /run]
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) api_socket: Option<PathBuf>,
    /// The TCP address of a service, in place of its socket.
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        global = true,
        conflicts_with = "api_socket"
    )]
    pub(crate) tcp: Option<SocketAddr>,
    /// File with the service's token, which a TCP address asks for.
    #[arg(long, value_name = "PATH", global = true, env = "WHIMBREL_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// The VM to use, on a service's socket.
    #[arg(long, value_name = "ID", global = true)]
    pub(crate) vm: Option<VmId>,
    /// Print JSON in place of text. Always on when the program is started as `ch-remote`, whose output is
    /// JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check that the VMM is running, and show its version.
    Ping,
    /// List the VMs of a service.
    #[command(visible_alias = "list")]
    Ls {
        /// The VMs of all nodes of the Pacemaker cluster that this host is in.
        #[arg(long)]
        all: bool,
    },
    /// Create the VM from a JSON file, without booting it.
    Create {
        /// The file; `-` is standard input.
        #[arg(default_value = "-")]
        path: String,
    },
    /// Boot the VM.
    Boot,
    /// Create the VM from a JSON file and boot it. A VM that cannot be booted is deleted again.
    Start {
        /// The file; `-` is standard input.
        #[arg(default_value = "-")]
        path: String,
    },
    /// Connect this terminal to the VM's serial port or console, in mode Pty or Socket. Ctrl-A x leaves.
    ///
    /// Must run on the VM's host, as a user who may open the pseudo terminal or socket. If standard input
    /// is not a terminal, all of it is sent, and output is printed until the VM closes the console.
    Console(PortArguments),
    /// Print what the VM's serial port or console wrote, in mode File.
    ///
    /// Must run on the VM's host, as a user who may read the file.
    Logs {
        /// Wait for more; Ctrl-C ends.
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        port: PortArguments,
    },
    /// Pause the guest.
    Pause,
    /// Resume the paused guest.
    Resume,
    /// Reset the guest.
    Reboot,
    /// End the guest at once. The VM can be booted again.
    Shutdown,
    /// End the VM and delete its configuration.
    Delete,
    /// Press the power button.
    PowerButton,
    /// Send a non-maskable interrupt to every vCPU.
    Nmi,
    /// Show the VM's configuration and state.
    Info,
    /// Show the counters of the VM's devices.
    Counters,
    /// Show the VM's address spaces: the region tree and the flat view.
    MemoryMap,
    /// Compare CPUs of hosts and guests.
    #[command(subcommand)]
    Cpu(CpuCommand),
    /// Show and drain the nodes of a Pacemaker cluster. Works on a node of it.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Follow the events of a service's VMs.
    Events {
        /// Start after the event with this number; 0 starts with the oldest that is kept.
        #[arg(long, value_name = "N")]
        after: Option<u64>,
    },
    /// Show the OpenAPI document of the socket.
    Openapi,
    /// End the VMM, or the service with all its VMs.
    ShutdownVmm,
    /// Resize the VM.
    Resize(ResizeArguments),
    /// Resize a disk.
    ResizeDisk {
        /// The disk.
        #[arg(long, value_name = "ID")]
        disk: String,
        /// Its new size.
        #[arg(long, value_name = "SIZE", value_parser = size)]
        size: u64,
    },
    /// Copy a disk of the VM into a new image while the guest runs, and have the disk continue there; wait until it
    /// does. Ctrl-C cancels. Needs --vm.
    MirrorDisk {
        /// The disk.
        #[arg(value_name = "ID")]
        disk: String,
        /// The new image, at whose path nothing may be: path=PATH,format=raw|qcow2,max_bandwidth=SIZE,
        /// max_downtime_ms=MS,deadline_s=S. [default: the format of the disk's image, no limit, 300 ms, 3600 s]
        #[arg(long, value_name = "KEY=VALUE,...")]
        to: String,
        /// Start the mirror, print its name, and do not wait.
        #[arg(long)]
        detach: bool,
    },
    /// Resize a memory zone that was created with `hotplug_size`.
    ResizeZone {
        /// The zone, by its id in `memory.zones` (`--memory-zone`).
        #[arg(long, value_name = "ID")]
        id: String,
        /// Its new size, with the memory that it boots with.
        #[arg(long, value_name = "SIZE", value_parser = size)]
        size: u64,
    },
    /// Add a device of the host.
    AddDevice {
        /// The device: path=/sys/bus/pci/devices/....
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Add a disk.
    AddDisk {
        /// The device: path=PATH,readonly=on.
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Add a shared file system.
    AddFs {
        /// The device: tag=NAME,socket=PATH.
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Add a network interface.
    AddNet {
        /// The device: tap=NAME,mac=MAC.
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Add persistent memory.
    AddPmem {
        /// The device: file=PATH,size=SIZE.
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Add a device that another process serves.
    AddUserDevice {
        /// The device: socket=PATH.
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Add a vDPA device.
    AddVdpa {
        /// The device: path=PATH,num_queues=N.
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Add a socket between guest and host.
    AddVsock {
        /// The device: cid=N,socket=PATH.
        #[arg(value_name = "KEY=VALUE,...")]
        options: String,
    },
    /// Remove a device.
    RemoveDevice {
        /// The device.
        id: String,
    },
    /// Write a snapshot of the VM into a folder of its host, and wait until it is complete. A running
    /// VM stops for some milliseconds only. Ctrl-C cancels.
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Snapshot {
        #[command(subcommand)]
        command: Option<SnapshotCommand>,
        /// The folder: file:///PATH, or an absolute path. Made if it does not exist.
        #[arg(value_name = "URL", required = true)]
        destination_url: Option<String>,
        /// A snapshot of this VM: only pages that have changed since are written. The new snapshot needs
        /// it.
        #[arg(long, value_name = "URL")]
        base: Option<String>,
        /// Treatment of the VM's disks that can be written.
        #[arg(long, value_enum, default_value_t = Disks::None)]
        disks: Disks,
        /// With `--disks copy`, of a running VM: how long the last blocks may take in the stop, in
        /// milliseconds. [default: 300]
        #[arg(long, value_name = "MS", value_parser = positive())]
        max_downtime_ms: Option<u64>,
        /// With `--disks copy`, of a running VM: seconds until which it must write slowly enough for that.
        /// [default: 3600]
        #[arg(long, value_name = "SECONDS", value_parser = positive())]
        deadline_s: Option<u64>,
        /// With `--disks copy`, of a running VM: bytes of its disks that may be copied in a second. [default:
        /// unlimited]
        #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
        max_bandwidth: Option<u64>,
    },
    /// Make the VM from a snapshot, and wait until it is there: a URL or path, or
    /// source_url=URL,resume=on,memory_restore_mode=map. Without resume=on the VM is paused. With count=N
    /// there are N VMs: ID-1, ID-2 and so on.
    Restore {
        /// The snapshot, with options.
        #[arg(value_name = "URL|KEY=VALUE,...")]
        options: String,
        /// JSON file of what differs from the VM that was saved: disks, taps, sockets; - for standard input.
        #[arg(long, value_name = "FILE")]
        overrides: Option<String>,
    },
    /// Print the manifest of a snapshot in a folder of this host, of any version of the format, with the
    /// images that it has frozen (`frozen_images`), the disks that it has copies of (`disk_images`), the images
    /// of all other disks (`other_images`), which must be as the guest left them, and what was recorded
    /// (`working_set`).
    Describe {
        /// The folder: file:///PATH, or a path.
        #[arg(value_name = "URL")]
        snapshot: String,
    },
    /// Make VMs from the VM, and wait until they are there. They share the memory that they do not write.
    /// A running VM stops for its device state only.
    Fork {
        /// Number of VMs.
        #[arg(long, value_name = "N", default_value_t = 1,
            value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_FORKS)))]
        count: u32,
        /// Start of their names, NAME-1 and so on. [default: the VM's name]
        #[arg(long, value_name = "NAME")]
        name: Option<VmId>,
        /// Let their guests run. The VM itself stays as it is.
        #[arg(long)]
        resume: bool,
        /// JSON file of what differs from the VM: disks, taps, sockets, with n in braces for the number of the fork;
        /// - for standard input.
        #[arg(long, value_name = "FILE")]
        overrides: Option<String>,
        /// Treatment of the VM's disks. A running VM with a disk that it can write needs `overlay`.
        #[arg(long, value_enum, default_value_t = Disks::None)]
        disks: Disks,
    },
    /// Write a core dump of the paused VM into a file of its host, for `crash` and `gdb`, and wait until
    /// it is complete.
    Coredump {
        /// Destination, which must not exist: file:///a/file, or a path.
        destination_url: String,
    },
    /// Move the VM to another service, and wait until it has arrived. Ctrl-C cancels.
    Migrate(MigrateArguments),
    /// Wait for a VM that another service sends; --vm gives it another name.
    Receive(ReceiveArguments),
    /// List the migrations in progress and the last ones that have ended.
    Migrations,
    /// Show the state of a migration.
    Migration {
        /// Its name.
        id: VmId,
    },
    /// Cancel a migration; the guest stays at the source.
    CancelMigration {
        /// Its name.
        id: VmId,
    },
    /// Decide whether the guest of a migration in doubt runs at this side. Before choosing `run`,
    /// make sure that it runs nowhere else.
    ResolveMigration {
        /// Its name.
        id: VmId,
        /// The decision for the guest at this side.
        #[arg(value_enum)]
        outcome: Outcome,
    },
    /// Send the VM to another host: a URL, or destination_url=URL,downtime_ms=N,...
    SendMigration {
        /// The destination is another process on this host, and receives shared memory by
        /// descriptor.
        #[arg(long)]
        local: bool,
        /// Destination and options.
        #[arg(value_name = "URL|KEY=VALUE,...")]
        options: String,
    },
    /// Receive a VM from another host: a URL, or receiver_url=URL,...
    ReceiveMigration {
        /// Listening address and options.
        #[arg(value_name = "URL|KEY=VALUE,...")]
        options: String,
    },
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man pages.
    Man {
        /// Directory for the pages.
        directory: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct PortArguments {
    /// Which of the two; by default the serial port, or the console if only that can be used.
    #[arg(long, value_enum)]
    pub(crate) port: Option<PortName>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PortName {
    /// ttyS0 in a Linux guest.
    Serial,
    /// The virtio console, hvc0 in a Linux guest.
    Console,
}

#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("sizes").required(true).multiple(true).args(["cpus", "memory", "balloon"]))]
pub(crate) struct ResizeArguments {
    /// vCPUs, up to the VM's `max_vcpus`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: Option<u32>,
    /// Memory.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    /// Memory in the balloon.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) balloon: Option<u64>,
    /// Wait until the guest has given up what it was asked for, and fail if it does not.
    #[arg(long)]
    pub(crate) wait: bool,
}

pub(crate) fn size(text: &str) -> Result<u64, String> {
    spec::options::size(text)
        .ok_or_else(|| format!("`{text}` is not a size such as 4096, 512M or 2G"))
}

/// Reads a number of at least 1.
pub(crate) fn positive() -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(1..)
}

/// Reads a limit in bytes per second.
pub(crate) fn bandwidth(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err(format!("`{text}` is no limit: it must be at least 1")),
        limit => Ok(limit),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_valid() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_and_forms_of_ch_remote_are_read() {
        for line in [
            "--api-socket /s ping",
            "--api-socket=/s create -",
            "--api-socket /s resize --cpus 2 --memory 1G",
            "--api-socket /s resize --cpus 2 --wait",
            "--api-socket /s resize-disk --disk d --size 10G",
            "--api-socket /s add-disk path=/a,readonly=on",
            "--api-socket /s send-migration --local unix:/m",
            "--vm a mirror-disk data --to path=/new,format=qcow2",
            "create /f --api-socket /s",
            "--tcp 127.0.0.1:8080 --token-file /t ping",
            "ping --tcp [::1]:8080",
        ] {
            let words = std::iter::once("wh-remote").chain(line.split(' '));
            assert!(Arguments::try_parse_from(words).is_ok(), "{line}");
        }
        for (line, option) in [
            ("resize --cpus 0", "--cpus"),
            ("fork --count 0", "--count"),
            ("fork --count 99999", "--count"),
            ("snapshot /s --max-downtime-ms 0", "--max-downtime-ms"),
            ("snapshot /s --deadline-s 0", "--deadline-s"),
            ("snapshot /s --max-bandwidth 0", "--max-bandwidth"),
            ("migrate unix:/m --max-downtime-ms 0", "--max-downtime-ms"),
            ("migrate unix:/m --deadline-s 0", "--deadline-s"),
            ("migrate unix:/m --connections 0", "--connections"),
            ("migrate unix:/m --connections 17", "--connections"),
            ("migrate unix:/m --max-bandwidth 0", "--max-bandwidth"),
            ("migrate unix:/m --stop-limit-ms 0", "--stop-limit-ms"),
            ("migrate unix:/m --hold-ms 0", "--hold-ms"),
            ("cluster drain a --deadline-s 0", "--deadline-s"),
            ("cluster undrain a --deadline-s 0", "--deadline-s"),
            ("snapshot record /s --limit 0", "--limit"),
        ] {
            let words = std::iter::once("wh-remote").chain(line.split(' '));
            let refused = Arguments::try_parse_from(words).unwrap_err().to_string();
            assert!(refused.contains(option), "{line}: {refused}");
        }
        let both = ["wh-remote", "--api-socket", "/s", "--tcp", "[::1]:1", "ls"];
        assert!(Arguments::try_parse_from(both).is_err());
        assert!(Arguments::try_parse_from(["wh-remote", "resize"]).is_err());
        assert!(Arguments::try_parse_from(["wh-remote", "resize", "--wait"]).is_err());
        assert!(Arguments::try_parse_from(["wh-remote", "--vm", "a/b", "info"]).is_err());
    }
}
