//! The OpenAPI document, and the routers that it is made with.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use hyper::ext::ReasonPhrase;
use spec::{Problem, VmCounters};
use tower::Layer as _;
use utoipa::openapi::{
    ComponentsBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Paths, Tag,
};
use utoipa::{PartialSchema as _, ToSchema as _};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::metrics::Requests;
use crate::middleware::envelope;
use crate::one_vm::OneVm;
use crate::problem::Refusal;
use crate::service::Service;
use crate::vmm::Vmm;
use crate::{docs, events, metrics, migrations, not_yet, one_vm, refusals, vmm, vms};

pub(crate) const SERVICE: &str = "Service";
pub(crate) const VMS: &str = "VMs";
pub(crate) const MIGRATIONS: &str = "Migrations";
pub(crate) const ONE_VM: &str = "One VM";

const TAGS: &[(&str, &str)] = &[
    (SERVICE, "The service itself."),
    (VMS, "Many VMs, by name: on the service's socket."),
    (
        MIGRATIONS,
        "Moving VMs between services while they run. One side waits, the other starts.",
    ),
    (
        ONE_VM,
        "Cloud Hypervisor's API, as its clients speak it: on a socket that serves one VM.",
    ),
];

/// The whole interface, both faces, as OpenAPI 3.1. A socket serves the part of it that it has, at
/// `/api/v1/openapi.json`.
#[must_use]
pub fn document() -> OpenApi {
    let mut whole = frame();
    whole.merge(vmm::routes().into_openapi());
    whole.merge(own().into_openapi());
    whole.merge(of_one_vm().into_openapi());
    whole.merge(published().into_openapi());
    whole
}

fn frame() -> OpenApi {
    let license = LicenseBuilder::new()
        .name("Apache-2.0 OR BSD-3-Clause")
        .identifier(Some("Apache-2.0 OR BSD-3-Clause"))
        .build();
    let info = InfoBuilder::new()
        .title("Whimbrel")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Virtual machines on KVM that move between hosts. Whatever is refused is explained by a problem body \
             (RFC 9457) with a stable `code`. Every answer carries an `X-Request-Id`, the client's own or a new one.",
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
        .schema("VmCounters", VmCounters::schema())
        .schemas_from_iter(schemas);
    OpenApiBuilder::new()
        .info(info)
        .paths(Paths::new())
        .components(Some(refusals::describe(components).build()))
        .tags(Some(tags))
        .build()
}

fn own() -> OpenApiRouter<Service> {
    vms::routes()
        .merge(migrations::routes())
        .merge(events::routes())
        .merge(metrics::routes())
}

fn of_one_vm() -> OpenApiRouter<OneVm> {
    one_vm::routes()
        .merge(migrations::one_vm_routes())
        .merge(not_yet::routes())
}

/// The service's own face.
pub(crate) fn service_face(service: Service, vmm: Vmm) -> OpenApiRouter {
    own()
        .with_state(service)
        .merge(vmm::routes().with_state(vmm))
}

/// Cloud Hypervisor's face.
pub(crate) fn vm_face(vm: OneVm, vmm: Vmm) -> OpenApiRouter {
    of_one_vm()
        .with_state(vm)
        .merge(vmm::routes().with_state(vmm))
}

/// A face, with what every face has: its document, a page to read it, and an answer to every other path.
pub(crate) fn assemble(face: OpenApiRouter, requests: Requests) -> Router {
    let (router, mut described) = face.split_for_parts();
    let mut whole = frame();
    described.merge(published().into_openapi());
    whole.merge(described);
    let paths: Arc<[String]> = whole.paths.paths.keys().cloned().collect();
    let json: Arc<str> = whole.to_json().unwrap_or_default().into();
    let (published, _) = published().with_state(Arc::clone(&json)).split_for_parts();
    let router = router
        .merge(published)
        .merge(docs::routes(&json))
        .fallback(move |request: Request| std::future::ready(no_such_path(&request, &paths)));
    // Around the router and not in its routes: it adds `Allow` after those are done.
    let service = from_fn_with_state(requests, envelope).layer(router);
    Router::new().fallback_service(map_response(without_reason).layer(service))
}

/// Widespread clients of Cloud Hypervisor's API read all that follows the protocol in a status line as a number:
/// "200" is one to them and "200 OK" is not. HTTP allows the reason to be empty (RFC 9112, section 4).
async fn without_reason(mut response: Response) -> Response {
    response
        .extensions_mut()
        .insert(const { ReasonPhrase::from_static(b"") });
    response
}

fn published() -> OpenApiRouter<Arc<str>> {
    OpenApiRouter::default().routes(routes!(openapi))
}

/// Describe what this socket serves.
#[utoipa::path(
    get, path = "/api/v1/openapi.json", operation_id = "openapi", tag = SERVICE,
    responses((status = 200, description = "An OpenAPI 3.1 document.", body = serde_json::Value)),
)]
async fn openapi(State(json): State<Arc<str>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], json.to_string())
}

fn no_such_path(request: &Request, paths: &[String]) -> Refusal {
    let path: String = request.uri().path().chars().take(128).collect();
    let hint = match spec::nearest(&path, paths.iter().map(String::as_str)) {
        Some(near) => format!("; did you mean {near}?"),
        None => "; GET /api/v1/openapi.json describes what there is".to_owned(),
    };
    Refusal::new(
        StatusCode::NOT_FOUND,
        "no-such-path",
        format!("there is nothing at {path}{hint}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::routing::get;
    use tower::ServiceExt as _;

    async fn panics() -> StatusCode {
        panic!("on purpose")
    }

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let face = OpenApiRouter::default().route("/panics", get(panics));
        let router = assemble(face, Requests::default());
        for _ in 0..2 {
            let request = Request::get("/panics").body(Body::empty()).unwrap();
            let response = router.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
            assert!(response.headers().contains_key("x-request-id"));
        }
    }
}
