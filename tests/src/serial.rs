//! A guest's output.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use guest::Line;

/// How often a file is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// A guest's serial port that goes to a file.
#[derive(Clone, Debug)]
pub struct Serial {
    path: PathBuf,
}

impl Serial {
    /// That goes to this file, which need not be there yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All that was printed so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.path).unwrap_or_default()).into_owned()
    }

    /// The pocket guest's lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        self.text().lines().filter_map(Line::parse).collect()
    }

    /// Waits until the text holds `needle` so many times, and returns the text.
    ///
    /// # Errors
    /// When it does not within `limit`; says what was printed.
    pub async fn wait_for(&self, needle: &str, times: usize, limit: Duration) -> Result<String> {
        let start = Instant::now();
        loop {
            let text = self.text();
            if text.matches(needle).count() >= times {
                return Ok(text);
            }
            if start.elapsed() > limit {
                bail!("no {needle:?} ({times} times) within {limit:?}; the guest printed:\n{text}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits for a line of the pocket guest.
    ///
    /// # Errors
    /// When it does not come within `limit`; says what was printed.
    pub async fn wait_for_line(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Line) -> bool,
    ) -> Result<Line> {
        let start = Instant::now();
        loop {
            if let Some(line) = self.lines().into_iter().find(|line| wanted(line)) {
                return Ok(line);
            }
            if start.elapsed() > limit {
                let text = self.text();
                bail!("no line {what} within {limit:?}; the guest printed:\n{text}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
