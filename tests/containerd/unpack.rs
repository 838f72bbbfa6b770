//! The differ by itself, with a double of containerd's content store that serves blobs as a test wants them: parallel
//! unpack as containerd 2.2 and later do it, blobs that lie, calls that are given up, service VMs that hang.
//!
//! ```text
//!   test ─ Prepare ""  ×n ─► the product ◄─ content ─ Store
//!        ─ Apply       ×n, at once
//!        ─ Commit      in order, with parents
//! ```

use crate::{
    client::{Client, assert_code, descriptor},
    command::{children, wait_until},
    content::{Serving, Store},
    everyday::assert_no_debris,
    image::{self, Image, LAYER, Layer, Packing},
    node::{Node, Snapshotter},
    tarball::{self, Entry},
    tree::Tree,
};
use containerd_api::types::{Descriptor, Mount};
use rustix::process::{Pid, Signal, kill_process};
use std::{fs, sync::Arc, thread, time::Duration};
use tokio::sync::Barrier;
use tonic::Code;

/// Longest wait for what the product does after its answer.
const SOON: Duration = Duration::from_secs(20);
/// Longest time of some calls that have nothing to wait for, on a busy machine: what hangs takes far longer.
const AT_ONCE: Duration = Duration::from_secs(30);

/// The product without a containerd, its double, and a client.
struct Bench {
    node: Node,
    store: Store,
    client: Client,
}

impl Bench {
    fn start() -> Self {
        let node = Node::without_containerd();
        let store = Store::listen(&node.containerd_socket());
        let client = Client::new(&node.lcow_socket(), Snapshotter::Lcow.name(), node.namespace());
        Self { node, store, client }
    }

    /// Serves a layer; its descriptor.
    fn offer(&self, layer: &Layer, serving: Serving) -> Descriptor {
        let digest = image::digest(&layer.blob);
        self.store.put(&digest, &layer.blob, serving);
        descriptor(&layer.media_type, &digest, layer.blob.len() as i64)
    }

    /// Prepare, Apply, Commit, one layer after the other, as all releases do; the name of the top.
    fn unpack_in_order(&self, image: &Image) -> String {
        let mut parent = String::new();
        for (chain, layer) in image.chain_ids().into_iter().zip(&image.layers) {
            let key = format!("extract-1 {chain}");
            let mounts = self.client.prepare(&key, &parent, &[]).expect("prepare");
            let applied = self.client.apply(self.offer(layer, Serving::Whole), mounts).expect("apply");
            assert_eq!(applied.digest, layer.diff_id());
            self.client.commit(&chain, &key, "", &[]).expect("commit");
            parent = chain;
        }
        parent
    }

    /// As containerd 2.2 and later do, if all layers may be unpacked at one time. Each blob is served only when all are
    /// asked for: Applies that waited for each other would never end.
    fn unpack_at_once(&self, image: &Image, with_parent_chain_id: bool) -> String {
        let chains = image.chain_ids();
        let barrier = Arc::new(Barrier::new(chains.len()));
        let prepared: Vec<Vec<Mount>> = (0..chains.len())
            .map(|n| {
                let mut labels = vec![("containerd.io/snapshot.ref", chains[n].as_str())];
                if with_parent_chain_id && n > 0 {
                    labels.push(("containerd.io/snapshot/parent-chain-id", &chains[n - 1]));
                }
                self.client.prepare(&format!("extract-2 {}", chains[n]), "", &labels).expect("prepare")
            })
            .collect();
        thread::scope(|scope| {
            let applies: Vec<_> = prepared
                .into_iter()
                .zip(&image.layers)
                // The lowest last: the others must not need it to begin.
                .rev()
                .map(|(mounts, layer)| {
                    let blob = self.offer(layer, Serving::Together(Arc::clone(&barrier)));
                    scope.spawn(move || (self.client.apply(blob, mounts), layer.diff_id()))
                })
                .collect();
            for apply in applies {
                let (applied, diff_id) = apply.join().expect("a thread");
                assert_eq!(applied.expect("apply").digest, diff_id);
            }
        });
        for (n, chain) in chains.iter().enumerate() {
            let parent = if n == 0 { "" } else { &chains[n - 1] };
            self.client.commit(chain, &format!("extract-2 {chain}"), parent, &[]).expect("commit");
        }
        chains.last().expect("a layer").clone()
    }

