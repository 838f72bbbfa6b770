//! The graphdriver: creates, mounts, compares, fills and removes layers.
//!
//! ```text
//!            ┌──────────── Driver: the homes of this process, the last Init's is current ───────────┐
//!   api ───► │ lifecycle  create, remove, metadata, status, cleanup     ──► store                   │
//!            │ views      get, put: mounts of images and sandboxes      ──► store, sys              │
//!            │ apply      apply_diff: a tar becomes an image            ──► svm, store              │
//!            │ diff       diff, changes, diff_size                      ──► svm, store              │
//!            │ pristine   a sandbox that was never written takes a tar  ──► svm, store              │
//!            │ leftovers  what a killed process left mounted or frozen  ──► sys                     │
//!            │ kept       images that stay mounted for the next view    ──► sys                     │
//!            └──────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The phases of a request. What stands in one row happens in that order; each phase knows only the results of those
//! before it, and a failure in any of them undoes what its own row has begun.
//!
//! ```text
//!             look            hold                   act                                       publish
//!   Create    snapshot        claim of the folder    files in staging, synced                  rename, index
//!   ApplyDiff snapshot, door  claim for the mark     tar ─► VM ─► image; check in a fresh VM   rename of layer.json, index
//!   Get, Put  chain           gates of all disks     mounts, unmounts                          counts
//!   Diff      snapshot        gates while metadata   VM ─► tar, digest                         last chunk, or the cut
//!                             are read (freeze)
//!   Remove    snapshot        gates to the rename    unmounts                                  rename, index; deletion later
//! ```
//!
//! Invariants:
//! * No byte of a layer is interpreted here: `apply` and `diff` open files and hand descriptors to a service VM.
//! * No lock is held across bulk I/O; gates are held while mounts change and while metadata are read.
//! * No task of the runtime waits for a disk; `on_disk_thread` and `blocking` run such work on threads of their own.
//! * A request reads the state of a layer once, as a snapshot, or under the layer's closed gate.
//! * A layer's state changes only by the store's atomic commits.
//! * The host mounts only images that a second, fresh service VM has checked, and sandboxes that this driver formatted.
//!
//! [`Driver`] is one type with an `impl` per file: `lifecycle`, `views`, `apply`, `diff` and `scrub`. So is
//! [`Home`](home::Home): opening and options in `home`, Get and Put in `views`, applies in `apply`, stacks of disks in
//! `comparison`, freezing in `live`, sandboxes without changes in `pristine`. Called by `api`, `migrate` and the
//! `store` commands.

mod apply;
mod clients;
mod comparison;
mod cut;
mod diff;
mod door;
mod error;
mod gates;
mod growth;
mod home;
mod image;
#[cfg(target_os = "linux")]
mod kept;
#[cfg(target_os = "linux")]
mod leftovers;
mod lifecycle;
mod live;
#[cfg(target_os = "linux")]
mod mounts;
#[cfg(all(test, target_os = "linux"))]
mod power_tests;
mod pristine;
mod refusal;
#[cfg(target_os = "linux")]
mod remap;
mod remembered;
mod room;
mod root;
mod sandbox;
mod scrub;
mod shown;
pub mod snapshots;
mod space;
mod views;

pub use crate::svm::replayed_within;
pub use clients::Clients;
pub use error::DriverError;
pub use space::SandboxGrown;
#[cfg(target_os = "linux")]
pub use space::Trimmed;

use crate::{
    config::Options,
    store::{DiskThread, InitRecord, LayerId, Marker, durable},
    svm::Change,
    telemetry::{Gauges, Phases},
};
use home::Home;
#[cfg(target_os = "linux")]
pub(crate) use home::embedded_config;
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// File below the service's root that holds the last Init: the engine does not repeat it after a crash.
const LAST_INIT: &str = "last-init.json";
/// How long operations may go on when service VMs are retired or the program stops.
const GRACE: Duration = Duration::from_secs(5);

/// A request that names a layer.
#[derive(Debug, Clone, Default)]
pub struct LayerRequest {
    /// The layer.
    pub id: String,
    /// Its parent, or empty.
    pub parent: String,
    /// `--storage-opt` of one container.
    pub storage_opt: BTreeMap<String, String>,
}

