//! The guest's output on a pseudo terminal.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write as _};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use guest::Line;
use openapi::Client;
use spec::VmId;

use crate::PATIENCE;

/// A guest's pseudo terminal.
pub(crate) struct Terminal {
    terminal: File,
    lines: Receiver<String>,
}

impl Terminal {
    pub(crate) fn open(path: &str) -> Result<Self> {
        let terminal = OpenOptions::new().read(true).write(true).open(path)?;
        let reader = BufReader::new(terminal.try_clone()?);
        let (sender, lines) = channel();
        // It ends with the terminal.
        thread::spawn(move || {
            let mut lines = reader.lines().map_while(std::io::Result::ok);
            lines.try_for_each(|line| sender.send(line))
        });
        Ok(Self { terminal, lines })
    }

    pub(crate) async fn of(client: &Client, vm: &VmId) -> Result<Self> {
        let port = client.vms_info(vm).await?.config.serial.file;
        Self::open(&port.context("no terminal")?)
    }

    pub(crate) fn until(&self, wanted: impl Fn(&Line) -> bool) -> Result<Line> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let text = self
                .lines
                .recv_timeout(left)
                .context("the guest is silent")?;
            match Line::parse(&text) {
                Some(line) if wanted(&line) => return Ok(line),
                _ => {}
            }
        }
    }

    pub(crate) fn ask(&mut self, command: guest::Command) -> Result<()> {
        Ok(writeln!(self.terminal, "{command}")?)
    }

    /// The longest gap since it was asked the last time.
    pub(crate) fn gap(&mut self) -> Result<u64> {
        self.ask(guest::Command::Report)?;
        match self.until(|line| matches!(line, Line::Report { .. }))? {
            Line::Report { gap_us, .. } => Ok(gap_us),
            _ => bail!("it was waited for"),
        }
    }
}
