//! Two stacks of layers as disks, for the service VM that compares them.
//!
//! ```text
//!   ids ─► pair: both stacks at one moment ─► chain_disks: open the files ─► still the same layers? ─► hold_still ─► job
//! ```
//!
//! Files are opened by name, and the snapshot is checked again afterwards: files of a later layer of the same id must
//! not pass for those of the one that was looked up. Called by `apply` (for the lowers), `diff`, `pristine` and
//! `scrub`.

use super::{
    DriverError, blocking, error::unfinished, home::Home, live::Stillness, open, remembered::Sandbox, sandbox,
};
use crate::{
    error::CorruptFile,
    store::{LayerId, LayerState, Member, Snapshot, SnapshotKind, StoreError, layout},
    svm::{CompareJob, ContainerId, DiskSource, LayerDisk, LayerKind, LiveControl, ParentDisks},
};
use std::sync::Arc;
use vhd_image::vhd;

/// A layer and the one that it is compared with, both at one moment.
pub(super) struct Pair {
    pub(super) target: Snapshot,
    other: Option<Snapshot>,
    /// `other` is the layer's own parent, or neither exists.
    pub(super) own: bool,
}

fn moved(id: &LayerId) -> DriverError {
    StoreError::WrongState {
        id: id.clone(),
        reason: "it was removed or changed by another request while it was being read; try again".into(),
    }
    .into()
}

/// Two stacks as disks, ready for a job.
pub(super) struct Comparison {
    pub(super) target: Vec<LayerDisk>,
    pub(super) parent: ParentDisks,
    pub(super) live: Option<Arc<Stillness>>,
}

/// The disks of a stack, top first and each once, by the names under which they are mounted. Of equal layers in one stack
/// only the upper one shows.
pub(super) fn disks_of(snapshot: &Snapshot) -> Vec<LayerId> {
    let with_disk = |m: &&Member| matches!(m.meta.state, LayerState::Applied | LayerState::Sandbox);
    let mut disks: Vec<LayerId> = Vec::new();
    for disk in snapshot.members().filter(with_disk).map(Member::disk_id) {
        if !disks.contains(disk) {
            disks.push(disk.clone());
        }
    }
    disks
}

/// The control over live sandboxes, as leases take it.
pub(super) fn control(live: Option<Arc<Stillness>>) -> Option<Arc<dyn LiveControl>> {
    live.map(|live| live as Arc<dyn LiveControl>)
}

impl Comparison {
    pub(super) fn job(self) -> CompareJob {
        CompareJob { target: self.target, parent: self.parent, live: control(self.live) }
    }
}

/// Whose layer to take from the scratch disk of a container under runhcs: of a disk that several containers use, that of
/// the key's last part, `<namespace>/<number>/<container>`; otherwise the only one in it. `has_users` says whether other
/// snapshots depend on this one; of a container these are those that use its disk.
fn container_in(member: &Member, has_users: bool) -> Option<ContainerId> {
    let snapshot = member.meta.snapshot.as_ref().filter(|s| s.kind == SnapshotKind::Active)?;
    let shared = has_users || snapshot.scratch_of.is_some();
    if shared { snapshot.name.rsplit('/').next()?.parse().ok() } else { None }
}

impl Home {
    /// Looks up a layer and the one it is compared with. A layer that was only created gets its sandbox first, so that
    /// there is something to compare.
    pub(super) async fn pair(self: &Arc<Self>, id: &str, parent: &str) -> Result<Pair, DriverError> {
        /// Attempts for a layer that other requests keep changing.
        const LOOKS: usize = 16;
        let id: LayerId = id.parse()?;
        let parent = if parent.is_empty() { None } else { Some(parent.parse::<LayerId>()?) };
        for _ in 0..LOOKS {
            let (target, other) = self.store.snapshots(&id, parent.as_ref())?;
            match target.top.meta.state {
                LayerState::Applying => return Err(unfinished(&id)),
                LayerState::Created => self.materialize(&id).await?,
                LayerState::Applied | LayerState::Sandbox => {
                    let own = parent.as_ref() == target.top.layer.parent();
                    return Ok(Pair { target, other, own });
                }
            }
        }
        Err(moved(&id))
    }

