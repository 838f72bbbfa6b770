//! Which number a file has: one device and unique inode numbers in every view, with `lcow.mount=overlay`. Needs root.
//!
//! Every image numbers its inodes from the same beginning, so each layer here has the same numbers as all the others.

use crate::support::{Plugin, Tar};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    os::unix::fs::{DirEntryExt, MetadataExt},
    path::Path,
};

/// Layers below a container at most: 127 images and the engine's `-init` layer would be one too many for a chain.
const MOST: usize = 126;
/// Owner of everything in the layers.
const HOST_ROOT: u64 = 500_000;

/// Two names of one file, a file with one name, and a file in a folder that every layer has.
fn layer(n: usize) -> Vec<u8> {
    let content = format!("of layer {n}\n");
    Tar::new()
        .dir("shared/")
        .dir(&format!("own{n}/"))
        .file(&format!("own{n}/a"), content.as_bytes())
        .entry(&format!("own{n}/b"), b'1', 0o644, &format!("own{n}/a"), b"")
        .file(&format!("own{n}/single"), content.as_bytes())
        .file(&format!("shared/{n}"), content.as_bytes())
        .end()
}

fn pair(n: usize) -> BTreeSet<String> {
    [format!("own{n}/a"), format!("own{n}/b")].into()
}

/// The number of every path below `dir`, which must all be of one device and the same in `stat` and in the folder's
/// list.
fn numbers(dir: &Path) -> BTreeMap<String, u64> {
    let device = fs::metadata(dir).unwrap().dev();
    let (mut found, mut open) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let (path, meta) = (entry.path(), entry.path().symlink_metadata().unwrap());
            assert_eq!(meta.dev(), device, "{} is of another device than its view", path.display());
            assert_eq!(meta.ino(), entry.ino(), "stat and the folder differ about {}", path.display());
            found.insert(path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned(), meta.ino());
            if meta.is_dir() {
                open.push(path);
            }
        }
    }
    found
}

/// Fails unless exactly the paths of each group share a number; returns the numbers.
fn assert_groups(dir: &Path, groups: &BTreeSet<BTreeSet<String>>) -> BTreeMap<String, u64> {
    let numbers = numbers(dir);
    let mut names: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    for (path, number) in &numbers {
        names.entry(*number).or_default().insert(path.clone());
    }
    let shared: BTreeSet<_> = names.into_values().filter(|paths| paths.len() > 1).collect();
    assert_eq!(&shared, groups, "paths that have one number");
    numbers
}

fn init(plugin: &Plugin, maps: bool) {
    let map =
        if maps { json!([{"container_id": 0, "host_id": HOST_ROOT, "size": 65536}]) } else { json!(null) };
    plugin.ok(
        "GraphDriver.Init",
        &json!({"Home": plugin.home(), "Opts": null, "UIDMaps": map, "GIDMaps": map}),
    );
}

fn sandbox(plugin: &Plugin, id: &str, parent: &str, options: &serde_json::Value) {
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": id, "Parent": parent, "StorageOpt": options}));
}

fn append(path: &Path) {
    fs::File::options().append(true).open(path).unwrap().write_all(b"more\n").unwrap();
}

fn views_have_one_identity(api: &str, maps: bool) {
    let plugin = Plugin::start(&["--storage-opt", &format!("lcow.overlayapi={api}")]);
    init(&plugin, maps);
    let mut parent = String::new();
    for n in 0..MOST {
        let id = format!("layer{n}");
        plugin.layer(&id, &parent, &layer(n));
        parent = id;
    }
    let groups = |count: usize| (0..count).map(pair).collect::<BTreeSet<_>>();
    // Views without a sandbox: of one layer, of two, of all.
    for count in [1, 2, MOST] {
        let id = format!("layer{}", count - 1);
        assert_groups(&plugin.get(&id), &groups(count));
        plugin.put(&id);
    }
    let size = json!({"size": "64m"});
    sandbox(&plugin, "alone", "", &size);
    let dir = plugin.get("alone");
    for name in ["x", "y"] {
        fs::write(dir.join(name), name).unwrap();
    }
    fs::hard_link(dir.join("x"), dir.join("z")).unwrap();
    assert_groups(&dir, &[["x", "z"].map(String::from).into()].into());
    plugin.put("alone");
    for count in [1, MOST] {
        let id = format!("on{count}");
        sandbox(&plugin, &id, &format!("layer{}", count - 1), &size);
        let dir = plugin.get(&id);
        let first = assert_groups(&dir, &groups(count));
        if maps {
            assert_eq!(u64::from(fs::metadata(dir.join("own0/a")).unwrap().uid()), HOST_ROOT);
        }
        // What has one name keeps its number when it is copied up; each copied name of a linked file gets its own.
        let last = count - 1;
        for path in [format!("own{last}/single"), format!("shared/{last}"), format!("own{last}/b")] {
            append(&dir.join(path));
        }
        let copied = format!("own{last}/b");
        let mut expected = groups(count);
        expected.remove(&pair(last));
        let same_but_copied = |numbers: &BTreeMap<String, u64>| {
            for (path, number) in numbers.iter().filter(|(path, _)| **path != copied) {
                assert_eq!(first[path], *number, "{path} has another number now");
            }
            assert_ne!(first[&copied], numbers[&copied], "{copied} is a file of its own now");
        };
        let second = assert_groups(&dir, &expected);
        same_but_copied(&second);
        plugin.put(&id);
        let third = assert_groups(&plugin.get(&id), &expected);
        same_but_copied(&third);
        assert_eq!(second[&copied], third[&copied]);
        plugin.put(&id);
    }
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
}

