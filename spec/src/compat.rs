//! Bodies of Cloud Hypervisor's clients, of all versions.
//!
//! Cloud Hypervisor ignores fields that it does not know, and its clients send such fields: historic
//! ones, and ones of later versions. This version ignores an unknown field only if its value asks for
//! nothing, since a client that asks for a device must learn that the guest will not have it.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::parse::{ParseError, parse, parse_value};

/// Unknown fields that are taken out of one body, at most. A body costs a reading for each.
const UNKNOWN_MAX: usize = 64;

/// Fields that are left out of one answer, at most.
const FOREIGN_MAX: usize = 1024;

/// A field that Cloud Hypervisor had, hides, or will have, and that [`VmConfig`](crate::VmConfig) has
/// not.
#[derive(Clone, Copy, Debug)]
pub struct ForeignField {
    /// The name of the field.
    pub name: &'static str,
    /// The object that has it.
    pub of: &'static str,
    /// The JSON of a value that is accepted beside the empty ones.
    pub default: Option<&'static str>,
    /// The reason for the field's being foreign, and its clients.
    pub reason: &'static str,
}

const fn foreign(
    of: &'static str,
    name: &'static str,
    default: Option<&'static str>,
    reason: &'static str,
) -> ForeignField {
    ForeignField {
        name,
        of,
        default,
        reason,
    }
}

/// The known foreign fields. Others are accepted at an empty value, too.
pub const FOREIGN_FIELDS: &[ForeignField] = &[
    foreign(
        "payload",
        "mrconfigid",
        None,
        "removed from Cloud Hypervisor; Kata's runtime-rs sends null",
    ),
    foreign(
        "payload",
        "fw_cfg_config",
        None,
        "in builds with the feature fw_cfg only",
    ),
    foreign(
        "disks",
        "disable_io_uring",
        None,
        "hidden in Cloud Hypervisor; Kata's runtime-rs sends false",
    ),
    foreign("disks", "disable_aio", None, "hidden in Cloud Hypervisor"),
    foreign(
        "serial",
        "iommu",
        None,
        "of the type that console and serial shared up to v51; Kata's runtimes send false",
    ),
    foreign(
        "platform",
        "iommu_address_width",
        Some("64"),
        "the name of iommu_address_width_bits before v53",
    ),
    foreign("VM", "gdb", None, "in builds with the feature gdb only"),
    foreign(
        "VM",
        "ivshmem",
        None,
        "in builds with the feature ivshmem only",
    ),
    foreign(
        "VM",
        "pvmemcontrol",
        None,
        "in builds with the feature pvmemcontrol only",
    ),
    foreign(
        "VM",
        "preserved_fds",
        None,
        "written by Cloud Hypervisor into its own snapshots",
    ),
];

/// Reads a body as a client of Cloud Hypervisor sends it.
///
/// # Errors
/// The body is not JSON, asks for something by an unknown field, or has a value of the wrong kind.
///
/// ```
/// let body = br#"{"payload": {"kernel": "/boot/vmlinux", "mrconfigid": null}}"#;
/// assert!(spec::parse::<spec::VmConfig>(body).is_err());
/// assert!(spec::parse_compatible::<spec::VmConfig>(body).is_ok());
/// ```
pub fn parse_compatible<T: DeserializeOwned>(body: &[u8]) -> Result<T, ParseError> {
    let mut body: Value = parse(body)?;
    if let Value::Object(fields) = &mut body {
        modernize_payload(fields);
    }
    drop_placeholders(&mut body);
    for _ in 0..UNKNOWN_MAX {
        match parse_value(&body) {
            Err(ParseError::UnknownField { pointer, field, .. })
                if remove_if_idle(&mut body, &pointer, &field) => {}
            result => return result,
        }
    }
    parse_value(&body)
}

