//! The part of containerd's gRPC interface that `lcow-graphdriver` serves and calls.
//!
//! ```text
//!   containerd ──Snapshots, Diff──► daemon      snapshots, diff      (clients: tests)
//!   daemon ──Content, Leases──► containerd      content, leases      (servers: test doubles)
//!                                               types                Mount, Descriptor
//! ```
//!
//! Messages and services only, generated from `proto/` and checked in (`tests/regenerate.rs`); `tests/foreign.rs` compares
//! them with containerd's own files. What the calls mean is the business of the callers: the daemon's module `containerd`.
//!
//! # Limits
//!
//! None of its own: the transport limits the size of a message. containerd sends up to 16 MiB, tonic's default is 4 MiB.
//!
//! # Stability
//!
//! Compatible on the wire with containerd 1.7 and later. Not published.

#![forbid(unsafe_code)]

mod generated;

pub use generated::{content, diff, leases, snapshots, types};

/// Header of a call with the namespace that it is for.
pub const NAMESPACE_HEADER: &str = "containerd-namespace";
/// Header of a call with the lease that holds what the call makes.
pub const LEASE_HEADER: &str = "containerd-lease";

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
