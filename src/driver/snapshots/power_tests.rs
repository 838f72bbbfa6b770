//! A power cut at every moment of containerd's requests, made by real snapshots with real service VMs.

use super::*;
use crate::{
    driver::power_tests::{config, noise, tar},
    store::{
        Store, StoreError, layout,
        tests::power::{Promise, Sequence},
    },
};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use std::path::PathBuf;

/// A blob in memory.
struct Bytes1(Vec<u8>);

impl Blob<DriverError> for Bytes1 {
    fn open(&self) -> BoxFuture<'_, Result<BlobBytes, DriverError>> {
        let bytes = Bytes::from(self.0.clone());
        async move { Ok(stream::iter([Ok(bytes)]).boxed() as BlobBytes) }.boxed()
    }
}

/// Orders that are free, as (request, first, second, why).
const FREE: &[(&str, &str, &str, &str)] = &[
    (
        "apply shared",
        "sync home/staging/cb/layer.exact",
        "link home/ca/layer.vhd home/staging/cb/layer.vhd.link",
        "the link has no name that is looked at before it is renamed",
    ),
    (
        "apply shared",
        "rename home/staging/cb/layer.exact.link home/staging/cb/layer.exact",
        "rename home/staging/cb/layer.exact home/cb/layer.exact",
        "both come before the sync of the layer's directory, and no record speaks of either file yet",
    ),
    (
        "convert",
        "rename home/cc/snapshot.json.new home/cc/snapshot.json",
        "sync home/cc/",
        "the version of the tar counts once a client has its first byte; the new layer syncs the same directory",
    ),
    (
        "remove",
        "sync home/",
        "unlink home/staging/cd-removing/snapshot.json",
        "a directory that comes back without its record is removed by the next start, as was asked for",
    ),
];

/// Syncs that are not missed, as (request, sync, why).
const SPARE: &[(&str, &str, &str)] = &[
    ("apply", "sync home/", OF_THE_LAST),
    ("apply shared", "sync home/", OF_THE_LAST),
    ("commit what was written", "sync home/cc/sandbox.vhdx", OF_THE_LAST),
    ("apply shared", "sync home/staging/cb/layer.vhd", OF_AN_IMAGE),
    ("apply shared", "sync home/staging/cb/layer.exact", OF_AN_IMAGE),
    (
        "convert",
        "sync home/cc/",
        "of the version of the tar, which counts once a client has its first byte; the new layer syncs the same directory",
    ),
];
const OF_THE_LAST: &str = "for what the request before did, which here is on the disk already; `store::tests::power` shows that \
                         it is missed with the requests at once";
const OF_AN_IMAGE: &str =
    "the files give way to those of a layer with the same tar, which is known only when they are whole";

fn open(home: &Path) -> Result<Store, StoreError> {
    Store::open_snapshots(&DiskThread::here(), home)
}

fn request(key: &str, parent: &str) -> PrepareRequest {
    PrepareRequest { key: key.into(), parent: parent.into(), labels: Labels::new() }
}

/// Waits for work after a reply.
async fn until(done: impl Fn() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(30);
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "a chore does not end");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_at_any_moment_of_containerds_requests_leaves_snapshots_whole_or_absent() {
    let (outer, tools) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut sequence = Sequence::begin(outer.path(), true);
    let home: PathBuf = outer.path().join("home");
    let options = Options { snapshot_mounts: SnapshotMounts::LcowLayer, ..Options::default() };
    sequence.asked("open");
    let s = Snapshots::open(&home, &config(tools.path(), home.clone(), options)).unwrap();
    let store = s.home().store.clone();
    let id = |name: &str| store.snapshot_named(name).unwrap().layer.id;
    sequence.answered("open", Promise::Durable, &store);

    for (name, parent, key, labels) in [
        ("base", "", "k/1/extract-1 a", ["prepare to unpack", "apply", "commit"]),
        ("twin", "", "k/1/extract-2 b", ["prepare to share", "apply shared", "commit shared"]),
    ] {
        sequence.asked(labels[0]);
        s.prepare(request(key, parent)).await.unwrap();
        sequence.answered(labels[0], Promise::Either, &store);
        sequence.asked(labels[1]);
        let place = ShownPlace::Folder(store.layout().layer(&id(key)));
        s.apply(ApplyRequest { place }, &Bytes1(tar("file", &noise(30_000)))).await.unwrap();
        sequence.answered(labels[1], Promise::Durable, &store);
        sequence.asked(labels[2]);
        s.commit(name.into(), key, None, Labels::new()).await.unwrap();
        sequence.answered(labels[2], Promise::Durable, &store);
    }

    sequence.asked("prepare");
    s.prepare(request("k/2/box", "base")).await.unwrap();
    sequence.answered("prepare", Promise::Durable, &store);

    sequence.asked("view");
    s.view(request("k/2/view", "base")).await.unwrap();
    sequence.answered("view", Promise::Durable, &store);

    sequence.asked("labels");
    s.update("k/2/box", |labels| drop(labels.insert("a".into(), "b".into()))).await.unwrap();
    sequence.answered("labels", Promise::Durable, &store);

    // A byte that a VHDX has no use for (2.2.1): what a container writes is not synced either.
    sequence.asked("write");
    let disk = store.layout().layer_file(&id("k/2/box"), layout::SANDBOX_VHDX_FILE);
    let file = std::fs::File::options().write(true).open(&disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"written", 40_000).unwrap();
    sequence.recorder.written(&disk);
    sequence.answered("write", Promise::AnyBytes, &store);

    sequence.asked("commit what was written");
    s.commit("written".into(), "k/2/box", None, Labels::new()).await.unwrap();
    until(|| {
        let member = store.snapshot_named("written").unwrap();
        member.meta.snapshot.as_ref().is_some_and(|s| s.unsynced.is_none())
    })
    .await;
    sequence.answered("commit what was written", Promise::Durable, &store);

    sequence.asked("convert");
    s.prepare(request("k/3/box", "written")).await.unwrap();
    sequence.answered("convert", Promise::Durable, &store);

    sequence.asked("remove");
    s.remove("k/2/view").await.unwrap();
    let staging = store.layout().top(layout::STAGING);
    until(|| std::fs::read_dir(&staging).unwrap().next().is_none()).await;
    sequence.answered("remove", Promise::Durable, &store);

    s.home().pool.shutdown(GRACE).await;
    drop(store);
    let recorded = sequence.end(open, "home");
    let seen = recorded.holds("containerd's requests by the driver");
    recorded.each_sync_counts(&seen, SPARE);
    recorded.each_order_counts(&seen, FREE);
}
