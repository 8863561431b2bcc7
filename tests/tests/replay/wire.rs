//! Requests as bytes, and taps.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

/// How long an answer may take, on a busy machine.
const ANSWER: Duration = Duration::from_secs(60);

/// Sends a request on a connection of its own, and returns the status and the body of the answer.
pub(crate) fn exchange(
    socket: &Path,
    method: &str,
    name: &str,
    body: Option<&str>,
    descriptors: &[File],
) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER))?;
    let mut request =
        format!("{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    if let Some(body) = body {
        let len = body.len();
        request +=
            &format!("Content-Type: application/json\r\nContent-Length: {len}\r\n\r\n{body}");
    } else {
        request += "\r\n";
    }
    if descriptors.is_empty() {
        stream.write_all(request.as_bytes())?;
    } else {
        let raw: Vec<_> = descriptors.iter().map(File::as_raw_fd).collect();
        let sent = stream.send_with_fds(&[request.as_bytes()], &raw)?;
        ensure!(sent == request.len(), "sent {sent} bytes");
    }
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        if let Some(parsed) = parse(&answer)? {
            return Ok(parsed);
        }
        let len = stream.read(&mut buffer)?;
        ensure!(
            len > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&answer)
        );
        answer.extend_from_slice(&buffer[..len]);
    }
}

/// Reads an answer, once it is complete.
fn parse(bytes: &[u8]) -> Result<Option<(u16, String)>> {
    let text = String::from_utf8_lossy(bytes);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return Ok(None);
    };
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    let mut headers = head.lines().filter_map(|line| line.split_once(": "));
    let length = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.map_or(Ok(0), |(_, length)| length.parse())?;
    Ok((body.len() >= length).then(|| (status, body.to_owned())))
}

/// Returns a name for a tap that no other test uses.
pub(crate) fn tap_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("wb{:x}n{number}", std::process::id())
}

/// Makes a tap of one queue and sends it over standard output: the request `TUNSETIFF` with the flags
/// `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`.
const OPEN_TAP: &str = "
import array, fcntl, os, socket, struct, sys
tap = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tap, 0x400454ca, struct.pack('16sH22x', sys.argv[1].encode(), 0x2 | 0x1000 | 0x4000))
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [tap]))]
socket.socket(fileno=1).sendmsg([b'x'], rights)
";

/// Opens a queue of a new tap. Another program makes it, since it takes an `ioctl` that no safe
/// library has.
pub(crate) fn open_tap() -> Result<File> {
    let (ours, theirs) = UnixStream::pair()?;
    let status = Command::new("python3")
        .args(["-c", OPEN_TAP, &tap_name()])
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .status()
        .context("python3 is needed")?;
    ensure!(status.success(), "cannot make a tap: {status}");
    let (_, tap) = ours.recv_with_fd(&mut [0])?;
    tap.context("no descriptor came")
}
