//! The store's own requests.

use super::{Promise, Recorded, Sequence, recorder::Recorder};
use crate::store::{
    AppliedMeta, DiskThread, InitRecord, LayerId, LayerMeta, LayerState, LayerWishes, NewName, NewSnapshot,
    SnapshotKind, SnapshotMeta, Store, StoreError, boot_id, files, layout, tests::unlocked,
};
use std::{collections::BTreeMap, io::Write, path::Path};

/// Orders that are free in each sequence, as (request, first, second, why).
pub(super) const FREE: &[(&str, &str, &str, &str)] = &[
    (
        "*",
        "sync *",
        "create *",
        "the new file has no name that is looked at before the next sync of its directory",
    ),
    (
        "*",
        "sync *",
        "mkdir *",
        "the new directory has no name that is looked at before a later rename, and its sync",
    ),
    ("*", "sync *", "unlink home/staging/?", "it is empty, and is deleted whenever it is found"),
];

/// Syncs of snapshots that are not missed where everything was on the disk before the request, as (request, sync, why).
/// With the requests at once they are missed: `snapshots_that_follow_each_other_at_once_hide_no_loss`.
const SPARE: &[(&str, &str, &str)] = &[
    ("apply", "sync home/", "for the name that a Prepare right before made"),
    ("sync it", "sync home/cb/sandbox.vhdx", "for what a container wrote right before"),
    ("delete", "sync home/", "for the rename right before"),
];

const HERE: &DiskThread = &DiskThread::here();

fn open(home: &Path) -> Result<Store, StoreError> {
    Store::open(HERE, home, |_| false)
}

fn id(text: &str) -> LayerId {
    text.parse().unwrap()
}

fn generation(store: &Store, name: &str) -> u64 {
    store.find(&id(name)).unwrap().generation
}

fn create(store: &Store, name: &str, parent: Option<&str>, state: LayerState) {
    let fill = |folder: &Path| match state {
        LayerState::Sandbox => {
            put(&folder.join(layout::SANDBOX_FILE), 9000);
            files::sync_named(&folder.join(layout::SANDBOX_FILE))
        }
        _ => Ok(()),
    };
    store.create(HERE, &id(name), parent.map(id).as_ref(), state, LayerWishes::default(), fill).unwrap();
}

/// A file of `bytes` bytes that are not zero.
fn put(path: &Path, bytes: usize) {
    files::create_private(path).unwrap().write_all(&vec![7; bytes]).unwrap();
}

fn update(store: &Store, name: &str, change: impl FnOnce(LayerMeta) -> LayerMeta) {
    let changed = store
        .update(HERE, &id(name), generation(store, name), |meta| Ok::<_, StoreError>(change(meta.clone())));
    changed.unwrap();
}

fn facts(bytes: u64) -> AppliedMeta {
    AppliedMeta {
        image_bytes: bytes,
        file_bytes: bytes,
        record_bytes: 100,
        diff_size: 0,
        tar_bytes: 0,
        tar_digest: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
        uuid: uuid::Uuid::nil(),
        entries: 0,
        verity_root: None,
        checked: true,
        writer: None,
        owners: None,
        shared: None,
    }
}

/// As `driver::apply` does it.
fn apply(store: &Store, name: &str) {
    let staged = store.stage(HERE, &id(name)).unwrap();
    put(&staged.path().join(layout::LAYER_FILE), 20_000);
    put(&staged.path().join(layout::RECORD_FILE), 100);
    files::sync_named(&staged.path().join(layout::LAYER_FILE)).unwrap();
    files::sync_named(&staged.path().join(layout::RECORD_FILE)).unwrap();
    let names = [layout::RECORD_FILE, layout::LAYER_FILE];
    let change = |meta: &LayerMeta| {
        Ok::<_, StoreError>(LayerMeta {
            state: LayerState::Applied,
            applied: Some(facts(20_000)),
            ..meta.clone()
        })
    };
    store.commit(HERE, &id(name), generation(store, name), staged, &names, change).unwrap();
}

/// The requests of Docker's plugin, as the store sees them.
fn record(settle: bool) -> Recorded {
    let outer = tempfile::tempdir().unwrap();
    let home = outer.path().join("home");
    let mut sequence = Sequence::begin(outer.path(), settle);
    sequence.asked("open");
    let store = unlocked(|| open(&home)).unwrap();
    sequence.answered("open", Promise::Durable, &store);
    let mut request = |label: &'static str, work: &dyn Fn(&Store, &Recorder)| {
        sequence.asked(label);
        work(&store, &sequence.recorder);
        sequence.answered(label, Promise::Durable, &store);
    };
    request("init", &|s, _| {
        s.record_init(HERE, InitRecord { opts: vec!["lcow.sandboxsize=30".into()], ..InitRecord::default() })
            .unwrap();
    });
    request("create", &|s, _| create(s, "base", None, LayerState::Created));
    // Before the first byte of the tar is read.
    request("mark", &|s, _| update(s, "base", |meta| LayerMeta { state: LayerState::Applying, ..meta }));
    request("apply", &|s, _| apply(s, "base"));
    request("sandbox", &|s, _| create(s, "box", Some("base"), LayerState::Sandbox));
    request("version", &|s, _| update(s, "box", |meta| LayerMeta { canonical_version: Some(2), ..meta }));
    request("remove", &|s, _| s.take_away(HERE, &id("box")).unwrap().delete(HERE, s));
    request("create again", &|s, _| create(s, "box", Some("base"), LayerState::Created));
    drop(store);
    sequence.end(open, "home")
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_answered() {
    let recorded = record(true);
    let seen = recorded.holds("docker's requests");
    recorded.each_sync_counts(&seen, &[]);
    recorded.each_order_counts(&seen, &[]);
}

