//! Reads a qcow2 of version 2 or 3: the disk behind [`ReadAt`].
//!
//! ```text
//!   read(offset) ─► cluster ─► L1 ─ none? zeros : L2 ─ none, zero flag? zeros ─ plain? the file ─ compressed? inflated
//! ```
//!
//! Refused, because what the disk holds is elsewhere or needs a key: backing files, external data files, encryption. Refused,
//! because this module does not know them: extended L2 entries, compression other than deflate, features without a name here.
//! Internal snapshots are ignored, and so are reference counts: a reader does not need them, and an image that was not closed
//! properly (dirty) has its mapping in order.
//!
//! Invariants: a table or cluster lies in the file, aligned, or reading it is an error; memory is bounded by [`MAX_L1_BYTES`],
//! [`CACHED_BYTES`] of L2 tables and one cluster. Source: docs/interop/qcow2.rst of QEMU.

use super::{COPIED, MAGIC, MAX_DISK, Qcow2Error, failed};
use disk_io::ReadAt;
use flate2::{Decompress, FlushDecompress};
use parking_lot::Mutex;
use std::{collections::HashMap, io, sync::Arc};

/// Largest L1 table that is read, in bytes; QEMU's limit, too.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Bytes of L2 tables that are kept.
const CACHED_BYTES: u64 = 8 << 20;
/// `cluster_bits` that the format allows.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Length of the header of version 2; that of version 3 up to `header_length` itself.
const HEADER_2: usize = 72;
const HEADER_3: usize = 104;
/// Bits 9 to 55 of an entry: where a table or a cluster is.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// From version 3 on: the cluster reads as zeros, whatever is there.
const ZERO: u64 = 1;
/// Unit of the length of compressed data.
const SECTOR: u64 = 512;
/// `incompatible_features`: reference counts may be wrong.
const DIRTY: u64 = 1;
/// `incompatible_features` that are refused, and what they are.
const REFUSED: &[(u64, &str)] = &[
    (1 << 1, "it is marked as corrupt; `qemu-img check -r all` repairs it"),
    (1 << 2, "its data are in an external data file; `qemu-img convert -O qcow2` makes one file of both"),
    (1 << 3, "its clusters are not compressed with deflate; `qemu-img convert -O qcow2` expands them"),
    (1 << 4, "extended L2 entries; `qemu-img convert -O qcow2` makes an image without them"),
];

/// Whether a file begins as a qcow2 does; version 1 is another format.
pub fn is_qcow2(head: &[u8]) -> bool {
    head.starts_with(&MAGIC.to_be_bytes()) && !head.starts_with(b"QFI\xfb\0\0\0\x01")
}

/// A qcow2 opened for reading.
#[derive(Debug)]
pub struct Qcow2<R> {
    file: R,
    file_bytes: u64,
    disk_bytes: u64,
    cluster_bits: u32,
    /// Version 3 has [`ZERO`].
    zero_flag: bool,
    l1: Vec<u64>,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    /// L2 tables, by their places in the file.
    tables: HashMap<u64, Arc<[u64]>>,
    /// The entry of the last compressed cluster that was read, and its bytes.
    expanded: Option<(u64, Arc<[u8]>)>,
}

/// Where a cluster is.
enum Place {
    Zeros,
    Plain(u64),
    Compressed(u64),
}

fn corrupt(what: &'static str, offset: u64) -> Qcow2Error {
    Qcow2Error::Corrupt { what, offset }
}

/// A big-endian number of the header.
fn number<const N: usize>(header: &[u8], at: usize) -> u64 {
    let bytes = header.get(at..at + N).unwrap_or_default();
    bytes.iter().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

fn read<R: ReadAt>(file: &R, buf: &mut [u8], offset: u64) -> Result<(), Qcow2Error> {
    file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => corrupt("the file ends too early", offset),
        _ => failed("read")(e),
    })
}

fn numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect()
}

