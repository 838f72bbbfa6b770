//! Recodings with agents that the test plays: what they say is believed only as far as it can be checked.

use super::*;
use crate::svm::{
    BackendLimits, Channel, Death, DiskId, DiskSource, ErrorKind, ExpandLimits, JailReport, Mode, Pool,
    PoolConfig, Purpose, ServiceVm, VmBackend, VmSpec,
};
use futures_util::{
    StreamExt,
    future::{BoxFuture, FutureExt, pending},
    stream,
};
use std::sync::{Arc, Mutex};
use svm_protocol::{DATA_PAYLOAD, FrameType, HEADER_LEN, WireError};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    task::JoinHandle,
    time::Instant,
};

/// What a channel holds, each way; less than a frame, so that nothing is hidden in it.
const CHANNEL: usize = 64 << 10;
/// The time-out where none is to happen, however busy the machine is.
const LONG: Duration = Duration::from_mins(1);
/// One that happens, or that a pause outlasts.
const SHORT: Duration = Duration::from_secs(1);

/// Plays the agent of one operation, from its first message on.
type Script = Box<dyn FnOnce(DuplexStream) -> BoxFuture<'static, ()> + Send>;

/// VMs whose agents are scripts.
struct Doubles(Arc<Mutex<Vec<Script>>>);

struct Double(Arc<Mutex<Vec<Script>>>);

impl std::fmt::Debug for Double {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Double")
    }
}

impl VmBackend for Doubles {
    fn name(&self) -> &'static str {
        "double"
    }
    fn limits(&self) -> BackendLimits {
        BackendLimits { disks: 1, vms: 8 }
    }
    fn boot(&self, _: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>> {
        let vm: Arc<dyn ServiceVm> = Arc::new(Double(self.0.clone()));
        async { Ok(vm) }.boxed()
    }
    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>> {
        async { Ok(0) }.boxed()
    }
}

impl ServiceVm for Double {
    fn describe(&self) -> String {
        "double".into()
    }
    fn attach<'a>(&'a self, _: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
        pending().boxed()
    }
    fn detach(&self, _: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
        pending().boxed()
    }
    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
        let script = self.0.lock().unwrap().pop().expect("an operation that the test expects");
        async {
            let (ours, theirs) = tokio::io::duplex(CHANNEL);
            tokio::spawn(script(theirs));
            Ok(Box::new(ours) as Channel)
        }
        .boxed()
    }
    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
        async { Ok(()) }.boxed()
    }
    fn terminate(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
    fn death(&self) -> BoxFuture<'_, Death> {
        pending().boxed()
    }
    fn console(&self) -> String {
        String::new()
    }
    fn jail(&self) -> Option<JailReport> {
        None
    }
}

/// A lease on a VM whose agent is `script`.
async fn leased<F>(script: impl FnOnce(DuplexStream) -> F + Send + 'static) -> (Pool, Lease)
where
    F: Future<Output = ()> + Send + 'static,
{
    leased_for(LONG, script).await
}

async fn leased_for<F>(
    idle_timeout: Duration,
    script: impl FnOnce(DuplexStream) -> F + Send + 'static,
) -> (Pool, Lease)
where
    F: Future<Output = ()> + Send + 'static,
{
    let script: Script = Box::new(|channel| script(channel).boxed());
    let config = PoolConfig { mode: Mode::Safe, spares: 0, idle_timeout, ..PoolConfig::default() };
    let pool = Pool::start(Arc::new(Doubles(Arc::new(Mutex::new(vec![script])))), config);
    let lease = pool.lease("a", Purpose::Work).await.unwrap();
    (pool, lease)
}

/// The next frame; `None` at the end of the channel.
async fn frame(channel: &mut (impl AsyncReadExt + Unpin)) -> Option<(FrameType, Vec<u8>)> {
    let mut head = [0; HEADER_LEN];
    channel.read_exact(&mut head).await.ok()?;
    let (kind, len) = svm_protocol::parse_header(head).unwrap();
    let mut payload = vec![0; len];
    channel.read_exact(&mut payload).await.ok()?;
    Some((kind, payload))
}

/// Whether the frame was accepted.
async fn say(channel: &mut (impl AsyncWriteExt + Unpin), kind: FrameType, payload: &[u8]) -> bool {
    let whole = [&svm_protocol::header(kind, payload.len())[..], payload].concat();
    channel.write_all(&whole).await.is_ok()
}

async fn done(channel: &mut (impl AsyncWriteExt + Unpin), bytes_in: u64, bytes_out: u64) -> bool {
    let summary = RecodeSummary { format: Compression::Gzip, bytes_in, bytes_out };
    say(channel, FrameType::Result, &serde_json::to_vec(&summary).unwrap()).await
}

/// Reads the request and all Data up to End; gives the bytes of the body.
async fn take_all(channel: &mut DuplexStream) -> u64 {
    let mut bytes = 0;
    loop {
        match frame(channel).await {
            Some((FrameType::Data, payload)) => bytes += payload.len() as u64,
            Some((FrameType::End, _)) | None => return bytes,
            Some(_) => {}
        }
    }
}

fn job(output_bytes: u64) -> ExpandJob {
    ExpandJob { format: None, limits: ExpandLimits::of_output(output_bytes) }
}

fn body(chunks: usize, len: usize) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    stream::iter((0..chunks).map(move |_| Ok(Bytes::from(vec![7; len]))))
}

