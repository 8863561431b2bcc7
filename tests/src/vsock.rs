//! Connections from the host to a guest's vsock ports.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::RUNS;

/// Sends 300 kB to a port on which the guest echoes, and checks what comes back.
///
/// # Errors
/// When nothing listens at the port within [`RUNS`], the connection is lost, or a byte differs.
pub async fn vsock_echo(socket: &Path, port: u32) -> Result<()> {
    let socket = socket.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut stream = connect(&socket, port)?;
        let data: Vec<u8> = (0..300_000_u32).map(|i| (i % 253) as u8).collect();
        stream.set_write_timeout(Some(RUNS))?;
        let mut reader = stream.try_clone()?;
        let mut back = vec![0; data.len()];
        // Written by another thread: the guest sends while it receives, and neither side has room for all.
        let echoed = thread::scope(|scope| -> Result<bool> {
            let writer = scope.spawn(|| stream.write_all(&data));
            reader.read_exact(&mut back)?;
            let written = writer.join();
            ensure!(
                matches!(written, Ok(Ok(()))),
                "writing to port {port}: {written:?}"
            );
            Ok(back == data)
        })?;
        ensure!(echoed, "port {port} did not echo what was sent");
        Ok(())
    })
    .await?
}

/// Sends a line to a port of the guest, and returns the connection with the line that comes back.
///
/// # Errors
/// When nothing listens at the port within [`RUNS`], or the connection is lost.
pub async fn vsock_ask(socket: &Path, port: u32) -> Result<(UnixStream, String)> {
    let socket = socket.to_owned();
    tokio::task::spawn_blocking(move || {
        let stream = connect(&socket, port)?;
        let answer = vsock_ask_again(&stream)?;
        Ok((stream, answer))
    })
    .await?
}

/// Sends a line on a connection, and returns the line that comes back.
///
/// # Errors
/// When the connection is lost.
pub fn vsock_ask_again(mut stream: &UnixStream) -> Result<String> {
    writeln!(stream, "who?")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}

/// Connects to a port of the guest, again and again until a program listens there.
fn connect(socket: &Path, port: u32) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(RUNS))?;
        writeln!(stream, "CONNECT {port}")?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while answer.last() != Some(&b'\n') && stream.read(&mut byte)? == 1 {
            answer.push(byte[0]);
        }
        if answer.starts_with(b"OK ") {
            return Ok(stream);
        }
        // A refused connection ends without an answer.
        ensure!(answer.is_empty() && start.elapsed() < RUNS, "{answer:?}");
        thread::sleep(Duration::from_millis(200));
    }
}
