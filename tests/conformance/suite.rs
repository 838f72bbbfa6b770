//! The suite: every function takes a backend and must hold on all of them.

use crate::{
    files::{Files, Tar, body, collect, noise, tree},
    support::machine::{Machine, SmallDisk},
};
use bytes::Bytes;
use disk_io::WriteAt;
use ext4_image::{
    Ext4,
    format::{BlankOptions, blank},
    writer::Attributes,
};
use futures_util::{StreamExt, stream};
use lcow_graphdriver::svm::{
    ChangeKind, CheckJob, CompareJob, CompressJob, Compression, DiskSource, ExpandJob, ExpandLimits,
    ExportJob, ExportKind, GrowJob, IdMaps, LayerDisk, LayerKind, Mode, ParentDisks, Pool, PoolConfig,
    Purpose, RecodeSummary, Recoded, SvmError, VmBackend, VmSpec,
};
use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use svm_protocol::ErrorKind;

pub(crate) type Backend = Arc<dyn VmBackend>;

pub(crate) fn pool(backend: &Backend, mode: Mode) -> Pool {
    let config = PoolConfig {
        mode,
        spares: 1,
        max_vms: 6,
        boot_timeout: Duration::from_mins(2),
        ..PoolConfig::default()
    };
    Pool::start(backend.clone(), config)
}

pub(crate) const END: Duration = Duration::from_secs(5);

async fn soon(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) async fn apply_and_exact_diff(backend: Backend) {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(&backend, mode), Files::new());
        for (name, tar) in
            [("empty", vec![0; 1024]), ("small", tree(3, 100, 1)), ("large", tree(30, 400_001, 2))]
        {
            let summary = files.apply(&pool, name, &tar).await.unwrap();
            assert_eq!(summary.tar_bytes, tar.len() as u64);
            let len = |kind: &str| std::fs::metadata(files.path(&format!("{name}.{kind}"))).unwrap().len();
            assert_eq!((len("vhd"), len("record")), (summary.file_bytes, summary.record_bytes), "{name}");
            let check = CheckJob {
                image: files.image(name),
                require_no_writers: true,
                tree: false,
                writer: 2,
                owners: IdMaps::default(),
            };
            assert_eq!(pool.check_image(check).await.unwrap().uuid, summary.uuid);
            let back = files.export(&pool, name, files.exact(name)).await.unwrap();
            assert!(back == tar, "{name}: {} bytes came back of {}", back.len(), tar.len());
        }
        pool.shutdown(END).await;
        assert!(pool.snapshot().vms.is_empty());
    }
}