impl<R: ReadAt> Qcow2<R> {
    /// Opens an image.
    ///
    /// # Errors
    /// [`Qcow2Error::Corrupt`] for an image that contradicts the format; [`Qcow2Error::Unsupported`] names the feature;
    /// [`Qcow2Error::Io`].
    pub fn open(file: R) -> Result<Self, Qcow2Error> {
        let file_bytes = file.size().map_err(failed("read"))?;
        let mut header = [0; HEADER_3];
        read(&file, &mut header[..HEADER_2], 0)?;
        if number::<4>(&header, 0) != u64::from(MAGIC) {
            return Err(corrupt("no magic number", 0));
        }
        let version = number::<4>(&header, 4);
        if !matches!(version, 2 | 3) {
            return Err(Qcow2Error::Unsupported("a version other than 2 and 3"));
        }
        if version == 3 {
            read(&file, &mut header, 0)?;
            let features = number::<8>(&header, 72);
            for (bit, what) in REFUSED {
                if features & bit != 0 {
                    return Err(Qcow2Error::Unsupported(what));
                }
            }
            if features & !DIRTY != 0 {
                return Err(Qcow2Error::Unsupported("a feature that is not known here"));
            }
        }
        if number::<8>(&header, 8) != 0 {
            let what = "it has a backing file; `qemu-img convert -O qcow2` makes one file of both";
            return Err(Qcow2Error::Unsupported(what));
        }
        if number::<4>(&header, 32) != 0 {
            return Err(Qcow2Error::Unsupported("it is encrypted; `qemu-img convert` decrypts it"));
        }
        let cluster_bits = number::<4>(&header, 20) as u32;
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(corrupt("a size of clusters that no image has", 20));
        }
        let disk_bytes = number::<8>(&header, 24);
        if disk_bytes > MAX_DISK {
            return Err(Qcow2Error::Unsupported("a disk of more than 64 TiB"));
        }
        let entries = disk_bytes.div_ceil(1 << (2 * cluster_bits - 3));
        if entries * 8 > MAX_L1_BYTES {
            return Err(Qcow2Error::Unsupported("an L1 table of more than 32 MiB"));
        }
        if number::<4>(&header, 36) < entries {
            return Err(corrupt("an L1 table that is too short for the disk", 36));
        }
        let at = number::<8>(&header, 40);
        if !at.is_multiple_of(1 << cluster_bits) || at == 0 && entries > 0 {
            return Err(corrupt("an L1 table at a place where none can be", 40));
        }
        // Not more than the file has.
        if at.checked_add(entries * 8).is_none_or(|end| end > file_bytes) {
            return Err(corrupt("an L1 table beyond the end of the file", 40));
        }
        let mut l1 = vec![0; (entries * 8) as usize];
        read(&file, &mut l1, at)?;
        Ok(Self {
            file,
            file_bytes,
            disk_bytes,
            cluster_bits,
            zero_flag: version == 3,
            l1: numbers(&l1),
            cache: Mutex::default(),
        })
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The place that an entry names, which is a cluster of the file; `flags` are the other bits that it may have.
    fn aligned(&self, entry: u64, flags: u64, what: &'static str) -> Result<u64, Qcow2Error> {
        let at = entry & OFFSET;
        if entry & !(OFFSET | flags) != 0 || !at.is_multiple_of(self.cluster_bytes()) || at >= self.file_bytes
        {
            return Err(corrupt(what, at));
        }
        Ok(at)
    }

    /// The L2 table at a place.
    fn table(&self, at: u64) -> Result<Arc<[u64]>, Qcow2Error> {
        if let Some(known) = self.cache.lock().tables.get(&at) {
            return Ok(Arc::clone(known));
        }
        let mut bytes = vec![0; self.cluster_bytes() as usize];
        read(&self.file, &mut bytes, at)?;
        let table: Arc<[u64]> = numbers(&bytes).into();
        let mut cache = self.cache.lock();
        if cache.tables.len() as u64 * self.cluster_bytes() >= CACHED_BYTES {
            cache.tables.clear();
        }
        cache.tables.insert(at, Arc::clone(&table));
        Ok(table)
    }

    fn place(&self, cluster: u64) -> Result<Place, Qcow2Error> {
        let bits = self.cluster_bits - 3;
        let l1 = self.l1.get((cluster >> bits) as usize).copied().unwrap_or(0);
        if l1 & OFFSET == 0 {
            return Ok(Place::Zeros);
        }
        let table = self.table(self.aligned(l1, COPIED, "an L1 entry that names no L2 table")?)?;
        let entry = table.get((cluster & ((1 << bits) - 1)) as usize).copied().unwrap_or(0);
        if entry & COMPRESSED != 0 {
            return Ok(Place::Compressed(entry));
        }
        if entry & OFFSET == 0 || self.zero_flag && entry & ZERO != 0 {
            return Ok(Place::Zeros);
        }
        self.aligned(entry, COPIED, "an L2 entry that names no cluster").map(Place::Plain)
    }

