//! One truth: what the daemon says, what its memory holds, what is on the disk and what the kernel has mounted agree,
//! whatever fails, stands still or races.
//!
//! Needs root and strace: system calls of the running daemon are made to fail, and its disk to stand still.

use crate::support::{Plugin, Reply, Tar, injection::Injection, noise, send_chunks};
use lcow_sys::linux::{
    freeze,
    loopdev::{self, LoopSpec},
    mount::{self, Ext4Options},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Longest wait for something that must come.
const PATIENCE: Duration = Duration::from_mins(1);

/// Loop devices whose file lies below a folder.
pub(crate) fn loop_devices(folder: &Path) -> Vec<String> {
    let files = fs::read_dir("/sys/block")
        .unwrap()
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path().join("loop/backing_file")).ok());
    files.filter(|file| file.starts_with(folder.to_str().unwrap())).collect()
}

/// Waits for the kernel: a device is let go of a moment after its unmount.
pub(crate) fn wait_for_no_loop_device(folder: &Path) {
    let begin = Instant::now();
    while !loop_devices(folder).is_empty() {
        assert!(begin.elapsed() < PATIENCE, "loop devices stay: {:?}", loop_devices(folder));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start() -> Plugin {
    // No spares: a worker that begins just when strace attaches may stand still.
    let plugin =
        Plugin::start(&["--storage-opt", "lcow.sandboxsize=32MiB", "--storage-opt", "lcow.pool.spares=0"]);
    plugin.init();
    plugin
}

fn tar() -> Vec<u8> {
    Tar::new().dir("d/").file("d/f", &noise(1, 50_000)).end()
}

fn state(plugin: &Plugin, id: &str) -> Option<Value> {
    let reply = plugin.call("GraphDriver.GetMetadata", &json!({"ID": id}));
    (reply.status == 200).then(|| reply.json()["Metadata"]["state"].clone())
}

fn state_on_disk(plugin: &Plugin, id: &str) -> Option<Value> {
    let text = fs::read(plugin.home().join(id).join("layer.json")).ok()?;
    Some(serde_json::from_slice::<Value>(&text).unwrap()["state"].clone())
}

/// A small ext4 as a home, which can be made to stand still: every write waits, every read is served.
struct StillDisk {
    folder: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl StillDisk {
    fn mounted_at(folder: PathBuf) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(256 << 20).unwrap();
        let made = Command::new("mkfs.ext4").arg("-q").arg(file.path()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let spec = LoopSpec { autoclear: true, ..LoopSpec::default() };
        let device = loopdev::attach(file.as_file().as_fd(), &spec).expect("loop devices need root");
        fs::create_dir_all(&folder).unwrap();
        mount::mount_ext4(&device.path, &folder, Ext4Options::default()).unwrap();
        Self { folder, _file: file }
    }
}

impl Drop for StillDisk {
    fn drop(&mut self) {
        let _ = mount::umount(&self.folder, true);
    }
}

/// Waits until a thread of the plugin waits for the disk.
fn wait_until_stuck(plugin: &Plugin) {
    let tasks = format!("/proc/{}/task", plugin.pid());
    let stuck = || {
        fs::read_dir(&tasks).unwrap().flatten().any(|task| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('D'))
        })
    };
    let begin = Instant::now();
    while !stuck() {
        assert!(begin.elapsed() < PATIENCE, "nothing waits for the disk\n{}", plugin.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Every kind of request that writes is held back by the disk, one after the other; what only looks, and what concerns
/// other layers, is answered meanwhile. The disk goes on when the last answer is there.
#[test]
fn a_disk_that_stands_still_holds_up_nobody_who_only_looks() {
    type Prepare = fn(&Plugin);
    let plugin =
        Plugin::start(&["--storage-opt", "lcow.sandboxsize=32MiB", "--storage-opt", "lcow.minfree=0"]);
    let disk = StillDisk::mounted_at(plugin.home());
    plugin.init();
    plugin.layer("other", "", &tar());
    let create: Prepare = |p| {
        p.ok("GraphDriver.Create", &json!({"ID": "x", "Parent": "other"}));
    };
    let sandbox: Prepare = |p| {
        p.ok("GraphDriver.CreateReadWrite", &json!({"ID": "x", "Parent": "other"}));
    };
    let home = plugin.home();
    let requests: [(&str, Prepare, Value); 6] = [
        ("GraphDriver.Create", |_| {}, json!({"ID": "x", "Parent": "other"})),
        ("GraphDriver.CreateReadWrite", |_| {}, json!({"ID": "x"})),
        ("GraphDriver.ApplyDiff", create, json!(null)),
        ("GraphDriver.Get", create, json!({"ID": "x"})),
        ("GraphDriver.Remove", sandbox, json!({"ID": "x"})),
        ("GraphDriver.Init", |_| {}, json!({"Home": home, "Opts": ["lcow.pool.spares=2"]})),
    ];
    for (method, prepare, request) in requests {
        prepare(&plugin);
        let still = freeze::freeze(&disk.folder).unwrap();
        std::thread::scope(|scope| {
            let slow = scope.spawn(|| {
                if method == "GraphDriver.ApplyDiff" {
                    let mut stream = plugin.begin_apply("x", "other");
                    send_chunks(&mut stream, &tar(), 4096).unwrap();
                    stream.write_all(b"0\r\n\r\n").unwrap();
                    return Reply::read(stream).unwrap();
                }
                plugin.call(method, &request)
            });
            wait_until_stuck(&plugin);
            let begin = Instant::now();
            for id in ["other", "x", "nobody"] {
                plugin.ok("GraphDriver.Exists", &json!({"ID": id}));
            }
            plugin.ok("GraphDriver.Status", &json!({}));
            plugin.ok("GraphDriver.Capabilities", &json!({}));
            assert_eq!(state(&plugin, "other"), Some(json!("applied")));
            assert!(plugin.diff("other", "") == tar());
            for path in ["healthz", "metrics", "svm"] {
                let reply = plugin.raw(format!("GET /{path} HTTP/1.1\r\nHost: \r\n\r\n").as_bytes());
                assert_eq!(reply.status, 200, "{path}: {}", reply.text());
            }
            println!("{method}: all others were answered within {:?}", begin.elapsed());
            assert!(!slow.is_finished(), "{method} was not held back");
            still.thaw().unwrap();
            let reply = slow.join().unwrap();
            assert_eq!(reply.status, 200, "{method}: {}\n{}", reply.text(), plugin.log());
        });
        plugin.put("x");
        plugin.remove("x");
    }
    drop(plugin);
}

/// Each step of each request fails once: memory and disk agree, and the daemon goes on.
#[test]
fn memory_and_disk_agree_whichever_call_of_a_request_fails() {
    type Step = fn(&Plugin) -> Reply;
    let mut plugin = start();
    let create: Step = |p| p.call("GraphDriver.Create", &json!({"ID": "x"}));
    let requests: [(&str, &[Step], Step); 5] = [
        ("create", &[], create),
        ("create a sandbox", &[], |p| p.call("GraphDriver.CreateReadWrite", &json!({"ID": "x"}))),
        ("apply", &[create], |p| p.apply("x", "", &tar())),
        ("first get", &[create], |p| p.call("GraphDriver.Get", &json!({"ID": "x"}))),
        ("remove", &[create], |p| p.call("GraphDriver.Remove", &json!({"ID": "x"}))),
    ];
    let mut failures = 0;
    for (name, before, step) in requests {
        for fault in [
            "fsync:error=EIO:when=1",
            "fsync:error=EIO:when=2",
            "fsync:error=EIO:when=3",
            "fsync:error=ENOSPC:when=4",
            "fsync:error=EIO:when=1+",
            "rename:error=EIO:when=1",
            "openat:error=EMFILE:when=1",
            "openat:error=EMFILE:when=3",
        ] {
            for prepare in before {
                let reply = prepare(&plugin);
                assert_eq!(reply.status, 200, "{}", reply.text());
            }
            let injection = Injection::begin(plugin.pid(), fault);
            let reply = step(&plugin);
            failures += usize::from(injection.end() > 0);
            let what = format!("{name}, {fault}: {} {}", reply.status, reply.text());
            assert_eq!(state(&plugin, "x"), state_on_disk(&plugin, "x"), "{what}");
            let (found, ok) = (state_on_disk(&plugin, "x"), reply.status == 200);
            match name {
                "create" | "create a sandbox" => assert_eq!(found.is_some(), ok, "{what}"),
                "apply" => assert_eq!(found == Some(json!("applied")), ok, "{what}"),
                "remove" => assert!(found.is_none() || !ok, "{what}"),
                _ => {}
            }
            plugin.kill_and_restart();
            assert_eq!(state(&plugin, "x"), found, "{what}, after a restart");
            plugin.put("x");
            plugin.remove("x");
            assert_eq!(plugin.mounts(), [""; 0], "{what}");
        }
    }
    assert!(failures > 20, "only {failures} requests met a failure: the test tests nothing");
    wait_for_no_loop_device(&plugin.folder);
}

#[test]
fn what_could_not_be_unmounted_is_tried_again_by_put_remove_and_start() {
    let mut plugin = start();
    plugin.layer("base", "", &tar());
    let show = |plugin: &Plugin| {
        plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": "base"}));
        plugin.get("rw");
    };
    let fault = |plugin: &Plugin, method: &str, when: &str| {
        let injection = Injection::begin(plugin.pid(), &format!("umount2:error=EIO:when={when}"));
        let reply = plugin.call(method, &json!({"ID": "rw"}));
        assert!(injection.end() > 0);
        assert_ne!(reply.status, 200, "{method} says that all went well: {}", reply.text());
    };
    // The view, one disk, all disks.
    for when in ["1", "2", "3", "2+", "1+"] {
        show(&plugin);
        fault(&plugin, "GraphDriver.Put", when);
        plugin.put("rw");
        assert_eq!(plugin.mounts(), [""; 0], "umount2 {when}, then a second Put");
        wait_for_no_loop_device(&plugin.folder);
        // And once more as if nothing had been.
        plugin.get("rw");
        fault(&plugin, "GraphDriver.Remove", when);
        assert_eq!(
            plugin.ok("GraphDriver.Exists", &json!({"ID": "rw"}))["Exists"],
            true,
            "removed, though mounted"
        );
        plugin.remove("rw");
        assert_eq!(plugin.mounts(), [""; 0], "umount2 {when}, then a second Remove");
        wait_for_no_loop_device(&plugin.folder);
        show(&plugin);
        fault(&plugin, "GraphDriver.Put", when);
        plugin.kill_and_restart();
        // What is still shown counts as held; what is not is unmounted.
        plugin.put("rw");
        assert_eq!(plugin.mounts(), [""; 0], "umount2 {when}, then a restart");
        // A disk that could not be unmounted is shown again.
        plugin.get("rw");
        fault(&plugin, "GraphDriver.Put", when);
        fs::write(plugin.get("rw").join("written"), b"again").unwrap();
        plugin.put("rw");
        plugin.remove("rw");
        assert_eq!(plugin.mounts(), [""; 0]);
        wait_for_no_loop_device(&plugin.folder);
    }
}

#[test]
fn a_start_unmounts_what_belongs_to_no_layer_and_no_deletion_walks_into_a_mount() {
    let mut plugin = start();
    plugin.layer("base", "", &tar());
    plugin.terminate();
    let home = plugin.home();
    let places = [
        home.join("mnt/0123456789abcdef"),
        home.join("staging/x-removing.1/merged"),
        home.join("gone/merged"),
    ];
    let precious = plugin.folder.join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("work"), b"of years").unwrap();
    for place in &places {
        fs::create_dir_all(place).unwrap();
        mount::bind(&precious, place).unwrap();
    }
    fs::write(home.join("gone/layerchain.json"), b"null").unwrap();
    fs::remove_file(home.join("gone/layerchain.json")).unwrap();
    plugin.start_again();
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    assert_eq!(fs::read(precious.join("work")).unwrap(), b"of years");
    // Mounted behind the daemon's back: Remove unmounts what is at its own places, and enters nothing else.
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": "base"}));
    plugin.get("rw");
    plugin.put("rw");
    mount::bind(&precious, &home.join("rw/merged")).unwrap();
    fs::create_dir(home.join("rw/odd")).unwrap();
    mount::bind(&precious, &home.join("rw/odd")).unwrap();
    plugin.remove("rw");
    assert_eq!(fs::read(precious.join("work")).unwrap(), b"of years");
    let left = plugin.mounts();
    assert!(left.len() == 1 && left[0].contains("staging"), "{left:?}");
    mount::umount(Path::new(&left[0]), true).unwrap();
    // The next removal takes what was left.
    plugin.remove("base");
    assert_eq!(fs::read_dir(home.join("staging")).unwrap().count(), 0);
}

#[test]
fn a_loop_device_that_cannot_be_asked_stops_no_sandbox() {
    let plugin = start();
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw"}));
    // Somebody's device, so that there is one to be asked.
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let spec = LoopSpec { autoclear: true, ..LoopSpec::default() };
    let device = loopdev::attach(file.as_file().as_fd(), &spec).unwrap();
    let injection = Injection::begin(plugin.pid(), "ioctl:error=EIO:when=1");
    let reply = plugin.call("GraphDriver.Get", &json!({"ID": "rw"}));
    assert!(injection.end() > 0, "no call failed");
    assert_eq!(reply.status, 200, "{}\n{}", reply.text(), plugin.log());
    drop(device);
    plugin.put("rw");
    plugin.remove("rw");
    wait_for_no_loop_device(&plugin.folder);
}

#[test]
fn gets_that_race_a_remove_leave_nothing_mounted() {
    let plugin = start();
    plugin.layer("base", "", &tar());
    for round in 0..30 {
        plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": "base"}));
        std::thread::scope(|scope| {
            for n in 0..10 {
                let plugin = &plugin;
                scope.spawn(move || {
                    if n == round % 10 {
                        plugin.remove("rw");
                    } else {
                        plugin.call("GraphDriver.Get", &json!({"ID": "rw"}));
                    }
                });
            }
        });
        // Whoever came after the removal met nothing.
        assert_eq!(plugin.mounts(), [""; 0], "round {round}\n{}", plugin.log());
        assert!(!plugin.home().join("rw").exists());
    }
    wait_for_no_loop_device(&plugin.folder);
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": "base"}));
    assert!(plugin.get("rw").join("d/f").exists());
}

#[test]
fn an_init_with_other_options_keeps_the_counts_of_views() {
    let plugin = start();
    plugin.layer("base", "", &tar());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": "base"}));
    let dir = plugin.get("rw");
    plugin.get("rw");
    let init = |option: &str| {
        plugin.ok("GraphDriver.Init", &json!({"Home": plugin.home(), "Opts": [option]}));
    };
    init("lcow.overlayapi=legacy");
    assert_eq!(plugin.get("rw"), dir);
    plugin.put("rw");
    init("lcow.overlayapi=new");
    plugin.put("rw");
    assert!(dir.join("d/f").exists(), "a view that is still held was unmounted");
    assert_eq!(plugin.ok("GraphDriver.GetMetadata", &json!({"ID": "rw"}))["Metadata"]["references"], "1");
    plugin.put("rw");
    assert_eq!(plugin.mounts(), [""; 0]);
}

/// An Init that fails at its last step is as if it had never been, for this process and for the next one.
#[test]
fn an_init_that_fails_changes_nothing() {
    let mut plugin = start();
    plugin.layer("base", "", &tar());
    let other = plugin.folder.join("second");
    let options = |plugin: &Plugin| {
        let status = plugin.ok("GraphDriver.Status", &json!({})).to_string();
        (status.contains("[\"lcow.pool.spares\",\"7\"]"), status.contains("second"))
    };
    assert_eq!(options(&plugin), (false, false));
    let requests = [
        json!({"Home": plugin.home(), "Opts": ["lcow.pool.spares=7"]}),
        json!({"Home": other, "Opts": ["lcow.pool.spares=7"]}),
    ];
    for request in &requests {
        // A folder where the file of the last Init is to be replaced.
        let last = plugin.folder.join("root/last-init.json");
        let kept = fs::read(&last).unwrap();
        fs::remove_file(&last).unwrap();
        fs::create_dir(&last).unwrap();
        plugin.err("GraphDriver.Init", request);
        assert_eq!(options(&plugin), (false, false), "{request}");
        fs::remove_dir(&last).unwrap();
        fs::write(&last, kept).unwrap();
        plugin.kill_and_restart();
        assert_eq!(options(&plugin), (false, false), "{request}, after a restart");
    }
    plugin.ok("GraphDriver.Init", &requests[0]);
    assert_eq!(options(&plugin), (true, false));
    assert!(plugin.diff("base", "") == tar());
}
