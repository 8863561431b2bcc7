//! Every call in every state, on both faces.

mod harness;

use control::fake::Fake;
use harness::{CONFIG, Served, call, expect, one_vm, service};
use serde_json::json;

/// The requests that bring a VM into each state after its creation.
const STATES: [(&str, Option<&[&str]>); 5] = [
    ("not created", None),
    ("Created", Some(&[])),
    ("Running", Some(&["boot"])),
    ("Paused", Some(&["boot", "pause"])),
    ("Shutdown", Some(&["boot", "shutdown"])),
];

/// Each call, and the status it has in each of the states on Cloud Hypervisor's face and on the service's own.
const TABLE: &[(&str, [u16; 5], [u16; 5])] = &[
    ("boot", [404, 204, 409, 409, 204], [404, 204, 409, 409, 204]),
    (
        "pause",
        [404, 405, 204, 405, 405],
        [404, 409, 204, 409, 409],
    ),
    (
        "resume",
        [404, 405, 405, 204, 405],
        [404, 409, 409, 204, 409],
    ),
    (
        "reboot",
        [404, 405, 204, 204, 405],
        [404, 409, 204, 204, 409],
    ),
    (
        "shutdown",
        [404, 405, 204, 204, 405],
        [404, 409, 204, 204, 409],
    ),
    (
        "power-button",
        [404, 405, 204, 405, 405],
        [404, 409, 204, 409, 409],
    ),
    ("nmi", [404, 409, 204, 204, 409], [404, 409, 204, 204, 409]),
    (
        "delete",
        [204, 204, 204, 204, 204],
        [404, 204, 204, 204, 204],
    ),
    ("info", [404, 200, 200, 200, 200], [404, 200, 200, 200, 200]),
    (
        "counters",
        [404, 200, 200, 200, 200],
        [404, 200, 200, 200, 200],
    ),
    (
        "memory-map",
        [404, 409, 200, 200, 409],
        [404, 409, 200, 200, 409],
    ),
    (
        "create",
        [204, 409, 409, 409, 409],
        [201, 409, 409, 409, 409],
    ),
];

