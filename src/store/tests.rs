//! Tests of the store: states, crash points, removal.

use super::*;

fn id(text: &str) -> LayerId {
    text.parse().unwrap()
}

fn create(store: &Store, name: &str, parent: Option<&str>) -> Result<(), StoreError> {
    let parent = parent.map(id);
    store.create(&id(name), parent.as_ref(), LayerState::Created, None, |_| Ok(()))
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
        let store = Store::open(home.path()).unwrap();
        create(&store, "base", None).unwrap();
        create(&store, "mid", Some("base")).unwrap();
        create(&store, "top", Some("mid")).unwrap();
        store.marker().store_id
    };
    let store = Store::open(home.path()).unwrap();
    assert_eq!(store.marker().store_id, store_id);
    assert!(store.marker().reproduces_exact_diffs);
    let Member { layer: top, meta } = store.get(&id("top")).unwrap();
    assert_eq!(top.chain[..], [id("mid"), id("base")]);
    assert_eq!(meta.state, LayerState::Created);
    assert_eq!(store.children(&id("base")), [id("mid")]);
    assert!(store.structural_faults().is_empty());
}

#[test]
fn a_moved_home_keeps_working() {
    let outer = tempfile::tempdir().unwrap();
    let (old, new) = (outer.path().join("old"), outer.path().join("new"));
    let store = Store::open(&old).unwrap();
    create(&store, "base", None).unwrap();
    create(&store, "top", Some("base")).unwrap();
    drop(store);
    fs::rename(&old, &new).unwrap();
    let store = Store::open(&new).unwrap();
    assert_eq!(store.find(&id("top")).unwrap().chain[..], [id("base")]);
    assert!(store.structural_faults().is_empty());
}

#[test]
fn wrong_creates_change_nothing() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    let before = names(home.path());
    assert!(matches!(create(&store, "base", None), Err(StoreError::Exists(_))));
    assert!(matches!(create(&store, "x", Some("nobody")), Err(StoreError::MissingParent { .. })));
    let failed: Result<(), StoreError> = store.create(&id("y"), None, LayerState::Sandbox, None, |folder| {
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
    let store = Store::open(home.path()).unwrap();
    create(&store, "l0", None).unwrap();
    for n in 1..=chain::MAX_CHAIN {
        create(&store, &format!("l{n}"), Some(&format!("l{}", n - 1))).unwrap();
    }
    let error = create(&store, "over", Some(&format!("l{}", chain::MAX_CHAIN))).unwrap_err();
    assert!(matches!(error, StoreError::TooDeep { depth: 129, max: 128, .. }), "{error}");
}

#[test]
fn remove_is_idempotent_and_never_breaks_a_child() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    create(&store, "top", Some("base")).unwrap();
    let error = store.remove(&id("base")).unwrap_err();
    assert!(error.to_string().contains("top"), "{error}");
    assert!(store.exists(&id("base")));
    // Fault 15 of the original: a left-over of an earlier removal blocks every later one.
    fs::create_dir(home.path().join("top-removing")).unwrap();
    fs::write(home.path().join("top-removing/file"), b"x").unwrap();
    store.remove(&id("top")).unwrap();
    store.remove(&id("top")).unwrap();
    store.remove(&id("base")).unwrap();
    store.remove(&id("never-there")).unwrap();
    assert!(store.is_empty());
    let report = store.collect(store.debris().unwrap());
    assert_eq!(report.deleted.len(), 1);
    assert!(report.failed.is_empty());
    assert!(!home.path().join("top-removing").exists());
}

#[test]
fn debris_of_a_crash_is_found_and_layers_are_not_touched() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    create(&store, "base", None).unwrap();
    drop(store);
    fs::create_dir(home.path().join("staging/base.1.7")).unwrap();
    fs::write(home.path().join("staging/base.1.7/layer.vhd"), b"torn").unwrap();
    fs::create_dir(home.path().join("staging/x-removing.1.8")).unwrap();
    fs::write(home.path().join("scratch/vm.vhdx"), b"").unwrap();
    let store = Store::open(home.path()).unwrap();
    let report = store.collect(store.debris().unwrap());
    let mut kinds: Vec<_> = report.deleted.iter().map(|d| d.kind).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["removed layer", "scratch disk", "unfinished layer"]);
    assert!(store.exists(&id("base")));
    assert_eq!(names(&home.path().join("staging")), [""; 0]);
}

