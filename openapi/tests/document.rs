//! The committed document against the server, the client, and Cloud Hypervisor's contract.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};

use openapi::{DOCUMENT, OPERATIONS};
use serde_json::Value;

fn document() -> Value {
    serde_json::from_str(DOCUMENT).unwrap()
}

/// The operations of the document, as (method, path, what is said of it).
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    paths
        .flat_map(|(path, item)| {
            item.as_object()
                .unwrap()
                .iter()
                .map(|(method, operation)| (method.to_uppercase(), path.clone(), operation.clone()))
        })
        .collect()
}

#[test]
fn committed_document_is_current() {
    let mut generated = api::document().to_pretty_json().unwrap();
    generated.push('\n');
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        std::fs::write(path, &generated).unwrap();
        return;
    }
    assert!(
        DOCUMENT == generated,
        "openapi/openapi.json is not what the server says; if the change is meant, run \
         UPDATE_OPENAPI=1 cargo test -p openapi"
    );
}

#[test]
fn operations_have_one_client_method_each() {
    let described: BTreeSet<_> = operations(&document())
        .into_iter()
        .map(|(method, path, operation)| {
            (
                operation["operationId"].as_str().unwrap().to_owned(),
                method,
                path,
            )
        })
        .collect();
    let known: BTreeSet<_> = OPERATIONS
        .iter()
        .map(|one| {
            (
                one.id.to_owned(),
                one.method.to_owned(),
                one.path.to_owned(),
            )
        })
        .collect();
    assert_eq!(described, known);
    assert_eq!(known.len(), OPERATIONS.len());
    let methods: BTreeSet<_> = OPERATIONS.iter().map(|one| one.client_method).collect();
    assert_eq!(methods.len(), OPERATIONS.len());
}

/// Generators make names of methods and types from these, in many spellings.
#[test]
fn operation_names_differ_in_more_than_spelling() {
    let plain = |name: &str| name.replace(['-', '_'], "").to_lowercase();
    let names: BTreeSet<_> = OPERATIONS.iter().map(|one| plain(one.id)).collect();
    assert_eq!(names.len(), OPERATIONS.len());
}

/// Generators split names at `-` and at capitals: `power-buttonVM` and `VMs` come out as
/// `power_button_vm` and `v_ms`.
#[test]
fn names_suit_every_language() {
    let operation = |id: &str| id.chars().all(|c| c.is_ascii_alphanumeric()) && !id.contains("VM");
    for (method, path, one) in operations(&document()) {
        let id = one["operationId"].as_str().unwrap();
        assert!(operation(id), "{method} {path}: {id}");
        let tag = one["tags"][0].as_str().unwrap();
        let lower = |c: char| c.is_ascii_lowercase() || c == '-';
        assert!(tag.chars().all(lower), "{method} {path}: {tag}");
    }
}

/// Generators make up a name for an object that is described inside another (`VmInfoDeviceTreeType0`).
#[test]
fn every_object_has_a_name() {
    fn unnamed(at: &str, schema: &Value, found: &mut Vec<String>) {
        if schema["type"] == "object" || schema["enum"].is_array() {
            found.push(at.to_owned());
        }
        parts(at, schema, found);
    }
    fn parts(at: &str, schema: &Value, found: &mut Vec<String>) {
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            unnamed(&format!("{at}.{name}"), property, found);
        }
        let several = ["oneOf", "anyOf", "allOf"].map(|several| schema[several].as_array());
        for one in several.into_iter().flatten().flatten() {
            unnamed(at, one, found);
        }
        for one in ["items", "additionalProperties"] {
            if schema[one].is_object() {
                unnamed(at, &schema[one], found);
            }
        }
    }
    let document = document();
    let mut found = Vec::new();
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        parts(name, schema, &mut found);
    }
    for (method, path, operation) in operations(&document) {
        let at = format!("{method} {path}");
        let answers = operation["responses"].as_object().unwrap().values();
        let bodies = answers.chain([&operation["requestBody"]]);
        let types = bodies.filter_map(|body| body["content"].as_object());
        for kind in types.flat_map(|types| types.values()) {
            unnamed(&at, &kind["schema"], &mut found);
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// Generators ignore what is beside `$ref`, and so also inside `oneOf`.
#[test]
fn optional_fields_are_described() {
    let document = document();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let mut seen = 0;
    for (name, schema) in schemas {
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            if property["oneOf"].is_array() {
                assert!(property["description"].is_string(), "{name}.{field}");
                seen += 1;
            }
        }
    }
    assert!(seen > 10);
}

/// A generated client returns nothing for a status that is not declared, as for an empty success.
#[test]
fn own_operations_declare_their_errors() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        if operation["tags"][0] == "cloud-hypervisor" {
            continue;
        }
        let other = operation["responses"]["default"]["$ref"].as_str();
        let pointer = other.and_then(|other| other.strip_prefix('#'));
        let response = document.pointer(pointer.unwrap_or_default()).unwrap();
        let schema = &response["content"]["application/problem+json"]["schema"]["$ref"];
        assert_eq!(schema, "#/components/schemas/Problem", "{method} {path}");
    }
}

