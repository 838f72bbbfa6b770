//! Blank journaled ext4 for sandboxes, as a handful of writes; no I/O.
//!
//! ```text
//!   0   1        1+d       +G        +G    +k      +G·t      +j
//!   SB │ GDT d │ block   │ inode  │ dirs │ inode │ journal │ free …
//!      │       │ bitmaps │ bitmaps│  k   │ tables│    j    │
//!   └──── write 1 ───┘    └ 3 ┘   └── 4 ──┘       └ 5 ┘        (2: block bitmap of the last group)
//! ```
//!
//! All metadata of all groups is packed at the front (feature flex_bg), so that only the first few groups need a block
//! bitmap on disk: the others are BLOCK_UNINIT and INODE_UNINIT. Every inode table is INODE_ZEROED, for a sparse file
//! reads as zeros: the kernel's lazy initialization has nothing to do. Invariants: `e2fsck -fn` is clean; the kernel
//! mounts it read-write; no reserved blocks, no lost+found, no backups of the super block (a blank is cheap to
//! recreate, and a sandbox is thrown away when it is broken). Called by the agent (create_sandbox). The file behind must
//! read as zeros where nothing is written.

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

/// Where everything is, in blocks.
#[derive(Debug, Clone, Copy)]
struct Plan {
    blocks: u64,
    groups: u64,
    descriptor_blocks: u64,
    inodes_per_group: u64,
    table_blocks: u64,
    block_bitmaps: u64,
    inode_bitmaps: u64,
    directories: u64,
    tables: u64,
    journal: u64,
    journal_blocks: u64,
    /// First free block.
    end: u64,
}

impl Plan {
    fn new(size_bytes: u64, directories: u64, journal_bytes: Option<u64>) -> Result<Self, Ext4Error> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&size_bytes) {
            return Err(Ext4Error::usage(format!(
                "a blank file system of {size_bytes} bytes: the size must be {MIN_BYTES} to {MAX_BYTES}"
            )));
        }
        let blocks = size_bytes / BLOCK;
        let journal_blocks = match (journal_bytes, size_bytes >> 20) {
            (Some(bytes), _) => bytes / BLOCK,
            (None, ..128) => 1024,
            (None, ..1024) => 4096,
            (None, ..2048) => 8192,
            (None, ..131_072) => 16_384,
            (None, _) => 32_768,
        };
        if !(MIN_JOURNAL..=MAX_JOURNAL).contains(&journal_blocks) {
            return Err(Ext4Error::usage(format!("a journal of {journal_blocks} blocks")));
        }
        let groups = blocks.div_ceil(GROUP);
        let descriptor_blocks = (groups * DESC_SIZE as u64).div_ceil(BLOCK);
        let per_block = BLOCK / INODE_SIZE as u64;
        let inodes_per_group = (size_bytes / BYTES_PER_INODE / groups).max(64).next_multiple_of(per_block);
        let table_blocks = inodes_per_group / per_block;
        let block_bitmaps = 1 + descriptor_blocks;
        let inode_bitmaps = block_bitmaps + groups;
        let first_directory = inode_bitmaps + groups;
        let tables = first_directory + directories + 1;
        let journal = tables + groups * table_blocks;
        let end = journal + journal_blocks;
        if end + end / 8 > blocks {
            return Err(Ext4Error::usage(format!(
                "a blank file system of {size_bytes} bytes has no room for its own {} bytes of journal and tables",
                end * BLOCK
            )));
        }
        if u64::from(EXT4_GOOD_OLD_FIRST_INO) + directories > inodes_per_group {
            return Err(Ext4Error::usage(format!("{directories} directories in a blank file system")));
        }
        Ok(Self {
            blocks,
            groups,
            descriptor_blocks,
            inodes_per_group,
            table_blocks,
            block_bitmaps,
            inode_bitmaps,
            directories: first_directory,
            tables,
            journal,
            journal_blocks,
            end,
        })
    }

    /// Blocks of a group: the last one may be short.
    fn group_blocks(&self, group: u64) -> u64 {
        GROUP.min(self.blocks - group * GROUP)
    }

    /// Blocks of a group that are in use.
    fn used(&self, group: u64) -> u64 {
        self.end.saturating_sub(group * GROUP).min(GROUP)
    }

    /// Whether the block bitmap of a group is on the disk: where metadata lies, and the last one, whose end is marked.
    fn has_bitmap(&self, group: u64) -> bool {
        self.used(group) > 0 || group + 1 == self.groups
    }

    fn block_bitmap(&self, group: u64) -> Vec<u8> {
        bitmap(self.used(group), self.group_blocks(group))
    }
}

