//! Tests of the store: states, crash points, removal.

#[cfg(target_os = "linux")]
pub(crate) mod power;

use super::*;
use layer_codec::IdRange;
use std::{fs, path::Path};

/// Tests may block.
const HERE: &DiskThread = &DiskThread::here();

fn open(home: &Path) -> Result<Store, StoreError> {
    unlocked(|| Store::open(HERE, home, |_| false))
}

/// Opens a store that this process has just closed. Other tests start programs, and between its fork and its exec a child
/// holds every lock of this process.
pub(super) fn unlocked(open: impl Fn() -> Result<Store, StoreError>) -> Result<Store, StoreError> {
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
    let begun = std::time::Instant::now();
    let own = format!("process {} ", std::process::id());
    loop {
        match open() {
            Err(StoreError::Locked { holder, .. })
                if holder.starts_with(&own) && begun.elapsed() < PATIENCE =>
            {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

fn id(text: &str) -> LayerId {
    text.parse().unwrap()
}

fn remove(store: &Store, id: &LayerId) -> Result<(), StoreError> {
    store.take_away(HERE, id)?.delete(HERE, store);
    Ok(())
}

fn create(store: &Store, name: &str, parent: Option<&str>) -> Result<(), StoreError> {
    let parent = parent.map(id);
    store.create(HERE, &id(name), parent.as_ref(), LayerState::Created, LayerWishes::default(), |_| Ok(()))
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_reopened_store_knows_its_layers_and_chains() {
    let home = tempfile::tempdir().unwrap();
    let store_id = {
        let store = open(home.path()).unwrap();
        create(&store, "base", None).unwrap();
        create(&store, "mid", Some("base")).unwrap();
        create(&store, "top", Some("mid")).unwrap();
        store.marker().store_id
    };
    let store = open(home.path()).unwrap();
    assert_eq!(store.marker().store_id, store_id);
    assert!(store.marker().reproduces_exact_diffs);
    let Member { layer: top, meta } = store.get(&id("top")).unwrap();
    assert_eq!(top.chain[..], [id("mid"), id("base")]);
    assert_eq!(meta.state, LayerState::Created);
    assert_eq!(store.children(&id("base")), [id("mid")]);
    assert!(store.structural_faults(HERE).is_empty());
}

#[test]
fn what_a_killed_process_was_writing_goes_at_the_next_open() {
    let home = tempfile::tempdir().unwrap();
    let before = open(home.path()).unwrap().marker().store_id;
    let unfinished = home.path().join(layout::MARKER_NEW);
    fs::write(&unfinished, "{\"format\":").unwrap();
    let store = open(home.path()).unwrap();
    assert_eq!(store.marker().store_id, before);
    assert!(!unfinished.exists());
}

#[test]
fn a_moved_home_keeps_working() {
    let outer = tempfile::tempdir().unwrap();
    let (old, new) = (outer.path().join("old"), outer.path().join("new"));
    let store = open(&old).unwrap();
    create(&store, "base", None).unwrap();
    create(&store, "top", Some("base")).unwrap();
    drop(store);
    fs::rename(&old, &new).unwrap();
    let store = open(&new).unwrap();
    assert_eq!(store.find(&id("top")).unwrap().chain[..], [id("base")]);
    assert!(store.structural_faults(HERE).is_empty());
}

#[test]
fn wrong_creates_change_nothing() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    let before = names(home.path());
    assert!(matches!(create(&store, "base", None), Err(StoreError::Exists(_))));
    assert!(matches!(create(&store, "x", Some("nobody")), Err(StoreError::MissingParent { .. })));
    let failed: Result<(), StoreError> =
        store.create(HERE, &id("y"), None, LayerState::Sandbox, LayerWishes::default(), |folder| {
            fs::write(folder.join("sandbox.vhd"), b"half").unwrap();
            Err(StoreError::Usage("the disk is full".into()))
        });
    assert!(failed.is_err());
    assert!(!store.exists(&id("y")));
    assert_eq!(names(home.path()), before);
    assert_eq!(names(&home.path().join("staging")), [""; 0]);
}

#[test]
fn chains_end_at_the_limit() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "l0", None).unwrap();
    for n in 1..=chain::MAX_CHAIN {
        create(&store, &format!("l{n}"), Some(&format!("l{}", n - 1))).unwrap();
    }
    let error = create(&store, "over", Some(&format!("l{}", chain::MAX_CHAIN))).unwrap_err();
    assert!(matches!(error, StoreError::TooDeep { depth: 130, max: 129, .. }), "{error}");
}

#[test]
fn remove_is_idempotent_and_never_breaks_a_child() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    create(&store, "top", Some("base")).unwrap();
    let error = remove(&store, &id("base")).unwrap_err();
    assert!(error.to_string().contains("top"), "{error}");
    assert!(store.exists(&id("base")));
    // Fault 15 of the original: a left-over of an earlier removal blocks every later one.
    fs::create_dir(home.path().join("top-removing")).unwrap();
    fs::write(home.path().join("top-removing/file"), b"x").unwrap();
    remove(&store, &id("top")).unwrap();
    remove(&store, &id("top")).unwrap();
    remove(&store, &id("base")).unwrap();
    remove(&store, &id("never-there")).unwrap();
    assert!(store.is_empty());
    let report = store.collect(HERE, store.debris(HERE).unwrap());
    assert_eq!(report.deleted.len(), 1);
    assert!(report.failed.is_empty());
    assert!(!home.path().join("top-removing").exists());
}

#[test]
fn debris_of_a_crash_is_found_and_layers_are_not_touched() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    drop(store);
    fs::create_dir(home.path().join("staging/base.1.7")).unwrap();
    fs::write(home.path().join("staging/base.1.7/layer.vhd"), b"torn").unwrap();
    fs::create_dir(home.path().join("staging/x-removing.1.8")).unwrap();
    fs::write(home.path().join("scratch/vm.vhdx"), b"").unwrap();
    let store = open(home.path()).unwrap();
    let report = store.collect(HERE, store.debris(HERE).unwrap());
    let mut kinds: Vec<_> = report.deleted.iter().map(|d| d.kind).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["removed layer", "scratch disk", "unfinished layer"]);
    assert!(store.exists(&id("base")));
    assert_eq!(names(&home.path().join("staging")), [""; 0]);
}

