//! Devices of the platform at fixed addresses.

use std::io::Write;
use std::sync::Arc;

use ::devices::sandbox::Confinement;
use ::devices::tpm::{self, Emulator, Tpm};
use ::devices::{
    CpuBlock, DebugConsole, DebugPort, HotplugBlock, InterruptLine, KeyboardReset, PowerBlock,
    ResetControl, Serial, pci, power,
};
use hypervisor::IrqRoutes;
use memory::{DeviceOps, SpaceKind, Transaction};
use spec::{CpusConfig, VmConfig};

use super::vcpu::GuestEnd;
use crate::arch::x86_64::layout;
use crate::devices::{MachineOrigin, PciHost};
use crate::failure::BuildError;
use crate::guest_event::{self, GuestEvent, Port, Reporter};

/// Maps a device at ports.
pub(super) fn map_port(
    tx: &mut Transaction<'_>,
    name: (&str, &str),
    port: u16,
    len: u64,
    device: Arc<dyn DeviceOps>,
) -> Result<(), BuildError> {
    let region = tx.device(name, len, device)?;
    Ok(tx.map(SpaceKind::PortIo, port.into(), region, 0)?)
}

/// Creates an interrupt line and attaches it to a pin of the I/O APIC.
fn line(routes: &IrqRoutes, gsi: u32) -> Result<InterruptLine, BuildError> {
    let line = InterruptLine::new().map_err(BuildError::host("create an interrupt line"))?;
    // By an irqfd: devices hold a descriptor, and no handle of KVM.
    routes.attach(line.event_fd(), gsi)?;
    Ok(line)
}

/// Maps the serial port, whose output goes to `output`.
pub(super) fn map_serial(
    tx: &mut Transaction<'_>,
    routes: &IrqRoutes,
    output: Box<dyn Write + Send>,
    reporter: &Reporter,
) -> Result<Arc<Serial>, BuildError> {
    let (first, room) = (reporter.clone(), reporter.clone());
    let serial = Arc::new(Serial::new(
        line(routes, layout::SERIAL_IRQ)?,
        output,
        // Called on a vCPU's thread: a report is a flag and a wake, and never waits for the driver.
        move |when| first.report(GuestEvent::FirstSerial(when)),
        move || room.report(GuestEvent::Room(Port::Serial)),
    ));
    map_port(
        tx,
        ("registers", "serial"),
        layout::SERIAL_PORT,
        8,
        Arc::clone(&serial) as _,
    )?;
    Ok(serial)
}

/// Maps the ACPI power registers.
pub(super) fn map_power(
    tx: &mut Transaction<'_>,
    routes: &IrqRoutes,
    end: &GuestEnd,
) -> Result<Arc<PowerBlock>, BuildError> {
    let block = PowerBlock::new(line(routes, layout::GED_IRQ)?, end.handler());
    let block = Arc::new(block);
    map_port(
        tx,
        ("registers", "power"),
        layout::POWER_PORT,
        power::LEN,
        Arc::clone(&block) as _,
    )?;
    Ok(block)
}

/// Maps the registers of ACPI's PCI hotplug.
pub(super) fn map_hotplug(
    tx: &mut Transaction<'_>,
    reporter: &Reporter,
) -> Result<Arc<HotplugBlock>, BuildError> {
    let to = reporter.clone();
    let block = Arc::new(HotplugBlock::new(move |slot| {
        to.report(GuestEvent::Ejected(slot));
    }));
    map_port(
        tx,
        ("registers", "hotplug"),
        layout::HOTPLUG_PORT,
        ::devices::hotplug::LEN,
        Arc::clone(&block) as _,
    )?;
    Ok(block)
}

/// Maps the registers of ACPI's CPU hotplug.
pub(super) fn map_cpus(
    tx: &mut Transaction<'_>,
    config: &CpusConfig,
    reporter: &Reporter,
) -> Result<Arc<CpuBlock>, BuildError> {
    let to = reporter.clone();
    let block = Arc::new(CpuBlock::new(
        config.boot_vcpus,
        config.max_vcpus,
        move || to.report(GuestEvent::Cpus),
    ));
    map_port(
        tx,
        ("registers", "cpus"),
        layout::CPUS_PORT,
        ::devices::cpus::LEN,
        Arc::clone(&block) as _,
    )?;
    Ok(block)
}

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
    // Priority -1: if the configuration names a port of another device, that device stays in front.
    Ok(tx.map(SpaceKind::PortIo, port.into(), region, -1)?)
}

/// Connects to the emulator of the TPM, if the machine has one and does not replace a machine that is
/// connected.
pub(super) fn tpm_emulator(
    config: &VmConfig,
    origin: &MachineOrigin,
) -> Result<Option<Arc<Emulator>>, BuildError> {
    // A machine that replaces another one keeps the connection: swtpm may end when it closes.
    Ok(match (&config.tpm, &origin.tpm) {
        (None, _) => None,
        (Some(_), Some(kept)) => Some(Arc::clone(kept)),
        (Some(tpm), None) => Some(Arc::new(Emulator::connect(tpm.socket.as_ref())?)),
    })
}

/// Makes a TPM and switches it on, which waits for the emulator: not for a change of the map.
pub(super) fn tpm(
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
    Ok(Arc::new(device))
}

pub(super) fn map_tpm(tx: &mut Transaction<'_>, device: &Arc<Tpm>) -> Result<(), BuildError> {
    let device = Arc::clone(device);
    let region = tx.device(("registers", "tpm"), tpm::LEN, device)?;
    Ok(tx.map(SpaceKind::Memory, layout::TPM, region, 0)?)
}
