//! kill -9 of a daemon in the middle of an apply and a diff: its machines end with it, and the next daemon finds nothing
//! of them. On the way, what `svm ls` and `svm console` show of a machine at work.

use crate::support::{Plugin, Tar, machine::Machine, noise, send_chunks, transport::FLAG};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// Longest wait: a first guest is booted under emulation, beside other tests.
const PATIENCE: Duration = Duration::from_mins(2);

pub(crate) fn soon(what: &str, plugin: &Plugin, mut reached: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !reached() {
        assert!(begin.elapsed() < PATIENCE, "never: {what}\n{}", plugin.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What `lcow-graphdriver svm` prints.
pub(crate) fn svm(plugin: &Plugin, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
    let done = command.arg("svm").args(arguments).arg(FLAG).arg(plugin.socket()).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// Number of a process's parent; `None` once the process is gone.
#[cfg(target_os = "linux")]
pub(crate) fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// All processes below this one.
#[cfg(target_os = "linux")]
pub(crate) fn descendants(of: u32) -> BTreeSet<u32> {
    let all: Vec<(u32, u32)> = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent_of(pid)?)))
        .collect();
    let mut found = BTreeSet::from([of]);
    while all.iter().any(|(pid, parent)| found.contains(parent) && found.insert(*pid)) {}
    found.remove(&of);
    found
}

fn entries(folder: &Path) -> BTreeSet<String> {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    all.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
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
        [plugin.home(), plugin.home().join("half"), plugin.folder.clone()].map(|folder| entries(&folder))
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
    let staged = || entries(&plugin.home().join("staging"));
    soon("a scratch disk in use", &plugin, || {
        staged().iter().any(|s| plugin.home().join("staging").join(s).join("verity.tmp").exists())
    });
    assert!(svm(&plugin, &["ls"]).contains("half_svm"));
    assert!(svm(&plugin, &["console", "half_svm"]).starts_with("==> half_svm ("));

    let names: Vec<String> = list().iter().map(|v| v["machine"].as_str().unwrap().to_owned()).collect();
    let machines: Vec<Machine> = names.iter().map(|name| Machine::of(name)).collect();
    assert!(machines.len() >= 3 && machines.iter().all(Machine::is_alive), "{names:?}");
    // What they started themselves, too; on Windows a job lets a worker start nothing.
    #[cfg(target_os = "linux")]
    let below = descendants(plugin.pid());
    #[cfg(target_os = "linux")]
    for name in &names {
        let pid = name.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(below.contains(&pid), "{name} is not among {below:?}");
    }

    let cache = plugin.folder.join("root/.svm");
    if cache.exists() {
        // As a daemon leaves it that is killed while it makes one.
        fs::create_dir(cache.join("making-x")).unwrap();
        fs::write(cache.join("making-x/memory"), b"half").unwrap();
    }
    plugin.kill_and_restart();
    soon("all of its machines are gone", &plugin, || machines.iter().all(|m| !m.is_alive()));
    #[cfg(target_os = "linux")]
    soon("all of its processes are gone", &plugin, || below.iter().all(|pid| parent_of(*pid).is_none()));
    drop((upload, download));
    plugin.init();
    assert_eq!(seen(&plugin), quiet, "home, the layer that was being written, what lies beside the home");
    for folder in ["scratch", "staging"] {
        assert!(entries(&plugin.home().join(folder)).is_empty(), "{folder}");
    }
    assert!(plugin.diff("whole", "") == tar, "a layer that was there before came back changed");
    #[cfg(target_os = "linux")]
    assert_eq!(plugin.mounts(), Vec::<String>::new());
    if cache.exists() {
        // Nothing but the template that the first daemon made and the next one uses.
        let kept = entries(&cache);
        assert!(kept.len() == 1 && !kept.iter().any(|name| name.starts_with("making-")), "{kept:?}");
    }
}
