//! The habits of Cloud Hypervisor's clients: errors that they parse, bodies that nobody reads, and
//! connections that they keep.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::time::Duration;

use api::Bounds;
use control::fake::Fake;
use harness::{CONFIG, Served, one_vm, read_for, service};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

const SILENCE: Duration = Duration::from_millis(300);

fn served(bounds: Bounds) -> Served {
    let service = service(Fake::default());
    Served::start(&service, one_vm(&service), bounds)
}

/// Sends a request on a connection that is kept, and returns the status and the body of the answer.
async fn ask(stream: &mut UnixStream, line: &str, body: &str) -> (u16, String) {
    let request = format!(
        "{line} HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let answer = read_for(stream, SILENCE).await;
    assert!(!answer.contains("Connection: close"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head["HTTP/1.1 ".len()..][..3].parse().unwrap();
    (status, body.to_owned())
}

/// Whether the other side ends the connection within this time.
async fn ends(stream: &mut UnixStream, within: Duration) -> bool {
    let mut byte = [0; 1];
    matches!(
        tokio::time::timeout(within, stream.read(&mut byte)).await,
        Ok(Ok(0) | Err(_))
    )
}

#[tokio::test]
async fn errors_are_arrays_of_strings_with_the_outermost_first() {
    let served = served(Bounds::default());
    let mut stream = served.connect().await;
    let table = [
        (
            "PUT /api/v1/vm.boot",
            "",
            404,
            "The VM could not boot",
            "the VM is not created",
        ),
        (
            "PUT /api/v1/vm.create",
            r#"{"payload": {"kernel": "/k"}, "iommu": true}"#,
            501,
            "The VM could not be created",
            "iommu: ",
        ),
        (
            "PUT /api/v1/vm.add-fs",
            "{}",
            501,
            "The file system could not be added to the VM",
            "this version",
        ),
    ];
    for (line, body, expected, failure, reason) in table {
        let (status, text) = ask(&mut stream, line, body).await;
        assert_eq!(status, expected, "{line}: {text}");
        let causes: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(causes[..2], ["Error from API", failure], "{line}");
        let inner = &causes[2..];
        assert!(
            inner.iter().any(|cause| cause.starts_with(reason)),
            "{causes:?}"
        );
    }
    for (line, expected) in [("GET /api/v1/vm.boot", 405), ("PUT /nowhere", 404)] {
        let (status, text) = ask(&mut stream, line, "").await;
        let causes: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (status, causes.len() >= 2),
            (expected, true),
            "{line}: {causes:?}"
        );
    }
}

#[tokio::test]
async fn the_own_face_keeps_its_problem_bodies() {
    let service = service(Fake::default());
    let served = Served::start(&service, service.router(), Bounds::default());
    let mut stream = served.connect().await;
    let (status, text) = ask(&mut stream, "GET /api/v1/vms/none", "").await;
    let problem: spec::Problem = serde_json::from_str(&text).unwrap();
    assert_eq!((status, problem.code.as_str()), (404, "no-such-vm"));
}

/// A body of many writes, each of which fails with a broken pipe when the service has hung up.
#[tokio::test]
async fn a_client_that_still_writes_gets_its_answer_and_keeps_its_connection() {
    let served = served(Bounds::default());
    let mut stream = served.connect().await;
    for (line, expected) in [
        ("PUT /api/v1/vm.add-fs", "501"),
        ("PUT /api/v1/vm.nothing", "404"),
        ("POST /api/v1/vm.boot", "405"),
        ("PUT /api/v1/vm.boot", "404"),
        ("GET /api/v1/vmm.ping", "200"),
    ] {
        let piece = [b' '; 4096];
        let pieces = 32;
        let length = piece.len() * pieces;
        let head = format!("{line} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..pieces {
            // Lets the service run in between, as a slow writer does.
            tokio::task::yield_now().await;
            stream.write_all(&piece).await.unwrap();
        }
        let answer = read_for(&mut stream, SILENCE).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {expected} ")),
            "{answer}"
        );
        assert!(!answer.contains("Connection: close"), "{answer}");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_discarded_before_it_is_refused() {
    let served = served(Bounds::default());
    let mut stream = served.connect().await;
    let length = spec::limits::BODY_LEN + (1 << 20);
    let head =
        format!("PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&vec![b' '; length]).await.unwrap();
    let answer = read_for(&mut stream, SILENCE).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

/// An upload of nothing by libcurl, which is how libvirt sends a PUT without a body.
#[tokio::test]
async fn an_empty_upload_that_waits_for_continue_keeps_the_connection() {
    let served = served(Bounds::default());
    let mut stream = served.connect().await;
    ask(&mut stream, "PUT /api/v1/vm.create", CONFIG).await;
    for command in ["vm.boot", "vm.pause", "vm.resume"] {
        let head = format!(
            "PUT /api/v1/{command} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\
             Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let interim = read_for(&mut stream, SILENCE).await;
        assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
        stream.write_all(b"0\r\n\r\n").await.unwrap();
        let answer = read_for(&mut stream, SILENCE).await;
        assert!(answer.starts_with("HTTP/1.1 204 "), "{command}: {answer}");
        assert!(!answer.contains("Connection: close"), "{answer}");
    }
}

#[test]
fn idle_connection_is_kept_for_ten_minutes() {
    let bounds = Bounds::default();
    assert!(bounds.idle_timeout >= Duration::from_secs(600));
    assert!(bounds.header_read_timeout <= Duration::from_secs(30));
}

#[tokio::test]
async fn an_idle_client_has_longer_than_one_that_has_begun_a_request() {
    let header_read_timeout = Duration::from_millis(200);
    let served = served(Bounds {
        header_read_timeout,
        idle_timeout: Duration::from_secs(600),
        ..Bounds::default()
    });
    let mut stream = served.connect().await;
    ask(&mut stream, "GET /api/v1/vmm.ping", "").await;
    assert!(!ends(&mut stream, 4 * header_read_timeout).await);
    assert_eq!(ask(&mut stream, "GET /api/v1/vmm.ping", "").await.0, 200);
    stream.write_all(b"GET /api/v1/vmm").await.unwrap();
    assert!(ends(&mut stream, Duration::from_secs(10)).await);
}

#[tokio::test]
async fn an_idle_client_is_let_go_at_the_idle_limit() {
    let served = served(Bounds {
        idle_timeout: Duration::from_millis(500),
        ..Bounds::default()
    });
    let mut stream = served.connect().await;
    ask(&mut stream, "GET /api/v1/vmm.ping", "").await;
    assert!(ends(&mut stream, Duration::from_secs(10)).await);
}

#[tokio::test]
async fn the_longest_idle_connection_makes_room_for_a_new_one() {
    let served = served(Bounds {
        connections: 3,
        ..Bounds::default()
    });
    // It has begun a request, so that it is not idle.
    let mut begun = served.connect().await;
    begun
        .write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\n")
        .await
        .unwrap();
    let mut oldest = served.connect().await;
    ask(&mut oldest, "GET /api/v1/vmm.ping", "").await;
    let mut newest = served.connect().await;
    ask(&mut newest, "GET /api/v1/vmm.ping", "").await;
    let mut another = served.connect().await;
    assert_eq!(ask(&mut another, "GET /api/v1/vmm.ping", "").await.0, 200);
    assert!(ends(&mut oldest, Duration::from_secs(10)).await);
    assert_eq!(ask(&mut newest, "GET /api/v1/vmm.ping", "").await.0, 200);
    begun.write_all(b"Host: x\r\n\r\n").await.unwrap();
    let answer = read_for(&mut begun, SILENCE).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

/// A body of a known client, after its public code, and the start of the reason for which it is refused.
const BODIES: &[(&str, &str, u16, &str)] = &[
    (
        "Kata's runtime-rs, without a shared file system",
        r#"{"cpus": {"boot_vcpus": 1, "max_vcpus": 8, "max_phys_bits": 46}, "memory": {"size": 268435456,
            "hotplug_size": 8589934592, "hotplug_method": "Acpi", "shared": true, "thp": true},
            "payload": {"kernel": "/k", "cmdline": "quiet", "initramfs": null, "firmware": null, "mrconfigid": null},
            "disks": [{"path": "/d", "readonly": true, "num_queues": 1, "queue_size": 1024, "disable_io_uring": false,
            "image_type": "Unknown", "iommu": false, "vhost_user": false}],
            "serial": {"mode": "Off", "iommu": false}, "console": {"mode": "Off", "iommu": false},
            "rng": {"src": "/dev/urandom", "iommu": false}, "vsock": {"cid": 3, "socket": "/v"}, "iommu": false,
            "watchdog": false}"#,
        204,
        "",
    ),
    (
        "Kata's runtime-rs, with its default file system",
        r#"{"cpus": {"boot_vcpus": 1, "max_vcpus": 8}, "payload": {"kernel": "/k", "mrconfigid": null},
            "fs": [{"tag": "kataShared", "socket": "/s", "num_queues": 1, "queue_size": 1024}]}"#,
        501,
        "fs: ",
    ),
    (
        "Kata's runtime in Go, without a shared file system",
        r#"{"cpus": {"boot_vcpus": 1, "max_vcpus": 4}, "memory": {"size": 2147483648, "shared": true,
            "hotplug_size": 4294967296}, "payload": {"kernel": "/k", "cmdline": "x"},
            "platform": {"num_pci_segments": 2}, "serial": {"mode": "Tty", "iommu": false},
            "console": {"mode": "Off"}, "vsock": {"cid": 3, "socket": "/v"}}"#,
        204,
        "",
    ),
    (
        "libvirt 9.0",
        r#"{"kernel": {"path": "/k"}, "cmdline": {"args": "quiet"}, "initramfs": {"path": "/i"},
            "cpus": {"boot_vcpus": 2, "max_vcpus": 4}, "memory": {"size": 536870912},
            "console": {"mode": "Null"}, "serial": {"mode": "Pty"},
            "platform": {"uuid": "c7a5fdbd-edaf-9455-926a-d65c16db1809"}}"#,
        204,
        "",
    ),
    (
        "libvirt 11",
        r#"{"payload": {"kernel": "/k", "cmdline": "quiet"}, "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
            "memory": {"size": 536870912}, "disks": [{"path": "/d"}], "console": {"mode": "Off"},
            "serial": {"mode": "Pty"}}"#,
        204,
        "",
    ),
    (
        "an interface without an address, with an odd number of queues",
        r#"{"payload": {"kernel": "/k"},
            "net": [{"tap": "t0", "ip": null, "mask": "", "num_queues": 5}]}"#,
        204,
        "",
    ),
    (
        "a field that asks for something",
        r#"{"payload": {"kernel": "/k"}, "disks": [{"path": "/d", "disable_io_uring": true}]}"#,
        400,
        "unknown field `disable_io_uring`",
    ),
    (
        "an array in place of an object",
        r#"{"payload": {"kernel": "/k"}, "cpus": [1, 1]}"#,
        400,
        "/cpus: must be an object",
    ),
];

