//! What only a named pipe has: its name, its clients that come all at once, vanish, or never read.

use super::small_tar;
use crate::support::{Plugin, Reply, noise, send_chunks, transport};
use serde_json::json;
use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lcow-graphdriver");

#[test]
fn five_hundred_connections_at_once_are_answered() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    let streams: Vec<_> = (0..500).map(|_| plugin.connect()).collect();
    let request = b"POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n";
    for mut stream in &streams {
        stream.write_all(request).unwrap();
    }
    for stream in streams {
        let reply = Reply::read(stream).unwrap();
        assert_eq!((reply.status, reply.json()), (200, json!({"Implements": ["GraphDriver"]})));
    }
}

#[test]
fn clients_that_vanish_leave_the_plugin_as_it_was() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    for n in 0..60 {
        let mut stream = plugin.connect();
        match n % 4 {
            0 => {}
            1 => stream.write_all(b"POST /GraphDriver.Status HTT").unwrap(),
            2 => stream
                .write_all(b"POST /GraphDriver.Create HTTP/1.1\r\nHost: \r\nContent-Length: 99\r\n\r\n{")
                .unwrap(),
            _ => {
                let body = r#"{"ID":"base","Parent":""}"#;
                write!(
                    stream,
                    "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                )
                .unwrap();
                let _ = stream.read(&mut [0; 100]);
            }
        }
    }
    assert!(plugin.diff("base", "") == small_tar());
    let rows = plugin.ok("GraphDriver.Status", &json!({}));
    assert!(rows["Status"].as_array().unwrap().iter().any(|r| r[0] == "Layers" && r[1] == "1"), "{rows}");
}

#[test]
fn a_client_that_never_reads_is_cut_off() {
    let plugin = Plugin::start(&["--pipe-write-timeout", "1"]);
    plugin.init();
    // More than all buffers on the way hold.
    let tar = crate::support::Tar::new().file("big", &noise(3, 24 << 20)).end();
    plugin.layer("base", "", &tar);
    let mut stream = plugin.connect();
    let body = r#"{"ID":"base","Parent":""}"#;
    write!(
        stream,
        "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    std::thread::sleep(Duration::from_secs(4));
    let begin = Instant::now();
    let (mut all, mut buffer) = (0, vec![0; 1 << 20]);
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 {
            break;
        }
        all += n;
    }
    assert!(all < tar.len() && begin.elapsed() < Duration::from_secs(20), "{all} bytes came after all");
    assert!(plugin.diff("base", "") == tar);
}

#[test]
fn a_gibibyte_goes_in_and_comes_back() {
    const PIECE: usize = 1 << 20;
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.Create", &json!({"ID": "big"}));
    let piece = noise(8, PIECE);
    // The header by hand: 1 GiB is more than the little tar writer of the tests should hold.
    let mut head = crate::support::Tar::new().file("big", b"").bytes;
    head[124..135].copy_from_slice(format!("{:011o}", 1u64 << 30).as_bytes());
    head[148..156].copy_from_slice(b"        ");
    let sum: u32 = head[..512].iter().map(|b| u32::from(*b)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let begin = Instant::now();
    let mut stream = plugin.begin_apply("big", "");
    send_chunks(&mut stream, &head, 512).unwrap();
    for _ in 0..1024 {
        send_chunks(&mut stream, &piece, 256 << 10).unwrap();
    }
    send_chunks(&mut stream, &[0; 1024], 1024).unwrap();
    stream.write_all(b"0\r\n\r\n").unwrap();
    let reply = Reply::read(stream).unwrap();
    assert_eq!((reply.status, reply.json()["Size"].as_u64()), (200, Some(1 << 30)), "{}", reply.text());
    println!("in: {} MB/s", (1u64 << 30) / 1_000_000 * 1000 / begin.elapsed().as_millis() as u64);
    let begin = Instant::now();
    let mut client = Command::new(PROGRAM)
        .args(["call", "GraphDriver.Diff", r#"{"ID":"big","Parent":""}"#, "--pipe"])
        .arg(plugin.socket())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = client.stdout.take().unwrap();
    let mut got = vec![0; 512];
    out.read_exact(&mut got).unwrap();
    assert!(got == head, "the header came back");
    let mut back = vec![0; PIECE];
    for n in 0..1024 {
        out.read_exact(&mut back).unwrap();
        assert!(back == piece, "MiB {n} differs");
    }
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [0; 1024]);
    assert!(client.wait().unwrap().success());
    println!("out: {} MB/s", (1u64 << 30) / 1_000_000 * 1000 / begin.elapsed().as_millis() as u64);
}

#[test]
fn call_speaks_to_the_pipe_as_curl_does_to_a_socket() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    let call = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("call").args(arguments).arg("--pipe").arg(plugin.socket());
        command.output().unwrap()
    };
    let status = call(&["GraphDriver.Status", "{}"]);
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    assert!(String::from_utf8_lossy(&status.stdout).contains("lcow.sandboxsize"));
    assert!(call(&["GraphDriver.Create", r#"{"ID":"a"}"#]).status.success());
    let tar = plugin.folder.join("layer.tar");
    std::fs::write(&tar, small_tar()).unwrap();
    let applied = call(&["GraphDriver.ApplyDiff?id=a&parent=", "--input", tar.to_str().unwrap()]);
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stdout));
    let diff = call(&["GraphDriver.Diff", r#"{"ID":"a","Parent":""}"#]);
    assert!(diff.status.success() && diff.stdout == small_tar(), "the tar came back over the pipe");
    let refused = call(&["GraphDriver.Get", r#"{"ID":"nobody"}"#]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stdout).contains("nobody"));
    let mut none = Command::new(PROGRAM);
    let none = none.args(["call", "GraphDriver.Status", "--pipe", r"\\.\pipe\lcow-nobody"]).output().unwrap();
    assert!(
        !none.status.success() && String::from_utf8_lossy(&none.stderr).contains("is the plugin running")
    );
}

#[test]
fn workers_are_held_by_a_job_and_die_with_the_plugin() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    let rows = plugin.ok("GraphDriver.Status", &json!({}));
    let rows = rows["Status"].as_array().unwrap();
    let jail = rows.iter().find(|r| r[0] == "Service VM Jail").unwrap()[1].as_str().unwrap();
    assert!(jail.starts_with("job, restricted token"), "{jail}");
    // Nobody else may run a worker.
    let alone = Command::new(PROGRAM).arg("worker").stdin(Stdio::null()).output().unwrap();
    assert!(!alone.status.success(), "{alone:?}");
    plugin.kill_and_restart();
    assert!(plugin.diff("base", "") == small_tar());
    assert!(transport::is_there(&plugin.socket()));
}
