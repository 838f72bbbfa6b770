//! This project's images, and what others say of them.

use lcow_graphdriver::{
    diff::{
        DiffError,
        apply::{ApplyOptions, HcsshimProfile, NoLowers, Profile, apply},
        record,
    },
    ext4::writer::WriterOptions,
};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    process::Command,
};
use tempfile::TempDir;

/// An image in a folder of its own.
pub(crate) struct Image {
    pub(crate) dir: TempDir,
    pub(crate) file: File,
}

pub(crate) fn text(e: &DiffError) -> String {
    let causes = std::iter::successors(std::error::Error::source(e), |s| s.source());
    causes.fold(e.to_string(), |text, cause| text + ": " + &cause.to_string())
}

/// Applies a tar, and has the record give it back.
pub(crate) fn make(tar: &[u8], profile: Profile) -> Result<Image, DiffError> {
    let dir = tempfile::tempdir().expect("a folder");
    let create = |name| {
        File::options().read(true).write(true).create_new(true).open(dir.path().join(name)).expect("a file")
    };
    let (file, record_file) = (create("image"), create("record"));
    let options = ApplyOptions { profile, footer: false, ..ApplyOptions::new(WriterOptions::default()) };
    apply(tar, &file, &record_file, &mut NoLowers, &options)?;
    let mut back = Vec::with_capacity(tar.len());
    record::replay(&file, &record_file, &mut back).expect("the tar comes back");
    assert!(back == tar, "another tar comes back");
    Ok(Image { dir, file })
}

pub(crate) fn hcsshim(tar: &[u8], profile: HcsshimProfile) -> Result<Image, DiffError> {
    make(tar, Profile::Hcsshim(profile))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of a file, and the root hash of its dm-verity tree (sha256, blocks of 4096 bytes, a salt of 32 zero bytes):
/// a second, plain way to it.
pub(crate) fn digests(file: &mut File) -> (String, String) {
    const BLOCK: usize = 4096;
    let hash = |block: &[u8]| Sha256::new().chain_update([0; 32]).chain_update(block).finalize();
    let zeros = hash(&[0; BLOCK]);
    file.seek(SeekFrom::Start(0)).expect("a file can be read");
    let (mut all, mut level, mut block) = (Sha256::new(), Vec::new(), [0; BLOCK]);
    while let Ok(()) = file.read_exact(&mut block) {
        all.update(block);
        level.extend_from_slice(&if block == [0; BLOCK] { zeros } else { hash(&block) });
    }
    loop {
        level.resize(level.len().next_multiple_of(BLOCK), 0);
        if level.len() == BLOCK {
            return (hex(&all.finalize()), hex(&hash(&level)));
        }
        level = level.chunks(BLOCK).flat_map(hash).collect();
    }
}

impl Image {
    /// What `e2fsck -fn` finds, but the padding of inode bitmaps, which that tool leaves clear.
    pub(crate) fn e2fsck(&self) -> Vec<String> {
        let out =
            Command::new("e2fsck").arg("-fn").arg(self.dir.path().join("image")).output().expect("e2fsck");
        let text = String::from_utf8_lossy(&out.stdout);
        let harmless = |line: &str| {
            let progress = ["Pass ", "Padding at end of inode bitmap is not set", "e2fsck "];
            line.is_empty()
                || progress.iter().any(|p| line.starts_with(p))
                || line.contains("WARNING: Filesystem still has errors")
                || line.contains(" files (") && line.contains(" blocks")
        };
        text.lines().filter(|line| !harmless(line)).map(str::to_owned).collect()
    }
}
