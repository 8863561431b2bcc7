//! Core scheduling (Linux, admin-guide/hw-vuln/core-scheduling): which threads of the host may run on
//! a core beside a vCPU, where cores have several hardware threads (SMT). They could observe the vCPU
//! through what they share with it.
//!
//! The kernel lets only threads with the same cookie share a core. A vCPU's thread gets its cookie
//! before it first enters the guest.

use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::thread::{
    CoreSchedulingScope, Pid, core_scheduling_cookie, create_core_scheduling_cookie, gettid,
    pull_core_scheduling_cookie,
};
use spec::CoreSchedulingMode;

const THREAD: CoreSchedulingScope = CoreSchedulingScope::Thread;

/// The threads with which the vCPUs of a machine share cores.
#[derive(Clone, Debug)]
pub(super) enum CoreSharing {
    /// With all.
    Any,
    /// With no other.
    None,
    /// With those of the same machine, of which these threads have its cookie.
    Machine(Arc<Mutex<Vec<Pid>>>),
}

/// The host cannot keep other threads off a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`cpus.core_scheduling=Vcpu` needs a kernel with CONFIG_SCHED_CORE: this host's CPUs have several \
     threads a core, and the kernel refuses a cookie ({0}); turn SMT off, or choose `Off`"
)]
pub(super) struct Unsupported(Errno);

impl CoreSharing {
    /// Returns what the configuration asks for, as far as there is something to do on this host.
    ///
    /// # Errors
    /// Fails if the configuration asks for cores of their own by name, and the kernel cannot give them.
    pub(super) fn new(mode: CoreSchedulingMode) -> Result<Self, Unsupported> {
        // Only reading the cookie shows whether the kernel has core scheduling: kernels with the
        // prctl may be built without it.
        let answer = core_scheduling_cookie(gettid(), THREAD).map(drop);
        let smt = std::fs::read_to_string("/sys/devices/system/cpu/smt/active");
        let is_smt = smt.is_ok_and(|active| active.trim() == "1");
        Self::decide(mode, answer, is_smt)
    }

    fn decide(
        mode: CoreSchedulingMode,
        answer: Result<(), Errno>,
        is_smt: bool,
    ) -> Result<Self, Unsupported> {
        match (mode, answer) {
            (CoreSchedulingMode::Off, _) => Ok(Self::Any),
            (CoreSchedulingMode::Vm, Ok(())) => Ok(Self::Machine(Arc::default())),
            (CoreSchedulingMode::Vcpu, Ok(())) => Ok(Self::None),
            // A core has one hardware thread: nothing shares it.
            (_, Err(Errno::NODEV)) => Ok(Self::Any),
            (_, Err(_)) if !is_smt => Ok(Self::Any),
            // The default, also of clients that do not know of it.
            (CoreSchedulingMode::Vm, Err(error)) => {
                tracing::warn!(%error, "the kernel has no core scheduling: other threads may run on the cores of vCPUs");
                Ok(Self::Any)
            }
            (CoreSchedulingMode::Vcpu, Err(error)) => Err(Unsupported(error)),
        }
    }

    /// Gives the calling thread the cookie, for as long as the thread lives. The result is dropped when
    /// the thread ends.
    pub(super) fn enter(&self) -> Result<Option<Member>, Errno> {
        let me = gettid();
        match self {
            Self::Any => Ok(None),
            // Cookies are unique: one that is never shared keeps all other threads off the core.
            Self::None => create_core_scheduling_cookie(me, THREAD).map(|()| None),
            Self::Machine(members) => {
                // Under the lock: of two threads that start, the second takes the cookie of the first,
                // and no member ends meanwhile: another thread could get its number.
                let mut there = members.lock();
                match there.last() {
                    Some(member) => pull_core_scheduling_cookie(*member, THREAD)?,
                    None => create_core_scheduling_cookie(me, THREAD)?,
                }
                there.push(me);
                drop(there);
                Ok(Some(Member {
                    me,
                    members: Arc::clone(members),
                }))
            }
        }
    }
}

/// A thread that has the cookie of its machine.
#[derive(Debug)]
pub(super) struct Member {
    me: Pid,
    members: Arc<Mutex<Vec<Pid>>>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.members.lock().retain(|member| *member != self.me);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn only_a_host_with_smt_needs_the_kernel() {
        use CoreSchedulingMode::{Off, Vcpu, Vm};
        let decide = |mode, answer, is_smt| CoreSharing::decide(mode, answer, is_smt);
        for mode in [Off, Vm, Vcpu] {
            let none = decide(mode, Err(Errno::NODEV), false);
            assert!(matches!(none, Ok(CoreSharing::Any)), "{mode:?}");
            let none = decide(mode, Err(Errno::INVAL), false);
            assert!(matches!(none, Ok(CoreSharing::Any)), "{mode:?}");
        }
        assert!(matches!(decide(Off, Ok(()), true), Ok(CoreSharing::Any)));
        assert!(matches!(
            decide(Vm, Ok(()), true),
            Ok(CoreSharing::Machine(_))
        ));
        assert!(matches!(decide(Vcpu, Ok(()), true), Ok(CoreSharing::None)));
        let lacking = decide(Vm, Err(Errno::INVAL), true);
        assert!(matches!(lacking, Ok(CoreSharing::Any)));
        let refused = decide(Vcpu, Err(Errno::INVAL), true).unwrap_err();
        assert!(
            refused.to_string().contains("CONFIG_SCHED_CORE"),
            "{refused}"
        );
    }

    /// Cookies of two threads that entered. All are 0 on a host without SMT.
    fn cookies(sharing: &CoreSharing) -> [u64; 2] {
        [(), ()].map(|()| {
            let (sharing, (told, tell)) = (sharing.clone(), channel());
            let entered = std::thread::spawn(move || {
                let member = sharing.enter().unwrap();
                let cookie = core_scheduling_cookie(gettid(), THREAD).unwrap_or(0);
                told.send(cookie).unwrap();
                member
            });
            let cookie = tell.recv().unwrap();
            drop(entered);
            cookie
        })
    }

    #[test]
    fn vcpus_have_the_cookies_that_are_asked_for() {
        let can = core_scheduling_cookie(gettid(), THREAD).is_ok();
        let [a, b] = cookies(&CoreSharing::new(CoreSchedulingMode::Off).unwrap());
        assert_eq!((a, b), (0, 0));
        let own = CoreSharing::new(CoreSchedulingMode::Vcpu);
        if let Ok(own) = own {
            let [a, b] = cookies(&own);
            assert_eq!(a != b && a != 0, can);
        }
        let machine = CoreSharing::new(CoreSchedulingMode::Vm).unwrap();
        let [a, b] = cookies(&machine);
        assert_eq!((a != 0, a == b), (can, true));
    }
}
