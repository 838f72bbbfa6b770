//! Reads and writes through the real wire against a containerd that misbehaves.

use super::*;
use crate::containerd::testing::{Containerd, Fault, State, Stored, digest};
use futures_util::{StreamExt, TryStreamExt};
use std::time::{Instant, SystemTime};
use tonic::Code;

const NAMESPACE: &str = "default";
/// Short where the double hangs, long enough for a busy machine elsewhere.
const HANG: Duration = Duration::from_millis(300);

fn patient() -> Limits {
    Limits::default()
}

fn hasty() -> Limits {
    Limits { call: HANG, idle: HANG, commit: HANG, ..Limits::default() }
}

/// Bytes that differ from each other everywhere.
fn bytes(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

async fn read_all(engine: &Engine, digest: &str, size: usize) -> Result<Vec<u8>, EngineError> {
    let blob = engine.read(NAMESPACE, digest, size as u64).await?;
    let read: Result<Vec<Bytes>, io::Error> = blob.try_collect().await;
    match read {
        Ok(pieces) => Ok(pieces.concat()),
        Err(error) => {
            let text = EngineError::in_stream(&error).expect("an error of the engine").to_string();
            Err(error.downcast::<EngineError>().unwrap_or_else(|_| panic!("{text}")))
        }
    }
}

async fn write_all(engine: &Engine, data: &[u8], labels: Labels) -> Result<Committed, EngineError> {
    let mut writer = engine.write(NAMESPACE, "lcow-diff").await?;
    for piece in data.chunks(3 << 19) {
        writer.send(Bytes::copy_from_slice(piece)).await?;
    }
    writer.commit(digest(data), labels).await
}

fn uncompressed(value: &str) -> Labels {
    [(UNCOMPRESSED.to_owned(), value.to_owned())].into()
}

#[tokio::test]
async fn a_blob_is_read_whole_in_one_call() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    // Nothing, one byte, one message, several, and more than all windows.
    for length in [0, 1, 64 << 10, (64 << 10) + 1, 40 << 20] {
        let data = bytes(length);
        let name = containerd.put(NAMESPACE, &data);
        containerd.state.lock().calls.clear();
        assert!(read_all(&engine, &name, length).await.unwrap() == data, "{length}");
        assert_eq!(containerd.state.lock().calls, ["Read"]);
    }
}

#[tokio::test]
async fn a_blob_that_is_missing_or_in_another_namespace_is_not_found() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    let name = containerd.put("other", b"data");
    let error = read_all(&engine, &name, 4).await.unwrap_err();
    assert!(matches!(error, EngineError::NotFound { call: "Content.Read", .. }), "{error}");
}

#[tokio::test]
async fn a_blob_of_another_size_or_with_gaps_is_broken() {
    let containerd = Containerd::start();
    let data = bytes(200_000);
    let name = containerd.put(NAMESPACE, &data);
    for (fault, size, part) in [
        (Fault::Short, 200_000, "ends after 199999 bytes, expected 200000"),
        (Fault::Long, 200_000, "more than the expected 200000 bytes"),
        (Fault::Gap, 200_000, "offset 65537, expected 65536"),
        // The descriptor is wrong, the blob is whole.
        (Fault::None, 199_999, "more than the expected 199999 bytes"),
        (Fault::None, 200_001, "ends after 200000 bytes, expected 200001"),
        (Fault::None, 0, "more than the expected 0 bytes"),
    ] {
        containerd.fault(fault);
        let error = read_all(&containerd.engine(patient()), &name, size).await.unwrap_err();
        assert!(matches!(error, EngineError::Broken { .. }), "{fault:?}: {error}");
        assert!(error.to_string().contains(part), "{fault:?}: {error}");
    }
}

