//! A shell in a guest, over its serial port.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The mark at the end of a command's output. The command contains it in two parts, so its echo does not
/// match.
const END: &str = "END-OF-COMMAND";

/// A login on a serial port that is a unix socket.
#[derive(Debug)]
pub struct Shell {
    stream: UnixStream,
    /// Output that was not consumed yet.
    seen: String,
}

impl Shell {
    /// Waits for the prompt of a guest whose `root` has no password, and logs in.
    ///
    /// # Errors
    /// When there is none within `limit`; says what the guest printed.
    pub async fn login(socket: &Path, limit: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .await
            .with_context(|| format!("connect to {}", socket.display()))?;
        let mut shell = Self {
            stream,
            seen: String::new(),
        };
        shell.login_again(limit).await?;
        Ok(shell)
    }

    /// Waits for the prompt of a guest that reboots, and logs in.
    ///
    /// # Errors
    /// The same as those of [`Shell::login`].
    pub async fn login_again(&mut self, limit: Duration) -> Result<()> {
        self.until("login: ", limit).await?;
        self.type_in("root\n").await?;
        self.until("# ", limit).await?;
        // What is typed is not shown, nor anything for the eye.
        self.type_in("stty -echo; PS1= exec sh\n").await?;
        self.run("true", limit).await?;
        Ok(())
    }

    /// Attaches to the shell of a migrated guest, at its port here.
    ///
    /// # Errors
    /// The shell does not answer within `limit`.
    pub async fn attach(socket: &Path, limit: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .await
            .with_context(|| format!("connect to {}", socket.display()))?;
        let mut shell = Self {
            stream,
            seen: String::new(),
        };
        shell.run("true", limit).await?;
        Ok(shell)
    }

    /// Waits for a guest that boots to print `ready`, after which it has a shell without a login.
    ///
    /// # Errors
    /// When there is no shell within `limit`; says what the guest printed.
    pub async fn after(socket: &Path, ready: &str, limit: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .await
            .with_context(|| format!("connect to {}", socket.display()))?;
        let mut shell = Self {
            stream,
            seen: String::new(),
        };
        shell.until(ready, limit).await?;
        // The prompt.
        shell.until("# ", limit).await?;
        shell.type_in("stty -echo; PS1= exec sh\n").await?;
        shell.run("true", limit).await?;
        Ok(shell)
    }

    /// Runs a command, and gives what it printed.
    ///
    /// # Errors
    /// When it fails, or does not end within `limit`; says what it printed.
    pub async fn run(&mut self, command: &str, limit: Duration) -> Result<String> {
        let (first, last) = END.split_at(3);
        let line = format!("{command}\necho \"{first}\"\"{last} $?\"\n");
        self.type_in(&line).await?;
        let printed = self.until(END, limit).await?;
        let status = self.until("\n", limit).await?;
        if status.trim() != "0" {
            bail!("`{command}` ended with {}: {printed}", status.trim());
        }
        Ok(printed.replace('\r', "").trim().to_owned())
    }

    /// Types, and waits for nothing.
    ///
    /// # Errors
    /// When the port is gone.
    pub async fn type_in(&mut self, text: &str) -> Result<()> {
        Ok(self.stream.write_all(text.as_bytes()).await?)
    }

    /// Returns the output before `needle`.
    ///
    /// # Errors
    /// `needle` does not come within `limit`; the error has the output so far.
    pub async fn until(&mut self, needle: &str, limit: Duration) -> Result<String> {
        let start = Instant::now();
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(needle) {
                let rest = self.seen.split_off(at + needle.len());
                let mut before = std::mem::replace(&mut self.seen, rest);
                before.truncate(at);
                return Ok(before);
            }
            let left = limit.saturating_sub(start.elapsed());
            match timeout(left, self.stream.read(&mut buffer)).await {
                Ok(Ok(0)) => bail!("the guest's port is closed; it printed:\n{}", self.seen),
                Ok(read) => self.seen += &String::from_utf8_lossy(&buffer[..read?]),
                Err(_) => bail!(
                    "no {needle:?} within {limit:?}; the guest printed:\n{}",
                    self.seen
                ),
            }
        }
    }
}
