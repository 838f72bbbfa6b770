//! The `layer` commands on real files: round trips compared byte for byte, foreign tars and readers, wrong input.
//!
//! Needs root (devices and owners in trees), GNU tar, bsdtar, gzip, zstd's own library through the crate, e2fsck.

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// A folder for one test, with a tree and its tar.
struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { folder: tempfile::tempdir().unwrap() };
        let tree = scene.path("tree");
        fs::create_dir_all(tree.join("usr/share/many")).unwrap();
        fs::create_dir(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
        fs::write(tree.join("etc/empty"), "").unwrap();
        fs::write(tree.join("usr/big"), noise(3_000_000)).unwrap();
        for n in 0..300 {
            fs::write(tree.join(format!("usr/share/many/file-{n:03}")), noise(n * 17)).unwrap();
        }
        fs::hard_link(tree.join("usr/big"), tree.join("usr/same")).unwrap();
        symlink("passwd", tree.join("etc/link")).unwrap();
        symlink("/usr/share", tree.join("share")).unwrap();
        fs::write(tree.join("etc").join("\u{e9} and a name of more than one hundred bytes ".repeat(3)), "x")
            .unwrap();
        fs::set_permissions(tree.join("usr/big"), fs::Permissions::from_mode(0o4755)).unwrap();
        let hole = fs::File::create(tree.join("hole")).unwrap();
        hole.set_len(10 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&hole, b"end", (10 << 20) - 3).unwrap();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    /// A tar of the tree.
    fn tar(&self, name: &str, options: &[&str]) -> PathBuf {
        let out = self.path(name);
        run(Command::new("tar").args(options).arg("-C").arg(self.path("tree")).arg("-cf").arg(&out).arg("."));
        out
    }

    fn pack(&self, tar: &Path, image: &str) -> serde_json::Value {
        let record = self.text(&format!("{image}.rec"));
        let done = ok(&["pack", "--json", "--record", &record, tar.to_str().unwrap(), &self.text(image)]);
        serde_json::from_slice(&done.stdout).unwrap()
    }

    /// Names in the folder that no test asked for.
    fn left_over(&self) -> Vec<String> {
        fs::read_dir(self.folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.starts_with('.'))
            .collect()
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = len as u64 | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        })
        .collect()
}

fn run(command: &mut Command) -> Output {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; see scripts/install-deps test"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    done
}

fn layer<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
    command.arg("layer").args(arguments);
    command
}

fn ok(arguments: &[&str]) -> Output {
    run(&mut layer(arguments))
}

/// A command that must fail with status 1; its message.
fn fails(arguments: &[&str]) -> String {
    let done = layer(arguments).stdin(Stdio::null()).output().unwrap();
    let message = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(1), "{arguments:?}: {message}");
    assert_eq!(message.lines().count(), 1, "one line of message: {message}");
    message
}