#[test]
fn commit_moves_files_first_and_changes_the_state_last() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    let layer = store.find(&id("a")).unwrap();
    let staged = store.stage(&id("a")).unwrap();
    fs::write(staged.path().join("layer.vhd"), b"image").unwrap();
    // A file that is missing from the staging folder stops the commit before the state changes.
    let failed: Result<_, StoreError> =
        store.commit(&id("a"), layer.generation, &staged, &["layer.exact", "layer.vhd"], |m| {
            Ok(LayerMeta { state: LayerState::Applied, ..m.clone() })
        });
    assert!(failed.is_err());
    assert_eq!(store.get(&id("a")).unwrap().meta.state, LayerState::Created);
    // A layer that was removed and created anew meanwhile is another layer.
    store.remove(&id("a")).unwrap();
    create(&store, "a", None).unwrap();
    let stale: Result<_, StoreError> =
        store.commit(&id("a"), layer.generation, &staged, &["layer.vhd"], |m| Ok(m.clone()));
    assert!(matches!(stale, Err(StoreError::NotFound(_))));
}

#[test]
fn a_damaged_layer_is_refused_everything_but_removal() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    drop(store);
    fs::write(home.path().join("a/layer.json"), b"{\"state\":\"nonsense\"}").unwrap();
    fs::create_dir(home.path().join("foreign")).unwrap();
    let store = Store::open(home.path()).unwrap();
    assert!(store.exists(&id("a")));
    assert!(store.get(&id("a")).unwrap_err().to_string().contains("damaged"));
    assert!(matches!(create(&store, "b", Some("a")), Err(StoreError::WrongState { .. })));
    assert_eq!(store.structural_faults().len(), 2);
    store.remove(&id("a")).unwrap();
    store.remove(&id("foreign")).unwrap();
    assert!(store.structural_faults().is_empty());
}

#[test]
fn a_later_format_is_refused_and_left_alone() {
    let home = tempfile::tempdir().unwrap();
    drop(Store::open(home.path()).unwrap());
    let path = home.path().join("lcow-store.json");
    fs::write(&path, "{\"format\": 2, \"what\": \"ever\"}").unwrap();
    let error = Store::open(home.path()).unwrap_err();
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
    Store::open(home.path()).unwrap().record_init(init.clone()).unwrap();
    assert_eq!(Store::open(home.path()).unwrap().marker().init, init);
}

#[test]
fn a_reader_works_beside_the_owner() {
    let home = tempfile::tempdir().unwrap();
    let owner = Store::open(home.path()).unwrap();
    create(&owner, "a", None).unwrap();
    let reader = Store::open_read_only(home.path()).unwrap();
    assert!(reader.exists(&id("a")));
    assert!(Store::open_read_only(&home.path().join("a")).is_err());
    assert!(matches!(Store::open(home.path()), Err(StoreError::Locked { .. })));
}

#[test]
fn the_reserve_refuses_before_the_disk_is_full() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    store.check_reserve(100, 100).unwrap();
    assert!(matches!(store.check_reserve(100, 99), Err(StoreError::LowSpace { .. })));
}

/// Only Windows refuses to delete what somebody has open.
#[cfg(windows)]
#[test]
fn a_staging_folder_in_use_goes_with_the_next_removal() {
    use std::os::windows::fs::OpenOptionsExt;
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    create(&store, "a", None).unwrap();
    let staged = store.stage(&id("a")).unwrap();
    let path = staged.path().join("layer.vhd");
    let held = fs::OpenOptions::new().write(true).create_new(true).share_mode(0).open(path).unwrap();
    drop(staged);
    let staging = home.path().join("staging");
    assert_eq!(names(&staging).len(), 1);
    let worker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(held);
    });
    store.remove(&id("a")).unwrap();
    worker.join().unwrap();
    assert_eq!(names(&staging), Vec::<String>::new());
}

/// What the system says of the lists, not what was asked for.
#[cfg(windows)]
#[test]
fn folders_of_the_store_admit_those_whom_they_should() {
    use crate::sys::windows::security::{access_list, is_wine, rights};
    let outer = tempfile::tempdir().unwrap();
    let home = outer.path().join("home");
    let store = Store::open(&home).unwrap();
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
