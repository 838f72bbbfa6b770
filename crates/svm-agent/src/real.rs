//! The codec of the agent: calls `layer-codec` and `ext4-image`, and turns their errors into [`WireError`]s.
//!
//! ```text
//!   operation ─► Codec ─► RealCodec ─► apply, record, export, changes, check
//!   daemon   ◄─ Live, Lowers, Growing ◄─ LiveHooks, LayerChain, Growth          an error of the daemon comes back unchanged
//! ```
//!
//! Holds no policy: limits and layout are in the options. Called by `operation` through [`Codec`].

use super::{
    codec::{
        AttachedLayer, CanonicalTar, ChangeSink, Codec, Copies, Growing, Live, Lowers, Parent, TarInput,
    },
    disk::OpDisk,
};
use disk_io::{ReadAt, StreamOut, WriteAt};
use ext4_image::{
    Ext4,
    check::{CheckLimits, check},
};
use layer_codec::{
    DiffError, ExportOptions, Foreign, LayerSource, LiveHooks, Mounter, NoHooks, ParentLayer, ParentSpec,
    apply::{self, ApplyResources, LayerChain},
    canonical, record,
};
use std::{fmt::Write as _, io, sync::Arc};
use svm_protocol::{
    ApplyOptions, ApplySummary, BlankRoot, CheckSummary, ErrorKind, ExportSummary, IdMaps, RootHash,
    WireError,
};

/// The most files that a message names.
const MAX_TOLD: usize = 8;

/// The codec of the agent.
#[derive(Debug, Default)]
pub struct RealCodec {
    /// Mounts sandboxes whose file system the reader does not support; `None` where the kernel is the host's.
    mounter: Option<Arc<dyn Mounter<OpDisk>>>,
}

/// Advice if the option is off.
const ALLOW_MOUNT: &str =
    "lcow.guestmount=true and a virtual machine, lcow.svm=qemu or hcs, would let the guest's kernel read it";
/// Advice if the option is on but the kernel is the host's.
const NO_GUEST: &str =
    "lcow.guestmount=true lets only the kernel of a virtual machine read it: lcow.svm=qemu or hcs";

impl RealCodec {
    /// The codec in a guest, where `mounter` may mount.
    pub fn mounting(mounter: Arc<dyn Mounter<OpDisk>>) -> Self {
        Self { mounter: Some(mounter) }
    }

    fn foreign(&self, layer: &AttachedLayer) -> Foreign<OpDisk> {
        match &self.mounter {
            _ if !layer.guest_mount => Foreign::Refused(ALLOW_MOUNT),
            None => Foreign::Refused(NO_GUEST),
            Some(mounter) => Foreign::Mounted(mounter.clone()),
        }
    }

    fn source(&self, layer: &AttachedLayer, live: bool) -> LayerSource<OpDisk> {
        let sandbox = layer.kind.is_sandbox();
        LayerSource {
            disk: layer.disk.clone(),
            kind: layer.kind,
            live: live && sandbox,
            // With userns-remap, what was written through a mount has host ids; applied layers have the tar's.
            host_ids: sandbox,
            foreign: self.foreign(layer),
        }
    }

    fn sources(&self, layers: &[AttachedLayer], live: bool) -> Vec<LayerSource<OpDisk>> {
        layers.iter().map(|layer| self.source(layer, live)).collect()
    }

    /// The parent's stack, with layers that it shares with the target by their index there.
    fn parent_layers(
        &self,
        target: &[AttachedLayer],
        parent: &Parent,
        live: bool,
    ) -> Vec<ParentLayer<OpDisk>> {
        let Parent::Chain(layers) = parent else { return Vec::new() };
        layers
            .iter()
            .map(|layer| match target.iter().position(|t| t.disk.is_same(&layer.disk)) {
                Some(shared) => ParentLayer::OfTarget(shared),
                None => ParentLayer::Other(self.source(layer, live)),
            })
            .collect()
    }
}

fn parent_spec<'a>(parent: &Parent, layers: &'a [ParentLayer<OpDisk>]) -> Option<ParentSpec<'a, OpDisk>> {
    match parent {
        Parent::None => None,
        Parent::Own => Some(ParentSpec::Own),
        Parent::Chain(_) => Some(ParentSpec::Layers(layers)),
    }
}

/// The daemon's hooks as [`LiveHooks`]; keeps the daemon's own error.
struct Hooks<'a> {
    live: &'a mut dyn Live,
    refused: Option<WireError>,
}

