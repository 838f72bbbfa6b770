//! `store import`: real data roots of 20.10 on overlay2 and vfs, a running engine, an LCOW home.

use crate::{
    archive,
    command::{Run, kill},
    engine::{Driver, Engine, EngineOptions},
    manifest::{Tree, sha256},
    room::{Room, Version},
    rootfs::{self, random_bytes},
    tarball::{self, Entry, Kind},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lcow-graphdriver");

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// `store import data-root … --json`.
fn import(engine: &Engine, args: &[&str]) -> (Run, Value) {
    let from = engine.data_root();
    let words = [&[PROGRAM, "store", "import", "data-root", "--json", utf8(&from)], args].concat();
    let run = engine.run(&words);
    let report = serde_json::from_slice(&run.stdout).unwrap_or(Value::Null);
    (run, report)
}

/// Everything of a tree but times of access: a change of its source shows.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).expect("folder").flatten() {
            let meta = entry.metadata().expect("metadata");
            let mut text = format!(
                "{} {:o} {}:{} {}.{} {}.{} {}",
                meta.ino(),
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec(),
                meta.len()
            );
            if meta.is_file() {
                text.push_str(&sha256(&fs::read(entry.path()).expect("file")));
            }
            found.insert(entry.path(), text);
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    found
}

/// A layer that BuildKit wrote has finer times in the source's folders than in its tar, which is what the image is.
fn in_seconds(mut tree: Tree) -> Tree {
    for node in tree.0.values_mut() {
        node.mtime = node.mtime.map(|(seconds, _)| (seconds, 0));
    }
    tree
}

