//! The bearer token that a client of the service shows over TCP.

use std::fmt;

use crate::limits::{API_TOKEN_LEN_MAX, API_TOKEN_LEN_MIN};

/// A secret that client and service share (RFC 6750). Its characters can stand in an HTTP header.
///
/// ```
/// let token: spec::ApiToken = "0123456789abcdef0123456789abcdef\n".parse()?;
/// assert_eq!(token.as_str().len(), 32);
/// assert_eq!(format!("{token:?}"), "ApiToken(..)");
/// # Ok::<(), spec::InvalidApiToken>(())
/// ```
#[derive(Clone)]
pub struct ApiToken(String);

/// A text that is no [`ApiToken`]. The text is not shown: it may be another secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidApiToken {
    /// The text is shorter or longer than a token may be.
    #[error(
        "an API token has {API_TOKEN_LEN_MIN} to {API_TOKEN_LEN_MAX} characters, and this one {0}"
    )]
    Length(usize),
    /// A character that an HTTP header may not carry as part of a token.
    #[error(
        "an API token has only the characters A-Z a-z 0-9 - . _ ~ + / =, and character {0} is another"
    )]
    Character(usize),
}

impl ApiToken {
    /// Returns the token's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for ApiToken {
    type Err = InvalidApiToken;

    /// Reads the content of a token file: one line, with or without its end.
    fn from_str(text: &str) -> Result<Self, InvalidApiToken> {
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        if !(API_TOKEN_LEN_MIN..=API_TOKEN_LEN_MAX).contains(&text.len()) {
            return Err(InvalidApiToken::Length(text.len()));
        }
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
        match text.bytes().position(|byte| !is_allowed(byte)) {
            None => Ok(Self(text.to_owned())),
            Some(place) => Err(InvalidApiToken::Character(place + 1)),
        }
    }
}

/// Never shows the secret, so that no log can.
impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiToken(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> InvalidApiToken {
        text.parse::<ApiToken>().unwrap_err()
    }

    #[test]
    fn short_long_and_unsendable_tokens_are_refused() {
        assert_eq!(refused(""), InvalidApiToken::Length(0));
        assert_eq!(refused(&"a".repeat(31)), InvalidApiToken::Length(31));
        assert_eq!(refused(&"a".repeat(513)), InvalidApiToken::Length(513));
        // A second line would end the header.
        let two_lines = format!("{}\nHost: x", "a".repeat(32));
        assert_eq!(refused(&two_lines), InvalidApiToken::Character(33));
        let umlaut = "ä".repeat(16);
        assert_eq!(refused(&umlaut), InvalidApiToken::Character(1));
        for fine in [
            "a".repeat(32),
            "a".repeat(512),
            format!("{}==\r\n", "+/".repeat(16)),
        ] {
            fine.parse::<ApiToken>().unwrap();
        }
    }
}
