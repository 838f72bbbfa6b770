//! One home: a store, its service VMs and its mounts.

use super::{DriverConfig, DriverError, GRACE, gates::Gates, remembered::Remembered, shown::Shown};
#[cfg(unix)]
use crate::store::guard;
use crate::{
    config::Options,
    store::{Debris, DiskThread, InitRecord, Layer, Store},
    svm::{self, Mode, Pool, PoolConfig},
};
use std::{path::Path, sync::Arc};

#[cfg(windows)]
use crate::config::SvmKind;
#[cfg(target_os = "linux")]
use {
    super::{mounts::Mounts, remap},
    crate::{
        config::SvmKind,
        error::with_causes,
        store::{LayerId, layout},
    },
    lcow_sys::linux::reflink,
    std::sync::atomic::{AtomicBool, Ordering},
};

/// An open home.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) store: Arc<Store>,
    pub(super) options: Options,
    pub(super) pool: Pool,
    pub(super) gates: Arc<Gates>,
    pub(super) init: InitRecord,
    pub(super) shown: Arc<Shown>,
    /// Files that changed during an export, for the next one.
    pub(super) remembered: Arc<Remembered>,
    #[cfg(target_os = "linux")]
    pub(super) mounts: Arc<Mounts>,
    /// Whether the disk has reflinks; cleared when a clone fails.
    #[cfg(target_os = "linux")]
    pub(super) reflinks: AtomicBool,
}

impl Home {
    /// Opens the store at `path` with the options of `init`, or else of the last Init. Debris is deleted in the
    /// background, because no request looks at it.
    pub(super) fn open(
        thread: &DiskThread,
        path: &Path,
        init: Option<InitRecord>,
        config: &DriverConfig,
    ) -> Result<Self, DriverError> {
        // Options first: an invalid one must leave nothing behind.
        let wanted = init.as_ref().map(|init| options_of(init, config)).transpose()?;
        let root_is_home = super::same_directory(path, &config.root);
        let store = Arc::new(Store::open(thread, path, |entry| root_is_home && super::root::is_ours(entry))?);
        if store.layout().holds_snapshots() {
            return Err(DriverError::Usage(format!(
                "'{}' holds snapshots of containerd, which a Docker plugin cannot use; give one of them another directory \
                 (--containerd-root, --root)",
                path.display()
            )));
        }
        let (init, options) = if let (Some(init), Some(options)) = (init, wanted) {
            store.record_init(thread, init.clone())?;
            (init, options)
        } else {
            let init = store.marker().init;
            let options = options_of(&init, config)?;
            (init, options)
        };
        for (id, fault) in store.structural_faults(thread) {
            tracing::error!(%id, fault, "a layer of the store is damaged");
        }
        let debris = store.debris(thread)?;
        // Only the owner may reap: what another process finds are the machines of a running daemon.
        let home = Self::assemble(store, init, options, config, true)?;
        #[cfg(target_os = "linux")]
        {
            home.set_doors(config)?;
            let ids: Vec<LayerId> = home.store.layers().into_iter().map(|l| l.id).collect();
            let frozen = home.mounts.rebuild(|id| home.store.snapshot(id).ok(), &ids)?;
            frozen.thaw_later(home.mounts.clone(), home.gates.clone());
            home.mounts.look_after_kept(&home.gates);
        }
        home.clear_later(debris);
        Ok(home)
    }

    /// Deletes debris in the background, because no request looks at it.
    fn clear_later(&self, debris: Vec<Debris>) {
        if debris.is_empty() {
            return;
        }
        let store = self.store.clone();
        // The directories of scratch disks name the machines that a killed daemon may have left.
        #[cfg(windows)]
        let (pool, runtime) = (self.pool.clone(), tokio::runtime::Handle::current());
        std::thread::spawn(move || {
            #[cfg(windows)]
            runtime.block_on(pool.clear_predecessor());
            let report = store.collect(&DiskThread::here(), debris);
            tracing::info!(deleted = report.deleted.len(), "cleared what an earlier process left behind");
            for (path, error) in report.failed {
                tracing::warn!(path = %path.display(), error, "cannot delete debris");
            }
        });
    }

