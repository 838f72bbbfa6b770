//! `--userns-remap`: root in containers is host id 500000, and images hold containers' ids.

use crate::{archive, engine::EngineOptions, manifest::Tree, rootfs, tarball};
use std::{fs, os::unix::fs::MetadataExt};

#[test]
fn remapped_containers_see_their_own_ids() {
    let entries = rootfs::full_for_userns();
    // A device can be made by the driver, but not by a container.
    let (engine, base) = rootfs::engine_with(EngineOptions::default().userns(), &entries);
    engine.run_container("box1", "base", &[]);
    let mut expected = base;
    expected.assert_same(&Tree::of_container(&engine, "box1"), "a remapped container of the imported tar");
    assert_eq!(
        engine.exec("box1", "id -u; cat /proc/self/uid_map").split_whitespace().collect::<Vec<_>>(),
        ["0", "0", "500000", "65536"]
    );
    engine.exec(
        "box1",
        "mkdir /work && echo own >/work/own && echo other >/work/other && chown 1000:1001 /work/other",
    );
    engine.exec("box1", "echo appended >>/data/nested/deeper/file && chown 5:6 /data/setgid && chmod 2711 /data/setgid && touch -d @1111111111 /data/setgid");
    engine.exec("box1", "rm -r /data/odd && mkdir /data/odd");
    expected.dir("/work", 0o755);
    expected.file("/work/own", 0o644, "own\n");
    let other = expected.file("/work/other", 0o644, "other\n");
    (other.uid, other.gid) = (1000, 1001);
    let file = expected.file("/data/nested/deeper/file", 0o600, "deep\nappended\n");
    (file.uid, file.gid) = (1000, 1000);
    let setgid = expected.file("/data/setgid", 0o2711, "#!/bin/sh\n");
    (setgid.uid, setgid.gid, setgid.mtime) = (5, 6, Some((1_111_111_111, 0)));
    expected.delete("/data/odd");
    expected.dir("/data/odd", 0o755);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "what the remapped container wrote");

    // The host sees other ids.
    let pid = engine.docker(&["inspect", "-f", "{{.State.Pid}}", "box1"]);
    let stat = engine.run(&["stat", "-c", "%u:%g", &format!("/proc/{pid}/root/work/other")]).expect_ok();
    assert_eq!(String::from_utf8_lossy(&stat.stdout).trim(), "501000:501001");
    let stat = engine.run(&["stat", "-c", "%u:%g", &format!("/proc/{pid}/root/bin/busybox")]).expect_ok();
    assert_eq!(String::from_utf8_lossy(&stat.stdout).trim(), "500000:500000");
    assert_eq!(fs::metadata(engine.home()).expect("home").mode() & 0o007, 0, "the home is open to everybody");

    engine.docker(&["commit", "box1", "committed"]);
    expected.assert_same(&Tree::of_image(&engine, "committed"), "the committed image");
    let exported = Tree::of_tar(&tarball::parse(&engine.docker_bytes(&["export", "box1"])));
    expected.clone().without_times().assert_same(&exported, "docker export");
    let diff = engine.docker(&["diff", "box1"]);
    assert!(diff.lines().any(|l| l == "A /work/own"), "{diff}");

    let context = engine.scratch("context");
    fs::write(context.join("copied"), "copied\n").expect("file");
    let dockerfile =
        "FROM committed\nRUN echo run >/work/run && chown 3:4 /work/run\nCOPY --chown=9:10 copied /work/\n";
    fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    engine.build("built", &context, &[]);
    let run = expected.file("/work/run", 0o644, "run\n");
    (run.uid, run.gid) = (3, 4);
    let copied = expected.file("/work/copied", 0o644, "copied\n");
    (copied.uid, copied.gid) = (9, 10);
    expected.assert_same(&Tree::of_image(&engine, "built"), "the built image");

    let saved = engine.docker_bytes(&["save", "built"]);
    let image = &archive::read(&saved)[0];
    image.assert_digests();
    for layer in &image.layers {
        for entry in tarball::parse(layer) {
            assert!(entry.uid < 65_536 && entry.gid < 65_536, "a layer holds host ids: {:?}", entry.path);
        }
    }
    engine.docker(&["rm", "-f", "box1"]);
    engine.remove_everything();
    engine.docker_with(&["load"], saved).expect_ok();
    expected.assert_same(&Tree::of_image(&engine, "built"), "the built image after save, rmi, load");
    engine.docker(&["create", "--name", "box2", "--network", "none", "built", "sleep", "100000"]);
    let host = context.join("copied");
    engine.docker(&["cp", host.to_str().expect("UTF-8"), "box2:/work/by-cp"]);
    engine.docker(&["start", "box2"]);
    assert_eq!(
        engine.exec("box2", "cat /work/by-cp && rm /work/by-cp && echo root-can-write >/work/run"),
        "copied"
    );
    engine.scrub();
}
