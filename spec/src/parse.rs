//! From bytes to types, with errors that help.

use serde::Deserializer;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::objects::ObjectsOnly;

use crate::wording::plain;

/// A body that is not what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// No JSON at all.
    #[error("the body is not JSON: {reason} at line {line}, column {column}")]
    Malformed {
        /// The parser's error.
        reason: String,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// An unknown field.
    #[error("unknown field `{field}`{}{}", at(pointer), did_you_mean(suggestion.as_ref()))]
    UnknownField {
        /// JSON pointer to what it is in.
        pointer: String,
        /// Its name.
        field: String,
        /// A field of nearly that name.
        suggestion: Option<String>,
    },
    /// A value of the wrong type, or a missing field.
    #[error("{}{reason}", before(pointer))]
    Invalid {
        /// JSON pointer to it.
        pointer: String,
        /// The expected kind of value.
        reason: String,
    },
}

fn at(pointer: &str) -> String {
    if pointer.is_empty() {
        String::new()
    } else {
        format!(" at {pointer}")
    }
}

fn before(pointer: &str) -> String {
    if pointer.is_empty() {
        String::new()
    } else {
        format!("{pointer}: ")
    }
}

fn did_you_mean(name: Option<&String>) -> String {
    name.map_or_else(String::new, |name| format!("; did you mean `{name}`?"))
}

impl ParseError {
    /// Stable code, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed { .. } => "malformed-json",
            Self::UnknownField { .. } => "unknown-field",
            Self::Invalid { .. } => "invalid-field",
        }
    }

    /// JSON pointer to what it is about; empty for the whole body.
    #[must_use]
    pub fn pointer(&self) -> &str {
        match self {
            Self::Malformed { .. } => "",
            Self::UnknownField { pointer, .. } | Self::Invalid { pointer, .. } => pointer,
        }
    }
}

/// Reads a body.
///
/// # Errors
/// The body is not JSON, has an unknown field, or a value of the wrong kind.
///
/// ```
/// let error = spec::parse::<spec::VmConfig>(br#"{"payload": {"kernal": "/k"}}"#).unwrap_err();
/// assert_eq!(error.to_string(), "unknown field `kernal` at /payload; did you mean `kernel`?");
/// ```
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ParseError> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = read(&mut reader)?;
    reader
        .end()
        .map_err(|error| explain(String::new(), &error))?;
    Ok(value)
}

/// Reads a body that is parsed already.
pub(crate) fn parse_value<T: DeserializeOwned>(body: &Value) -> Result<T, ParseError> {
    read(body)
}

fn read<'de, T, D>(from: D) -> Result<T, ParseError>
where
    T: DeserializeOwned,
    D: Deserializer<'de, Error = serde_json::Error>,
{
    serde_path_to_error::deserialize(ObjectsOnly(from)).map_err(|error| {
        let pointer = pointer(error.path());
        explain(pointer, error.inner())
    })
}

fn explain(pointer: String, error: &serde_json::Error) -> ParseError {
    let text = error.to_string();
    let reason = text
        .rfind(" at line ")
        .map_or(text.as_str(), |end| &text[..end])
        .to_owned();
    if !error.is_data() {
        return ParseError::Malformed {
            reason,
            line: error.line(),
            column: error.column(),
        };
    }
    // serde has no other way to say which field it was.
    let mut names = reason.split('`').skip(1).step_by(2);
    match names.next().filter(|_| reason.starts_with("unknown field")) {
        None => ParseError::Invalid {
            pointer,
            reason: plain(&reason),
        },
        Some(field) => ParseError::UnknownField {
            // The path ends with the field itself.
            pointer: pointer
                .strip_suffix(&format!("/{field}"))
                .unwrap_or(&pointer)
                .to_owned(),
            field: field.to_owned(),
            suggestion: nearest(field, names).map(str::to_owned),
        },
    }
}

/// Returns the known name that is most similar to `name`, if one is.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|known| (strsim::jaro_winkler(name, known), known))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, known)| known)
}

/// A JSON pointer (RFC 6901).
fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .fold(String::new(), |so_far, segment| match segment {
            Segment::Seq { index } => format!("{so_far}/{index}"),
            Segment::Map { key } | Segment::Enum { variant: key } => {
                format!("{so_far}/{}", key.replace('~', "~0").replace('/', "~1"))
            }
            Segment::Unknown => so_far,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VmConfig;

    fn error(body: &str) -> ParseError {
        parse::<VmConfig>(body.as_bytes()).unwrap_err()
    }

    #[test]
    fn errors_name_field_and_position() {
        assert!(matches!(
            error("{"),
            ParseError::Malformed {
                line: 1,
                column: 1,
                ..
            }
        ));
        assert!(matches!(error("{} x"), ParseError::Invalid { .. }));
        assert_eq!(error("{}").to_string(), "the field `payload` is missing");
        assert_eq!(
            error(r#"{"payload":{},"cpus":{"boot_vcpus":"2","max_vcpus":2}}"#).to_string(),
            "/cpus/boot_vcpus: must be a whole number from 0 to 4294967295, not the string \"2\"; did you mean 2?"
        );
        assert_eq!(
            error(r#"{"payload":{},"disks":[{"path":"/a"},{"path":"/b","read_only":true}]}"#)
                .to_string(),
            "unknown field `read_only` at /disks/1; did you mean `readonly`?"
        );
        for (body, pointer) in [
            (r#"["q2", {"payload": {}}]"#, ""),
            (r#"{"payload": {}, "cpus": [1, 1]}"#, "/cpus"),
            (r#"{"payload": ["/x"]}"#, "/payload"),
            (r#"{"payload": {}, "disks": [["/d"]]}"#, "/disks/0"),
            (r#"{"payload": {}, "balloon": [1]}"#, "/balloon"),
        ] {
            let error = error(body);
            assert_eq!(error.pointer(), pointer, "{body}");
            assert!(error.to_string().contains("must be an object"), "{error}");
        }
        let text = error(r#"{"payload": "/k"}"#).to_string();
        assert_eq!(text, "/payload: must be an object, not the string \"/k\"");
        assert!(matches!(
            error(r#"{"payload":{}} trailing"#),
            ParseError::Malformed { line: 1, .. }
        ));
    }
}
