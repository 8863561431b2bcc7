//! The queues of a console.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use virtio_devices::console::Console;
use whimbrel_fuzz::Machine;

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new(|workers| {
        Box::new(Console::new(Box::new(std::io::sink()), || {}, workers).0)
    }));
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| machine.run(input)));