    /// Opens the store of snapshots at `path`. What an earlier process left mounted is for the caller to take over.
    pub(super) fn open_snapshots(
        thread: &DiskThread,
        path: &Path,
        config: &DriverConfig,
    ) -> Result<Self, DriverError> {
        let store = Arc::new(Store::open_snapshots(thread, path)?);
        for (id, fault) in store.structural_faults(thread) {
            tracing::error!(%id, fault, "a snapshot of the store is damaged");
        }
        let debris = store.debris(thread)?;
        let home = Self::assemble(store, InitRecord::default(), config.options.clone(), config, true)?;
        home.clear_later(debris);
        Ok(home)
    }

    /// Opens the store at `path` for reading, next to its owner. Nothing is mounted, unmounted or deleted.
    pub(super) fn inspect(
        thread: &DiskThread,
        path: &Path,
        config: &DriverConfig,
    ) -> Result<Self, DriverError> {
        let store = Arc::new(Store::open_read_only(thread, path)?);
        let init = store.marker().init;
        let options = options_of(&init, config)?;
        Self::assemble(store, init, options, config, false)
    }

    #[cfg_attr(not(target_os = "linux"), expect(clippy::unnecessary_wraps, reason = "only Linux has mounts"))]
    fn assemble(
        store: Arc<Store>,
        init: InitRecord,
        options: Options,
        config: &DriverConfig,
        reap: bool,
    ) -> Result<Self, DriverError> {
        let pool = start_pool(&options, config, &store, reap);
        #[cfg(target_os = "linux")]
        let mounts = Arc::new(Mounts::new(store.layout().clone(), &options, remap::namespace(&init)?));
        #[cfg(target_os = "linux")]
        let reflinks = AtomicBool::new(reflink::works_in(&store.layout().top(layout::STAGING)));
        Ok(Self {
            store,
            options,
            pool,
            gates: Arc::default(),
            init,
            shown: Arc::default(),
            remembered: Arc::default(),
            #[cfg(target_os = "linux")]
            mounts,
            #[cfg(target_os = "linux")]
            reflinks,
        })
    }

    /// The same home under another Init. Mounts and their counts stay as they are. Must be called within a runtime, on
    /// a thread that may wait.
    pub(super) fn with_init(
        &self,
        thread: &DiskThread,
        init: InitRecord,
        config: &DriverConfig,
    ) -> Result<Self, DriverError> {
        let options = options_of(&init, config)?;
        let other_maps = (&init.uid_maps, &init.gid_maps) != (&self.init.uid_maps, &self.init.gid_maps);
        if other_maps && !self.store.is_empty() {
            return Err(DriverError::Usage(
                "the user-namespace maps of Init differ from those that the store's layers were written with; use another home"
                    .into(),
            ));
        }
        // Everything that can fail comes before the first lasting change.
        #[cfg(target_os = "linux")]
        let mounts = Arc::new(self.mounts.renewed(&options, remap::namespace(&init)?));
        self.store.record_init(thread, init.clone())?;
        // The machines of the replaced pool are still in use.
        let pool = start_pool(&options, config, &self.store, cfg!(not(windows)));
        let home = Self {
            store: self.store.clone(),
            options,
            pool,
            gates: self.gates.clone(),
            init,
            shown: self.shown.clone(),
            remembered: self.remembered.clone(),
            #[cfg(target_os = "linux")]
            mounts,
            #[cfg(target_os = "linux")]
            reflinks: AtomicBool::new(self.reflinks.load(Ordering::Relaxed)),
        };
        #[cfg(target_os = "linux")]
        {
            if other_maps {
                home.set_doors(config)?;
            }
            home.mounts.trim_kept(&home.gates, None);
            home.mounts.look_after_kept(&home.gates);
        }
        Ok(home)
    }

    /// Identifies a layer among all layers of this process, those of other homes included.
    pub(super) fn which(&self, layer: &Layer) -> super::door::Which {
        (Arc::as_ptr(&self.store) as usize as u64, layer.generation)
    }

    /// Ends the service VMs of a home that another Init replaced; running operations get [`GRACE`].
    pub(super) async fn retire(&self) {
        self.pool.shutdown(GRACE).await;
    }