/// An entry that needs larger blocks: what comes out is what comes out of an apply with such blocks from the start, and
/// the first pair of files is emptied.
pub(crate) async fn larger_blocks_in_mid_stream(backend: Backend) {
    // The shortest time-out that operators can set in seconds and mean it.
    let config = PoolConfig {
        mode: Mode::Safe,
        spares: 1,
        max_vms: 6,
        boot_timeout: Duration::from_mins(2),
        idle_timeout: Duration::from_secs(5),
        ..PoolConfig::default()
    };
    let (pool, files) = (Pool::start(backend, config), Files::new());
    let far = "far/".repeat(700);
    let filled = |tar: Tar| {
        (0..40).fold(tar.folder("d/"), |tar, n| tar.file(&format!("d/f{n}"), &noise(n * 9_000, n as u64)))
    };
    // Below, written with large blocks from the start.
    let mut job = files.apply_job("below");
    job.options.block_size = 4096;
    let lease = pool.lease("below", Purpose::Work).await.unwrap();
    lease.tar_to_layer(job, body(&Tar::default().long_link("far", &far).end(), 60_000)).await.unwrap();
    drop(lease);
    let cases = [
        ("first", filled(Tar::default().long_link("far", &far)).end(), true),
        ("last", filled(Tar::default()).long_link("far", &far).end(), true),
        ("none", filled(Tar::default()).end(), false),
        ("link", filled(Tar::default()).entry("again", b'1', b"", "far").end(), true),
    ];
    for (name, tar, grows) in cases {
        // Once with larger blocks from the start, and once with the usual ones.
        let wide = format!("{name}-wide");
        let mut summaries = Vec::new();
        for (layer, block_size) in [(wide.as_str(), if grows { 4096 } else { 1024 }), (name, 1024)] {
            let mut job = files.apply_job(layer);
            job.options.block_size = block_size;
            job.larger = Some(files.larger(layer));
            job.lowers = vec![files.layer("below")];
            let lease = pool.lease(layer, Purpose::Work).await.unwrap();
            summaries.push(lease.tar_to_layer(job, body(&tar, 60_000)).await.unwrap());
        }
        assert_eq!(summaries[0], summaries[1], "{name}");
        let read = |file: String| std::fs::read(files.path(&file)).unwrap();
        for kind in ["vhd", "record"] {
            let larger = format!("{name}.larger.{kind}");
            assert_eq!(files.path(&larger).exists(), grows, "{larger}");
            assert!(!files.path(&format!("{wide}.larger.{kind}")).exists(), "{wide} needs no second pair");
            let last = if grows { larger } else { format!("{name}.{kind}") };
            assert!(read(last) == read(format!("{wide}.{kind}")), "{name}: another {kind}");
            if grows {
                assert_eq!(read(format!("{name}.{kind}")).len(), 0, "{name}: the first {kind} takes room");
            }
        }
    }
    // Nobody gives a second pair: a clear refusal, and the machine goes on.
    let error =
        files.apply(&pool, "refused", &Tar::default().long_link("far", &far).end()).await.unwrap_err();
    assert!(error.to_string().contains("larger blocks"), "{error}");
    files.apply(&pool, "refused", &filled(Tar::default()).end()).await.unwrap();
    pool.shutdown(END).await;
}

pub(crate) async fn canonical_diff_changes_and_sizes(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global), Files::new());
    files.apply(&pool, "base", &tree(20, 5000, 1)).await.unwrap();
    let top = Tar::default().folder("d0/").file("d0/.wh.f1", b"").file("d0/added", &[7; 1234]).end();
    files.apply(&pool, "top", &top).await.unwrap();
    let lease = pool.lease("top", Purpose::Work).await.unwrap();
    let changes = lease.changes(files.compare(&["top", "base"])).await.unwrap();
    let kinds: Vec<_> =
        changes.iter().map(|c| (String::from_utf8_lossy(&c.path).into_owned(), c.kind)).collect();
    assert!(kinds.contains(&("/d0/added".into(), ChangeKind::Added)), "{kinds:?}");
    assert!(kinds.contains(&("/d0/f1".into(), ChangeKind::Deleted)), "{kinds:?}");
    assert_eq!(lease.diff_size(files.compare(&["top", "base"])).await.unwrap(), 1234);
    drop(lease);
    let first =
        files.export(&pool, "top", files.canonical(&["top", "base"], ParentDisks::Own)).await.unwrap();
    let again =
        files.export(&pool, "top", files.canonical(&["top", "base"], ParentDisks::Own)).await.unwrap();
    assert!(first == again && first.len() > 1024);
    pool.shutdown(END).await;
}

pub(crate) async fn a_blank_sandbox_is_empty(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    let disk = files.writable("sandbox");
    disk.file.set_len(64 << 20).unwrap();
    let root = Attributes { permissions: 0o755, ..Attributes::default() };
    let directories = ["upper", "work"].map(|name| (name.as_bytes().to_vec(), root)).to_vec();
    let options = BlankOptions { root, directories, ..BlankOptions::default() };
    for (offset, data) in blank(64 << 20, &options).unwrap() {
        disk.file.write_all_at(&data, offset).unwrap();
    }
    let target = vec![LayerDisk { disk: files.readable("sandbox"), kind: LayerKind::Sandbox }];
    let lease = pool.lease("s", Purpose::Work).await.unwrap();
    let job = || CompareJob { target: target.clone(), parent: ParentDisks::Own, live: None };
    assert!(lease.changes(job()).await.unwrap().is_empty());
    assert_eq!(lease.diff_size(job()).await.unwrap(), 0);
    drop(lease);
    pool.shutdown(END).await;
}

