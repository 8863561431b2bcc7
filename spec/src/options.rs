//! The options of Cloud Hypervisor's command line: `--cpus boot=2,max=4` and the like.
//!
//! An option is a list of `key=value` pairs. Each becomes a field of the type that a request's
//! body would have, and is read by the same code: what is wrong in a body is wrong here, and is
//! said in the same words.

mod consoles;
mod kinds;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

pub use self::consoles::{console, debug_console, serial};
pub use self::kinds::{
    BALLOON, DEVICE, DISK, FS, MEMORY_ZONE, MIRROR, NET, NUMA, PCI_SEGMENT, PLATFORM, PMEM,
    RATE_LIMIT_GROUP, RECEIVE_MIGRATION, RESTORE, RNG, SEND_MIGRATION, TPM, USER_DEVICE, VDPA,
    VSOCK,
};
use crate::cpus::CpusConfig;
use crate::memory::MemoryConfig;
use crate::parse::{ParseError, parse};

/// An option that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {reason}")]
pub struct OptionError {
    option: String,
    reason: String,
}

fn error(option: &str, reason: impl Into<String>) -> OptionError {
    OptionError {
        option: option.to_owned(),
        reason: reason.into(),
    }
}

/// How a value is written.
#[derive(Clone, Copy)]
enum Form {
    Text,
    Number,
    /// A number with `K`, `M`, `G` or `T` behind it, or none.
    Size,
    /// `on`, `off`, `true`, `false`.
    Switch,
    /// `[a,b]`, or one value without brackets.
    Texts,
    /// `[0,2-3]`.
    Numbers,
    /// `[0@[1,2],1@[3]]`: CPUs of the host for queues.
    Affinity,
    /// `[1@20,2@30]`, or one of them: distances to other nodes.
    Distances,
    /// A word of the API, in the command line's way of writing: `on-demand` for `OnDemand`.
    Word,
}

/// `(key, field, form)`.
type Key = (&'static str, &'static str, Form);

const MEMORY: &[Key] = &[
    ("size", "size", Form::Size),
    ("mergeable", "mergeable", Form::Switch),
    ("shared", "shared", Form::Switch),
    ("hugepages", "hugepages", Form::Switch),
    ("hugepage_size", "hugepage_size", Form::Size),
    ("prefault", "prefault", Form::Switch),
    ("reserve", "reserve", Form::Switch),
    ("thp", "thp", Form::Switch),
    ("hotplug_method", "hotplug_method", Form::Word),
    ("hotplug_size", "hotplug_size", Form::Size),
    ("hotplugged_size", "hotplugged_size", Form::Size),
];

/// An option whose keys are the fields of a configuration type.
pub struct OptionKind {
    name: &'static str,
    keys: &'static [Key],
    /// Keys that it has in common with others.
    also: &'static [&'static [Key]],
}

impl OptionKind {
    /// Reads the option's text.
    ///
    /// # Errors
    /// Fails if a key is not known, or a value not possible; the text names it.
    pub fn read<T: DeserializeOwned>(&self, text: &str) -> Result<T, OptionError> {
        let keys: Vec<Key> = self
            .keys
            .iter()
            .chain(self.also.iter().copied().flatten())
            .copied()
            .collect();
        typed(self.name, &Value::Object(fields(self.name, text, &keys)?))
    }
}

