//! Packs a layer's tar into a VHD with an exact record: `pack INPUT.tar IMAGE.vhd RECORD`.

use layer_codec::apply::{ApplyOptions, NoLowers, apply};
use std::{env, error::Error, fs::File, path::Path};

fn create(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let [input, image, record] = &args[..] else {
        return Err("usage: pack INPUT.tar IMAGE.vhd RECORD".into());
    };
    let (image, record) = (create(image.as_ref())?, create(record.as_ref())?);
    let options = ApplyOptions { verity: true, ..ApplyOptions::default() };
    let summary = apply(File::open(input)?, &image, &record, &mut NoLowers, &options)?;
    println!("{} entries, {} bytes of image", summary.entries, summary.image_bytes);
    println!("tar  {}", summary.tar_digest);
    if let Some(root) = summary.verity_root {
        println!("root {root}");
    }
    Ok(())
}
