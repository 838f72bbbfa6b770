//! Layers that are written to while they are read.
//!
//! ```text
//!   frozen    metadata of all files ─► memory; bytes of recently changed files ─► scratch
//!   thawed    the other files' bytes are read from the disk
//!   frozen    have the other files changed? ─► an error that names them, so that they are copied next time
//! ```
//!
//! A header is sent before its data, and a change is found only at the end, when it is too late to read the file again. So
//! files that are likely to change are copied beforehand. Only files whose bytes were read while thawed are checked again:
//! a tar shows the layers as they were at the first freeze. Called by [`super::export`] and [`super::changes`].

use super::{
    DiffError,
    details::{Detail, Details, Stamp},
    fs::Range,
    view::{LayerInode, Table},
    walk::{Items, Status},
};
use disk_io::{ReadAt, WriteAt};
use ext4_image::FileKind;
use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::Arc,
    time::{Duration, Instant},
};

/// Bytes copied at once.
const COPY: usize = 1 << 20;
/// The most changed files that an error names, and the most that it lists by layer and inode.
const MAX_NAMED: usize = 8;
const MAX_TOLD: usize = 1024;

/// A file of a live layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LiveFile {
    /// Index of its layer in the target.
    pub layer: u16,
    /// Its inode.
    pub inode: u32,
}

/// What to copy of live layers while they are frozen.
pub struct Copies {
    /// An empty disk; useless afterwards.
    pub scratch: Arc<dyn WriteAt>,
    /// Files whose ctime is at or after this are copied; seconds since 1970.
    pub since: i64,
    /// These are copied first: an earlier attempt failed because they changed.
    pub changed: Vec<LiveFile>,
    /// The most bytes in total.
    pub most_bytes: u64,
    /// The longest time in total.
    pub most_time: Duration,
}

impl std::fmt::Debug for Copies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copies").field("since", &self.since).finish_non_exhaustive()
    }
}

/// A file whose bytes are read while the file system is thawed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Read {
    pub(super) node: LayerInode,
    /// In [`Details::list`].
    pub(super) detail: u32,
    /// The item that it was read for, in [`Items::items`].
    pub(super) item: usize,
}

impl Details {
    /// Notes where the bytes of live files are that are compared later. `detailed`: those of the target are noted already.
    pub(super) fn capture<R: ReadAt>(
        &mut self,
        table: &Table<'_, R>,
        items: &Items,
        detailed: bool,
    ) -> Result<(), DiffError> {
        for item in &items.items {
            let Status::Pending(was) = item.status else { continue };
            for (node, noted) in [(item.node, detailed.then_some(item.detail)), (was, None)] {
                if !table.is_live(node.layer) || self.captured.contains_key(&node) {
                    continue;
                }
                let detail = match noted {
                    Some(detail) => detail,
                    None => self.note(table, node, &table.inode(node)?)?,
                };
                self.captured.insert(node, detail);
            }
        }
        Ok(())
    }

    /// The live files that will be read while thawed: those to be compared, and those of `streamed`.
    pub(super) fn reads(
        &self,
        items: &Items,
        streamed: impl Fn(usize) -> bool,
    ) -> impl Iterator<Item = Read> {
        let reads = items.items.iter().enumerate().flat_map(move |(at, item)| {
            let mut here = [None, None, None];
            if let Status::Pending(was) = item.status {
                for (place, node) in here.iter_mut().zip([item.node, was]) {
                    *place = self.captured.get(&node).map(|detail| Read { node, detail: *detail, item: at });
                }
            }
            if streamed(at) && item.kind == FileKind::File {
                here[2] = Some(Read { node: item.node, detail: item.detail, item: at });
            }
            here.into_iter().flatten()
        });
        reads.filter(|read| {
            self.list.get(read.detail as usize).is_some_and(|detail| {
                // What is inside the inode, or nothing but holes, was read with it.
                detail.stamp != u32::MAX && !detail.copied && detail.ranges.len > 0
            })
        })
    }

    /// Copies the files of `reads` that `copies` selects; those that do not fit are read from the disk later.
    pub(super) fn copy<R: ReadAt>(
        &mut self,
        table: &Table<'_, R>,
        reads: Vec<Read>,
        copies: Copies,
    ) -> Result<(), DiffError> {
        let begun = Instant::now();
        let changed: HashSet<LiveFile> = copies.changed.into_iter().collect();
        // A file with several names is several details of one place.
        let mut files: HashMap<LayerInode, (bool, u64, Vec<u32>)> = HashMap::new();
        for read in reads {
            let Some(detail) = self.list.get(read.detail as usize) else { continue };
            let Some(stamp) = self.stamps.get(detail.stamp as usize) else { continue };
            let named = changed.contains(&LiveFile { layer: read.node.layer, inode: read.node.ino });
            if !named && stamp.ctime.secs < copies.since {
                continue;
            }
            let bytes = self.ranges_of(detail).iter().fold(0u64, |sum, range| sum.saturating_add(range.len));
            match files.entry(read.node) {
                Entry::Occupied(mut known) => known.get_mut().2.push(read.detail),
                Entry::Vacant(new) => {
                    new.insert((named, bytes, vec![read.detail]));
                }
            }
        }
        let mut files: Vec<_> = files.into_iter().collect();
        files.sort_unstable_by_key(|(node, (named, bytes, _))| (!named, *bytes, *node));
        let mut at = 0u64;
        let mut buffer = Vec::new();
        for (node, (_, bytes, details)) in files {
            if bytes > copies.most_bytes - at {
                continue;
            }
            if !self.copy_file(table, node, &details, &*copies.scratch, at, &mut buffer, || {
                begun.elapsed() <= copies.most_time
            })? {
                break;
            }
            at += bytes;
        }
        self.scratch = Some(copies.scratch);
        Ok(())
    }

