//! Any bytes as what a service VM says: the daemon's pool fails the operation, or takes an answer that makes sense.
//! And any bytes as what a daemon says to the agent at the end of a link.
//!
//! ```text
//!   input:  operation (0–4, 7, 8: daemon's side; 5: agent's side; 6: a guest's link) │ bytes of the channel
//! ```
//!
//! A guest's link is a greeting and then the bytes, over and over, by a peer that reads nothing.
#![no_main]

use bound::Limit;
use ext4_image::check::WRITER;
use futures_util::{StreamExt, future::BoxFuture};
use lcow_graphdriver::svm::{
    Access, ApplyJob, BackendLimits, Channel, CheckJob, CompareJob, CompressJob, Compression, Death,
    DiskSource, ExpandJob, ExpandLimits, ExportJob, ExportKind, IdMaps, LayerDisk, LayerKind, ParentDisks,
    Pool, PoolConfig, Purpose, SecondPair, ServiceVm, SvmError, VmBackend, VmSpec, remote::RemoteAgent,
};
use libfuzzer_sys::fuzz_target;
use std::{
    fs::File,
    io,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};
use svm_agent::{RealCodec, codec::Codec, link::Platform};
use svm_protocol::{self, DiskId, JailReport, WireError, link};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Runtime,
    sync::watch,
};

mod bound;

/// The pool's and the agent's own, once; frames of a megabyte at most; and the link's queue and inboxes.
const LIMIT: Limit =
    Limit { held: (24 << 20, 64), asked: (96 << 20, 4096), disk: (0, 0), steps: (1 << 16, 64) };
/// Most bytes of output that an expansion may have here; a compression of the body has less.
const RECODED: u64 = 128 << 10;
/// Bytes that a guest's link is flooded with.
const FLOOD: usize = 4 << 20;

/// What the next channel says.
static SAID: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static NOTHING: LazyLock<Arc<File>> = LazyLock::new(|| Arc::new(File::open("/dev/null").expect("/dev/null")));
/// The pool's tasks live here: one thread, so that a run depends on nothing but its input, and a clock that leaps when
/// everything waits, so that a time-out costs none.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime")
});

#[derive(Debug)]
struct Liars;

/// A VM that ends when it is told to.
#[derive(Debug)]
struct Liar(watch::Sender<bool>);

impl VmBackend for Liars {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn limits(&self) -> BackendLimits {
        BackendLimits { disks: 256, vms: 64 }
    }

    fn boot(&self, _: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>> {
        Box::pin(async { Ok(Arc::new(Liar(watch::Sender::new(false))) as Arc<dyn ServiceVm>) })
    }

    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>> {
        Box::pin(async { Ok(0) })
    }
}

/// What makes a second pair of disks.
struct Pair;

impl SecondPair for Pair {
    fn make(&self) -> BoxFuture<'_, io::Result<(DiskSource, DiskSource)>> {
        Box::pin(async { Ok((disk(Access::ReadWrite), disk(Access::ReadWrite))) })
    }
}

impl ServiceVm for Liar {
    fn describe(&self) -> String {
        "liar".into()
    }

    fn attach<'a>(&'a self, _: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
        Box::pin(async { Ok(DiskId(1)) })
    }

    fn detach(&self, _: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
        Box::pin(async { Ok(()) })
    }

    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
        Box::pin(async {
            let said = std::mem::take(&mut *SAID.lock().expect("not poisoned"));
            let (ours, mut theirs) = tokio::io::duplex(said.len().max(1 << 20));
            theirs.write_all(&said).await.expect("room for all");
            theirs.shutdown().await.expect("open");
            // What the daemon says is taken and forgotten.
            tokio::spawn(async move { tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await });
            Ok(Box::new(ours) as Channel)
        })
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
        Box::pin(async { Ok(()) })
    }

    fn terminate(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.0.send_replace(true);
        })
    }

    fn death(&self) -> BoxFuture<'_, Death> {
        let mut ended = self.0.subscribe();
        Box::pin(async move {
            let _ = ended.wait_for(|ended| *ended).await;
            Death { cause: "told to".into(), console: String::new() }
        })
    }

    fn console(&self) -> String {
        String::new()
    }

    fn jail(&self) -> Option<JailReport> {
        None
    }
}