fn with_input(arguments: &[&str], input: &[u8]) -> Output {
    let mut child =
        layer(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let done = std::thread::scope(|scope| {
        scope.spawn(move || {
            // The program may stop before it has read everything.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().unwrap()
    });
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    done
}

/// Name, type, mode, owner, links, size and content of all that is below a folder.
fn survey(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, base: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let m = fs::symlink_metadata(&path).unwrap();
            let content = if m.is_file() {
                format!("{:?}", crc32c::crc32c(&fs::read(&path).unwrap()))
            } else if m.is_symlink() {
                fs::read_link(&path).unwrap().display().to_string()
            } else {
                String::new()
            };
            let size = if m.is_dir() { 0 } else { m.len() };
            let name = path.strip_prefix(base).unwrap();
            found.push(format!(
                "{} {:o} {}:{} {} {size} {} {content}",
                name.display(),
                m.mode(),
                m.uid(),
                m.gid(),
                if m.is_dir() { 0 } else { m.nlink() },
                m.mtime()
            ));
            if m.is_dir() {
                walk(&path, base, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(folder, folder, &mut found);
    found.sort();
    found
}

#[test]
fn every_kind_of_tar_comes_back_byte_for_byte() {
    let scene = Scene::new();
    for (n, options) in [
        &["--format=gnu"][..],
        &["--format=pax"],
        &["--format=gnu", "-S"],
        &["--format=pax", "-S", "-b", "1"],
    ]
    .into_iter()
    .enumerate()
    {
        let tar = scene.tar(&format!("{n}.tar"), options);
        let image = format!("{n}.vhd");
        let summary = scene.pack(&tar, &image);
        assert_eq!(summary["tar_bytes"], fs::metadata(&tar).unwrap().len());
        assert_eq!(summary["file_bytes"], fs::metadata(scene.path(&image)).unwrap().len());
        assert_eq!(summary["record_bytes"], fs::metadata(scene.path(&format!("{image}.rec"))).unwrap().len());
        let record = scene.text(&format!("{image}.rec"));
        ok(&["unpack", "--exact", &record, &scene.text(&image), &scene.text("back.tar")]);
        assert_eq!(fs::read(&tar).unwrap(), fs::read(scene.path("back.tar")).unwrap(), "{options:?}");
        let piped = ok(&["unpack", "--exact", &record, &scene.text(&image)]);
        assert!(piped.stdout == fs::read(&tar).unwrap(), "{options:?} to standard output");
        run(Command::new("e2fsck").arg("-fn").arg(scene.path(&image)));
        let verified = ok(&["verify", "--json", "--record", &record, &scene.text(&image)]);
        let verified: serde_json::Value = serde_json::from_slice(&verified.stdout).unwrap();
        assert_eq!(verified["tar_digest"], summary["tar_digest"]);
    }
    assert_eq!(scene.left_over(), Vec::<String>::new());
}

#[test]
fn the_canonical_tar_is_what_gnu_tar_and_bsdtar_unpack_to_the_same_tree() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &["--format=pax", "-S"]);
    scene.pack(&tar, "a.vhd");
    ok(&["unpack", &scene.text("a.vhd"), &scene.text("canonical.tar")]);
    let expected = survey(&scene.path("tree"));
    for (program, name) in [("tar", "gnu"), ("bsdtar", "bsd")] {
        let folder = scene.path(name);
        fs::create_dir(&folder).unwrap();
        run(Command::new(program).arg("-xpf").arg(scene.path("canonical.tar")).arg("-C").arg(&folder));
        assert_eq!(survey(&folder), expected, "{program}");
    }
    // A canonical tar is its own canonical tar, and a tar by bsdtar leads to the same one.
    scene.pack(&scene.path("canonical.tar"), "b.vhd");
    ok(&["unpack", &scene.text("b.vhd"), &scene.text("again.tar")]);
    assert!(fs::read(scene.path("canonical.tar")).unwrap() == fs::read(scene.path("again.tar")).unwrap());
    let foreign = scene.path("bsd.tar");
    run(Command::new("bsdtar")
        .args(["--format", "pax", "--no-fflags", "-cf"])
        .arg(&foreign)
        .arg("-C")
        .arg(scene.path("gnu"))
        .arg("."));
    scene.pack(&foreign, "c.vhd");
    ok(&["unpack", "--exact", &scene.text("c.vhd.rec"), &scene.text("c.vhd"), &scene.text("exact.tar")]);
    assert!(fs::read(&foreign).unwrap() == fs::read(scene.path("exact.tar")).unwrap());
}

#[test]
fn packed_and_piped_input_gives_the_same_image() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &[]);
    let plain = fs::read(&tar).unwrap();
    scene.pack(&tar, "plain.vhd");
    let expected = fs::read(scene.path("plain.vhd")).unwrap();
    let gzip = run(Command::new("gzip").arg("-1c").arg(&tar)).stdout;
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    // Two members one behind the other are one stream, as for gzip and zstd themselves.
    let half = plain.len() / 2;
    let mut members = zstd::encode_all(&plain[..half], 1).unwrap();
    members.extend(zstd::encode_all(&plain[half..], 1).unwrap());
    for (name, bytes, packing) in [
        ("tar", &plain, "none"),
        ("gz", &gzip, "gzip"),
        ("zst", &zstd, "zstd"),
        ("two.zst", &members, "zstd"),
    ] {
        let (input, image) = (scene.path(name), scene.text(&format!("{name}.vhd")));
        fs::write(&input, bytes).unwrap();
        let done = ok(&["pack", "--json", input.to_str().unwrap(), &image]);
        let done: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(done["packing"], packing);
        assert!(fs::read(&image).unwrap() == expected, "{name} from a file");
        with_input(&["pack", "-", &image], bytes);
        assert!(fs::read(&image).unwrap() == expected, "{name} from standard input");
    }
    // A packed stream that is cut is an error, and what stood there stays.
    let before = fs::read(scene.path("gz.vhd")).unwrap();
    fs::write(scene.path("cut.gz"), &gzip[..gzip.len() / 2]).unwrap();
    let message = fails(&["pack", &scene.text("cut.gz"), &scene.text("gz.vhd")]);
    assert!(message.contains("cut.gz"), "{message}");
    assert!(fs::read(scene.path("gz.vhd")).unwrap() == before);
    assert_eq!(scene.left_over(), Vec::<String>::new());
}

#[test]
fn wrong_input_is_refused_with_its_name_and_what_helps() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &[]);
    let (tar, out) = (tar.to_str().unwrap(), scene.text("out.vhd"));
    scene.pack(Path::new(tar), "good.vhd");
    let good = scene.text("good.vhd");
    fs::write(scene.path("noise"), noise(5000)).unwrap();
    fs::write(scene.path("empty"), "").unwrap();
    fs::write(scene.path("x.xz"), b"\xFD7zXZ\0and more").unwrap();
    fs::write(scene.path("x.vhdx"), b"vhdxfile and more").unwrap();
    let mut cut = fs::read(tar).unwrap();
    cut.truncate(100_000);
    fs::write(scene.path("cut.tar"), cut).unwrap();
    let tree = scene.text("tree");
    for (arguments, expected) in [
        (vec!["pack", &scene.text("missing"), &out], vec!["missing", "No such file"]),
        (vec!["pack", &tree, &out], vec!["is a directory", "tar -C"]),
        (vec!["pack", &scene.text("noise"), &out], vec!["noise", "does not begin with a tar header"]),
        (vec!["pack", &scene.text("empty"), &out], vec!["empty"]),
        (vec!["pack", &scene.text("x.xz"), &out], vec!["x.xz", "xz -dc"]),
        (vec!["pack", &scene.text("cut.tar"), &out], vec!["cut.tar", "ends at byte 100000"]),
        (vec!["pack", "--max-size", "100KiB", tar, &out], vec!["102400", "raise --max-size"]),
        (vec!["pack", tar, &tree], vec!["is a directory"]),
        (vec!["pack", tar, "/dev/null"], vec!["not a regular file"]),
        (vec!["pack", tar, "/no/such/folder/out.vhd"], vec!["/no/such/folder"]),
        (vec!["pack", "--record", &out, tar, &out], vec!["two different files"]),
        (vec!["unpack", &scene.text("noise")], vec!["noise"]),
        (vec!["unpack", "--exact", &scene.text("noise"), &good], vec!["noise", "bad magic"]),
        (vec!["inspect", &scene.text("x.vhdx")], vec!["x.vhdx", "corrupt vhdx"]),
        (vec!["inspect", &tree], vec!["is a directory"]),
        (vec!["ls", &good, "/etc/nothing"], vec!["good.vhd", "'nothing' does not exist"]),
        (vec!["ls", &good, "/etc/passwd/x"], vec!["not a directory"]),
        (vec!["cat", &good, "/etc"], vec!["not a regular file"]),
        (vec!["verify", tar], vec!["in.tar"]),
    ] {
        let message = fails(&arguments);
        for part in expected {
            assert!(message.contains(part), "{arguments:?}: {message:?} lacks {part:?}");
        }
        assert!(!Path::new(&out).exists(), "{arguments:?} left its output");
    }
    assert_eq!(scene.left_over(), Vec::<String>::new());
    for arguments in [&["pack", tar][..], &["pack", "--profile", "ext2", tar, &out], &["diff", &good]] {
        assert_eq!(layer(arguments).output().unwrap().status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn damage_is_found_and_no_whole_tar_comes_out() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &[]);
    scene.pack(&tar, "a.vhd");
    let (image, record) = (scene.text("a.vhd"), scene.text("a.vhd.rec"));
    let bytes = fs::read(&image).unwrap();
    // In the data of the largest file: metadata stay sound, only the digest tells.
    let noise = noise(3_000_000);
    let at = bytes.windows(64).position(|w| w == &noise[..64]).unwrap();
    let mut bad = bytes.clone();
    bad[at + 10] ^= 1;
    fs::write(&image, &bad).unwrap();
    ok(&["verify", &image]);
    let message = fails(&["verify", "--record", &record, &image]);
    assert!(message.contains("digest of the tar does not match"), "{message}");
    let message = fails(&["unpack", "--exact", &record, &image, &scene.text("out.tar")]);
    assert!(message.contains("a.vhd"), "{message}");
    assert!(!scene.path("out.tar").exists());
    // In the superblock.
    let mut bad = bytes.clone();
    bad[1024 + 0x20] ^= 1;
    fs::write(&image, &bad).unwrap();
    fails(&["verify", &image]);
    // The end is missing: the footer, then more.
    fs::write(&image, &bytes[..bytes.len() - 512]).unwrap();
    ok(&["verify", "--record", &record, &image]);
    fs::write(&image, &bytes[..bytes.len() - 4096]).unwrap();
    fails(&["verify", &image]);
    fs::write(&image, [&bytes[..4096], &bytes[bytes.len() - 512..]].concat()).unwrap();
    assert!(fails(&["verify", &image]).contains("is truncated"));
}

