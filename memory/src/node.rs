//! Memory from one NUMA node of the host.

use std::io;
use std::path::PathBuf;

use crate::limits::HOST_NODES;
use crate::ram_config::RamError;

/// Has the host take all pages of a mapping from `node` (`mbind(2)`, `MPOL_BIND`). Call this before a
/// page is touched: pages that are there stay where they are.
///
/// # Errors
/// The host has no such node, or refuses.
///
/// # Safety
/// `host` and `len` are a mapping of this process, and stay so during the call.
pub(crate) unsafe fn bind(host: *mut u8, len: usize, node: u32) -> Result<(), RamError> {
    let bits = usize::try_from(node).unwrap_or(usize::MAX);
    // Ask sysfs first: `EINVAL` from the kernel has many other reasons.
    let dir = PathBuf::from(format!("/sys/devices/system/node/node{node}"));
    if bits >= HOST_NODES || !dir.exists() {
        let online = std::fs::read_to_string("/sys/devices/system/node/online");
        let online = online.map_or_else(|_| "unknown".to_owned(), |list| list.trim().to_owned());
        return Err(RamError::NoSuchNode { node, online });
    }
    const WORD: usize = libc::c_ulong::BITS as usize;
    let mut mask = [0 as libc::c_ulong; HOST_NODES / WORD];
    if let Some(word) = mask.get_mut(bits / WORD) {
        *word |= 1 << (bits % WORD);
    }
    // The kernel reads one bit less than it is given.
    let max_node = HOST_NODES + 1;
    // SAFETY: the caller's mapping, of which no content changes, and a mask of `HOST_NODES` bits.
    let refused = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            host,
            len,
            libc::MPOL_BIND,
            mask.as_ptr(),
            max_node,
            0,
        )
    };
    match refused {
        0 => Ok(()),
        _ => Err(RamError::Host {
            attempt: "take from a NUMA node",
            size: len as u64,
            source: io::Error::last_os_error(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use crate::{PAGE_SIZE, RamBlock, RamConfig};

    fn on(node: u32, shared: bool) -> Result<RamBlock, String> {
        let config = RamConfig {
            shared,
            prefault: true,
            host_node: Some(node),
            ..RamConfig::anonymous(4 * PAGE_SIZE)
        };
        RamBlock::new(&config).map_err(|error| error.to_string())
    }

    /// The policy of the mapping that begins at the block, as the kernel shows it.
    fn policy(block: &RamBlock) -> String {
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let start = format!("{:08x} ", block.host_addr().addr());
        let line = maps.lines().find_map(|line| line.strip_prefix(&start));
        let policy = line.and_then(|rest| rest.split_whitespace().next());
        policy.unwrap_or_default().to_owned()
    }

    #[test]
    fn memory_is_bound_to_its_node() {
        for shared in [false, true] {
            let block = on(0, shared).unwrap();
            assert_eq!(policy(&block), "bind:0", "shared: {shared}");
        }
        let unbound = RamBlock::new(&RamConfig::anonymous(4 * PAGE_SIZE)).unwrap();
        assert_eq!(policy(&unbound), "default");
    }

    #[test]
    fn names_a_node_that_does_not_exist() {
        for node in [1000, 1024, u32::MAX] {
            let refused = on(node, false).unwrap_err();
            let expected = format!("the host has no NUMA node {node}: its nodes are ");
            assert!(refused.starts_with(&expected), "{refused}");
        }
    }
}
