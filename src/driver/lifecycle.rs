//! Creation, removal, metadata, status and cleanup of layers.

use super::{Driver, DriverError, GRACE, LayerRequest, blocking, home::Home, on_disk_thread, sandbox};
use crate::{
    config::{self, CONTAINERD_PREFIX, MAX_SANDBOX_BYTES, MIN_SANDBOX_BYTES, Unit},
    store::{DiskThread, LayerId, LayerState, LayerWishes, Member, layout},
    svm::Mode,
};
use bytesize::ByteSize;
use std::{collections::BTreeMap, sync::Arc};

/// The `--storage-opt` names that a single layer accepts.
const SIZE_OPTION: &str = "size";
const XINO_OPTION: &str = "xino";

fn parent_of(request: &LayerRequest) -> Result<Option<LayerId>, DriverError> {
    if request.parent.is_empty() { Ok(None) } else { Ok(Some(request.parent.parse()?)) }
}

/// Parses a layer's options.
fn wishes_of(request: &LayerRequest) -> Result<LayerWishes, DriverError> {
    let mut wishes = LayerWishes::default();
    for (name, value) in &request.storage_opt {
        let refused = |accepted: String| {
            DriverError::Usage(format!("storage option {name}: '{value}' is not accepted; give {accepted}"))
        };
        if name.eq_ignore_ascii_case(SIZE_OPTION) {
            let size = config::parse_sandbox_size(value, Unit::Bytes).ok_or_else(|| {
                let (least, most) = (ByteSize(MIN_SANDBOX_BYTES), ByteSize(MAX_SANDBOX_BYTES));
                refused(format!("a size of {least} to {most}"))
            })?;
            wishes.sandbox_bytes = Some(size);
        } else if name.eq_ignore_ascii_case(XINO_OPTION) {
            wishes.xino = Some(config::parse_switch(value).ok_or_else(|| refused("on or off".into()))?);
        } else {
            return Err(DriverError::Usage(format!(
                "unknown storage option '{name}' for a layer; there are '{SIZE_OPTION}' and '{XINO_OPTION}'"
            )));
        }
    }
    Ok(wishes)
}

impl Driver {
    /// `GraphDriver.Create`: a layer without content. ApplyDiff makes it an image; the first Get makes it a sandbox.
    pub async fn create(&self, request: LayerRequest) -> Result<(), DriverError> {
        let home = self.home().await?;
        let (id, parent, wishes) =
            (request.id.parse::<LayerId>()?, parent_of(&request)?, wishes_of(&request)?);
        on_disk_thread(move |thread| {
            home.check_reserve(thread)?;
            home.store.create(thread, &id, parent.as_ref(), LayerState::Created, wishes, |_| Ok(()))
        })
        .await
    }

    /// `GraphDriver.CreateReadWrite`: a sandbox.
    pub async fn create_read_write(&self, request: LayerRequest) -> Result<(), DriverError> {
        let home = self.home().await?;
        let (id, parent, wishes) =
            (request.id.parse::<LayerId>()?, parent_of(&request)?, wishes_of(&request)?);
        let bytes = wishes.sandbox_bytes.unwrap_or(home.options.sandbox_bytes);
        let wishes = LayerWishes { sandbox_bytes: Some(bytes), ..wishes };
        on_disk_thread(move |thread| {
            home.check_reserve(thread)?;
            home.store.create(thread, &id, parent.as_ref(), LayerState::Sandbox, wishes, |folder| {
                sandbox::write(folder, bytes, home.options.mount, home.root_ids())
            })
        })
        .await
    }

    /// `GraphDriver.Remove`: unmounts, whatever the reference count, and deletes. Idempotent.
    ///
    /// # Errors
    /// A layer that still has children is refused; the error names them.
    pub async fn remove(&self, id: &str) -> Result<(), DriverError> {
        let home = self.home().await?;
        let id: LayerId = id.parse()?;
        if !home.store.children(&id).is_empty() {
            // A tar in progress is disturbed only for a layer that goes. Its children may go before this request's turn.
            let upto = self.doors.latest();
            home.remove(id.clone()).await?;
            self.doors.forget(&id, upto);
            return Ok(());
        }
        // A tar in progress would find its layer gone, or another one of the same id.
        let parted = self.doors.part(&id).await;
        home.remove(id.clone()).await?;
        self.doors.forget(&id, parted);
        Ok(())
    }

