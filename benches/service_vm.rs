//! Overhead of an embedded service VM: leases, and bytes in and out of a worker that does nothing with them. Run by
//! hand: `cargo bench --bench service_vm`.
//!
//! The workers are this program itself, started again, so that they can run the tests' codec.

#[path = "../tests/svm/codec.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod codec;

use bytes::Bytes;
use codec::TestCodec;
use futures_util::{StreamExt, stream};
use lcow_graphdriver::svm::{
    ApplyJob, ApplyOptions, DiskSource, ExportJob, ExportKind, Mode, Pool, PoolConfig, Purpose,
    embedded::{EmbeddedBackend, EmbeddedConfig},
};
use std::{
    fs::File,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use svm_agent::{codec::Codec, worker_main};

/// Environment variable that makes a process a worker.
const MARK: &str = "LCOW_BENCH_WORKER";
/// Leases that are measured.
const LEASES: usize = 20;
/// Bytes in, for each size of chunks, and bytes out.
const IN: usize = 1 << 30;
const OUT: usize = 512 << 20;
const BLOCK: usize = 1 << 20;

fn backend() -> Arc<EmbeddedBackend> {
    Arc::new(EmbeddedBackend::new(EmbeddedConfig {
        program: std::env::current_exe().expect("this program's path"),
        args: Vec::new(),
        env: vec![(MARK.into(), "1".into())],
        ..EmbeddedConfig::default()
    }))
}

fn rate(bytes: usize, start: Instant) -> u128 {
    bytes as u128 / start.elapsed().as_micros().max(1)
}

async fn leases(what: &str, spares: usize) {
    let pool = Pool::start(backend(), PoolConfig { spares, ..PoolConfig::default() });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut times = Vec::new();
    for n in 0..LEASES {
        let start = Instant::now();
        let lease = pool.lease(&format!("{n}"), Purpose::Work).await.expect("a lease");
        times.push(start.elapsed());
        drop(lease);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    times.sort();
    println!("lease, {what}: median {:?}, worst {:?}", times[LEASES / 2], times[LEASES - 1]);
    pool.shutdown(Duration::ZERO).await;
}

fn writable(path: &Path) -> DiskSource {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
    DiskSource::read_write(Arc::new(file.expect("a file")), path)
}

fn readable(path: &Path) -> DiskSource {
    DiskSource::read_only(Arc::new(File::open(path).expect("a file")), path)
}

async fn bytes() {
    let folder = tempfile::tempdir().expect("a directory");
    let (image, record) = (folder.path().join("image"), folder.path().join("record"));
    let pool = Pool::start(backend(), PoolConfig { mode: Mode::Global, spares: 1, ..PoolConfig::default() });
    let block: Bytes = (0..BLOCK).map(|n| (n / 7) as u8).collect();
    for chunk in [4 << 10, 32 << 10, BLOCK] {
        let block = block.slice(..chunk);
        let all = stream::iter((0..IN / chunk).map(move |_| Ok(block.clone())));
        let options = ApplyOptions::default();
        let scratch = None;
        let job = ApplyJob {
            image: writable(Path::new("/dev/null")),
            record: writable(&record),
            scratch,
            lowers: Vec::new(),
            larger: None,
            options,
        };
        let lease = pool.lease("in", Purpose::Work).await.expect("a lease");
        let start = Instant::now();
        lease.tar_to_layer(job, all).await.expect("bytes in");
        println!("in, chunks of {chunk}: {} MB/s", rate(IN, start));
    }
    std::fs::write(&image, vec![1; OUT]).expect("an image");
    let kind = ExportKind::Exact { image: readable(&image), record: readable(&record) };
    let lease = pool.lease("out", Purpose::Export).await.expect("a lease");
    let start = Instant::now();
    let mut tar = lease.layer_to_tar(ExportJob { kind, live: None }).await.expect("a stream");
    let mut n = 0;
    while let Some(chunk) = tar.next().await {
        n += chunk.expect("bytes out").len();
    }
    assert_eq!(n, OUT, "all of it came");
    println!("out: {} MB/s", rate(n, start));
}

fn main() {
    if std::env::var_os(MARK).is_some() {
        let codec: Arc<dyn Codec> = Arc::new(TestCodec);
        std::process::exit(worker_main(&[], &codec));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        leases("cold", 0).await;
        leases("spare", 1).await;
        bytes().await;
    });
}
