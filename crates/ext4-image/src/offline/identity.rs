//! Gives a file system another UUID, so that a copy of a disk can be attached beside it.
//!
//! ```text
//!   super block   UUID, seed of all checksums (metadata_csum_seed) ─► one sector         journal   UUID, if it has one
//!   not touched   directories' hashes (their seed stays), every other checksum
//! ```
//!
//! All checksums of metadata begin with a seed. It is the checksum of the UUID, unless the super block holds it
//! (metadata_csum_seed): then the UUID can change and no checksum does. A file system without that feature gets it, with the
//! seed that it has had, so nothing is rewritten there either; Linux mounts the result from 4.4 on. Called by `layer clone`.

use super::{flush, grow::refresh_existing_copies, log::Log, replay::replay, superblock};
use crate::{
    Ext4Error, Place,
    layout::superblock::{Incompat, RoCompat, SUPERBLOCK_OFFSET},
    reader::Ext4,
};
use disk_io::WriteAt;

/// What became of the UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The UUID before.
    pub old: [u8; 16],
    /// The file system got metadata_csum_seed, which it did not have.
    pub seed_added: bool,
}

/// Sets the UUID of a file system and of its journal, durably. A dirty journal is replayed first. With `writable`, a
/// read-only file system becomes a writable one in the same step.
///
/// # Errors
/// `Unsupported` for checksums of older kinds that depend on the UUID (uninit_bg). `Corrupt`, `Io`; as [`replay`].
pub fn set_uuid<D: WriteAt>(disk: &D, uuid: [u8; 16], writable: bool) -> Result<Identity, Ext4Error> {
    replay(disk)?;
    let fs = Ext4::open(disk)?;
    let geometry = fs.geometry();
    let old = superblock::read(disk)?;
    let csum = geometry.metadata_csum();
    if !csum && geometry.has_ro(RoCompat::EXT4_FEATURE_RO_COMPAT_GDT_CSUM) {
        return Err(Ext4Error::unsupported(
            "another UUID for a file system with the feature uninit_bg; use `tune2fs -U`",
            Place::offset(SUPERBLOCK_OFFSET),
        ));
    }
    let mut new = old;
    new.s_uuid = uuid;
    let seed_added = csum && !geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_CSUM_SEED);
    if seed_added {
        new.s_checksum_seed.set(geometry.checksum_seed);
        let flags = new.incompat() | Incompat::EXT4_FEATURE_INCOMPAT_CSUM_SEED;
        new.s_feature_incompat.set(flags.bits());
    }
    if writable {
        let flags = new.ro_compat() - RoCompat::EXT4_FEATURE_RO_COMPAT_READONLY;
        new.s_feature_ro_compat.set(flags.bits());
    }
    superblock::commit(disk, &old, new)?;
    if geometry.has_journal() {
        let mut log = Log::open(&fs)?;
        // Internal journals have none, unless a tool gave them one; an empty log has no checksum that depends on it.
        if log.superblock.s_uuid != [0; 16] {
            log.superblock.s_uuid = uuid;
            log.write_superblock(disk)?;
        }
    }
    refresh_existing_copies(disk, geometry)?;
    flush(disk)?;
    Ok(Identity { old: old.s_uuid, seed_added })
}
