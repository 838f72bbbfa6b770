//! Where bytes can be lost × how the daemon fails there × the retry.

use super::{
    client::{Source, apply_line, headers_only, send, send_once},
    support::{Plugin, noise, send_chunks, transport::Stream},
};
use serde_json::json;
use std::{
    fs,
    io::{Cursor, Write},
    thread,
    time::{Duration, Instant},
};

/// Files of the tar; each is a block, and each tail of blocks is a tar.
const FILES: usize = 700;

/// How much of a request has left the client when it fails.
#[derive(Debug, Clone, Copy)]
enum Lost {
    /// A begin of the head, up to behind this text. The transport had read the tar's first part already.
    Head(&'static str),
    /// The head and this many bytes of the tar.
    Body(usize),
}

const LOST: [Lost; 8] = [
    Lost::Head("POST /Gr"),
    Lost::Head("?id=la"),
    Lost::Head(" HTTP/1.1\r\n"),
    Lost::Body(0),
    Lost::Body(1),
    Lost::Body(512),
    Lost::Body(63 * 1024),
    Lost::Body(usize::MAX),
];

/// How the daemon fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// kill -9 and a new one.
    Killed,
    /// A clean stop and a new one.
    Stopped,
    /// The client stands still until the daemon's time is over.
    TimedOut,
    /// The connection breaks.
    HungUp,
    /// The connection was in the queue of a daemon that never took it.
    NeverAccepted,
}

const WAYS: [Way; 5] = [Way::Killed, Way::Stopped, Way::TimedOut, Way::HungUp, Way::NeverAccepted];

fn begin(plugin: &Plugin, id: &str, tar: &[u8], lost: Lost) -> (Stream, usize) {
    let head = format!(
        "{} HTTP/1.1\r\nHost: plugin.moby.localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        apply_line(id, "")
    );
    let mut stream = plugin.connect();
    match lost {
        Lost::Head(upto) => {
            let end = head.find(upto).unwrap() + upto.len();
            stream.write_all(&head.as_bytes()[..end]).unwrap();
            // What a transport reads at once.
            (stream, 32 << 10)
        }
        Lost::Body(bytes) => {
            let bytes = bytes.min(tar.len());
            stream.write_all(head.as_bytes()).unwrap();
            send_chunks(&mut stream, &tar[..bytes], 4096).unwrap();
            (stream, bytes.next_multiple_of(512).max(512))
        }
    }
}

fn fail(plugin: &mut Plugin, way: Way, stream: Stream) {
    match way {
        Way::Killed => plugin.kill_and_restart(),
        Way::Stopped => {
            assert_eq!(plugin.terminate(), Some(0));
            plugin.start_again();
        }
        Way::TimedOut => {
            // Ends when the daemon closes, or answers.
            let mut stream = stream;
            let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
            return;
        }
        Way::HungUp => {
            drop(stream);
            thread::sleep(Duration::from_millis(100));
            return;
        }
        Way::NeverAccepted => {
            plugin.kill();
            drop(stream);
            plugin.start_again();
            return;
        }
    }
    drop(stream);
}

/// Nothing was made of the tail, and the advice helps.
fn no_tail(plugin: &Plugin, id: &str, tar: &[u8], consumed: usize, what: &str) {
    for tail in [&tar[consumed.min(tar.len() - 1024)..], &tar[tar.len() - 1024..], tar] {
        let reply =
            send(&plugin.socket(), &apply_line(id, ""), &Source::new(Cursor::new(tail.to_vec())), 3).unwrap();
        assert!(reply.status >= 400, "{what}: a retry with {} bytes was taken", tail.len());
        assert!(reply.text().contains("pull it again"), "{what}: {}", reply.text());
    }
    assert_ne!(
        plugin.ok("GraphDriver.GetMetadata", &json!({"ID": id}))["Metadata"]["state"],
        "applied",
        "{what}"
    );
    plugin.remove(id);
    plugin.layer(id, "", tar);
    assert!(plugin.diff(id, "") == tar, "{what}");
    plugin.remove(id);
}

