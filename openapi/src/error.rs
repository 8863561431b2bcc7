//! Why a call brought nothing.

use std::io;
use std::time::Duration;

use http::StatusCode;
use spec::Problem;

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No service answers at the address.
    #[error(
        "no service answers at {place}: is whimbrel running (`whimbrel serve`), and is this its socket?"
    )]
    NoService {
        /// The socket or address.
        place: String,
        /// The host's error.
        source: io::Error,
    },
    /// The socket belongs to another user.
    #[error("{place} may not be used: the socket belongs to another user")]
    Forbidden {
        /// The socket.
        place: String,
    },
    /// The service was there and went, or speaks something else.
    #[error("the connection to {place} broke during {operation}: {source}")]
    Broken {
        /// The socket or address.
        place: String,
        /// The name of the operation in the document.
        operation: &'static str,
        /// How.
        source: hyper::Error,
    },
    /// No answer came in time. The service may still do what was asked.
    #[error("{place} did not answer {operation} within {} s; the operation may still be in \
             progress", after.as_secs())]
    Timeout {
        /// The socket or address.
        place: String,
        /// The name of the operation in the document.
        operation: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The service says why it was not done.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// The answer is not one that the service gives.
    #[error("{place} answered {operation} with status {status} and an unexpected body: {body}")]
    NotUnderstood {
        /// The socket or address.
        place: String,
        /// The name of the operation in the document.
        operation: &'static str,
        /// The answer's status.
        status: StatusCode,
        /// The beginning of its body.
        body: String,
    },
    /// The request cannot be put in HTTP.
    #[error("{operation} cannot be sent: {reason}")]
    Unsendable {
        /// The name of the operation in the document.
        operation: &'static str,
        /// Why.
        reason: String,
    },
}

impl ClientError {
    /// Returns the stable code of the problem, if the service sent one.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Problem(problem) => Some(&problem.code),
            _ => None,
        }
    }
}

/// Returns the messages of an error and its causes. A cause that is part of the text already is left out: the
/// messages of many errors end with their cause.
#[must_use]
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let message = cause.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        enum Failed {
            #[error("cannot lock a: {source}")]
            Told { source: io::Error },
            #[error("cannot lock a")]
            Untold { source: io::Error },
        }
        let source = || io::Error::other("no space");
        for failed in [
            Failed::Told { source: source() },
            Failed::Untold { source: source() },
        ] {
            assert_eq!(with_causes(&failed), "cannot lock a: no space");
        }
        assert_eq!(with_causes(&source()), "no space");
    }
}
