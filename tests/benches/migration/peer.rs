//! A program with Cloud Hypervisor's command line and API, beside us.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use guest::Line;
use openapi::Client;
use spec::{MemoryMode, ReceiveMigrationData, SendMigrationData};
use tempfile::TempDir;

use crate::curves::Points;
use crate::terminal::Terminal;
use crate::{Case, PATIENCE, SETTLE, Seen, config, warm_memory};

/// A program that serves one VM. It ends with what it was started for.
struct Peer {
    child: Child,
    client: Client,
}

impl Peer {
    async fn start(program: &Path, dir: &Path, name: &str) -> Result<Self> {
        let socket = dir.join(name);
        let child = Command::new(program)
            .arg("--api-socket")
            .arg(&socket)
            .stderr(Stdio::null())
            .spawn()?;
        let client = Client::unix(&socket).with_timeout(PATIENCE);
        let peer = Self { child, client };
        let start = Instant::now();
        while peer.client.ping().await.is_err() {
            ensure!(
                start.elapsed() < PATIENCE,
                "{} does not answer",
                program.display()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(peer)
    }
}

impl Peer {
    async fn terminal(&self) -> Result<Terminal> {
        let port = self.client.vm_info().await?.config.serial.file;
        Terminal::open(&port.context("no terminal")?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The gap that a guest of another program sees.
pub(crate) async fn moves(program: &Path, case: Case, times: usize) -> Result<Vec<Seen>> {
    let mut all = Vec::new();
    for _ in 0..times {
        all.push(one(program, case).await?.0);
    }
    Ok(all)
}

/// The bytes that are left over time, as far as the program tells.
pub(crate) async fn curve(program: &Path, case: Case) -> Result<Points> {
    Ok(one(program, case).await?.1)
}

async fn one(program: &Path, case: Case) -> Result<(Seen, Points)> {
    let warm = warm_memory()?;
    let dir = TempDir::with_prefix("whimbrel-peer.")?;
    let kernel = dir.path().join("pocket");
    std::fs::write(&kernel, guest::IMAGE)?;
    let from = Peer::start(program, dir.path(), "from").await?;
    let to = Peer::start(program, dir.path(), "to").await?;
    from.client.vm_create(&config(case, &kernel)).await?;
    from.client.vm_boot().await?;
    let mut terminal = from.terminal().await?;
    terminal.until(|line| matches!(line, Line::Heartbeat { .. }))?;
    tokio::time::sleep(SETTLE).await;
    terminal.gap()?;
    // A port of our own, which the kernel has just given away.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let url = format!("tcp:127.0.0.1:{port}");
    let mode = match case.mode {
        MemoryMode::Postcopy => "Postcopy",
        _ => "Precopy",
    };
    let body = serde_json::json!({ "receiver_url": url, "memory_mode": mode });
    let body: ReceiveMigrationData = serde_json::from_value(body)?;
    drop(warm);
    let start = Instant::now();
    let receiving = to.client.vm_receive_migration(&body);
    let sending = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let body = serde_json::json!({
            "destination_url": url, "downtime_ms": 20, "timeout_s": 20, "timeout_strategy": "Ignore",
            "memory_mode": mode,
        });
        let body: SendMigrationData = serde_json::from_value(body)?;
        Ok(from
            .client
            .clone()
            .waiting(Duration::from_secs(60))
            .vm_send_migration(&body)
            .await?)
    };
    let moved = async { tokio::join!(receiving, sending) };
    tokio::pin!(moved);
    let mut points = Points::new();
    let (received, sent): (_, Result<()>) = loop {
        tokio::select! {
            both = &mut moved => break both,
            () = tokio::time::sleep(Duration::from_millis(4)) => {}
        }
        // Only versions that answer at once have a progress. It is not there before they begin.
        if let Ok(progress) = from.client.vm_migration_progress().await {
            let left = progress
                .memory_transmission_info
                .memory_bytes_remaining_iteration;
            points.push((start.elapsed(), left));
        }
    };
    received?;
    sent?;
    let seen = Seen {
        gap: to.terminal().await?.gap()?,
        total: u64::try_from(start.elapsed().as_micros())?,
        ..Seen::default()
    };
    Ok((seen, points))
}
