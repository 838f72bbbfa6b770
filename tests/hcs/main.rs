//! The HCS backend against a test double of `computecore.dll` (`tests/computecore_double`), through the pool and with
//! the real codec. The agent's stream is a named pipe here: Wine has no Hyper-V sockets.
#![cfg(windows)]

#[path = "../computecore_double/client.rs"]
mod client;
#[path = "../support/mod.rs"]
mod support;

use bytes::Bytes;
use ext4_image::format::{BlankOptions, blank};
use futures_util::{Stream, StreamExt, stream};
use lcow_graphdriver::svm::{
    Access, ApplyJob, ApplyOptions, ApplySummary, CheckJob, CompareJob, DiskSource, ExportJob, ExportKind,
    IdMaps, LayerDisk, LayerKind, Mode, ParentDisks, Pool, PoolConfig, Purpose, SvmError, VmBackend, VmSpec,
    hcs::{HcsBackend, HcsConfig},
};
use lcow_sys::windows::computecore::Library;
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use vhd_image::vhdx;

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["kernel", "initrd.img"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn scratch(&self) -> PathBuf {
        self.path("scratch")
    }

    /// A backend on the double, with faults that it is told by the kernel's command line.
    fn backend(&self, faults: &str) -> Arc<HcsBackend> {
        let mut config = HcsConfig::new(self.path("kernel"), self.path("initrd.img"), self.scratch());
        config.boot_parameters = faults.into();
        config.growing_bytes = 1 << 30;
        config.deadline = Duration::from_secs(20);
        Arc::new(client::backend(config))
    }

    fn pool(&self, mode: Mode, faults: &str) -> Pool {
        let config = PoolConfig { mode, spares: 1, max_vms: 6, ..PoolConfig::default() };
        Pool::start(self.backend(faults), config)
    }

    fn writable(&self, name: &str) -> DiskSource {
        let path = self.path(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        DiskSource::read_write(Arc::new(file), path)
    }

    fn readable(&self, name: &str) -> DiskSource {
        DiskSource::read_only(Arc::new(File::open(self.path(name)).unwrap()), self.path(name))
    }

    async fn apply(&self, pool: &Pool, name: &str, tar: &[u8]) -> Result<ApplySummary, SvmError> {
        let job = ApplyJob {
            image: self.writable(&format!("{name}.vhd")),
            record: self.writable(&format!("{name}.exact")),
            scratch: None,
            lowers: Vec::new(),
            larger: None,
            options: ApplyOptions::default(),
        };
        pool.lease(name, Purpose::Work).await?.tar_to_layer(job, body(tar)).await
    }

    fn image(&self, name: &str) -> DiskSource {
        let disk = self.readable(&format!("{name}.vhd"));
        let len = disk.file.metadata().unwrap().len() - 512;
        disk.window(0, len)
    }

    async fn exact(&self, pool: &Pool, name: &str) -> Result<Vec<u8>, SvmError> {
        let record = self.readable(&format!("{name}.exact"));
        let kind = ExportKind::Exact { image: self.image(name), record };
        let lease = pool.lease(name, Purpose::Export).await?;
        let mut tar = lease.layer_to_tar(ExportJob { kind, live: None }).await?;
        let mut all = Vec::new();
        while let Some(chunk) = tar.next().await {
            all.extend_from_slice(&chunk?);
        }
        assert!(tar.complete());
        Ok(all)
    }

    /// Nothing of any machine is left: no folder, and none of the double's.
    fn is_clear(&self) -> bool {
        fs::read_dir(self.scratch()).map_or(0, Iterator::count) == 0
    }
}

fn body(content: &[u8]) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
    let content = Bytes::copy_from_slice(content);
    let pieces = content.len().div_ceil(60_000);
    stream::iter((0..pieces).map(move |n| Ok(content.slice(n * 60_000..content.len().min((n + 1) * 60_000)))))
}

fn tar(files: usize, bytes: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for n in 0..files {
        let mut header = vec![0; 512];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, format!("file{n}").as_bytes());
        put(100, b"0000644\x000000000\x000000000\x00");
        put(124, format!("{bytes:011o}\0").as_bytes());
        put(136, b"14000000000\0        0");
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        all.extend_from_slice(&header);
        all.extend((0..bytes).map(|i| (i * 31 / 7 + n) as u8));
        all.resize(all.len().next_multiple_of(512), 0);
    }
    all.resize(all.len() + 1024, 0);
    all
}

