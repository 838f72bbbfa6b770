//! Any bytes as an ext4 image, as the reader, the checker and the canonical diff meet them.
//!
//! The corpus has images of mke2fs without checksums of metadata, so that a changed byte is met by the code behind them.
#![no_main]

use bound::{Counted, Limit};
use disk_io::{MemDisk, StreamOut};
use ext4_image::{Ext4, FileKind, check};
use layer_codec::{LayerKind, LayerSource, NoHooks, changes, export};
use libfuzzer_sys::fuzz_target;
use std::{
    fs::File,
    io::{self, Write},
};

mod bound;

/// Bytes that one export may write.
const MAX_EXPORT: usize = 32 << 20;
/// Each of the five operations may visit each block some dozen times and keeps what it meets of names; what an export
/// writes, it reads.
const LIMIT: Limit = Limit {
    held: (64 << 20, 1024),
    asked: (256 << 20, 16384),
    disk: (256 << 20, 8192),
    steps: (1 << 20, 256),
};

/// A hostile image may describe terabytes in its holes: who reads has a limit of its own.
struct Limited(usize);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StreamOut for Limited {
    fn splice(&mut self, _: &File, _: u64, _: u64) -> io::Result<u64> {
        Ok(0)
    }
}

/// Every file that some folder names, as `layer ls` walks.
fn walk(fs: &Ext4<&Counted<MemDisk>>) {
    let mut folders = vec![fs.root()];
    let mut seen = std::collections::HashSet::new();
    while let Some(ino) = folders.pop() {
        let Ok(folder) = fs.inode(ino) else { continue };
        let Ok(entries) = fs.read_dir(&folder) else { continue };
        if let Some(last) = entries.last() {
            let _ = fs.lookup(&folder, &last.name);
        }
        for entry in entries {
            if !seen.insert(entry.ino) {
                continue;
            }
            let Ok(inode) = fs.inode(entry.ino) else { continue };
            let _ = (fs.xattrs(&inode), fs.extents(&inode));
            match inode.kind {
                FileKind::Directory => folders.push(entry.ino),
                FileKind::Symlink => {
                    let _ = fs.symlink_target(&inode);
                }
                _ => {
                    let _ = (fs.data_map(&inode), fs.inline_bytes(&inode));
                    let mut bytes = [0; 4096];
                    let _ = fs.read_file_at(&inode, 0, &mut bytes);
                }
            }
        }
    }
}

fuzz_target!(|image: &[u8]| LIMIT.hold(image.len(), || one(image)));

const LIMITS: check::CheckLimits =
    check::CheckLimits { max_blocks: 1 << 20, max_inodes: 1 << 16, writer: check::WRITER };

fn one(image: &[u8]) {
    let disk = Counted(MemDisk::from(image.to_vec()));
    let sound = check::check(&disk, LIMITS).is_ok();
    if let Ok(fs) = Ext4::open(&disk) {
        walk(&fs);
    } else {
        assert!(!sound, "the checker takes what the reader can't open");
    }
    for kind in [LayerKind::Applied, LayerKind::Sandbox] {
        let layers = [LayerSource::new(&disk, kind)];
        let _ = export(&layers, None, &Default::default(), &mut NoHooks, &mut Limited(MAX_EXPORT));
        let _ = changes(&layers, None, &Default::default(), &mut NoHooks);
    }
}