    /// Bytes free on the disk of the home.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        #[cfg(target_os = "linux")]
        {
            lcow_sys::linux::mount::space(self.store.layout().home()).ok().map(|s| s.available)
        }
        #[cfg(windows)]
        {
            lcow_sys::windows::fs::available_bytes(self.store.layout().home()).ok()
        }
    }

    /// Refuses new layers when the disk is nearly full.
    pub(super) fn check_reserve(&self, _: &DiskThread) -> Result<(), DriverError> {
        match self.free_bytes() {
            Some(free) => Ok(self.store.check_reserve(self.options.min_free_bytes, free)?),
            None => Ok(()),
        }
    }

    /// Numbers of merged views, of disks that they use, and of images that stay mounted for the next view.
    #[cfg_attr(not(target_os = "linux"), expect(clippy::unused_self, reason = "only Linux has mounts"))]
    pub(super) fn mount_counts(&self) -> (u64, u64, u64) {
        #[cfg(target_os = "linux")]
        {
            self.mounts.counts()
        }
        #[cfg(not(target_os = "linux"))]
        {
            (0, 0, 0)
        }
    }

    /// Unmounts the disks that no view uses.
    #[cfg_attr(not(target_os = "linux"), expect(clippy::unused_async, reason = "only Linux has mounts"))]
    pub(super) async fn unmount_idle(self: &Arc<Self>) {
        #[cfg(target_os = "linux")]
        {
            let home = self.clone();
            let work = move || {
                home.mounts.let_go(&home.gates, None);
                Ok(())
            };
            if let Err(error) = super::blocking(work).await {
                tracing::warn!(error = %with_causes(&error), "cannot unmount what no view uses");
            }
        }
    }

    /// The host's id of the containers' root.
    pub(super) fn root_ids(&self) -> (u32, u32) {
        self.init.root_ids()
    }

    /// The user-namespace maps as service VMs take them.
    pub(super) fn id_maps(&self) -> svm::IdMaps {
        svm::IdMaps { uids: self.init.uid_maps.clone(), gids: self.init.gid_maps.clone() }
    }

    /// Closes the home and the layers' directories to everyone but their owner. With userns-remap the mapped root's
    /// group may pass through them, and through the root if the home is below it.
    #[cfg(target_os = "linux")]
    fn set_doors(&self, config: &DriverConfig) -> Result<(), DriverError> {
        let group = self.init.passing_group();
        let home = self.store.layout().home();
        guard::close_folder(home, group)?;
        if group.is_some() && super::root::is_above(&config.root, home) {
            guard::close_folder(&config.root, group)?;
        }
        for layer in self.store.layers() {
            if let Err(error) = self.set_door(&layer.id) {
                tracing::error!(id = %layer.id, error = %with_causes(&error), "cannot restrict access to a layer's directory");
            }
        }
        Ok(())
    }

    /// Closes a layer's directory to everyone but its owner and, with userns-remap, the mapped root's group.
    #[cfg(target_os = "linux")]
    pub(super) fn set_door(&self, id: &LayerId) -> Result<(), DriverError> {
        Ok(guard::close_folder(&self.store.layout().layer(id), self.init.passing_group())?)
    }
}

pub(super) fn options_of(init: &InitRecord, config: &DriverConfig) -> Result<Options, DriverError> {
    let mut options = config.options.clone();
    options.set_all(&init.opts)?;
    Ok(options)
}

#[cfg(target_os = "linux")]
fn qemu_config(options: &Options, config: &DriverConfig) -> svm::qemu::QemuConfig {
    use crate::config::Acceleration;
    use svm::qemu::Accelerator;
    let kird = &options.kird_path;
    // In the service's root, because caches of a home are deleted as debris at each start.
    let mut qemu =
        svm::qemu::QemuConfig::new(kird.join(&options.kernel), kird.join(&options.initrd), &config.root);
    qemu.boot_parameters.clone_from(&options.boot_parameters);
    qemu.memory = options.guest_memory_bytes;
    qemu.growing_bytes = largest_file(options);
    qemu.accelerator = match options.accelerator {
        Acceleration::Auto => None,
        Acceleration::Kvm => Some(Accelerator::Kvm),
        Acceleration::Tcg => Some(Accelerator::Tcg),
    };
    qemu.strict = strict(options);
    if let Some(program) = &config.worker_program {
        qemu.launcher.clone_from(program);
    }
    qemu
}

