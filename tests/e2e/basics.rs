//! One container's life: import, run, exec, copy in and out, diff, commit, export, and what the engine says of it.

use crate::{
    engine::{Engine, EngineOptions},
    manifest::Tree,
    rootfs::{self, random_bytes},
    tarball::{self, Entry, Kind},
};
use std::{collections::BTreeSet, fs, os::unix::fs::symlink};

/// The sum that engines call size: bytes of regular files and of symlinks' targets, a file with several names once.
fn size_of(entries: &[Entry]) -> u64 {
    let size = |e: &Entry| match &e.kind {
        Kind::File(data) => data.len() as u64,
        Kind::Symlink(target) => target.len() as u64,
        _ => 0,
    };
    entries.iter().map(size).sum()
}

/// Extended attributes that the host sees in a running container's file.
fn xattrs(engine: &Engine, container: &str, path: &str) -> String {
    let pid = engine.docker(&["inspect", "-f", "{{.State.Pid}}", container]);
    let file = format!("/proc/{pid}/root{path}");
    let run =
        engine.run(&["getfattr", "--absolute-names", "-d", "-m", "^user", "-e", "hex", &file]).expect_ok();
    String::from_utf8_lossy(&run.stdout).lines().skip(1).collect::<Vec<_>>().join("\n").trim().to_owned()
}

#[test]
fn an_imported_image_shows_exactly_its_tar() {
    let entries = rootfs::full();
    let (engine, expected) = rootfs::engine_with(EngineOptions::default(), &entries);
    engine.run_container("box1", "base", &[]);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "a container of the imported tar");
    assert_eq!(
        xattrs(&engine, "box1", "/data/xattr"),
        "user.note=0x76616c75650077697468 0a6279746573ff".replace(' ', "")
    );
    assert_eq!(xattrs(&engine, "box1", "/data/xattr-dir"), "user.on=0x6120666f6c646572");

    if !engine.has_containerd() {
        // Otherwise it is that of the packed layers.
        assert_eq!(engine.docker(&["inspect", "-f", "{{.Size}}", "base"]), size_of(&entries).to_string());
    }
    assert_eq!(engine.docker(&["history", "-q", "base"]).lines().count(), 1);
    let diff_id = format!("sha256:{}", crate::manifest::sha256(&tarball::build(&entries)));
    assert_eq!(engine.docker(&["inspect", "-f", "{{join .RootFS.Layers \" \"}}", "base"]), diff_id);
    let info = engine.docker(&["info"]);
    if engine.is_lcow() {
        assert!(info.contains("Storage Driver: lcow"), "{info}");
        let kind = if engine.has_containerd() { "io.containerd.snapshotter.v1" } else { "LCOW" };
        assert!(info.contains(kind), "{info}");
        assert_eq!(engine.docker(&["inspect", "-f", "{{.GraphDriver.Name}}", "box1"]), "lcow");
    }
    let usage = engine.docker(&["system", "df"]);
    assert!(usage.lines().any(|l| l.starts_with("Images") && l.contains("MB")), "{usage}");
    engine.scrub();
}

/// Changes in a container, known in advance: (script, expected `docker diff`).
const SCRIPT: &str = "
    echo changed >/data/old
    rm /data/empty
    rm -r /data/nested
    mkdir -p /work/a/b && echo new >/work/a/b/new
    ln -s ../a/b/new /work/link
    ln /work/a/b/new /work/hard
    chmod 0711 /data/setuid && touch -d @1111111111 /data/setuid
    rm -r /data/odd && mkdir /data/odd && echo again >/data/odd/-dash
    rm /data/relative && mkdir /data/relative && echo x >/data/relative/x
    mknod /work/node c 1 5
    mkfifo /work/pipe
    echo 12345678 >>/data/linked
    dd if=/dev/zero of=/work/zeros bs=1024 count=300 2>/dev/null
    chown 77:88 /work/zeros
    touch -d @1234567890 /work/zeros";

