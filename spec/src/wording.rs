//! serde's error messages in words of JSON.
//!
//! serde speaks of Rust types: `invalid type: string "1G", expected u64`. A user of the API knows JSON and
//! the API's fields only. serde gives no other access to these facts than its text.

use crate::nearest;
use crate::options::size;

/// Rewords a message of serde; one of an unknown form stays as it is.
pub(crate) fn plain(message: &str) -> String {
    wrong_kind(message)
        .or_else(|| unknown_word(message))
        .or_else(|| missing(message))
        .unwrap_or_else(|| message.to_owned())
}

/// `invalid type: string "1G", expected u64`, and `invalid value: integer ...`.
fn wrong_kind(message: &str) -> Option<String> {
    let found = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "))
        .or_else(|| message.strip_prefix("invalid length "))?;
    // The found value may hold the text that separates the two; the expected kind never does.
    let (found, expected) = found.rsplit_once(", expected ")?;
    let expected = kind(expected);
    if message.starts_with("invalid length") {
        return Some(format!("must be {expected}, not an array of {found}"));
    }
    let hint = bytes_hint(found, &expected);
    Some(format!("must be {expected}, not {}{hint}", value(found)))
}

/// `unknown variant `Vdi`, expected one of `Raw`, `Qcow2``.
fn unknown_word(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown variant ")?;
    let mut names = rest.split('`').skip(1).step_by(2);
    let found = names.next()?;
    let known: Vec<&str> = names.collect();
    let near = nearest(found, known.iter().copied());
    let hint = near.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
    Some(format!("`{found}` is none of {}{hint}", known.join(", ")))
}

/// `missing field `payload``.
fn missing(message: &str) -> Option<String> {
    let name = message.strip_prefix("missing field `")?.strip_suffix('`')?;
    Some(format!("the field `{name}` is missing"))
}

/// JSON's word for the type that was expected.
fn kind(expected: &str) -> String {
    match expected {
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "an array".to_owned(),
        "a map" => "an object".to_owned(),
        _ if expected.starts_with("struct ") => "an object".to_owned(),
        _ if expected.starts_with("tuple ") => "an array".to_owned(),
        _ => expected.to_owned(),
    }
}

/// JSON's word for the value that was found.
fn value(found: &str) -> String {
    match found {
        "sequence" => "an array".to_owned(),
        "map" => "an object".to_owned(),
        "null" | "unit value" => "null".to_owned(),
        _ => format!("the {found}"),
    }
}

/// The API takes sizes in bytes, where command lines take `1G`.
fn bytes_hint(found: &str, expected: &str) -> String {
    let text = found
        .strip_prefix("string \"")
        .and_then(|text| text.strip_suffix('"'));
    match text.and_then(size) {
        Some(bytes) if expected.starts_with("a whole number") => format!("; did you mean {bytes}?"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_speak_of_json() {
        for (serde, ours) in [
            (
                r#"invalid type: string "1G", expected u64"#,
                r#"must be a whole number, 0 or more, not the string "1G"; did you mean 1073741824?"#,
            ),
            (
                r#"invalid type: string "x, expected u8", expected a boolean"#,
                r#"must be true or false, not the string "x, expected u8""#,
            ),
            (
                "invalid type: map, expected a string",
                "must be a string, not an object",
            ),
            (
                "invalid type: null, expected struct VmConfig",
                "must be an object, not null",
            ),
            (
                "invalid type: sequence, expected u32",
                "must be a whole number from 0 to 4294967295, not an array",
            ),
            (
                "invalid value: integer `-1`, expected u16",
                "must be a whole number from 0 to 65535, not the integer `-1`",
            ),
            (
                "invalid length 2, expected struct VmConfig with 28 elements",
                "must be an object, not an array of 2",
            ),
            (
                "unknown variant `qcow2`, expected one of `Raw`, `Qcow2`",
                "`qcow2` is none of Raw, Qcow2; did you mean `Qcow2`?",
            ),
            ("missing field `payload`", "the field `payload` is missing"),
            ("recursion limit exceeded", "recursion limit exceeded"),
        ] {
            assert_eq!(plain(serde), ours);
        }
    }
}