#[test]
fn no_tail_is_taken_wherever_bytes_were_lost_and_however_the_daemon_failed() {
    let tar = headers_only(FILES);
    for way in WAYS {
        let mut plugin = Plugin::start(&["--storage-opt", "lcow.timeout=1", "--stop-timeout", "1"]);
        plugin.init();
        for (n, lost) in LOST.into_iter().enumerate() {
            let what = format!("{way:?} {lost:?}");
            // A client that goes away before it named a layer lost what it lost by itself.
            if way == Way::HungUp && n == 0 {
                continue;
            }
            // A queued connection holds less than all.
            if way == Way::NeverAccepted && matches!(lost, Lost::Body(usize::MAX)) {
                continue;
            }
            let id = format!("layer{n}");
            plugin.ok("GraphDriver.Create", &json!({"ID": id}));
            if way == Way::NeverAccepted {
                plugin.pause();
            }
            let (stream, consumed) = begin(&plugin, &id, &tar, lost);
            fail(&mut plugin, way, stream);
            no_tail(&plugin, &id, &tar, consumed, &what);
        }
        assert_eq!(fs::read_dir(plugin.home().join("staging")).unwrap().count(), 0, "{way:?}");
    }
}

/// Refusals that another look would not repeat: the state changes before the retry.
#[test]
fn no_tail_is_taken_after_a_refusal_whose_reason_went_away() {
    let tar = headers_only(FILES);
    let plugin = Plugin::start(&[]);
    plugin.init();
    let body = |id: &str, parent: &str, tar: &[u8]| {
        let source = Source::new(Cursor::new(tar.to_vec()));
        send_once(&plugin.socket(), &apply_line(id, parent), &source).unwrap()
    };
    plugin.layer("base", "", &tar);
    // No such layer, and then there is.
    let reply = body("late", "", &tar);
    assert!(reply.status >= 400 && reply.text().contains("does not exist"), "{}", reply.text());
    plugin.ok("GraphDriver.Create", &json!({"ID": "late"}));
    let reply = body("late", "", &tar[512 * 100..]);
    assert!(reply.status >= 400 && reply.text().contains("does not exist"), "{}", reply.text());
    no_tail(&plugin, "late", &tar, 512 * 100, "no such layer");
    // A wrong parent, and then the right one.
    plugin.ok("GraphDriver.Create", &json!({"ID": "top", "Parent": "base"}));
    assert!(body("top", "other", &tar).text().contains("was created on base, not on other"));
    let reply = body("top", "base", &tar[512 * 100..]);
    assert!(reply.status >= 400 && reply.text().contains("not on other"), "{}", reply.text());
    plugin.remove("top");
    // Another ApplyDiff is under way, and is over.
    plugin.ok("GraphDriver.Create", &json!({"ID": "two"}));
    let mut first = plugin.begin_apply("two", "");
    send_chunks(&mut first, &tar[..1000], 500).unwrap();
    plugin.wait_for_state("two", "applying");
    assert!(body("two", "", &tar).text().contains("in progress"));
    drop(first);
    no_tail(&plugin, "two", &tar, 512, "two at once");
    // An empty body is nothing, before and between.
    plugin.ok("GraphDriver.Create", &json!({"ID": "empty"}));
    assert!(body("empty", "", &[]).status >= 400);
    assert!(plugin.send("GraphDriver.ApplyDiff?id=empty&parent=", b"").status >= 400);
    assert_eq!(body("empty", "", &tar).status, 200);
}

#[test]
fn a_removal_ends_a_running_apply_and_the_next_layer_of_the_id_is_its_own() {
    let tar = headers_only(FILES);
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.Create", &json!({"ID": "x"}));
    let mut stream = plugin.begin_apply("x", "");
    send_chunks(&mut stream, &tar[..100_000], 4096).unwrap();
    plugin.wait_for_state("x", "applying");
    plugin.remove("x");
    plugin.layer("x", "", &tar);
    let reply = super::support::Reply::read(stream).unwrap();
    assert!(reply.status >= 400 && reply.text().contains("was removed while"), "{}", reply.text());
    assert!(plugin.diff("x", "") == tar);
}

#[test]
fn a_layer_that_an_earlier_process_created_can_still_be_written() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.Create", &json!({"ID": "a"}));
    plugin.kill_and_restart();
    assert!(plugin.apply("a", "", &headers_only(3)).text().contains("was restarted"));
    let dir = plugin.get("a");
    assert!(dir.is_dir());
    plugin.put("a");
}