    pub(super) async fn comparison(self: &Arc<Self>, pair: Pair) -> Result<Comparison, DriverError> {
        let home = self.clone();
        let stacks = blocking(move || {
            let mut sandboxes = Vec::new();
            let target = home.chain_disks(&pair.target, &mut sandboxes)?;
            let mut below = Vec::new();
            let parent = match pair.other {
                _ if pair.own => ParentDisks::Own,
                Some(parent) => ParentDisks::Chain(home.chain_disks(&parent, &mut below)?),
                None => ParentDisks::None,
            };
            sandboxes.extend(below.into_iter().map(|sandbox| Sandbox { in_target: None, ..sandbox }));
            Ok((target, parent, sandboxes))
        });
        let (mut target, mut parent, sandboxes) = stacks.await?;
        let live = self.hold_still(sandboxes, &mut target, &mut parent).await?;
        Ok(Comparison { target, parent, live })
    }

    /// A layer and its ancestors as disks; layers that were only created have none. Appends the sandboxes among them to
    /// `sandboxes`.
    pub(super) fn chain_disks(
        &self,
        snapshot: &Snapshot,
        sandboxes: &mut Vec<Sandbox>,
    ) -> Result<Vec<LayerDisk>, DriverError> {
        let mut disks = Vec::new();
        for member in snapshot.members() {
            let id = &member.layer.id;
            match member.meta.state {
                LayerState::Created => {}
                LayerState::Applying => return Err(unfinished(id)),
                LayerState::Applied => {
                    disks.push(LayerDisk { disk: self.image_disk(member)?, kind: LayerKind::Applied });
                }
                LayerState::Sandbox => {
                    let path = sandbox::path(self.store.layout(), id);
                    let file = Arc::new(open(&path)?);
                    let length = file.metadata().map_err(DriverError::io("measure", &path))?.len();
                    let vhdx = path.ends_with(layout::SANDBOX_VHDX_FILE);
                    let in_target = u16::try_from(disks.len()).ok();
                    let layer = member.layer.clone();
                    sandboxes.push(Sandbox { layer, file: file.clone(), in_target });
                    let disk = DiskSource::read_only(file, path);
                    let disk = if vhdx {
                        disk.vhdx()
                    } else {
                        disk.window(0, length.saturating_sub(vhd::FOOTER_SIZE as u64))
                    };
                    // A snapshot's VHDX is for runhcs, which has a place of its own in it.
                    let kind = match &member.meta.snapshot {
                        Some(_) if vhdx => {
                            LayerKind::Scratch(container_in(member, !self.store.children(id).is_empty()))
                        }
                        _ => LayerKind::Sandbox,
                    };
                    disks.push(LayerDisk { disk, kind });
                }
            }
        }
        // The files were opened by name and may be those of a later layer of the same id.
        if self.store.is_current(snapshot) { Ok(disks) } else { Err(moved(snapshot.id())) }
    }

    pub(super) fn image_disk(&self, member: &Member) -> Result<DiskSource, DriverError> {
        let path = self.store.layout().layer_file(&member.layer.id, layout::LAYER_FILE);
        let applied = member
            .meta
            .applied
            .as_ref()
            .ok_or_else(|| CorruptFile::new(&path, "layer.json does not describe it"))?;
        Ok(DiskSource::read_only(Arc::new(open(&path)?), path).window(0, applied.image_bytes))
    }

    /// Image and exact record of an applied layer.
    pub(super) fn exact_disks(&self, snapshot: &Snapshot) -> Result<(DiskSource, DiskSource), DriverError> {
        let record = self.store.layout().layer_file(snapshot.id(), layout::RECORD_FILE);
        let file = open(&record)?;
        let image = self.image_disk(&snapshot.top)?;
        if !self.store.is_current(snapshot) {
            return Err(moved(snapshot.id()));
        }
        Ok((image, DiskSource::read_only(Arc::new(file), record)))
    }
}
