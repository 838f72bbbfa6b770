//! Prints a file of an ext4 image: `cargo run --example cat -- IMAGE /path/of/the/file`.
//!
//! Symbolic links are not followed. The image is never written, and may be damaged or hostile.

use ext4_image::{Ext4, FileKind};
use std::{
    error::Error,
    fs::File,
    io::{Write, stdout},
};

/// Bytes read at once.
const PIECE: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [image, path] = args.as_slice() else {
        return Err("usage: cat IMAGE PATH".into());
    };
    let fs = Ext4::open(File::open(image)?)?;
    let mut inode = fs.inode(fs.root())?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        let ino = fs.lookup(&inode, name.as_bytes())?.ok_or_else(|| format!("{path}: no entry {name:?}"))?;
        inode = fs.inode(ino)?;
    }
    if inode.kind != FileKind::File {
        return Err(format!("{path} is not a regular file but a {:?}", inode.kind).into());
    }
    let (mut offset, mut piece) = (0, vec![0; PIECE]);
    loop {
        let n = fs.read_file_at(&inode, offset, &mut piece)?;
        if n == 0 {
            return Ok(());
        }
        stdout().write_all(&piece[..n])?;
        offset += n as u64;
    }
}