#[test]
fn commit_moves_files_first_and_changes_the_state_last() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    let layer = store.find(&id("a")).unwrap();
    let staged = store.stage(HERE, &id("a")).unwrap();
    fs::write(staged.path().join("layer.vhd"), b"image").unwrap();
    // A file that is missing from the staging directory stops the commit before the state changes.
    let failed: Result<_, StoreError> =
        store.commit(HERE, &id("a"), layer.generation, staged, &["layer.exact", "layer.vhd"], |m| {
            Ok(LayerMeta { state: LayerState::Applied, ..m.clone() })
        });
    assert!(failed.is_err());
    assert_eq!(store.get(&id("a")).unwrap().meta.state, LayerState::Created);
    let staged = store.stage(HERE, &id("a")).unwrap();
    // A layer that was removed and created anew meanwhile is another layer.
    remove(&store, &id("a")).unwrap();
    create(&store, "a", None).unwrap();
    let stale: Result<_, StoreError> =
        store.commit(HERE, &id("a"), layer.generation, staged, &["layer.vhd"], |m| Ok(m.clone()));
    assert!(matches!(stale, Err(StoreError::NotFound(_))));
}

#[test]
fn a_damaged_layer_is_refused_everything_but_removal() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    drop(store);
    fs::write(home.path().join("a/layer.json"), b"{\"state\":\"nonsense\"}").unwrap();
    let store = open(home.path()).unwrap();
    assert!(store.exists(&id("a")));
    assert!(store.get(&id("a")).unwrap_err().to_string().contains("damaged"));
    assert!(matches!(create(&store, "b", Some("a")), Err(StoreError::WrongState { .. })));
    assert_eq!(store.structural_faults(HERE).len(), 1);
    remove(&store, &id("a")).unwrap();
    assert!(store.structural_faults(HERE).is_empty());
}

