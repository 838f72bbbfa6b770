//! The end of one side of a channel at each frame of each operation: the other side ends as well, and what follows works.
//!
//! ```text
//!   pool ─► RelayVm ─► channel ─► relay: frame n of the operation ─► channel ─► agent
//!        attach, detach, open       │ killed   the machine is killed before it passes
//!        count as frames            │ cut      the channel is closed on both sides
//!                                   │ silent   nothing passes any more: the daemon's time-out ends it
//!                                   └ left     the daemon drops the operation
//! ```
//!
//! An operation that is nevertheless answered with success must have given the same bytes as undisturbed. Then the same
//! operation works in the same pool, and no machine, lease or process is left. By itself each frame of each operation on
//! the embedded backend, and three moments of an apply on the others; `LCOW_FRAMES=all` tries all on each
//! (`scripts/torture frames`). A daemon that is killed at each frame is in `tests/calls`.

use crate::{
    files::{Files, Tar, body, noise, tree},
    suite::{Backend, END, recoded},
    support::machine::Machine,
};
use disk_io::WriteAt;
use ext4_image::{
    format::{BlankOptions, blank},
    writer::Attributes,
};
use futures_util::{StreamExt, future::BoxFuture, stream};
use lcow_graphdriver::svm::{
    BackendLimits, Channel, CheckJob, CompareJob, CompressJob, Compression, Death, DiskId, DiskSource,
    ExpandJob, ExpandLimits, ExportJob, ExportKind, IdMaps, JailReport, LayerDisk, LayerKind, LiveControl,
    Mode, ParentDisks, Pool, PoolConfig, PoolVm, Purpose, ServiceVm, SvmError, VmBackend, VmSpec, Witness,
};
use std::{
    collections::HashMap,
    env, fs, io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use svm_protocol::{BlankRoot, HEADER_LEN, parse_header};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex, split},
    sync::Notify,
};

/// How long an operation may make no progress.
const IDLE: Duration = Duration::from_secs(1);
/// An operation that is not over by then waits for ever: much more than any time-out.
const PATIENCE: Duration = Duration::from_mins(1);
/// Bytes on their way between pool and relay.
const ROOM: usize = 16 << 10;
/// Cases at one time, most of which wait.
const AT_ONCE: usize = 8;
/// Operations with fewer frames were not seen.
const FEWEST_FRAMES: u64 = 2;
const SANDBOX_BYTES: u64 = 32 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Killed,
    Cut,
    Silent,
    Left,
}

const FATES: [Fate; 4] = [Fate::Killed, Fate::Cut, Fate::Silent, Fate::Left];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// With larger blocks from the midst on: an Event and its Resume.
    Apply,
    Exact,
    Canonical,
    /// Of a sandbox that is held still: Events and Resumes.
    Live,
    Changes,
    DiffSize,
    Written,
    Check,
    Compress,
    Expand,
}

const ALL: [What; 10] = [
    What::Apply,
    What::Exact,
    What::Canonical,
    What::Live,
    What::Changes,
    What::DiffSize,
    What::Written,
    What::Check,
    What::Compress,
    What::Expand,
];

/// What happens to the frames of a backend's channels.
#[derive(Default)]
struct Plan {
    /// Frames since the last [`Plan::begin`].
    passed: AtomicU64,
    /// The frame that the fate meets, from 0; [`u64::MAX`] for none.
    at: AtomicU64,
    fate: std::sync::Mutex<Option<Fate>>,
    silent: AtomicBool,
    met: AtomicBool,
    /// It was a frame of a channel: without it an operation is not complete.
    on_channel: AtomicBool,
    left: Notify,
    /// The machine that was killed, or that the pool ends for its silence.
    ends: std::sync::Mutex<Option<String>>,
    /// Disks of each machine, those that are being attached among them.
    disks: std::sync::Mutex<HashMap<String, usize>>,
}

/// A disk that is being attached; it counts until it is detached, unless that fails.
struct Attaching<'a> {
    plan: &'a Plan,
    machine: String,
    attached: bool,
}

