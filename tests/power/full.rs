//! Full disks: every request of both faces meets one, at many levels, and goes on when there is space again.
//!
//! ```text
//!   prepared with space ─► filler leaves N bytes (or N inodes) ─► request ─► done │ an error that names the space
//!     meanwhile: what only reads works, another container runs on       failed: as before, or refused until removed
//!   filler deleted ─► the same daemon takes the same request ─► content read back ─► removed: works on a full disk too
//! ```

use super::{
    client::{Calls, Failure},
    containers::{Shown, write_synced},
    daemon::{Daemon, Skipped, homes, store},
    engine::Engine,
    room::Room,
    support::{Tar, noise},
    transport,
};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
};

/// Bytes of the disk.
const BYTES: u64 = 96 << 20;
/// Inodes of the disk: so few that they can be used up.
const INODES: u64 = 512;

/// What is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Bytes(u64),
    Inodes(u64),
}

const LEVELS: [Left; 12] = [
    Left::Bytes(0),
    Left::Bytes(4 << 10),
    Left::Bytes(8 << 10),
    Left::Bytes(16 << 10),
    Left::Bytes(32 << 10),
    Left::Bytes(64 << 10),
    Left::Bytes(160 << 10),
    Left::Bytes(400 << 10),
    Left::Bytes(1 << 20),
    Left::Inodes(0),
    Left::Inodes(1),
    Left::Inodes(3),
];

/// What uses the space up; it is free again after the drop.
struct Filler(PathBuf);

