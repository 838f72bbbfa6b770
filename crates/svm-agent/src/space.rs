//! Room of the file system on a disk: more of it.
//!
//! ```text
//!   operation ─► Codec::grow ─► grow ─► ext4_image::offline      what is written is durable
//! ```

use super::disk::OpDisk;
use ext4_image::offline::{self, GrowOptions};
use std::ops::Range;
use svm_protocol::{GrowSummary, WireError};

/// Lets the file system on a disk grow to `bytes`. `data` are the ranges of the disk that may not be zeros.
pub(crate) fn grow(disk: &OpDisk, bytes: u64, data: Vec<Range<u64>>) -> Result<GrowSummary, WireError> {
    let options = GrowOptions { dirty: data, unfinished: false };
    let grown = offline::grow(disk, bytes, &options)?;
    Ok(GrowSummary { old_bytes: grown.old_bytes, new_bytes: grown.new_bytes })
}
