//! Pool, leases and the embedded backend with real worker processes.
//!
//! The workers are this test program itself, started again for its test `worker_entry`, so that they can run a test
//! codec; the jail of the real program is tested by its own self-test.

mod codec;
mod recode;

use bytes::Bytes;
use codec::TestCodec;
use futures_util::{StreamExt, stream};
use lcow_graphdriver::svm::{
    ApplyJob, ApplyOptions, CheckJob, CompareJob, DiskFormat, DiskSource, ExportJob, ExportKind, IdMaps,
    LayerDisk, LayerKind, LiveControl, Mode, ParentDisks, Pool, PoolConfig, Purpose, SvmError, VmBackend,
    VmSpec,
    embedded::{EmbeddedBackend, EmbeddedConfig},
};
use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use svm_agent::{codec::Codec, worker_main};
use svm_protocol::ErrorKind;

const MARK: &str = "LCOW_TEST_WORKER";

/// Not a test of its own: what a worker of the other tests runs.
#[test]
fn worker_entry() {
    if std::env::var_os(MARK).is_some() {
        let codec: Arc<dyn Codec> = Arc::new(TestCodec);
        std::process::exit(worker_main(&[], &codec));
    }
}

fn backend() -> Arc<EmbeddedBackend> {
    Arc::new(EmbeddedBackend::new(EmbeddedConfig {
        program: std::env::current_exe().unwrap(),
        args: ["--exact", "worker_entry", "--test-threads=1", "--nocapture", "-q"].map(Into::into).to_vec(),
        env: vec![(MARK.into(), "1".into())],
        ..EmbeddedConfig::default()
    }))
}

fn pool(mode: Mode) -> Pool {
    let config = PoolConfig { mode, spares: 1, max_vms: 8, ..PoolConfig::default() };
    Pool::start(backend(), config)
}

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn writable(&self, name: &str) -> DiskSource {
        let path = self.path(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        DiskSource::read_write(Arc::new(file), path)
    }

    fn readable(&self, name: &str) -> DiskSource {
        DiskSource::read_only(Arc::new(File::open(self.path(name)).unwrap()), self.path(name))
    }

    fn with(&self, name: &str, content: &[u8]) -> DiskSource {
        std::fs::write(self.path(name), content).unwrap();
        self.readable(name)
    }

    fn apply(&self, name: &str) -> ApplyJob {
        ApplyJob {
            image: self.writable(&format!("{name}.image")),
            record: self.writable(&format!("{name}.record")),
            scratch: None,
            lowers: Vec::new(),
            larger: None,
            options: ApplyOptions::default(),
        }
    }

    fn exact(&self, name: &str) -> ExportJob {
        let image = self.readable(&format!("{name}.image"));
        let record = self.readable(&format!("{name}.record"));
        ExportJob { kind: ExportKind::Exact { image, record }, live: None }
    }

    fn compare(&self, content: &[u8], live: Option<Arc<dyn LiveControl>>) -> CompareJob {
        let disk = self.with("target", content);
        CompareJob {
            target: vec![LayerDisk { disk, kind: LayerKind::Sandbox }],
            parent: ParentDisks::Own,
            live,
        }
    }
}

fn body(content: &[u8], chunk: usize) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + use<> {
    let content = Bytes::copy_from_slice(content);
    let all: Vec<_> =
        (0..content.len()).step_by(chunk).map(|at| (at, (at + chunk).min(content.len()))).collect();
    stream::iter(all.into_iter().map(move |(a, b)| Ok(content.slice(a..b))))
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n / 7) as u8 ^ seed).collect()
}

async fn collect(mut tar: lcow_graphdriver::svm::TarStream) -> Result<Vec<u8>, SvmError> {
    let mut all = Vec::new();
    while let Some(chunk) = tar.next().await {
        all.extend_from_slice(&chunk?);
    }
    assert!(tar.complete(), "a stream without error must be complete");
    Ok(all)
}

fn worker_pid(description: &str) -> i32 {
    description.split(' ').nth(1).unwrap().parse().unwrap()
}

fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Waits for something that happens in the background.
async fn soon(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lowers_of_an_apply_are_lent_when_they_are_asked_for() {
    let (pool, files) = (pool(Mode::Safe), Files::new());
    let lower = |name: &str, bytes: usize| {
        let disk = files.with(name, &pattern(bytes, 9));
        LayerDisk { disk, kind: LayerKind::Applied }
    };
    let job = |lowers: &[LayerDisk]| ApplyJob { lowers: lowers.to_vec(), ..files.apply("l") };
    let lowers = [lower("one", 1000), lower("two", 200), lower("three", 30)];
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    let mut tar = b"below".to_vec();
    tar.extend(pattern(700_000, 1));
    let summary = lease.tar_to_layer(job(&lowers), body(&tar, 9000)).await.unwrap();
    assert_eq!((summary.entries, summary.diff_size), (3, 1230));
    // A disk that can't be attached is in nobody's way as long as nobody looks at it.
    let mut odd = lowers.clone();
    odd[1].disk.format = DiskFormat::Vhdx;
    let summary = lease.tar_to_layer(job(&odd), body(b"a tar without such links", 9)).await.unwrap();
    assert_eq!((summary.entries, summary.diff_size), (3, 0));
    let failed = lease.tar_to_layer(job(&odd), body(&tar, 9000)).await.unwrap_err();
    assert!(matches!(failed, SvmError::Disk { .. }), "{failed}");
    drop(lease);
    pool.shutdown(Duration::from_secs(5)).await;
    assert!(pool.snapshot().vms.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tar_goes_in_and_comes_out_in_both_modes() {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(mode), Files::new());
        // Not a multiple of anything; chunks as small as a client's, and larger than a frame.
        for (len, chunk) in [(0, 1), (1, 1), (700_001, 37), (3_000_001, 1 << 20)] {
            let content = pattern(len, 3);
            let lease = pool.lease("a", Purpose::Work).await.unwrap();
            let expected = if mode == Mode::Safe { "a_svm" } else { "_lcow_global_svm_" };
            assert_eq!(lease.vm_name(), expected);
            let summary = lease.tar_to_layer(files.apply("l"), body(&content, chunk)).await.unwrap();
            assert_eq!(summary.tar_bytes, len as u64);
            drop(lease);
            assert_eq!(std::fs::read(files.path("l.image")).unwrap(), content);
            assert_eq!(std::fs::read(files.path("l.record")).unwrap(), b"record");
            let image = files.readable("l.image");
            let checked = pool
                .check_image(CheckJob {
                    image,
                    tree: false,
                    writer: 2,
                    require_no_writers: true,
                    owners: IdMaps::default(),
                })
                .await
                .unwrap();
            assert_eq!(checked.blocks, len as u64);
            let lease = pool.lease("a", Purpose::Export).await.unwrap();
            let tar = collect(lease.layer_to_tar(files.exact("l")).await.unwrap()).await.unwrap();
            assert_eq!(tar, content);
        }
        let jail = pool.snapshot().jail.unwrap();
        assert!(jail.seccomp && jail.no_new_privs, "{jail:?}");
        pool.shutdown(Duration::from_secs(5)).await;
        assert!(pool.snapshot().vms.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_proves_nothing_while_somebody_can_still_write() {
    let (pool, files) = (pool(Mode::Safe), Files::new());
    let writer = files.writable("image");
    let image = files.readable("image");
    let e = pool
        .check_image(CheckJob {
            image,
            tree: false,
            writer: 2,
            require_no_writers: true,
            owners: IdMaps::default(),
        })
        .await
        .unwrap_err();
    assert!(matches!(e, SvmError::StillWritable(_)), "{e}");
    drop(writer);
    let image = files.readable("image");
    pool.check_image(CheckJob {
        image,
        tree: false,
        writer: 2,
        require_no_writers: true,
        owners: IdMaps::default(),
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_4_a_read_only_disk_stays_read_only_even_from_a_writable_file() {
    let (pool, files) = (pool(Mode::Global), Files::new());
    let mut image = files.writable("image");
    image.access = lcow_graphdriver::svm::Access::ReadOnly;
    // The test codec's check tries to write.
    pool.check_image(CheckJob {
        image,
        tree: false,
        writer: 2,
        require_no_writers: false,
        owners: IdMaps::default(),
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_5_a_cut_or_refused_tar_is_an_error() {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(mode), Files::new());
        let lease = pool.lease("a", Purpose::Work).await.unwrap();
        let cut = body(b"some bytes", 3).chain(stream::iter([Err(io::Error::other("upload cut"))]));
        let e = lease.tar_to_layer(files.apply("l"), cut).await.unwrap_err();
        assert!(matches!(&e, SvmError::Body(m) if m.contains("upload cut")), "{e}");
        // Refused long before the body ends: the error comes at once, the rest is never read.
        let endless = body(b"bad!!", 5).chain(stream::repeat_with(|| Ok(Bytes::from_static(&[7; 4096]))));
        let e = lease.tar_to_layer(files.apply("l"), endless).await.unwrap_err();
        assert_eq!(e.refused_kind(), Some(ErrorKind::Corrupt), "{e}");
        let e = lease.tar_to_layer(files.apply("l"), body(b"panic", 5)).await.unwrap_err();
        assert_eq!(e.refused_kind(), Some(ErrorKind::Internal), "{e}");
        // The same VM goes on working.
        lease.tar_to_layer(files.apply("l"), body(b"good", 5)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_6_an_export_that_fails_late_or_dies_never_looks_complete() {
    let (pool, files) = (pool(Mode::Safe), Files::new());
    std::fs::write(files.path("l.record"), b"").unwrap();
    for (head, died) in [(b"later", false), (b"died!", true)] {
        let mut content = pattern(2 << 20, 1);
        content[..5].copy_from_slice(head);
        std::fs::write(files.path("l.image"), &content).unwrap();
        let lease = pool.lease("a", Purpose::Export).await.unwrap();
        let mut tar = lease.layer_to_tar(files.exact("l")).await.unwrap();
        let (mut got, mut failure) = (Vec::new(), None);
        while let Some(item) = tar.next().await {
            match item {
                Ok(bytes) => got.extend_from_slice(&bytes),
                Err(e) => failure = Some(e),
            }
        }
        assert!(!tar.complete());
        assert!(content.starts_with(&got));
        let failure = failure.expect("an error item");
        assert_eq!(matches!(failure, SvmError::Died { .. }), died, "{failure}");
    }
}

/// A caller that saw the end may ask at once for the VM that it used, or count what is in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_an_export_is_seen_only_after_its_lease_is_given_back() {
    let (pool, files) = (pool(Mode::Global), Files::new());
    std::fs::write(files.path("l.record"), b"").unwrap();
    std::fs::write(files.path("l.image"), b"small").unwrap();
    for round in 0..300 {
        let lease = pool.lease("a", Purpose::Export).await.unwrap();
        let tar = lease.layer_to_tar(files.exact("l")).await.unwrap();
        assert_eq!(collect(tar).await.unwrap(), b"small");
        assert_eq!(pool.snapshot().leases, 0, "round {round}");
    }
    pool.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_9_and_10_a_worker_killed_in_mid_stream_fails_one_request_and_leaves_nothing() {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(mode), Files::new());
        let lease = pool.lease("a", Purpose::Work).await.unwrap();
        let pid = worker_pid(&lease.vm_description());
        let killed = stream::iter([Ok(Bytes::from_static(b"first"))]).chain(stream::once(async move {
            rustix::process::kill_process(
                rustix::process::Pid::from_raw(pid).unwrap(),
                rustix::process::Signal::KILL,
            )
            .unwrap();
            Ok(Bytes::from(vec![1; 8 << 20]))
        }));
        let e = lease.tar_to_layer(files.apply("l"), killed).await.unwrap_err();
        assert!(matches!(&e, SvmError::Died { cause, .. } if cause.contains("signal 9")), "{e}");
        drop(lease);
        soon("the worker is reaped", || !alive(pid)).await;
        // Seen first by the watch on the process or by the failed operation; counted once.
        let s = pool.snapshot();
        assert_eq!(s.deaths + s.poisoned, 1, "{s:?}");
        // The next one gets a living VM.
        let lease = pool.lease("a", Purpose::Work).await.unwrap();
        lease.tar_to_layer(files.apply("l"), body(b"good", 5)).await.unwrap();
        let e = lease.tar_to_layer(files.apply("l"), body(b"crash", 5)).await.unwrap_err();
        assert!(matches!(&e, SvmError::Died { cause, .. } if cause.contains("signal 6")), "{e}");
        drop(lease);
        pool.shutdown(Duration::from_secs(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_2_one_vm_per_id_is_shared_and_ended_after_the_last() {
    let pool = pool(Mode::Safe);
    let (a, b) = tokio::join!(pool.lease("a", Purpose::Work), pool.lease("a", Purpose::Export));
    let (a, b) = (a.unwrap(), b.unwrap());
    let other = pool.lease("b", Purpose::Work).await.unwrap();
    assert_eq!(a.vm_description(), b.vm_description());
    assert_ne!(a.vm_description(), other.vm_description());
    let pid = worker_pid(&a.vm_description());
    drop(a);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(alive(pid));
    drop(b);
    soon("the VM of the id ends", || !alive(pid)).await;
}

async fn fifty(mode: Mode) {
    let (pool, files) = (pool(mode), Arc::new(Files::new()));
    let tasks: Vec<_> = (0..50u8)
        .map(|n| {
            let (pool, files) = (pool.clone(), files.clone());
            tokio::spawn(async move {
                let (name, content) = (format!("l{n}"), pattern(300_000 + n as usize, n));
                let lease = pool.lease(&format!("id{}", n % 20), Purpose::Work).await.unwrap();
                lease.tar_to_layer(files.apply(&name), body(&content, 10_000)).await.unwrap();
                drop(lease);
                let lease = pool.lease(&name, Purpose::Export).await.unwrap();
                let tar = collect(lease.layer_to_tar(files.exact(&name)).await.unwrap()).await.unwrap();
                assert!(tar == content, "layer {n} came back changed");
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let s = pool.snapshot();
    assert_eq!((s.leases, s.waiting, s.boot_failures, s.deaths), (0, 0, 0, 0), "{s:?}");
    pool.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_concurrent_operations_in_safe_mode() {
    fifty(Mode::Safe).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_concurrent_operations_in_global_mode() {
    fifty(Mode::Global).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diff_that_streams_into_an_apply_does_not_dead_lock_with_the_fewest_vms() {
    for mode in [Mode::Safe, Mode::Global] {
        let config = PoolConfig { mode, spares: 0, max_vms: 2, ..PoolConfig::default() };
        let (pool, files) = (Pool::start(backend(), config), Arc::new(Files::new()));
        let content = pattern(4 << 20, 9);
        let tasks: Vec<_> = (0..4)
            .map(|n| {
                let (pool, files, content) = (pool.clone(), files.clone(), content.clone());
                tokio::spawn(async move {
                    std::fs::write(files.path(&format!("s{n}.image")), &content).unwrap();
                    std::fs::write(files.path(&format!("s{n}.record")), b"").unwrap();
                    let source = pool.lease(&format!("s{n}"), Purpose::Export).await.unwrap();
                    let tar = source.layer_to_tar(files.exact(&format!("s{n}"))).await.unwrap();
                    let target = pool.lease(&format!("t{n}"), Purpose::Work).await.unwrap();
                    let tar = tar.map(|chunk| chunk.map_err(io::Error::from));
                    target.tar_to_layer(files.apply(&format!("t{n}")), tar).await.unwrap();
                    assert!(std::fs::read(files.path(&format!("t{n}.image"))).unwrap() == content);
                })
            })
            .collect();
        for task in tasks {
            tokio::time::timeout(Duration::from_mins(1), task).await.expect("dead lock").unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_stream_cancels_and_frees_the_lease() {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(mode), Files::new());
        let target =
            vec![LayerDisk { disk: files.with("t", &pattern(1 << 20, 0)), kind: LayerKind::Applied }];
        let kind = ExportKind::Canonical {
            target,
            parent: ParentDisks::None,
            format: 1,
            id_maps: IdMaps::default(),
            source_date_epoch: None,
        };
        let lease = pool.lease("a", Purpose::Export).await.unwrap();
        let mut tar = lease.layer_to_tar(ExportJob { kind, live: None }).await.unwrap();
        assert!(tar.next().await.unwrap().is_ok());
        assert_eq!(pool.snapshot().leases, 1);
        drop(tar);
        soon("the lease is free", || pool.snapshot().leases == 0).await;
        assert_eq!(pool.snapshot().poisoned, 0);
        // A caller that goes away while applying, too.
        let lease = pool.lease("a", Purpose::Work).await.unwrap();
        let never = body(b"x", 1).chain(stream::pending());
        let cancelled =
            tokio::time::timeout(Duration::from_millis(50), lease.tar_to_layer(files.apply("l"), never));
        assert!(cancelled.await.is_err());
        lease.tar_to_layer(files.apply("l"), body(b"good", 5)).await.unwrap();
    }
}

#[derive(Default)]
struct Writers {
    frozen: AtomicI32,
    freezes: AtomicU32,
    /// What stopping them takes.
    takes: Duration,
}

impl LiveControl for Writers {
    fn freeze(&self) -> futures_util::future::BoxFuture<'_, io::Result<()>> {
        self.freezes.fetch_add(1, Ordering::SeqCst);
        assert_eq!(self.frozen.fetch_add(1, Ordering::SeqCst), 0, "frozen twice");
        Box::pin(async {
            tokio::time::sleep(self.takes).await;
            Ok(())
        })
    }
    fn thaw(&self) -> futures_util::future::BoxFuture<'_, io::Result<()>> {
        self.frozen.store(0, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_24_a_live_sandbox_is_frozen_for_its_metadata_only_and_thawed_on_every_way_out() {
    let config = PoolConfig { freeze_limit: Duration::from_millis(300), ..PoolConfig::default() };
    let (pool, files) = (Pool::start(backend(), config), Files::new());
    let writers = Arc::new(Writers::default());
    let live: Option<Arc<dyn LiveControl>> = Some(writers.clone());
    let target = vec![LayerDisk { disk: files.with("t", b"data"), kind: LayerKind::Sandbox }];
    let kind = ExportKind::Canonical {
        target,
        parent: ParentDisks::Own,
        format: 1,
        id_maps: IdMaps::default(),
        source_date_epoch: None,
    };
    let lease = pool.lease("a", Purpose::Export).await.unwrap();
    let tar = lease.layer_to_tar(ExportJob { kind, live: live.clone() }).await.unwrap();
    assert_eq!(writers.freezes.load(Ordering::SeqCst), 2);
    assert_eq!(writers.frozen.load(Ordering::SeqCst), 0, "bytes flow only when thawed");
    drop(tar);
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    let changes = lease.changes(files.compare(&vec![0; 50_000], live.clone())).await.unwrap();
    assert_eq!(changes.len(), 50_000);
    assert_eq!(changes[49_999].path, b"/path/49999");
    // An agent that never gets its metadata read: thawed after the limit, and the operation fails.
    let e = lease.diff_size(files.compare(b"x", live.clone())).await.unwrap_err();
    assert!(matches!(e, SvmError::Live(_)), "{e}");
    soon("thawed", || writers.frozen.load(Ordering::SeqCst) == 0).await;
    // A caller that goes away while it is frozen.
    let gone = tokio::time::timeout(Duration::from_millis(50), lease.diff_size(files.compare(b"x", live)));
    assert!(gone.await.is_err());
    soon("thawed", || writers.frozen.load(Ordering::SeqCst) == 0).await;
    assert_eq!(lease.diff_size(files.compare(b"12345", None)).await.unwrap(), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_gets_two_freezes_and_stopping_the_writers_is_not_its_time() {
    let config = PoolConfig { freeze_limit: Duration::from_millis(300), ..PoolConfig::default() };
    let (pool, files) = (Pool::start(backend(), config), Files::new());
    let slow = Duration::from_millis(700);
    for (content, takes, refused) in [("again", Duration::ZERO, true), ("once", slow, false)] {
        let writers = Arc::new(Writers { takes, ..Writers::default() });
        let target =
            vec![LayerDisk { disk: files.with(content, content.as_bytes()), kind: LayerKind::Sandbox }];
        let kind = ExportKind::Canonical {
            target,
            parent: ParentDisks::Own,
            format: 1,
            id_maps: IdMaps::default(),
            source_date_epoch: None,
        };
        let lease = pool.lease("a", Purpose::Export).await.unwrap();
        let tar = lease.layer_to_tar(ExportJob { kind, live: Some(writers.clone()) }).await;
        match tar {
            Err(SvmError::Protocol { reason, .. }) if refused => {
                assert!(reason.contains("BeforeRecheck"), "{reason}");
            }
            other => assert!(!refused && other.is_ok(), "{content}: {other:?}"),
        }
        assert_eq!(writers.freezes.load(Ordering::SeqCst), 2, "{content}");
        soon("thawed", || writers.frozen.load(Ordering::SeqCst) == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_8_the_time_out_is_for_idleness_not_for_the_whole_transfer() {
    let config = PoolConfig { idle_timeout: Duration::from_millis(400), ..PoolConfig::default() };
    let (pool, files) = (Pool::start(backend(), config), Files::new());
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    // Slower in all than the time-out, but never idle towards the VM's own answers.
    let slow = body(&pattern(10 << 20, 0), 1 << 20).then(|c| async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        c
    });
    let start = Instant::now();
    lease.tar_to_layer(files.apply("l"), slow).await.unwrap();
    assert!(start.elapsed() > Duration::from_millis(800), "the transfer must outlast the time-out");
    // An agent that is silent is given up, and its VM too (this one would sleep for an hour).
    let pid = worker_pid(&lease.vm_description());
    let live: Option<Arc<dyn LiveControl>> = Some(Arc::new(Writers::default()));
    let e = lease.diff_size(files.compare(b"x", live)).await.unwrap_err();
    assert!(matches!(e, SvmError::Timeout { .. }), "{e}");
    drop(lease);
    soon("the silent worker is ended", || !alive(pid)).await;
    assert_eq!(pool.snapshot().poisoned, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_is_no_worker_is_a_boot_error_with_its_words() {
    let config = EmbeddedConfig {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), "echo these were my last words >&2; exit 7".into()],
        ..EmbeddedConfig::default()
    };
    let pool = Pool::start(Arc::new(EmbeddedBackend::new(config)), PoolConfig::default());
    let e = pool.lease("a", Purpose::Work).await.unwrap_err();
    let (engine, log) = (e.to_string(), e.with_console());
    assert!(engine.contains("exit status 7") && !engine.contains("last words"), "{engine}");
    assert!(log.contains("last words") && log.contains("exit status 7"), "{log}");
    // One that never greets is given up after the boot time-out, and is gone.
    let config = EmbeddedConfig {
        args: vec!["-c".into(), "sleep 1000".into()],
        program: "/bin/sh".into(),
        ..Default::default()
    };
    let limits = PoolConfig { boot_timeout: Duration::from_millis(200), spares: 0, ..PoolConfig::default() };
    let pool = Pool::start(Arc::new(EmbeddedBackend::new(config)), limits);
    let e = pool.lease("a", Purpose::Work).await.unwrap_err();
    assert!(matches!(e, SvmError::Timeout { .. }), "{e}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_13_cleanup_ends_the_global_vm_and_the_pool_goes_on() {
    let (pool, files) = (pool(Mode::Global), Files::new());
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    let pid = worker_pid(&lease.vm_description());
    drop(lease);
    assert!(alive(pid), "the global VM outlives its leases");
    pool.retire(Duration::from_secs(5)).await;
    assert!(!alive(pid));
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    // A retired VM that is still leased is ended after the grace; its lease fails.
    pool.retire(Duration::from_millis(50)).await;
    let e = lease.tar_to_layer(files.apply("l"), body(b"good", 5)).await.unwrap_err();
    assert!(matches!(e, SvmError::Cancelled(_) | SvmError::Died { .. }), "{e}");
    pool.shutdown(Duration::ZERO).await;
    assert!(pool.lease("b", Purpose::Work).await.is_err());
}

#[test]
fn the_jail_of_the_real_program_holds() {
    let program = env!("CARGO_BIN_EXE_lcow-graphdriver");
    let run = |args: &[&str]| {
        let out = Command::new(program).args(["worker", "--self-test"]).args(args).output().unwrap();
        (out.status, String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let deadly = ["exec", "ptrace", "mount", "unshare", "io-uring"];
    for attempt in lcow_sys::linux::probe::ATTEMPTS {
        let (status, text) = run(&[attempt]);
        if deadly.contains(&attempt) {
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(status.signal(), Some(31), "{attempt} must end the worker by SIGSYS: {status} {text}");
        } else {
            assert!(status.success() && text.contains("refused"), "{attempt}: {status} {text}");
        }
    }
    // The other walls stand without the filter (what they can't see, `socket` and `fork`, is the filter's alone).
    for attempt in [
        "open",
        "create",
        "stat",
        "connect",
        "bind",
        "exec",
        "ptrace",
        "mount",
        "signal",
        "raise-limit",
        "setuid",
    ] {
        let (status, text) = run(&[attempt, "--without-seccomp"]);
        assert!(status.success() && text.contains("refused"), "{attempt} without seccomp: {status} {text}");
    }
}

/// A self-test of the real program under a kernel that answers some calls with an error, as older kernels and outer
/// containers do. The filter is this thread's; what the thread starts inherits it.
fn self_test_where(
    refused: &[Refused],
    errno: i32,
    jail: &str,
    attempt: &str,
    user: Option<u32>,
) -> std::process::Output {
    use std::os::unix::process::CommandExt;
    // By descriptor: an ordinary user may not be able to walk to the program.
    let program = File::open(env!("CARGO_BIN_EXE_lcow-graphdriver")).unwrap();
    let mut command = Command::new("/proc/self/fd/0");
    command.args(["worker", "--self-test", attempt]).env("LCOW_WORKER_JAIL", jail).stdin(program);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    where_refused(refused, errno, move || command.output().unwrap())
}

/// A call that fails, or only with this value of an argument.
type Refused = (i64, Option<(u8, u64)>);

/// Runs `work` on a thread whose processes get `errno` from the calls `refused`.
fn where_refused<T: Send + 'static>(
    refused: &[Refused],
    errno: i32,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, apply_filter,
    };
    let rules = refused.iter().map(|(call, argument)| {
        let rules = argument.map(|(n, value)| {
            let only = SeccompCondition::new(n, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap();
            SeccompRule::new(vec![only]).unwrap()
        });
        (*call, rules.into_iter().collect())
    });
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let error = SeccompAction::Errno(errno.cast_unsigned());
    let filter = SeccompFilter::new(rules.collect(), SeccompAction::Allow, error, arch).unwrap();
    let filter: Option<BpfProgram> = (!refused.is_empty()).then(|| filter.try_into().unwrap());
    std::thread::spawn(move || {
        if let Some(filter) = filter {
            apply_filter(&filter).unwrap();
        }
        work()
    })
    .join()
    .unwrap()
}

#[test]
fn a_kernel_without_landlock_passes_the_strict_jail_with_a_warning_and_no_path_is_open() {
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP] {
        for attempt in ["open", "create", "stat", "socket", "connect", "bind"] {
            let refused = [(libc::SYS_landlock_create_ruleset, None)];
            let out = self_test_where(&refused, errno, "strict", attempt, None);
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && text.contains("refused"), "{attempt}: {out:?}");
            assert!(text.contains("landlock: "), "the missing wall is named: {text}");
        }
    }
}

#[test]
fn each_wall_that_is_missing_stops_a_strict_worker_and_is_named() {
    let call = |number| (number, None);
    let option = |option: i32| (libc::SYS_prctl, Some((0, u64::from(option.cast_unsigned()))));
    let landlock = call(libc::SYS_landlock_create_ruleset);
    /// Calls that fail, which wall it was, and whether the least of walls still stands.
    type Case = (Vec<Refused>, &'static str, bool);
    let cases: [Case; 7] = [
        (vec![landlock, call(libc::SYS_fsopen)], "no path", true),
        (vec![landlock, call(libc::SYS_chroot)], "no path", true),
        (vec![call(libc::SYS_close_range)], "closed descriptors", true),
        (vec![call(libc::SYS_capset)], "no capabilities", true),
        (vec![call(libc::SYS_setresuid)], "a user that owns nothing", true),
        (vec![call(libc::SYS_prlimit64), call(libc::SYS_setrlimit)], "resource limits", true),
        (vec![option(libc::PR_SET_NO_NEW_PRIVS)], "no_new_privs", false),
    ];
    for (refused, wall, least) in cases {
        let out = self_test_where(&refused, libc::EPERM, "strict", "open", None);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && said.contains(wall), "{wall}: {out:?}");
        assert!(said.contains("lcow.jail=best-effort"), "what to do: {said}");
        let out = self_test_where(&refused, libc::EPERM, "best-effort", "fork", None);
        assert_eq!(out.status.success(), least, "{wall}: {out:?}");
    }
    // The filter itself can't be refused by a filter that stands: by its number it can.
    let out = self_test_where(&[call(libc::SYS_seccomp)], libc::ENOSYS, "strict", "open", None);
    assert!(String::from_utf8_lossy(&out.stderr).contains("system-call filter"), "{out:?}");
}

#[test]
fn an_ordinary_users_worker_has_the_walls_that_kernels_give_to_users() {
    const USER: Option<u32> = Some(4321);
    let out = self_test_where(&[], 0, "strict", "open", USER);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("refused"), "{out:?}");
    // An empty root takes root: without Landlock only the filter stands against paths, which best-effort takes.
    let refused = [(libc::SYS_landlock_create_ruleset, None)];
    let out = self_test_where(&refused, libc::ENOSYS, "strict", "open", USER);
    assert!(String::from_utf8_lossy(&out.stderr).contains("no path"), "{out:?}");
    let out = self_test_where(&refused, libc::ENOSYS, "best-effort", "open", USER);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("refused"), "{out:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_has_a_user_of_its_own_and_a_limit_of_file_sizes() {
    const LIMIT: u64 = 5 << 30;
    let strict = EmbeddedBackend::new(EmbeddedConfig {
        program: env!("CARGO_BIN_EXE_lcow-graphdriver").into(),
        file_limit: Some(LIMIT),
        strict: true,
        ..EmbeddedConfig::default()
    });
    let mut users = std::collections::BTreeSet::new();
    let mut vms = Vec::new();
    for number in [1, 2, 3] {
        let vm = strict.boot(VmSpec { number }).await.unwrap();
        let pid = worker_pid(&vm.describe());
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let (status, limits) = (read("status"), read("limits"));
        let line = |text: &str, name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line[name.len()..].split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let uids = line(&status, "Uid:");
        assert!(uids.iter().all(|u| *u == uids[0] && u.parse::<u32>().unwrap() > 60_000), "{uids:?}");
        assert_eq!(line(&status, "Gid:"), uids);
        assert_eq!(line(&status, "Groups:"), [""; 0]);
        assert_eq!(line(&limits, "Max file size")[..2], [LIMIT.to_string(), LIMIT.to_string()]);
        users.insert(uids[0].clone());
        vms.push(vm);
    }
    assert_eq!(users.len(), vms.len(), "each has a user of its own: {users:?}");
    for vm in vms {
        vm.terminate().await;
    }
}

/// What stands in QEMU's place tries what a QEMU that was taken over would.
#[test]
fn a_launched_program_reads_the_systems_files_and_its_descriptors_and_nothing_else() {
    use lcow_sys::linux::{
        fdpass,
        launch::{Order, send_order},
    };
    use std::{io::Write, os::fd::AsFd};
    const SCRIPT: &str = r#"
        echo "given: $(cat /proc/self/fd/3) $(cat <&4)"
        echo "uid: $(id -u)"
        cat /etc/passwd && echo LEAK of a file
        cat "$1" && echo LEAK of a neighbour
        ls / && echo LEAK of a folder
        ls /run && echo LEAK of sockets
        exec 5<>/dev/tcp/127.0.0.1/1 && echo LEAK of the network
        echo end
    "#;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["given", "neighbour"] {
        std::fs::write(path(name), name).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(path(name), open).unwrap();
    }
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let given = File::open(path("given")).unwrap();
    let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut memory = File::from(memory);
    memory.write_all(b"memory").unwrap();
    std::io::Seek::rewind(&mut memory).unwrap();
    let (ours, theirs) = fdpass::message_pair().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .arg("launch")
        .stdin(std::process::Stdio::from(theirs))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let neighbour = path("neighbour");
    let order = Order {
        program: "/bin/bash".into(),
        args: vec!["-c".into(), SCRIPT.into(), "bash".into(), neighbour.to_str().unwrap().into()],
        fds: 2,
        user: 0x4c45_0001,
        memory: 4 << 30,
        strict: true,
    };
    send_order(ours.as_fd(), &order, &[given.as_fd(), memory.as_fd()]).unwrap();
    let out = child.wait_with_output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(said.contains("given: given memory") && said.ends_with("end\n"), "{said} {complained}");
    assert!(said.contains(&format!("uid: {}", 0x4c45_0001)), "{said} {complained}");
    assert!(!said.contains("LEAK"), "{said} {complained}");
    // A kernel before 6.15 can't give it a root of its own; each other wall stood without a note.
    assert!(!complained.contains("launch:"), "{complained}");
}

/// Starts a launcher whose kernel refuses some calls, and has it run a program that says where it got to.
fn launched_where(refused: &[Refused], strict: bool) -> std::process::Output {
    use lcow_sys::linux::{
        fdpass,
        launch::{Order, send_order},
    };
    use std::os::fd::AsFd;
    let (ours, theirs) = fdpass::message_pair().unwrap();
    let child = where_refused(refused, libc::EPERM, move || {
        Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .arg("launch")
            .stdin(std::process::Stdio::from(theirs))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    });
    let order = Order {
        program: "/bin/echo".into(),
        args: vec!["it runs".into()],
        fds: 0,
        user: 0x4c45_0002,
        memory: 4 << 30,
        strict,
    };
    send_order(ours.as_fd(), &order, &[]).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn each_missing_part_of_qemus_confinement_stops_a_strict_launch_and_is_named() {
    let call = |number| (number, None);
    let option = |option: i32| (libc::SYS_prctl, Some((0, u64::from(option.cast_unsigned()))));
    let landlock = call(libc::SYS_landlock_create_ruleset);
    let cases: [(Vec<Refused>, &str); 6] = [
        (vec![landlock, call(libc::SYS_chroot)], "no foreign path"),
        (vec![call(libc::SYS_capset)], "no capabilities"),
        (vec![call(libc::SYS_setresuid)], "a user that owns nothing"),
        (vec![call(libc::SYS_prlimit64), call(libc::SYS_setrlimit)], "resource limits"),
        (vec![option(libc::PR_SET_NO_NEW_PRIVS)], "no_new_privs"),
        (vec![call(libc::SYS_seccomp)], "no new sockets"),
    ];
    for (refused, part) in cases {
        let out = launched_where(&refused, true);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.code() == Some(1) && out.stdout.is_empty() && said.contains(part),
            "{part}: {out:?}"
        );
        assert!(said.contains("lcow.jail=best-effort"), "what to do: {said}");
        let out = launched_where(&refused, false);
        assert!(out.status.success() && out.stdout == b"it runs\n", "best effort without {part}: {out:?}");
        assert!(String::from_utf8_lossy(&out.stderr).contains("launch: "), "it is named: {out:?}");
    }
    // The second walls may be missing.
    let out = launched_where(&[call(libc::SYS_unshare)], true);
    assert!(out.status.success(), "{out:?}");
    let out = launched_where(&[], true);
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
}

#[test]
fn garbage_on_the_control_channel_ends_the_worker() {
    use lcow_sys::linux::fdpass;
    use std::os::fd::AsFd;
    for garbage in [&b"\xff\xff\xff\xff\x09"[..], b"x", b"\x02\x00\x00\x00\x09{}", b"\x00\x00\x00\x00\x03"] {
        let (ours, theirs) = fdpass::message_pair().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .arg("worker")
            .stdin(std::process::Stdio::from(theirs))
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut buffer = vec![0; 65536];
        assert!(fdpass::receive(ours.as_fd(), &mut buffer).unwrap().0 > 0, "a greeting");
        fdpass::send(ours.as_fd(), garbage, &[]).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{garbage:?}");
    }
}
