//! An epoll loop on a thread of its own that serves many actors.
//!
//! An [`Actor`] is whatever lives on the loop: a VM's driver, a queue of a device. The loop calls an
//! actor when its [`Waker`] was used, when a file descriptor that it registered becomes ready, and
//! when its timer expires. An actor never blocks for long: all others of the thread wait behind it.
//! A panic in an actor ends that actor ([`Actor::crashed`] is called) and no other.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Poll, Registry, Token};

use crate::sandbox::{Confinement, ThreadKind, Violation};

/// Events taken from the kernel in one go.
const EVENTS_PER_POLL: usize = 64;
/// Commands that are obeyed before the kernel is asked for events again.
const COMMANDS_PER_ROUND: usize = 1024;
const WAKER: Token = Token(0);

/// The readiness for which a descriptor is watched.
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
    /// Keep the actor, and call [`Actor::woken`] again once the others had their turn.
    Again,
    /// The actor is done: drop it, with whatever it registered.
    Leave,
}

/// Something that lives on a pool thread.
pub trait Actor: Send {
    /// Its waker was used, its timer expired, or the loop has just adopted it.
    fn woken(&mut self, sources: &mut Sources<'_>) -> Flow;
    /// The descriptor that it registered as `key` is ready to be read.
    fn ready(&mut self, key: usize, sources: &mut Sources<'_>) -> Flow;
    /// Called after the actor panicked with this message. The actor is dropped next.
    fn crashed(&mut self, message: &str);
    /// The sandbox refused a system call that the actor made, and the actor is dropped next.
    fn violated(&mut self, violation: &Violation) {
        self.crashed(&violation.to_string());
    }
}

/// The loop as its actors see it: they watch descriptors and set their timer.
pub struct Sources<'a> {
    registry: &'a Registry,
    shared: &'a mut Tokens,
    timers: &'a mut HashMap<u64, Instant>,
    actor: u64,
}

impl Sources<'_> {
    /// Watches `fd`; [`Actor::ready`] is called with `key` when it becomes ready (edge triggered:
    /// read or write until that would block).
    ///
    /// The descriptor stays the actor's and must be given to [`Sources::forget`] before it is
    /// closed.
    ///
    /// # Errors
    /// Fails if the host cannot watch it, as it is with a regular file.
    pub fn watch(&mut self, fd: RawFd, key: usize, interest: Interest) -> io::Result<()> {
        // The token is known before the kernel may report it, and withdrawn if the kernel refuses.
        let token = self.shared.issue(self.actor, key, fd);
        self.registry
            .register(&mut SourceFd(&fd), token, interest.into())
            .inspect_err(|_| {
                self.shared.withdraw(self.actor, fd);
            })
    }

    /// Sets the actor's only timer: [`Actor::woken`] is called at `when` or soon after it. `None`
    /// stops the timer.
    pub fn wake_at(&mut self, when: Option<Instant>) {
        match when {
            Some(when) => self.timers.insert(self.actor, when),
            None => self.timers.remove(&self.actor),
        };
    }

    /// Ends the watch on `fd`, if there is one.
    pub fn forget(&mut self, fd: RawFd) {
        if self.shared.withdraw(self.actor, fd).is_some() {
            // The descriptor may be closed already; then the kernel has forgotten it by itself.
            let _ = self.registry.deregister(&mut SourceFd(&fd));
        }
    }
}

/// Owners of the registered descriptors. Tokens are never reused, so an event that was fetched
/// before its descriptor was removed finds no actor instead of a wrong one.
#[derive(Default)]
struct Tokens {
    next: usize,
    by_token: HashMap<Token, (u64, usize)>,
    /// Descriptors of each actor, which are few. A machine that stops dismisses hundreds of actors, and
    /// must not look through the descriptors of all for each.
    by_actor: HashMap<u64, Vec<(RawFd, Token)>>,
}

impl Tokens {
    fn issue(&mut self, actor: u64, key: usize, fd: RawFd) -> Token {
        self.next += 1;
        let token = Token(self.next);
        self.by_token.insert(token, (actor, key));
        self.by_actor.entry(actor).or_default().push((fd, token));
        token
    }

    /// Removes what was issued for this descriptor of the actor, if anything was.
    fn withdraw(&mut self, actor: u64, fd: RawFd) -> Option<Token> {
        let own = self.by_actor.get_mut(&actor)?;
        let at = own.iter().position(|(watched, _)| *watched == fd)?;
        let (_, token) = own.swap_remove(at);
        self.by_token.remove(&token);
        Some(token)
    }