pub(crate) async fn a_sandbox_grows(backend: Backend) {
    const SIZES: [u64; 2] = [80 << 20, 1 << 30];
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    let disk = files.writable("sandbox");
    disk.file.set_len(SIZES[1]).unwrap();
    for (offset, data) in blank(SIZES[0], &BlankOptions::default()).unwrap() {
        disk.file.write_all_at(&data, offset).unwrap();
    }
    let lease = pool.lease("s", Purpose::Work).await.unwrap();
    let job = |bytes| GrowJob {
        disk: disk.clone().window(0, SIZES[1]),
        bytes,
        data: std::iter::once(0..SIZES[1]).collect(),
    };
    let grown = lease.grow(&job(SIZES[1])).await.unwrap();
    assert_eq!((grown.old_bytes, grown.new_bytes), (SIZES[0], SIZES[1]));
    let smaller = lease.grow(&job(SIZES[0])).await.unwrap_err();
    assert_eq!(smaller.refused_kind(), Some(ErrorKind::Usage), "{smaller}");
    drop(lease);
    pool.shutdown(END).await;
    let geometry = Ext4::open(&*disk.file).unwrap().geometry().clone();
    assert_eq!(geometry.blocks_count * u64::from(geometry.block_size), SIZES[1]);
    #[cfg(target_os = "linux")]
    ext4_image::testing::fsck(&disk.path);
}

pub(crate) async fn read_only_disks_stay_read_only(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    files.apply(&pool, "l", &tree(1, 10, 1)).await.unwrap();
    let before = std::fs::read(files.path("l.vhd")).unwrap();
    let lease = pool.lease("l", Purpose::Work).await.unwrap();
    let mut job = files.apply_job("other");
    // A disk that says read-only, though its file could be written. Not so on Hyper-V, which opens disks alone: a handle
    // that can write keeps it from attaching the file at all (tests/hcs, `a_layer_that_somebody_writes_is_not_attached`).
    let path = files.path("l.vhd");
    let file = std::fs::File::options().read(true).write(backend.name() != "hcs").open(&path).unwrap();
    job.image = DiskSource::read_only(Arc::new(file), path);
    let e = lease.tar_to_layer(job, body(&tree(1, 10, 2), 999)).await.unwrap_err();
    assert!(e.refused_kind().is_some(), "{e}");
    drop(lease);
    assert!(std::fs::read(files.path("l.vhd")).unwrap() == before);
    pool.shutdown(END).await;
}

/// A chain of `count` layers that are all the same small one, in files of their own.
async fn chain(files: &Files, pool: &Pool, count: usize) -> Vec<LayerDisk> {
    files.apply(pool, "l", &tree(1, 10, 1)).await.unwrap();
    let mut layers = Vec::new();
    for n in 0..count {
        let name = format!("copy{n}");
        std::fs::copy(files.path("l.vhd"), files.path(&format!("{name}.vhd"))).unwrap();
        layers.push(files.layer(&name));
    }
    layers
}

pub(crate) async fn more_disks_than_the_limit_are_an_error(backend: Backend) {
    let limit = backend.limits().disks;
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    let mut target = chain(&files, &pool, 3).await;
    // The files stay four; the windows are as many as one likes, and each is a disk.
    std::fs::write(files.path("many"), vec![0; limit * 512 + 4608]).unwrap();
    let disk = files.readable("many");
    let window =
        |n: usize| LayerDisk { disk: disk.clone().window(n as u64 * 512, 4096), kind: LayerKind::Applied };
    target.extend((0..=limit).map(window));
    let lease = pool.lease("x", Purpose::Work).await.unwrap();
    let e = lease.changes(CompareJob { target, parent: ParentDisks::None, live: None }).await.unwrap_err();
    assert!(matches!(&e, SvmError::Disk { reason, .. } if reason.contains("attached already")), "{e}");
    drop(lease);
    // The VM that could not take one more is replaced; the next operation works.
    files.apply(&pool, "after", &tree(1, 10, 1)).await.unwrap();
    assert_eq!(pool.snapshot().vms.len(), 0);
    pool.shutdown(END).await;
}

