//! Fields of requests that this version refuses.

use serde::Serialize;
use serde_json::Value;

/// A field of a request, other than `vm.create`, that this version does not support. An absent field
/// and an empty list ask for nothing.
#[derive(Clone, Copy, Debug)]
pub struct RefusedField {
    /// The endpoint, such as `vm.restore`.
    pub endpoint: &'static str,
    /// The name of the field.
    pub name: &'static str,
    /// The missing capability, as in "this version cannot ...".
    pub what: &'static str,
}

/// All of them.
pub const REFUSED_FIELDS: &[RefusedField] = &[RefusedField {
    endpoint: "vm.receive-migration",
    name: "zone_updates",
    what: "move memory zones (`zone_updates`)",
}];

impl RefusedField {
    /// Returns the first field of a request that asks for something that this version refuses.
    #[must_use]
    pub fn first_of(endpoint: &str, body: &impl Serialize) -> Option<&'static Self> {
        let body = serde_json::to_value(body).unwrap_or_default();
        let asks = |field: &&Self| match body.get(field.name) {
            None | Some(Value::Null) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        };
        let mut fields = REFUSED_FIELDS.iter();
        fields.find(|field| field.endpoint == endpoint && asks(field))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReceiveMigrationData;

    #[test]
    fn a_field_is_refused_if_it_asks_for_something() {
        let refused = |zones: &str| {
            let body = format!(r#"{{"receiver_url": "unix:/s", "zone_updates": {zones}}}"#);
            let body: ReceiveMigrationData = crate::parse(body.as_bytes()).unwrap();
            let first = RefusedField::first_of("vm.receive-migration", &body);
            assert!(RefusedField::first_of("vm.boot", &body).is_none());
            first.map(|field| field.name)
        };
        assert_eq!(refused("null"), None);
        assert_eq!(refused("[]"), None);
        let asked = r#"[{"id": "z", "host_numa_node": 1}]"#;
        assert_eq!(refused(asked), Some("zone_updates"));
    }
}