    /// What a container on a snapshot sees.
    fn tree(&self, name: &str) -> Tree {
        let mounts = self.client.prepare("look", name, &[]).expect("prepare");
        let root = self.node.mount_as_answered(&mounts);
        let tree = Tree::of_folder(&root);
        self.node.unmount(&root);
        self.client.remove("look").expect("remove");
        tree
    }

    /// The difference of a committed snapshot to its parent, as it was written to the content store.
    fn diff(&self, name: &str) -> Vec<u8> {
        let parent = self.client.stat(name).expect("stat").parent;
        let left =
            if parent.is_empty() { Vec::new() } else { self.client.view("left", &parent).expect("view") };
        let right = self.client.view("right", name).expect("view");
        let blob = self.client.diff(left, right, LAYER).expect("diff");
        self.client.remove("right").expect("remove");
        if !parent.is_empty() {
            self.client.remove("left").expect("remove");
        }
        self.store.assert_leased(&blob.digest);
        let bytes = self.store.blob(&blob.digest);
        assert_eq!(image::digest(&bytes), blob.digest);
        assert_eq!(
            self.store.labels(&blob.digest)["containerd.io/uncompressed"],
            blob.digest,
            "of a plain layer"
        );
        bytes
    }

    /// Digests of the images of layers on disk, sorted.
    fn images_on_disk(&self) -> Vec<String> {
        let files = self.node.layers().into_iter().map(|l| self.node.home().join(l).join("layer.vhd"));
        let mut digests: Vec<String> =
            files.filter_map(|f| fs::read(f).ok()).map(|b| image::digest(&b)).collect();
        digests.sort();
        digests
    }

    /// Removes all snapshots, children first; then nothing is left.
    fn assert_leaves_nothing(&self) {
        for _pass in 0..200 {
            let left = self.client.list(&[]).expect("list");
            let leaf = left.iter().find(|s| !left.iter().any(|other| other.parent == s.name));
            let Some(leaf) = leaf else { break };
            self.client.remove(&leaf.name).expect("remove of a leaf");
        }
        self.client.cleanup().expect("cleanup");
        assert_no_debris(&self.node);
    }
}

#[test]
fn layers_are_unpacked_in_parallel_and_are_the_same() {
    let image = image::full();
    let one = Bench::start();
    let top = one.unpack_in_order(&image);
    image.tree().assert_same(&one.tree(&top), "unpacked in order");
    let other = Bench::start();
    let top = other.unpack_at_once(&image, true);
    image.tree().assert_same(&other.tree(&top), "unpacked at once, parents known");
    assert_eq!(other.images_on_disk(), one.images_on_disk(), "images of layers");
    for (chain, layer) in image.chain_ids().iter().zip(&image.layers) {
        assert!(other.diff(chain) == layer.tar, "the diff of {chain} is not its layer");
    }
    one.assert_leaves_nothing();
    other.assert_leaves_nothing();
}

