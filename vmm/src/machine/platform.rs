//! Devices of the platform at fixed addresses.

use std::io::Write;
use std::sync::Arc;

use ::devices::sandbox::Confinement;
use ::devices::tpm::{self, Emulator, Tpm};
use ::devices::{DebugConsole, DebugPort, KeyboardReset, ResetControl, pci};
use memory::{SpaceKind, Transaction};
use spec::VmConfig;

use super::map_port;
use super::vcpu::GuestEnd;
use crate::arch::x86_64::layout;
use crate::devices::{MachineOrigin, PciHost};
use crate::failure::BuildError;
use crate::guest_event::{self, GuestEvent, Reporter};

/// Maps the platform that PC software expects: PCI, and two ports.
pub(super) fn map_pc(
    tx: &mut Transaction<'_>,
    host: &PciHost,
    end: &GuestEnd,
) -> Result<(), BuildError> {
    for (segment, bus) in (0..).zip(host.buses()) {
        let ecam = tx.device(("ecam", "pci"), pci::ECAM_BUS_LEN, bus.ecam())?;
        tx.map(SpaceKind::Memory, layout::ecam(segment), ecam, 0)?;
        if segment == 0 {
            map_port(
                tx,
                ("configuration", "pci"),
                layout::PCI_PORT,
                8,
                Arc::new(ResetControl::new(bus.ports(), end.handler())),
            )?;
        }
    }
    let keyboard = KeyboardReset::new(end.handler());
    map_port(
        tx,
        ("command", "keyboard"),
        layout::KEYBOARD_PORT,
        1,
        Arc::new(keyboard),
    )?;
    let to = end.reporter.clone();
    let debug = DebugPort::new(move |when| to.report(GuestEvent::FirstDebugPort(when)));
    map_port(
        tx,
        ("codes", "debug-port"),
        layout::DEBUG_PORT,
        1,
        Arc::new(debug),
    )
}

/// Maps the debug console behind the platform's own ports, whatever port the configuration names.
pub(super) fn map_debug_console(
    tx: &mut Transaction<'_>,
    port: u16,
    output: Box<dyn Write + Send>,
) -> Result<(), BuildError> {
    let device = Arc::new(DebugConsole::new(output));
    let region = tx.device(("port", "debug-console"), 1, device)?;
    // Priority -1: a configuration that names a port of the platform hides nothing of it.
    Ok(tx.map(SpaceKind::PortIo, port.into(), region, -1)?)
}

/// Connects to the emulator of the TPM, if the machine has one and does not replace a machine that is
/// connected.
pub(super) fn tpm_emulator(
    config: &VmConfig,
    origin: &MachineOrigin,
) -> Result<Option<Arc<Emulator>>, BuildError> {
    Ok(match (&config.tpm, &origin.tpm) {
        (None, _) => None,
        (Some(_), Some(kept)) => Some(Arc::clone(kept)),
        (Some(tpm), None) => Some(Arc::new(Emulator::connect(tpm.socket.as_ref())?)),
    })
}

/// Maps a TPM, which is switched on.
pub(super) fn map_tpm(
    tx: &mut Transaction<'_>,
    emulator: &Arc<Emulator>,
    confinement: Confinement,
    reporter: &Reporter,
) -> Result<Arc<Tpm>, BuildError> {
    let to = reporter.clone();
    let report = move |why: String| {
        let failure = guest_event::sandbox_violation(&format!("tpm: {why}"), None);
        to.report(GuestEvent::Failed(failure));
    };
    let device = Tpm::new(layout::TPM, Arc::clone(emulator), confinement, report)?;
    let device = Arc::new(device);
    let region = tx.device(("registers", "tpm"), tpm::LEN, Arc::clone(&device) as _)?;
    tx.map(SpaceKind::Memory, layout::TPM, region, 0)?;
    Ok(device)
}