/// Keeps the daemon's own error, which is returned instead of the [`DiffError`] that is made of it here.
fn keep(refused: &mut Option<WireError>, error: WireError) -> DiffError {
    let made = DiffError::Usage(error.message.clone());
    *refused = Some(error);
    made
}

impl Hooks<'_> {
    fn tell(&mut self, outcome: Result<(), WireError>) -> Result<(), DiffError> {
        outcome.map_err(|e| keep(&mut self.refused, e))
    }
}

impl LiveHooks for Hooks<'_> {
    fn copies(&mut self) -> Option<Copies> {
        self.live.copies()
    }

    fn metadata_read(&mut self) -> Result<(), DiffError> {
        let outcome = self.live.metadata_read();
        self.tell(outcome)
    }

    fn before_recheck(&mut self) -> Result<(), DiffError> {
        let outcome = self.live.before_recheck();
        self.tell(outcome)
    }
}

/// The daemon's second pair of disks as [`apply::Growth`].
struct Grown<'a> {
    growing: &'a mut dyn Growing,
    refused: &'a mut Option<WireError>,
}

impl apply::Growth<OpDisk, OpDisk> for Grown<'_> {
    fn disks(&mut self) -> Result<Option<(OpDisk, OpDisk)>, DiffError> {
        self.growing.disks().map(Some).map_err(|e| keep(self.refused, e))
    }

    fn replaying(&mut self, bytes: u64) -> Result<(), DiffError> {
        self.growing.replaying(bytes).map_err(|e| keep(self.refused, e))
    }

    fn replayed(&mut self, image: OpDisk, record: OpDisk) -> Result<(), DiffError> {
        // Frees the host's space; a device keeps its length, and the daemon detaches it.
        for disk in [&image, &record] {
            if let Err(source) = disk.set_len(0)
                && source.kind() != io::ErrorKind::Unsupported
            {
                return Err(DiffError::Io { what: "emptying the first disks", source });
            }
        }
        self.growing.replayed().map_err(|e| keep(self.refused, e))
    }
}

/// Runs something with the daemon's hooks, if there are any.
fn hooked<T>(
    live: Option<&mut dyn Live>,
    run: impl FnOnce(&mut dyn LiveHooks) -> Result<T, DiffError>,
) -> Result<T, WireError> {
    let Some(live) = live else { return Ok(run(&mut NoHooks)?) };
    let mut hooks = Hooks { live, refused: None };
    run(&mut hooks).map_err(|error| hooks.refused.unwrap_or_else(|| error.into()))
}

/// Checks an image against the hash tree that follows it, block by block.
fn check_tree(disk: &OpDisk) -> Result<RootHash, WireError> {
    let fs = Ext4::open(disk.clone())?;
    let fs_bytes = fs.geometry().blocks_count.saturating_mul(u64::from(fs.geometry().block_size));
    let superblock = verity_tree::find(disk, fs_bytes)?
        .ok_or_else(|| WireError::new(ErrorKind::Corrupt, "no hash tree follows the file system"))?;
    let report = verity_tree::check(disk, &superblock, &mut |_| {})?;
    if report.is_sound() {
        return Ok(RootHash(report.root));
    }
    Err(WireError::new(ErrorKind::Corrupt, damage(&fs, &report)))
}

/// The damage of an image in one line: the affected files by name, if the directories can still be read.
pub fn damage<R: ReadAt>(fs: &Ext4<R>, report: &verity_tree::CheckReport) -> String {
    if report.damaged.is_empty() {
        return format!("{} ranges of the hash tree are damaged", report.damaged_tree.len());
    }
    let first = report.damaged.first().map_or(0, |r| r.start);
    let mut text = format!("{} blocks are damaged, the first at byte {first}", report.bad_blocks);
    match fs.owners(&report.damaged) {
        Ok(owners) => {
            for file in owners.files.iter().take(MAX_TOLD) {
                let _ = write!(text, ", in '{}'", file.escape_ascii());
            }
            if owners.count > MAX_TOLD as u64 {
                let _ = write!(text, " and {} other files", owners.count - MAX_TOLD as u64);
            }
            if owners.others {
                text.push_str(", in metadata or free space");
            }
        }
        Err(e) => {
            let _ = write!(text, "; the affected files could not be determined: {e}");
        }
    }
    text
}

