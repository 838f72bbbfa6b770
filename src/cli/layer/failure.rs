//! Errors of `layer`: what was being done, to which file, why it failed, and what helps.

use crate::cli::CliError;
use ext4_image::Ext4Error;
use layer_codec::DiffError;
use std::{error::Error, fmt::Write as _, io, path::Path};

/// The reader closed the output: this is no failure, and there is nothing left to report.
#[derive(Debug, thiserror::Error)]
#[error("the reader closed the output")]
struct ClosedPipe;

/// Whether an error only means that the reader closed the output.
pub(super) fn is_closed_pipe(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(|e| {
        e.is::<ClosedPipe>()
            || e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |e: &&'a (dyn Error + 'static)| {
        let e: &'a (dyn Error + 'static) = *e;
        e.source()
    })
}

/// `cannot {doing} '{path}'`, the causes, and what helps.
pub(in crate::cli) fn failed(doing: &str, path: &Path, error: &(dyn Error + 'static)) -> CliError {
    if is_closed_pipe(error) {
        return Box::new(ClosedPipe);
    }
    let mut text = format!("cannot {doing} {}", shown(path));
    for cause in causes(error) {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {cause}");
    }
    if let Some(help) = causes(error).find_map(help) {
        let _ = write!(text, " ({help})");
    }
    text.into()
}

/// A path as messages show it.
pub(in crate::cli) fn shown(path: &Path) -> String {
    if path.as_os_str() == "-" { "the standard stream".to_owned() } else { format!("'{}'", path.display()) }
}

/// What the caller can do about an error.
fn help(error: &(dyn Error + 'static)) -> Option<&'static str> {
    if let Some(e) = error.downcast_ref::<io::Error>() {
        return match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Some("free some space there, or write to another disk")
            }
            io::ErrorKind::NotFound => Some("check the path"),
            _ => None,
        };
    }
    if let Some(e) = error.downcast_ref::<Ext4Error>() {
        return match e {
            Ext4Error::Full { .. } => Some("raise --max-size"),
            _ => None,
        };
    }
    match error.downcast_ref::<DiffError>()? {
        DiffError::Vhd(_) => Some("a VHD holds at most 2040 GiB"),
        DiffError::Corrupt { what, .. } if what.contains("record") => {
            Some("image and record must come unchanged from the same `layer pack`")
        }
        _ => None,
    }
}
