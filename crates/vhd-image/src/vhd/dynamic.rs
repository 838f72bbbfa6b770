//! Dynamic VHD, read only: a disk in blocks that take space in the file only once they have been written.
//!
//! ```text
//!   copy of the footer │ dynamic header (1024) │ table: a sector number for each block │ blocks … │ footer
//!                                                 block = bitmap of its sectors, padded to 512 bytes │ its data
//!   read(offset) ─► block ─► table: none? zeros : bitmap: never written? zeros : the file
//! ```
//!
//! Invariants: every block of the table lies in the file, after the header, and shares no byte with another block or with
//! the table; memory is bounded by [`MAX_TABLE_BYTES`] and the bitmap of one block. A differencing disk is refused, because
//! its remaining content is in its parent. Source: the specification named in the parent module.

use super::{COOKIE, FOOTER_SIZE, MAX_DISK_BYTES, NO_OFFSET, RawFooter, SECTOR, VERSION, checksum};
use disk_io::ReadAt;
use std::{io, ops::Range};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32, U64},
};

/// Largest block table that is read into memory, in bytes: enough for 2040 GiB in blocks of 512 KiB.
pub const MAX_TABLE_BYTES: u64 = 16 << 20;
/// Largest accepted block; all known creators use 2 MiB.
const MAX_BLOCK_BYTES: u32 = 256 << 20;
const HEADER_SIZE: usize = 1024;
const NO_COOKIE: &str = "no cookie";
const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
/// The table entry of a block without space in the file.
const UNUSED: u32 = u32::MAX;
const TYPE_DYNAMIC: u32 = 3;
const TYPE_DIFFERENCING: u32 = 4;
/// Creators whose machines see a disk of the size that the geometry gives, which may be a little less than the size in the
/// footer: Virtual PC, and QEMU in its compatible mode.
const BY_GEOMETRY: [[u8; 4]; 2] = [*b"vpc ", *b"qemu"];
/// The largest geometry; all larger disks have it too.
const MAX_GEOMETRY_SECTORS: u64 = 65_535 * 16 * 255;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    header_version: U32,
    max_table_entries: U32,
    block_size: U32,
    checksum: U32,
    parent_unique_id: [u8; 16],
    parent_time_stamp: U32,
    reserved: U32,
    parent_name: [U16; 256],
    parent_locators: [u8; 192],
    reserved_end: [u8; 256],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE);

/// Why a dynamic VHD is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DynamicError {
    /// The file contradicts itself or the format.
    #[error("corrupt vhd: {what} (byte {offset} of the file)")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// Where in the file, in bytes.
        offset: u64,
    },
    /// A differencing disk, whose remaining content is in another file.
    #[error(
        "this differencing vhd holds only the differences to its parent '{parent}'; merge the two with the tool that \
         created them (Hyper-V: `Merge-VHD`, VirtualBox: `VBoxManage clonemedium`, Xen: `vhd-util coalesce`) and use \
         the result"
    )]
    Differencing {
        /// The name of the parent as recorded in the file; may be empty.
        parent: String,
    },
    /// Valid, but of a kind or size that this module does not read.
    #[error("unsupported vhd: {0}")]
    Unsupported(&'static str),
    /// The file cannot be read.
    #[error("cannot read the vhd")]
    Io(#[source] io::Error),
}

fn corrupt(what: &'static str, offset: u64) -> DynamicError {
    DynamicError::Corrupt { what, offset }
}

fn read<const N: usize, D: ReadAt>(disk: &D, offset: u64) -> Result<[u8; N], DynamicError> {
    let mut bytes = [0; N];
    disk.read_exact_at(&mut bytes, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => corrupt("the file ends too early", offset),
        _ => DynamicError::Io(e),
    })?;
    Ok(bytes)
}

/// Whether a file begins as a dynamic or differencing VHD does: with a copy of its footer.
pub fn is_dynamic(head: &[u8]) -> bool {
    head.starts_with(&COOKIE)
}