/// Reads an answer of a service of another version, or of Cloud Hypervisor. Fields that are unknown,
/// and optional ones with a value of an unknown kind, are left out.
///
/// # Errors
/// The answer is not JSON, or something that it must have is missing or not understood.
pub fn parse_response<T: DeserializeOwned>(body: &[u8]) -> Result<T, ParseError> {
    // An answer of this version is not read a second time.
    if let Ok(value) = parse(body) {
        return Ok(value);
    }
    let mut body: Value = parse(body)?;
    for _ in 0..FOREIGN_MAX {
        let error = match parse_value(&body) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let at = match &error {
            ParseError::UnknownField { pointer, field, .. } => {
                Some((pointer.as_str(), field.as_str()))
            }
            ParseError::Invalid { pointer, .. } => pointer.rsplit_once('/'),
            ParseError::Malformed { .. } => None,
        };
        let removed =
            at.and_then(|(parent, name)| body.pointer_mut(parent)?.as_object_mut()?.remove(name));
        if removed.is_none() {
            return Err(error);
        }
    }
    parse_value(&body)
}

/// Moves `kernel`, `cmdline` and `initramfs` from the top of the body, where clients of versions
/// before v28 put them, to the payload.
fn modernize_payload(fields: &mut Map<String, Value>) {
    if fields.contains_key("payload") {
        return;
    }
    let mut payload = Map::new();
    for (name, part) in [
        ("kernel", "path"),
        ("cmdline", "args"),
        ("initramfs", "path"),
    ] {
        let is_historic = |value: &Value| match value {
            Value::Null => true,
            Value::Object(inner) => inner.len() == 1 && inner.contains_key(part),
            _ => false,
        };
        // Anything else stays, and is refused as an unknown field.
        if !fields.get(name).is_some_and(is_historic) {
            continue;
        }
        if let Some(Value::Object(mut inner)) = fields.remove(name)
            && let Some(value) = inner.remove(part)
        {
            payload.insert(name.to_owned(), value);
        }
    }
    if !payload.is_empty() {
        fields.insert("payload".to_owned(), Value::Object(payload));
    }
}

/// Takes out known fields at values by which clients say that they choose nothing.
fn drop_placeholders(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, value| match name.as_str() {
                // The default of Kata's type: Cloud Hypervisor detects the format then.
                "image_type" => value != "Unknown",
                _ => true,
            });
            for name in ["ip", "mask"] {
                if let Some(value) = fields.get_mut(name).filter(|value| value.is_null()) {
                    *value = Value::String(String::new());
                }
            }
            fields.values_mut().for_each(drop_placeholders);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_placeholders),
        _ => {}
    }
}

/// Takes an unknown field out of the body, if its value asks for nothing.
fn remove_if_idle(body: &mut Value, pointer: &str, field: &str) -> bool {
    let Some(Value::Object(fields)) = body.pointer_mut(pointer) else {
        return false;
    };
    let is_idle = fields
        .get(field)
        .is_some_and(|value| is_empty(value) || is_default(field, value));
    is_idle && fields.remove(field).is_some()
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_u64() == Some(0),
        Value::String(value) => value.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(_) => false,
    }
}

