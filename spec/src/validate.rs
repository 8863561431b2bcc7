//! Whether a configuration makes sense, and whether this version can do what it says.

use std::collections::HashSet;

use serde_json::Value;

use crate::console::ConsoleMode;
use crate::devices;
use crate::limits;
use crate::service::FieldProblem;
use crate::vm::VmConfig;

/// The host's limits for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLimits {
    /// vCPUs of one VM.
    pub max_vcpus: u32,
    /// Bytes of guest memory that its physical addresses can reach.
    pub max_memory: u64,
    /// CPUs of the host, with those that are offline: vCPUs can be bound to numbers below this.
    pub host_cpus: usize,
}

/// Fields that are accepted at these values only: the ones that say "not there", and those that
/// Cloud Hypervisor's clients send without meaning anything by them. A capability that arrives
/// takes its line out.
const NOT_YET: &[(&str, &[&str])] = &[
    ("/cpus/features/amx", &["false"]),
    ("/payload/igvm", &[]),
    ("/payload/host_data", &[]),
    ("/fs", &["[]"]),
    ("/generic_vhost_user", &["[]"]),
    ("/pmem", &["[]"]),
    ("/devices", &["[]"]),
    ("/user_devices", &["[]"]),
    ("/vdpa", &["[]"]),
    ("/iommu", &["false"]),
    ("/rtc", &[]),
    ("/platform/iommu_segments", &["[]"]),
    ("/platform/iommu_address_width_bits", &["64"]),
    ("/platform/tdx", &["false"]),
    ("/platform/sev_snp", &["false"]),
    ("/platform/iommufd", &["false"]),
    ("/platform/vfio_p2p_dma", &["true"]),
];

/// The code of a problem with a field that this version does not support.
pub const UNSUPPORTED: &str = "unsupported";

impl VmConfig {
    /// All that is wrong with it on such a host, or nothing.
    ///
    /// # Errors
    /// A list of problems that is not empty.
    pub fn validate(&self, host: &HostLimits) -> Result<(), Vec<FieldProblem>> {
        let mut found = Vec::new();
        self.check_supported(&mut found);
        self.check_cpus(host, &mut found);
        self.memory.check(host, &mut found);
        self.check_numa(&mut found);
        self.check_payload(&mut found);
        self.check_consoles(&mut found);
        self.check_segments(&mut found);
        self.check_landlock(&mut found);
        if let Some(platform) = &self.platform {
            platform.check_identity(&mut found);
        }
        if let Some(tpm) = &self.tpm
            && !(1..=limits::SOCKET_PATH_LEN).contains(&tpm.socket.len())
        {
            let most = limits::SOCKET_PATH_LEN;
            let detail = format!("`socket` must be a path of 1 to {most} bytes");
            found.push(problem("/tpm/socket", "out-of-range", detail));
        }
        devices::check(self, &mut found);
        if found.is_empty() { Ok(()) } else { Err(found) }
    }

    fn check_supported(&self, found: &mut Vec<FieldProblem>) {
        // What was parsed can be written again.
        let all = serde_json::to_value(self).unwrap_or_default();
        for (pointer, accepted) in NOT_YET {
            let Some(value) = all.pointer(pointer) else {
                continue;
            };
            let fine = accepted
                .iter()
                .any(|good| serde_json::from_str::<Value>(good).is_ok_and(|good| good == *value));
            if !fine {
                let only = match accepted {
                    [] => String::new(),
                    accepted => format!("; it can be left out, or be {}", accepted.join(" or ")),
                };
                let detail = format!("this version does not support `{}`{only}", name(pointer));
                found.push(problem(pointer, UNSUPPORTED, detail));
            }
        }
    }

    fn check_cpus(&self, host: &HostLimits, found: &mut Vec<FieldProblem>) {
        let (boot, max) = (self.cpus.boot_vcpus, self.cpus.max_vcpus);
        if boot == 0 {
            found.push(problem(
                "/cpus/boot_vcpus",
                "out-of-range",
                "`boot_vcpus` must be at least 1".into(),
            ));
        }
        if max < boot {
            let detail = format!("`max_vcpus` ({max}) is less than `boot_vcpus` ({boot})");
            found.push(problem("/cpus/max_vcpus", "out-of-range", detail));
        } else if max > host.max_vcpus {
            let detail = format!(
                "`max_vcpus` ({max}) is more than this host's KVM allows ({})",
                host.max_vcpus
            );
            found.push(problem("/cpus/max_vcpus", "out-of-range", detail));
        }
        self.check_topology(found);
        if let Some(bits) = self
            .cpus
            .max_phys_bits
            .filter(|bits| !(36..=52).contains(bits))
        {
            let detail = format!("`max_phys_bits` ({bits}) must be 36 to 52");
            found.push(problem("/cpus/max_phys_bits", "out-of-range", detail));
        }
        self.check_affinity(host, found);
    }

