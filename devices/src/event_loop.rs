//! An epoll loop on a thread of its own that serves many actors.
//!
//! An [`Actor`] is whatever lives on the loop: a VM's driver, a queue of a device. It is called
//! when somebody woke it through its [`Waker`], and when a file descriptor that it registered
//! becomes ready. An actor never blocks for long: all others of the thread wait behind it. A panic
//! in an actor ends that actor (it is told through [`Actor::crashed`]) and nobody else.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Poll, Registry, Token};

/// Events taken from the kernel in one go.
const EVENTS_PER_POLL: usize = 64;
/// Commands that are obeyed before the kernel is asked for events again.
const COMMANDS_PER_ROUND: usize = 1024;
const WAKER: Token = Token(0);

/// What a descriptor is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// That there is something to read.
    Read,
    /// That there is room to write.
    Write,
    /// Either.
    Both,
}

impl From<Interest> for mio::Interest {
    fn from(interest: Interest) -> Self {
        match interest {
            Interest::Read => Self::READABLE,
            Interest::Write => Self::WRITABLE,
            Interest::Both => Self::READABLE | Self::WRITABLE,
        }
    }
}

/// Whether an actor stays on its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Keep the actor.
    Stay,
    /// The actor is done: drop it, with whatever it registered.
    Leave,
}

/// Something that lives on a pool thread.
pub trait Actor: Send {
    /// Its waker was used, or it has just been adopted by the loop.
    fn woken(&mut self, sources: &mut Sources<'_>) -> Flow;
    /// The descriptor that it registered as `key` is ready to be read.
    fn ready(&mut self, key: usize, sources: &mut Sources<'_>) -> Flow;
    /// It panicked, with this message, and is dropped next.
    fn crashed(&mut self, message: &str);
}

/// What an actor may do to the loop that it is called from: watch descriptors.
pub struct Sources<'a> {
    registry: &'a Registry,
    shared: &'a mut Tokens,
    actor: u64,
}

impl Sources<'_> {
    /// Watches `fd`; [`Actor::ready`] is called with `key` when it becomes ready (edge triggered:
    /// go on until it would block).
    ///
    /// The descriptor stays the actor's and must be given to [`Sources::forget`] before it is
    /// closed.
    ///
    /// # Errors
    /// When the host cannot watch it, as it is with a regular file.
    pub fn watch(&mut self, fd: RawFd, key: usize, interest: Interest) -> io::Result<()> {
        let token = self.shared.issue(self.actor, key, fd);
        self.registry
            .register(&mut SourceFd(&fd), token, interest.into())
            .inspect_err(|_| self.shared.withdraw(token))
    }

    /// Ends the watch on `fd`, if there is one.
    pub fn forget(&mut self, fd: RawFd) {
        if let Some(token) = self.shared.token_of(self.actor, fd) {
            self.shared.withdraw(token);
            // The descriptor may be closed already; then the kernel has forgotten it by itself.
            let _ = self.registry.deregister(&mut SourceFd(&fd));
        }
    }
}

/// Who registered which descriptor. Tokens are never reused, so that an event which was fetched
/// before its descriptor was forgotten finds nobody in place of somebody else.
#[derive(Default)]
struct Tokens {
    next: usize,
    by_token: HashMap<Token, (u64, usize, RawFd)>,
}

impl Tokens {
    fn issue(&mut self, actor: u64, key: usize, fd: RawFd) -> Token {
        self.next += 1;
        let token = Token(self.next);
        self.by_token.insert(token, (actor, key, fd));
        token
    }

    fn withdraw(&mut self, token: Token) {
        self.by_token.remove(&token);
    }

    fn token_of(&self, actor: u64, fd: RawFd) -> Option<Token> {
        let (token, _) = self
            .by_token
            .iter()
            .find(|(_, (a, _, f))| (*a, *f) == (actor, fd))?;
        Some(*token)
    }

