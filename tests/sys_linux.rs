//! Loop devices and mounts with the real kernel. Needs root, loop devices, mkfs.ext4 and overlayfs; where one is
//! missing the test fails with the reason.

use lcow_sys::linux::{
    byhandle::{self, Name, Tree},
    freeze, idmap,
    loopdev::{self, LoopDevice, LoopSpec},
    mount::{self, Ext4Options},
    mountinfo,
    overlay::{self, OverlayMethod, OverlaySpec},
};
use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    time::Duration,
};

/// A folder whose mounts go away with it, in reverse order, also after a failure.
struct Scene {
    folder: tempfile::TempDir,
    mounts: Vec<PathBuf>,
}

impl Scene {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        Self { folder: tempfile::tempdir().unwrap(), mounts: Vec::new() }
    }

    fn dir(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let status = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&path).status();
        assert!(status.expect("mkfs.ext4 is needed").success());
        path
    }

    fn attach(image: &Path, read_only: bool) -> LoopDevice {
        let file = File::options().read(true).write(true).open(image).unwrap();
        let spec = LoopSpec { read_only, autoclear: true, name: "lcow-test".into(), ..LoopSpec::default() };
        loopdev::attach(file.as_fd(), &spec).expect("loop devices are needed")
    }

    fn mount_image(&mut self, image: &Path, at: &str, options: Ext4Options) -> PathBuf {
        let device = Self::attach(image, options.read_only);
        let target = self.dir(at);
        mount::mount_ext4(&device.path, &target, options).unwrap();
        self.mounts.push(target.clone());
        target
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for target in self.mounts.iter().rev() {
            let _ = freeze::thaw(target);
            let _ = mount::umount(target, true);
        }
    }
}

#[test]
fn an_ext4_without_a_place_in_the_tree_is_read_by_inode_number() {
    let mut scene = Scene::new();
    let image = scene.image("image");
    let point = scene.mount_image(&image, "point", Ext4Options::default());
    fs::create_dir_all(point.join("folder/inner")).unwrap();
    fs::write(point.join("folder/file"), [7; 5000]).unwrap();
    let script = "cd $0/folder; ln -s file link; setfattr -n trusted.x -v 1 file; setfattr -h -n trusted.y -v 2 link; \
                  fallocate -l 100000 reserved; printf start | dd of=reserved conv=notrunc status=none; sync -f .";
    let status = Command::new("sh").arg("-ec").arg(script).arg(&point).status().unwrap();
    assert!(status.success(), "fallocate and attr are needed");
    let ino = |name: &str| fs::symlink_metadata(point.join(name)).unwrap().ino() as u32;
    let numbers = ["folder", "folder/inner", "folder/file", "folder/link", "folder/reserved"].map(ino);
    let [folder, inner, file, link, reserved] = numbers;
    let look = |tree: &Tree| {
        let mut names = Vec::new();
        tree.visit_dir::<std::io::Error>(folder, |Name { name, ino, .. }| {
            names.push((name.to_vec(), ino as u32));
            Ok(())
        })
        .unwrap();
        names.sort();
        let expected: [(&[u8], u32); 4] =
            [(b"file", file), (b"inner", inner), (b"link", link), (b"reserved", reserved)];
        assert_eq!(names, expected.map(|(name, ino)| (name.to_vec(), ino)));
        let stat = tree.stat(file).unwrap();
        assert_eq!(
            (stat.size, stat.links, stat.mode & 0o170_000, stat.encrypted),
            (5000, 1, 0o100_000, false)
        );
        assert_eq!(tree.read_link(link).unwrap(), b"file");
        assert_eq!(tree.xattrs(file).unwrap(), [(b"trusted.x".to_vec(), b"1".to_vec())]);
        assert_eq!(tree.xattrs(link).unwrap(), [(b"trusted.y".to_vec(), b"2".to_vec())]);
        assert_eq!(tree.xattrs(inner).unwrap(), []);
        // mkfs gives an image of this size blocks of 1 KiB; what is reserved behind the first is no data.
        let file = tree.open_file(reserved).unwrap();
        assert_eq!(byhandle::data_ranges(&file, 9).unwrap(), [(0, 1024)]);
        assert!(byhandle::data_ranges(&file, 0).is_err());
        assert_eq!(tree.stat(9999).unwrap_err().raw_os_error(), Some(libc::ESTALE));
    };
    look(&Tree::of(&point).unwrap());
    mount::umount(&point, false).unwrap();
    let device = Scene::attach(&image, false);
    let tree = Tree::mount(&device.path).unwrap();
    assert!(mountinfo::read().unwrap().iter().all(|entry| entry.source != device.path.as_os_str()));
    look(&tree);
    let file = tree.open_file(file).unwrap();
    assert!(File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).is_err());
}