#[test]
fn a_folder_that_no_store_made_is_no_layer_and_is_never_removed() {
    let home = tempfile::tempdir().unwrap();
    drop(open(home.path()).unwrap());
    let precious = home.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), b"work of years").unwrap();
    fs::create_dir(home.path().join("empty")).unwrap();
    // Torn layers have one of the two files; they can be removed.
    for (name, file) in [("torn1", "layer.json"), ("torn2", "layerchain.json")] {
        fs::create_dir(home.path().join(name)).unwrap();
        fs::write(home.path().join(name).join(file), b"").unwrap();
    }
    let store = open(home.path()).unwrap();
    for name in ["precious", "empty"] {
        assert!(!store.exists(&id(name)));
        let removed = remove(&store, &id(name)).unwrap_err().to_string();
        assert!(removed.contains(name) && removed.contains("left alone"), "{removed}");
        assert!(create(&store, name, None).unwrap_err().to_string().contains("left alone"));
    }
    assert_eq!(store.structural_faults(HERE).len(), 4);
    remove(&store, &id("torn1")).unwrap();
    remove(&store, &id("torn2")).unwrap();
    assert_eq!(fs::read(precious.join("file")).unwrap(), b"work of years");
    assert!(home.path().join("empty").is_dir());
    // Made while the store is open: nothing takes its place.
    fs::create_dir(home.path().join("late")).unwrap();
    assert!(create(&store, "late", None).is_err());
    remove(&store, &id("late")).unwrap();
    assert!(home.path().join("late").is_dir());
}

#[test]
fn a_folder_with_something_in_it_never_becomes_a_store() {
    for foreign in ["work", "precious.txt", "cache"] {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(foreign);
        if foreign.ends_with("txt") {
            fs::write(&path, b"x").unwrap();
        } else {
            fs::create_dir(&path).unwrap();
            fs::write(path.join("file"), b"x").unwrap();
        }
        #[cfg(unix)]
        let mode = |path: &Path| std::os::unix::fs::MetadataExt::mode(&fs::metadata(path).unwrap());
        #[cfg(unix)]
        fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let error = open(home.path()).unwrap_err().to_string();
        assert!(error.contains(foreign) && error.contains("empty"), "{error}");
        assert_eq!(names(home.path()), [foreign]);
        #[cfg(unix)]
        assert_eq!(mode(home.path()) & 0o777, 0o755, "not even its mode is changed");
        assert!(Store::open(HERE, home.path(), |entry| entry.file_name() == foreign).is_ok());
    }
    // A new file system, and a store whose first start was cut at any point.
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("lost+found")).unwrap();
    drop(open(home.path()).unwrap());
    fs::rename(home.path().join("lcow-store.json"), home.path().join("lcow-store.json.new")).unwrap();
    drop(open(home.path()).unwrap());
}