pub(crate) async fn two_hundred_disks(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global), Files::new());
    let target = chain(&files, &pool, 200).await;
    let lease = pool.lease("x", Purpose::Work).await.unwrap();
    let job = CompareJob { target, parent: ParentDisks::None, live: None };
    // A file of 10 bytes and a symlink to 5.
    assert_eq!(lease.diff_size(job).await.unwrap(), 10 + 5);
    drop(lease);
    // All are taken away again, and the VM goes on.
    files.apply(&pool, "after", &tree(1, 10, 1)).await.unwrap();
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(END).await;
}

pub(crate) async fn concurrent_operations_in_both_modes(backend: Backend) {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(&backend, mode), Arc::new(Files::new()));
        let tasks: Vec<_> = (0..8u64)
            .map(|n| {
                let (pool, files) = (pool.clone(), files.clone());
                tokio::spawn(async move {
                    let (name, tar) = (format!("l{n}"), tree(4, 100_000, n * 100));
                    files.apply(&pool, &name, &tar).await.unwrap();
                    let back = files.export(&pool, &name, files.exact(&name)).await.unwrap();
                    assert!(back == tar, "layer {n} came back changed");
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let s = pool.snapshot();
        assert_eq!((s.leases, s.waiting, s.boot_failures, s.deaths, s.poisoned), (0, 0, 0, 0, 0), "{s:?}");
        pool.shutdown(END).await;
    }
}

pub(crate) async fn a_dropped_export_is_cancelled(backend: Backend) {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(&backend, mode), Files::new());
        files.apply(&pool, "l", &tree(20, 1_000_000, 1)).await.unwrap();
        let lease = pool.lease("l", Purpose::Export).await.unwrap();
        let mut tar = lease.layer_to_tar(files.exact("l")).await.unwrap();
        assert!(tar.next().await.unwrap().is_ok());
        drop(tar);
        soon("the lease is free", || pool.snapshot().leases == 0).await;
        // A caller that goes away while applying, too; the VM goes on.
        let lease = pool.lease("m", Purpose::Work).await.unwrap();
        let never = body(&tree(1, 100, 1)[..600], 100).chain(stream::pending());
        let gone = lease.tar_to_layer(files.apply_job("m"), never);
        assert!(tokio::time::timeout(Duration::from_millis(300), gone).await.is_err());
        lease.tar_to_layer(files.apply_job("m"), body(&tree(1, 100, 1), 100)).await.unwrap();
        drop(lease);
        assert_eq!(pool.snapshot().poisoned, 0);
        pool.shutdown(END).await;
    }
}

pub(crate) async fn a_killed_vm_fails_one_operation(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    let machine = Arc::new(Machine::of(&lease.vm_description()));
    let tar = tree(4, 1_000_000, 1);
    let (head, tail) = (Bytes::copy_from_slice(&tar[..5000]), Bytes::copy_from_slice(&tar[5000..]));
    let victim = machine.clone();
    let killed = stream::iter([Ok(head)]).chain(stream::once(async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        victim.kill();
        Ok(tail)
    }));
    let e = lease.tar_to_layer(files.apply_job("a"), killed).await.unwrap_err();
    assert!(matches!(&e, SvmError::Died { cause, .. } if cause.contains(machine.killed())), "{e}");
    drop(lease);
    soon("the process is reaped", || !machine.is_alive()).await;
    files.apply(&pool, "a", &tar).await.unwrap();
    let s = pool.snapshot();
    assert_eq!(s.deaths + s.poisoned, 1, "{s:?}");
    pool.shutdown(END).await;
}

pub(crate) async fn a_silent_vm_is_given_up(backend: Backend) {
    let config = PoolConfig {
        idle_timeout: Duration::from_secs(2),
        boot_timeout: Duration::from_mins(2),
        spares: 0,
        ..PoolConfig::default()
    };
    let (pool, files) = (Pool::start(backend.clone(), config), Files::new());
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    let machine = Arc::new(Machine::of(&lease.vm_description()));
    let tar = tree(4, 1_000_000, 1);
    let (head, tail) = (Bytes::copy_from_slice(&tar[..5000]), Bytes::copy_from_slice(&tar[5000..]));
    let victim = machine.clone();
    let stopped = stream::iter([Ok(head)]).chain(stream::once(async move {
        victim.pause();
        Ok(tail)
    }));
    let start = Instant::now();
    let e = lease.tar_to_layer(files.apply_job("a"), stopped).await.unwrap_err();
    assert!(matches!(e, SvmError::Timeout { .. }), "{e}");
    assert!(start.elapsed() < Duration::from_secs(20));
    drop(lease);
    soon("the silent process is ended", || !machine.is_alive()).await;
    files.apply(&pool, "a", &tar).await.unwrap();
    pool.shutdown(END).await;
}

