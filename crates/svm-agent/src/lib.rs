//! The agent of a service VM: the process in which untrusted layer bytes are interpreted.
//!
//! ```text
//!   control channel ─► serve: disks (attach, detach), one thread per data channel
//!   data channel    ─► operation: Request ─ Data… ─► Codec ─► Data… ─ Result │ Error
//! ```
//!
//! Synchronous, without runtime, paths or configuration: descriptors and frames only. The same code runs in a jailed
//! worker process ([`worker`]) and, over a [`link`], in a virtual machine ([`guest`]). An operation that panics is
//! answered with an error; a channel that closes cancels its operation at the next byte that it reads or writes.
//! Called by `cli` (the worker), by `lcow-agent` (the guest) and by the `layer` commands for [`damage`].

#![forbid(unsafe_code)]

mod behind;
mod block;
pub mod channel;
pub mod codec;
pub mod disk;
mod frames;
#[cfg(target_os = "linux")]
pub mod guest;
pub mod link;
#[cfg(target_os = "linux")]
mod mount;
mod operation;
mod piece;
mod real;
pub mod recode;
mod serve;
mod space;
pub mod worker;

pub use real::{RealCodec, damage};
pub use worker::worker_main;