#[test]
fn looking_at_an_image() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &["--numeric-owner", "--owner=12:12", "--group=34:34", "--mtime=@86399"]);
    let summary = scene.pack(&tar, "a.vhd");
    let image = scene.text("a.vhd");
    let text = |arguments: &[&str]| String::from_utf8(ok(arguments).stdout).unwrap();
    let facts: serde_json::Value =
        serde_json::from_str(&text(&["inspect", "--json", "--record", &scene.text("a.vhd.rec"), &image]))
            .unwrap();
    assert_eq!(facts["ext4"]["uuid"], summary["uuid"]);
    assert_eq!(facts["vhd"]["uuid"], summary["uuid"]);
    assert_eq!(facts["kind"], "layer");
    assert_eq!(facts["counts"]["files"], 305);
    assert_eq!(facts["counts"]["hard_links"], 1);
    assert_eq!(facts["counts"]["symlinks"], 2);
    // A layer's size counts the targets of its two links as well.
    let links = "passwd".len() + "/usr/share".len();
    let files = summary["diff_size"].as_u64().unwrap() - links as u64;
    assert_eq!(facts["counts"]["file_bytes"], files);
    assert_eq!(facts["record"]["tar_digest"], summary["tar_digest"]);
    assert!(text(&["inspect", &image]).contains("inline_data"));
    assert_eq!(text(&["ls", &image]), "etc\nhole\nshare\ntree\nusr\n".replace("tree\n", ""));
    let long = text(&["ls", "-l", &image, "/usr/big"]);
    assert_eq!(long, "-rwsr-xr-x   2    12    34    3000000 1970-01-01 23:59:59 /usr/big\n");
    assert!(text(&["ls", "-l", &image, "/etc"]).contains(" link -> passwd\n"));
    assert_eq!(text(&["ls", &image, "/share/"]), "many\n", "a link with a slash is followed");
    assert_eq!(text(&["ls", &image, "/share/many"]).lines().count(), 300);
    let rows: serde_json::Value = serde_json::from_str(&text(&["ls", "--json", &image, "etc/link"])).unwrap();
    assert_eq!((&rows[0]["type"], &rows[0]["target"]), (&"symlink".into(), &"passwd".into()));
    for name in ["etc/passwd", "usr/same", "hole", "etc/empty", "share/many/file-299"] {
        let expected = fs::read(scene.path("tree").join(name.replace("share", "usr/share"))).unwrap();
        assert!(ok(&["cat", &image, name]).stdout == expected, "{name}");
    }
    assert_eq!(ok(&["cat", &image, "/etc/link"]).stdout, fs::read(scene.path("tree/etc/passwd")).unwrap());
    // Nobody reads: no panic, no message.
    let mut child =
        layer(&["cat", &image, "usr/big"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert_eq!((done.status.code(), done.stderr.len()), (Some(141), 0));
}

#[test]
fn the_difference_of_two_images_turns_one_tree_into_the_other() {
    let scene = Scene::new();
    scene.pack(&scene.tar("old.tar", &[]), "old.vhd");
    let before = survey(&scene.path("tree"));
    let tree = scene.path("tree");
    fs::remove_file(tree.join("etc/empty")).unwrap();
    fs::write(tree.join("etc/new"), "new").unwrap();
    fs::write(tree.join("usr/share/many/file-100"), "changed").unwrap();
    fs::set_permissions(tree.join("usr/share/many/file-101"), fs::Permissions::from_mode(0o600)).unwrap();
    scene.pack(&scene.tar("new.tar", &[]), "new.vhd");
    assert_ne!(before, survey(&tree));
    let diff = scene.path("diff.tar");
    ok(&["diff", "-o", diff.to_str().unwrap(), &scene.text("new.vhd"), &scene.text("old.vhd")]);
    let names = String::from_utf8(run(Command::new("tar").arg("-tf").arg(&diff)).stdout).unwrap();
    let mut names: Vec<&str> = names.lines().filter(|n| !n.ends_with('/')).collect();
    names.sort_unstable();
    assert_eq!(names, ["etc/.wh.empty", "etc/new", "usr/share/many/file-100", "usr/share/many/file-101"]);
    // Equal images differ in nothing.
    let none = ok(&["diff", &scene.text("new.vhd"), &scene.text("new.vhd")]);
    assert!(none.stdout.iter().all(|b| *b == 0), "{} bytes", none.stdout.len());
}

#[test]
fn completions_and_manual_pages_are_made() {
    let program = env!("CARGO_BIN_EXE_lcow-graphdriver");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(Command::new(program).args(["completions", shell])).stdout;
        assert!(String::from_utf8(script).unwrap().contains("verify"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    run(Command::new(program).arg("man").arg(folder.path().join("man1")));
    let page = fs::read_to_string(folder.path().join("man1/lcow-graphdriver-layer-pack.1")).unwrap();
    assert!(page.contains("max\\-size"), "{page}");
}

#[test]
fn a_hash_tree_is_what_veritysetup_makes_and_names_the_damaged_file() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &[]);
    let image = scene.text("v.vhd");
    let summary = ok(&["pack", "--json", "--verity", tar.to_str().unwrap(), &image]).stdout;
    let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
    let root = summary["verity"]["root_hash"].as_str().unwrap().to_owned();
    let offset = summary["verity"]["hash_offset"].as_u64().unwrap();
    let facts = ok(&["inspect", "--json", &image]).stdout;
    let facts: serde_json::Value = serde_json::from_slice(&facts).unwrap();
    assert_eq!(facts["verity"]["root_hash"], root.as_str());
    assert_eq!(facts["verity"]["hash_offset"], offset);
    run(Command::new("veritysetup").args([
        "verify",
        "--hash-offset",
        &offset.to_string(),
        &image,
        &image,
        &root,
    ]));
    // The same file system as without a tree, and the same file each time.
    let again = scene.text("w.vhd");
    ok(&["pack", "--verity", tar.to_str().unwrap(), &again]);
    let bytes = fs::read(&image).unwrap();
    assert!(bytes == fs::read(&again).unwrap());
    scene.pack(&tar, "plain.vhd");
    let plain = fs::read(scene.path("plain.vhd")).unwrap();
    assert!(bytes[..plain.len() - 512] == plain[..plain.len() - 512]);

    let sound = ok(&["verify", "--json", "--root-hash", &root, &image]).stdout;
    let sound: serde_json::Value = serde_json::from_slice(&sound).unwrap();
    assert_eq!(sound["verity"]["root_hash"], root.as_str());
    assert!(fails(&["verify", "--root-hash", &"0".repeat(64), &image]).contains("its root hash is"));
    assert!(fails(&["verify", "--root-hash", &root, &scene.text("plain.vhd")]).contains("has no hash tree"));
    // A byte in the middle of the only large file.
    let big = fs::read(scene.path("tree/usr/big")).unwrap();
    let middle = &big[1_500_000..1_500_064];
    let at = bytes.windows(64).position(|w| w == middle).unwrap();
    let mut damaged = bytes.clone();
    damaged[at] ^= 1;
    fs::write(&image, &damaged).unwrap();
    let said = fails(&["verify", &image]);
    // The file has two names; either will do.
    assert!(said.contains("1 blocks are damaged"), "{said}");
    assert!(said.contains("in '/usr/big'\n") || said.contains("in '/usr/same'\n"), "{said}");
}

#[test]
fn a_disk_is_the_same_in_every_kind_of_file() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &[]);
    let source = scene.text("a.vhd");
    ok(&["pack", "--verity", tar.to_str().unwrap(), &source]);
    let bytes = fs::read(&source).unwrap();
    let disk = &bytes[..bytes.len() - 512];
    // A disk with sectors of 4096 bytes needs blocks of that size.
    let wide_source = scene.text("wide.vhd");
    ok(&["pack", "--block-size", "4KiB", tar.to_str().unwrap(), &wide_source]);
    let wide_bytes = fs::read(&wide_source).unwrap();
    let wide = ["--block-size", "32MiB", "--sector-size", "4096"];
    assert!(
        fails(&[&["convert"], &wide[..], &[&source, &scene.text("e.vhdx")]].concat())
            .contains("blocks of 1024 bytes")
    );
    for (arguments, name, format) in [
        (&[][..], "a.img", "raw"),
        (&["--to", "raw"], "b", "raw"),
        (&[], "c.vhd", "vpc"),
        (&[], "d.vhdx", "vhdx"),
        (&wide, "e.vhdx", "vhdx"),
    ] {
        let (source, disk) = match name {
            "e.vhdx" => (&wide_source, &wide_bytes[..wide_bytes.len() - 512]),
            _ => (&source, disk),
        };
        let out = scene.text(name);
        let mut command = vec!["convert", "--json", source, &out];
        command.splice(1..1, arguments.iter().copied());
        let done: serde_json::Value = serde_json::from_slice(&ok(&command).stdout).unwrap();
        assert_eq!(done["disk_bytes"], disk.len(), "{name}");
        // A foreign reader finds the same disk. QEMU reads no VHDX with sectors of 4096 bytes.
        let foreign = !arguments.contains(&"4096");
        let raw = scene.text("foreign.raw");
        if foreign {
            run(Command::new("qemu-img").args(["convert", "-f", format, "-O", "raw", &out, &raw]));
            assert!(fs::read(&raw).unwrap() == disk, "{name}: another disk");
        }
        if format == "vhdx" && foreign {
            run(Command::new("qemu-img").args(["check", "-f", "vhdx", &out]));
            let facts: serde_json::Value =
                serde_json::from_slice(&ok(&["inspect", "--json", &out]).stdout).unwrap();
            assert_eq!(facts["vhdx"]["disk_bytes"], disk.len());
            assert!(facts["verity"]["root_hash"].is_string());
        }
        // And back, by every command that reads images.
        let back = scene.text("back.img");
        ok(&["convert", &out, &back]);
        assert!(fs::read(&back).unwrap() == disk, "{name}: the way back");
        ok(&["verify", &out]);
        assert_eq!(ok(&["cat", &out, "etc/passwd"]).stdout, fs::read(scene.path("tree/etc/passwd")).unwrap());
    }
    // What a foreign writer made.
    let foreign = scene.text("foreign.vhdx");
    run(Command::new("qemu-img").args([
        "convert",
        "-f",
        "raw",
        "-O",
        "vhdx",
        &scene.text("a.img"),
        &foreign,
    ]));
    ok(&["convert", &foreign, &scene.text("f.raw")]);
    assert!(fs::read(scene.path("f.raw")).unwrap() == disk);
    assert!(fails(&["convert", &source, &scene.text("g")]).contains("--to"));
    assert!(
        fails(&["convert", "--block-size", "1MiB", &source, &scene.text("g.vhd")]).contains("only to VHDX")
    );
    assert!(fails(&["convert", "--block-size", "3MiB", &source, &scene.text("g.vhdx")]).contains("block"));
    assert!(!scene.path("g.vhdx").exists(), "nothing is left of a failure");
}

