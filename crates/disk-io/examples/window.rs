//! Copies a window of a file or block device to standard output: `cargo run --example window -- FILE OFFSET LENGTH`.
//!
//! Without arguments, it shows a window of a small disk in memory.

use disk_io::{MemDisk, ReadAt, SubDisk};
use std::{
    error::Error,
    fs::File,
    io::{self, Write},
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => copy(&SubDisk::new(MemDisk::from(b"0123456789\n".to_vec()), 4, 7)),
        [file, offset, length] => copy(&SubDisk::new(File::open(file)?, offset.parse()?, length.parse()?)),
        _ => Err("usage: window [FILE OFFSET LENGTH]".into()),
    }
}

fn copy(disk: &impl ReadAt) -> Result<(), Box<dyn Error>> {
    let mut out = io::stdout().lock();
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        let n = disk.read_at(&mut buffer, at)?;
        if n == 0 {
            return Ok(());
        }
        out.write_all(&buffer[..n])?;
        at += n as u64;
    }
}
