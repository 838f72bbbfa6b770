//! Our writer against `e2fsck -fn`: whatever a tar holds, the image of it is clean, or the tar is refused.
//!
//! The tars are full of bytes that look like parts of a file system: roots of extent trees, folders' blocks, block
//! numbers. `LCOW_TARS` (150) of them are made by chance from `LCOW_MUTATIONS_SEED`.

use super::{
    build::Tar,
    e2fsck,
    image::{Image, Kind, Unit, put16, put32},
    mutate::Random,
    number,
};
use disk_io::MemDisk;
use ext4_image::{
    BlockSize, Ext4,
    check::{CheckLimits, check},
    hcsshim::DEFAULT_MAX_DISK,
    writer::{Attributes, ImageWriter, NodeKind, WriterOptions},
};
use layer_codec::{
    DiffError,
    apply::{self, ApplyOptions, HcsshimProfile, NoLowers, Profile},
};
use std::{fs, path::Path};

/// Tars made by chance in an ordinary run.
const COUNT: u64 = 150;

fn image_of(tar: &[u8], options: &ApplyOptions) -> Result<Vec<u8>, DiffError> {
    let (image, record) = (MemDisk::new(), MemDisk::new());
    apply::apply(tar, &image, &record, &mut NoLowers, options)?;
    Ok(image.to_vec())
}

/// What e2fsck or our checker have against an image.
fn faults(image: &[u8]) -> Option<String> {
    if let Err(e) = check(MemDisk::from(image.to_vec()), CheckLimits::default()) {
        return Some(format!("our checker: {e}"));
    }
    let file = tempfile::NamedTempFile::new_in(shared()).unwrap();
    fs::write(file.path(), Image::new(image.to_vec()).for_e2fsck()).unwrap();
    e2fsck(file.path())
}

/// In memory where there is such a place.
fn shared() -> &'static Path {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() { shared } else { Path::new("/tmp") }
}

fn default(block_size: BlockSize, inline_data: bool) -> ApplyOptions {
    ApplyOptions { block_size: block_size.bytes(), inline_data, ..ApplyOptions::default() }
}

fn hcsshim() -> ApplyOptions {
    let hcsshim =
        HcsshimProfile { max_disk_bytes: DEFAULT_MAX_DISK, inline_data: true, ..HcsshimProfile::default() };
    ApplyOptions { profile: Profile::Hcsshim, hcsshim, ..ApplyOptions::default() }
}

/// 60 bytes or fewer that look like the root of an extent tree.
fn root(entries: u32, max: u32, depth: u32, len: usize) -> Vec<u8> {
    let mut data = vec![0; len.max(60)];
    for (at, value) in [(0, 0xF30A), (2, entries), (4, max), (6, depth), (16, 1), (20, 3)] {
        put16(&mut data, at, value);
    }
    data.truncate(len);
    data
}

#[test]
fn files_that_look_like_an_extent_tree_are_clean() {
    let mut tar = Tar::new();
    for entries in 0..=5 {
        for max in 0..=5 {
            for (depth, len) in [(0, 60), (1, 60), (5, 8), (0, 5), (0, 200), (0, 61)] {
                tar = tar.file(&format!("{entries}-{max}-{depth}-{len}"), &root(entries, max, depth, len));
            }
        }
    }
    let tar = tar.end();
    for block_size in [BlockSize::B1024, BlockSize::B4096] {
        let image = image_of(&tar, &default(block_size, true)).unwrap();
        assert_eq!(faults(&image), None, "{block_size:?}");
        let fs = Ext4::open(MemDisk::from(image)).unwrap();
        let top = fs.inode(fs.root()).unwrap();
        for (name, len) in [("1-4-0-60", 60), ("0-2-5-8", 8), ("5-4-0-200", 200)] {
            let file = fs.inode(fs.lookup(&top, name.as_bytes()).unwrap().unwrap()).unwrap();
            let mut data = vec![0; len];
            assert_eq!(fs.read_file_at(&file, 0, &mut data).unwrap(), len, "{name}");
            let parts: Vec<u32> = name.split('-').map(|part| part.parse().unwrap()).collect();
            assert_eq!(data, root(parts[0], parts[1], parts[2], len), "{name}");
        }
    }
    // That profile has no freedom: it refuses, and says which.
    let one = Tar::new().file("innocent", b"x").file("looks-like-one", &root(1, 4, 0, 60)).end();
    let error = image_of(&one, &hcsshim()).unwrap_err();
    let text = format!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
    assert!(text.contains("looks-like-one"), "{text}");
}

