//! Export and changes against sandboxes that the real kernel wrote through overlayfs, read back by GNU tar and bsdtar.
//!
//! These tests need root, loop devices and overlayfs, and say so if they are missing.

mod epoch;
mod lowers;
mod readers;
mod scratch;
mod usage;

use super::{canonical::Version, *};
use disk_io::MemDisk;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};
use tempfile::TempDir;

/// Runs a shell script; its standard output.
fn sh(script: &str) -> String {
    let out = Command::new("bash").args(["-euc", script]).output().expect("bash starts");
    assert!(
        out.status.success(),
        "`{script}` failed (these tests need root, loop devices, overlayfs, e2fsprogs, GNU tar, bsdtar, attr, acl): {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A mount that goes when the test ends, well or not.
struct Mount(PathBuf);

impl Mount {
    fn new(dir: &Path, args: &str) -> Self {
        fs::create_dir_all(dir).unwrap();
        sh(&format!("mount {args} {}", dir.display()));
        Self(dir.to_owned())
    }

    fn image(dir: &Path, image: &Path, options: &str) -> Self {
        fs::create_dir_all(dir).unwrap();
        ext4_image::testing::loop_mount(image, dir, options, &[]);
        Self(dir.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status();
        if !done.is_ok_and(|s| s.success()) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
}

/// Layers on images, written by the kernel.
struct Stack {
    dir: TempDir,
    layers: usize,
}

impl Stack {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), layers: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, n: usize) -> PathBuf {
        self.path(&format!("{n}.img"))
    }

    /// Makes a sandbox on top, runs `script` in the merged directory ($M), unmounts.
    fn layer(&mut self, script: &str) -> &mut Self {
        self.layer_with("-O inline_data,metadata_csum,64bit,ea_inode", script)
    }

    fn layer_with(&mut self, mkfs: &str, script: &str) -> &mut Self {
        let n = self.layers;
        self.layers += 1;
        let image = self.image(n);
        sh(&format!("truncate -s 64M {0} && mkfs.ext4 -q -I 256 {mkfs} {0}", image.display()));
        let mut mounts = Vec::new();
        let mut lowers = Vec::new();
        for below in (0..n).rev() {
            let at = self.path(&format!("m{below}"));
            mounts.push(Mount::image(&at, &self.image(below), "ro"));
            lowers.push(format!("{}/upper", at.display()));
        }
        let at = self.path("rw");
        mounts.push(Mount::image(&at, &image, ""));
        for sub in ["upper", "work", "none"] {
            fs::create_dir(at.join(sub)).unwrap();
        }
        lowers.push(format!("{}/none", at.display()));
        let merged = self.path("merged");
        let overlay = Mount::new(
            &merged,
            &format!(
                "-t overlay overlay -o lowerdir={},upperdir={1}/upper,workdir={1}/work,\
                 index=off,metacopy=off,redirect_dir=nofollow",
                lowers.join(":"),
                at.display()
            ),
        );
        sh(&format!("export M={}; cd $M; umask 022; {script}", merged.display()));
        drop(overlay);
        while let Some(mount) = mounts.pop() {
            drop(mount);
        }
        sh(&format!("e2fsck -fn {} >/dev/null 2>&1", image.display()));
        self
    }

    /// The stack with layer `top` nearest.
    fn sources(&self, top: usize) -> Vec<LayerSource<File>> {
        (0..=top)
            .rev()
            .map(|n| LayerSource::new(File::open(self.image(n)).unwrap(), LayerKind::Sandbox))
            .collect()
    }

    fn export(&self, top: usize, parent: Option<ParentSpec<'_, File>>) -> (Vec<u8>, ExportSummary) {
        self.export_as(Version::default(), top, parent)
    }

    fn export_as(
        &self,
        version: Version,
        top: usize,
        parent: Option<ParentSpec<'_, File>>,
    ) -> (Vec<u8>, ExportSummary) {
        let mut tar = Vec::new();
        let sources = self.sources(top);
        let options = ExportOptions { version, ..ExportOptions::default() };
        let summary = export(&sources, parent, &options, &mut NoHooks, &mut tar).unwrap();
        assert_eq!(summary.tar_bytes, tar.len() as u64);
        assert_eq!(
            summary.diff_size,
            diff_size(&sources, parent, &ExportOptions::default(), &mut NoHooks).unwrap()
        );
        (tar, summary)
    }

    /// `M /path` lines.
    fn changes(&self, top: usize, parent: Option<ParentSpec<'_, File>>) -> Vec<String> {
        changes(&self.sources(top), parent, &ExportOptions::default(), &mut NoHooks)
            .unwrap()
            .into_iter()
            .map(|c| {
                let kind = match c.kind {
                    ChangeKind::Modified => 'C',
                    ChangeKind::Added => 'A',
                    ChangeKind::Deleted => 'D',
                };
                format!("{kind} {}", String::from_utf8_lossy(&c.path))
            })
            .collect()
    }
}

/// Names in a tar, as a foreign reader sees them.
fn names(tar: &[u8], tool: &str) -> Vec<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), tar).unwrap();
    let quoting = if tool == "tar" { "--quoting-style=escape" } else { "" };
    sh(&format!("{tool} {quoting} -tf {}", file.path().display())).lines().map(str::to_owned).collect()
}

