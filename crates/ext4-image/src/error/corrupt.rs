//! The rules that an image must keep: one variant a rule, grouped by structure.
//!
//! The rule names what is wrong; [`Place`](super::Place) in [`Ext4Error::Corrupt`](super::Ext4Error::Corrupt) names the
//! group, inode, block or byte. The reader reports some of these rules; the checker, which is stricter, all.

use std::fmt;

/// What is wrong with a corrupt image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CorruptKind {
    /// A rule about a superblock.
    Superblock(SuperblockFault),
    /// A rule about a group: its descriptor, bitmaps and inode table.
    Group(GroupFault),
    /// A rule about an inode.
    Inode(InodeFault),
    /// A rule about the directory tree: link counts and parents.
    Link(LinkFault),
    /// A rule about the blocks of an inode: extent tree or block map.
    Extent(ExtentFault),
    /// A rule about a directory.
    Dir(DirFault),
    /// A rule about extended attributes.
    Xattr(XattrFault),
    /// A rule about the journal.
    Journal(JournalFault),
    /// A rule about a block.
    Block(BlockFault),
    /// What a kernel reports about a mounted file system, in its words (`EUCLEAN`, `EBADMSG`, …).
    Kernel(String),
}

impl fmt::Display for CorruptKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock(fault) => write!(f, "superblock: {fault}"),
            Self::Group(fault) => write!(f, "group: {fault}"),
            Self::Inode(fault) => write!(f, "inode: {fault}"),
            Self::Link(fault) => write!(f, "links: {fault}"),
            Self::Extent(fault) => write!(f, "extents: {fault}"),
            Self::Dir(fault) => write!(f, "directory: {fault}"),
            Self::Xattr(fault) => write!(f, "xattrs: {fault}"),
            Self::Journal(fault) => write!(f, "journal: {fault}"),
            Self::Block(fault) => write!(f, "block: {fault}"),
            Self::Kernel(report) => f.write_str(report),
        }
    }
}

/// Declares an enum of rules: each variant with its text, which is also its documentation.
macro_rules! faults {
    ($(#[$doc:meta])* $name:ident => $kind:ident { $($variant:ident: $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $(#[doc = $text] $variant,)*
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $text,)*
                })
            }
        }

        impl From<$name> for CorruptKind {
            fn from(fault: $name) -> Self {
                Self::$kind(fault)
            }
        }
    };
}

faults! {
    /// Rules about a superblock.
    SuperblockFault => Superblock {
        Magic: "the ext4 magic number is missing",
        Checksum: "the checksum does not match",
        BlockSize: "`s_log_block_size` is out of range",
        BlocksCount: "it counts more blocks than the disk has",
        FirstDataBlock: "`s_first_data_block` does not fit the block size",
        BlocksPerGroup: "`s_blocks_per_group` is out of range",
        ClusterSize: "the cluster size differs from the block size",
        ClustersPerGroup: "`s_clusters_per_group` differs from `s_blocks_per_group`",
        InodeSize: "`s_inode_size` is out of range",
        DescSize: "`s_desc_size` is out of range",
        InodesPerGroup: "`s_inodes_per_group` is out of range",
        InodesCount: "`s_inodes_count` does not fit the groups",
        InodesBeyondDisk: "it counts more inodes than the disk has room for",
        FreeCounts: "the counts of free blocks or free inodes are wrong",
        NotClean: "the file system is not marked clean",
        FirstInode: "`s_first_ino` is not 11",
        ExtraInodeSize: "`s_min_extra_isize` or `s_want_extra_isize` is out of range",
        ReservedBlocks: "more than half of the blocks are reserved",
        FlexGroups: "`s_log_groups_per_flex` is out of range",
        FirstMetaGroup: "`s_first_meta_bg` is out of range",
        NotPrimary: "`s_block_group_nr` is not 0, so it is not the primary copy",
        Surroundings: "the bytes around the superblock are not zero",
        RecordedErrors: "a kernel recorded errors in this file system (see `e2fsck -fn`)",
    }
}