    /// The bytes of a compressed cluster.
    fn expanded(&self, entry: u64) -> Result<Arc<[u8]>, Qcow2Error> {
        if let Some((known, bytes)) = &self.cache.lock().expanded
            && *known == entry
        {
            return Ok(Arc::clone(bytes));
        }
        // The upper bits count the sectors that the data touch besides the first.
        let split = 62 - (self.cluster_bits - 8);
        let at = entry & ((1 << split) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> split;
        let end = ((at / SECTOR + 1 + sectors) * SECTOR).min(self.file_bytes);
        let len = end.checked_sub(at).filter(|len| *len > 0);
        let len = len.ok_or_else(|| corrupt("compressed data beyond the end of the file", at))?;
        let mut packed = vec![0; len as usize];
        read(&self.file, &mut packed, at)?;
        let mut bytes = vec![0; self.cluster_bytes() as usize];
        let mut inflate = Decompress::new(false);
        let done = inflate.decompress(&packed, &mut bytes, FlushDecompress::Finish);
        if done.is_err() || inflate.total_out() != self.cluster_bytes() {
            return Err(corrupt("compressed data that do not expand to a cluster", at));
        }
        let bytes: Arc<[u8]> = bytes.into();
        self.cache.lock().expanded = Some((entry, Arc::clone(&bytes)));
        Ok(bytes)
    }
}

impl<R: ReadAt> ReadAt for Qcow2<R> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = self.disk_bytes.saturating_sub(offset);
        let within = offset & (self.cluster_bytes() - 1);
        let most = rest.min(self.cluster_bytes() - within);
        let len = usize::try_from(most).map_or(buf.len(), |most| most.min(buf.len()));
        let Some(buf) = buf.get_mut(..len).filter(|buf| !buf.is_empty()) else { return Ok(0) };
        let bad = |e: Qcow2Error| match e {
            Qcow2Error::Io { source, .. } => source,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        };
        match self.place(offset >> self.cluster_bits).map_err(bad)? {
            Place::Zeros => buf.fill(0),
            Place::Plain(at) => read(&self.file, buf, at + within).map_err(bad)?,
            Place::Compressed(entry) => {
                let bytes = self.expanded(entry).map_err(bad)?;
                buf.copy_from_slice(&bytes[within as usize..within as usize + len]);
            }
        }
        Ok(len)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.disk_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::create_from, *};
    use disk_io::{MemDisk, WriteAt};
    use proptest::prelude::*;
    use std::sync::LazyLock;

    const DISK: u64 = 9 << 20;

    /// A disk with some data, and its image.
    fn sample() -> (MemDisk, MemDisk) {
        let disk = MemDisk::new();
        disk.set_len(DISK).unwrap();
        for at in [0, 70_000, 5 << 20, DISK - 3000] {
            disk.write_all_at(&[(at >> 8) as u8 | 1; 3000], at).unwrap();
        }
        let image = MemDisk::new();
        create_from(&image, DISK, &disk, std::slice::from_ref(&(0..DISK))).unwrap();
        (disk, image)
    }

    fn whole(disk: &impl ReadAt) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; disk.size()? as usize];
        disk.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    #[test]
    fn what_is_written_is_read() {
        let (disk, image) = sample();
        let opened = Qcow2::open(&image).unwrap();
        assert!(whole(&opened).unwrap() == disk.to_vec());
        let mut end = [7; 100];
        assert_eq!(opened.read_at(&mut end, DISK - 40).unwrap(), 40);
        assert_eq!(opened.read_at(&mut end, DISK).unwrap(), 0);
        assert_eq!(opened.read_at(&mut end, u64::MAX).unwrap(), 0);
        assert!(is_qcow2(&image.to_vec()) && !is_qcow2(b"QFI\xfb\0\0\0\x01"));
    }

    #[test]
    fn what_is_not_in_the_file_is_refused_by_name() {
        let (_, image) = sample();
        let with = |at: usize, bytes: &[u8]| {
            let image = MemDisk::from(image.to_vec());
            image.write_all_at(bytes, at as u64).unwrap();
            Qcow2::open(image).unwrap_err().to_string()
        };
        for (at, bytes, word) in [
            (8, &[0, 0, 0, 0, 0, 0, 2, 0][..], "backing file"),
            (32, &[0, 0, 0, 2], "encrypted"),
            (79, &[1 << 1], "corrupt"),
            (79, &[1 << 2], "external data file"),
            (79, &[1 << 3], "deflate"),
            (79, &[1 << 4], "extended L2"),
            (72, &[1], "not known"),
            (4, &[0, 0, 0, 4], "version"),
            (24, &[1], "64 TiB"),
        ] {
            let error = with(at, bytes);
            assert!(error.starts_with("unsupported qcow2") && error.contains(word), "{error}");
        }
        for (at, bytes) in [(0, &[0][..]), (20, &[0, 0, 0, 22]), (36, &[0; 4]), (40, &[1]), (47, &[1])] {
            assert!(with(at, bytes).starts_with("corrupt qcow2"), "{at}");
        }
        // An image that was not closed is read.
        let dirty = MemDisk::from(image.to_vec());
        dirty.write_all_at(&[1], 79).unwrap();
        assert!(Qcow2::open(dirty).is_ok());
        for len in [0, 4, 71, 72, 103, 65_540] {
            let cut = MemDisk::from(image.to_vec()[..len].to_vec());
            assert!(Qcow2::open(cut).is_err(), "{len}");
        }
    }

    #[test]
    fn entries_that_lead_nowhere_are_errors() {
        let (_, image) = sample();
        let opened = Qcow2::open(&image).unwrap();
        let (l1, l2) = (1u64 << 16, opened.l1[0] & OFFSET);
        for (at, entry) in [
            (l1, (1 << 9) | (1 << 16)),
            (l1, 1 << 40),
            (l1, (1 << 16) | (1 << 1)),
            (l2, 1 << 41),
            (l2, 1 << 9),
            (l2, (1 << 16) | (1 << 60)),
            (l2, COMPRESSED | (1 << 45)),
            (l2, COMPRESSED | 0x3_0d40),
        ] {
            let broken = MemDisk::from(image.to_vec());
            broken.write_all_at(&u64::to_be_bytes(entry), at).unwrap();
            let error = whole(&Qcow2::open(broken).unwrap()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{at} {entry:x}: {error}");
        }
        // A cluster of zeros.
        let zero = MemDisk::from(image.to_vec());
        zero.write_all_at(&u64::to_be_bytes((1 << 16) | ZERO), l2).unwrap();
        assert!(whole(&Qcow2::open(zero).unwrap()).unwrap()[..1 << 16].iter().all(|byte| *byte == 0));
    }

    /// For many cases.
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| sample().1.to_vec());

    proptest! {
        #[test]
        fn any_change_is_an_error_or_another_disk(
            changes in prop::collection::vec((0usize..200_000, any::<u8>()), 1..8),
            head in prop::collection::vec((0usize..104, any::<u8>()), 0..3),
        ) {
            let mut bytes = IMAGE.clone();
            for (at, byte) in changes.into_iter().chain(head) {
                bytes[at] = byte;
            }
            if let Ok(opened) = Qcow2::open(MemDisk::from(bytes)) {
                let mut buf = vec![0; 1 << 16];
                for at in (0..opened.size().unwrap().min(DISK)).step_by(1 << 16) {
                    let _ = opened.read_at(&mut buf, at);
                }
            }
        }
    }

    // qemu-img is a program of Linux.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_qemu_writes_is_read() {
        use std::{fs, process::Command};
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (raw, image, other) = (path("raw"), path("image"), path("other"));
        let (raw, image) = (raw.as_str(), image.as_str());
        let mut bytes = vec![0; (40 << 20) + 1536];
        for (at, len) in [(0, 5), (4 << 20, 300_000), (33 << 20, 1 << 20), (bytes.len() - 1000, 1000)] {
            for (n, byte) in bytes[at..at + len].iter_mut().enumerate() {
                *byte = (n * 31 + n / 251) as u8 | 1;
            }
        }
        fs::write(raw, &bytes).unwrap();
        let run = |args: &[&str]| {
            let done = Command::new("qemu-img").args(args).output().expect("this test needs qemu-img");
            assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
        };
        for options in [
            &[][..],
            &["-c"],
            &["-o", "compat=0.10"],
            &["-c", "-o", "compat=0.10,cluster_size=4096"],
            &["-o", "cluster_size=512"],
            &["-o", "cluster_size=2M"],
            &["-c", "-o", "cluster_size=2M"],
            &["-o", "lazy_refcounts=on"],
            &["-o", "preallocation=metadata"],
        ] {
            run(&[&["convert", "-f", "raw", "-O", "qcow2"][..], options, &[raw, image]].concat());
            let opened = Qcow2::open(fs::File::open(image).unwrap()).unwrap();
            assert!(whole(&opened).unwrap() == bytes, "{options:?}");
        }
        let refused = |word: &str| {
            let error = Qcow2::open(fs::File::open(image).unwrap()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            fs::remove_file(image).unwrap();
        };
        run(&["convert", "-c", "-o", "compression_type=zstd", "-O", "qcow2", raw, image]);
        refused("deflate");
        run(&["create", "-f", "qcow2", "-F", "raw", "-b", raw, image]);
        refused("backing file");
        run(&["create", "-f", "qcow2", "-o", &format!("data_file={other}"), image, "1M"]);
        refused("external data file");
        run(&["create", "-f", "qcow2", "-o", "extended_l2=on", image, "1M"]);
        refused("extended L2");
        run(&[
            "create",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=secret",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            image,
            "1M",
        ]);
        refused("encrypted");
    }
}