#[test]
fn without_parents_chain_ids_implied_directories_are_of_root() {
    let image = image::full();
    let bench = Bench::start();
    let top = bench.unpack_at_once(&image, false);
    // What containerd 2.2's overlayfs has there: the applier has seen no parent.
    let mut expected = image.tree();
    for path in ["/tmp", "/data", "/data/kept", "/data/attributes", "/data/nested"] {
        let described = image.layers.iter().rev().find_map(|layer| {
            let (name, folder) = (path.trim_start_matches('/'), format!("{}/", path.trim_start_matches('/')));
            let names = |e: &Entry| e.path == name.as_bytes() || e.path == folder.as_bytes();
            let inside = |e: &Entry| e.path.starts_with(folder.as_bytes());
            let entry = layer.entries.iter().find(|e| names(e));
            (entry.is_some() || layer.entries.iter().any(inside)).then_some(entry.is_some())
        });
        if described == Some(false) {
            expected.change(path, |node| {
                (node.mode, node.uid, node.gid) = (0o755, 0, 0);
                node.xattrs.clear();
            });
        }
    }
    expected.assert_same(&bench.tree(&top), "unpacked at once, parents unknown");
    bench.assert_leaves_nothing();
}

#[test]
fn links_into_lower_layers_need_their_parent() {
    let linked = vec![Entry::hard_link("data/link", "bin/busybox")];
    let image =
        Image::new(vec![Layer::new(image::shell(), Packing::Gzip), Layer::new(linked, Packing::Plain)]);
    let bench = Bench::start();
    // In order, the parent is known at Prepare: the file is copied up.
    let top = bench.unpack_in_order(&image);
    let tree = bench.tree(&top);
    assert_eq!(tree.0[b"/data/link".as_slice()].content, tree.0[b"/bin/busybox".as_slice()].content);
    // Else it is refused by name, and nothing waits for it.
    let blob = bench.offer(&image.layers[1], Serving::Whole);
    let mounts = bench.client.prepare("extract-3 parentless", "", &[]).expect("prepare");
    let refusal = bench.client.apply(blob, mounts).expect_err("a link to nowhere");
    assert!(refusal.message().contains("busybox"), "{refusal}");
    assert_ne!(refusal.code(), Code::Unimplemented, "no other differ may try");
    bench.client.remove("extract-3 parentless").expect("remove");
    bench.assert_leaves_nothing();
}

#[test]
fn a_layer_whose_parents_are_there_is_read_once() {
    let image = image::full();
    let (chains, implied) = (image.chain_ids(), 3);
    let (layer, chain) = (&image.layers[implied], &chains[implied]);
    let labels = [
        ("containerd.io/snapshot.ref", chain.as_str()),
        ("containerd.io/snapshot/parent-chain-id", &chains[implied - 1]),
    ];
    let bench = Bench::start();
    let below = Image::new(image.layers[..implied].to_vec());
    let parent = bench.unpack_in_order(&below);
    let mounts = bench.client.prepare("extract-9", "", &labels).expect("prepare");
    let applied = bench.client.apply(bench.offer(layer, Serving::Whole), mounts).expect("apply");
    assert_eq!(applied.digest, layer.diff_id());
    bench.client.commit(chain, "extract-9", &parent, &[]).expect("commit");
    assert_eq!(bench.store.reads(&image::digest(&layer.blob)), 1);
    let whole = Image::new(image.layers[..=implied].to_vec());
    whole.tree().assert_same(&bench.tree(chain), "directories of lower layers");
    bench.assert_leaves_nothing();
}

#[test]
fn a_blob_that_is_deleted_before_its_second_read_is_an_error() {
    let image = image::full();
    let (chains, implied) = (image.chain_ids(), 3);
    let layer = &image.layers[implied];
    let labels = [
        ("containerd.io/snapshot.ref", chains[implied].as_str()),
        ("containerd.io/snapshot/parent-chain-id", &chains[implied - 1]),
    ];
    let bench = Bench::start();
    let digest = image::digest(&layer.blob);
    let blob = bench.offer(layer, Serving::Whole);
    let mounts = bench.client.prepare("extract-9", "", &labels).expect("prepare");
    thread::scope(|scope| {
        let applying = scope.spawn(|| bench.client.apply(blob, mounts));
        wait_until("the apply to wait for the layers below", SOON, || {
            bench.node.room.log_text("lcow").contains("waiting for them").then_some(())
        });
        bench.store.delete(&digest);
        bench.unpack_in_order(&Image::new(image.layers[..implied].to_vec()));
        let refusal = applying.join().expect("a thread").expect_err("the blob is gone");
        assert_eq!(refusal.code(), Code::NotFound, "{refusal}");
        assert!(refusal.message().contains(&digest), "{refusal}");
    });
    assert!(bench.client.commit("cut", "extract-9", "", &[]).is_err(), "a layer that was cut has a name");
    bench.assert_leaves_nothing();
}

