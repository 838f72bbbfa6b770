//! Kinds of disks and what is told of machines: hash trees, VHDX, dirty file systems, greetings, garbage.

use crate::{
    files::{Files, body, noise, tree},
    suite::{Backend, END, pool},
};
use lcow_graphdriver::svm::{
    CheckJob, ExportJob, ExportKind, IdMaps, LayerDisk, LayerKind, Mode, ParentDisks, Purpose, VmSpec,
};
use std::{
    path::Path,
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use svm_protocol::{ErrorKind, FrameType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vhd_image::vhdx;

/// A hash tree behind the image, its leaves on a scratch disk; the tree is checked against every byte.
pub(crate) async fn a_hash_tree_with_a_scratch_disk(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    let tar = tree(40, 50_000, 4);
    let (mut roots, mut image_bytes) = (Vec::new(), 0);
    for (name, scratch) in [("with", true), ("without", false)] {
        let lease = pool.lease(name, Purpose::Work).await.unwrap();
        let mut job = files.apply_job(name);
        job.options.verity = true;
        job.scratch = scratch.then(|| files.writable("scratch"));
        let summary = lease.tar_to_layer(job, body(&tar, 60_000)).await.unwrap();
        drop(lease);
        roots.push(summary.verity_root.expect("a root").to_string());
        image_bytes = summary.image_bytes;
        let image = files.readable(&format!("{name}.vhd")).window(0, summary.image_bytes);
        // The tree lies behind the file system.
        for (image, tree) in [(image.clone(), false), (files.image(name), true)] {
            let check =
                CheckJob { image, require_no_writers: true, tree, writer: 2, owners: IdMaps::default() };
            let found = pool.check_image(check).await.unwrap();
            // Told where it was asked for.
            assert_eq!(found.verity.map(|r| r.to_string()), tree.then(|| roots[0].clone()), "{name}");
        }
        let record = files.readable(&format!("{name}.record"));
        let kind = ExportKind::Exact { image: image.clone(), record };
        assert!(files.export(&pool, name, ExportJob { kind, live: None }).await.unwrap() == tar, "{name}");
    }
    assert_eq!(roots[0], roots[1]);
    let read = |name: &str| std::fs::read(files.path(name)).unwrap();
    assert!(read("with.vhd") == read("without.vhd"));

    // One bit of a file's bytes: the metadata are as good as before, the tree is not.
    let mut damaged = read("with.vhd");
    let part = noise(64, 4);
    let at = damaged.windows(part.len()).position(|w| w == part).expect("the first file's bytes");
    damaged[at] ^= 1;
    std::fs::write(files.path("damaged.vhd"), damaged).unwrap();
    let check = |image, tree| CheckJob {
        image,
        require_no_writers: true,
        tree,
        writer: 2,
        owners: IdMaps::default(),
    };
    let file_system = files.readable("damaged.vhd").window(0, image_bytes);
    pool.check_image(check(file_system, false)).await.unwrap();
    let e = pool.check_image(check(files.image("damaged"), true)).await.unwrap_err();
    assert_eq!(e.refused_kind(), Some(ErrorKind::Corrupt), "{e}");
    // What stands behind the file system must be said to be a tree.
    let e = pool.check_image(check(files.image("with"), false)).await.unwrap_err();
    assert_eq!(e.refused_kind(), Some(ErrorKind::Corrupt), "{e}");
    pool.shutdown(END).await;
}

/// A sandbox in a VHDX gives the tar that the same disk gives as it is.
pub(crate) async fn a_disk_in_a_vhdx(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global), Files::new());
    files.apply(&pool, "l", &tree(60, 60_000, 5)).await.unwrap();
    let plain = files.image("l");
    let len = plain.len.unwrap();
    let image = std::fs::read(files.path("l.vhd")).unwrap()[..len as usize].to_vec();
    let options = vhdx::CreateOptions::new(len.next_multiple_of(1 << 20), uuid::Uuid::from_u128(7));
    // Two pieces, the second first, so that the disk's order is not the file's.
    let (head, tail) = image.split_at(1 << 20);
    let content = [(1 << 20, tail.to_vec()), (0, head.to_vec())];
    vhdx::create(&*files.writable("l.vhdx").file, &options, &content).unwrap();
    let export = async |disk| {
        let target = vec![LayerDisk { disk, kind: LayerKind::Applied }];
        let (parent, id_maps) = (ParentDisks::None, IdMaps::default());
        let kind = ExportKind::Canonical { target, parent, format: 1, id_maps, source_date_epoch: None };
        files.export(&pool, "l", ExportJob { kind, live: None }).await
    };
    let expected = export(plain).await.unwrap();
    for disk in [files.readable("l.vhdx").vhdx(), files.readable("l.vhdx").vhdx().window(0, len)] {
        assert!(export(disk).await.unwrap() == expected);
    }
    // A file that is none is refused as one, and the machine goes on.
    std::fs::write(files.path("junk"), noise(4 << 20, 3)).unwrap();
    let e = export(files.readable("junk").vhdx()).await.unwrap_err();
    assert!(e.to_string().contains("VHDX"), "{e}");
    assert!(export(files.readable("l.vhdx").vhdx()).await.unwrap() == expected);
    pool.shutdown(END).await;
}