#[tokio::test]
async fn an_error_in_mid_stream_has_its_kind_and_is_the_last_item() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    let name = containerd.put(NAMESPACE, &bytes(200_000));
    for (code, kind) in [
        (Code::NotFound, io::ErrorKind::NotFound),
        (Code::Unavailable, io::ErrorKind::ConnectionAborted),
        (Code::Cancelled, io::ErrorKind::Interrupted),
        (Code::Internal, io::ErrorKind::Other),
        (Code::Unknown, io::ErrorKind::Other),
        (Code::DataLoss, io::ErrorKind::Other),
    ] {
        containerd.fault(Fault::ReadFails(100_000, code));
        let items: Vec<_> = engine.read(NAMESPACE, &name, 200_000).await.unwrap().collect().await;
        let (last, before) = items.split_last().unwrap();
        let read: usize = before.iter().map(|item| item.as_ref().unwrap().len()).sum();
        let error = last.as_ref().unwrap_err();
        assert_eq!((read, error.kind()), (100_000, kind), "{code:?}: {error}");
        assert!(error.to_string().contains(r"in mid-stream\u{1b}"), "{error}");
    }
}

#[tokio::test]
async fn a_stream_that_stands_still_ends_by_the_idle_limit() {
    let containerd = Containerd::start();
    let name = containerd.put(NAMESPACE, &bytes(200_000));
    for fault in [Fault::ReadHangs(100_000), Fault::ReadHangs(0), Fault::ReadEmpty] {
        containerd.fault(fault);
        let limits = Limits { idle: HANG, ..patient() };
        let start = Instant::now();
        let error = read_all(&containerd.engine(limits), &name, 200_000).await.unwrap_err();
        assert!(matches!(error, EngineError::TimedOut { after: HANG, .. }), "{fault:?}: {error}");
        assert!(start.elapsed() >= HANG && start.elapsed() < Duration::from_secs(20), "{fault:?}");
    }
    // A stream that nobody reads delays no other: its share of the connection's window is limited.
    containerd.fault(Fault::None);
    let big = bytes(40 << 20);
    let name = containerd.put(NAMESPACE, &big);
    let engine = containerd.engine(patient());
    let _unread: Vec<Blob> = {
        let mut blobs = Vec::new();
        for _ in 0..4 {
            blobs.push(engine.read(NAMESPACE, &name, big.len() as u64).await.unwrap());
        }
        blobs
    };
    assert!(read_all(&engine, &name, big.len()).await.unwrap() == big);
}

#[tokio::test]
async fn a_call_that_hangs_ends_by_its_limit() {
    let containerd = Containerd::start();
    containerd.fault(Fault::CallsHang);
    let engine = containerd.engine(hasty());
    let error = read_all(&engine, "sha256:00", 0).await.unwrap_err();
    assert!(matches!(error, EngineError::TimedOut { call: "Content.Read", .. }), "{error}");
    let error = write_all(&engine, b"x", Labels::new()).await.unwrap_err();
    assert!(matches!(error, EngineError::TimedOut { call: "Leases.Create", .. }), "{error}");
}

