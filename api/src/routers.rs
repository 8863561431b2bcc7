//! The routers of both faces, and the document that describes them.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use hyper::ext::ReasonPhrase;
use spec::VmId;
use tower::Layer as _;
use utoipa::openapi::OpenApi;

use crate::document::frame;
use crate::errors::Face;
use crate::middleware::envelope;
use crate::one_vm::OneVm;
use crate::problem::ApiError;
use crate::request_counts::Requests;
use crate::routes::{Described, Routes, routes};
use crate::serve::Shutdown;
use crate::service::Service;
use crate::sockets::VmSockets;
use crate::tags::SERVICE;
use crate::vmm::{Scope, Vmm};
use crate::{
    commands, docs, events, generators, host, metrics, migrations, not_yet, one_vm, snapshots, vmm,
    vms,
};

impl Service {
    /// Also gives each VM that is created through [`router`](Self::router) a socket `<id>.sock` of its own in
    /// `directory`, on which Cloud Hypervisor's API is spoken. Removes those that a killed process left there.
    #[must_use]
    pub fn with_vm_sockets(mut self, directory: impl Into<PathBuf>) -> Self {
        let service = self.clone();
        self.sockets = Some(Arc::new(VmSockets::new(
            directory.into(),
            self.registry.clone(),
            self.shutdown.clone(),
            Box::new(move |id, shutdown| service.vm_router(id, shutdown)),
        )));
        self
    }

    /// The service's own face. To be served by [`serve`](crate::serve), which tells it what a request came
    /// over: over TCP, requests without the token, and those that a web page makes a browser send,
    /// are refused.
    pub fn router(&self) -> Router {
        let vmm = Vmm {
            about: Arc::clone(&self.about),
            registry: self.registry.clone(),
            scope: Scope::All,
            shutdown: self.shutdown.clone(),
        };
        let envelope = (Face::Service, self.requests.clone());
        assemble(service_face(self.clone(), vmm), envelope)
    }

    /// Cloud Hypervisor's face of the VM `id`, whether it is created yet or not. `shutdown` is requested when a
    /// client asks this VMM to end; for a program that is nothing else, that is
    /// [`shutdown`](Self::shutdown).
    pub fn vm_router(&self, id: &VmId, shutdown: &Shutdown) -> Router {
        let vmm = Vmm {
            about: Arc::clone(&self.about_vm),
            registry: self.registry.clone(),
            scope: Scope::One(id.clone()),
            shutdown: shutdown.clone(),
        };
        let vm = OneVm {
            registry: self.registry.clone(),
            id: id.clone(),
            claim: self.claim,
        };
        let envelope = (Face::CloudHypervisor, self.requests.clone());
        assemble(vm_face(vm, vmm), envelope)
    }
}

/// The whole interface, both faces, as OpenAPI 3.1. A socket serves the part of it that it has, at
/// `/api/v1/openapi.json`.
#[must_use]
pub fn document() -> OpenApi {
    let mut whole = frame();
    vmm::routes().describe(&mut whole);
    own().describe(&mut whole);
    of_one_vm().describe(&mut whole);
    published().describe(&mut whole);
    generators::suit(&mut whole);
    whole
}

fn own() -> Routes<Service> {
    vms::routes()
        .merge(commands::service_routes())
        .merge(migrations::routes())
        .merge(snapshots::routes())
        .merge(host::routes())
        .merge(events::routes())
        .merge(metrics::routes())
}

fn of_one_vm() -> Routes<OneVm> {
    one_vm::routes()
        .merge(commands::vm_routes())
        .merge(migrations::one_vm_routes())
        .merge(snapshots::one_vm_routes())
        .merge(not_yet::routes())
}

/// The service's own face.
fn service_face(service: Service, vmm: Vmm) -> Routes {
    own()
        .with_state(service)
        .merge(vmm::routes().with_state(vmm))
}

/// Cloud Hypervisor's face.
fn vm_face(vm: OneVm, vmm: Vmm) -> Routes {
    of_one_vm()
        .with_state(vm)
        .merge(vmm::routes().with_state(vmm))
}