/// All bytes that come, and how the stream ended.
async fn drain(mut stream: Recoded) -> (u64, Result<RecodeSummary, SvmError>) {
    let mut bytes = 0;
    while let Some(item) = stream.next().await {
        match item {
            Ok(chunk) => bytes += chunk.len() as u64,
            Err(e) => {
                assert!(!stream.complete());
                assert!(stream.next().await.is_none(), "an error is the last item");
                return (bytes, Err(e));
            }
        }
    }
    (bytes, Ok(*stream.summary().expect("an end without error is complete")))
}

fn is_protocol(result: &Result<RecodeSummary, SvmError>, about: &str) -> bool {
    matches!(result, Err(SvmError::Protocol { reason, .. }) if reason.contains(about))
}

#[tokio::test]
async fn an_agent_that_gives_more_than_the_limit_is_cut_off() {
    for rest in [0, 1, 1000] {
        // As much as is allowed, then more, without end.
        let (pool, lease) = leased(move |mut channel| async move {
            let (mut input, mut output) = tokio::io::split(&mut channel);
            let reading = async { while frame(&mut input).await.is_some() {} };
            let writing = async { while say(&mut output, FrameType::Data, &[1; 1024]).await {} };
            tokio::join!(reading, writing);
        })
        .await;
        let limit = 1_000_000 + rest;
        let stream = lease.expand(job(limit), body(4, 1000)).await.unwrap();
        let (bytes, end) = drain(stream).await;
        assert!(bytes <= limit && limit - bytes < 1024, "{bytes} bytes passed of {limit}");
        assert!(is_protocol(&end, "bytes of output"), "{end:?}");
        assert_eq!((pool.snapshot().leases, pool.snapshot().poisoned), (0, 1));
    }
}

#[tokio::test]
async fn a_compression_without_end_is_cut_off_by_what_was_sent() {
    let (_pool, lease) = leased(|mut channel| async move {
        take_all(&mut channel).await;
        while say(&mut channel, FrameType::Data, &[1; 4096]).await {}
    })
    .await;
    let stream = lease.compress(CompressJob::reproducible(Compression::Gzip), body(8, 80_000)).await.unwrap();
    let (bytes, end) = drain(stream).await;
    assert!(bytes <= 8 * 90_000 + ENCODER_OVERHEAD, "{bytes} bytes were taken");
    assert!(is_protocol(&end, "bytes of output"), "{end:?}");
}

#[tokio::test]
async fn a_summary_that_lies_is_no_end() {
    let cases = [
        (3000, 5, true),
        (2999, 5, false),
        (3001, 5, false),
        (0, 5, false),
        (3000, 4, false),
        (3000, 6, false),
        (u64::MAX, 5, false),
    ];
    for (bytes_in, bytes_out, good) in cases {
        let (pool, lease) = leased(move |mut channel| async move {
            assert_eq!(take_all(&mut channel).await, 3000);
            say(&mut channel, FrameType::Data, b"plain").await;
            done(&mut channel, bytes_in, bytes_out).await;
        })
        .await;
        let (bytes, end) = drain(lease.expand(job(1 << 20), body(3, 1000)).await.unwrap()).await;
        assert_eq!((bytes, end.is_ok()), (5, good), "{end:?}");
        assert!(good || is_protocol(&end, "a summary of"), "{end:?}");
        assert_eq!(pool.snapshot().poisoned, u64::from(!good));
    }
    // Another format than the one that was asked for.
    let (_pool, lease) = leased(|mut channel| async move {
        let bytes = take_all(&mut channel).await;
        done(&mut channel, bytes, 0).await;
    })
    .await;
    let job = ExpandJob { format: Some(Compression::Zstd), ..job(1) };
    let (_, end) = drain(lease.expand(job, body(1, 10)).await.unwrap()).await;
    assert!(is_protocol(&end, "gzip where zstd"), "{end:?}");
}

