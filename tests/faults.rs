//! Disks that fill up, peers that stand still, sockets and notices of systemd: what an operator meets.
//!
//! Needs root: it mounts small tmpfs disks.

mod support;

use serde_json::json;
use std::{
    fs,
    io::Write,
    os::{
        fd::AsRawFd,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use support::{Plugin, Reply, Tar, noise, send_chunks};

/// A tmpfs of a fixed size, unmounted on drop.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path, megabytes: u32) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={megabytes}m");
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).status().unwrap();
        assert!(status.success(), "mounting a tmpfs needs root");
        Self(path.to_owned())
    }

    fn free(&self) -> u64 {
        let room = rustix::fs::statvfs(&self.0).unwrap();
        room.f_bavail * room.f_frsize
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_during_an_apply_is_an_error_and_leaves_no_trace() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.minfree=0"]);
    let disk = SmallDisk::mount(&plugin.home(), 12);
    plugin.init();
    plugin.layer("small", "", &Tar::new().file("f", &noise(1, 100_000)).end());
    let before = disk.free();
    plugin.ok("GraphDriver.Create", &json!({"ID": "large"}));
    let reply = plugin.apply("large", "", &Tar::new().file("f", &noise(2, 20 << 20)).end());
    assert!(reply.status >= 400, "{}", reply.text());
    let text = reply.text();
    assert!(text.contains("large") && text.to_lowercase().contains("space"), "{text}");
    plugin.remove("large");
    assert_eq!(fs::read_dir(plugin.home().join("staging")).unwrap().count(), 0);
    assert!(disk.free() >= before - 64 * 1024, "{} of {before} bytes came back", disk.free());
    plugin.layer("again", "small", &Tar::new().file("g", &noise(3, 1 << 20)).end());
    assert!(plugin.diff("small", "") == Tar::new().file("f", &noise(1, 100_000)).end());
}

#[test]
fn a_full_host_stops_new_layers_first_and_sandboxes_survive_it() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.minfree=8m"]);
    let disk = SmallDisk::mount(&plugin.home(), 40);
    plugin.init();
    for id in ["a", "b"] {
        plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": id, "StorageOpt": {"size": "1g"}}));
    }
    let (a, b) = (plugin.get("a"), plugin.get("b"));
    fs::write(b.join("kept"), noise(5, 100_000)).unwrap();
    sync(&b);
    // The sandbox believes that it has 1 GiB; the host has 40 MiB.
    let mut failed = false;
    for n in 0..60 {
        let file = a.join(format!("f{n}"));
        let written = fs::File::create(&file).and_then(|mut f| {
            f.write_all(&noise(n, 1 << 20))?;
            f.sync_all()
        });
        if written.is_err() {
            failed = true;
            break;
        }
    }
    assert!(failed, "60 MiB went onto a disk of 40 MiB");
    assert!(disk.free() < 8 << 20);
    let text = plugin.err("GraphDriver.Create", &json!({"ID": "refused"}));
    assert!(text.contains("lcow.minfree"), "{text}");
    let status = plugin.ok("GraphDriver.Status", &json!({})).to_string();
    assert!(status.contains("LOW"), "{status}");
    // The other container reads on, and the full one comes back sound once there is room.
    assert_eq!(fs::read(b.join("kept")).unwrap(), noise(5, 100_000));
    plugin.put("a");
    plugin.put("b");
    assert_eq!(plugin.mounts().len(), 1, "only the disk itself: {:?}", plugin.mounts());
    grow(&disk, 120);
    let a = plugin.get("a");
    fs::write(a.join("after"), b"room again").unwrap();
    assert_eq!(fs::read(a.join("f0")).unwrap(), noise(0, 1 << 20));
    plugin.put("a");
    for id in ["a", "b"] {
        e2fsck_clean(&plugin.home().join(id).join("sandbox.vhd"));
    }
    assert_eq!(fs::read(plugin.get("b").join("kept")).unwrap(), noise(5, 100_000));
    plugin.put("b");
}

fn grow(disk: &SmallDisk, megabytes: u32) {
    let options = format!("remount,size={megabytes}m");
    assert!(Command::new("mount").args(["-o", &options]).arg(&disk.0).status().unwrap().success());
}

fn sync(folder: &Path) {
    rustix::fs::syncfs(fs::File::open(folder).unwrap()).unwrap();
}

/// The file system before the VHD footer, as e2fsck sees it.
fn e2fsck_clean(sandbox: &Path) {
    let output = Command::new("e2fsck").args(["-f", "-n"]).arg(sandbox).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn deleted_files_give_their_space_back_to_the_host() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "StorageOpt": {"size": "20g"}}));
    let file = plugin.home().join("c/sandbox.vhd");
    let on_disk = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&file).unwrap()) * 512;
    assert!(on_disk() < 1 << 20, "a blank of 20 GB takes {} bytes", on_disk());
    let dir = plugin.get("c");
    fs::write(dir.join("large"), noise(1, 64 << 20)).unwrap();
    sync(&dir);
    assert!(on_disk() > 64 << 20);
    fs::remove_file(dir.join("large")).unwrap();
    let begin = Instant::now();
    while on_disk() > 48 << 20 {
        sync(&dir);
        assert!(begin.elapsed() < Duration::from_secs(30), "{} bytes are still taken", on_disk());
        std::thread::sleep(Duration::from_millis(100));
    }
    plugin.put("c");
    e2fsck_clean(&file);
}