    /// `GraphDriver.Exists`.
    pub async fn exists(&self, id: &str) -> Result<bool, DriverError> {
        let home = self.home().await?;
        Ok(id.parse::<LayerId>().is_ok_and(|id| home.store.exists(&id)))
    }

    /// `GraphDriver.GetMetadata`: facts for `docker inspect`.
    pub async fn metadata(&self, id: &str) -> Result<BTreeMap<String, String>, DriverError> {
        let home = self.home().await?;
        let id: LayerId = id.parse()?;
        on_disk_thread(move |thread| home.metadata(thread, &id)).await
    }

    /// `GraphDriver.Status`: lines for `docker info`.
    pub async fn status(&self) -> Vec<(String, String)> {
        let lines = async {
            let home = self.home().await?;
            blocking(move || Ok(home.status())).await
        };
        lines.await.unwrap_or_else(|e: DriverError| vec![("LCOW".into(), format!("not usable: {e}"))])
    }

    /// `GraphDriver.Cleanup`, when the engine stops: unmounts everything, ends service VMs and deletes debris. The
    /// driver stays usable for the next Init.
    pub async fn cleanup(&self) -> Result<(), DriverError> {
        let home = self.home().await?;
        #[cfg(target_os = "linux")]
        {
            let ids: Vec<LayerId> = home.store.layers().into_iter().map(|l| l.id).collect();
            let gates = home.gates.close(&ids).await;
            let unmounting = home.clone();
            gates
                .run(move |_, gates| {
                    for (id, references, dropped) in unmounting.mounts.drop_all(&gates) {
                        tracing::warn!(%id, references, "cleanup found a layer still in use");
                        if let Err(error) = dropped {
                            tracing::warn!(%id, error = %error, "cleanup cannot unmount a layer");
                        }
                    }
                    unmounting.release_stuck(&gates);
                    unmounting.mounts.let_go(&unmounting.gates, Some(&gates));
                    Ok(())
                })
                .await?;
        }
        home.pool.retire(GRACE).await;
        Ok(())
    }
}

impl Home {
    /// Unmounts and removes a layer. Its gates stay closed from the check of its children to the rename, so that
    /// nothing mounts a layer that is being removed.
    async fn remove(self: Arc<Self>, id: LayerId) -> Result<(), DriverError> {
        let gates = self.close_view(&id).await?;
        gates
            .run(move |thread, gates| {
                let closed = self.store.close_to_children(&id)?;
                #[cfg(target_os = "linux")]
                if self.store.exists(&id) {
                    let references = self.mounts.references(&id);
                    if references > 0 {
                        tracing::warn!(%id, references, "a layer is removed while it is in use; it is unmounted");
                    }
                    self.mounts.clear(&gates, &id)?;
                }
                let doomed = self.store.take_away(thread, &id)?;
                self.shown.forget(&id);
                #[cfg(target_os = "linux")]
                self.release_stuck(&gates);
                drop(closed);
                // The deletion may take long and affects no other request.
                drop(gates);
                doomed.delete(thread, &self.store);
                Ok(())
            })
            .await
    }

    fn metadata(&self, thread: &DiskThread, id: &LayerId) -> Result<BTreeMap<String, String>, DriverError> {
        let Member { layer, meta } = self.store.get(id)?;
        let usage = self.store.layer_usage(thread, id)?;
        let file = |name: &str| self.store.layout().layer_file(id, name).to_string_lossy().into_owned();
        let mut facts: BTreeMap<String, String> = [
            ("dir", self.store.layout().layer(id).to_string_lossy().into_owned()),
            ("state", format!("{:?}", meta.state).to_lowercase()),
            ("disk_bytes", usage.allocated.to_string()),
        ]
        .map(|(k, v)| (k.to_owned(), v))
        .into();
        let mut add = |key: &str, value: String| facts.insert(key.to_owned(), value);
        if let Some(parent) = layer.parent() {
            add("parent", parent.to_string());
        }
        if meta.state == LayerState::Sandbox {
            add("file", sandbox::path(self.store.layout(), id).to_string_lossy().into_owned());
            if let Some(bytes) = meta.sandbox_bytes {
                add("size", bytes.to_string());
            }
        }
        if meta.handed_out {
            add("handed_out", "true".into());
        }
        if let Some(applied) = &meta.applied {
            add("file", file(layout::LAYER_FILE));
            add("image_bytes", applied.image_bytes.to_string());
            add("record_bytes", applied.record_bytes.to_string());
            add("tar_digest", applied.tar_digest.to_string());
            add("tar_bytes", applied.tar_bytes.to_string());
            add("uuid", applied.uuid.to_string());
            if let Some(root) = &applied.verity_root {
                add("verity_root", root.to_string());
            }
        }
        #[cfg(target_os = "linux")]
        add("references", self.mounts.references(id).to_string());
        Ok(facts)
    }