impl Filler {
    fn leave(disk: &Path, left: Left) -> Self {
        let filler = Self(disk.join("filler"));
        fs::create_dir(&filler.0).unwrap();
        // What is still being written back needs its space first.
        rustix::fs::syncfs(File::open(disk).unwrap()).unwrap();
        match left {
            Left::Bytes(bytes) => {
                let file = File::create(filler.0.join("file")).unwrap();
                let mut at = 0;
                // In pieces: the free space is no single one, and a part of it is for the file's own extents.
                for piece in [1 << 20, 64 << 10, 4 << 10] {
                    while free(disk) >= bytes + piece {
                        match fallocate(&file, FallocateFlags::empty(), at, piece) {
                            Ok(()) => at += piece,
                            Err(rustix::io::Errno::NOSPC) => break,
                            Err(e) => panic!("fill the disk: {e}"),
                        }
                    }
                }
                file.sync_all().unwrap();
            }
            Left::Inodes(inodes) => {
                let mut made = Vec::new();
                for n in 0.. {
                    let path = filler.0.join(n.to_string());
                    match File::create_new(&path) {
                        Ok(_) => made.push(path),
                        Err(e) if e.kind() == io::ErrorKind::StorageFull => break,
                        Err(e) => panic!("fill the disk: {e}"),
                    }
                }
                for path in made.iter().take(inodes as usize) {
                    fs::remove_file(path).unwrap();
                }
            }
        }
        filler
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn free(disk: &Path) -> u64 {
    let room = statvfs(disk).unwrap();
    room.f_bavail * room.f_frsize
}

/// A daemon on a small disk, with a layer and a container that has nothing to do with what follows.
struct Scene {
    room: Room,
    calls: Calls,
    engine: Engine,
    daemon: Daemon,
    other: PathBuf,
    runtime: tokio::runtime::Runtime,
    containerd: PathBuf,
}

fn small(seed: u64) -> Vec<u8> {
    Tar::new().dir("d/").file("d/f", &noise(seed, 20_000)).end()
}

fn large() -> Vec<u8> {
    Tar::new().file("large", &noise(77, 600_000)).end()
}

impl Scene {
    fn new() -> Self {
        let room = Room::enter_small(BYTES, INODES);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let containerd = transport::address(&room.folder, "containerd");
        let engine = runtime.block_on(async { Engine::start(&containerd) });
        let daemon = Daemon::start(&room, &containerd, Skipped::Nothing).expect("a start on an empty disk");
        let calls = Calls::new(&room.folder);
        calls.docker("Init", &json!({"Home": homes(&room)[0], "Opts": null})).unwrap();
        calls.docker("Create", &json!({"ID": "base"})).unwrap();
        calls.apply("base", "", &small(1)).unwrap();
        calls.docker("CreateReadWrite", &json!({"ID": "other", "Parent": "base"})).unwrap();
        let other = calls.get("other").unwrap();
        write_synced(&other, "kept", &noise(9, 30_000)).unwrap();
        let scene = Self { room, calls, engine, daemon, other, runtime, containerd };
        scene.unpacked("image", "", &small(2)).unwrap();
        scene.calls.commit("image", "extract-image").unwrap();
        scene
    }

    /// An extraction `extract-NAME` with a tar.
    fn unpacked(&self, name: &str, parent: &str, tar: &[u8]) -> Result<(), Failure> {
        let mounts = self.calls.prepare(&format!("extract-{name}"), parent)?;
        self.calls.unpack(mounts, &self.engine.put(tar), tar.len())
    }

    fn tar_of(&self, name: &str, parent: &str) -> Result<Vec<u8>, Failure> {
        let left = self.calls.view("left", parent)?;
        let right = self.calls.view("right", name)?;
        let digest = self.calls.compare(left, right)?;
        self.calls.remove_snapshot("left")?;
        self.calls.remove_snapshot("right")?;
        Ok(self.engine.get(&digest))
    }

    /// Stops the daemon, which waits for the end of connections.
    fn stop(&mut self) {
        self.calls = Calls::new(&self.room.folder);
        self.daemon.stop();
    }

    /// What only reads works, and the other container as well.
    fn others_run_on(&self) {
        assert!(self.calls.diff("base", "").expect("Diff on a full disk") == small(1));
        assert_eq!(fs::read(self.other.join("kept")).unwrap(), noise(9, 30_000));
        assert!(fs::read(self.other.join("d/f")).unwrap() == noise(1, 20_000));
        assert_eq!(self.calls.layer("base").unwrap().unwrap().0, "applied");
        assert!(self.calls.stat("image").expect("Stat on a full disk").is_some());
        assert!(self.calls.names().expect("List on a full disk").contains(&"image".to_owned()));
        self.calls.docker("Status", &json!({})).expect("Status on a full disk");
    }
}

/// A request that meets the full disk.
struct Phase {
    name: &'static str,
    /// With space.
    before: fn(&Scene) -> Result<(), Failure>,
    request: fn(&Scene) -> Result<(), Failure>,
    /// After a failure, with space again: what a client does before it sends the request again.
    again: fn(&Scene) -> Result<(), Failure>,
    /// Whether everything is as promised afterwards.
    check: fn(&Scene) -> Result<(), Failure>,
    /// What removes it; must work on a full disk.
    remove: fn(&Scene) -> Result<(), Failure>,
    /// It may fail on a full disk.
    may_fail: bool,
}

#[expect(clippy::unnecessary_wraps, reason = "the type of a phase's steps")]
fn nothing(_: &Scene) -> Result<(), Failure> {
    Ok(())
}

fn remove_x(scene: &Scene) -> Result<(), Failure> {
    scene.calls.docker("Remove", &json!({"ID": "x"})).map(drop)
}

fn is(scene: &Scene, state: &str) -> Result<(), Failure> {
    match scene.calls.layer("x")? {
        Some((found, _)) if found == state => Ok(()),
        other => Err(format!("x is {other:?}, not {state}")),
    }
}

fn same(found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    if found == expected { Ok(()) } else { Err(format!("{} other bytes", found.len())) }
}

fn create(scene: &Scene) -> Result<(), Failure> {
    scene.calls.docker("Create", &json!({"ID": "x", "Parent": "base"})).map(drop)
}

fn create_rw(scene: &Scene) -> Result<(), Failure> {
    scene.calls.docker("CreateReadWrite", &json!({"ID": "x", "Parent": "base"})).map(drop)
}

fn written(scene: &Scene) -> Result<(), Failure> {
    create_rw(scene)?;
    let dir = scene.calls.get("x")?;
    write_synced(&dir, "written", &noise(3, 10_000)).map_err(|e| e.to_string())
}

fn read_written(scene: &Scene) -> Result<(), Failure> {
    let dir = scene.calls.get("x")?;
    let found = fs::read(dir.join("written")).map_err(|e| e.to_string());
    scene.calls.put("x")?;
    same(&found?, &noise(3, 10_000))
}

fn boxed(scene: &Scene) -> Result<(), Failure> {
    let mounts = scene.calls.prepare("box", "image")?;
    let shown = Shown::mount(&scene.room.folder, &mounts).map_err(|e| e.to_string())?;
    write_synced(&shown.place, "written", &noise(4, 10_000)).map_err(|e| e.to_string())?;
    shown.end().map_err(|e| e.to_string())
}

fn read_box(scene: &Scene, mounts: &[containerd_api::types::Mount]) -> Result<(), Failure> {
    let shown = Shown::mount(&scene.room.folder, mounts).map_err(|e| e.to_string())?;
    same(&fs::read(shown.place.join("written")).map_err(|e| e.to_string())?, &noise(4, 10_000))
}

const PHASES: [Phase; 14] = [
    Phase {
        name: "create",
        before: nothing,
        request: create,
        again: nothing,
        check: |s| is(s, "created"),
        remove: remove_x,
        may_fail: true,
    },
    Phase {
        name: "create-rw",
        before: nothing,
        request: create_rw,
        again: nothing,
        check: |s| is(s, "sandbox"),
        remove: remove_x,
        may_fail: true,
    },
    Phase {
        name: "apply",
        before: create,
        request: |s| s.calls.apply("x", "base", &large()),
        // As an engine: what was begun is never sent again.
        again: |s| remove_x(s).and_then(|()| create(s)),
        check: |s| s.calls.diff("x", "base").and_then(|tar| same(&tar, &large())),
        remove: remove_x,
        may_fail: true,
    },
    Phase {
        name: "get",
        before: create_rw,
        request: |s| s.calls.get("x").map(drop),
        again: nothing,
        check: |s| s.calls.get("x").and_then(|_| s.calls.put("x")).and_then(|()| s.calls.put("x")),
        remove: remove_x,
        may_fail: true,
    },
    Phase {
        name: "put",
        before: written,
        request: |s| s.calls.put("x"),
        again: nothing,
        check: read_written,
        remove: remove_x,
        may_fail: false,
    },
    Phase {
        name: "diff",
        before: |s| written(s).and_then(|()| s.calls.put("x")),
        request: |s| s.calls.diff("x", "base").map(drop),
        again: nothing,
        check: |s| {
            let tar = s.calls.diff("x", "base")?;
            same(&s.calls.diff("x", "base")?, &tar)?;
            let has = tar.windows(100).any(|w| w == &noise(3, 10_000)[..100]);
            if has { Ok(()) } else { Err("the diff lacks the file".into()) }
        },
        remove: remove_x,
        may_fail: true,
    },
    Phase {
        name: "remove",
        before: written_and_put,
        request: remove_x,
        again: nothing,
        check: |s| if s.calls.layer("x")?.is_none() { Ok(()) } else { Err("x is still there".into()) },
        remove: nothing,
        may_fail: false,
    },
    Phase {
        name: "prepare",
        before: nothing,
        request: |s| s.calls.prepare("extract-x", "image").map(drop),
        again: nothing,
        check: |s| s.calls.mounts("extract-x").map(drop),
        remove: |s| s.calls.remove_snapshot("extract-x"),
        may_fail: true,
    },
    Phase {
        name: "unpack",
        before: |s| s.calls.prepare("extract-x", "image").map(drop),
        request: |s| {
            let mounts = s.calls.mounts("extract-x")?;
            s.calls.unpack(mounts, &s.engine.put(&large()), large().len())
        },
        // As containerd's unpacker.
        again: |s| {
            s.calls.remove_snapshot("extract-x")?;
            s.calls.prepare("extract-x", "image").map(drop)
        },
        check: |s| {
            s.calls.commit("x", "extract-x")?;
            let tar = s.tar_of("x", "image");
            s.calls.remove_snapshot("x")?;
            s.calls.prepare("extract-x", "image")?;
            same(&tar?, &large())
        },
        remove: |s| s.calls.remove_snapshot("extract-x"),
        may_fail: true,
    },
    Phase {
        name: "commit",
        before: |s| s.unpacked("x", "image", &large()),
        request: |s| s.calls.commit("x", "extract-x"),
        again: nothing,
        check: |s| s.tar_of("x", "image").and_then(|tar| same(&tar, &large())),
        remove: |s| s.calls.remove_snapshot("x"),
        may_fail: true,
    },
    Phase {
        name: "container",
        before: nothing,
        request: |s| s.calls.prepare("box", "image").map(drop),
        again: nothing,
        check: |s| s.calls.mounts("box").map(drop),
        remove: |s| s.calls.remove_snapshot("box"),
        may_fail: true,
    },
    Phase {
        name: "container-commit",
        before: boxed,
        request: |s| s.calls.commit("x", "box"),
        again: nothing,
        check: |s| {
            let mounts = s.calls.view("view", "x")?;
            let found = read_box(s, &mounts);
            s.calls.remove_snapshot("view")?;
            found
        },
        remove: |s| s.calls.remove_snapshot("x"),
        may_fail: true,
    },
    Phase {
        name: "view",
        before: nothing,
        request: |s| s.calls.view("view", "image").map(drop),
        again: nothing,
        check: |s| s.calls.mounts("view").map(drop),
        remove: |s| s.calls.remove_snapshot("view"),
        may_fail: true,
    },
    Phase {
        name: "remove-snapshot",
        before: boxed,
        request: |s| s.calls.remove_snapshot("box"),
        again: nothing,
        check: |s| if s.calls.stat("box")?.is_none() { Ok(()) } else { Err("it is still there".into()) },
        remove: nothing,
        may_fail: false,
    },
];

fn written_and_put(scene: &Scene) -> Result<(), Failure> {
    written(scene).and_then(|()| scene.calls.put("x"))
}

/// In a thread of its own, which has the mounts.
fn in_a_room(test: impl FnOnce() + Send + 'static) {
    if let Err(panic) = std::thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_full_disk_fails_requests_and_the_same_daemon_goes_on_when_there_is_space() {
    in_a_room(|| {
        let mut scene = Scene::new();
        let mut failures: BTreeMap<&str, u32> = BTreeMap::new();
        let mut wrong = Vec::new();
        for phase in &PHASES {
            for left in LEVELS {
                let what = format!("{} with {left:?} left", phase.name);
                (phase.before)(&scene).unwrap_or_else(|e| panic!("before {what}: {e}"));
                let filler = Filler::leave(&scene.room.disk(), left);
                let result = (phase.request)(&scene);
                scene.others_run_on();
                drop(filler);
                if let Err(text) = &result {
                    *failures.entry(phase.name).or_default() += 1;
                    let lower = text.to_lowercase();
                    if !phase.may_fail {
                        wrong.push(format!("{what}: failed: {text}"));
                    } else if !lower.contains("space") && !lower.contains("lcow.minfree") {
                        wrong.push(format!("{what}: the reason is not named: {text}"));
                    }
                    let repeated = (phase.again)(&scene).and_then(|()| (phase.request)(&scene));
                    if let Err(text) = repeated {
                        wrong.push(format!("{what}: with space again: {text}"));
                    }
                }
                if let Err(text) = (phase.check)(&scene) {
                    wrong.push(format!("{what}: afterwards: {text}"));
                }
                let filler = Filler::leave(&scene.room.disk(), left);
                if let Err(text) = (phase.remove)(&scene) {
                    wrong.push(format!("{what}: removal on a full disk: {text}"));
                    drop(filler);
                    let _ = (phase.remove)(&scene);
                }
            }
        }
        println!("requests that met a full disk and failed: {failures:?}");
        assert!(wrong.is_empty(), "{wrong:#?}\n{}", scene.daemon.log());
        for phase in ["create", "create-rw", "apply", "prepare", "unpack", "container", "view"] {
            assert!(failures.contains_key(phase), "{phase} never met a full disk: {failures:?}");
        }
        scene.calls.put("other").unwrap();
        store(&scene.room, "scrub").unwrap();
        scene.stop();
        store(&scene.room, "repair").unwrap();
        // And it starts on a full disk.
        let filler = Filler::leave(&scene.room.disk(), Left::Bytes(0));
        let started = Daemon::start(&scene.room, &scene.containerd, Skipped::Nothing);
        assert!(started.is_ok(), "a start on a full disk: {:?}", started.err());
        assert!(scene.calls.diff("base", "").unwrap() == small(1));
        drop((filler, started));
        scene.room.unmount();
        scene.room.check().unwrap();
        drop(scene.runtime);
    });
}

#[test]
fn a_sparse_sandbox_on_a_full_disk_keeps_what_was_synced_and_others_run_on() {
    in_a_room(|| {
        let mut scene = Scene::new();
        let options = json!({"ID": "x", "Parent": "base", "StorageOpt": {"size": "256m"}});
        scene.calls.docker("CreateReadWrite", &options).unwrap();
        let dir = scene.calls.get("x").unwrap();
        write_synced(&dir, "first", &noise(5, 50_000)).unwrap();
        let filler = Filler::leave(&scene.room.disk(), Left::Bytes(8 << 20));
        let mut synced = 0;
        let error = loop {
            match write_synced(&dir, &format!("n{synced}"), &noise(synced + 1, 1 << 20)) {
                Ok(()) => synced += 1,
                Err(e) => break e,
            }
            assert!(synced < 64, "64 MiB went onto 8 MiB");
        };
        println!("{synced} MiB were synced, then: {error}");
        // ENOSPC, EIO, or EROFS once the file system in the sandbox has met an error.
        let known = [libc::ENOSPC, libc::EIO, libc::EROFS];
        assert!(error.raw_os_error().is_some_and(|n| known.contains(&n)), "{error}");
        scene.others_run_on();
        drop(filler);
        scene.calls.put("x").unwrap();
        let dir = scene.calls.get("x").unwrap();
        assert_eq!(fs::read(dir.join("first")).unwrap(), noise(5, 50_000));
        for n in 0..synced {
            assert!(fs::read(dir.join(format!("n{n}"))).unwrap() == noise(n + 1, 1 << 20), "n{n}");
        }
        write_synced(&dir, "after", b"space again").unwrap();
        scene.calls.put("x").unwrap();
        let file = homes(&scene.room)[0].join("x/sandbox.vhd");
        let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(&file).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        remove_x(&scene).unwrap();
        scene.calls.put("other").unwrap();
        scene.stop();
        scene.room.unmount();
        scene.room.check().unwrap();
    });
}

#[test]
fn a_container_at_its_quota_can_be_read_compared_and_committed() {
    in_a_room(|| {
        let scene = Scene::new();
        let fill = |dir: &Path| {
            write_synced(dir, "written", &noise(4, 10_000)).unwrap();
            let error = fs::write(dir.join("much"), noise(6, 32 << 20)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        };
        create_rw(&scene).unwrap();
        fill(&scene.calls.get("x").unwrap());
        scene.calls.put("x").unwrap();
        assert!(scene.calls.diff("x", "base").unwrap().len() > 8 << 20);
        remove_x(&scene).unwrap();
        let mounts = scene.calls.prepare("box", "image").unwrap();
        let shown = Shown::mount(&scene.room.folder, &mounts).unwrap();
        fill(&shown.place);
        shown.end().unwrap();
        scene.calls.commit("x", "box").unwrap();
        let mounts = scene.calls.view("view", "x").unwrap();
        read_box(&scene, &mounts).unwrap();
    });
}
