//! Blank journaled ext4 for sandboxes, as a handful of writes; no I/O.
//!
//! ```text
//!   0   1       +d        +G       +G     +k      +G·t      +j
//!   SB │ desc │ block   │ inode  │ dirs │ inode │ journal │ free …      d: 1; version 1: descriptors of all groups
//!      │  d   │ bitmaps │ bitmaps│  k   │ tables│    j    │
//!   └──── one write ───┘└─ one ─┘└── one ──┘    └─ one ─┘   and the block bitmap of the last group
//!
//!   version 2, first blocks of group g:   super block's copy (g = 1, 3ⁿ, 5ⁿ, 7ⁿ) │ descriptors (g = 0, 1, 63 of each 64)
//! ```
//!
//! All metadata of all groups is packed at the front (feature flex_bg), so that only the first few groups need a block
//! bitmap on disk: the others are BLOCK_UNINIT and INODE_UNINIT. Every inode table is INODE_ZEROED, for a sparse file
//! reads as zeros: the kernel's lazy initialization has nothing to do.
//!
//! Version 2 can grow while it is mounted: Linux refuses that with sparse_super2, which version 1 had in order to have no
//! copies of the super block. Descriptors are where meta_bg has them, because then no room must be reserved for those of
//! later groups; the places of copies are left out of the packed metadata and not written, since nothing reads them while
//! the first ones are sound, and a growing kernel writes them. With metadata_csum_seed a clone gets a UUID of its own by
//! one write.
//!
//! Invariants: `e2fsck -fn` is clean; the kernel mounts it read-write; no reserved blocks, no lost+found, no written copy of
//! the super block (a blank is cheap to recreate, and a sandbox is thrown away when it is broken). Called by the daemon,
//! which makes sandboxes. The file behind must read as zeros where nothing is written.

mod plan;

use super::{
    Ext4Error,
    layout::{
        EXT4_GOOD_OLD_FIRST_INO, EXT4_JOURNAL_INO, EXT4_NAME_LEN, EXT4_ROOT_INO, SECTOR,
        checksum::{crc32c, inode_seed},
        dir::{DIR_TAIL_SIZE, EXT4_FT_DIR, entry_size, put_entry, seal_leaf},
        extent::{ENTRY_SIZE, EXT_INIT_MAX_LEN, ExtentHeader, ROOT_MAX, RawExtent},
        group::{DESC_SIZE, GroupDesc, GroupFlags},
        inode::{I_BLOCK_SIZE, InodeFlags, RawInode, S_IFDIR, S_IFREG, seal_inode},
        journal::{JBD2_SUPERBLOCK_V2, JournalHeader, JournalSuperblock},
        superblock::{
            self, Compat, EXT4_DEFM_ACL, EXT4_DEFM_XATTR_USER, Incompat, RoCompat, SUPERBLOCK_OFFSET,
            Superblock,
        },
    },
    writer::Attributes,
};
use plan::{Plan, set_bits};
use zerocopy::{FromZeros, IntoBytes, little_endian::U32};

/// Block size in bytes.
const BLOCK: u64 = 4096;
/// Blocks of a group.
const GROUP: u64 = 8 * BLOCK;
/// Inode size in bytes.
const INODE_SIZE: usize = 256;
/// `i_extra_isize`: all fields that the kernel knows.
const EXTRA_ISIZE: u16 = 32;
/// One inode for so many bytes, as `mke2fs` has it.
const BYTES_PER_INODE: u64 = 16_384;
/// Fewest blocks of a journal that the kernel takes (`JBD2_MIN_JOURNAL_BLOCKS`).
const MIN_JOURNAL: u64 = 1024;
/// Most blocks of a journal: what four extents hold.
const MAX_JOURNAL: u64 = ROOT_MAX as u64 * EXT_INIT_MAX_LEN as u64;
/// Smallest file system in bytes.
pub const MIN_BYTES: u64 = 16 << 20;
/// Largest file system in bytes.
pub const MAX_BYTES: u64 = 16 << 40;
const LOG_GROUPS_PER_FLEX: u8 = 4;
/// `s_jnl_backup_type`: `s_jnl_blocks` holds the journal inode's `i_block` and size.
const JOURNAL_BACKUP: u8 = 1;

