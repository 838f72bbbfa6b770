//! Which parts of a sparse file have data.
//!
//! ```text
//!   SEEK_DATA ─► start ─ SEEK_HOLE ─► end ─► …          elsewhere, or without holes: the whole file
//! ```
//!
//! Called by `driver` and `cli`.

use std::{fs::File, ops::Range};

/// The ranges of a file that have data, if its file system reports them; otherwise the whole file.
#[cfg_attr(not(target_os = "linux"), expect(unused_variables, reason = "only Linux reports holes here"))]
pub fn data_ranges(file: &File, bytes: u64) -> Vec<Range<u64>> {
    #[cfg(target_os = "linux")]
    {
        let mut ranges = Vec::new();
        let mut at = 0;
        // An error means the end of the data, or a file system that does not report holes.
        while let Ok(start) = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            let Ok(end) = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)) else { break };
            if start >= bytes {
                return ranges;
            }
            ranges.push(start..end.min(bytes));
            at = end;
        }
        if at > 0 || file.metadata().is_ok_and(|known| known.len() > 0 && is_hole(file)) {
            return ranges;
        }
    }
    std::iter::once(0..bytes).collect()
}

/// Whether the file system reports that a file without data is one hole.
#[cfg(target_os = "linux")]
fn is_hole(file: &File) -> bool {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(0)) == Ok(0)
}