fn disk(access: Access) -> DiskSource {
    DiskSource { access, ..DiskSource::read_only(NOTHING.clone(), "/dev/null") }
}

/// One operation of the pool with a VM that says `said`.
async fn daemon_side(operation: u8, said: &[u8]) {
    let config = PoolConfig {
        spares: 0,
        idle_timeout: Duration::from_secs(60),
        ping_interval: Duration::ZERO,
        ..PoolConfig::default()
    };
    let pool = Pool::start(Arc::new(Liars), config);
    *SAID.lock().expect("not poisoned") = said.to_vec();
    let layer = || LayerDisk { disk: disk(Access::ReadOnly), kind: LayerKind::Applied };
    let compare = || CompareJob { target: vec![layer()], parent: ParentDisks::Own, live: None };
    let export = |kind| ExportJob { kind, live: None };
    let exact = ExportKind::Exact { image: disk(Access::ReadOnly), record: disk(Access::ReadOnly) };
    match operation {
        0 => {
            let job = CheckJob {
                image: disk(Access::ReadOnly),
                tree: true,
                writer: WRITER,
                owners: IdMaps::default(),
                require_no_writers: false,
            };
            let _ = pool.check_image(job).await;
        }
        1 => {
            let lease = pool.lease("a", Purpose::Work).await.expect("a VM");
            let job = ApplyJob {
                image: disk(Access::ReadWrite),
                record: disk(Access::ReadWrite),
                scratch: None,
                lowers: vec![],
                larger: Some(Arc::new(Pair)),
                options: svm_protocol::ApplyOptions::default(),
            };
            let body = futures_util::stream::iter([Ok::<_, io::Error>(vec![0; 1024].into())]);
            let _ = lease.tar_to_layer(job, body).await;
        }
        2 => {
            let lease = pool.lease("a", Purpose::Export).await.expect("a VM");
            if let Ok(mut tar) = lease.layer_to_tar(export(exact)).await {
                let mut whole = true;
                while let Some(part) = tar.next().await {
                    whole &= part.is_ok();
                }
                assert!(whole || !tar.complete(), "a failed tar counts as complete");
            }
        }
        3 => {
            let lease = pool.lease("a", Purpose::Export).await.expect("a VM");
            let _ = lease.changes(compare()).await;
        }
        4 => {
            let lease = pool.lease("a", Purpose::Export).await.expect("a VM");
            let _ = lease.diff_size(compare()).await;
        }
        _ => {
            let lease = pool.lease("a", Purpose::Work).await.expect("a VM");
            let body = futures_util::stream::iter([Ok::<_, io::Error>(vec![0; 1024].into())]);
            let begun = if operation == 7 {
                let limits = ExpandLimits::of_output(RECODED);
                lease.expand(ExpandJob { format: None, limits }, body).await
            } else {
                lease.compress(CompressJob::reproducible(Compression::Zstd), body).await
            };
            if let Ok(mut recoded) = begun {
                let (mut whole, mut bytes) = (true, 0);
                while let Some(part) = recoded.next().await {
                    whole &= part.is_ok();
                    bytes += part.map_or(0, |part| part.len() as u64);
                }
                assert!(whole == recoded.complete(), "a failed stream counts as complete, or the reverse");
                let told =
                    recoded.summary().is_none_or(|told| (told.bytes_in, told.bytes_out) == (1024, bytes));
                assert!(told && bytes <= RECODED, "{bytes} bytes passed");
            }
        }
    }
    pool.shutdown(Duration::from_secs(1)).await;
    pool.snapshot();
}

/// No disk is there.
struct Bare;

impl Platform for Bare {
    fn open_disk(&self, _: &str, _: bool) -> Result<File, WireError> {
        Err(WireError::new(svm_protocol::ErrorKind::Io, "no disk"))
    }

    fn open_transfer(&self, _: &str) -> Result<File, WireError> {
        Err(WireError::new(svm_protocol::ErrorKind::Io, "no disk"))
    }