/// What a blank file system holds.
#[derive(Debug, Clone, Default)]
pub struct BlankOptions {
    /// UUID.
    pub uuid: [u8; 16],
    /// Label; at most 16 bytes, without NUL.
    pub label: Vec<u8>,
    /// Attributes of the root directory.
    pub root: Attributes,
    /// Directories in the root: name and attributes. They and the root fit one block each.
    pub directories: Vec<(Vec<u8>, Attributes)>,
    /// Size of the journal in bytes (4 MiB to 512 MiB); `None` chooses by the size of the file system.
    pub journal_bytes: Option<u64>,
    /// Creation time in seconds since 1970, for `s_mkfs_time`.
    pub mkfs_time: u32,
}

/// Layout of a blank; every kernel since 4.4 mounts both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlankVersion {
    /// Of releases 1 and 2: sparse_super2, all descriptors behind the super block.
    First,
    /// Grows while mounted, and is cloned without rewriting checksums.
    #[default]
    Second,
}

/// The version of [`blank`].
pub const BLANK_VERSION: u32 = 2;

/// `i_block` for pieces of adjacent blocks; they need at most [`ROOT_MAX`] extents.
fn extents(pieces: &[(u64, u64)]) -> [u8; I_BLOCK_SIZE] {
    let longest = u64::from(EXT_INIT_MAX_LEN);
    let parts = pieces.iter().flat_map(|&(start, blocks)| {
        (0..blocks).step_by(longest as usize).map(move |at| (start + at, (blocks - at).min(longest) as u32))
    });
    let mut out = [0; I_BLOCK_SIZE];
    let (mut logical, mut count) = (0u32, 0);
    for ((start, n), slot) in parts.zip(out[ENTRY_SIZE..].chunks_exact_mut(ENTRY_SIZE)) {
        slot.copy_from_slice(RawExtent::new(logical, start, n).as_bytes());
        (logical, count) = (logical + n, count + 1);
    }
    out[..ENTRY_SIZE].copy_from_slice(ExtentHeader::new(count, ROOT_MAX, 0).as_bytes());
    out
}

fn inode(mode: u16, links: u32, a: &Attributes, pieces: &[(u64, u64)]) -> RawInode {
    let mut raw = RawInode::new_zeroed();
    let size = pieces.iter().map(|(_, blocks)| blocks).sum::<u64>() * BLOCK;
    raw.i_mode.set(mode);
    raw.set_owner(a.uid, a.gid);
    raw.i_links_count.set(links as u16);
    raw.set_size(size);
    raw.i_blocks_lo.set((size / SECTOR) as u32);
    raw.i_flags.set(InodeFlags::EXT4_EXTENTS_FL.bits());
    raw.i_block = extents(pieces);
    raw.i_extra_isize.set(EXTRA_ISIZE);
    let time = |t: super::Timestamp| {
        let (low, extra) = t.encode();
        (low.into(), extra.into())
    };
    (raw.i_mtime, raw.i_mtime_extra) = time(a.mtime);
    (raw.i_crtime, raw.i_crtime_extra) = time(a.mtime);
    (raw.i_atime, raw.i_atime_extra) = time(a.atime.unwrap_or(a.mtime));
    (raw.i_ctime, raw.i_ctime_extra) = time(a.ctime.unwrap_or(a.mtime));
    raw
}

fn directory_block(seed: u32, ino: u32, children: &[(u32, &[u8])]) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    let end = block.len() - DIR_TAIL_SIZE;
    let mut entries: Vec<(u32, &[u8])> = vec![(ino, b"."), (EXT4_ROOT_INO, b"..")];
    entries.extend_from_slice(children);
    let mut at = 0;
    for (i, (child, name)) in entries.iter().enumerate() {
        let len = if i + 1 == entries.len() { end - at } else { entry_size(name.len()) };
        put_entry(&mut block[at..], *child, len, name, EXT4_FT_DIR);
        at += len;
    }
    seal_leaf(inode_seed(seed, ino, 0), &mut block);
    block
}