#[test]
fn requests_that_follow_each_other_at_once_hide_no_loss() {
    record(false).holds("docker's requests, at once");
}

fn open_snapshots(home: &Path) -> Result<Store, StoreError> {
    Store::open_snapshots(HERE, home)
}

fn prepare(store: &Store, key: &str, parent: &str, kind: SnapshotKind, state: LayerState, durable: bool) {
    let new = NewSnapshot {
        key: key.into(),
        kind,
        parent: (!parent.is_empty()).then(|| parent.to_owned()),
        labels: [("a".to_owned(), "b".to_owned())].into(),
        state,
        scratch_of: None,
        wishes: LayerWishes::default(),
        durable,
    };
    let fill = |_: &LayerId, folder: &Path| {
        if state == LayerState::Sandbox {
            put(&folder.join(layout::SANDBOX_VHDX_FILE), 9000);
        }
        Ok::<_, StoreError>(())
    };
    store.create_snapshot(HERE, new, fill).unwrap();
}

fn commit(store: &Store, name: &str, key: &str, unsynced: Option<String>) {
    let new = NewName { name: name.into(), labels: BTreeMap::new(), parent: None, usage: None, unsynced };
    store.commit_snapshot(HERE, key, new).unwrap();
}

fn named(store: &Store, name: &str) -> LayerId {
    store.snapshot_named(name).unwrap().layer.id
}

/// The requests of containerd, as the store sees them.
fn record_snapshots(settle: bool) -> Recorded {
    let outer = tempfile::tempdir().unwrap();
    let home = outer.path().join("home");
    let mut sequence = Sequence::begin(outer.path(), settle);
    sequence.asked("open");
    let store = unlocked(|| open_snapshots(&home)).unwrap();
    sequence.answered("open", Promise::Durable, &store);
    let mut request = |label: &'static str, promise, work: &mut dyn FnMut(&Store, &Recorder)| {
        sequence.asked(label);
        work(&store, &sequence.recorder);
        sequence.answered(label, promise, &store);
    };
    use LayerState::{Created, Sandbox};
    use SnapshotKind::{Active, View};
    request("prepare to unpack", Promise::Either, &mut |s, _| {
        prepare(s, "extract-1", "", Active, Created, false);
    });
    request("apply", Promise::Durable, &mut |s, _| apply(s, named(s, "extract-1").as_str()));
    request("commit", Promise::Durable, &mut |s, _| commit(s, "base", "extract-1", None));
    request("prepare", Promise::Durable, &mut |s, _| prepare(s, "box", "base", Active, Sandbox, true));
    request("view", Promise::Durable, &mut |s, _| prepare(s, "view", "base", View, Created, true));
    request("labels", Promise::Durable, &mut |s, _| {
        let label = |snapshot: &mut SnapshotMeta| drop(snapshot.labels.insert("c".into(), "d".into()));
        s.update_snapshot(HERE, &named(s, "box"), label).unwrap();
    });
    let id = named(&store, "box");
    let disk = store.layout().layer_file(&id, layout::SANDBOX_VHDX_FILE);
    request("write", Promise::AnyBytes, &mut |_, recorder| {
        std::fs::File::options().write(true).open(&disk).unwrap().write_all(&[9; 9000]).unwrap();
        recorder.written(&disk);
    });
    request("commit what was written", Promise::WholeOrAbsent, &mut |s, _| {
        commit(s, "written", "box", Some(boot_id()));
    });
    request("sync it", Promise::Durable, &mut |s, _| {
        files::sync_named(&disk).unwrap();
        s.update_snapshot(HERE, &id, |snapshot| snapshot.unsynced = None).unwrap();
    });
    let mut vanished = None;
    request("remove", Promise::Later, &mut |s, _| vanished = Some(s.vanish("view").unwrap()));
    let mut doomed = None;
    request("rename away", Promise::Either, &mut |s, _| {
        doomed = Some(s.discard(HERE, &vanished.take().unwrap()).unwrap());
    });
    request("delete", Promise::Durable, &mut |s, _| {
        s.sync_removals(HERE).unwrap();
        doomed.take().unwrap().delete(HERE, s);
    });
    drop(store);
    sequence.end(open_snapshots, "home")
}

#[test]
fn a_power_cut_at_any_moment_leaves_snapshots_whole_or_absent() {
    let recorded = record_snapshots(true);
    let seen = recorded.holds("containerd's requests");
    recorded.each_sync_counts(&seen, SPARE);
    recorded.each_order_counts(&seen, &[]);
}

#[test]
fn snapshots_that_follow_each_other_at_once_hide_no_loss() {
    let recorded = record_snapshots(false);
    let seen = recorded.holds("containerd's requests, at once");
    for (request, sync, _) in SPARE {
        recorded.misses(&seen, request, sync);
    }
}
