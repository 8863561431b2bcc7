//! The files of `tests/consumers`. `README.md` there describes them.

use std::collections::BTreeMap;

use anyhow::{Error, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// A consumer and its requests.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Script {
    pub(crate) consumer: String,
    pub(crate) version: String,
    /// The command line, in parts that can be marked.
    pub(crate) start: Vec<Arguments>,
    /// The API's socket, if it is not `{dir}/api.sock`.
    pub(crate) api: Option<String>,
    /// The consumer binds the API's socket and passes it on.
    #[serde(default)]
    pub(crate) inherits_socket: bool,
    /// The FIFO that the consumer makes for `--event-monitor`.
    pub(crate) events: Option<String>,
    pub(crate) steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Arguments {
    pub(crate) arguments: Vec<String>,
    pub(crate) later: Option<String>,
    refused: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Step {
    Request(Box<Request>),
    Prints(Output),
    /// A command of `ch-remote`.
    Remote {
        remote: Vec<String>,
    },
    /// An event of `--event-monitor`: `vm:booted`.
    Event {
        event: String,
    },
    /// The VMM ends by itself.
    Ends {
        #[serde(rename = "ends")]
        _ends: bool,
    },
    /// The VMM is started again.
    Starts {
        #[serde(rename = "starts")]
        _starts: bool,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    /// `PUT vm.boot`.
    pub(crate) request: String,
    pub(crate) body: Option<Value>,
    /// The last body with other values at these pointers, in place of `body`.
    pub(crate) again_with: Option<BTreeMap<String, Value>>,
    /// Queues of a new tap, sent along.
    #[serde(default)]
    pub(crate) descriptors: usize,
    /// Values in the answer, by pointer.
    #[serde(default)]
    pub(crate) answer: BTreeMap<String, Value>,
    /// The answer has the address of a device on the first bus.
    #[serde(default)]
    pub(crate) bdf: bool,
    later: Option<String>,
    refused: Option<String>,
}

/// A text of the guest, and its place.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Output {
    pub(crate) prints: String,
    pub(crate) file: Option<String>,
    pub(crate) socket: Option<String>,
    /// Pointer in `vm.info` to the path of a pseudo terminal.
    pub(crate) pty: Option<String>,
}

/// The mark of something that this version refuses.
pub(crate) struct Mark<'a> {
    subject: &'a str,
    refused: &'a str,
}

impl Mark<'_> {
    fn new<'a>(later: Option<&'a str>, refused: Option<&'a str>) -> Result<Option<Mark<'a>>> {
        match (later, refused) {
            (Some(subject), Some(refused)) => Ok(Some(Mark { subject, refused })),
            (None, None) => Ok(None),
            _ => bail!("`later` and `refused` belong together"),
        }
    }

    /// The error for a step that is not refused any more.
    pub(crate) fn passes(&self) -> Error {
        let subject = self.subject;
        anyhow!("marked `later`: `{subject}`, and passes: remove the mark")
    }

    /// Checks the reason of a refusal.
    pub(crate) fn check(&self, said: &str) -> Result<()> {
        let refused = self.refused;
        ensure!(
            said.contains(refused),
            "refused for another reason than `{refused}`: {said}"
        );
        Ok(())
    }
}

impl Arguments {
    pub(crate) fn mark(&self) -> Result<Option<Mark<'_>>> {
        Mark::new(self.later.as_deref(), self.refused.as_deref())
    }
}

impl Request {
    pub(crate) fn mark(&self) -> Result<Option<Mark<'_>>> {
        Mark::new(self.later.as_deref(), self.refused.as_deref())
    }
}
