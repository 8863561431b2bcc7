//! The gate in front of `KVM_RUN`.
//!
//! KVM replaces memslots one by one. A guest that touches memory between the removal of a slot
//! and the arrival of the ones in its place would see a hole which the map does not have. So
//! while such a batch runs, the gate is closed: every vCPU is kicked out and none gets in.
//!
//! On the normal path a vCPU pays a store, a fence and a load to enter, and the same to leave. Each
//! side says what it does *before* it looks at the other's flag, with a fence in between, so that
//! either the vCPU sees the closed gate or the closer sees the vCPU inside. `gate::model` checks
//! all orders.

use std::sync::Arc;

use memory::sync::atomic::{AtomicBool, Ordering, fence};
use memory::sync::{Condvar, Mutex, MutexGuard};

use crate::kick::Kicker;

/// One for all vCPUs of a VM.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    /// Held by the thread that has the gate closed.
    closer: Mutex<()>,
    seats: Mutex<Vec<Arc<Seat>>>,
    /// Signalled under `seats` when a vCPU leaves a closed gate and when the gate opens.
    changed: Condvar,
}

/// One vCPU's place at the gate.
#[derive(Debug)]
pub struct Seat {
    inside: AtomicBool,
    kicker: Kicker,
}

impl Gate {
    /// A place for a vCPU that `kicker` gets out of the guest.
    pub fn seat(&self, kicker: Kicker) -> Arc<Seat> {
        let seat = Arc::new(Seat {
            inside: AtomicBool::new(false),
            kicker,
        });
        self.seats.lock().push(Arc::clone(&seat));
        seat
    }

    /// Ends a vCPU's place.
    pub fn forget(&self, seat: &Arc<Seat>) {
        self.seats.lock().retain(|other| !Arc::ptr_eq(other, seat));
    }

    /// Waits for the gate to be open and goes in.
    pub fn enter(&self, seat: &Seat) {
        loop {
            // First announce, then look. The reverse order lets a closer check this seat in
            // between: it finds the seat empty, and the vCPU enters a closed gate. The fence keeps
            // the CPU from moving the load above the store; acquire and release do not prevent
            // that.
            seat.inside.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            // What the closer did before it opened the gate is seen inside.
            if !self.closed.load(Ordering::Acquire) {
                return;
            }
            // The closer may already wait for this seat. `leave` wakes it up; without that both
            // sides would wait for each other.
            self.leave(seat);
            let mut seats = self.seats.lock();
            // `Closed::drop` stores and notifies under `seats`, so no notification falls between
            // this check and the wait. Another closer may come before we announce again, hence the
            // outer loop.
            while self.closed.load(Ordering::Acquire) {
                self.changed.wait(&mut seats);
            }
        }
    }

    /// Goes out, and tells a closer that waits.
    pub fn leave(&self, seat: &Seat) {
        // Release: a closer that sees this seat empty also sees all that was done inside.
        seat.inside.store(false, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::Relaxed) {
            // Without this lock, the notification could fall between the closer's check and its
            // wait, and the closer would sleep for ever.
            let _seats = self.seats.lock();
            self.changed.notify_all();
        }
    }

    /// Closes the gate: on return no vCPU is in the guest, until the result is dropped. May be
    /// called by a vCPU's thread, which is not in the guest when it calls anything.
    pub fn close(&self) -> Closed<'_> {
        // `Closed` keeps this lock. Otherwise the first of two closers would open the gate while
        // the second still relies on it.
        let closer = self.closer.lock();
        self.closed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut seats = self.seats.lock();
        // A vCPU that announces itself after this pass sees the closed gate and turns back without
        // a kick. One that announced itself earlier gets a kick even if it has not reached KVM_RUN:
        // its `immediate_exit` is then set.
        for seat in seats
            .iter()
            .filter(|seat| seat.inside.load(Ordering::Acquire))
        {
            seat.kicker.kick();
        }
        while seats.iter().any(|seat| seat.inside.load(Ordering::Acquire)) {
            self.changed.wait(&mut seats);
        }
        Closed {
            gate: self,
            _closer: closer,
        }
    }
}

/// The gate is closed as long as this lives.
pub struct Closed<'a> {
    gate: &'a Gate,
    _closer: MutexGuard<'a, ()>,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        let _seats = self.gate.seats.lock();
        self.gate.closed.store(false, Ordering::Release);
        self.gate.changed.notify_all();
    }
}

/// `cargo test -p hypervisor --features loom --lib model`
#[cfg(all(test, feature = "loom"))]
mod model {
    use loom::cell::UnsafeCell;

    use super::*;

    /// State that vCPUs use inside and the closer changes: loom reports concurrent access.
    struct Slots(UnsafeCell<u32>);

    // SAFETY: that it is shared rightly is what the model checks.
    #[expect(unsafe_code, reason = "the model's own cell")]
    unsafe impl Sync for Slots {}

    #[test]
    fn a_vcpu_inside_and_a_batch_exclude_each_other() {
        loom::model(|| {
            let gate = Arc::new(Gate::default());
            let slots = Arc::new(Slots(UnsafeCell::new(0)));
            let seat = gate.seat(Kicker::default());
            let vcpu = {
                let (gate, slots) = (Arc::clone(&gate), Arc::clone(&slots));
                loom::thread::spawn(move || {
                    for _ in 0..2 {
                        gate.enter(&seat);
                        slots.0.with(|_| {});
                        gate.leave(&seat);
                    }
                })
            };
            let closed = gate.close();
            slots.0.with_mut(|_| {});
            drop(closed);
            vcpu.join().unwrap();
        });
    }

    #[test]
    fn two_batches_come_one_after_the_other() {
        loom::model(|| {
            let gate = Arc::new(Gate::default());
            let slots = Arc::new(Slots(UnsafeCell::new(0)));
            let seat = gate.seat(Kicker::default());
            let other = {
                let (gate, slots) = (Arc::clone(&gate), Arc::clone(&slots));
                loom::thread::spawn(move || {
                    let _closed = gate.close();
                    slots.0.with_mut(|_| {});
                })
            };
            gate.enter(&seat);
            slots.0.with(|_| {});
            gate.leave(&seat);
            let closed = gate.close();
            slots.0.with_mut(|_| {});
            drop(closed);
            other.join().unwrap();
        });
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    #[test]
    fn closed_gate_excludes_vcpus() {
        let gate = Gate::default();
        let (inside, done) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let seat = gate.seat(Kicker::default());
                    while !done.load(Ordering::Relaxed) {
                        gate.enter(&seat);
                        inside.fetch_add(1, Ordering::SeqCst);
                        std::hint::spin_loop();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        gate.leave(&seat);
                    }
                });
            }
            for _ in 0..2_000 {
                let closed = gate.close();
                for _ in 0..20 {
                    assert_eq!(inside.load(Ordering::SeqCst), 0);
                }
                drop(closed);
                thread::yield_now();
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
