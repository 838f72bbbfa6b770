//! The super block: what the reader does not check, and what no writer of this crate makes.
//!
//! Called by [`super::check`].

use super::{Checker, Layout};
use crate::{
    Ext4Error, Place,
    error::SuperblockFault,
    layout::{
        EXT4_GOOD_OLD_FIRST_INO,
        hash::DX_HASH_HALF_MD4,
        inode::EXT4_GOOD_OLD_INODE_SIZE,
        superblock::{
            Compat, EXT2_FLAGS_UNSIGNED_HASH, EXT4_DEFM_ACL, EXT4_DEFM_XATTR_USER, EXT4_VALID_FS, Incompat,
            RoCompat, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock,
        },
    },
    reader::{Geometry, superblock::KNOWN_INCOMPAT},
    writer::GROUP_BLOCKS,
};
use disk_io::ReadAt;
use zerocopy::IntoBytes;

/// Compatible features that an image may have.
const COMPAT: Compat = Compat::EXT4_FEATURE_COMPAT_EXT_ATTR
    .union(Compat::EXT4_FEATURE_COMPAT_DIR_INDEX)
    .union(Compat::EXT4_FEATURE_COMPAT_SPARSE_SUPER2);
/// Incompatible features that an image may have: all that the reader knows but recovery.
const INCOMPAT: Incompat = KNOWN_INCOMPAT.difference(Incompat::EXT4_FEATURE_INCOMPAT_RECOVER);
/// Read-only compatible features that an image may have.
const RO_COMPAT: RoCompat = RoCompat::EXT4_FEATURE_RO_COMPAT_SPARSE_SUPER
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_LARGE_FILE)
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_HUGE_FILE)
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_DIR_NLINK)
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE)
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM)
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_READONLY);
/// Incompatible features that an image must have.
const INCOMPAT_NEEDED: Incompat =
    Incompat::EXT4_FEATURE_INCOMPAT_FILETYPE.union(Incompat::EXT4_FEATURE_INCOMPAT_EXTENTS);

/// Features of an image of profile hcsshim: exactly these (and `EXT4_FEATURE_INCOMPAT_INLINE_DATA` or not).
const HCSSHIM_COMPAT: Compat =
    Compat::EXT4_FEATURE_COMPAT_EXT_ATTR.union(Compat::EXT4_FEATURE_COMPAT_SPARSE_SUPER2);
const HCSSHIM_INCOMPAT: Incompat = INCOMPAT_NEEDED.union(Incompat::EXT4_FEATURE_INCOMPAT_FLEX_BG);
const HCSSHIM_RO_COMPAT: RoCompat = RoCompat::EXT4_FEATURE_RO_COMPAT_LARGE_FILE
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_HUGE_FILE)
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE)
    .union(RoCompat::EXT4_FEATURE_RO_COMPAT_READONLY);

/// More inodes than fit a group whatever its size (`EXT2_MAX_INODES_PER_GROUP`).
const MAX_INODES_PER_GROUP: u32 = 65_536;
/// Largest `s_log_groups_per_flex` that the kernel mounts.
const MAX_LOG_GROUPS_PER_FLEX: u8 = 31;
/// Largest `s_desc_size`.
const MAX_DESC_SIZE: u16 = 1024;
/// Smallest `s_min_extra_isize` that is not 0: up to `i_checksum_hi`.
const MIN_EXTRA_ISIZE: u16 = 4;

impl Layout {
    /// Exactly the features of profile hcsshim, in its only geometry, or else the default.
    pub(super) fn of(geometry: &Geometry) -> Self {
        let incompat = geometry.s_feature_incompat.difference(Incompat::EXT4_FEATURE_INCOMPAT_INLINE_DATA);
        let hcsshim = geometry.s_feature_compat == HCSSHIM_COMPAT
            && incompat == HCSSHIM_INCOMPAT
            && geometry.s_feature_ro_compat == HCSSHIM_RO_COMPAT
            && (geometry.block_size, geometry.blocks_per_group, geometry.inode_size) == (4096, 32_768, 256)
            && geometry.uuid == [0; 16]
            && geometry.desc_size == 32;
        if hcsshim { Self::Hcsshim } else { Self::Default }
    }
}