/// First block of an internal journal that holds nothing.
fn journal_superblock(blocks: u64) -> Vec<u8> {
    let mut sb = JournalSuperblock::new_zeroed();
    sb.s_header = JournalHeader::new(JBD2_SUPERBLOCK_V2, 0);
    sb.s_blocksize.set(BLOCK as u32);
    sb.s_maxlen.set(blocks as u32);
    sb.s_first.set(1);
    sb.s_sequence.set(1);
    sb.s_nr_users.set(1);
    let mut block = vec![0; BLOCK as usize];
    block[..sb.as_bytes().len()].copy_from_slice(sb.as_bytes());
    block
}

fn check_options(options: &BlankOptions) -> Result<(), Ext4Error> {
    if options.label.len() > 16 || options.label.contains(&0) {
        return Err(Ext4Error::usage("a label over 16 bytes or with a NUL"));
    }
    let mut room = BLOCK as usize - DIR_TAIL_SIZE - 24;
    for (i, (name, _)) in options.directories.iter().enumerate() {
        let bad = name.is_empty()
            || name.len() > EXT4_NAME_LEN
            || name == b"."
            || name == b".."
            || name.iter().any(|&b| b == b'/' || b == 0)
            || options.directories[..i].iter().any(|(other, _)| other == name);
        let left = room.checked_sub(entry_size(name.len()));
        match left {
            Some(left) if !bad => room = left,
            _ => {
                let shown = String::from_utf8_lossy(name).into_owned();
                return Err(Ext4Error::usage(format!("directory {shown:?} of a blank file system")));
            }
        }
    }
    Ok(())
}

/// The writes (byte offset, bytes; ascending, not overlapping) that turn a file of `size_bytes` zeros into a mountable
/// ext4 of version [`BLANK_VERSION`]. A size that is no multiple of 4096, or that ends with a group of fewer than 64 blocks,
/// leaves its end unused.
///
/// # Errors
/// `Usage` if the size is too small ([`MIN_BYTES`], or no room for the journal), too large ([`MAX_BYTES`]) or names are
/// bad.
pub fn blank(size_bytes: u64, options: &BlankOptions) -> Result<Vec<(u64, Vec<u8>)>, Ext4Error> {
    blank_of(BlankVersion::default(), size_bytes, options)
}