/// A mounted file system, unmounted on drop.
pub(crate) struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    pub(crate) fn new(image: &Path, point: &'a Path) -> Self {
        std::fs::create_dir_all(point).unwrap();
        ext4_image::testing::loop_mount(image, point, "", &[]);
        Self(point)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

pub(crate) fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A file system whose journal was never replayed is read as the kernel would, without being mounted anywhere; one with
/// a feature that the reader does not know is refused by the feature's name, and not guessed at.
pub(crate) async fn a_dirty_file_system_is_read_and_a_foreign_one_is_refused(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Safe), Files::new());
    let (image, point) = (files.path("fs"), files.path("point"));
    std::fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    run(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&image));
    {
        let _mounted = Mounted::new(&image, &point);
        std::fs::create_dir_all(point.join("upper/d")).unwrap();
        std::fs::create_dir_all(point.join("work")).unwrap();
        for n in 0..40 {
            std::fs::write(point.join(format!("upper/d/f{n}")), noise(3000, n)).unwrap();
        }
        run(Command::new("sync").arg("-f").arg(&point));
        // What lies in the journal now is nowhere else, as after a power cut.
        std::fs::copy(&image, files.path("dirty")).unwrap();
    }
    let recover = std::fs::read(files.path("dirty")).unwrap()[1024 + 0x60] & 4;
    assert_eq!(recover, 4, "the copy has a journal to replay");
    let export = async |name: &str| {
        let target = vec![LayerDisk { disk: files.readable(name), kind: LayerKind::Sandbox }];
        let (parent, id_maps) = (ParentDisks::None, IdMaps::default());
        let kind = ExportKind::Canonical { target, parent, format: 1, id_maps, source_date_epoch: None };
        files.export(&pool, name, ExportJob { kind, live: None }).await
    };
    let before = std::fs::read(files.path("dirty")).unwrap();
    let clean = export("fs").await.unwrap();
    assert!(clean.len() > 40 * 3000);
    assert!(export("dirty").await.unwrap() == clean, "the journal's part is missing");
    assert!(std::fs::read(files.path("dirty")).unwrap() == before, "a disk that is read was written");

    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-O", "bigalloc"]).arg(files.path("fs")));
    let e = export("fs").await.unwrap_err();
    assert_eq!(e.refused_kind(), Some(ErrorKind::Unsupported), "{e}");
    assert!(e.to_string().contains("bigalloc"), "{e}");
    assert!(export("dirty").await.unwrap() == clean);
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(END).await;
}

