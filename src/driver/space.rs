//! Room of sandboxes: more of it, and what containers do not use given back.
//!
//! ```text
//!   grow   mounted      VHD longer ─► loop device ─► EXT4_IOC_RESIZE_FS          the kernel refuses? ─► "at the next start"
//!          not mounted  VHD longer ─► service VM: journal, ext4 larger           (or the next Get, if it was put off)
//!   trim   mounted      FITRIM ─► holes in the file
//! ```
//!
//! The daemon changes the VHD around the file system, which it has made itself, and nothing inside: that is the kernel's
//! or a service VM's. Invariants: the layer's gate is closed meanwhile; a cut leaves the old or the new size; `sandbox_bytes`
//! in `layer.json` follows the file. A sandbox for virtual machines is theirs: it is refused. Called by `api` and
//! `store grow`.

use super::{Driver, DriverError, gates::Held, home::Home, on_disk_thread, sandbox};
use crate::{
    error::CorruptFile,
    store::{DiskThread, LayerId, LayerMeta, LayerState, Member, files, layout},
    svm::{DiskSource, GrowJob, Purpose},
};
use disk_io::{ReadAt, WriteAt};
use lcow_sys::sparse::data_ranges;
use serde::Serialize;
use std::{
    fs::{File, OpenOptions},
    path::Path,
    sync::Arc,
};
use vhd_image::vhd::{self, Footer};
#[cfg(target_os = "linux")]
use {
    super::mounts::failed,
    lcow_sys::linux::{
        SysError,
        loopdev::{self, LoopDevice},
        space,
    },
    std::os::fd::AsFd,
};

/// How a sandbox got its new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GrownHow {
    /// It has no file yet, and will be made with this size.
    NotMade,
    /// While it was mounted.
    Mounted,
    /// By a service VM.
    Unmounted,
    /// It will, before it is mounted the next time.
    PutOff,
}

/// The sizes of a sandbox, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SandboxGrown {
    /// How.
    pub how: GrownHow,
    /// Before.
    pub before: u64,
    /// Afterwards.
    pub after: u64,
}

/// What a trim gave back; bytes that the file takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trimmed {
    /// The layer.
    pub id: LayerId,
    /// Before.
    pub before: u64,
    /// Afterwards.
    pub after: u64,
}

impl Driver {
    /// Makes a sandbox larger. With `put_off`, what the kernel cannot do while it is mounted is done before its next mount.
    pub async fn grow(&self, id: &str, bytes: u64, put_off: bool) -> Result<SandboxGrown, DriverError> {
        let home = self.home().await?;
        home.grow_sandbox(&id.parse()?, bytes, put_off).await
    }

    /// Gives back what mounted sandboxes do not use: of one layer, or of all.
    #[cfg(target_os = "linux")]
    pub async fn trim(&self, id: Option<&str>) -> Result<Vec<Trimmed>, DriverError> {
        let home = self.home().await?;
        let ids = match id {
            Some(id) => vec![id.parse()?],
            None => home.store.layers().into_iter().map(|layer| layer.id).collect(),
        };
        let mut done = Vec::new();
        for id in ids {
            let one = home.clone();
            let gate = home.gates.close([&id]).await;
            let trimmed = gate.run(move |_, gate| one.trim_mounted(&gate, &id)).await?;
            done.extend(trimmed);
        }
        match id {
            Some(id) if done.is_empty() => Err(DriverError::Usage(format!(
                "layer {id} is no mounted sandbox; `lcow-graphdriver layer compact` gives back what an unmounted one does \
                 not use"
            ))),
            _ => Ok(done),
        }
    }
}

/// Refuses a size that no sandbox can have.
fn check_size(bytes: u64) -> Result<(), DriverError> {
    if bytes > vhd::MAX_DISK_BYTES || !bytes.is_multiple_of(vhd::SECTOR) {
        return Err(DriverError::Usage(format!(
            "a sandbox of {bytes} bytes: the size must be a multiple of {} and at most {}",
            vhd::SECTOR,
            vhd::MAX_DISK_BYTES
        )));
    }
    Ok(())
}

