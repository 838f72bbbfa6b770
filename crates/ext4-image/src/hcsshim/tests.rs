//! Limits and misuse. The bytes themselves are held to the tool in `tests/hcsshim`.

use super::*;
use crate::{Timestamp, writer::ImageSummary};
use disk_io::MemDisk;

fn attributes() -> Attributes {
    let mtime = Timestamp { secs: 1_500_000_000, nanos: 0 };
    Attributes { permissions: 0o644, uid: 1, gid: 2, mtime, atime: None, ctime: None }
}

/// Data, an xattr block, a long symlink and a directory.
fn small(options: HcsshimOptions) -> Result<ImageSummary> {
    let mut w = HcsshimWriter::new(MemDisk::new(), options)?;
    let root = w.root();
    let xattr = Xattr { name: b"user.big".to_vec(), value: vec![1; 1000] };
    let file = w.create(root, b"file", NodeKind::File, 20_000, &attributes(), vec![xattr])?;
    w.begin_file(file)?;
    w.write_data(5000, &[7; 100], &mut |_| ())?;
    w.end_file()?;
    let target = vec![b't'; 200];
    w.create(root, b"link", NodeKind::Symlink { target }, 0, &attributes(), Vec::new())?;
    w.create(root, b"dir", NodeKind::Directory, 0, &attributes(), Vec::new())?;
    w.finish()
}

#[test]
fn a_full_disk_is_an_error_at_every_limit() {
    let options = HcsshimOptions::new(LCOW_MAX_DISK);
    let whole = small(options).unwrap().image_bytes;
    for max_image_bytes in (0..whole).step_by(1000) {
        let result = small(HcsshimOptions { max_image_bytes, ..options });
        assert!(matches!(result, Err(Ext4Error::Full { .. })), "{max_image_bytes} of {whole}: {result:?}");
    }
    assert_eq!(small(HcsshimOptions { max_image_bytes: whole, ..options }).unwrap().image_bytes, whole);
}

#[test]
fn misuse_is_an_error() {
    let mut w = HcsshimWriter::new(MemDisk::new(), HcsshimOptions::default()).unwrap();
    let root = w.root();
    let usage = |result: Result<()>| assert!(matches!(result, Err(Ext4Error::Usage { .. })), "{result:?}");
    usage(w.begin_file(root));
    usage(w.write_data(0, b"x", &mut |_| ()));
    usage(w.end_file());
    let file = w.create(root, b"f", NodeKind::File, 3, &attributes(), Vec::new()).unwrap();
    w.begin_file(file).unwrap();
    usage(w.begin_file(file));
    usage(w.create(root, b"g", NodeKind::File, 3, &attributes(), Vec::new()).map(|_| ()));
    usage(w.write_data(0, b"four", &mut |_| ()));
    w.write_data(0, b"ab", &mut |_| ()).unwrap();
    usage(w.write_data(1, b"c", &mut |_| ()));
    usage(w.finish().map(|_| ()));
}
