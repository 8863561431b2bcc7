//! Access to the disk of a machine from other threads, beside its guest, for copies of its content.
//!
//! An access belongs to one machine, and ends with it. One that [waits](DiskAccess::await_reset) continues
//! at the disk of the next machine: each block that the old machine or the new one writes is marked.
//!
//! ```text
//!   old machine          no machine                     new machine
//!   at its disk   ►   await_reset: operations wait   ►   follow: at its disk, which is tracked
//!                     the image is closed, unlocked      (before its guest runs)
//! ```

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use memory::{AwaitedBlocks, DirtyBitmap, PageBuffer};
use parking_lot::{Condvar, Mutex, RwLock};

use super::base::ImageVersion;
use super::image::contained;
use super::{BlockHandle, Shared};

/// Lets copies use the image of a disk as long as its device is there.
///
/// The image is locked for as long as it is open, and the next machine, after a reset, opens it anew. So
/// a copy that still runs must not hold it: the device, when it goes, waits for the operation of each copy
/// that is in progress, and lets none begin.
#[derive(Clone, Debug)]
pub(super) struct CopyGate(Arc<RwLock<Gate>>);

#[derive(Debug)]
enum Gate {
    Open,
    /// With the version of the image that the device left, if a copy was being made.
    Closed(Option<ImageVersion>),
}

impl CopyGate {
    pub(super) fn open() -> Self {
        Self(Arc::new(RwLock::new(Gate::Open)))
    }

    /// The device of the disk goes. No queue of it runs.
    pub(super) fn close(&self, shared: &Shared) {
        let mut gate = self.0.write();
        let image = shared.image();
        let left = image.written.is_set().then(|| {
            // Nothing is left to write then when the image is closed.
            if !image.readonly {
                contained(|| image.flush())?;
            }
            ImageVersion::of(&image)
        });
        *gate = Gate::Closed(left.and_then(Result::ok));
    }

    /// Whether a disk has the content that the device of this gate left.
    fn was_left_as(&self, next: &Shared) -> bool {
        match &*self.0.read() {
            Gate::Closed(Some(left)) => next.opened.as_ref() == Some(left),
            Gate::Open | Gate::Closed(None) => false,
        }
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The device of a disk.
#[derive(Clone)]
struct Device {
    gate: CopyGate,
    shared: Weak<Shared>,
}

impl Device {
    fn of(handle: &BlockHandle) -> Self {
        Self {
            gate: handle.shared.gate.clone(),
            shared: Arc::downgrade(&handle.shared),
        }
    }
}

enum Place {
    At(Device),
    /// The machine is reset. The gate is that of its disk.
    Between(CopyGate),
    Ended,
}

/// The dirty blocks that a copy tracks: the copy continues at the next machine.
struct Tracked {
    dirty: Arc<DirtyBitmap>,
    size: u64,
}

struct Inner {
    place: Mutex<Place>,
    moved: Condvar,
    tracked: Mutex<Option<Tracked>>,
}

/// A disk of a machine, for copies. It ends with its machine, unless it [follows](Self::follow) the disk to
/// the next one. Clones share that.
#[derive(Clone)]
pub struct DiskAccess(Arc<Inner>);

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the machine of the disk ended")
}

impl DiskAccess {
    pub(super) fn new(handle: &BlockHandle) -> Self {
        Self(Arc::new(Inner {
            place: Mutex::new(Place::At(Device::of(handle))),
            moved: Condvar::new(),
            tracked: Mutex::new(None),
        }))
    }

    /// Has operations wait for [`Self::follow`] or [`Self::end`]: the machine is reset.
    pub fn await_reset(&self) {
        let mut place = self.0.place.lock();
        if let Place::At(device) = &*place {
            *place = Place::Between(device.gate.clone());
        }
    }