#[tokio::test]
async fn cpus_have_the_defaults_of_the_face() {
    for (given, one, many) in [
        ("", true, false),
        ("false", false, false),
        ("true", true, true),
    ] {
        let field = match given {
            "" => String::new(),
            given => format!(r#", "nested": {given}"#),
        };
        let config = format!(
            r#"{{"payload": {{"kernel": "/k"}}, "cpus": {{"boot_vcpus": 1, "max_vcpus": 1{field}}}}}"#
        );
        let service = service(Fake::default());
        let router = one_vm(&service);
        expect(&router, "PUT /api/v1/vm.create", &config, 204).await;
        let info = expect(&router, "GET /api/v1/vm.info", "", 200).await.json();
        assert_eq!(info["config"]["cpus"]["nested"], one, "{given}");
        assert_eq!(info["config"]["cpus"]["max_phys_bits"], 46);

        let router = service.router();
        expect(&router, "PUT /api/v1/vms/other", &config, 201).await;
        let info = expect(&router, "GET /api/v1/vms/other", "", 200)
            .await
            .json();
        assert_eq!(info["config"]["cpus"]["nested"], many, "{given}");
        assert_eq!(info["config"]["cpus"].get("max_phys_bits"), None);
        expect(&router, "PUT /api/v1/vms/other", &config, 200).await;
    }
}

fn line(face: usize, call: &str) -> (String, &'static str) {
    let line = match (face, call) {
        (0, "info" | "counters" | "memory-map") => format!("GET /api/v1/vm.{call}"),
        (0, _) => format!("PUT /api/v1/vm.{call}"),
        (_, "create") => "POST /api/v1/vms".to_owned(),
        (_, "delete") => "DELETE /api/v1/vms/vm".to_owned(),
        (_, "info") => "GET /api/v1/vms/vm".to_owned(),
        (_, "counters" | "memory-map") => format!("GET /api/v1/vms/vm/{call}"),
        _ => format!("PUT /api/v1/vms/vm/{call}"),
    };
    let body = match (face, call) {
        (0, "create") => CONFIG,
        (_, "create") => r#"{"id": "vm", "config": {"payload": {"kernel": "/boot/vmlinux"}}}"#,
        _ => "",
    };
    (line, body)
}

/// Cloud Hypervisor has no machine behind a guest that ended, and shows its VM as one that was not booted.
#[tokio::test]
async fn ended_guest_is_shown_as_each_face_does() {
    let service = service(Fake::default());
    let (one, many) = (one_vm(&service), service.router());
    expect(&one, "PUT /api/v1/vm.create", CONFIG, 204).await;
    for (call_name, on_one_vm, on_many) in [
        ("boot", "Running", "Running"),
        ("shutdown", "Created", "Shutdown"),
        ("boot", "Running", "Running"),
    ] {
        expect(&one, &format!("PUT /api/v1/vm.{call_name}"), "", 204).await;
        let info = expect(&one, "GET /api/v1/vm.info", "", 200).await.json();
        assert_eq!(info["state"], on_one_vm, "{call_name}");
        let info = expect(&many, "GET /api/v1/vms/vm", "", 200).await.json();
        assert_eq!(info["state"], on_many, "{call_name}");
    }
}

#[tokio::test]
async fn every_call_in_every_state_on_both_faces() {
    for face in [0, 1] {
        for (call_name, on_one_vm, on_many) in TABLE {
            for (column, (state, path)) in STATES.iter().enumerate() {
                let service = service(Fake::default());
                let router = if face == 0 {
                    one_vm(&service)
                } else {
                    service.router()
                };
                for step in path
                    .iter()
                    .flat_map(|path| ["create"].iter().chain(path.iter()))
                {
                    let (line, body) = line(face, step);
                    let status = call(&router, &line, body).await.status;
                    assert!(
                        status.is_success(),
                        "{step} on the way to {state}: {status}"
                    );
                }
                let expected = if face == 0 { on_one_vm } else { on_many }[column];
                let shown = match (face, *state) {
                    (0, "Shutdown") => "Created",
                    (_, state) => state,
                };
                let (line, body) = line(face, call_name);
                let answer = expect(&router, &line, body, expected).await;
                match expected {
                    204 => assert_eq!(answer.text, "", "{line}"),
                    200 | 201 => assert_eq!(answer.header("content-type"), "application/json"),
                    404 if face == 0 => assert_eq!(answer.code(), "vm-not-created"),
                    404 => assert_eq!(answer.code(), "no-such-vm"),
                    _ if *call_name == "create" => assert_eq!(answer.code(), "vm-exists"),
                    _ => {
                        assert_eq!(answer.code(), "wrong-state");
                        assert!(
                            answer.text.contains(&format!("is {shown} ")),
                            "says where the VM is: {}",
                            answer.text
                        );
                    }
                }
                // A refused call changes nothing.
                if expected >= 400 && path.is_some() {
                    let (info, _) = self::line(face, "info");
                    let info = expect(&router, &info, "", 200).await.json();
                    assert_eq!(info["state"], shown, "after a refused {call_name}");
                }
            }
        }
    }
}

#[tokio::test]
async fn returns_contract_bodies() {
    let service = service(Fake::default());
    let router = one_vm(&service);
    let ping = expect(&router, "GET /api/v1/vmm.ping", "", 200)
        .await
        .json();
    let expected = json!({
        "build_version": "v1.2.3-4-gabcdef", "version": "1.2.3", "pid": 42, "features": ["kvm"],
    });
    assert_eq!(ping, expected);
    let config = r#"{"payload": {"kernel": "/k", "cmdline": "console=ttyS0"}, "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 1073741824}, "serial": {"mode": "File", "file": "/tmp/log"}}"#;
    expect(&router, "PUT /api/v1/vm.create", config, 204).await;
    let info = expect(&router, "GET /api/v1/vm.info", "", 200).await.json();
    assert_eq!(info["state"], "Created");
    assert_eq!(
        info["config"]["payload"],
        json!({"kernel": "/k", "cmdline": "console=ttyS0"})
    );
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 2);
    assert_eq!(
        info["config"]["serial"],
        json!({"mode": "File", "file": "/tmp/log"})
    );
    assert_eq!(info["memory_actual_size"], 1_073_741_824);
}