#[test]
fn a_window_of_a_file_becomes_a_device_and_goes_with_its_last_user() {
    let scene = Scene::new();
    let path = scene.folder.path().join("file");
    fs::write(&path, (0..8u8).flat_map(|n| [n; 512]).collect::<Vec<_>>()).unwrap();
    let file = File::open(&path).unwrap();
    let spec = LoopSpec {
        offset: 1024,
        sizelimit: 1536,
        read_only: true,
        autoclear: true,
        direct_io: false,
        name: "x".repeat(100),
    };
    let device = loopdev::attach(file.as_fd(), &spec).unwrap();
    let expected: Vec<u8> = (2..5u8).flat_map(|n| [n; 512]).collect();
    assert_eq!(fs::read(&device.path).unwrap(), expected);
    let written = File::options().write(true).open(&device.path).and_then(|f| {
        use std::os::unix::fs::FileExt;
        f.write_all_at(&[9; 512], 0)?;
        f.sync_all()
    });
    assert!(written.is_err(), "read-only");
    assert_eq!(fs::read(&path).unwrap()[1024], 2, "nothing was written");
    let status = loopdev::status(device.number).unwrap().unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!((status.backing_dev, status.backing_inode), (meta.dev(), meta.ino()));
    assert_eq!((status.offset, status.sizelimit, status.name.len()), (1024, 1536, 63));
    assert!(status.read_only && status.autoclear);
    assert!(loopdev::list().unwrap().contains(&status));
    assert_eq!(loopdev::find_by_backing(file.as_fd()).unwrap(), [status]);
    drop(device);
    let mut left = Vec::new();
    for _ in 0..100 {
        left = loopdev::find_by_backing(file.as_fd()).unwrap();
        if left.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn many_starters_at_once_each_get_their_own_device() {
    let scene = Scene::new();
    let path = scene.folder.path().join("file");
    fs::write(&path, [0; 4096]).unwrap();
    let file = File::open(&path).unwrap();
    let spec = LoopSpec { read_only: true, autoclear: true, ..LoopSpec::default() };
    let mut numbers: Vec<u32> = std::thread::scope(|s| {
        let attach = || loopdev::attach(file.as_fd(), &spec).unwrap();
        let all: Vec<_> = (0..16).map(|_| s.spawn(attach)).collect();
        let devices: Vec<_> = all.into_iter().map(|t| t.join().unwrap()).collect();
        let numbers = devices.iter().map(|d| d.number).collect();
        for device in devices {
            device.detach().unwrap();
        }
        numbers
    });
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 16);
}

#[test]
fn ext4_mounts_show_up_in_the_table_freeze_and_thaw() {
    let mut scene = Scene::new();
    let image = scene.image("image");
    let target = scene.mount_image(
        &image,
        "a b\\c",
        Ext4Options { discard: true, noatime: true, ..Ext4Options::default() },
    );
    let entry = mountinfo::read().unwrap().into_iter().find(|m| m.mount_point == target).unwrap();
    assert_eq!((entry.fs_type.as_str(), entry.major), ("ext4", loopdev::LOOP_MAJOR));
    assert!(entry.super_options.contains("discard") && entry.options.contains("noatime"), "{entry:?}");
    assert!(mount::space(&target).unwrap().available > 1 << 20);
    fs::write(target.join("before"), "x").unwrap();
    mount::syncfs(&target).unwrap();
    let frozen = freeze::freeze(&target).unwrap();
    assert_eq!(freeze::freeze(&target).unwrap_err().raw_os_error(), Some(16), "EBUSY: frozen once only");
    let (sender, done) = mpsc::channel();
    let blocked = target.join("blocked");
    let writer = std::thread::spawn(move || {
        fs::write(blocked, "y").unwrap();
        sender.send(()).unwrap();
    });
    assert!(done.recv_timeout(Duration::from_millis(200)).is_err(), "a frozen file system takes no writes");
    frozen.thaw().unwrap();
    drop(frozen);
    done.recv_timeout(Duration::from_secs(10)).unwrap();
    writer.join().unwrap();
    drop(freeze::freeze(&target).unwrap());
    fs::write(target.join("after"), "z").unwrap();
    // Whoever froze it is gone: what start-up repair meets.
    assert!(Command::new("fsfreeze").arg("-f").arg(&target).status().unwrap().success());
    freeze::thaw(&target).unwrap();
    freeze::thaw(&target).unwrap();
    fs::write(target.join("repaired"), "z").unwrap();
    let busy = File::open(target.join("after")).unwrap();
    assert_eq!(mount::umount(&target, false).unwrap_err().raw_os_error(), Some(16));
    drop(busy);
    mount::umount(&target, false).unwrap();
    scene.mounts.clear();
}

fn overlay_of(lowers: usize, method: OverlayMethod) {
    let mut scene = Scene::new();
    let image = scene.image("image");
    // nodev and nosuid of the layer's own mount must not reach through the overlay.
    let limits = Ext4Options { nodev: true, nosuid: true, ..Ext4Options::default() };
    let base = scene.mount_image(&image, "base", limits);
    for n in 0..lowers {
        let lower = base.join(format!("l/{n}"));
        fs::create_dir_all(&lower).unwrap();
        fs::write(lower.join(format!("own{n}")), n.to_string()).unwrap();
        fs::write(lower.join("same"), n.to_string()).unwrap();
    }
    fs::copy("/bin/true", base.join("l/0/true")).unwrap();
    for folder in ["u/upper", "u/work"] {
        fs::create_dir_all(base.join(folder)).unwrap();
    }
    let target = scene.dir("merged");
    let spec = OverlaySpec {
        base: base.clone(),
        lowers: (0..lowers).map(|n| format!("l/{n}").into()).collect(),
        upper: Some(("u/upper".into(), "u/work".into())),
        context: None,
        target: target.clone(),
        xino: true,
        read_only: false,
    };
    assert_eq!(overlay::mount_overlay(&spec, method).unwrap(), method);
    scene.mounts.push(target.clone());
    assert_eq!(fs::read_to_string(target.join("same")).unwrap(), "0", "nearest first");
    for n in 0..lowers {
        assert_eq!(fs::read_to_string(target.join(format!("own{n}"))).unwrap(), n.to_string());
    }
    fs::write(target.join("new"), "up").unwrap();
    assert_eq!(fs::read_to_string(base.join("u/upper/new")).unwrap(), "up");
    assert!(Command::new(target.join("true")).status().unwrap().success());
    let entry = mountinfo::read().unwrap().into_iter().find(|m| m.mount_point == target).unwrap();
    assert_eq!(entry.fs_type, "overlay");
    for option in ["redirect_dir=nofollow", "index=off", "metacopy=off"] {
        // The kernel leaves options out of the table that equal its defaults.
        let key = option.split('=').next().unwrap();
        let other = entry.super_options.split(',').find(|o| o.starts_with(key) && *o != option);
        assert_eq!(other, None, "{entry:?}");
    }
}

#[test]
fn overlay_of_3_lowers_by_the_new_api() {
    overlay_of(3, OverlayMethod::NewApi);
}

#[test]
fn overlay_of_3_lowers_by_one_page() {
    overlay_of(3, OverlayMethod::OnePage);
}

#[test]
fn overlay_of_129_lowers_by_the_new_api() {
    overlay_of(129, OverlayMethod::NewApi);
}

#[test]
fn overlay_of_129_lowers_by_one_page() {
    overlay_of(129, OverlayMethod::OnePage);
}

#[test]
fn overlay_errors_name_what_is_wrong() {
    let scene = Scene::new();
    let target = scene.dir("t");
    let mut spec = OverlaySpec { base: scene.folder.path().into(), target, ..OverlaySpec::default() };
    let e = overlay::mount_overlay(&spec, OverlayMethod::Auto).unwrap_err();
    assert!(e.to_string().contains("no lower"), "{e}");
    spec.lowers = vec!["missing".into(), "too".into()];
    let e = overlay::mount_overlay(&spec, OverlayMethod::Auto).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(2), "{e}");
}

