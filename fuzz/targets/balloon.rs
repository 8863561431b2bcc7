//! The queues of a balloon.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use virtio_devices::balloon::{Balloon, BalloonConfig};
use whimbrel_fuzz::Machine;

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new(|workers| {
        let config = BalloonConfig {
            size: 1 << 20,
            deflate_on_oom: true,
            free_page_reporting: true,
        };
        Box::new(Balloon::new(&config, workers).0)
    }));
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| machine.run(input)));