/// Parses the footer of a dynamic or differencing disk.
fn parse_footer(bytes: &[u8; FOOTER_SIZE], offset: u64) -> Result<RawFooter, DynamicError> {
    let raw: RawFooter = zerocopy::transmute!(*bytes);
    if raw.cookie != COOKIE {
        return Err(corrupt(NO_COOKIE, offset));
    }
    let summed = RawFooter { checksum: U32::ZERO, ..raw };
    if checksum(summed.as_bytes()) != raw.checksum.get() {
        return Err(corrupt("wrong checksum of the footer", offset));
    }
    if raw.file_format_version.get() >> 16 != VERSION >> 16 {
        return Err(DynamicError::Unsupported("format version"));
    }
    match raw.disk_type.get() {
        TYPE_DYNAMIC | TYPE_DIFFERENCING => Ok(raw),
        _ => Err(DynamicError::Unsupported("a disk type that is neither fixed nor dynamic")),
    }
}

/// Size of the disk as a machine sees it, in bytes.
fn disk_bytes(footer: &RawFooter) -> Result<u64, DynamicError> {
    let recorded = footer.current_size.get();
    if recorded == 0 || recorded > MAX_DISK_BYTES || !recorded.is_multiple_of(SECTOR) {
        return Err(corrupt("a size that no vhd can have", 48));
    }
    let (heads, sectors) = (u64::from(footer.heads), u64::from(footer.sectors_per_track));
    let geometry = u64::from(footer.cylinders.get()) * heads * sectors;
    let by_geometry = BY_GEOMETRY.contains(&footer.creator_application);
    if by_geometry && geometry != 0 && geometry != MAX_GEOMETRY_SECTORS && geometry * SECTOR <= recorded {
        return Ok(geometry * SECTOR);
    }
    Ok(recorded)
}

/// A dynamic VHD opened for reading: the virtual disk behind [`ReadAt`].
#[derive(Debug)]
pub struct DynamicVhd<D> {
    disk: D,
    bytes: u64,
    uuid: [u8; 16],
    timestamp: u32,
    block_bytes: u64,
    /// Bytes before the data of each block in the file.
    bitmap_bytes: u64,
    /// First sector of each block in the file, or [`UNUSED`].
    table: Vec<u32>,
}

impl<D: ReadAt> DynamicVhd<D> {
    /// Opens a file that begins with a copy of its footer. If that copy is damaged, the footer at the end is used.
    ///
    /// # Errors
    /// [`DynamicError::Corrupt`], [`DynamicError::Unsupported`] and [`DynamicError::Differencing`] for what the file holds;
    /// [`DynamicError::Io`] if it cannot be read.
    pub fn open(disk: D) -> Result<Self, DynamicError> {
        let size = disk.size().map_err(DynamicError::Io)?;
        let footer = match parse_footer(&read(&disk, 0)?, 0) {
            Err(first @ DynamicError::Corrupt { .. }) => {
                let at = size.saturating_sub(FOOTER_SIZE as u64);
                parse_footer(&read(&disk, at)?, at).map_err(|last| match first {
                    DynamicError::Corrupt { what: NO_COOKIE, .. } => last,
                    first => first,
                })?
            }
            other => other?,
        };
        let at = footer.data_offset.get();
        if at == NO_OFFSET || at < FOOTER_SIZE as u64 || !at.is_multiple_of(SECTOR) {
            return Err(corrupt("the offset of the dynamic header is invalid", 16));
        }
        let header: RawHeader = zerocopy::transmute!(read::<HEADER_SIZE, _>(&disk, at)?);
        if header.cookie != HEADER_COOKIE {
            return Err(corrupt("no dynamic header", at));
        }
        let summed = RawHeader { checksum: U32::ZERO, ..header };
        if checksum(summed.as_bytes()) != header.checksum.get() {
            return Err(corrupt("wrong checksum of the dynamic header", at));
        }
        if footer.disk_type.get() == TYPE_DIFFERENCING {
            let name = header.parent_name.map(U16::get);
            let end = name.iter().position(|&unit| unit == 0).unwrap_or(name.len());
            return Err(DynamicError::Differencing { parent: String::from_utf16_lossy(&name[..end]) });
        }
        if header.header_version.get() >> 16 != VERSION >> 16 {
            return Err(DynamicError::Unsupported("version of the dynamic header"));
        }
        let block = header.block_size.get();
        if !block.is_power_of_two() || u64::from(block) < SECTOR {
            return Err(corrupt("a block size that is not a power of two, or less than a sector", at));
        }
        if block > MAX_BLOCK_BYTES {
            return Err(DynamicError::Unsupported("blocks of more than 256 MiB"));
        }
        let (bytes, block_bytes) = (disk_bytes(&footer)?, u64::from(block));
        let blocks = bytes.div_ceil(block_bytes);
        if blocks > u64::from(header.max_table_entries.get()) {
            return Err(corrupt("the table is too small for the disk", at));
        }
        if blocks * 4 > MAX_TABLE_BYTES {
            return Err(DynamicError::Unsupported("a table of more than 16 MiB"));
        }
        let table_at = header.table_offset.get();
        let table_end = table_at.checked_add(blocks * 4).filter(|end| *end <= size);
        let Some(table_end) = table_end.filter(|_| table_at >= FOOTER_SIZE as u64) else {
            return Err(corrupt("the table lies outside of the file", at));
        };
        let mut raw = vec![0; (blocks * 4) as usize];
        disk.read_exact_at(&mut raw, table_at).map_err(DynamicError::Io)?;
        let (entries, _) = raw.as_chunks::<4>();
        let table: Vec<u32> = entries.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect();
        let opened = Self {
            disk,
            bytes,
            uuid: footer.unique_id,
            timestamp: footer.time_stamp.get(),
            block_bytes,
            bitmap_bytes: block_bytes.div_ceil(SECTOR * 8).next_multiple_of(SECTOR),
            table,
        };
        opened.check([0..FOOTER_SIZE as u64, at..at + HEADER_SIZE as u64, table_at..table_end], size)?;
        Ok(opened)
    }