/// A link where the store's own directories should be: what it names would be cleared at each start.
#[cfg(unix)]
#[test]
fn a_link_in_place_of_a_folder_is_refused() {
    for name in ["staging", "scratch", "cache", "mnt"] {
        let (home, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        drop(open(home.path()).unwrap());
        fs::write(other.path().join("precious"), b"x").unwrap();
        let path = home.path().join(name);
        files::remove_tree(&path).unwrap();
        std::os::unix::fs::symlink(other.path(), &path).unwrap();
        assert!(open(home.path()).unwrap_err().to_string().contains(name));
        assert_eq!(names(other.path()), ["precious"]);
    }
}

#[test]
fn staging_names_never_meet_those_of_an_earlier_process() {
    let home = tempfile::tempdir().unwrap();
    let stage = || {
        let store = open(home.path()).unwrap();
        let staged = store.stage(HERE, &id("a")).unwrap();
        let path = staged.path().to_owned();
        // As a kill leaves it.
        std::mem::forget(staged);
        path
    };
    // In a container the process has the same number after each start, and here it is the same process.
    assert_ne!(stage(), stage());
    assert_eq!(names(&home.path().join("staging")).len(), 2);
}

/// One step of a layer's life that changes the disk.
type Step = (&'static str, fn(&Store) -> Result<(), StoreError>);

fn set(store: &Store, state: LayerState) -> Result<(), StoreError> {
    let generation = store.find(&id("a"))?.generation;
    store
        .update(HERE, &id("a"), generation, |m| Ok::<_, StoreError>(LayerMeta { state, ..m.clone() }))
        .map(|_| ())
}

fn commit(store: &Store, state: LayerState, file: &str) -> Result<(), StoreError> {
    let generation = store.find(&id("a"))?.generation;
    let staged = store.stage(HERE, &id("a"))?;
    fs::write(staged.path().join(file), b"bytes").unwrap();
    store
        .commit(HERE, &id("a"), generation, staged, &[file], |m| {
            Ok::<_, StoreError>(LayerMeta { state, ..m.clone() })
        })
        .map(|_| ())
}

#[test]
fn memory_says_what_the_disk_says_whichever_sync_or_rename_fails() {
    use faults::Call;
    let steps: [(&[Step], Step); 7] = [
        (&[], ("create", |s| create(s, "a", None))),
        (&[("create", |s| create(s, "a", None))], ("mark", |s| set(s, LayerState::Applying))),
        (
            &[("create", |s| create(s, "a", None)), ("mark", |s| set(s, LayerState::Applying))],
            ("commit", |s| commit(s, LayerState::Applied, "layer.vhd")),
        ),
        (
            &[("create", |s| create(s, "a", None)), ("mark", |s| set(s, LayerState::Applying))],
            ("unmark", |s| set(s, LayerState::Created)),
        ),
        (
            &[("create", |s| create(s, "a", None))],
            ("materialize", |s| commit(s, LayerState::Sandbox, "sandbox.vhd")),
        ),
        (&[("create", |s| create(s, "a", None))], ("remove", |s| remove(s, &id("a")))),
        (
            &[],
            ("init", |s| {
                s.record_init(HERE, InitRecord { opts: vec!["x=y".into()], ..InitRecord::default() })
            }),
        ),
    ];
    let mut hits = std::collections::BTreeMap::new();
    for (before, (name, step)) in steps {
        for (call, forever) in
            [(Call::Sync, false), (Call::Sync, true), (Call::Rename, false), (Call::Rename, true)]
        {
            for nth in 1.. {
                let home = tempfile::tempdir().unwrap();
                let store = open(home.path()).unwrap();
                for (_, prepare) in before {
                    prepare(&store).unwrap();
                }
                faults::arm(call, nth, forever);
                let done = step(&store);
                let hit = faults::disarm();
                let what = format!("{name}, {call:?} {nth}, forever: {forever}: {done:?}");
                let seen = |store: &Store| {
                    (store.find(&id("a")).ok().map(|l| l.meta.map(|m| m.state)), store.marker().init)
                };
                let memory = seen(&store);
                let working = create(&store, "other", None);
                drop(store);
                let again = open(home.path()).unwrap();
                assert_eq!(memory, seen(&again), "{what}");
                if !hit {
                    done.unwrap();
                    break;
                }
                *hits.entry(name).or_insert(0) += 1;
                let error = done.expect_err(&what);
                working.unwrap_or_else(|e| panic!("{what}: the next one fails too: {e}"));
                // What failed has not happened, where it could be undone; what forbids something may stand.
                match (name, forever) {
                    ("create", false) => assert!(memory.0.is_none(), "{what}"),
                    ("commit" | "unmark", false) => {
                        assert_eq!(memory.0, Some(Ok(LayerState::Applying)), "{what}");
                    }
                    ("init", false) => assert_eq!(memory.1, InitRecord::default(), "{what}"),
                    _ => {}
                }
                assert!(error.to_string().contains(&*home.path().to_string_lossy()), "{error}");
                remove(&again, &id("a")).unwrap();
                again.collect(HERE, again.debris(HERE).unwrap());
                assert_eq!(names(&home.path().join("staging")), [""; 0], "{what}");
            }
        }
    }
    assert!(hits.len() == 7 && hits.values().all(|n| *n >= 4), "every step met failures: {hits:?}");
}

/// A state that cannot even be read after the failure is not guessed: the layer is refused, and read again.
#[test]
fn a_state_that_is_not_known_is_read_again_before_it_is_used() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    let path = home.path().join("a/layer.json");
    let generation = store.find(&id("a")).unwrap().generation;
    // The rename happens, its sync fails, and what stands there cannot be read.
    faults::arm(faults::Call::Sync, 2, false);
    faults::after(|path| fs::rename(path, path.with_extension("hidden")).unwrap(), &path);
    let failed = store.update(HERE, &id("a"), generation, |m| {
        Ok::<_, StoreError>(LayerMeta { state: LayerState::Applying, ..m.clone() })
    });
    assert!(faults::disarm());
    failed.unwrap_err();
    assert!(store.is_unsettled() && store.get(&id("a")).is_err());
    store.settle(HERE);
    assert!(store.is_unsettled(), "there is still nothing to read");
    fs::rename(path.with_extension("hidden"), &path).unwrap();
    store.settle(HERE);
    assert!(!store.is_unsettled());
    assert_eq!(store.get(&id("a")).unwrap().meta.state, LayerState::Applying);
}

/// Syncs of one layer take long; the others, and every look-up, do not wait for them.
#[test]
fn a_sync_that_is_held_back_holds_up_its_own_layer_only() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    create(&store, "b", None).unwrap();
    let (entered, wait) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            faults::hold(faults::Call::Sync, 1, move || {
                entered.send(()).unwrap();
                released.recv().unwrap();
            });
            set(&store, LayerState::Applying)
        });
        wait.recv().unwrap();
        let waiting = scope.spawn(|| set(&store, LayerState::Sandbox));
        // All of this while the sync stands still: it goes on when the last of it was answered.
        assert!(store.exists(&id("a")));
        assert_eq!(store.get(&id("a")).unwrap().meta.state, LayerState::Created);
        assert_eq!(store.layers().len(), 2);
        assert!(store.snapshot(&id("b")).is_ok());
        create(&store, "c", Some("a")).unwrap();
        let b = store.find(&id("b")).unwrap();
        store
            .update(HERE, &b.id, b.generation, |m| {
                Ok::<_, StoreError>(LayerMeta { state: LayerState::Applying, ..m.clone() })
            })
            .unwrap();
        remove(&store, &id("b")).unwrap();
        assert!(!waiting.is_finished(), "two work in one folder");
        release.send(()).unwrap();
        slow.join().unwrap().unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(store.get(&id("a")).unwrap().meta.state, LayerState::Sandbox);
}

