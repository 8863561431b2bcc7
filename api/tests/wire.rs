//! The wire: real clients, misbehaving clients, and the end of the service.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::time::{Duration, Instant};

use api::{Bounds, TcpAccess};
use control::fake::Fake;
use harness::{CONFIG, Served, expect, one_vm, read_for, service};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn served(fake: Fake) -> Served {
    let service = service(fake);
    let router = one_vm(&service);
    Served::start(&service, router, Bounds::default())
}

/// An answer as ch-remote understands it: the status is all that stands between the protocol and the end of the
/// line, the length is where `Content-Length` stands in just that spelling, and each piece of 256 bytes is text.
fn as_ch_remote_reads(answer: &str) -> (u16, Option<String>) {
    assert!(answer.is_ascii(), "{answer}");
    let line = answer.strip_prefix("HTTP/1.1 ").unwrap();
    let status = line[..line.find('\r').unwrap()].trim().parse().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "));
    let body = length.map(|length| {
        assert_eq!(length.trim().parse::<usize>().unwrap(), body.len());
        body.to_owned()
    });
    (status, body)
}

#[tokio::test]
async fn ch_remote_works() {
    let served = served(Fake::default());
    let ask = async |method: &str, command: &str, body: Option<&str>| {
        let mut request =
            format!("{method} /api/v1/{command} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        if let Some(body) = body {
            request += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
        } else {
            request += "\r\n";
        }
        as_ch_remote_reads(&served.exchange(&request).await)
    };
    let (status, body) = ask("GET", "vmm.ping", None).await;
    assert_eq!(status, 200);
    assert!(body.unwrap().contains("\"version\":\"1.2.3\""));
    assert_eq!(ask("GET", "vm.info", None).await.0, 404);
    let config = r#"{"payload": {"kernel": "/boot/vmlinux", "cmdline": "naïve=日本"}}"#;
    assert_eq!(ask("PUT", "vm.create", Some(config)).await, (204, None));
    for command in [
        "boot",
        "pause",
        "resume",
        "reboot",
        "power-button",
        "nmi",
        "shutdown",
    ] {
        assert_eq!(
            ask("PUT", &format!("vm.{command}"), None).await,
            (204, None),
            "{command}"
        );
    }
    let (status, body) = ask("GET", "vm.info", None).await;
    let info: spec::VmInfo = serde_json::from_str(&body.unwrap()).unwrap();
    assert_eq!(
        (status, info.config.payload.cmdline.as_deref()),
        (200, Some("naïve=日本"))
    );
    let (status, body) = ask("PUT", "vm.pause", None).await;
    assert_eq!(status, 405);
    assert!(
        body.unwrap()
            .contains("a VM that is Created cannot be paused")
    );
    assert_eq!(
        ask("PUT", "vm.add-fs", Some(r#"{"tag": "t", "socket": "/s"}"#))
            .await
            .0,
        501
    );
    assert_eq!(ask("PUT", "vm.delete", None).await, (204, None));
    assert_eq!(ask("PUT", "vmm.shutdown", None).await, (204, None));
    served.serving.await.unwrap();
}

/// Requests as Go's `net/http` writes them: one connection for all, a length of 0 where there is no body, chunks where the
/// length is not known.
#[tokio::test]
async fn one_connection_serves_many_requests() {
    let served = served(Fake::default());
    let mut stream = served.connect().await;
    let chunked = format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\n\
         Transfer-Encoding: chunked\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n\
         {:x}\r\n{CONFIG}\r\n0\r\n\r\n",
        CONFIG.len()
    );
    let empty = |line: &str| {
        format!(
            "{line} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\n\r\n"
        )
    };
    let requests = [
        (chunked, "204"),
        (empty("PUT /api/v1/vm.boot"), "204"),
        (empty("PUT /api/v1/vm.boot"), "409"),
        (empty("GET /api/v1/vm.info"), "200"),
        (empty("PUT /api/v1/vm.delete"), "204"),
    ];
    for (request, status) in &requests {
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = read_for(&mut stream, Duration::from_millis(100)).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    // Pipelined, and with the client's side closed before the answers come.
    for _ in 0..3 {
        stream
            .write_all(empty("GET /api/v1/vmm.ping").as_bytes())
            .await
            .unwrap();
    }
    stream.shutdown().await.unwrap();
    let answers = read_for(&mut stream, Duration::from_secs(5)).await;
    assert_eq!(answers.matches("HTTP/1.1 200 ").count(), 3, "{answers}");
}

#[tokio::test]
async fn rejects_oversized_body_early() {
    let served = served(Fake::default());
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{";
    let answer = served.exchange(head).await;
    assert!(
        answer.starts_with("HTTP/1.1 413 ") && answer.contains("the body is longer than"),
        "{answer}"
    );
}

#[tokio::test]
async fn slow_request_head_times_out() {
    let service = service(Fake::default());
    let header_read_timeout = Duration::from_millis(200);
    let bounds = Bounds {
        header_read_timeout,
        ..Bounds::default()
    };
    let served = Served::start(&service, one_vm(&service), bounds);
    let begun = Instant::now();
    let mut slow = served.connect().await;
    let mut silent = served.connect().await;
    for byte in b"GET /api/v1/vmm.ping HTTP/1.1\r\nX-Very-Slow-Indeed: 0123456789" {
        if slow.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest).await;
    silent.read_to_end(&mut rest).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3));
    let answer = served
        .exchange("GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn invalid_bytes_end_only_their_connection() {
    let served = served(Fake::default());
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000));
    let fields = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000));
    let lengths =
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}";
    for rubbish in [
        "\u{16}\u{3}\u{1}",
        "GET\r\n\r\n",
        "\r\n\r\n\0",
        &long,
        &fields,
        lengths,
    ] {
        let answer = served.exchange(rubbish).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{answer}"
        );
    }
    let answer = served
        .exchange("GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_at_once_are_all_served() {
    let service = service(Fake::default());
    // Fewer at a time than there are: the others wait their turn.
    let bounds = Bounds {
        connections: 8,
        ..Bounds::default()
    };
    let served = std::sync::Arc::new(Served::start(&service, service.router(), bounds));
    let clients: Vec<_> = (0..32)
        .map(|client| {
            let served = served.clone();
            tokio::spawn(async move {
                let mut stream = served.connect().await;
                let body = format!(r#"{{"id": "vm-{client}", "config": {CONFIG}}}"#);
                let request = format!(
                    "POST /api/v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(request.as_bytes()).await.unwrap();
                let answer = read_for(&mut stream, Duration::from_secs(20)).await;
                assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(service.registry().list().len(), 32);
}

#[tokio::test]
async fn shutdown_finishes_requests() {
    let delay = Duration::from_millis(300);
    let service = service(Fake {
        delay,
        ..Fake::default()
    });
    let served = Served::start(&service, service.router(), Bounds::default());
    expect(&service.router(), "PUT /api/v1/vms/vm", CONFIG, 201).await;
    let _idle = served.connect().await;
    let mut events = served.connect().await;
    events
        .write_all(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut busy = served.connect().await;
    busy.write_all(b"PUT /api/v1/vms/vm/boot HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    tokio::time::sleep(delay / 3).await;
    let begun = Instant::now();
    service.shutdown().request();
    let answer = read_for(&mut busy, Duration::from_secs(5)).await;
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    served.serving.await.unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "idle clients and followers hold nothing up"
    );
    assert_eq!(
        std::fs::read_dir(served.directory.path()).unwrap().count(),
        0
    );
}

#[tokio::test]
async fn shutdown_has_a_time_limit() {
    let service = service(Fake {
        delay: Duration::from_secs(3),
        ..Fake::default()
    });
    let bounds = Bounds {
        shutdown_grace: Duration::from_millis(100),
        ..Bounds::default()
    };
    let served = Served::start(&service, service.router(), bounds);
    expect(&service.router(), "PUT /api/v1/vms/vm", CONFIG, 201).await;
    let mut busy = served.connect().await;
    busy.write_all(b"PUT /api/v1/vms/vm/boot HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    service.shutdown().request();
    tokio::time::timeout(Duration::from_secs(1), served.serving)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn tcp_serves_who_shows_the_token_but_no_web_pages() {
    let service = service(Fake::default());
    let token = "0123456789abcdef0123456789abcdef";
    let access = TcpAccess::from(token.parse::<spec::ApiToken>().unwrap());
    let listener = api::Listener::tcp("127.0.0.1:0".parse().unwrap(), access)
        .await
        .unwrap();
    let address = listener.place().strip_prefix("http://").unwrap().to_owned();
    let serving = tokio::spawn(api::serve(
        listener,
        service.router(),
        service.shutdown().clone(),
    ));
    let list = "GET /api/v1/vms";
    let host = format!("Host: {address}\r\n");
    let shown = format!("{host}Authorization: Bearer {token}\r\n");
    let evil = format!("{shown}Origin: https://evil.example\r\n");
    let other_host = shown.replace(&address, "evil.example");
    let wrong = format!(
        "{host}Authorization: Bearer {}\r\n",
        token.replace('f', "e")
    );
    let table = [
        (list, &shown, "200"),
        (list, &evil, "403"),
        (list, &other_host, "421"),
        (list, &host, "401"),
        (list, &wrong, "401"),
        // No path is open, not even those that are not there.
        ("PUT /api/v1/vmm.shutdown", &host, "401"),
        ("GET /api/v1/openapi.json", &host, "401"),
        ("GET /docs", &host, "401"),
        ("GET /nothing", &host, "401"),
        ("GET /nothing", &shown, "404"),
    ];
    for (line, headers, status) in table {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let request = format!("{line} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{line} {headers}: {answer}"
        );
        if status == "401" {
            assert!(
                answer.contains("Www-Authenticate: Bearer realm="),
                "{answer}"
            );
            assert!(answer.contains("application/problem+json"), "{answer}");
            assert!(!answer.contains(token), "{answer}");
        }
    }
    service.shutdown().request();
    serving.await.unwrap();
}

/// Reads server-sent events until there are `count`: what happened, in order.
async fn follow(served: &Served, query: &str, header: &str, count: usize) -> Vec<String> {
    let mut stream = served.connect().await;
    let request = format!("GET /api/v1/events{query} HTTP/1.1\r\nHost: x\r\n{header}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let mut piece = [0; 1024];
    while text.matches("event: ").count() < count {
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut piece));
        let length = read
            .await
            .unwrap_or_else(|_| panic!("silence after {text}"))
            .unwrap();
        assert_ne!(length, 0, "the stream ended after {text}");
        text += std::str::from_utf8(&piece[..length]).unwrap();
    }
    text.lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn events_resume_after_reconnect() {
    let service = service(Fake::default());
    let router = service.router();
    let served = Served::start(&service, service.router(), Bounds::default());
    for id in ["a", "b"] {
        expect(&router, &format!("PUT /api/v1/vms/{id}"), CONFIG, 201).await;
        expect(&router, &format!("PUT /api/v1/vms/{id}/boot"), "", 204).await;
    }
    assert_eq!(
        follow(&served, "?after=0", "", 4).await,
        ["created", "booted", "created", "booted"]
    );
    assert_eq!(
        follow(&served, "?after=0&vm=b", "", 2).await,
        ["created", "booted"]
    );
    assert_eq!(
        follow(&served, "", "Last-Event-ID: 3\r\n", 1).await,
        ["booted"]
    );
    // A client from before the service began again.
    assert_eq!(follow(&served, "?after=99", "", 4).await.len(), 4);
    // Events while a client follows.
    let later = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        expect(&router, "PUT /api/v1/vms/a/pause", "", 204).await;
    };
    let (seen, ()) = tokio::join!(follow(&served, "", "", 1), later);
    assert_eq!(seen, ["paused"]);
    // Too late for some.
    for _ in 0..600 {
        expect(&router, "PUT /api/v1/vms/a/resume", "", 204).await;
        expect(&router, "PUT /api/v1/vms/a/pause", "", 204).await;
    }
    assert_eq!(follow(&served, "?after=1", "", 1).await[0], "missed");
    for query in ["?after=x", "?before=1", "?vm=a%20b"] {
        assert_eq!(
            expect(&router, &format!("GET /api/v1/events{query}"), "", 400)
                .await
                .code(),
            "bad-query"
        );
    }
}
