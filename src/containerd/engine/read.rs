//! A blob as one Read stream.
//!
//! ```text
//!   Read {digest, 0, 0} ─► {0, n₀} {n₀, n₁} … ─ end ─►  offset = sum so far ∧ sum ≤ size, and = size at the end
//! ```
//!
//! The whole blob is asked for, not `size` bytes of it: containerd cuts a range silently, so that a blob that is longer than
//! its descriptor says would look right.
//!
//! Called by `connect`.

use super::{
    Blob, EngineError,
    connect::{self, Engine, MAX_MESSAGE},
    limited,
};
use bytes::Bytes;
use containerd_api::content::{ReadContentRequest, ReadContentResponse, content_client::ContentClient};
use futures_util::{StreamExt, stream};
use std::time::Duration;
use tonic::Streaming;

/// The method, in errors.
const READ: &str = "Content.Read";

/// Opens a blob.
pub(super) async fn blob(
    engine: &Engine,
    namespace: &str,
    digest: &str,
    size: u64,
) -> Result<Blob, EngineError> {
    let mut client = ContentClient::new(engine.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
    let whole = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
    let request = connect::request(READ, whole, namespace, None)?;
    let messages = limited(READ, engine.limits.call, client.read(request)).await?.into_inner();
    let reader = Reader { messages, size, offset: 0, idle: engine.limits.idle };
    Ok(stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(Some(data)) => Some((Ok(data), Some(reader))),
            Ok(None) => None,
            Err(error) => Some((Err(error.into_io()), None)),
        }
    })
    .boxed())
}

struct Reader {
    messages: Streaming<ReadContentResponse>,
    size: u64,
    offset: u64,
    idle: Duration,
}

impl Reader {
    /// The next bytes; `None` is the complete blob's end.
    async fn next(&mut self) -> Result<Option<Bytes>, EngineError> {
        let Self { messages, size, offset, idle } = self;
        // Messages without data are no progress, so the time limit is for all of them together.
        let message = limited(READ, *idle, async {
            loop {
                match messages.message().await? {
                    Some(message) if message.data.is_empty() => {}
                    other => return Ok(other),
                }
            }
        });
        let broken = |reason| {
            let reason = format!("{reason}; remove the image and pull it again");
            Err(EngineError::Broken { call: READ, reason })
        };
        let Some(ReadContentResponse { offset: at, data }) = message.await? else {
            return if offset == size {
                Ok(None)
            } else {
                broken(format!("the blob ends after {offset} bytes, expected {size}"))
            };
        };
        if u64::try_from(at) != Ok(*offset) {
            return broken(format!("the blob continues at offset {at}, expected {offset}"));
        }
        *offset += data.len() as u64;
        if *offset > *size {
            return broken(format!("the blob has more than the expected {size} bytes"));
        }
        Ok(Some(data))
    }
}