/// Gives both footers of a dynamic VHD another kind of disk.
fn retype_vhd(path: &Path, kind: u32) {
    let mut bytes = fs::read(path).unwrap();
    for at in [0, bytes.len() - 512] {
        let footer = &mut bytes[at..at + 512];
        footer[60..64].copy_from_slice(&kind.to_be_bytes());
        footer[64..68].fill(0);
        let sum = !footer.iter().map(|b| u32::from(*b)).sum::<u32>();
        footer[64..68].copy_from_slice(&sum.to_be_bytes());
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn dynamic_vhds_are_read_as_qemu_reads_them() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &[]);
    ok(&["pack", "--raw", tar.to_str().unwrap(), &scene.text("a.img")]);
    // Room for blocks that are written later, out of order.
    fs::File::options().write(true).open(scene.path("a.img")).unwrap().set_len(100 << 20).unwrap();
    let (vhd, theirs, ours) = (scene.text("a.vhd"), scene.text("theirs.img"), scene.text("ours.img"));
    for options in ["subformat=dynamic", "subformat=dynamic,force_size=on"] {
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "vpc", "-o", options])
            .args([&scene.text("a.img"), &vhd]));
        for write in ["write -P 0x5a 90M 64k", "write -P 0xa5 70M 3M", "write -P 1 99M 512"] {
            run(Command::new("qemu-io").args(["-f", "vpc", "-c", write, &vhd]));
        }
        run(Command::new("qemu-img").args(["convert", "-f", "vpc", "-O", "raw", &vhd, &theirs]));
        ok(&["convert", &vhd, &ours]);
        assert!(fs::read(&theirs).unwrap() == fs::read(&ours).unwrap(), "{options}: another disk");
        let facts: serde_json::Value =
            serde_json::from_slice(&ok(&["inspect", "--json", &vhd]).stdout).unwrap();
        assert_eq!(facts["vhd"]["disk_bytes"], fs::metadata(&theirs).unwrap().len(), "{options}");
        assert_eq!(facts["vhd"]["block_bytes"], 2 << 20);
        // A byte after the file system is found.
        assert!(fails(&["verify", &vhd]).contains("outside of file system and hash tree"));
        assert_eq!(ok(&["cat", &vhd, "etc/passwd"]).stdout, fs::read(scene.path("tree/etc/passwd")).unwrap());
    }
    assert!(
        fails(&["mount", &vhd, &scene.text("tree")])
            .contains("is a dynamic VHD, which the kernel cannot mount")
    );
    // What convert makes of it is a fixed one, with its id.
    let fixed = scene.text("fixed.vhd");
    ok(&["convert", &vhd, &fixed]);
    assert_eq!(fs::metadata(&fixed).unwrap().len(), fs::metadata(&theirs).unwrap().len() + 512);
    retype_vhd(&scene.path("a.vhd"), 4);
    let said = fails(&["convert", &vhd, &scene.text("never.img")]);
    assert!(said.contains("differencing vhd") && said.contains("Merge-VHD"), "{said}");
    retype_vhd(&scene.path("a.vhd"), 7);
    assert!(fails(&["convert", &vhd, &scene.text("never.img")]).contains("neither fixed nor dynamic"));
    assert!(!scene.path("never.img").exists());
}

