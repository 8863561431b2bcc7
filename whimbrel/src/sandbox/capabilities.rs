//! Capabilities: the parts of root's power, for a program that root starts.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// The part of root's power that VMs need. All else goes: loading modules, mounting, tracing,
/// rebooting, raw sockets, raw I/O, changing users, and what the kernel adds in the future.
const NEEDED: CapabilitySet = CapabilitySet::empty()
    // Images, kernels and sockets may belong to other users.
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    // Taps are made and configured, also those of devices that a client adds later.
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_BIND_SERVICE)
    // Huge pages and locked memory.
    .union(CapabilitySet::IPC_LOCK)
    // Limits on descriptors are raised, and taps have more queues.
    .union(CapabilitySet::SYS_RESOURCE)
    // userfaultfd serves faults of the kernel, as postcopy needs, where the sysctl
    // vm.unprivileged_userfaultfd is 0.
    .union(CapabilitySet::SYS_PTRACE);

/// The capabilities that are left to threads of devices: guests' vsock connections end at unix
/// sockets, which may belong to other users. Threads of vCPUs have none.
pub(super) const OF_DEVICES: CapabilitySet = CapabilitySet::DAC_OVERRIDE;

/// Gives up what VMs do not need, for this thread and those that it starts from now on.
pub(super) fn drop_unneeded() -> io::Result<()> {
    keep(NEEDED)
}

/// Keeps these capabilities of the calling thread, as far as it has them, and gives up all others.
/// With `no_new_privs` there is no way back.
pub(super) fn keep(kept: CapabilitySet) -> io::Result<()> {
    let now = capabilities(None)?;
    let kept = CapabilitySets {
        // Only what the thread has: a program of an ordinary user asks for nothing.
        effective: now.effective & kept,
        permitted: now.permitted & kept,
        inheritable: now.inheritable & kept,
    };
    if kept != now {
        set_capabilities(None, kept)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn what_is_given_up_does_not_come_back() {
        thread::spawn(|| {
            drop_unneeded().unwrap();
            let few = capabilities(None).unwrap();
            assert!(NEEDED.contains(few.permitted | few.effective));
            keep(CapabilitySet::empty()).unwrap();
            assert!(capabilities(None).unwrap().permitted.is_empty());
            let back = CapabilitySets {
                effective: CapabilitySet::SYS_ADMIN,
                permitted: CapabilitySet::SYS_ADMIN,
                inheritable: CapabilitySet::empty(),
            };
            assert!(set_capabilities(None, back).is_err());
        })
        .join()
        .unwrap();
    }
}