/// An Apply that must fail, and what must be true after it.
fn refused(bench: &Bench, what: &str, blob: Descriptor) {
    let key = format!("extract-4 {what}");
    let mounts = bench.client.prepare(&key, "", &[]).expect("prepare");
    let failure = bench.client.apply(blob, mounts).expect_err(what);
    assert_ne!(failure.code(), Code::Unimplemented, "{what}: no other differ may try: {failure}");
    assert!(!failure.message().is_empty() && !failure.message().contains("panick"), "{what}: {failure}");
    // Never a part of a layer under a name.
    let commit = bench.client.commit("bad", &key, "", &[]);
    assert!(commit.is_err(), "{what} was committed");
    bench.client.remove(&key).expect("remove");
}

#[test]
fn blobs_that_lie_or_end_early_are_refused() {
    let bench = Bench::start();
    let good = Layer::new(vec![Entry::file("data/a", image::random_bytes(8, 2_500_000))], Packing::Gzip);
    let digest = image::digest(&good.blob);
    let size = good.blob.len() as i64;
    let gzip = &good.media_type;
    for (what, serving) in [
        ("short", Serving::Short(1_200_000)),
        ("empty", Serving::Short(0)),
        ("failing", Serving::Fails(1_200_000)),
        ("failing at once", Serving::Fails(0)),
    ] {
        bench.store.put(&digest, &good.blob, serving);
        refused(&bench, what, descriptor(gzip, &digest, size));
    }
    bench.store.put(&digest, &good.blob, Serving::Whole);
    for wrong in [size - 1, size + 1, 0, -1, i64::MAX] {
        // Size 0 is what some clients send who do not know it; it is for the product to accept or refuse.
        if wrong != 0 {
            refused(&bench, &format!("a size of {wrong}"), descriptor(gzip, &digest, wrong));
        }
    }
    let mut other = good.blob.clone();
    other[1_000_000] ^= 1;
    bench.store.put(&digest, &other, Serving::Whole);
    refused(&bench, "other bytes than the digest's", descriptor(gzip, &digest, size));
    for digest in
        ["", "sha256:", "sha256:../../../etc/passwd", "md5:d41d8cd98f00b204e9800998ecf8427e", "nonsense"]
    {
        refused(&bench, &format!("the digest {digest:?}"), descriptor(gzip, digest, size));
    }
    let missing = image::digest(b"missing");
    refused(&bench, "a blob that is not there", descriptor(gzip, &missing, size));
    // A gigabyte of zeros in a megabyte, which the file's tar header does not announce.
    let zeros = vec![0; 64 << 20];
    let bomb = Layer::packed(
        zeros.clone(),
        zstd::encode_all(&zeros[..], 3).expect("zstd"),
        &format!("{LAYER}+zstd"),
    );
    let blob = bench.offer(&bomb, Serving::Whole);
    let mounts = bench.client.prepare("extract-5 zeros", "", &[]).expect("prepare");
    // Zeros are the end of an archive: an empty layer, whose diffID is that of all of them.
    match bench.client.apply(blob, mounts) {
        Ok(applied) => assert_eq!((applied.digest, applied.size), (bomb.diff_id(), zeros.len() as i64)),
        Err(status) => assert_ne!(status.code(), Code::Unimplemented, "{status}"),
    }
    bench.client.remove("extract-5 zeros").expect("remove");

    let encrypted = format!("{LAYER}+gzip+encrypted");
    let mounts = bench.client.prepare("extract-6 encrypted", "", &[]).expect("prepare");
    bench.store.put(&digest, &good.blob, Serving::Whole);
    let blob = descriptor(&encrypted, &digest, size);
    assert_code(bench.client.apply(blob, mounts.clone()), Code::Unimplemented, "an encrypted layer");
    // The key is as good as before.
    let applied =
        bench.client.apply(descriptor(gzip, &digest, size), mounts).expect("a good layer after all");
    assert_eq!((applied.digest, applied.size), (good.diff_id(), good.tar.len() as i64));
    assert_eq!(applied.media_type, LAYER);
    bench.assert_leaves_nothing();
}

