//! Bodies of answers.

use std::fmt::Write as _;

use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use serde::Serialize;

use crate::problem::Refusal;

/// A value as JSON.
pub(crate) struct Answer<T>(pub(crate) T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match ascii_json(&self.0) {
            Ok(body) => {
                let content_type = HeaderValue::from_static("application/json");
                ([(CONTENT_TYPE, content_type)], body).into_response()
            }
            Err(error) => Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal-error",
                format!("the answer could not be written as JSON: {error}"),
            )
            .into_response(),
        }
    }
}

/// JSON in ASCII. Widespread clients of Cloud Hypervisor's API read an answer in pieces of 256 bytes, each of
/// which must be valid UTF-8: a character of several bytes across two pieces ends them.
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
    fn json_is_ascii_and_means_the_same() {
        for text in ["plain", "Gerät \"ü\"", "😀 \u{7f}\u{80}", "日本\n"] {
            let json = ascii_json(text).unwrap();
            assert!(json.is_ascii(), "{json}");
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
    }
}
