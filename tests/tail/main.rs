//! No sequence of refusal, failure, kill, restart or time-out lets anything but a whole tar become a layer, and the
//! client reads the first reason.
//!
//! ```text
//!   tails.rs     where bytes can be lost × how the daemon fails or dies there × the client's retry
//!   reasons.rs   answers that arrive, whatever is still to come; reasons that are kept; one log line a failure
//!   halves.rs    half requests, idle connections, stops
//!   client.rs    a client that reads its tar once, as dockerd's does
//! ```
#![cfg(target_os = "linux")]

mod client;
mod halves;
mod reasons;
mod tails;

#[path = "../support/mod.rs"]
mod support;
