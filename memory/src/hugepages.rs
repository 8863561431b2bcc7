//! The host's pool of huge pages (Linux, Documentation/admin-guide/mm/hugetlbpage.rst).

use std::fs;
use std::io;

use crate::ram_config::RamError;

/// Why `size` bytes could not be reserved in huge pages of `page` bytes, when the host said `error`.
pub(crate) fn refusal(size: u64, page: u64, error: io::Error) -> RamError {
    match (error.kind(), free(page)) {
        (_, None) => RamError::NoSuchHugePage(page),
        (io::ErrorKind::OutOfMemory, Some(free)) => RamError::NoHugePages { size, page, free },
        (_, Some(_)) => RamError::Host {
            attempt: "map",
            size,
            source: error,
        },
    }
}

/// Huge pages of this size that are free and not reserved; `None` if the host has no such pages.
pub(crate) fn free(page: u64) -> Option<u64> {
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10);
    let count = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(format!("{pool}/{name}")).ok()?;
        text.trim().parse().ok()
    };
    // Pages beyond the pool's size that the host may add when they are asked for.
    let surplus = count("nr_overcommit_hugepages")?.saturating_sub(count("surplus_hugepages")?);
    // The kernel counts a reserved page as free until it is touched.
    let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
    Some(free.saturating_add(surplus))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::RamBlock;
    use crate::ram_config::RamConfig;

    #[test]
    fn counts_free_huge_pages() {
        const PAGE: u64 = 2 << 20;
        let Some(free) = free(PAGE) else {
            return;
        };
        for shared in [false, true] {
            let config = RamConfig {
                hugepage_size: Some(PAGE),
                shared,
                ..RamConfig::anonymous((free + 64) * PAGE)
            };
            let refused = RamBlock::new(&config).unwrap_err().to_string();
            let expected = format!(
                "{} MiB of huge pages are needed, {} pages of 2097152 bytes each, and {free} of",
                (free + 64) * 2,
                free + 64
            );
            assert!(refused.starts_with(&expected), "{refused}");
        }
        let odd = RamConfig {
            hugepage_size: Some(8 << 20),
            ..RamConfig::anonymous(8 << 20)
        };
        let refused = RamBlock::new(&odd).unwrap_err().to_string();
        assert_eq!(refused, "the host has no huge pages of 8388608 bytes");
    }
}
