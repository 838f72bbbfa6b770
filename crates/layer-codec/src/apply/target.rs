//! What the entries of a tar go into: one for each profile.

use super::LowerLayers;
use crate::DiffError;
use ext4_image::writer::{ImageSummary, NodeId, Placed};
use layer_tar::Entry;

/// Where the data of an entry go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// Into this file.
    Data(NodeId),
    /// There are none, or they are not kept in the image.
    Nothing,
}

/// Takes entries and their data, in the order of the stream.
pub(super) trait Target {
    /// Gives an entry its place.
    fn entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError>;

    /// Opens a file of `size` bytes (not 0) that [`Self::entry`] gave.
    fn begin_file(&mut self, node: NodeId, size: u64) -> Result<(), DiffError>;

    /// Data of the open file at a place that is not below the last one's end; tells where they live.
    fn write_data(
        &mut self,
        offset: u64,
        data: &[u8],
        placed: &mut dyn FnMut(Placed),
    ) -> Result<(), DiffError>;

    /// All data that were placed so far can be read from the disk.
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

    /// Settles what could not be settled before; the sum of the sizes of regular files and symlinks.
    fn settle(&mut self, lowers: &mut dyn LowerLayers) -> Result<u64, DiffError>;

    /// Completes the image of a tar with this digest.
    fn finish(self, tar_digest: [u8; 32]) -> Result<ImageSummary, DiffError>;
}
