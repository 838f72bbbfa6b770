//! Blobs that containerd deletes while they are unpacked: an Apply has all of the blob, or fails with its name, and nothing
//! stays.
//!
//! ```text
//!   test ─ Apply ─► the product ─ Read ─► containerd ◄─ content rm, garbage collection ─ test
//!                     └─ workers: stopped until the file is gone
//! ```
//!
//! containerd's content store keeps a blob's file open while a stream reads it (`plugins/content/local/readerat.go`), so
//! that a stream that has begun may well come to its end. How far it gets is for containerd; that it ends as a whole
//! layer or as none is for the product.

use crate::{
    client::{Client, assert_code, descriptor},
    command::{children, wait_until},
    everyday::assert_no_debris,
    image::{self, Layer, Packing},
    node::{Node, Release, Snapshotter},
    tarball::Entry,
};
use rustix::process::{Pid, Signal, kill_process};
use std::{fs, path::PathBuf, thread, time::Duration};
use tonic::Code;

/// Longest wait for containerd's garbage collection, and for a blob that is read.
const SOON: Duration = Duration::from_secs(30);
/// More than all buffers between containerd and a worker hold.
const LARGE: usize = 20 << 20;

/// A node whose product reads blobs by `content`, and a client of its differ.
struct Bench {
    node: Node,
    client: Client,
}

impl Bench {
    fn start(release: Release, content: &str) -> Self {
        let option = format!("lcow.containerd.content={content}");
        let node = Node::start_with_data(release, &["--storage-opt", &option]);
        let client = Client::new(&node.lcow_socket(), Snapshotter::Lcow.name(), node.namespace());
        Self { node, client }
    }

    /// Puts a blob into containerd's store, and holds it against garbage collection.
    fn ingest(&self, blob: &[u8]) -> String {
        let digest = image::digest(blob);
        let file = self.node.scratch("ingest").join("blob");
        fs::write(&file, blob).expect("blob");
        let command =
            format!("ctr --namespace {} content ingest {digest} <{}", self.node.namespace(), file.display());
        self.node.room.run(&["sh", "-ec", &command]).expect_ok();
        self.node.ctr(&["content", "label", &digest, "containerd.io/gc.root=held"]);
        digest
    }

    /// Where containerd keeps a blob.
    fn file(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a digest");
        self.node.room.folder().join("containerd/io.containerd.content.v1.content/blobs/sha256").join(hex)
    }

    /// Deletes a blob, and waits until its file is gone.
    fn delete(&self, digest: &str) {
        assert!(self.file(digest).exists(), "the blob is not where containerd keeps blobs");
        self.node.ctr(&["content", "rm", digest]);
        wait_until("containerd to delete the file", SOON, || (!self.file(digest).exists()).then_some(()));
    }

    /// Sends a signal to all workers.
    fn signal_workers(&self, signal: Signal) {
        let workers = children(self.node.lcow_pid());
        assert!(!workers.is_empty(), "the product has no workers");
        for pid in workers {
            // One that has just ended needs no signal.
            let _ = kill_process(Pid::from_raw(pid.cast_signed()).expect("a pid"), signal);
        }
    }

    /// Whether the product reads a blob, or containerd for it: one of them has its file open.
    fn is_read(&self, digest: &str) -> bool {
        let file = self.file(digest);
        [self.node.lcow_pid(), self.node.containerd_pid()].into_iter().any(|pid| {
            let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|path| path == file)
        })
    }

    /// Applies `layer` while its blob is deleted; then nothing of it is left, whatever came of it.
    fn apply_while_deleted(&self, layer: &Layer, what: &str) {
        let digest = self.ingest(&layer.blob);
        let blob = descriptor(&layer.media_type, &digest, layer.blob.len() as i64);
        let key = format!("extract-1 {what}");
        let mounts = self.client.prepare(&key, "", &[]).expect("prepare");
        thread::scope(|scope| {
            self.signal_workers(Signal::STOP);
            let applying = scope.spawn(|| self.client.apply(blob, mounts));
            wait_until("the blob to be read", SOON, || self.is_read(&digest).then_some(()));
            self.delete(&digest);
            assert!(!applying.is_finished(), "{what}: the blob was not deleted in the middle");
            self.signal_workers(Signal::CONT);
            match applying.join().expect("a thread") {
                Ok(applied) => {
                    assert_eq!(applied.digest, layer.diff_id(), "{what}");
                    self.client.commit(what, &key, "", &[]).expect("commit");
                    self.client.remove(what).expect("remove");
                }
                Err(refusal) => {
                    assert!(refusal.message().contains(&digest), "{what}: {refusal}");
                    assert_ne!(refusal.code(), Code::Unimplemented, "{what}: no other differ may try");
                    assert!(
                        self.client.commit(what, &key, "", &[]).is_err(),
                        "{what}: part of a layer has a name"
                    );
                    self.client.remove(&key).expect("remove");
                }
            }
        });
        // Deleted before: by name, at once.
        let blob = descriptor(&layer.media_type, &digest, layer.blob.len() as i64);
        let mounts = self.client.prepare(&key, "", &[]).expect("prepare");
        let refusal = self.client.apply(blob.clone(), mounts.clone()).expect_err(what);
        assert!(
            refusal.message().contains(digest.strip_prefix("sha256:").expect("a digest")),
            "{what}: {refusal}"
        );
        assert!(self.client.commit(what, &key, "", &[]).is_err(), "{what}: nothing has a name");
        // And after it is there again, the same snapshot takes it.
        assert_eq!(self.ingest(&layer.blob), digest);
        assert_eq!(self.client.apply(blob, mounts).expect("apply").digest, layer.diff_id());
        self.client.commit(what, &key, "", &[]).expect("commit");
        self.client.remove(what).expect("remove");
        self.delete(&digest);
    }
}

fn campaign(release: Release, content: &str) {
    let bench = Bench::start(release, content);
    let entries = vec![Entry::file("data/large", image::random_bytes(3, LARGE))];
    for (what, packing) in [("plain", Packing::Plain), ("gzip", Packing::Gzip)] {
        bench.apply_while_deleted(&Layer::new(entries.clone(), packing), what);
    }
    // Never held, and never there.
    let missing = image::digest(b"missing");
    let mounts = bench.client.prepare("extract-1 missing", "", &[]).expect("prepare");
    let code = if content == "grpc" { Code::NotFound } else { Code::FailedPrecondition };
    let blob = descriptor(image::LAYER, &missing, 7);
    assert_code(bench.client.apply(blob, mounts), code, "a blob that is not there");
    bench.client.remove("extract-1 missing").expect("remove");
    bench.client.cleanup().expect("cleanup");
    assert_no_debris(&bench.node);
}

#[test]
fn a_deleted_blob_is_a_whole_layer_or_an_error_on_1_7() {
    campaign(Release::V1, "grpc");
}

#[test]
fn a_deleted_blob_is_a_whole_layer_or_an_error_on_2() {
    campaign(Release::V2, "grpc");
}

#[test]
fn a_deleted_blob_that_is_read_as_a_file_is_a_whole_layer_or_an_error() {
    campaign(Release::V2, "file");
}
