//! The queues of a vsock, with a host that listens nowhere.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use virtio_devices::vsock::Vsock;
use whimbrel_fuzz::Machine;

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new(|workers| {
        let socket = std::env::temp_dir().join(format!("fuzz-vsock-{}", std::process::id()));
        Box::new(Vsock::new(3, &socket, workers).expect("a socket"))
    }));
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| machine.run(input)));
