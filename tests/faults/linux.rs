//! Sandboxes that are mounted, and systemd: what only Linux has. Needs root: it mounts small tmpfs disks.

use crate::support::{Plugin, Reply, Tar, machine::SmallDisk, noise};
use serde_json::json;
use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

#[test]
fn a_full_host_stops_new_layers_first_and_sandboxes_survive_it() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.minfree=8m"]);
    let disk = SmallDisk::of(plugin.home(), 40 << 20).expect("mounting a tmpfs needs root");
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
    let a = get_once_alone(&plugin, "a");
    fs::write(a.join("after"), b"room again").unwrap();
    assert_eq!(fs::read(a.join("f0")).unwrap(), noise(0, 1 << 20));
    plugin.put("a");
    for id in ["a", "b"] {
        e2fsck_clean(&plugin.home().join(id).join("sandbox.vhd"));
    }
    assert_eq!(fs::read(plugin.get("b").join("kept")).unwrap(), noise(5, 100_000));
    plugin.put("b");
}

/// Shows a sandbox whose file system stopped after an error, once no mount namespace keeps it: those of other tests copy
/// every mount.
fn get_once_alone(plugin: &Plugin, id: &str) -> PathBuf {
    let begin = Instant::now();
    loop {
        let reply = plugin.call("GraphDriver.Get", &json!({"ID": id}));
        if !reply.text().contains("another mount namespace keeps mounted") {
            return reply.json()["Dir"].as_str().unwrap_or_else(|| panic!("{}", reply.text())).into();
        }
        assert!(begin.elapsed() < Duration::from_mins(1), "{}", reply.text());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A container or service that copied the host's mounts keeps a stopped file system alive; a view of it would be read-only.
#[test]
fn a_sandbox_that_stopped_and_is_kept_alive_elsewhere_is_refused_until_it_is_free() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=64m"]);
    plugin.init();
    plugin.layer("base", "", &Tar::new().file("f", b"x").end());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": "base"}));
    let view = plugin.get("rw");
    fs::write(view.join("kept"), b"kept").unwrap();
    sync(&view);
    let disk = plugin
        .mounts()
        .into_iter()
        .find(|place| place.contains("/mnt/") && Path::new(place).join("upper").exists())
        .expect("the sandbox is mounted");
    let mut other = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "echo there; exec sleep 600"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 6];
    other.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    let other = Ended(other);
    let stopped = Command::new("xfs_io").args(["-x", "-c", "shutdown", &disk]).status().unwrap();
    assert!(stopped.success(), "xfs_io of xfsprogs");
    plugin.put("rw");
    let text = plugin.err("GraphDriver.Get", &json!({"ID": "rw"}));
    assert!(text.contains("another mount namespace keeps mounted"), "{text}");
    assert_eq!(plugin.mounts(), [""; 0], "a refused Get leaves nothing mounted");
    drop(other);
    let view = get_once_alone(&plugin, "rw");
    assert_eq!(fs::read(view.join("kept")).unwrap(), b"kept");
    fs::write(view.join("after"), b"again").unwrap();
    plugin.put("rw");
}

/// A process that is killed at the end of the test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn grow(disk: &SmallDisk, megabytes: u32) {
    let options = format!("remount,size={megabytes}m");
    assert!(Command::new("mount").args(["-o", &options]).arg(&disk.folder).status().unwrap().success());
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
fn systemd_can_hand_over_the_socket_and_hears_that_the_plugin_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("lcow.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let notices = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    notices.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // Any number but 3, which the shell gives to its copy: the listener itself may have that one.
    let lent = rustix::io::fcntl_dupfd_cloexec(&listener, 10).unwrap();
    rustix::io::fcntl_setfd(&lent, rustix::io::FdFlags::empty()).unwrap();
    // LISTEN_PID must name the program itself: the shell becomes it.
    let script = format!(
        "exec 3<&{fd} {fd}<&-; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" serve --root \"$1\" --socket /nonexistent/never-used",
        fd = lent.as_raw_fd()
    );
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