/// A block of bits: the first `used` and all from `end` on are set.
fn bitmap(used: u64, end: u64) -> Vec<u8> {
    let mut out = vec![0u8; BLOCK as usize];
    for range in [0..used, end..8 * BLOCK] {
        let (first, last) = (range.start.next_multiple_of(8).min(range.end), range.end / 8 * 8);
        for bit in (range.start..first).chain(last.max(first)..range.end) {
            out[(bit / 8) as usize] |= 1 << (bit % 8);
        }
        if first < last {
            out[(first / 8) as usize..(last / 8) as usize].fill(0xff);
        }
    }
    out
}

/// `i_block` for adjacent blocks.
fn extents(mut start: u64, blocks: u64) -> [u8; I_BLOCK_SIZE] {
    let count = blocks.div_ceil(u64::from(EXT_INIT_MAX_LEN));
    let mut out = [0; I_BLOCK_SIZE];
    out[..ENTRY_SIZE].copy_from_slice(ExtentHeader::new(count as u16, ROOT_MAX, 0).as_bytes());
    let (mut logical, mut left) = (0u32, blocks);
    for slot in out[ENTRY_SIZE..].chunks_exact_mut(ENTRY_SIZE).take(count as usize) {
        let n = left.min(u64::from(EXT_INIT_MAX_LEN)) as u32;
        slot.copy_from_slice(RawExtent::new(logical, start, n).as_bytes());
        (logical, start, left) = (logical + n, start + u64::from(n), left - u64::from(n));
    }
    out
}