impl Codec for RealCodec {
    fn apply(
        &self,
        input: TarInput<'_>,
        image: OpDisk,
        record: OpDisk,
        scratch: Option<OpDisk>,
        lowers: &mut dyn Lowers,
        growing: &mut dyn Growing,
        options: &ApplyOptions,
    ) -> Result<ApplySummary, WireError> {
        let resources = ApplyResources {
            scratch: scratch.map(|disk| Arc::new(disk) as Arc<dyn WriteAt>),
            told_digest: input.told,
        };
        let (mut refused, mut no_disks) = (None, None);
        let mut chain = LayerChain::new(lowers.count(), || match lowers.next() {
            Ok(layer) => Ok(self.source(&layer, false)),
            Err(e) => Err(keep(&mut refused, e)),
        });
        let mut grown = Grown { growing, refused: &mut no_disks };
        let applied =
            apply::apply_growing(input.bytes, image, record, &mut chain, options, &resources, &mut grown);
        applied.map_err(|error| refused.or(no_disks).unwrap_or_else(|| error.into()))
    }

    fn check(
        &self,
        image: OpDisk,
        tree: bool,
        writer: u32,
        owners: &IdMaps,
    ) -> Result<CheckSummary, WireError> {
        let verity = if tree { Some(check_tree(&image)?) } else { None };
        let limits = CheckLimits { writer, ..CheckLimits::default() };
        let report = check(image.clone(), limits)?;
        verity_tree::check_around(&image, report.image_bytes, tree)?;
        apply::check_owners(&Ext4::open(image)?, owners)?;
        Ok(CheckSummary {
            image_bytes: report.image_bytes,
            profile: report.layout.into(),
            inodes: report.inodes,
            blocks: report.blocks_used,
            uuid: uuid::Uuid::from_bytes(report.uuid),
            verity,
        })
    }

    fn export_exact(
        &self,
        image: OpDisk,
        record: OpDisk,
        digested: bool,
        out: &mut dyn StreamOut,
    ) -> Result<ExportSummary, WireError> {
        let summary = if digested {
            record::replay_for_digesting_reader(image, record, out)?
        } else {
            record::replay(image, record, out)?
        };
        Ok(ExportSummary {
            tar_bytes: summary.tar_bytes,
            tar_digest: Some(summary.tar_digest),
            ..ExportSummary::default()
        })
    }

    fn export_canonical(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        tar: &CanonicalTar,
        live: Option<&mut dyn Live>,
        out: &mut dyn StreamOut,
    ) -> Result<ExportSummary, WireError> {
        let CanonicalTar { format, ref id_maps, source_date_epoch } = *tar;
        let version = canonical::version(format).ok_or_else(|| {
            WireError::new(
                ErrorKind::Unsupported,
                format!("canonical tar version {format} (versions 1 to {} are known)", canonical::VERSION),
            )
        })?;
        let is_live = live.is_some();
        let (stack, below) = (self.sources(&target, is_live), self.parent_layers(&target, &parent, is_live));
        let spec = parent_spec(&parent, &below);
        let options =
            ExportOptions { id_maps: id_maps.clone(), strict_ids: false, version, source_date_epoch };
        let summary = hooked(live, |hooks| layer_codec::export(&stack, spec, &options, hooks, out))?;
        Ok(ExportSummary {
            tar_bytes: summary.tar_bytes,
            tar_digest: None,
            hidden: summary.hidden,
            first_hidden: summary.first_hidden.map(|path| path.escape_ascii().to_string()),
        })
    }

    fn changes(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        live: Option<&mut dyn Live>,
        sink: ChangeSink<'_>,
    ) -> Result<(), WireError> {
        let (stack, below) =
            (self.sources(&target, live.is_some()), self.parent_layers(&target, &parent, live.is_some()));
        let (spec, options) = (parent_spec(&parent, &below), ExportOptions::default());
        let found = hooked(live, |hooks| layer_codec::changes(&stack, spec, &options, hooks))?;
        found.iter().try_for_each(sink)
    }

    fn written(
        &self,
        target: Vec<AttachedLayer>,
        blank: BlankRoot,
        live: Option<&mut dyn Live>,
    ) -> Result<bool, WireError> {
        let stack = self.sources(&target, live.is_some());
        let BlankRoot { permissions, uid, gid } = blank;
        let blank = layer_codec::BlankRoot { permissions, uid, gid };
        hooked(live, |hooks| layer_codec::written(&stack, blank, hooks))
    }

    fn diff_size(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        live: Option<&mut dyn Live>,
    ) -> Result<u64, WireError> {
        let (stack, below) =
            (self.sources(&target, live.is_some()), self.parent_layers(&target, &parent, live.is_some()));
        let (spec, options) = (parent_spec(&parent, &below), ExportOptions::default());
        hooked(live, |hooks| layer_codec::diff_size(&stack, spec, &options, hooks))
    }
}
