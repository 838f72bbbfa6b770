//! Makes an ext4 image from a directory: `cargo run --example pack -- DIRECTORY IMAGE`.
//!
//! Names are taken in sorted order, so that the same tree gives the same image. Directories, regular files and symbolic
//! links; permissions are those of the source on Unix. Owners and times are 0. The image is checked before it is kept.

use ext4_image::{
    check,
    writer::{Attributes, ImageWriter, NodeId, NodeKind, WriterOptions},
};
use std::{
    error::Error,
    fs::{self, File, Metadata},
    io::Read,
    path::Path,
};

/// Bytes read at once.
const PIECE: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [directory, image] = args.as_slice() else {
        return Err("usage: pack DIRECTORY IMAGE".into());
    };
    let disk = File::create_new(image)?;
    let mut writer = ImageWriter::new(&disk, WriterOptions::default())?;
    let root = writer.root();
    add(&mut writer, root, Path::new(directory))?;
    let summary = writer.finish()?;
    check::check(&File::open(image)?, check::CheckLimits::default())?;
    println!("{image}: {} bytes, {} inodes", summary.image_bytes, summary.inodes);
    Ok(())
}

fn add(writer: &mut ImageWriter<&File>, dir: NodeId, path: &Path) -> Result<(), Box<dyn Error>> {
    let mut entries = fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name, metadata) = (entry.path(), entry.file_name(), entry.metadata()?);
        let name = name.as_encoded_bytes();
        let attributes = Attributes { permissions: permissions(&metadata), ..Attributes::default() };
        if metadata.is_dir() {
            let node = writer.create(dir, name, NodeKind::Directory, attributes, Vec::new())?;
            add(writer, node, &path)?;
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path)?.into_os_string().into_encoded_bytes();
            writer.create(dir, name, NodeKind::Symlink { target }, attributes, Vec::new())?;
        } else if metadata.is_file() {
            let node = writer.create(dir, name, NodeKind::File, attributes, Vec::new())?;
            copy(writer, node, &path, metadata.len())?;
        }
    }
    Ok(())
}

/// Copies the contents of a file; a file that shrinks meanwhile ends in zeros.
fn copy(writer: &mut ImageWriter<&File>, node: NodeId, path: &Path, size: u64) -> Result<(), Box<dyn Error>> {
    let mut source = File::open(path)?.take(size);
    writer.begin_file(node, size)?;
    let (mut offset, mut piece) = (0, vec![0; PIECE]);
    loop {
        let n = source.read(&mut piece)?;
        if n == 0 {
            break;
        }
        writer.write_data(offset, &piece[..n], &mut |_| {})?;
        offset += n as u64;
    }
    writer.end_file()?;
    Ok(())
}

#[cfg(unix)]
fn permissions(metadata: &Metadata) -> u16 {
    std::os::unix::fs::MetadataExt::mode(metadata) as u16 & 0o7777
}

#[cfg(not(unix))]
fn permissions(metadata: &Metadata) -> u16 {
    if metadata.is_dir() { 0o755 } else { 0o644 }
}