#[test]
fn disks_of_other_formats_are_refused_with_the_command_to_use() {
    let scene = Scene::new();
    let tar = scene.tar("in.tar", &[]);
    let raw = scene.text("a.img");
    ok(&["pack", "--raw", tar.to_str().unwrap(), &raw]);
    let out = scene.text("out.img");
    for (format, options) in [
        ("qcow2", ""),
        ("qcow2", "compat=0.10"),
        ("qcow", ""),
        ("qed", ""),
        ("vdi", ""),
        ("parallels", ""),
        ("vmdk", ""),
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ] {
        let foreign = scene.text(&format!("a disk{options}.{format}"));
        let mut make = Command::new("qemu-img");
        make.args(["convert", "-f", "raw", "-O", format]);
        if !options.is_empty() {
            make.args(["-o", options]);
        }
        run(make.args([&raw, &foreign]));
        for command in [&["convert", &foreign, &out][..], &["inspect", &foreign], &["verify", &foreign]] {
            let said = fails(command);
            assert!(said.contains("which is not supported"), "{format} {options}: {said}");
            assert!(!scene.path("out.img").exists());
        }
        // What the message says to do works.
        let said = fails(&["convert", &foreign, &out]);
        let advice =
            said.split('`').nth(1).unwrap().replace("OUT.img", &format!("'{}'", scene.text("made.img")));
        run(Command::new("sh").args(["-ec", &advice]));
        ok(&["verify", &scene.text("made.img")]);
        assert_eq!(
            ok(&["cat", &scene.text("made.img"), "etc/passwd"]).stdout,
            fs::read(scene.path("tree/etc/passwd")).unwrap()
        );
    }
    for (tool, name) in [("gzip", "gzip"), ("xz", "xz")] {
        let packed = run(Command::new(tool).args(["-kc", &raw])).stdout;
        fs::write(scene.path("packed"), packed).unwrap();
        assert!(fails(&["convert", &scene.text("packed"), &out]).contains(&format!("is {name}, which")));
    }
    assert!(fails(&["inspect", tar.to_str().unwrap()]).contains("layer pack"));
    // A disk within a VHD that whoever guesses would take for a file of another format, with a name of the host in it.
    let hidden = scene.text("hidden.img");
    fs::write(&hidden, fs::read(scene.path("a disk.qcow2")).unwrap()).unwrap();
    let length = fs::metadata(&hidden).unwrap().len().next_multiple_of(512);
    fs::File::options().write(true).open(&hidden).unwrap().set_len(length).unwrap();
    run(Command::new("qemu-img").args([
        "convert",
        "-f",
        "raw",
        "-O",
        "vhdx",
        &hidden,
        &scene.text("h.vhdx"),
    ]));
    assert!(fails(&["convert", &scene.text("h.vhdx"), &out]).contains("begins like qcow2"));
}

