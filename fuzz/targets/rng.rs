//! The queues of the entropy device.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use virtio_devices::rate_limiter::RateLimits;
use virtio_devices::rng::Rng;
use whimbrel_fuzz::Machine;

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new(|workers| {
        let limits = RateLimits::default();
        Box::new(Rng::new("/dev/urandom".as_ref(), limits, workers).expect("a source of entropy"))
    }));
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| machine.run(input)));