faults! {
    /// Rules about a group: its descriptor, bitmaps and inode table.
    GroupFault => Group {
        Checksum: "the checksum of the descriptor does not match",
        InodeTable: "the inode table is outside the file system",
        Flags: "the descriptor has unknown flags or fields",
        TooSmall: "the group is too small for its descriptors",
        PlacesOutside: "the bitmaps or the inode table are outside the file system",
        PlacesInOtherGroup: "the bitmaps or the inode table are in another group, without feature flex_bg",
        UnusedInodes: "`bg_itable_unused` exceeds the inodes of a group",
        UninitInodes: "a group with uninitialized inodes has used inodes",
        UninitBlocks: "a group with an uninitialized block bitmap has used blocks",
        FirstUninit: "the first group has uninitialized inodes",
        LastUninit: "the last group has an uninitialized block bitmap",
        InodeBitmapChecksum: "the checksum of the inode bitmap does not match",
        InodeBitmapPadding: "the padding of the inode bitmap is wrong",
        BlockBitmapChecksum: "the checksum of the block bitmap does not match",
        BlockBitmap: "the block bitmap is wrong about a block",
        InodeCounts: "the counts of free inodes or of directories are wrong",
        FreeBlocks: "the count of free blocks is wrong",
    }
}

faults! {
    /// Rules about an inode.
    InodeFault => Inode {
        Number: "the number is outside the file system",
        CutOff: "it is cut off",
        Checksum: "the checksum does not match",
        FileType: "`i_mode` has an unknown file type",
        ExtraSize: "`i_extra_isize` is out of range",
        NegativeSize: "`i_size` is negative",
        SizeTooLarge: "`i_size` is too large for its type or for the block size",
        ReservedInUse: "a reserved inode is in use",
        ReservedFree: "a reserved inode is marked free",
        FreeNotEmpty: "a free inode is not empty",
        CountedUnused: "a used inode is among those that the group counts as never used",
        Deleted: "a used inode has a deletion time or no links",
        Flags: "`i_flags` has flags that no writer of this crate sets",
        FlagCombination: "`i_flags` has flags that exclude each other or do not fit the type",
        Nanoseconds: "a time has more than 999,999,999 nanoseconds",
        UnknownFields: "fields that must be zero are not",
        LooksLikeExtents: "inline data look like the root of an extent tree",
        InlineSize: "inline data are shorter than `i_size`",
        NoExtents: "it has contents, but neither extents nor inline data",
        EmptyFile: "an empty file has contents",
        Device: "a device is malformed",
        DeviceLooksLikeDirectory: "the number of a device is that of a block that looks like a directory of this inode",
        PipeContents: "a pipe or socket has contents",
        BlocksBeyondEnd: "blocks lie beyond `i_size`",
        BlocksCount: "`i_blocks` is wrong",
        SymlinkLength: "the length of a symbolic link is out of range",
        SymlinkNul: "the target of a symbolic link contains NUL",
        SymlinkShort: "a short symbolic link has blocks",
        SymlinkBlocks: "a symbolic link has more than one block",
        SymlinkEnd: "the target of a symbolic link does not end at `i_size`",
        NoExtAttr: "it has an xattr block, without feature ext_attr",
        NoDirIndex: "it has a hash tree, without feature dir_index",
        NoHugeFile: "`i_blocks` counts blocks, without feature huge_file",
        NoLargeFile: "a file of 2 GiB or more, without feature large_file",
        XattrValue: "the inode of an xattr value has an impossible size or link count",
    }
}

faults! {
    /// Rules about the directory tree: link counts and parents.
    LinkFault => Link {
        Root: "the root is not a directory, or has a name",
        NamedButFree: "a free or reserved inode has a name",
        ReservedUnmarked: "a reserved inode is not marked as used",
        XattrReferences: "the reference count of an xattr value is wrong",
        XattrBlockReferences: "an xattr block has fewer owners than its header counts",
        Unnamed: "a directory has no name",
        Parent: "`..` does not name the parent",
        Count: "the link count or the type differs from what the names say",
        DirectoryCount: "the link count of a directory is wrong",
        NoDirNlink: "a directory has more subdirectories than its link count can hold, without feature dir_nlink",
        Loop: "a directory is inside itself",
    }
}

faults! {
    /// Rules about the blocks of an inode: extent tree or block map.
    ExtentFault => Extent {
        Magic: "a node has no magic number",
        Counts: "a node has impossible counts",
        Capacity: "`eh_max` of a node does not fit its place",
        TooDeep: "the tree is too deep",
        Depth: "a node does not have the depth that its parent demands, or is empty",
        NodeChecksum: "the checksum of a node does not match",
        NodeStart: "a node does not begin where its parent says",
        Order: "extents are out of order",
        NodeOutside: "a node is outside the file system",
        Length: "the length of an extent is out of range",
        Outside: "an extent is outside the file system",
        Unwritten: "an extent is unwritten, which no writer of this crate makes",
        MapOutside: "the block map points outside the file system",
        MapTooLong: "the file is too long for a block map",
        MapBlocks: "the block map has more blocks than the file system",
    }
}

