//! Appends a hash tree to an image file, or verifies one.
//!
//! ```text
//! cargo run --example verity -- format IMAGE
//! cargo run --example verity -- verify IMAGE SIZE ROOT
//! ```
//!
//! SIZE is the size of the image without its tree, in bytes. `veritysetup verify --hash-offset OFFSET IMAGE IMAGE ROOT`
//! checks the same file. Without arguments, it formats and verifies an image of 1 MiB in memory.

use disk_io::{MemDisk, ReadAt, WriteAt};
use std::{error::Error, fs::File};
use verity_tree::{Hash, TreeDisk, TreeSummary, check, find};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        [] => {
            let image = MemDisk::from(vec![1; 1 << 20]);
            let tree = format(&image, &image)?;
            verify(&image, 1 << 20, &hex(&tree.root))
        }
        ["format", path] => {
            let image = File::options().read(true).write(true).open(path)?;
            let tree = format(&image, &image)?;
            println!("hash offset {}, root {}", tree.hash_offset, hex(&tree.root));
            Ok(())
        }
        ["verify", path, size, root] => verify(&File::open(path)?, size.parse()?, root),
        _ => Err("usage: verity [format IMAGE | verify IMAGE SIZE ROOT]".into()),
    }
}

/// Passes the image through a `TreeDisk` that writes it back in place. A program that creates an image lets its writer
/// write to the `TreeDisk` instead.
fn format<D: WriteAt>(image: &impl ReadAt, out: D) -> Result<TreeSummary, Box<dyn Error>> {
    let size = image.size()?;
    let disk = TreeDisk::<_, MemDisk>::hashing(out, None)?;
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    while at < size {
        let n = image.read_at(&mut buffer, at)?;
        disk.write_all_at(&buffer[..n], at)?;
        at += n as u64;
    }
    let tree = disk.finish(size, [0; 16])?.ok_or("the tree was written before")?;
    disk.sync()?;
    Ok(tree)
}

fn verify(image: &impl ReadAt, size: u64, root: &str) -> Result<(), Box<dyn Error>> {
    let superblock = find(image, size)?.ok_or("no hash tree follows the image")?;
    let report = check(image, &superblock, &mut |_| {})?;
    if !report.is_sound() {
        return Err(format!("damaged: {:?}, tree: {:?}", report.damaged, report.damaged_tree).into());
    }
    if hex(&report.root) != root {
        return Err(format!("root mismatch: expected {root}, found {}", hex(&report.root)).into());
    }
    println!("{} blocks verified", report.data_blocks);
    Ok(())
}

fn hex(hash: &Hash) -> String {
    hash.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}
