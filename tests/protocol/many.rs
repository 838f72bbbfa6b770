//! A store of many layers: what they cost in memory, and that a start finds all of them.
//!
//! ```text
//!   CLIENTS threads ─► chains of 100 layers, each fiftieth with content ─► kill ─► start ─► Status, Exists, Diff
//! ```
//!
//! 1,000 layers by itself, `LCOW_LAYERS` says otherwise (`scripts/torture endurance`). Times are printed for
//! `docs/reliability.md`; only memory has a limit.

use crate::support::{Plugin, Tar, noise};
use serde_json::json;
use std::{env, fs, time::Instant};

const LAYERS: usize = 1000;
const CLIENTS: usize = 4;
/// Layers of a chain.
const CHAIN: usize = 100;
/// One layer in so many gets a tar.
const APPLIED: usize = 50;
/// Resident bytes that a layer may cost, with what the allocator keeps: its chain is a list of names.
const MOST_BYTES: usize = 12 << 10;
/// Resident bytes that do not depend on the number of layers: buffers of transfers and threads.
const FIXED_BYTES: usize = 48 << 20;

fn id(n: usize) -> String {
    format!("{n:064x}")
}

fn tar(n: usize) -> Vec<u8> {
    Tar::new().file("f", &noise(n as u64, 3000)).end()
}

/// Resident bytes of a process.
fn resident(plugin: &Plugin) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", plugin.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
}

fn layers_by_status(plugin: &Plugin) -> String {
    let status = plugin.ok("GraphDriver.Status", &json!({}));
    let lines = status["Status"].as_array().unwrap();
    let line = lines.iter().find(|line| line[0] == "Layers").unwrap();
    line[1].as_str().unwrap().to_owned()
}

#[test]
fn a_start_finds_every_layer_of_a_large_store() {
    let count = env::var("LCOW_LAYERS").ok().and_then(|n| n.parse().ok()).unwrap_or(LAYERS);
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    let empty = resident(&plugin);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let plugin = &plugin;
            scope.spawn(move || {
                for n in (0..count).filter(|n| n / CHAIN % CLIENTS == client) {
                    let parent = if n % CHAIN == 0 { String::new() } else { id(n - 1) };
                    if n % APPLIED == 0 {
                        plugin.layer(&id(n), &parent, &tar(n));
                    } else {
                        plugin.ok("GraphDriver.Create", &json!({"ID": id(n), "Parent": parent}));
                    }
                }
            });
        }
    });
    let (made, full) = (begin.elapsed(), resident(&plugin));
    let begin = Instant::now();
    plugin.kill_and_restart();
    let started = begin.elapsed();
    let begin = Instant::now();
    let status = layers_by_status(&plugin);
    let asked = begin.elapsed();
    let loaded = resident(&plugin);
    println!(
        "{count} layers made in {:.1} s; start {} ms, Status {:.1} ms; resident {} KiB empty, {} KiB with all, {} KiB after a start",
        made.as_secs_f64(),
        started.as_millis(),
        asked.as_secs_f64() * 1000.0,
        empty >> 10,
        full >> 10,
        loaded >> 10
    );
    assert_eq!(status, count.to_string());
    for n in (0..count).step_by(7) {
        assert_eq!(plugin.ok("GraphDriver.Exists", &json!({"ID": id(n)}))["Exists"], true, "layer {n}");
    }
    for n in (0..count).step_by(APPLIED * 4) {
        let parent = if n % CHAIN == 0 { String::new() } else { id(n - 1) };
        assert!(plugin.diff(&id(n), &parent) == tar(n), "layer {n} has other bytes");
    }
    assert!(
        loaded <= FIXED_BYTES + count * MOST_BYTES,
        "{loaded} bytes are resident with {count} layers, {empty} without"
    );
}