#[test]
fn an_image_is_mounted_on_a_folder() {
    struct Mount(String);
    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
    let scene = Scene::new();
    scene.pack(&scene.tar("in.tar", &[]), "a.vhd");
    fs::create_dir(scene.path("at")).unwrap();
    let at = scene.text("at");
    ok(&["mount", &scene.text("a.vhd"), &at]);
    let mounted = Mount(at.clone());
    assert_eq!(
        fs::read(scene.path("at/usr/big")).unwrap(),
        fs::read(scene.path("tree/usr/big")).unwrap(),
        "the mounted file differs"
    );
    assert_eq!(
        fs::write(scene.path("at/new"), "").unwrap_err().kind(),
        std::io::ErrorKind::ReadOnlyFilesystem
    );
    drop(mounted);
    assert!(!scene.path("at/usr").exists());
    let loops = run(Command::new("losetup").args(["-j", &scene.text("a.vhd")])).stdout;
    assert!(loops.is_empty(), "a loop device is left: {}", String::from_utf8_lossy(&loops));
    assert!(fails(&["mount", "--write", &scene.text("a.vhd"), &at]).contains("never changes"));
    ok(&["convert", &scene.text("a.vhd"), &scene.text("a.vhdx")]);
    assert!(fails(&["mount", &scene.text("a.vhdx"), &at]).contains("layer convert"));
    // A damaged image never reaches the kernel.
    let mut bytes = fs::read(scene.path("a.vhd")).unwrap();
    bytes[1024 + 0x60] ^= 0xff;
    fs::write(scene.path("a.vhd"), bytes).unwrap();
    fails(&["mount", &scene.text("a.vhd"), &at]);
    assert!(!scene.path("at/usr").exists());
}

