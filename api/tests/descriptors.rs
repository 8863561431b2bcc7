//! Descriptors that come along with requests.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::fs::File;
use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use api::Bounds;
use control::fake::Fake;
use harness::{CONFIG, Served, expect, one_vm, read_for, service};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;

/// Cloud Hypervisor's face of a VM that runs.
async fn served() -> Served {
    let service = service(Fake::default());
    let router = one_vm(&service);
    expect(&router, "PUT /api/v1/vm.create", CONFIG, 204).await;
    expect(&router, "PUT /api/v1/vm.boot", "", 204).await;
    Served::start(&service, router, Bounds::default())
}

fn open(count: usize) -> Vec<OwnedFd> {
    let open = |_| File::open("/dev/null").unwrap().into();
    (0..count).map(open).collect()
}

/// Writes these bytes with these descriptors, in one message.
async fn send(stream: &UnixStream, bytes: &str, descriptors: &[OwnedFd]) {
    stream.writable().await.unwrap();
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    let pieces = [IoSlice::new(bytes.as_bytes())];
    let sent = sendmsg(stream, &pieces, &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

fn head(verb: &str, body: &str) -> String {
    let length = body.len();
    format!("PUT /api/v1/{verb} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n")
}

async fn status(stream: &mut UnixStream) -> (u16, String) {
    let answer = read_for(stream, Duration::from_millis(200)).await;
    let status = answer.strip_prefix("HTTP/1.1 ").map(|rest| &rest[..3]);
    (status.unwrap_or("0").parse().unwrap(), answer)
}

/// Whatever piece of the request they come with. A body that wants two is refused without two.
#[tokio::test]
async fn interface_receives_tap_descriptors() {
    let served = served().await;
    let body = r#"{"num_queues": 4, "fds": null}"#;
    let head = head("vm.add-net", body);
    let two = open(2);

    // As ch-remote does it: the beginning of the head has them.
    let mut stream = served.connect().await;
    let (first, rest) = head.split_once("Content-Length").unwrap();
    send(&stream, first, &two).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let rest = format!("Content-Length{rest}{body}");
    stream.write_all(rest.as_bytes()).await.unwrap();
    let (code, answer) = status(&mut stream).await;
    assert_eq!(code, 200, "{answer}");

    // All in one message, on the same connection.
    send(&stream, &format!("{head}{body}"), &two).await;
    let (code, answer) = status(&mut stream).await;
    assert_eq!(code, 200, "{answer}");

    // With the body.
    send(&stream, &head, &[]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    send(&stream, body, &two).await;
    let (code, answer) = status(&mut stream).await;
    assert_eq!(code, 200, "{answer}");

    // Those of one request are not the next one's, and the count is looked at.
    for count in [1, 3] {
        send(&stream, &format!("{head}{body}"), &open(count)).await;
        let (code, answer) = status(&mut stream).await;
        assert_eq!(code, 400, "{answer}");
        let told = format!("{count} were sent");
        assert!(answer.contains(&told), "{answer}");
    }
}

/// Unwanted descriptors are refused, and closed.
#[tokio::test]
async fn rejects_and_closes_unwanted_descriptors() {
    let served = served().await;
    let mut stream = served.connect().await;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let disk = r#"{"path": "/srv/web.raw"}"#;
    let request = format!("{}{disk}", head("vm.add-disk", disk));
    send(&stream, &request, &[writer.into()]).await;
    let (code, answer) = status(&mut stream).await;
    assert_eq!(code, 400, "{answer}");
    assert!(
        answer.contains("the request accepts no descriptors"),
        "{answer}"
    );
    // The last writer has gone: ours went into the message.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);

    // A request that has no body.
    let ping = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
    send(&stream, ping, &open(1)).await;
    assert_eq!(status(&mut stream).await.0, 200);
    let net = format!("{}{{}}", head("vm.add-net", "{}"));
    send(&stream, &net, &[]).await;
    let (code, answer) = status(&mut stream).await;
    assert_eq!(code, 200, "{answer}");

    // In a body they are numbers of another process.
    let numbers = r#"{"fds": [7]}"#;
    let request = format!("{}{numbers}", head("vm.add-net", numbers));
    send(&stream, &request, &[]).await;
    let (code, answer) = status(&mut stream).await;
    assert_eq!(code, 501, "{answer}");

    // More than any request takes.
    send(&stream, &net, &open(65)).await;
    let (code, answer) = status(&mut stream).await;
    assert_eq!(code, 0, "the connection ends: {answer}");
}

/// A request for a guest takes as many as `net_fds` says.
#[tokio::test]
async fn guests_receive_tap_descriptors() {
    let service = service(Fake::default());
    let router = one_vm(&service);
    let served = Served::start(&service, router, Bounds::default());
    let mut stream = served.connect().await;
    let restore = |nets: &str| {
        let body = format!(r#"{{"source_url": "file:///s", "net_fds": {nets}}}"#);
        format!("{}{body}", head("vm.restore", &body))
    };
    let receive = |nets: &str| {
        let body = format!(r#"{{"receiver_url": "unix:/s", "net_fds": {nets}}}"#);
        format!("{}{body}", head("vm.receive-migration", &body))
    };
    let three = r#"[{"id": "a", "num_fds": 2}, {"id": "b", "num_fds": 1, "fds": [9]}]"#;
    let too_many = r#"[{"id": "a", "num_fds": 18446744073709551615}, {"id": "b", "num_fds": 1}]"#;
    for (request, count, wanted) in [
        // The fake makes no guests.
        (restore(three), 3, (501, "cannot be moved")),
        (receive(three), 3, (501, "cannot be moved")),
        (restore("null"), 0, (501, "cannot be moved")),
        (restore("[]"), 1, (400, "asks for 0 descriptors")),
        (restore(three), 2, (400, "asks for 3 descriptors")),
        (receive(three), 4, (400, "asks for 3 descriptors")),
        (restore(too_many), 1, (400, "descriptors")),
    ] {
        send(&stream, &request, &open(count)).await;
        let (code, answer) = status(&mut stream).await;
        assert_eq!(code, wanted.0, "{request}: {answer}");
        assert!(answer.contains(wanted.1), "{request}: {answer}");
    }
}
