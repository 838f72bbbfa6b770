//! Turns a raw disk image into a fixed VHD, in place: `cargo run --example raw_to_vhd -- DISK`.
//!
//! The size must be a multiple of 512 bytes. Without an argument, it converts an empty disk of 1 MiB in memory.

use disk_io::{MemDisk, WriteAt};
use std::{error::Error, fs::File};
use vhd_image::vhd::Footer;

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1) {
        Some(path) => append_footer(&File::options().read(true).write(true).open(path)?),
        None => append_footer(&MemDisk::from(vec![0; 1 << 20])),
    }
}

fn append_footer(disk: &impl WriteAt) -> Result<(), Box<dyn Error>> {
    let size = disk.size()?;
    // Neither a clock nor a random id: the same disk always yields the same VHD.
    let footer = Footer::new(size, 0, *uuid::Uuid::from_u128(u128::from(size)).as_bytes())?;
    disk.write_all_at(&footer.to_bytes(), size)?;
    disk.sync()?;
    println!("{size} bytes of disk, {} bytes of VHD", disk.size()?);
    Ok(())
}