#[test]
fn a_sandbox_is_mounted_only_if_it_is_asked_for() {
    struct Mount(String);
    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
    let scene = Scene::new();
    let (tree, image, at) = (scene.path("sandbox"), scene.text("s.img"), scene.text("at"));
    for folder in ["sandbox/upper", "sandbox/work", "at"] {
        fs::create_dir_all(scene.path(folder)).unwrap();
    }
    fs::write(tree.join("upper/file"), "what a container wrote").unwrap();
    let make = |options: &[&str]| {
        let made = run(Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-d"])
            .arg(&tree)
            .args(options)
            .args([&image, "32M"]));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    };
    make(&[]);
    let before = fs::read(&image).unwrap();
    assert!(fails(&["mount", &image, &at]).contains("--sandbox"));
    ok(&["mount", "--sandbox", &image, &at]);
    let mounted = Mount(at.clone());
    assert_eq!(fs::read(scene.path("at/upper/file")).unwrap(), b"what a container wrote");
    assert_eq!(
        fs::write(scene.path("at/new"), "").unwrap_err().kind(),
        std::io::ErrorKind::ReadOnlyFilesystem
    );
    drop(mounted);
    assert!(fs::read(&image).unwrap() == before, "a mount without --write wrote");
    // A journal to replay: nothing is, without --write.
    let dirty = run(Command::new("debugfs").args(["-w", "-R", "feature needs_recovery", &image]));
    assert!(dirty.status.success());
    let before = fs::read(&image).unwrap();
    assert!(fails(&["mount", "--sandbox", &image, &at]).contains("--write"));
    assert!(fs::read(&image).unwrap() == before, "a refusal wrote");
    ok(&["mount", "--write", &image, &at]);
    let mounted = Mount(at.clone());
    fs::write(scene.path("at/upper/new"), "").unwrap();
    drop(mounted);
    // What costs the kernel much for each group.
    make(&["-b", "1024", "-g", "256"]);
    assert!(fails(&["mount", "--write", &image, &at]).contains("groups"));
    // An applied image is none.
    scene.pack(&scene.tar("in.tar", &[]), "a.vhd");
    assert!(fails(&["mount", "--sandbox", &scene.text("a.vhd"), &at]).contains("applied layer"));
}

#[test]
fn bytes_beside_the_file_system_are_not_believed() {
    let scene = Scene::new();
    scene.pack(&scene.tar("in.tar", &[]), "a.vhd");
    let good = fs::read(scene.path("a.vhd")).unwrap();
    let image = scene.text("a.vhd");
    ok(&["verify", &image]);
    // A qcow2's first bytes in the boot block; a footer's fields; one that tells of a smaller disk.
    for (at, bytes) in
        [(0, &b"QFI\xfb"[..]), (1000, b"x"), (good.len() - 512 + 24, b"x"), (good.len() - 512 + 100, b"x")]
    {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let footer = bad.len() - 512;
        // Its checksum is right.
        bad[footer + 64..footer + 68].fill(0);
        let sum = !bad[footer..].iter().map(|b| u32::from(*b)).sum::<u32>();
        bad[footer + 64..footer + 68].copy_from_slice(&sum.to_be_bytes());
        fs::write(&image, bad).unwrap();
        fails(&["verify", &image]);
    }
    // Between the file system and the footer.
    let mut bad = good.clone();
    let footer = bad.split_off(good.len() - 512);
    bad.extend([0x5A; 512]);
    bad.extend(footer);
    fs::write(&image, bad).unwrap();
    fails(&["verify", &image]);
    fs::write(&image, &good).unwrap();
    ok(&["verify", &image]);
}