impl Drop for Attaching<'_> {
    fn drop(&mut self) {
        if !self.attached {
            self.plan.released(&self.machine);
        }
    }
}

impl Plan {
    fn attaching(&self, machine: String) -> Attaching<'_> {
        *self.disks.lock().unwrap().entry(machine.clone()).or_default() += 1;
        Attaching { plan: self, machine, attached: false }
    }

    fn released(&self, machine: &str) {
        if let Some(disks) = self.disks.lock().unwrap().get_mut(machine) {
            *disks -= 1;
        }
    }

    /// Waits until no machine of the pool holds a disk: what an operation leaves to do behind its answer is then done, or
    /// the machine that does not do it has ended, like one that was killed.
    async fn quiet(&self, pool: &Pool) {
        let is_busy = |vm: PoolVm| {
            let ends = self.ends.lock().unwrap().as_ref() == Some(&vm.machine);
            ends || self.disks.lock().unwrap().get(&vm.machine).is_some_and(|disks| *disks > 0)
        };
        while pool.running().into_iter().any(is_busy) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn begin(&self, fate: Option<(Fate, u64)>) {
        *self.fate.lock().unwrap() = fate.map(|(fate, _)| fate);
        self.at.store(fate.map_or(u64::MAX, |(_, at)| at), Ordering::SeqCst);
        self.passed.store(0, Ordering::SeqCst);
        self.silent.store(false, Ordering::SeqCst);
        self.met.store(false, Ordering::SeqCst);
        self.on_channel.store(false, Ordering::SeqCst);
    }

    /// Kills a machine, which may have ended already.
    fn kill(&self, name: &str) {
        let machine = Machine::of(name);
        if machine.is_alive() {
            machine.kill();
        }
        *self.ends.lock().unwrap() = Some(name.to_owned());
    }

    /// What meets the next frame.
    fn next(&self) -> Option<Fate> {
        if self.passed.fetch_add(1, Ordering::SeqCst) != self.at.load(Ordering::SeqCst) {
            return None;
        }
        self.met.store(true, Ordering::SeqCst);
        *self.fate.lock().unwrap()
    }
}

/// A backend whose channels pass through a relay.
struct Relay {
    inner: Backend,
    plan: Arc<Plan>,
}

impl VmBackend for Relay {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn limits(&self) -> BackendLimits {
        self.inner.limits()
    }

    fn boot(&self, spec: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>> {
        Box::pin(async {
            let inner = self.inner.boot(spec).await?;
            Ok(Arc::new(RelayVm { inner, plan: self.plan.clone() }) as Arc<dyn ServiceVm>)
        })
    }

    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>> {
        self.inner.reap()
    }
}

struct RelayVm {
    inner: Arc<dyn ServiceVm>,
    plan: Arc<Plan>,
}

impl std::fmt::Debug for RelayVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

impl RelayVm {
    /// A request about disks or channels counts as a frame. A machine that is silent answers none.
    async fn asked(&self) {
        match self.plan.next() {
            None => {}
            Some(Fate::Killed | Fate::Cut) => self.plan.kill(&self.inner.describe()),
            // One that does not release its disks is ended, with whatever else it does.
            Some(Fate::Silent) => {
                self.plan.silent.store(true, Ordering::SeqCst);
                *self.plan.ends.lock().unwrap() = Some(self.inner.describe());
            }
            Some(Fate::Left) => self.plan.left.notify_one(),
        }
        if self.plan.silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }
}

impl ServiceVm for RelayVm {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn attach<'a>(&'a self, disk: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
        Box::pin(async move {
            let mut attaching = self.plan.attaching(self.inner.describe());
            self.asked().await;
            let disk = self.inner.attach(disk).await?;
            attaching.attached = true;
            Ok(disk)
        })
    }

    fn detach(&self, disk: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
        Box::pin(async move {
            self.asked().await;
            self.inner.detach(disk).await?;
            self.plan.released(&self.inner.describe());
            Ok(())
        })
    }

