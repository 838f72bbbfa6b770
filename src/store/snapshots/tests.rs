//! Names, codes, crashes and reboots of snapshots, on a store without files of layers.

use super::*;
use crate::store::{REMOVING_SUFFIX, StoreError, tests::unlocked};
use std::path::PathBuf;

struct Fixture {
    _folder: tempfile::TempDir,
    home: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("home");
        Self { _folder: folder, home }
    }

    fn open(&self) -> Store {
        unlocked(|| Store::open_snapshots(&DiskThread::here(), &self.home)).unwrap()
    }
}

fn create(store: &Store, key: &str, parent: &str, state: LayerState) -> Result<Member, StoreError> {
    create_sharing(store, key, parent, state, None)
}

fn create_sharing(
    store: &Store,
    key: &str,
    parent: &str,
    state: LayerState,
    scratch_of: Option<&LayerId>,
) -> Result<Member, StoreError> {
    let new = NewSnapshot {
        key: key.into(),
        kind: SnapshotKind::Active,
        parent: (!parent.is_empty()).then(|| parent.to_owned()),
        labels: BTreeMap::new(),
        state,
        scratch_of: scratch_of.cloned(),
        wishes: LayerWishes::default(),
        durable: true,
    };
    store.create_snapshot::<StoreError>(&DiskThread::here(), new, |_, _| Ok(()))
}

fn named(name: &str, parent: &str) -> NewName {
    NewName {
        name: name.into(),
        labels: [("k".to_owned(), "v".to_owned())].into(),
        parent: (!parent.is_empty()).then(|| parent.to_owned()),
        usage: Some(SnapshotUsage { bytes: 7, inodes: 1 }),
        unsynced: None,
    }
}

fn commit(store: &Store, key: &str, name: &str, parent: &str) -> Result<Member, StoreError> {
    store.commit_snapshot(&DiskThread::here(), key, named(name, parent))
}

/// What a refusal is to containerd.
fn code<T: std::fmt::Debug>(result: Result<T, StoreError>) -> &'static str {
    match result.unwrap_err() {
        StoreError::Snapshot(SnapshotRefusal::NotFound(_)) => "NotFound",
        StoreError::Snapshot(SnapshotRefusal::Exists(_)) => "AlreadyExists",
        StoreError::Snapshot(SnapshotRefusal::Invalid(_)) => "InvalidArgument",
        StoreError::Snapshot(SnapshotRefusal::Precondition(_)) => "FailedPrecondition",
        other => panic!("{other}"),
    }
}

fn names(store: &Store) -> Vec<String> {
    let mut names: Vec<String> = store
        .snapshots_listed()
        .into_iter()
        .filter_map(|m| Some(m.meta.snapshot.as_ref()?.name.clone()))
        .collect();
    names.sort();
    names
}

#[test]
fn refusals_are_those_of_containerds_snapshotters_and_change_nothing() {
    let fixture = Fixture::new();
    let store = fixture.open();
    create(&store, "one", "", LayerState::Created).unwrap();
    commit(&store, "one", "base", "").unwrap();
    create(&store, "child", "base", LayerState::Created).unwrap();
    create(&store, "free", "", LayerState::Created).unwrap();
    let before = names(&store);
    for (result, expected) in [
        (create(&store, "base", "", LayerState::Created), "AlreadyExists"),
        (create(&store, "child", "", LayerState::Created), "AlreadyExists"),
        (create(&store, "new", "nothing", LayerState::Created), "NotFound"),
        (create(&store, "new", "child", LayerState::Created), "InvalidArgument"),
        (commit(&store, "child", "base", ""), "AlreadyExists"),
        (commit(&store, "nothing", "name", ""), "NotFound"),
        (commit(&store, "base", "name", ""), "FailedPrecondition"),
        (commit(&store, "child", "name", "other"), "InvalidArgument"),
        (commit(&store, "free", "name", "nothing"), "NotFound"),
        (commit(&store, "free", "name", "child"), "FailedPrecondition"),
    ] {
        assert_eq!(code(result), expected);
    }
    assert_eq!(code(store.vanish("base")), "FailedPrecondition");
    assert_eq!(code(store.vanish("nothing")), "NotFound");
    assert_eq!(names(&store), before);
    // What failed has given its names back.
    create(&store, "new", "base", LayerState::Created).unwrap();
    commit(&store, "new", "name", "base").unwrap();
}

