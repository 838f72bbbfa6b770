//! What a graphdriver means: layers that are created, shown, compared, filled and removed.
//!
//! ```text
//!            ┌──────────── Driver: the homes of this process, the last Init's is current ───────────┐
//!   api ───► │ lifecycle  create, remove, metadata, status, cleanup     ──► store                   │
//!            │ views      get, put: mounts of images and sandboxes      ──► store, sys              │
//!            │ transfer   diff, apply_diff, changes, diff_size          ──► svm, store              │
//!            └──────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants:
//! * No byte of a layer is interpreted here: `transfer` opens files and hands descriptors to a service VM.
//! * No lock is held across bulk I/O; gates are held while mounts change and while metadata are read.
//! * A layer's state changes through the store's atomic commits only.
//! * Only images that a second, fresh service VM found sound, and sandboxes that we formatted, are mounted.
//!
//! Called by `api` and, for scrub, by `main`.

mod cut;
mod door;
mod error;
mod gates;
mod home;
mod lifecycle;
mod live;
#[cfg(target_os = "linux")]
mod mounts;
mod scrub;
mod transfer;
mod views;

pub use error::{DriverError, with_causes};
pub use scrub::{ScrubFinding, ScrubReport};

use crate::{
    config::Options,
    store::{InitRecord, LayerId, durable},
    svm::Change,
    telemetry::{Gauges, Phases},
};
use home::Home;
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// File below the service's root that remembers the last Init: the engine does not repeat it after a crash.
const LAST_INIT: &str = "last-init.json";
/// Time that operations get to end when service VMs are retired or the program stops.
const GRACE: Duration = Duration::from_secs(5);

/// A request that names a layer.
#[derive(Debug, Clone, Default)]
pub struct LayerRequest {
    /// The layer.
    pub id: String,
    /// Its parent, or "".
    pub parent: String,
    /// SELinux label of the merged view, or "".
    pub mount_label: String,
    /// `--storage-opt` of one container.
    pub storage_opt: BTreeMap<String, String>,
}

/// One changed path; kind 0 is modified, 1 added, 2 deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedPath {
    /// Absolute path in the layer, raw bytes.
    pub path: Vec<u8>,
    /// What happened to it.
    pub kind: u8,
}

impl From<Change> for ChangedPath {
    fn from(change: Change) -> Self {
        Self { path: change.path, kind: change.kind as u8 }
    }
}

/// How the driver is set up.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// The service's own state; also the home until an Init names one.
    pub root: PathBuf,
    /// Options from command line, environment and file; Init's are stronger.
    pub options: Options,
    /// The program that is started as a worker; `None` for this very program.
    pub worker_program: Option<PathBuf>,
}

/// Content of [`LAST_INIT`].
#[derive(Debug, Serialize, Deserialize)]
struct LastInit {
    home: PathBuf,
}

/// The driver.
#[derive(Debug)]
pub struct Driver {
    config: DriverConfig,
    homes: RwLock<Homes>,
    /// Inits one after the other.
    init: tokio::sync::Mutex<()>,
    doors: door::Doors,
    cuts: Arc<cut::CutDiffs>,
    phases: Phases,
}

#[derive(Debug, Default)]
struct Homes {
    open: HashMap<PathBuf, Arc<Home>>,
    current: Option<Arc<Home>>,
}

impl Driver {
    /// A driver that continues where an earlier process stopped: the last Init's home is opened with what that Init
    /// said. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The root or the home cannot be used, another process owns the store, or the kind of service VM that the options
    /// name cannot work here.
    pub fn start(config: DriverConfig) -> Result<Self, DriverError> {
        std::fs::create_dir_all(&config.root).map_err(DriverError::io("create", &config.root))?;
        let last = Self::last_home(&config.root)?;
        home::check_backend(&config.options, &config)?;
        let driver = Self::new(config);
        if let Some(home) = last {
            if home.is_dir() {
                let opened = Home::open(&home, None, &driver.config)?;
                // The next Init may say otherwise, so this is no reason to end.
                if let Err(error) = home::check_backend(&opened.options, &driver.config) {
                    tracing::error!(
                        "no layer can be handled until this is mended or Init says otherwise: {error}"
                    );
                }
                driver.adopt(home, opened);
            } else {
                tracing::warn!(home = %home.display(), "the last Init's home is gone; waiting for the next Init");
            }
        }
        Ok(driver)
    }

    fn new(config: DriverConfig) -> Self {
        Self {
            config,
            homes: RwLock::default(),
            init: tokio::sync::Mutex::default(),
            doors: door::Doors::default(),
            cuts: Arc::default(),
            phases: Phases::default(),
        }
    }

    /// How long the phases of transfers took, for metrics.
    pub fn phases(&self) -> Phases {
        self.phases.clone()
    }

    /// The home that the last Init named to the service at `root`.
    pub fn last_home(root: &Path) -> Result<Option<PathBuf>, DriverError> {
        let last: Option<LastInit> = durable::read_json(&root.join(LAST_INIT))?;
        Ok(last.map(|l| l.home))
    }

