//! The 512-byte header block, as in POSIX.1-2017 pax ("ustar Interchange Format") and GNU tar's `tar.h`.
//!
//! ```text
//!   0 name[100]  100 mode[8]  108 uid[8]  116 gid[8]  124 size[12]  136 mtime[12]  148 chksum[8]  156 typeflag
//! 157 linkname[100]  257 magic[6]  263 version[2]  265 uname[32]  297 gname[32]  329 devmajor[8]  337 devminor[8]
//! 345 prefix[155] (ustar)                                                                        500 pad[12]
//! 345 atime[12] ctime[12] offset[12] longnames[4] unused[1] sparse[4×24] isextended[1] realsize[12] pad[17] (GNU)
//! ```
//!
//! Invariant: these structs consist of bytes only, so any 512 bytes are a valid value; the reader checks the meaning.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The unit of tar, in bytes: a header is one block, data is padded to whole blocks.
pub const BLOCK: usize = 512;

/// `magic` and `version` of POSIX archives.
pub(crate) const MAGIC_USTAR: &[u8; 8] = b"ustar\x0000";
/// `magic` and `version` of GNU archives.
pub(crate) const MAGIC_GNU: &[u8; 8] = b"ustar  \0";
/// The end of a star header's `pad`.
pub(crate) const TRAILER_STAR: &[u8; 4] = b"tar\0";

/// Values of `typeflag`.
pub(crate) mod typeflag {
    /// Regular file, v7.
    pub(crate) const REGULAR_V7: u8 = 0;
    /// Regular file.
    pub(crate) const REGULAR: u8 = b'0';
    /// Hard link.
    pub(crate) const LINK: u8 = b'1';
    /// Symbolic link.
    pub(crate) const SYMLINK: u8 = b'2';
    /// Character device.
    pub(crate) const CHAR: u8 = b'3';
    /// Block device.
    pub(crate) const BLOCK: u8 = b'4';
    /// Directory.
    pub(crate) const DIRECTORY: u8 = b'5';
    /// Named pipe.
    pub(crate) const FIFO: u8 = b'6';
    /// "Contiguous" file: a regular file everywhere.
    pub(crate) const CONTIGUOUS: u8 = b'7';
    /// PAX header for the next entry.
    pub(crate) const PAX: u8 = b'x';
    /// PAX header for all later entries according to POSIX; the engines' readers ignore it.
    pub(crate) const PAX_GLOBAL: u8 = b'g';
    /// GNU long name of the next entry.
    pub(crate) const GNU_LONGNAME: u8 = b'L';
    /// GNU long link target of the next entry.
    pub(crate) const GNU_LONGLINK: u8 = b'K';
    /// GNU sparse file.
    pub(crate) const GNU_SPARSE: u8 = b'S';
    /// GNU directory with a list of names as its data (incremental dumps).
    pub(crate) const GNU_DUMPDIR: u8 = b'D';
    /// GNU volume label.
    pub(crate) const GNU_VOLUME: u8 = b'V';
    /// GNU: the rest of a file that began on another volume.
    pub(crate) const GNU_MULTIVOLUME: u8 = b'M';
}

/// The header block.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) name: [u8; 100],
    pub(crate) mode: [u8; 8],
    pub(crate) uid: [u8; 8],
    pub(crate) gid: [u8; 8],
    pub(crate) size: [u8; 12],
    pub(crate) mtime: [u8; 12],
    pub(crate) chksum: [u8; 8],
    pub(crate) typeflag: u8,
    pub(crate) linkname: [u8; 100],
    /// `magic[6]` and `version[2]`: only together they identify the dialect.
    pub(crate) magic: [u8; 8],
    pub(crate) uname: [u8; 32],
    pub(crate) gname: [u8; 32],
    pub(crate) devmajor: [u8; 8],
    pub(crate) devminor: [u8; 8],
    /// From byte 345: `prefix` and `pad`, or the GNU fields.
    pub(crate) tail: [u8; 167],
}

/// One segment of a sparse file in a GNU header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawSparse {
    pub(crate) offset: [u8; 12],
    pub(crate) numbytes: [u8; 12],
}

/// The fields of a GNU header from byte 345.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawGnuTail {
    pub(crate) atime: [u8; 12],
    pub(crate) ctime: [u8; 12],
    pub(crate) offset: [u8; 12],
    pub(crate) longnames: [u8; 4],
    pub(crate) unused: u8,
    pub(crate) sp: [RawSparse; 4],
    pub(crate) isextended: u8,
    pub(crate) realsize: [u8; 12],
    pub(crate) pad: [u8; 17],
}

/// A block that continues the sparse map of a GNU header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawSparseExtension {
    pub(crate) sp: [RawSparse; 21],
    pub(crate) isextended: u8,
    pub(crate) pad: [u8; 7],
}

const _: () = assert!(size_of::<RawHeader>() == BLOCK);
const _: () = assert!(size_of::<RawGnuTail>() == 167);
const _: () = assert!(size_of::<RawSparseExtension>() == BLOCK);

/// The dialect of a header block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// No magic.
    V7,
    /// POSIX `ustar`.
    Ustar,
    /// star's variant of ustar: a shorter prefix, then atime and ctime.
    Star,
    /// GNU.
    Gnu,
}

/// Length of the prefix in `tail` of a POSIX header, in bytes.
pub(crate) const USTAR_PREFIX: usize = 155;
/// Length of the prefix in `tail` of a star header, in bytes; `atime[12]` and `ctime[12]` follow.
pub(crate) const STAR_PREFIX: usize = 131;

impl RawHeader {
    /// The dialect, from `magic`.
    pub(crate) fn dialect(&self) -> Dialect {
        if &self.magic == MAGIC_GNU {
            Dialect::Gnu
        } else if self.magic.starts_with(b"ustar\0") {
            if self.tail.ends_with(TRAILER_STAR) { Dialect::Star } else { Dialect::Ustar }
        } else {
            Dialect::V7
        }
    }

    /// Whether `chksum` is the sum of the block's bytes: unsigned as in POSIX, or signed as in old tars.
    pub(crate) fn checksum_holds(&self) -> bool {
        let Some(want) = super::number::octal(&self.chksum) else { return false };
        let spaces = 8 * i64::from(b' ');
        let unsigned = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
        let bytes = self.as_bytes();
        if i64::from(unsigned(bytes) - unsigned(&self.chksum)) + spaces == want {
            return true;
        }
        let signed = |bytes: &[u8]| bytes.iter().map(|&b| i32::from(b.cast_signed())).sum::<i32>();
        i64::from(signed(bytes) - signed(&self.chksum)) + spaces == want
    }
}

/// The bytes of a field up to its first NUL.
pub(crate) fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    &field[..end]
}