pub(crate) async fn hostile_layers_are_refused(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global), Files::new());
    let good = tree(2, 1000, 1);
    let mut bad_sum = good.clone();
    bad_sum[600] ^= 1;
    bad_sum[150] ^= 1;
    for (what, tar) in [
        ("noise", noise(100_000, 5)),
        ("cut", good[..1200].to_vec()),
        ("checksum", bad_sum),
        ("outside", Tar::default().entry("a", b'1', b"", "../../../etc/passwd").end()),
    ] {
        let e = files.apply(&pool, "bad", &tar).await.unwrap_err();
        assert_eq!(e.refused_kind(), Some(ErrorKind::Corrupt), "{what}: {e}");
    }
    // Refused long before the body ends: the rest is never read.
    let lease = pool.lease("bad", Purpose::Work).await.unwrap();
    let endless =
        body(&noise(4096, 1), 4096).chain(stream::repeat_with(|| Ok(Bytes::from_static(&[7; 4096]))));
    let e = lease.tar_to_layer(files.apply_job("bad"), endless).await.unwrap_err();
    assert_eq!(e.refused_kind(), Some(ErrorKind::Corrupt), "{e}");
    // A body that breaks off is the caller's own error.
    let cut = body(&good[..700], 100).chain(stream::iter([Err(io::Error::other("upload cut"))]));
    let e = lease.tar_to_layer(files.apply_job("bad"), cut).await.unwrap_err();
    assert!(matches!(&e, SvmError::Body(m) if m.contains("upload cut")), "{e}");
    drop(lease);
    // Garbage where an image is due.
    std::fs::write(files.path("junk"), noise(1 << 20, 3)).unwrap();
    let check = CheckJob {
        image: files.readable("junk"),
        require_no_writers: false,
        tree: false,
        writer: 2,
        owners: IdMaps::default(),
    };
    let e = pool.check_image(check).await.unwrap_err();
    assert!(e.refused_kind().is_some(), "{e}");
    files.apply(&pool, "good", &good).await.unwrap();
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(END).await;
}

pub(crate) async fn a_full_disk_is_an_error_of_its_own(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global), Files::new());
    let Some(small) = SmallDisk::of(files.path("small"), SmallDisk::BYTES) else { return };
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    let mut job = files.apply_job("a");
    let path = small.folder.join("image");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    job.image = DiskSource::read_write(Arc::new(file), path);
    let e = lease.tar_to_layer(job, body(&tree(40, 1_000_000, 1), 60_000)).await.unwrap_err();
    assert_eq!(e.refused_kind(), Some(ErrorKind::NoSpace), "{e}");
    drop(lease);
    files.apply(&pool, "b", &tree(1, 10, 1)).await.unwrap();
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(END).await;
    drop(small);
}

pub(crate) async fn a_diff_streams_into_an_apply(backend: Backend) {
    for mode in [Mode::Safe, Mode::Global] {
        let (pool, files) = (pool(&backend, mode), Files::new());
        let tar = tree(5, 1_000_000, 8);
        files.apply(&pool, "a", &tar).await.unwrap();
        let source = pool.lease("a", Purpose::Export).await.unwrap();
        let stream = source.layer_to_tar(files.exact("a")).await.unwrap();
        let target = pool.lease("b", Purpose::Work).await.unwrap();
        let stream = stream.map(|chunk| chunk.map_err(io::Error::from));
        target.tar_to_layer(files.apply_job("b"), stream).await.unwrap();
        drop(target);
        let read = |name: &str| std::fs::read(files.path(name)).unwrap();
        assert!(read("a.vhd") == read("b.vhd") && read("a.record") == read("b.record"));
        pool.shutdown(END).await;
    }
}

