//! Disk space while a layer is made.
//!
//! ```text
//!   body of an ApplyDiff ─► watched: after each 32 MiB, is lcow.minfree still there? ─► service VM
//!   files that came back ─► settle: cut to their lengths, blocks held against them ─► commit
//! ```
//!
//! The reserve is checked before an apply begins, but a tar of a terabyte, or a worker that writes too much, could use
//! it up in between. And a file may have blocks beyond its end, which its length does not show. Called by `apply`.

use super::{DriverError, home::Home, on_disk_thread};
#[cfg(unix)]
use crate::error::CorruptFile;
use crate::svm::DiskSource;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::{io, sync::Arc};

/// Bytes of a tar between two checks of the reserve.
const LOOK_EVERY: u64 = 32 << 20;

/// `body`, but fails as soon as less than the reserve is free.
pub(super) fn watched<S>(body: S, home: Arc<Home>) -> impl Stream<Item = io::Result<Bytes>> + Send
where
    S: Stream<Item = io::Result<Bytes>> + Send,
{
    let mut since = 0;
    body.then(move |chunk| {
        since += chunk.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let due = since >= LOOK_EVERY;
        if due {
            since = 0;
        }
        let home = home.clone();
        async move {
            let chunk = chunk?;
            if due {
                on_disk_thread(move |thread| home.check_reserve(thread)).await.map_err(io::Error::other)?;
            }
            Ok(chunk)
        }
    })
}

/// Frees blocks beyond the end of a finished file, and compares its blocks with its length.
///
/// # Errors
/// [`CorruptFile`] if the file takes more space than its length; I/O errors.
pub(super) fn settle(disk: &DiskSource) -> Result<(), DriverError> {
    let measure = DriverError::io("measure", &disk.path);
    let length = disk.file.metadata().map_err(measure)?.len();
    // To its current length: file systems then drop blocks that were allocated beyond it.
    disk.file.set_len(length).map_err(DriverError::io("cut", &disk.path))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        /// Unit of `st_blocks`, in bytes.
        const UNIT: u64 = 512;
        // What a file system may count for itself: extent trees, clusters, attributes.
        let own = length / 64 + (4 << 20);
        let taken = disk.file.metadata().map_err(DriverError::io("measure", &disk.path))?.blocks() * UNIT;
        if taken > length + own {
            let reason = format!("it has {length} bytes but takes {taken} on the disk");
            return Err(CorruptFile::new(disk.path.clone(), reason).into());
        }
    }
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, fallocate};
    use std::{fs::File, os::unix::fs::MetadataExt};

    #[test]
    fn room_behind_the_end_of_a_finished_file_is_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layer.vhd");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 64 << 20).unwrap();
        let taken = |file: &File| file.metadata().unwrap().blocks() * 512;
        assert!(taken(&file) >= 64 << 20, "the file system has such room");
        let disk = DiskSource::read_write(Arc::new(file), &path);
        settle(&disk).unwrap();
        assert!(taken(&disk.file) <= 2 << 20 && disk.file.metadata().unwrap().len() == 1 << 20);
    }
}