#[tokio::test]
async fn a_result_before_the_end_and_a_channel_that_ends_are_errors() {
    // The body never ends, so no result can be right.
    let (_pool, lease) = leased(|mut channel| async move {
        assert_eq!(frame(&mut channel).await.unwrap().0, FrameType::Request);
        done(&mut channel, 0, 0).await;
        pending::<()>().await;
    })
    .await;
    let endless = body(1, 1).chain(stream::pending());
    let (_, end) = drain(lease.expand(job(1 << 20), endless).await.unwrap()).await;
    assert!(is_protocol(&end, "before the end"), "{end:?}");
    // Closed without a word: whatever came before is not all.
    let (_pool, lease) = leased(|mut channel: DuplexStream| async move {
        take_all(&mut channel).await;
        say(&mut channel, FrameType::Data, b"plain").await;
    })
    .await;
    let (bytes, end) = drain(lease.expand(job(1 << 20), body(3, 1000)).await.unwrap()).await;
    assert!(bytes == 5 && is_protocol(&end, "without a result"), "{end:?}");
    // Events belong to other operations.
    let (_pool, lease) = leased(|mut channel: DuplexStream| async move {
        take_all(&mut channel).await;
        say(&mut channel, FrameType::Event, b"\"lower\"").await;
        pending::<()>().await;
    })
    .await;
    let (_, end) = drain(lease.expand(job(1 << 20), body(3, 1000)).await.unwrap()).await;
    assert!(is_protocol(&end, "unexpected event"), "{end:?}");
}

#[tokio::test]
async fn a_refusal_in_mid_stream_is_found_behind_what_was_sent() {
    let (pool, lease) = leased(|mut channel| async move {
        frame(&mut channel).await;
        frame(&mut channel).await;
        say(&mut channel, FrameType::Data, &[1; 1000]).await;
        let error = serde_json::to_vec(&WireError::new(ErrorKind::Corrupt, "at byte 7")).unwrap();
        say(&mut channel, FrameType::Error, &error).await;
    })
    .await;
    let (bytes, end) = drain(lease.expand(job(1 << 20), body(10_000, 10_000)).await.unwrap()).await;
    assert_eq!(bytes, 1000);
    assert_eq!(end.unwrap_err().refused_kind(), Some(ErrorKind::Corrupt));
    assert_eq!(pool.snapshot().poisoned, 0, "the VM is not at fault");
}

#[tokio::test]
async fn a_body_that_fails_is_its_own_error() {
    let (_pool, lease) = leased(|mut channel| async move {
        take_all(&mut channel).await;
    })
    .await;
    let cut = body(2, 10).chain(stream::iter([Err(io::Error::other("the blob was cut"))]));
    let (_, end) = drain(lease.expand(job(1 << 20), cut).await.unwrap()).await;
    assert!(matches!(&end, Err(SvmError::Body(m)) if m.contains("the blob was cut")), "{end:?}");
}

/// Output that grows a thousandfold and input that is still coming: each side's buffers are full.
#[tokio::test]
async fn full_buffers_in_both_directions_are_no_dead_lock() {
    const FRAMES: u64 = 300;
    let (_pool, lease) = leased(|mut channel| async move {
        // In turns, as the agent does it: one frame in, many out.
        let (mut taken, mut given) = (0, 0);
        loop {
            match frame(&mut channel).await {
                Some((FrameType::Data, payload)) => {
                    taken += payload.len() as u64;
                    for _ in 0..20 {
                        given += DATA_PAYLOAD as u64;
                        assert!(say(&mut channel, FrameType::Data, &vec![7; DATA_PAYLOAD]).await);
                    }
                }
                Some((FrameType::End, _)) => break,
                _ => {}
            }
        }
        assert!(done(&mut channel, taken, given).await);
    })
    .await;
    let stream = lease.expand(job(u64::MAX), body(FRAMES as usize, DATA_PAYLOAD)).await.unwrap();
    let (bytes, end) = tokio::time::timeout(LONG, drain(stream)).await.expect("dead lock");
    assert_eq!(bytes, FRAMES * 20 * DATA_PAYLOAD as u64);
    assert_eq!(end.unwrap().bytes_in, FRAMES * DATA_PAYLOAD as u64);
}