/// A broken rule about the super block.
pub(super) fn bad(fault: SuperblockFault) -> Ext4Error {
    Ext4Error::corrupt(fault, Place::offset(SUPERBLOCK_OFFSET))
}

/// A valid image that no writer of this crate makes.
fn foreign(what: impl std::fmt::Display) -> Ext4Error {
    Ext4Error::unsupported(
        format!("an image with {what}, which no writer of this crate makes"),
        Place::offset(SUPERBLOCK_OFFSET),
    )
}

/// Names the first feature of orphans, journal, quota, snapshots, MMP, errors, encryption and casefolding that is there.
fn unwanted(sb: &Superblock) -> Option<&'static str> {
    let fields: [(&str, &[&[u8]]); 15] = [
        ("an orphan list", &[sb.s_last_orphan.as_bytes()]),
        ("a journal", &[&sb.s_journal_uuid, sb.s_journal_inum.as_bytes(), sb.s_journal_dev.as_bytes()]),
        ("a journal backup", &[sb.s_jnl_blocks.as_bytes()]),
        ("reserved descriptor blocks", &[sb.s_reserved_gdt_blocks.as_bytes()]),
        ("preallocation", &[&[sb.s_prealloc_blocks, sb.s_prealloc_dir_blocks]]),
        ("multi-mount protection", &[sb.s_mmp_interval.as_bytes(), sb.s_mmp_block.as_bytes()]),
        ("encryption", &[&[sb.s_encryption_level]]),
        (
            "a snapshot",
            &[
                sb.s_snapshot_inum.as_bytes(),
                sb.s_snapshot_id.as_bytes(),
                sb.s_snapshot_r_blocks_count.as_bytes(),
                sb.s_snapshot_list.as_bytes(),
            ],
        ),
        ("recorded errors", &[sb.s_error_count.as_bytes(), &sb.s_error_info]),
        ("mount options", &[&sb.s_mount_opts]),
        ("quota files", &[sb.s_usr_quota_inum.as_bytes(), sb.s_grp_quota_inum.as_bytes()]),
        ("encryption keys", &[&sb.s_encrypt_algos, &sb.s_encrypt_pw_salt]),
        ("a project quota file", &[sb.s_prj_quota_inum.as_bytes()]),
        ("an encoding", &[sb.s_encoding.as_bytes(), sb.s_encoding_flags.as_bytes()]),
        ("an orphan file", &[sb.s_orphan_file_inum.as_bytes()]),
    ];
    let used = |parts: &[&[u8]]| parts.iter().any(|part| part.iter().any(|b| *b != 0));
    fields.iter().find(|(_, parts)| used(parts)).map(|(name, _)| *name)
}

