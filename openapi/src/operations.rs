//! The operations of the document, each a method of [`Client`].

use spec::{
    AwaitMigration, CreateVm, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig,
    MemoryMap, MigrationInfo, NetConfig, PciDeviceInfo, PmemConfig, ReceiveMigrationData,
    ResolveMigration, RestoreConfig, SendMigrationData, StartMigration, VdpaConfig,
    VmAddUserDevice, VmConfig, VmCoredumpData, VmCounters, VmId, VmInfo, VmRemoveDevice, VmResize,
    VmResizeDisk, VmResizeZone, VmSnapshotConfig, VmSummary, VmmPingResponse, VsockConfig,
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
    /// Its path, with `{id}` for a VM's name.
    pub path: &'static str,
    /// The method of [`Client`] that calls it.
    pub client_method: &'static str,
}

impl Operation {
    pub(crate) fn accept(&self) -> &'static str {
        match self.id {
            "events" => "text/event-stream",
            "metrics" => "text/plain",
            _ => "application/json",
        }
    }
}

pub(crate) const EVENTS: Operation = Operation {
    id: "events",
    method: "GET",
    path: "/api/v1/events",
    client_method: "events",
};

const METRICS: Operation = Operation {
    id: "metrics",
    method: "GET",
    path: "/api/v1/metrics",
    client_method: "metrics",
};

