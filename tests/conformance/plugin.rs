//! The whole plugin on a backend: what it shows of its machines, and what is left of an operation however it ends.

use crate::{
    files::tree,
    killed::{descendants, soon, svm},
    support::{Plugin, Tar, noise, send_chunks},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::{fs, io::Write, path::Path, process::Command};

/// The machines that `svm ls --json` shows.
fn machines(plugin: &Plugin) -> Vec<Value> {
    serde_json::from_str(&svm(plugin, &["ls", "--json"])).unwrap()
}

/// Scratch disks and staged files below the home.
pub(crate) fn debris(plugin: &Plugin) -> Vec<String> {
    let names = |folder: &str| {
        let entries = fs::read_dir(plugin.home().join(folder)).into_iter().flatten().flatten();
        entries.map(|e| e.path().display().to_string()).collect::<Vec<_>>()
    };
    ["scratch", "staging"].iter().flat_map(|folder| names(folder)).collect()
}

/// The scratch disk of an apply, and its machine, go when it succeeds, is refused, is cut, or loses its machine.
pub(crate) fn scratch_goes_in_every_case(options: &[String]) {
    let mut arguments = vec!["--storage-opt", "lcow.pool.spares=0", "--storage-opt", "lcow.verity=true"];
    arguments.extend(options.iter().flat_map(|o| ["--storage-opt", o]));
    let plugin = Plugin::start(&arguments);
    plugin.init();
    let tar = Tar::new().file("f", &noise(1, 600_000)).end();
    let nothing_left = |what: &str| {
        soon(what, &plugin, || debris(&plugin).is_empty() && machines(&plugin).is_empty());
        soon(what, &plugin, || descendants(plugin.pid()).is_empty());
    };
    let begin = |id: &str| {
        plugin.ok("GraphDriver.Create", &json!({"ID": id, "Parent": ""}));
        let mut upload = plugin.begin_apply(id, "");
        send_chunks(&mut upload, &tar[..300_000], 50_000).unwrap();
        soon("a machine and a scratch disk at work", &plugin, || {
            let scratch = debris(&plugin).iter().any(|staged| Path::new(staged).join("verity.tmp").exists());
            scratch && machines(&plugin).iter().any(|vm| vm["name"] == format!("{id}_svm"))
        });
        upload
    };

    plugin.layer("good", "", &tar);
    nothing_left("after a success");

    plugin.ok("GraphDriver.Create", &json!({"ID": "bad", "Parent": ""}));
    assert_ne!(plugin.apply("bad", "", &noise(3, 100_000)).status, 200);
    nothing_left("after a tar that is refused");

    drop(begin("cut"));
    nothing_left("after a caller that went away");

    let mut upload = begin("killed");
    let vms = machines(&plugin);
    let machine = vms.iter().find(|vm| vm["name"] == "killed_svm").unwrap()["machine"].as_str().unwrap();
    let pid = machine.split(' ').nth(1).unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    // The plugin may refuse the rest.
    let _ = send_chunks(&mut upload, &tar[300_000..], 50_000).and_then(|()| upload.write_all(b"0\r\n\r\n"));
    let reply = crate::support::Reply::read(upload).unwrap();
    assert!(reply.status != 200 && reply.text().contains("signal 9"), "{}", reply.text());
    nothing_left("after a machine that was killed");
    assert!(plugin.diff("good", "") == tar);
    nothing_left("after a diff");
}

/// `/metrics` tells machines that were restored from those that were booted.
pub(crate) fn metrics_tell_restores_from_boots(options: &[String], restored: bool) {
    let mut arguments = vec!["--storage-opt", "lcow.pool.spares=0"];
    arguments.extend(options.iter().flat_map(|o| ["--storage-opt", o]));
    let plugin = Plugin::start(&arguments);
    plugin.init();
    plugin.layer("a", "", &Tar::new().file("f", b"x").end());
    plugin.diff("a", "");
    let text = plugin.raw(b"GET /metrics HTTP/1.1\r\nHost: \r\n\r\n").text();
    let value = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(&format!("lcow_service_vm_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in:\n{text}")).parse::<u64>().unwrap()
    };
    // One for the apply, one for the check of its image, one for the diff.
    assert!(value("boots") >= 3, "{text}");
    assert_eq!(value("failures"), 0, "{text}");
    let expected = if restored { (1, value("boots")) } else { (0, 0) };
    assert_eq!((value("cold_boots"), value("restores")), expected, "{text}");
}

/// `svm bench` measures the backends that it is told of and leaves nothing.
pub(crate) fn bench_measures_each_backend(kird: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let (tar, work) = (folder.path().join("layer.tar"), folder.path().join("work"));
    fs::write(&tar, tree(20, 5000, 1)).unwrap();
    fs::create_dir(&work).unwrap();
    let bench = |arguments: &[&Path]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
        command.args(["svm", "bench"]).arg(&tar).arg("--work").arg(&work).args(arguments);
        let done = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(fs::read_dir(&work).unwrap().count(), 0, "it leaves files");
        (done.status.code(), text(&done.stdout), text(&done.stderr))
    };
    let row = |table: &str, name: &str| table.lines().find(|l| l.contains(name)).map(str::to_owned);
    let seconds = |row: &str| row.matches(" s").count();

    let (status, table, said) = bench(&[]);
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(row(&table, "embedded").map(|r| seconds(&r)), Some(4), "{table}");
    assert_eq!(row(&table, "qemu"), None, "{table}");

    let (status, table, said) = bench(&[Path::new("--kirdpath"), kird]);
    assert_eq!(status, Some(0), "{said}");
    for (name, detail) in [("embedded", ""), ("qemu", "QEMU ")] {
        let row = row(&table, name).unwrap_or_else(|| panic!("no {name} in:\n{table}"));
        assert!(seconds(&row) == 4 && row.contains(detail), "{table}");
    }

    let (status, table, said) = bench(&[Path::new("--kirdpath"), &work.join("nothing")]);
    assert_eq!(status, Some(1), "{said}");
    assert!(
        row(&table, "embedded").is_some() && said.contains("qemu: ") && said.contains("vmlinux"),
        "{said}"
    );
}
