//! Operations of Cloud Hypervisor's contract for capabilities that this version does not have. They are in the
//! document with their bodies, and each is refused by name.

use spec::{
    DeviceConfig, FsConfig, GenericVhostUserConfig, PmemConfig, VdpaConfig, VmAddUserDevice,
};

use crate::one_vm::OneVm;
use crate::problem::ApiError;
use crate::refusals::Unsupported;
use crate::routes::{Routes, routes};
use crate::tags::ONE_VM;

/// Declares a handler in each row: its name, path, operation, body, and the end of "this version cannot ...".
macro_rules! not_yet {
    ($($name:ident $path:literal $operation:literal $body:ty, $what:literal;)*) => {
        $(
            #[utoipa::path(
                put, path = $path, operation_id = $operation, tag = ONE_VM, request_body = $body,
                summary = concat!("Not supported by this version: ", $what, "."),
                responses(Unsupported),
            )]
            async fn $name() -> ApiError {
                ApiError::not_implemented($what)
            }
        )*

        pub(crate) fn routes() -> Routes<OneVm> {
            Routes::default()$(.routes(routes!($name)))*
        }
    };
}

not_yet! {
    add_device "/api/v1/vm.add-device" "vmAddDevice" DeviceConfig, "give a VM a device of the host";
    add_fs "/api/v1/vm.add-fs" "vmAddFs" FsConfig, "give a VM a shared file system";
    add_generic_vhost_user "/api/v1/vm.add-generic-vhost-user" "vmAddGenericVhostUser" GenericVhostUserConfig,
        "give a VM a vhost-user device";
    add_pmem "/api/v1/vm.add-pmem" "vmAddPmem" PmemConfig, "give a VM persistent memory";
    add_vdpa "/api/v1/vm.add-vdpa" "vmAddVdpa" VdpaConfig, "give a VM a vDPA device";
    add_user_device "/api/v1/vm.add-user-device" "vmAddUserDevice" VmAddUserDevice,
        "give a VM a vfio-user device";
}
