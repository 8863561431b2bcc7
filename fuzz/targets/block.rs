//! The queues of a disk.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use virtio_devices::block::Block;
use whimbrel_fuzz::{Machine, disk_config};

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new(|workers| {
        let disk = tempfile::NamedTempFile::new().expect("a file");
        disk.as_file().set_len(1 << 20).expect("a file that grows");
        Box::new(Block::new(&disk_config(disk.path()), workers).expect("a disk").0)
    }));
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| machine.run(input)));
