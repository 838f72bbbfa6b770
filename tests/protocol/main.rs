//! The plugin protocol as real daemons speak it, against the real program: one body of tests, on a unix socket (Linux)
//! and on a named pipe (Windows, under Wine in this project's own runs).
//!
//! ```text
//!   main.rs    what does not depend on how layers are shown        both transports
//!   none.rs    lcow.mount=none: folders and VHDX sandboxes         both transports
//!   identity.rs  devices and inode numbers of merged views      Linux
//!   mounts.rs  lcow.mount=overlay: merged views, needs root        Linux
//!   kept.rs    layers that stay mounted for the next container     Linux
//!   pristine.rs  ApplyDiff of a layer that was shown               Linux, and lcow.mount=none on both
//!   commit.rs  Diff and ApplyDiff of what containers write         Linux
//!   upgrade.rs a store of release 1, and userns-remap              Linux
//!   activation.rs  sockets that systemd passes, by name            Linux
//!   pipe.rs    what only a pipe has                                Windows
//! ```

#[cfg(target_os = "linux")]
mod activation;
#[cfg(target_os = "linux")]
mod commit;
#[cfg(target_os = "linux")]
mod identity;
#[cfg(target_os = "linux")]
mod kept;
#[cfg(target_os = "linux")]
mod many;
#[cfg(target_os = "linux")]
mod mounts;
mod none;
#[cfg(windows)]
mod pipe;
mod pristine;
#[path = "../support/mod.rs"]
mod support;
#[cfg(target_os = "linux")]
mod upgrade;

use serde_json::json;
use std::{fs, io::Write, path::Path, time::Duration};
use support::{Plugin, Reply, Tar, noise, send_chunks};

fn small_tar() -> Vec<u8> {
    Tar::new().dir("etc/").file("etc/motd", b"hello\n").file("big", &noise(1, 300_000)).end()
}

#[test]
fn activation_init_and_capabilities_as_dockerd_asks() {
    let plugin = Plugin::start(&[]);
    let reply = plugin.send("Plugin.Activate", b"");
    assert_eq!((reply.status, reply.json()), (200, json!({"Implements": ["GraphDriver"]})));
    assert!(reply.head.contains("application/vnd.docker.plugins.v1.2+json"), "{}", reply.head);
    plugin.init();
    assert_eq!(
        plugin.ok("GraphDriver.Capabilities", &json!({})),
        json!({"Capabilities": {"ReproducesExactDiffs": true}})
    );
    let status = plugin.ok("GraphDriver.Status", &json!({}));
    let lines = status["Status"].as_array().unwrap();
    assert_eq!(lines[0][0], "LCOW");
    assert!(lines.iter().any(|l| l[0] == "lcow.sandboxsize"), "{status}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(plugin.socket()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(plugin.home()).unwrap().permissions().mode() & 0o777, 0o700);
    }
}

