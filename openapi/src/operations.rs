//! The operations of the document, each a method of [`Client`].

use spec::{
    AwaitMigration, CpuCheck, CpuDescription, CreateVm, DeviceConfig, DiskConfig, FindOverlays,
    ForkVm, FsConfig, GenericVhostUserConfig, HostCpu, MemoryMap, MergeSnapshots, MigrationInfo,
    MigrationProgress, MirrorDisk, NetConfig, OverlayInfo, PciDeviceInfo, PmemConfig,
    ReceiveMigrationData, RecordWorkingSet, ResolveMigration, RestoreConfig, SendMigrationData,
    StartMigration, VdpaConfig, VmAddUserDevice, VmConfig, VmCoredumpData, VmCounters, VmId,
    VmInfo, VmRemoveDevice, VmResize, VmResizeDisk, VmResizeZone, VmSnapshotConfig, VmSummary,
    VmmPingResponse, VsockConfig,
};

use crate::client::Client;
use crate::error::ClientError;

/// An operation of the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its `operationId`.
    pub id: &'static str,
    /// Its method.
    pub method: &'static str,
    /// Its path, with `{id}` for a VM's name and `{disk}` for a disk's id.
    pub path: &'static str,
    /// The method of [`Client`] that calls it.
    pub client_method: &'static str,
}

impl Operation {
    pub(crate) fn accept(&self) -> &'static str {
        match self.id {
            "followEvents" => "text/event-stream",
            "getMetrics" => "text/plain",
            // On a socket that serves one VM, only a client that names problems gets them.
            _ => "application/json, application/problem+json",
        }
    }
}

pub(crate) const EVENTS: Operation = Operation {
    id: "followEvents",
    method: "GET",
    path: "/api/v1/events",
    client_method: "events",
};

const METRICS: Operation = Operation {
    id: "getMetrics",
    method: "GET",
    path: "/api/v1/metrics",
    client_method: "metrics",
};

/// One line an operation: the client's method, with the names of VM and disk in parentheses and the body in
/// brackets where there are such; method, path and name of the operation; what comes back.
macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        $name:ident $(($id:ident $(, $disk:ident)?))? $([$body:ty])? : $method:ident $path:literal $operation:literal $(-> $reply:ty)?;
    )*) => {
        impl Client {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// Fails if there is no service, it refuses, or its answer is not understood.
                pub async fn $name(
                    &self,
                    $($id: &VmId, $($disk: &str,)?)?
                    $(body: &$body,)?
                ) -> Result<operations!(@reply $($reply)?), ClientError> {
                    const OPERATION: Operation = Operation {
                        id: $operation,
                        method: stringify!($method),
                        path: $path,
                        client_method: stringify!($name),
                    };
                    let target = OPERATION.path.to_owned();
                    // The names of VMs and disks are made of characters that a path may hold.
                    $(
                        let target = target.replace("{id}", $id.as_str());
                        $(let target = target.replace("{disk}", $disk);)?
                    )?
                    let json = None;
                    $(let json = json.or(Some(serde_json::to_vec::<$body>(body)));)?
                    self.call(&OPERATION, target, json).await
                }
            )*
        }

        /// Every operation that the client knows.
        pub const OPERATIONS: &[Operation] = &[
            EVENTS,
            METRICS,
            $(Operation {
                id: $operation,
                method: stringify!($method),
                path: $path,
                client_method: stringify!($name),
            },)*
        ];
    };
    (@reply) => { () };
    (@reply $reply:ty) => { $reply };
}

