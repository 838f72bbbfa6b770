//! Opens images and reads their trees, with a progress bar on a terminal. Called by all commands of `image`.

use super::SourceArgs;
use crate::cli::{CliError, confined, layer::bar};
use oci_image::{
    Image, ImageError, Limits, Options, Source,
    tree::{Tree, TreeOptions},
};
use std::{error::Error, fmt::Write as _, io};

/// An opened image, and how messages name it.
pub(super) struct Opened {
    pub(super) image: Image,
    pub(super) name: String,
}

/// Opens the image at this place of the command line.
pub(super) fn open(place: usize, source: &Source, args: &SourceArgs) -> Result<Opened, CliError> {
    let name = source.to_string();
    let mut limits = Limits::default();
    limits.image_bytes = args.max_size.as_u64();
    limits.ratio = args.max_ratio;
    let options = Options { platform: args.platform.clone(), limits, scratch: args.scratch.clone() };
    let files = confined::files(place, source, &args.means());
    let image = source.open_with(&files, &options).map_err(|e| failed("open", &name, &e))?;
    Ok(Opened { image, name })
}

/// Reads the tree of an image.
pub(super) fn tree(opened: &Opened, args: &SourceArgs, digests: bool) -> Result<Tree, CliError> {
    let options = TreeOptions { entries: args.max_entries, bytes: args.max_size.as_u64(), digests };
    let bar = bar(None);
    let tree = Tree::read(&opened.image, &options, &mut |bytes| bar.set_position(bytes));
    bar.finish_and_clear();
    tree.map_err(|e| failed("read", &opened.name, &e))
}

/// What a reader of the image said, somewhere among the causes of an error of whoever read it. It names layer and digest by
/// itself.
pub(super) fn image_error<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e ImageError> {
    let mut cause = Some(error);
    while let Some(inner) = cause {
        let carried = inner.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let found = inner.downcast_ref().or_else(|| carried.and_then(|carried| carried.downcast_ref()));
        if found.is_some() {
            return found;
        }
        cause = inner.source();
    }
    None
}

/// `cannot {doing} {name}`, the causes, and what helps.
pub(super) fn failed(doing: &str, name: &str, error: &ImageError) -> CliError {
    let mut text = format!("cannot {doing} {name}: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    match error {
        ImageError::NoSpace { .. } => text.push_str(" (name a directory with more space with --scratch)"),
        ImageError::Limit { .. } if !text.contains("--max-") => {
            text.push_str(" (--max-size and --max-ratio raise the limits of layers)");
        }
        _ => {}
    }
    text.into()
}
