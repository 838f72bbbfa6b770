//! Daemons that are killed under running containers: the plugin, dockerd, both.

use crate::{
    engine::{Engine, EngineOptions},
    manifest::Tree,
    rootfs,
};

/// A container that writes a line into `/data/lines` ten times a second.
fn writer(engine: &Engine) {
    let script = "n=0; while :; do n=$((n+1)); echo line $n >>/data/lines; sleep 0.1; done";
    let head = ["run", "-d", "--network", "none", "--stop-signal", "KILL", "--name", "writer"];
    engine.docker(&[&head[..], &["base", "/bin/sh", "-c", script]].concat());
}

/// Lines written so far; each must be whole and in order. Read past the engine, which asks its driver at each exec.
fn lines(engine: &Engine) -> usize {
    let run = engine.run(&["cat", &format!("{}/data/lines", root_of(engine, "writer"))]).expect_ok();
    let text = String::from_utf8_lossy(&run.stdout);
    for (n, line) in text.lines().enumerate() {
        // The last line of a file that is just written to is whole, too: one write.
        assert_eq!(line, format!("line {}", n + 1));
    }
    text.lines().count()
}

/// The folder in the room that is a running container's root. Needs no driver.
fn root_of(engine: &Engine, container: &str) -> String {
    let processes = engine.docker(&["ps", "-q", "--no-trunc", "--filter", &format!("name={container}")]);
    let state = if engine.has_containerd() { "/run/containerd" } else { "/run/e2e-exec/containerd/daemon" };
    let file = format!("{state}/io.containerd.runtime.v2.task/moby/{processes}/init.pid");
    let pid_file = engine.run(&["cat", &file]);
    let pid = String::from_utf8_lossy(&pid_file.expect_ok().stdout).trim().to_owned();
    format!("/proc/{pid}/root")
}

fn goes_on(engine: &Engine) {
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
    let (before, begin) = (lines(engine), std::time::Instant::now());
    while lines(engine) <= before {
        assert!(begin.elapsed() < PATIENCE, "the container wrote nothing after line {before}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Files of several kinds, and the tree with them.
fn work(engine: &Engine, container: &str, base: &Tree) -> Tree {
    engine.exec(
        container,
        "mkdir /work && echo w >/work/file && ln -s file /work/link && rm -r /data/nested && sync",
    );
    let mut tree = base.clone();
    tree.dir("/work", 0o755);
    tree.file("/work/file", 0o644, "w\n");
    tree.symlink("/work/link", "file");
    tree.delete("/data/nested");
    tree
}

#[test]
fn containers_go_on_when_the_plugin_is_killed() {
    let (engine, base) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::full());
    writer(&engine);
    engine.run_container("box1", "base", &[]);
    let mut expected = work(&engine, "box1", &base);
    goes_on(&engine);
    engine.kill_plugin();
    // Without any plugin.
    goes_on(&engine);
    let dead = format!("{}/work/dead", root_of(&engine, "box1"));
    engine.run(&["sh", "-c", "echo while-dead >$0", &dead]).expect_ok();
    let exec = engine.spawn(&["docker", "exec", "box1", "true"]).wait();
    if engine.has_containerd() {
        // Which asks its snapshotter only when a container starts.
        exec.expect_ok();
    } else {
        let failure = exec.expect_failure();
        assert!(failure.contains("lcow.sock"), "{failure}");
    }
    expected.file("/work/dead", 0o644, "while-dead\n");
    engine.start_plugin();
    goes_on(&engine);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the container after the plugin's restart");
    engine.docker(&["commit", "box1", "running"]);
    expected.assert_same(&Tree::of_image(&engine, "running"), "a commit of the running container");
    let diff = engine.docker(&["diff", "box1"]);
    assert!(diff.contains("A /work/dead") && diff.contains("D /data/nested"), "{diff}");
    // Again, and once with nothing in between.
    engine.kill_plugin();
    engine.start_plugin();
    engine.kill_plugin();
    engine.start_plugin();
    engine.docker(&["stop", "-t", "0", "box1"]);
    goes_on(&engine);
    engine.docker(&["start", "box1"]);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the container after stop and start");
    engine.exec("box1", "echo more >/work/more");
    expected.file("/work/more", 0o644, "more\n");
    engine.docker(&["stop", "-t", "0", "box1"]);
    engine.kill_plugin();
    engine.start_plugin();
    engine.docker(&["commit", "box1", "stopped"]);
    expected.assert_same(&Tree::of_image(&engine, "stopped"), "a commit of the stopped container");
    engine.scrub();
    engine.docker(&["rm", "-f", "box1", "writer"]);
    engine.assert_nothing_mounted();
}

#[test]
fn a_container_can_be_stopped_and_removed_while_its_plugin_was_away() {
    let (engine, _) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::small());
    for name in ["ends", "removed"] {
        engine.run_container(name, "base", &[]);
    }
    engine.kill_plugin();
    // It ends by itself; dockerd's Put waits for the plugin.
    let kill = engine.spawn(&["docker", "kill", "ends"]);
    std::thread::sleep(std::time::Duration::from_millis(700));
    engine.start_plugin();
    kill.wait().expect_ok();
    engine.docker(&["rm", "-f", "ends"]);
    engine.docker(&["rm", "-f", "removed"]);
    engine.assert_nothing_mounted();
    assert_eq!(engine.shell("base", "echo works"), "works");
}

#[test]
fn live_restore_keeps_containers_over_a_killed_dockerd() {
    let options = EngineOptions::default().dockerd(&["--live-restore"]);
    let (engine, base) = rootfs::engine_with(options, &rootfs::full());
    writer(&engine);
    engine.run_container("box1", "base", &[]);
    let mut expected = work(&engine, "box1", &base);
    goes_on(&engine);
    engine.kill_dockerd();
    engine.start_dockerd();
    goes_on(&engine);
    assert_eq!(engine.docker(&["inspect", "-f", "{{.State.Running}}", "box1"]), "true");
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the container after dockerd's restart");
    // Both at once, dockerd waits for the plugin.
    engine.kill_plugin();
    engine.kill_dockerd();
    engine.start_plugin();
    engine.start_dockerd();
    goes_on(&engine);
    engine.exec("box1", "echo later >/work/later");
    expected.file("/work/later", 0o644, "later\n");
    // A clean stop, too, leaves the containers alone.
    engine.stop_dockerd();
    engine.start_dockerd();
    goes_on(&engine);
    engine.docker(&["commit", "box1", "committed"]);
    expected.assert_same(&Tree::of_image(&engine, "committed"), "a commit after the restarts");
    engine.docker(&["stop", "-t", "0", "box1"]);
    engine.docker(&["start", "box1"]);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the container after stop and start");
    engine.scrub();
    engine.docker(&["rm", "-f", "box1", "writer"]);
    engine.assert_nothing_mounted();
}

#[test]
fn a_killed_dockerd_without_live_restore_leaves_what_was_written() {
    let (engine, base) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    engine.run_container("box1", "base", &[]);
    let expected = work(&engine, "box1", &base);
    engine.kill_dockerd();
    engine.start_dockerd();
    assert_eq!(engine.docker(&["inspect", "-f", "{{.State.Running}}", "box1"]), "false");
    engine.docker(&["start", "box1"]);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the container after dockerd's restart");
    engine.docker(&["commit", "box1", "committed"]);
    expected.assert_same(&Tree::of_image(&engine, "committed"), "its commit");
    engine.docker(&["rm", "-f", "box1"]);
    engine.scrub();
    engine.assert_nothing_mounted();
}
