//! Changes of a file system that is not mounted: its journal is replayed, it grows, it gets another UUID.
//!
//! ```text
//!   replay      log ─► blocks in their places ─flush─► log empty ─flush─► needs_recovery cleared
//!   grow        replay ─► new groups ─flush─► old last group full?  yes: super block ─flush
//!                                                                   no:  log (last group, super block) ─► replay
//!   identity    super block with another UUID ─flush─► journal
//! ```
//!
//! Invariants: a power cut at any write leaves a file system that e2fsck finds clean once it has replayed the journal, in
//! the old or in the new state (the tests visit every such moment). For that a change of the super block is one write of
//! one sector of 512 bytes (`superblock`). Nothing is moved, and nothing is rewritten that grows with the disk. The
//! metadata are read as those of a hostile image, but what they say about free space is believed: who needs more lets
//! e2fsck check the disk. Called by `layer grow`, `layer clone`, `layer compact` and the agent.

mod free;
mod grow;
mod identity;
mod log;
mod replay;
mod superblock;
#[cfg(all(test, target_os = "linux"))]
mod tests;

pub use free::{estimate_free_space, free_space};
pub use grow::{GrowOptions, Grown, grow};
pub use identity::{Identity, set_uuid};
pub use replay::{Replayed, replay};

use crate::{Ext4Error, Place};
use disk_io::WriteAt;

/// Writes bytes of the file system.
fn write<D: WriteAt>(disk: &D, bytes: &[u8], offset: u64) -> Result<(), Ext4Error> {
    disk.write_all_at(bytes, offset)
        .map_err(|e| Ext4Error::io("writing the file system", Place::offset(offset), e))
}

/// Makes what was written durable.
fn flush<D: WriteAt>(disk: &D) -> Result<(), Ext4Error> {
    disk.sync().map_err(|e| Ext4Error::io("syncing the file system", Place::default(), e))
}