const END: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_goes_in_is_checked_and_comes_back_in_both_modes() {
    // Once answered at once, once with every call pending for a while.
    for (mode, faults) in [(Mode::Safe, ""), (Mode::Global, ""), (Mode::Safe, "double.pending=30")] {
        let place = Place::new();
        let pool = place.pool(mode, faults);
        for (name, tar) in [("empty", vec![0; 1024]), ("small", tar(3, 100)), ("large", tar(20, 400_001))] {
            let summary = place.apply(&pool, name, &tar).await.unwrap();
            let len = |kind: &str| fs::metadata(place.path(&format!("{name}.{kind}"))).unwrap().len();
            assert_eq!((len("vhd"), len("exact")), (summary.file_bytes, summary.record_bytes), "{name}");
            let check = CheckJob {
                image: place.image(name),
                tree: false,
                writer: 2,
                require_no_writers: true,
                owners: IdMaps::default(),
            };
            assert_eq!(pool.check_image(check).await.unwrap().uuid, summary.uuid);
            assert!(place.exact(&pool, name).await.unwrap() == tar, "{name}: another tar came back");
        }
        pool.shutdown(END).await;
        assert!(pool.snapshot().vms.is_empty() && place.is_clear());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_in_both_modes() {
    for mode in [Mode::Safe, Mode::Global] {
        let place = Place::new();
        let pool = place.pool(mode, "");
        let tars: Vec<_> = (0..6).map(|n| tar(2 + n, 50_000 + n)).collect();
        let round = tars.iter().enumerate().map(|(n, tar)| {
            let (place, pool, name) = (&place, &pool, format!("l{n}"));
            async move {
                place.apply(pool, &name, tar).await.unwrap();
                assert!(place.exact(pool, &name).await.unwrap() == *tar, "{name}");
            }
        });
        futures_util::future::join_all(round).await;
        pool.shutdown(END).await;
        assert!(place.is_clear());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vhdx_sandbox_is_read_as_it_is() {
    let place = Place::new();
    let pool = place.pool(Mode::Safe, "");
    let file = File::create_new(place.path("sandbox.vhdx")).unwrap();
    let attributes = ext4_image::writer::Attributes { permissions: 0o755, ..Default::default() };
    let options = BlankOptions {
        uuid: [7; 16],
        label: Vec::new(),
        root: attributes,
        directories: vec![(b"upper".to_vec(), attributes), (b"work".to_vec(), attributes)],
        journal_bytes: None,
        mkfs_time: 1_600_000_000,
    };
    let content = blank(256 << 20, &options).unwrap();
    let created = vhdx::CreateOptions::new(256 << 20, uuid::Uuid::new_v4());
    vhdx::create(&file, &created, &content).unwrap();
    drop(file);
    let target = || vec![LayerDisk { disk: place.readable("sandbox.vhdx").vhdx(), kind: LayerKind::Sandbox }];
    let job = || CompareJob { target: target(), parent: ParentDisks::Own, live: None };
    let lease = pool.lease("s", Purpose::Work).await.unwrap();
    assert!(lease.changes(job()).await.unwrap().is_empty());
    assert_eq!(lease.diff_size(job()).await.unwrap(), 0);
    drop(lease);
    pool.shutdown(END).await;
    assert!(place.is_clear());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_cost_one_operation() {
    // The first hot-add of each machine fails; the machine is lost in its second one; its end is told late.
    for (faults, told) in [
        ("double.fail-add=1", "failed by order of the test"),
        ("double.lose-at=2", "service VM"),
        ("double.late-exit=700 double.fail-add=2", "failed by order of the test"),
    ] {
        let place = Place::new();
        let pool = place.pool(Mode::Safe, faults);
        let begin = Instant::now();
        for n in 0..2 {
            let error = place.apply(&pool, &format!("l{n}"), &tar(2, 1000)).await.unwrap_err();
            assert!(error.to_string().contains(told), "{faults}: {error}");
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{faults}");
        pool.shutdown(END).await;
        assert!(pool.snapshot().vms.is_empty() && place.is_clear(), "{faults}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_hot_add_frees_its_slot_and_the_machine_goes_on() {
    let place = Place::new();
    let backend = place.backend("double.fail-add=2");
    let vm = backend.boot(VmSpec { number: 1 }).await.unwrap();
    fs::write(place.path("a"), [1; 700]).unwrap();
    let first = vm.attach(&place.readable("a")).await.unwrap();
    vm.attach(&place.readable("a")).await.unwrap_err();
    // As many as there are slots: none of them was lost, and the next is refused by us, not by the service.
    let mut ids = Vec::new();
    for _ in 1..256 {
        ids.push(vm.attach(&place.readable("a")).await.unwrap());
    }
    let full = vm.attach(&place.readable("a")).await.unwrap_err();
    assert!(full.to_string().contains("256 disks are attached already"), "{full}");
    for id in ids.into_iter().chain([first]) {
        vm.detach(id).await.unwrap();
    }
    assert!(vm.detach(first).await.is_err());
    vm.ping().await.unwrap();
    assert!(vm.console().contains("hello from the guest"), "{}", vm.console());
    // What is no disk for Hyper-V, or held by a writer, is refused by the double and told.
    let writable = DiskSource { access: Access::ReadWrite, ..place.readable("a") };
    assert!(vm.attach(&writable).await.unwrap_err().to_string().contains("empty file or a VHDX"));
    vm.terminate().await;
    assert_eq!(vm.death().await.cause, "ended: terminated");
    assert!(vm.ping().await.is_err() && vm.open_channel().await.is_err());
    drop(vm);
    assert!(place.is_clear());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_somebody_writes_is_not_attached() {
    let place = Place::new();
    let pool = place.pool(Mode::Safe, "");
    place.apply(&pool, "l", &tar(2, 1000)).await.unwrap();
    let writer = File::options().write(true).open(place.path("l.vhd")).unwrap();
    let error = place.exact(&pool, "l").await.unwrap_err().to_string();
    assert!(error.contains("open for writing elsewhere"), "{error}");
    drop(writer);
    assert!(place.exact(&pool, "l").await.is_ok());
    pool.shutdown(END).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_ends_while_its_disks_come_and_go_is_told_as_dead() {
    let place = Place::new();
    let backend = place.backend("");
    for last_call in ["attach", "detach", "grown"] {
        let vm = backend.boot(VmSpec { number: 1 }).await.unwrap();
        let disk = place.writable("new");
        let id = vm.attach(&disk).await.unwrap();
        let folder = std::env::temp_dir()
            .join(format!("computecore-double-{}", vm.describe().split(' ').nth(1).unwrap()));
        fs::write(folder.join("order.kill"), "").unwrap();
        while folder.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let error = match last_call {
            "attach" => vm.attach(&place.writable("other")).await.unwrap_err(),
            "detach" => vm.detach(id).await.unwrap_err(),
            _ => vm.grown(&disk, 0).await.unwrap_err(),
        };
        let SvmError::Died { cause, .. } = &error else { panic!("{last_call}: {error}") };
        assert!(cause.contains("the guest ended by itself"), "{last_call}: {error}");
        vm.terminate().await;
    }
    assert!(place.is_clear());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_not_plain_is_refused_and_costs_one_operation() {
    // FILE_ATTRIBUTE_SPARSE_FILE, _COMPRESSED, _ENCRYPTED: Wine has no such files, so the double is told of them.
    for (attribute, name) in [(0x200, "sparse"), (0x800, "compressed"), (0x4000, "encrypted")] {
        let place = Place::new();
        let backend = place.backend(&format!("double.attributes={attribute}"));
        let vm = backend.boot(VmSpec { number: 1 }).await.unwrap();
        fs::write(place.path("a"), [1; 700]).unwrap();
        for disk in [place.readable("a"), place.writable("new")] {
            let error = vm.attach(&disk).await.unwrap_err().to_string();
            assert!(error.contains("0xc03a001a") && error.contains(name), "{error}");
        }
        vm.ping().await.unwrap();
        vm.terminate().await;
        drop(vm);
        assert!(place.is_clear());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_export_and_a_dropped_apply_leave_the_pool_usable() {
    let place = Place::new();
    let pool = place.pool(Mode::Global, "");
    let big = tar(8, 2_000_000);
    place.apply(&pool, "big", &big).await.unwrap();
    let kind = ExportKind::Exact { image: place.image("big"), record: place.readable("big.exact") };
    let lease = pool.lease("big", Purpose::Export).await.unwrap();
    let mut stream = lease.layer_to_tar(ExportJob { kind, live: None }).await.unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let cut = stream::iter([Ok(Bytes::copy_from_slice(&big[..100_000])), Err(io::Error::other("cut"))]);
    let job = ApplyJob {
        image: place.writable("cut.vhd"),
        record: place.writable("cut.exact"),
        scratch: None,
        lowers: Vec::new(),
        larger: None,
        options: ApplyOptions::default(),
    };
    let lease = pool.lease("cut", Purpose::Work).await.unwrap();
    assert!(matches!(lease.tar_to_layer(job, cut).await, Err(SvmError::Body(_))));
    drop(lease);
    assert!(place.exact(&pool, "big").await.unwrap() == big);
    pool.shutdown(END).await;
    assert!(place.is_clear());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_whose_agent_never_comes_is_given_up() {
    let place = Place::new();
    let mut config = HcsConfig::new(place.path("kernel"), place.path("initrd.img"), place.scratch());
    config.boot_parameters = "double.mute=1".into();
    config.deadline = Duration::from_secs(2);
    let backend = client::backend(config);
    let error = backend.boot(VmSpec { number: 1 }).await.unwrap_err().to_string();
    assert!(error.contains("no agent has greeted within 2s"), "{error}");
    assert!(place.is_clear());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_paths_and_a_missing_dll_are_told() {
    let place = Place::new();
    fs::remove_file(place.path("kernel")).unwrap();
    let error = place.backend("").boot(VmSpec { number: 1 }).await.unwrap_err().to_string();
    assert!(error.contains("HcsCreateComputeSystem") && error.contains("kernel"), "{error}");
    let config = HcsConfig::new("k", "i", place.scratch());
    let none = Library::load(Some(Path::new(r"C:\nowhere\computecore.dll")));
    let backend = HcsBackend::with(config, none, Arc::new(client::PipeTransport));
    for error in [backend.boot(VmSpec { number: 1 }).await.unwrap_err(), backend.reap().await.unwrap_err()] {
        assert!(error.to_string().contains("Hyper-V is not enabled"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_predecessor_left_is_ended() {
    let place = Place::new();
    let backend = place.backend("");
    assert_eq!(backend.reap().await.unwrap(), 0);
    let vm = backend.boot(VmSpec { number: 1 }).await.unwrap();
    fs::create_dir_all(place.scratch().join(uuid::Uuid::new_v4().to_string())).unwrap();
    fs::write(place.scratch().join("not-ours.txt"), "x").unwrap();
    assert_eq!(place.backend("").reap().await.unwrap(), 2);
    assert!(vm.death().await.cause.contains("terminated"));
    assert!(place.scratch().join("not-ours.txt").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_ends_what_a_predecessor_left_but_not_what_its_sibling_runs() {
    let place = Place::new();
    let left = place.backend("").boot(VmSpec { number: 1 }).await.unwrap();
    let config = PoolConfig { spares: 0, ..PoolConfig::default() };
    let pool = Pool::start(place.backend(""), config.clone());
    // At the start of a daemon: before the home's scratch folder, which names the machines, is cleared.
    pool.clear_predecessor().await;
    assert!(left.death().await.cause.contains("terminated"));
    assert!(place.is_clear());
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    // Another Init brings a pool of its own, while operations of this one go on.
    let sibling = Pool::start(place.backend(""), PoolConfig { reap: false, ..config });
    sibling.clear_predecessor().await;
    place.apply(&sibling, "l", &tar(1, 10)).await.unwrap();
    let job = ApplyJob {
        image: place.writable("a.vhd"),
        record: place.writable("a.exact"),
        scratch: None,
        lowers: Vec::new(),
        larger: None,
        options: ApplyOptions::default(),
    };
    lease.tar_to_layer(job, body(&tar(1, 10))).await.unwrap();
    drop(lease);
    for pool in [pool, sibling] {
        pool.shutdown(END).await;
        assert_eq!(pool.snapshot().deaths, 0);
    }
    assert!(place.is_clear());
}

#[test]
fn a_start_without_hyper_v_and_without_a_guest_names_all_that_is_missing() {
    let place = Place::new();
    let kird = place.path("kird");
    let options = |initrd: &str| {
        let named =
            [("svm", "hcs"), ("kirdpath", kird.to_str().unwrap()), ("kernel", "kernel"), ("initrd", initrd)];
        named.map(|(name, value)| format!("lcow.{name}={value}"))
    };
    let said = support::refusal::refused(place.folder.path(), &options("initrd"));
    let lines: Vec<&str> = said.lines().filter(|l| l.contains("lcow.svm=hcs cannot work")).collect();
    let [line] = lines[..] else { panic!("not one message:\n{said}") };
    let (kernel, initrd) = (kird.join("kernel"), kird.join("initrd"));
    for expected in [
        kernel.to_str().unwrap(),
        initrd.to_str().unwrap(),
        "scripts/build-svm-image --hyperv",
        "lcow.kirdpath",
        "Hyper-V is not enabled",
    ] {
        assert!(line.contains(expected), "{expected} is missing in:\n{line}");
    }

    // Files that are there are not named: Wine has no Hyper-V, whatever there is of a guest.
    fs::create_dir(&kird).unwrap();
    for name in ["kernel", "initrd"] {
        fs::write(kird.join(name), name).unwrap();
    }
    let said = support::refusal::refused(place.folder.path(), &options("initrd"));
    assert!(said.contains("cannot work: Hyper-V is not enabled"), "{said}");
}

#[test]
fn with_hyper_v_only_the_guests_files_can_be_missing() {
    let place = Place::new();
    place.backend("").preflight().unwrap();
    fs::write(place.path("kernel"), "").unwrap();
    let said = place.backend("").preflight().unwrap_err();
    assert!(said.contains("kernel: is empty") && !said.contains("initrd.img:"), "{said}");
    fs::remove_file(place.path("kernel")).unwrap();
    fs::create_dir(place.path("kernel")).unwrap();
    fs::remove_file(place.path("initrd.img")).unwrap();
    let said = place.backend("").preflight().unwrap_err();
    assert!(said.contains("kernel: is no file") && said.contains("initrd.img: "), "{said}");
}