fn changed(mut tree: Tree) -> Tree {
    tree.file("/data/old", 0o644, "changed\n");
    tree.delete("/data/empty");
    tree.delete("/data/nested");
    tree.dir("/work", 0o755);
    tree.dir("/work/a", 0o755);
    tree.dir("/work/a/b", 0o755);
    tree.file("/work/a/b/new", 0o644, "new\n");
    tree.symlink("/work/link", "../a/b/new");
    tree.hard_link("/work/hard", "/work/a/b/new");
    // A whole second: the engine's own drivers cut times to seconds in a commit.
    tree.file("/data/setuid", 0o711, "#!/bin/sh\n").mtime = Some((1_111_111_111, 0));
    tree.delete("/data/odd");
    tree.dir("/data/odd", 0o755);
    tree.file("/data/odd/-dash", 0o644, "again\n");
    tree.delete("/data/relative");
    tree.dir("/data/relative", 0o755);
    tree.file("/data/relative/x", 0o644, "x\n");
    tree.put_node("/work/node", 'c', 0o644, Some((1, 5)));
    tree.put_node("/work/pipe", 'p', 0o644, None);
    // Its other names are another file now: overlayfs copies one name up.
    tree.file("/data/linked", 0o640, "one file, three names\n12345678\n");
    let second = tree.0.get_mut(b"/data/linked-2".as_slice()).expect("second name");
    second.same_as = None;
    let zeros = tree.file("/work/zeros", 0o644, vec![0; 300 << 10]);
    (zeros.uid, zeros.gid, zeros.mtime) = (77, 88, Some((1_234_567_890, 0)));
    tree
}

const CHANGES: &[&str] = &[
    "C /data",
    "C /data/old",
    "D /data/empty",
    "D /data/nested",
    "A /work",
    "A /work/a",
    "A /work/a/b",
    "A /work/a/b/new",
    "A /work/link",
    "A /work/hard",
    "C /data/setuid",
    "C /data/odd",
    "C /data/odd/-dash",
    "C /data/relative",
    "A /data/relative/x",
    "A /work/node",
    "A /work/pipe",
    "C /data/linked",
    "A /work/zeros",
];

#[test]
fn what_a_container_writes_is_seen_by_diff_commit_export_and_size() {
    let (engine, base) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    engine.run_container("box1", "base", &[]);
    engine.exec("box1", SCRIPT);
    let expected = changed(base);
    let running = Tree::of_container(&engine, "box1");
    expected.assert_same(&running, "the running container");

    // The container runs, its pages are dirty.
    let diff = engine.docker(&["diff", "box1"]);
    let mut wanted: BTreeSet<&str> = CHANGES.iter().copied().collect();
    let mut found: BTreeSet<&str> = diff.lines().collect();
    // An opaque folder's lost names are listed by some drivers and left out by others; busybox's own rm of /data/odd
    // and mkdir make one.
    // The second line of a name with a newline is the only one without a kind.
    found.retain(|l| !l.starts_with("D /data/odd/") && *l != "newline");
    for own in ["C /etc", "C /dev", "A /dev/console"] {
        wanted.remove(own);
        found.remove(own);
    }
    assert_eq!(found, wanted, "docker diff of the running container");

    let size = engine.docker(&["inspect", "-s", "-f", "{{.SizeRw}}", "box1"]).parse::<u64>().expect("SizeRw");
    let written = ["changed\n", "new\n", "again\n", "x\n", "one file, three names\n12345678\n"];
    let setuid = "#!/bin/sh\n".len();
    let wanted = (written.iter().map(|t| t.len()).sum::<usize>() + setuid + (300 << 10)) as u64;
    let wanted = wanted + "../a/b/new".len() as u64;
    if engine.has_containerd() {
        // Snapshotters count blocks, and those of directories, too.
        assert!(
            (wanted..wanted + (256 << 10)).contains(&size),
            "SizeRw is {size}, {wanted} bytes were written"
        );
    } else {
        assert_eq!(size, wanted, "SizeRw");
    }
    assert!(engine.docker(&["ps", "-s", "--format", "{{.Size}}"]).contains("virtual"), "ps -s shows no size");
    let root = engine
        .docker(&["inspect", "-s", "-f", "{{.SizeRootFs}}", "box1"])
        .parse::<u64>()
        .expect("SizeRootFs");
    assert!(root > rootfs::LARGE as u64 + size, "SizeRootFs is {root}");

    engine.docker(&["commit", "box1", "committed"]);
    let committed = Tree::of_image(&engine, "committed");
    expected.assert_same(&committed, "the committed image");
    if engine.is_lcow() {
        running.except_times_of(&["/etc"]).assert_same(&committed, "the committed image, with all times");
    }
    assert_eq!(engine.docker(&["history", "-q", "committed"]).lines().count(), 2);
    let layers = |image: &str| engine.docker(&["inspect", "-f", "{{join .RootFS.Layers \" \"}}", image]);
    assert!(layers("committed").starts_with(&layers("base")), "the commit does not stand on its image");

    let exported = Tree::of_tar(&tarball::parse(&engine.docker_bytes(&["export", "box1"])));
    expected.clone().without_times().assert_same(&exported, "docker export");

    engine.docker(&["stop", "-t", "0", "box1"]);
    let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let stopped = engine.docker(&["diff", "box1"]);
    assert_eq!(sorted(&stopped), sorted(&diff), "docker diff of the stopped container");
    engine.docker(&["start", "box1"]);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the container after a restart");
    // A child of the committed image, and a commit on it.
    engine.run_container("child", "committed", &[]);
    engine.exec("child", "rm -r /work/a && echo child >/data/child");
    engine.docker(&["commit", "child", "second"]);
    let mut second = expected;
    second.delete("/work/a");
    second.file("/data/child", 0o644, "child\n");
    second.0.get_mut(b"/work/hard".as_slice()).expect("hard").same_as = None;
    second.assert_same(&Tree::of_image(&engine, "second"), "a commit on a commit");
    engine.scrub();
}

