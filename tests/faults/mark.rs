//! The mark that an ApplyDiff sets before the first byte of its tar: what if it cannot be written?
//!
//! ```text
//!   Create ─► ApplyDiff ─► layer.json "applying": write ─► sync ─► rename ─► sync of the folder
//!                                                   └──────── each of them fails once ────────┘
//! ```
//!
//! Needs root and strace: system calls of the running daemon are made to fail.

use crate::support::{Plugin, Tar, injection::Injection, noise};
use serde_json::{Value, json};
use std::fs;

#[test]
fn a_mark_that_cannot_be_written_is_an_error_and_nothing_half_made_is_seen() {
    let mut plugin = Plugin::start(&["--storage-opt", "lcow.pool.spares=0"]);
    plugin.init();
    let tar = Tar::new().dir("d/").file("d/f", &noise(1, 50_000)).end();
    let home = plugin.home();
    let on_disk =
        || -> Value { serde_json::from_slice(&fs::read(home.join("x/layer.json")).unwrap()).unwrap() };
    let facts =
        |plugin: &Plugin| plugin.ok("GraphDriver.GetMetadata", &json!({"ID": "x"}))["Metadata"].clone();
    // Counted by thread: the mark is the first that the request writes. The last failure comes behind the rename.
    for (fault, state) in [
        ("openat:error=ENOSPC:when=1", "created"),
        ("fsync:error=ENOSPC:when=1", "created"),
        ("rename:error=EIO:when=1", "created"),
        ("fsync:error=EIO:when=2", "applying"),
    ] {
        plugin.ok("GraphDriver.Create", &json!({"ID": "x"}));
        let injection = Injection::begin(plugin.pid(), fault);
        let reply = plugin.apply("x", "", &tar);
        assert!(injection.end() > 0, "{fault}: nothing failed");
        assert!(reply.status >= 400, "{fault}: {} {}", reply.status, reply.text());
        let reason = reply.text();
        assert!(reason.contains(home.join("x").to_str().unwrap()), "{fault}: {reason}");
        // Memory and disk agree, and no file of an image is there.
        assert_eq!(
            (on_disk()["state"].clone(), facts(&plugin)["state"].clone()),
            (json!(state), json!(state)),
            "{fault}"
        );
        let mut files: Vec<_> = fs::read_dir(home.join("x"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        files.retain(|name| name != "layer.json.new");
        files.sort();
        assert_eq!(files, ["layer.json", "layerchain.json"], "{fault}");
        assert_eq!(fs::read_dir(home.join("staging")).unwrap().count(), 0, "{fault}");
        // What the client sends again is refused, with the first reason; other layers take their tars.
        let again = plugin.apply("x", "", &tar);
        assert!(again.status >= 400, "{fault}: a second tar was taken after {reason}");
        plugin.layer("other", "", &tar);
        assert!(plugin.diff("other", "") == tar, "{fault}");
        plugin.remove("other");
        // The same after a restart, and after Remove the id is as any other.
        plugin.kill_and_restart();
        assert!(plugin.apply("x", "", &tar).status >= 400, "{fault}: taken after a restart");
        plugin.remove("x");
        plugin.layer("x", "", &tar);
        assert!(plugin.diff("x", "") == tar, "{fault}");
        plugin.remove("x");
    }
}
