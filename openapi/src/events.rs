//! Following what happens to VMs.

use std::collections::VecDeque;

use http::StatusCode;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use serde::Deserialize;
use spec::{Event, VmId};

use crate::client::Client;
use crate::error::ClientError;
use crate::operations::EVENTS;

/// Bytes of one event.
const EVENT_LEN: usize = 1 << 20;

/// An item of the event stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Something happened.
    Happened(Event),
    /// Events before this number are lost: the service no longer keeps them.
    Missed {
        /// The oldest event that is.
        oldest: u64,
        /// How many are lost; in the stream of one VM an upper bound. Absent from older services.
        count: Option<u64>,
    },
}

/// A stream of events. Dropping it ends the connection.
#[derive(Debug)]
pub struct Events {
    client: Client,
    body: Incoming,
    // The connection ends with it.
    _connection: SendRequest<http_body_util::Full<hyper::body::Bytes>>,
    buffer: Vec<u8>,
    ready: VecDeque<News>,
}

impl Client {
    /// Follows what happens: after the event of number `after` (0: from the oldest that is kept; none: from now
    /// on), to all VMs or to one.
    ///
    /// # Errors
    /// Fails if there is no service, or it refuses.
    pub async fn events(
        &self,
        after: Option<u64>,
        vm: Option<&VmId>,
    ) -> Result<Events, ClientError> {
        let after = after.map(|after| format!("after={after}"));
        let vm = vm.map(|vm| format!("vm={vm}"));
        let query: Vec<_> = after.into_iter().chain(vm).collect();
        let target = match query.is_empty() {
            true => EVENTS.path.to_owned(),
            false => format!("{}?{}", EVENTS.path, query.join("&")),
        };
        let (body, connection) = self.open(&EVENTS, &target).await?;
        Ok(Events {
            client: self.clone(),
            body,
            _connection: connection,
            buffer: Vec::new(),
            ready: VecDeque::new(),
        })
    }
}

impl Events {
    /// Returns the next item, or `None` when the service has ended the stream. Waits without a limit.
    ///
    /// # Errors
    /// Fails if the connection breaks, or what comes is not understood.
    pub async fn next(&mut self) -> Result<Option<News>, ClientError> {
        loop {
            if let Some(news) = self.ready.pop_front() {
                return Ok(Some(news));
            }
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            let frame = frame.map_err(|source| ClientError::Broken {
                place: self.client.place(),
                operation: EVENTS.id,
                source,
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            self.buffer.extend_from_slice(&data);
            self.take_whole_ones()?;
        }
    }

    /// Takes the events that have come whole: an empty line ends each.
    fn take_whole_ones(&mut self) -> Result<(), ClientError> {
        while let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
            let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
            match parse(&block) {
                Ok(news) => self.ready.extend(news),
                Err(_) => return Err(self.not_understood(&block)),
            }
        }
        if self.buffer.len() > EVENT_LEN {
            let begun = std::mem::take(&mut self.buffer);
            return Err(self.not_understood(&begun));
        }
        Ok(())
    }

    fn not_understood(&self, block: &[u8]) -> ClientError {
        self.client.not_understood(&EVENTS, StatusCode::OK, block)
    }
}

/// One block of a stream of server-sent events, as this service writes them; nothing if it is a comment.
fn parse(block: &[u8]) -> serde_json::Result<Option<News>> {
    #[derive(Deserialize)]
    struct Missed {
        oldest: u64,
        count: Option<u64>,
    }

    let block = String::from_utf8_lossy(block);
    let field = |name: &str| {
        let fields = block.lines().filter_map(|line| line.strip_prefix(name));
        fields.map(str::trim_start).collect::<Vec<_>>().join("\n")
    };
    let data = field("data:");
    if data.is_empty() {
        return Ok(None);
    }
    if field("event:") == "missed" {
        let Missed { oldest, count } = serde_json::from_str(&data)?;
        return Ok(Some(News::Missed { oldest, count }));
    }
    serde_json::from_str(&data).map(|event| Some(News::Happened(event)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_event_blocks() {
        assert_eq!(parse(b":\n\n").unwrap(), None);
        for (data, count) in [
            (r#"{"oldest":7}"#, None),
            (r#"{"oldest":7,"count":3}"#, Some(3)),
        ] {
            let missed = parse(format!("event: missed\ndata: {data}\n\n").as_bytes()).unwrap();
            assert_eq!(missed, Some(News::Missed { oldest: 7, count }));
        }
        let data = r#"{"sequence":3,"time_ms":1,"vm":"a","event":"booted"}"#;
        let block = format!("id: 3\nevent: booted\ndata: {data}\n\n");
        let Some(News::Happened(event)) = parse(block.as_bytes()).unwrap() else {
            panic!("no event");
        };
        assert_eq!((event.sequence, event.event.as_str()), (3, "booted"));
        assert!(parse(b"data: nonsense\n\n").is_err());
    }
}
