//! `--event-monitor`: events in Cloud Hypervisor's form, written to a file, a FIFO or a descriptor.
//!
//! ```text
//!   EventLog ──► task ── bounded queue ──► thread "event-monitor" ──► reader
//!                  └─ full: dropped and counted
//! ```
//!
//! A reader that stalls blocks the thread, fills the queue, and then loses events. It never blocks
//! a VM, and takes a bounded amount of memory.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SyncSender, TrySendError, channel, sync_channel,
};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use control::EventLog;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::retry_on_intr;
use serde::Serialize;

use crate::inherited;

/// Events that wait for the reader. A life of a VM has about ten.
const WAITING_MAX: usize = 256;

/// How long the end of the program waits for a reader to take the last events.
const FLUSH: Duration = Duration::from_secs(1);

/// An event as Cloud Hypervisor writes it.
#[derive(Debug, PartialEq, Serialize)]
struct MonitorEvent {
    /// Since the program started.
    timestamp: Duration,
    source: &'static str,
    event: &'static str,
    properties: Option<BTreeMap<&'static str, String>>,
}

/// Returns the events of Cloud Hypervisor, as (source, event), that an event of ours stands for. Cloud
/// Hypervisor reports the beginning and the end of each action. Ours has a beginning only for an action
/// that takes long.
fn names(event: &str) -> &'static [(&'static str, &'static str)] {
    match event {
        "booted" => &[("vm", "booting"), ("vm", "booted")],
        "paused" => &[("vm", "pausing"), ("vm", "paused")],
        "resumed" => &[("vm", "resuming"), ("vm", "resumed")],
        "rebooted" => &[("vm", "rebooting"), ("vm", "rebooted")],
        "resize-requested" => &[("vm", "resizing")],
        "resized" => &[("vm", "resized")],
        "snapshotting" => &[("vm", "snapshotting")],
        "snapshotted" => &[("vm", "snapshotted")],
        "core-dumping" => &[("vm", "coredumping")],
        "core-dumped" => &[("vm", "coredumped")],
        "restoring" => &[("vm", "restoring")],
        "restored" => &[("vm", "restored")],
        "awaited" => &[("vm", "migration-receive-ready")],
        "arrived" => &[("vm", "migration-receive-finished")],
        "arrival-failed" => &[("vm", "migration-receive-failed")],
        "migrating" => &[("vm", "migration-starting")],
        "migrated" => &[("vm", "migration-finished"), ("vm", "deleted")],
        "migration-failed" => &[("vm", "migration-failed")],
        "shutdown" | "failed" => &[("vm", "shutdown")],
        "deleted" => &[("vm", "deleted")],
        "guest-panic" => &[("guest", "panic")],
        _ => &[],
    }
}

/// The writing end.
pub(crate) struct EventMonitor {
    start: Instant,
    waiting: SyncSender<MonitorEvent>,
    dropped: u64,
    /// The last event of the log that was reported.
    seen: u64,
    /// Ends when the thread has written all.
    done: Receiver<()>,
}

impl EventMonitor {
    /// Opens `path=PATH` or `fd=N` and reports `vmm:starting`. Never waits for a reader.
    ///
    /// # Errors
    /// When the text has another form, the file cannot be opened, or the host gives no thread.
    pub(crate) fn start(text: &str) -> Result<Self> {
        let file = match text.split_once('=') {
            Some(("path", path)) => open(path),
            Some(("fd", number)) => inherited::parse(number)
                .and_then(inherited::duplicate)
                .map(File::from),
            _ => bail!("--event-monitor {text}: give path=PATH or fd=N"),
        };
        Self::write_to(file.with_context(|| format!("--event-monitor {text}"))?)
    }

    fn write_to(file: File) -> Result<Self> {
        // Bounded: a reader that stalls costs memory for this many events and no more.
        let (waiting, inbox) = sync_channel(WAITING_MAX);
        let (finished, done) = channel();
        std::thread::Builder::new()
            .name("event-monitor".to_owned())
            .spawn(move || {
                if let Err(error) = write_all(&file, &inbox) {
                    tracing::warn!(%error, "the event monitor cannot be written to: it ends");
                }
                drop(finished);
            })
            .context("cannot start the thread of --event-monitor")?;
        let mut monitor = Self {
            start: Instant::now(),
            waiting,
            dropped: 0,
            seen: 0,
            done,
        };
        monitor.report("vmm", "starting");
        Ok(monitor)
    }

