//! This project's images, and what others say of them.

use layer_codec::{
    DiffError,
    apply::{ApplyOptions, ApplySummary, HcsshimProfile, NoLowers, Profile, apply},
    record,
};
use sha2::{Digest, Sha256};
use std::{
    fmt::Write as _,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

const BLOCK: usize = 4096;

/// An image in a folder of its own: file system, hash tree, VHD footer.
pub(crate) struct Image {
    dir: TempDir,
    pub(crate) file: File,
    pub(crate) summary: ApplySummary,
}

pub(crate) fn text(e: &DiffError) -> String {
    let causes = std::iter::successors(std::error::Error::source(e), |s| s.source());
    causes.fold(e.to_string(), |text, cause| text + ": " + &cause.to_string())
}

/// Applies a tar, and has the record give it back.
pub(crate) fn make(tar: &[u8], options: ApplyOptions) -> Result<Image, DiffError> {
    let mut back = Vec::with_capacity(tar.len());
    let image = make_from(tar, options, |image, record| {
        record::replay(image, record, &mut back).expect("the tar comes back");
    })?;
    assert!(back == tar, "another tar comes back");
    Ok(image)
}

/// Applies a tar from anywhere; `look` gets image and record.
pub(crate) fn make_from(
    tar: impl Read,
    options: ApplyOptions,
    look: impl FnOnce(&File, &File),
) -> Result<Image, DiffError> {
    let dir = tempfile::tempdir().expect("a folder");
    let create = |name| {
        File::options().read(true).write(true).create_new(true).open(dir.path().join(name)).expect("a file")
    };
    let (file, record_file) = (create("image"), create("record"));
    let options = ApplyOptions { verity: true, ..options };
    let summary = apply(tar, &file, &record_file, &mut NoLowers, &options)?;
    look(&file, &record_file);
    Ok(Image { dir, file, summary })
}

pub(crate) fn hcsshim(tar: &[u8], profile: HcsshimProfile) -> Result<Image, DiffError> {
    make(tar, in_hcsshim(profile))
}

/// The options of a layer in profile `hcsshim`.
pub(crate) fn in_hcsshim(hcsshim: HcsshimProfile) -> ApplyOptions {
    ApplyOptions { profile: Profile::Hcsshim, hcsshim, ..ApplyOptions::default() }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What is compared of a file with a file system, a hash tree and a footer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Digests {
    /// SHA-256 of the file system.
    pub(crate) image: String,
    /// Root hash of its dm-verity tree, by a second, plain way to it.
    pub(crate) root: String,
    /// SHA-256 of tree and footer, without their UUIDs and the checksum over the footer's.
    pub(crate) rest: String,
}

fn hash_block(block: &[u8]) -> [u8; 32] {
    // The salt.
    Sha256::new().chain_update([0; 32]).chain_update(block).finalize().into()
}

/// Digests of a file whose file system has `image_bytes`.
pub(crate) fn digests(file: &mut File, image_bytes: u64) -> Digests {
    let zeros = hash_block(&[0; BLOCK]);
    file.seek(SeekFrom::Start(0)).expect("a file can be read");
    let (mut all, mut level, mut block) = (Sha256::new(), Vec::new(), [0; BLOCK]);
    for _ in 0..image_bytes / BLOCK as u64 {
        file.read_exact(&mut block).expect("the file system is whole");
        all.update(block);
        level.extend_from_slice(&if block == [0; BLOCK] { zeros } else { hash_block(&block) });
    }
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).expect("a file can be read");
    hide_ids(&mut rest);
    let root = loop {
        level.resize(level.len().next_multiple_of(BLOCK), 0);
        if level.len() == BLOCK {
            break hash_block(&level);
        }
        level = level.chunks(BLOCK).flat_map(hash_block).collect();
    };
    Digests { image: hex(&all.finalize()), root: hex(&root), rest: hex(&Sha256::digest(&rest)) }
}

/// Clears the UUIDs of the tree's super block and of the footer, and the footer's checksum. What is left is the same for
/// the same file system.
pub(crate) fn hide_ids(rest: &mut [u8]) {
    rest[16..32].fill(0);
    let footer = rest.len() - 512;
    rest[footer + 64..footer + 84].fill(0);
}

impl Image {
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(crate) fn folder(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn digests(&mut self) -> Digests {
        digests(&mut self.file, self.summary.image_bytes)
    }

    /// What `e2fsck -fn` finds, but the padding of inode bitmaps, which that tool leaves clear.
    pub(crate) fn e2fsck(&self) -> Vec<String> {
        let out = Command::new("e2fsck").arg("-fn").arg(self.path()).output().expect("e2fsck");
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