/// `--cpus boot=2,max=2,topology=1:2:1:1,affinity=[0@[0,1]]`, or just a number.
///
/// # Errors
/// Fails if a key is not known, or a value not possible.
pub fn cpus(text: &str) -> Result<CpusConfig, OptionError> {
    const NAME: &str = "--cpus";
    if let Ok(count) = text.parse() {
        return Ok(CpusConfig::with_vcpus(count));
    }
    let keys: &[Key] = &[
        ("boot", "boot_vcpus", Form::Number),
        ("max", "max_vcpus", Form::Number),
        ("topology", "topology", Form::Text),
        ("kvm_hyperv", "kvm_hyperv", Form::Switch),
        ("profile", "profile", Form::Text),
        ("max_phys_bits", "max_phys_bits", Form::Number),
        ("nested", "nested", Form::Switch),
        ("affinity", "affinity", Form::Text),
        ("features", "features", Form::Text),
        ("core_scheduling", "core_scheduling", Form::Word),
    ];
    let mut fields = fields(NAME, text, keys)?;
    let boot = fields.entry("boot_vcpus").or_insert(json!(1)).clone();
    fields.entry("max_vcpus").or_insert(boot);
    if let Some(Value::String(topology)) = fields.remove("topology") {
        fields.insert("topology".into(), read_topology(NAME, &topology)?);
    }
    if let Some(Value::String(affinity)) = fields.remove("affinity") {
        fields.insert(
            "affinity".into(),
            read_affinity("vcpu", &affinity).ok_or_else(|| {
                error(
                    NAME,
                    format!("affinity={affinity} must have the form {AFFINITY}"),
                )
            })?,
        );
    }
    if let Some(Value::String(features)) = fields.remove("features") {
        let names: Vec<_> = features
            .split(',')
            .filter(|name| !name.is_empty())
            .collect();
        let features: Map<_, _> = names
            .iter()
            .map(|name| ((*name).to_owned(), json!(true)))
            .collect();
        fields.insert("features".into(), Value::Object(features));
    }
    typed(NAME, &Value::Object(fields))
}

fn read_topology(option: &str, text: &str) -> Result<Value, OptionError> {
    let parts: Vec<u32> = text
        .split(':')
        .map_while(|part| part.parse().ok())
        .collect();
    let [threads, cores, dies, packages] = parts[..] else {
        return Err(error(
            option,
            format!("topology={text} must be four numbers, threads:cores:dies:packages"),
        ));
    };
    Ok(json!({
        "threads_per_core": threads, "cores_per_die": cores,
        "dies_per_package": dies, "packages": packages,
    }))
}

const AFFINITY: &str = "[0@[0,1],1@[2-3]]";

/// Reads a list of numbers, called `key`, with CPUs of the host for each.
fn read_affinity(key: &str, text: &str) -> Option<Value> {
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    let entries = split(inner).ok()?;
    let read = entries.iter().map(|entry| {
        let (number, cpus) = entry.split_once('@')?;
        let number: u32 = number.parse().ok()?;
        Some(json!({ key: number, "host_cpus": numbers(cpus)? }))
    });
    Some(Value::Array(read.collect::<Option<_>>()?))
}

/// Reads a list of nodes with their distances.
fn read_distances(text: &str) -> Option<Value> {
    let read = split(inner(text)).ok()?.into_iter().map(|entry| {
        let (node, distance) = entry.split_once('@')?;
        let (node, distance): (u32, u8) = (node.parse().ok()?, distance.parse().ok()?);
        Some(json!({ "destination": node, "distance": distance }))
    });
    Some(Value::Array(read.collect::<Option<_>>()?))
}

/// A list's text without its brackets, which a list of one may lack.
fn inner(text: &str) -> &str {
    let within = text.strip_prefix('[');
    within
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text)
}

/// `--memory size=512M,shared=on`.
///
/// # Errors
/// Fails if a key is not known, or a value not possible.
pub fn memory(text: &str) -> Result<MemoryConfig, OptionError> {
    const NAME: &str = "--memory";
    let mut fields = fields(NAME, text, MEMORY)?;
    fields
        .entry("size")
        .or_insert(json!(MemoryConfig::default().size));
    typed(NAME, &Value::Object(fields))
}