    fn report(&mut self, source: &'static str, event: &'static str) {
        self.report_with(source, event, BTreeMap::new());
    }

    fn report_with(
        &mut self,
        source: &'static str,
        event: &'static str,
        mut properties: BTreeMap<&'static str, String>,
    ) {
        // The next event that has room says how many had none.
        if self.dropped > 0 {
            properties.insert("dropped", self.dropped.to_string());
        }
        let event = MonitorEvent {
            timestamp: self.start.elapsed(),
            source,
            event,
            properties: Some(properties).filter(|properties| !properties.is_empty()),
        };
        match self.waiting.try_send(event) {
            Ok(()) => self.dropped = 0,
            Err(TrySendError::Full(_)) => {
                if self.dropped == 0 {
                    tracing::warn!("the reader of --event-monitor stalls: it loses events");
                }
                self.dropped = self.dropped.saturating_add(1);
            }
            // The thread has said why it ended.
            Err(TrySendError::Disconnected(_)) => {}
        }
    }

    /// Reports the events of `log` for as long as it is polled, and never ends.
    pub(crate) async fn follow(&mut self, log: &EventLog) -> std::convert::Infallible {
        loop {
            log.wait_after(self.seen).await;
            self.report_new(log);
        }
    }

    fn report_new(&mut self, log: &EventLog) {
        for event in log.after(self.seen, None).0 {
            self.seen = event.sequence;
            for (source, name) in names(&event.event) {
                // A panic's kind, as Cloud Hypervisor has it. Other events have none.
                let kind = event.detail.clone().filter(|_| *source == "guest");
                let kind = kind.map(|kind| ("event", kind));
                self.report_with(source, name, kind.into_iter().collect());
            }
        }
    }

    /// Reports what is left in `log` and the end of the program. Waits a second at most for a reader that
    /// stalls.
    pub(crate) fn finish(mut self, log: &EventLog) {
        self.report_new(log);
        self.report("vmm", "shutdown");
        // The thread's loop ends when the queue is empty. `done` then closes.
        drop(self.waiting);
        if self.done.recv_timeout(FLUSH) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the reader of --event-monitor did not take the last events");
        }
    }
}

/// Opens a file, or a FIFO without a reader. For reading as well: so the FIFO opens at once, in
/// whichever order reader and writer come, and a reader that leaves and returns is no error.
fn open(path: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    file.with_context(|| format!("cannot open {path}"))
}

