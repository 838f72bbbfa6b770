//! The canonical tar as other readers see it, and as our own apply takes it back.

use super::*;
use crate::apply::{ApplyOptions, NoLowers, apply};
use disk_io::MemDisk;
use ext4_image::Ext4;
use std::io::Read;

/// A sandbox with what readers stumble over.
fn sparse_files() -> Stack {
    let mut stack = Stack::new();
    stack.layer(
        "printf head > app.db; truncate -s 1M app.db; printf tail >> app.db
         truncate -s 550G lastlog; printf last | dd of=lastlog bs=1 seek=292000000000 conv=notrunc status=none
         truncate -s 16M all-hole; printf x > holes; truncate -s 24M holes; printf y >> holes",
    );
    stack
}

/// What a file of a merged directory holds.
fn content(name: &str) -> Vec<u8> {
    let mut bytes = b"head".to_vec();
    assert_eq!(name, "app.db");
    bytes.resize(1 << 20, 0);
    bytes.extend_from_slice(b"tail");
    bytes
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn a_file_with_a_hole_comes_out_right_from_readers_that_know_no_sparse_files() {
    let stack = sparse_files();
    let (tar, _) = stack.export(0, None);
    assert!(tar.len() < 4 << 20, "{} bytes", tar.len());
    let file = stack.path("all.tar");
    fs::write(&file, &tar).unwrap();
    let want = content("app.db");
    for tool in ["busybox tar", "tar", "bsdtar"] {
        let out = stack.path(&format!("out-{}", tool.replace(' ', "-")));
        fs::create_dir(&out).unwrap();
        sh(&format!("{tool} -xf {} -C {} app.db", file.display(), out.display()));
        assert!(fs::read(out.join("app.db")).unwrap() == want, "{tool}");
    }
    let mut archive = tar::Archive::new(&tar[..]);
    let mut seen = false;
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().to_str() == Some("app.db") {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            assert!(bytes == want, "rust's tar: {} bytes", bytes.len());
            seen = true;
        }
    }
    assert!(seen);
    // Those that would fill a disk are sparse: readers that do know them give the same file.
    sh(&format!(
        "cd {0}; mkdir big; tar -C big -xSf all.tar lastlog all-hole holes
         test $(stat -c %s big/lastlog) = $((550 << 30)); test $(du -k big/lastlog | cut -f1) -lt 100
         test \"$(dd if=big/lastlog bs=4 skip=73000000000 count=1 status=none)\" = last
         test $(stat -c %s big/holes) = $(((24 << 20) + 1)); test \"$(tail -c 1 big/holes)\" = y",
        stack.dir.path().display()
    ));
    let sparse = |name: &[u8]| {
        let record = [b"GNU.sparse.name=", name, b"\n"].concat();
        tar.windows(record.len()).any(|w| w == record)
    };
    assert_eq!([&b"app.db"[..], b"lastlog", b"all-hole", b"holes"].map(sparse), [false, true, true, true]);
}