#[tokio::test]
async fn bodies_of_known_clients_are_accepted_or_refused_by_name() {
    for (client, body, expected, reason) in BODIES {
        let served = served(Bounds::default());
        let mut stream = served.connect().await;
        let (status, text) = ask(&mut stream, "PUT /api/v1/vm.create", body).await;
        assert_eq!(status, *expected, "{client}: {text}");
        if *expected == 204 {
            assert_eq!(ask(&mut stream, "PUT /api/v1/vm.boot", "").await.0, 204);
            continue;
        }
        let causes: Vec<String> = serde_json::from_str(&text).unwrap();
        assert!(
            causes.iter().any(|cause| cause.starts_with(reason)),
            "{client}: {causes:?}"
        );
        let (status, _) = ask(&mut stream, "GET /api/v1/vm.info", "").await;
        assert_eq!(status, 404, "{client}: a refused body changes nothing");
    }
}

#[tokio::test]
async fn a_device_of_a_known_client_may_have_its_hidden_fields() {
    let served = served(Bounds::default());
    let mut stream = served.connect().await;
    ask(&mut stream, "PUT /api/v1/vm.create", CONFIG).await;
    let disk = r#"{"path": "/d", "disable_io_uring": false, "image_type": "Unknown"}"#;
    let (status, text) = ask(&mut stream, "PUT /api/v1/vm.add-disk", disk).await;
    assert_eq!(status, 200, "{text}");
}

/// The service's own face refuses what Cloud Hypervisor's ignores.
#[tokio::test]
async fn the_own_face_stays_strict() {
    let service = service(Fake::default());
    let served = Served::start(&service, service.router(), Bounds::default());
    let mut stream = served.connect().await;
    let body = r#"{"payload": {"kernel": "/k", "mrconfigid": null}}"#;
    let (status, text) = ask(&mut stream, "PUT /api/v1/vms/vm", body).await;
    assert_eq!(status, 400, "{text}");
    let problem: spec::Problem = serde_json::from_str(&text).unwrap();
    assert_eq!(problem.code, "unknown-field");
}
