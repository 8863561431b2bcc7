//! Saved state of a VM: named, versioned sections of a bounded size.
//!
//! A device does not serialize itself. It saves a plain type of its own, a [`Saved`] with a version.
//! That type is frozen once released, and is not trusted when read. A later version is another type,
//! which reads the earlier one through [`Saved::older`].
//!
//! ```text
//!   device ── Save ──► Scope ──► Writer ══ bytes ══► Store ──► LoadScope ── Load ──► device
//!                    path, V2   checksums           checks    V1 ─older─► V2
//! ```
//!
//! A [`Store`] checks all bytes before any section is read, and hands each section out once.
//! [`finish`](Store::finish) fails if a section was not asked for: state that is dropped in silence
//! shows up later as a broken guest.
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use state::{Load, LoadError, LoadScope, Save, SaveError, Saved, Scope, Section, Store, Writer};
//!
//! #[derive(Serialize, Deserialize)]
//! #[serde(deny_unknown_fields)]
//! struct V1 { divisor: u8 }
//! impl Saved for V1 { const VERSION: u16 = 1; }
//!
//! #[derive(Serialize, Deserialize)]
//! #[serde(deny_unknown_fields)]
//! struct V2 { divisor: u16 }
//! impl Saved for V2 {
//!     const VERSION: u16 = 2;
//!     fn older(section: &Section<'_>) -> Result<Self, LoadError> {
//!         section.read::<V1>().map(|v1| V2 { divisor: v1.divisor.into() })
//!     }
//! }
//!
//! struct Timer { divisor: u16 }
//! impl Save for Timer {
//!     fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
//!         to.put(&V2 { divisor: self.divisor })
//!     }
//! }
//! impl Load for Timer {
//!     fn load(&mut self, from: &mut LoadScope<'_, '_>, _: &mut ()) -> Result<(), LoadError> {
//!         let saved: V2 = from.take()?;
//!         if saved.divisor == 0 {
//!             return Err(from.refuse("a timer that divides by zero"));
//!         }
//!         self.divisor = saved.divisor;
//!         Ok(())
//!     }
//! }
//!
//! let mut writer = Writer::default();
//! Timer { divisor: 7 }.save(&mut writer.scope("timer")?)?;
//! let bytes = writer.finish();
//!
//! let mut timer = Timer { divisor: 1 };
//! let mut store = Store::open(&bytes)?;
//! timer.load(&mut store.scope("timer")?, &mut ())?;
//! store.finish()?;
//! assert_eq!(timer.divisor, 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod error;
pub mod limits;
mod path;
mod store;
mod wire;
mod writer;

pub use error::{LoadError, OpenError, SaveError};
pub use path::{InvalidPath, SectionPath};
pub use store::{LoadScope, Section, SectionCopy, Store};
pub use writer::{Scope, Writer};

use serde::{Serialize, de::DeserializeOwned};

/// One version of a device's saved state, frozen once released.
///
/// Fields are named on the wire. Derive it with `deny_unknown_fields` and without defaults: a type
/// with other fields is another version.
pub trait Saved: Serialize + DeserializeOwned {
    /// The version: 1 for the first type, one more for each that follows.
    const VERSION: u16;

    /// Reads an earlier version and converts it to this one. The default knows no earlier version.
    ///
    /// # Errors
    /// The section's version is not supported, or its body does not match its version.
    fn older(section: &Section<'_>) -> Result<Self, LoadError> {
        Err(section.unknown_version(Self::VERSION))
    }
}

/// A device whose state can be saved. The caller pauses the device first.
pub trait Save {
    /// Writes all state that the device needs to continue from here.
    ///
    /// # Errors
    /// The state exceeds a limit.
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError>;
}

/// A device that continues from saved state. It can reach nothing but `Context` meanwhile.
pub trait Load<Context: ?Sized = ()> {
    /// Reads the state that [`Save::save`] wrote, and checks it: the writer is not trusted.
    ///
    /// # Errors
    /// The state is missing, cannot be decoded, or is invalid. The device is then unusable.
    fn load(
        &mut self,
        from: &mut LoadScope<'_, '_>,
        context: &mut Context,
    ) -> Result<(), LoadError>;
}
