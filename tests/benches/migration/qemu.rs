//! QEMU beside us, through QMP.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use guest::Line;
use serde_json::{Value, json};
use spec::MemoryMode;
use tempfile::TempDir;

use crate::curves::{BANDWIDTH, Points};
use crate::terminal::Terminal;
use crate::{Case, MIB, PATIENCE, SETTLE, Seen, config, warm_memory};

const PROGRAM: &str = "qemu-system-x86_64";

/// Its version, if it is installed.
pub(crate) fn version() -> Option<String> {
    let told = Command::new(PROGRAM).arg("--version").output().ok()?;
    let told = String::from_utf8(told.stdout).ok()?;
    Some(told.lines().next()?.to_owned())
}

struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
}

impl Qemu {
    /// With the guest that we are measured with; `incoming` waits for one.
    fn start(case: Case, dir: &Path, name: &str, incoming: bool) -> Result<Self> {
        let kernel = dir.join("pocket");
        let cmdline = config(case, &kernel).payload.cmdline.unwrap_or_default();
        let socket = dir.join(name);
        let mut command = Command::new(PROGRAM);
        command
            .args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"])
            .args(["-M", "microvm,pit=on,pic=on,rtc=on,isa-serial=on"])
            .args(["-m", &(case.memory / MIB).to_string()])
            .args(["-smp", &case.vcpus.to_string()])
            .arg("-kernel")
            .arg(&kernel)
            .args(["-append", &cmdline])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-chardev", "pty,id=port", "-serial", "chardev:port"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    let ended = child.try_wait()?;
                    ensure!(
                        ended.is_none() && start.elapsed() < PATIENCE,
                        "{ended:?}: {error}"
                    );
                    thread::sleep(Duration::from_millis(2));
                }
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qemu = Self {
            child,
            qmp: BufReader::new(stream),
        };
        qemu.recv()?;
        qemu.ask("qmp_capabilities", &json!({}))?;
        if !matches!(case.mode, MemoryMode::Precopy) {
            let capability = json!({ "capability": "postcopy-ram", "state": true });
            let capabilities = json!({ "capabilities": [capability] });
            qemu.ask("migrate-set-capabilities", &capabilities)?;
        }
        Ok(qemu)
    }

    fn recv(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.qmp.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// The answer to a command; events in between are passed over.
    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let asked = json!({ "execute": command, "arguments": arguments });
        writeln!(self.qmp.get_mut(), "{asked}")?;
        loop {
            let mut heard = self.recv()?;
            if let Some(error) = heard.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(answer) = heard.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    fn terminal(&mut self) -> Result<Terminal> {
        let all = self.ask("query-chardev", &json!({}))?;
        let all = all.as_array().context("no chardevs")?;
        let mut names = all.iter().filter(|one| one["label"] == "port");
        let name = names.next().and_then(|one| one["filename"].as_str());
        let path = name.and_then(|name| name.strip_prefix("pty:"));
        Terminal::open(path.context("no terminal")?)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The gap that a guest of it sees, and the stop that it says it was: from the guest's end at the source
/// until all is sent. Its guest's TSC stands meanwhile, so that the guest sees less.
pub(crate) fn moves(case: Case, times: usize) -> Result<Vec<Seen>> {
    (0..times).map(|_| one(case, 0, &mut |_, _| {})).collect()
}

/// The bytes that are left over time, under the bandwidth of the curves.
pub(crate) fn curve(case: Case) -> Result<Points> {
    let mut points = Points::new();
    let mut watch = |at, info: &Value| {
        let left = info["ram"]["remaining"].as_u64();
        points.push((at, left.unwrap_or(case.memory)));
    };
    one(case, BANDWIDTH, &mut watch)?;
    Ok(points)
}

/// Moves one guest. `watch` gets the time since the start, and QEMU's report.
fn one(case: Case, bandwidth: u64, watch: &mut dyn FnMut(Duration, &Value)) -> Result<Seen> {
    let warm = warm_memory()?;
    let dir = TempDir::with_prefix("whimbrel-qemu.")?;
    std::fs::write(dir.path().join("pocket"), guest::IMAGE)?;
    let mut from = Qemu::start(case, dir.path(), "from", false)?;
    let mut to = Qemu::start(case, dir.path(), "to", true)?;
    let mut terminal = from.terminal()?;
    terminal.until(|line| matches!(line, Line::Heartbeat { .. }))?;
    thread::sleep(SETTLE);
    terminal.gap()?;
    // A port of our own, which the kernel has just given away.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let uri = json!({ "uri": format!("tcp:127.0.0.1:{port}") });
    to.ask("migrate-incoming", &uri)?;
    // As much downtime as we are granted. A bandwidth of 0 is no limit.
    let policy = json!({ "downtime-limit": 20, "max-bandwidth": bandwidth });
    from.ask("migrate-set-parameters", &policy)?;
    drop(warm);
    let (start, mut is_asked) = (Instant::now(), matches!(case.mode, MemoryMode::Precopy));
    from.ask("migrate", &uri)?;
    let done = loop {
        let info = from.ask("query-migrate", &json!({}))?;
        watch(start.elapsed(), &info);
        let status = info["status"].as_str().unwrap_or_default().to_owned();
        let rounds = info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        let wanted = if matches!(case.mode, MemoryMode::Hybrid) {
            2
        } else {
            0
        };
        match status.as_str() {
            "completed" => break info,
            "failed" | "cancelled" => bail!("{info}"),
            "active" if !is_asked && rounds >= wanted => {
                from.ask("migrate-start-postcopy", &json!({}))?;
                is_asked = true;
            }
            _ => {}
        }
        // As our table's: what takes too long may stop for as long as it takes.
        if start.elapsed() > Duration::from_secs(20) {
            let policy = json!({ "downtime-limit": 2000 });
            from.ask("migrate-set-parameters", &policy)?;
        }
        ensure!(start.elapsed() < PATIENCE, "{info}");
        thread::sleep(Duration::from_millis(5));
    };
    // Its own total ends when all is sent, which may be in the sockets' buffers still.
    let runs_there = loop {
        let state = to.ask("query-status", &json!({}))?;
        if state["running"] == json!(true) {
            break start.elapsed();
        }
        ensure!(start.elapsed() < PATIENCE, "{state}");
        thread::sleep(Duration::from_millis(1));
    };
    // In postcopy QEMU has reported a downtime of weeks: ignore such values.
    let told = |what: &str| done[what].as_u64().filter(|ms| *ms < 1 << 22);
    let us = |what: &str| told(what).unwrap_or(0) * 1000;
    Ok(Seen {
        gap: to.terminal()?.gap()?,
        stop: us("downtime"),
        total: us("total-time"),
        runs_there: u64::try_from(runs_there.as_micros())?,
        ..Seen::default()
    })
}