#[tokio::test]
async fn a_restart_of_containerd_ends_calls_and_the_next_one_connects_again() {
    let mut containerd = Containerd::start();
    let engine = containerd.engine(patient());
    let data = bytes(300_000);
    let name = containerd.put(NAMESPACE, &data);
    containerd.fault(Fault::ReadHangs(100_000));
    let mut blob = engine.read(NAMESPACE, &name, 300_000).await.unwrap();
    blob.next().await.unwrap().unwrap();
    containerd.stop();
    let error = blob.try_for_each(|_| std::future::ready(Ok(()))).await.expect_err("an end");
    let found = EngineError::in_stream(&error).unwrap();
    assert!(matches!(found, EngineError::Unavailable { .. }), "{found:?}");
    // While it is down every call fails at once.
    for _ in 0..3 {
        let start = Instant::now();
        let error = read_all(&engine, &name, 300_000).await.unwrap_err();
        assert!(matches!(error, EngineError::Unavailable { .. }), "{error:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
    containerd.fault(Fault::None);
    containerd.restart();
    assert!(read_all(&engine, &name, 300_000).await.unwrap() == data);
}

#[tokio::test]
async fn a_blob_is_written_in_chunks_and_held_by_a_lease_that_expires() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    for length in [0, 1, 1 << 20, (5 << 20) + 7] {
        let data = bytes(length);
        *containerd.state.lock() = State::default();
        let before = SystemTime::now();
        let labels = uncompressed("sha256:aa");
        let committed = write_all(&engine, &data, labels.clone()).await.unwrap();
        assert_eq!(committed, Committed { size: length as u64, existed: false });
        let state = containerd.state.lock();
        let blob = &state.blobs[&(NAMESPACE.to_owned(), digest(&data))];
        assert!(*blob == Stored { data, labels }, "{length}");
        assert_eq!(state.calls, ["Create", "Write"], "nothing is aborted, the lease stays");
        assert!(state.ingests.is_empty() && state.writes.iter().all(|n| *n <= 1 << 20), "{:?}", state.writes);
        let ((namespace, id), lease) = state.leases.iter().next().unwrap();
        assert!(state.leases.len() == 1 && namespace == NAMESPACE && id.starts_with("lcow-"), "{id}");
        assert_eq!(lease.resources.len(), 1);
        // `2026-11-30T21:00:00Z`, an hour from now.
        let expire = &lease.labels["containerd.io/gc.expire"];
        let end: SystemTime = expire.parse::<prost_types::Timestamp>().unwrap().try_into().unwrap();
        let least = before + Duration::from_secs(3599);
        assert!(end >= least && end <= SystemTime::now() + Duration::from_hours(1), "{expire}");
        assert!(expire.len() == 20 && expire.ends_with('Z'), "{expire}");
    }
}

#[tokio::test]
async fn chunks_do_not_wait_for_each_reply_but_for_all_but_four() {
    let containerd = Containerd::start();
    containerd.fault(Fault::WriteHangs(0));
    let engine = containerd.engine(Limits { idle: HANG, ..patient() });
    let mut writer = engine.write(NAMESPACE, "ref").await.unwrap();
    let mut sent = 0;
    let error = loop {
        match writer.send(Bytes::from(vec![0; 1 << 20])).await {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, EngineError::TimedOut { call: "Content.Write", .. }), "{error}");
    // One that the server has, one in the channel and one on its way at least; never more than the limit.
    assert!((2..=4).contains(&sent), "{sent}");
}

#[tokio::test]
async fn what_an_older_write_left_under_the_ref_is_dropped() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    let old = (NAMESPACE.to_owned(), "lcow-diff".to_owned());
    containerd.state.lock().ingests.insert(old, vec![9; 70_000]);
    assert!(!write_all(&engine, b"new", Labels::new()).await.unwrap().existed);
}

#[tokio::test]
async fn a_blob_that_exists_is_leased_and_gets_its_missing_label() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    let key = |data: &[u8]| (NAMESPACE.to_owned(), digest(data));
    for (had, sent, has) in [
        (Labels::new(), uncompressed("sha256:aa"), uncompressed("sha256:aa")),
        (uncompressed("sha256:bb"), uncompressed("sha256:aa"), uncompressed("sha256:bb")),
        (Labels::new(), Labels::new(), Labels::new()),
        ([("k".to_owned(), "v".to_owned())].into(), Labels::new(), [("k".to_owned(), "v".to_owned())].into()),
    ] {
        containerd.put(NAMESPACE, b"data");
        containerd.state.lock().blobs.get_mut(&key(b"data")).unwrap().labels = had.clone();
        containerd.state.lock().calls.clear();
        containerd.state.lock().leases.clear();
        let committed = write_all(&engine, b"data", sent.clone()).await.unwrap();
        assert_eq!(committed, Committed { size: 4, existed: true });
        let state = containerd.state.lock();
        assert_eq!(state.blobs[&key(b"data")].labels, has);
        let updates = usize::from(had != has);
        assert_eq!(state.calls[..4], ["Create", "Write", "AddResource", "Info"]);
        assert_eq!(state.calls[4..], ["Update"][..updates], "{had:?}");
        let lease = state.leases.values().next().unwrap();
        assert!(lease.resources.contains(&format!("content {}", digest(b"data"))), "{lease:?}");
    }
}

#[tokio::test]
async fn a_blob_that_exists_and_is_collected_meanwhile_is_not_found() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    containerd.put(NAMESPACE, b"data");
    containerd.fault(Fault::CommitLoses);
    let error = write_all(&engine, b"data", Labels::new()).await.unwrap_err();
    assert!(matches!(error, EngineError::NotFound { call: "Content.Info", .. }), "{error}");
}

