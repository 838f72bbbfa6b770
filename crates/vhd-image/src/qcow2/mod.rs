//! QEMU's qcow2: writes version 3, an image of a disk whose zeros take no space, and reads versions 2 and 3 ([`Qcow2`]).
//!
//! ```text
//!   cluster  0       1 …      then, in the order of the disk                       at the end
//!            │ header │ L1 table │ L2 │ data │ data │ … │ L2 │ data │ …     │ refcount blocks │ refcount table │
//! ```
//!
//! Clusters of 64 KiB; no backing file, no snapshots, no compression, no encryption. Every cluster is used once, so all
//! reference counts are 1. Clusters of zeros are absent. Specification: docs/interop/qcow2.rst of QEMU; all numbers are
//! big-endian.
//!
//! Invariants: one pass over the source in ascending order; equal disks give equal bytes; the header is written last, so a
//! file whose creation was interrupted is no qcow2. Memory: two clusters, and 8 bytes for each 512 MiB of the disk.

mod reader;

pub use reader::{MAX_L1_BYTES, Qcow2, is_qcow2};

use crate::zeros::{nonzero_runs, read_padded, touched};
use disk_io::{ReadAt, WriteAt};
use std::{io, ops::Range};

/// `QFI` and 0xFB.
const MAGIC: u32 = 0x5146_49FB;
const VERSION: u32 = 3;
/// `cluster_bits`.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of an L2 table, and of a cluster of the other tables.
const ENTRIES: u64 = CLUSTER / 8;
/// `refcount_order`: 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Reference counts in a block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// `header_length`.
const HEADER_LENGTH: u32 = 104;
/// `QCOW_OFLAG_COPIED`: the reference count is exactly 1.
const COPIED: u64 = 1 << 63;
/// The unit of a disk's size; bytes.
const SECTOR: u64 = 512;
/// Largest disk: 64 TiB, so that the L1 table stays small.
pub const MAX_DISK: u64 = 64 << 40;

/// Why no image could be written, or one is not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2Error {
    /// The disk has a size that no image can have.
    #[error("a qcow2 of {bytes} bytes: the size must be a multiple of 512 up to 64 TiB")]
    Size {
        /// The size that was asked for; bytes.
        bytes: u64,
    },
    /// The image contradicts itself or the format.
    #[error("corrupt qcow2: {what} (byte {offset} of the file)")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// Where in the file, in bytes.
        offset: u64,
    },
    /// Valid, but of a kind or size that is not read.
    #[error("unsupported qcow2: {0}")]
    Unsupported(&'static str),
    /// Reading the disk, or reading or writing the image failed.
    #[error("cannot {what} the qcow2 image")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Qcow2Error {
    move |source| Qcow2Error::Io { what, source }
}

