//! What `tests/regenerate.rs` generates from `proto/`. Never edited by hand.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "the style of the generators: prost and tonic"
)]

#[rustfmt::skip]
pub mod runtime;