/// A parent that is being removed takes no child, and a parent with a child that is being made is not removed.
#[test]
fn a_parent_is_there_as_long_as_a_child_is_being_made() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    let made: Result<(), StoreError> = store.create(
        HERE,
        &id("top"),
        Some(&id("base")),
        LayerState::Sandbox,
        LayerWishes::default(),
        |_| {
            assert!(!store.exists(&id("top")), "half a layer is shown");
            let error = remove(&store, &id("base")).unwrap_err();
            assert!(matches!(error, StoreError::HasChildren { .. }), "{error}");
            Err(StoreError::Usage("it comes to nothing".into()))
        },
    );
    made.unwrap_err();
    assert_eq!(store.children(&id("base")), []);
    remove(&store, &id("base")).unwrap();
}

#[test]
fn a_layer_that_is_about_to_go_gets_no_children() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    let closed = store.close_to_children(&id("base")).unwrap();
    let error = create(&store, "top", Some("base")).unwrap_err();
    assert!(matches!(error, StoreError::MissingParent { .. }), "{error}");
    // A removal that fails meanwhile leaves it as it was.
    drop(closed);
    create(&store, "top", Some("base")).unwrap();
    let error = store.close_to_children(&id("base")).unwrap_err();
    assert!(matches!(error, StoreError::HasChildren { .. }), "{error}");
    remove(&store, &id("top")).unwrap();
    let closed = store.close_to_children(&id("base")).unwrap();
    remove(&store, &id("base")).unwrap();
    drop(closed);
    create(&store, "base", None).unwrap();
    create(&store, "top", Some("base")).unwrap();
}

#[test]
fn a_later_format_is_refused_and_left_alone() {
    let home = tempfile::tempdir().unwrap();
    drop(open(home.path()).unwrap());
    let path = home.path().join("lcow-store.json");
    fs::write(&path, "{\"format\": 2, \"what\": \"ever\"}").unwrap();
    let error = open(home.path()).unwrap_err();
    assert!(matches!(error, StoreError::UnsupportedFormat { found: 2, known: 1, .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "{\"format\": 2, \"what\": \"ever\"}");
}

#[test]
fn init_is_kept_across_restarts() {
    let home = tempfile::tempdir().unwrap();
    let init = InitRecord {
        opts: vec!["lcow.sandboxsize=30".into()],
        uid_maps: vec![IdRange { container_id: 0, host_id: 500_000, size: 65536 }],
        gid_maps: vec![],
    };
    open(home.path()).unwrap().record_init(HERE, init.clone()).unwrap();
    assert_eq!(open(home.path()).unwrap().marker().init, init);
}

#[test]
fn a_reader_works_beside_the_owner() {
    let home = tempfile::tempdir().unwrap();
    let owner = open(home.path()).unwrap();
    create(&owner, "a", None).unwrap();
    let reader = Store::open_read_only(HERE, home.path()).unwrap();
    assert!(reader.exists(&id("a")));
    assert!(Store::open_read_only(HERE, &home.path().join("a")).is_err());
    assert!(matches!(Store::open(HERE, home.path(), |_| false), Err(StoreError::Locked { .. })));
}

#[test]
fn the_reserve_refuses_before_the_disk_is_full() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    store.check_reserve(100, 100).unwrap();
    assert!(matches!(store.check_reserve(100, 99), Err(StoreError::LowSpace { .. })));
}

/// Only Windows refuses to delete what somebody has open.
#[cfg(windows)]
#[test]
fn a_staging_folder_in_use_goes_with_the_next_removal() {
    use std::os::windows::fs::OpenOptionsExt;
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    let staged = store.stage(HERE, &id("a")).unwrap();
    let path = staged.path().join("layer.vhd");
    let held = fs::OpenOptions::new().write(true).create_new(true).share_mode(0).open(path).unwrap();
    drop(staged);
    let staging = home.path().join("staging");
    assert_eq!(names(&staging).len(), 1);
    let worker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(held);
    });
    remove(&store, &id("a")).unwrap();
    worker.join().unwrap();
    assert_eq!(names(&staging), Vec::<String>::new());
}