    fn forget_disk(&self, _: &str) {}

    fn wake(&self, _: &[u8], _: Duration) -> Vec<String> {
        Vec::new()
    }
}

/// The agent, told `said` in a session.
fn agent_side(said: &[u8]) {
    let input = [&link::SYNC, said].concat();
    let platform: Arc<dyn Platform> = Arc::new(Bare);
    let codec: Arc<dyn Codec> = Arc::new(RealCodec::default());
    svm_agent::link::serve(input.as_slice(), io::sink(), &platform, &codec)
        .expect("garbage costs a session, not the agent");
}

/// A guest that greets well, then says `said` over and over and reads nothing, while the daemon writes and reads.
async fn guest_side(said: &[u8]) {
    if said.is_empty() {
        return;
    }
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let (mut listen, mut speak) = tokio::io::split(theirs);
    let (input, output) = tokio::io::split(ours);
    let greet = async {
        let mut head = [0; link::SYNC.len() + link::HEADER_LEN + svm_protocol::HEADER_LEN];
        listen.read_exact(&mut head).await?;
        let len = u32::from_le_bytes(head[link::SYNC.len()..][..4].try_into().expect("four bytes"));
        let mut wake = vec![0; len as usize - svm_protocol::HEADER_LEN];
        listen.read_exact(&mut wake).await?;
        let wake: svm_protocol::Wake = serde_json::from_slice(&wake)?;
        let hello = svm_protocol::Hello {
            version: svm_protocol::PROTOCOL_VERSION,
            jail: JailReport::default(),
            nonce: wake.nonce,
            transfer: false,
            witness: None,
        };
        let mut message = Vec::new();
        svm_protocol::write_json(&mut message, svm_protocol::FrameType::Hello, &hello)?;
        // Yes to the first request that there will be, before it is made: nothing is read any more.
        let reply = svm_protocol::ControlReply { seq: 1, error: None, witness: None };
        svm_protocol::write_json(&mut message, svm_protocol::FrameType::Reply, &reply)?;
        speak.write_all(&link::SYNC).await?;
        let hello_len = message.len() - {
            let mut reply_bytes = Vec::new();
            svm_protocol::write_json(&mut reply_bytes, svm_protocol::FrameType::Reply, &reply)?;
            reply_bytes.len()
        };
        for part in [&message[..hello_len], &message[hello_len..]] {
            speak.write_all(&link::header(0, link::Kind::Data, part.len())).await?;
            speak.write_all(part).await?;
        }
        Ok::<_, io::Error>(())
    };
    let (agent, greeted) = tokio::join!(RemoteAgent::connect(input, output, None), greet);
    greeted.expect("the daemon greets");
    let agent = agent.expect("a good greeting");
    let flood = tokio::spawn({
        let many = said.repeat((16 << 10) / said.len() + 1);
        async move {
            let mut sent = 0;
            while sent < FLOOD && speak.write_all(&many).await.is_ok() {
                sent += many.len();
            }
            speak
        }
    });
    if let Ok(Ok(channel)) = tokio::time::timeout(Duration::from_secs(1), agent.open_channel()).await {
        let (mut read, mut write) = tokio::io::split(channel);
        let body = async { tokio::io::copy(&mut tokio::io::repeat(7).take(16 << 20), &mut write).await };
        let back = async { tokio::io::copy(&mut read, &mut tokio::io::sink()).await };
        let _ = tokio::time::timeout(Duration::from_secs(1), async { tokio::join!(body, back) }).await;
    }
    drop(agent);
    drop((flood.await, listen));
}

fuzz_target!(|input: &[u8]| {
    LazyLock::force(&RUNTIME);
    LIMIT.hold(input.len(), || one(input));
});

fn one(input: &[u8]) {
    let Some((&operation, said)) = input.split_first() else { return };
    let mut bytes = said;
    while let Ok(Some(_)) = svm_protocol::decode_change(&mut bytes) {}
    match operation % 9 {
        5 => agent_side(said),
        6 => RUNTIME.block_on(guest_side(said)),
        operation => RUNTIME.block_on(daemon_side(operation, said)),
    }
}
