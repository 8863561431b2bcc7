//! Saved state of a memory device. Frozen.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use state::Saved;

use super::Shared;

/// The first version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct V1 {
    /// Guest address of the region.
    addr: u64,
    /// Bytes of the region.
    region_size: u64,
    /// Bytes of a block.
    block_size: u64,
    /// Bytes that the guest should plug.
    requested: u64,
    /// A bit for each block, lowest first: whether it is plugged.
    plugged: ByteBuf,
}

impl Saved for V1 {
    const VERSION: u16 = 1;
}

impl V1 {
    pub(super) fn of(shared: &Shared) -> Self {
        let mut plugged = vec![0_u8; bytes(shared)];
        for block in 0..shared.blocks() {
            // Whole blocks are changed, however a request ends: none is plugged in part.
            if shared.plugged_pages(block, 1) > 0
                && let Some(byte) = plugged.get_mut((block / 8) as usize)
            {
                *byte |= 1 << (block % 8);
            }
        }
        Self {
            addr: shared.addr,
            region_size: shared.region_size(),
            block_size: shared.block_size,
            requested: shared.requested.load(Ordering::Acquire),
            plugged: ByteBuf::from(plugged),
        }
    }

    /// Makes the memory what it was. All checks come before the first change.
    pub(super) fn restore(&self, shared: &Shared) -> Result<(), String> {
        let (addr, size, block) = (shared.addr, shared.region_size(), shared.block_size);
        if (self.addr, self.region_size, self.block_size) != (addr, size, block) {
            return Err(format!(
                "its region is {:#x} bytes at {:#x} in blocks of {:#x} bytes, and the machine's is \
                 {size:#x} bytes at {addr:#x} in blocks of {block:#x}",
                self.region_size, self.addr, self.block_size
            ));
        }
        // The driver would plug up to a size that no block has, or that lies past the region.
        if !self.requested.is_multiple_of(block) || self.requested > size {
            return Err(format!("{:#x} bytes cannot be requested", self.requested));
        }
        let is_plugged = |index: u64| {
            let byte = self.plugged.get((index / 8) as usize);
            byte.is_some_and(|byte| byte >> (index % 8) & 1 != 0)
        };
        let past_the_end = shared.blocks()..self.plugged.len() as u64 * 8;
        if self.plugged.len() != bytes(shared) || past_the_end.into_iter().any(is_plugged) {
            return Err("its bitmap does not fit the region".to_owned());
        }
        let mut first = 0;
        while first < shared.blocks() {
            let is = is_plugged(first);
            let rest = first..shared.blocks();
            let end = rest.into_iter().find(|block| is_plugged(*block) != is);
            let end = end.unwrap_or(shared.blocks());
            // A destination loads twice, and pages arrive in between: what is unplugged now may have
            // been plugged before, and have content.
            let changed = match is {
                true => plug_missing(shared, first, end),
                false => shared.unplug(first, end - first),
            };
            changed.map_err(|error| format!("the host has no memory for it: {error}"))?;
            first = end;
        }
        shared.requested.store(self.requested, Ordering::Release);
        shared.count_plugged();
        Ok(())
    }
}

fn bytes(shared: &Shared) -> usize {
    shared.blocks().div_ceil(8) as usize
}

/// Plugs those blocks that are not yet: to plug one again could wait for pages that are missing.
fn plug_missing(shared: &Shared, first: u64, end: u64) -> std::io::Result<()> {
    for block in (first..end).filter(|block| shared.plugged_pages(*block, 1) == 0) {
        shared.plug(block, 1)?;
    }
    Ok(())
}
