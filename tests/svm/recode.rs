//! Decompression and compression in workers of the real program, against the programs that make and read such streams:
//! gzip, pigz, zstd, pzstd and Python.

use super::{alive, body, soon, worker_pid};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use lcow_graphdriver::svm::{
    CompressJob, Compression, ExpandJob, ExpandLimits, Mode, Pool, PoolConfig, Purpose, RecodeSummary,
    Recoded, SvmError,
    embedded::{EmbeddedBackend, EmbeddedConfig},
};
use std::{
    io,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};
use svm_protocol::ErrorKind;

#[expect(clippy::needless_pass_by_value, reason = "as the pool takes it")]
fn pool_with(config: PoolConfig, memory_limit: u64) -> Pool {
    let backend = EmbeddedBackend::new(EmbeddedConfig {
        program: env!("CARGO_BIN_EXE_lcow-graphdriver").into(),
        memory_limit,
        ..EmbeddedConfig::default()
    });
    Pool::start(Arc::new(backend), PoolConfig { mode: Mode::Safe, spares: 0, max_vms: 8, ..config })
}

fn pool() -> Pool {
    pool_with(PoolConfig::default(), EmbeddedConfig::default().memory_limit)
}

/// Text, zeros and noise, the same on every run.
fn sample(len: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut bytes = Vec::with_capacity(len + 4096);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        match state >> 62 {
            0 => bytes.extend([0; 700]),
            1 => bytes.extend((0..99).flat_map(|n| (state.rotate_left(n)).to_le_bytes())),
            _ => bytes.extend(format!("/usr/share/doc/package-{}/copyright\n", state >> 50).bytes()),
        }
    }
    bytes.truncate(len);
    bytes
}

fn any(output_bytes: u64) -> ExpandJob {
    ExpandJob { format: None, limits: ExpandLimits::of_output(output_bytes) }
}

async fn finish(mut recoded: Recoded) -> Result<(Vec<u8>, RecodeSummary), SvmError> {
    let mut all = Vec::new();
    while let Some(chunk) = recoded.next().await {
        all.extend_from_slice(&chunk?);
    }
    let summary = *recoded.summary().expect("a stream without error must be complete");
    assert_eq!(summary.bytes_out, all.len() as u64);
    Ok((all, summary))
}

async fn expand(pool: &Pool, stream: &[u8], chunk: usize) -> Result<(Vec<u8>, RecodeSummary), SvmError> {
    let lease = pool.lease("x", Purpose::Work).await.unwrap();
    finish(lease.expand(any(1 << 30), body(stream, chunk)).await?).await
}

