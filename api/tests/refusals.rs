//! Every way to be refused.

mod harness;

use axum::body::Body;
use control::fake::Fake;
use harness::{CONFIG, call, expect, one_vm, send, service};
use http::Request;
use serde_json::Value;

/// A body to create a VM with, the status it gets, the code, and words that help.
const BODIES: &[(&str, u16, &str, &[&str])] = &[
    ("", 400, "missing-body", &["Content-Length"]),
    ("{", 400, "malformed-json", &["line 1", "column 1"]),
    (
        "{\"payload\":\n  }",
        400,
        "malformed-json",
        &["line 2", "column 3"],
    ),
    ("not json", 400, "malformed-json", &["line 1"]),
    (
        "{\"payload\": {}} trailing",
        400,
        "malformed-json",
        &["trailing"],
    ),
    ("[]", 400, "invalid-field", &[]),
    ("{}", 400, "invalid-field", &["payload"]),
    (
        r#"{"payload": {"kernal": "/k"}}"#,
        400,
        "unknown-field",
        &["kernal", "/payload", "did you mean `kernel`"],
    ),
    (
        r#"{"payload": {"kernel": 7}}"#,
        400,
        "invalid-field",
        &["/payload/kernel", "string"],
    ),
    (
        r#"{"payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": -1, "max_vcpus": 1}}"#,
        400,
        "invalid-field",
        &["/cpus/boot_vcpus"],
    ),
    (
        r#"{"payload": {"kernel": "/k"}, "memory": {"size": 0}}"#,
        422,
        "invalid-configuration",
        &["/memory/size"],
    ),
    (
        r#"{"payload": {"kernel": "/k"}, "memory": {"size": 4097}, "cpus": {"boot_vcpus": 0, "max_vcpus": 0}}"#,
        422,
        "invalid-configuration",
        &["/memory/size", "/cpus/boot_vcpus"],
    ),
    (
        r#"{"payload": {"kernel": "/k"}, "iommu": true}"#,
        501,
        "unsupported-configuration",
        &["/iommu"],
    ),
];

#[tokio::test]
async fn every_bad_body_is_explained() {
    for (body, status, code, words) in BODIES {
        let service = service(Fake::default());
        for (router, line) in [
            (one_vm(&service), "PUT /api/v1/vm.create"),
            (service.router(), "PUT /api/v1/vms/vm"),
        ] {
            let answer = expect(&router, line, body, *status).await;
            assert_eq!(answer.code(), *code, "{body}");
            for word in *words {
                assert!(
                    answer.text.contains(word),
                    "{word} is not in {}",
                    answer.text
                );
            }
            assert!(
                service.registry().list().is_empty(),
                "{body} changes nothing"
            );
        }
    }
}

