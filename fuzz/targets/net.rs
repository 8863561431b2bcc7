//! The queues of a network interface, on a tap of the host.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use virtio_devices::net::{Net, NetConfig, TapAddress, TapSource};
use virtio_devices::rate_limiter::RateLimits;
use whimbrel_fuzz::Machine;

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new(|workers| {
        let config = NetConfig {
            tap: TapSource::Name("wbfuzz%d".to_owned()),
            address: TapAddress {
                ip: None,
                mac: None,
                mtu: None,
            },
            mac: [2, 0, 0, 0, 0, 1],
            mtu: Some(1500),
            pairs: 1,
            queue_size: 64,
            offload_csum: true,
            offload_tso: true,
            limits: RateLimits::default(),
        };
        Box::new(Net::new(config, workers).expect("a tap: wants /dev/net/tun and CAP_NET_ADMIN").0)
    }));
}

fuzz_target!(|input: &[u8]| MACHINE.with_borrow_mut(|machine| machine.run(input)));
