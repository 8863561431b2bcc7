//! The commands that both faces have. A row of [`commands!`] declares a command once: its texts and
//! its request are shared, and each face adds its path, its operation id and its refusals.

use axum::extract::State;
use axum::response::Response;
use control::{NewDevice, Request};
use spec::{
    DiskConfig, MemoryMap, NetConfig, PciDeviceInfo, VmId, VmRemoveDevice, VmResize, VmResizeDisk,
    VmResizeZone, VsockConfig,
};

use crate::answer::reply;
use crate::extract::{Json, JsonAndTap, Named};
use crate::one_vm::OneVm;
use crate::problem::ApiError;
use crate::refusals::{
    BadBody, BadConfig, CommandRefused, DeviceRefused, Failed, NoSuchDevice, NoSuchDisk, NoSuchVm,
    NotAllowedNow, NotCreated, NotDone, NotPossible, Pending, Unsupported, WrongState,
};
use crate::routes::{Routes, routes};
use crate::service::Service;
use crate::tags::{ONE_VM, VMS};

/// Declares the handlers of both faces, and the routers that hold them.
///
/// The handlers must be functions of their own, as `#[utoipa::path]` describes one function at one
/// path. A command with a body names the extractor's pattern and the body's type.
macro_rules! commands {
    ($(
        $(#[$doc:meta])*
        $method:ident $(($body:pat, $extract:ty, $type:ty))? {
            $service:ident at $path:literal as $operation:literal, refuses [$($refusal:ident)*];
            $vm:ident at $vm_path:literal as $vm_operation:literal, refuses [$($vm_refusal:ident)*];
            $(answers $answers:tt;)+
            asks $request:expr;
        }
    )*) => {
        $(
            $(#[$doc])*
            #[utoipa::path(
                $method, path = $path, operation_id = $operation, tag = VMS,
                $(request_body = $type,)?
                params(("id" = VmId, Path, description = "The VM's name.")),
                responses($($answers,)+ $($refusal,)*),
            )]
            async fn $service(
                State(service): State<Service>,
                Named(id): Named,
                $($body: $extract,)?
            ) -> Result<Response, ApiError> {
                Ok(reply(service.ask(&id, $request).await?))
            }

            $(#[$doc])*
            #[utoipa::path(
                $method, path = $vm_path, operation_id = $vm_operation, tag = ONE_VM,
                $(request_body = $type,)?
                responses($($answers,)+ $($vm_refusal,)*),
            )]
            async fn $vm(
                State(vm): State<OneVm>,
                $($body: $extract,)?
            ) -> Result<Response, ApiError> {
                Ok(reply(vm.ask($request).await?))
            }
        )*

        /// The commands on the service's own face.
        pub(crate) fn service_routes() -> Routes<Service> {
            Routes::default()$(.routes(routes!($service)))*
        }

        /// The commands on Cloud Hypervisor's face.
        pub(crate) fn vm_routes() -> Routes<OneVm> {
            Routes::default()$(.routes(routes!($vm)))*
        }
    };
}

