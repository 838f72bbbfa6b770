//! ApplyDiff of a layer that was shown: taken if nothing was ever written into it, refused with the reason otherwise.
//! moby's graphtest (scripts/graphtest) does the same with moby's own client.

use super::small_tar;
use crate::support::{Plugin, Tar};
use serde_json::json;

fn tar() -> Vec<u8> {
    Tar::new().dir("etc/").file("etc/issue", b"applied\n").end()
}

/// Applies to `id`, which must be refused with all of `words`.
fn refused(plugin: &Plugin, id: &str, words: &[&str]) {
    let reply = plugin.apply(id, "base", &tar());
    assert_ne!(reply.status, 200, "a tar was taken by {id}");
    for word in words {
        assert!(reply.text().contains(word), "no \"{word}\" in: {}", reply.text());
    }
}

fn create(plugin: &Plugin, id: &str, parent: &str) {
    plugin.ok("GraphDriver.Create", &json!({"ID": id, "Parent": parent}));
}

#[cfg(target_os = "linux")]
mod shown {
    use super::{create, refused, small_tar, tar};
    use crate::support::Plugin;
    use serde_json::json;
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, chown},
        path::Path,
        process::Command,
    };

    fn start() -> Plugin {
        let plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=64m"]);
        plugin.init();
        plugin.layer("base", "", &small_tar());
        plugin
    }

    /// Create, Get, `change`, Put.
    fn visited(plugin: &Plugin, id: &str, change: impl FnOnce(&Path)) {
        create(plugin, id, "base");
        change(&plugin.get(id));
        plugin.put(id);
    }

    fn taken(plugin: &Plugin, id: &str) {
        let reply = plugin.apply(id, "base", &tar());
        assert_eq!(reply.status, 200, "{id}: {}\n{}", reply.text(), plugin.log());
        assert!(plugin.diff(id, "base") == tar(), "{id}: not the tar that was applied");
        assert!(!plugin.home().join(id).join("sandbox.vhd").exists(), "{id}: its sandbox is still there");
        let dir = plugin.get(id);
        assert_eq!(fs::read(dir.join("etc/issue")).unwrap(), b"applied\n");
        assert_eq!(fs::read(dir.join("etc/motd")).unwrap(), b"hello\n");
        plugin.put(id);
        refused(plugin, id, &["already applied"]);
    }

    #[test]
    fn a_layer_that_was_shown_and_never_written_takes_a_tar() {
        let plugin = start();
        visited(&plugin, "looked-at", |dir| {
            assert_eq!(fs::read(dir.join("etc/motd")).unwrap(), b"hello\n");
        });
        taken(&plugin, "looked-at");
        // What is gone again was never there, and times of the root do not count.
        visited(&plugin, "tidied", |dir| {
            fs::write(dir.join("made"), "x").unwrap();
            fs::create_dir(dir.join("folder")).unwrap();
            fs::remove_file(dir.join("made")).unwrap();
            fs::remove_dir(dir.join("folder")).unwrap();
        });
        taken(&plugin, "tidied");
        // Twice, with a Diff and a DiffSize between.
        visited(&plugin, "twice", |_| ());
        assert_eq!(plugin.ok("GraphDriver.DiffSize", &json!({"ID": "twice", "Parent": "base"}))["Size"], 0);
        plugin.get("twice");
        plugin.put("twice");
        taken(&plugin, "twice");
        // Compared without ever being shown.
        create(&plugin, "compared", "base");
        assert!(plugin.diff("compared", "base").iter().all(|b| *b == 0));
        taken(&plugin, "compared");
        assert_eq!(plugin.mounts(), [""; 0]);
    }

    #[test]
    fn a_layer_that_was_written_keeps_what_it_has() {
        let plugin = start();
        let run = |program: &str, arguments: &[&str], path: &Path| {
            assert!(Command::new(program).args(arguments).arg(path).status().unwrap().success());
        };
        type Change<'a> = &'a dyn Fn(&Path);
        let changes: [(&str, Change<'_>); 9] = [
            ("file", &|dir| fs::write(dir.join("made"), "x").unwrap()),
            ("folder", &|dir| fs::create_dir(dir.join("made")).unwrap()),
            ("deleted", &|dir| fs::remove_file(dir.join("big")).unwrap()),
            ("changed", &|dir| fs::write(dir.join("etc/motd"), "changed").unwrap()),
            ("mode", &|dir| {
                fs::set_permissions(dir.join("etc"), fs::Permissions::from_mode(0o700)).unwrap();
            }),
            ("root-mode", &|dir| fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap()),
            ("root-owner", &|dir| chown(dir, Some(7), None).unwrap()),
            ("root-group", &|dir| chown(dir, None, Some(7)).unwrap()),
            ("root-xattr", &|dir| run("setfattr", &["-n", "user.mine", "-v", "y"], dir)),
        ];
        for (id, change) in changes {
            visited(&plugin, id, change);
            refused(&plugin, id, &["was written"]);
            // It is as it was, and can be shown, compared and removed.
            let shown = plugin.get(id);
            assert!(!shown.join("etc/issue").exists());
            match id {
                "file" => assert_eq!(fs::read(shown.join("made")).unwrap(), b"x"),
                "deleted" => assert!(!shown.join("big").exists()),
                "root-mode" => {
                    assert_eq!(fs::metadata(&shown).unwrap().permissions().mode() & 0o7777, 0o700);
                }
                _ => {}
            }
            plugin.put(id);
            plugin.remove(id);
        }
        assert_eq!(plugin.mounts(), [""; 0]);
    }

    #[test]
    fn a_layer_in_use_and_one_with_children_are_refused_until_they_are_made_anew() {
        let plugin = start();
        create(&plugin, "held", "base");
        plugin.get("held");
        plugin.get("held");
        plugin.put("held");
        refused(&plugin, "held", &["in use"]);
        plugin.put("held");
        // What came now might be the tail of what was refused.
        plugin.remove("held");
        visited(&plugin, "held", |_| ());
        taken(&plugin, "held");
        // A child that shows it, and one that does not.
        for shows in [true, false] {
            visited(&plugin, "parent", |_| ());
            create(&plugin, "child", "parent");
            if shows {
                plugin.get("child");
            }
            // Its disk is part of the child's view then.
            let words: &[&str] = if shows { &["in use"] } else { &["is the parent", "child"] };
            refused(&plugin, "parent", words);
            plugin.put("child");
            plugin.remove("child");
            plugin.remove("parent");
        }
        visited(&plugin, "parent", |_| ());
        create(&plugin, "child", "parent");
        plugin.remove("child");
        taken(&plugin, "parent");
        assert_eq!(plugin.mounts(), [""; 0]);
    }

    #[test]
    fn a_layer_of_an_earlier_process_is_refused() {
        let mut plugin = start();
        visited(&plugin, "old", |_| ());
        plugin.kill_and_restart();
        plugin.init();
        refused(&plugin, "old", &["earlier process"]);
        plugin.remove("old");
        visited(&plugin, "old", |_| ());
        taken(&plugin, "old");
    }
}

#[test]
fn a_sandbox_that_machines_attach_takes_a_tar_once_it_was_given_back() {
    let plugin =
        Plugin::start(&["--storage-opt", "lcow.mount=none", "--storage-opt", "lcow.sandboxsize=64m"]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    create(&plugin, "c", "base");
    plugin.get("c");
    plugin.get("c");
    plugin.put("c");
    refused(&plugin, "c", &["in use"]);
    plugin.remove("c");
    create(&plugin, "c", "base");
    plugin.get("c");
    plugin.put("c");
    let reply = plugin.apply("c", "base", &tar());
    assert_eq!(reply.status, 200, "{}\n{}", reply.text(), plugin.log());
    assert!(plugin.diff("c", "base") == tar());
    assert!(!plugin.home().join("c/sandbox.vhdx").exists());
}
