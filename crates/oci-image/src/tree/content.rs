//! The data of one file, read from its layer again. Called by users of this crate.

use super::{layer::of_tar, node::Node};
use crate::{Image, ImageError, image::layer_name};
use layer_tar::{Event, TarReader};
use std::io::{self, Write};

/// Bytes of zeros that are written at a time, for holes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Writes the data of a regular file, which [`Tree::read`](super::Tree::read) has verified; of anything else, nothing. Stops
/// at the end of the file: what follows in its layer is not read again.
///
/// # Errors
/// Those of [`LayerReader`](crate::LayerReader); [`ImageError::Write`]; [`ImageError::Corrupt`] if the layer has changed since
/// the tree was read.
pub fn copy_file(image: &Image, node: &Node, out: &mut dyn Write) -> Result<(), ImageError> {
    let Some(content) = node.content else { return Ok(()) };
    let layer = image.layers().get(content.layer);
    let what = layer.map_or_else(String::new, |layer| layer_name(content.layer, layer));
    let writing = |source| ImageError::Write { what: "the data of a file".to_owned(), source };
    let mut reader = TarReader::new(image.open_layer(content.layer)?);
    let (mut found, mut at) = (false, 0);
    loop {
        match reader.next_event().map_err(|e| of_tar(&what, e))? {
            Event::Entry(_) | Event::End if found => break,
            Event::Entry(entry) => found = entry.offset == content.offset && entry.size == node.size,
            Event::Data { offset, bytes } if found => {
                zeros(out, offset - at).map_err(writing)?;
                out.write_all(bytes).map_err(writing)?;
                at = offset + bytes.len() as u64;
            }
            Event::Raw(_) | Event::Data { .. } => {}
            Event::End => return Err(ImageError::corrupt(what, "it has changed since it was read")),
        }
        if found && at == node.size {
            break;
        }
    }
    zeros(out, node.size.saturating_sub(at)).map_err(writing)
}

fn zeros(out: &mut dyn Write, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let n = len.min(ZEROS.len() as u64);
        out.write_all(&ZEROS[..n as usize])?;
        len -= n;
    }
    Ok(())
}