    fn grown<'a>(&'a self, disk: &'a DiskSource, len: u64) -> BoxFuture<'a, Result<(), SvmError>> {
        self.inner.grown(disk, len)
    }

    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
        Box::pin(async {
            self.asked().await;
            let agent = self.inner.open_channel().await?;
            let (ours, theirs) = duplex(ROOM);
            tokio::spawn(relay(theirs, agent, self.plan.clone(), self.inner.describe()));
            Ok(Box::new(ours) as Channel)
        })
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
        self.inner.ping()
    }

    fn terminate(&self) -> BoxFuture<'_, ()> {
        self.inner.terminate()
    }

    fn death(&self) -> BoxFuture<'_, Death> {
        self.inner.death()
    }

    fn console(&self) -> String {
        self.inner.console()
    }

    fn daemon_digests(&self) -> bool {
        self.inner.daemon_digests()
    }

    fn jail(&self) -> Option<JailReport> {
        self.inner.jail()
    }

    fn witness(&self) -> Option<Witness> {
        self.inner.witness()
    }
}

/// Passes frames both ways until one side closes or the fate ends it.
async fn relay(daemon: DuplexStream, agent: Channel, plan: Arc<Plan>, machine: String) {
    let (from_daemon, to_daemon) = split(daemon);
    let (from_agent, to_agent) = split(agent);
    tokio::select! {
        () = pass(from_daemon, to_agent, &plan, &machine) => {}
        () = async {
            pass(from_agent, to_daemon, &plan, &machine).await;
            // Silence has no end that the daemon could see: its own end of the channel ends the relay.
            if plan.silent.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
        } => {}
    }
}

