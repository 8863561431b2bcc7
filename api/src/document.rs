//! The frame of the OpenAPI document: everything but its paths.

use spec::Problem;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Array, ArrayBuilder, ComponentsBuilder, InfoBuilder, LicenseBuilder, Object, ObjectBuilder,
    OpenApi, OpenApiBuilder, Paths, Ref, Tag,
};
use utoipa::{PartialSchema as _, ToSchema as _};

use crate::refusals;
use crate::tags::TAGS;

/// The name of the security scheme of TCP.
const TOKEN: &str = "ApiToken";

/// Returns the document without paths: title, tags, and the schemas that no operation leads to.
pub(crate) fn frame() -> OpenApi {
    let license = LicenseBuilder::new()
        .name("Apache-2.0 OR BSD-3-Clause")
        .identifier(Some("Apache-2.0 OR BSD-3-Clause"))
        .build();
    let info = InfoBuilder::new()
        .title("Whimbrel")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Virtual machines on KVM that move between hosts. A refused request gets a problem \
             body (RFC 9457) with a stable `code`. Every response has an `X-Request-Id`: the \
             client's own or a generated one.",
        ))
        .license(Some(license))
        .build();
    let tags = TAGS.iter().map(|(name, description)| {
        let mut tag = Tag::new(*name);
        tag.description = Some((*description).to_owned());
        tag
    });
    // What the document names and no handler's types lead to.
    let mut schemas = Vec::new();
    Problem::schemas(&mut schemas);
    let components = ComponentsBuilder::new()
        .schema("Problem", Problem::schema())
        .schema("Errors", errors())
        .schema("DeviceCounters", device_counters())
        .schema("VmCounters", vm_counters())
        .schemas_from_iter(schemas);
    let token = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some(
            "The content of the service's `--api-token-file`. Over TCP, a request without it is answered with \
             401 and the code `token-missing` or `token-wrong`. On a unix socket no token is asked for.",
        ))
        .build();
    let components = components.security_scheme(TOKEN, SecurityScheme::Http(token));
    // Either none, on a unix socket, or the token.
    let unix = SecurityRequirement::default();
    let tcp = SecurityRequirement::new::<_, [&str; 0], _>(TOKEN, []);
    OpenApiBuilder::new()
        .security(Some([unix, tcp]))
        .info(info)
        .paths(Paths::new())
        .components(Some(refusals::describe(components).build()))
        .tags(Some(tags))
        .build()
}

/// Describes the errors of Cloud Hypervisor's face.
fn errors() -> Array {
    ArrayBuilder::new()
        .items(String::schema())
        .description(Some(
            "The error and its causes, outermost first. A client that names `application/problem+json` in \
             `Accept` gets a problem body instead.",
        ))
        .build()
}

/// Describes the counters of one device. Generators make up a name for a map inside a map, so this
/// one has a name.
fn device_counters() -> Object {
    let counter = u64::schema();
    ObjectBuilder::new()
        .description(Some("Counters of a device, by name."))
        .additional_properties(Some(counter))
        .build()
}

fn vm_counters() -> Object {
    let device = Ref::from_schema_name("DeviceCounters");
    ObjectBuilder::new()
        .description(Some("Counters of a VM's devices, by the device's name."))
        .additional_properties(Some(device))
        .build()
}