faults! {
    /// Rules about a directory.
    DirFault => Dir {
        NotADirectory: "the inode is not a directory",
        Size: "the size is not a whole number of blocks",
        TooLarge: "it is too large",
        Hole: "it has a hole",
        BlocksCount: "its blocks do not fit its size",
        InlineSize: "the size of the inline data is wrong",
        Checksum: "the checksum of a block does not match",
        EntryCutOff: "an entry is cut off",
        EntryLength: "an entry has an impossible length",
        EntryInode: "an entry names an inode outside the file system",
        EntryName: "an entry has an impossible name",
        EntryType: "an entry has an unknown type",
        EntryTypes: "an inode has names of different types",
        DirectoryNames: "a directory has two names",
        Duplicate: "a name is there twice",
        Dot: "the entry `.` is wrong",
        DotDot: "the entry `..` is wrong",
        DotEnd: "the entry `.` or `..` is not terminated",
        DotDotLength: "the entry `..` does not cover the hash tree",
        SecondDot: "there is a second `.` or `..`",
        TreeRoot: "the root of the hash tree is malformed",
        TreeDepth: "the hash tree is too deep",
        TreeNode: "a node of the hash tree does not look like an empty block",
        TreeCounts: "a node of the hash tree has impossible counts",
        TreeChecksum: "the checksum of a node of the hash tree does not match",
        TreeOrder: "the hashes of the hash tree are out of order",
        TreeChild: "the hash tree names a block twice, or one outside the directory",
        TreeMissing: "the hash tree does not name a block",
        TreeBounds: "a name is outside the bounds of the hash tree",
    }
}

faults! {
    /// Rules about extended attributes.
    XattrFault => Xattr {
        Unterminated: "the list of entries has no end",
        NameCutOff: "a name is cut off",
        Name: "a name is empty, contains NUL, or does not fit its name index",
        Index: "the name index is unknown",
        ValueTooLong: "a value is longer than 64 KiB",
        ValueCutOff: "a value is cut off",
        ValueInode: "the inode of a value is not what the entry says",
        ValuePlace: "a value is both in an inode and in the block",
        ValueHash: "the hash of a value in an inode does not match",
        Overlap: "values overlap",
        Hash: "the hash of an entry does not match",
        Acl: "a POSIX ACL is malformed",
        Duplicate: "a name is there twice",
        Unsorted: "the entries of a block are not sorted",
        NotXattrs: "the bytes after the inode are not xattrs",
        InlineData: "inline data without the flag, or the flag without inline data",
        InlineDataInBlock: "inline data in a block",
        Forbidden: "an xattr value has xattrs itself",
        Overlayfs: "a `trusted.overlay` xattr that no writer of this crate writes",
        BlockOutside: "the block is outside the file system",
        BlockHeader: "the block has no xattr header",
        BlockChecksum: "the checksum of the block does not match",
        BlockHash: "the hash of the block does not match",
        BlockOwners: "the reference count of the block is out of range",
        BlockShared: "the block has more owners than its header counts",
    }
}

faults! {
    /// Rules about the journal.
    JournalFault => Journal {
        TooLong: "it is too long",
        Hole: "it has a hole",
        Magic: "its superblock has no magic number",
        Type: "its superblock has an unknown type",
        TwoChecksums: "it has both checksum features, csum_v2 and csum_v3",
        SuperblockChecksum: "the checksum of its superblock does not match",
        BlockSize: "its block size differs from that of the file system",
        Bounds: "`s_first` or `s_maxlen` is out of range",
        Start: "`s_start` is outside the log",
        DescriptorChecksum: "the checksum of a descriptor block does not match",
        TargetOutside: "it holds a block outside the file system",
        TargetChecksum: "the checksum of a logged block does not match",
        RevokeChecksum: "the checksum of a revoke block does not match",
        RevokeLength: "a revoke block has an impossible length",
        ChangesBlockSize: "recovery changes the block size",
    }
}

faults! {
    /// Rules about a block.
    BlockFault => Block {
        Outside: "the number is beyond the end of the file system",
        TwoOwners: "it has two owners",
    }
}
