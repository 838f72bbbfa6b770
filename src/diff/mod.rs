//! Layers as differences: tar stream ⇄ ext4 image.
//!
//! ```text
//!                     ┌───────────── apply ─────────────┐
//!   tar stream ──► tar::TarReader ──► tree, whiteouts ──► ext4::writer ──► VHD footer     = layer.vhd
//!                     │                                      │ where the bytes went
//!                     └── all other bytes ──► record::RecordWriter ◄──┘                   = exact record
//!
//!   layer.vhd + exact record ──► record::replay ──► the very tar stream
//! ```
//!
//! Everything here works on [`ReadAt`](crate::io::ReadAt), [`WriteAt`](crate::io::WriteAt), `Read` and `Write`, and
//! takes every byte it reads for hostile. Called by `agent`, inside the jail.

pub mod apply;
mod error;
mod hash;
pub mod record;

pub use error::DiffError;