#[test]
fn a_folder_whose_numbers_look_like_an_extent_tree_is_clean() {
    // Inline, a folder begins with its parent's number and that of its first name: here 0xF30A, and 2 + 2^16.
    let disk = MemDisk::new();
    let mut w = ImageWriter::new(&disk, WriterOptions::default()).unwrap();
    let (root, plain) = (w.root(), Attributes::default());
    // The first node made is inode 11.
    let mut next = 11;
    let mut make = |w: &mut ImageWriter<_>, dir, name: &str, kind| {
        next += 1;
        w.create(dir, name.as_bytes(), kind, plain, Vec::new()).map(|node| (node, next - 1)).unwrap()
    };
    let (fill, _) = make(&mut w, root, "fill", NodeKind::Directory);
    let mut ino = 11;
    while ino < 0xF30A - 1 {
        ino = make(&mut w, fill, &format!("{ino}"), NodeKind::Fifo).1;
    }
    let (parent, number) = make(&mut w, root, "parent", NodeKind::Directory);
    assert_eq!(number, 0xF30A);
    let (folder, mut ino) = make(&mut w, parent, "folder", NodeKind::Directory);
    while ino < 0x1_0001 {
        ino = make(&mut w, fill, &format!("{ino}"), NodeKind::Fifo).1;
    }
    assert_eq!(make(&mut w, folder, "first", NodeKind::Fifo).1, 0x1_0002);
    w.finish().unwrap();
    assert_eq!(faults(&disk.to_vec()), None);
}

#[test]
fn a_device_whose_number_leads_to_a_folder_of_its_own_is_clean() {
    // The block of a file that looks like the first one of a folder, whose number is the device's.
    let tar = |device: (u32, u32), block: &[u8]| {
        let (major, minor) = device;
        Tar::new().device("a", b'4', major, minor).link("b", "a").file("c", block).end()
    };
    for block_size in [BlockSize::B1024, BlockSize::B2048, BlockSize::B4096] {
        let (options, bs) = (default(block_size, false), block_size.bytes() as usize);
        let first = image_of(&tar((1, 1), &vec![1; bs]), &options).unwrap();
        let fs = Ext4::open(MemDisk::from(first.clone())).unwrap();
        let top = fs.inode(fs.root()).unwrap();
        let ino = fs.lookup(&top, b"a").unwrap().unwrap();
        let file = fs.inode(fs.lookup(&top, b"c").unwrap().unwrap()).unwrap();
        let place = fs.data_map(&file).unwrap()[0].disk_offset.unwrap();
        let number = (place / bs as u64) as u32;
        // Sealed as a folder's block is: the seed of all our images is the same.
        let mut image = Image::new(first);
        let at = place as usize;
        let b = &mut image.bytes[at..at + bs];
        b.fill(0);
        for (at, ino, len, name) in [(0, ino, 12, &b"."[..]), (12, 2, bs as u32 - 24, b"..")] {
            put32(b, at, ino);
            put16(b, at + 4, len);
            (b[at + 6], b[at + 7]) = (name.len() as u8, 2);
            b[at + 8..at + 8 + name.len()].copy_from_slice(name);
        }
        put16(b, bs - 8, 12);
        b[bs - 5] = 0xDE;
        image.seal(&Unit { kind: Kind::DirectoryLeaf, at, len: bs, owner: ino });
        let block = image.bytes[at..at + bs].to_vec();
        let image = image_of(&tar((number >> 8, number & 0xFF), &block), &options).unwrap();
        assert_eq!(faults(&image), None, "{block_size:?}");
    }
}

/// Bytes that mean something to a file system.
fn bytes(random: &mut Random, len: usize) -> Vec<u8> {
    let mut data = match random.below(6) {
        0 => root(random.below(6) as u32, random.below(6) as u32, random.below(6) as u32, len),
        1 => (0..len.div_ceil(4)).flat_map(|_| (random.below(200) as u32).to_le_bytes()).collect(),
        2 => vec![0; len],
        3 => {
            // An entry of a folder.
            let mut data = vec![0; len.max(24)];
            put32(&mut data, 0, 11 + random.below(20) as u32);
            put32(&mut data, 4, 0x0201_000C);
            data[8] = b'.';
            data
        }
        4 => [&0xEA02_0000u32.to_le_bytes()[..], &[1, 1, 4, 0]].concat(),
        _ => (0..len).map(|_| random.next() as u8).collect(),
    };
    data.resize(len, random.one_of(&[0, 0xFF, b'x']));
    data
}

fn size(random: &mut Random) -> usize {
    match random.below(5) {
        0 => random.below(64),
        1 => random.one_of(&[0, 1, 4, 8, 59, 60, 61, 120, 135, 136, 137, 255, 256]),
        2 => random.below(500),
        3 => random.one_of(&[1023, 1024, 1025, 4095, 4096, 4097]),
        _ => random.below(9000),
    }
}

