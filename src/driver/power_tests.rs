//! A power cut at every moment of the requests of Docker's plugin, made by a real driver with real service VMs.
//!
//! The workers are this test program itself, started again for its test `worker_entry`.

use super::{Driver, DriverConfig, LayerRequest};
use crate::{
    config::{JailKind, Options},
    store::{
        DiskThread, InitRecord, Store, StoreError,
        tests::power::{Promise, Sequence},
    },
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Syncs that are not missed, as (request, sync, why).
const SPARE: &[(&str, &str, &str)] = &[
    ("init", "sync /", "of a new root; here the home beside it is as new, and syncs the same directory"),
    (
        "init",
        "sync home/",
        "of the new store's marker; recording the Init syncs the same directory again before the answer",
    ),
    (
        "get of a created layer",
        "sync home/late/",
        "of the new state; the note that the sandbox was handed out syncs the same directory before the answer",
    ),
];

/// Orders that are free, as (request, first, second, why).
const FREE: &[(&str, &str, &str, &str)] = &[
    ("init", "mkdir root", "sync /", "the home beside it syncs the same directory"),
    (
        "init",
        "rename home/lcow-store.json.new home/lcow-store.json",
        "sync home/",
        "recording the Init syncs the same directory again before the answer",
    ),
    (
        "get of a created layer",
        "rename home/late/layer.json.new home/late/layer.json",
        "sync home/late/",
        "the note that the sandbox was handed out syncs the same directory before the answer",
    ),
];

const MARK: &str = "LCOW_POWER_WORKER";

/// Not a test of its own: what a worker of the other tests runs.
#[test]
fn worker_entry() {
    if std::env::var_os(MARK).is_some() {
        let codec: Arc<dyn svm_agent::codec::Codec> = Arc::new(svm_agent::RealCodec::default());
        std::process::exit(svm_agent::worker_main(&[], &codec));
    }
}

/// A driver's configuration whose workers are this program.
pub(super) fn config(folder: &Path, root: PathBuf, options: Options) -> DriverConfig {
    let program = folder.join("worker");
    let script = format!(
        "#!/bin/sh\n{MARK}=1 exec '{}' --exact driver::power_tests::worker_entry --test-threads=1 --nocapture -q\n",
        std::env::current_exe().unwrap().display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let options = Options {
        pool_spares: 0,
        min_free_bytes: 0,
        sandbox_bytes: 32 << 20,
        jail: JailKind::BestEffort,
        ..options
    };
    DriverConfig { root, options, worker_program: Some(program) }
}

/// A tar of one file.
pub(super) fn tar(name: &str, bytes: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 512;
    let mut header = [0_u8; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{:011o}", bytes.len()));
    put(136, "14735672000");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend(bytes);
    tar.resize(tar.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
    tar
}

/// Bytes that do not repeat.
pub(super) fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..len).map(next).collect()
}

fn open(home: &Path) -> Result<Store, StoreError> {
    Store::open(&DiskThread::here(), home, |_| false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_at_any_moment_of_dockers_requests_loses_nothing_that_was_answered() {
    let (outer, tools) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sequence = Arc::new(Mutex::new(Sequence::begin(outer.path(), true)));
    let home = outer.path().join("home");
    sequence.lock().asked("init");
    let driver = Driver::start(config(tools.path(), outer.path().join("root"), Options::default())).unwrap();
    driver
        .init(home, InitRecord { opts: vec!["lcow.mount=none".into()], ..InitRecord::default() })
        .await
        .unwrap();
    let store = driver.current().unwrap().store.clone();
    let answered = |label| sequence.lock().answered(label, Promise::Durable, &store);
    answered("init");
    let request = |id: &str, parent: &str| LayerRequest {
        id: id.into(),
        parent: parent.into(),
        ..LayerRequest::default()
    };

    sequence.lock().asked("create");
    driver.create(request("base", "")).await.unwrap();
    answered("create");

    // The first byte is read when the layer is marked, durably.
    let body = |mark: &'static str, apply: &'static str| {
        let (sequence, store) = (sequence.clone(), store.clone());
        let first = stream::once(async move {
            let mut sequence = sequence.lock();
            sequence.answered(mark, Promise::Durable, &store);
            sequence.asked(apply);
            Ok::<_, io::Error>(Bytes::new())
        });
        first.chain(stream::iter([Ok(Bytes::from(tar("file", &noise(30_000))))])).boxed()
    };
    sequence.lock().asked("mark");
    driver.apply_diff("base", "", body("mark", "apply")).await.unwrap();
    answered("apply");

    sequence.lock().asked("sandbox without a parent");
    driver.create_read_write(request("blank", "")).await.unwrap();
    answered("sandbox without a parent");
    // Nothing was written into it, so that it takes a tar.
    sequence.lock().asked("take back");
    driver.apply_diff("blank", "", body("take back", "apply to it")).await.unwrap();
    answered("apply to it");

    sequence.lock().asked("sandbox");
    driver.create_read_write(request("box", "base")).await.unwrap();
    answered("sandbox");

    sequence.lock().asked("diff");
    let mut diff = driver.diff("box", "base").await.unwrap();
    diff.next().await.unwrap().unwrap();
    // The version of the tar is fixed before its first byte is sent.
    answered("diff");
    drop(diff);

    sequence.lock().asked("get of a created layer");
    driver.create(request("late", "base")).await.unwrap();
    driver.get("late", "").await.unwrap();
    answered("get of a created layer");
    driver.put("late").await.unwrap();

    sequence.lock().asked("remove");
    driver.remove("box").await.unwrap();
    answered("remove");

    driver.stop().await;
    drop((driver, store));
    let sequence = Arc::into_inner(sequence).expect("the body is gone").into_inner();
    let recorded = sequence.end(open, "home");
    let seen = recorded.holds("docker's requests by the driver");
    recorded.each_sync_counts(&seen, SPARE);
    recorded.each_order_counts(&seen, FREE);
}