/// Image ids with names, all of them.
fn images(engine: &Engine) -> BTreeSet<String> {
    let text = engine.docker(&["images", "-a", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"]);
    text.lines().map(str::to_owned).collect()
}

/// Tars of many makers as images, two builds, a commit, a name more, an image without a name, a container.
fn fill(engine: &Engine) -> Vec<&'static str> {
    let entry = || vec![Entry::file("data/x", "content of x\n"), Entry::dir("data/d/")];
    let base = tarball::build(&rootfs::small());
    let mut garbage = tarball::build(&entry());
    garbage.extend_from_slice(&[0; 20 * 512]);
    let raw = vec![
        Entry::dir("./data/"),
        Entry::file(b"./data/\xff\xfe\n".as_slice(), random_bytes(3, 700_000)),
        Entry::file("data/.wh.none", ""),
        Entry::hard_link("data/hard", b"data/\xff\xfe\n"),
        Entry::dir("data/sub/"),
        Entry::symlink("data/link", "sub"),
        Entry::file("data/link/through-a-link", "in data/sub\n"),
        Entry::file([b"data/".as_slice(), &[b'l'; 250]].concat(), "long").xattr("user.x", [0, 10, 255]),
    ];
    let tars = [base.clone(), tarball::members(&entry()), garbage, tarball::build(&raw)];
    engine.docker_with(&["load"], archive::write("tars", &tars)).expect_ok();
    let context = engine.scratch("context");
    fs::write(context.join("large"), random_bytes(11, 3_000_000)).expect("file");
    let dockerfile = "FROM base\nCOPY large /data/large\nRUN rm -r /data/odd && ln /data/large /data/large-2\n\
        RUN rm -rf /data/nested && mkdir /data/nested && echo new >/data/nested/new\n";
    fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    engine.build("classic", &context, &[]);
    engine.build_by("1", "buildkit", &context, &[]).expect_ok();
    engine.run_container("box1", "classic", &[]);
    engine.exec("box1", "echo w >/data/written; mknod /data/node c 5 6; rm /data/x 2>/dev/null || true");
    engine.docker(&["commit", "box1", "committed"]);
    engine.docker(&["tag", "committed", "example.com:5000/other/name:1.0"]);
    engine.docker(&["rm", "-f", "box1"]);
    engine.import("nameless", tarball::build(&[Entry::file("only", "one\n")]));
    engine.docker(&["tag", "base", "nameless"]);
    engine.docker(&["create", "--name", "stays", "base", "true"]);
    vec!["base", "tars", "classic", "buildkit", "committed"]
}

fn data_root(driver: Driver) {
    let options = EngineOptions { driver, ..EngineOptions::lcow() };
    let (engine, _) = rootfs::engine_with(options, &rootfs::full());
    let names = fill(&engine);
    let tree_of = |n: &str| {
        let mut tree = in_seconds(Tree::of_image(&engine, n).except_times_of(&["/etc"]));
        if driver == Driver::Vfs {
            // This driver's diff is a comparison of folders: it writes a link to a file of a lower layer as a file of
            // its own, so that its folders have links which the image has not.
            tree.0.values_mut().for_each(|node| node.same_as = None);
        }
        tree
    };
    let trees: Vec<Tree> = names.iter().map(|n| tree_of(n)).collect();
    let before = images(&engine);
    let saved: Vec<_> =
        names.iter().map(|n| archive::read(&engine.docker_bytes(&["save", n])).remove(0)).collect();
    let (run, _) = import(&engine, &[]);
    assert!(run.expect_failure().contains("an engine is running on"));
    engine.stop_dockerd();

    let root = engine.data_root();
    let sources = [root.join("image").join(driver.name()), root.join(driver.name())];
    let source = sources.each_ref().map(|s| snapshot(s));
    // Killed at some moments; each time the next run goes on.
    for wait in [30, 120, 250] {
        let words = [PROGRAM, "store", "import", "data-root", utf8(&root)];
        let running = engine.spawn(&words);
        std::thread::sleep(Duration::from_millis(wait));
        for pid in crate::command::children(running.pid()) {
            kill(pid);
        }
        let _ = running.wait();
    }
    let (run, report) = import(&engine, &[]);
    let text = run.expect_ok().text();
    assert!(text.contains("1 containers are not imported"), "{text}");
    let count = |report: &Value, name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{report}"));
    let layers = count(&report, "layers") + count(&report, "layers_earlier");
    assert!(layers >= 12, "{report}");
    let (run, report) = import(&engine, &["--from-driver", driver.name()]);
    run.expect_ok();
    assert_eq!((count(&report, "layers"), count(&report, "layers_earlier")), (0, layers));
    assert_eq!(count(&report, "containers_left_out"), 1);
    for (path, before) in sources.iter().zip(&source) {
        assert_eq!(&snapshot(path), before, "{} was changed", path.display());
    }

    engine.choose_driver(Driver::Lcow, "lcow", root.join("lcow"));
    engine.start_plugin();
    engine.start_dockerd();
    assert_eq!(images(&engine), before);
    for ((name, tree), image) in names.iter().zip(&trees).zip(&saved) {
        tree.assert_same(&tree_of(name), &format!("{name} after the import"));
        let again = archive::read(&engine.docker_bytes(&["save", name])).remove(0);
        again.assert_digests();
        assert!(again.layers == image.layers, "{name} is saved with other bytes");
    }
    // They are images like others.
    let context = engine.scratch("on-top");
    fs::write(context.join("Dockerfile"), "FROM committed\nRUN cat /data/written >/data/copy\n")
        .expect("Dockerfile");
    engine.build("on-top", &context, &[]);
    assert_eq!(engine.shell("on-top", "cat /data/copy"), "w");
    engine.scrub();
    engine.remove_everything();
    engine.assert_nothing_mounted();
}

#[test]
fn images_of_overlay2_come_over() {
    data_root(Driver::Overlay2);
}

#[test]
fn images_of_vfs_come_over() {
    data_root(Driver::Vfs);
}

#[test]
fn images_come_over_into_the_managed_plugin() {
    let engine = Engine::start(Version::V26.options(Driver::Vfs));
    engine.import("base", tarball::build(&rootfs::full()));
    let saved = archive::read(&engine.docker_bytes(&["save", "base"])).remove(0);
    let room = Room::of(engine);
    let home = room.home_of("lcow");
    let engine = &room.engine;
    engine.stop_dockerd();
    let (run, _) = import(engine, &["--home", utf8(&home)]);
    run.expect_ok();
    engine.start_dockerd();
    room.use_plugin();
    assert_eq!(engine.shell("base", "cat /data/nested/deeper/file"), "deep");
    let again = archive::read(&engine.docker_bytes(&["save", "base"])).remove(0);
    assert!(again.layers == saved.layers, "other bytes");
    engine.scrub();
}

#[test]
fn what_cannot_be_made_again_is_told_and_the_rest_comes_over() {
    let options = EngineOptions { driver: Driver::Vfs, ..EngineOptions::lcow() };
    let (engine, _) = rootfs::engine_with(options, &rootfs::small());
    let image = |name: &str| {
        let tar = tarball::build(&[Entry::dir("x/"), Entry::file("x/file", format!("{name}\n"))]);
        let base = tarball::build(&rootfs::small());
        engine.docker_with(&["load"], archive::write(name, &[base, tar])).expect_ok();
        let layers = engine.docker(&["inspect", "-f", "{{json .RootFS.Layers}}", name]);
        let layers: Vec<String> = serde_json::from_str(&layers).expect("layers");
        sha256(layers.join(" ").as_bytes())
    };
    let [changed, linked, missing, damaged, other] =
        ["changed", "linked", "missing", "damaged", "other"].map(image);
    engine.stop_dockerd();
    let db = engine.data_root().join("image/vfs/layerdb/sha256");
    let id = |chain: &str| fs::read_to_string(db.join(chain).join("cache-id")).expect("cache-id");
    let file = |chain: &str| engine.data_root().join("vfs/dir").join(id(chain)).join("x/file");
    fs::write(file(&changed), "CHANGED\n").expect("file");
    fs::remove_file(file(&linked)).expect("file");
    symlink("/etc/passwd", file(&linked)).expect("symlink");
    fs::remove_file(file(&missing)).expect("file");
    let split = db.join(&damaged).join("tar-split.json.gz");
    let bytes = fs::read(&split).expect("tar data");
    fs::write(&split, &bytes[..bytes.len() / 2]).expect("tar data");
    // Whole in itself, but of another layer.
    fs::copy(db.join(&changed).join("tar-split.json.gz"), db.join(&other).join("tar-split.json.gz"))
        .expect("copy");
    fs::write(file(&other), "changed\n").expect("file");

    let (run, report) = import(&engine, &[]);
    assert_eq!(run.status.code(), Some(1), "{}", run.text());
    let failed = report["failed"].as_array().expect("failed");
    assert_eq!((failed.len(), report["images"].as_u64()), (5, Some(1)), "{report}");
    let text = report["failed"].to_string();
    for (chain, said) in [
        (&changed, "'x/file' was changed"),
        (&linked, "'x/file' cannot be read"),
        (&missing, "'x/file' cannot be read"),
        (&damaged, "is damaged"),
        (&other, "tar digest mismatch"),
    ] {
        let id = id(chain);
        assert!(text.contains(said), "{said}: {text}");
        assert!(
            failed.iter().any(|f| f.as_str().is_some_and(|f| f.contains(&id) && f.contains(said))),
            "{text}"
        );
        assert!(!engine.data_root().join("lcow").join(&id).exists(), "a layer that failed is left");
        assert!(!engine.data_root().join("image/lcow/layerdb/sha256").join(chain).exists());
    }
    engine.choose_driver(Driver::Lcow, "lcow", engine.data_root().join("lcow"));
    engine.start_plugin();
    engine.start_dockerd();
    assert_eq!(images(&engine).len(), 1);
    assert_eq!(engine.shell("base", "echo works"), "works");
    engine.scrub();
    let usage =
        engine.run(&[PROGRAM, "store", "import", "data-root", "/", "--driver", "../x"]).expect_failure();
    assert!(usage.contains("is not the data root"), "{usage}");
}

/// An engine on vfs with three images: `base`, `other` on it, and `large` with a layer that a store of layers of at most
/// [`SMALL_LAYERS`] refuses, and a small one on that.
fn engine_with_a_large_image() -> Engine {
    let options = EngineOptions { driver: Driver::Vfs, ..EngineOptions::lcow() };
    let (engine, _) = rootfs::engine_with(options, &rootfs::small());
    let base = tarball::build(&rootfs::small());
    let layer = |content: &[u8]| tarball::build(&[Entry::dir("x/"), Entry::file("x/file", content)]);
    let large = [base.clone(), layer(&random_bytes(5, 12 << 20)), layer(b"on top\n")];
    engine.docker_with(&["load"], archive::write("large", &large)).expect_ok();
    engine.docker_with(&["load"], archive::write("other", &[base, layer(b"other\n")])).expect_ok();
    engine
}

/// `lcow.maxlayer`
const SMALL_LAYERS: &str = "8MiB";

#[test]
fn an_image_that_the_store_refuses_is_left_out_and_the_rest_comes_over() {
    let engine = engine_with_a_large_image();
    let (all, large) = (images(&engine), engine.docker(&["inspect", "-f", "{{.Id}}", "large"]));
    engine.stop_dockerd();
    let root = engine.data_root();
    let import = |setting: &str| {
        let words = ["env", setting, PROGRAM, "store", "import", "data-root", "--json", utf8(&root)];
        let run = engine.run(&words);
        let report: Value = serde_json::from_slice(&run.stdout).unwrap_or(Value::Null);
        (run, report)
    };
    // What would meet every layer is no layer's fault: the run ends, with a report, and nothing is lost.
    let (run, report) = import("LCOW_MINFREE=1000TiB");
    assert_eq!(run.status.code(), Some(1), "{}", run.text());
    assert!(report["stopped"].as_str().is_some_and(|s| s.contains("lcow.minfree")), "{report}");
    assert_eq!(
        (&report["failed"], &report["images"]),
        (&serde_json::json!([]), &serde_json::json!(0)),
        "{report}"
    );
    assert_eq!(report["images_left_out"].as_array().map(Vec::len), Some(3), "{report}");
    for _ in 0..2 {
        let (run, report) = import(&format!("LCOW_MAXLAYER={SMALL_LAYERS}"));
        assert_eq!(run.status.code(), Some(1), "{}", run.text());
        assert_eq!(
            (&report["images"], &report["stopped"]),
            (&serde_json::json!(2), &Value::Null),
            "{report}"
        );
        let left_out = report["left_out"].as_array().expect("left_out");
        assert_eq!(left_out.len(), 1, "{report}");
        assert_eq!(
            (&left_out[0]["image"], &left_out[0]["names"][0]),
            (&large.clone().into(), &"large:latest".into())
        );
        let failed = report["failed"].as_array().expect("failed");
        assert_eq!((failed.len(), &failed[0]), (1, &left_out[0]["reason"]), "{report}");
        assert!(failed[0].as_str().is_some_and(|f| f.contains("bytes")), "{report}");
    }
    let lcow = |engine: &Engine| {
        engine.choose_driver(Driver::Lcow, "lcow", root.join("lcow"));
        engine.start_plugin();
        engine.start_dockerd();
    };
    lcow(&engine);
    let present = images(&engine);
    assert_eq!(present, all.iter().filter(|i| !i.contains(&large)).cloned().collect());
    assert_eq!(engine.shell("other", "cat /x/file"), "other");
    engine.scrub();
    // It goes on once the limit is another.
    engine.stop_dockerd();
    engine.kill_plugin();
    let (run, report) = import("LCOW_MAXLAYER=1GiB");
    run.expect_ok();
    assert_eq!(
        (&report["images"], &report["left_out"]),
        (&serde_json::json!(3), &serde_json::json!([])),
        "{report}"
    );
    lcow(&engine);
    assert_eq!(images(&engine), all);
    assert_eq!(engine.shell("large", "cat /x/file"), "on top");
    engine.scrub();
}

#[test]
fn an_image_that_the_other_engine_refuses_is_left_out_and_the_rest_is_copied() {
    let from = engine_with_a_large_image();
    let limit = format!("lcow.maxlayer={SMALL_LAYERS}");
    let options = EngineOptions { driver: Driver::Lcow, ..EngineOptions::lcow() };
    let to = Engine::start(options.plugin(&["--storage-opt", &limit]));
    let (a, b) = (from.socket(), to.socket());
    let run = Command::new(PROGRAM).args(["store", "import", "engine", utf8(&a), utf8(&b)]).output();
    let run = run.expect("lcow-graphdriver");
    let said = String::from_utf8_lossy(&run.stdout);
    assert_eq!(run.status.code(), Some(1), "{said}");
    assert!(said.contains("2 of 3 images sent") && said.contains("not copied: large:latest: "), "{said}");
    let large = from.docker(&["inspect", "-f", "{{.Id}}", "large"]);
    assert_eq!(images(&to), images(&from).into_iter().filter(|i| !i.contains(&large)).collect());
    assert_eq!(to.shell("other", "cat /x/file"), "other");
    to.scrub();
}

#[test]
fn images_are_copied_from_engine_to_engine() {
    let options = EngineOptions { driver: Driver::Vfs, ..EngineOptions::lcow() };
    let (from, _) = rootfs::engine_with(options, &rootfs::full());
    let names = fill(&from);
    let to = Engine::start(EngineOptions { driver: Driver::Lcow, ..EngineOptions::lcow() });
    let copy = |images: &[&str]| {
        let (a, b) = (from.socket(), to.socket());
        let output = Command::new(PROGRAM)
            .args(["store", "import", "engine", utf8(&a), utf8(&b)])
            .args(images)
            .output();
        let output = output.expect("lcow-graphdriver");
        let text =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        (output.status.success(), text)
    };
    let (ok, text) = copy(&["classic"]);
    assert!(ok && text.contains("1 of them sent"), "{text}");
    let (ok, text) = copy(&[]);
    assert!(ok, "{text}");
    let (ok, text) = copy(&[]);
    assert!(ok && text.contains(" 0 of them sent"), "{text}");
    let (ok, text) = copy(&["no-such-image"]);
    assert!(!ok && text.contains("no-such-image"), "{text}");
    // Steps of a build come along only as parents of what has a name.
    let named = |engine: &Engine| -> BTreeSet<String> {
        engine
            .docker(&["images", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"])
            .lines()
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(named(&to), named(&from));
    for name in names {
        let layers = |engine: &Engine| archive::read(&engine.docker_bytes(&["save", name])).remove(0).layers;
        assert!(layers(&from) == layers(&to), "{name} has other bytes");
    }
    assert_eq!(to.shell("committed", "cat /data/written"), "w");
    to.scrub();
}

fn host(program: &str, args: &[&str]) {
    let run = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(run.status.success(), "{program} {args:?}\n{}", String::from_utf8_lossy(&run.stderr));
}

#[test]
fn an_original_homes_layers_become_tars() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let home = folder.path().join("home");
    let layer = |id: &str, chain: &str, fill: &dyn Fn(&Path)| {
        let (tree, place, raw) =
            (folder.path().join(format!("{id}.tree")), home.join(id), folder.path().join("raw"));
        fs::create_dir_all(&tree).expect("tree");
        fs::create_dir_all(&place).expect("layer");
        fill(&tree);
        // The features of hcsshim's images.
        let features = "none,ext_attr,sparse_super2,filetype,extent,flex_bg,large_file,huge_file,extra_isize";
        host(
            "mke2fs",
            &[
                "-q",
                "-t",
                "ext4",
                "-b",
                "4096",
                "-I",
                "256",
                "-O",
                features,
                "-d",
                utf8(&tree),
                utf8(&raw),
                "4M",
            ],
        );
        let vhd = place.join("layer.vhd");
        host(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                "vpc",
                "-o",
                "subformat=fixed,force_size=on",
                utf8(&raw),
                utf8(&vhd),
            ],
        );
        fs::write(place.join("layerchain.json"), chain).expect("chain");
        fs::remove_file(raw).expect("raw");
    };
    layer("aaa", "null", &|tree| {
        fs::create_dir(tree.join("dir")).expect("dir");
        fs::write(tree.join("dir/file"), "from below\n").expect("file");
        fs::write(tree.join("gone"), "x").expect("file");
        symlink("dir/file", tree.join("link")).expect("link");
    });
    layer("bbb", r#"["C:\\ProgramData\\docker\\lcow\\aaa"]"#, &|tree| {
        host("mknod", &[utf8(&tree.join("gone")), "c", "0", "0"]);
        fs::create_dir(tree.join("dir")).expect("dir");
        host("setfattr", &["-n", "trusted.overlay.opaque", "-v", "y", utf8(&tree.join("dir"))]);
        fs::write(tree.join("dir/new"), "from above\n").expect("file");
    });
    fs::create_dir(home.join("ccc")).expect("sandbox");
    fs::write(home.join("ccc/sandbox.vhdx"), "vhdxfile").expect("sandbox");
    let before = snapshot(&home);
    let out = folder.path().join("out");
    let run = || {
        let run = Command::new(PROGRAM)
            .args(["store", "import", "lcow-home", "--json", utf8(&home), utf8(&out)])
            .output();
        let run = run.expect("lcow-graphdriver");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        serde_json::from_slice::<Value>(&run.stdout).expect("JSON")
    };
    let report = run();
    assert_eq!(report["sandboxes_left_out"], 1);
    let layers = report["layers"].as_array().expect("layers");
    assert_eq!(layers.iter().map(|l| l["id"].as_str().expect("id")).collect::<Vec<_>>(), ["aaa", "bbb"]);
    assert_eq!(layers[1]["parent"], "aaa");
    assert_eq!(snapshot(&home), before, "the home was changed");
    let tar = |id: &str| fs::read(out.join(format!("{id}.tar"))).expect("tar");
    for layer in layers {
        let id = layer["id"].as_str().expect("id");
        assert_eq!(layer["digest"], format!("sha256:{}", sha256(&tar(id))));
    }
    let kinds = |id: &str| -> BTreeMap<String, Kind> {
        let name = |e: &Entry| String::from_utf8_lossy(&e.path).trim_end_matches('/').to_owned();
        tarball::parse(&tar(id)).into_iter().map(|e| (name(&e), e.kind)).collect()
    };
    // These images show a `lost+found` as containers of the original saw it.
    let (below, above) = (kinds("aaa"), kinds("bbb"));
    assert_eq!(below.keys().collect::<Vec<_>>(), ["dir", "dir/file", "gone", "link", "lost+found"]);
    assert_eq!(below["dir/file"], Kind::File(b"from below\n".to_vec()));
    assert_eq!(
        above.keys().collect::<Vec<_>>(),
        [".wh.gone", "dir", "dir/.wh..wh..opq", "dir/new", "lost+found"]
    );
    let first = tar("bbb");
    assert_eq!(run()["layers"][1]["earlier"], true);
    assert_eq!(tar("bbb"), first);
}