/// Bytes, with `K`, `M`, `G` or `T` (powers of 1024) behind the number, or none.
#[must_use]
pub fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.trim_end_matches(['i', 'B']).char_indices().last()? {
        (at, 'K' | 'k') => (&text[..at], 10),
        (at, 'M' | 'm') => (&text[..at], 20),
        (at, 'G' | 'g') => (&text[..at], 30),
        (at, 'T' | 't') => (&text[..at], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn fields(option: &str, text: &str, keys: &[Key]) -> Result<Map<String, Value>, OptionError> {
    let mut fields = Map::new();
    for part in split(text).map_err(|reason| error(option, reason))? {
        let Some((key, value)) = part.split_once('=') else {
            return Err(error(option, without_key(&part, keys)));
        };
        let Some((_, field, form)) = keys.iter().find(|(known, _, _)| *known == key) else {
            let hint = crate::nearest(key, keys.iter().map(|(known, _, _)| *known));
            let hint = hint.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            return Err(error(option, format!("unknown key `{key}`{hint}")));
        };
        // As for Cloud Hypervisor, an empty value is not given. An address has a default that differs
        // from none, so that its empty value stays.
        if value.is_empty() && !matches!(*field, "ip" | "mask") {
            continue;
        }
        let read = read_value(*form, value)
            .map_err(|expected| error(option, format!("{key}={value} is not {expected}")))?;
        if insert(&mut fields, field, read).is_some() {
            return Err(error(option, format!("`{key}` is given twice")));
        }
    }
    Ok(fields)
}

/// Explains a part that must have the form key=value.
fn without_key(part: &str, keys: &[Key]) -> String {
    if keys.iter().any(|(key, ..)| *key == part) {
        return format!("`{part}` needs a value: {part}=VALUE");
    }
    let hint = match keys.first() {
        // The first key is the main one: `path` of a disk, `size` of memory.
        Some((key, _, form)) if read_value(*form, part).is_ok() => {
            format!("; did you mean {key}={part}?")
        }
        _ => String::new(),
    };
    format!("`{part}` must have the form key=value{hint}")
}

/// Puts a value where `field` says, a path of names, and gives what was there.
fn insert(fields: &mut Map<String, Value>, field: &str, value: Value) -> Option<Value> {
    match field.split_once('/') {
        None => fields.insert(field.to_owned(), value),
        Some((outer, inner)) => {
            let outer = fields.entry(outer).or_insert_with(|| json!({}));
            insert(outer.as_object_mut()?, inner, value)
        }
    }
}

fn read_value(form: Form, text: &str) -> Result<Value, &'static str> {
    match form {
        Form::Text => Ok(json!(text)),
        Form::Word => Ok(json!(word(text))),
        Form::Texts => {
            let all = split(inner(text)).map_err(|_| "a list like [a,b]")?;
            Ok(json!(all))
        }
        Form::Affinity => read_affinity("queue_index", text).ok_or("a list like [0@[0,1],1@[2-3]]"),
        Form::Distances => read_distances(text).ok_or("a list like [1@20,2@30]"),
        Form::Numbers => numbers(text)
            .map(|all| json!(all))
            .ok_or("a list like [0,2-3]"),
        Form::Number => text
            .parse::<u64>()
            .map(|n| json!(n))
            .map_err(|_| "a number"),
        Form::Size => size(text)
            .map(|n| json!(n))
            .ok_or("a size like 4096, 512M or 2G"),
        Form::Switch => match text {
            "on" | "true" => Ok(json!(true)),
            "off" | "false" | "" => Ok(json!(false)),
            _ => Err("on or off"),
        },
    }
}

/// `on-demand` as `OnDemand`.
fn word(text: &str) -> String {
    let mut start = true;
    let mut word = String::new();
    for c in text.chars() {
        match c {
            '-' | '_' => start = true,
            _ if std::mem::take(&mut start) => word.extend(c.to_uppercase()),
            _ => word.push(c),
        }
    }
    word
}

/// `[0,2-3]`.
fn numbers(text: &str) -> Option<Vec<usize>> {
    const MOST: usize = 1 << 16;
    let mut all = Vec::new();
    for part in inner(text).split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > MOST {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

/// At the commas that are in no brackets and no quotes; quotes are taken off.
fn split(text: &str) -> Result<Vec<String>, String> {
    let (mut parts, mut part, mut depth, mut quoted) = (Vec::new(), String::new(), 0_u32, false);
    for c in text.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if depth == 0 && !quoted => parts.push(std::mem::take(&mut part)),
            _ => {
                match c {
                    '[' if !quoted => depth += 1,
                    ']' if !quoted => {
                        depth = depth
                            .checked_sub(1)
                            .ok_or_else(|| format!("`{text}` has an unmatched closing bracket"))?;
                    }
                    _ => {}
                }
                part.push(c);
            }
        }
    }
    if depth > 0 || quoted {
        return Err(format!("`{text}` has an unclosed bracket or quote"));
    }
    parts.push(part);
    parts.retain(|part| !part.is_empty());
    Ok(parts)
}

fn typed<T: DeserializeOwned>(option: &str, value: &Value) -> Result<T, OptionError> {
    parse(value.to_string().as_bytes()).map_err(|refused| match refused {
        ParseError::Invalid { reason, pointer } if pointer.is_empty() => error(option, reason),
        other => error(option, other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiskConfig, VsockConfig};

    #[test]
    fn cpus_in_all_forms() {
        assert_eq!(cpus("3").unwrap(), CpusConfig::with_vcpus(3));
        assert_eq!(cpus("boot=2").unwrap(), CpusConfig::with_vcpus(2));
        let full =
            cpus("boot=2,max=4,topology=2:1:1:2,affinity=[0@[0,2-3],1@[1]],nested=off").unwrap();
        assert_eq!(
            (full.boot_vcpus, full.max_vcpus, full.nested),
            (2, 4, Some(false))
        );
        assert_eq!(full.topology.unwrap().packages, 2);
        let mode = cpus("core_scheduling=vcpu").unwrap().core_scheduling;
        assert_eq!(mode, crate::CoreSchedulingMode::Vcpu);
        assert_eq!(full.affinity.unwrap()[0].host_cpus, [0, 2, 3]);
        let disk: DiskConfig = DISK.read("path=/a,queue_affinity=[1@[2-3]]").unwrap();
        let affinity = &disk.queue_affinity.unwrap()[0];
        assert_eq!(
            (affinity.queue_index, &*affinity.host_cpus),
            (1, &[2, 3][..])
        );
        for (bad, why) in [
            ("boot=two", "--cpus: boot=two is not a number"),
            ("bot=2", "--cpus: unknown key `bot`; did you mean `boot`?"),
            ("boot=1,boot=2", "--cpus: `boot` is given twice"),
            (
                "topology=1:2",
                "--cpus: topology=1:2 must be four numbers, threads:cores:dies:packages",
            ),
            (
                "affinity=[0@[1",
                "--cpus: `affinity=[0@[1` has an unclosed bracket or quote",
            ),
        ] {
            assert_eq!(cpus(bad).unwrap_err().to_string(), why);
        }
    }

    #[test]
    fn value_without_key_gets_a_hint() {
        for (refused, why) in [
            (
                memory("1G").unwrap_err(),
                "--memory: `1G` must have the form key=value; did you mean size=1G?",
            ),
            (
                memory("lots").unwrap_err(),
                "--memory: `lots` must have the form key=value",
            ),
            (
                DISK.read::<DiskConfig>("/a.raw").unwrap_err(),
                "--disk: `/a.raw` must have the form key=value; did you mean path=/a.raw?",
            ),
            (
                DISK.read::<DiskConfig>("path=/a,readonly").unwrap_err(),
                "--disk: `readonly` needs a value: readonly=VALUE",
            ),
        ] {
            assert_eq!(refused.to_string(), why);
        }
    }

    #[test]
    fn memory_sizes() {
        assert_eq!(memory("size=2G,shared=on").unwrap().size, 2 << 30);
        assert_eq!(memory("shared=on").unwrap().size, 512 << 20);
        assert_eq!(size("512MiB"), Some(512 << 20));
        assert_eq!(size("17T"), Some(17 << 40));
        for none in ["", "G", "-1", "99999999999999T", "1.5G"] {
            assert_eq!(size(none), None, "{none}");
        }
        assert!(
            memory("size=lots")
                .unwrap_err()
                .to_string()
                .contains("a size like")
        );
    }

    #[test]
    fn limits_of_the_entropy_device() {
        let rng: crate::RngConfig = RNG.read("src=/a,bw_size=4K,bw_refill_time=50").unwrap();
        let bandwidth = rng.rate_limiter_config.unwrap().bandwidth.unwrap();
        assert_eq!((bandwidth.size, bandwidth.refill_time), (4096, 50));
        // Peers of older versions refuse unknown fields, so an absent limit is not written.
        let rng: crate::RngConfig = RNG.read("src=/a").unwrap();
        let written = serde_json::to_value(rng).unwrap();
        assert_eq!(written.get("rate_limiter_config"), None);
    }

    #[test]
    fn limits_of_a_disk() {
        let text = "path=/a,image_type=qcow2,bw_size=1M,bw_refill_time=100,ops_size=7,ops_refill_time=1000";
        let disk: DiskConfig = DISK.read(text).unwrap();
        assert_eq!(disk.image_type, Some(crate::ImageType::Qcow2));
        let limits = disk.rate_limiter_config.unwrap();
        let (bandwidth, ops) = (limits.bandwidth.unwrap(), limits.ops.unwrap());
        assert_eq!((bandwidth.size, bandwidth.refill_time), (1 << 20, 100));
        assert_eq!((ops.size, ops.one_time_burst), (7, None));
        let half = DISK.read::<DiskConfig>("path=/a,bw_size=1").unwrap_err();
        assert!(half.to_string().contains("refill_time"), "{half}");
    }

    #[test]
    fn an_empty_value_is_not_given() {
        let disk = |text: &str| DISK.read::<DiskConfig>(text).unwrap();
        assert_eq!(disk("path=/a,id=,serial="), disk("path=/a"));
        let net: crate::NetConfig = NET.read("tap=,mac=,ip=,mask=").unwrap();
        assert_eq!((net.tap, net.mac), (None, None));
        // The default would be an address.
        assert_eq!((net.ip.as_str(), net.mask.as_str()), ("", ""));
    }

    #[test]
    fn errors_of_a_disk() {
        let given = |text: &str| DISK.read::<DiskConfig>(text).unwrap();
        let json = |text: &str| serde_json::from_str::<DiskConfig>(text).unwrap();
        let pauses = given("path=/a,on_error=pause");
        assert_eq!(pauses.on_error, crate::OnError::Pause);
        assert_eq!(json(r#"{"path":"/a","on_error":"pause"}"#), pauses);
        assert_eq!(json(r#"{"path":"/a","on_error":"Pause"}"#), pauses);
        // The default is not written, so older peers accept the configuration.
        let reports = given("path=/a,on_error=report");
        assert_eq!(reports, given("path=/a"));
        let written = serde_json::to_value(&reports).unwrap();
        assert_eq!(written.get("on_error"), None);
        DISK.read::<DiskConfig>("path=/a,on_error=stop")
            .unwrap_err();
    }

    #[test]
    fn platforms() {
        let text =
            "num_pci_segments=4,serial_number=s 1,oem_strings=[a b,c],system_family=f,tdx=off";
        let platform: crate::PlatformConfig = PLATFORM.read(text).unwrap();
        assert_eq!(platform.num_pci_segments, Some(4));
        assert_eq!(platform.system_serial(), Some("s 1"));
        assert_eq!(platform.oem_strings.unwrap(), ["a b", "c"]);
        assert_eq!(platform.system_family.as_deref(), Some("f"));
        let one: crate::PlatformConfig =
            PLATFORM.read("oem_strings=a,iommu_segments=[1-2]").unwrap();
        assert_eq!(one.oem_strings.unwrap(), ["a"]);
        assert_eq!(one.iommu_segments.unwrap(), [1, 2]);
        let bad = PLATFORM.read::<crate::PlatformConfig>("num_pci_segments=x");
        assert!(bad.unwrap_err().to_string().contains("a number"));
        let text = "pci_segment=1,mmio32_aperture_weight=2";
        let segment: crate::PciSegmentConfig = PCI_SEGMENT.read(text).unwrap();
        assert_eq!(
            (segment.pci_segment, segment.mmio32_aperture_weight),
            (1, Some(2))
        );
    }

    #[test]
    fn devices_become_their_types() {
        let disk: DiskConfig = DISK.read("path=/d,readonly=on,id=root").unwrap();
        assert_eq!(
            (disk.path.as_deref(), disk.readonly, disk.num_queues),
            (Some("/d"), true, 1)
        );
        let vsock = VSOCK.read::<VsockConfig>("cid=3").unwrap_err();
        assert_eq!(vsock.to_string(), "--vsock: the field `socket` is missing");
    }
}