#[test]
fn files_of_126_layers_have_one_device_and_unique_numbers() {
    views_have_one_identity("new", false);
}

#[test]
fn files_of_126_layers_have_one_device_and_unique_numbers_by_one_option_string() {
    views_have_one_identity("legacy", false);
}

#[test]
fn files_of_126_layers_have_one_device_and_unique_numbers_under_userns_remap() {
    views_have_one_identity("auto", true);
}

#[test]
fn a_layer_that_is_twice_in_the_chain_has_new_numbers_at_the_next_mount() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    for (id, parent, n) in [("twice", "", 0), ("once", "twice", 1), ("again", "once", 0)] {
        plugin.layer(id, parent, &layer(n));
    }
    let uuid =
        |id: &str| plugin.ok("GraphDriver.GetMetadata", &json!({"ID": id}))["Metadata"]["uuid"].clone();
    assert_eq!(uuid("twice"), uuid("again"), "the same content is the same file system");
    sandbox(&plugin, "c", "again", &json!({"size": "64m"}));
    let dir = plugin.get("c");
    let groups: BTreeSet<_> = [pair(0), pair(1)].into();
    let first = assert_groups(&dir, &groups);
    let paths = ["own0/single", "own1/single"];
    for path in paths {
        append(&dir.join(path));
    }
    let second = assert_groups(&dir, &groups);
    assert_eq!(paths.map(|p| first[p]), paths.map(|p| second[p]), "while it is mounted numbers stay");
    plugin.put("c");
    let third = assert_groups(&plugin.get("c"), &groups);
    assert_eq!(first[paths[1]], third[paths[1]], "its layer is there once");
    assert_ne!(first[paths[0]], third[paths[0]], "docs/operations.md says that it gets a new number");
    plugin.put("c");
}

#[test]
fn one_container_or_the_store_can_have_small_numbers() {
    /// Numbers that a program without large-file support can hold.
    const SMALL: u64 = 1 << 32;
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &layer(0));
    plugin.layer("next", "base", &layer(1));
    let largest = |plugin: &Plugin, id: &str| {
        let dir = plugin.get(id);
        let number = |path: &str| fs::metadata(dir.join(path)).unwrap().ino();
        let largest = ["own0/a", "own1/a", "own1"].map(number).into_iter().max().unwrap();
        plugin.put(id);
        largest
    };
    sandbox(&plugin, "small", "next", &json!({"xino": "off", "size": "64m"}));
    sandbox(&plugin, "large", "next", &json!({"xino": "on", "size": "64m"}));
    sandbox(&plugin, "usual", "next", &json!({"size": "64m"}));
    plugin.ok("GraphDriver.Create", &json!({"ID": "step", "Parent": "next", "StorageOpt": {"xino": "off"}}));
    let smallness =
        |plugin: &Plugin| ["small", "step", "large", "usual"].map(|id| largest(plugin, id) < SMALL);
    assert_eq!(smallness(&plugin), [true, true, false, false]);
    // It is the layer's own, whatever process shows it, and stronger than the store's.
    plugin.kill();
    plugin.arguments.extend(["--storage-opt", "lcow.xino=off"].map(String::from));
    plugin.start_again();
    assert_eq!(smallness(&plugin), [true, true, false, true]);
    let text = plugin.err(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": "x", "Parent": "next", "StorageOpt": {"xino": "auto"}}),
    );
    assert!(text.contains("xino: 'auto' is not accepted; give on or off"), "{text}");
}