/// What the system says of the lists, not what was asked for.
#[cfg(windows)]
#[test]
fn folders_of_the_store_admit_those_whom_they_should() {
    use super::files::{LAYER_ACCESS, PRIVATE_ACCESS};
    use lcow_sys::windows::security::{access_list, is_wine, rights};
    let outer = tempfile::tempdir().unwrap();
    let home = outer.path().join("home");
    let store = open(&home).unwrap();
    create(&store, "base", None).unwrap();
    let (layer, file) = (home.join("base"), home.join("base").join(layout::META_FILE));
    for (path, asked) in [(&home, PRIVATE_ACCESS), (&layer, LAYER_ACCESS), (&file, LAYER_ACCESS)] {
        let (found, path) = (access_list(path).unwrap(), path.display());
        if !is_wine() {
            assert_eq!(rights(&found), rights(asked), "{path}: {found}");
        } else if !path.to_string().ends_with(".json") {
            // A mode of 0700 is all that Wine keeps of it; files do not even get that.
            assert!(found.contains(";FA;;;SY)") && !found.contains(";WD)"), "{path}: {found}");
        }
    }
    if !is_wine() {
        for path in [&home, &layer] {
            let found = access_list(path).unwrap();
            assert!(found.starts_with("D:P"), "what the folder above admits counts too: {found}");
        }
    }
}

/// Failures and pauses of the next calls of this thread that make a change durable.
pub(super) mod faults {
    use std::{
        cell::{Cell, RefCell},
        io,
        path::{Path, PathBuf},
    };

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in crate::store) enum Call {
        Sync,
        Rename,
    }

    type Pause = Box<dyn FnOnce()>;
    type Change = (fn(&Path), PathBuf);

    thread_local! {
        static PLAN: Cell<Option<(Call, u32, bool)>> = const { Cell::new(None) };
        static HIT: Cell<bool> = const { Cell::new(false) };
        static PAUSE: RefCell<Option<Pause>> = const { RefCell::new(None) };
        static AFTER: RefCell<Option<Change>> = const { RefCell::new(None) };
    }

    /// The `nth` call of a kind fails, or each from then on.
    pub(in crate::store) fn arm(call: Call, nth: u32, forever: bool) {
        PLAN.set(Some((call, nth, forever)));
        HIT.set(false);
    }

    /// Something that happens to `path` when the failure does.
    pub(in crate::store) fn after(change: fn(&Path), path: &Path) {
        AFTER.set(Some((change, path.to_owned())));
    }

    /// The `nth` call of a kind lasts as long as `pause`.
    pub(in crate::store) fn hold(call: Call, nth: u32, pause: impl FnOnce() + 'static) {
        PAUSE.set(Some(Box::new(pause)));
        PLAN.set(Some((call, nth, false)));
    }

    /// No more failures; whether there was one.
    pub(in crate::store) fn disarm() -> bool {
        PLAN.set(None);
        HIT.get()
    }

    /// Asked before each call.
    pub(in crate::store) fn point(call: Call) -> io::Result<()> {
        let Some((planned, nth, forever)) = PLAN.get().filter(|(planned, ..)| *planned == call) else {
            return Ok(());
        };
        PLAN.set((nth > 1).then_some((planned, nth - 1, forever)).or(forever.then_some((planned, 1, true))));
        if nth > 1 {
            return Ok(());
        }
        if let Some(pause) = PAUSE.take() {
            pause();
            return Ok(());
        }
        if let Some((change, path)) = AFTER.take() {
            change(&path);
        }
        HIT.set(true);
        Err(io::Error::from_raw_os_error(5))
    }
}