#[tokio::test]
async fn only_an_agent_that_does_nothing_is_given_up() {
    // It accepts nothing and says nothing, with a body that waits to be sent and with one that was.
    for (chunks, len) in [(1000, DATA_PAYLOAD), (1, 10)] {
        let (pool, lease) = leased_for(SHORT, |channel| async move {
            let _open = channel;
            pending::<()>().await;
        })
        .await;
        let begin = Instant::now();
        let (_, end) = drain(lease.expand(job(1 << 20), body(chunks, len)).await.unwrap()).await;
        assert!(matches!(end, Err(SvmError::Timeout { .. })), "{end:?}");
        assert!(begin.elapsed() >= SHORT && begin.elapsed() < LONG / 2, "{:?}", begin.elapsed());
        assert_eq!(pool.snapshot().poisoned, 1);
    }
}

/// The honest agent of the next test: each frame comes back as it is.
async fn echo(mut channel: DuplexStream) {
    let mut bytes = 0;
    loop {
        match frame(&mut channel).await {
            Some((FrameType::Data, payload)) => {
                bytes += payload.len() as u64;
                say(&mut channel, FrameType::Data, &payload).await;
            }
            Some((FrameType::End, _)) => break,
            None => return,
            _ => {}
        }
    }
    done(&mut channel, bytes, bytes).await;
}

#[tokio::test]
async fn a_slow_reader_and_a_slow_body_are_waited_for() {
    // The reader pauses for longer than any time-out, with everything full behind it.
    let (_pool, lease) = leased_for(SHORT, echo).await;
    let mut stream = lease.expand(job(u64::MAX), body(20, DATA_PAYLOAD)).await.unwrap();
    let mut bytes = 0;
    while let Some(chunk) = stream.next().await {
        let before = bytes;
        bytes += chunk.unwrap().len();
        if before / (10 * DATA_PAYLOAD) != bytes / (10 * DATA_PAYLOAD) {
            tokio::time::sleep(2 * SHORT).await;
        }
    }
    assert!(stream.complete() && bytes == 20 * DATA_PAYLOAD);
    // The body pauses as long.
    let (_pool, lease) = leased_for(SHORT, echo).await;
    let slow = body(3, DATA_PAYLOAD).then(|chunk| async {
        tokio::time::sleep(2 * SHORT).await;
        chunk
    });
    let (bytes, end) = drain(lease.expand(job(u64::MAX), slow).await.unwrap()).await;
    assert!(bytes == 3 * DATA_PAYLOAD as u64 && end.is_ok(), "{end:?}");
}

/// Tells its drop.
struct Dropped(Option<tokio::sync::oneshot::Sender<()>>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.take().unwrap().send(());
    }
}

#[tokio::test]
async fn dropping_the_stream_ends_channel_body_and_lease() {
    for chunks_taken in 0..4 {
        let (ended, channel_ended) = tokio::sync::oneshot::channel();
        let (pool, lease) = leased(|mut channel| async move {
            let (mut input, mut output) = tokio::io::split(&mut channel);
            let reading = async { while frame(&mut input).await.is_some() {} };
            let writing = async { while say(&mut output, FrameType::Data, &[1; 1024]).await {} };
            tokio::join!(reading, writing);
            let _ = ended.send(());
        })
        .await;
        let (drop_body, body_dropped) = tokio::sync::oneshot::channel();
        let held = Dropped(Some(drop_body));
        let endless = body(1, 1).chain(stream::pending()).inspect(move |_| {
            let _ = &held;
        });
        let mut stream = lease.expand(job(u64::MAX), endless).await.unwrap();
        for _ in 0..chunks_taken {
            assert!(stream.next().await.unwrap().is_ok());
        }
        drop(stream);
        channel_ended.await.unwrap();
        body_dropped.await.unwrap();
        while pool.snapshot().leases > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.snapshot().poisoned, 0);
    }
}

/// An unread stream holds no more than its queue, whatever the agent could give.
#[tokio::test]
async fn an_unread_stream_holds_the_agent_up() {
    let given = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = given.clone();
    let (_pool, lease) = leased(move |mut channel| async move {
        let data = vec![1; DATA_PAYLOAD];
        while say(&mut channel, FrameType::Data, &data).await {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    })
    .await;
    let stream = lease.expand(job(u64::MAX), body(1, 1).chain(stream::pending())).await.unwrap();
    let waiting: JoinHandle<()> =
        tokio::spawn(async { tokio::time::sleep(Duration::from_millis(300)).await });
    waiting.await.unwrap();
    let frames = given.load(std::sync::atomic::Ordering::Relaxed);
    assert!(frames <= QUEUED_CHUNKS + 2, "{frames} frames were taken of a stream that is not read");
    drop(stream);
}