#[test]
fn wrong_requests_get_a_clear_error_and_change_nothing() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    let before: Vec<_> = fs::read_dir(plugin.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    let methods =
        ["Create", "CreateReadWrite", "Remove", "Get", "Put", "GetMetadata", "Diff", "Changes", "DiffSize"];
    let broken_json = ["", "{", "[]", "\"x\"", "{\"ID\": 7}", "{\"ID\":\"a\"", "\0\0\0"];
    for method in methods {
        let method = format!("GraphDriver.{method}");
        for body in broken_json {
            let reply = plugin.send(&method, body.as_bytes());
            assert!((400..500).contains(&reply.status), "{method} {body:?}: {}", reply.status);
            assert!(!reply.json()["Err"].as_str().unwrap().is_empty());
        }
        for id in ["", "..", ".", "../x", "a/b", "cache", "staging", "x-removing", "é"] {
            let text = plugin.err(&method, &json!({"ID": id}));
            assert!(text.contains("is not a layer id"), "{method} {id:?}: {text}");
        }
        assert!(plugin.err(&method, &json!({})).contains("is empty"));
    }
    for id in ["", "..", "a/b"] {
        let reply = plugin.apply(id, "", &small_tar());
        assert!(reply.status >= 400 && reply.text().contains("is not a layer id"), "{}", reply.text());
    }
    assert!(plugin.err("GraphDriver.Init", &json!({})).contains("Home"));
    assert!(plugin.err("GraphDriver.Init", &json!({"Home": "relative"})).contains("absolute"));
    let text = plugin
        .err("GraphDriver.Init", &json!({"Home": plugin.folder.join("other"), "Opts": ["lcow.nonsense=1"]}));
    assert!(text.contains("lcow.nonsense") && text.contains("lcow.globalmode"), "{text}");
    assert!(!plugin.folder.join("other").exists());
    let huge = format!("{{\"ID\":\"{}\"}}", "x".repeat(2 << 20));
    assert_eq!(plugin.send("GraphDriver.Create", huge.as_bytes()).status, 413);
    assert_eq!(plugin.send("GraphDriver.NoSuchThing", b"{}").status, 404);
    let reply = plugin.raw(b"GET /GraphDriver.Status HTTP/1.1\r\nHost: \r\n\r\n");
    assert_eq!((reply.status, reply.json()["Err"].as_str().unwrap().contains("POST")), (405, true));
    let missing = [
        plugin.err("GraphDriver.Get", &json!({"ID": "nobody"})),
        plugin.err("GraphDriver.Diff", &json!({"ID": "nobody"})),
        plugin.err("GraphDriver.GetMetadata", &json!({"ID": "nobody"})),
        plugin.err("GraphDriver.Create", &json!({"ID": "a", "Parent": "nobody"})),
    ];
    assert!(
        missing.iter().all(|t| t.contains("nobody does not exist") || t.contains("parent nobody")),
        "{missing:?}"
    );
    let after: Vec<_> = fs::read_dir(plugin.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(before, after);
}

#[test]
fn unknown_fields_are_ignored_and_missing_layers_can_be_put_and_removed() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.Create", &json!({"ID": "a", "Parent": "", "Future": {"x": [1]}}));
    assert_eq!(plugin.ok("GraphDriver.Exists", &json!({"ID": "a"})), json!({"Exists": true}));
    assert_eq!(plugin.ok("GraphDriver.Exists", &json!({"ID": "b"})), json!({"Exists": false}));
    assert_eq!(plugin.ok("GraphDriver.Exists", &json!({"ID": ".."})), json!({"Exists": false}));
    assert!(plugin.err("GraphDriver.Create", &json!({"ID": "a"})).contains("exists already"));
    for _ in 0..2 {
        plugin.ok("GraphDriver.Put", &json!({"ID": "b"}));
        plugin.ok("GraphDriver.Put", &json!({"ID": "a"}));
        plugin.remove("a");
        plugin.remove("b");
    }
    plugin.ok("GraphDriver.Cleanup", &json!({}));
}

#[test]
fn an_applied_layer_gives_back_its_very_bytes() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    let tars: Vec<(&str, Vec<u8>)> = vec![
        ("plain", small_tar()),
        ("empty", vec![0; 1024]),
        ("no-end", Tar::new().file("x", &noise(2, 70_000)).bytes),
        ("trailing", [Tar::new().file("x", b"1").end(), noise(3, 20_000)].concat()),
        ("twice", Tar::new().file("x", b"first").file("x", &noise(4, 9000)).end()),
    ];
    let mut parent = String::new();
    for (id, tar) in &tars {
        plugin.layer(id, &parent, tar);
        assert!(plugin.diff(id, &parent) == *tar, "{id}: the diff differs");
        parent = (*id).to_owned();
    }
    let mut restarted = plugin;
    restarted.kill_and_restart();
    for (n, (id, tar)) in tars.iter().enumerate() {
        let parent = if n == 0 { "" } else { tars[n - 1].0 };
        assert!(restarted.diff(id, parent) == *tar, "{id}: the diff differs after a restart");
    }
    assert_eq!(restarted.layer("sized", "", &small_tar()), 300_006);
    let size = restarted.ok("GraphDriver.DiffSize", &json!({"ID": "sized", "Parent": ""}));
    assert_eq!(size["Size"], 300_006);
    let facts = restarted.ok("GraphDriver.GetMetadata", &json!({"ID": "sized"}))["Metadata"].clone();
    assert_eq!(facts["state"], "applied");
    assert!(
        restarted
            .err("GraphDriver.Create", &json!({"ID": "x", "StorageOpt": {"nonsense": "1"}}))
            .contains("nonsense")
    );
    assert!(restarted.apply("sized", "", &small_tar()).text().contains("never changes"));
}

#[test]
fn an_empty_body_is_never_a_layer_and_leaves_the_layer_usable() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.Create", &json!({"ID": "a"}));
    let reply = plugin.send("GraphDriver.ApplyDiff?id=a&parent=", b"");
    assert!(reply.status >= 400 && reply.text().contains("empty"), "{}", reply.text());
    let reply = plugin.apply("a", "", b"");
    assert!(reply.status >= 400, "{}", reply.text());
    let reply = plugin.apply("a", "", &small_tar());
    assert_eq!(reply.status, 200, "{}", reply.text());
}

