//! What the daemon and its worker processes share: environment variables and the form of the control channel.
//!
//! ```text
//!   Linux    a message socket: one datagram, one frame, descriptors beside it
//!   Windows  a pipe: frames, with the number of a handle that was put into the worker beforehand
//! ```
//!
//! Called by `svm::embedded` of the daemon and by the agent's `worker`.

use crate::{ControlRequest, FrameError, FrameType, HEADER_LEN, parse_header};
use serde::{Deserialize, Serialize};
use std::io;

/// Environment variable: the address space that a worker may use; bytes.
pub const MEMORY_VARIABLE: &str = "LCOW_WORKER_MEMORY";
/// Environment variable: the largest file that a worker may write; bytes.
pub const FILE_SIZE_VARIABLE: &str = "LCOW_WORKER_FILE_SIZE";
/// Environment variable: the user that a worker becomes if it has the right to change its user.
pub const USER_VARIABLE: &str = "LCOW_WORKER_USER";
/// Environment variable: `strict`, or anything else (or unset) for the sandbox layers that the kernel and the rights allow.
pub const JAIL_VARIABLE: &str = "LCOW_WORKER_JAIL";
/// The value of [`JAIL_VARIABLE`] that makes every missing sandbox layer an error.
pub const STRICT: &str = "strict";
/// Largest control message; bytes.
pub const MAX_CONTROL: usize = 64 << 10;

/// A control request with the number of the handle that goes with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenRequest {
    /// A handle in the worker, duplicated into it by the daemon: a disk or a channel.
    pub handle: Option<u64>,
    /// The request.
    pub request: ControlRequest,
}

/// Splits a datagram into frame type and payload.
///
/// # Errors
/// A reason unless it is exactly one frame.
pub fn parse_message(message: &[u8]) -> Result<(FrameType, &[u8]), FrameError> {
    let cut = || FrameError::Io(io::ErrorKind::UnexpectedEof.into());
    let (head, payload) = message.split_first_chunk::<HEADER_LEN>().ok_or_else(cut)?;
    let (kind, len) = parse_header(*head)?;
    if len == payload.len() { Ok((kind, payload)) } else { Err(cut()) }
}
