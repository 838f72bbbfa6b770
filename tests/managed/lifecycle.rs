//! A plugin's life in the engine: it is created, used, killed, replaced, upgraded, and refused to be disabled.

use crate::{
    command::{kill, wait_until},
    everyday,
    manifest::Tree,
    plugin::archive,
    room::{RESTART, Room, Version, next_version},
    rootfs::random_bytes,
    tarball::{self, Entry},
};
use std::{
    fs,
    net::TcpListener,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// A container that writes a line into `/data/lines` ten times a second.
fn writer(room: &Room) {
    let script = "n=0; while :; do n=$((n+1)); echo line $n >>/data/lines; sleep 0.1; done";
    room.engine.docker(&[
        "run",
        "-d",
        "--network",
        "none",
        "--name",
        "writer",
        "base",
        "/bin/sh",
        "-c",
        script,
    ]);
}

/// Fails unless the writer wrote whole lines in order, and goes on.
fn goes_on(room: &Room) {
    let pid = room.engine.docker(&["inspect", "-f", "{{.State.Pid}}", "writer"]);
    let lines = || {
        // Past the engine, which asks its driver at each exec.
        let text = room.engine.run(&["cat", &format!("/proc/{pid}/root/data/lines")]).expect_ok().stdout;
        let text = String::from_utf8(text).expect("text");
        for (n, line) in text.lines().enumerate() {
            assert_eq!(line, format!("line {}", n + 1));
        }
        text.lines().count()
    };
    const PATIENCE: Duration = Duration::from_secs(30);
    let (before, begin) = (lines(), Instant::now());
    while lines() <= before {
        assert!(begin.elapsed() < PATIENCE, "the container wrote nothing after line {before}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn life(version: Version) {
    let (room, base) = Room::start(version, &[]);
    let engine = &room.engine;
    let jail = room.status("Service VM Jail");
    assert!(jail.contains("seccomp") && !jail.contains("NOT"), "the jail in the plugin: {jail}");
    assert_eq!(room.status("Home"), "/var/lib/lcow/lcow");
    everyday::everything(engine, &base);
    // The engine writes into /etc of every container that it starts.
    let built = Tree::of_image(engine, "built").except_times_of(&["/etc"]);

    // A crash with a container that runs.
    writer(&room);
    engine.run_container("box1", "built", &[]);
    engine.exec("box1", "echo before >/work/before");
    let first = room.plugin_pid().expect("the plugin runs");
    kill(first);
    goes_on(&room);
    let second = room.wait_for_successor(first);
    goes_on(&room);
    engine.exec("box1", "echo after >/work/after");
    let mut tree = built.clone();
    tree.file("/work/before", 0o644, "before\n");
    tree.file("/work/after", 0o644, "after\n");
    tree.assert_same(&Tree::of_container(engine, "box1"), "the container after the plugin's crash");
    engine.docker(&["commit", "box1", "after-crash"]);
    tree.assert_same(&Tree::of_image(engine, "after-crash"), "a commit after the plugin's crash");

    // A crash under load: what was asked of it may fail, nothing that was there may suffer.
    let layers = |n: u64| tarball::build(&[Entry::file("data/load", random_bytes(n, 8 << 20))]);
    let load: Vec<_> = (0..3)
        .map(|n| {
            let tag = format!("load{n}");
            engine.spawn_with(&["docker", "import", "-", &tag], &[], Some(layers(n)))
        })
        .chain([engine.spawn(&["docker", "commit", "box1", "under-load"])])
        .collect();
    thread::sleep(Duration::from_millis(150));
    kill(second);
    let outcomes: Vec<bool> = load.into_iter().map(|l| l.wait().ok()).collect();
    eprintln!("of the requests under the crash succeeded: {outcomes:?}");
    let third = room.wait_for_successor(second);
    goes_on(&room);
    tree.assert_same(&Tree::of_container(engine, "box1"), "the container after the crash under load");
    engine.docker_with(&["import", "-", "load-again"], layers(9)).expect_ok();
    engine.scrub();

    // Its new program, with containers that run.
    let next = next_version(&engine.scratch("next"));
    let id = room.id();
    room.build_plugin(&["--load", next.to_str().expect("UTF-8"), "--replace"]);
    room.wait_for_successor(third);
    let program = fs::read(room.folder().join("rootfs/bin/lcow-graphdriver")).expect("program");
    assert!(program.ends_with(b"next version"), "the plugin runs its old program");
    assert_eq!(room.id(), id);
    goes_on(&room);
    tree.assert_same(&Tree::of_container(engine, "box1"), "the container after the replacement");

    // The engine restarts: the store is kept.
    let refused = engine.try_docker(&["plugin", "disable", "lcow"]).expect_failure();
    assert!(refused.contains("in use"), "{refused}");
    let refused = engine.try_docker(&["plugin", "rm", "lcow"]).expect_failure();
    assert!(refused.contains("enabled") || refused.contains("in use"), "{refused}");
    engine.docker(&["rm", "-f", "writer"]);
    let begun = std::time::Instant::now();
    engine.stop_dockerd();
    assert!(begun.elapsed() < Duration::from_secs(25), "dockerd took {:?} to stop", begun.elapsed());
    let log = engine.log_text("dockerd");
    assert!(log.contains("lcow_graphdriver::cli::serve: stopped"), "the plugin did not stop in order");
    engine.start_dockerd();
    engine.docker(&["start", "box1"]);
    tree.assert_same(&Tree::of_container(engine, "box1"), "the container after the engine's restart");
    engine.docker(&["rm", "-f", "box1"]);
    engine.scrub();
    engine.assert_nothing_mounted();
    everyday::export(engine, &base);
}

#[test]
fn a_plugins_life_on_20_10() {
    life(Version::V20);
}

#[test]
fn a_plugins_life_on_26_1() {
    life(Version::V26);
}

/// A registry in the room; returns its address.
fn registry(room: &Room) -> String {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let config = room.engine.scratch("registry").join("config.yml");
    let storage = room.engine.scratch("registry-data");
    let text = format!(
        "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: \
         127.0.0.1:{port}\n",
        storage.display()
    );
    fs::write(&config, text).expect("configuration");
    // It ends with the room.
    drop(room.engine.spawn(&["docker-registry", "serve", config.to_str().expect("UTF-8")]));
    wait_until("the registry", RESTART, || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    format!("127.0.0.1:{port}")
}

/// The two ways to a plugin with another configuration: by hand, and from a registry.
fn upgrades(version: Version) {
    let (room, _) = Room::start(version, &[]);
    let engine = &room.engine;
    engine.run_container("box1", "base", &[]);
    engine.exec("box1", "echo kept >/data/kept");
    let tree = Tree::of_container(engine, "box1").except_times_of(&["/etc"]);
    let check = |what: &str| {
        room.use_plugin();
        engine.docker(&["start", "box1"]);
        tree.assert_same(&Tree::of_container(engine, "box1"), what);
        engine.scrub();
        room.use_vfs();
        engine.docker(&["plugin", "disable", "lcow"]);
    };
    // A plugin that is removed loses its folder: the store stands aside meanwhile.
    let kept = engine.folder().join("kept");
    let anew = |make: &dyn Fn()| {
        fs::rename(room.home_of("lcow"), &kept).expect("move the store out");
        let old = room.id();
        engine.docker(&["plugin", "rm", "lcow"]);
        make();
        assert_ne!(room.id(), old);
        // The engine makes this folder when it first enables a plugin.
        fs::create_dir_all(room.folder().join("propagated-mount")).expect("folder of the store");
        fs::rename(&kept, room.home_of("lcow")).expect("move the store in");
    };
    let description = || engine.docker(&["plugin", "inspect", "-f", "{{.Config.Description}}", "lcow"]);

    // By hand.
    let next = next_version(&engine.scratch("next"));
    room.use_vfs();
    engine.docker(&["plugin", "disable", "lcow"]);
    anew(&|| room.create(&next));
    assert!(description().ends_with("version 99.0-test"), "{}", description());
    // Settings go with the plugin, and are given anew; an empty one is none.
    engine.docker(&["plugin", "set", "lcow", "LCOW_SANDBOXSIZE=3", "LCOW_POOL_SPARES=1"]);
    engine.docker(&["plugin", "set", "lcow", "LCOW_POOL_SPARES="]);
    room.enable();
    room.use_plugin();
    assert_eq!(room.status("lcow.sandboxsize"), "3.0 GiB");
    assert_eq!(room.status("lcow.pool.spares"), "2");
    check("the container after a plugin that was made anew");

    // From a registry: installed once, then upgraded in its place.
    let name = format!("{}/lcow:stable", registry(&room));
    let push = |archive: &Path| {
        room.build_plugin(&["--load", archive.to_str().expect("UTF-8"), "--name", &name]);
        engine.docker(&["plugin", "push", &name]);
        engine.docker(&["plugin", "rm", &name]);
    };
    push(archive());
    let install = ["plugin", "install", "--grant-all-permissions", "--disable", "--alias", "lcow", &name];
    anew(&|| drop(engine.docker(&install)));
    room.enable();
    check("the container after an installation from a registry");
    let id = room.id();
    push(&next);
    engine.docker(&["plugin", "upgrade", "--grant-all-permissions", "lcow", &name]);
    assert_eq!(room.id(), id);
    assert!(description().ends_with("version 99.0-test"), "{}", description());
    room.enable();
    check("the container after an upgrade from a registry");
    engine.assert_nothing_mounted();
}

#[test]
fn upgrades_keep_the_store_on_20_10() {
    upgrades(Version::V20);
}

#[test]
fn upgrades_keep_the_store_on_26_1() {
    upgrades(Version::V26);
}

#[test]
fn a_name_with_its_tag_is_another_home() {
    let (mut room, _) = Room::start(Version::V20, &[]);
    let tree = Tree::of_image(&room.engine, "base").except_times_of(&["/etc"]);
    room.name = "lcow:latest".into();
    room.use_plugin();
    assert_eq!(room.status("Home"), "/var/lib/lcow/lcow:latest");
    assert_eq!(room.engine.docker(&["images", "-q"]), "", "another home has other images");
    room.engine.import("here", tarball::build(&crate::rootfs::full()));
    // A colon is a separator in overlayfs's options; two layers need them.
    room.engine.docker(&[
        "run",
        "--network",
        "none",
        "--name",
        "box1",
        "here",
        "sh",
        "-c",
        "echo x >/data/x",
    ]);
    room.engine.docker(&["commit", "box1", "two"]);
    assert_eq!(room.engine.shell("two", "cat /data/x"), "x");
    room.engine.docker(&["rm", "-f", "box1"]);
    room.engine.scrub();
    room.name = "lcow".into();
    room.use_plugin();
    tree.assert_same(&Tree::of_image(&room.engine, "base"), "the first home after the other");
    room.engine.assert_nothing_mounted();
}

#[test]
fn live_restore_keeps_containers_and_plugin_over_a_killed_dockerd() {
    let (room, _) = Room::start(Version::V26, &["--live-restore"]);
    writer(&room);
    goes_on(&room);
    let pid = room.plugin_pid().expect("the plugin runs");
    room.engine.kill_dockerd();
    room.engine.start_dockerd();
    goes_on(&room);
    // Its crash is noticed by the new dockerd as well.
    let pid = room.plugin_pid().unwrap_or(pid);
    kill(pid);
    room.wait_for_successor(pid);
    goes_on(&room);
    room.engine.stop_dockerd();
    room.engine.start_dockerd();
    goes_on(&room);
    room.engine.docker(&["commit", "writer", "written"]);
    room.engine.docker(&["rm", "-f", "writer"]);
    room.engine.scrub();
    room.engine.assert_nothing_mounted();
}