#[tokio::test]
async fn a_write_that_fails_is_aborted_and_its_lease_ends() {
    let containerd = Containerd::start();
    let data = bytes(9 << 20);
    for (fault, expected) in [
        (Fault::Locked, "unavailable: ref locked"),
        (Fault::WriteFails(3 << 20, Code::ResourceExhausted), "ResourceExhausted: no space left"),
        (Fault::WriteFails(3 << 20, Code::Cancelled), "cancelled: no space left"),
        (Fault::WriteFails((9 << 20) - 1, Code::Internal), "Internal: no space left"),
        (Fault::WriteHangs(2 << 20), "no answer for 0.3 s"),
        (Fault::CommitHangs, "no answer for 0.3 s"),
        (Fault::WriteCuts, "bytes were written, expected"),
        (Fault::WriteEnds(4 << 20), "the stream ended before the commit"),
    ] {
        *containerd.state.lock() = State::default();
        containerd.fault(fault);
        let slow = matches!(fault, Fault::WriteHangs(_) | Fault::CommitHangs);
        let limits = Limits {
            idle: if slow { HANG } else { patient().idle },
            commit: if slow { HANG } else { patient().commit },
            call: if slow { Duration::from_secs(2) } else { patient().call },
            ..patient()
        };
        let error = write_all(&containerd.engine(limits), &data, Labels::new()).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{fault:?}: {error}");
        // Whoever holds the ref goes on writing.
        let held = fault != Fault::Locked;
        let done = |state: &State| {
            state.calls.ends_with(&["DeleteLease"])
                && state.calls.contains(&"Abort") == held
                && state.ingests.is_empty()
                && state.leases.is_empty()
                && state.blobs.is_empty()
        };
        containerd.until(&format!("{fault:?}"), done).await;
    }
}

#[tokio::test]
async fn a_wrong_digest_and_a_dropped_writer_commit_nothing() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    let mut writer = engine.write(NAMESPACE, "ref").await.unwrap();
    writer.send(Bytes::from_static(b"data")).await.unwrap();
    let error = writer.commit(digest(b"other"), Labels::new()).await.unwrap_err();
    assert!(matches!(error, EngineError::Other { code: Code::FailedPrecondition, .. }), "{error}");
    let clean = |state: &State| {
        state.calls.ends_with(&["DeleteLease"]) && state.ingests.is_empty() && state.leases.is_empty()
    };
    containerd.until("wrong digest", clean).await;
    assert!(containerd.state.lock().blobs.is_empty());

    containerd.state.lock().calls.clear();
    let mut writer = engine.write(NAMESPACE, "ref").await.unwrap();
    writer.send(Bytes::from(bytes(3 << 20))).await.unwrap();
    containerd.until("data arrives", |state| !state.ingests.is_empty()).await;
    drop(writer);
    containerd.until("dropped", clean).await;

    // The client gives up while the write is being opened, and while it is being committed.
    for fault in [Fault::OpenHangs, Fault::CommitHangs] {
        containerd.state.lock().calls.clear();
        containerd.fault(fault);
        let engine = containerd.engine(Limits { call: Duration::from_secs(2), ..patient() });
        let given_up = timeout(HANG, write_all(&engine, b"data", Labels::new())).await;
        assert!(given_up.is_err(), "{fault:?}: {given_up:?}");
        containerd.until("given up", clean).await;
        let state = containerd.state.lock();
        assert!(state.blobs.is_empty() && state.calls.contains(&"Abort") == (fault == Fault::CommitHangs));
    }
}

#[tokio::test]
async fn names_that_are_no_header_are_refused_before_any_call() {
    let containerd = Containerd::start();
    let engine = containerd.engine(patient());
    let refused = engine.read("two\nlines", "sha256:00", 0).await.err().unwrap();
    assert!(matches!(refused, EngineError::Other { code: Code::InvalidArgument, .. }), "{refused}");
    assert!(containerd.state.lock().calls.is_empty());
}

#[cfg(unix)]
#[tokio::test]
async fn an_address_without_a_containerd_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::new(folder.path().join("none.sock"), patient());
    let error = read_all(&engine, "sha256:00", 0).await.unwrap_err();
    assert!(matches!(error, EngineError::Unavailable { .. }), "{error:?}");
    assert!(error.to_string().contains("none.sock"), "{error}");
}