    fn forget_actor(&mut self, actor: u64, registry: &Registry) {
        self.by_token.retain(|_, (owner, _, fd)| {
            if *owner == actor {
                let _ = registry.deregister(&mut SourceFd(fd));
            }
            *owner != actor
        });
    }
}

enum Command {
    Adopt(u64, Box<dyn Actor>),
    Wake(u64),
    Dismiss(u64),
    End,
}

/// Wakes one actor, from any thread; cheap to call when it is awake already.
#[derive(Clone)]
pub struct Waker {
    actor: u64,
    commands: Sender<Command>,
    loop_waker: Arc<mio::Waker>,
}

impl Waker {
    /// Has [`Actor::woken`] called, soon.
    pub fn wake(&self) {
        self.send(Command::Wake(self.actor));
    }

    /// Has the actor dropped, soon, with whatever it registered. If it is being called it ends
    /// that call first.
    pub fn dismiss(&self) {
        self.send(Command::Dismiss(self.actor));
    }

    fn send(&self, command: Command) {
        send(&self.commands, &self.loop_waker, command);
    }
}

/// Puts actors on a loop, from any thread.
#[derive(Clone)]
pub struct LoopHandle {
    commands: Sender<Command>,
    loop_waker: Arc<mio::Waker>,
    next_actor: Arc<AtomicU64>,
}

impl LoopHandle {
    /// Puts an actor on the loop. `make` gets the waker that the actor will hear. If the loop has
    /// ended the actor is dropped.
    pub fn adopt<A, R>(&self, make: impl FnOnce(Waker) -> (A, R)) -> R
    where
        A: Actor + 'static,
    {
        let actor = self.next_actor.fetch_add(1, Ordering::Relaxed);
        let waker = Waker {
            actor,
            commands: self.commands.clone(),
            loop_waker: Arc::clone(&self.loop_waker),
        };
        let (made, result) = make(waker);
        self.send(Command::Adopt(actor, Box::new(made)));
        result
    }

    fn send(&self, command: Command) {
        send(&self.commands, &self.loop_waker, command);
    }
}

/// A loop that has ended has no actors left that could miss this.
fn send(to: &Sender<Command>, loop_waker: &mio::Waker, command: Command) {
    if to.send(command).is_ok()
        && let Err(error) = loop_waker.wake()
    {
        tracing::error!(%error, "an event loop cannot be woken");
    }
}

/// A loop and its thread. Dropping it ends the thread with its actors.
pub struct EventLoop {
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a loop on a thread with this name.
    ///
    /// # Errors
    /// When the host gives no thread or no descriptors.
    pub fn start(name: &str) -> io::Result<Self> {
        let poll = Poll::new()?;
        let loop_waker = Arc::new(mio::Waker::new(poll.registry(), WAKER)?);
        let (commands, inbox) = channel();
        let running = Running {
            poll,
            inbox,
            actors: HashMap::new(),
            tokens: Tokens::default(),
        };
        let builder = std::thread::Builder::new().name(name.to_owned());
        let thread = builder.spawn(move || running.run())?;
        Ok(Self {
            handle: LoopHandle {
                commands,
                loop_waker,
                next_actor: Arc::default(),
            },
            thread: Some(thread),
        })
    }

    /// By which actors come to this loop.
    #[must_use]
    pub fn handle(&self) -> &LoopHandle {
        &self.handle
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.handle.send(Command::End);
        if let Some(thread) = self.thread.take() {
            // Actors' panics are caught on the thread; there is nothing left to report here.
            let _ = thread.join();
        }
    }
}

struct Running {
    poll: Poll,
    inbox: Receiver<Command>,
    actors: HashMap<u64, Box<dyn Actor>>,
    tokens: Tokens,
}

