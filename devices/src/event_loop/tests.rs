use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// Reports each call; panics or leaves on a command over its socket.
struct Echo {
    socket: UnixStream,
    reports: mpsc::Sender<String>,
    watching: bool,
}

impl Actor for Echo {
    fn woken(&mut self, sources: &mut Sources<'_>) -> Flow {
        if !self.watching {
            self.watching = true;
            sources
                .watch(self.socket.as_raw_fd(), 7, Interest::Read)
                .unwrap();
        }
        self.reports.send("woken".into()).unwrap();
        Flow::Stay
    }

    fn ready(&mut self, key: usize, _: &mut Sources<'_>) -> Flow {
        let mut byte = [0];
        self.socket.read_exact(&mut byte).unwrap();
        match byte[0] {
            b'!' => panic!("told to"),
            b'.' => Flow::Leave,
            other => {
                self.reports
                    .send(format!("{key}:{}", other as char))
                    .unwrap();
                Flow::Stay
            }
        }
    }

    fn crashed(&mut self, message: &str) {
        self.reports.send(format!("crashed: {message}")).unwrap();
    }
}

fn echo(on: &EventLoop) -> (UnixStream, mpsc::Receiver<String>, Waker) {
    let (near, far) = UnixStream::pair().unwrap();
    let (reports, heard) = mpsc::channel();
    let waker = on.handle().adopt(|waker| {
        (
            Echo {
                socket: far,
                reports,
                watching: false,
            },
            waker,
        )
    });
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), "woken");
    (near, heard, waker)
}

#[test]
fn actors_receive_wakes_and_events() {
    let on = EventLoop::start("test").unwrap();
    let (mut near, heard, waker) = echo(&on);
    near.write_all(b"a").unwrap();
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), "7:a");
    waker.wake();
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), "woken");
}

#[test]
fn a_panic_ends_one_actor_and_no_other() {
    let on = EventLoop::start("test").unwrap();
    let (mut first, first_heard, waker) = echo(&on);
    let (mut second, second_heard, _) = echo(&on);
    first.write_all(b"!").unwrap();
    assert_eq!(
        first_heard.recv_timeout(PATIENCE).unwrap(),
        "crashed: told to"
    );
    assert!(
        first_heard.recv_timeout(PATIENCE).is_err(),
        "its report channel is dropped"
    );
    waker.wake();
    second.write_all(b"b").unwrap();
    assert_eq!(second_heard.recv_timeout(PATIENCE).unwrap(), "7:b");
}

#[test]
fn ended_actors_are_dropped() {
    let on = EventLoop::start("test").unwrap();
    let (mut leaver, leaver_heard, _) = echo(&on);
    let (_near, stayer_heard, waker) = echo(&on);
    leaver.write_all(b".").unwrap();
    assert!(leaver_heard.recv_timeout(PATIENCE).is_err());
    drop(on);
    assert!(stayer_heard.try_recv().is_err());
    waker.wake();
}

/// Wakes itself whenever it is called, or asks to be called again.
struct Restless(Option<Waker>);

impl Actor for Restless {
    fn woken(&mut self, _: &mut Sources<'_>) -> Flow {
        match &self.0 {
            Some(waker) => waker.wake(),
            None => return Flow::Again,
        }
        Flow::Stay
    }

    fn ready(&mut self, _: usize, _: &mut Sources<'_>) -> Flow {
        Flow::Stay
    }

    fn crashed(&mut self, _: &str) {}
}

#[test]
fn busy_actor_does_not_starve_others() {
    let on = EventLoop::start("test").unwrap();
    let (mut near, heard, _) = echo(&on);
    let restless = |of: fn(Waker) -> Option<Waker>| {
        on.handle()
            .adopt(|waker| (Restless(of(waker.clone())), waker))
    };
    let (restless, again) = (restless(Some), restless(|_| None));
    for _ in 0..100 {
        near.write_all(b"a").unwrap();
        assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), "7:a");
    }
    restless.dismiss();
    again.dismiss();
}

/// Counts its calls, wakes another actor in each, and asks to be called again.
struct Busy {
    calls: Arc<AtomicU64>,
    other: Option<Waker>,
}

impl Actor for Busy {
    fn woken(&mut self, _: &mut Sources<'_>) -> Flow {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if let Some(other) = &self.other {
            other.wake();
        }
        Flow::Again
    }

    fn ready(&mut self, _: usize, _: &mut Sources<'_>) -> Flow {
        Flow::Stay
    }

    fn crashed(&mut self, _: &str) {}
}

#[test]
fn wakes_of_a_busy_actor_add_no_turns() {
    let on = EventLoop::start("test").unwrap();
    let busy = |other| {
        on.handle().adopt(|waker| {
            let calls = Arc::<AtomicU64>::default();
            let counted = Arc::clone(&calls);
            (Busy { calls, other }, (counted, waker))
        })
    };
    let (woken, waker) = busy(None);
    let (rounds, _) = busy(Some(waker));
    let reach = |count| {
        while rounds.load(Ordering::SeqCst) < count {
            std::thread::yield_now();
        }
    };
    // The first actor has turns before there is a second one.
    reach(1);
    let (rounds_before, woken_before) =
        (rounds.load(Ordering::SeqCst), woken.load(Ordering::SeqCst));
    reach(rounds_before + 1000);
    // A round has a turn of each, and one more for the wake.
    let woken = woken.load(Ordering::SeqCst) - woken_before;
    let rounds = rounds.load(Ordering::SeqCst) - rounds_before;
    assert!(woken <= 2 * rounds + 2, "{woken} calls in {rounds} rounds");
}