/// Garbage on an operation's channel costs that channel.
pub(crate) async fn garbage_on_a_channel(backend: Backend) {
    let vm = backend.boot(VmSpec { number: 77 }).await.unwrap();
    let ping = {
        let mut frames = Vec::new();
        svm_protocol::write_json(&mut frames, FrameType::Request, &svm_protocol::Operation::Ping).unwrap();
        frames
    };
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("a type that is none", b"\x02\0\0\0\xffxx".to_vec()),
        ("a frame of 4 GB", b"\xff\xff\xff\xff\x02".to_vec()),
        ("no JSON", b"\x04\0\0\0\x02{{{{".to_vec()),
        ("data before a request", b"\x01\0\0\0\x03x".to_vec()),
    ];
    cases.extend((0..4).map(|seed| ("noise", noise(5000, seed))));
    for (what, garbage) in cases {
        let mut channel = vm.open_channel().await.unwrap();
        // The agent may have let go before it is all sent.
        let _ = channel.write_all(&garbage).await;
        let mut head = [0; svm_protocol::HEADER_LEN];
        let answer = tokio::time::timeout(Duration::from_secs(20), channel.read_exact(&mut head));
        answer.await.expect(what).expect(what);
        assert_eq!(svm_protocol::parse_header(head).unwrap().0, FrameType::Error, "{what}");
        drop(channel);
        vm.ping().await.expect(what);
        let mut channel = vm.open_channel().await.unwrap();
        channel.write_all(&ping).await.unwrap();
        channel.read_exact(&mut head).await.unwrap();
        assert_eq!(svm_protocol::parse_header(head).unwrap().0, FrameType::Result, "after {what}");
    }
    vm.terminate().await;
    assert_eq!(vm.death().await.cause, "signal 9");
}

/// Machines restored from one saved state have a clock and random numbers of their own.
pub(crate) async fn restored_machines_wake_alone(backend: Backend) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    // The first may be the one that was booted; all are restored from the same state.
    for number in 0..4 {
        let before = now();
        let vm = backend.boot(VmSpec { number: 900 + number }).await.unwrap();
        let after = now();
        let witness = vm.witness().expect("a machine with a clock of its own");
        let clock = Duration::from_nanos(witness.unix_nanos);
        let slack = Duration::from_secs(2);
        assert!(
            before < clock + slack && clock < after + slack,
            "the guest's clock says {clock:?}, the host's {before:?} to {after:?}"
        );
        assert!(seen.insert(witness.random), "two machines drew the same random numbers: {witness:?}");
        vm.terminate().await;
        if number == 0 {
            // A template that was made just now would pass for a clock that was set.
            tokio::time::sleep(2 * slack).await;
        }
    }
    assert_eq!(backend.cold_boots().min(1), backend.cold_boots(), "restored, not booted");
}

/// A spare stands still until it is needed, and its clock with it: what its first operation asks, it must know again.
pub(crate) async fn a_paused_spare_goes_on_with_the_hosts_clock(backend: Backend) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let slack = Duration::from_secs(1);
    for (number, with_disk) in [(910, false), (911, true)] {
        let vm = backend.boot(VmSpec { number }).await.unwrap();
        let greeting = vm.witness().expect("a machine with a clock of its own");
        tokio::time::sleep(3 * slack).await;
        vm.ping().await.unwrap();
        assert_eq!(vm.witness(), Some(greeting.clone()), "asking whether it is there wakes nobody");
        let before = now();
        let files = Files::new();
        // Whichever comes first.
        if with_disk {
            vm.attach(&files.writable("disk")).await.unwrap();
        }
        let mut channel = vm.open_channel().await.unwrap();
        let after = now();
        let witness = vm.witness().unwrap();
        let clock = Duration::from_nanos(witness.unix_nanos);
        assert!(
            before < clock + slack && clock < after + slack,
            "the guest's clock says {clock:?}, the host's {before:?} to {after:?}"
        );
        assert_ne!(witness.random, greeting.random);
        let mut request = Vec::new();
        svm_protocol::write_json(&mut request, FrameType::Request, &svm_protocol::Operation::Ping).unwrap();
        channel.write_all(&request).await.unwrap();
        let mut head = [0; svm_protocol::HEADER_LEN];
        channel.read_exact(&mut head).await.unwrap();
        assert_eq!(svm_protocol::parse_header(head).unwrap().0, FrameType::Result);
        // It was told once: it does not stand still any more.
        vm.open_channel().await.unwrap();
        assert_eq!(vm.witness(), Some(witness));
        vm.terminate().await;
    }
}
