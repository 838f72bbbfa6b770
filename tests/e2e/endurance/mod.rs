//! Long runs: what the product holds is the same after many cycles of an engine, and many containers share their layers.
//!
//! ```text
//!   create ─► start: writes ─► commit ─► run the new image: reads ─► rm ─► rmi ─► sample      a control that leaks on purpose
//!   N containers at once on one image ─► two loop devices each and those of the image's layers, no more ─► rm: none
//! ```
//!
//! By itself a minute of cycles and 30 containers. `LCOW_ENDURANCE_SECONDS`, `LCOW_ENDURANCE_CYCLES` (the first that is over ends it) and
//! `LCOW_ENDURANCE_CONTAINERS` say otherwise, and `LCOW_ENDURANCE_TABLE` names a file for the samples (`scripts/torture endurance`).

mod figures;

use crate::{
    command::TICK,
    engine::{Driver, Engine, EngineOptions},
    rootfs,
};
use figures::{FEWEST, Sample, grown, table};
use serde_json::{Value, json};
use std::{
    env, fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

/// How long cycles go on by themselves.
const SECONDS: u64 = 60;
const CONTAINERS: usize = 30;
/// Containers that are started or removed at one time.
const AT_ONCE: usize = 6;
/// Samples of a long run: it has one for each so many cycles.
const MOST_SAMPLES: u64 = 400;
/// Cycles of the control, and what each forgets besides, for the disk.
const LEAKS: u64 = 15;
const MORE: u64 = 6;
/// Longest wait for what the kernel frees behind an unmount.
const FREED: Duration = Duration::from_secs(2);
/// Loop devices of a container: its own disk, and that of the engine's `-init` layer below it.
const OWN_LOOPS: usize = 2;
/// Loop devices of the image's layers, which all containers share.
const SHARED_LOOPS: usize = 2;

fn number(name: &str, otherwise: u64) -> u64 {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// The figures at a moment at which the engine does nothing.
fn sample(engine: &Engine, cycle: u64, begin: Instant) -> Sample {
    engine.unmount_idle();
    let waiting = Instant::now();
    while !engine.loops().is_empty() && waiting.elapsed() < FREED {
        thread::sleep(TICK);
    }
    let (loops, mounts) = (engine.loops().len(), engine.mounts().len());
    Sample::take(cycle, begin.elapsed().as_secs_f64(), engine.plugin_pid(), &engine.home(), loops, mounts)
}

/// A life of a container, and of an image that was made of it.
fn cycle(engine: &Engine, n: u64) {
    let script = format!(
        "echo {n} >/data/n; dd if=/dev/urandom of=/data/random bs=64k count=8 2>/dev/null; rm /etc/group; sync"
    );
    engine.docker(&["create", "--name", "cycle", "--network", "none", "base", "/bin/sh", "-c", &script]);
    engine.docker(&["start", "--attach", "cycle"]);
    engine.docker(&["commit", "cycle", "cycled"]);
    let seen = engine.shell("cycled", "cat /data/n; test ! -e /etc/group; wc -c </data/random");
    let seen: Vec<&str> = seen.split_whitespace().collect();
    assert_eq!(seen, [n.to_string().as_str(), "524288"], "cycle {n}");
    engine.docker(&["rm", "cycle"]);
    engine.docker(&["rmi", "cycled"]);
}

#[test]
fn cycles_of_an_engine_leave_every_figure_flat() {
    let (seconds, cycles) =
        (number("LCOW_ENDURANCE_SECONDS", SECONDS), number("LCOW_ENDURANCE_CYCLES", u64::MAX));
    // Fewer would say nothing, however slow the machine is.
    let least = FEWEST as u64 * 2;
    let (engine, _) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::small());
    let begin = Instant::now();
    let (mut samples, mut every, mut n) = (Vec::new(), 1, 0);
    while n < least || (begin.elapsed() < Duration::from_secs(seconds) && n < cycles) {
        cycle(&engine, n);
        n += 1;
        if n % every == 0 {
            samples.push(sample(&engine, n, begin));
        }
        if samples.len() as u64 >= MOST_SAMPLES {
            every *= 2;
            samples.retain(|sample: &Sample| sample.cycle.is_multiple_of(every));
        }
    }
    let text = table(&samples);
    let (first, last) = (samples.first().expect("samples"), samples.last().expect("samples"));
    println!(
        "{n} cycles, {:.0} s, {} samples; first {:?}, last {:?}",
        last.seconds,
        samples.len(),
        first.values,
        last.values
    );
    if let Some(path) = env::var_os("LCOW_ENDURANCE_TABLE") {
        fs::write(path, &text).expect("the table of samples");
    }
    let grown = grown(&samples);
    assert!(grown.is_empty(), "{grown:?}\n{text}");
    engine.remove_everything();
    engine.assert_nothing_mounted();
    engine.scrub();
}

/// A request to the product beside its engine.
fn ask(engine: &Engine, method: &str, request: &Value) {
    let mut stream = UnixStream::connect(engine.plugin_socket()).expect("the product's socket");
    let body = request.to_string();
    let head = format!(
        "POST /GraphDriver.{method} HTTP/1.1\r\nHost: \r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).expect("a request");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("a reply");
    assert!(reply.starts_with("HTTP/1.1 200"), "{method}: {reply}");
}

/// The control: who forgets a Put and a Remove, and keeps a connection open, is found in four of the five figures.
#[test]
fn a_leak_is_found() {
    // Of another kind of driver, the engine alone knows the socket.
    let options = EngineOptions { driver: Driver::Lcow, ..EngineOptions::default() };
    let (engine, _) = rootfs::engine_with(options, &rootfs::small());
    let begin = Instant::now();
    let (mut samples, mut open) = (Vec::new(), Vec::new());
    for n in 1..=LEAKS {
        let id = format!("leaked{n}");
        ask(&engine, "CreateReadWrite", &json!({"ID": id}));
        ask(&engine, "Get", &json!({"ID": id}));
        for more in 0..MORE {
            ask(&engine, "CreateReadWrite", &json!({"ID": format!("{id}-{more}")}));
        }
        open.push(UnixStream::connect(engine.plugin_socket()).expect("the product's socket"));
        let (loops, mounts) = (engine.loops().len(), engine.mounts().len());
        let (pid, seconds) = (engine.plugin_pid(), begin.elapsed().as_secs_f64());
        samples.push(Sample::take(n, seconds, pid, &engine.home(), loops, mounts));
    }
    let found: Vec<&str> = grown(&samples).iter().map(|(name, _)| *name).collect();
    for name in ["descriptors", "loop devices", "mounts", "disk (KiB)"] {
        assert!(found.contains(&name), "{name} is not among {found:?}\n{}", table(&samples));
    }
    drop(open);
    for n in 1..=LEAKS {
        let more = (0..MORE).map(|more| format!("leaked{n}-{more}"));
        for id in more.chain([format!("leaked{n}")]) {
            ask(&engine, "Remove", &json!({"ID": id}));
        }
    }
    engine.assert_nothing_mounted();
}

/// Runs commands of docker's, a few at one time.
fn all(engine: &Engine, commands: &[Vec<String>]) {
    for some in commands.chunks(AT_ONCE) {
        let running: Vec<_> = some
            .iter()
            .map(|words| engine.spawn(&words.iter().map(String::as_str).collect::<Vec<_>>()))
            .collect();
        for one in running {
            one.wait().expect_ok();
        }
    }
}

fn words(all: &[&str]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

#[test]
fn many_containers_at_once_share_their_layers() {
    let count = number("LCOW_ENDURANCE_CONTAINERS", CONTAINERS as u64) as usize;
    let (engine, _) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::small());
    // A second layer that all of them share.
    engine.docker(&[
        "run",
        "--name",
        "second",
        "--network",
        "none",
        "base",
        "/bin/sh",
        "-c",
        "echo shared >/data/shared",
    ]);
    engine.docker(&["commit", "second", "shared"]);
    engine.docker(&["rm", "second"]);
    let begin = Instant::now();
    let before = sample(&engine, 0, begin);
    let names: Vec<String> = (0..count).map(|n| format!("many{n}")).collect();
    let run = |name: &String| {
        let script = format!("echo {name} >/data/own; exec sleep 1000000");
        words(&[
            "docker",
            "run",
            "-d",
            "--network",
            "none",
            "--name",
            name,
            "shared",
            "/bin/sh",
            "-c",
            &script,
        ])
    };
    all(&engine, &names.iter().map(run).collect::<Vec<_>>());
    let started = begin.elapsed();
    assert_eq!(engine.docker(&["ps", "-q"]).lines().count(), count);
    let (loops, mounts) = (engine.loops().len(), engine.mounts().len());
    let full = Sample::take(1, started.as_secs_f64(), engine.plugin_pid(), &engine.home(), loops, mounts);
    println!(
        "{count} containers in {:.0} s: before {:?}, with them {:?} ({})",
        started.as_secs_f64(),
        before.values,
        full.values,
        figures::NAMES.join(", ")
    );
    assert_eq!(loops, count * OWN_LOOPS + SHARED_LOOPS, "loop devices of {count} containers");
    let step = (count / 8).max(1);
    for name in names.iter().step_by(step) {
        let seen = engine.exec(name, "cat /data/own /data/shared");
        assert_eq!(seen.split_whitespace().collect::<Vec<_>>(), [name.as_str(), "shared"]);
    }
    let remove = |name: &String| words(&["docker", "rm", "-f", name]);
    all(&engine, &names.iter().map(remove).collect::<Vec<_>>());
    let after = sample(&engine, 2, begin);
    println!("behind their removal {:?}", after.values);
    engine.remove_everything();
    engine.assert_nothing_mounted();
    engine.scrub();
}
