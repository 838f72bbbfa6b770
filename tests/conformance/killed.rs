//! kill -9 of a daemon in the middle of an apply and a diff: its machines end with it, and the next daemon finds nothing
//! of them. On the way, what `svm ls` and `svm console` show of a machine at work.

use crate::{
    plugin::{descendants, parent_of, soon, svm},
    support::{Plugin, Tar, noise, send_chunks},
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    path::Path,
};

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

pub(crate) fn leaves_nothing(options: &[String]) {
    let mut arguments = vec!["--storage-opt", "lcow.pool.spares=1", "--storage-opt", "lcow.verity=true"];
    arguments.extend(options.iter().flat_map(|o| ["--storage-opt", o]));
    let mut plugin = Plugin::start(&arguments);
    plugin.init();
    // More than all the buffers between a worker and a reader that does not read.
    let tar = Tar::new().file("f", &noise(1, 12_000_000)).end();
    plugin.layer("whole", "", &tar);
    plugin.ok("GraphDriver.Create", &serde_json::json!({"ID": "half", "Parent": ""}));
    let seen = |plugin: &Plugin| {
        [plugin.home(), plugin.home().join("half"), plugin.folder.clone()].map(|folder| names(&folder))
    };
    let quiet = seen(&plugin);

    let mut upload = plugin.begin_apply("half", "");
    send_chunks(&mut upload, &tar[..300_000], 50_000).unwrap();
    let mut download = plugin.connect();
    let body = r#"{"ID":"whole","Parent":""}"#;
    let head = format!("POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n", body.len());
    download.write_all(format!("{head}{body}").as_bytes()).unwrap();
    download.read_exact(&mut [0; 1000]).unwrap();
    let list = || serde_json::from_str::<Vec<Value>>(&svm(&plugin, &["ls", "--json"])).unwrap();
    soon("machines at an apply and a diff, and a spare", &plugin, || {
        let vms = list();
        let at_work = |name: &str| vms.iter().any(|v| v["name"] == name && v["leases"] == 1);
        at_work("half_svm") && at_work("whole_svm") && vms.iter().any(|v| v["leases"] == 0)
    });
    let staged = || names(&plugin.home().join("staging"));
    soon("a scratch disk in use", &plugin, || {
        staged().iter().any(|s| plugin.home().join("staging").join(s).join("verity.tmp").exists())
    });
    assert!(svm(&plugin, &["ls"]).contains("half_svm"));
    assert!(svm(&plugin, &["console", "half_svm"]).starts_with("==> half_svm ("));

    let machines: Vec<u32> = list()
        .iter()
        .map(|v| v["machine"].as_str().unwrap().split(' ').nth(1).unwrap().parse().unwrap())
        .collect();
    let below = descendants(plugin.pid());
    assert!(machines.len() >= 3 && machines.iter().all(|m| below.contains(m)), "{machines:?} of {below:?}");

    let cache = plugin.folder.join("root/.svm");
    if cache.exists() {
        // As a daemon leaves it that is killed while it makes one.
        fs::create_dir(cache.join("making-x")).unwrap();
        fs::write(cache.join("making-x/memory"), b"half").unwrap();
    }
    plugin.kill_and_restart();
    soon("all of its processes are gone", &plugin, || below.iter().all(|pid| parent_of(*pid).is_none()));
    drop((upload, download));
    plugin.init();
    assert_eq!(seen(&plugin), quiet, "home, the layer that was being written, what lies beside the home");
    for folder in ["scratch", "staging"] {
        assert!(names(&plugin.home().join(folder)).is_empty(), "{folder}");
    }
    assert!(plugin.diff("whole", "") == tar, "a layer that was there before came back changed");
    assert_eq!(plugin.mounts(), Vec::<String>::new());
    if cache.exists() {
        // Nothing but the template that the first daemon made and the next one uses.
        let kept = names(&cache);
        assert!(kept.len() == 1 && !kept.iter().any(|name| name.starts_with("making-")), "{kept:?}");
    }
}