#[test]
fn an_idmapped_view_shows_shifted_ids() {
    let mut scene = Scene::new();
    let image = scene.image("image");
    let source = scene.mount_image(&image, "source", Ext4Options::default());
    fs::write(source.join("file"), "x").unwrap();
    std::os::unix::fs::chown(source.join("file"), Some(33), Some(44)).unwrap();
    let map = ["0 500000 65536"];
    let namespace = idmap::user_namespace(&map, &map).unwrap();
    let target = scene.dir("mapped");
    idmap::mount_idmapped(&source, &target, &namespace, true).unwrap();
    scene.mounts.push(target.clone());
    let meta = fs::metadata(target.join("file")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (500_033, 500_044));
    assert!(fs::write(target.join("file"), "y").is_err(), "read-only view");
    assert_eq!(fs::metadata(source.join("file")).unwrap().uid(), 33);
    // As a lower of an overlay, as the driver uses it.
    let upper = scene.dir("u/upper");
    let work = scene.dir("u/work");
    let merged = scene.dir("merged");
    let spec = OverlaySpec {
        base: scene.folder.path().into(),
        lowers: vec![target],
        upper: Some((upper, work)),
        target: merged.clone(),
        ..OverlaySpec::default()
    };
    overlay::mount_overlay(&spec, OverlayMethod::Auto).unwrap();
    scene.mounts.push(merged.clone());
    assert_eq!(fs::metadata(merged.join("file")).unwrap().uid(), 500_033);
    assert!(idmap::user_namespace(&["0 0 0"], &map).is_err());
}
