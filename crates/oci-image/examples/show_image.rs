//! Shows an image: `cargo run --example show_image -- oci-archive:app.tar`.

use oci_image::{Options, Source};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let Some(source) = std::env::args().nth(1) else {
        return Err("usage: show_image SOURCE".into());
    };
    let image = Source::parse(&source)?.open(&Options::default())?;
    println!("{} {}", image.config().digest, image.config().platform);
    for (index, layer) in image.layers().iter().enumerate() {
        let summary = image.open_layer(index)?.finish()?;
        println!(
            "{} {} {} bytes, plain {}",
            layer.descriptor.digest, summary.compression, summary.blob_bytes, summary.plain_bytes
        );
    }
    Ok(())
}
