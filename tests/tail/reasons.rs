//! The client reads why; so does the operator.

use super::{
    client::{Source, apply_line, headers_only, refused_at_once, send, send_once},
    support::{Plugin, Reply, Tar, noise, send_chunks},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Cursor, Read, Write},
    path::Path,
    time::{Duration, Instant},
};

/// What is said of `refused_at_once`.
const REASON: &str = "does not begin with a tar header";
/// What stands behind a refused entry.
const MORE: u64 = 5 << 30;

fn fresh(plugin: &Plugin, id: &str) {
    plugin.remove(id);
    plugin.ok("GraphDriver.Create", &json!({"ID": id}));
}

/// The `Err` of a reply.
fn err(reply: &Reply) -> String {
    reply.json()["Err"].as_str().unwrap().to_owned()
}

#[test]
fn the_reason_is_read_200_times_with_5_gib_to_come() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    for round in 0..200 {
        fresh(&plugin, "x");
        let source = Source::new(refused_at_once(MORE));
        let reply = send_once(&plugin.socket(), &apply_line("x", ""), &source)
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert_eq!(reply.status, 500, "round {round}: {}", reply.text());
        assert!(err(&reply).contains(REASON), "round {round}: {}", reply.text());
        if round % 10 == 0 {
            // So does a retry, at once, with as much to come.
            let source = Source::new(refused_at_once(MORE));
            let reply = send_once(&plugin.socket(), &apply_line("x", ""), &source).unwrap();
            let text = err(&reply);
            assert!(text.contains(REASON) && text.contains("pull it again"), "round {round}: {text}");
        }
    }
}

/// A client that writes all before it reads: nothing limits what is read and dropped.
#[test]
fn a_client_that_writes_everything_first_reads_the_reason_too() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    fresh(&plugin, "x");
    let mut stream = plugin.begin_apply("x", "");
    let mut tar = refused_at_once(1 << 30);
    let mut part = vec![0; 1 << 20];
    loop {
        let read = tar.read(&mut part).unwrap();
        if read == 0 {
            break;
        }
        send_chunks(&mut stream, &part[..read], 1 << 20).unwrap();
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    let reply = Reply::read(stream).unwrap();
    assert!(reply.status == 500 && err(&reply).contains(REASON), "{}", reply.text());
}

#[test]
fn every_refusal_is_read_whatever_is_still_to_come() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.timeout=20"]);
    plugin.init();
    let full = Plugin::start(&["--storage-opt", "lcow.minfree=1000000GiB"]);
    full.init();
    let whole = headers_only(3);
    plugin.layer("applied", "", &whole);
    plugin.layer("base", "", &whole);
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "sandbox", "Parent": "base"}));
    plugin.get("sandbox");
    let cases: &[(&Plugin, &str, u16, &str)] = &[
        (&plugin, "POST /GraphDriver.ApplyDiff?id=nobody&parent=", 500, "does not exist"),
        (&plugin, "POST /GraphDriver.ApplyDiff?id=..&parent=", 400, "is not a layer id"),
        (&plugin, "POST /GraphDriver.ApplyDiff?id=applied&parent=", 400, "never changes"),
        (&plugin, "POST /GraphDriver.ApplyDiff?id=sandbox&parent=", 400, "is in use"),
        (&plugin, "POST /GraphDriver.ApplyDiff?id=a&id=b", 400, "invalid query"),
        (&plugin, "POST /GraphDriver.NoSuch", 404, "there is no method"),
        (&plugin, "PUT /GraphDriver.ApplyDiff?id=x&parent=", 405, "send a POST"),
        (&plugin, "POST /GraphDriver.Create", 413, "more than 1048576 bytes"),
        (&plugin, "POST /GraphDriver.Status", 413, "more than 1048576 bytes"),
    ];
    for (plugin, line, status, words) in cases {
        for round in 0..20 {
            let source = Source::new(std::io::repeat(0x20).take(MORE));
            let reply = send_once(&plugin.socket(), line, &source)
                .unwrap_or_else(|e| panic!("{line}, round {round}: {e}"));
            // A closed door is a refusal of another kind than what closed it.
            let expected = reply.status == *status || (round > 0 && reply.status == 400);
            assert!(expected, "{line}: {} {}", reply.status, reply.text());
            assert!(err(&reply).contains(words), "{line}: {}", reply.text());
        }
    }
    plugin.put("sandbox");
    // Nothing is created where there is no room.
    let reply = full.call("GraphDriver.Create", &json!({"ID": "x"}));
    assert!(err(&reply).contains("lcow.minfree"), "{}", reply.text());
}

