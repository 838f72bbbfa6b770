//! The super block: 512 bytes, little-endian, in a block of its own.
//!
//! ```text
//!   0 "verity\0\0" │ 8 version 1 │ 12 hash type 1 │ 16 uuid │ 32 "sha256" │ 64 data block │ 68 hash block
//!   72 data blocks │ 80 salt size │ 82 zeros │ 88 salt (256 bytes) │ 344 zeros
//! ```
//!
//! Source: cryptsetup, `lib/verity/verity.c`. Everything but the UUID is checked when it is read.

use super::{BLOCK, SALT, VerityError, hash_offset};
use disk_io::ReadAt;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

const SIGNATURE: [u8; 8] = *b"verity\0\0";
const VERSION: u32 = 1;
/// The salt is hashed before the block.
const HASH_TYPE: u32 = 1;
const ALGORITHM: &[u8] = b"sha256";
const MAX_SALT: usize = 256;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    signature: [u8; 8],
    version: U32,
    hash_type: U32,
    uuid: [u8; 16],
    algorithm: [u8; 32],
    data_block_size: U32,
    hash_block_size: U32,
    data_blocks: U64,
    salt_size: U16,
    reserved1: [u8; 6],
    salt: [u8; MAX_SALT],
    reserved2: [u8; 168],
}
/// Used bytes of the super block.
pub(super) const SUPERBLOCK_BYTES: u64 = 512;
const _: () = assert!(size_of::<Raw>() as u64 == SUPERBLOCK_BYTES);

/// A parsed super block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuperBlock {
    /// Its offset on the disk, in bytes; also the end of the data blocks.
    pub offset: u64,
    /// Its UUID; no hash covers it.
    pub uuid: [u8; 16],
    /// Number of data blocks of [`BLOCK`] bytes.
    pub data_blocks: u64,
    /// The salt, at most 256 bytes.
    pub salt: Vec<u8>,
}

impl SuperBlock {
    /// The super block of a new tree.
    pub(super) fn new(data_blocks: u64, uuid: [u8; 16]) -> Self {
        Self { offset: data_blocks * BLOCK as u64, uuid, data_blocks, salt: vec![0; SALT] }
    }

    /// The block that holds it.
    pub(super) fn to_block(&self) -> [u8; BLOCK] {
        let mut raw = Raw::new_zeroed();
        raw.signature = SIGNATURE;
        raw.version.set(VERSION);
        raw.hash_type.set(HASH_TYPE);
        raw.uuid = self.uuid;
        raw.algorithm[..ALGORITHM.len()].copy_from_slice(ALGORITHM);
        raw.data_block_size.set(BLOCK as u32);
        raw.hash_block_size.set(BLOCK as u32);
        raw.data_blocks.set(self.data_blocks);
        raw.salt_size.set(self.salt.len() as u16);
        raw.salt[..self.salt.len()].copy_from_slice(&self.salt);
        let mut block = [0; BLOCK];
        block[..size_of::<Raw>()].copy_from_slice(raw.as_bytes());
        block
    }

    /// Reads the super block at `offset`.
    ///
    /// # Errors
    /// [`VerityError::Corrupt`] if there is none or its data does not end at `offset`; [`VerityError::Unsupported`] for
    /// other hashes and block sizes; [`VerityError::Io`] if the disk fails.
    pub fn read<D: ReadAt + ?Sized>(disk: &D, offset: u64) -> Result<Self, VerityError> {
        let mut raw = Raw::new_zeroed();
        disk.read_exact_at(raw.as_mut_bytes(), offset)
            .map_err(VerityError::io("reading the hash tree's super block", offset))?;
        let corrupt = |reason: String| VerityError::Corrupt { offset, reason };
        if raw.signature != SIGNATURE {
            return Err(corrupt("no super block".into()));
        }
        let name = raw.algorithm.split(|b| *b == 0).next().unwrap_or_default();
        let (data, hash) = (raw.data_block_size.get(), raw.hash_block_size.get());
        if raw.version.get() != VERSION || raw.hash_type.get() != HASH_TYPE || name != ALGORITHM {
            return Err(VerityError::Unsupported(format!(
                "version {}, hash type {}, algorithm '{}' (supported: 1, 1, sha256)",
                raw.version,
                raw.hash_type,
                name.escape_ascii()
            )));
        }
        if data as usize != BLOCK || hash as usize != BLOCK {
            return Err(VerityError::Unsupported(format!(
                "blocks of {data} and {hash} bytes (supported: 4096)"
            )));
        }
        let salt = raw.salt.get(..usize::from(raw.salt_size.get()));
        let salt = salt.ok_or_else(|| corrupt(format!("a salt of {} bytes", raw.salt_size)))?.to_vec();
        let data_blocks = raw.data_blocks.get();
        if data_blocks == 0 || data_blocks.checked_mul(BLOCK as u64) != Some(offset) {
            return Err(corrupt(format!("{data_blocks} data blocks do not end at the super block")));
        }
        Ok(Self { offset, uuid: raw.uuid, data_blocks, salt })
    }
}

/// The super block of the tree after a file system of `fs_bytes` on `disk` (a VHD without its footer); `None` if there is
/// none.
///
/// # Errors
/// As [`SuperBlock::read`], if there is a signature.
pub fn find<D: ReadAt + ?Sized>(disk: &D, fs_bytes: u64) -> Result<Option<SuperBlock>, VerityError> {
    let offset = hash_offset(fs_bytes);
    let size = disk.size().map_err(VerityError::io("measuring the disk", offset))?;
    if size.saturating_sub(offset) < BLOCK as u64 {
        return Ok(None);
    }
    let mut signature = [0; SIGNATURE.len()];
    disk.read_exact_at(&mut signature, offset)
        .map_err(VerityError::io("reading the hash tree's super block", offset))?;
    if signature == SIGNATURE { SuperBlock::read(disk, offset).map(Some) } else { Ok(None) }
}