commands! {
    /// Boot the VM.
    put {
        boot at "/api/v1/vms/{id}/boot" as "bootVm",
            refuses [NoSuchVm WrongState BadConfig];
        boot_vm at "/api/v1/vm.boot" as "vmBoot",
            refuses [NotCreated WrongState BadConfig];
        answers (status = 204, description = "The guest is running.");
        asks Request::Boot;
    }

    /// Pause the guest: its vCPUs and devices stop until it is resumed.
    put {
        pause at "/api/v1/vms/{id}/pause" as "pauseVm", refuses [NoSuchVm WrongState Failed];
        pause_vm at "/api/v1/vm.pause" as "vmPause", refuses [NotCreated NotAllowedNow Failed];
        answers (status = 204, description = "The guest is paused.");
        asks Request::Pause;
    }

    /// Resume a paused guest.
    put {
        resume at "/api/v1/vms/{id}/resume" as "resumeVm", refuses [NoSuchVm WrongState Failed];
        resume_vm at "/api/v1/vm.resume" as "vmResume", refuses [NotCreated NotAllowedNow Failed];
        answers (status = 204, description = "The guest is running.");
        asks Request::Resume;
    }

    /// Reset the guest, as by a reset button.
    put {
        reboot at "/api/v1/vms/{id}/reboot" as "rebootVm", refuses [NoSuchVm WrongState Failed];
        reboot_vm at "/api/v1/vm.reboot" as "vmReboot", refuses [NotCreated NotAllowedNow Failed];
        answers (status = 204, description = "The guest was reset.");
        asks Request::Reboot;
    }

    /// End the guest at once, as by pulling the plug. The VM can be booted again.
    put {
        shut_down at "/api/v1/vms/{id}/shutdown" as "shutdownVm",
            refuses [NoSuchVm WrongState Failed];
        shut_down_vm at "/api/v1/vm.shutdown" as "vmShutdown",
            refuses [NotCreated NotAllowedNow Failed];
        answers (status = 204, description = "The guest has ended.");
        asks Request::Shutdown;
    }

    /// Press the power button. The guest decides what follows.
    put {
        power_button at "/api/v1/vms/{id}/power-button" as "pressPowerButton",
            refuses [NoSuchVm WrongState Failed];
        power_button_vm at "/api/v1/vm.power-button" as "vmPowerButton",
            refuses [NotCreated NotAllowedNow Failed];
        answers (status = 204, description = "The button was pressed.");
        asks Request::PowerButton;
    }

    /// Send a non-maskable interrupt to every vCPU.
    put {
        nmi at "/api/v1/vms/{id}/nmi" as "sendNmi", refuses [NoSuchVm WrongState Failed];
        nmi_vm at "/api/v1/vm.nmi" as "vmNmi", refuses [NotCreated WrongState Failed];
        answers (status = 204, description = "The interrupt was sent.");
        asks Request::Nmi;
    }

    /// Return the counters of the VM's devices.
    get {
        device_counters at "/api/v1/vms/{id}/counters" as "getCounters",
            refuses [NoSuchVm WrongState Failed];
        device_counters_vm at "/api/v1/vm.counters" as "vmCounters",
            refuses [NotCreated WrongState Failed];
        answers (
            status = 200, description = "Counters by device and name.",
            body = ref("#/components/schemas/VmCounters")
        );
        asks Request::Counters;
    }

    /// Return the VM's address spaces: the tree of memory regions, and the flat view of it.
    ///
    /// Not in Cloud Hypervisor's contract.
    get {
        address_spaces at "/api/v1/vms/{id}/memory-map" as "getMemoryMap",
            refuses [NoSuchVm WrongState Failed];
        address_spaces_vm at "/api/v1/vm.memory-map" as "vmMemoryMap",
            refuses [NotCreated WrongState Failed];
        answers (status = 200, description = "The address spaces: memory and port I/O.", body = MemoryMap);
        asks Request::MemoryMap;
    }

    /// Change the number of vCPUs, and the size of the VM's memory or balloon.
    ///
    /// vCPUs are plugged at once. To give some up, the guest must eject them, and memory it plugs and
    /// unplugs itself: until it has, `pending_resizes` in the VM's information shows how far it is. The
    /// event `resized` follows, or `resize-failed` if the guest refuses or takes longer than 60 s.
    put (Json(sizes), Json<VmResize>, VmResize) {
        resize at "/api/v1/vms/{id}/resize" as "resizeVm",
            refuses [CommandRefused Pending];
        resize_vm at "/api/v1/vm.resize" as "vmResize",
            refuses [NotCreated WrongState Pending BadBody BadConfig];
        answers (status = 204, description = "The guest was notified. It may not have completed the resize.");
        asks Request::Resize(sizes);
    }

    /// Change the size of a memory zone.
    ///
    /// The guest plugs and unplugs the memory itself: `pending_resizes` in the VM's information shows
    /// how far it is, and the event `resized` or `resize-failed` follows, as for `resize`.
    put (Json(zone), Json<VmResizeZone>, VmResizeZone) {
        resize_zone at "/api/v1/vms/{id}/resize-zone" as "resizeZone",
            refuses [CommandRefused Pending];
        resize_zone_vm at "/api/v1/vm.resize-zone" as "vmResizeZone",
            refuses [NotCreated WrongState Pending BadBody NotDone Unsupported];
        answers (status = 204, description = "The guest was notified. It may not have completed the resize.");
        asks Request::ResizeZone(zone);
    }

    /// Change the size of a disk.
    put (Json(disk), Json<VmResizeDisk>, VmResizeDisk) {
        resize_disk at "/api/v1/vms/{id}/resize-disk" as "resizeDisk",
            refuses [CommandRefused];
        resize_disk_vm at "/api/v1/vm.resize-disk" as "vmResizeDisk",
            refuses [NoSuchDisk WrongState NotDone BadBody];
        answers (status = 204, description = "The disk has its new size, and the guest was notified.");
        asks Request::ResizeDisk(disk);
    }

    /// Add a disk.
    put (Json(disk), Json<DiskConfig>, DiskConfig) {
        add_disk at "/api/v1/vms/{id}/add-disk" as "addDisk",
            refuses [CommandRefused];
        add_disk_vm at "/api/v1/vm.add-disk" as "vmAddDisk",
            refuses [DeviceRefused];
        answers (status = 200, description = "The running guest has the device.", body = PciDeviceInfo);
        answers (status = 204, description = "The device will be added at the next boot.");
        asks Request::AddDevice(NewDevice::Disk(Box::new(disk)));
    }

    /// Add a network interface.
    ///
    /// Over a unix socket the request may carry the descriptors of its tap's queues (`SCM_RIGHTS`),
    /// one for each queue pair.
    put (JsonAndTap(net), JsonAndTap, NetConfig) {
        add_net at "/api/v1/vms/{id}/add-net" as "addNet",
            refuses [CommandRefused];
        add_net_vm at "/api/v1/vm.add-net" as "vmAddNet",
            refuses [DeviceRefused];
        answers (status = 200, description = "The running guest has the device.", body = PciDeviceInfo);
        answers (status = 204, description = "The device will be added at the next boot.");
        asks Request::AddDevice(NewDevice::Net(Box::new(net)));
    }

    /// Add a vsock device.
    put (Json(vsock), Json<VsockConfig>, VsockConfig) {
        add_vsock at "/api/v1/vms/{id}/add-vsock" as "addVsock",
            refuses [CommandRefused];
        add_vsock_vm at "/api/v1/vm.add-vsock" as "vmAddVsock",
            refuses [DeviceRefused];
        answers (status = 200, description = "The running guest has the device.", body = PciDeviceInfo);
        answers (status = 204, description = "The device will be added at the next boot.");
        asks Request::AddDevice(NewDevice::Vsock(vsock));
    }

    /// Remove a device, which the guest must eject.
    ///
    /// The event `device-removed` follows when the guest has ejected the device; until then
    /// `device_tree` in the VM's information shows it as `Leaving`. The next boot is without the
    /// device, even if the guest does not eject it.
    put (Json(device), Json<VmRemoveDevice>, VmRemoveDevice) {
        remove_device at "/api/v1/vms/{id}/remove-device" as "removeDevice",
            refuses [CommandRefused];
        remove_device_vm at "/api/v1/vm.remove-device" as "vmRemoveDevice",
            refuses [NoSuchDevice WrongState NotPossible Failed BadBody];
        answers (status = 204, description = "The request was sent to the guest.");
        asks Request::RemoveDevice(device);
    }
}