    /// Checks that the topology has room for all vCPUs, with APIC ids that this version supports.
    fn check_topology(&self, found: &mut Vec<FieldProblem>) {
        let max = self.cpus.max_vcpus;
        let arrangement = self.cpus.arrangement();
        let highest = max.checked_sub(1).map(|last| arrangement.apic_id(last));
        if let Some(topology) = &self.cpus.topology
            && topology.vcpus() != Some(max)
        {
            let detail = format!(
                "`topology` ({} x {} x {} x {}) does not give the VM's `max_vcpus` ({max})",
                topology.threads_per_core,
                topology.cores_per_die,
                topology.dies_per_package,
                topology.packages
            );
            found.push(problem("/cpus/topology", "inconsistent", detail));
        } else if let Some(highest) = highest
            && highest.is_none_or(|id| id > limits::APIC_ID)
        {
            let highest = highest.map_or("more than 32 bits".to_owned(), |id| id.to_string());
            let detail = format!(
                "these vCPUs need APIC ids up to {highest}, and this version supports ids up to \
                 {}: use fewer vCPUs, or counts of threads, cores and dies that are powers of two",
                limits::APIC_ID
            );
            let field = match self.cpus.topology {
                Some(_) => "/cpus/topology",
                None => "/cpus/max_vcpus",
            };
            found.push(problem(field, UNSUPPORTED, detail));
        }
    }

    fn check_affinity(&self, host: &HostLimits, found: &mut Vec<FieldProblem>) {
        let max = self.cpus.max_vcpus;
        let mut seen = HashSet::new();
        for (i, affinity) in self.cpus.affinity.iter().flatten().enumerate() {
            let pointer = format!("/cpus/affinity/{i}");
            if affinity.vcpu >= max {
                let detail = format!(
                    "`vcpu` ({}) must be less than `max_vcpus` ({max})",
                    affinity.vcpu
                );
                found.push(problem(&pointer, "out-of-range", detail));
            } else if !seen.insert(affinity.vcpu) {
                let detail = format!("vCPU {} is listed twice", affinity.vcpu);
                found.push(problem(&pointer, "duplicate", detail));
            } else if affinity.host_cpus.is_empty() {
                let detail = format!("`host_cpus` of vCPU {} is empty", affinity.vcpu);
                found.push(problem(&pointer, "out-of-range", detail));
            }
            let missing = |cpu: &&usize| **cpu >= host.host_cpus;
            if let Some(cpu) = affinity.host_cpus.iter().find(missing) {
                let detail = format!(
                    "vCPU {} cannot run on CPU {cpu}: this host has {} CPUs, numbered from 0",
                    affinity.vcpu, host.host_cpus
                );
                let pointer = format!("{pointer}/host_cpus");
                found.push(problem(&pointer, "out-of-range", detail));
            }
        }
    }

    fn check_payload(&self, found: &mut Vec<FieldProblem>) {
        let payload = &self.payload;
        if payload.kernel.is_none() && payload.firmware.is_none() && payload.igvm.is_none() {
            let detail = "`kernel` and `firmware` are missing: there is nothing to boot".to_owned();
            found.push(problem("/payload/kernel", "missing", detail));
        }
        if payload.kernel.is_some() && payload.firmware.is_some() {
            let detail =
                "`kernel` and `firmware` exclude each other: firmware finds its kernel on \
                          a disk"
                    .to_owned();
            found.push(problem("/payload/firmware", "inconsistent", detail));
        }
        let cmdline = payload.cmdline.as_deref().unwrap_or("");
        if cmdline.len() >= limits::CMDLINE_LEN {
            let (len, most) = (cmdline.len(), limits::CMDLINE_LEN - 1);
            let detail = format!("`cmdline` has {len} bytes; a kernel accepts at most {most}");
            found.push(problem("/payload/cmdline", "out-of-range", detail));
        } else if cmdline.contains('\0') {
            let detail = "`cmdline` contains a NUL byte".to_owned();
            found.push(problem("/payload/cmdline", "out-of-range", detail));
        }
    }