impl<R: ReadAt> Checker<R> {
    /// Checks what [`Geometry`] does not.
    pub(super) fn superblock(&self) -> Result<Superblock, Ext4Error> {
        let sb = self.fs.source.superblock()?;
        let geometry = self.fs.geometry();
        let hcsshim = self.layout == Layout::Hcsshim;
        let (compat, incompat) = (geometry.s_feature_compat, geometry.s_feature_incompat);
        let ro_compat = geometry.s_feature_ro_compat;
        let checksums =
            if hcsshim { RoCompat::empty() } else { RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM };
        for (name, bits, fits) in [
            ("compatible", compat.bits(), COMPAT.contains(compat)),
            (
                "incompatible",
                incompat.bits(),
                INCOMPAT.contains(incompat) && incompat.contains(INCOMPAT_NEEDED),
            ),
            (
                "read-only compatible",
                ro_compat.bits(),
                RO_COMPAT.contains(ro_compat) && ro_compat.contains(checksums),
            ),
        ] {
            if !fits {
                return Err(foreign(format_args!("{name} feature bits {bits:#x}")));
            }
        }
        if sb.s_state.get() != EXT4_VALID_FS {
            return Err(bad(SuperblockFault::NotClean));
        }
        if let Some(name) = unwanted(&sb) {
            return Err(foreign(name));
        }
        if sb.s_clusters_per_group.get() != geometry.blocks_per_group {
            return Err(bad(SuperblockFault::ClustersPerGroup));
        }
        if sb.s_creator_os.get() != 0
            || sb.s_default_mount_opts.get() & !(EXT4_DEFM_XATTR_USER | EXT4_DEFM_ACL) != 0
        {
            return Err(foreign("another creator or other default mount options"));
        }
        if geometry.first_ino != EXT4_GOOD_OLD_FIRST_INO || geometry.inodes_count < EXT4_GOOD_OLD_FIRST_INO {
            return Err(bad(SuperblockFault::FirstInode));
        }
        if !(256..=1024).contains(&geometry.inode_size) {
            return Err(foreign(format_args!("inodes of {} bytes", geometry.inode_size)));
        }
        let room = geometry.inode_size - EXT4_GOOD_OLD_INODE_SIZE as u16;
        // 0: not given.
        let extra_fits = |size: u16| {
            size == 0 || (MIN_EXTRA_ISIZE..=room).contains(&size) && size.is_multiple_of(MIN_EXTRA_ISIZE)
        };
        if !extra_fits(sb.s_min_extra_isize.get()) || !extra_fits(sb.s_want_extra_isize.get()) {
            return Err(bad(SuperblockFault::ExtraInodeSize));
        }
        // A smaller group makes the kernel keep more in memory for each mount, and no writer here makes one.
        if !hcsshim && u64::from(geometry.blocks_per_group) != GROUP_BLOCKS {
            return Err(foreign(format_args!("groups of {} blocks", geometry.blocks_per_group)));
        }
        let per_block = geometry.block_size / u32::from(geometry.inode_size);
        let most = (per_block * (geometry.blocks_per_group - 4)).min(MAX_INODES_PER_GROUP - per_block);
        if !(per_block..=most).contains(&geometry.inodes_per_group) {
            return Err(bad(SuperblockFault::InodesPerGroup));
        }
        // Without hash trees there is no hash.
        let hash = if hcsshim { (0, 0) } else { (DX_HASH_HALF_MD4, EXT2_FLAGS_UNSIGNED_HASH) };
        if (sb.s_def_hash_version, sb.s_flags.get()) != hash {
            return Err(foreign("another directory hash"));
        }
        if sb.r_blocks_count() > geometry.blocks_count / 2 {
            return Err(bad(SuperblockFault::ReservedBlocks));
        }
        if sb.s_log_groups_per_flex > MAX_LOG_GROUPS_PER_FLEX {
            return Err(bad(SuperblockFault::FlexGroups));
        }
        let desc_size = sb.s_desc_size.get();
        if desc_size != 0 && !desc_size.is_power_of_two() || desc_size > MAX_DESC_SIZE {
            return Err(bad(SuperblockFault::DescSize));
        }
        let desc_blocks = geometry.groups.div_ceil(geometry.block_size / u32::from(geometry.desc_size));
        if geometry.first_meta_bg > desc_blocks {
            return Err(bad(SuperblockFault::FirstMetaGroup));
        }
        if sb.s_block_group_nr.get() != 0 {
            return Err(bad(SuperblockFault::NotPrimary));
        }
        Ok(sb)
    }

    /// Nothing may be before the super block, or after it up to the end of its block: other programs look there for disks
    /// and boot code of their own kinds.
    pub(super) fn around_superblock(&self) -> Result<(), Ext4Error> {
        let end = u64::from(self.fs.geometry().block_size);
        for (from, to) in [(0, SUPERBLOCK_OFFSET), (SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE as u64, end)] {
            let mut bytes = vec![0; to.saturating_sub(from) as usize];
            self.fs.source.read(from, &mut bytes)?;
            if let Some(at) = bytes.iter().position(|b| *b != 0) {
                let place = Place::offset(from + at as u64);
                return Err(Ext4Error::corrupt(SuperblockFault::Surroundings, place));
            }
        }
        Ok(())
    }
}
