//! Access to a TCP listener: only programs that send its token are served.
//!
//! A unix socket needs no token, since its mode (0600) admits its owner only. Every local user can
//! connect to a loopback address.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::HeaderValue;
use rustix::fs::{FileType, Mode, OFlags, fstat};
use rustix::process::geteuid;
use spec::limits::API_TOKEN_LEN_MAX;
use spec::{ApiToken, InvalidApiToken};
use subtle::ConstantTimeEq as _;

use crate::problem::ApiError;

/// The clients that a TCP listener serves.
#[derive(Clone, Debug)]
pub enum TcpAccess {
    /// Those that send `Authorization: Bearer TOKEN` with each request.
    Token(Arc<ApiToken>),
    /// Each program of each local user. To be used only if the operator says so.
    AnyLocalUser,
}

impl From<ApiToken> for TcpAccess {
    fn from(token: ApiToken) -> Self {
        Self::Token(Arc::new(token))
    }
}

impl TcpAccess {
    /// Refuses a request whose `Authorization` is not the token.
    pub(crate) fn check(&self, authorization: Option<&HeaderValue>) -> Result<(), ApiError> {
        let Self::Token(token) = self else {
            return Ok(());
        };
        let Some(shown) = authorization.and_then(bearer) else {
            return Err(ApiError::unauthorized(
                r#"Bearer realm="whimbrel""#,
                "token-missing",
                "this listener serves requests with a header `Authorization: Bearer TOKEN` only; TOKEN is the \
                 content of the service's --api-token-file (wh-remote: --token-file)",
            ));
        };
        // The time that this takes depends on the length of the token alone, which is no secret.
        if bool::from(shown.ct_eq(token.as_str().as_bytes())) {
            return Ok(());
        }
        Err(ApiError::unauthorized(
            r#"Bearer realm="whimbrel", error="invalid_token""#,
            "token-wrong",
            "the token of the request is not that of the service's --api-token-file",
        ))
    }
}

/// Returns the token of `Bearer TOKEN`. The name of the scheme has no case (RFC 9110, 11.1).
fn bearer(authorization: &HeaderValue) -> Option<&[u8]> {
    let value = authorization.as_bytes();
    let (scheme, rest) = value.split_at_checked("Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then(|| rest.trim_ascii())
}

/// A file of which no token can be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenFileError {
    /// The file cannot be opened or read.
    #[error("cannot read the API token file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Something else than a regular file, which may block or change with each read.
    #[error("the API token file {path} is not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Other users may know the token, or choose it.
    #[error(
        "the API token file {path} has mode {mode:04o} and belongs to user {owner}, so others may know the token: \
         it must belong to user {user} or root, with no access for others (chmod 600)"
    )]
    NotPrivate {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its owner.
        owner: u32,
        /// The user of this process.
        user: u32,
    },
    /// The content is no token.
    #[error("the API token file {path}: {source}; `openssl rand -hex 32` makes a good one")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The fault of the token.
        source: InvalidApiToken,
    },
}

/// Reads the token in `path`, which must be a regular file that only this user, or root, can read.
///
/// # Errors
/// Fails if the file cannot be read, other users have access to it, or its content is no token.
pub fn token_file(path: &Path) -> Result<ApiToken, TokenFileError> {
    let unreadable = |source: io::Error| TokenFileError::Read {
        path: path.to_owned(),
        source,
    };
    // NONBLOCK: opening a FIFO would wait for its writer. It has no effect on regular files.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file: OwnedFd =
        rustix::fs::open(path, flags, Mode::empty()).map_err(|e| unreadable(e.into()))?;
    // Of the open file and not of the path, which may name another file by now.
    let facts = fstat(&file).map_err(|e| unreadable(e.into()))?;
    if FileType::from_raw_mode(facts.st_mode) != FileType::RegularFile {
        return Err(TokenFileError::NotAFile {
            path: path.to_owned(),
        });
    }
    let (mode, user) = (facts.st_mode & 0o7777, geteuid().as_raw());
    if mode & 0o077 != 0 || ![user, 0].contains(&facts.st_uid) {
        return Err(TokenFileError::NotPrivate {
            path: path.to_owned(),
            mode,
            owner: facts.st_uid,
            user,
        });
    }
    // Room for the end of the line, and for one more byte: what is longer than a token shows as that.
    let most = API_TOKEN_LEN_MAX as u64 + 3;
    let mut text = String::new();
    File::from(file)
        .take(most)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    text.parse().map_err(|source| TokenFileError::Invalid {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn only_the_whole_token_is_accepted() {
        let access = TcpAccess::from(TOKEN.parse::<ApiToken>().unwrap());
        let code = |value: Option<&str>| {
            let value = value.map(|value| HeaderValue::from_str(value).unwrap());
            access
                .check(value.as_ref())
                .map_err(|refusal| refusal.code().to_owned())
        };
        for right in [format!("Bearer {TOKEN}"), format!("bearer  {TOKEN} ")] {
            assert_eq!(code(Some(&right)), Ok(()), "{right}");
        }
        for wrong in [
            format!("Bearer {}", &TOKEN[1..]),
            format!("Bearer {TOKEN}0"),
            format!("Bearer {}", TOKEN.to_uppercase()),
            "Bearer  ".to_owned(),
        ] {
            assert_eq!(code(Some(&wrong)), Err("token-wrong".to_owned()), "{wrong}");
        }
        for none in [
            None,
            Some(""),
            Some(TOKEN),
            Some("Basic YTpi"),
            Some("Bearer"),
        ] {
            assert_eq!(code(none), Err("token-missing".to_owned()), "{none:?}");
        }
        assert!(TcpAccess::AnyLocalUser.check(None).is_ok());
    }

    #[test]
    fn token_file_must_be_private_and_regular() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let read = |mode: u32, content: &str| {
            write(&path, content).unwrap();
            set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            token_file(&path)
        };
        let fine = read(0o600, &format!("{TOKEN}\n")).unwrap();
        assert_eq!(fine.as_str(), TOKEN);
        assert!(matches!(
            read(0o600, "short\n"),
            Err(TokenFileError::Invalid { .. })
        ));
        let long = "a".repeat(1 << 20);
        assert!(matches!(
            read(0o600, &long),
            Err(TokenFileError::Invalid { .. })
        ));
        for open in [0o640, 0o604, 0o620, 0o601] {
            let refused = read(open, TOKEN).unwrap_err();
            assert!(
                matches!(refused, TokenFileError::NotPrivate { .. }),
                "{refused}"
            );
        }
        let missing = token_file(&directory.path().join("none")).unwrap_err();
        assert!(matches!(missing, TokenFileError::Read { .. }));
        for special in [directory.path(), Path::new("/dev/null")] {
            let refused = token_file(special).unwrap_err();
            assert!(
                matches!(refused, TokenFileError::NotAFile { .. }),
                "{refused}"
            );
        }
        // A FIFO without a writer is refused, and not waited for.
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(matches!(
            token_file(&fifo),
            Err(TokenFileError::NotAFile { .. })
        ));
    }
}