    /// Refuses Landlock's fields. The program takes them out of the configuration with which it starts
    /// before it has threads; any other comes too late for them.
    fn check_landlock(&self, found: &mut Vec<FieldProblem>) {
        let rules = self.landlock_rules.as_deref().unwrap_or_default();
        for (pointer, is_asked) in [
            ("/landlock_enable", self.landlock_enable),
            ("/landlock_rules", !rules.is_empty()),
        ] {
            if is_asked {
                let detail = format!(
                    "`{}` works in the file of `whimbrel run` only, because a running process cannot \
                     restrict all of its threads; start the program with --landlock",
                    name(pointer)
                );
                found.push(problem(pointer, UNSUPPORTED, detail));
            }
        }
    }

    fn check_consoles(&self, found: &mut Vec<FieldProblem>) {
        for end in self.console_ends() {
            let (field, path) = match end.mode {
                ConsoleMode::File => ("file", end.file),
                // The debug console has no such field, and refuses the mode.
                ConsoleMode::Socket if end.name != "debug_console" => ("socket", end.socket),
                _ => continue,
            };
            let pointer = format!("/{}/{field}", end.name);
            match path.map(String::as_str) {
                None => {
                    let detail = format!("`{field}` is missing: mode {:?} needs a path", end.mode);
                    found.push(problem(&pointer, "missing", detail));
                }
                Some("") => {
                    found.push(problem(
                        &pointer,
                        "out-of-range",
                        format!("`{field}` is empty"),
                    ));
                }
                Some(_) => {}
            }
        }
        if let Some(debug) = &self.debug_console {
            debug.check(found);
        }
    }
}