/// Runs a shell command in `folder`; its standard output.
fn shell(folder: &std::path::Path, command: &str) -> Vec<u8> {
    let out = Command::new("bash").args(["-ec", command]).current_dir(folder).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_other_programs_compress_expands_to_what_they_were_given() {
    const PYTHON: &str =
        "import gzip, sys; sys.stdout.buffer.write(gzip.compress(open('plain', 'rb').read(), ";
    let (pool, folder) = (pool(), tempfile::tempdir().unwrap());
    let at = folder.path();
    let plain = sample(5_000_001);
    std::fs::write(at.join("plain"), &plain).unwrap();
    std::fs::write(at.join("first"), &plain[..1_234_567]).unwrap();
    std::fs::write(at.join("second"), &plain[1_234_567..]).unwrap();
    let (python1, python9) = (format!("python3 -c \"{PYTHON}1))\""), format!("python3 -c \"{PYTHON}9))\""));
    let pad = "head -c 10240 /dev/zero";
    let padded = format!("gzip -c plain; {pad}");
    let commands = [
        ("cat plain", Compression::Plain),
        ("gzip -1c plain", Compression::Gzip),
        ("gzip -9nc plain", Compression::Gzip),
        ("gzip -c first second", Compression::Gzip),
        ("gzip -c first; gzip -9c < second; gzip -c < /dev/null", Compression::Gzip),
        (&padded, Compression::Gzip),
        ("pigz -p 4 -c plain", Compression::Gzip),
        ("pigz -p 3 -i -b 128 -c plain", Compression::Gzip),
        (&python1, Compression::Gzip),
        (&python9, Compression::Gzip),
        ("zstd -qc -1 plain", Compression::Zstd),
        ("zstd -qc -19 plain", Compression::Zstd),
        ("zstd -qc -T4 --rsyncable plain", Compression::Zstd),
        ("zstd -qc --no-check < plain", Compression::Zstd),
        ("zstd -qc --long=27 plain", Compression::Zstd),
        ("zstd -qc --ultra -22 first; zstd -qc second", Compression::Zstd),
        ("pzstd -qc -p 4 plain", Compression::Zstd),
        (
            r"printf '\x51\x2a\x4d\x18\x03\0\0\0abc'; zstd -qc plain; printf '\x5e\x2a\x4d\x18\0\0\0\0'",
            Compression::Zstd,
        ),
    ];
    for (command, format) in commands {
        let stream = shell(at, command);
        for chunk in [999, 1 << 20] {
            let (found, summary) =
                expand(&pool, &stream, chunk).await.unwrap_or_else(|e| panic!("{command}: {e}"));
            assert!(found == plain, "{command}: {} bytes of {}", found.len(), plain.len());
            assert_eq!((summary.format, summary.bytes_in), (format, stream.len() as u64), "{command}");
        }
    }
    pool.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_compressed_is_read_by_other_programs_and_is_always_the_same() {
    let (pool, folder) = (pool(), tempfile::tempdir().unwrap());
    for len in [0, 1, 4_000_003] {
        let plain = sample(len);
        for (format, readers) in [
            (
                Compression::Gzip,
                &[
                    "gzip -dc < packed",
                    "pigz -dc < packed",
                    "python3 -c \"import gzip, sys; sys.stdout.buffer.write(gzip.open('packed').read())\"",
                ][..],
            ),
            (Compression::Zstd, &["zstd -dqc < packed", "pzstd -dqc < packed"][..]),
        ] {
            let mut first = None;
            for chunk in [777, 1 << 20] {
                let lease = pool.lease("x", Purpose::Work).await.unwrap();
                let job = CompressJob::reproducible(format);
                let packed = finish(lease.compress(job, body(&plain, chunk)).await.unwrap()).await.unwrap();
                assert_eq!((packed.1.format, packed.1.bytes_in), (format, len as u64));
                assert!(first.get_or_insert_with(|| packed.0.clone()) == &packed.0, "{format}: not the same");
            }
            std::fs::write(folder.path().join("packed"), first.unwrap()).unwrap();
            for reader in readers {
                assert!(shell(folder.path(), reader) == plain, "{reader}");
            }
        }
    }
    pool.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_stream_is_corrupt_and_the_worker_goes_on() {
    let (pool, folder) = (pool(), tempfile::tempdir().unwrap());
    let plain = sample(1_500_000);
    std::fs::write(folder.path().join("plain"), &plain).unwrap();
    for tool in ["gzip -c plain", "zstd -qc plain"] {
        let stream = shell(folder.path(), tool);
        let holder = pool.lease("x", Purpose::Work).await.unwrap();
        let pid = worker_pid(&holder.vm_description());
        let last = stream.len() - 1;
        for cut in [4, 5, 9, 17, 1000, last / 2, last - 8, last - 3, last] {
            let e = expand(&pool, &stream[..cut], 4321).await.unwrap_err();
            assert_eq!(e.refused_kind(), Some(ErrorKind::Corrupt), "{tool} cut at {cut}: {e}");
            assert!(e.to_string().ends_with(&format!("at byte {cut}")), "{tool} cut at {cut}: {e}");
            let mut changed = stream.clone();
            changed[cut.max(20)] ^= 0x10;
            match expand(&pool, &changed, 70_000).await {
                // Other bits can mean the same bytes: a zero may be copied from any other zero.
                Ok((found, _)) => assert!(found == plain, "{tool} changed at {cut}: other bytes"),
                Err(e) => assert!(e.refused_kind().is_some(), "{tool} changed at {cut}: {e}"),
            }
        }
        assert!(expand(&pool, &stream, 1 << 16).await.unwrap().0 == plain);
        assert_eq!(worker_pid(&holder.vm_description()), pid);
        assert!(alive(pid), "one worker read them all");
    }
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(Duration::from_secs(5)).await;
}

/// `field` of a process's status; bytes.
fn memory(pid: i32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// A stream of one member or frame, again and again.
fn repeated(member: Vec<u8>, times: usize) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let member = Bytes::from(member);
    stream::iter((0..times).map(move |_| Ok(member.clone())))
}

/// 16 MiB of zeros, compressed.
fn zeros(tool: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    shell(folder.path(), &format!("head -c {} /dev/zero | {tool}", 16 << 20))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bomb_costs_neither_memory_nor_time() {
    const LIMIT: u64 = 300 << 20;
    /// What a worker needs besides, and what a test may add to its own process while others run beside it.
    const WORKER: u64 = 24 << 20;
    let pool = pool();
    for tool in ["gzip -c", "zstd -qc"] {
        // 10 GiB.
        let bomb = repeated(zeros(tool), 640);
        let lease = pool.lease("bomb", Purpose::Work).await.unwrap();
        let pid = worker_pid(&lease.vm_description());
        let before = memory(pid, "VmRSS");
        let mut expanded = lease.expand(any(LIMIT), bomb).await.unwrap();
        let (mut bytes, mut most, begin) = (0, 0, Instant::now());
        let end = loop {
            match expanded.next().await.unwrap() {
                Ok(chunk) => {
                    assert!(chunk.iter().all(|b| *b == 0));
                    bytes += chunk.len() as u64;
                    if bytes % (32 << 20) < chunk.len() as u64 {
                        most = most.max(memory(pid, "VmHWM"));
                    }
                }
                Err(e) => break e,
            }
        };
        assert_eq!(end.refused_kind(), Some(ErrorKind::Limit), "{end}");
        assert!(bytes <= LIMIT && bytes > LIMIT - (1 << 20), "{bytes} bytes came");
        assert!(most - before < WORKER, "{tool}: a worker of {before} bytes grew to {most}");
        println!("{tool}: {bytes} bytes in {:?}, worker {before} to {most} bytes", begin.elapsed());
    }
    pool.shutdown(Duration::from_secs(5)).await;
}

/// Everything is full while one side pauses: nothing is lost, nothing grows, and no time-out counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_or_body_holds_up_the_other_side_and_no_memory() {
    const IDLE: Duration = Duration::from_millis(400);
    const WORKER: u64 = 24 << 20;
    let config = PoolConfig { idle_timeout: IDLE, ..PoolConfig::default() };
    let pool = pool_with(config, EmbeddedConfig::default().memory_limit);
    // 1 GiB of zeros from a body that is always ready, then a body that pauses.
    for slow_body in [false, true] {
        let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = taken.clone();
        let members = if slow_body { 8 } else { 64 };
        let body = repeated(zeros("gzip -c"), members).then(move |chunk| {
            let n = counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            async move {
                if slow_body && n.is_multiple_of(4) {
                    tokio::time::sleep(3 * IDLE).await;
                }
                chunk
            }
        });
        let lease = pool.lease("slow", Purpose::Work).await.unwrap();
        let pid = worker_pid(&lease.vm_description());
        let before = memory(pid, "VmRSS");
        let mut expanded = lease.expand(any(u64::MAX), body).await.unwrap();
        if !slow_body {
            tokio::time::sleep(3 * IDLE).await;
            let members = taken.load(std::sync::atomic::Ordering::Relaxed);
            // A member has 16 KiB; socket and buffers hold some dozens of them.
            assert!(members < 60, "{members} chunks were taken for a reader that takes nothing");
        }
        let (mut bytes, mut most) = (0, 0);
        while let Some(chunk) = expanded.next().await {
            let chunk = chunk.unwrap();
            if bytes % (100 << 20) < chunk.len() && !slow_body {
                tokio::time::sleep(IDLE * 3 / 2).await;
                most = memory(pid, "VmHWM");
            }
            bytes += chunk.len();
        }
        assert!(expanded.complete() && bytes == members * (16 << 20), "{bytes}");
        assert!(most.saturating_sub(before) < WORKER, "a worker of {before} bytes grew to {most}");
    }
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recoding_that_is_dropped_at_any_point_leaves_no_worker() {
    let pool = pool();
    let member = zeros("gzip -c");
    let mut pids = Vec::new();
    for round in 0..24u64 {
        let lease = pool.lease(&format!("r{round}"), Purpose::Work).await.unwrap();
        pids.push(worker_pid(&lease.vm_description()));
        // Endless, or one that pauses in mid-member.
        let body = repeated(member.clone(), 1000);
        let paused = stream::iter([Ok(Bytes::copy_from_slice(&member[..member.len() / 2]))]);
        let mut recoded = match round % 3 {
            0 => lease.expand(any(u64::MAX), body).await.unwrap(),
            1 => lease.expand(any(u64::MAX), paused.chain(stream::pending())).await.unwrap(),
            _ => lease.compress(CompressJob::reproducible(Compression::Zstd), body).await.unwrap(),
        };
        let until = Duration::from_micros(round * round * 137);
        let reading = async { while recoded.next().await.is_some() {} };
        let _ = tokio::time::timeout(until, reading).await;
        drop(recoded);
    }
    soon("all leases are free", || pool.snapshot().leases == 0).await;
    for pid in pids {
        soon("the worker is ended", || !alive(pid)).await;
    }
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_while_it_recodes_is_an_error_and_no_end() {
    let pool = pool();
    let lease = pool.lease("x", Purpose::Work).await.unwrap();
    let pid = worker_pid(&lease.vm_description());
    let mut expanded = lease.expand(any(u64::MAX), repeated(zeros("gzip -c"), 640)).await.unwrap();
    assert!(expanded.next().await.unwrap().is_ok());
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let mut end = None;
    while let Some(item) = expanded.next().await {
        end = item.err();
    }
    assert!(matches!(&end, Some(SvmError::Died { cause, .. }) if cause.contains("signal 9")), "{end:?}");
    assert!(!expanded.complete());
    pool.shutdown(Duration::from_secs(5)).await;
}

/// The window of a frame is memory that its maker chooses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_larger_than_the_workers_memory_is_refused_and_the_worker_lives() {
    let pool = pool_with(PoolConfig::default(), 160 << 20);
    // Windows of 2^27 and 2^31 bytes: the one is more than the worker has, the other more than is accepted.
    for (window, about) in [(17 << 3, "memory"), (21 << 3, "window")] {
        let frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0, window, 1, 0, 0][..], &[0; 9]].concat();
        let lease = pool.lease("x", Purpose::Work).await.unwrap();
        let e = finish(lease.expand(any(1 << 30), body(&frame, 5)).await.unwrap()).await.unwrap_err();
        assert!(e.refused_kind() == Some(ErrorKind::Limit) && e.to_string().contains(about), "{e}");
    }
    assert_eq!((pool.snapshot().deaths, pool.snapshot().poisoned), (0, 0));
    pool.shutdown(Duration::from_secs(5)).await;
}
