//! Hostile disk images: they are opened or refused, and read.

#![no_main]

use std::fs;
use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use virtio_devices::VirtioDevice;
use virtio_devices::block::Block;
use virtio_devices::testing::workers;
use whimbrel_fuzz::{Machine, disk_config};

thread_local! {
    static DIR: tempfile::TempDir = tempfile::tempdir_in("/dev/shm").expect("a directory");
}

/// The device contains panics of the library; no other code may panic.
fn contain() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let all = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !panic
                .location()
                .is_some_and(|at| at.file().contains("/imago-"))
            {
                all(panic);
            }
        }));
    });
}

fuzz_target!(|input: &[u8]| DIR.with(|dir| {
    contain();
    let path = dir.path().join("image");
    fs::write(&path, input).expect("a file");
    let mut config = disk_config(&path);
    config.readonly = true;
    let (_event_loop, workers) = workers();
    let Ok((device, _)) = Block::new(&config, workers) else {
        return;
    };
    let mut capacity = [0; 8];
    device.read_config(0, &mut capacity);
    // A read of the first and of the last sectors.
    let last = u64::from_le_bytes(capacity).saturating_sub(8);
    Machine::new(|_| Box::new(device)).read_disk(&[0, last]);
}));
