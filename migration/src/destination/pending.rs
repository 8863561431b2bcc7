//! Connections of which it is not known yet who makes them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Connection;
use crate::link::{Accept, Closer, Stream};
use crate::message;

/// How long who connects may take to say who it is, all in all.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that may be about to say it.
const MOST: usize = 64;

struct PendingConnection {
    number: u64,
    since: Instant,
    closer: Closer,
}

/// Those who connected and have not said yet who they are.
#[derive(Default)]
pub(super) struct PendingConnections {
    all: Mutex<Vec<PendingConnection>>,
}

impl PendingConnections {
    /// Takes connections until it is `over`, and hands on those who say who they are.
    pub(super) fn receive<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        accept: &mut dyn Accept,
        tick: Duration,
        over: &AtomicBool,
        arrive: &Sender<Connection>,
    ) {
        for number in 0.. {
            if over.load(Ordering::Acquire) {
                break;
            }
            self.end(|stranger| stranger.since.elapsed() > PATIENCE);
            let stream = match accept.accept(tick) {
                Ok(Some(stream)) => stream,
                Ok(None) => continue,
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "a connection cannot be taken now");
                    thread::sleep(tick);
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "no more connections can come");
                    break;
                }
            };
            if !self.admit(number, &*stream) {
                continue;
            }
            let arrive = arrive.clone();
            let greeting = move || {
                let greeted = greet(stream);
                // Nobody ends it any more.
                self.forget(number);
                if let Some(connection) = greeted {
                    // The session may be over.
                    let _ = arrive.send(connection);
                }
            };
            if let Err(error) = thread::Builder::new().spawn_scoped(scope, greeting) {
                tracing::warn!(%error, "a connection cannot be served now");
                self.forget(number);
            }
        }
        self.end(|_| true);
    }

    fn admit(&self, number: u64, stream: &dyn Stream) -> bool {
        let Ok(closer) = stream.closer() else {
            return false;
        };
        let mut all = self.all.lock();
        let has_room = all.len() < MOST;
        if has_room {
            all.push(PendingConnection {
                number,
                since: Instant::now(),
                closer,
            });
        }
        has_room
    }

    fn forget(&self, number: u64) {
        self.all.lock().retain(|stranger| stranger.number != number);
    }

    fn end(&self, which: impl Fn(&PendingConnection) -> bool) {
        let all = self.all.lock();
        let expired = all.iter().filter(|pending| which(pending));
        expired.for_each(|pending| pending.closer.close());
    }
}

/// Whether another connection may be taken later, when others have ended.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let passing = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    passing
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn greet(mut stream: Box<dyn Stream>) -> Option<Connection> {
    stream.set_patience(PATIENCE).ok()?;
    match message::recv_hello(&mut *stream) {
        Ok(hello) => Some(Connection { hello, stream }),
        Err(error) => {
            tracing::info!(%error, "somebody connected who does not migrate a guest");
            None
        }
    }
}