async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, plan: &Plan, machine: &str) {
    loop {
        let mut head = [0; HEADER_LEN];
        if from.read_exact(&mut head).await.is_err() {
            return;
        }
        let (_, len) = parse_header(head).expect("a frame");
        let mut frame = vec![0; HEADER_LEN + len];
        frame[..HEADER_LEN].copy_from_slice(&head);
        if from.read_exact(&mut frame[HEADER_LEN..]).await.is_err() {
            return;
        }
        let fate = plan.next();
        plan.on_channel.fetch_or(fate.is_some(), Ordering::SeqCst);
        match fate {
            None => {}
            Some(Fate::Killed) => plan.kill(machine),
            Some(Fate::Cut) => return,
            Some(Fate::Silent) => plan.silent.store(true, Ordering::SeqCst),
            // The daemon's end is dropped, and the relay with it.
            Some(Fate::Left) => plan.left.notify_one(),
        }
        if plan.silent.load(Ordering::SeqCst) {
            continue;
        }
        if to.write_all(&frame).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

/// A sandbox without writers.
struct Still;

impl LiveControl for Still {
    fn freeze(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn thaw(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

/// Layers that operations are about, and a number for what each makes.
struct Ground {
    files: Files,
    packed: Vec<u8>,
    tar: Vec<u8>,
    made: AtomicUsize,
}

impl Ground {
    /// Made without a relay.
    async fn new(backend: &Backend) -> Self {
        let files = Files::new();
        let pool = Pool::start(backend.clone(), config());
        let layer = tree(3, 60_000, 1);
        files.apply(&pool, "layer", &layer).await.unwrap();
        let lease = pool.lease("packed", Purpose::Work).await.unwrap();
        let job = CompressJob::reproducible(Compression::Gzip);
        let (packed, _) = recoded(lease.compress(job, body(&layer, 60_000)).await.unwrap()).await.unwrap();
        pool.shutdown(END).await;
        let disk = files.writable("sandbox");
        disk.file.set_len(SANDBOX_BYTES).unwrap();
        let root = Attributes { permissions: 0o755, ..Attributes::default() };
        let directories = ["upper", "work"].map(|name| (name.as_bytes().to_vec(), root)).to_vec();
        let options = BlankOptions { root, directories, ..BlankOptions::default() };
        for (offset, data) in blank(SANDBOX_BYTES, &options).unwrap() {
            disk.file.write_all_at(&data, offset).unwrap();
        }
        let far = "far/".repeat(700);
        let tar = Tar::default().file("f", &noise(90_000, 4)).long_link("far", &far).end();
        Self { files, packed, tar, made: AtomicUsize::new(0) }
    }

    fn sandbox(&self, live: Option<Arc<dyn LiveControl>>) -> CompareJob {
        let target = vec![LayerDisk { disk: self.files.readable("sandbox"), kind: LayerKind::Sandbox }];
        CompareJob { target, parent: ParentDisks::Own, live }
    }

    /// Runs an operation; what it gave, as bytes.
    async fn run(&self, pool: &Pool, what: What) -> Result<Vec<u8>, SvmError> {
        let files = &self.files;
        let purpose = if matches!(what, What::Exact | What::Canonical | What::Live) {
            Purpose::Export
        } else {
            Purpose::Work
        };
        if what == What::Check {
            let image = files.image("layer");
            let check = CheckJob {
                image,
                require_no_writers: true,
                tree: false,
                writer: 2,
                owners: IdMaps::default(),
            };
            return pool.check_image(check).await.map(|summary| format!("{summary:?}").into_bytes());
        }
        if purpose == Purpose::Export {
            let job = match what {
                What::Exact => files.exact("layer"),
                What::Canonical => files.canonical(&["layer"], ParentDisks::None),
                _ => {
                    let CompareJob { target, parent, live } = self.sandbox(Some(Arc::new(Still)));
                    let kind = ExportKind::Canonical {
                        target,
                        parent,
                        format: 2,
                        id_maps: IdMaps::default(),
                        source_date_epoch: None,
                    };
                    ExportJob { kind, live }
                }
            };
            return files.export(pool, "x", job).await;
        }
        let lease = pool.lease("x", purpose).await?;
        match what {
            What::Apply => {
                let name = format!("made{}", self.made.fetch_add(1, Ordering::SeqCst));
                let mut job = files.apply_job(&name);
                job.larger = Some(files.larger(&name));
                lease.tar_to_layer(job, body(&self.tar, 30_000)).await?;
                let read = |kind| fs::read(files.path(&format!("{name}.larger.{kind}"))).unwrap();
                Ok([read("vhd"), read("record")].concat())
            }
            What::Changes => {
                lease.changes(files.compare(&["layer"])).await.map(|found| format!("{found:?}").into_bytes())
            }
            What::DiffSize => {
                lease.diff_size(files.compare(&["layer"])).await.map(|size| size.to_le_bytes().to_vec())
            }
            What::Written => {
                let root = BlankRoot { permissions: 0o755, uid: 0, gid: 0 };
                lease.written(self.sandbox(Some(Arc::new(Still))), root).await.map(|found| vec![found.into()])
            }
            What::Compress => {
                let job = CompressJob::reproducible(Compression::Zstd);
                Ok(recoded(lease.compress(job, body(&self.tar, 30_000)).await?).await?.0)
            }
            _ => {
                let job = ExpandJob { format: None, limits: ExpandLimits::of_output(1 << 30) };
                Ok(recoded(lease.expand(job, body(&self.packed, 30_000)).await?).await?.0)
            }
        }
    }
}

fn config() -> PoolConfig {
    PoolConfig {
        mode: Mode::Global,
        spares: 0,
        max_vms: 4,
        boot_timeout: Duration::from_mins(2),
        idle_timeout: IDLE,
        ping_interval: Duration::ZERO,
        reap: false,
        ..PoolConfig::default()
    }
}

fn relayed(backend: &Backend) -> (Pool, Arc<Plan>) {
    let plan = Arc::new(Plan::default());
    plan.begin(None);
    let relay = Relay { inner: backend.clone(), plan: plan.clone() };
    (Pool::start(Arc::new(relay), config()), plan)
}

/// What an operation gives undisturbed, and its frames.
async fn undisturbed(backend: &Backend, ground: &Ground, what: What) -> (Vec<u8>, u64) {
    let (pool, plan) = relayed(backend);
    let bytes = ground.run(&pool, what).await.unwrap_or_else(|e| panic!("{what:?}: {e}"));
    plan.quiet(&pool).await;
    let frames = plan.passed.load(Ordering::SeqCst);
    pool.shutdown(END).await;
    assert!(frames >= FEWEST_FRAMES, "{what:?}: only {frames} frames");
    (bytes, frames)
}

/// One fate; whether the frame was met, and whether the operation failed.
async fn meet(backend: &Backend, ground: &Ground, case: (What, Fate, u64), expected: &[u8]) -> (bool, bool) {
    let (what, fate, at) = case;
    let (pool, plan) = relayed(backend);
    plan.begin(Some((fate, at)));
    let ended = tokio::time::timeout(PATIENCE, async {
        tokio::select! {
            ended = ground.run(&pool, what) => Some(ended),
            () = plan.left.notified() => None,
        }
    });
    let ended = ended.await.unwrap_or_else(|_| panic!("{case:?}: the daemon waits for ever"));
    let on_channel = plan.on_channel.load(Ordering::SeqCst);
    // The fate may still meet the release of disks, which an answer does not wait for.
    tokio::time::timeout(PATIENCE, plan.quiet(&pool))
        .await
        .unwrap_or_else(|_| panic!("{case:?}: the pool keeps disks, or a dead machine"));
    let met = plan.met.load(Ordering::SeqCst);
    let failed = match ended {
        Some(Ok(bytes)) => {
            assert!(bytes == expected, "{case:?}: success with other bytes");
            assert!(
                !(on_channel && matches!(fate, Fate::Cut | Fate::Silent)),
                "{case:?}: success without all frames"
            );
            false
        }
        Some(Err(_)) => {
            assert!(met, "{case:?}: it failed undisturbed");
            true
        }
        None => true,
    };
    plan.begin(None);
    let again = tokio::time::timeout(PATIENCE, ground.run(&pool, what)).await;
    let again = again.unwrap_or_else(|_| panic!("{case:?}: what follows waits for ever"));
    let again = again.unwrap_or_else(|e| panic!("{case:?}: what follows fails: {e}"));
    assert!(again == expected, "{case:?}: what follows gives other bytes");
    let machines: Vec<Machine> = pool.running().iter().map(|vm| Machine::of(&vm.machine)).collect();
    tokio::time::timeout(PATIENCE, pool.shutdown(END)).await.expect("the pool ends");
    let snapshot = pool.snapshot();
    assert!(snapshot.vms.is_empty() && snapshot.leases == 0, "{case:?}: {snapshot:?}");
    assert!(machines.iter().all(|machine| !machine.is_alive()), "{case:?}: a machine is left");
    (met, failed)
}

/// Every frame of these operations, or three of each.
async fn at_frames(backend: Backend, operations: &[What], fates: &[Fate], every: bool) {
    let ground = Ground::new(&backend).await;
    for what in operations {
        let (expected, frames) = undisturbed(&backend, &ground, *what).await;
        let moments: Vec<u64> = if every { (0..frames).collect() } else { vec![0, frames / 2, frames - 1] };
        let cases: Vec<(What, Fate, u64)> =
            moments.iter().flat_map(|at| fates.iter().map(|fate| (*what, *fate, *at))).collect();
        let at_once = if every { AT_ONCE } else { 1 };
        let outcomes: Vec<(bool, bool)> = stream::iter(cases.iter())
            .map(|case| meet(&backend, &ground, *case, &expected))
            .buffer_unordered(at_once)
            .collect()
            .await;
        let met = outcomes.iter().filter(|(met, _)| *met).count();
        let failed = outcomes.iter().filter(|(_, failed)| *failed).count();
        println!(
            "{} {what:?}: {frames} frames, {} ends, {met} met, {failed} failed operations",
            backend.name(),
            cases.len()
        );
        // A stream may be cut into other frames.
        assert!(met * 10 >= cases.len() * 6 && failed * 2 >= met, "{what:?}: the relay met too little");
    }
}

fn all_is_wanted() -> bool {
    env::var("LCOW_FRAMES").is_ok_and(|value| value == "all")
}

pub(crate) async fn an_end_at_each_frame(backend: Backend) {
    if all_is_wanted() || backend.name() == "embedded" {
        at_frames(backend, &ALL, &FATES, true).await;
    } else {
        at_frames(backend, &[What::Apply], &[Fate::Killed], false).await;
    }
}