fn name(random: &mut Random) -> Vec<u8> {
    let len = if random.below(4) == 0 { 1 + random.below(255) } else { 1 + random.below(12) };
    let odd = random.below(5) == 0;
    let mut name: Vec<u8> = (0..len)
        .map(|_| if odd { 1 + random.below(255) as u8 } else { b'a' + random.below(26) as u8 })
        .map(|c| if c == b'/' { b'.' } else { c })
        .collect();
    if random.below(30) == 0 {
        name = b"lost+found".to_vec();
    }
    if name.starts_with(b".") {
        name[0] = b'_';
    }
    name
}

/// A tar made by chance.
fn chance(random: &mut Random) -> Vec<u8> {
    let mut tar = Tar::new();
    let mut folders: Vec<Vec<u8>> = vec![Vec::new()];
    let mut files: Vec<Vec<u8>> = Vec::new();
    let many = random.one_of(&[3, 20, 60, 400]);
    for _ in 0..many {
        let folder = if random.below(3) == 0 {
            folders[folders.len() - 1].clone()
        } else {
            folders[random.below(folders.len())].clone()
        };
        let mut path = folder;
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(name(random));
        if path.len() > 2000 {
            continue;
        }
        // Seldom a name that is there already.
        if !files.is_empty() && random.below(25) == 0 {
            path.clone_from(&files[random.below(files.len())]);
        }
        let (mut records, mut values): (Vec<String>, Vec<Vec<u8>>) = (Vec::new(), Vec::new());
        let mut record = |key: &str, value: Vec<u8>| {
            records.push(key.into());
            values.push(value);
        };
        record("path", path.clone());
        if random.below(3) == 0 {
            let secs = random.one_of(&[
                -1i64,
                0,
                -2_147_483_648,
                2_147_483_648,
                11_000_000_000,
                12_884_901_888,
                1 << 40,
            ]);
            record("mtime", format!("{secs}.5").into_bytes());
        }
        if random.below(4) == 0 {
            record("uid", random.one_of(&["0", "65535", "65536", "4294967294"]).into());
            record("gid", random.one_of(&["0", "65535", "65536", "4294967294"]).into());
        }
        for n in 0..random.one_of(&[0usize, 0, 0, 1, 2, 5]) {
            let len = random.one_of(&[1usize, 1, 3, 10, 40]);
            let space = random.one_of(&["user.", "trusted.", "security."]);
            let size = random.one_of(&[0, 1, 2, 3, 4, 5, 30, 31, 32, 100, 200, 300, 900, 1500, 5000]);
            let key = format!("SCHILY.xattr.{space}{}{n}", "n".repeat(len));
            let value = bytes(random, size);
            record(&key, value);
        }
        let kind = random.below(20);
        let target = match kind {
            12..15 if random.below(3) == 0 => {
                (0..=random.below(1100)).map(|_| 1 + random.below(255) as u8).collect()
            }
            12..15 => [&[0x0A, 0xF3, 1, 4][..], &b"x".repeat(random.below(60))].concat(),
            15..17 if !files.is_empty() => files[random.below(files.len())].clone(),
            _ => Vec::new(),
        };
        if !target.is_empty() {
            record("linkpath", target);
        }
        let pairs: Vec<(&str, &[u8])> =
            records.iter().map(String::as_str).zip(values.iter().map(Vec::as_slice)).collect();
        tar = tar.pax(&pairs);
        tar = match kind {
            0..9 => {
                let len = size(random);
                files.push(path);
                tar.file("x", &bytes(random, len))
            }
            9..12 => {
                folders.push(path);
                tar.dir("x", 0o755)
            }
            12..15 => tar.symlink("x", "y"),
            15..17 if !files.is_empty() => tar.link("x", "y"),
            _ => {
                let (major, minor) =
                    random.one_of(&[(0, 1), (1, 3), (0, 200), (5, 1), (255, 255), (259, 70_000)]);
                files.push(path);
                let flag = random.one_of(b"346");
                tar.device("x", flag, major, minor)
            }
        };
    }
    tar.end()
}

#[test]
fn images_of_hostile_tars_are_clean() {
    let (count, seed) = (number("LCOW_TARS", COUNT), number("LCOW_MUTATIONS_SEED", 1));
    let (mut made, mut wrong) = (0, Vec::new());
    for n in 0..count {
        let mut random = Random::new(seed ^ 0x7A72, n);
        let tar = chance(&mut random);
        let options = match n % 8 {
            0..3 => default(BlockSize::B1024, true),
            3 => default(BlockSize::B1024, false),
            4 => default(BlockSize::B2048, true),
            5 => default(BlockSize::B4096, true),
            6 => default(BlockSize::B4096, false),
            _ => hcsshim(),
        };
        let Ok(image) = image_of(&tar, &options) else { continue };
        made += 1;
        if let Some(fault) = faults(&image) {
            wrong.push(format!("tar {n}: {fault}"));
        }
    }
    println!("seed {seed}: {made} images of {count} tars, {} of them wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(made * 3 > count, "hardly a tar is taken");
}