    fn forget_actor(&mut self, actor: u64, registry: &Registry) {
        for (fd, token) in self.by_actor.remove(&actor).unwrap_or_default() {
            self.by_token.remove(&token);
            // The descriptor may be closed already; then the kernel has forgotten it by itself.
            let _ = registry.deregister(&mut SourceFd(&fd));
        }
    }
}

enum Command {
    Adopt(u64, Adopted),
    Wake(u64),
    Dismiss(u64),
    End,
}

/// An actor, and whether a command to wake it is under way.
struct Adopted {
    actor: Box<dyn Actor>,
    waking: Arc<AtomicBool>,
    /// The span in which the actor was adopted: its log lines belong to the same VM.
    span: tracing::Span,
}

/// Wakes one actor, from any thread. Wakes that the actor has not seen yet are one: however often a
/// guest causes one, at most one command of an actor is in the loop's queue.
#[derive(Clone)]
pub struct Waker {
    actor: u64,
    waking: Arc<AtomicBool>,
    commands: Sender<Command>,
    loop_waker: Arc<LoopWaker>,
}

impl Waker {
    /// Has [`Actor::woken`] called, soon.
    pub fn wake(&self) {
        if !self.waking.swap(true, Ordering::AcqRel) {
            self.send(Command::Wake(self.actor));
        }
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
    loop_waker: Arc<LoopWaker>,
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
        let waking = Arc::new(AtomicBool::new(false));
        let waker = Waker {
            actor,
            waking: Arc::clone(&waking),
            commands: self.commands.clone(),
            loop_waker: Arc::clone(&self.loop_waker),
        };
        let (made, result) = make(waker);
        let adopted = Adopted {
            actor: Box::new(made),
            waking,
            span: tracing::Span::current(),
        };
        self.send(Command::Adopt(actor, adopted));
        result
    }

    fn send(&self, command: Command) {
        send(&self.commands, &self.loop_waker, command);
    }
}

/// A loop that has ended has no actors left that could miss this.
fn send(to: &Sender<Command>, loop_waker: &LoopWaker, command: Command) {
    if to.send(command).is_ok() {
        loop_waker.wake();
    }
}

/// Wakes a loop from its wait for events. One wake stands for all commands that are sent until the loop
/// takes them: a machine that stops dismisses hundreds of queues in a row.
struct LoopWaker {
    waker: mio::Waker,
    is_woken: AtomicBool,
}

impl LoopWaker {
    /// Called behind the sending of a command.
    fn wake(&self) {
        if !self.is_woken.swap(true, Ordering::AcqRel)
            && let Err(error) = self.waker.wake()
        {
            self.is_woken.store(false, Ordering::Release);
            tracing::error!(%error, "cannot wake an event loop");
        }
    }

