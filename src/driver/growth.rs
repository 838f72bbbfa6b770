//! The second pair of files of an apply that needs larger blocks.
//!
//! ```text
//!   staging/<id>.<n>/ layer.vhd  layer.exact      begun in small blocks ─► emptied when they were read back
//!                     larger.vhd larger.exact     what the apply goes on with ─► renamed to the usual names at its end
//! ```
//!
//! For a while image and record exist twice, so the disk needs free space for a second copy of them, beyond
//! `lcow.minfree`. Called by `apply`; the pool requests the second pair.

use super::{DriverError, blocking, home::Home};
use crate::{
    store::{allocated_bytes, files, layout},
    svm::{DiskSource, SecondPair},
};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Names of the second pair in a staging directory.
const NAMES: [&str; 2] = ["larger.vhd", "larger.exact"];
/// Their final names, which the first pair has until then.
const PLACES: [&str; 2] = [layout::LAYER_FILE, layout::RECORD_FILE];

/// Image and record of an apply.
#[derive(Clone)]
pub(super) struct Files(Arc<Inner>);

struct Inner {
    home: Arc<Home>,
    staged: PathBuf,
    first: [DiskSource; 2],
    second: Mutex<Option<[DiskSource; 2]>>,
}

fn make(path: &Path) -> Result<DiskSource, DriverError> {
    let file = files::create_private(path).map_err(DriverError::io("create", path))?;
    Ok(DiskSource::read_write(Arc::new(file), path))
}

impl Files {
    /// The first pair, in a staging directory.
    pub(super) fn new(home: Arc<Home>, staged: &Path) -> Result<Self, DriverError> {
        let first = [make(&staged.join(PLACES[0]))?, make(&staged.join(PLACES[1]))?];
        Ok(Self(Arc::new(Inner { home, staged: staged.to_owned(), first, second: Mutex::new(None) })))
    }

    /// Image and record that the apply begins with.
    pub(super) fn first(&self) -> (DiskSource, DiskSource) {
        let [image, record] = &self.0.first;
        (image.clone(), record.clone())
    }

    /// Image and record that the apply ended with, under their usual names. Blocks.
    ///
    /// # Errors
    /// The second pair could not be renamed.
    pub(super) fn last(self) -> Result<(DiskSource, DiskSource), DriverError> {
        let Some([image, record]) = self.0.second.lock().take() else { return Ok(self.first()) };
        let moved = |disk: DiskSource, name: &str| {
            let path = self.0.staged.join(name);
            files::rename(&disk.path, &path).map_err(DriverError::io("rename", &disk.path))?;
            Ok::<_, DriverError>(DiskSource { path, ..disk })
        };
        Ok((moved(image, PLACES[0])?, moved(record, PLACES[1])?))
    }
}

impl Inner {
    fn make_second(&self) -> Result<(DiskSource, DiskSource), DriverError> {
        let mut taken = 0;
        for disk in &self.first {
            let metadata = disk.file.metadata().map_err(DriverError::io("measure", &disk.path))?;
            taken += allocated_bytes(&metadata);
        }
        if let Some(free) = self.home.free_bytes() {
            let reserve = self.home.options.min_free_bytes.saturating_add(taken);
            self.home.store.check_reserve(reserve, free).map_err(|error| {
                DriverError::Usage(format!("{error} (lcow.minfree, and {taken} bytes for the layer so far)"))
            })?;
        }
        let pair = [make(&self.staged.join(NAMES[0]))?, make(&self.staged.join(NAMES[1]))?];
        let [image, record] = pair.clone();
        *self.second.lock() = Some(pair);
        Ok((image, record))
    }
}

impl SecondPair for Files {
    fn make(&self) -> BoxFuture<'_, io::Result<(DiskSource, DiskSource)>> {
        let inner = self.0.clone();
        Box::pin(async {
            let made = blocking(move || inner.make_second()).await;
            made.map_err(|error| io::Error::other(crate::error::with_causes(&error)))
        })
    }
}
