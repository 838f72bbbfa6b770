//! Who may come in: other users of the host, folders that are somebody else's, sandboxes that a machine has had.
//!
//! Needs root: it becomes another user, and gives folders away.

use crate::support::{Plugin, Tar, transport};
use serde_json::json;
use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
};

/// An ordinary user.
const USER: &str = "12345";

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

fn open_to_all(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

/// What an ordinary user gets of a program: its output, or nothing. By a shell: setpriv itself keeps its capabilities
/// until it has found the program, and would walk through any wall.
fn as_user(program: &Path) -> Option<String> {
    let output = Command::new("setpriv")
        .args(["--reuid", USER, "--regid", USER, "--clear-groups"])
        .args(["sh", "-c", "exec \"$0\" -u"])
        .arg(program)
        .output()
        .unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

/// A base layer with a program that is root's whoever starts it, and a sandbox on it that is shown.
fn show_suid(plugin: &Plugin) -> std::path::PathBuf {
    let program = fs::read("/usr/bin/id").unwrap();
    plugin.layer("img", "", &Tar::new().entry("id", b'0', 0o4755, "", &program).end());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": "img"}));
    plugin.get("rw").join("id")
}

#[test]
fn no_other_user_of_the_host_becomes_root_through_a_view() {
    let mut plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=32MiB"]);
    // The folders above are passable: the store's own must be the wall.
    open_to_all(&plugin.folder.clone());
    assert_eq!(as_user(Path::new("/usr/bin/id")), Some(format!("{USER}\n")));
    // Without an Init the root is the home.
    let root = plugin.folder.join("root");
    let program = show_suid(&plugin);
    assert!(program.starts_with(&root) && program.exists());
    assert_eq!(as_user(&program), None, "a user became root");
    let shown = plugin.get("img").join("id");
    assert_eq!(as_user(&shown), None, "a user became root through an image");
    // As release 1 left it, and while the service was away.
    plugin.terminate();
    open_to_all(&root);
    open_to_all(&root.join("rw"));
    plugin.start_again();
    // The first request opens the root as a home.
    plugin.ok("GraphDriver.Exists", &json!({"ID": "rw"}));
    assert_eq!((mode(&root), mode(&root.join("rw"))), (0o700, 0o700));
    assert_eq!(as_user(&program), None, "a user became root after a restart");
    for id in ["img", "rw"] {
        plugin.put(id);
    }
    // An Init whose home is there and open to everybody.
    let home = plugin.home();
    fs::create_dir(&home).unwrap();
    open_to_all(&home);
    plugin.init();
    let program = show_suid(&plugin);
    assert!(program.starts_with(&home));
    assert_eq!((mode(&home), mode(&home.join("rw"))), (0o700, 0o700));
    assert_eq!(as_user(&program), None, "a user became root through a home that was there");
    // A view that works does not open the way.
    open_to_all(&home);
    plugin.kill_and_restart();
    assert_eq!(mode(&home), 0o700);
    assert!(plugin.log().contains("other users could enter"), "{}", plugin.log());
    // The bits are no dummy: with the wall opened by hand they work.
    for folder in [&home, &home.join("rw")] {
        open_to_all(folder);
    }
    assert_eq!(as_user(&program).as_deref(), Some("0\n"));
}

#[test]
fn with_a_user_namespace_one_group_may_pass_and_nobody_else() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=32MiB"]);
    let maps = json!([{"container_id": 0, "host_id": 300_000, "size": 65536}]);
    let home = plugin.home();
    fs::create_dir(&home).unwrap();
    open_to_all(&home);
    plugin.ok("GraphDriver.Init", &json!({"Home": home, "Opts": [], "UIDMaps": maps, "GIDMaps": maps}));
    let program = show_suid(&plugin);
    for folder in [&home, &home.join("rw")] {
        assert_eq!(mode(folder), 0o710, "{}", folder.display());
        assert_eq!(fs::metadata(folder).unwrap().gid(), 300_000);
    }
    assert_eq!(as_user(&program), None);
    assert_eq!(mode(&plugin.folder.join("root")), 0o700, "the home is not below it");
}

#[test]
fn a_home_of_another_user_is_refused() {
    let plugin = Plugin::start(&[]);
    let home = plugin.home();
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(12_345), None).unwrap();
    let text = plugin.err("GraphDriver.Init", &json!({"Home": home}));
    assert!(text.contains("12345") && text.contains("belongs"), "{text}");
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
    std::os::unix::fs::chown(&home, Some(0), None).unwrap();
    plugin.init();
}