operations! {
    /// Asks whether the service is there, and which it is.
    ping: GET "/api/v1/vmm.ping" "ping" -> VmmPingResponse;
    /// Ends what the socket serves: the service with all its VMs, or one VM.
    shut_service_down: PUT "/api/v1/vmm.shutdown" "shutdownService";
    /// Describes what the socket serves, as OpenAPI.
    openapi: GET "/api/v1/openapi.json" "getDocument" -> serde_json::Value;

    /// Lists the VMs.
    vms_list: GET "/api/v1/vms" "listVms" -> Vec<VmSummary>;
    /// Creates a VM, without booting it.
    vms_create[CreateVm]: POST "/api/v1/vms" "createVm" -> VmSummary;
    /// Sees to it that there is a VM of this name with this configuration.
    vms_ensure(id)[VmConfig]: PUT "/api/v1/vms/{id}" "ensureVm" -> VmSummary;
    /// Asks for a VM's configuration and state.
    vms_info(id): GET "/api/v1/vms/{id}" "getVm" -> VmInfo;
    /// Ends a VM and has it forgotten.
    vms_delete(id): DELETE "/api/v1/vms/{id}" "deleteVm";
    /// Boots a VM.
    vms_boot(id): PUT "/api/v1/vms/{id}/boot" "bootVm";
    /// Pauses a guest.
    vms_pause(id): PUT "/api/v1/vms/{id}/pause" "pauseVm";
    /// Resumes a paused guest.
    vms_resume(id): PUT "/api/v1/vms/{id}/resume" "resumeVm";
    /// Resets a guest.
    vms_reboot(id): PUT "/api/v1/vms/{id}/reboot" "rebootVm";
    /// Ends a guest at once; its VM can be booted again.
    vms_shutdown(id): PUT "/api/v1/vms/{id}/shutdown" "shutdownVm";
    /// Presses the power button.
    vms_power_button(id): PUT "/api/v1/vms/{id}/power-button" "pressPowerButton";
    /// Sends a non-maskable interrupt to every vCPU.
    vms_nmi(id): PUT "/api/v1/vms/{id}/nmi" "sendNmi";
    /// Asks for the counters of a VM's devices.
    vms_counters(id): GET "/api/v1/vms/{id}/counters" "getCounters" -> VmCounters;
    /// Asks for a VM's address spaces.
    vms_memory_map(id): GET "/api/v1/vms/{id}/memory-map" "getMemoryMap" -> MemoryMap;
    /// Asks what a guest sees of its CPUs.
    vms_cpu(id): GET "/api/v1/vms/{id}/cpu" "getVmCpu" -> CpuDescription;
    /// Asks for the CPU of the service's host.
    host_cpu: GET "/api/v1/host/cpu" "getHostCpu" -> HostCpu;
    /// Asks whether a guest with these CPUs could run on the service's host.
    check_cpu[CpuDescription]: POST "/api/v1/host/cpu/check" "checkCpu" -> CpuCheck;
    /// Asks a guest for memory through its balloon, or gives it back.
    vms_resize(id)[VmResize]: PUT "/api/v1/vms/{id}/resize" "resizeVm";
    /// Gives a memory zone another size.
    vms_resize_zone(id)[VmResizeZone]: PUT "/api/v1/vms/{id}/resize-zone" "resizeZone";
    /// Gives a disk another size.
    vms_resize_disk(id)[VmResizeDisk]: PUT "/api/v1/vms/{id}/resize-disk" "resizeDisk";
    /// Gives a VM a disk.
    vms_add_disk(id)[DiskConfig]: PUT "/api/v1/vms/{id}/add-disk" "addDisk" -> Option<PciDeviceInfo>;
    /// Gives a VM a network interface.
    vms_add_net(id)[NetConfig]: PUT "/api/v1/vms/{id}/add-net" "addNet" -> Option<PciDeviceInfo>;
    /// Gives a VM a socket between guest and host.
    vms_add_vsock(id)[VsockConfig]: PUT "/api/v1/vms/{id}/add-vsock" "addVsock" -> Option<PciDeviceInfo>;
    /// Asks a guest to let go of a device.
    vms_remove_device(id)[VmRemoveDevice]: PUT "/api/v1/vms/{id}/remove-device" "removeDevice";
    /// Begins to move a VM to another service, which waits for it.
    vms_migrate(id)[StartMigration]: POST "/api/v1/vms/{id}/migrations" "migrateVm" -> MigrationInfo;
    /// Starts to write a snapshot of a VM, which may run.
    vms_snapshot(id)[VmSnapshotConfig]: POST "/api/v1/vms/{id}/snapshots" "snapshotVm" -> MigrationInfo;
    /// Starts to write a snapshot that needs no base from a chain of increments.
    snapshots_merge[MergeSnapshots]: POST "/api/v1/snapshots/merge" "mergeSnapshots" -> MigrationInfo;
    /// Lists the overlays beside an image, and removes those that nothing uses if that is asked for.
    overlays[FindOverlays]: POST "/api/v1/overlays" "findOverlays" -> Vec<OverlayInfo>;
    /// Starts to write a core dump of a paused VM.
    vms_core_dump(id)[VmCoredumpData]: POST "/api/v1/vms/{id}/core-dumps" "dumpVm" -> MigrationInfo;
    /// Starts to copy a disk of a VM into a new image, on which the disk then continues.
    vms_mirror_disk(id, disk)[MirrorDisk]: POST "/api/v1/vms/{id}/disks/{disk}/mirror" "mirrorDisk" -> MigrationInfo;
    /// Starts to make a VM of this name from a snapshot.
    vms_restore(id)[RestoreConfig]: POST "/api/v1/vms/{id}/restore" "restoreVm" -> MigrationInfo;
    /// Starts to make a VM of this name from a snapshot, and to record the working set of its guest.
    vms_record(id)[RecordWorkingSet]: POST "/api/v1/vms/{id}/recording" "recordWorkingSet" -> MigrationInfo;
    /// Ends the recording of a VM's working set, which is written then.
    vms_stop_recording(id): PUT "/api/v1/vms/{id}/recording/stop" "stopRecording";
    /// Starts to make VMs from a paused VM.
    vms_fork(id)[ForkVm]: POST "/api/v1/vms/{id}/forks" "forkVm" -> MigrationInfo;
    /// Begins to wait for a VM from another service.
    migrations_receive[AwaitMigration]: POST "/api/v1/migrations" "receiveMigration" -> MigrationInfo;
    /// Lists migrations: those in progress, and the last ones that ended.
    migrations_list: GET "/api/v1/migrations" "listMigrations" -> Vec<MigrationInfo>;
    /// Tells how a migration is going.
    migrations_info(id): GET "/api/v1/migrations/{id}" "getMigration" -> MigrationInfo;
    /// Calls a migration off.
    migrations_cancel(id): DELETE "/api/v1/migrations/{id}" "cancelMigration";
    /// Decides what becomes of the guest of a migration that is in doubt.
    migrations_resolve(id)[ResolveMigration]: POST "/api/v1/migrations/{id}/resolve" "resolveMigration";

    /// Creates the socket's VM, without booting it.
    vm_create[VmConfig]: PUT "/api/v1/vm.create" "vmCreate";
    /// Ends the socket's VM and has it forgotten.
    vm_delete: PUT "/api/v1/vm.delete" "vmDelete";
    /// Boots the socket's VM.
    vm_boot: PUT "/api/v1/vm.boot" "vmBoot";
    /// Lets the guest stand still.
    vm_pause: PUT "/api/v1/vm.pause" "vmPause";
    /// Resumes the paused guest.
    vm_resume: PUT "/api/v1/vm.resume" "vmResume";
    /// Resets the guest.
    vm_reboot: PUT "/api/v1/vm.reboot" "vmReboot";
    /// Ends the guest at once; its VM can be booted again.
    vm_shutdown: PUT "/api/v1/vm.shutdown" "vmShutdown";
    /// Presses the power button.
    vm_power_button: PUT "/api/v1/vm.power-button" "vmPowerButton";
    /// Sends a non-maskable interrupt to every vCPU.
    vm_nmi: PUT "/api/v1/vm.nmi" "vmNmi";
    /// Asks for the VM's configuration and state.
    vm_info: GET "/api/v1/vm.info" "vmInfo" -> VmInfo;
    /// Asks for the counters of the VM's devices.
    vm_counters: GET "/api/v1/vm.counters" "vmCounters" -> VmCounters;
    /// Asks for the VM's address spaces.
    vm_memory_map: GET "/api/v1/vm.memory-map" "vmMemoryMap" -> MemoryMap;

    /// Resizes the VM.
    vm_resize[VmResize]: PUT "/api/v1/vm.resize" "vmResize";
    /// Resizes a disk.
    vm_resize_disk[VmResizeDisk]: PUT "/api/v1/vm.resize-disk" "vmResizeDisk";
    /// Resizes a memory zone.
    vm_resize_zone[VmResizeZone]: PUT "/api/v1/vm.resize-zone" "vmResizeZone";
    /// Adds a device of the host. (Refused by services of this version.)
    vm_add_device[DeviceConfig]: PUT "/api/v1/vm.add-device" "vmAddDevice" -> Option<PciDeviceInfo>;
    /// Removes a device.
    vm_remove_device[VmRemoveDevice]: PUT "/api/v1/vm.remove-device" "vmRemoveDevice";
    /// Adds a disk.
    vm_add_disk[DiskConfig]: PUT "/api/v1/vm.add-disk" "vmAddDisk" -> Option<PciDeviceInfo>;
    /// Adds a shared file system. (Refused by services of this version.)
    vm_add_fs[FsConfig]: PUT "/api/v1/vm.add-fs" "vmAddFs" -> Option<PciDeviceInfo>;
    /// Adds a vhost-user device. (Refused by services of this version.)
    vm_add_generic_vhost_user[GenericVhostUserConfig]:
        PUT "/api/v1/vm.add-generic-vhost-user" "vmAddGenericVhostUser" -> Option<PciDeviceInfo>;
    /// Adds persistent memory. (Refused by services of this version.)
    vm_add_pmem[PmemConfig]: PUT "/api/v1/vm.add-pmem" "vmAddPmem" -> Option<PciDeviceInfo>;
    /// Adds a network interface.
    vm_add_net[NetConfig]: PUT "/api/v1/vm.add-net" "vmAddNet" -> Option<PciDeviceInfo>;
    /// Adds a vsock device.
    vm_add_vsock[VsockConfig]: PUT "/api/v1/vm.add-vsock" "vmAddVsock" -> Option<PciDeviceInfo>;
    /// Adds a vDPA device. (Refused by services of this version.)
    vm_add_vdpa[VdpaConfig]: PUT "/api/v1/vm.add-vdpa" "vmAddVdpa" -> Option<PciDeviceInfo>;
    /// Adds a vfio-user device. (Refused by services of this version.)
    vm_add_user_device[VmAddUserDevice]:
        PUT "/api/v1/vm.add-user-device" "vmAddUserDevice" -> Option<PciDeviceInfo>;
    /// Writes a snapshot of the paused VM. The answer comes when it is complete: give the client time.
    vm_snapshot[VmSnapshotConfig]: PUT "/api/v1/vm.snapshot" "vmSnapshot";
    /// Writes a core dump of the paused VM. The answer comes when it is complete: give the client time.
    vm_coredump[VmCoredumpData]: PUT "/api/v1/vm.coredump" "vmCoredump";
    /// Makes the VM from a snapshot. The answer comes when it is there: give the client time.
    vm_restore[RestoreConfig]: PUT "/api/v1/vm.restore" "vmRestore";
    /// Receives a VM from another host. The answer comes when it has arrived: give the client time.
    vm_receive_migration[ReceiveMigrationData]: PUT "/api/v1/vm.receive-migration" "vmReceiveMigration";
    /// Cancels the VM's migration.
    vm_cancel_migration: PUT "/api/v1/vm.cancel-migration" "vmCancelMigration";
    /// Asks how the VM's migration is going, or how the last one ended.
    vm_migration_progress: GET "/api/v1/vm.migration-progress" "vmMigrationProgress" -> MigrationProgress;
    /// Starts to send the VM to another host. The answer comes at once, or for a client that
    /// [waits](Client::waiting) when it has moved.
    vm_send_migration[SendMigrationData]: PUT "/api/v1/vm.send-migration" "vmSendMigration";
}

impl Client {
    /// Asks for the service's numbers, in Prometheus' text format.
    ///
    /// # Errors
    /// Fails if there is no service, or it refuses.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let (_, body) = self
            .exchange(&METRICS, METRICS.path.to_owned(), None)
            .await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}