/// One changed path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedPath {
    /// Absolute path in the layer, raw bytes.
    pub path: Vec<u8>,
    /// 0 modified, 1 added, 2 deleted, as the engine numbers them.
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
    /// Options from the command line, environment and file; those of Init take precedence.
    pub options: Options,
    /// The program that is started as a worker; `None` for this program.
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
    config: Arc<DriverConfig>,
    homes: Arc<RwLock<Homes>>,
    /// Serializes Inits and the opening of homes. The guard moves into the work, so it is held even if the request is
    /// dropped.
    init: Arc<tokio::sync::Mutex<()>>,
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
    /// A driver that continues where an earlier process stopped: opens the home of the last Init with the options of
    /// that Init. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The root or the home cannot be used, another process owns the store, or the backend that the options name does
    /// not work here.
    pub fn start(config: DriverConfig) -> Result<Self, DriverError> {
        // Nothing else runs yet.
        let thread = &DiskThread::here();
        let last = Self::last_home(&config.root)?;
        home::check_backend(&config.options, &config)?;
        root::prepare(&config.root, last.as_deref())?;
        let driver = Self::new(config);
        if let Some(home) = last {
            // An error of the disk must not look like a home that was deleted: all layers would be unknown.
            let there = match std::fs::metadata(&home) {
                Ok(metadata) => metadata.is_dir(),
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => false,
                Err(e) => return Err(DriverError::io("look at the last Init's home", &home)(e)),
            };
            if there {
                let opened = Home::open(thread, &home, None, &driver.config)?;
                // The next Init may choose another backend, so the process goes on.
                if let Err(error) = home::check_backend(&opened.options, &driver.config) {
                    tracing::error!(
                        "no layer can be handled until this is fixed or Init chooses another backend: {error}"
                    );
                }
                driver.homes.write().adopt(home, opened);
            } else {
                tracing::warn!(home = %home.display(), "the last Init's home is gone; waiting for the next Init");
            }
        }
        Ok(driver)
    }

    fn new(config: DriverConfig) -> Self {
        Self {
            config: Arc::new(config),
            homes: Arc::default(),
            init: Arc::default(),
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

    /// A driver that reads a store next to its owner, for scrub, which changes nothing. Blocks: for commands only.
    pub fn inspect(home: &Path, config: DriverConfig) -> Result<Self, DriverError> {
        Ok(Self::with_home(Home::inspect(&DiskThread::here(), home, &config)?, home, config))
    }

    /// A driver that owns `home`, whatever the last Init named; opening a store repairs it. Blocks: for commands only.
    pub fn repair(home: &Path, config: DriverConfig) -> Result<Self, DriverError> {
        let thread = &DiskThread::here();
        let snapshots = Marker::read(home)?.is_some_and(|marker| marker.snapshot_numbers.is_some());
        let opened = if snapshots {
            Home::open_snapshots(thread, home, &config)?
        } else {
            Home::open(thread, home, None, &config)?
        };
        Ok(Self::with_home(opened, home, config))
    }

    fn with_home(opened: Home, path: &Path, config: DriverConfig) -> Self {
        let driver = Self::new(config);
        driver.homes.write().adopt(path.to_owned(), opened);
        driver
    }

    /// Faults that show without opening an image.
    pub async fn structural_faults(&self) -> Result<Vec<(LayerId, String)>, DriverError> {
        let home = self.home().await?;
        on_disk_thread(move |thread| Ok(home.store.structural_faults(thread))).await
    }

    fn current(&self) -> Option<Arc<Home>> {
        self.homes.read().current.clone()
    }

    /// The home that serves requests now. If a failed write left the state of a layer uncertain, it is read again
    /// first.
    async fn home(&self) -> Result<Arc<Home>, DriverError> {
        let home = match self.current() {
            Some(home) => home,
            None => self.open_root().await?,
        };
        if home.store.is_unsettled() {
            let settling = home.clone();
            on_disk_thread(move |thread| {
                settling.store.settle(thread);
                Ok(())
            })
            .await?;
        }
        Ok(home)
    }

    /// Without an Init the root itself is the home, for use with curl.
    async fn open_root(&self) -> Result<Arc<Home>, DriverError> {
        let one_at_a_time = self.init.clone().lock_owned().await;
        if let Some(home) = self.current() {
            return Ok(home);
        }
        let (config, homes, runtime) =
            (self.config.clone(), self.homes.clone(), tokio::runtime::Handle::current());
        on_disk_thread(move |thread| {
            let _context = runtime.enter();
            let opened = Home::open(thread, &config.root, None, &config)?;
            let home = homes.write().adopt(config.root.clone(), opened);
            drop(one_at_a_time);
            Ok(home)
        })
        .await
    }

    /// `GraphDriver.Init`: makes `path` the home that serves requests, with these options. An Init that fails changes
    /// nothing.
    ///
    /// # Errors
    /// A relative path, an unknown or invalid option, or a store that cannot be used.
    pub async fn init(&self, path: PathBuf, record: InitRecord) -> Result<(), DriverError> {
        if !path.is_absolute() {
            return Err(DriverError::Usage(format!(
                "Init: Home '{}' is not an absolute path",
                path.display()
            )));
        }
        let one_at_a_time = self.init.clone().lock_owned().await;
        let (config, homes, runtime) =
            (self.config.clone(), self.homes.clone(), tokio::runtime::Handle::current());
        on_disk_thread(move |thread| {
            let _context = runtime.enter();
            let options = home::options_of(&record, &config)?;
            home::check_backend(&options, &config)?;
            let known = homes.read().open.get(&path).cloned();
            let remember = || {
                let last = LastInit { home: path.clone() };
                durable::write_json(&config.root.join(LAST_INIT), &last)
            };
            match known {
                Some(home) if home.init == record => {
                    remember()?;
                    homes.write().current = Some(home);
                }
                Some(home) => {
                    let renewed = home.with_init(thread, record, &config)?;
                    if let Err(error) = remember() {
                        // Restore what the store has recorded, too.
                        home.store.record_init(thread, home.init.clone())?;
                        runtime.spawn(async move { renewed.retire().await });
                        return Err(error.into());
                    }
                    homes.write().adopt(path.clone(), renewed);
                    // Operations under the old options may finish; new requests do not wait for them.
                    runtime.spawn(async move { home.retire().await });
                }
                None => {
                    let opened = Home::open(thread, &path, Some(record), &config)?;
                    if let Err(error) = remember() {
                        runtime.spawn(async move { opened.retire().await });
                        return Err(error.into());
                    }
                    homes.write().adopt(path.clone(), opened);
                }
            }
            tracing::info!(home = %path.display(), "init");
            drop(one_at_a_time);
            Ok(())
        })
        .await
    }

    /// `GraphDriver.Capabilities`.
    pub async fn reproduces_exact_diffs(&self) -> Result<bool, DriverError> {
        Ok(self.home().await?.store.marker().reproduces_exact_diffs)
    }

    /// How long a transfer may make no progress (`lcow.timeout`).
    pub fn idle_timeout(&self) -> Duration {
        self.homes
            .read()
            .current
            .as_ref()
            .map_or(self.config.options.idle_timeout, |h| h.options.idle_timeout)
    }

    /// Ends service VMs in order, and unmounts what nothing uses. Mounts of running containers stay.
    pub async fn stop(&self) {
        for home in self.homes() {
            home.pool.shutdown(GRACE).await;
            home.unmount_idle().await;
        }
    }

    /// Unmounts the disks of layers that no container uses (`lcow.mount.keep`).
    pub async fn unmount_idle(&self) {
        for home in self.homes() {
            home.unmount_idle().await;
        }
    }

    fn homes(&self) -> Vec<Arc<Home>> {
        self.homes.read().open.values().cloned().collect()
    }

    /// The running service VMs, for `svm ls`; none before Init.
    pub fn service_vms(&self) -> Vec<crate::svm::PoolVm> {
        let home = self.homes.read().current.clone();
        home.map(|home| home.pool.running()).unwrap_or_default()
    }

    /// Current counts, for metrics.
    pub async fn gauges(&self) -> Gauges {
        match self.current() {
            Some(home) => home.gauges().await,
            None => Gauges::default(),
        }
    }
}

impl Home {
    /// Current counts, for metrics.
    async fn gauges(self: &Arc<Self>) -> Gauges {
        let home = self;
        let measured = home.clone();
        let free = blocking(move || Ok(measured.free_bytes())).await.ok().flatten();
        let pool = home.pool.snapshot();
        let (mounts, disks, kept) = home.mount_counts();
        Gauges {
            layers: home.store.len() as u64,
            mounts,
            disks,
            kept,
            service_vms: (pool.vms.len() + pool.spares + pool.booting) as u64,
            spares: pool.spares as u64,
            boots: pool.boots,
            cold_boots: pool.cold_boots,
            restores: pool.restores,
            lease_waits: pool.waits,
            vm_failures: pool.boot_failures + pool.deaths + pool.poisoned,
            free_bytes: free.unwrap_or(0),
        }
    }
}

impl Homes {
    /// Makes `home` the one that serves requests.
    fn adopt(&mut self, path: PathBuf, home: Home) -> Arc<Home> {
        let home = Arc::new(home);
        self.open.insert(path, home.clone());
        self.current = Some(home.clone());
        home
    }
}

/// Whether two paths name the same directory.
fn same_directory(one: &Path, other: &Path) -> bool {
    one == other || one.canonicalize().is_ok_and(|one| other.canonicalize().is_ok_and(|other| one == other))
}

/// Runs file work of the store on a thread that may wait.
async fn on_disk_thread<T: Send + 'static>(
    work: impl FnOnce(&DiskThread) -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    DiskThread::run(work).await.map_err(|e| DriverError::Internal(format!("a task ended early: {e}")))?
}

/// Runs blocking work on a thread that may wait.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .map_err(|e| DriverError::Internal(format!("a task ended early: {e}")))?
}

/// Opens a file for reading.
fn open(path: &Path) -> Result<std::fs::File, DriverError> {
    std::fs::File::open(path).map_err(DriverError::io("open", path))
}