#[test]
fn every_item_has_a_description() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        assert!(
            operation["summary"].is_string(),
            "{method} {path} has no summary"
        );
        assert!(
            operation["tags"][0].is_string(),
            "{method} {path} has no tag"
        );
        let answers = operation["responses"].as_object().unwrap();
        for (status, answer) in answers {
            assert!(
                answer["$ref"].is_string() || !answer["description"].as_str().unwrap().is_empty(),
                "{method} {path} {status}"
            );
        }
    }
    let mut left = vec![&document];
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(reference)) = fields.get("$ref") {
                    let pointer = reference.strip_prefix('#').unwrap();
                    assert!(
                        document.pointer(pointer).is_some(),
                        "{reference} leads nowhere"
                    );
                }
                left.extend(fields.values());
            }
            Value::Array(items) => left.extend(items),
            _ => {}
        }
    }
}

/// A type in the notation of the facts: `integer`, `[string]`, the name of a schema. `null` is left out, since a
/// field that may be `null` may also be absent.
fn type_of(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        return reference.rsplit('/').next().unwrap().to_owned();
    }
    for several in ["oneOf", "anyOf", "allOf"] {
        if let Some(parts) = schema[several].as_array() {
            let parts: Vec<_> = parts
                .iter()
                .map(type_of)
                .filter(|part| part != "null")
                .collect();
            return parts.join("|");
        }
    }
    let kind = match &schema["type"] {
        Value::String(kind) => kind.clone(),
        Value::Array(kinds) => {
            let kinds = kinds.iter().filter_map(Value::as_str);
            kinds
                .filter(|kind| *kind != "null")
                .collect::<Vec<_>>()
                .join("|")
        }
        _ => "any".to_owned(),
    };
    if kind == "array" {
        format!("[{}]", type_of(&schema["items"]))
    } else {
        kind
    }
}

struct Facts {
    operations: Vec<(String, String, Option<String>, Vec<String>)>,
    /// By schema: its fields, with whether they are required and their types.
    fields: BTreeMap<String, Vec<(String, bool, String)>>,
    values: BTreeMap<String, Vec<String>>,
}

fn facts() -> Facts {
    let text = include_str!("cloud-hypervisor.facts");
    let mut facts = Facts {
        operations: Vec::new(),
        fields: BTreeMap::new(),
        values: BTreeMap::new(),
    };
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some((operation, answers)) = line.split_once(" -> ") {
            let mut words = operation.split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            let answers = answers.split(' ').map(str::to_owned).collect();
            facts.operations.push((method, path, words.next(), answers));
        } else if let Some((name, values)) = line.split_once(" = ") {
            let values = values.split(" | ").map(str::to_owned).collect();
            facts.values.insert(name.to_owned(), values);
        } else {
            let (name, fields) = line.split_once(" { ").unwrap();
            let fields = fields.strip_suffix(" }").unwrap().split(", ").map(|field| {
                let (name, kind) = field.split_once(": ").unwrap();
                let required = name.ends_with('!');
                (
                    name.trim_end_matches('!').to_owned(),
                    required,
                    kind.to_owned(),
                )
            });
            facts.fields.insert(name.to_owned(), fields.collect());
        }
    }
    facts
}