#[test]
fn a_folder_with_foreign_content_is_no_home_and_nothing_in_it_is_touched() {
    let plugin = Plugin::start(&[]);
    let home = plugin.home();
    fs::create_dir_all(home.join("precious")).unwrap();
    fs::write(home.join("precious/work"), b"of years").unwrap();
    open_to_all(&home);
    for foreign in [home.as_path(), Path::new("/"), Path::new("/etc"), Path::new("/usr")] {
        let before = mode(foreign);
        let text = plugin.err("GraphDriver.Init", &json!({"Home": foreign}));
        assert!(text.contains("not empty"), "{text}");
        assert_eq!(mode(foreign), before);
        assert!(!foreign.join("owner.lock").exists() && !foreign.join("lcow-store.json").exists());
    }
    // The refused Init changed nothing: the next one with another home works, and so does a restart.
    let other = plugin.folder.join("other");
    plugin.ok("GraphDriver.Init", &json!({"Home": other}));
    // A folder that somebody put into the store.
    fs::create_dir(other.join("stranger")).unwrap();
    fs::write(other.join("stranger/work"), b"of years").unwrap();
    let mut plugin = plugin;
    plugin.kill_and_restart();
    assert_eq!(plugin.ok("GraphDriver.Exists", &json!({"ID": "stranger"}))["Exists"], false);
    assert!(plugin.err("GraphDriver.Remove", &json!({"ID": "stranger"})).contains("left alone"));
    assert!(plugin.err("GraphDriver.Create", &json!({"ID": "stranger"})).contains("left alone"));
    assert_eq!(fs::read(other.join("stranger/work")).unwrap(), b"of years");
    assert_eq!(fs::read(home.join("precious/work")).unwrap(), b"of years");
}

#[test]
fn a_root_that_is_open_and_somebody_elses_is_refused_and_stays_open() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("root");
    fs::create_dir_all(root.join("precious")).unwrap();
    open_to_all(&root);
    let serve = || {
        Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .args(["serve", "--root"])
            .arg(&root)
            .arg(transport::FLAG)
            .arg(transport::address(outer.path()))
            .output()
            .unwrap()
    };
    let refused = serve();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("--root"), "{text}");
    assert_eq!((mode(&root), fs::read_dir(&root).unwrap().count()), (0o755, 1));
}

#[test]
fn owner_lock_is_never_written_through_a_link() {
    let plugin = Plugin::start(&[]);
    let home = plugin.home();
    let precious = plugin.folder.join("precious");
    fs::write(&precious, b"of years").unwrap();
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::symlink(&precious, home.join("owner.lock")).unwrap();
    let text = plugin.err("GraphDriver.Init", &json!({"Home": home}));
    assert!(text.contains("owner.lock"), "{text}");
    assert_eq!(fs::read(&precious).unwrap(), b"of years");
}

fn init(plugin: &Plugin, mount: &str) {
    let option = format!("lcow.mount={mount}");
    plugin.ok("GraphDriver.Init", &json!({"Home": plugin.home(), "Opts": [option]}));
}

#[test]
fn a_sandbox_that_a_machine_has_had_is_never_mounted_by_the_host() {
    let mut plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=32MiB"]);
    init(&plugin, "overlay");
    plugin.layer("base", "", &Tar::new().file("f", b"x").end());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "below", "Parent": "base"}));
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "sb", "Parent": "below"}));
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "kept", "Parent": "base"}));
    // What the host has mounted, no machine gets: as a layer and as an ancestor.
    for (held, asked) in [("sb", "sb"), ("below", "sb")] {
        plugin.get(held);
        init(&plugin, "none");
        let text = plugin.err("GraphDriver.Get", &json!({"ID": asked}));
        assert!(text.contains("its sandbox is mounted on the host"), "{text}");
        init(&plugin, "overlay");
        plugin.put(held);
    }
    let noted = |id: &str| {
        let text = fs::read(plugin.home().join(id).join("layer.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()["handed_out"] == true
    };
    assert!(!noted("sb"));
    init(&plugin, "none");
    assert_eq!(plugin.get("sb"), plugin.home().join("sb"));
    plugin.put("sb");
    assert!(noted("sb") && noted("below") && !noted("base") && !noted("kept"));
    plugin.ok("GraphDriver.Create", &json!({"ID": "child", "Parent": "sb"}));
    for restart in [false, true] {
        if restart {
            plugin.kill_and_restart();
        }
        init(&plugin, "overlay");
        for id in ["sb", "below", "child"] {
            let text = plugin.err("GraphDriver.Get", &json!({"ID": id}));
            assert!(text.contains("handed to a virtual machine"), "{text}");
        }
        plugin.get("kept");
        plugin.put("kept");
        plugin.get("base");
        plugin.put("base");
        assert_eq!(plugin.mounts(), [""; 0]);
    }
    // It can still be read where nobody but a service VM is at risk, and given out again.
    plugin.diff("sb", "below");
    init(&plugin, "none");
    plugin.get("sb");
    assert_eq!(plugin.ok("GraphDriver.GetMetadata", &json!({"ID": "sb"}))["Metadata"]["handed_out"], "true");
}