#[tokio::test]
async fn many_vms_live_side_by_side() {
    let service = service(Fake::default());
    let router = service.router();
    assert_eq!(
        expect(&router, "GET /api/v1/vms", "", 200).await.json(),
        json!([])
    );
    for id in ["b", "a"] {
        let body = format!(r#"{{"id": "{id}", "config": {CONFIG}}}"#);
        let answer = expect(&router, "POST /api/v1/vms", &body, 201).await;
        assert_eq!(answer.header("location"), format!("/api/v1/vms/{id}"));
        let info = expect(
            &router,
            &format!("GET {}", answer.header("location")),
            "",
            200,
        )
        .await;
        assert_eq!(info.json()["state"], "Created");
    }
    // Without a name it gets one.
    let body = format!(r#"{{"config": {CONFIG}}}"#);
    let named = expect(&router, "POST /api/v1/vms", &body, 201).await.json();
    assert_eq!(named["id"].as_str().unwrap().len(), 36);
    expect(&router, "PUT /api/v1/vms/b/boot", "", 204).await;
    let list = expect(&router, "GET /api/v1/vms", "", 200).await.json();
    let states: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .filter(|vm| vm["id"] != named["id"])
        .map(|vm| (vm["id"].as_str().unwrap(), vm["state"].as_str().unwrap()))
        .collect();
    assert_eq!(states, [("a", "Created"), ("b", "Running")]);
    let sizes = r#"{"desired_vcpus": 3, "desired_ram": 1073741824}"#;
    expect(&router, "PUT /api/v1/vms/b/resize", sizes, 204).await;
    let metrics = expect(&router, "GET /api/v1/metrics", "", 200).await.text;
    assert!(
        metrics.contains("whimbrel_vms{state=\"Running\"} 1\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("whimbrel_vms{state=\"Created\"} 2\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("whimbrel_vm_memory_bytes{vm=\"a\"} 536870912\n"),
        "{metrics}"
    );
    // After a resize, and of a VM that is off.
    for line in [
        "whimbrel_vm_memory_bytes{vm=\"b\"} 1073741824\n",
        "whimbrel_vm_vcpus{vm=\"b\"} 3\n",
        "whimbrel_vm_vcpus{vm=\"a\"} 1\n",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    // The counters of a VM's devices, and the kind of each.
    for line in [
        "# TYPE whimbrel_vm_read_bytes_total counter\n",
        "whimbrel_vm_read_bytes_total{vm=\"b\",device=\"_disk0\"} 7\n",
        "# TYPE whimbrel_vm_actual_bytes gauge\n",
        "whimbrel_vm_actual_bytes{vm=\"b\",device=\"__balloon\"} 3\n",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
    // What came before this one: a list, three creations with two looks at them, a boot, a list, a resize.
    assert!(
        metrics.contains("whimbrel_api_requests_total{outcome=\"ok\"} 9\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn ensuring_a_vm_may_be_repeated() {
    let service = service(Fake::default());
    let router = service.router();
    let answer = expect(&router, "PUT /api/v1/vms/vm", CONFIG, 201).await;
    assert_eq!(answer.header("location"), "/api/v1/vms/vm");
    expect(&router, "PUT /api/v1/vms/vm/boot", "", 204).await;
    let again = expect(&router, "PUT /api/v1/vms/vm", CONFIG, 200).await;
    assert_eq!(again.json()["state"], "Running");
    let other = r#"{"payload": {"kernel": "/another"}}"#;
    assert_eq!(
        expect(&router, "PUT /api/v1/vms/vm", other, 409)
            .await
            .code(),
        "vm-exists"
    );
}

/// An address that was made up is not asked for again; one that was asked for is.
#[tokio::test]
async fn ensuring_a_vm_with_an_interface_may_be_repeated() {
    let with = |net: &str| format!(r#"{{"payload": {{"kernel": "/k"}}, "net": [{net}]}}"#);
    let router = service(Fake::default()).router();
    let line = "PUT /api/v1/vms/vm";
    expect(&router, line, &with("{}"), 201).await;
    expect(&router, line, &with("{}"), 200).await;
    let other = with(r#"{"mac": "52:54:00:12:34:56"}"#);
    expect(&router, line, &other, 409).await;
}

#[tokio::test]
async fn shutting_the_service_down_ends_its_vms() {
    let service = service(Fake::default());
    let router = service.router();
    expect(&router, "PUT /api/v1/vms/vm", CONFIG, 201).await;
    assert!(!service.shutdown().is_requested());
    expect(&router, "PUT /api/v1/vmm.shutdown", "", 204).await;
    assert!(service.shutdown().is_requested());
    assert!(service.registry().list().is_empty());
}

#[tokio::test]
async fn vm_socket_lives_with_its_vm() {
    let sockets = tempfile::tempdir().unwrap();
    let service = service(Fake::default()).with_vm_sockets(sockets.path());
    let router = service.router();
    for round in 0..3 {
        let created = expect(&router, "PUT /api/v1/vms/mine", CONFIG, 201)
            .await
            .json();
        let path = sockets.path().join("mine.sock");
        assert_eq!(
            created["api_socket"],
            path.to_str().unwrap(),
            "round {round}"
        );
        let ask = |line: &'static str| {
            let path = path.clone();
            async move {
                use tokio::io::AsyncWriteExt as _;
                let mut stream = tokio::net::UnixStream::connect(path).await.unwrap();
                let request = format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n");
                stream.write_all(request.as_bytes()).await.unwrap();
                harness::read_for(&mut stream, std::time::Duration::from_millis(100)).await
            }
        };
        assert!(
            ask("PUT /api/v1/vm.boot")
                .await
                .starts_with("HTTP/1.1 204 ")
        );
        // It is the same VM.
        let info = expect(&router, "GET /api/v1/vms/mine", "", 200).await;
        assert_eq!(info.json()["state"], "Running");
        // That socket's VMM is this VM alone.
        if round == 0 {
            assert!(
                ask("PUT /api/v1/vmm.shutdown")
                    .await
                    .starts_with("HTTP/1.1 204 ")
            );
            assert!(!service.shutdown().is_requested());
        } else {
            expect(&router, "DELETE /api/v1/vms/mine", "", 204).await;
        }
        expect(&router, "GET /api/v1/vms/mine", "", 404).await;
    }
}

#[tokio::test]
async fn closed_service_removes_sockets() {
    let sockets = tempfile::tempdir().unwrap();
    let service = service(Fake::default()).with_vm_sockets(sockets.path());
    for id in ["a", "b", "c"] {
        let line = format!("PUT /api/v1/vms/{id}");
        expect(&service.router(), &line, CONFIG, 201).await;
    }
    assert_eq!(std::fs::read_dir(sockets.path()).unwrap().count(), 6);
    service.close().await;
    assert!(service.shutdown().is_requested());
    assert_eq!(std::fs::read_dir(sockets.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn vm_without_socket_is_not_created() {
    let service = service(Fake::default()).with_vm_sockets("/nowhere/at/all");
    let router = service.router();
    let answer = expect(&router, "PUT /api/v1/vms/vm", CONFIG, 500).await;
    assert_eq!(answer.code(), "vm-socket");
    assert!(
        answer.text.contains("/nowhere/at/all/vm.sock"),
        "{}",
        answer.text
    );
    assert!(service.registry().list().is_empty());
}

#[tokio::test]
async fn dead_driver_fails_only_its_requests() {
    let service = service(Fake {
        die_at_nmi: true,
        ..Fake::default()
    });
    let router = service.router();
    for id in ["a", "b"] {
        expect(&router, &format!("PUT /api/v1/vms/{id}"), CONFIG, 201).await;
        expect(&router, &format!("PUT /api/v1/vms/{id}/boot"), "", 204).await;
    }
    assert_eq!(
        expect(&router, "PUT /api/v1/vms/a/nmi", "", 500)
            .await
            .code(),
        "driver-gone"
    );
    assert_eq!(
        expect(&router, "PUT /api/v1/vms/a/pause", "", 500)
            .await
            .code(),
        "driver-gone"
    );
    expect(&router, "PUT /api/v1/vms/b/pause", "", 204).await;
    // The dead one can be swept up.
    expect(&router, "DELETE /api/v1/vms/a", "", 204).await;
    expect(&router, "GET /api/v1/vms/a", "", 404).await;
}

#[tokio::test]
async fn slow_driver_delays_no_other() {
    let slow = Fake {
        delay: std::time::Duration::from_millis(500),
        ..Fake::default()
    };
    let service = service(slow);
    let served = Served::start(&service, service.router(), api::Bounds::default());
    let router = service.router();
    expect(&router, "PUT /api/v1/vms/vm", CONFIG, 201).await;
    let boot = tokio::spawn({
        let router = router.clone();
        async move { call(&router, "PUT /api/v1/vms/vm/boot", "").await.status }
    });
    let begun = std::time::Instant::now();
    for _ in 0..20 {
        expect(&router, "GET /api/v1/vms/vm", "", 200).await;
        expect(&router, "GET /api/v1/vmm.ping", "", 200).await;
    }
    assert!(
        begun.elapsed() < std::time::Duration::from_millis(400),
        "{:?}",
        begun.elapsed()
    );
    assert!(!boot.is_finished());
    assert_eq!(boot.await.unwrap(), 204);
    drop(served);
}
