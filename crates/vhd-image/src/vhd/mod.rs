//! Fixed VHD: the raw disk followed by a 512-byte footer. Dynamic VHDs can be read ([`dynamic`]).
//!
//! ```text
//!   0 ──────────── disk, byte for byte ────────────┬─ footer (512, big-endian) ─┐
//!   size rules: disk a multiple of 512 bytes, at most 2040 GiB (the format's own limit)
//! ```
//!
//! Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 (2006). Invariants: `Footer::to_bytes` writes the
//! correct checksum; `Footer::parse` accepts the footers of all creators but checks every field that affects the size of
//! the disk or its kind. No I/O.

pub mod dynamic;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32, U64},
};

/// Size of the footer in bytes.
pub const FOOTER_SIZE: usize = 512;
/// Size of a sector; disk sizes are multiples of it.
pub const SECTOR: u64 = 512;
/// Largest disk: 2040 GiB.
pub const MAX_DISK_BYTES: u64 = 2040 << 30;
/// Seconds from 1970 to the VHD epoch, 2000-01-01 00:00 UTC.
pub const EPOCH: i64 = 946_684_800;

const COOKIE: [u8; 8] = *b"conectix";
/// A reserved bit that is always set.
const FEATURES: u32 = 2;
const VERSION: u32 = 0x0001_0000;
const NO_OFFSET: u64 = u64::MAX;
/// For this creator, QEMU and Hyper-V take the exact size from the footer instead of the geometry.
const CREATOR_APP: [u8; 4] = *b"win ";
const CREATOR_VERSION: u32 = 0x000A_0000;
const CREATOR_OS: [u8; 4] = *b"Wi2k";
const TYPE_FIXED: u32 = 2;

/// Why a footer is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum VhdError {
    /// Not 512 bytes, no cookie, a wrong checksum, or fields that contradict each other.
    #[error("corrupt vhd footer: {0}")]
    Corrupt(&'static str),
    /// A valid footer of a kind that this module does not read.
    #[error("unsupported vhd: {0}")]
    Unsupported(&'static str),
    /// A size that no fixed VHD can have.
    #[error("a vhd cannot have {0} bytes: sizes are multiples of 512 bytes from 512 bytes to 2040 GiB")]
    Size(u64),
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
    cookie: [u8; 8],
    features: U32,
    file_format_version: U32,
    data_offset: U64,
    time_stamp: U32,
    creator_application: [u8; 4],
    creator_version: U32,
    creator_host_os: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors_per_track: u8,
    disk_type: U32,
    checksum: U32,
    unique_id: [u8; 16],
    saved_state: u8,
    reserved: [u8; 427],
}
const _: () = assert!(size_of::<RawFooter>() == FOOTER_SIZE);

/// The fields of a footer that matter for a fixed disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Size of the disk before the footer, in bytes.
    pub disk_bytes: u64,
    /// Creation time in seconds since 2000 ([`EPOCH`]).
    pub timestamp: u32,
    /// Unique id of the disk.
    pub uuid: [u8; 16],
}

impl Footer {
    /// A footer for a disk of `disk_bytes`.
    ///
    /// # Errors
    /// [`VhdError::Size`] for 0, more than 2040 GiB, or a size that is not a multiple of 512.
    pub fn new(disk_bytes: u64, timestamp: u32, uuid: [u8; 16]) -> Result<Self, VhdError> {
        if disk_bytes == 0 || disk_bytes > MAX_DISK_BYTES || !disk_bytes.is_multiple_of(SECTOR) {
            return Err(VhdError::Size(disk_bytes));
        }
        Ok(Self { disk_bytes, timestamp, uuid })
    }

    /// The 512 bytes that follow the disk.
    pub fn to_bytes(&self) -> [u8; FOOTER_SIZE] {
        let (cylinders, heads, sectors_per_track) = geometry(self.disk_bytes / SECTOR);
        let mut raw = RawFooter {
            cookie: COOKIE,
            features: U32::new(FEATURES),
            file_format_version: U32::new(VERSION),
            data_offset: U64::new(NO_OFFSET),
            time_stamp: U32::new(self.timestamp),
            creator_application: CREATOR_APP,
            creator_version: U32::new(CREATOR_VERSION),
            creator_host_os: CREATOR_OS,
            original_size: U64::new(self.disk_bytes),
            current_size: U64::new(self.disk_bytes),
            cylinders: U16::new(cylinders),
            heads,
            sectors_per_track,
            disk_type: U32::new(TYPE_FIXED),
            checksum: U32::ZERO,
            unique_id: self.uuid,
            saved_state: 0,
            reserved: [0; 427],
        };
        raw.checksum = U32::new(checksum(raw.as_bytes()));
        zerocopy::transmute!(raw)
    }

    /// The footer as hcsshim's `tar2ext4` writes it: creator, geometry and time are zero. QEMU takes the size from it
    /// nevertheless.
    pub fn to_bytes_hcsshim(&self) -> [u8; FOOTER_SIZE] {
        let bytes = self.to_bytes();
        let Ok(mut raw) = RawFooter::read_from_bytes(&bytes) else { return bytes };
        raw.time_stamp = U32::ZERO;
        raw.creator_application = [0; 4];
        raw.creator_host_os = [0; 4];
        (raw.cylinders, raw.heads, raw.sectors_per_track) = (U16::ZERO, 0, 0);
        raw.checksum = U32::ZERO;
        raw.checksum = U32::new(checksum(raw.as_bytes()));
        zerocopy::transmute!(raw)
    }