#[test]
fn a_cut_apply_cannot_come_back_as_a_tail() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    let tar = Tar::new().file("one", &noise(5, 40_000)).file("two", &noise(6, 40_000)).end();
    // A tail that begins at a header and is a fine tar by itself.
    let tail = Tar::new().file("two", &noise(6, 40_000)).end();
    for cut in [1, 512, 1000, 40_960, 60_000, tar.len() - 1024, tar.len()] {
        for restart in [false, true] {
            let id = format!("l{cut}-{restart}");
            plugin.ok("GraphDriver.Create", &json!({"ID": id}));
            let mut stream = plugin.begin_apply(&id, "");
            send_chunks(&mut stream, &tar[..cut], 4096).unwrap();
            stream.flush().unwrap();
            // An apply that the plugin has not begun may be begun again.
            plugin.wait_for_state(&id, "applying");
            if restart {
                plugin.kill_and_restart();
                drop(stream);
            } else {
                drop(stream);
                std::thread::sleep(Duration::from_millis(100));
            }
            for body in [&tail[..], &[], &tar] {
                let reply = plugin.apply(&id, "", body);
                assert!(reply.status >= 400, "a retry after {cut} bytes was taken: {}", reply.text());
                let error = reply.text();
                assert!(error.contains("pull it again"), "{error}");
            }
            assert!(plugin.err("GraphDriver.Get", &json!({"ID": id})).contains("pull it again"));
            plugin.remove(&id);
            plugin.layer(&id, "", &tar);
            assert!(plugin.diff(&id, "") == tar);
            plugin.remove(&id);
        }
    }
    assert_eq!(fs::read_dir(plugin.home().join("staging")).unwrap().count(), 0);
}

#[test]
fn a_bad_tar_is_an_error_that_names_the_entry_and_leaves_no_layer() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    let mut damaged = Tar::new().file("good", b"1").file("evil", b"2").end();
    damaged[1024] ^= 1;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("checksum", damaged),
        ("truncated", small_tar()[..100_000].to_vec()),
        ("text", b"this is not a tar, but long enough to be looked at ".repeat(30)),
        ("link", Tar::new().entry("l", b'1', 0o644, "nowhere", b"").end()),
    ];
    for (id, tar) in cases {
        plugin.ok("GraphDriver.Create", &json!({"ID": id}));
        let reply = plugin.apply(id, "", &tar);
        assert!(reply.status >= 400, "{id} was taken: {}", reply.text());
        let text = reply.json()["Err"].as_str().unwrap().to_owned();
        assert!(text.contains(id) && text.len() > 30, "{text}");
        plugin.remove(id);
    }
    assert_eq!(fs::read_dir(plugin.home().join("staging")).unwrap().count(), 0);
}

#[test]
fn several_homes_in_one_process() {
    let plugin = Plugin::start(&[]);
    let homes = [plugin.folder.join("h1"), plugin.folder.join("h2")];
    for (n, home) in homes.iter().enumerate() {
        plugin.ok("GraphDriver.Init", &json!({"Home": home}));
        plugin.layer("same", "", &Tar::new().file("n", &[n as u8]).end());
    }
    for (n, home) in homes.iter().enumerate() {
        plugin.ok("GraphDriver.Init", &json!({"Home": home}));
        assert!(plugin.diff("same", "") == Tar::new().file("n", &[n as u8]).end());
    }
}

#[test]
fn a_diff_into_an_apply_of_the_same_plugin_streams() {
    for mode in ["lcow.globalmode=false", "lcow.globalmode=true"] {
        let plugin = Plugin::start(&["--storage-opt", mode, "--storage-opt", "lcow.pool.max=3"]);
        plugin.init();
        let tar = Tar::new().file("large", &noise(7, 20 << 20)).end();
        plugin.layer("a", "", &tar);
        plugin.ok("GraphDriver.Create", &json!({"ID": "b"}));
        // The reader of the diff is the writer of the apply, with nothing stored in between but a pipe's worth.
        let mut from = plugin.connect();
        let body = json!({"ID": "a", "Parent": ""}).to_string();
        write!(
            from,
            "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut to = plugin.begin_apply("b", "");
        let mut input = std::io::BufReader::new(from);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            std::io::BufRead::read_line(&mut input, &mut line).unwrap();
        }
        // Both bodies are chunked: each chunk is handed on as it comes.
        loop {
            line.clear();
            std::io::BufRead::read_line(&mut input, &mut line).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            std::io::Read::read_exact(&mut input, &mut chunk).unwrap();
            to.write_all(line.as_bytes()).and_then(|()| to.write_all(&chunk)).unwrap();
            if size == 0 {
                break;
            }
        }
        let reply = Reply::read(to).unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert!(plugin.diff("b", "") == tar);
    }
}

#[test]
fn health_and_metrics() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("a", "", &small_tar());
    plugin.diff("a", "");
    let get = |path: &str| plugin.raw(format!("GET {path} HTTP/1.1\r\nHost: \r\n\r\n").as_bytes());
    assert_eq!((get("/healthz").status, get("/healthz").text().as_str()), (200, "ok\n"));
    let text = get("/metrics").text();
    for line in [
        "lcow_requests_total{endpoint=\"GraphDriver.ApplyDiff\",outcome=\"ok\"} 1".to_owned(),
        format!("lcow_diff_received_bytes_total {}", small_tar().len()),
        format!("lcow_diff_sent_bytes_total {}", small_tar().len()),
        "lcow_layers 1".to_owned(),
    ] {
        assert!(text.contains(&line), "{line} is missing in:\n{text}");
    }
}