impl Running {
    fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS_PER_POLL);
        let mut commands = Vec::new();
        // There may be commands of which the loop's waker has told already.
        let mut left = false;
        loop {
            let wait = left.then_some(Duration::ZERO);
            match self.poll.poll(&mut events, wait) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "an event loop cannot wait for events and ends");
                    return;
                }
            }
            for event in &events {
                if event.token() == WAKER {
                    continue;
                }
                if let Some(&(actor, key, _)) = self.tokens.by_token.get(&event.token()) {
                    self.call(actor, |a, sources| a.ready(key, sources));
                }
            }
            // Those that are there now: an actor that wakes itself is called again when the kernel has
            // been asked for everybody's events. What comes from here on wakes the loop again.
            commands.extend(self.inbox.try_iter().take(COMMANDS_PER_ROUND));
            left = commands.len() == COMMANDS_PER_ROUND;
            for command in commands.drain(..) {
                match command {
                    Command::Adopt(id, actor) => {
                        self.actors.insert(id, actor);
                        self.call(id, |a, sources| a.woken(sources));
                    }
                    Command::Wake(id) => self.call(id, |a, sources| a.woken(sources)),
                    Command::Dismiss(id) => self.drop_actor(id),
                    Command::End => return,
                }
            }
        }
    }

    fn call(&mut self, id: u64, f: impl FnOnce(&mut dyn Actor, &mut Sources<'_>) -> Flow) {
        let Some(actor) = self.actors.get_mut(&id) else {
            return;
        };
        let mut sources = Sources {
            registry: self.poll.registry(),
            shared: &mut self.tokens,
            actor: id,
        };
        let flow = catch_unwind(AssertUnwindSafe(|| f(actor.as_mut(), &mut sources)))
            .unwrap_or_else(|panic| {
                let message = panic_message(panic.as_ref());
                tracing::error!(message, "an actor panicked");
                // A second panic while telling it would say nothing new.
                let _ = catch_unwind(AssertUnwindSafe(|| actor.crashed(message)));
                Flow::Leave
            });
        if flow == Flow::Leave {
            self.drop_actor(id);
        }
    }

    fn drop_actor(&mut self, id: u64) {
        self.tokens.forget_actor(id, self.poll.registry());
        let actor = self.actors.remove(&id);
        let _ = catch_unwind(AssertUnwindSafe(|| drop(actor)));
    }
}

/// The text of a panic, where it has one.
#[must_use]
pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Reports each call; panics or leaves when told so over its socket.
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
    fn actors_hear_their_wakers_and_their_descriptors() {
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
    fn an_actor_that_leaves_is_dropped_and_so_is_everything_when_the_loop_ends() {
        let on = EventLoop::start("test").unwrap();
        let (mut leaver, leaver_heard, _) = echo(&on);
        let (_near, stayer_heard, waker) = echo(&on);
        leaver.write_all(b".").unwrap();
        assert!(leaver_heard.recv_timeout(PATIENCE).is_err());
        drop(on);
        assert!(stayer_heard.try_recv().is_err());
        waker.wake();
    }

    /// Wakes itself whenever it is called.
    struct Restless(Waker);

    impl Actor for Restless {
        fn woken(&mut self, _: &mut Sources<'_>) -> Flow {
            self.0.wake();
            Flow::Stay
        }

        fn ready(&mut self, _: usize, _: &mut Sources<'_>) -> Flow {
            Flow::Stay
        }

        fn crashed(&mut self, _: &str) {}
    }

    #[test]
    fn an_actor_that_always_wants_its_turn_leaves_the_others_theirs() {
        let on = EventLoop::start("test").unwrap();
        let (mut near, heard, _) = echo(&on);
        let restless = on.handle().adopt(|waker| (Restless(waker.clone()), waker));
        for _ in 0..100 {
            near.write_all(b"a").unwrap();
            assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), "7:a");
        }
        restless.dismiss();
    }

    #[test]
    fn an_actor_that_is_dismissed_hears_no_more() {
        let on = EventLoop::start("test").unwrap();
        let (mut near, heard, waker) = echo(&on);
        waker.dismiss();
        assert!(heard.recv_timeout(PATIENCE).is_err(), "it is dropped");
        assert!(near.write_all(b"a").is_err() || near.read(&mut [0]).is_ok_and(|len| len == 0));
        waker.dismiss();
    }
}