/// A listing of a tree that tells everything a tar should carry.
const DESCRIBE: &str = r"find . -mindepth 1 -printf '%P %y %#m %U:%G %n %l ' \( -type d -printf '- ' -o -printf '%s ' \) \
    -printf '%T@\n' | LC_ALL=C sort; find . -mindepth 1 -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum;
    find . -mindepth 1 \( -type b -o -type c \) -exec stat -c '%n %t:%T' {} + | sort;
    find . -mindepth 1 -print0 | LC_ALL=C sort -z | xargs -0r getfattr -h -d -m - -e hex |
    awk '/^# file:/{f=$0;next} NF{print f, $0}'";

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn a_whole_tree_comes_back_exactly_through_gnu_tar() {
    let mut stack = Stack::new();
    stack.layer(
        r#"
        mkdir -p a/b d; echo hi > a/file; printf 'x%.0s' {1..100} > a/inline; head -c 300000 /dev/urandom > a/big
        ln a/file a/zlink; ln -s ../file a/b/short; ln -s $(printf 'y%.0s' {1..90}) a/b/long
        ln -s $(printf 'é%.0s' {1..90}) a/b/uni
        mknod d/c c 1 3; mknod d/b b 259 70000; mkfifo d/p
        touch -d '1960-01-02 03:04:05.678 UTC' a/old; touch -d '2345-01-02 03:04:05.000000009 UTC' a/new
        chown 3000000:4000000 a/old; chmod 6711 a/big; chmod 1777 d
        setfattr -n user.bin -v 0x000a3d00ff a/file; setfattr -n user.empty a/b; setfattr -n trusted.x -v y a/b/long -h
        setfattr -n user.huge -v 0x$(head -c 3500 /dev/urandom | xxd -p | tr -d '\n') d
        setfattr -n user.huge -v 0x$(head -c 3000 /dev/urandom | xxd -p | tr -d '\n') a/new
        setfacl -m u:1234:rwx,g:77:r a/big; setfacl -d -m u:99:rx a
        touch "$(printf 'n%.0s' {1..200})" "$(printf 'ü%.0s' {1..60})" $'bad\xff\xfename' $'new\nline' "sp ace"
        truncate -s 40M sparse; printf data | dd of=sparse bs=1 seek=2000000 conv=notrunc status=none
        truncate -s 1M hole; head -c 8192 /dev/zero > zeros
        fallocate -l 200000 unwritten; mkdir many; cd many; for i in {1..3000}; do echo $i > f$i; done
        "#,
    );
    let (tar, summary) = stack.export(0, None);
    let file = stack.path("out.tar");
    fs::write(&file, &tar).unwrap();
    sh(&format!(
        "mkdir {0}/x && tar -C {0}/x --xattrs --xattrs-include='*' --numeric-owner -xpf {0}/out.tar",
        stack.dir.path().display()
    ));
    let at = stack.path("look");
    let mount = Mount::image(&at, &stack.image(0), "ro");
    let want = sh(&format!("cd {}/upper; {DESCRIBE}", at.display()));
    drop(mount);
    let got = sh(&format!("cd {}/x; {DESCRIBE}", stack.dir.path().display()));
    // Directories' times are set by tar; `trusted.overlay.*` is overlayfs' own.
    let clean =
        |s: &str| s.lines().filter(|l| !l.contains(" trusted.overlay.")).collect::<Vec<_>>().join("\n");
    let (want, got) = (clean(&want), clean(&got));
    if want != got {
        let only =
            |a: &str, b: &str| a.lines().filter(|l| !b.contains(l)).take(9).collect::<Vec<_>>().join("\n");
        panic!(
            "only in the image:\n{}\nonly in the extracted tree:\n{}",
            only(&want, &got),
            only(&got, &want)
        );
    }
    assert_eq!((summary.sockets, summary.hidden, summary.first_hidden), (0, 0, None));
    // Sorted, parents first, directories with a slash, and both tools see the same names.
    let gnu = names(&tar, "tar");
    assert_eq!(gnu.len(), names(&tar, "LC_ALL=C.UTF-8 bsdtar").len());
    assert_eq!(&gnu[..5], ["a/", "a/b/", "a/b/long", "a/b/short", "a/b/uni"]);
    // The sparse files take little room, and their holes come back.
    assert!(tar.len() < 8 << 20, "{}", tar.len());
    sh(&format!(
        "cd {}; test $(stat -c %b x/sparse) -lt 100; cmp -n 3000000 x/sparse <(bsdtar -xOf out.tar sparse)",
        stack.dir.path().display()
    ));
    // The same bytes again.
    assert!(stack.export(0, None).0 == tar);
}

