//! Images that are damaged, or that lie: a pull fails with its reason, nothing stays, and a good image works after it.

use crate::{
    everyday::{assert_empty, everywhere, remove_everything},
    image::{self, Image, Layer, Packing},
    node::{Node, Release, Snapshotter},
    registry::Registry,
    tarball::{self, Entry},
};

everywhere! { damaged_layers_fail_and_leave_nothing }

/// A layer whose blob is what somebody made of a good one; the image names the good one's diffID.
fn damaged(packing: Packing, damage: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Layer {
    let good = Layer::new(vec![Entry::file("data/a", image::random_bytes(5, 300_000))], packing);
    Layer { blob: damage(good.blob.clone()), ..good }
}

/// Every image here has a good lowest layer, and one of these on it.
fn cases() -> Vec<(&'static str, Layer)> {
    let cut = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.len() / 2);
        bytes
    };
    let other = tarball::build(&[Entry::file("data/a", "other bytes")]);
    let checksum = |mut bytes: Vec<u8>| {
        bytes[110] ^= 1;
        bytes
    };
    let (plain, gzip, zstd) = (Packing::Plain, Packing::Gzip, Packing::Zstd);
    vec![
        ("cut-gzip", damaged(gzip, cut)),
        ("cut-zstd", damaged(zstd, cut)),
        ("cut-tar", damaged(plain, cut)),
        ("header-checksum", damaged(plain, checksum)),
        ("noise", damaged(plain, |_| image::random_bytes(6, 64 << 10))),
        ("noise-after-gzip", damaged(gzip, |b| [b, image::random_bytes(7, 5000)].concat())),
        ("another-diff-id", damaged(plain, |_| other.clone())),
        (
            "another-diff-id-gzip",
            Layer { blob: Layer::new(vec![Entry::dir("x/")], gzip).blob, ..damaged(gzip, |b| b) },
        ),
        // More bytes behind the end of the archive belong to the layer, and so to its digest.
        ("bytes-behind-the-end", damaged(plain, |b| [b, vec![0; 10_240]].concat())),
    ]
}

fn damaged_layers_fail_and_leave_nothing(release: Release, snapshotter: Snapshotter) {
    let node = Node::start(release, snapshotter);
    let registry = Registry::start();
    let small = image::small(4);
    for (case, layer) in cases() {
        // containerd's own differ has no complaint about bytes that no gzip member begins with.
        if case == "noise-after-gzip" && snapshotter == Snapshotter::Overlayfs {
            continue;
        }
        let name = registry.offer(case, &Image::new(vec![small.layers[0].clone(), layer]));
        let pull = ["images", "pull", "--plain-http", "--snapshotter", snapshotter.name(), &name];
        for attempt in 1..=2 {
            let failure = node.try_ctr(&pull).expect_failure();
            assert!(!failure.contains("panic"), "{case}, attempt {attempt}: {failure}");
        }
        let _ = node.try_ctr(&["images", "rm", "--sync", &name]);
    }
    // A registry that stops in the middle of a blob, and is well later.
    let name = registry.offer("small", &small);
    let blob = image::digest(&small.layers[1].blob);
    registry.cut(&blob, 30_000);
    let pull = ["images", "pull", "--plain-http", "--snapshotter", snapshotter.name(), &name];
    node.try_ctr(&pull).expect_failure();
    assert!(registry.sent(&[blob]) > 0, "the cut blob was never asked for");
    registry.heal();
    node.ctr(&pull);
    small.tree().assert_same(&node.tree_of_image(&name), "a good image after all the damaged ones");
    assert_eq!(node.ctr(&["run", "--rm", &name, "once", "/bin/echo", "works"]), "works");
    node.release_leases();
    remove_everything(&node);
    assert_empty(&node);
}
