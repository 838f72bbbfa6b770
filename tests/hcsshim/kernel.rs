//! Images of both profiles as the kernel mounts them: the same tree, but for `lost+found`.

use crate::{
    image::{Image, in_hcsshim, make, text},
    profile,
    tars::{Wildness, random},
    tree::{Tree, assert_same, snapshot},
};
use ext4_image::{hcsshim::LCOW_MAX_DISK, testing::loop_mount};
use layer_codec::apply::ApplyOptions;
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A loop mount, gone when dropped, also while a test fails.
pub(crate) struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // The loop device goes with its last user.
        let done = Command::new("umount").arg(&self.0).status();
        let done = done.is_ok_and(|s| s.success());
        assert!(done || std::thread::panicking(), "{} cannot be unmounted", self.0.display());
    }
}

impl Mounted {
    /// Mounts a file on a folder in `folder`.
    pub(crate) fn new(disk: &Path, folder: &Path, options: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test mounts file systems: run it as root");
        let point = folder.join("mnt");
        fs::create_dir_all(&point).expect("a folder");
        loop_mount(disk, &point, options, &[]);
        Self(point)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

pub(crate) fn mount(image: &Image) -> Mounted {
    Mounted::new(&image.path(), image.folder(), "ro")
}

pub(crate) fn tree(image: &Image) -> Tree {
    snapshot(mount(image).path())
}

#[test]
fn the_kernel_finds_what_it_finds_in_a_default_image() {
    for (seed, inline) in [(4, false), (6, true), (8, false)] {
        let tar = random(seed, 80, Wildness::Inside);
        let made = |p| make(&tar, p).unwrap_or_else(|e| panic!("seed {seed}: {}", text(&e)));
        let hcsshim = made(in_hcsshim(profile(LCOW_MAX_DISK, true, inline)));
        let default = made(ApplyOptions::default());
        let mut found = tree(&hcsshim);
        assert!(found.remove("lost+found").is_some(), "hcsshim's images have one");
        // That tool also keeps a symlink's set-id and sticky bits, which mean nothing.
        found.values_mut().filter(|n| n.mode & 0o170_000 == 0o120_000).for_each(|n| n.mode &= !0o7000);
        let mut expected = tree(&default);
        settle(&mut found);
        settle(&mut expected);
        assert_same(&format!("seed {seed}"), &found, &expected);
    }
}

/// Leaves out in what the profiles differ (docs/tar-rules.md): that tool passes over what a hard link's header says of its
/// file, and keeps `user.*` attributes of what is neither file nor folder, which Linux would refuse.
fn settle(tree: &mut Tree) {
    /// Kind of a file in its mode.
    const KIND: u32 = 0o170_000;
    let linked: HashSet<String> =
        tree.iter().filter_map(|(name, n)| Some([name.clone(), n.same_as.clone()?])).flatten().collect();
    assert!(linked.len() < tree.len() / 2, "most of the tree has one name only");
    for (name, node) in tree {
        if linked.contains(name) {
            (node.mode, node.owner, node.mtime) = (node.mode & KIND, (0, 0), (0, 0));
            node.xattrs.clear();
        }
        if ![0o100_000, 0o040_000].contains(&(node.mode & KIND)) {
            node.xattrs.retain(|attribute, _| !attribute.starts_with("user."));
        }
    }
}
