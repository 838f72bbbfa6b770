//! Diffs of containers that write.

use super::{
    faults::Faults,
    ground::{Ground, read, unpack},
    is_bound, shown, soon,
    support::{Plugin, Reply, Tar, noise},
};
use serde_json::json;
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

/// A plugin on some ground, its calls watched.
fn plugin_on(ground: Ground) -> (Plugin, Faults) {
    let (plugin, faults) = Faults::plugin(&[]);
    ground.lay(&plugin);
    (plugin, faults)
}

/// A container as an engine makes it: an image, an init layer that was written and put away, the container's own.
fn container(plugin: &Plugin) -> std::path::PathBuf {
    plugin.init();
    plugin.layer("base", "", &Tar::new().dir("etc/").file("etc/motd", b"hello\n").file("old", b"old").end());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c-init", "Parent": "base"}));
    fs::write(plugin.get("c-init").join("etc/hosts"), "127.0.0.1\n").unwrap();
    plugin.put("c-init");
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "c-init"}));
    plugin.get("c")
}

fn line(number: u64) -> String {
    format!("line {number} of a log that grows and grows\n")
}

#[test]
fn twenty_diffs_of_a_container_that_logs_are_each_a_state_that_it_had() {
    for ground in Ground::ALL {
        let (plugin, faults) = plugin_on(ground);
        let dir = container(&plugin);
        fs::create_dir(dir.join("still")).unwrap();
        for n in 0..100 {
            fs::write(dir.join(format!("still/{n}")), noise(n, 20_000)).unwrap();
        }
        fs::write(dir.join("large"), noise(7, 20 << 20)).unwrap();
        let (lines, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let stop_at_the_end = StopAtTheEnd(&stop);
            scope.spawn(|| {
                let mut log = File::create(dir.join("etc/log")).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let number = lines.load(Ordering::Relaxed);
                    log.write_all(line(number).as_bytes()).unwrap();
                    lines.store(number + 1, Ordering::Relaxed);
                    // 500 a second
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            soon("it logs", &plugin, || lines.load(Ordering::Relaxed) > 0);
            // The own parent, as commit has it; the image; nothing, which is the whole tree.
            for (n, parent) in ["c-init", "base", ""].iter().cycle().take(20).enumerate() {
                let (begun, freezes) = (lines.load(Ordering::Relaxed), faults.count("freeze", 0));
                let tar = plugin.diff("c", parent);
                let ended = lines.load(Ordering::Relaxed) + 1;
                let unpacked = unpack(&tar);
                let log = String::from_utf8(read(&unpacked, "etc/log")).unwrap();
                let count = log.lines().count() as u64;
                assert!(
                    (begun..=ended).contains(&count),
                    "{ground:?} {n}: {count} lines, {begun} to {ended}"
                );
                assert!(
                    log == (0..count).map(line).collect::<String>(),
                    "{ground:?} {n}: no state that it had"
                );
                assert!(read(&unpacked, "large") == noise(7, 20 << 20));
                for n in 0..100 {
                    assert!(read(&unpacked, &format!("still/{n}")) == noise(n, 20_000));
                }
                assert_eq!(*parent != "c-init", unpacked.path().join("out/etc/hosts").exists());
                assert_eq!(parent.is_empty(), unpacked.path().join("out/old").exists());
                // Two sandboxes are mounted. Each is frozen once, or where files are looked at again, twice.
                let freezes = faults.count("freeze", 0) - freezes;
                assert!(freezes == 2 || freezes == 4 && ground == Ground::Plain, "{ground:?}: {freezes}");
                if n % 5 != 0 {
                    continue;
                }
                let size =
                    plugin.ok("GraphDriver.DiffSize", &json!({"ID": "c", "Parent": parent}))["Size"].as_u64();
                assert!(size.unwrap() > (20 << 20) + 100 * 20_000, "{size:?}");
                let changes =
                    plugin.ok("GraphDriver.Changes", &json!({"ID": "c", "Parent": parent})).to_string();
                assert!(changes.contains("{\"Kind\":1,\"Path\":\"/etc/log\"}"), "{changes}");
            }
            drop(stop_at_the_end);
        });
        // Two for each Diff, DiffSize and Changes, and one at the start to see whether it works.
        let clones = if ground == Ground::Xfs { (20 + 4 + 4) * 2 + 1 } else { 0 };
        assert_eq!(faults.count("clone", 0), clones);
        assert_eq!(faults.count("freeze", 0), faults.count("thaw", 0));
        assert_eq!(fs::read_dir(plugin.home().join("staging")).unwrap().count(), 0, "something is left");
        println!("{ground:?}: {:?}", frozen(&plugin));
    }
}

/// Lets the writers of a test end, also when it fails.
struct StopAtTheEnd<'a>(&'a AtomicBool);