/// Numbers in their form in the file.
fn table(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

/// Writes an image of a disk of `disk_bytes` into `out`, replacing its content: the bytes of `source`, which is read at the
/// ranges `data` (ascending, not overlapping), and zeros elsewhere.
///
/// Returns the length of the file in bytes. Nothing is synced.
///
/// # Errors
/// [`Qcow2Error::Size`]; [`Qcow2Error::Io`].
pub fn create_from<W: WriteAt, R: ReadAt + ?Sized>(
    out: W,
    disk_bytes: u64,
    source: &R,
    data: &[Range<u64>],
) -> Result<u64, Qcow2Error> {
    if disk_bytes > MAX_DISK || !disk_bytes.is_multiple_of(SECTOR) {
        return Err(Qcow2Error::Size { bytes: disk_bytes });
    }
    let write =
        |bytes: &[u8], cluster: u64| out.write_all_at(bytes, cluster * CLUSTER).map_err(failed("write"));
    out.set_len(0).map_err(failed("empty"))?;
    let mut l1 = vec![0u64; disk_bytes.div_ceil(CLUSTER * ENTRIES) as usize];
    let l1_at = 1;
    // The next cluster of the file.
    let mut next = l1_at + (l1.len() as u64).div_ceil(ENTRIES).max(1);
    // The L2 table in use: its number, its cluster, its entries.
    let mut l2: Option<(u64, u64, Vec<u64>)> = None;
    let mut buffer = vec![0; CLUSTER as usize];
    for cluster in touched(data, CLUSTER, disk_bytes) {
        let at = cluster * CLUSTER;
        let len = (disk_bytes - at).min(CLUSTER) as usize;
        buffer[len..].fill(0);
        read_padded(source, &mut buffer[..len], at).map_err(failed("read the disk for"))?;
        let runs = nonzero_runs(&buffer);
        if runs.is_empty() {
            continue;
        }
        let number = cluster / ENTRIES;
        if l2.as_ref().is_none_or(|(known, ..)| *known != number) {
            if let Some((_, place, entries)) = l2.take() {
                write(&table(&entries), place)?;
            }
            l1[number as usize] = (next * CLUSTER) | COPIED;
            l2 = Some((number, next, vec![0; ENTRIES as usize]));
            next += 1;
        }
        for run in runs {
            let offset = next * CLUSTER + run.start as u64;
            out.write_all_at(&buffer[run], offset).map_err(failed("write"))?;
        }
        if let Some((_, _, entries)) = &mut l2 {
            entries[(cluster % ENTRIES) as usize] = (next * CLUSTER) | COPIED;
        }
        next += 1;
    }
    if let Some((_, place, entries)) = l2 {
        write(&table(&entries), place)?;
    }
    write(&table(&l1), l1_at)?;
    let (blocks, tables) = refcount_clusters(next);
    let (blocks_at, table_at) = (next, next + blocks);
    let end = next + blocks + tables;
    for block in 0..blocks {
        let used = (end - block * REFCOUNTS).min(REFCOUNTS);
        write(&1u16.to_be_bytes().repeat(used as usize), blocks_at + block)?;
    }
    let places: Vec<u64> = (blocks_at..table_at).map(|cluster| cluster * CLUSTER).collect();
    write(&table(&places), table_at)?;
    out.set_len(end * CLUSTER).map_err(failed("set the size of"))?;
    let mut header = Vec::with_capacity(HEADER_LENGTH as usize);
    let mut put = |bytes: &[u8]| header.extend_from_slice(bytes);
    put(&MAGIC.to_be_bytes());
    put(&VERSION.to_be_bytes());
    // backing_file_offset, backing_file_size
    put(&[0; 12]);
    put(&CLUSTER_BITS.to_be_bytes());
    put(&disk_bytes.to_be_bytes());
    // crypt_method
    put(&[0; 4]);
    put(&(l1.len() as u32).to_be_bytes());
    put(&(l1_at * CLUSTER).to_be_bytes());
    put(&(table_at * CLUSTER).to_be_bytes());
    put(&(tables as u32).to_be_bytes());
    // nb_snapshots, snapshots_offset, incompatible_features, compatible_features, autoclear_features
    put(&[0; 36]);
    put(&REFCOUNT_ORDER.to_be_bytes());
    put(&HEADER_LENGTH.to_be_bytes());
    debug_assert_eq!(header.len(), HEADER_LENGTH as usize);
    // The end of the header extensions follows: zeros.
    write(&header, 0)?;
    Ok(end * CLUSTER)
}

/// Clusters of reference counts, and of the table of them, behind `used` clusters: they are counted too.
fn refcount_clusters(used: u64) -> (u64, u64) {
    let (mut blocks, mut tables) = (1, 1);
    loop {
        let total = used + blocks + tables;
        let needed = (total.div_ceil(REFCOUNTS), total.div_ceil(REFCOUNTS).div_ceil(ENTRIES));
        if needed == (blocks, tables) {
            return needed;
        }
        (blocks, tables) = (blocks.max(needed.0), tables.max(needed.1));
        if needed.0 < blocks || needed.1 < tables {
            return (blocks, tables);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk_io::MemDisk;
    use std::process::Command;

    /// A disk of a number of bytes that differ from place to place, with zeros between.
    fn disk(bytes: u64, at: &[u64]) -> MemDisk {
        let disk = MemDisk::new();
        disk.set_len(bytes).unwrap();
        for (n, offset) in at.iter().enumerate() {
            let data: Vec<u8> = (0..9000u32).map(|i| (i.wrapping_mul(7) >> 3) as u8 ^ n as u8).collect();
            let len = (bytes - offset).min(data.len() as u64) as usize;
            disk.write_all_at(&data[..len], *offset).unwrap();
        }
        disk
    }

    #[test]
    fn the_clusters_of_reference_counts_count_themselves() {
        for used in
            [2, REFCOUNTS - 3, REFCOUNTS - 2, REFCOUNTS - 1, REFCOUNTS, 3 * REFCOUNTS - 4, 3 * REFCOUNTS]
        {
            let (blocks, tables) = refcount_clusters(used);
            assert!((used + blocks + tables) <= blocks * REFCOUNTS, "{used}");
            assert!(blocks <= tables * ENTRIES);
        }
    }

    #[test]
    fn a_size_that_no_disk_has_is_refused() {
        let error = create_from(MemDisk::new(), 1000, &MemDisk::new(), &[]).unwrap_err();
        assert!(matches!(error, Qcow2Error::Size { bytes: 1000 }), "{error}");
    }

    #[test]
    fn zeros_take_no_space_however_they_are_stored() {
        let source = disk(8 << 20, &[0, 3 << 20]);
        let (sparse, full) = (MemDisk::new(), MemDisk::new());
        let few = [0..9000, (3 << 20)..(3 << 20) + 9000];
        let a = create_from(&sparse, 8 << 20, &source, &few).unwrap();
        #[expect(clippy::single_range_in_vec_init, reason = "one range of data")]
        let b = create_from(&full, 8 << 20, &source, &[0..8 << 20]).unwrap();
        assert_eq!(a, b);
        assert!(sparse.to_vec() == full.to_vec());
        // Header, L1, L2, two of data, counts, their table.
        assert_eq!(a, 7 * CLUSTER);
    }

    /// qemu-img is the judge: its check finds nothing, and the disk is the one that went in.
    // qemu-img is a program of Linux.
    #[cfg(target_os = "linux")]
    #[test]
    fn qemu_reads_back_what_went_in() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, image) = (dir.path().join("raw"), dir.path().join("qcow2"));
        let far = 3 * (CLUSTER * ENTRIES) + 12_345;
        for (bytes, at) in [
            (8 << 20, vec![0, 65_000, 3 << 20, (8 << 20) - 700]),
            (CLUSTER * ENTRIES * 3 + (1 << 20), vec![512, CLUSTER * ENTRIES - 100, far]),
            (1536, vec![0]),
            (1 << 20, vec![]),
        ] {
            let source = std::fs::File::create(&raw).unwrap();
            source.set_len(bytes).unwrap();
            for (n, offset) in at.iter().enumerate() {
                let data = vec![n as u8 + 1; (bytes - offset).min(9000) as usize];
                WriteAt::write_all_at(&source, &data, *offset).unwrap();
            }
            let ranges: Vec<Range<u64>> =
                at.iter().map(|offset| *offset..(offset + 9000).min(bytes)).collect();
            let out = std::fs::File::create(&image).unwrap();
            let source = std::fs::File::open(&raw).unwrap();
            create_from(&out, bytes, &source, &ranges).unwrap();
            let run = |args: &[&str]| {
                let done = Command::new("qemu-img").args(args).output().expect("this test needs qemu-img");
                let said = String::from_utf8_lossy(&done.stdout).into_owned();
                assert!(done.status.success(), "{args:?}: {said}{}", String::from_utf8_lossy(&done.stderr));
            };
            run(&["check", "-f", "qcow2", &image.to_string_lossy()]);
            run(&["compare", "-f", "raw", "-F", "qcow2", &raw.to_string_lossy(), &image.to_string_lossy()]);
        }
    }
}
