//! Clients that follow events: their slots are free as soon as they are gone.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::time::Duration;

use api::{Bounds, Listener, TcpAccess, serve_within};
use control::fake::Fake;
use harness::{CONFIG, Served, expect, service};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Less than the 15 s after which a comment line would find that a client is gone.
const PATIENCE: Duration = Duration::from_secs(10);

const FOLLOW: &[u8] = b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n";
const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// One connection at a time: who comes next waits for its slot.
fn bounds() -> Bounds {
    Bounds {
        connections: 1,
        ..Bounds::default()
    }
}

/// Sends a request and reads the beginning of its answer.
async fn begin<S>(stream: &mut S, request: &[u8])
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(request).await.unwrap();
    let mut answer = [0; 12];
    let read = tokio::time::timeout(PATIENCE, stream.read_exact(&mut answer));
    read.await.expect("no slot is free").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

#[tokio::test]
async fn a_follower_that_closes_its_unix_socket_frees_its_slot() {
    let service = service(Fake::default());
    let served = Served::start(&service, service.router(), bounds());
    for _ in 0..50 {
        begin(&mut served.connect().await, FOLLOW).await;
    }
    begin(&mut served.connect().await, PING).await;
}

#[tokio::test]
async fn a_follower_that_closes_its_tcp_socket_frees_its_slot() {
    let service = service(Fake::default());
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), TcpAccess::AnyLocalUser)
        .await
        .unwrap();
    let address = listener.place().replace("http://", "");
    let (router, shutdown) = (service.router(), service.shutdown().clone());
    let serving = tokio::spawn(serve_within(listener, router, shutdown, bounds()));
    for _ in 0..3 {
        begin(&mut TcpStream::connect(&address).await.unwrap(), FOLLOW).await;
    }
    begin(&mut TcpStream::connect(&address).await.unwrap(), PING).await;
    service.shutdown().request();
    serving.await.unwrap();
}

#[tokio::test]
async fn a_follower_that_ends_its_sending_side_keeps_its_stream() {
    let service = service(Fake::default());
    let served = Served::start(&service, service.router(), Bounds::default());
    let mut stream = served.connect().await;
    begin(&mut stream, FOLLOW).await;
    stream.shutdown().await.unwrap();
    expect(&service.router(), "PUT /api/v1/vms/vm", CONFIG, 201).await;
    let (mut seen, mut piece) = (String::new(), [0; 1024]);
    while !seen.contains("event: created") {
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut piece));
        let length = read.await.expect("no event comes").unwrap();
        assert_ne!(length, 0, "the stream ended after {seen}");
        seen += std::str::from_utf8(&piece[..length]).unwrap();
    }
    // And when it is gone, so is its slot.
    drop(stream);
    service.shutdown().request();
    served.serving.await.unwrap();
}
