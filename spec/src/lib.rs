//! Configuration and wire types of the service, and their validation. No behaviour.
//!
//! Types that Cloud Hypervisor's API has too are the same on the wire: names, defaults, required
//! fields. [`parse()`] reads a body and explains what is wrong with one; [`VmConfig::validate`]
//! says everything that is wrong with a configuration at once, by field.
//!
//! ```
//! let config: spec::VmConfig = spec::parse(br#"{"payload": {"kernel": "/boot/vmlinux"}}"#)?;
//! let host = spec::HostLimits { max_vcpus: 16, max_memory: 1 << 36, host_cpus: 4 };
//! assert_eq!(config.validate(&host), Ok(()));
//! assert_eq!(config.memory.size, 512 << 20);
//! # Ok::<(), spec::ParseError>(())
//! ```

#![forbid(unsafe_code)]

mod compat;
mod console;
mod cpus;
mod defaults;
mod descriptors;
mod device;
mod devices;
mod disk;
mod host;
pub mod limits;
mod memory;
mod migration;
mod names;
mod numa;
mod objects;
pub mod options;
mod overlays;
mod overrides;
mod parse;
mod paths;
mod platform;
mod progress;
mod rate_limit;
mod refused;
mod requests;
mod service;
mod slots;
mod timeline;
mod token;
mod validate;
mod vm;
mod wording;
mod zones;

pub use compat::{FOREIGN_FIELDS, ForeignField, parse_compatible, parse_response};
pub use console::{ConsoleConfig, ConsoleEnd, ConsoleMode, DebugConsoleConfig, SerialConfig};
pub use cpus::{CoreSchedulingMode, CpuAffinity, CpuFeatures, CpuProfile, CpuTopology, CpusConfig};
pub use descriptors::{Descriptors, RestoredNetConfig};
pub use device::{
    BalloonConfig, DeviceConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig,
    RngConfig, RtcConfig, TpmConfig, UserDeviceConfig, VdpaConfig, VsockConfig,
};
pub use devices::{HostIp, parse_mac};
pub use disk::{
    DiskConfig, ImageType, LockGranularity, MigratedBase, MirrorDisk, NewImageFormat, OnError,
    VirtQueueAffinity,
};
pub use host::{CpuCheck, CpuDescription, CpuidLeaf, HostCpu, ProfileFit};
pub use memory::{HotplugMethod, MemoryConfig, MemoryZoneConfig};
pub use migration::{
    AtDeadline, AwaitMigration, DiskStorage, MemoryMode, MigrationDowntime, MigrationError,
    MigrationInfo, MigrationOutcome, MigrationPhase, MigrationRound, MigrationSide,
    ResolveMigration, StartMigration, StorageMode,
};
pub use names::{MEMORY_DEVICE, PVPANIC, WATCHDOG, check_device_name, free_name};
pub use overlays::{FindOverlays, OverlayInfo, OverlayState};
pub use overrides::{
    DiskOverride, ForkVm, MAX_FORKS, NetOverride, Overrides, VsockOverride, fork_names,
};
pub use parse::{ParseError, nearest, parse};
pub use paths::{NamedPath, PathUse};
pub use platform::{
    LandlockConfig, NumaConfig, NumaDistance, PayloadConfig, PciSegmentConfig, PlatformConfig,
};
pub use progress::{
    FailedMigration, LocalTransport, MemoryTransmissionInfo, MigrationOver, MigrationProgress,
    MigrationState, MigrationTransport, OngoingMigration, OngoingPhase, TcpConnections,
    TcpTransport,
};
pub use rate_limit::{RateLimitGroupConfig, RateLimiterConfig, TokenBucket};
pub use refused::{REFUSED_FIELDS, RefusedField};
pub use requests::{
    MemoryRestoreMode, MergeSnapshots, MigrationMode, ReceiveMigrationData, RecordWorkingSet,
    RestoreConfig, SendMigrationData, SnapshotDisks, TimeoutStrategy, VmAddUserDevice,
    VmCoredumpData, VmMemoryZoneUpdateData, VmRemoveDevice, VmResize, VmResizeDisk, VmResizeZone,
    VmSnapshotConfig,
};
pub use service::{
    CreateVm, Event, FieldProblem, InvalidVmId, MapAlias, MapNode, MapRange, MapSpace, MemoryMap,
    Problem, VmId, VmSummary,
};
pub use slots::WantedPlace;
pub use timeline::{MigrationActivity, MigrationStep};
pub use token::{ApiToken, InvalidApiToken};
pub use validate::{HostLimits, UNSUPPORTED};
pub use vm::{
    BootTimeline, DeviceNode, DeviceState, DeviceTree, Failure, PciDeviceInfo, PendingResize,
    ResizeResource, VmConfig, VmCounters, VmInfo, VmState, VmmPingResponse,
};
pub use zones::{MemoryZone, WHOLE_MEMORY};