/// As [`blank`], in a version of choice.
///
/// # Errors
/// As [`blank`].
pub fn blank_of(
    version: BlankVersion,
    size_bytes: u64,
    options: &BlankOptions,
) -> Result<Vec<(u64, Vec<u8>)>, Ext4Error> {
    check_options(options)?;
    let directories = options.directories.len() as u64;
    let plan = Plan::new(version, size_bytes, directories, options.journal_bytes)?;
    let seed = crc32c(!0, &options.uuid);
    let used_inodes = u64::from(EXT4_GOOD_OLD_FIRST_INO) - 1 + directories;
    let mut inode_bitmap = vec![0; BLOCK as usize];
    set_bits(&mut inode_bitmap, 0..used_inodes);
    set_bits(&mut inode_bitmap, plan.inodes_per_group..8 * BLOCK);

    // Super block, descriptors and the first block bitmaps are adjacent, unless the descriptors lie in later groups.
    let front = (0..plan.groups).take_while(|&g| plan.has_bitmap(g)).count() as u64;
    let front_end = plan.block_bitmaps[front as usize - 1] + 1;
    let mut head = vec![0; (front_end * BLOCK) as usize];
    let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut free_blocks = 0;
    for group in 0..plan.groups {
        let index = group as usize;
        let mut desc = GroupDesc::new_zeroed();
        desc.set_places(plan.block_bitmaps[index], plan.inode_bitmaps[index], plan.tables[index]);
        let free = plan.group_blocks(group) - plan.used(group);
        free_blocks += free;
        desc.set_free_blocks(free as u32);
        let mut flags = GroupFlags::EXT4_BG_INODE_ZEROED;
        if plan.has_bitmap(group) {
            let bits = plan.block_bitmap(group);
            desc.set_block_bitmap_csum(crc32c(seed, &bits));
            if group < front {
                let at = (plan.block_bitmaps[index] * BLOCK) as usize;
                head[at..at + bits.len()].copy_from_slice(&bits);
            } else {
                writes.push((plan.block_bitmaps[index] * BLOCK, bits));
            }
        } else {
            flags |= GroupFlags::EXT4_BG_BLOCK_UNINIT;
        }
        if group == 0 {
            desc.set_free_inodes((plan.inodes_per_group - used_inodes) as u32);
            desc.set_itable_unused((plan.inodes_per_group - used_inodes) as u32);
            desc.set_used_dirs(1 + directories as u32);
            desc.set_inode_bitmap_csum(crc32c(seed, &inode_bitmap[..(plan.inodes_per_group / 8) as usize]));
        } else {
            flags |= GroupFlags::EXT4_BG_INODE_UNINIT;
            desc.set_free_inodes(plan.inodes_per_group as u32);
            desc.set_itable_unused(plan.inodes_per_group as u32);
        }
        desc.bg_flags.set(flags.bits());
        desc.seal(seed, group as u32);
        let (block, at) = plan.descriptor_place(group);
        if block < front_end {
            let at = block as usize * BLOCK as usize + at;
            head[at..at + DESC_SIZE].copy_from_slice(desc.as_bytes());
        } else {
            if at == 0 {
                writes.push((block * BLOCK, vec![0; BLOCK as usize]));
            }
            let place = writes.iter_mut().rfind(|(offset, _)| *offset == block * BLOCK);
            if let Some((_, bytes)) = place {
                bytes[at..at + DESC_SIZE].copy_from_slice(desc.as_bytes());
            }
        }
    }

    // Directories and the used part of the first inode table are adjacent.
    let mut body = Vec::new();
    let ino = |i: usize| EXT4_GOOD_OLD_FIRST_INO + i as u32;
    let children: Vec<(u32, &[u8])> =
        options.directories.iter().enumerate().map(|(i, (name, _))| (ino(i), name.as_slice())).collect();
    body.extend(directory_block(seed, EXT4_ROOT_INO, &children));
    for i in 0..options.directories.len() {
        body.extend(directory_block(seed, ino(i), &[]));
    }
    let table = body.len();
    body.resize(table + (used_inodes as usize * INODE_SIZE).next_multiple_of(BLOCK as usize), 0);
    let mut put = |number: u32, raw: &RawInode| {
        let at = table + (number as usize - 1) * INODE_SIZE;
        let slot = &mut body[at..at + INODE_SIZE];
        slot[..raw.as_bytes().len()].copy_from_slice(raw.as_bytes());
        seal_inode(seed, number, slot);
    };
    let mode = |a: &Attributes| S_IFDIR | a.permissions & 0o7777;
    put(
        EXT4_ROOT_INO,
        &inode(mode(&options.root), 2 + directories as u32, &options.root, &[(plan.directories, 1)]),
    );
    for (i, (_, a)) in options.directories.iter().enumerate() {
        put(ino(i), &inode(mode(a), 2, a, &[(plan.directories + 1 + i as u64, 1)]));
    }
    let born = Attributes {
        mtime: super::Timestamp { secs: i64::from(options.mkfs_time), nanos: 0 },
        ..Attributes::default()
    };
    let journal = inode(S_IFREG | 0o600, 1, &born, &plan.journal);
    put(EXT4_JOURNAL_INO, &journal);

    let sb = superblock(&plan, options, free_blocks, used_inodes, &journal);
    head[SUPERBLOCK_OFFSET as usize..SUPERBLOCK_OFFSET as usize + sb.as_bytes().len()]
        .copy_from_slice(sb.as_bytes());
    writes.push((0, head));
    writes.push((plan.inode_bitmaps[0] * BLOCK, inode_bitmap));
    writes.push((plan.directories * BLOCK, body));
    let journal_blocks = plan.journal.iter().map(|(_, n)| n).sum();
    writes.push((plan.journal[0].0 * BLOCK, journal_superblock(journal_blocks)));
    writes.sort_unstable_by_key(|(offset, _)| *offset);
    Ok(writes)
}

