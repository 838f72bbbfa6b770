//! What `tests/regenerate.rs` generates from `proto/`, one file each. Never edited by hand.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "the style of the generators: prost and tonic"
)]

#[rustfmt::skip]
pub mod content;
#[rustfmt::skip]
pub mod diff;
#[rustfmt::skip]
pub mod leases;
#[rustfmt::skip]
pub mod snapshots;
#[rustfmt::skip]
pub mod types;