/// The machines of Hyper-V, with their scratch disks in `scratch`.
#[cfg(windows)]
fn hcs_config(options: &Options, scratch: impl Into<std::path::PathBuf>) -> svm::hcs::HcsConfig {
    let kird = &options.kird_path;
    let mut hcs = svm::hcs::HcsConfig::new(kird.join(&options.kernel), kird.join(&options.initrd), scratch);
    hcs.boot_parameters.clone_from(&options.boot_parameters);
    hcs.memory = options.guest_memory_bytes;
    hcs.growing_bytes = largest_file(options);
    hcs
}

/// Refuses options whose backend does not work here, instead of failing at the first layer. The choice of `auto` always
/// works.
pub(super) fn check_backend(options: &Options, config: &DriverConfig) -> Result<(), DriverError> {
    #[cfg(target_os = "linux")]
    if options.svm == SvmKind::Qemu {
        let backend = svm::qemu::QemuBackend::new(qemu_config(options, config));
        return backend.preflight().map_err(|reason| DriverError::Backend { kind: options.svm, reason });
    }
    #[cfg(windows)]
    if options.svm == SvmKind::Hcs {
        // Belongs to no home: nothing is created.
        let backend = svm::hcs::HcsBackend::new(hcs_config(options, &config.root));
        return backend.preflight().map_err(|reason| DriverError::Backend { kind: options.svm, reason });
    }
    let _ = (options, config);
    Ok(())
}

/// Largest file of an image or a record, in bytes: hash tree and footer come on top of `lcow.maxlayer`.
fn largest_file(options: &Options) -> u64 {
    /// A hash tree is smaller than this fraction of its data: 32 bytes per 4 KiB block, and a little for the upper
    /// levels.
    const TREE_SHARE: u64 = 64;
    /// Space for what does not grow with the data: super block of the tree, footer, head of a record.
    const SLACK: u64 = 64 << 20;
    let largest = options.max_layer_bytes;
    (largest + largest / TREE_SHARE + SLACK).next_multiple_of(1 << 20)
}

/// Whether a worker or QEMU may start only with all the required parts of its jail.
#[cfg(target_os = "linux")]
fn strict(options: &Options) -> bool {
    use crate::config::JailKind;
    match options.jail {
        JailKind::Auto => rustix::process::geteuid().is_root(),
        JailKind::Strict => true,
        JailKind::BestEffort => false,
    }
}

/// The configuration of workers under these options.
pub(crate) fn embedded_config(options: &Options) -> svm::embedded::EmbeddedConfig {
    #[cfg(target_os = "linux")]
    return svm::embedded::EmbeddedConfig {
        memory_limit: options.memory_bytes,
        file_limit: Some(largest_file(options)),
        strict: strict(options),
        ..Default::default()
    };
    #[cfg(not(target_os = "linux"))]
    svm::embedded::EmbeddedConfig { memory_limit: options.memory_bytes, ..Default::default() }
}

/// Starts the service VMs of a home; `reap` if machines that are found belong to a killed predecessor.
fn start_pool(options: &Options, config: &DriverConfig, store: &Store, reap: bool) -> Pool {
    let settings = PoolConfig {
        mode: if options.global_mode { Mode::Global } else { Mode::Safe },
        spares: options.pool_spares,
        max_vms: options.pool_max,
        idle_timeout: options.idle_timeout,
        reap,
        guest_mount: options.guest_mount,
        ..PoolConfig::default()
    };
    #[cfg(target_os = "linux")]
    if options.svm == SvmKind::Qemu {
        let qemu = qemu_config(options, config);
        // The first start also boots a guest for the template.
        let settings = PoolConfig { boot_timeout: qemu.deadline * 2, ..settings };
        return Pool::start(Arc::new(svm::qemu::QemuBackend::new(qemu)), settings);
    }
    #[cfg(windows)]
    if options.svm == SvmKind::Hcs {
        let scratch = store.layout().top(crate::store::layout::SCRATCH);
        let hcs = hcs_config(options, scratch);
        return Pool::start(Arc::new(svm::hcs::HcsBackend::new(hcs)), settings);
    }
    #[cfg(not(windows))]
    let _ = store;
    let mut embedded = embedded_config(options);
    if let Some(program) = &config.worker_program {
        embedded.program.clone_from(program);
    }
    Pool::start(Arc::new(svm::embedded::EmbeddedBackend::new(embedded)), settings)
}