impl Drop for StopAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How long sandboxes stood still, as the log tells; for people.
fn frozen(plugin: &Plugin) -> Vec<String> {
    let log = plugin.log();
    let times = log.lines().filter(|l| l.contains(" thawed ")).filter_map(|l| l.split("frozen=").nth(1));
    times.map(|rest| rest.split_whitespace().next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn many_files_that_change_come_whole() {
    const FILES: usize = 200;
    const BYTES: usize = 3000;
    for ground in Ground::ALL {
        let (plugin, _faults) = plugin_on(ground);
        let dir = container(&plugin);
        let stop = AtomicBool::new(false);
        for n in 0..FILES {
            fs::write(dir.join(format!("f{n}")), vec![b'0'; BYTES]).unwrap();
        }
        std::thread::scope(|scope| {
            let stop_at_the_end = StopAtTheEnd(&stop);
            let stop = &stop;
            let dir = dir.as_path();
            for writer in 0..2 {
                scope.spawn(move || {
                    // Each file is one letter from its first byte to its last, written at once.
                    for n in (writer..).step_by(2).take_while(|_| !stop.load(Ordering::Relaxed)) {
                        let letter = b'a' + (n / FILES % 26) as u8;
                        let file =
                            File::options().write(true).open(dir.join(format!("f{}", n % FILES))).unwrap();
                        file.write_all_at(&[letter; BYTES], 0).unwrap();
                    }
                });
            }
            scope.spawn(move || {
                // Files that come, are renamed, linked, grow and go.
                for n in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    let (made, moved) = (dir.join(format!("made{n}")), dir.join(format!("moved{n}")));
                    fs::write(&made, vec![b'm'; n % 100_000]).unwrap();
                    fs::rename(&made, &moved).unwrap();
                    fs::hard_link(&moved, &made).unwrap();
                    if n > 20 {
                        let _ = fs::remove_file(dir.join(format!("made{}", n - 20)));
                        let _ = fs::remove_file(dir.join(format!("moved{}", n - 20)));
                    }
                }
            });
            for round in 0..6 {
                let unpacked = unpack(&plugin.diff("c", if round % 2 == 0 { "c-init" } else { "" }));
                for n in 0..FILES {
                    let file = read(&unpacked, &format!("f{n}"));
                    assert!(
                        file.len() == BYTES && file.iter().all(|b| *b == file[0]),
                        "{ground:?}, round {round}: f{n} is of two times"
                    );
                }
            }
            drop(stop_at_the_end);
        });
    }
}

#[test]
fn what_was_written_just_before_is_synced_before_all_stands_still() {
    for ground in Ground::ALL {
        let (plugin, faults) = plugin_on(ground);
        let dir = shown(&plugin);
        let piece = noise(3, 1 << 20);
        let mut file = File::create(dir.join("much")).unwrap();
        for _ in 0..400 {
            file.write_all(&piece).unwrap();
        }
        drop(file);
        let tar = plugin.diff("c", "base");
        assert!(tar.len() > 400 << 20);
        let much = read(&unpack(&tar), "much");
        assert!(much.len() == 400 << 20 && much.chunks(1 << 20).all(|part| part == piece), "{ground:?}");
        assert!((1..=2).contains(&faults.count("freeze", 0)));
        println!("{ground:?}: 400 MB were written just before; it stood still for {:?}", frozen(&plugin));
    }
}

/// A Diff whose bytes are not read before `meanwhile` has done its work: more is to come than anything holds.
fn slow_diff(plugin: &Plugin, meanwhile: impl FnOnce()) -> Reply {
    let thawed = frozen(plugin).len();
    let mut stream = plugin.connect();
    let body = json!({"ID": "c", "Parent": "base"}).to_string();
    write!(
        stream,
        "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    soon("its metadata are read", plugin, || frozen(plugin).len() > thawed);
    meanwhile();
    Reply::read(stream).unwrap()
}

/// Makes all files of the sandbox look as if they had not been changed for an hour; it must not be mounted.
fn age(plugin: &Plugin, inodes: &[u64]) {
    let sandbox = plugin.home().join("c/sandbox.vhd");
    for inode in inodes {
        for field in ["ctime", "mtime"] {
            let mut age = Command::new("debugfs");
            age.args(["-w", "-R", &format!("set_inode_field <{inode}> {field} 20200101000000")])
                .arg(&sandbox);
            assert!(age.output().expect("debugfs: scripts/install-deps test").status.success());
        }
    }
}

#[test]
fn a_file_that_changed_is_named_remembered_and_copied_at_the_next_attempt() {
    const MIB: usize = 1 << 20;
    let (plugin, faults) = plugin_on(Ground::Plain);
    let dir = shown(&plugin);
    // The first fills all that lies between the worker and who does not read.
    fs::write(dir.join("a"), noise(1, 64 * MIB)).unwrap();
    fs::write(dir.join("database"), noise(2, MIB)).unwrap();
    let inodes = ["a", "database"].map(|name| fs::metadata(dir.join(name)).unwrap().ino());
    let change = || {
        let file = File::options().write(true).open(dir.join("database")).unwrap();
        file.write_all_at(b"changed", 1000).unwrap();
    };
    let aged = || {
        plugin.put("c");
        // Who still had something open in it may have put off the end of its file system.
        let sandbox = plugin.home().join("c/sandbox.vhd");
        soon("its file system has ended", &plugin, || !is_bound(&sandbox));
        age(&plugin, &inodes);
        plugin.get("c");
        assert!(fs::metadata(dir.join("database")).unwrap().ctime() < 1_600_000_000, "it is not old");
    };
    aged();
    let reply = slow_diff(&plugin, change);
    assert!(!reply.complete, "a file changed, and the tar is whole");
    let log = plugin.log();
    assert!(
        log.contains("\\\"database\\\" changed while it was read") || log.contains("\"database\" changed"),
        "{log}"
    );
    assert!(log.contains("the next attempt copies it"), "{log}");
    // It is as old as before, so what is known of it is that it failed.
    aged();
    let before = fs::read(dir.join("database")).unwrap();
    let reply = slow_diff(&plugin, change);
    assert!(reply.complete, "{}", plugin.log());
    assert!(read(&unpack(&reply.body), "database") == before, "the state of the freeze");
    // A layer of the same id is another one.
    plugin.put("c");
    plugin.remove("c");
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    plugin.get("c");
    fs::write(dir.join("new"), "x").unwrap();
    plugin.diff("c", "base");
    assert_eq!(faults.count("freeze", 0), faults.count("thaw", 0));
}

#[test]
fn a_file_too_large_to_be_copied_is_named_with_what_to_do() {
    const MIB: usize = 1 << 20;
    let (plugin, _faults) = plugin_on(Ground::Plain);
    let dir = shown(&plugin);
    let piece = noise(1, MIB);
    let mut file = File::create(dir.join("huge")).unwrap();
    for _ in 0..300 {
        file.write_all(&piece).unwrap();
    }
    fs::write(dir.join("small"), "small").unwrap();
    for _ in 0..2 {
        let reply = slow_diff(&plugin, || {
            file.write_all_at(b"changed", 1000).unwrap();
            fs::write(dir.join("small"), "changed, and copied before").unwrap();
        });
        assert!(!reply.complete);
        let log = plugin.log();
        assert!(log.contains("huge") && log.contains("more than 256 MiB cannot be copied"), "{log}");
        assert!(!log.contains("\"small\\\""), "{log}");
    }
    // Nobody writes to it: it is read from where it lies.
    let unpacked = unpack(&plugin.diff("c", "base"));
    assert!(read(&unpacked, "huge").len() == 300 * MIB);
}

#[test]
fn a_disk_that_cannot_clone_after_all_is_read_without() {
    let (plugin, faults) = plugin_on(Ground::Xfs);
    let dir = shown(&plugin);
    fs::write(dir.join("file"), "written").unwrap();
    let tries = || faults.calls().iter().filter(|(call, _)| call == "clone").count();
    let before = tries();
    faults.fail("clone");
    assert!(read(&unpack(&plugin.diff("c", "base")), "file") == b"written");
    assert_eq!(tries(), before + 1);
    assert!(plugin.log().contains("cannot be cloned after all"), "{}", plugin.log());
    faults.mend("clone");
    plugin.diff("c", "base");
    assert_eq!(tries(), before + 1, "it is not tried again and again");
    assert_eq!(faults.count("freeze", 0), faults.count("thaw", 0));
    fs::write(dir.join("file"), "again").unwrap();
}

#[test]
fn clones_are_made_only_where_all_of_a_sandbox_could_be_written_anew() {
    let free = |path: &Path| {
        let room = rustix::fs::statvfs(path).unwrap();
        room.f_bavail * room.f_frsize
    };
    let (plugin, faults) = Faults::plugin(&["--storage-opt", "lcow.minfree=3g"]);
    Ground::Xfs.lay(&plugin);
    let dir = shown(&plugin);
    fs::write(dir.join("file"), noise(1, 8 << 20)).unwrap();
    let before = faults.count("clone", 0);
    plugin.diff("c", "base");
    assert_eq!(faults.count("clone", 0), before + 1);
    let taken = File::create(plugin.home().join("mnt/taken")).unwrap();
    let room = free(&plugin.home()) - (3 << 30);
    rustix::fs::fallocate(&taken, rustix::fs::FallocateFlags::empty(), 0, room - (4 << 20)).unwrap();
    plugin.diff("c", "base");
    assert_eq!(faults.count("clone", 0), before + 1, "there is no room for another");
}