fn inode(mode: u16, links: u32, a: &Attributes, start: u64, blocks: u64) -> RawInode {
    let mut raw = RawInode::new_zeroed();
    let size = blocks * BLOCK;
    raw.i_mode.set(mode);
    raw.set_owner(a.uid, a.gid);
    raw.i_links_count.set(links as u16);
    raw.set_size(size);
    raw.i_blocks_lo.set((size / SECTOR) as u32);
    raw.i_flags.set(InodeFlags::EXT4_EXTENTS_FL.bits());
    raw.i_block = extents(start, blocks);
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
/// ext4. A size that is no multiple of 4096 leaves its end unused.
///
/// # Errors
/// `Usage` if the size is too small ([`MIN_BYTES`], or no room for the journal), too large ([`MAX_BYTES`]) or names are
/// bad.
pub fn blank(size_bytes: u64, options: &BlankOptions) -> Result<Vec<(u64, Vec<u8>)>, Ext4Error> {
    check_options(options)?;
    let directories = options.directories.len() as u64;
    let plan = Plan::new(size_bytes, directories, options.journal_bytes)?;
    let seed = crc32c(!0, &options.uuid);
    let used_inodes = u64::from(EXT4_GOOD_OLD_FIRST_INO) - 1 + directories;
    let inode_bitmap = bitmap(used_inodes, plan.inodes_per_group);

    // Super block, descriptors and the first block bitmaps.
    let front = (0..plan.groups).take_while(|&g| plan.has_bitmap(g)).count() as u64;
    let mut head = vec![0; ((plan.block_bitmaps + front) * BLOCK) as usize];
    for group in 0..plan.groups {
        let mut desc = GroupDesc::new_zeroed();
        desc.set_places(
            plan.block_bitmaps + group,
            plan.inode_bitmaps + group,
            plan.tables + group * plan.table_blocks,
        );
        desc.set_free_blocks((plan.group_blocks(group) - plan.used(group)) as u32);
        let mut flags = GroupFlags::EXT4_BG_INODE_ZEROED;
        if plan.has_bitmap(group) {
            let bits = plan.block_bitmap(group);
            desc.set_block_bitmap_csum(crc32c(seed, &bits));
            if group < front {
                let at = ((plan.block_bitmaps + group) * BLOCK) as usize;
                head[at..at + bits.len()].copy_from_slice(&bits);
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
        let at = BLOCK as usize + group as usize * DESC_SIZE;
        head[at..at + DESC_SIZE].copy_from_slice(desc.as_bytes());
    }
    debug_assert!(plan.block_bitmaps == 1 + plan.descriptor_blocks);

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
        &inode(mode(&options.root), 2 + directories as u32, &options.root, plan.directories, 1),
    );
    for (i, (_, a)) in options.directories.iter().enumerate() {
        put(ino(i), &inode(mode(a), 2, a, plan.directories + 1 + i as u64, 1));
    }
    let born = Attributes {
        mtime: super::Timestamp { secs: i64::from(options.mkfs_time), nanos: 0 },
        ..Attributes::default()
    };
    let journal = inode(S_IFREG | 0o600, 1, &born, plan.journal, plan.journal_blocks);
    put(EXT4_JOURNAL_INO, &journal);

    let sb = superblock(&plan, options, used_inodes, &journal);
    head[SUPERBLOCK_OFFSET as usize..SUPERBLOCK_OFFSET as usize + sb.as_bytes().len()]
        .copy_from_slice(sb.as_bytes());
    let mut writes = vec![(0, head)];
    if front < plan.groups {
        let last = plan.groups - 1;
        writes.push(((plan.block_bitmaps + last) * BLOCK, plan.block_bitmap(last)));
    }
    writes.push((plan.inode_bitmaps * BLOCK, inode_bitmap));
    writes.push((plan.directories * BLOCK, body));
    writes.push((plan.journal * BLOCK, journal_superblock(plan.journal_blocks)));
    Ok(writes)
}

fn superblock(plan: &Plan, options: &BlankOptions, used_inodes: u64, journal: &RawInode) -> Superblock {
    let compat = Compat::EXT4_FEATURE_COMPAT_HAS_JOURNAL
        | Compat::EXT4_FEATURE_COMPAT_EXT_ATTR
        | Compat::EXT4_FEATURE_COMPAT_DIR_INDEX
        | Compat::EXT4_FEATURE_COMPAT_SPARSE_SUPER2;
    let incompat = Incompat::EXT4_FEATURE_INCOMPAT_FILETYPE
        | Incompat::EXT4_FEATURE_INCOMPAT_EXTENTS
        | Incompat::EXT4_FEATURE_INCOMPAT_64BIT
        | Incompat::EXT4_FEATURE_INCOMPAT_FLEX_BG;
    let ro = RoCompat::EXT4_FEATURE_RO_COMPAT_LARGE_FILE
        | RoCompat::EXT4_FEATURE_RO_COMPAT_HUGE_FILE
        | RoCompat::EXT4_FEATURE_RO_COMPAT_DIR_NLINK
        | RoCompat::EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE
        | RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM;
    let inodes = plan.groups * plan.inodes_per_group;
    let mut hash_seed = [U32::ZERO; 4];
    for (slot, word) in hash_seed.iter_mut().zip(options.uuid.chunks_exact(4)) {
        *slot = U32::from_bytes([word[0], word[1], word[2], word[3]]);
    }
    let mut sb = Superblock::new(&superblock::Shape {
        blocks_count: plan.blocks,
        free_blocks_count: plan.blocks - plan.end,
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
    sb.seal();
    sb
}

// Their oracles are Linux programs and the Linux kernel.
#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::{
        Timestamp,
        testing::{Mount, fsck},
    };
    use disk_io::WriteAt;
    use std::{fs, os::unix::fs::MetadataExt};

    fn options() -> BlankOptions {
        let a = |permissions| Attributes {
            permissions,
            uid: 100_000,
            gid: 3,
            mtime: Timestamp { secs: 1_600_000_000, nanos: 5 },
            ..Attributes::default()
        };
        BlankOptions {
            uuid: *b"\x01\x23\x45\x67\x89\xab\x4d\xef\x81\x23\x45\x67\x89\xab\xcd\xef",
            label: b"sandbox".to_vec(),
            root: a(0o755),
            directories: vec![(b"upper".to_vec(), a(0o751)), (b"work".to_vec(), a(0o700))],
            journal_bytes: None,
            mkfs_time: 1_600_000_000,
        }
    }

    fn made(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        for (offset, bytes) in blank(size, &options()).unwrap() {
            file.as_file().write_all_at(&bytes, offset).unwrap();
        }
        file
    }

    fn disk_use(file: &tempfile::NamedTempFile) -> u64 {
        file.as_file().metadata().unwrap().blocks() * 512
    }

    #[test]
    fn blanks_of_all_sizes_are_clean() {
        let sizes =
            [MIN_BYTES, 100 << 20, (128 << 20) + 4096, (1 << 30) + 12_345, 20 << 30, 200 << 30, 3 << 40];
        for size in sizes {
            fsck(made(size).path());
        }
    }

    #[test]
    fn a_blank_of_20_gib_is_small() {
        let file = made(20 << 30);
        assert!(disk_use(&file) < 1 << 20, "{} bytes on disk", disk_use(&file));
        // What is written is what it costs: few pieces, and nothing for each of its 160 groups but their descriptors.
        let pieces = blank(20 << 30, &options()).unwrap();
        let bytes: usize = pieces.iter().map(|(_, data)| data.len()).sum();
        assert!(pieces.len() < 1000 && bytes < 1 << 20, "{} pieces, {bytes} bytes", pieces.len());
    }

    /// Discards and write-back reach the backing file when the kernel gets to them.
    fn eventually(what: &str, holds: impl Fn() -> bool) {
        let begin = std::time::Instant::now();
        while !holds() {
            assert!(begin.elapsed() < std::time::Duration::from_mins(5), "in vain: {what}");
            rustix::fs::sync();
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    #[test]
    fn the_kernel_writes_to_it_and_gives_space_back() {
        for size in [MIN_BYTES, 20 << 30] {
            let file = made(size);
            {
                let mount = Mount::new(file.path(), "rw,discard");
                let m = mount.path();
                let upper = m.join("upper").metadata().unwrap();
                assert_eq!((upper.mode() & 0o7777, upper.uid(), upper.gid()), (0o751, 100_000, 3));
                assert_eq!((upper.mtime(), upper.mtime_nsec()), (1_600_000_000, 5));
                assert_eq!(fs::read_dir(m).unwrap().count(), 2);
                let before = disk_use(&file);
                for i in 0..200 {
                    fs::write(m.join(format!("upper/f{i}")), vec![i as u8; 40_000]).unwrap();
                }
                rustix::fs::sync();
                eventually("the files take space", || disk_use(&file) > before + 8_000_000);
                for i in 1..200 {
                    fs::remove_file(m.join(format!("upper/f{i}"))).unwrap();
                }
                rustix::fs::syncfs(fs::File::open(m).unwrap()).unwrap();
                let status = std::process::Command::new("umount").arg(m).status().unwrap();
                assert!(status.success());
                // The journal's blocks stay, the more of them the more often the kernel committed: up to 4 MB.
                eventually("deleted files give space back", || disk_use(&file) < before + 6_000_000);
            }
            fsck(file.path());
            let mount = Mount::new(file.path(), "ro");
            assert!(fs::read(mount.path().join("upper/f0")).unwrap() == vec![0; 40_000]);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let usage = |size, options: &BlankOptions| {
            assert!(matches!(blank(size, options), Err(Ext4Error::Usage { .. })));
        };
        for size in [0, 4096, MIN_BYTES - 1, MAX_BYTES + 1, u64::MAX] {
            usage(size, &options());
        }
        usage(MIN_BYTES, &BlankOptions { journal_bytes: Some(15 << 20), ..options() });
        usage(1 << 30, &BlankOptions { journal_bytes: Some(4095), ..options() });
        usage(1 << 30, &BlankOptions { label: vec![b'x'; 17], ..options() });
        for name in ["", ".", "..", "a/b", "a\0", "upper"] {
            let mut o = options();
            o.directories.push((name.into(), Attributes::default()));
            usage(1 << 30, &o);
        }
    }
}