    /// A driver that looks at a store beside its owner: for scrub, which changes nothing.
    pub fn inspect(home: &Path, config: DriverConfig) -> Result<Self, DriverError> {
        Ok(Self::with_home(Home::inspect(home, &config)?, home, config))
    }

    /// A driver that owns `home`, whatever the last Init said: opening it repairs it.
    pub fn repair(home: &Path, config: DriverConfig) -> Result<Self, DriverError> {
        Ok(Self::with_home(Home::open(home, None, &config)?, home, config))
    }

    fn with_home(opened: Home, path: &Path, config: DriverConfig) -> Self {
        let driver = Self::new(config);
        driver.adopt(path.to_owned(), opened);
        driver
    }

    /// Faults that can be seen without opening an image.
    pub fn structural_faults(&self) -> Result<Vec<(LayerId, String)>, DriverError> {
        Ok(self.home()?.store.structural_faults())
    }

    fn adopt(&self, path: PathBuf, home: Home) {
        let home = Arc::new(home);
        let mut homes = self.homes.write();
        homes.open.insert(path, home.clone());
        homes.current = Some(home);
    }

    /// The home that serves requests now.
    fn home(&self) -> Result<Arc<Home>, DriverError> {
        if let Some(home) = &self.homes.read().current {
            return Ok(home.clone());
        }
        // No Init yet: an engineer with curl works on the root itself.
        let mut homes = self.homes.write();
        if let Some(home) = &homes.current {
            return Ok(home.clone());
        }
        let path = self.config.root.clone();
        let home = Arc::new(Home::open(&path, None, &self.config)?);
        homes.open.insert(path, home.clone());
        homes.current = Some(home.clone());
        Ok(home)
    }

    /// `GraphDriver.Init`: makes `home` the one that serves, with these options.
    ///
    /// # Errors
    /// A relative home, an unknown or wrong option, or a store that cannot be used.
    pub async fn init(&self, path: PathBuf, record: InitRecord) -> Result<(), DriverError> {
        if !path.is_absolute() {
            return Err(DriverError::Usage(format!(
                "Init's Home '{}' is not an absolute path",
                path.display()
            )));
        }
        let _one_at_a_time = self.init.lock().await;
        let options = home::options_of(&record, &self.config)?;
        let config = self.config.clone();
        blocking(move || home::check_backend(&options, &config)).await?;
        let known = self.homes.read().open.get(&path).cloned();
        match known {
            Some(home) if home.store.marker().init == record => self.homes.write().current = Some(home),
            Some(home) => {
                let renewed = home.with_init(record, &self.config)?;
                self.adopt(path.clone(), renewed);
                // What still runs under the old options gets its time; new requests need not wait for it.
                tokio::spawn(async move { home.retire().await });
            }
            None => {
                let config = self.config.clone();
                let (home, runtime) = (path.clone(), tokio::runtime::Handle::current());
                let opened = blocking(move || {
                    let _context = runtime.enter();
                    Home::open(&home, Some(record), &config)
                })
                .await?;
                self.adopt(path.clone(), opened);
            }
        }
        tracing::info!(home = %path.display(), "init");
        let last = self.config.root.join(LAST_INIT);
        blocking(move || Ok(durable::write_json(&last, &LastInit { home: path })?)).await
    }

    /// `GraphDriver.Capabilities`.
    pub fn reproduces_exact_diffs(&self) -> Result<bool, DriverError> {
        Ok(self.home()?.store.marker().reproduces_exact_diffs)
    }

    /// Longest stand-still of a transfer.
    pub fn idle_timeout(&self) -> Duration {
        self.homes
            .read()
            .current
            .as_ref()
            .map_or(self.config.options.idle_timeout, |h| h.options.idle_timeout)
    }

    /// Ends service VMs in order. Mounts stay as they are: containers may live on them.
    pub async fn stop(&self) {
        let homes: Vec<_> = self.homes.read().open.values().cloned().collect();
        for home in homes {
            home.pool.shutdown(GRACE).await;
        }
    }

    /// The running service VMs, for people; none before Init.
    pub fn service_vms(&self) -> Vec<crate::svm::PoolVm> {
        let home = self.homes.read().current.clone();
        home.map(|home| home.pool.running()).unwrap_or_default()
    }

    /// What the driver holds now, for metrics.
    pub fn gauges(&self) -> Gauges {
        let Some(home) = self.homes.read().current.clone() else { return Gauges::default() };
        let pool = home.pool.snapshot();
        let (mounts, disks) = home.mount_counts();
        Gauges {
            layers: home.store.len() as u64,
            mounts,
            disks,
            service_vms: (pool.vms.len() + pool.spares + pool.booting) as u64,
            spares: pool.spares as u64,
            boots: pool.boots,
            cold_boots: pool.cold_boots,
            restores: pool.restores,
            lease_waits: pool.waits,
            vm_failures: pool.boot_failures + pool.deaths + pool.poisoned,
            free_bytes: home.free_bytes().unwrap_or(0),
        }
    }
}

/// Runs blocking work on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| DriverError::Internal(e.to_string()))?
}

/// Opens a file for reading.
fn open(path: &Path) -> Result<std::fs::File, DriverError> {
    std::fs::File::open(path).map_err(DriverError::io("open", path))
}