/// A base and a layer that changes it in every way.
fn two_layers() -> Stack {
    let mut stack = Stack::new();
    stack
        .layer(
            "mkdir -p keep/sub gone opaque todir; echo 1 > keep/same; echo 2 > keep/mod; echo 3 > gone/x
             echo 4 > opaque/old; echo 5 > opaque/both; echo 6 > dirfile; echo 7 > keep/del; mkdir filedir; echo 8 > filedir/in
             echo aa > keep/bytes; touch -d @1000 keep/bytes; echo x > keep/attr; mkdir xdir; echo l > l1; ln l1 l2",
        )
        .layer(
            "echo 22 > keep/mod; rm -r gone; rm -r opaque; mkdir opaque; echo 55 > opaque/both; echo n > opaque/new
             rm dirfile; mkdir dirfile; echo c > dirfile/child; rm keep/del; rm -r filedir; echo f > filedir
             echo bb > keep/bytes; touch -d @1000 keep/bytes; setfattr -n user.a -v b keep/attr
             setfattr -n user.d -v e xdir; echo a > added; mkdir keep/newdir; echo q > keep/newdir/f
             echo h > h1; ln h1 h2",
        );
    stack
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn against_its_own_parent_a_layer_is_what_stands_in_it() {
    let stack = two_layers();
    let (tar, summary) = stack.export(1, Some(ParentSpec::Own));
    let expect = "added dirfile/ dirfile/.wh..wh..opq dirfile/child filedir .wh.gone h1 h2 keep/ keep/attr keep/bytes \
                  keep/.wh.del keep/mod keep/newdir/ keep/newdir/.wh..wh..opq keep/newdir/f opaque/ opaque/.wh..wh..opq \
                  opaque/both opaque/new xdir/";
    let got = names(&tar, "tar");
    // The kernel marks new directories opaque as it likes; the others are certain.
    let certain = |names: Vec<String>| -> Vec<String> {
        names.into_iter().filter(|n| !n.ends_with(".wh..opq") || n.starts_with("opaque/")).collect()
    };
    assert_eq!(certain(got), certain(expect.split_whitespace().map(str::to_owned).collect()));
    assert_eq!(summary.diff_size, 2 + 2 + 2 + 2 + 2 + 3 + 3 + 2 + 3 + 2);
    assert_eq!(
        stack.changes(1, Some(ParentSpec::Own)),
        [
            "A /added",
            "C /dirfile",
            "A /dirfile/child",
            "C /filedir",
            "D /gone",
            "A /h1",
            "A /h2",
            "C /keep",
            "C /keep/attr",
            "C /keep/bytes",
            "D /keep/del",
            "C /keep/mod",
            "A /keep/newdir",
            "A /keep/newdir/f",
            "C /opaque",
            "C /opaque/both",
            "A /opaque/new",
            "D /opaque/old",
            "C /xdir",
        ]
    );
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn against_an_unrelated_copy_contents_decide() {
    let stack = two_layers();
    let copy = Stack::new();
    fs::copy(stack.image(0), copy.image(0)).unwrap();
    let other: Vec<_> = copy.sources(0).into_iter().map(ParentLayer::Other).collect();
    let (tar, _) = stack.export(1, Some(ParentSpec::Layers(&other)));
    let want = [
        "added",
        "dirfile/",
        "dirfile/child",
        "filedir",
        ".wh.gone",
        "h1",
        "h2",
        "keep/",
        "keep/attr",
        "keep/bytes",
        "keep/.wh.del",
        "keep/mod",
        "keep/newdir/",
        "keep/newdir/f",
        "opaque/",
        "opaque/both",
        "opaque/new",
        "opaque/.wh.old",
        "xdir/",
    ];
    assert_eq!(names(&tar, "tar"), want);
    // Shared or not, the same difference.
    let shared = [ParentLayer::OfTarget(1)];
    assert!(stack.export(1, Some(ParentSpec::Layers(&shared))).0 == tar);
    // The layer below against its copy: nothing.
    let (tar, summary) = stack.export(0, Some(ParentSpec::Layers(&other)));
    assert_eq!((tar, summary.entries), (vec![0; 1024], 0));
    assert_eq!(stack.changes(0, Some(ParentSpec::Layers(&other))), [""; 0]);
    let changes = stack.changes(1, Some(ParentSpec::Layers(&other)));
    assert!(changes.contains(&"C /keep/bytes".to_owned()), "{changes:?}");
    assert!(!changes.iter().any(|c| c.ends_with("/same")), "{changes:?}");
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn a_distant_ancestor_gives_the_squashed_difference() {
    let mut stack = two_layers();
    stack.layer("rm added; echo 2 > keep/mod2; rm -r keep/newdir; echo again > gone");
    let (tar, _) = stack.export(2, Some(ParentSpec::Layers(&[ParentLayer::OfTarget(2)])));
    let got = names(&tar, "tar");
    assert!(!got.iter().any(|n| n == "added" || n.starts_with("keep/newdir")), "{got:?}");
    for name in ["gone", "keep/.wh.del", "keep/mod", "keep/mod2", "opaque/.wh.old", "h2"] {
        assert!(got.iter().any(|n| n == name), "{name} in {got:?}");
    }
}

/// The canonical format is frozen: these bytes must never change.
#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn the_canonical_tar_is_the_golden_one() {
    let mut stack = Stack::new();
    stack.layer("mkdir d; echo 1 > d/gone; echo 2 > d/kept").layer(
        r#"
        rm d/gone; rm -r d; mkdir d; echo new > d/file; ln d/file d/link; ln -s target d/sym; mkfifo d/fifo; mknod d/dev c 5 1
        echo . > "$(printf 'long%.0s' {1..40})"; echo . > $'\xff'; echo . > ü; chown 2097152:7 d/file
        setfattr -n user.b -v 0x0a00 d/file; setfattr -n user.a -v 0x3d d/file; setfacl -m u:5:r d/file
        truncate -s 1M s; printf x | dd of=s bs=1 seek=500000 conv=notrunc status=none; chmod 4755 s
        find . -mindepth 1 -print0 | xargs -0 touch -h -d '2001-02-03 04:05:06 UTC'
        touch -h -d '1965-01-01 00:00:00.25 UTC' d/sym; touch -d '2001-02-03 04:05:06 UTC' d
        "#,
    );
    for (version, name) in [(Version::V1, "canonical-v1.tar"), (Version::V2, "canonical-v2.tar")] {
        let (tar, _) = stack.export_as(version, 1, Some(ParentSpec::Own));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var_os("LCOW_WRITE_GOLDEN").is_some() && !path.exists() {
            fs::write(&path, &tar).unwrap();
        }
        let golden = fs::read(&path).unwrap();
        assert_eq!(names(&tar, "tar"), names(&golden, "tar"));
        assert!(tar == golden, "{name}: the canonical format is frozen");
    }
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn host_ids_are_mapped_back() {
    let mut stack = Stack::new();
    stack.layer("echo x > f; chown 500005:500006 f; setfacl -m u:500007:r f; echo y > g");
    let ranges = vec![IdRange { container_id: 0, host_id: 500_000, size: 65536 }];
    let id_maps = IdMaps { uids: ranges.clone(), gids: ranges };
    let options = ExportOptions { id_maps, ..ExportOptions::default() };
    let mut sources = stack.sources(0);
    sources[0].host_ids = true;
    let mut tar = Vec::new();
    export(&sources, None, &options, &mut NoHooks, &mut tar).unwrap();
    fs::write(stack.path("o.tar"), tar).unwrap();
    let list = sh(&format!("tar --numeric-owner -tvf {}", stack.path("o.tar").display()));
    assert!(list.contains(" 5/6 ") && list.contains(" 65534/65534 "), "{list}");
    sh(&format!(
        "cd {}; mkdir x; tar -C x --xattrs --xattrs-include='*' -xpf o.tar; getfacl -np x/f | grep -q '^user:7:r--'",
        stack.dir.path().display()
    ));
}

/// Writes to the sandbox when the metadata were read.
struct Writer<'a> {
    mount: &'a Path,
    script: &'static str,
    copies: Option<Copies>,
    rechecks: u32,
}

impl<'a> Writer<'a> {
    fn new(mount: &'a Path, script: &'static str) -> Self {
        Self { mount, script, copies: None, rechecks: 0 }
    }
}

impl LiveHooks for Writer<'_> {
    fn copies(&mut self) -> Option<Copies> {
        self.copies.take()
    }

    fn metadata_read(&mut self) -> Result<(), DiffError> {
        sh(&format!("fsfreeze -u {0}; cd {0}/upper; sleep 0.05; {1}", self.mount.display(), self.script));
        Ok(())
    }

    fn before_recheck(&mut self) -> Result<(), DiffError> {
        self.rechecks += 1;
        sh(&format!("fsfreeze -f {}", self.mount.display()));
        Ok(())
    }
}

/// Thaws a mount whatever happens.
struct Thaw<'a>(&'a Path);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0).stderr(std::process::Stdio::null()).status();
    }
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn a_mounted_sandbox_is_a_snapshot_or_an_error() {
    let mut stack = Stack::new();
    stack.layer("head -c 200000 /dev/urandom > a; echo small > b; mkdir d");
    let before = stack.export(0, None).0;
    let at = stack.path("live");
    let _mount = Mount::image(&at, &stack.image(0), "");
    for (script, changes) in [
        ("true", None),
        ("echo new > d/added; chmod 700 d; rm d/added", None),
        ("printf z | dd of=a bs=1 seek=100000 conv=notrunc status=none", Some("a")),
        ("rm a", Some("a")),
        ("echo c > c", None),
    ] {
        sh(&format!("fsfreeze -f {}", at.display()));
        let _thaw = Thaw(&at);
        let mut sources = stack.sources(0);
        sources[0].live = true;
        let mut tar = Vec::new();
        let result =
            export(&sources, None, &ExportOptions::default(), &mut Writer::new(&at, script), &mut tar);
        match (result, changes) {
            (Ok(_), None) => {}
            (Err(DiffError::ChangedWhileReading { names, .. }), Some(want)) => {
                assert_eq!(names, format!("{want:?}"));
            }
            (other, _) => panic!("{script}: {other:?}"),
        }
        if script == "true" {
            assert!(tar == before);
        }
    }
}