#[test]
fn names_labels_and_chains_survive_a_restart_and_a_number_is_never_used_again() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let odd = "default/1/extract-6 sha256:ab: \u{e9}/../x";
    let first = create(&store, odd, "", LayerState::Created).unwrap();
    let second = create(&store, "free", "", LayerState::Created).unwrap();
    commit(&store, odd, "base", "").unwrap();
    commit(&store, "free", "top", "base").unwrap();
    let ids = [first.layer.id, second.layer.id];
    let gone = create(&store, "gone", "top", LayerState::Created).unwrap().layer.id;
    let vanished = store.vanish("gone").unwrap();
    let doomed = store.discard(&DiskThread::here(), &vanished).unwrap();
    doomed.delete(&DiskThread::here(), &store);
    drop(store);
    let store = fixture.open();
    assert_eq!(names(&store), ["base", "top"]);
    let top = store.snapshot_named("top").unwrap();
    assert_eq!((&top.layer.id, top.layer.chain.as_ref()), (&ids[1], &ids[..1]));
    let snapshot = top.meta.snapshot.as_ref().unwrap();
    assert_eq!(snapshot.labels["k"], "v");
    assert_eq!(snapshot.usage, Some(SnapshotUsage { bytes: 7, inodes: 1 }));
    assert_eq!(snapshot.created, snapshot.updated);
    let next = create(&store, "next", "top", LayerState::Created).unwrap();
    assert!(next.layer.id != gone && !ids.contains(&next.layer.id));
    assert_eq!(store.children(&ids[1]), [next.layer.id]);
}

#[test]
fn a_removal_frees_the_name_at_once_and_its_folder_later() {
    let fixture = Fixture::new();
    let store = fixture.open();
    create(&store, "key", "", LayerState::Sandbox).unwrap();
    let vanished = store.vanish("key").unwrap();
    let folder = store.layout().layer(&vanished.layer.id);
    assert!(folder.exists() && names(&store).is_empty());
    create(&store, "key", "", LayerState::Created).unwrap();
    let doomed = store.discard(&DiskThread::here(), &vanished).unwrap();
    assert!(!folder.exists());
    let staged = || std::fs::read_dir(fixture.home.join(layout::STAGING)).unwrap().flatten();
    assert!(staged().any(|entry| entry.file_name().to_string_lossy().contains(REMOVING_SUFFIX)));
    store.sync_removals(&DiskThread::here()).unwrap();
    doomed.delete(&DiskThread::here(), &store);
    assert_eq!(staged().count(), 0);
    assert_eq!(names(&store), ["key"]);
}

#[test]
fn a_removal_that_was_killed_brings_the_snapshot_back_whole() {
    let fixture = Fixture::new();
    let store = fixture.open();
    create(&store, "key", "", LayerState::Created).unwrap();
    let _vanished = store.vanish("key").unwrap();
    drop(store);
    assert_eq!(names(&fixture.open()), ["key"], "containerd does not know it and removes it again");
}

#[test]
fn a_removal_that_was_undone_does_not_hide_a_newer_snapshot_of_the_same_key() {
    let fixture = Fixture::new();
    let store = fixture.open();
    // So many that no order of directory entries is right by chance.
    let keys: Vec<String> = (0..40).map(|n| format!("key{n:02}")).collect();
    let mut pairs = Vec::new();
    for key in &keys {
        let older = create(&store, key, "", LayerState::Created).unwrap().layer.id;
        let _vanished = store.vanish(key).unwrap();
        pairs.push((older, create(&store, key, "", LayerState::Sandbox).unwrap().layer.id));
    }
    drop(store);
    let store = fixture.open();
    assert_eq!(names(&store), keys);
    for (key, (older, newer)) in keys.iter().zip(&pairs) {
        assert_eq!(store.snapshot_named(key).unwrap().layer.id, *newer, "{key}");
        assert!(
            store.doubtful().iter().any(|layer| layer.id == *older),
            "{key}: the older one is removed again"
        );
    }
    assert_eq!(store.doubtful().len(), keys.len());
}

#[test]
fn what_was_committed_before_a_reboot_and_never_synced_is_not_listed_nor_its_children() {
    let fixture = Fixture::new();
    let store = fixture.open();
    create(&store, "base-key", "", LayerState::Created).unwrap();
    commit(&store, "base-key", "base", "").unwrap();
    for (key, name, boot) in
        [("a", "this boot", super::super::boot_id()), ("b", "other boot", "another".into())]
    {
        create(&store, key, "base", LayerState::Sandbox).unwrap();
        let new = NewName { unsynced: Some(boot), ..named(name, "base") };
        store.commit_snapshot(&DiskThread::here(), key, new).unwrap();
        create(&store, &format!("on {name}"), name, LayerState::Created).unwrap();
    }
    drop(store);
    let store = fixture.open();
    #[cfg(target_os = "linux")]
    assert_eq!(names(&store), ["base", "on this boot", "this boot"]);
    assert_eq!(code(store.snapshot_named("other boot")), "NotFound");
    assert_eq!(code(create(&store, "new", "other boot", LayerState::Created)), "NotFound");
    // Children first, so that they can be removed in this order.
    for layer in store.doubtful() {
        let vanished = store.vanish_doubtful(&layer.id).expect("it has no children left");
        store.discard(&DiskThread::here(), &vanished).unwrap().delete(&DiskThread::here(), &store);
    }
    assert!(store.doubtful().is_empty());
    // The name is free again.
    create(&store, "again", "base", LayerState::Created).unwrap();
    commit(&store, "again", "other boot", "").unwrap();
}

