//! The plugin is killed while an engine sends it a layer, and starts anew at once: the engine sends what is left of the
//! tar again, and no part of a layer may pass for it. And what is refused is refused with its reason.

use crate::{
    archive,
    engine::{Engine, EngineOptions},
    tarball::{self, Entry},
};
use std::{
    collections::BTreeSet,
    fs, thread,
    time::{Duration, Instant},
};

/// Longest wait for the layer's folder.
const CREATED: Duration = Duration::from_secs(30);

fn rounds(usual: usize) -> usize {
    std::env::var("LCOW_TAIL_ROUNDS").map_or(usual, |n| n.parse().expect("a number of rounds"))
}

/// A layer of empty files: each block of its tar is a header, so that most of its tails are tars.
fn layer(round: usize, files: usize) -> Vec<u8> {
    let first = Entry::file(format!("a-{round}"), b"");
    let rest = (0..files).map(|n| Entry::file(format!("f{n:06}"), b""));
    tarball::build(&std::iter::once(first).chain(rest).collect::<Vec<_>>())
}

fn image(engine: &Engine, name: &str, tar: &[u8]) -> String {
    let file = engine.scratch("files").join(format!("{name}.tar"));
    fs::write(&file, archive::write(name, &[tar.to_vec()])).expect("archive");
    file.to_str().expect("UTF-8").to_owned()
}

fn layers(engine: &Engine) -> BTreeSet<String> {
    let names = fs::read_dir(engine.home()).expect("the home");
    names.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn assert_whole(engine: &Engine, name: &str, tar: &[u8]) {
    let saved = archive::read(&engine.docker_bytes(&["save", name]));
    saved[0].assert_digests();
    assert!(saved[0].layers == [tar], "{name}: a part of a layer was taken for it");
}

#[test]
fn engine_tail() {
    let engine = Engine::start(EngineOptions::lcow());
    let mut loaded = 0;
    let rounds = rounds(20);
    for round in 0..rounds {
        let (name, tar) = (format!("tail{round}"), layer(round, 20_000));
        let file = image(&engine, &name, &tar);
        let before = layers(&engine);
        let load = engine.spawn(&["docker", "load", "-i", &file]);
        let begin = Instant::now();
        while layers(&engine).is_subset(&before) && begin.elapsed() < CREATED {
            thread::sleep(Duration::from_micros(200));
        }
        // Within the 6 ms in which the first bytes are on their way.
        thread::sleep(Duration::from_micros((round as u64 * 1237) % 6000));
        if engine.is_lcow() {
            engine.kill_plugin();
            engine.start_plugin();
        }
        let run = load.wait();
        if run.ok() {
            assert_whole(&engine, &name, &tar);
            loaded += 1;
            engine.docker(&["rmi", "-f", &name]);
        } else {
            eprintln!("round {round}: {}", run.stderr.trim_end());
        }
        fs::remove_file(&file).expect("the archive");
    }
    eprintln!("{loaded} of {rounds} loads succeeded, all whole");
    engine.scrub();
    engine.remove_everything();
    engine.assert_nothing_mounted();
    engine.stop_dockerd();
}

/// The control: a plugin that went away between two commands costs nothing.
#[test]
fn loads_over_connections_that_died_idle_all_succeed() {
    let engine = Engine::start(EngineOptions::lcow());
    for round in 0..rounds(10) {
        let (name, tar) = (format!("idle{round}"), layer(round, 200));
        let file = image(&engine, &name, &tar);
        if engine.is_lcow() {
            engine.kill_plugin();
            engine.start_plugin();
        }
        engine.docker(&["load", "-i", &file]);
        assert_whole(&engine, &name, &tar);
        engine.docker(&["rmi", "-f", &name]);
        fs::remove_file(&file).expect("the archive");
    }
    engine.stop_dockerd();
}

/// What the user of `load` and `import` reads when a large layer is refused at its first entry.
#[test]
fn the_user_reads_why_a_large_layer_was_refused() {
    let engine = Engine::start(EngineOptions::lcow());
    let mut tar = tarball::build(&[Entry::file("evil", b""), Entry::file("data", vec![7; 24 << 20])]);
    // The first header's checksum is wrong.
    tar[0] ^= 1;
    let file = image(&engine, "refused", &tar);
    let reason = if engine.is_lcow() { "does not begin with a tar header" } else { "invalid tar header" };
    for round in 0..3 {
        let text = engine.try_docker(&["load", "-i", &file]).expect_failure();
        assert!(text.contains(reason), "load, round {round}: {text}");
        let text = engine.docker_with(&["import", "-", "refused"], tar.clone()).expect_failure();
        assert!(text.contains(reason), "import, round {round}: {text}");
    }
    engine.remove_everything();
    engine.stop_dockerd();
}