/// What is to be copied, with generous limits.
fn copies(since: i64, changed: Vec<LiveFile>) -> Copies {
    let (scratch, most_time) = (Arc::new(MemDisk::new()), Duration::from_mins(5));
    Copies { scratch, since, changed, most_bytes: 1 << 30, most_time }
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn what_changed_lately_is_copied_while_it_stands_still() {
    const NEVER: i64 = i64::MAX;
    const LONG: Duration = Duration::from_mins(5);
    let mut stack = Stack::new();
    stack.layer(
        "head -c 200000 /dev/urandom > a; ln a other; echo small > b; mkdir d; : > empty; truncate -s 9M hole
         truncate -s 3M sparse; head -c 70000 /dev/urandom | dd of=sparse bs=1000 seek=1500 conv=notrunc status=none",
    );
    let at = stack.path("live");
    let _mount = Mount::image(&at, &stack.image(0), "");
    let export = |hooks: &mut Writer<'_>| {
        sh(&format!("fsfreeze -f {}", at.display()));
        let _thaw = Thaw(&at);
        let mut sources = stack.sources(0);
        sources[0].live = true;
        let mut tar = Vec::new();
        export(&sources, None, &ExportOptions::default(), hooks, &mut tar).map(|_| tar)
    };
    let inode = |name: &str| {
        let number = sh(&format!("stat -c %i {}/upper/{name}", at.display()));
        LiveFile { layer: 0, inode: number.trim().parse().unwrap() }
    };
    let (a, sparse) = (inode("a"), inode("sparse"));
    // Nothing is copied, or too little: an error that names what the next attempt should copy.
    let limited = |most_bytes, most_time| Copies { most_bytes, most_time, ..copies(0, vec![]) };
    let cases = [
        (None, "\"a\", \"sparse\" changed while it was read", vec![a, sparse]),
        (Some(copies(NEVER, vec![])), "the next attempt copies it", vec![a, sparse]),
        (Some(copies(NEVER, vec![sparse])), "\"a\" changed while it was read", vec![a]),
        (Some(limited(100_000, LONG)), "cannot be copied", vec![a]),
        (Some(limited(1 << 30, Duration::ZERO)), "the next attempt copies it", vec![a, sparse]),
    ];
    for (copies, text, expected) in cases {
        let mut hooks = Writer { copies, ..Writer::new(&at, "touch a sparse") };
        let error = export(&mut hooks).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        let DiffError::ChangedWhileReading { files, .. } = error else { panic!("{error}") };
        assert_eq!((files, hooks.rechecks), (expected, 1), "{text}");
    }
    // All is copied, or named and just small enough: there is nothing to be looked at again, whatever is done.
    let quiet = export(&mut Writer::new(&at, "true")).unwrap();
    let small = Copies { most_bytes: 200_000 + 100_000, ..copies(NEVER, vec![a, sparse]) };
    for copies in [copies(0, vec![]), copies(NEVER, vec![a, sparse]), small] {
        let mut hooks = Writer { copies: Some(copies), ..Writer::new(&at, "true") };
        assert!(export(&mut hooks).unwrap() == quiet);
    }
    let change =
        "printf z | dd of=a bs=1 seek=100000 conv=notrunc status=none; echo more >> b; rm sparse hole
         echo full > empty; rmdir d; head -c 5M /dev/urandom > new";
    let mut hooks = Writer { copies: Some(copies(0, vec![])), ..Writer::new(&at, change) };
    assert!(export(&mut hooks).unwrap() == quiet, "the state of the freeze");
    assert_eq!(hooks.rechecks, 0);
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn live_layers_that_are_compared_by_their_bytes_are_looked_at_again_on_both_sides() {
    let mut stack = Stack::new();
    stack.layer("head -c 50000 /dev/zero > same; touch -d @1000000000 same; cp -p same twin; echo x > only");
    // Another stack with files of the same metadata: only their bytes tell.
    fs::copy(stack.image(0), stack.path("parent.img")).unwrap();
    let at = stack.path("live");
    let of_target = |live| LayerSource { live, ..stack.sources(0).remove(0) };
    let of_parent = |live| LayerSource {
        live,
        ..LayerSource::new(File::open(stack.path("parent.img")).unwrap(), LayerKind::Sandbox)
    };
    for (side, image) in [(true, stack.image(0)), (false, stack.path("parent.img"))] {
        let _mount = Mount::image(&at, &image, "");
        let target = [of_target(side)];
        let parent = [ParentLayer::Other(of_parent(!side))];
        let spec = Some(ParentSpec::Layers(&parent));
        // The time is put back, as those do who hide what they wrote.
        let write = "printf z | dd of=same conv=notrunc status=none; touch -d @1000000000 same";
        let look = |hooks: &mut Writer<'_>| {
            sh(&format!("fsfreeze -f {}", at.display()));
            let _thaw = Thaw(&at);
            let found = changes(&target, spec, &ExportOptions::default(), hooks).unwrap();
            found.iter().map(|c| String::from_utf8_lossy(&c.path).into_owned()).collect::<Vec<_>>()
        };
        let mut hooks = Writer::new(&at, "true");
        assert_eq!((look(&mut hooks), hooks.rechecks), (vec![], 1));
        assert_eq!(
            look(&mut Writer::new(&at, "touch -d @1000000000 same")),
            ["/same"],
            "it may have been changed"
        );
        sh(&format!("fsfreeze -f {}", at.display()));
        let thaw = Thaw(&at);
        let mut tar = Vec::new();
        let result = export(&target, spec, &ExportOptions::default(), &mut Writer::new(&at, write), &mut tar);
        drop(thaw);
        match result {
            Err(DiffError::ChangedWhileReading { names, .. }) => assert_eq!(names, "\"same\""),
            other => panic!("{other:?}"),
        }
        sh(&format!("cd {}/upper; head -c 50000 /dev/zero > same; touch -d @1000000000 same", at.display()));
    }
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn what_a_tar_of_layers_cannot_express_is_left_out_and_large_values_are_kept() {
    let mut stack = Stack::new();
    stack.layer(
        "mkdir d; echo x > d/.wh.trap; echo y > d/ok; setfattr -n user.huge -v $(printf 'A%.0s' {1..9000}) d/ok
         setfattr -n trusted.overlay.fake -v y d 2>/dev/null || true
         python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'",
    );
    let (tar, summary) = stack.export(0, None);
    assert_eq!(names(&tar, "tar"), ["d/", "d/ok"]);
    assert_eq!((summary.sockets, summary.hidden, summary.entries), (1, 1, 2));
    assert_eq!(summary.first_hidden.as_deref(), Some(&b"d/.wh.trap"[..]));
    let find = |needle: &[u8]| tar.windows(needle.len()).any(|w| w == needle);
    assert!(find(&[&b"SCHILY.xattr.user.huge="[..], &[b'A'; 9000], b"\n"].concat()));
    assert!(!find(b"trusted.overlay"));
}
