//! Replays a file of `tests/consumers`.

mod script;
mod wire;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use guest::Options;
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::Value;
use tempfile::TempDir;
use tests::built;

use script::{Mark, Output, Request, Script, Step};
use wire::open_tap;

/// Long enough for a busy machine: nothing here is measured.
const SOON: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

/// A VMM, killed by its process id when dropped.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A consumer and its VMM, in a folder of their own.
pub(crate) struct Scene {
    script: Script,
    dir: TempDir,
    tap: String,
    tap_fd: File,
    /// The socket of a consumer that makes it.
    listener: UnixListener,
    vmm: Option<Vmm>,
    /// Body of the last request, which a step may repeat with changes.
    body: Value,
    events: Option<Receiver<Vec<u8>>>,
    event_text: Vec<u8>,
    /// Events that steps have waited for.
    events_seen: usize,
}

impl Scene {
    /// Reads a file.
    pub(crate) fn new(text: &str) -> Result<Self> {
        let script: Script = serde_json::from_str(text)?;
        let dir = TempDir::with_prefix("whimbrel-consumer.")?;
        fs::write(dir.path().join("pocket.elf"), guest::IMAGE)?;
        for disk in ["disk", "second-disk"] {
            File::create(dir.path().join(disk))?.set_len(1 << 20)?;
        }
        let listener = UnixListener::bind(dir.path().join("inherited.sock"))?;
        let tap_fd = open_tap()?;
        // The VMM inherits both, by number.
        fcntl_setfd(&listener, FdFlags::empty())?;
        fcntl_setfd(&tap_fd, FdFlags::empty())?;
        Ok(Self {
            script,
            dir,
            tap: wire::tap_name(),
            tap_fd,
            listener,
            vmm: None,
            body: Value::Null,
            events: None,
            event_text: Vec::new(),
            events_seen: 0,
        })
    }