#[test]
fn a_call_that_is_given_up_ends_its_work() {
    let bench = Bench::start();
    let layer = Layer::new(vec![Entry::file("data/a", image::random_bytes(9, 2_500_000))], Packing::Plain);
    let blob = bench.offer(&layer, Serving::Hangs(1_200_000));
    let mounts = bench.client.prepare("extract-7", "", &[]).expect("prepare");
    let outcome = bench.client.apply_for(blob, mounts, Duration::from_secs(2));
    assert_code(outcome, Code::Cancelled, "an apply without an end");
    assert_eq!(bench.store.reads(&image::digest(&layer.blob)), 1);
    // A tail is no layer.
    let commit = bench.client.commit("cut", "extract-7", "", &[]);
    assert!(commit.is_err(), "a layer that was cut has a name");
    bench.client.remove("extract-7").expect("remove");
    let blob = bench.offer(&layer, Serving::Whole);
    let mounts = bench.client.prepare("extract-7", "", &[]).expect("prepare");
    assert_eq!(bench.client.apply(blob, mounts).expect("apply").digest, layer.diff_id());
    bench.client.commit("whole", "extract-7", "", &[]).expect("commit");
    let text = tarball::parse(&bench.diff("whole"));
    assert_eq!(text.len(), 1);
    bench.assert_leaves_nothing();
}

#[test]
fn names_answer_while_every_service_vm_hangs() {
    let bench = Bench::start();
    let top = bench.unpack_in_order(&image::small(20));
    bench.client.prepare("box", &top, &[]).expect("prepare");
    let layer = Layer::new(vec![Entry::file("data/a", image::random_bytes(9, 2_500_000))], Packing::Gzip);
    let blob = bench.offer(&layer, Serving::Hangs(1_000_000));
    let mounts = bench.client.prepare("extract-8", "", &[]).expect("prepare");
    thread::scope(|scope| {
        let hanging = scope.spawn(|| bench.client.apply(blob, mounts));
        wait_until("the apply to read", SOON, || {
            (bench.store.reads(&image::digest(&layer.blob)) > 0).then_some(())
        });
        let workers = children(bench.node.lcow_pid());
        assert!(!workers.is_empty(), "no service VM works on the apply");
        let signal = |signal| {
            for pid in &workers {
                let pid = Pid::from_raw(pid.cast_signed()).expect("a pid");
                // One that has just ended hangs no more.
                let _ = kill_process(pid, signal);
            }
        };
        signal(Signal::STOP);
        let begun = std::time::Instant::now();
        for _round in 0..10 {
            bench.client.stat("box").expect("stat");
            bench.client.usage("box").expect("usage");
            bench.client.usage(&top).expect("usage");
            bench.client.list(&[]).expect("list");
            bench.client.mounts("box").expect("mounts");
            bench.client.prepare("short", &top, &[]).expect("prepare");
            bench.client.remove("short").expect("remove");
            bench.client.cleanup().expect("cleanup");
        }
        // The snapshot whose layer hangs goes as well.
        bench.client.remove("extract-8").expect("remove");
        assert!(begun.elapsed() < AT_ONCE, "names waited for service VMs: {:?}", begun.elapsed());
        signal(Signal::CONT);
        hanging.join().expect("a thread").expect_err("its snapshot was removed");
    });
    bench.assert_leaves_nothing();
}