#[test]
fn copies_in_and_out_keep_everything() {
    let (engine, mut expected) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    let host = engine.scratch("in");
    let large = random_bytes(9, 3 << 20);
    fs::create_dir_all(host.join("tree/one/two")).expect("folder");
    fs::write(host.join("tree/one/two/file"), "in two folders\n").expect("file");
    fs::write(host.join("tree/large"), &large).expect("file");
    fs::write(host.join("tree/one/with space"), "s").expect("file");
    symlink("one/two", host.join("tree/link")).expect("symlink");
    symlink("/data/large", host.join("tree/absolute")).expect("symlink");
    let tree = host.join("tree");
    let tree = tree.to_str().expect("UTF-8");

    engine.run_container("box1", "base", &[]);
    // Into a running and into a created container; through a symlinked folder, too.
    engine.docker(&["create", "--name", "still", "--network", "none", "base", "sleep", "100000"]);
    for container in ["box1", "still"] {
        engine.docker(&["cp", tree, &format!("{container}:/data/")]);
        engine.docker(&[
            "cp",
            &format!("{tree}/one/two/file"),
            &format!("{container}:/data/folder-link/by-link"),
        ]);
    }
    engine.docker(&["start", "still"]);
    expected.dir("/data/tree", 0o755);
    expected.dir("/data/tree/one", 0o755);
    expected.dir("/data/tree/one/two", 0o755);
    expected.file("/data/tree/one/two/file", 0o644, "in two folders\n");
    expected.file("/data/tree/one/with space", 0o644, "s");
    expected.file("/data/tree/large", 0o644, &large);
    expected.symlink("/data/tree/link", "one/two");
    expected.symlink("/data/tree/absolute", "/data/large");
    expected.file("/data/nested/by-link", 0o644, "in two folders\n");
    for container in ["box1", "still"] {
        let found = Tree::of_container(&engine, container);
        expected.assert_same(&found, &format!("container {container} after cp"));
        engine.exec(container, "echo written >/data/tree/one/two/back");
        // Out as a tar and as files.
        let tar = tarball::parse(&engine.docker_bytes(&["cp", &format!("{container}:/data/tree"), "-"]));
        let tar = Tree::of_tar(&tar);
        assert_eq!(
            tar.0[b"/tree/large".as_slice()].content,
            Some((large.len() as u64, crate::manifest::sha256(&large)))
        );
        assert_eq!(tar.0[b"/tree/link".as_slice()].target.as_deref(), Some(b"one/two".as_slice()));
        let out = engine.scratch(&format!("out-{container}"));
        engine.docker(&["cp", &format!("{container}:/data/tree"), out.to_str().expect("UTF-8")]);
        assert_eq!(fs::read(out.join("tree/large")).expect("large"), large);
        assert_eq!(fs::read(out.join("tree/one/two/back")).expect("back"), b"written\n");
        assert_eq!(fs::read_link(out.join("tree/absolute")).expect("link").to_str(), Some("/data/large"));
        let followed = engine.docker_bytes(&["cp", "-L", &format!("{container}:/data/absolute"), "-"]);
        let followed = tarball::parse(&followed);
        assert_eq!(followed.len(), 1);
        assert_eq!(followed[0].kind, Kind::File(random_bytes(1, rootfs::LARGE)), "cp -L of a link to a file");
    }
    engine.try_docker(&["cp", "box1:/data/none", "-"]).expect_failure();
    engine.docker(&["stop", "-t", "0", "box1"]);
    let stopped = tarball::parse(&engine.docker_bytes(&["cp", "box1:/data/tree/one/two/back", "-"]));
    assert_eq!(stopped[0].kind, Kind::File(b"written\n".to_vec()), "cp out of a stopped container");
}