/// `layer.json` keeps the reason, and the next process says it.
#[test]
fn the_first_reason_is_kept_across_a_restart() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    fresh(&plugin, "x");
    let reply =
        send(&plugin.socket(), &apply_line("x", ""), &Source::new(refused_at_once(8 << 20)), 1).unwrap();
    assert!(err(&reply).contains(REASON));
    fresh(&plugin, "early");
    let reply = plugin.apply("early", "elsewhere", &headers_only(3));
    assert!(err(&reply).contains("not on elsewhere"));
    for restart in [false, true] {
        if restart {
            plugin.kill_and_restart();
        }
        for (id, reason) in [("x", REASON), ("early", "not on elsewhere")] {
            for body in [&headers_only(3)[..], &[]] {
                let text = err(&plugin.apply(id, "", body));
                assert!(text.contains(reason) && text.contains("pull it again"), "{restart} {id}: {text}");
            }
            let text = err(&plugin.send(&format!("GraphDriver.ApplyDiff?id={id}&parent="), b""));
            assert!(text.contains(reason), "an empty body: {text}");
            let meta: Value =
                serde_json::from_slice(&fs::read(plugin.home().join(id).join("layer.json")).unwrap())
                    .unwrap();
            assert!(meta["refused"].as_str().unwrap().contains(reason), "{meta}");
        }
    }
}

/// A warning of the driver, from a thread that waits for the disk, can be joined to the request in which it arose.
#[test]
fn what_is_logged_on_the_way_has_the_number_of_its_request() {
    let plugin = Plugin::start(&["--log-format", "json"]);
    plugin.init();
    plugin.layer("held", "", &Tar::new().file("f", b"x").end());
    let held = plugin.call("GraphDriver.Get", &json!({"ID": "held"}));
    assert_eq!(held.status, 200, "{}", held.text());
    let removed = plugin.call("GraphDriver.Remove", &json!({"ID": "held"}));
    assert_eq!(removed.status, 200, "{}", removed.text());
    let log = plugin.log();
    let line = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|line| line["fields"]["message"].as_str().is_some_and(|m| m.contains("while it is in use")))
        .unwrap_or_else(|| panic!("no warning of the layer in use: {log}"));
    let expected = json!({"name": "request", "request": number_of(&removed),
        "endpoint": "GraphDriver.Remove", "layer": "held"});
    assert_eq!(line["span"], expected, "{line}");
}

fn damage(image: &Path, content: &[u8]) {
    let mut bytes = fs::read(image).unwrap();
    let at = bytes.windows(64).position(|w| w == &content[content.len() - 64..]).unwrap();
    bytes[at + 10] ^= 1;
    fs::write(image, bytes).unwrap();
}

/// In a commit the engine streams a Diff into an ApplyDiff: when the Diff fails, the ApplyDiff says why.
#[test]
fn an_apply_that_was_fed_from_a_cut_diff_says_why_that_was_cut() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    let content = noise(1, 12 << 20);
    plugin.layer("from", "", &Tar::new().file("big", &content).end());
    damage(&plugin.home().join("from/layer.vhd"), &content);
    for lost in [0, 1, 4096, 100_000] {
        let cut = plugin.call("GraphDriver.Diff", &json!({"ID": "from", "Parent": ""}));
        assert!(
            cut.status == 200 && !cut.complete && cut.body.len() > 1 << 20,
            "{} {}",
            cut.status,
            cut.body.len()
        );
        fresh(&plugin, "to");
        let mut stream = plugin.begin_apply("to", "");
        send_chunks(&mut stream, &cut.body[..cut.body.len() - lost], 32 << 10).unwrap();
        drop(stream);
        let begin = Instant::now();
        let text = loop {
            let text = err(&plugin.apply("to", "", &[]));
            if !text.contains("in progress") {
                break text;
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "{text}");
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(text.contains("because the diff of layer from failed"), "{lost} bytes fewer: {text}");
        assert!(text.contains("damaged") || text.contains("digest"), "{lost} bytes fewer: {text}");
    }
    // A body of its own that breaks off is not that Diff's.
    fresh(&plugin, "to");
    let mut stream = plugin.begin_apply("to", "");
    send_chunks(&mut stream, &Tar::new().file("own", &noise(2, 1 << 20)).bytes, 4096).unwrap();
    drop(stream);
    std::thread::sleep(Duration::from_millis(300));
    let text = err(&plugin.apply("to", "", &[]));
    assert!(!text.contains("because the diff"), "{text}");
}

fn failures(plugin: &Plugin) -> Vec<Value> {
    plugin
        .log()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["level"] == "WARN" && line["fields"]["request"].is_string())
        .map(|line| line["fields"].clone())
        .collect()
}

fn number_of(reply: &Reply) -> String {
    let head = reply.head.to_ascii_lowercase();
    head.lines().find_map(|l| Some(l.strip_prefix("x-request-id: ")?.trim().to_owned())).unwrap()
}