    /// Called by the loop before it takes commands. A command whose sender relied on an earlier wake is
    /// there by then, and one that is sent later wakes the loop again.
    fn rearm(&self) {
        self.is_woken.swap(false, Ordering::AcqRel);
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
    /// Fails if the host cannot start a thread or has no descriptors left.
    pub fn start(name: &str) -> io::Result<Self> {
        Self::start_confined(name, ThreadKind::Drivers, Confinement::default())
    }

    /// Starts a loop on a thread with this name, which enters its sandbox before it serves actors.
    ///
    /// # Errors
    /// Fails if the host gives no thread or no descriptors, or does not confine the thread.
    pub fn start_confined(
        name: &str,
        kind: ThreadKind,
        confinement: Confinement,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let loop_waker = Arc::new(LoopWaker {
            waker: mio::Waker::new(poll.registry(), WAKER)?,
            is_woken: AtomicBool::new(false),
        });
        let (commands, inbox) = channel();
        let running = Running {
            poll,
            loop_waker: Arc::clone(&loop_waker),
            inbox,
            actors: HashMap::new(),
            tokens: Tokens::default(),
            timers: HashMap::new(),
            again: BTreeSet::new(),
            confinement,
        };
        let builder = std::thread::Builder::new().name(name.to_owned());
        let (entered, outcome) = channel();
        let thread = builder.spawn(move || {
            let is_confined = confinement.enter(kind);
            let may_run = is_confined.is_ok();
            // The other end waits for this answer.
            let _ = entered.send(is_confined);
            if may_run {
                running.run();
            }
        })?;
        // Waits for the thread to be confined: the caller must not hand guests to a thread that is
        // not.
        outcome.recv().map_err(io::Error::other)??;
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
    loop_waker: Arc<LoopWaker>,
    inbox: Receiver<Command>,
    actors: HashMap<u64, Adopted>,
    tokens: Tokens,
    /// When actors want to be woken. There are few: each poll looks at all.
    timers: HashMap<u64, Instant>,
    /// Actors that asked to be called again. A set: an actor that asks in `ready` and in `woken`, or is
    /// woken meanwhile, has one turn a round like all others, however often a guest wakes it.
    again: BTreeSet<u64>,
    confinement: Confinement,
}

impl Running {
    fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS_PER_POLL);
        let mut commands = Vec::new();
        // There may be commands whose wake the loop has consumed already.
        let mut left = false;
        loop {
            // Work that is left must not wait for an event. A poll of zero still takes the events
            // that are there, so that busy actors do not starve the others.
            let wait = if left || !self.again.is_empty() {
                Some(Duration::ZERO)
            } else {
                self.until_next_timer()
            };
            match self.poll.poll(&mut events, wait) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "an event loop cannot wait for events, and ends");
                    return;
                }
            }
            // mio's waker needs no reading: it is edge-triggered, and the next wake is a new edge.
            for event in &events {
                if event.token() == WAKER {
                    continue;
                }
                // An earlier event of this batch may have ended the actor, or its watch. Then the
                // token is gone.
                if let Some(&(actor, key)) = self.tokens.by_token.get(&event.token()) {
                    self.call(actor, |a, sources| a.ready(key, sources));
                }
            }
            // Between the events and the commands: each round serves all three kinds.
            self.expire_timers();
            for id in std::mem::take(&mut self.again) {
                self.wake(id);
            }
            // Those that are there now: an actor that wakes itself is called again when the kernel has
            // been asked for everybody's events. What comes from here on wakes the loop again.
            self.loop_waker.rearm();
            commands.extend(self.inbox.try_iter().take(COMMANDS_PER_ROUND));
            left = commands.len() == COMMANDS_PER_ROUND;
            for command in commands.drain(..) {
                match command {
                    Command::Adopt(id, actor) => {
                        self.actors.insert(id, actor);
                        self.wake(id);
                    }
                    Command::Wake(id) => self.wake(id),
                    Command::Dismiss(id) => self.drop_actor(id),
                    Command::End => return,
                }
            }
        }
    }

    fn until_next_timer(&self) -> Option<Duration> {
        let next = self.timers.values().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn expire_timers(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        let now = Instant::now();
        let expired = self.timers.iter().filter(|(_, when)| **when <= now);
        let expired: Vec<u64> = expired.map(|(id, _)| *id).collect();
        for id in expired {
            self.timers.remove(&id);
            self.wake(id);
        }
    }

    fn wake(&mut self, id: u64) {
        if let Some(actor) = self.actors.get(&id) {
            // Before the call: what happens during it needs another. A swap, so that the call sees
            // what was written before the wakes that this one stands for.
            actor.waking.swap(false, Ordering::AcqRel);
        }
        self.call(id, |a, sources| a.woken(sources));
    }

    fn call(&mut self, id: u64, f: impl FnOnce(&mut dyn Actor, &mut Sources<'_>) -> Flow) {
        let Some(Adopted { actor, span, .. }) = self.actors.get_mut(&id) else {
            return;
        };
        let entered = span.enter();
        let mut sources = Sources {
            registry: self.poll.registry(),
            shared: &mut self.tokens,
            timers: &mut self.timers,
            actor: id,
        };
        // The actor is dropped after a panic and never called again, so nothing sees what the panic
        // left half done.
        let flow = catch_unwind(AssertUnwindSafe(|| f(actor.as_mut(), &mut sources)))
            .unwrap_or_else(|panic| {
                let message = panic_message(panic.as_ref());
                tracing::error!(message, "an actor panicked");
                // A second panic while telling it would say nothing new.
                let _ = catch_unwind(AssertUnwindSafe(|| actor.crashed(message)));
                Flow::Leave
            });
        // A thread serves many VMs: the refused call is that of the actor that was just called.
        // An actor that panicked has said so already.
        let flow = match self.confinement.violation() {
            Some(violation) if flow != Flow::Leave => {
                let _ = catch_unwind(AssertUnwindSafe(|| actor.violated(&violation)));
                Flow::Leave
            }
            _ => flow,
        };
        drop(entered);
        match flow {
            Flow::Stay => {}
            Flow::Again => {
                self.again.insert(id);
            }
            Flow::Leave => self.drop_actor(id),
        }
    }

    fn drop_actor(&mut self, id: u64) {
        // Before the drop, which closes the descriptors: the kernel could hand the same number to
        // another actor.
        self.tokens.forget_actor(id, self.poll.registry());
        self.timers.remove(&id);
        let actor = self.actors.remove(&id);
        // A destructor may panic, too, and the thread serves other VMs.
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
mod tests;