    /// Continues at the same disk of the next machine, whose guest has not run yet. If the image was changed
    /// while no machine had it, all blocks count as written.
    ///
    /// # Errors
    /// The disk has another size than before.
    pub fn follow(&self, next: &BlockHandle) -> io::Result<()> {
        let mut place = self.0.place.lock();
        let Place::Between(gate) = &*place else {
            return Ok(());
        };
        if let Some(Tracked { dirty, size }) = &*self.0.tracked.lock() {
            let now = next.shared.capacity.load(Ordering::Acquire);
            if now != *size {
                let why = format!("it had {size} bytes before the reset, and has {now} now");
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            next.shared.image().written.set(Arc::clone(dirty));
            if !gate.was_left_as(&next.shared) {
                dirty.mark_all();
            }
        }
        *place = Place::At(Device::of(next));
        self.0.moved.notify_all();
        Ok(())
    }

    /// Ends the access: no other machine follows.
    pub fn end(&self) {
        *self.0.place.lock() = Place::Ended;
        self.0.moved.notify_all();
    }

    /// Has each disk tracked that this follows.
    pub(super) fn track(&self, dirty: &Arc<DirtyBitmap>, size: u64) {
        let dirty = Arc::clone(dirty);
        *self.0.tracked.lock() = Some(Tracked { dirty, size });
    }

    /// Ends tracking. Does not wait for the next machine.
    pub(super) fn end_tracking(&self, dirty: &Arc<DirtyBitmap>) {
        let device = {
            // Locked, as `follow` has it when the next disk begins to be tracked.
            let place = self.0.place.lock();
            let is_ours = |tracked: &mut Tracked| Arc::ptr_eq(&tracked.dirty, dirty);
            self.0.tracked.lock().take_if(is_ours);
            match &*place {
                Place::At(device) => device.clone(),
                Place::Between(_) | Place::Ended => return,
            }
        };
        // Not with the place locked: a gate that closes may wait for storage.
        let gate = device.gate.0.read();
        if let (Gate::Open, Some(shared)) = (&*gate, device.shared.upgrade()) {
            shared.image().written.unset(dirty);
        }
    }

    /// Returns the device. Waits while the machine is reset.
    fn device(&self) -> io::Result<Device> {
        let mut place = self.0.place.lock();
        loop {
            match &*place {
                Place::At(device) => return Ok(device.clone()),
                Place::Between(_) => self.0.moved.wait(&mut place),
                Place::Ended => return Err(ended()),
            }
        }
    }

    /// Whether the device at which this is has this gate.
    fn is_at(&self, gate: &CopyGate) -> bool {
        matches!(&*self.0.place.lock(), Place::At(device) if device.gate.is(gate))
    }

    /// Bytes that the guest sees.
    ///
    /// # Errors
    /// The size of the image cannot be read, or the device is gone.
    pub fn size(&self) -> io::Result<u64> {
        self.with(|shared| shared.image().size())
    }

    pub(super) fn with<R>(&self, work: impl FnOnce(&Shared) -> io::Result<R>) -> io::Result<R> {
        loop {
            let device = self.device()?;
            let gate = device.gate.0.read();
            // Not upgraded behind a closed gate: not even for a moment may this own the image then.
            let shared = match &*gate {
                Gate::Open => device.shared.upgrade(),
                Gate::Closed(_) => None,
            };
            if let Some(shared) = shared {
                let done = contained(|| work(&shared));
                // In this order: the gate closes when the image has no owner here.
                drop(shared);
                drop(gate);
                return done;
            }
            drop(gate);
            // A gate closes behind `await_reset`, so that this place is another one after a reset.
            if self.is_at(&device.gate) {
                return Err(ended());
            }
        }
    }

    /// Makes durable what the guest wrote so far, beside the guest, with the tables of a qcow2 image: the
    /// same in a stop is short then.
    ///
    /// # Errors
    /// The host cannot write, or the device is gone.
    pub fn pre_sync(&self) -> io::Result<()> {
        self.with(|shared| {
            let image = shared.image();
            if image.readonly {
                Ok(())
            } else {
                image.flush()
            }
        })
    }

    /// Has the disk wait for blocks that are still at the source of a migration. No queue of it was started.
    ///
    /// # Errors
    /// The device is gone.
    pub fn await_blocks(&self, blocks: Arc<AwaitedBlocks>) -> io::Result<()> {
        self.with(|shared| {
            *shared.awaited.lock() = Some(blocks);
            Ok(())
        })
    }

    /// Writes a block that came from the source of a migration, beside the guest. The caller has claimed it.
    ///
    /// # Errors
    /// The host cannot write, or the device is gone.
    pub fn write_arrived(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|shared| {
            let image = shared.image();
            if !image.is_direct() {
                return image.write_arrived(data, offset);
            }
            let mut aligned = PageBuffer::new(data.len());
            aligned.copy_from_slice(data);
            image.write_arrived(&aligned, offset)
        })
    }

    /// Makes a block zeros that came as zeros from the source of a migration. The caller has claimed it.
    ///
    /// # Errors
    /// The host cannot write, or the device is gone.
    pub fn zero_arrived(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroed = self.with(|shared| shared.image().write_zeroes(offset, len, true));
        match zeroed {
            // A file system that punches no holes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                self.write_arrived(offset, &vec![0; len])
            }
            done => done,
        }
    }
}
