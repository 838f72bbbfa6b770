//! Kubernetes' container runtime interface (CRI) v1 as its client sees it: what kubelet asks of containerd, as far as the
//! tests do.
//!
//! ```text
//!   tests/containerd/cri ──RuntimeService, ImageService──► containerd ──Snapshots, Diff──► the product
//! ```
//!
//! Messages and clients only, generated from `proto/` and checked in (`tests/regenerate.rs`); `tests/foreign.rs` compares
//! them with Kubernetes' own file. A dependency of tests alone: nothing of it reaches the product, which
//! `tests/architecture` checks.
//!
//! # Limits
//!
//! Fields that no test reads or sets are left out; a message that has them is read without them.
//!
//! # Stability
//!
//! Compatible on the wire with CRI v1 (Kubernetes 1.23 and later). Not published.

#![forbid(unsafe_code)]

mod generated;

pub use generated::runtime;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