#[test]
fn a_quota_is_hard() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "StorageOpt": {"size": "32m"}}));
    let dir = plugin.get("c");
    let error = fs::write(dir.join("f"), noise(1, 64 << 20)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    fs::remove_file(dir.join("f")).unwrap();
    fs::write(dir.join("g"), b"goes on").unwrap();
    plugin.put("c");
}

#[test]
fn a_transfer_that_stands_still_ends_and_a_slow_one_does_not() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.timeout=1"]);
    plugin.init();
    let tar = Tar::new().file("f", &noise(1, 30_000)).end();
    // Slow: three times the limit as a whole, never idle for long.
    plugin.ok("GraphDriver.Create", &json!({"ID": "slow"}));
    let mut stream = plugin.begin_apply("slow", "");
    for part in tar.chunks(tar.len() / 9) {
        send_chunks(&mut stream, part, 4096).unwrap();
        std::thread::sleep(Duration::from_millis(400));
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    let reply = Reply::read(stream).unwrap();
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(plugin.diff("slow", "") == tar);
    // Idle.
    plugin.ok("GraphDriver.Create", &json!({"ID": "idle"}));
    let mut stream = plugin.begin_apply("idle", "");
    send_chunks(&mut stream, &tar[..5000], 1000).unwrap();
    let begin = Instant::now();
    let reply = Reply::read(stream).unwrap();
    assert!(reply.status >= 400 && reply.text().contains("lcow.timeout"), "{}", reply.text());
    assert!(begin.elapsed() < Duration::from_secs(10));
    plugin.remove("idle");
}

#[test]
fn a_client_that_never_reads_its_diff_costs_nothing_for_long() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.timeout=1", "--storage-opt", "lcow.pool.max=2"]);
    plugin.init();
    let tar = Tar::new().file("f", &noise(1, 24 << 20)).end();
    plugin.layer("a", "", &tar);
    let mut stuck = Vec::new();
    for _ in 0..3 {
        let mut stream = UnixStream::connect(plugin.socket()).unwrap();
        let body = json!({"ID": "a", "Parent": ""}).to_string();
        write!(
            stream,
            "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        stuck.push(stream);
        std::thread::sleep(Duration::from_millis(100));
    }
    let begin = Instant::now();
    assert!(plugin.diff("a", "") == tar);
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    drop(stuck);
}

#[test]
fn a_killed_worker_fails_one_request_and_leaves_nothing_behind() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.pool.spares=0"]);
    plugin.init();
    let tar = Tar::new().file("f", &noise(1, 200_000)).end();
    plugin.layer("good", "", &tar);
    plugin.ok("GraphDriver.Create", &json!({"ID": "bad"}));
    let mut stream = plugin.begin_apply("bad", "");
    send_chunks(&mut stream, &tar[..100_000], 10_000).unwrap();
    // Time to get into the middle of the stream.
    std::thread::sleep(Duration::from_millis(300));
    let worker = wait_for_child(&plugin);
    rustix::process::kill_process(worker, rustix::process::Signal::KILL).unwrap();
    let reply = Reply::read(stream).unwrap();
    assert!(reply.status >= 400 && reply.text().contains("died"), "{}", reply.text());
    plugin.remove("bad");
    plugin.layer("bad", "good", &tar);
    assert!(plugin.diff("bad", "good") == tar);
    assert_eq!(fs::read_dir(plugin.home().join("staging")).unwrap().count(), 0);
}

fn wait_for_child(plugin: &Plugin) -> rustix::process::Pid {
    let begin = Instant::now();
    loop {
        let tasks = fs::read_dir(format!("/proc/{}/task", plugin.pid())).unwrap();
        for task in tasks.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            if let Some(pid) = children.split_whitespace().next() {
                return rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
            }
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "there is no worker");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn systemd_can_hand_over_the_socket_and_hears_that_the_plugin_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("lcow.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let notices = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    notices.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // LISTEN_PID must name the program itself: the shell becomes it.
    let script = format!(
        "exec 3<&{fd} {fd}<&-; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" serve --root \"$1\" --socket /nonexistent/never-used",
        fd = listener.as_raw_fd()
    );
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let mut child = Command::new("bash")
        .args(["-c", &script])
        .arg(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .arg(folder.path().join("root"))
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .stderr(fs::File::create(folder.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut text = [0; 100];
    let outcome = notices.recv(&mut text).and_then(|n| {
        let heard = String::from_utf8_lossy(&text[..n]).into_owned();
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n")?;
        Ok((heard, Reply::read(stream)?))
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    let status = child.wait().unwrap();
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    let (heard, reply) = outcome.unwrap_or_else(|e| panic!("{e}\n{log}"));
    assert!(heard.contains("READY=1"), "{heard}");
    assert_eq!(reply.json(), json!({"Implements": ["GraphDriver"]}));
    assert!(status.success(), "{log}");
    assert!(socket.exists(), "a socket of systemd is not ours to remove");
}

#[test]
fn wrong_options_are_refused_at_the_start_with_a_message_that_helps() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .args(["serve", "--root"])
            .arg(folder.path().join("root"))
            .arg("--socket")
            .arg(folder.path().join("lcow.sock"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = run(&["--storage-opt", "lcow.sandboxsize=tiny"]);
    assert!(text.contains("lcow.sandboxsize") && text.contains("tiny") && text.contains("16 MiB"), "{text}");
    let text = run(&["--storage-opt", "lcow.nosuch=1"]);
    assert!(text.contains("lcow.nosuch") && text.contains("lcow.globalmode"), "{text}");
    let text = run(&["--config", "/nonexistent/lcow.toml"]);
    assert!(text.contains("/nonexistent/lcow.toml"), "{text}");
    assert!(!folder.path().join("root").exists());
}
