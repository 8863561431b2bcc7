//! JSON as the service writes it.

use std::fmt::Write as _;

use serde::Serialize;

/// Serializes a value as JSON in ASCII.
///
/// Widespread clients of Cloud Hypervisor's API read an answer in pieces of 256 bytes and require each
/// piece to be valid UTF-8. A character of several bytes that crosses two pieces would break them.
pub(crate) fn ascii_json<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    let json = serde_json::to_string(value)?;
    if json.is_ascii() {
        return Ok(json);
    }
    let mut ascii = String::with_capacity(json.len() * 2);
    for character in json.chars() {
        // Outside of strings JSON is ASCII anyway.
        if character.is_ascii() {
            ascii.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(ascii, "\\u{unit:04x}");
            }
        }
    }
    Ok(ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_ascii() {
        for text in ["plain", "Gerät \"ü\"", "😀 \u{7f}\u{80}", "日本\n"] {
            let json = ascii_json(text).unwrap();
            assert!(json.is_ascii(), "{json}");
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
    }
}
