//! Prints what a VHD or VHDX is: `cargo run --example vhd_info -- IMAGE`.
//!
//! Without an argument, it creates a VHDX of 64 MiB in memory and describes that.

use disk_io::{MemDisk, ReadAt};
use std::{error::Error, fs::File};
use vhd_image::{
    vhd::{FOOTER_SIZE, Footer, dynamic},
    vhdx,
};

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(path) = std::env::args().nth(1) {
        return describe(&File::open(path)?);
    }
    let file = MemDisk::new();
    let options = vhdx::CreateOptions::new(64 << 20, uuid::Uuid::from_u128(1));
    vhdx::create(&file, &options, &[(1 << 20, b"content".to_vec())])?;
    describe(&file)
}

fn describe(file: &impl ReadAt) -> Result<(), Box<dyn Error>> {
    let mut head = [0; 8];
    file.read_exact_at(&mut head, 0)?;
    if &head == b"vhdxfile" {
        let disk = vhdx::Vhdx::open(file)?;
        println!("vhdx: {:#?}", disk.geometry());
        println!("log in use: {}; allocated: {:?}", disk.is_dirty(), disk.allocated());
    } else if dynamic::is_dynamic(&head) {
        let disk = dynamic::DynamicVhd::open(file)?;
        println!("dynamic vhd: {} bytes in blocks of {}", disk.size()?, disk.block_bytes());
        println!("allocated: {:?}", disk.allocated());
    } else {
        let mut footer = [0; FOOTER_SIZE];
        let at = file.size()?.checked_sub(FOOTER_SIZE as u64).ok_or("smaller than a footer")?;
        file.read_exact_at(&mut footer, at)?;
        println!("fixed vhd: {:#?}", Footer::parse(&footer)?);
    }
    Ok(())
}