fn refuse_smaller(id: &LayerId, before: u64, bytes: u64) -> Result<(), DriverError> {
    if bytes < before {
        return Err(DriverError::Usage(format!(
            "layer {id}: its sandbox has {before} bytes and cannot shrink to {bytes}"
        )));
    }
    Ok(())
}

/// Opens a sandbox's VHD for writing; gives the size of its disk.
fn open_vhd(path: &Path) -> Result<(File, Footer), DriverError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(DriverError::io("open", path))?;
    let size = ReadAt::size(&file).map_err(DriverError::io("measure", path))?;
    let at = size.saturating_sub(vhd::FOOTER_SIZE as u64);
    let mut bytes = [0; vhd::FOOTER_SIZE];
    file.read_exact_at(&mut bytes, at).map_err(DriverError::io("read", path))?;
    match Footer::parse(&bytes) {
        Ok(footer) if footer.disk_bytes == at => Ok((file, footer)),
        Ok(footer) => Err(CorruptFile::new(
            path,
            format!("its footer gives a disk of {} bytes, the file has {at}", footer.disk_bytes),
        )
        .into()),
        Err(e) => Err(CorruptFile::new(path, e.to_string()).into()),
    }
}

/// Makes a fixed VHD longer, durably. Its file system keeps its size.
fn lengthen(path: &Path, file: &File, footer: &Footer, bytes: u64) -> Result<(), DriverError> {
    let old = footer.disk_bytes;
    if bytes == old {
        return Ok(());
    }
    let new = Footer::new(bytes, footer.timestamp, footer.uuid)
        .map_err(|e| DriverError::Usage(e.to_string()))?
        .to_bytes();
    // One write makes the file longer and ends it with a footer. Only then the old one can go.
    let write = || {
        file.write_all_at(&new, bytes)?;
        files::sync_file(file, path)?;
        let rest = usize::try_from(bytes - old).unwrap_or(vhd::FOOTER_SIZE).min(vhd::FOOTER_SIZE);
        file.write_all_at(&vec![0; rest], old)?;
        files::sync_file(file, path)
    };
    write().map_err(DriverError::io("enlarge the sandbox", path))
}

impl Home {
    /// Makes a sandbox larger, mounted or not.
    async fn grow_sandbox(
        self: &Arc<Self>,
        id: &LayerId,
        bytes: u64,
        put_off: bool,
    ) -> Result<SandboxGrown, DriverError> {
        check_size(bytes)?;
        let gate = self.gates.close([id]).await;
        let (home, layer) = (self.clone(), id.clone());
        let done =
            gate.run(move |thread, gate| home.grow_here(thread, &gate, &layer, bytes, put_off)).await?;
        match done {
            Some(done) => Ok(done),
            None => self.grow_unmounted(id, bytes).await,
        }
    }

    /// What needs no service VM; `None` for a sandbox that is not mounted.
    fn grow_here(
        &self,
        thread: &DiskThread,
        gate: &Held,
        id: &LayerId,
        bytes: u64,
        put_off: bool,
    ) -> Result<Option<SandboxGrown>, DriverError> {
        gate.covers(id)?;
        let member = self.store.get(id)?;
        match member.meta.state {
            LayerState::Sandbox => {}
            LayerState::Created => {
                let before = member.meta.sandbox_bytes.unwrap_or(self.options.sandbox_bytes);
                refuse_smaller(id, before, bytes)?;
                self.note_size(thread, &member, bytes)?;
                return Ok(Some(SandboxGrown { how: GrownHow::NotMade, before, after: bytes }));
            }
            LayerState::Applied | LayerState::Applying => {
                return Err(DriverError::Usage(format!(
                    "layer {id} has no sandbox: applied layers never change"
                )));
            }
        }
        self.refuse_machines(&member)?;
        #[cfg(target_os = "linux")]
        if let Some(dir) = self.mounts.disk_dir(id) {
            return self.grow_mounted(thread, &member, &dir, bytes, put_off).map(Some);
        }
        let _ = put_off;
        Ok(None)
    }