/// Streams that are longer than every window flow in both directions at once; refusals and drops leave the machine usable.
pub(crate) async fn a_stream_is_recoded_while_it_comes(backend: Backend) {
    for mode in [Mode::Safe, Mode::Global] {
        let pool = pool(&backend, mode);
        let any = |output_bytes| ExpandJob { format: None, limits: ExpandLimits::of_output(output_bytes) };
        let plain = tree(12, 400_001, 2);
        // Few bytes in, many out.
        let zeros = vec![0; 40 << 20];
        for format in [Compression::Gzip, Compression::Zstd] {
            for plain in [&plain, &zeros] {
                let lease = pool.lease("c", Purpose::Work).await.unwrap();
                let job = CompressJob::reproducible(format);
                let (packed, summary) =
                    recoded(lease.compress(job, body(plain, 60_000)).await.unwrap()).await.unwrap();
                assert_eq!(
                    (summary.format, summary.bytes_in, summary.bytes_out),
                    (format, plain.len() as u64, packed.len() as u64)
                );
                let mut expected = Vec::new();
                svm_agent::recode::compress(&mut &plain[..], format, format.level(), &mut expected).unwrap();
                assert!(packed == expected, "{format}: other bytes than another agent's");
                let lease = pool.lease("e", Purpose::Work).await.unwrap();
                let stream = lease.expand(any(1 << 30), body(&packed, 4099)).await.unwrap();
                let (found, summary) = recoded(stream).await.unwrap();
                assert!(found == *plain && summary.format == format, "{format}: {} bytes", found.len());
                for (stream, limit, kind) in [
                    (&packed[..packed.len() / 2], 1 << 30, ErrorKind::Corrupt),
                    (&packed[..], plain.len() as u64 - 1, ErrorKind::Limit),
                ] {
                    let lease = pool.lease("e", Purpose::Work).await.unwrap();
                    let e = recoded(lease.expand(any(limit), body(stream, 60_000)).await.unwrap()).await;
                    assert_eq!(e.unwrap_err().refused_kind(), Some(kind), "{format}");
                }
            }
        }
        // Dropped while bytes are on their way, both ways.
        let lease = pool.lease("d", Purpose::Work).await.unwrap();
        let endless = stream::repeat_with(|| Ok(Bytes::from(vec![7; 60_000])));
        let mut dropped = lease.expand(any(u64::MAX), endless).await.unwrap();
        for _ in 0..20 {
            assert!(dropped.next().await.unwrap().is_ok());
        }
        drop(dropped);
        soon("the lease is free", || pool.snapshot().leases == 0).await;
        let lease = pool.lease("d", Purpose::Work).await.unwrap();
        let cut = body(&plain, 60_000).chain(stream::iter([Err(io::Error::other("blob cut"))]));
        let e = recoded(lease.expand(any(1 << 30), cut).await.unwrap()).await.unwrap_err();
        assert!(matches!(&e, SvmError::Body(m) if m.contains("blob cut")), "{e}");
        assert_eq!(pool.snapshot().poisoned, 0);
        pool.shutdown(END).await;
        assert!(pool.snapshot().vms.is_empty());
    }
}

pub(crate) async fn recoded(mut stream: Recoded) -> Result<(Vec<u8>, RecodeSummary), SvmError> {
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        all.extend_from_slice(&chunk?);
    }
    Ok((all, *stream.summary().expect("a stream without error is complete")))
}

pub(crate) async fn nothing_is_left_behind(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    let other = pool.lease("b", Purpose::Work).await.unwrap();
    let machines = [&lease, &other].map(|lease| Machine::of(&lease.vm_description()));
    assert!(machines.iter().all(Machine::is_alive));
    drop(lease);
    soon("the first is gone", || !machines[0].is_alive()).await;
    pool.shutdown(Duration::ZERO).await;
    drop(other);
    soon("both are gone", || machines.iter().all(|m| !m.is_alive())).await;
    assert_eq!(std::fs::read_dir(files.folder.path()).unwrap().count(), 0);
    assert_eq!(backend.reap().await.unwrap(), 0);
}