fn superblock(
    plan: &Plan,
    options: &BlankOptions,
    free_blocks: u64,
    used_inodes: u64,
    journal: &RawInode,
) -> Superblock {
    let mut compat = Compat::EXT4_FEATURE_COMPAT_HAS_JOURNAL
        | Compat::EXT4_FEATURE_COMPAT_EXT_ATTR
        | Compat::EXT4_FEATURE_COMPAT_DIR_INDEX;
    let mut incompat = Incompat::EXT4_FEATURE_INCOMPAT_FILETYPE
        | Incompat::EXT4_FEATURE_INCOMPAT_EXTENTS
        | Incompat::EXT4_FEATURE_INCOMPAT_64BIT
        | Incompat::EXT4_FEATURE_INCOMPAT_FLEX_BG;
    let mut ro = RoCompat::EXT4_FEATURE_RO_COMPAT_LARGE_FILE
        | RoCompat::EXT4_FEATURE_RO_COMPAT_HUGE_FILE
        | RoCompat::EXT4_FEATURE_RO_COMPAT_DIR_NLINK
        | RoCompat::EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE
        | RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM;
    match plan.version {
        BlankVersion::First => compat |= Compat::EXT4_FEATURE_COMPAT_SPARSE_SUPER2,
        BlankVersion::Second => {
            ro |= RoCompat::EXT4_FEATURE_RO_COMPAT_SPARSE_SUPER;
            incompat |= Incompat::EXT4_FEATURE_INCOMPAT_META_BG | Incompat::EXT4_FEATURE_INCOMPAT_CSUM_SEED;
        }
    }
    let inodes = plan.groups * plan.inodes_per_group;
    let mut hash_seed = [U32::ZERO; 4];
    for (slot, word) in hash_seed.iter_mut().zip(options.uuid.chunks_exact(4)) {
        *slot = U32::from_bytes([word[0], word[1], word[2], word[3]]);
    }
    let mut sb = Superblock::new(&superblock::Shape {
        blocks_count: plan.blocks,
        free_blocks_count: free_blocks,
        inodes_count: inodes as u32,
        free_inodes_count: (inodes - used_inodes) as u32,
        first_data_block: 0,
        log_block_size: BLOCK.ilog2() - 10,
        blocks_per_group: GROUP as u32,
        inodes_per_group: plan.inodes_per_group as u32,
        inode_size: INODE_SIZE as u16,
        extra_isize: EXTRA_ISIZE,
        compat,
        incompat,
        ro_compat: ro,
    });
    sb.set_checksums_and_hash(hash_seed);
    sb.s_uuid = options.uuid;
    sb.s_volume_name[..options.label.len()].copy_from_slice(&options.label);
    sb.s_journal_inum.set(EXT4_JOURNAL_INO);
    sb.s_jnl_backup_type = JOURNAL_BACKUP;
    for (slot, word) in sb.s_jnl_blocks.iter_mut().zip(journal.i_block.chunks_exact(4)) {
        *slot = U32::from_bytes([word[0], word[1], word[2], word[3]]);
    }
    sb.s_jnl_blocks[15] = journal.i_size_high;
    sb.s_jnl_blocks[16] = journal.i_size_lo;
    sb.s_default_mount_opts.set(EXT4_DEFM_XATTR_USER | EXT4_DEFM_ACL);
    sb.s_mkfs_time.set(options.mkfs_time);
    sb.s_lastcheck.set(options.mkfs_time);
    sb.s_wtime.set(options.mkfs_time);
    sb.s_log_groups_per_flex = LOG_GROUPS_PER_FLEX;
    if plan.version == BlankVersion::Second {
        sb.s_checksum_seed.set(crc32c(!0, &options.uuid));
        // Left open, the first mount would compute it and look for the copies of the super block, which are not there.
        let directories = 1 + options.directories.len() as u64;
        sb.s_overhead_clusters.set((plan.blocks - free_blocks - directories) as u32);
    }
    sb.seal();
    sb
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