#[test]
fn a_record_that_a_power_cut_may_have_left_is_no_snapshot_and_other_damage_stays() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let contents: [(&[u8], bool); 6] = [
        (b"", true),
        (b"{", true),
        (b"{\n  \"state\": \"cre", true),
        (&[0; 300], true),
        (b"{}\n", false),
        (b"{\"state\": \0\0\0", false),
    ];
    let ids = contents.map(|(content, cut)| {
        let id = create(&store, &format!("{content:?}"), "", LayerState::Created).unwrap().layer.id;
        std::fs::write(store.layout().meta_file(&id), content).unwrap();
        (id, cut)
    });
    drop(store);
    let store = fixture.open();
    assert!(names(&store).is_empty());
    let doubtful: Vec<LayerId> = store.doubtful().into_iter().map(|layer| layer.id).collect();
    assert_eq!(doubtful.len(), contents.len());
    let thread = &DiskThread::here();
    for (id, cut) in ids {
        assert_eq!(store.has_no_record(thread, &id), cut, "{id}");
    }
}

#[test]
fn a_plugins_store_and_a_store_of_snapshots_are_told_apart() {
    let fixture = Fixture::new();
    drop(Store::open(&DiskThread::here(), &fixture.home, |_| false).unwrap());
    let error =
        unlocked(|| Store::open_snapshots(&DiskThread::here(), &fixture.home)).unwrap_err().to_string();
    assert!(error.contains("--containerd-root"), "{error}");
    let fixture = Fixture::new();
    drop(fixture.open());
    let opened = unlocked(|| Store::open(&DiskThread::here(), &fixture.home, |_| false)).unwrap();
    assert!(opened.layout().holds_snapshots());
}

#[test]
fn a_chain_is_at_most_127_parents_long() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let mut parent = String::new();
    for n in 0..=crate::store::chain::MAX_CHAIN {
        let key = format!("k{n}");
        create(&store, &key, &parent, LayerState::Created).unwrap();
        parent = format!("n{n}");
        commit(&store, &key, &parent, "").unwrap();
    }
    let error = create(&store, "more", &parent, LayerState::Created).unwrap_err();
    assert!(matches!(error, StoreError::TooDeep { .. }), "{error}");
}

#[test]
fn the_owner_of_a_shared_scratch_disk_stays_until_its_users_are_gone() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let pod = create(&store, "k/1/pod", "", LayerState::Sandbox).unwrap().layer.id;
    let share = |store: &Store, key: &str, owner: &LayerId| {
        create_sharing(store, key, "", LayerState::Sandbox, Some(owner))
    };
    let first = share(&store, "k/2/first", &pod).unwrap().layer.id;
    share(&store, "k/3/second", &pod).unwrap();
    // A user of a disk is no owner, and neither is what is no container.
    assert_eq!(code(share(&store, "k/4/third", &first)), "FailedPrecondition");
    let layer = create(&store, "k/5/extract-1", "", LayerState::Created).unwrap().layer.id;
    assert_eq!(code(share(&store, "k/4/third", &layer)), "FailedPrecondition");
    // What refers to the disk keeps it, over a restart too.
    let check = |store: &Store| {
        assert_eq!(code(store.vanish("k/1/pod")), "FailedPrecondition");
        for key in ["k/1/pod", "k/2/first"] {
            assert_eq!(code(commit(store, key, "name", "")), "FailedPrecondition");
        }
    };
    check(&store);
    drop(store);
    let store = fixture.open();
    check(&store);
    for key in ["k/2/first", "k/3/second", "k/1/pod"] {
        let vanished = store.vanish(key).unwrap();
        store.discard(&DiskThread::here(), &vanished).unwrap().delete(&DiskThread::here(), &store);
    }
    assert_eq!(code(share(&store, "k/4/third", &pod)), "FailedPrecondition");
    // A failed attempt leaves no child behind.
    let pod = create(&store, "k/6/pod", "", LayerState::Sandbox).unwrap().layer.id;
    let taken = share(&store, "k/6/pod", &pod);
    assert_eq!(code(taken), "AlreadyExists");
    commit(&store, "k/6/pod", "name", "").unwrap();
    assert_eq!(code(share(&store, "k/7/late", &pod)), "FailedPrecondition");
}