    fn status(&self) -> Vec<(String, String)> {
        let pool = self.pool.snapshot();
        let (views, disks, kept) = self.mount_counts();
        let mode = match pool.mode {
            Mode::Safe => "safe (one service VM for each operation's layer)",
            Mode::Global => "global (one service VM for all)",
        };
        let backend = match pool.detail.as_str() {
            "" => pool.backend.to_owned(),
            detail => format!("{} ({detail})", pool.backend),
        };
        let mut lines: Vec<(String, String)> = vec![
            ("LCOW".into(), env!("CARGO_PKG_VERSION").into()),
            ("Home".into(), self.store.layout().home().display().to_string()),
            ("Store Format".into(), self.store.marker().format.to_string()),
            ("Layers".into(), self.store.len().to_string()),
            ("Mounts".into(), format!("{views} merged, {disks} disks, {kept} kept")),
            ("Service VM Backend".into(), backend),
            ("Service VM Mode".into(), mode.into()),
            (
                "Service VMs".into(),
                format!("{} in use, {} spare, {} starting", pool.vms.len(), pool.spares, pool.booting),
            ),
        ];
        if let Some(jail) = &pool.jail {
            lines.push(("Service VM Jail".into(), jail_line(jail)));
        }
        if let Some(free) = self.free_bytes() {
            let low = if free < self.options.min_free_bytes { " (LOW: new layers are refused)" } else { "" };
            lines.push(("Free Space".into(), format!("{}{low}", ByteSize(free))));
        }
        let entries = self.options.entries().filter(|(name, _)| !name.starts_with(CONTAINERD_PREFIX));
        lines.extend(entries.map(|(name, value)| (name.to_owned(), value)));
        lines
    }
}

/// The parts of a worker's jail that are in force, and those that are not, in one line.
fn jail_line(jail: &crate::svm::JailReport) -> String {
    let landlock = format!("landlock (ABI {})", jail.landlock_abi);
    let parts = [
        (jail.seccomp, "seccomp"),
        (jail.landlock_full, landlock.as_str()),
        (jail.no_new_privs, "no_new_privs"),
        (jail.net_namespace && jail.ipc_namespace, "namespaces"),
        (jail.empty_root, "empty root"),
        (jail.closed_descriptors, "closed descriptors"),
        (jail.unprivileged_user, "own user"),
        (jail.no_capabilities, "no capabilities"),
        (jail.limits, "limits"),
    ];
    if !jail.walls.is_empty() {
        let notes =
            if jail.notes.is_empty() { String::new() } else { format!("; NOT: {}", jail.notes.join(", ")) };
        return format!("{}{notes}", jail.walls.join(", "));
    }
    let list = |held: bool| {
        parts.iter().filter(|(holds, _)| *holds == held).map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    };
    match (list(true), list(false)) {
        (holds, missing) if missing.is_empty() => holds,
        (holds, missing) => format!("{holds}; NOT: {missing}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_options_are_checked() {
        let request = |name: &str, value: &str| LayerRequest {
            storage_opt: [(name.to_owned(), value.to_owned())].into(),
            ..LayerRequest::default()
        };
        let size = |value| wishes_of(&request("Size", value)).unwrap().sandbox_bytes;
        assert_eq!((size("1G"), size("40m")), (Some(1 << 30), Some(40 << 20)));
        for (value, expected) in [("on", true), ("off", false)] {
            assert_eq!(wishes_of(&request("xino", value)).unwrap().xino, Some(expected));
        }
        assert_eq!(wishes_of(&LayerRequest::default()).unwrap(), LayerWishes::default());
        for (name, value) in [
            ("size", "1"),
            ("size", "lots"),
            ("size", "9000t"),
            ("xino", "auto"),
            ("xino", ""),
            ("inodes", "1"),
        ] {
            let error = wishes_of(&request(name, value)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