/// A face, with what every face has: its document, a page to read it, and an answer to every other path.
fn assemble(face: Routes, shared: (Face, Requests)) -> Router {
    let (router, described) = face.split();
    let kind = shared.0;
    let (own, described_too) = published().split();
    let document = Arc::new(described.also(described_too));
    let mut paths = document.paths.clone();
    paths.sort_unstable();
    let router = router
        .merge(own.with_state(Arc::clone(&document)))
        .merge(docs::routes(document))
        .fallback(move |request: Request| std::future::ready(no_such_path(&request, kind, &paths)));
    // Around the router and not in its routes: it adds `Allow` after those are done.
    let service = from_fn_with_state(shared, envelope).layer(router);
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

fn published() -> Routes<Arc<Described>> {
    Routes::default().routes(routes!(openapi))
}

/// Return the OpenAPI document of this socket.
#[utoipa::path(
    get, path = "/api/v1/openapi.json", operation_id = "getDocument", tag = SERVICE,
    responses((status = 200, description = "An OpenAPI 3.1 document.", body = serde_json::Value)),
)]
async fn openapi(State(document): State<Arc<Described>>) -> impl IntoResponse {
    let json = document.json().to_string();
    ([(CONTENT_TYPE, "application/json")], json)
}

fn no_such_path(request: &Request, face: Face, paths: &[String]) -> ApiError {
    let path: String = request.uri().path().chars().take(128).collect();
    let on = |start: &str| path.starts_with(start);
    // The name of another path of this face would be no help, and could be a harmful one.
    let other_face = match face {
        Face::Service if on("/api/v1/vm.") => Some(
            "this socket serves many VMs: name one, as in /api/v1/vms/{id}/boot (wh-remote: --vm ID), or \
             use the VM's own socket, which GET /api/v1/vms shows",
        ),
        Face::CloudHypervisor if on("/api/v1/vms") || on("/api/v1/migrations") => Some(
            "this socket serves one VM by Cloud Hypervisor's API, as in /api/v1/vm.boot (wh-remote: omit \
             --vm); the service's own socket has this path",
        ),
        _ => None,
    };
    if let Some(advice) = other_face {
        return ApiError::new(
            StatusCode::NOT_FOUND,
            "no-such-path",
            format!("no resource at {path}; {advice}"),
        );
    }
    // What all paths begin with makes none of them likely.
    let start = "/api/v1/";
    let names = paths.iter().filter_map(|path| path.strip_prefix(start));
    let name = path
        .strip_prefix(start)
        .unwrap_or(path.trim_start_matches('/'));
    let hint = match spec::nearest(name, names) {
        Some(near) => format!("; did you mean {start}{near}?"),
        None => "; GET /api/v1/openapi.json lists the paths".to_owned(),
    };
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no-such-path",
        format!("no resource at {path}{hint}"),
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

    #[test]
    fn path_of_other_face_is_explained() {
        let paths = [
            "/api/v1/vmm.shutdown",
            "/api/v1/vm.restore",
            "/api/v1/vm.resize",
        ];
        let paths = paths.map(str::to_owned);
        let detail = |path: &str, face| {
            let request = Request::get(path).body(Body::empty()).unwrap();
            no_such_path(&request, face, &paths).detail().to_owned()
        };
        for path in ["/api/v1/vm.snapshot", "/api/v1/vm.info"] {
            let told = detail(path, Face::Service);
            assert!(
                told.contains("--vm ID") && !told.contains("shutdown"),
                "{told}"
            );
        }
        let told = detail("/api/v1/vms/web/boot", Face::CloudHypervisor);
        assert!(told.contains("omit --vm"), "{told}");
        let told = detail("/api/v1/events", Face::CloudHypervisor);
        assert!(!told.contains("did you mean"), "{told}");
        let told = detail("/vmm.shutdown", Face::Service);
        assert!(
            told.contains("did you mean /api/v1/vmm.shutdown?"),
            "{told}"
        );
        let told = detail("/api/v1/vmm.shutdwn", Face::Service);
        assert!(
            told.contains("did you mean /api/v1/vmm.shutdown?"),
            "{told}"
        );
    }

    #[tokio::test]
    async fn panic_becomes_500() {
        let face = Routes::default().undescribed("/panics", get(panics));
        let router = assemble(face, (Face::Service, Requests::default()));
        for _ in 0..2 {
            let request = Request::get("/panics").body(Body::empty()).unwrap();
            let response = router.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
            assert!(response.headers().contains_key("x-request-id"));
        }
    }
}
