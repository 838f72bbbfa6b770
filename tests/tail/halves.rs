//! Half requests end in time, idle connections do not, and a stop ends within its bound.

use super::{
    client::headers_only,
    support::{Plugin, Reply, send_chunks},
};
use serde_json::json;
use std::{
    io::{Read, Write},
    thread,
    time::{Duration, Instant},
};

const STATUS: &[u8] = b"POST /GraphDriver.Status HTTP/1.1\r\nHost: \r\nContent-Length: 2\r\n\r\n{}";
const HALF_HEAD: &[u8] = b"POST /GraphDriver.Status HTTP/1.1\r\nHost: x\r\n";
const HALF_BODY: &[u8] = b"POST /GraphDriver.Status HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{";
/// Against hanging only.
const LONG: Duration = Duration::from_secs(45);

#[test]
fn half_requests_end_in_time_and_idle_connections_never() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.timeout=1"]);
    plugin.init();
    let mut used = plugin.connect();
    used.write_all(STATUS).unwrap();
    assert_eq!(Reply::read(used.try_clone().unwrap()).unwrap().status, 200);
    let mut unused = plugin.connect();
    let mut half_head = plugin.connect();
    half_head.write_all(HALF_HEAD).unwrap();
    let mut half_body = plugin.connect();
    half_body.write_all(HALF_BODY).unwrap();
    // The second half comes slowly, but in time.
    let mut slow = plugin.connect();
    slow.write_all(&STATUS[..20]).unwrap();
    thread::sleep(Duration::from_millis(300));
    slow.write_all(&STATUS[20..]).unwrap();
    assert_eq!(Reply::read(slow).unwrap().status, 200);
    // The one is closed, the other is told.
    assert_eq!(half_head.read(&mut [0; 100]).unwrap(), 0);
    let reply = Reply::read(half_body).unwrap();
    assert!(reply.status == 408 && reply.text().contains("did not arrive in time"), "{}", reply.text());
    // Three times the limit later the idle ones serve.
    thread::sleep(Duration::from_secs(3));
    for idle in [&mut used, &mut unused] {
        idle.write_all(STATUS).unwrap();
        assert_eq!(Reply::read(idle.try_clone().unwrap()).unwrap().status, 200);
    }
    assert!(plugin.log().contains("request failed in its head"), "{}", plugin.log());
}

#[test]
fn half_requests_and_idle_connections_do_not_hold_up_a_stop() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.Create", &json!({"ID": "x"}));
    let mut held = Vec::new();
    for bytes in [&b""[..], STATUS, HALF_HEAD, HALF_BODY] {
        let mut stream = plugin.connect();
        stream.write_all(bytes).unwrap();
        if bytes == STATUS {
            Reply::read(stream.try_clone().unwrap()).unwrap();
        }
        held.push(stream);
    }
    // An answer whose client neither reads nor closes.
    let mut refused = plugin.begin_apply("nobody", "");
    send_chunks(&mut refused, &headers_only(10), 512).unwrap();
    thread::sleep(Duration::from_millis(100));
    let begin = Instant::now();
    assert_eq!(plugin.terminate(), Some(0));
    assert!(begin.elapsed() < LONG);
    drop((held, refused));
}

#[test]
fn a_stop_cuts_what_does_not_end_in_its_time() {
    let mut plugin = Plugin::start(&["--stop-timeout", "1"]);
    plugin.init();
    plugin.ok("GraphDriver.Create", &json!({"ID": "x"}));
    let tar = headers_only(100);
    let mut stream = plugin.begin_apply("x", "");
    send_chunks(&mut stream, &tar[..10_000], 512).unwrap();
    plugin.wait_for_state("x", "applying");
    let begin = Instant::now();
    assert_eq!(plugin.terminate(), Some(0));
    assert!(begin.elapsed() < LONG);
    assert!(plugin.log().contains("cutting off requests that did not finish in time"), "{}", plugin.log());
    plugin.start_again();
    assert!(plugin.apply("x", "", &tar[512 * 20..]).text().contains("pull it again"));
    drop(stream);
}