/// Applies a tar; what the image holds of `name`.
fn applied(tar: &[u8], name: &[u8]) -> (Vec<ext4_image::Xattr>, u64) {
    let (image, record) = (MemDisk::new(), MemDisk::new());
    let options = ApplyOptions::default();
    apply(tar, &image, &record, &mut NoLowers, &options).unwrap();
    let fs = Ext4::open(&image).unwrap();
    let ino = fs.lookup(&fs.inode(fs.root()).unwrap(), name).unwrap().unwrap();
    let inode = fs.inode(ino).unwrap();
    let mut xattrs = fs.xattrs(&inode).unwrap();
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    (xattrs, inode.size)
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn apply_takes_what_both_versions_write_and_attributes_keep_their_names() {
    let mut stack = sparse_files();
    stack.layer(
        r#"touch odd; for name in 'a=b' '=' 'c%3Dd' 'e%=f' 'sp ace' $'new\nline' ü '%25'; do
              setfattr -n "user.$name" -v 0x00ff0a3d odd; done"#,
    );
    let names = |xattrs: &[ext4_image::Xattr]| {
        xattrs.iter().map(|x| String::from_utf8(x.name.clone()).unwrap()).collect::<Vec<_>>()
    };
    let mut want =
        ["a=b", "=", "c%3Dd", "e%=f", "sp ace", "new\nline", "ü", "%25"].map(|n| format!("user.{n}"));
    want.sort();
    let (tar, _) = stack.export(1, Some(ParentSpec::Own));
    let (xattrs, _) = applied(&tar, b"odd");
    assert_eq!(names(&xattrs), want);
    assert!(xattrs.iter().all(|x| x.value == [0, 0xff, 0x0a, 0x3d]));
    // bsdtar reads them, too.
    fs::write(stack.path("odd.tar"), &tar).unwrap();
    let listed = sh(&format!(
        "cd {}; mkdir o; bsdtar -C o --xattrs -xf odd.tar; getfattr -m - -d o/odd --absolute-names | grep -c '^user'",
        stack.dir.path().display()
    ));
    assert_eq!(listed.trim(), "8");
    let (one, _) = stack.export_as(Version::V1, 1, Some(ParentSpec::Own));
    assert_eq!(applied(&one, b"odd").0.len(), 8);
    for version in [Version::V1, Version::V2] {
        let (tar, _) = stack.export_as(version, 0, None);
        for (name, size) in [("app.db", (1 << 20) + 4), ("all-hole", 16 << 20), ("holes", (24 << 20) + 1)] {
            assert_eq!(applied(&tar, name.as_bytes()).1, size, "{name}");
        }
    }
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn an_opaque_root_ends_the_stack_in_every_diff() {
    let layer = |entries: &[(&str, &[u8])]| {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, data) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *data).unwrap();
        }
        let (image, record) = (MemDisk::new(), MemDisk::new());
        let options = ApplyOptions { footer: false, ..ApplyOptions::default() };
        apply(&tar.into_inner().unwrap()[..], &image, &record, &mut NoLowers, &options).unwrap();
        LayerSource::new(image, LayerKind::Applied)
    };
    let stack = [
        layer(&[("top", b"1")]),
        layer(&[(".wh..wh..opq", b""), ("d/new", b"22"), ("f", b"1")]),
        layer(&[("d/old", b"1"), ("f", b"1"), ("gone", b"1")]),
    ];
    let paths = |parent| {
        let all = changes(&stack[1..], parent, &ExportOptions::default(), &mut NoHooks).unwrap();
        all.iter().map(|c| format!("{:?} {}", c.kind, String::from_utf8_lossy(&c.path))).collect::<Vec<_>>()
    };
    assert_eq!(
        paths(Some(ParentSpec::Own)),
        ["Modified /d", "Added /d/new", "Deleted /d/old", "Modified /f", "Deleted /gone"]
    );
    assert_eq!(paths(None), ["Added /d", "Added /d/new", "Added /f"]);
    let export_of = |layers: &[LayerSource<MemDisk>], parent| {
        let mut tar = Vec::new();
        export(layers, parent, &ExportOptions::default(), &mut NoHooks, &mut tar).unwrap();
        names(&tar, "tar")
    };
    assert_eq!(export_of(&stack[1..], Some(ParentSpec::Own)), [".wh..wh..opq", "d/", "d/new", "f"]);
    // Squashed, and against a distant ancestor.
    assert_eq!(export_of(&stack, None), ["d/", "d/new", "f", "top"]);
    assert_eq!(
        export_of(&stack, Some(ParentSpec::Layers(&[ParentLayer::OfTarget(2)]))),
        ["d/", "d/new", "d/.wh.old", ".wh.gone", "top"]
    );
    assert_eq!(diff_size(&stack, None, &ExportOptions::default(), &mut NoHooks).unwrap(), 4);
}