    /// Refuses a sandbox that virtual machines attach.
    fn refuse_machines(&self, member: &Member) -> Result<(), DriverError> {
        let id = &member.layer.id;
        if member.meta.handed_out || self.store.layout().layer_file(id, layout::SANDBOX_VHDX_FILE).exists() {
            return Err(DriverError::Usage(format!(
                "layer {id}: its sandbox is a disk of virtual machines; stop the one that has it, and use \
                 `lcow-graphdriver layer grow {} SIZE`",
                sandbox::path(self.store.layout(), id).display()
            )));
        }
        Ok(())
    }

    /// Records a new size.
    fn note_size(&self, thread: &DiskThread, member: &Member, bytes: u64) -> Result<(), DriverError> {
        let layer = &member.layer;
        self.store.update::<DriverError>(thread, &layer.id, layer.generation, |meta| {
            Ok(LayerMeta { sandbox_bytes: Some(bytes), grow_to: None, ..meta.clone() })
        })?;
        Ok(())
    }

    /// Makes a sandbox larger that is mounted.
    #[cfg(target_os = "linux")]
    fn grow_mounted(
        &self,
        thread: &DiskThread,
        member: &Member,
        dir: &Path,
        bytes: u64,
        put_off: bool,
    ) -> Result<SandboxGrown, DriverError> {
        let id = &member.layer.id;
        let path = self.store.layout().layer_file(id, layout::SANDBOX_FILE);
        let (file, footer) = open_vhd(&path)?;
        let before = footer.disk_bytes;
        refuse_smaller(id, before, bytes)?;
        lengthen(&path, &file, &footer, bytes)?;
        let grown = || {
            for found in loopdev::find_by_backing(file.as_fd())? {
                if let Some(device) = LoopDevice::open_bound(found.number, file.as_fd())? {
                    device.set_sizelimit(bytes)?;
                }
            }
            let block = rustix::fs::statvfs(dir).map_or(BLOCK, |known| known.f_bsize.max(1));
            space::resize_ext4(dir, bytes / block)
        };
        match grown() {
            Ok(()) => {
                self.note_size(thread, member, bytes)?;
                Ok(SandboxGrown { how: GrownHow::Mounted, before, after: bytes })
            }
            Err(error) if put_off && reason(&error).is_some() => {
                let layer = &member.layer;
                self.store.update::<DriverError>(thread, id, layer.generation, |meta| {
                    Ok(LayerMeta { grow_to: Some(bytes), ..meta.clone() })
                })?;
                Ok(SandboxGrown { how: GrownHow::PutOff, before, after: bytes })
            }
            Err(error) => match reason(&error) {
                Some(reason) => Err(DriverError::Usage(format!(
                    "layer {id}: its sandbox is mounted, and {reason}; use --at-next-start to let it grow before it is \
                     mounted the next time"
                ))),
                None => Err(failed(id, "enlarge its mounted sandbox")(error)),
            },
        }
    }