fn is_default(field: &str, value: &Value) -> bool {
    let known = FOREIGN_FIELDS.iter().filter(|known| known.name == field);
    known
        .filter_map(|known| serde_json::from_str::<Value>(known.default?).ok())
        .any(|default| default == *value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiskConfig, VmConfig};

    fn config(body: &str) -> Result<VmConfig, ParseError> {
        parse_compatible(body.as_bytes())
    }

    #[test]
    fn unknown_field_without_effect_is_accepted() {
        for value in ["null", "false", "0", "\"\"", "[]"] {
            let body =
                format!(r#"{{"payload": {{"kernel": "/k", "later": {value}}}, "more": {value}}}"#);
            assert_eq!(config(&body).unwrap().payload.kernel.as_deref(), Some("/k"));
        }
        for value in ["true", "1", "\"x\"", "[0]", "{}", "-1"] {
            let body = format!(r#"{{"payload": {{"kernel": "/k", "later": {value}}}}}"#);
            let error = config(&body).unwrap_err();
            assert_eq!(
                (error.code(), error.pointer()),
                ("unknown-field", "/payload"),
                "{body}"
            );
            assert!(error.to_string().contains("`later`"), "{error}");
        }
    }

    #[test]
    fn foreign_fields_are_accepted_at_their_defaults() {
        for field in FOREIGN_FIELDS {
            for value in [Some("null"), Some("false"), field.default]
                .into_iter()
                .flatten()
            {
                let inner = format!(r#"{{"{}": {value}}}"#, field.name);
                let whole = match field.of {
                    "VM" => format!(
                        r#"{{"payload": {{"kernel": "/k"}}, "{}": {value}}}"#,
                        field.name
                    ),
                    "payload" => format!(r#"{{"payload": {inner}}}"#),
                    "disks" => format!(r#"{{"payload": {{}}, "disks": [{inner}]}}"#),
                    "cpus" => format!(
                        r#"{{"payload": {{}}, "cpus": {{"boot_vcpus": 1, "max_vcpus": 1, "{}": {value}}}}}"#,
                        field.name
                    ),
                    "serial" => {
                        format!(
                            r#"{{"payload": {{}}, "serial": {{"mode": "Null", "{}": {value}}}}}"#,
                            field.name
                        )
                    }
                    of => format!(r#"{{"payload": {{}}, "{of}": {inner}}}"#),
                };
                assert!(
                    parse::<VmConfig>(whole.as_bytes()).is_err(),
                    "{whole} is strict"
                );
                config(&whole).unwrap_or_else(|error| panic!("{whole}: {error}"));
                let asking = whole.replace(
                    &format!(r#""{}": {value}"#, field.name),
                    &format!(r#""{}": "yes""#, field.name),
                );
                assert_eq!(
                    config(&asking).unwrap_err().code(),
                    "unknown-field",
                    "{asking}"
                );
            }
        }
    }

    #[test]
    fn the_body_of_libvirt_9_is_a_payload() {
        let body = r#"{"kernel": {"path": "/k"}, "cmdline": {"args": "quiet"}, "initramfs": {"path": "/i"}}"#;
        let payload = config(body).unwrap().payload;
        assert_eq!(payload.kernel.as_deref(), Some("/k"));
        assert_eq!(payload.cmdline.as_deref(), Some("quiet"));
        assert_eq!(payload.initramfs.as_deref(), Some("/i"));
        let both = r#"{"payload": {"kernel": "/k"}, "kernel": {"path": "/other"}}"#;
        assert_eq!(config(both).unwrap_err().code(), "unknown-field");
        let odd = r#"{"kernel": {"path": "/k", "more": 1}}"#;
        assert_eq!(config(odd).unwrap_err().code(), "unknown-field");
    }

    #[test]
    fn a_format_that_is_unknown_is_detected() {
        let body = br#"{"path": "/d", "image_type": "Unknown"}"#;
        assert_eq!(
            parse_compatible::<DiskConfig>(body).unwrap().image_type,
            None
        );
    }

    #[test]
    fn answer_may_have_unknown_fields() {
        let answer = br#"{"config": {"payload": {"kernel": "/k", "later": {"a": 1}},
            "cpus": {"boot_vcpus": 2, "max_vcpus": 2, "core_scheduling": "Later"},
            "rng": {"src": "/dev/urandom"}, "gdb": false, "later": [1]},
            "state": "Running", "memory_actual_size": 4096, "later": "x"}"#;
        let info: crate::VmInfo = parse_response(answer).unwrap();
        assert_eq!(info.state, crate::VmState::Running);
        assert_eq!(info.config.payload.kernel.as_deref(), Some("/k"));
        assert_eq!(info.config.cpus.boot_vcpus, 2);
        for answer in [
            "{}",
            "[]",
            r#"{"config": {"payload": {}}, "state": "Later", "memory_actual_size": 1}"#,
        ] {
            parse_response::<crate::VmInfo>(answer.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn too_many_unknown_fields_are_refused() {
        let fields: String = (0..=UNKNOWN_MAX)
            .map(|n| format!(r#", "x{n}": null"#))
            .collect();
        let body = format!(r#"{{"payload": {{}}{fields}}}"#);
        assert_eq!(config(&body).unwrap_err().code(), "unknown-field");
    }
}