/// One line an operation: the client's method, with the VM's name in parentheses and the body in brackets where
/// there are such; method, path and name of the operation; what comes back.
macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        $name:ident $(($id:ident))? $([$body:ty])? : $method:ident $path:literal $operation:literal $(-> $reply:ty)?;
    )*) => {
        impl Client {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// When there is no service, it refuses, or its answer is not understood.
                pub async fn $name(
                    &self,
                    $($id: &VmId,)?
                    $(body: &$body,)?
                ) -> Result<operations!(@reply $($reply)?), ClientError> {
                    const OPERATION: Operation = Operation {
                        id: $operation,
                        method: stringify!($method),
                        path: $path,
                        client_method: stringify!($name),
                    };
                    let target = OPERATION.path.to_owned();
                    // A VM's name is made of characters that a path may hold.
                    $(let target = target.replace("{id}", $id.as_str());)?
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
    ping: GET "/api/v1/vmm.ping" "pingVMM" -> VmmPingResponse;
    /// Ends what the socket serves: the service with all its VMs, or one VM.
    shut_service_down: PUT "/api/v1/vmm.shutdown" "shutdownVMM";
    /// Describes what the socket serves, as OpenAPI.
    openapi: GET "/api/v1/openapi.json" "openapi" -> serde_json::Value;

    /// Lists the VMs.
    vms_list: GET "/api/v1/vms" "vmsList" -> Vec<VmSummary>;
    /// Creates a VM, without booting it.
    vms_create[CreateVm]: POST "/api/v1/vms" "vmsCreate" -> VmSummary;
    /// Sees to it that there is a VM of this name with this configuration.
    vms_ensure(id)[VmConfig]: PUT "/api/v1/vms/{id}" "vmsEnsure" -> VmSummary;
    /// Asks for a VM's configuration and state.
    vms_info(id): GET "/api/v1/vms/{id}" "vmsInfo" -> VmInfo;
    /// Ends a VM and has it forgotten.
    vms_delete(id): DELETE "/api/v1/vms/{id}" "vmsDelete";
    /// Boots a VM.
    vms_boot(id): PUT "/api/v1/vms/{id}/boot" "vmsBoot";
    /// Lets a guest stand still.
    vms_pause(id): PUT "/api/v1/vms/{id}/pause" "vmsPause";
    /// Lets a paused guest go on.
    vms_resume(id): PUT "/api/v1/vms/{id}/resume" "vmsResume";
    /// Resets a guest.
    vms_reboot(id): PUT "/api/v1/vms/{id}/reboot" "vmsReboot";
    /// Ends a guest at once; its VM can be booted again.
    vms_shutdown(id): PUT "/api/v1/vms/{id}/shutdown" "vmsShutdown";
    /// Presses the power button.
    vms_power_button(id): PUT "/api/v1/vms/{id}/power-button" "vmsPowerButton";
    /// Sends a non-maskable interrupt to every vCPU.
    vms_nmi(id): PUT "/api/v1/vms/{id}/nmi" "vmsNmi";
    /// Asks for the counters of a VM's devices.
    vms_counters(id): GET "/api/v1/vms/{id}/counters" "vmsCounters" -> VmCounters;
    /// Asks for a VM's address spaces.
    vms_memory_map(id): GET "/api/v1/vms/{id}/memory-map" "vmsMemoryMap" -> MemoryMap;
    /// Asks a guest for memory through its balloon, or gives it back.
    vms_resize(id)[VmResize]: PUT "/api/v1/vms/{id}/resize" "vmsResize";
    /// Gives a disk another size.
    vms_resize_disk(id)[VmResizeDisk]: PUT "/api/v1/vms/{id}/resize-disk" "vmsResizeDisk";
    /// Gives a VM a disk.
    vms_add_disk(id)[DiskConfig]: PUT "/api/v1/vms/{id}/add-disk" "vmsAddDisk" -> Option<PciDeviceInfo>;
    /// Gives a VM a network interface.
    vms_add_net(id)[NetConfig]: PUT "/api/v1/vms/{id}/add-net" "vmsAddNet" -> Option<PciDeviceInfo>;
    /// Gives a VM a socket between guest and host.
    vms_add_vsock(id)[VsockConfig]: PUT "/api/v1/vms/{id}/add-vsock" "vmsAddVsock" -> Option<PciDeviceInfo>;
    /// Asks a guest to let go of a device.
    vms_remove_device(id)[VmRemoveDevice]: PUT "/api/v1/vms/{id}/remove-device" "vmsRemoveDevice";
    /// Begins to move a VM to another service, which waits for it.
    vms_migrate(id)[StartMigration]: POST "/api/v1/vms/{id}/migrations" "vmsMigrate" -> MigrationInfo;
    /// Begins to wait for a VM from another service.
    migrations_receive[AwaitMigration]: POST "/api/v1/migrations" "migrationsReceive" -> MigrationInfo;
    /// Lists migrations: those that go on, and the last that are over.
    migrations_list: GET "/api/v1/migrations" "migrationsList" -> Vec<MigrationInfo>;
    /// Tells how a migration is going.
    migrations_info(id): GET "/api/v1/migrations/{id}" "migrationsInfo" -> MigrationInfo;
    /// Calls a migration off.
    migrations_cancel(id): DELETE "/api/v1/migrations/{id}" "migrationsCancel";
    /// Decides what becomes of the guest of a migration that is in doubt.
    migrations_resolve(id)[ResolveMigration]: POST "/api/v1/migrations/{id}/resolve" "migrationsResolve";

    /// Creates the socket's VM, without booting it.
    vm_create[VmConfig]: PUT "/api/v1/vm.create" "createVM";
    /// Ends the socket's VM and has it forgotten.
    vm_delete: PUT "/api/v1/vm.delete" "deleteVM";
    /// Boots the socket's VM.
    vm_boot: PUT "/api/v1/vm.boot" "bootVM";
    /// Lets the guest stand still.
    vm_pause: PUT "/api/v1/vm.pause" "pauseVM";
    /// Lets the paused guest go on.
    vm_resume: PUT "/api/v1/vm.resume" "resumeVM";
    /// Resets the guest.
    vm_reboot: PUT "/api/v1/vm.reboot" "rebootVM";
    /// Ends the guest at once; its VM can be booted again.
    vm_shutdown: PUT "/api/v1/vm.shutdown" "shutdownVM";
    /// Presses the power button.
    vm_power_button: PUT "/api/v1/vm.power-button" "power-buttonVM";
    /// Sends a non-maskable interrupt to every vCPU.
    vm_nmi: PUT "/api/v1/vm.nmi" "nmiVM";
    /// Asks for the VM's configuration and state.
    vm_info: GET "/api/v1/vm.info" "infoVM" -> VmInfo;
    /// Asks for the counters of the VM's devices.
    vm_counters: GET "/api/v1/vm.counters" "countersVM" -> VmCounters;
    /// Asks for the VM's address spaces.
    vm_memory_map: GET "/api/v1/vm.memory-map" "memoryMapVM" -> MemoryMap;

    /// Resizes the VM.
    vm_resize[VmResize]: PUT "/api/v1/vm.resize" "resizeVM";
    /// Resizes a disk.
    vm_resize_disk[VmResizeDisk]: PUT "/api/v1/vm.resize-disk" "resizeDiskVM";
    /// Resizes a memory zone. (Refused by services of this version.)
    vm_resize_zone[VmResizeZone]: PUT "/api/v1/vm.resize-zone" "resizeZoneVM";
    /// Adds a device of the host. (Refused by services of this version.)
    vm_add_device[DeviceConfig]: PUT "/api/v1/vm.add-device" "addDeviceVM" -> Option<PciDeviceInfo>;
    /// Removes a device.
    vm_remove_device[VmRemoveDevice]: PUT "/api/v1/vm.remove-device" "removeDeviceVM";
    /// Adds a disk.
    vm_add_disk[DiskConfig]: PUT "/api/v1/vm.add-disk" "addDiskVM" -> Option<PciDeviceInfo>;
    /// Adds a shared file system. (Refused by services of this version.)
    vm_add_fs[FsConfig]: PUT "/api/v1/vm.add-fs" "addFsVM" -> Option<PciDeviceInfo>;
    /// Adds a vhost-user device. (Refused by services of this version.)
    vm_add_generic_vhost_user[GenericVhostUserConfig]:
        PUT "/api/v1/vm.add-generic-vhost-user" "addGenericVhostUserVM" -> Option<PciDeviceInfo>;
    /// Adds persistent memory. (Refused by services of this version.)
    vm_add_pmem[PmemConfig]: PUT "/api/v1/vm.add-pmem" "addPmemVM" -> Option<PciDeviceInfo>;
    /// Adds a network interface.
    vm_add_net[NetConfig]: PUT "/api/v1/vm.add-net" "addNetVM" -> Option<PciDeviceInfo>;
    /// Adds a vsock device.
    vm_add_vsock[VsockConfig]: PUT "/api/v1/vm.add-vsock" "addVsockVM" -> Option<PciDeviceInfo>;
    /// Adds a vDPA device. (Refused by services of this version.)
    vm_add_vdpa[VdpaConfig]: PUT "/api/v1/vm.add-vdpa" "addVdpaVM" -> Option<PciDeviceInfo>;
    /// Adds a vfio-user device. (Refused by services of this version.)
    vm_add_user_device[VmAddUserDevice]:
        PUT "/api/v1/vm.add-user-device" "addUserDeviceVM" -> Option<PciDeviceInfo>;
    /// Takes a snapshot. (Refused by services of this version.)
    vm_snapshot[VmSnapshotConfig]: PUT "/api/v1/vm.snapshot" "snapshotVM";
    /// Takes a core dump. (Refused by services of this version.)
    vm_coredump[VmCoredumpData]: PUT "/api/v1/vm.coredump" "coredumpVM";
    /// Restores a snapshot. (Refused by services of this version.)
    vm_restore[RestoreConfig]: PUT "/api/v1/vm.restore" "restoreVM";
    /// Receives a VM from another host. The answer comes when it has arrived: give the client time.
    vm_receive_migration[ReceiveMigrationData]: PUT "/api/v1/vm.receive-migration" "receiveMigrationVM";
    /// Sends the VM to another host. The answer comes when it has moved: give the client time.
    vm_send_migration[SendMigrationData]: PUT "/api/v1/vm.send-migration" "sendMigrationVM";
}

impl Client {
    /// Asks for the service's numbers, in Prometheus' text format.
    ///
    /// # Errors
    /// When there is no service, or it refuses.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let (_, body) = self
            .exchange(&METRICS, METRICS.path.to_owned(), None)
            .await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}