    /// Makes a sandbox larger that is not mounted, by a service VM.
    async fn grow_unmounted(self: &Arc<Self>, id: &LayerId, bytes: u64) -> Result<SandboxGrown, DriverError> {
        // An export may hold the last service VM and wait for the gate.
        let lease = self
            .pool
            .lease(id.as_str(), Purpose::Work)
            .await
            .map_err(DriverError::svm(id, "enlarge its sandbox"))?;
        let gate = self.gates.close([id]).await;
        let (home, layer) = (self.clone(), id.clone());
        let (gate, member, job, before) = on_disk_thread(move |_| {
            let member = home.store.get(&layer)?;
            home.refuse_machines(&member)?;
            #[cfg(target_os = "linux")]
            {
                home.mounts.free_hidden(&gate, &layer)?;
                if home.mounts.disk_dir(&layer).is_some() {
                    return Err(DriverError::Usage(format!(
                        "layer {layer} was mounted meanwhile; try again"
                    )));
                }
            }
            let path = home.store.layout().layer_file(&layer, layout::SANDBOX_FILE);
            let (file, footer) = open_vhd(&path)?;
            refuse_smaller(&layer, footer.disk_bytes, bytes)?;
            lengthen(&path, &file, &footer, bytes)?;
            let data = data_ranges(&file, bytes);
            let disk = DiskSource::read_write(Arc::new(file), path).window(0, bytes);
            Ok((gate, member, GrowJob { disk, bytes, data }, footer.disk_bytes))
        })
        .await?;
        let grown = lease.grow(&job).await.map_err(DriverError::svm(id, "enlarge its sandbox"))?;
        tracing::info!(%id, old = grown.old_bytes, new = grown.new_bytes, "enlarged a sandbox");
        let home = self.clone();
        gate.run(move |thread, _gate| {
            // What a virtual machine calls durable may be in this system's page cache still.
            files::sync_file(&job.disk.file, &job.disk.path)
                .map_err(DriverError::io("sync the sandbox", &job.disk.path))?;
            home.note_size(thread, &member, bytes)
        })
        .await?;
        Ok(SandboxGrown { how: GrownHow::Unmounted, before, after: bytes })
    }

    /// Makes a sandbox larger whose growth was put off, before it is mounted. A failure is only logged: the container can
    /// run with the room that there is.
    #[cfg(target_os = "linux")]
    pub(super) async fn grow_put_off(self: &Arc<Self>, id: &LayerId) {
        let Some(bytes) = self.store.get(id).ok().and_then(|member| member.meta.grow_to) else { return };
        if self.mounts.disk_dir(id).is_some() {
            return;
        }
        if let Err(error) = self.grow_unmounted(id, bytes).await {
            let error = crate::error::with_causes(&error);
            tracing::warn!(%id, bytes, error, "cannot enlarge a sandbox whose growth was put off");
        }
    }

    /// Gives back what a mounted sandbox does not use; `None` for a layer without one.
    #[cfg(target_os = "linux")]
    fn trim_mounted(&self, gate: &Held, id: &LayerId) -> Result<Option<Trimmed>, DriverError> {
        gate.covers(id)?;
        let Ok(member) = self.store.get(id) else { return Ok(None) };
        let Some(dir) = self.mounts.disk_dir(id).filter(|_| member.meta.state == LayerState::Sandbox) else {
            return Ok(None);
        };
        let path = self.store.layout().layer_file(id, layout::SANDBOX_FILE);
        let taken = || {
            let known = std::fs::metadata(&path).map_err(DriverError::io("measure", &path))?;
            Ok::<_, DriverError>(crate::store::allocated_bytes(&known))
        };
        let before = taken()?;
        space::trim(&dir).map_err(failed(id, "give back what its sandbox does not use"))?;
        Ok(Some(Trimmed { id: id.clone(), before, after: taken()? }))
    }
}

/// Size of a sandbox's blocks in bytes, where the kernel does not tell.
#[cfg(target_os = "linux")]
const BLOCK: u64 = 4096;

/// Why the kernel cannot enlarge a mounted sandbox, if that is the reason of the error.
#[cfg(target_os = "linux")]
fn reason(error: &SysError) -> Option<&'static str> {
    use rustix::io::Errno;
    let code = error.raw_os_error()?;
    [
        (Errno::PERM, "this process lacks CAP_SYS_RESOURCE, which that needs"),
        (
            Errno::OPNOTSUPP,
            "it was made by an earlier release (with sparse_super2), and Linux does not enlarge such a file system",
        ),
        (Errno::AGAIN, "this kernel does not change the size of a loop device in use"),
    ]
    .into_iter()
    .find_map(|(known, reason)| (known.raw_os_error() == code).then_some(reason))
}