pub(crate) fn name(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

pub(crate) fn problem(pointer: &str, code: &str, detail: String) -> FieldProblem {
    FieldProblem {
        pointer: pointer.to_owned(),
        code: code.to_owned(),
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PayloadConfig;

    use crate::cpus::CpuTopology;

    const HOST: HostLimits = HostLimits {
        max_vcpus: 8,
        max_memory: 1 << 40,
        host_cpus: 64,
    };

    fn good() -> VmConfig {
        VmConfig::with_payload(PayloadConfig {
            kernel: Some("/k".into()),
            ..Default::default()
        })
    }

    fn found(change: impl FnOnce(&mut VmConfig)) -> Vec<(String, String)> {
        let mut config = good();
        change(&mut config);
        let problems = config.validate(&HOST).err().unwrap_or_default();
        problems
            .into_iter()
            .map(|problem| (problem.pointer, problem.code))
            .collect()
    }

    fn one(pointer: &str, code: &str) -> Vec<(String, String)> {
        vec![(pointer.to_owned(), code.to_owned())]
    }

    #[test]
    fn accepts_default_config() {
        assert_eq!(good().validate(&HOST), Ok(()));
        let sent = r#"{"payload":{"kernel":"/k"},"cpus":{"boot_vcpus":2,"max_vcpus":2},
            "memory":{"size":536870912,"hotplug_method":"Acpi","shared":false,"thp":true},
            "disks":[],"rng":{"src":"/dev/urandom","iommu":false},"iommu":false,
            "serial":{"mode":"Null"},"console":{"mode":"Tty"},"watchdog":false,
            "platform":{"num_pci_segments":1,"tdx":false}}"#;
        assert_eq!(
            crate::parse::<VmConfig>(sent.as_bytes())
                .unwrap()
                .validate(&HOST),
            Ok(())
        );
    }

    #[test]
    fn each_problem_names_its_field() {
        let cpus = |boot, max| found(|c| (c.cpus.boot_vcpus, c.cpus.max_vcpus) = (boot, max));
        assert_eq!(cpus(0, 1), one("/cpus/boot_vcpus", "out-of-range"));
        assert_eq!(cpus(2, 1), one("/cpus/max_vcpus", "out-of-range"));
        assert_eq!(cpus(1, 9), one("/cpus/max_vcpus", "out-of-range"));
        assert_eq!(cpus(1, 2), [], "the room is not used");
        let segments = |count| {
            let body = format!(r#"{{"num_pci_segments": {count}}}"#);
            let platform = crate::parse::<crate::PlatformConfig>(body.as_bytes()).unwrap();
            found(|c| c.platform = Some(platform))
        };
        assert_eq!(segments(2), []);
        for count in [0, 97] {
            assert_eq!(
                segments(count),
                one("/platform/num_pci_segments", "out-of-range")
            );
        }
        let platform = |body: &str| {
            let platform = crate::parse::<crate::PlatformConfig>(body.as_bytes()).unwrap();
            found(|c| c.platform = Some(platform))
        };
        let uuid = "00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(
            platform(&format!(
                r#"{{"system_uuid":"{uuid}","uuid":"{}","serial_number":"s","oem_strings":["größe"]}}"#,
                uuid.to_uppercase()
            )),
            []
        );
        for (body, pointer, code) in [
            (r#"{"system_uuid":"4711"}"#, "system_uuid", "out-of-range"),
            (r#"{"uuid":""}"#, "uuid", "out-of-range"),
            (r#"{"system_family":""}"#, "system_family", "out-of-range"),
            (
                r#"{"system_version":"a\u0000b"}"#,
                "system_version",
                "out-of-range",
            ),
            (
                r#"{"oem_strings":["a","b\n"]}"#,
                "oem_strings/1",
                "out-of-range",
            ),
            (
                r#"{"serial_number":"a","system_serial_number":"b"}"#,
                "serial_number",
                "inconsistent",
            ),
            (
                r#"{"uuid":"00112233-4455-6677-8899-aabbccddeef0",
                    "system_uuid":"00112233-4455-6677-8899-aabbccddeeff"}"#,
                "uuid",
                "inconsistent",
            ),
        ] {
            assert_eq!(
                platform(body),
                one(&format!("/platform/{pointer}"), code),
                "{body}"
            );
        }
        let strings = |count: usize, len: usize| {
            let strings = vec!["x".repeat(len); count];
            platform(&serde_json::json!({ "oem_strings": strings }).to_string())
        };
        assert_eq!(strings(255, 200), []);
        assert_eq!(
            strings(256, 1),
            one("/platform/oem_strings", "out-of-range")
        );
        assert_eq!(strings(1, limits::SMBIOS_LEN - 1), []);
        assert_eq!(
            strings(1, limits::SMBIOS_LEN),
            one("/platform", "out-of-range")
        );
        let large = HostLimits {
            max_vcpus: 4096,
            ..HOST
        };
        let on_large = |vcpus, topology: Option<[u32; 4]>| {
            let mut config = good();
            config.cpus = crate::CpusConfig::with_vcpus(vcpus);
            config.cpus.topology = topology.map(|[threads, cores, dies, packages]| CpuTopology {
                threads_per_core: threads,
                cores_per_die: cores,
                dies_per_package: dies,
                packages,
            });
            let problems = config.validate(&large).err().unwrap_or_default();
            let named = |problem: FieldProblem| (problem.pointer, problem.code);
            problems.into_iter().map(named).collect::<Vec<_>>()
        };
        assert_eq!(on_large(255, None), []);
        assert_eq!(on_large(256, None), one("/cpus/max_vcpus", "unsupported"));
        assert_eq!(on_large(252, Some([2, 63, 1, 2])), []);
        // 33 cores take as many ids as 64.
        assert_eq!(
            on_large(198, Some([1, 33, 1, 6])),
            one("/cpus/topology", "unsupported")
        );
        for size in [0, 4097, 1 << 50] {
            assert_eq!(
                found(|c| c.memory.size = size),
                one("/memory/size", "out-of-range")
            );
        }
        assert_eq!(
            found(|c| c.payload.kernel = None),
            one("/payload/kernel", "missing")
        );
        let firmware = Some("/f".to_owned());
        assert_eq!(
            found(|c| c.payload.firmware.clone_from(&firmware)),
            one("/payload/firmware", "inconsistent")
        );
        assert_eq!(
            found(|c| (c.payload.kernel, c.payload.firmware) = (None, firmware)),
            []
        );
        assert_eq!(
            found(|c| c.payload.cmdline = Some("x".repeat(2048))),
            one("/payload/cmdline", "out-of-range")
        );
        assert_eq!(
            found(|c| c.serial.mode = ConsoleMode::File),
            one("/serial/file", "missing")
        );
        let debug = |body: &str| {
            let debug = crate::parse::<crate::DebugConsoleConfig>(body.as_bytes()).unwrap();
            found(|c| c.debug_console = Some(debug))
        };
        assert_eq!(debug(r#"{"mode":"File","file":"/f"}"#), []);
        assert_eq!(debug(r#"{"mode":"Pty","iobase":1026}"#), []);
        for (body, field, code) in [
            (r#"{"mode":"File"}"#, "file", "missing"),
            (r#"{"mode":"Socket"}"#, "mode", "unsupported"),
            (r#"{"mode":"Null","iobase":1020}"#, "iobase", "out-of-range"),
        ] {
            assert_eq!(debug(body), one(&format!("/debug_console/{field}"), code));
        }
        let bound_to = |host_cpus| {
            let affinity = vec![crate::CpuAffinity { vcpu: 0, host_cpus }];
            found(|c| c.cpus.affinity = Some(affinity))
        };
        assert_eq!(bound_to(vec![0, 63]), []);
        assert_eq!(bound_to(vec![]), one("/cpus/affinity/0", "out-of-range"));
        assert_eq!(
            bound_to(vec![0, 99_999]),
            one("/cpus/affinity/0/host_cpus", "out-of-range")
        );
        assert_eq!(found(|c| c.watchdog = true), []);
        let tpm = |len| {
            let socket = "x".repeat(len);
            found(|c| c.tpm = Some(crate::TpmConfig { socket }))
        };
        assert_eq!(tpm(107), []);
        for len in [0, 108] {
            assert_eq!(tpm(len), one("/tpm/socket", "out-of-range"));
        }
        assert_eq!(found(|c| c.iommu = true), one("/iommu", "unsupported"));
        assert_eq!(
            found(|c| c.console.mode = ConsoleMode::Socket),
            one("/console/socket", "missing")
        );
    }

    #[test]
    fn hotplugged_memory_fits_its_method() {
        use crate::HotplugMethod::{Acpi, VirtioMem};
        const MIB: u64 = 1 << 20;
        let with = |method, room: u64, plugged: u64| {
            found(|c| {
                c.memory.hotplug_method = method;
                c.memory.hotplug_size = Some(room);
                c.memory.hotplugged_size = Some(plugged);
            })
        };
        assert_eq!(with(VirtioMem, 1024 * MIB, 514 * MIB), []);
        assert_eq!(with(Acpi, 1024 * MIB + 4096, 0), []);
        assert_eq!(with(Acpi, 1024 * MIB + 4096, 1024 * MIB), []);
        assert_eq!(with(Acpi, 4096, 0), []);
        let field = |name: &str| one(&format!("/memory/{name}"), "out-of-range");
        assert_eq!(with(VirtioMem, 1000 * MIB, 0), field("hotplug_size"));
        assert_eq!(with(VirtioMem, 1 << 50, 0), field("hotplug_size"));
        assert_eq!(with(VirtioMem, 128 * MIB, MIB), field("hotplugged_size"));
        assert_eq!(
            with(VirtioMem, 128 * MIB, 130 * MIB),
            field("hotplugged_size")
        );
        assert_eq!(with(Acpi, 1 << 50, 0), field("hotplug_size"));
        for (room, plugged) in [(128, 256), (255, 256), (256, 64), (0, 128)] {
            let found = with(Acpi, room * MIB, plugged * MIB);
            assert_eq!(found, field("hotplugged_size"));
        }
        let with_huge = |plugged| {
            found(|c| {
                c.memory.hugepages = true;
                c.memory.hugepage_size = Some(1 << 30);
                c.memory.size = 1 << 30;
                c.memory.hotplug_method = VirtioMem;
                c.memory.hotplug_size = Some(2 << 30);
                c.memory.hotplugged_size = Some(plugged);
            })
        };
        assert_eq!(with_huge(1 << 30), []);
        assert_eq!(with_huge(512 << 20), field("hotplugged_size"));
    }

    #[test]
    fn reports_all_problems_at_once() {
        let all = found(|c| {
            c.memory.size = 1;
            c.iommu = true;
            c.payload.kernel = None;
        });
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn the_table_names_fields_that_exist() {
        let schema = serde_json::to_value(good()).unwrap();
        for (pointer, values) in NOT_YET {
            assert!(
                values
                    .iter()
                    .all(|value| serde_json::from_str::<Value>(value).is_ok())
            );
            let top = pointer.split('/').nth(1).unwrap();
            let body = format!(r#"{{"payload":{{}},"{top}":null}}"#);
            let unknown = crate::parse::<VmConfig>(body.as_bytes())
                .err()
                .is_some_and(|error| error.code() == "unknown-field");
            assert!(!unknown || schema.get(top).is_some(), "{pointer}");
        }
    }
}