#[test]
#[cfg_attr(
    windows,
    ignore = "a break needs a console, which Wine has none of without a display; run it on real Windows"
)]
fn a_live_socket_is_refused_and_a_stop_is_graceful() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    let dir = plugin.get("c");
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .args(["serve", "--root"])
        .arg(plugin.folder.join("root2"))
        .arg(support::transport::FLAG)
        .arg(plugin.socket())
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("is in use"), "{second:?}");
    // A store has one owner, whatever the socket.
    let third = std::process::Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .args(["store", "gc", "--home"])
        .arg(plugin.home())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&third.stderr).into_owned();
    assert!(!third.status.success() && text.contains(&format!("process {}", plugin.pid())), "{text}");
    // An apply in flight ends before the program does.
    plugin.ok("GraphDriver.Create", &json!({"ID": "late"}));
    let mut stream = plugin.begin_apply("late", "");
    let tar = small_tar();
    send_chunks(&mut stream, &tar[..2000], 500).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let finisher = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        send_chunks(&mut stream, &tar[2000..], 5000).unwrap();
        stream.write_all(b"0\r\n\r\n").unwrap();
        Reply::read(stream).unwrap()
    });
    assert_eq!(plugin.terminate(), Some(0));
    assert_eq!(finisher.join().unwrap().status, 200);
    assert!(!support::transport::is_there(&plugin.socket()));
    #[cfg(target_os = "linux")]
    assert!(dir.join("etc/motd").exists(), "a stop must not pull the mounts from under containers");
    #[cfg(not(target_os = "linux"))]
    assert!(dir.join("sandbox.vhdx").is_file());
    plugin.start_again();
    assert!(plugin.diff("late", "") == small_tar());
    plugin.put("c");
    assert_eq!(plugin.mounts(), [""; 0]);
}

#[test]
fn the_store_commands_tell_what_is_there() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    plugin.layer("top", "base", &small_tar());
    let run = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .arg("store")
            .args(arguments)
            .arg("--root")
            .arg(plugin.folder.join("root"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let rows: serde_json::Value = serde_json::from_str(&run(&["ls", "--json"])).unwrap();
    assert_eq!((rows[0]["id"].as_str(), rows[1]["parent"].as_str()), (Some("base"), Some("base")));
    let tree: serde_json::Value = serde_json::from_str(&run(&["tree", "--json"])).unwrap();
    assert_eq!(tree[0]["children"][0]["id"], "top");
    assert!(run(&["tree"]).contains("└─ top"));
    assert!(run(&["du"]).contains("all"));
    let scrub: serde_json::Value = serde_json::from_str(&run(&["scrub", "--json"])).unwrap();
    assert_eq!((scrub["images"].as_u64(), scrub["faults"].as_array().unwrap().len()), (Some(2), 0));
    damage_is_found(&plugin, &plugin.home().join("base/layer.vhd"));
}

fn damage_is_found(plugin: &Plugin, image: &Path) {
    let mut bytes = fs::read(image).unwrap();
    // The larger file: a small one lies in its inode, and the record holds its bytes.
    let big = noise(1, 300_000);
    let at =
        bytes.windows(64).position(|w| w == &big[..64]).expect("a file's bytes lie in the image as they are");
    bytes[at + 10] ^= 1;
    fs::write(image, bytes).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .args(["store", "scrub", "--home"])
        .arg(plugin.home())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("base: "), "{output:?}");
    // And a Diff of it is cut, never taken for the layer.
    let reply = plugin.call("GraphDriver.Diff", &json!({"ID": "base", "Parent": ""}));
    assert!(reply.status != 200 || !reply.complete, "a damaged layer was handed out");
}

#[test]
fn a_sound_image_and_record_of_another_layer_are_not_taken_for_this_one() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    for (id, content) in [("a", b"one"), ("b", b"two")] {
        plugin.layer(id, "", &Tar::new().file("file", content).end());
    }
    for name in ["layer.vhd", "layer.exact"] {
        fs::copy(plugin.home().join("b").join(name), plugin.home().join("a").join(name)).unwrap();
    }
    let reply = plugin.call("GraphDriver.Diff", &json!({"ID": "a", "Parent": ""}));
    assert!(reply.status != 200 || !reply.complete, "layer b was handed out as layer a");
    let reply = plugin.call("GraphDriver.Diff", &json!({"ID": "b", "Parent": ""}));
    assert!(reply.status == 200 && reply.complete);
}