#[tokio::test]
async fn every_problem_of_a_configuration_is_listed_with_its_field() {
    let service = service(Fake::default());
    let body = r#"{"payload": {"kernel": "/k"}, "memory": {"size": 4097}, "cpus": {"boot_vcpus": 0, "max_vcpus": 0}}"#;
    let problem = expect(&one_vm(&service), "PUT /api/v1/vm.create", body, 422)
        .await
        .json();
    let pointers: Vec<_> = problem["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["pointer"].as_str().unwrap())
        .collect();
    assert!(pointers.contains(&"/memory/size"), "{pointers:?}");
    assert!(pointers.contains(&"/cpus/boot_vcpus"), "{pointers:?}");
}

/// A pointer is one of the body that was sent, in which a new VM's configuration is a part.
#[tokio::test]
async fn pointers_are_of_the_whole_body() {
    let service = service(Fake::default());
    for (vm, status) in [
        (
            r#"{"payload": {"kernel": "/k"}, "memory": {"size": 0}}"#,
            422,
        ),
        (
            r#"{"payload": {"kernel": "/k"}, "memory": {"size": "1"}}"#,
            400,
        ),
    ] {
        let body = format!(r#"{{"id": "vm", "config": {vm}}}"#);
        let problem = expect(&service.router(), "POST /api/v1/vms", &body, status)
            .await
            .json();
        assert_eq!(problem["errors"][0]["pointer"], "/config/memory/size");
    }
}

#[tokio::test]
async fn impossible_name_is_no_missing_vm() {
    let service = service(Fake::default());
    let router = service.router();
    for name in ["-x", "a%20b", &"n".repeat(spec::limits::VM_ID_LEN + 1)] {
        let answer = expect(&router, &format!("PUT /api/v1/vms/{name}"), CONFIG, 422).await;
        assert_eq!(answer.code(), "invalid-name", "{name}");
        // Nothing can have this name.
        let answer = expect(&router, &format!("GET /api/v1/vms/{name}"), "", 404).await;
        assert_eq!(answer.code(), "no-such-vm", "{name}");
    }
    assert!(service.registry().list().is_empty());
    let document = serde_json::to_value(api::document()).unwrap();
    let answers = &document["paths"]["/api/v1/vms/{id}"]["put"]["responses"];
    assert!(answers["422"].is_object(), "{answers}");
}

#[tokio::test]
async fn rejects_wrong_content_type() {
    let table = [
        (None, 204),
        (Some("application/json"), 204),
        (Some("application/json; charset=utf-8"), 204),
        (Some("application/x-www-form-urlencoded"), 204),
        (Some("application/merge-patch+json"), 204),
        (Some("application/yaml"), 415),
        (Some("multipart/form-data; boundary=x"), 415),
    ];
    for (content_type, status) in table {
        let service = service(Fake::default());
        let mut request = Request::put("/api/v1/vm.create");
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let answer = send(&one_vm(&service), request.body(Body::from(CONFIG)).unwrap()).await;
        assert_eq!(answer.status, status, "{content_type:?}");
        if status == 415 {
            assert_eq!(answer.code(), "unsupported-media-type");
        }
    }
}

#[tokio::test]
async fn a_body_is_read_up_to_the_limit() {
    let service = service(Fake::default());
    let padded = |length: usize| format!("{CONFIG}{}", " ".repeat(length - CONFIG.len()));
    let answer = call(
        &one_vm(&service),
        "PUT /api/v1/vm.create",
        &padded(spec::limits::BODY_LEN + 1),
    )
    .await;
    assert_eq!(
        (answer.status.as_u16(), answer.code().as_str()),
        (413, "body-too-large")
    );
    // Also when its length is not announced.
    let stream = http_body_util::StreamBody::new(futures_util::stream::iter((0..40).map(|_| {
        Ok::<_, std::convert::Infallible>(hyper::body::Frame::data(vec![b' '; 1 << 16].into()))
    })));
    let request = Request::put("/api/v1/vm.create")
        .body(Body::new(stream))
        .unwrap();
    assert_eq!(send(&one_vm(&service), request).await.status, 413);
    expect(
        &one_vm(&service),
        "PUT /api/v1/vm.create",
        &padded(spec::limits::BODY_LEN),
        204,
    )
    .await;
}

#[tokio::test(start_paused = true)]
async fn missing_body_times_out() {
    let service = service(Fake::default());
    let begun = futures_util::stream::iter(["{\"payload\": "]);
    let never = futures_util::stream::pending();
    let body = futures_util::StreamExt::chain(begun, never);
    let body = futures_util::StreamExt::map(body, Ok::<_, std::convert::Infallible>);
    let request = Request::put("/api/v1/vm.create")
        .body(Body::from_stream(body))
        .unwrap();
    let answer = send(&one_vm(&service), request).await;
    assert_eq!(
        (answer.status.as_u16(), answer.code().as_str()),
        (408, "body-timeout")
    );
}

#[tokio::test]
async fn unknown_path_is_404_with_hint() {
    let service = service(Fake::default());
    let table = [
        ("GET /api/v1/vm", "did you mean /api/v1/vms?"),
        ("GET /api/v1/vmss", "did you mean /api/v1/vms?"),
        ("GET /", "openapi.json"),
        (
            "PUT /api/v1/vms/vm/bot",
            "did you mean /api/v1/vms/{id}/boot?",
        ),
    ];
    for (line, hint) in table {
        let answer = expect(&service.router(), line, "", 404).await;
        assert_eq!(answer.code(), "no-such-path");
        assert!(answer.text.contains(hint), "{line}: {}", answer.text);
    }
    let answer = expect(&one_vm(&service), "PUT /api/v1/vm.bot", "", 404).await;
    assert!(
        answer.text.contains("did you mean /api/v1/vm.boot?"),
        "{}",
        answer.text
    );
    // Each face on its own socket.
    expect(&service.router(), "PUT /api/v1/vm.boot", "", 404).await;
    expect(&one_vm(&service), "GET /api/v1/vms", "", 404).await;
    // What cannot be a name names nothing.
    for id in [
        "nobody",
        "..",
        "%2e%2e%2fetc",
        "a%20b",
        &"x".repeat(65),
        "%ff",
    ] {
        expect(&service.router(), &format!("GET /api/v1/vms/{id}"), "", 404).await;
    }
    assert_eq!(
        expect(&service.router(), "GET /api/v1/vms/nobody", "", 404)
            .await
            .code(),
        "no-such-vm"
    );
}

#[tokio::test]
async fn wrong_method_is_405() {
    let service = service(Fake::default());
    let table = [
        (
            service.router(),
            "PATCH /api/v1/vms/vm",
            vec!["DELETE", "GET", "HEAD", "PUT"],
        ),
        (
            service.router(),
            "DELETE /api/v1/vms",
            vec!["GET", "HEAD", "POST"],
        ),
        (one_vm(&service), "GET /api/v1/vm.boot", vec!["PUT"]),
        (one_vm(&service), "POST /api/v1/vm.create", vec!["PUT"]),
        (one_vm(&service), "PUT /api/v1/vm.info", vec!["GET", "HEAD"]),
    ];
    for (router, line, methods) in table {
        let answer = expect(&router, line, "", 405).await;
        assert_eq!(answer.code(), "method-not-allowed");
        let mut allowed: Vec<_> = answer.header("allow").split(',').map(str::trim).collect();
        allowed.sort_unstable();
        assert_eq!(allowed, methods, "{line}");
        assert!(answer.text.contains(methods[0]), "{}", answer.text);
    }
}

/// A wrong state is not a wrong method: no method would work.
#[tokio::test]
async fn state_405_allows_no_method() {
    let service = service(Fake::default());
    let router = one_vm(&service);
    expect(&router, "PUT /api/v1/vm.create", CONFIG, 204).await;
    let answer = expect(&router, "PUT /api/v1/vm.pause", "", 405).await;
    assert_eq!(answer.headers.get("allow").unwrap(), "");
    assert_eq!(answer.code(), "wrong-state");
}

/// Every operation of Cloud Hypervisor's contract that is not there says so, whatever it is sent.
#[tokio::test]
async fn missing_capability_is_501() {
    let service = service(Fake::default());
    let router = one_vm(&service);
    let paths = [
        "add-device",
        "add-fs",
        "add-generic-vhost-user",
        "add-pmem",
        "add-vdpa",
        "add-user-device",
    ];
    for path in paths {
        let answer = expect(&router, &format!("PUT /api/v1/vm.{path}"), "{}", 501).await;
        assert_eq!(answer.code(), "not-implemented");
        assert!(
            answer.text.contains("this version of the service cannot"),
            "{}",
            answer.text
        );
    }
}

#[tokio::test]
async fn reports_driver_refusals() {
    let service = service(Fake {
        fail_boot: true,
        ..Fake::default()
    });
    let router = one_vm(&service);
    expect(&router, "PUT /api/v1/vm.create", CONFIG, 204).await;
    assert_eq!(
        expect(&router, "PUT /api/v1/vm.boot", "", 422).await.code(),
        "kernel-missing"
    );
    assert_eq!(
        expect(&router, "GET /api/v1/vm.info", "", 200).await.json()["state"],
        "Created"
    );
}

/// Problems with 422 on the service's own face have the contract's status on the other.
#[tokio::test]
async fn device_refusals_follow_contract() {
    let service = service(Fake {
        fail_devices: true,
        ..Fake::default()
    });
    let (contract, own) = (one_vm(&service), service.router());
    expect(&contract, "PUT /api/v1/vm.create", CONFIG, 204).await;
    expect(&contract, "PUT /api/v1/vm.boot", "", 204).await;
    for (verb, body, status, code) in [
        ("add-disk", "{}", 400, "invalid-configuration"),
        ("add-net", r#"{"mtu": 1}"#, 400, "invalid-configuration"),
        (
            "add-vsock",
            r#"{"cid": 1, "socket": "/s"}"#,
            400,
            "invalid-configuration",
        ),
        ("add-disk", r#"{"path": "/a"}"#, 500, "disk-unusable"),
        ("add-net", "{}", 500, "disk-unusable"),
        (
            "add-vsock",
            r#"{"cid": 3, "socket": "/s"}"#,
            500,
            "disk-unusable",
        ),
        (
            "resize-disk",
            r#"{"id": "a", "desired_size": 1}"#,
            500,
            "disk-unusable",
        ),
    ] {
        let line = format!("PUT /api/v1/vm.{verb}");
        assert_eq!(expect(&contract, &line, body, status).await.code(), code);
        let line = format!("PUT /api/v1/vms/vm/{verb}");
        assert_eq!(expect(&own, &line, body, 422).await.code(), code);
    }
    // What this version cannot do is the same on both.
    for line in ["PUT /api/v1/vm.add-disk", "PUT /api/v1/vms/vm/add-disk"] {
        let router = if line.contains("vms") {
            &own
        } else {
            &contract
        };
        let body = r#"{"path": "/a", "vhost_user": true}"#;
        expect(router, line, body, 501).await;
    }
}

#[tokio::test]
async fn answers_carry_the_request_id() {
    let service = service(Fake::default());
    let request = |id: &str| {
        let request = Request::get("/api/v1/vms").header("x-request-id", id);
        request.body(Body::empty()).unwrap()
    };
    assert_eq!(
        send(&service.router(), request("mine-1"))
            .await
            .header("x-request-id"),
        "mine-1"
    );
    let refused = call(&service.router(), "GET /nothing", "").await;
    assert_eq!(refused.header("x-request-id").len(), 32);
}

#[tokio::test]
async fn each_face_describes_itself() {
    let service = service(Fake::default());
    let mut described = Vec::new();
    for router in [service.router(), one_vm(&service)] {
        let document = expect(&router, "GET /api/v1/openapi.json", "", 200)
            .await
            .json();
        assert_eq!(document["openapi"], "3.1.0");
        let page = expect(&router, "GET /docs", "", 200).await;
        assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
        assert!(!page.text.contains("src="), "the page fetches nothing");
        // What is described is there.
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                // Streams do not end; shutting down would change what follows.
                if path.ends_with("/events") || path.ends_with(".shutdown") {
                    continue;
                }
                let line = format!("{} {}", method.to_uppercase(), path.replace("{id}", "vm"));
                let answer = call(&router, &line, "").await;
                let missing = answer.status == 404 && answer.code() == "no-such-path";
                assert!(!missing && answer.status != 405, "{line}: {answer:?}");
            }
        }
        described.extend(document["paths"].as_object().unwrap().keys().cloned());
    }
    described.sort();
    described.dedup();
    let whole: Value = serde_json::from_str(&api::document().to_json().unwrap()).unwrap();
    let all: Vec<_> = whole["paths"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect();
    assert_eq!(described, all, "both faces together are the whole document");
}