#[test]
fn each_failed_request_is_one_line_with_its_number() {
    let plugin = Plugin::start(&["--log-format", "json"]);
    plugin.init();
    fresh(&plugin, "x");
    let cases = [
        ("GraphDriver.Get", "nobody", plugin.call("GraphDriver.Get", &json!({"ID": "nobody"}))),
        ("GraphDriver.Create", "x", plugin.call("GraphDriver.Create", &json!({"ID": "x"}))),
        ("GraphDriver.Diff", "nobody", plugin.call("GraphDriver.Diff", &json!({"ID": "nobody"}))),
        ("GraphDriver.Create", "-", plugin.send("GraphDriver.Create", b"{")),
        ("GraphDriver.ApplyDiff", "nobody", plugin.apply("nobody", "", &headers_only(2))),
        ("GraphDriver.ApplyDiff", "x", plugin.apply("x", "", &[0x5a; 2048])),
        ("GraphDriver.ApplyDiff", "x", plugin.apply("x", "", &headers_only(2))),
        ("unknown", "-", plugin.send("GraphDriver.NoSuch", b"{}")),
        ("unknown", "-", plugin.raw(b"DELETE /nothing HTTP/1.1\r\nHost: \r\n\r\n")),
    ];
    let lines = failures(&plugin);
    for (endpoint, layer, reply) in &cases {
        let number = number_of(reply);
        let own: Vec<_> = lines.iter().filter(|line| line["request"] == *number).collect();
        assert_eq!(own.len(), 1, "{endpoint} {layer}: {}\n{}", reply.head, plugin.log());
        let line = own[0];
        assert_eq!((&line["endpoint"], &line["layer"]), (&json!(endpoint), &json!(layer)), "{line}");
        assert_eq!(line["status"], reply.status, "{line}");
        assert!(line["seconds"].as_f64().is_some(), "{line}");
        let text = err(reply);
        assert_eq!(text, format!("{} (request {number})", line["error"].as_str().unwrap()));
    }
    // What succeeds has a number and no line.
    let fine = plugin.call("GraphDriver.Exists", &json!({"ID": "x"}));
    assert!(!failures(&plugin).iter().any(|line| line["request"] == *number_of(&fine)));
    // A Diff that is cut, and one whose client goes away.
    let content = noise(1, 12 << 20);
    plugin.layer("from", "", &Tar::new().file("big", &content).end());
    let mut gone = plugin.connect();
    let body = json!({"ID": "from"}).to_string();
    write!(gone, "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    BufReader::new(gone).read_line(&mut String::new()).unwrap();
    let hung_up = |line: &Value| line["error"].as_str().is_some_and(|e| e.contains("hung up"));
    let begin = Instant::now();
    while !failures(&plugin).iter().any(hung_up) {
        assert!(begin.elapsed() < Duration::from_secs(30), "{}", plugin.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    damage(&plugin.home().join("from/layer.vhd"), &content);
    let cut = plugin.call("GraphDriver.Diff", &json!({"ID": "from", "Parent": ""}));
    assert!(!cut.complete);
    let number = number_of(&cut);
    let lines = failures(&plugin);
    let own: Vec<_> = lines.iter().filter(|line| line["request"] == *number).collect();
    assert_eq!(own.len(), 1, "{}", plugin.log());
    assert!(own[0]["error"].as_str().unwrap().contains("the diff was cut after"), "{}", own[0]);
    assert_eq!(own[0]["damage"], true, "{}", own[0]);
    // Corruption has its own number among the metrics, and transfers have phases.
    let text = plugin.raw(b"GET /metrics HTTP/1.1\r\nHost: \r\n\r\n").text();
    for line in [
        "lcow_corruption_total 1\n",
        "lcow_requests_total{endpoint=\"GraphDriver.Diff\",outcome=\"corrupt\"} 1\n",
        "lcow_transfer_phase_seconds_count{transfer=\"apply\",phase=\"wait\"}",
        "lcow_transfer_phase_seconds_count{transfer=\"apply\",phase=\"apply\"}",
        "lcow_transfer_phase_seconds_count{transfer=\"apply\",phase=\"check\"} 1\n",
        "lcow_transfer_phase_seconds_count{transfer=\"apply\",phase=\"commit\"} 1\n",
        "lcow_transfer_phase_seconds_count{transfer=\"diff\",phase=\"export\"}",
    ] {
        assert!(text.contains(line), "{line} is missing in:\n{text}");
    }
}

#[test]
fn an_unreadable_layer_is_corruption_and_not_a_wrong_request() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("x", "", &headers_only(2));
    plugin.kill();
    fs::write(plugin.home().join("x/layer.json"), b"{").unwrap();
    plugin.start_again();
    let reply = plugin.call("GraphDriver.Get", &json!({"ID": "x"}));
    assert_eq!(reply.status, 500, "{}", reply.text());
    assert!(err(&reply).contains("damaged"), "{}", reply.text());
    let text = plugin.raw(b"GET /metrics HTTP/1.1\r\nHost: \r\n\r\n").text();
    assert!(text.contains("lcow_corruption_total 1\n"), "{text}");
    let source = Source::new(Cursor::new(headers_only(2)));
    assert_eq!(send_once(&plugin.socket(), &apply_line("x", ""), &source).unwrap().status, 500);
}