pub(crate) async fn an_end_that_is_asked_for_twice_is_seen_by_all(backend: Backend) {
    let vm = backend.boot(VmSpec { number: 900 }).await.unwrap();
    let machine = Machine::of(&vm.describe());
    assert!(machine.is_alive());
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            let vm = vm.clone();
            tokio::spawn(async move { vm.death().await.cause })
        })
        .collect();
    tokio::join!(vm.terminate(), vm.terminate());
    vm.terminate().await;
    assert!(!machine.is_alive(), "terminate returned before the end");
    let mut causes = Vec::new();
    for waiter in waiters {
        causes.push(tokio::time::timeout(END, waiter).await.expect("death() resolves").unwrap());
    }
    assert!(causes.windows(2).all(|pair| pair[0] == pair[1]), "{causes:?}");
    assert_eq!(vm.death().await.cause, causes[0], "also for one who asks later");
}

/// Prints a row of the table in docs.
pub(crate) async fn figures(backend: Backend) {
    let name = backend.name();
    let files = Files::new();
    let config = PoolConfig { spares: 0, boot_timeout: Duration::from_mins(2), ..PoolConfig::default() };
    let pool = Pool::start(backend.clone(), config.clone());
    let start = Instant::now();
    drop(pool.lease("warm", Purpose::Work).await.unwrap());
    println!("{name}: first lease {:?} ({})", start.elapsed(), backend.detail());
    let mut times = Vec::new();
    for n in 0..7 {
        let start = Instant::now();
        let lease = pool.lease(&format!("{n}"), Purpose::Work).await.unwrap();
        times.push(start.elapsed());
        drop(lease);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    times.sort();
    println!("{name}: lease without spare, median {:?}", times[3]);
    let spared = Pool::start(backend.clone(), PoolConfig { spares: 1, ..config });
    times.clear();
    for n in 0..5 {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let start = Instant::now();
        let lease = spared.lease(&format!("{n}"), Purpose::Work).await.unwrap();
        times.push(start.elapsed());
        drop(lease);
    }
    times.sort();
    println!("{name}: lease of a spare, median {:?}", times[2]);
    spared.shutdown(END).await;
    let (mut disks, mut channels) = (Vec::new(), Vec::new());
    for n in 0..11 {
        let vm = backend.boot(VmSpec { number: 700 + n }).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let disk = files.writable("first");
        let start = Instant::now();
        vm.attach(&disk).await.unwrap();
        disks.push(start.elapsed());
        let start = Instant::now();
        drop(vm.open_channel().await.unwrap());
        channels.push(start.elapsed());
        vm.terminate().await;
    }
    disks.sort();
    channels.sort();
    println!(
        "{name}: first disk of a spare {:?} to {:?}, median {:?}; then a channel, median {:?}",
        disks[0], disks[10], disks[5], channels[5]
    );
    let tar = tree(6600, 18_000, 1);
    for _ in 0..3 {
        let start = Instant::now();
        let lease = pool.lease("l", Purpose::Work).await.unwrap();
        let got = start.elapsed();
        lease.tar_to_layer(files.apply_job("l"), body(&tar, 256 << 10)).await.unwrap();
        let applied = start.elapsed();
        drop(lease);
        let check = CheckJob {
            image: files.image("l"),
            require_no_writers: true,
            tree: false,
            writer: 2,
            owners: IdMaps::default(),
        };
        pool.check_image(check).await.unwrap();
        println!(
            "{name}: {} MB: lease {got:?}, applied {applied:?}, checked {:?}",
            tar.len() >> 20,
            start.elapsed()
        );
        let start = Instant::now();
        let back = collect(
            pool.lease("l", Purpose::Export).await.unwrap().layer_to_tar(files.exact("l")).await.unwrap(),
        );
        assert!(back.await.unwrap().len() == tar.len());
        println!("{name}: exact diff {:?}", start.elapsed());
        let target = vec![files.layer("l")];
        let kind = ExportKind::Canonical {
            target,
            parent: ParentDisks::None,
            format: 1,
            id_maps: IdMaps::default(),
            source_date_epoch: None,
        };
        let start = Instant::now();
        let lease = pool.lease("l", Purpose::Export).await.unwrap();
        collect(lease.layer_to_tar(ExportJob { kind, live: None }).await.unwrap()).await.unwrap();
        println!("{name}: canonical diff {:?}", start.elapsed());
    }
    pool.shutdown(END).await;
}