    /// Parses the last 512 bytes of a fixed VHD, whoever created it.
    ///
    /// # Errors
    /// [`VhdError::Corrupt`] for a missing cookie, a wrong checksum or contradicting fields; [`VhdError::Unsupported`] for
    /// dynamic and differencing disks and other versions of the format; [`VhdError::Size`].
    pub fn parse(bytes: &[u8]) -> Result<Self, VhdError> {
        let raw = RawFooter::read_from_bytes(bytes).map_err(|_| VhdError::Corrupt("not 512 bytes"))?;
        if raw.cookie != COOKIE {
            return Err(VhdError::Corrupt("no cookie"));
        }
        let mut summed = raw;
        summed.checksum = U32::ZERO;
        if checksum(summed.as_bytes()) != raw.checksum.get() {
            return Err(VhdError::Corrupt("wrong checksum"));
        }
        if raw.file_format_version.get() >> 16 != VERSION >> 16 {
            return Err(VhdError::Unsupported("format version"));
        }
        if raw.disk_type.get() != TYPE_FIXED {
            return Err(VhdError::Unsupported("dynamic or differencing disk"));
        }
        if raw.data_offset.get() != NO_OFFSET {
            return Err(VhdError::Corrupt("a fixed disk with a data offset"));
        }
        Self::new(raw.current_size.get(), raw.time_stamp.get(), raw.unique_id)
    }
}

/// The id of a layer's disk: the UUID of its file system or, if that is zero, a UUID (version 8) made from the first bytes
/// of the SHA-256 digest of its tar.
pub fn layer_id(file_system: [u8; 16], tar_digest: &[u8; 32]) -> [u8; 16] {
    if file_system != [0; 16] {
        return file_system;
    }
    let mut id = [0; 16];
    id.copy_from_slice(&tar_digest[..16]);
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

/// Ones' complement of the sum of all bytes, computed with a checksum field of zero.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().map(|&b| u32::from(b)).sum::<u32>()
}

/// Cylinders, heads and sectors per track, as in the appendix of the specification.
fn geometry(sectors: u64) -> (u16, u8, u8) {
    const MAX_SECTORS: u64 = 65_535 * 16 * 255;
    let total = sectors.min(MAX_SECTORS);
    let (spt, heads, tracks) = if total >= 65_535 * 16 * 63 {
        (255, 16, total / 255)
    } else {
        let tracks = total / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if tracks < heads * 1024 && heads <= 16 {
            (17, heads, tracks)
        } else {
            let tracks = total / 31;
            if tracks < 16 * 1024 { (31, 16, tracks) } else { (63, 16, total / 63) }
        }
    };
    ((tracks / heads) as u16, heads as u8, spt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn footer_round_trip_and_known_bytes() {
        let footer = Footer::new(20 << 30, 77, *b"0123456789abcdef").unwrap();
        let bytes = footer.to_bytes();
        assert_eq!(&bytes[..8], b"conectix");
        assert_eq!(&bytes[28..32], b"win ");
        assert_eq!(u64::from_be_bytes(bytes[48..56].try_into().unwrap()), 20 << 30);
        assert_eq!(Footer::parse(&bytes).unwrap(), footer);
        for i in 0..FOOTER_SIZE {
            let mut broken = bytes;
            broken[i] ^= 1;
            assert!(Footer::parse(&broken).is_err(), "byte {i}");
        }
        assert_eq!(Footer::parse(&bytes[1..]), Err(VhdError::Corrupt("not 512 bytes")));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bad in [0, 511, 513, MAX_DISK_BYTES + 512, u64::MAX] {
            assert_eq!(Footer::new(bad, 0, [0; 16]), Err(VhdError::Size(bad)));
        }
        assert!(Footer::new(MAX_DISK_BYTES, 0, [0; 16]).is_ok());
    }

    #[test]
    fn dynamic_disks_are_unsupported() {
        let mut raw = Footer::new(512, 0, [0; 16]).unwrap().to_bytes();
        raw[60..64].copy_from_slice(&3u32.to_be_bytes());
        raw[64..68].fill(0);
        let sum = checksum(&raw);
        raw[64..68].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(Footer::parse(&raw), Err(VhdError::Unsupported("dynamic or differencing disk")));
    }

    #[test]
    #[cfg_attr(windows, ignore = "the oracle is qemu-img of Linux")]
    fn qemu_takes_the_exact_size() {
        let file = tempfile::Builder::new().suffix(".vhd").tempfile().unwrap();
        let disk = 12_345 * 512u64;
        file.as_file().set_len(disk).unwrap();
        let bytes = Footer::new(disk, 0, [7; 16]).unwrap().to_bytes();
        disk_io::WriteAt::write_all_at(file.as_file(), &bytes, disk).unwrap();
        let out = std::process::Command::new("qemu-img")
            .args(["info", "-f", "vpc", "--output=json"])
            .arg(file.path())
            .output()
            .expect("this test needs qemu-img");
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(json["virtual-size"], disk);
    }
}