    /// Replays all of it.
    pub(crate) fn replay(mut self) -> Result<()> {
        let consumer = format!("{}, {}", self.script.consumer, self.script.version);
        let start = std::mem::take(&mut self.script.start);
        let steps = std::mem::take(&mut self.script.steps);
        for (at, group) in start.iter().enumerate() {
            if let Some(mark) = group.mark()? {
                let with = start.iter().enumerate();
                let with = with.filter(|(other, group)| *other == at || group.later.is_none());
                let arguments: Vec<_> = with.flat_map(|(_, group)| &group.arguments).collect();
                self.is_refused(&arguments, &mark)
                    .with_context(|| format!("{consumer}: {:?}", group.arguments))?;
            }
        }
        let unmarked = start.iter().filter(|group| group.later.is_none());
        let arguments: Vec<_> = unmarked.flat_map(|group| &group.arguments).collect();
        self.start(&arguments)?;
        for (step, number) in steps.iter().zip(1..) {
            if let Step::Starts { .. } = step {
                self.start(&arguments)?;
                continue;
            }
            self.perform(step).with_context(|| {
                let log = fs::read_to_string(self.path("log")).unwrap_or_default();
                format!("{consumer}: step {number}, {step:?}; the VMM logged:\n{log}")
            })?;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Replaces the names in braces by what they stand for in this test.
    fn fill(&self, text: &str) -> String {
        let beating = Options {
            heartbeat_ms: Some(20),
            ..Options::default()
        };
        let path = |name| self.path(name).display().to_string();
        let mut filled = text.to_owned();
        for (name, value) in [
            ("{dir}", self.dir.path().display().to_string()),
            ("{kernel}", path("pocket.elf")),
            ("{disk}", path("disk")),
            ("{second-disk}", path("second-disk")),
            ("{guest}", beating.to_string()),
            ("{tap}", self.tap.clone()),
            ("{tap-fd}", self.tap_fd.as_raw_fd().to_string()),
            ("{socket-fd}", self.listener.as_raw_fd().to_string()),
        ] {
            filled = filled.replace(name, &value);
        }
        filled
    }

    fn fill_all(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.fill(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.fill_all(item)),
            Value::Object(fields) => fields.values_mut().for_each(|field| self.fill_all(field)),
            _ => {}
        }
    }

    /// The socket of the API.
    fn socket(&self) -> PathBuf {
        let inherits = self.script.inherits_socket;
        match &self.script.api {
            Some(path) => self.fill(path).into(),
            None if inherits => self.path("inherited.sock"),
            None => self.path("api.sock"),
        }
    }

    fn spawn(&self, arguments: &[&String], log: &str) -> Result<Vmm> {
        let child = Command::new(built("whimbrel")?)
            .arg0("cloud-hypervisor")
            .args(arguments.iter().map(|text| self.fill(text)))
            .stdin(Stdio::null())
            .stdout(File::create(self.path("output"))?)
            .stderr(File::create(self.path(log))?)
            .spawn()?;
        Ok(Vmm(child))
    }

    /// Starts the VMM and waits for its API.
    fn start(&mut self, arguments: &[&String]) -> Result<()> {
        if let Some(path) = self.script.events.clone() {
            let fifo = PathBuf::from(self.fill(&path));
            // A VMM that is started again gets the same.
            if !fifo.exists() {
                mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR)?;
            }
            (self.event_text, self.events_seen) = (Vec::new(), 0);
            // Opening waits for the VMM, as it does in the consumer.
            self.events = Some(read_all(move || File::open(fifo)));
        }
        self.vmm = Some(self.spawn(arguments, "log")?);
        let begun = Instant::now();
        while !matches!(self.exchange("GET", "vmm.ping", None, &[]), Ok((200, _))) {
            let ended = match &mut self.vmm {
                Some(vmm) => vmm.0.try_wait()?,
                None => None,
            };
            let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
            ensure!(ended.is_none(), "the VMM ended: {ended:?}:\n{}", log());
            ensure!(begun.elapsed() < SOON, "no API:\n{}", log());
            thread::sleep(LOOK);
        }
        // The API is there before a VM of the command line.
        let boots = arguments.iter().any(|argument| *argument == "--kernel");
        while boots && !self.is_running() {
            let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
            ensure!(begun.elapsed() < SOON, "the VM does not run:\n{}", log());
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn is_running(&self) -> bool {
        let info = self.exchange("GET", "vm.info", None, &[]);
        matches!(info, Ok((200, info)) if info.contains(r#""state":"Running""#))
    }

    /// Starts the VMM with an option that this version refuses.
    fn is_refused(&self, arguments: &[&String], mark: &Mark<'_>) -> Result<()> {
        let mut vmm = self.spawn(arguments, "refusal")?;
        let begun = Instant::now();
        loop {
            if let Some(status) = vmm.0.try_wait()? {
                let said = fs::read_to_string(self.path("refusal"))?;
                ensure!(!status.success(), "ended with success: {said}");
                return mark.check(&said);
            }
            // The API may answer before the VM on the command line is refused.
            if self.is_running() {
                return Err(mark.passes());
            }
            ensure!(begun.elapsed() < SOON, "neither refused nor started");
            thread::sleep(LOOK);
        }
    }

    fn perform(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Request(request) => self.request(request),
            Step::Prints(output) => self.prints(output),
            Step::Remote { remote } => {
                let link = self.path("ch-remote");
                std::os::unix::fs::symlink(built("wh-remote")?, &link)?;
                let output = Command::new(link)
                    .arg("--api-socket")
                    .arg(self.socket())
                    .args(remote)
                    .output()?;
                ensure!(output.status.success(), "{output:?}");
                Ok(())
            }
            Step::Event { event } => self.event(event),
            Step::Ends { .. } => self.ends(),
            Step::Starts { .. } => Ok(()),
        }
    }

    fn request(&mut self, request: &Request) -> Result<()> {
        let (method, name) = request.request.split_once(' ').context("METHOD PATH")?;
        let changes = request.again_with.as_ref();
        let mut body = match (&request.body, changes) {
            (Some(body), None) => body.clone(),
            (None, Some(_)) => self.body.clone(),
            (None, None) => Value::Null,
            (Some(_), Some(_)) => bail!("`body` and `again_with` exclude each other"),
        };
        for (pointer, value) in changes.into_iter().flatten() {
            let field = body.pointer_mut(pointer);
            *field.with_context(|| format!("the last body has no {pointer}"))? = value.clone();
        }
        self.body = body.clone();
        self.fill_all(&mut body);
        let text = (!body.is_null()).then(|| body.to_string());
        let taps = (0..request.descriptors).map(|_| open_tap());
        let taps = taps.collect::<Result<Vec<_>>>()?;
        let (status, answer) = self.exchange(method, name, text.as_deref(), &taps)?;
        let is_done = (200..300).contains(&status);
        if let Some(mark) = request.mark()? {
            ensure!(status != 0, "no answer");
            if is_done {
                return Err(mark.passes());
            }
            // Clients print the strings of this array.
            let strings: Vec<String> = serde_json::from_str(&answer)?;
            return mark.check(&strings.join(": "));
        }
        ensure!(is_done, "{status}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
        for (pointer, wanted) in &request.answer {
            let found = answer.pointer(pointer);
            ensure!(found == Some(wanted), "{pointer} is {found:?}");
        }
        if request.bdf {
            // Kata's runtimes read the device's number, and know no other bus or function.
            let bdf = answer["bdf"].as_str().unwrap_or_default();
            let device = bdf.strip_prefix("0000:00:");
            let device = device.and_then(|rest| rest.strip_suffix(".0"));
            let is_number = device.is_some_and(|text| u8::from_str_radix(text, 16).is_ok());
            ensure!(is_number, "bdf {bdf}");
        }
        Ok(())
    }

    fn exchange(
        &self,
        method: &str,
        name: &str,
        body: Option<&str>,
        descriptors: &[File],
    ) -> Result<(u16, String)> {
        wire::exchange(&self.socket(), method, name, body, descriptors)
    }

    /// Waits until the guest has printed a text.
    fn prints(&self, output: &Output) -> Result<()> {
        if let Some(path) = &output.file {
            let path = self.fill(path);
            let begun = Instant::now();
            loop {
                let text = fs::read(&path).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                if text.contains(&output.prints) {
                    return Ok(());
                }
                ensure!(begun.elapsed() < SOON, "printed only:\n{text}");
                thread::sleep(LOOK);
            }
        }
        let read = if let Some(path) = &output.socket {
            let stream = UnixStream::connect(self.fill(path))?;
            read_all(move || Ok(File::from(OwnedFd::from(stream))))
        } else {
            let pointer = output.pty.as_deref().context("file, socket or pty")?;
            let (_, info) = self.exchange("GET", "vm.info", None, &[])?;
            let info: Value = serde_json::from_str(&info)?;
            let path = info.pointer(pointer).and_then(Value::as_str);
            let path = path.context("no pseudo terminal")?.to_owned();
            read_all(move || File::open(path))
        };
        let (begun, mut seen) = (Instant::now(), Vec::new());
        while !String::from_utf8_lossy(&seen).contains(&output.prints) {
            let left = SOON.saturating_sub(begun.elapsed());
            let part = read.recv_timeout(left);
            seen.extend(part.with_context(|| String::from_utf8_lossy(&seen).into_owned())?);
        }
        Ok(())
    }

    /// Waits for the next event of a name: `vm:booted`.
    fn event(&mut self, wanted: &str) -> Result<()> {
        let events = self.events.as_ref().context("no `events`")?;
        let begun = Instant::now();
        loop {
            let stream = serde_json::Deserializer::from_slice(&self.event_text);
            let complete: Vec<Value> = stream.into_iter().map_while(Result::ok).collect();
            let name = |event: &Value| {
                let word = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
                format!("{}:{}", word("source"), word("event"))
            };
            let names: Vec<_> = complete.iter().map(name).collect();
            let mut new = names.iter().skip(self.events_seen);
            if let Some(at) = new.position(|name| name == wanted) {
                self.events_seen += at + 1;
                return Ok(());
            }
            let left = SOON.saturating_sub(begun.elapsed());
            let part = events.recv_timeout(left);
            self.event_text
                .extend(part.with_context(|| format!("there were {names:?}"))?);
        }
    }

    fn ends(&mut self) -> Result<()> {
        let vmm = self.vmm.as_mut().context("the VMM has not started")?;
        let begun = Instant::now();
        loop {
            if let Some(status) = vmm.0.try_wait()? {
                ensure!(status.success(), "{status}");
                return Ok(());
            }
            ensure!(begun.elapsed() < SOON, "the VMM does not end");
            thread::sleep(LOOK);
        }
    }
}

/// Reads a file on a thread of its own, piece by piece.
fn read_all(open: impl FnOnce() -> std::io::Result<File> + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let Ok(mut file) = open() else { return };
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = file.read(&mut buffer) {
            if sender.send(buffer[..len].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
