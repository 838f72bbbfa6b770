//! Files are told apart by device and inode number: exporters, archivers and copiers find the links that the layers have,
//! and programs that stay on one file system leave nothing out.
//!
//! Every layer here has hard links, and every image numbers its inodes alike, so that numbers of layers that shine through
//! would make links of files that have nothing to do with each other.

use crate::{
    archive,
    engine::{Engine, EngineOptions},
    manifest::Tree,
    rootfs,
    tarball::{self, Entry},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Layers with links, on top of the root file system.
const LAYERS: usize = 8;
/// The containers' root with userns-remap, as the host sees it; ids in the layers are below it.
const HOST_ROOT: u32 = 500_000;
/// The distribution's programs that are put into the image.
const PROGRAMS: [&str; 3] = ["tar", "du", "rsync"];

fn layer(n: usize) -> Vec<Entry> {
    let text = format!("content of layer {n}\n");
    vec![
        Entry::dir(format!("data/layer{n}/")),
        Entry::file(format!("data/layer{n}/a"), &text),
        Entry::hard_link(format!("data/layer{n}/b"), format!("data/layer{n}/a")),
        Entry::dir(format!("data/layer{n}/deep/")),
        Entry::hard_link(format!("data/layer{n}/deep/c"), format!("data/layer{n}/a")),
        Entry::file(format!("data/layer{n}/single"), format!("single of {n}\n")),
        Entry::symlink(format!("data/layer{n}/link"), "a"),
        Entry::dir("data/shared/"),
        Entry::file(format!("data/shared/{n}"), format!("shared of {n}\n")),
        Entry::hard_link(format!("data/shared/{n}-too"), format!("data/shared/{n}")),
    ]
}

fn output(command: &mut Command) -> String {
    let run = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; see scripts/install-deps test"));
    assert!(run.status.success(), "{command:?}: {}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// The distribution's own programs with the libraries that they need, at their usual places.
fn programs() -> Vec<Entry> {
    let mut files = BTreeSet::new();
    for name in PROGRAMS {
        let folders = ["/usr/bin", "/bin"].iter();
        let path = folders.map(|f| Path::new(f).join(name)).find(|p| p.exists());
        let path = path.unwrap_or_else(|| panic!("no {name}; see scripts/install-deps test"));
        for word in output(Command::new("ldd").arg(&path)).split_whitespace().filter(|w| w.starts_with('/')) {
            files.insert(PathBuf::from(word));
        }
        files.insert(path);
    }
    let mut folders = BTreeSet::new();
    let mut entries = Vec::new();
    for file in files {
        let inside = file.strip_prefix("/").expect("absolute").to_owned();
        folders.extend(inside.ancestors().skip(1).filter(|f| *f != Path::new("")).map(Path::to_owned));
        // Busybox has a link of this name.
        let place = if file.ends_with("bin/tar") { "usr/bin/gnutar".into() } else { inside };
        let content = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        entries.push(Entry::file(place.to_str().expect("UTF-8"), content).mode(0o755));
    }
    folders.remove(Path::new("bin"));
    folders.insert("usr".into());
    folders.insert("usr/bin".into());
    let folders = folders.iter().map(|f| Entry::dir(format!("{}/", f.to_str().expect("UTF-8"))));
    folders.chain(entries).collect()
}

/// An engine with the image `linked`, and its tree.
fn engine_with_links(options: EngineOptions, more: Vec<Entry>) -> (Engine, Tree) {
    let engine = Engine::start(options);
    let base: Vec<Entry> = rootfs::small().into_iter().chain(more).collect();
    let layers: Vec<Vec<Entry>> = std::iter::once(base).chain((0..LAYERS).map(layer)).collect();
    let tars: Vec<Vec<u8>> = layers.iter().map(|entries| tarball::build(entries)).collect();
    engine.docker_with(&["load"], archive::write("linked", &tars)).expect_ok();
    let mut tree = Tree::default();
    for entries in &layers {
        tree.apply(entries);
    }
    (engine, tree.without_times())
}

/// What a tree has below a folder, by paths below it. A file's first name is the first in the order of paths.
fn below(tree: &Tree, folder: &str) -> Tree {
    let inside = |path: &[u8]| path.strip_prefix(folder.as_bytes()).map(<[u8]>::to_vec);
    let nodes = tree.0.iter().filter_map(|(path, node)| {
        let mut node = node.clone();
        (node.mtime, node.same_as) = (None, node.same_as.and_then(|first| inside(&first)));
        Some((inside(path).filter(|path| !path.is_empty())?, node))
    });
    Tree(nodes.collect())
}

fn links_are_found(options: EngineOptions) {
    let (engine, expected) = engine_with_links(options, programs());
    engine.run_container("box1", "linked", &[]);
    expected.assert_same(&Tree::of_container(&engine, "box1").without_times(), "what the container sees");
    let data = below(&expected, "/data");
    assert!(data.0.values().filter(|n| n.same_as.is_some()).count() == 3 * LAYERS, "links to be found");

    let exported = Tree::of_tar(&tarball::parse(&engine.docker_bytes(&["export", "box1"])));
    expected.assert_same(&exported, "docker export");
    let copied = tarball::parse(&engine.docker_bytes(&["cp", "box1:/data", "-"]));
    let mut copied = below(&Tree::of_tar(&copied), "/data");
    for node in copied.0.values_mut() {
        // With userns-remap this way of the engine's tells the host's ids.
        (node.uid, node.gid) = (node.uid % HOST_ROOT, node.gid % HOST_ROOT);
    }
    data.assert_same(&copied, "docker cp of a folder");

    let archived = engine.docker_bytes(&[
        "exec",
        "box1",
        "/usr/bin/gnutar",
        "--one-file-system",
        "--numeric-owner",
        "--sort=name",
        "--format=pax",
        "-C",
        "/",
        "-cf",
        "-",
        "data",
    ]);
    data.assert_same(&below(&Tree::of_tar(&tarball::parse(&archived)), "/data"), "tar --one-file-system");

    // Every file once, whichever of its names; every folder.
    let counted = engine.exec("box1", "/usr/bin/du -xa --apparent-size -B1 /data");
    let mut left: BTreeMap<&[u8], u64> = data.0.keys().map(|path| (&path[..], 1)).collect();
    for line in counted.lines() {
        let (size, path) = line.split_once('\t').expect("size and path");
        let Some(path) = path.strip_prefix("/data").filter(|path| !path.is_empty()) else { continue };
        let node = data.0.get(path.as_bytes()).unwrap_or_else(|| panic!("du tells of {path}"));
        if let Some((bytes, _)) = &node.content {
            assert_eq!(size, bytes.to_string(), "du about {path}");
        }
        let first = node.same_as.as_deref().unwrap_or(path.as_bytes());
        let names = data.0.iter().filter(|(name, n)| *name == first || n.same_as.as_deref() == Some(first));
        for (name, _) in names {
            assert!(left.remove(&name[..]).is_some(), "du counts a file twice: {path}");
        }
    }
    assert!(left.is_empty(), "du -x leaves out {:?}", left.keys().map(|p| String::from_utf8_lossy(p)));

    engine.exec("box1", "/usr/bin/rsync -aHx /data/ /copy");
    let seen = Tree::of_container(&engine, "box1");
    data.assert_same(&below(&seen, "/copy"), "rsync -H -x");
    // Numbers stay what they are when a file is written, and when the container starts again.
    let number = |path: &str| engine.exec("box1", &format!("stat -c %d:%i {path}"));
    let (single, linked) = ("/data/layer3/single", "/data/layer3/a");
    let before = [single, linked].map(number);
    engine.exec("box1", &format!("echo more >>{single}; echo more >>{linked}"));
    let after = [single, linked].map(number);
    assert_eq!(before[0], after[0], "a file with one name keeps its number");
    assert_ne!(before[1], after[1], "a name of a linked file that was written is a file of its own");
    let inode = |numbers: &[String; 2]| numbers.clone().map(|n| n.split_once(':').expect("two").1.to_owned());
    engine.docker(&["restart", "-t", "0", "box1"]);
    assert_eq!(inode(&after), inode(&[single, linked].map(number)), "numbers after a restart");
    engine.docker(&["commit", "box1", "committed"]);
    engine.run_container("box2", "committed", &[]);
    let committed = Tree::of_tar(&tarball::parse(&engine.docker_bytes(&["export", "box2"])));
    let mut expected = expected;
    expected.file(single, 0o644, "single of 3\nmore\n");
    expected.file(linked, 0o644, "content of layer 3\nmore\n");
    // The other two names are still one file.
    let mut first_name = |path: &str, first: Option<&str>| {
        let node = expected.0.get_mut(path.as_bytes()).expect("a name of the file");
        node.same_as = first.map(|first| first.as_bytes().to_vec());
    };
    first_name("/data/layer3/b", None);
    first_name("/data/layer3/deep/c", Some("/data/layer3/b"));
    below(&expected, "/data").assert_same(&below(&committed, "/data"), "export of what was committed");
    engine.docker(&["rm", "-f", "box1", "box2"]);
    engine.assert_nothing_mounted();
    engine.scrub();
}

#[test]
fn links_of_layers_are_found_and_nothing_is_left_out() {
    links_are_found(EngineOptions::default());
}

#[test]
fn links_of_layers_are_found_by_the_old_mount_call() {
    links_are_found(EngineOptions::lcow().plugin(&["--storage-opt", "lcow.overlayapi=legacy"]));
}

#[test]
fn links_of_layers_are_found_under_userns_remap() {
    links_are_found(EngineOptions::default().userns());
}

/// Builds the program of 32 bits.
fn small_program(folder: &Path) -> Vec<u8> {
    let (source, out) = (folder.join("identity.c"), folder.join("identity"));
    fs::write(&source, include_str!("identity.c")).expect("source");
    let mut gcc = Command::new("gcc");
    gcc.args(["-m32", "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie"]);
    gcc.args(["-fno-stack-protector", "-fno-builtin", "-Wl,--build-id=none", "-o"]);
    output(gcc.arg(&out).arg(&source));
    fs::read(out).expect("program")
}

#[test]
fn programs_of_32_bits_need_small_numbers() {
    /// What the kernel answers where a number does not fit.
    const TOO_LARGE: &str = "stat -75\ngetdents -75";
    const FITS: &str = "stat 0\ngetdents 0";
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let program = || vec![Entry::file("small", small_program(folder.path())).mode(0o755)];
    let (engine, _) = engine_with_links(EngineOptions::lcow(), program());
    let run = |engine: &Engine, options: &[&str]| {
        engine.docker(&[&["run", "--rm", "--network", "none"], options, &["linked", "/small"]].concat())
    };
    assert_eq!(run(&engine, &[]), TOO_LARGE);
    assert_eq!(run(&engine, &["--storage-opt", "xino=off"]), FITS);
    assert_eq!(run(&engine, &["--storage-opt", "xino=on"]), TOO_LARGE);
    // It is the container's for life.
    engine.docker(&[
        "run",
        "--name",
        "kept",
        "--network",
        "none",
        "--storage-opt",
        "xino=off",
        "linked",
        "/small",
    ]);
    engine.stop_dockerd();
    engine.kill_plugin();
    engine.start_plugin();
    engine.start_dockerd();
    assert_eq!(engine.docker(&["start", "-a", "kept"]), FITS);
    let wrong = engine.try_docker(&["run", "--rm", "--storage-opt", "xino=auto", "linked", "/small"]);
    assert!(wrong.expect_failure().contains("give on or off"));
    engine.docker(&["rm", "kept"]);
    drop(engine);
    let options = EngineOptions::lcow().plugin(&["--storage-opt", "lcow.xino=off"]);
    let (engine, _) = engine_with_links(options, program());
    assert_eq!(run(&engine, &[]), FITS);
    assert_eq!(run(&engine, &["--storage-opt", "xino=on"]), TOO_LARGE);
}

#[test]
fn sizes_are_those_of_overlay2() {
    // Links of both kinds, deletions, devices, a file that is only touched, one with holes, an overwritten file.
    const SCRIPT: &str = "cd /data; ln -s /a/target/that/is/long l1; ln l1 l2; ln -s x l3; echo 12345 >f1; ln f1 f2
        touch layer0/single; rm layer1/b; echo more >>layer2/a; mknod n c 1 3; mkfifo p; mkdir d; rm -r layer4
        dd if=/dev/zero of=hole bs=1 count=1 seek=1000000 2>/dev/null; chmod 600 layer5/a; ln layer6/a another";
    let sizes = |options: EngineOptions| {
        let (engine, _) = engine_with_links(options, Vec::new());
        engine.run_container("box1", "linked", &[]);
        let fresh = engine.docker(&["inspect", "--size", "-f", "{{.SizeRw}}", "box1"]);
        engine.exec("box1", SCRIPT);
        let written = engine.docker(&["inspect", "--size", "-f", "{{.SizeRw}} {{.SizeRootFs}}", "box1"]);
        let shown = engine.docker(&["ps", "-s", "--format", "{{.Size}}"]);
        engine.docker(&["commit", "box1", "committed"]);
        let image = engine.docker(&["inspect", "-f", "{{.Size}}", "committed"]);
        let history = engine.docker(&["history", "--human=false", "--format", "{{.Size}}", "committed"]);
        (fresh, written, shown, image, history)
    };
    let theirs = sizes(EngineOptions { driver: crate::engine::Driver::Overlay2, ..EngineOptions::lcow() });
    assert_eq!(sizes(EngineOptions::lcow()), theirs);
}