    /// Checks that the blocks lie in the file and overlap neither `taken` nor each other.
    fn check(&self, taken: [Range<u64>; 3], size: u64) -> Result<(), DynamicError> {
        let mut places = Vec::from(taken);
        for (block, start) in self.present() {
            let data = self.block_bytes.min(self.bytes - block * self.block_bytes);
            let end = start + self.bitmap_bytes + data;
            if end > size {
                return Err(corrupt("a block beyond the end of the file", start));
            }
            places.push(start..end);
        }
        places.sort_by_key(|place| place.start);
        match places.windows(2).find(|pair| pair[0].end > pair[1].start) {
            Some(pair) => Err(corrupt("two parts of the file overlap", pair[1].start)),
            None => Ok(()),
        }
    }

    /// The blocks that have space in the file, with its offset in bytes.
    fn present(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let entries = self.table.iter().enumerate().filter(|(_, sector)| **sector != UNUSED);
        entries.map(|(block, sector)| (block as u64, u64::from(*sector) * SECTOR))
    }

    /// Size of a block in bytes.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Unique id of the disk.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Creation time in seconds since 2000 ([`super::EPOCH`]).
    pub fn timestamp(&self) -> u32 {
        self.timestamp
    }

    /// Byte ranges of the virtual disk that have space in the file, ascending; all others read as zeros.
    pub fn allocated(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (block, _) in self.present() {
            let start = block * self.block_bytes;
            let end = (start + self.block_bytes).min(self.bytes);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Reads `into` from byte `inside` of the block that begins at `start` in the file. Sectors that are not set in the
    /// block's bitmap were never written and read as zeros, whatever the file holds there.
    fn read_block(&self, into: &mut [u8], start: u64, inside: u64) -> io::Result<()> {
        self.disk.read_exact_at(into, start + self.bitmap_bytes + inside)?;
        let (first, last) = (inside / SECTOR, (inside + into.len() as u64 - 1) / SECTOR);
        let mut bitmap = vec![0; (last / 8 - first / 8 + 1) as usize];
        self.disk.read_exact_at(&mut bitmap, start + first / 8)?;
        if bitmap.iter().all(|byte| *byte == u8::MAX) {
            return Ok(());
        }
        for sector in first..=last {
            // The bit of the first sector is the highest of its byte.
            if bitmap[(sector / 8 - first / 8) as usize] & (0x80 >> (sector % 8)) == 0 {
                let from = (sector * SECTOR).saturating_sub(inside) as usize;
                let to = (((sector + 1) * SECTOR - inside) as usize).min(into.len());
                into[from..to].fill(0);
            }
        }
        Ok(())
    }
}

impl<D: ReadAt> ReadAt for DynamicVhd<D> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = offset.saturating_add(buf.len() as u64).min(self.bytes);
        let mut at = offset;
        while at < end {
            let inside = at % self.block_bytes;
            let n = (self.block_bytes - inside).min(end - at);
            let done = (at - offset) as usize;
            let into = &mut buf[done..done + n as usize];
            match self.table[(at / self.block_bytes) as usize] {
                UNUSED => into.fill(0),
                sector => self.read_block(into, u64::from(sector) * SECTOR, inside)?,
            }
            at += n;
        }
        Ok(end.saturating_sub(offset) as usize)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk_io::MemDisk;

    const BLOCK: u64 = 4096;
    const TABLE: u64 = 1536;
    const DATA: u64 = 2048;

    /// A disk of five blocks, of which the third and the first are present; sector 1 of the third was never written.
    struct Sample {
        footer: RawFooter,
        header: RawHeader,
        table: Vec<u32>,
    }

    impl Sample {
        fn new() -> Self {
            let footer = super::super::Footer::new(4 * BLOCK + 1024, 7, [9; 16]).unwrap().to_bytes();
            let mut footer: RawFooter = zerocopy::transmute!(footer);
            (footer.disk_type, footer.data_offset) = (U32::new(TYPE_DYNAMIC), U64::new(512));
            let mut header = RawHeader::read_from_bytes(&[0; HEADER_SIZE]).unwrap();
            (header.cookie, header.data_offset) = (HEADER_COOKIE, U64::new(NO_OFFSET));
            (header.table_offset, header.header_version) = (U64::new(TABLE), U32::new(VERSION));
            (header.max_table_entries, header.block_size) = (U32::new(5), U32::new(BLOCK as u32));
            let place = |n: u64| ((DATA + n * (512 + BLOCK)) / SECTOR) as u32;
            Self { footer, header, table: vec![place(1), UNUSED, place(0), UNUSED, UNUSED] }
        }

        fn bytes(&self) -> Vec<u8> {
            let (mut footer, mut header) = (self.footer, self.header);
            footer.checksum = U32::ZERO;
            footer.checksum = U32::new(checksum(footer.as_bytes()));
            header.checksum = U32::ZERO;
            header.checksum = U32::new(checksum(header.as_bytes()));
            let mut file = [footer.as_bytes(), header.as_bytes()].concat();
            for entry in &self.table {
                file.extend(entry.to_be_bytes());
            }
            file.resize(DATA as usize, 0);
            for (fill, bitmap) in [(3, 0b1011_1111), (1, 0xff)] {
                file.push(bitmap);
                file.resize(file.len() + 511, 0);
                file.resize(file.len() + BLOCK as usize, fill);
            }
            file.extend(footer.as_bytes());
            file
        }

        fn open(&self) -> Result<DynamicVhd<MemDisk>, DynamicError> {
            open(self.bytes())
        }
    }

    fn open(bytes: Vec<u8>) -> Result<DynamicVhd<MemDisk>, DynamicError> {
        DynamicVhd::open(MemDisk::from(bytes))
    }

    #[test]
    fn blocks_are_read_from_where_the_table_says() {
        let disk = Sample::new().open().unwrap();
        let mut expected = vec![0; 4 * BLOCK as usize + 1024];
        expected[..BLOCK as usize].fill(1);
        expected[2 * BLOCK as usize..3 * BLOCK as usize].fill(3);
        let unwritten = 2 * BLOCK as usize + 512;
        expected[unwritten..unwritten + 512].fill(0);
        let mut all = vec![7; expected.len()];
        disk.read_exact_at(&mut all, 0).unwrap();
        assert!(all == expected);
        for (offset, len) in [(1, 3), (4000, 5000), (8500, 200), (8704, 1), (9215, 2), (0, 1)] {
            let mut part = vec![7; len];
            disk.read_exact_at(&mut part, offset).unwrap();
            assert!(part == expected[offset as usize..offset as usize + len], "{len} bytes at {offset}");
        }
        assert_eq!(disk.read_at(&mut [0; 8], expected.len() as u64 - 3).unwrap(), 3);
        assert_eq!(disk.read_at(&mut [0; 8], u64::MAX - 1).unwrap(), 0);
        assert_eq!(disk.allocated(), [0..BLOCK, 2 * BLOCK..3 * BLOCK]);
        assert_eq!(
            (disk.size().unwrap(), disk.uuid(), disk.timestamp()),
            (expected.len() as u64, [9; 16], 7)
        );
    }

    #[test]
    fn the_footer_at_the_end_helps_where_its_copy_is_damaged() {
        let mut bytes = Sample::new().bytes();
        bytes[70] ^= 1;
        assert_eq!(open(bytes.clone()).unwrap().size().unwrap(), 4 * BLOCK + 1024);
        let end = bytes.len();
        bytes[end - 1] ^= 1;
        assert!(open(bytes).unwrap_err().to_string().contains("wrong checksum of the footer (byte 0"));
    }

    #[test]
    fn contradictions_are_refused() {
        let refusal = |change: &dyn Fn(&mut Sample)| {
            let mut sample = Sample::new();
            change(&mut sample);
            sample.open().map(|_| ()).unwrap_err().to_string()
        };
        assert!(refusal(&|s| s.table[1] = s.table[0]).contains("overlap"));
        assert!(refusal(&|s| s.table[1] = s.table[0] + 1).contains("overlap"));
        assert!(refusal(&|s| s.table[1] = 1).contains("overlap"));
        assert!(refusal(&|s| s.table[1] = 0).contains("overlap"));
        assert!(refusal(&|s| s.table[1] = 100).contains("beyond the end"));
        assert!(refusal(&|s| s.table[1] = UNUSED - 1).contains("beyond the end"));
        assert!(refusal(&|s| s.header.block_size = U32::new(4097)).contains("power of two"));
        assert!(refusal(&|s| s.header.block_size = U32::new(256)).contains("power of two"));
        assert!(refusal(&|s| s.header.block_size = U32::ZERO).contains("power of two"));
        assert!(refusal(&|s| s.header.block_size = U32::new(1 << 31)).contains("256 MiB"));
        assert!(refusal(&|s| s.header.max_table_entries = U32::new(4)).contains("too small"));
        assert!(refusal(&|s| s.header.table_offset = U64::new(u64::MAX - 3)).contains("outside"));
        assert!(refusal(&|s| s.header.table_offset = U64::new(0)).contains("outside"));
        assert!(refusal(&|s| s.header.cookie = *b"cxsparsf").contains("no dynamic header"));
        assert!(
            refusal(&|s| s.footer.data_offset = U64::new(NO_OFFSET)).contains("offset of the dynamic header")
        );
        assert!(refusal(&|s| s.footer.data_offset = U64::new(1 << 40)).contains("ends too early"));
        assert!(
            refusal(&|s| s.footer.current_size = U64::new(MAX_DISK_BYTES + 512)).contains("no vhd can have")
        );
        assert!(refusal(&|s| s.footer.disk_type = U32::new(5)).contains("neither fixed nor dynamic"));
        let parent = "C:\\base.vhd".encode_utf16().map(U16::new);
        let differencing = refusal(&|s| {
            s.footer.disk_type = U32::new(TYPE_DIFFERENCING);
            for (n, unit) in parent.clone().enumerate() {
                s.header.parent_name[n] = unit;
            }
        });
        assert!(
            differencing.contains("parent 'C:\\base.vhd'") && differencing.contains("Merge-VHD"),
            "{differencing}"
        );
        let whole = Sample::new().bytes();
        for length in 0..whole.len() - 512 {
            assert!(open(whole[..length].to_vec()).is_err(), "cut to {length} bytes");
        }
    }

    #[test]
    fn virtual_pc_shows_the_geometry() {
        let size = |creator: &[u8; 4], geometry: (u16, u8, u8)| {
            let mut sample = Sample::new();
            sample.footer.creator_application = *creator;
            (sample.footer.cylinders, sample.footer.heads, sample.footer.sectors_per_track) =
                (U16::new(geometry.0), geometry.1, geometry.2);
            sample.open().unwrap().size().unwrap()
        };
        let recorded = 4 * BLOCK + 1024;
        assert_eq!(size(b"vpc ", (1, 4, 8)), 32 * 512);
        assert_eq!(size(b"win ", (1, 4, 8)), recorded);
        assert_eq!(size(b"vpc ", (0, 4, 8)), recorded);
        assert_eq!(size(b"vpc ", (1000, 4, 8)), recorded, "a geometry beyond the size is ignored");
    }
}