#[test]
fn the_profile_hcsshim_has_the_root_hashes_of_tar2ext4() {
    let scene = Scene::new();
    let empty = scene.path("empty.tar");
    fs::write(&empty, [0; 10_240]).unwrap();
    let image = scene.text("e.vhd");
    let flags = ["pack", "--profile", "hcsshim", "--verity", "--json"];
    // The same as `tests/hcsshim/corpus.rs`: for 16 GiB, which is the default, and for 128.
    for (max_disk, root) in [
        (&[][..], "5a021e8b10137bc7a7658670ccc4898eb1facffaa933aadd9cfe4bccc1f84f85"),
        (&["--max-disk", "128GiB"][..], "8b4842f06982817534a75bcf71865213b09dfa8313229c384e5201dadbd75e25"),
    ] {
        let summary = ok(&[&flags[..], max_disk, &[empty.to_str().unwrap(), &image]].concat()).stdout;
        let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
        assert_eq!(summary["verity"]["root_hash"], root);
        let offset = summary["verity"]["hash_offset"].to_string();
        run(Command::new("veritysetup").args(["verify", "--hash-offset", &offset, &image, &image, root]));
        ok(&["verify", "--root-hash", root, &image]);
        let facts = ok(&["inspect", "--json", &image]).stdout;
        let facts: serde_json::Value = serde_json::from_slice(&facts).unwrap();
        assert_eq!(facts["verity"]["root_hash"], root);
    }
    // Without a footer, from standard input; the file system is the same.
    let raw = scene.text("e.img");
    let flags = ["pack", "--profile", "hcsshim", "--max-disk", "128GiB", "--raw", "-", &raw];
    with_input(&flags, &fs::read(&empty).unwrap());
    assert!(fs::read(&image).unwrap().starts_with(&fs::read(&raw).unwrap()));
    // A whole tree, and its tar back.
    let tar = scene.tar("in.tar", &["--format=pax"]);
    let record = scene.text("t.rec");
    let image = scene.text("t.vhd");
    let out = scene.text("out.tar");
    let flags =
        ["pack", "--profile", "hcsshim", "--inline", "--record", &record, tar.to_str().unwrap(), &image];
    ok(&flags);
    ok(&["verify", "--record", &record, &image]);
    ok(&["unpack", "--exact", &record, &image, &out]);
    assert!(fs::read(&tar).unwrap() == fs::read(out).unwrap());
}

#[test]
fn options_that_do_not_go_together_and_sizes_that_cannot_be_are_refused() {
    let scene = Scene::new();
    let (tar, image) = (scene.tar("in.tar", &[]), scene.text("x.vhd"));
    let refused = |flags: &[&str]| fails(&[&["pack"], flags, &[tar.to_str().unwrap(), &image]].concat());
    for flag in ["--inline", "--keep-whiteouts", "--convert-slash"] {
        assert!(refused(&[flag]).contains("requires --profile hcsshim"));
    }
    assert!(refused(&["--max-disk", "128GiB"]).contains("requires --profile hcsshim"));
    assert!(
        refused(&["--profile", "hcsshim", "--block-size", "2KiB"]).contains("requires --profile default")
    );
    assert_eq!(layer(&["pack", "--block-size", "8KiB", "x", "y"]).output().unwrap().status.code(), Some(2));
    assert!(refused(&["--max-size", "2041GiB"]).contains("a vhd"));
    assert!(refused(&["--max-size", "17TiB", "--raw"]).contains("has at most 16.0 TiB"));
    assert!(refused(&["--profile", "hcsshim", "--max-disk", "17TiB"]).contains("maximum disk"));
    assert!(!scene.path("x.vhd").exists());
    // A disk of more than a layer may have.
    let huge = scene.text("huge.vhdx");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vhdx", &huge, "17T"]));
    for out in ["out.vhdx", "out.img"] {
        assert!(fails(&["convert", &huge, &scene.text(out)]).contains("at most 16.0 TiB"));
    }
    assert!(fails(&["convert", &huge, &scene.text("out.vhd")]).contains("2040 GiB"));
}

#[test]
fn a_symbolic_link_longer_than_a_block_makes_all_blocks_larger() {
    let scene = Scene::new();
    let long = "long/".repeat(600);
    symlink(&long, scene.path("tree/far")).unwrap();
    let (tar, image) = (scene.tar("in.tar", &[]), scene.text("x.vhd"));
    let tar = tar.to_str().unwrap();
    let (record, wide) = (scene.text("x.rec"), [scene.text("wide.vhd"), scene.text("wide.rec")]);
    ok(&["pack", "--block-size", "4KiB", "--record", &wide[1], tar, &wide[0]]);
    // From a pipe, which has no second pass, and with a record that nobody asked for.
    let mut packing = layer(&["pack", "--verity", "-", &image]);
    let mut packing = packing.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    packing.stdin.take().unwrap().write_all(&fs::read(tar).unwrap()).unwrap();
    assert!(packing.wait().unwrap().success());
    ok(&["pack", "--verity", "--block-size", "4KiB", tar, &scene.text("tree.vhd")]);
    assert!(fs::read(&image).unwrap() == fs::read(scene.path("tree.vhd")).unwrap());
    ok(&["pack", "--record", &record, tar, &image]);
    for (grown, from_the_start) in [(&image, &wide[0]), (&record, &wide[1])] {
        assert!(fs::read(grown).unwrap() == fs::read(from_the_start).unwrap(), "{grown}");
    }
    // Nothing else is left beside them.
    let left: Vec<_> = fs::read_dir(scene.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
    run(Command::new("e2fsck").args(["-fn", &image]));
    let out = ok(&["unpack", "--exact", &record, &image]).stdout;
    assert!(out == fs::read(tar).unwrap());
    let stat = run(Command::new("debugfs").args(["-R", "stat /far", &image])).stdout;
    assert!(String::from_utf8_lossy(&stat).contains("Size: 3000"), "{}", String::from_utf8_lossy(&stat));
}