    /// Copies one file to `at`; false if the time is over, and then it is read from the disk later.
    #[allow(clippy::too_many_arguments, reason = "each is a thing of its own")]
    fn copy_file<R: ReadAt>(
        &mut self,
        table: &Table<'_, R>,
        node: LayerInode,
        details: &[u32],
        scratch: &dyn WriteAt,
        at: u64,
        buffer: &mut Vec<u8>,
        in_time: impl Fn() -> bool,
    ) -> Result<bool, DiffError> {
        let fs = table.fs(node.layer)?;
        let Some(first) = details.first().and_then(|n| self.list.get(*n as usize)) else { return Ok(true) };
        let mut place = at;
        for range in self.ranges_of(first) {
            let mut done = 0;
            while done < range.len {
                if !in_time() {
                    return Ok(false);
                }
                let n = (range.len - done).min(COPY as u64);
                buffer.resize(n as usize, 0);
                fs.read(node.ino, range.disk + done, buffer)?;
                scratch.write_all_at(buffer, place).map_err(DiffError::io("copying a file to scratch"))?;
                done += n;
                place += n;
            }
        }
        for number in details {
            let Some(detail) = self.list.get_mut(*number as usize) else { continue };
            detail.copied = true;
            let span = detail.ranges;
            let mut place = at;
            for range in self.ranges.get_mut(span.at..span.at + span.len).unwrap_or_default() {
                range.disk = place;
                place += range.len;
            }
        }
        Ok(true)
    }

    /// The files of `reads` that have changed, according to the disk now; nothing cached is used.
    pub(super) fn changed<R: ReadAt>(
        &self,
        table: &Table<'_, R>,
        reads: impl Iterator<Item = Read>,
    ) -> Result<Vec<Read>, DiffError> {
        let (mut fresh, mut known) = (HashMap::new(), HashMap::new());
        let mut changed = Vec::new();
        let mut now: Vec<Range> = Vec::new();
        for read in reads {
            let same = match known.entry(read.node) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let fs = match fresh.entry(read.node.layer) {
                        Entry::Occupied(known) => known.into_mut(),
                        Entry::Vacant(new) => new.insert(table.opened_anew(read.node.layer)?),
                    };
                    now.clear();
                    let same = self.list.get(read.detail as usize).is_some_and(|detail| {
                        fs.inode(read.node.ino).is_ok_and(|inode| {
                            inode.kind == FileKind::File
                                && self.stamps.get(detail.stamp as usize) == Some(&Stamp::of(&inode))
                                && fs.ranges(&inode, &mut now).is_ok()
                                && now == self.ranges_of(detail)
                        })
                    });
                    *new.insert(same)
                }
            };
            if !same {
                changed.push(read);
            }
        }
        Ok(changed)
    }

    fn ranges_of(&self, detail: &Detail) -> &[Range] {
        self.ranges.get(detail.ranges.at..detail.ranges.at + detail.ranges.len).unwrap_or_default()
    }

    /// The error for files that changed.
    pub(super) fn changed_error(
        &self,
        items: &Items,
        mut changed: Vec<Read>,
        most_bytes: Option<u64>,
    ) -> DiffError {
        // Names of one file are one file.
        let mut seen = HashSet::new();
        changed.retain(|read| seen.insert(read.node));
        let mut names = Vec::new();
        let mut too_large = false;
        for read in changed.iter().take(MAX_NAMED) {
            let mut path = Vec::new();
            if let Some(item) = items.items.get(read.item) {
                items.path(item, &mut path);
            }
            let ranges = self.list.get(read.detail as usize).map(|detail| self.ranges_of(detail));
            let bytes =
                ranges.unwrap_or_default().iter().fold(0u64, |sum, range| sum.saturating_add(range.len));
            too_large |= most_bytes.is_some_and(|most| bytes > most);
            names.push(format!("{:?}", String::from_utf8_lossy(&path)));
        }
        if changed.len() > MAX_NAMED {
            names.push(format!("{} other files", changed.len() - MAX_NAMED));
        }
        let advice = match most_bytes {
            Some(most) if too_large => format!(
                "; more than {} MiB cannot be copied while the container stands still: pause it, or stop what writes there",
                most >> 20
            ),
            Some(_) => "; the next attempt copies it while the container stands still".to_owned(),
            None => String::new(),
        };
        let files = changed
            .iter()
            .take(MAX_TOLD)
            .map(|r| LiveFile { layer: r.node.layer, inode: r.node.ino })
            .collect();
        DiffError::ChangedWhileReading { names: names.join(", "), advice, files }
    }
}
