//! VHDX: a virtual disk in a file that grows as it is written; dynamic and fixed, without parents.
//!
//! ```text
//!   file    │ id │ head 1 │ head 2 │ regi 1 │ regi 2 │ … 1 MiB │ log │ metadata │ BAT │ block │ block │ …
//!   BAT     │ b0 │ b1 │ … │ b(r-1) │ bitmap │ b(r) │ …          r = chunk ratio = 2²³ · sector / block size
//!   entry   bits 0-2 state, 20-63 offset in MiB
//!   disk    offset / block size ─► entry: present ─► bytes in the file, else zeros
//! ```
//!
//! Source: \[MS-VHDX\] v20180912. Invariants: hostile files yield typed errors and need bounded memory; [`Vhdx`] never
//! writes, and shows a file whose log is in use as if the log had been replayed; what [`VhdxWriter`] has synced survives a
//! crash that cuts a write at any byte; files written by this module have a log in use only while [`grow`], [`compact`] or
//! [`set_disk_id`] changes several sectors as one step.

mod change;
mod create;
mod error;
mod layout;
mod log;
mod reader;
mod tables;
mod writer;

#[cfg(test)]
mod tests;

pub use change::{compact, grow, set_disk_id};
pub use create::{CreateOptions, create, create_from};
pub use error::VhdxError;
pub use layout::{MAX_BLOCK, MAX_DISK, MIN_BLOCK};
pub use reader::{MAX_BAT_BYTES, Vhdx};
pub use tables::Geometry;
pub use writer::VhdxWriter;
