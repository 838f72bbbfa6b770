//! Receives the entries of a tar: implemented by each profile, called by `apply`.

use super::{LowerLayers, usage::Usage};
use crate::DiffError;
use ext4_image::writer::{ImageSummary, NodeId, Placed};
use layer_tar::Entry;

/// Destination of the data of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// This file.
    Data(NodeId),
    /// None: there are no data, or they are not stored in the image.
    Nothing,
}

/// What is known once everything is settled.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Settled {
    /// Sum of the sizes of regular files and symlinks.
    pub(super) diff_size: u64,
    /// See [`super::ApplySummary::implied_directories`].
    pub(super) implied_directories: u64,
    /// Hard links into layers below.
    pub(super) lower_links: u64,
    /// What the layer takes as an upper directory.
    pub(super) usage: Usage,
}

/// Takes entries and their data, in the order of the stream.
pub(super) trait Target {
    /// Adds an entry.
    fn entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError>;

    /// Opens a file of `size` bytes (not 0) that [`Self::entry`] gave.
    fn begin_file(&mut self, node: NodeId, size: u64) -> Result<(), DiffError>;

    /// Writes data of the open file at an offset that is not before the end of the previous data; reports where they are.
    fn write_data(
        &mut self,
        offset: u64,
        data: &[u8],
        placed: &mut dyn FnMut(Placed),
    ) -> Result<(), DiffError>;

    /// Makes all data that were written so far readable from the disk.
    fn flush(&mut self) -> Result<(), DiffError> {
        Ok(())
    }

    /// Ends the open file.
    fn end_file(&mut self) -> Result<(), DiffError>;

    /// The error for a limit that the current entry exceeds.
    fn limit(&self, what: &'static str, limit: u64) -> DiffError;

    /// The stream is at its end. `go_differs`: see [`layer_tar::TarReader::go_differs`].
    fn end_of_stream(&mut self, _go_differs: Option<&'static str>) -> Result<(), DiffError> {
        Ok(())
    }

    /// Settles what could not be settled before.
    fn settle(&mut self, lowers: &mut dyn LowerLayers) -> Result<Settled, DiffError>;

    /// Completes the image of a tar with this digest.
    fn finish(self, tar_digest: [u8; 32]) -> Result<ImageSummary, DiffError>;
}
