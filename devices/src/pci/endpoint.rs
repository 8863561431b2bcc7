//! A function with BARs and MSI-X.

use std::sync::Arc;

use memory::{RegionId, Transaction};
use parking_lot::Mutex;
use state::{LoadError, LoadScope, Save, SaveError, Scope};

use super::bar::{Bar, BarMap, BarRequest, place_bar};
use super::msix::{self, MsiTarget, Msix};
use super::registers::{COMMAND, Registers};
use super::saved;
use super::{BarError, ConfigSpace, Identity};

/// Puts an endpoint together.
pub struct EndpointBuilder {
    identity: Identity,
    registers: Registers,
    bars: Vec<Bar>,
    msix: Option<(usize, Arc<Msix>)>,
}

impl EndpointBuilder {
    /// With neither BARs nor capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            registers: Registers::new(identity),
            bars: Vec::new(),
            msix: None,
        }
    }

    /// Adds a BAR. Its region is shown nowhere until the guest, or the machine, enables
    /// memory decoding.
    ///
    /// # Errors
    /// Fails if the register is not free, or the size is invalid.
    pub fn bar(&mut self, request: &BarRequest) -> Result<(), BarError> {
        let bar = Bar::new(&mut self.registers, request, &self.bars)?;
        self.bars.push(bar);
        Ok(())
    }

    /// Adds a capability: the body behind its two-byte header, and its bits that the guest may
    /// write. Returns its offset; `None` when there is no room.
    #[must_use]
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        self.registers.add_capability(id, body, writable)
    }

    /// Adds an MSI-X capability. Table and pending bits are at these offsets of this BAR,
    /// where the caller shows [`Msix::table`] and [`Msix::pba`]. `None` when there is no room for
    /// the capability.
    #[must_use]
    pub fn msix(
        &mut self,
        vectors: u16,
        bar: u8,
        (table, pba): (u32, u32),
        target: Arc<dyn MsiTarget>,
    ) -> Option<Arc<Msix>> {
        let msix = Msix::new(vectors, target);
        let mut body = [0; 10];
        // Message control holds the size as N - 1 (PCI Local Bus 3.0, 6.8.2.3). `count` is at least
        // 1.
        body[..2].copy_from_slice(&(msix.count() - 1).to_le_bytes());
        // Table and PBA registers hold the offset and, in the three low bits, the BAR (6.8.2.4 and
        // 6.8.2.5).
        body[2..6].copy_from_slice(&(table & !7 | u32::from(bar & 7)).to_le_bytes());
        body[6..].copy_from_slice(&(pba & !7 | u32::from(bar & 7)).to_le_bytes());
        let writable = msix::CONTROL_WRITABLE.to_le_bytes();
        let at = self.capability(msix::CAPABILITY, &body, &writable)?;
        self.msix = Some((at + 2, Arc::clone(&msix)));
        Some(msix)
    }

    /// The endpoint, whose BARs `map` shows.
    #[must_use]
    pub fn build(self, map: Arc<dyn BarMap>) -> Endpoint {
        Endpoint {
            identity: self.identity,
            power_on: self.registers.clone(),
            msix: self.msix,
            map,
            state: Mutex::new(State {
                registers: self.registers,
                bars: self.bars,
                assumed_master: false,
            }),
        }
    }
}

struct State {
    registers: Registers,
    bars: Vec<Bar>,
    /// See [`Endpoint::assume_bus_master`].
    assumed_master: bool,
}

impl State {
    fn is_master(&self) -> bool {
        self.assumed_master || self.registers.is_master()
    }
}

/// A function of type 0.
pub struct Endpoint {
    identity: Identity,
    /// The registers as they are after power-on.
    power_on: Registers,
    /// Offset of the message control register, and the vectors.
    msix: Option<(usize, Arc<Msix>)>,
    map: Arc<dyn BarMap>,
    state: Mutex<State>,
}

