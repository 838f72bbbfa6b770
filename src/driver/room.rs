//! Room on the home's disk while a layer is made.
//!
//! ```text
//!   body of an ApplyDiff ─► watched: after each 32 MiB, is lcow.minfree still there? ─► service VM
//!   files that came back ─► settle: cut to their lengths, blocks held against them ─► commit
//! ```
//!
//! The reserve is looked at before an apply begins; a tar of a terabyte, or a worker that writes more than it should,
//! would use it up in between. And a file may have blocks behind its end that its length does not show. Called by
//! `apply`.

use super::{DriverError, home::Home, on_disk_thread};
#[cfg(unix)]
use crate::error::CorruptFile;
use crate::svm::DiskSource;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::{io, sync::Arc};

/// Bytes of a tar after which the reserve is looked at again.
const LOOK_EVERY: u64 = 32 << 20;

/// `body`, which fails as soon as the disk has less than the reserve.
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

/// Gives back what a finished file has behind its end, and holds its blocks against its length.
///
/// # Errors
/// [`CorruptFile`] for a file that takes more room than its length; what the system says.
pub(super) fn settle(disk: &DiskSource) -> Result<(), DriverError> {
    let measure = DriverError::io("measure", &disk.path);
    let length = disk.file.metadata().map_err(measure)?.len();
    // To the length that it has: file systems then drop blocks that were reserved behind it.
    disk.file.set_len(length).map_err(DriverError::io("cut", &disk.path))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        /// Bytes of a unit of `st_blocks`.
        const UNIT: u64 = 512;
        // What a file system may count for its own: trees of extents, clusters, attributes.
        let own = length / 64 + (4 << 20);
        let taken = disk.file.metadata().map_err(DriverError::io("measure", &disk.path))?.blocks() * UNIT;
        if taken > length + own {
            let reason = format!("it has {length} bytes and takes {taken} on the disk");
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