/// Kills at random under a client that writes as fast as it can, and loads in peace beside it.
#[test]
fn random_kills_let_no_tail_through() {
    let rounds: usize = std::env::var("LCOW_TAIL_ROUNDS").map_or(12, |n| n.parse().unwrap());
    let tar = headers_only(8000);
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    let mut whole = 0;
    for round in 0..rounds {
        let id = format!("layer{round}");
        plugin.ok("GraphDriver.Create", &json!({"ID": id}));
        let source = Source::new(Cursor::new(tar.clone()));
        let (socket, line) = (plugin.socket(), apply_line(&id, ""));
        let load = thread::spawn(move || send(&socket, &line, &source, 100));
        thread::sleep(Duration::from_micros(noise(round as u64, 8)[7] as u64 * 100));
        if round % 3 == 2 {
            plugin.terminate();
            plugin.start_again();
        } else {
            plugin.kill_and_restart();
        }
        let said_ok = load.join().unwrap().is_ok_and(|reply| reply.status == 200);
        let meta = plugin.ok("GraphDriver.GetMetadata", &json!({"ID": id}))["Metadata"].clone();
        assert!(!said_ok || meta["state"] == "applied", "round {round}: {meta}");
        if meta["state"] == "applied" {
            assert!(plugin.diff(&id, "") == tar, "round {round}: a tail became a layer");
            whole += 1;
        }
        plugin.remove(&id);
    }
    println!("{rounds} rounds, {whole} layers, all whole");
}

/// The control: connections that were closed while they were idle, and a listener that was not there before Create,
/// cost nobody a layer.
#[test]
fn loads_over_connections_that_were_closed_idle_are_whole() {
    let rounds: usize = std::env::var("LCOW_TAIL_ROUNDS").map_or(40, |n| n.parse().unwrap());
    let tar = headers_only(50);
    let mut plugin = Plugin::start(&["--storage-opt", "lcow.timeout=1"]);
    plugin.init();
    for round in 0..rounds {
        let id = format!("layer{round}");
        // An idle connection that has served a request, and one that has not.
        let mut idle = [plugin.connect(), plugin.connect()];
        idle[0]
            .write_all(b"POST /GraphDriver.Status HTTP/1.1\r\nHost: \r\nContent-Length: 2\r\n\r\n{}")
            .unwrap();
        if round % 4 == 0 {
            assert_eq!(plugin.terminate(), Some(0));
            assert!(Stream::connect(plugin.socket()).is_err());
            plugin.start_again();
        }
        let create = json!({"ID": id}).to_string();
        let request = format!(
            "POST /GraphDriver.Create HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{create}",
            create.len()
        );
        // As a client does that finds its idle connection closed: a new one.
        let sent = idle[1]
            .write_all(request.as_bytes())
            .and_then(|()| super::support::Reply::read(idle[1].try_clone()?));
        if !sent.is_ok_and(|reply| reply.status == 200) {
            let _ = plugin.call("GraphDriver.Create", &json!({"ID": id}));
        }
        let reply =
            send(&plugin.socket(), &apply_line(&id, ""), &Source::new(Cursor::new(tar.clone())), 1).unwrap();
        assert_eq!(reply.status, 200, "round {round}: {}", reply.text());
        assert!(plugin.diff(&id, "") == tar, "round {round}");
        drop(idle);
        plugin.remove(&id);
    }
}

#[test]
fn no_tail_is_taken_when_a_worker_dies_or_the_tar_is_bad() {
    let tar = headers_only(FILES);
    let plugin = Plugin::start(&[]);
    plugin.init();
    let bad = [&tar[..512 * 50], &[0x5a; 512], &tar[512 * 51..]].concat();
    plugin.ok("GraphDriver.Create", &json!({"ID": "bad"}));
    let reply = send(&plugin.socket(), &apply_line("bad", ""), &Source::new(Cursor::new(bad)), 1).unwrap();
    assert!(reply.status >= 400);
    no_tail(&plugin, "bad", &tar, 512 * 60, "a bad tar");
    plugin.ok("GraphDriver.Create", &json!({"ID": "worker"}));
    let mut stream = plugin.begin_apply("worker", "");
    send_chunks(&mut stream, &tar[..512 * 30], 4096).unwrap();
    plugin.wait_for_state("worker", "applying");
    // Whichever has the tar now, and will have it.
    let reading = thread::spawn(move || super::support::Reply::read(stream).unwrap());
    let begin = Instant::now();
    while !reading.is_finished() {
        plugin.kill_workers();
        assert!(begin.elapsed() < Duration::from_secs(50), "no end in spite of its worker's");
        thread::sleep(Duration::from_millis(20));
    }
    let reply = reading.join().unwrap();
    assert!(reply.status >= 500, "{}", reply.text());
    no_tail(&plugin, "worker", &tar, 512 * 30, "a dead worker");
}
