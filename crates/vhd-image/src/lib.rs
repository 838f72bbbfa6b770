//! Virtual hard disk images in safe Rust: fixed VHD footers, dynamic VHDs (read only), VHDX and qcow2 files.
//!
//! All of it works on [`disk_io::ReadAt`] and [`disk_io::WriteAt`], so an image can be a file, a device or memory, and an
//! opened image is itself a disk that a file system can be read from.
//!
//! ```text
//!   fixed VHD     │ the disk, byte for byte …                                   │ footer 512 │      vhd::Footer
//!   dynamic VHD   │ footer │ header │ block table │ bitmap │ block │ … │ footer  │                vhd::dynamic::DynamicVhd
//!   VHDX          │ id │ head ×2 │ regi ×2 │ … │ log │ metadata │ BAT │ block │ block │ …        vhdx::{create, Vhdx, VhdxWriter}
//!   qcow2         │ header │ L1 │ L2 │ cluster │ … │ reference counts │                           qcow2::{create_from, Qcow2}
//! ```
//!
//! | | fixed VHD | dynamic VHD | VHDX, fixed or dynamic | differencing |
//! |---|---|---|---|---|
//! | read | yes | yes | yes; a log in use is replayed in memory | refused, with a typed error |
//! | write | the disk is a plain file | no | yes; what was synced survives a crash at any byte | no |
//! | grow, compact | the caller's file | no | dynamic only, in place, through the log | no |
//! | create | yes | no | dynamic only | no |
//!
//! qcow2: created, and read, with clusters that are plain or compressed with deflate; backing files, external data files,
//! encryption and what is not known are refused, with a typed error.
//!
//! # Limits
//!
//! VHD: 2040 GiB, tables up to 16 MiB ([`vhd::dynamic::MAX_TABLE_BYTES`]). VHDX: 64 TiB ([`vhdx::MAX_DISK`]), block
//! tables up to 64 MiB ([`vhdx::MAX_BAT_BYTES`]), logs in use up to 64 MiB. qcow2: 64 TiB ([`qcow2::MAX_DISK`]), L1 tables up
//! to 32 MiB ([`qcow2::MAX_L1_BYTES`]).
//!
//! Images are untrusted: every offset, count and length is checked before it is used, tables are bounded, no two blocks
//! share bytes, and a malformed image yields a typed error.
//!
//! # Byte stability
//!
//! [`vhd::Footer::to_bytes`], [`vhdx::create()`], [`vhdx::create_from()`] and [`qcow2::create_from`] are pure functions of their arguments: equal arguments yield equal
//! bytes, on every system and in every release with the same major version. [`vhdx::VhdxWriter`] draws new write ids, as
//! the format demands, and is not reproducible.

#![forbid(unsafe_code)]

pub mod qcow2;
pub mod vhd;
pub mod vhdx;
mod zeros;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
