//! The window to the BAR in configuration space (virtio 1.3, 4.1.4.9), with storms of resets: a
//! driver negotiates, resets and turns bus mastering off and on while queues are served, the machine
//! pauses and moves.

#![no_main]

use arbitrary::{Result, Unstructured};
use devices::pci::ConfigSpace;
use libfuzzer_sys::fuzz_target;
use virtio_devices::testing::TestQueue;
use whimbrel_fuzz::pci::PciMachine;

const COMMAND: usize = 4;
/// Fields of the common configuration structure, by offset and width.
const COMMON: [(u32, u32); 17] = [
    (0, 4),
    (4, 4),
    (8, 4),
    (12, 4),
    (16, 2),
    (20, 1),
    (21, 1),
    (22, 2),
    (24, 2),
    (26, 2),
    (28, 2),
    (32, 4),
    (36, 4),
    (40, 4),
    (44, 4),
    (48, 4),
    (58, 2),
];
/// The first bytes of the structures: ISR, device configuration, doorbells, MSI-X.
const OTHERS: [u32; 6] = [0x1000, 0x2000, 0x3000, 0x4000, 0x400c, 0x7000];

struct Driver {
    machine: PciMachine,
    queue: TestQueue,
    /// Offsets of the capabilities of the window and of MSI-X.
    window: usize,
    msix: usize,
}

impl Driver {
    fn new() -> Self {
        let mut machine = PciMachine::new();
        let queue = TestQueue::new(&mut machine.guest, 0, 16);
        let (mut window, mut msix) = (0, 0);
        let read = |at: usize| {
            let mut data = [0; 4];
            machine.device.read(at, &mut data);
            data
        };
        let mut at = usize::from(read(0x34)[0]);
        while at != 0 {
            let head = read(at);
            match (head[0], head[3]) {
                (9, 5) => window = at,
                (0x11, _) => msix = at,
                _ => {}
            }
            at = head[1].into();
        }
        Self {
            machine,
            queue,
            window,
            msix,
        }
    }

    /// Names a piece of the BAR.
    fn aim(&self, bar: u8, offset: u32, len: u32) {
        let device = &self.machine.device;
        device.write(self.window + 4, &[bar]);
        device.write(self.window + 8, &offset.to_le_bytes());
        device.write(self.window + 12, &len.to_le_bytes());
    }

    fn set(&self, offset: u32, len: u32, value: u32) {
        self.aim(0, offset, len);
        let device = &self.machine.device;
        device.write(self.window + 16, &value.to_le_bytes());
    }

    /// Negotiates and enables the queue, as far as `steps` go.
    fn negotiate(&self, steps: usize) {
        let rings = self.queue.rings;
        let words = |offset: u32, addr: u64| {
            [
                (offset, 4, addr as u32),
                (offset + 4, 4, (addr >> 32) as u32),
            ]
        };
        let [d0, d1] = words(32, rings.descriptors);
        let [a0, a1] = words(40, rings.available);
        let [u0, u1] = words(48, rings.used);
        let all = [
            (20, 1, 0),
            (20, 1, 3),
            (8, 4, 1),
            // VERSION_1 and RING_RESET.
            (12, 4, 1 | 1 << 8),
            (20, 1, 11),
            (22, 2, 0),
            (24, 2, rings.size.into()),
            d0,
            d1,
            a0,
            a1,
            u0,
            u1,
            (28, 2, 1),
            (20, 1, 15),
        ];
        for (offset, len, value) in all.into_iter().take(steps) {
            self.set(offset, len, value);
        }
    }

    fn play(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        while !bytes.is_empty() {
            let device = &self.machine.device;
            match bytes.int_in_range(0_u8..=9)? {
                0 => {
                    let (offset, len) = *bytes.choose(&COMMON)?;
                    self.set(offset, len, bytes.arbitrary()?);
                }
                1 => {
                    let offset = bytes.choose(&OTHERS)? + bytes.int_in_range(0..=16)?;
                    self.set(offset, *bytes.choose(&[1, 2, 4])?, bytes.arbitrary()?);
                }
                // No driver does this: any bar, place and length, any width of the data.
                2 => {
                    self.aim(bytes.arbitrary()?, bytes.arbitrary()?, bytes.arbitrary()?);
                    let mut data: [u8; 8] = bytes.arbitrary()?;
                    let len = bytes.int_in_range(1_usize..=8)?;
                    device.write(self.window + 16, &data[..len]);
                    device.read(self.window + 16, &mut data[..len]);
                }
                3 | 4 => self.negotiate(bytes.int_in_range(0..=15)?),
                5 => {
                    // A buffer in RAM, or one that breaks the rules, and the doorbell.
                    let addr = *bytes.choose(&[0x8000_u64, 0xf_fff8, 1 << 40])?;
                    self.queue
                        .set_descriptor(0, addr, 64, bytes.int_in_range(0..=7)?, 0);
                    self.queue.offer(0);
                    self.set(0x3000, 2, 0);
                }
                6 => device.write(COMMAND, &[*bytes.choose(&[0, 2, 4, 6])?, 0]),
                7 => device.write(self.msix + 2, &bytes.arbitrary::<u16>()?.to_le_bytes()),
                8 => {
                    device.pause();
                    device.resume();
                }
                _ => match bytes.int_in_range(0_u8..=3)? {
                    0 => device.reset(),
                    _ => {
                        self.machine.move_on();
                        device.resume();
                    }
                },
            }
        }
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let mut driver = Driver::new();
    // An input that is too short leaves out what it does not tell.
    let _ = driver.play(&mut Unstructured::new(input));
    driver.machine.finish();
});
