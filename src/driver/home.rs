//! One home: a store, its service VMs and its mounts.

use super::{DriverConfig, DriverError, GRACE, gates::Gates};
use crate::{
    config::Options,
    store::{IdRange, InitRecord, Store},
    svm::{self, Mode, Pool, PoolConfig},
};
use std::{path::Path, sync::Arc};

#[cfg(windows)]
use crate::config::SvmKind;
#[cfg(target_os = "linux")]
use {
    super::mounts::Mounts,
    crate::{config::SvmKind, store::LayerId},
};

/// A home that is open.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) store: Arc<Store>,
    pub(super) options: Options,
    pub(super) pool: Pool,
    pub(super) gates: Arc<Gates>,
    pub(super) init: InitRecord,
    #[cfg(target_os = "linux")]
    pub(super) mounts: Arc<Mounts>,
}

impl Home {
    /// Opens the store at `path` with what an Init says, or with what the last one said. Debris is deleted in the
    /// background: it lies where no request looks.
    pub(super) fn open(
        path: &Path,
        init: Option<InitRecord>,
        config: &DriverConfig,
    ) -> Result<Self, DriverError> {
        // Options first: a wrong one must leave nothing behind.
        let wanted = init.as_ref().map(|init| options_of(init, config)).transpose()?;
        let store = Arc::new(Store::open(path)?);
        let (init, options) = if let (Some(init), Some(options)) = (init, wanted) {
            store.record_init(init.clone())?;
            (init, options)
        } else {
            let init = store.marker().init;
            let options = options_of(&init, config)?;
            (init, options)
        };
        for (id, fault) in store.structural_faults() {
            tracing::error!(%id, fault, "a layer of the store is damaged");
        }
        let debris = store.debris()?;
        let home = Self::assemble(store, init, options, config)?;
        #[cfg(target_os = "linux")]
        {
            home.open_doors()?;
            let ids: Vec<LayerId> = home.store.layers().into_iter().map(|l| l.id).collect();
            home.mounts.rebuild(|id| home.store.snapshot(id).ok(), &ids)?;
        }
        if !debris.is_empty() {
            let store = home.store.clone();
            // Folders of scratch disks are named after the machines that a killed daemon may have left.
            #[cfg(windows)]
            let (pool, runtime) = (home.pool.clone(), tokio::runtime::Handle::current());
            std::thread::spawn(move || {
                #[cfg(windows)]
                runtime.block_on(pool.clear_predecessor());
                let report = store.collect(debris);
                tracing::info!(deleted = report.deleted.len(), "cleared what an earlier process left behind");
                for (path, error) in report.failed {
                    tracing::warn!(path = %path.display(), error, "cannot delete debris");
                }
            });
        }
        Ok(home)
    }

    /// Looks at the store at `path` beside its owner. Nothing is mounted, unmounted or deleted.
    pub(super) fn inspect(path: &Path, config: &DriverConfig) -> Result<Self, DriverError> {
        let store = Arc::new(Store::open_read_only(path)?);
        let init = store.marker().init;
        let options = options_of(&init, config)?;
        Self::assemble(store, init, options, config)
    }

    #[cfg_attr(not(target_os = "linux"), expect(clippy::unnecessary_wraps, reason = "only Linux has mounts"))]
    fn assemble(
        store: Arc<Store>,
        init: InitRecord,
        options: Options,
        config: &DriverConfig,
    ) -> Result<Self, DriverError> {
        let pool = start_pool(&options, config, &store, true);
        #[cfg(target_os = "linux")]
        let mounts = Arc::new(Mounts::new(store.layout().clone(), options.overlay_api, remap(&init)?));
        Ok(Self {
            store,
            options,
            pool,
            gates: Arc::default(),
            init,
            #[cfg(target_os = "linux")]
            mounts,
        })
    }

    /// The same home under another Init. Mounts go on as they are.
    pub(super) fn with_init(&self, init: InitRecord, config: &DriverConfig) -> Result<Self, DriverError> {
        let options = options_of(&init, config)?;
        if (&init.uid_maps, &init.gid_maps) != (&self.init.uid_maps, &self.init.gid_maps)
            && !self.store.is_empty()
        {
            return Err(DriverError::Usage(
                "Init asks for other user-namespace maps than the store's layers were written with; use another home"
                    .into(),
            ));
        }
        self.store.record_init(init.clone())?;
        // The machines of the pool that this one replaces are still at work.
        let pool = start_pool(&options, config, &self.store, cfg!(not(windows)));
        #[cfg(target_os = "linux")]
        let mounts =
            if (&init.uid_maps, options.overlay_api) == (&self.init.uid_maps, self.options.overlay_api) {
                self.mounts.clone()
            } else {
                let mounts =
                    Arc::new(Mounts::new(self.store.layout().clone(), options.overlay_api, remap(&init)?));
                let ids: Vec<LayerId> = self.store.layers().into_iter().map(|l| l.id).collect();
                mounts.rebuild(|id| self.store.snapshot(id).ok(), &ids)?;
                mounts
            };
        Ok(Self {
            store: self.store.clone(),
            options,
            pool,
            gates: self.gates.clone(),
            init,
            #[cfg(target_os = "linux")]
            mounts,
        })
    }

    /// Ends the service VMs of a home that another Init replaced; operations that run get some time.
    pub(super) async fn retire(&self) {
        self.pool.shutdown(GRACE).await;
    }

