//! Names of devices, and MAC addresses of interfaces.

use std::collections::HashSet;

use crate::device::NetConfig;
use crate::limits;
use crate::service::FieldProblem;
use crate::validate::problem;
use crate::vm::VmConfig;

/// The names that were given, with the devices that have them.
pub(crate) fn given(config: &VmConfig) -> impl Iterator<Item = (String, &str)> {
    let disks = config.disks.iter().flatten().enumerate();
    let disks = disks.map(|(i, disk)| (format!("/disks/{i}"), disk.id.as_deref()));
    let net = config.net.iter().flatten().enumerate();
    let net = net.map(|(i, net)| (format!("/net/{i}"), net.id.as_deref()));
    let vsock = config.vsock.iter();
    let vsock = vsock.map(|vsock| ("/vsock".to_owned(), vsock.id.as_deref()));
    let balloon = config.balloon.iter();
    let balloon = balloon.map(|balloon| ("/balloon".to_owned(), balloon.id.as_deref()));
    let others = [
        ("/rng".to_owned(), config.rng.id.as_deref()),
        ("/console".to_owned(), config.console.id.as_deref()),
    ];
    let memory = config.memory.all_zones().into_iter().enumerate();
    let memory = memory.map(|(i, zone)| (zone.pointer(i), zone.device()));
    let watchdog = config.watchdog;
    let watchdog = watchdog.then(|| ("/watchdog".to_owned(), Some(WATCHDOG)));
    disks
        .chain(net)
        .chain(vsock)
        .chain(balloon)
        .chain(memory)
        .chain(watchdog)
        .chain(others)
        .filter_map(|(pointer, id)| Some((pointer, id?)))
}

/// The name of the device through which a VM's memory grows.
pub const MEMORY_DEVICE: &str = "__memory";

/// The name of the watchdog.
pub const WATCHDOG: &str = "__watchdog";

/// The name of the panic notifier.
pub const PVPANIC: &str = "__pvpanic";

/// The names of devices of which there is one at most.
const OF_THE_MACHINE: [(&str, &str); 5] = [
    ("/memory", MEMORY_DEVICE),
    ("/watchdog", WATCHDOG),
    ("/rng", "__rng"),
    ("/console", "__console"),
    ("/balloon", "__balloon"),
];

/// Returns the problem of the name of the device at `pointer`, if any.
#[must_use]
pub fn check_device_name(pointer: &str, id: &str) -> Option<FieldProblem> {
    let is_own = OF_THE_MACHINE.contains(&(pointer, id));
    // What a path of saved state can hold.
    let fits = (1..=limits::DEVICE_NAME_LEN).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte));
    if is_own || fits && !id.starts_with("__") {
        return None;
    }
    let detail = format!(
        "`{id}` is not a device id: use 1 to {} letters, digits, `-`, `_`, `.` and `:`, not \
         starting with `__`",
        limits::DEVICE_NAME_LEN
    );
    Some(problem(&format!("{pointer}/id"), "out-of-range", detail))
}

/// The first of `_kind0`, `_kind1` and so on that is not taken.
pub fn free_name(kind: &str, taken: impl Fn(&str) -> bool) -> Option<String> {
    let names = (0_usize..).map(|i| format!("_{kind}{i}"));
    names.into_iter().find(|name| !taken(name))
}

impl NetConfig {
    /// Chooses a random, locally administered MAC address (IEEE 802, 8.2) if none is given. It becomes part
    /// of the configuration, so it stays the same over reboots and migrations.
    pub fn give_mac(&mut self) {
        self.mac.get_or_insert_with(|| {
            let random = uuid::Uuid::new_v4();
            // The last six bytes of the sixteen are random all through.
            let [.., a, b, c, d, e, f] = random.into_bytes();
            let a = a & 0xfc | 0x02;
            format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
        });
    }
}

impl VmConfig {
    /// The names that its devices have.
    #[must_use]
    pub fn device_names(&self) -> HashSet<String> {
        let pvpanic = self.pvpanic.then_some(PVPANIC);
        let names = given(self).map(|(_, id)| id).chain(pvpanic);
        names.map(str::to_owned).collect()
    }