#[test]
fn dismissed_actor_gets_no_events() {
    let on = EventLoop::start("test").unwrap();
    let (mut near, heard, waker) = echo(&on);
    waker.dismiss();
    assert!(heard.recv_timeout(PATIENCE).is_err(), "it is dropped");
    assert!(near.write_all(b"a").is_err() || near.read(&mut [0]).is_ok_and(|len| len == 0));
    waker.dismiss();
}

/// Counts its calls, and sets its timer at the first.
struct Timed {
    calls: mpsc::Sender<Instant>,
    after: Option<Duration>,
}

impl Actor for Timed {
    fn woken(&mut self, sources: &mut Sources<'_>) -> Flow {
        sources.wake_at(self.after.take().map(|after| Instant::now() + after));
        self.calls.send(Instant::now()).unwrap();
        Flow::Stay
    }

    fn ready(&mut self, _: usize, _: &mut Sources<'_>) -> Flow {
        Flow::Stay
    }

    fn crashed(&mut self, _: &str) {}
}

#[test]
fn a_timer_expires_once_and_not_before_its_time() {
    const AFTER: Duration = Duration::from_millis(30);
    let on = EventLoop::start("test").unwrap();
    let (calls, called) = mpsc::channel();
    let after = Some(AFTER);
    on.handle().adopt(|_| (Timed { calls, after }, ()));
    let adopted = called.recv_timeout(PATIENCE).unwrap();
    let expired = called.recv_timeout(PATIENCE).unwrap();
    assert!(expired - adopted >= AFTER, "{:?}", expired - adopted);
    assert!(called.recv_timeout(2 * AFTER).is_err(), "it expires once");
}

#[test]
fn pending_wakes_merge() {
    let on = EventLoop::start("test").unwrap();
    let (calls, called) = mpsc::channel();
    let waker = on
        .handle()
        .adopt(|waker| (Timed { calls, after: None }, waker));
    called.recv_timeout(PATIENCE).unwrap();
    // Keeps the loop's thread while the other actor is woken over and over.
    let (go, held) = mpsc::channel::<()>();
    on.handle().adopt(|_| (Holder(held), ()));
    (0..10_000).for_each(|_| waker.wake());
    go.send(()).unwrap();
    called.recv_timeout(PATIENCE).unwrap();
    drop(on);
    assert!(
        called.try_iter().count() <= 1,
        "a wake before and one after the holder came"
    );
}

/// Waits, on the loop's thread, until the test lets it go.
struct Holder(mpsc::Receiver<()>);

impl Actor for Holder {
    fn woken(&mut self, _: &mut Sources<'_>) -> Flow {
        self.0.recv().unwrap();
        Flow::Leave
    }

    fn ready(&mut self, _: usize, _: &mut Sources<'_>) -> Flow {
        Flow::Stay
    }

    fn crashed(&mut self, _: &str) {}
}

/// Notes a violation whenever an actor's call sets [`REFUSED`] on the loop's thread.
#[derive(Debug)]
struct Notes;

thread_local! {
    static REFUSED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl crate::sandbox::Sandbox for Notes {
    fn enter(&self, kind: ThreadKind) -> io::Result<()> {
        match kind {
            ThreadKind::Devices => Ok(()),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    fn violation(&self) -> Option<Violation> {
        REFUSED.take().then(|| Violation {
            thread: "test".to_owned(),
            syscall: "ptrace (101)".to_owned(),
        })
    }
}

/// Makes a forbidden system call whenever it is woken.
struct Forbidden(mpsc::Sender<String>);

impl Actor for Forbidden {
    fn woken(&mut self, _: &mut Sources<'_>) -> Flow {
        REFUSED.set(true);
        Flow::Again
    }

    fn ready(&mut self, _: usize, _: &mut Sources<'_>) -> Flow {
        Flow::Stay
    }

    fn crashed(&mut self, message: &str) {
        self.0.send(message.to_owned()).unwrap();
    }
}

#[test]
fn violation_ends_only_its_actor() {
    let confinement = Confinement::new(&Notes);
    let on = EventLoop::start_confined("test", ThreadKind::Devices, confinement).unwrap();
    let (mut other, heard, _) = echo(&on);
    let (violations, received) = mpsc::channel();
    on.handle().adopt(|_| (Forbidden(violations), ()));
    let message = received.recv_timeout(PATIENCE).unwrap();
    assert!(
        message.contains("`test`") && message.contains("ptrace (101)"),
        "{message}"
    );
    // The actor is dropped, and with it its end of the channel.
    received.recv_timeout(PATIENCE).unwrap_err();
    other.write_all(b"x").unwrap();
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), "7:x");
}

#[test]
fn unconfined_thread_serves_nothing() {
    let confinement = Confinement::new(&Notes);
    let refused = EventLoop::start_confined("test", ThreadKind::Drivers, confinement);
    let refused = refused.map(|_| ()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
}
