//! `image cat`: one file of an image. Called by `cli::image`.

use super::{CatArgs, open};
use crate::cli::{CliError, layer::standard_output};
use oci_image::{
    ImageError,
    tree::{NodeKind, copy_file},
};
use std::{io::BufWriter, io::Write as _, process::ExitCode};

/// Bytes that are written at a time.
const BUFFER: usize = 256 << 10;

pub(super) fn cat(args: &CatArgs) -> Result<ExitCode, CliError> {
    let opened = open::open(0, &args.image, &args.source)?;
    let tree = open::tree(&opened, &args.source, false)?;
    let node = tree
        .find(args.path.as_bytes(), true)
        .map(|id| tree.node(id))
        .map_err(|e| open::failed("read", &opened.name, &e))?;
    let doing = format!("read {:?} of", args.path);
    if node.kind != NodeKind::File {
        return Err(format!("cannot {doing} {}: it is not a regular file", opened.name).into());
    }
    let mut out = BufWriter::with_capacity(BUFFER, standard_output()?);
    match copy_file(&opened.image, node, &mut out) {
        // Kept as it is, so that a closed pipe is recognized.
        Err(ImageError::Write { source, .. }) => return Err(source.into()),
        other => other.map_err(|e| open::failed(&doing, &opened.name, &e))?,
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