    /// Bytes free on the disk of the home.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        #[cfg(target_os = "linux")]
        {
            crate::sys::linux::mount::space(self.store.layout().home()).ok().map(|s| s.available)
        }
        #[cfg(windows)]
        {
            crate::sys::windows::fs::available_bytes(self.store.layout().home()).ok()
        }
    }

    /// Refuses new layers when the disk is nearly full.
    pub(super) fn check_reserve(&self) -> Result<(), DriverError> {
        match self.free_bytes() {
            Some(free) => Ok(self.store.check_reserve(self.options.min_free_bytes, free)?),
            None => Ok(()),
        }
    }

    /// Numbers of merged views and disks that are mounted.
    #[cfg_attr(not(target_os = "linux"), expect(clippy::unused_self, reason = "only Linux has mounts"))]
    pub(super) fn mount_counts(&self) -> (u64, u64) {
        #[cfg(target_os = "linux")]
        {
            self.mounts.counts()
        }
        #[cfg(not(target_os = "linux"))]
        {
            (0, 0)
        }
    }

    /// The host's id of the containers' root.
    pub(super) fn root_ids(&self) -> (u32, u32) {
        let host = |maps: &[IdRange]| maps.iter().find(|m| m.container_id == 0).map_or(0, |m| m.host_id);
        (host(&self.init.uid_maps), host(&self.init.gid_maps))
    }

    /// The maps in the form of service VMs.
    pub(super) fn id_maps(&self) -> svm::IdMaps {
        let convert = |maps: &[IdRange]| {
            maps.iter()
                .map(|m| svm::IdRange { container_id: m.container_id, host_id: m.host_id, size: m.size })
                .collect()
        };
        svm::IdMaps { uids: convert(&self.init.uid_maps), gids: convert(&self.init.gid_maps) }
    }

    /// With userns-remap, lets the mapped root walk to the merged views.
    #[cfg(target_os = "linux")]
    fn open_doors(&self) -> Result<(), DriverError> {
        open_door(self.store.layout().home(), self.root_ids())
    }
}

/// With userns-remap, lets the mapped root's group walk through a folder: 0710, group of the mapped root.
#[cfg(target_os = "linux")]
pub(super) fn open_door(folder: &Path, (uid, gid): (u32, u32)) -> Result<(), DriverError> {
    use std::os::unix::fs::PermissionsExt;
    /// Owner all, group may pass.
    const PASS: u32 = 0o710;
    if (uid, gid) == (0, 0) {
        return Ok(());
    }
    std::os::unix::fs::chown(folder, None, Some(gid))
        .map_err(DriverError::io("change the group of", folder))?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(PASS))
        .map_err(DriverError::io("change the mode of", folder))
}

pub(super) fn options_of(init: &InitRecord, config: &DriverConfig) -> Result<Options, DriverError> {
    let mut options = config.options.clone();
    options.set_all(&init.opts)?;
    Ok(options)
}

#[cfg(target_os = "linux")]
fn remap(init: &InitRecord) -> Result<Option<Arc<std::os::fd::OwnedFd>>, DriverError> {
    use crate::sys::linux::idmap::{IdMapping, user_namespace};
    if init.uid_maps.is_empty() && init.gid_maps.is_empty() {
        return Ok(None);
    }
    let convert = |maps: &[IdRange]| -> Vec<IdMapping> {
        maps.iter().map(|m| IdMapping { inside: m.container_id, outside: m.host_id, count: m.size }).collect()
    };
    user_namespace(&convert(&init.uid_maps), &convert(&init.gid_maps)).map(|fd| Some(Arc::new(fd))).map_err(
        |source| DriverError::Mount {
            id: "-".into(),
            action: "make the user namespace of Init's maps",
            source,
        },
    )
}

#[cfg(target_os = "linux")]
fn qemu_config(options: &Options, config: &DriverConfig) -> svm::qemu::QemuConfig {
    use crate::config::Acceleration;
    use svm::qemu::Accelerator;
    let kird = &options.kird_path;
    // Below the service's own root: the home's caches are debris of a start.
    let mut qemu =
        svm::qemu::QemuConfig::new(kird.join(&options.kernel), kird.join(&options.initrd), &config.root);
    qemu.boot_parameters.clone_from(&options.boot_parameters);
    qemu.memory = options.guest_memory_bytes;
    qemu.accelerator = match options.accelerator {
        Acceleration::Auto => None,
        Acceleration::Kvm => Some(Accelerator::Kvm),
        Acceleration::Tcg => Some(Accelerator::Tcg),
    };
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
    hcs.growing_bytes = options.max_layer_bytes;
    hcs
}

/// Refuses options whose service VMs cannot be made here, instead of failing at the first layer. What `auto` chooses
/// needs nothing.
pub(super) fn check_backend(options: &Options, config: &DriverConfig) -> Result<(), DriverError> {
    #[cfg(target_os = "linux")]
    if options.svm == SvmKind::Qemu {
        let backend = svm::qemu::QemuBackend::new(qemu_config(options, config));
        return backend.preflight().map_err(|reason| DriverError::Backend { kind: options.svm, reason });
    }
    #[cfg(windows)]
    if options.svm == SvmKind::Hcs {
        // Of no home: nothing is made.
        let backend = svm::hcs::HcsBackend::new(hcs_config(options, &config.root));
        return backend.preflight().map_err(|reason| DriverError::Backend { kind: options.svm, reason });
    }
    let _ = (options, config);
    Ok(())
}

/// Starts the service VMs of a home; `reap` says that what is found of machines is a predecessor's.
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
        // The first start boots a guest once, for the template.
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
    let mut embedded =
        svm::embedded::EmbeddedConfig { memory_limit: options.memory_bytes, ..Default::default() };
    if let Some(program) = &config.worker_program {
        embedded.program.clone_from(program);
    }
    Pool::start(Arc::new(svm::embedded::EmbeddedBackend::new(embedded)), settings)
}