fn write_all(file: &File, inbox: &Receiver<MonitorEvent>) -> io::Result<()> {
    for event in inbox {
        // libvirt looks for balanced braces; others read up to the empty line.
        let mut text = serde_json::to_string_pretty(&event)?;
        text.push_str("\n\n");
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match (&*file).write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // A signal ends the wait, whatever its handler asks for (signal(7)).
                    retry_on_intr(|| poll(&mut [PollFd::new(file, PollFlags::OUT)], None))?;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

    use super::*;

    fn pipe() -> (File, File) {
        let (read, write): (OwnedFd, OwnedFd) = rustix::pipe::pipe().unwrap();
        (read.into(), write.into())
    }

    /// The events in `text`, as `source:event`.
    fn parsed(text: &str) -> Vec<String> {
        let events = serde_json::Deserializer::from_str(text).into_iter::<serde_json::Value>();
        let name = |event: serde_json::Value| {
            assert!(event["timestamp"]["nanos"].is_u64() && event["timestamp"]["secs"].is_u64());
            assert!(event.get("properties").is_some());
            format!("{}:{}", event["source"], event["event"]).replace('"', "")
        };
        events.map(|event| name(event.unwrap())).collect()
    }

    #[test]
    fn life_of_a_vm_in_names_of_cloud_hypervisor() {
        let (mut read, write) = pipe();
        let (log, vm) = (EventLog::default(), spec::VmId::unique());
        let mut monitor = EventMonitor::write_to(write).unwrap();
        for event in ["created", "booted", "paused", "device-added"] {
            log.record(&vm, event, Some("a detail".to_owned()));
        }
        log.record(&vm, "guest-panic", Some("panic".to_owned()));
        log.record(&vm, "shutdown", None);
        monitor.report_new(&log);
        monitor.report_new(&log);
        log.record_last(&vm, "deleted", None);
        monitor.finish(&log);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        let expected = "vmm:starting vm:booting vm:booted vm:pausing vm:paused guest:panic \
                        vm:shutdown vm:deleted vmm:shutdown";
        assert_eq!(parsed(&text).join(" "), expected);
        assert!(text.ends_with("}\n\n"));
        let kind = "\"properties\": {\n    \"event\": \"panic\"\n  }";
        assert!(text.contains(kind) && !text.contains("a detail"), "{text}");
    }

    /// The names are those of Cloud Hypervisor's own page on its event monitor.
    #[test]
    fn snapshots_restores_and_migrations_have_events_of_their_own() {
        let (mut read, write) = pipe();
        let (log, vm) = (EventLog::default(), spec::VmId::unique());
        let mut monitor = EventMonitor::write_to(write).unwrap();
        for event in [
            "restoring",
            "restored",
            "resumed",
            "snapshotting",
            "snapshotted",
            "core-dumping",
            "core-dumped",
            "awaited",
            "arrival-failed",
            "arrived",
            "migrating",
            "migration-failed",
            "migrated",
        ] {
            log.record(&vm, event, None);
        }
        monitor.report_new(&log);
        monitor.finish(&EventLog::default());
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        let expected = "vmm:starting vm:restoring vm:restored vm:resuming vm:resumed vm:snapshotting \
                        vm:snapshotted vm:coredumping vm:coredumped vm:migration-receive-ready vm:migration-receive-failed \
                        vm:migration-receive-finished vm:migration-starting vm:migration-failed \
                        vm:migration-finished vm:deleted vmm:shutdown";
        assert_eq!(parsed(&text).join(" "), expected);
    }

    #[test]
    fn reader_that_stalls_loses_events_and_learns_how_many() {
        let (mut read, write) = pipe();
        let mut monitor = EventMonitor::write_to(write).unwrap();
        // The pipe's 64 KiB and the queue fill up. Coming to an end at all is half of the test.
        let lossy = (0..1_000_000).any(|_| {
            monitor.report("vm", "paused");
            monitor.dropped > 1000
        });
        assert!(lossy, "{}", monitor.dropped);
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            read.read_to_string(&mut text).unwrap();
            text
        });
        // The queue has room again once the reader has begun.
        let deadline = Instant::now() + Duration::from_secs(30);
        while monitor.dropped > 0 && Instant::now() < deadline {
            monitor.report("vm", "resumed");
            std::thread::yield_now();
        }
        monitor.finish(&EventLog::default());
        let text = reader.join().unwrap();
        let losses = text.matches("\"dropped\"").count();
        assert!(losses >= 1, "the loss is in the stream");
        assert!(parsed(&text).contains(&"vm:resumed".to_owned()));
    }

    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    /// The signals that end the program come while the last events wait for the reader.
    #[test]
    fn signals_do_not_end_the_writer() {
        let number = SIGRTMIN() + 4;
        register_signal_handler(number, ignore).unwrap();
        let (mut read, write) = pipe();
        rustix::io::ioctl_fionbio(&write, true).unwrap();
        let (events, inbox) = sync_channel(WAITING_MAX);
        // More than the 64 KiB that the pipe has room for.
        for _ in 0..32 {
            let properties = BTreeMap::from([("event", "x".repeat(4096))]);
            let event = MonitorEvent {
                timestamp: Duration::ZERO,
                source: "vm",
                event: "paused",
                properties: Some(properties),
            };
            events.send(event).unwrap();
        }
        drop(events);
        let writer = std::thread::spawn(move || write_all(&write, &inbox));
        for _ in 0..50 {
            writer.kill(number).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        writer.join().unwrap().unwrap();
        assert_eq!(parsed(&text).len(), 32);
    }

    #[test]
    fn fifo_opens_without_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let monitor = EventMonitor::start(&format!("path={}", path.display())).unwrap();
        let mut reader = File::open(&path).unwrap();
        monitor.finish(&EventLog::default());
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(parsed(&text), ["vmm:starting", "vmm:shutdown"]);
        for bad in ["/fifo", "fd=1048576", "path=/nothing/there", "fd=x"] {
            assert!(EventMonitor::start(bad).is_err(), "{bad}");
        }
    }
}
