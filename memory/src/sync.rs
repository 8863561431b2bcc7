//! The locks and atomics of what is model-checked, here and in `hypervisor`, or the model checker's
//! stand-ins for them (feature `loom`).
#![allow(missing_docs, reason = "the names are the standard ones")]

#[cfg(not(feature = "loom"))]
pub use parking_lot::{Condvar, Mutex, MutexGuard};
#[cfg(not(feature = "loom"))]
pub use std::{sync::atomic, thread};

#[cfg(feature = "loom")]
pub use self::model::{Condvar, Guard as MutexGuard, Mutex};
#[cfg(feature = "loom")]
pub use loom::{sync::atomic, thread};

#[cfg(feature = "loom")]
#[expect(clippy::unwrap_used, reason = "a lock of a model is never poisoned")]
mod model {
    #[derive(Debug)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> Guard<'_, T> {
            Guard(Some(self.0.lock().unwrap()))
        }
    }

    pub struct Guard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    impl<T> std::ops::Deref for Guard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.0.as_ref().unwrap()
        }
    }

    impl<T> std::ops::DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().unwrap()
        }
    }

    #[derive(Debug)]
    pub struct Condvar(loom::sync::Condvar);

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl Default for Condvar {
        fn default() -> Self {
            Self::new()
        }
    }

    impl Condvar {
        pub fn new() -> Self {
            Self(loom::sync::Condvar::new())
        }

        pub fn wait<T>(&self, guard: &mut Guard<'_, T>) {
            let held = guard.0.take().unwrap();
            guard.0 = Some(self.0.wait(held).unwrap());
        }

        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}