impl Endpoint {
    /// Returns the function's identity.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Its vectors, if it has any.
    #[must_use]
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|(_, msix)| msix)
    }

    /// Whether the function may read and write memory and send messages (PCI Local Bus 3.0, 6.2.2).
    #[must_use]
    pub fn is_bus_master(&self) -> bool {
        self.state.lock().is_master()
    }

    /// Whether bus mastering is only assumed: see [`Endpoint::assume_bus_master`].
    #[must_use]
    pub fn assumes_bus_master(&self) -> bool {
        self.state.lock().assumed_master
    }

    /// Takes bus mastering to be on until the guest writes the command register or resets the
    /// machine: for a guest that was saved where the bit was not honoured, and runs without it.
    pub fn assume_bus_master(&self) {
        let mut state = self.state.lock();
        state.assumed_master = true;
        self.follow_control(&state);
    }

    fn follow_control(&self, state: &State) {
        if let Some((control, msix)) = &self.msix {
            msix.set_control(state.registers.get_u16(*control), state.is_master());
        }
    }

    /// Stops the function's BARs from moving, because it is removed. Returns those that are mapped, for the
    /// caller to take from the map. (It cannot be done here: a vCPU that moves a BAR holds this function's
    /// lock and waits for the topology's.)
    pub fn withdraw(&self) -> Vec<RegionId> {
        // Without `bars` a later write of the guest moves nothing, even if a vCPU is in `write` by
        // now.
        let bars = std::mem::take(&mut self.state.lock().bars);
        let shown = bars.iter().filter(|bar| bar.shown.is_some());
        shown.map(|bar| bar.region).collect()
    }

    /// Resets the function: no BAR is mapped, all vectors are masked, and addresses have their first values.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        state.registers = self.power_on.clone();
        state.assumed_master = false;
        if let Some((_, msix)) = &self.msix {
            msix.reset();
        }
        self.follow_bars(&mut state);
    }

    fn follow_bars(&self, state: &mut State) {
        let State {
            registers, bars, ..
        } = state;
        for bar in bars {
            let wanted = bar.wanted(registers);
            if wanted != bar.shown {
                bar.shown = wanted;
                self.map.place(bar.region, wanted);
            }
        }
    }

    /// Loads the saved state. The BARs move by `tx`, so they appear with everything else. The
    /// machine is paused.
    ///
    /// # Errors
    /// Fails if it was another function, or what was saved makes no sense.
    pub fn load(
        &self,
        from: &mut LoadScope<'_, '_>,
        tx: &mut Transaction<'_>,
    ) -> Result<(), LoadError> {
        let saved: saved::V1 = from.take()?;
        let header = <[u8; 256]>::try_from(saved.header).map_err(|header| {
            from.refuse(format!("the header has {} bytes, not 256", header.len()))
        })?;
        let mut state = self.state.lock();
        let mut registers = self.power_on.clone();
        registers
            .restore(&header)
            .map_err(|at| from.refuse(format!("register {at:#x} belongs to another function")))?;
        match (&self.msix, saved.msix) {
            (Some((control, msix)), Some(saved)) => {
                let (entries, pending) = msix.save();
                if (entries.len(), pending.len()) != (saved.entries.len(), saved.pending.len()) {
                    let (was, is) = (saved.entries.len(), entries.len());
                    return Err(from.refuse(format!(
                        "the saved function has {was} MSI-X vectors, and this one has {is}"
                    )));
                }
                let control = registers.get_u16(*control);
                msix.restore(
                    &saved.entries,
                    &saved.pending,
                    control,
                    registers.is_master(),
                );
            }
            (None, None) => {}
            (is, _) => {
                let what = if is.is_some() { "had no" } else { "had" };
                return Err(from.refuse(format!("the saved function {what} MSI-X vectors")));
            }
        }
        state.registers = registers;
        state.assumed_master = false;
        let State {
            registers, bars, ..
        } = &mut *state;
        for bar in bars {
            let wanted = bar.wanted(registers);
            if wanted != bar.shown {
                // By the transaction of the whole load, and not by `map`: `map` would open a
                // transaction of its own and wait for this one for good.
                place_bar(tx, bar.region, wanted)
                    .map_err(|error| from.refuse(error.to_string()))?;
                bar.shown = wanted;
            }
        }
        Ok(())
    }
}

impl Save for Endpoint {
    fn save(&self, to: &mut Scope<'_>) -> Result<(), SaveError> {
        let state = self.state.lock();
        let msix = self.msix.as_ref().map(|(_, msix)| {
            let (entries, pending) = msix.save();
            saved::Msix { entries, pending }
        });
        to.put(&saved::V1 {
            header: state.registers.header().to_vec(),
            msix,
        })
    }
}

impl ConfigSpace for Endpoint {
    fn read(&self, at: usize, data: &mut [u8]) {
        self.state.lock().registers.read(at, data);
    }

    fn write(&self, at: usize, data: &[u8]) {
        let mut state = self.state.lock();
        state.registers.write(at, data);
        // The bus master bit is in the low byte. From its first write on the guest's own value
        // holds.
        if (at..at.saturating_add(data.len())).contains(&COMMAND) {
            state.assumed_master = false;
        }
        self.follow_control(&state);
        self.follow_bars(&mut state);
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}
