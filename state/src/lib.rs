//! Saved state of a VM: named, versioned sections of a bounded size.
//!
//! What a device saves is not the device. It is a plain type of its own, frozen once it was
//! released and never trusted when read: a [`Saved`] with a version. A later version is another
//! type, which reads the earlier one through [`Saved::older`].
//!
//! ```text
//!   device ── Save ──► Scope ──► Writer ══ bytes ══► Store ──► LoadScope ── Load ──► device
//!                    path, V2   checksums           checks    V1 ─older─► V2
//! ```
//!
//! A [`Store`] checks the whole before anybody reads of it, hands each section out once, and
//! [`finish`](Store::finish) refuses what nobody asked for: state that would be dropped in silence
//! is a guest that breaks later.
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
pub use store::{LoadScope, Section, Store};
pub use writer::{Scope, Writer};

use serde::{Serialize, de::DeserializeOwned};

/// One version of what a device saves, frozen once it was released.
///
/// Fields are named on the wire. Derive it with `deny_unknown_fields`, and without defaults: a
/// field that comes or goes is another version.
pub trait Saved: Serialize + DeserializeOwned {
    /// From 1, and up by one with each type that follows.
    const VERSION: u16;

    /// Reads an earlier version and makes this one of it. The first version knows none.
    ///
    /// # Errors
    /// When the section is of no version that is known, or not what that version says.
    fn older(section: &Section<'_>) -> Result<Self, LoadError> {
        Err(section.unknown_version(Self::VERSION))
    }
}

/// Something whose state can be saved. It stands still while it is.
pub trait Save {
    /// Puts all that is needed to go on from here.
    ///
    /// # Errors
    /// When it does not fit.
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError>;
}

/// Something that goes on from saved state. `Context` is all that it can reach meanwhile.
pub trait Load<Context: ?Sized = ()> {
    /// Takes what [`Save::save`] put, and checks it: whoever wrote it is not trusted.
    ///
    /// # Errors
    /// When it is not there, cannot be read, or makes no sense; what loads is then of no use.
    fn load(
        &mut self,
        from: &mut LoadScope<'_, '_>,
        context: &mut Context,
    ) -> Result<(), LoadError>;
}
