//! A device's registers: configuration space and BAR, any width at any offset.

#![no_main]

use arbitrary::Unstructured;
use devices::pci::ConfigSpace;
use libfuzzer_sys::fuzz_target;
use virtio_devices::BAR_LEN;
use whimbrel_fuzz::pci::{BAR, PciMachine};

fuzz_target!(|input: &[u8]| {
    let machine = PciMachine::new();
    let (device, space) = (&machine.device, &machine.space);
    device.write(4, &[6, 0]);
    let mut bytes = Unstructured::new(input);
    while let (Ok(kind), Ok(at), Ok(mut data), Ok(len)) = (
        bytes.int_in_range(0_u8..=5),
        bytes.int_in_range(0..=BAR_LEN + 8),
        bytes.arbitrary::<[u8; 8]>(),
        bytes.int_in_range(1_usize..=8),
    ) {
        let data = &mut data[..len];
        // Of the BAR, mostly the registers that do something.
        let register = if kind & 1 == 0 { at & 0x703f } else { at };
        match kind {
            0 | 1 => drop(space.view().write(BAR + register, data)),
            2 => drop(space.view().read(BAR + register, data)),
            3 => device.write(at as usize & 0x3ff, data),
            4 => device.read(at as usize & 0x3ff, data),
            _ => {
                device.pause();
                device.resume();
            }
        }
        if bytes.is_empty() {
            break;
        }
    }
    machine.finish();
});