    /// Gives every device that has no name one that no other has: `_disk0`, `_net0`, `_vsock0` and
    /// so on, and those of which there is one at most `__rng`, `__console` and `__balloon`. An
    /// interface without an address is given one too.
    pub fn name_devices(&mut self) {
        let mut taken = self.device_names();
        let mut name = |id: &mut Option<String>, kind: &str| {
            if id.is_none() {
                *id = free_name(kind, |name| taken.contains(name));
                taken.extend(id.clone());
            }
        };
        for disk in self.disks.iter_mut().flatten() {
            name(&mut disk.id, "disk");
        }
        for net in self.net.iter_mut().flatten() {
            name(&mut net.id, "net");
            net.give_mac();
        }
        if let Some(vsock) = &mut self.vsock {
            name(&mut vsock.id, "vsock");
        }
        let only = |id: &mut Option<String>, name: &str| {
            id.get_or_insert_with(|| name.to_owned());
        };
        only(&mut self.rng.id, "__rng");
        only(&mut self.console.id, "__console");
        if let Some(balloon) = &mut self.balloon {
            only(&mut balloon.id, "__balloon");
        }
    }

    /// Takes a disk, a network interface or a vsock out, and tells whether there was one of this
    /// name. The others belong to the machine.
    pub fn remove_device(&mut self, id: &str) -> bool {
        fn take<T>(all: &mut Option<Vec<T>>, is_it: impl Fn(&T) -> bool) -> bool {
            let Some(list) = all else { return false };
            let before = list.len();
            list.retain(|one| !is_it(one));
            let taken = list.len() < before;
            if list.is_empty() {
                *all = None;
            }
            taken
        }
        let is_vsock = self
            .vsock
            .take_if(|vsock| vsock.id.as_deref() == Some(id))
            .is_some();
        is_vsock
            || take(&mut self.disks, |disk| disk.id.as_deref() == Some(id))
            || take(&mut self.net, |net| net.id.as_deref() == Some(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_unique() {
        let mut config: VmConfig = serde_json::from_str(
            r#"{"payload":{"kernel":"/k"},"disks":[{"path":"/a"},{"path":"/b","id":"_disk0"},{"path":"/c"}],
                "net":[{}],"vsock":{"cid":3,"socket":"/s"},"balloon":{"size":0}}"#,
        )
        .unwrap();
        config.name_devices();
        let mut names: Vec<_> = config.device_names().into_iter().collect();
        names.sort();
        let expected = [
            "__balloon",
            "__console",
            "__rng",
            "_disk0",
            "_disk1",
            "_disk2",
            "_net0",
            "_vsock0",
        ];
        assert_eq!(names, expected);
        let once = config.clone();
        config.name_devices();
        assert_eq!(config, once, "naming twice changes nothing");

        assert!(config.remove_device("_disk1") && !config.remove_device("_disk1"));
        assert!(config.remove_device("_vsock0") && config.vsock.is_none());
        assert!(config.remove_device("_net0") && config.net.is_none());
        assert!(!config.remove_device("__rng"));
        assert_eq!(config.disks.unwrap().len(), 2);
    }

    #[test]
    fn interface_keeps_generated_mac() {
        let mut config: VmConfig = serde_json::from_str(
            r#"{"payload":{"kernel":"/k"},"net":[{},{"mac":"52:54:00:12:34:56"},{}]}"#,
        )
        .unwrap();
        config.name_devices();
        let all = config.net.clone().unwrap();
        let macs: Vec<_> = all.into_iter().filter_map(|net| net.mac).collect();
        assert_eq!(macs[1], "52:54:00:12:34:56");
        assert_ne!(macs[0], macs[2]);
        for made in [&macs[0], &macs[2]] {
            let [first, ..] = crate::parse_mac(made).unwrap();
            assert_eq!(first & 3, 2, "{made} is of one interface, and of no maker");
        }
    }
}