#[test]
fn has_all_cloud_hypervisor_operations() {
    let document = document();
    let facts = facts();
    assert_eq!(facts.operations.len(), 31);
    for (method, path, body, answers) in facts.operations {
        let operation = &document["paths"][&path][method.to_lowercase()];
        assert!(operation.is_object(), "{method} {path} is missing");
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let ours = schema.is_object().then(|| type_of(schema));
        assert_eq!(ours, body, "body of {method} {path}");
        let given = operation["responses"].as_object().unwrap();
        if given.contains_key("501") && given.len() == 1 {
            continue;
        }
        for answer in answers {
            assert!(
                given.contains_key(&answer),
                "{method} {path} does not answer {answer}"
            );
        }
    }
}

/// Fields that this project requires and the contract does not, since nothing can be done without them.
const STRICTER: &[(&str, &[&str])] = &[
    ("VmResizeDisk", &["id", "desired_size"]),
    ("VmResizeZone", &["id", "desired_ram"]),
    ("VmRemoveDevice", &["id"]),
    ("VmSnapshotConfig", &["destination_url"]),
    ("VmCoredumpData", &["destination_url"]),
    (
        "CpuTopology",
        &[
            "threads_per_core",
            "cores_per_die",
            "dies_per_package",
            "packages",
        ],
    ),
];

/// Bodies that the service only sends: there, more is promised rather than asked.
const SENT: &[&str] = &["VmmPingResponse", "VmInfo", "DeviceNode", "PciDeviceInfo"];

/// Values that Whimbrel understands beyond the contract's, in bodies that it only receives.
const ADDED: &[(&str, &str)] = &[("MemoryRestoreMode", "Map")];

#[test]
fn has_cloud_hypervisor_bodies() {
    let document = document();
    let facts = facts();
    assert!(facts.fields.len() > 40 && facts.values.len() > 5);
    let schemas = &document["components"]["schemas"];
    let mut differences = Vec::new();
    for (name, fields) in &facts.fields {
        let Some(ours) = schemas[name].as_object() else {
            if name != "PciDeviceInfo" {
                differences.push(format!("{name} is missing"));
            }
            continue;
        };
        for (field, _, kind) in fields {
            let found = &ours["properties"][field];
            if found.is_null() {
                differences.push(format!("{name}.{field} is missing"));
                continue;
            }
            // A map that has a name here has none in the contract.
            let found = match type_of(found) {
                name if schemas[&name]["additionalProperties"].is_object() => "object".to_owned(),
                found => found,
            };
            // A list of resources is typed no further in the contract, a map no further than `object`.
            if found != *kind && !(kind == "[object]" && found == "[any]") {
                differences.push(format!("{name}.{field} is {found}, not {kind}"));
            }
        }
        let required: BTreeSet<_> = ours
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let theirs: BTreeSet<_> = fields
            .iter()
            .filter(|(_, required, _)| *required)
            .map(|(field, ..)| field.as_str())
            .collect();
        let stricter = STRICTER.iter().find(|(stricter, _)| stricter == name);
        let expected: BTreeSet<_> = theirs
            .iter()
            .copied()
            .chain(
                stricter
                    .iter()
                    .flat_map(|(_, fields)| fields.iter().copied()),
            )
            .collect();
        if SENT.contains(&name.as_str()) {
            if !theirs.is_subset(&required) {
                differences.push(format!("{name} does not promise {theirs:?}"));
            }
        } else if !required.is_subset(&expected) {
            differences.push(format!(
                "{name} requires {required:?}, more than {expected:?}"
            ));
        }
    }
    for (name, values) in &facts.values {
        let ours: Vec<_> = schemas[name]["enum"]
            .as_array()
            .map(|values| {
                values
                    .iter()
                    .filter_map(Value::as_str)
                    .filter(|value| !ADDED.contains(&(name.as_str(), value)))
                    .map(str::to_owned)
                    .collect()
            })
            .unwrap_or_default();
        let (ours, theirs) = (
            BTreeSet::from_iter(ours),
            BTreeSet::from_iter(values.clone()),
        );
        if ours != theirs {
            differences.push(format!("{name} is {ours:?}, not {theirs:?}"));
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
}
