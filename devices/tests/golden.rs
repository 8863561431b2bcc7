//! The bytes of each section's first version, which are read for ever. A section that changes gets a
//! new version and a new file; these stay. `UPDATE_GOLDEN=1` writes those that are missing.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use devices::pci::Bus;
use devices::{
    ConsoleInput as _, CpuBlock, DimmBlock, HotplugBlock, InterruptLine, PmTimer, PowerBlock, Rtc,
    Serial,
};
use memory::DeviceOps as _;
use state::{Load, Save, Store, Writer};

fn check<D: Save>(name: &str, device: &D, load: impl FnOnce(&mut state::LoadScope<'_, '_>)) {
    let save = || {
        let mut writer = Writer::default();
        device.save(&mut writer.scope(name).unwrap()).unwrap();
        writer.finish()
    };
    let saved = save();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.v1"));
    if !path.exists() && std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &saved).unwrap();
    }
    let golden = fs::read(&path).unwrap();
    let mut store = Store::open(&golden).unwrap();
    load(&mut store.scope(name).unwrap());
    store.finish().unwrap();
    assert!(saved == golden && save() == golden, "{name}");
}

#[test]
fn saved_state_is_stable() {
    let line = || InterruptLine::new().unwrap();
    let serial = Serial::new(line(), Box::new(std::io::sink()), |_| {}, || {});
    serial.write(7, &[0x5a]);
    serial.receive(b"typed");
    check("serial", &serial, |from| {
        (&serial).load(from, &mut ()).unwrap();
    });
    let power = PowerBlock::new(line(), |_| {});
    power.press_power_button();
    check("power", &power, |from| {
        (&power).load(from, &mut ()).unwrap();
    });
    let hotplug = HotplugBlock::new(|_| {});
    hotplug.insert(3);
    hotplug.want_back(5);
    check("hotplug", &hotplug, |from| {
        (&hotplug).load(from, &mut ()).unwrap();
    });
    let timer = PmTimer::new(|| Duration::from_secs(3));
    check("pm-timer", &timer, |from| {
        (&timer).load(from, &mut ()).unwrap();
    });
    let rtc = Rtc::new(|| Duration::from_secs(1_000_000_000), 1 << 30, 0);
    // The guest sets the year, and chooses a register.
    rtc.write(0, &[9]);
    rtc.write(1, &[0x11]);
    rtc.write(0, &[0x8a]);
    check("rtc", &rtc, |from| {
        (&rtc).load(from, &mut ()).unwrap();
    });
    let cpus = CpuBlock::new(2, 8, || {});
    (2..5).for_each(|vcpu| cpus.plug(vcpu));
    let mut event = [0; 4];
    cpus.read(devices::cpus::EVENT, &mut event);
    cpus.read(devices::cpus::EVENT, &mut event);
    cpus.want_back(1);
    cpus.want_back(3);
    check("cpus", &cpus.snapshot(), |from| {
        let loaded = CpuBlock::new(2, 8, || {});
        (&loaded).load(from, &mut ()).unwrap();
        assert!(loaded.present() == cpus.present() && loaded.leaving() == cpus.leaving());
    });
    let region = memory::AddrRange::new(5 << 30, 8 << 30).unwrap();
    let unit = devices::dimms::UNIT;
    let dimms = DimmBlock::new(region, 2 * unit, || {}).unwrap();
    (1..5).for_each(|units| dimms.plug(units * unit).unwrap());
    for slot in 1..=3_u32 {
        dimms.read(devices::dimms::EVENT, &mut event);
        if slot < 3 {
            // The first is accepted, the second refused.
            let answer = (slot - 1) << 24 | 1 << 16 | slot;
            dimms.write(devices::dimms::STATUS, &answer.to_le_bytes());
        }
    }
    check("dimms", &dimms, |from| {
        let loaded = DimmBlock::new(region, 0, || {}).unwrap();
        (&loaded).load(from, &mut ()).unwrap();
        assert_eq!(loaded.plugged(), dimms.plugged());
    });
    let bus = Bus::new(0);
    bus.ports().write(0, &0x8000_0800_u32.to_le_bytes());
    check("pci", &*bus, |from| {
        (&*bus).load(from, &mut ()).unwrap();
    });
}
