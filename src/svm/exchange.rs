//! One operation on one channel, seen from the daemon.
//!
//! ```text
//!   Request ─►  [Data… End ─►]  ◄─ Data… / Event (Resume ─►)  ◄─ Result │ Error
//! ```
//!
//! A read or write that makes no progress for the idle time-out ends the operation; there is no other time limit. A
//! channel that ends without Result or Error means that the VM died or cut it, never that the stream is complete.
//!
//! Where the daemon digests ([`ServiceVm::daemon_digests`]), End carries the digest of the tar that was sent, and the
//! agent's summary must repeat it; an exact tar that comes back is compared with the digest in its record, and its last
//! frame is held back until they match. A reader that gets all bytes therefore has the original tar, whatever the guest
//! reports. Called by `lease` and `stream`.

use super::{Channel, ServiceVm, SvmError, digesting::Digesting};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use std::{
    io::{self, IoSlice},
    iter,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use svm_protocol::{
    DATA_PAYLOAD, DigestKind, ErrorKind, FrameType, HEADER_LEN, Operation, TarDigest, WireError,
};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split},
    sync::mpsc,
    time::{Instant, timeout},
};

/// How long to wait for the end of a VM whose channel broke, to report the cause.
const DEATH_GRACE: Duration = Duration::from_secs(2);

/// Bytes that are read after sending failed, in search of the agent's Error: what the agent and the kernel had
/// buffered.
const AFTER_BREAK: usize = 4 << 20;

/// Chunks of a body below this size are joined; larger ones are sent without a copy.
const COPIED_BELOW: usize = 4 << 10;

/// What the agent sent.
pub(super) enum Incoming {
    Data(Bytes),
    Event(svm_protocol::OperationEvent),
    Result(Bytes),
}

/// Progress of the writing half, for the reading half: while a body is being sent the agent sends nothing, and its
/// silence counts from the last byte that it accepted.
struct Progress {
    sending: AtomicBool,
    /// Bytes of the body so far.
    bytes: AtomicU64,
    last: Mutex<Instant>,
    /// When the agent last announced that it will accept nothing for a while.
    excused: Mutex<Option<Instant>>,
    /// Digest of the tar that was sent, where the daemon digests.
    sent: Mutex<Option<TarDigest>>,
}

impl Progress {
    fn touch(&self) {
        *self.last.lock() = Instant::now();
    }

    fn is_excused(&self, idle: Duration) -> bool {
        self.excused.lock().is_some_and(|since| since.elapsed() < idle)
    }

    fn is_idle(&self, idle: Duration) -> bool {
        !self.sending.load(Ordering::Relaxed) && self.last.lock().elapsed() >= idle
    }
}

/// The reading half with its VM.
pub(super) struct Receiver {
    progress: Arc<Progress>,
    vm: Arc<dyn ServiceVm>,
    name: String,
    idle: Duration,
    input: ReadHalf<Channel>,
    /// Set for an exact tar if the daemon digests.
    digesting: Option<Digesting>,
    /// The latest frame, held back until the digest is checked.
    held: Option<Bytes>,
    /// The result, which follows the frame that was held back.
    result: Option<Bytes>,
}

/// The writing half.
pub(super) struct Sender {
    progress: Arc<Progress>,
    idle: Duration,
    output: WriteHalf<Channel>,
    /// Set for a tar to apply if the daemon digests.
    digesting: Option<Digesting>,
}

/// The only field of a summary that is examined here.
#[derive(serde::Deserialize)]
struct Told {
    tar_digest: Option<TarDigest>,
}

/// Why sending stopped.
pub(super) enum SendError {
    /// The channel broke; the receiver finds the reason.
    Channel(io::Error),
    /// No progress.
    Timeout,
    /// The body failed.
    Body(io::Error),
}

/// Opens a channel and sends the request.
pub(super) async fn begin(
    vm: &Arc<dyn ServiceVm>,
    name: &str,
    idle: Duration,
    operation: &Operation,
) -> Result<(Sender, Receiver), SvmError> {
    let channel = timeout(idle, vm.open_channel())
        .await
        .map_err(|_| SvmError::Timeout { what: "opening a channel to the service VM", after: idle })?;
    let channel = match channel {
        Ok(channel) => channel,
        Err(e) => return Err(explain(vm, name, e).await),
    };
    let (input, output) = split(channel);
    let progress = Arc::new(Progress {
        sending: AtomicBool::new(false),
        bytes: AtomicU64::new(0),
        last: Mutex::new(Instant::now()),
        excused: Mutex::default(),
        sent: Mutex::default(),
    });
    let digest = |wanted: bool| (wanted && vm.daemon_digests()).then(|| Digesting::start(DigestKind::Blake3));
    let mut receiver = Receiver {
        progress: progress.clone(),
        vm: vm.clone(),
        name: name.to_owned(),
        idle,
        input,
        digesting: digest(matches!(operation, Operation::ExportExact { .. })),
        held: None,
        result: None,
    };
    let digesting = digest(matches!(operation, Operation::Apply { .. }));
    let mut sender = Sender { progress, idle, output, digesting };
    let request = serde_json::to_vec(operation)
        .map_err(|e| SvmError::Protocol { vm: name.to_owned(), reason: e.to_string() })?;
    if let Err(e) = sender.frame(FrameType::Request, &request).await {
        return Err(receiver.after_send_error(e).await);
    }
    Ok((sender, receiver))
}

/// The error of a failed channel: the VM's death if it died, else `otherwise`.
async fn explain(vm: &Arc<dyn ServiceVm>, name: &str, otherwise: SvmError) -> SvmError {
    match timeout(DEATH_GRACE, vm.death()).await {
        Ok(death) => SvmError::Died { vm: name.to_owned(), cause: death.cause, console: death.console },
        Err(_) => otherwise,
    }
}

/// Frames to be sent between those of a body.
pub(super) type Between = mpsc::UnboundedReceiver<(FrameType, Vec<u8>)>;

impl Sender {
    /// Sends one frame.
    pub(super) async fn frame(&mut self, kind: FrameType, payload: &[u8]) -> Result<(), SendError> {
        self.vectored(&svm_protocol::header(kind, payload.len()), &[IoSlice::new(payload)]).await
    }

    /// Sends one frame whose payload consists of pieces.
    async fn parts(&mut self, kind: FrameType, pieces: Vec<Bytes>) -> Result<(), SendError> {
        let header = svm_protocol::header(kind, pieces.iter().map(Bytes::len).sum());
        let slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        self.vectored(&header, &slices).await
    }

    async fn vectored(&mut self, header: &[u8], payload: &[IoSlice<'_>]) -> Result<(), SendError> {
        let mut all: Vec<_> = iter::once(IoSlice::new(header)).chain(payload.iter().copied()).collect();
        let mut left = &mut all[..];
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match timeout(self.idle, self.output.write_vectored(left)).await {
                // A busy agent accepts nothing, but announces that.
                Err(_) if self.progress.is_excused(self.idle) => continue,
                Err(_) => return Err(SendError::Timeout),
                Ok(Err(e)) => return Err(SendError::Channel(e)),
                Ok(Ok(0)) => return Err(SendError::Channel(io::ErrorKind::WriteZero.into())),
                Ok(Ok(n)) => IoSlice::advance_slices(&mut left, n),
            }
            self.progress.touch();
        }
        Ok(())
    }

    /// Sends a body as Data frames and End. Chunks are gathered into frames of [`DATA_PAYLOAD`], large ones without a
    /// copy if the channel supports it. The owner of the body limits how long it may idle. Frames from `between` are
    /// sent at the next frame boundary.
    pub(super) async fn body<S>(&mut self, body: S, between: &mut Between) -> Result<(), SendError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        self.progress.sending.store(true, Ordering::Relaxed);
        let sent = self.gather(body, between).await;
        self.progress.touch();
        self.progress.sending.store(false, Ordering::Relaxed);
        sent
    }

    /// Sends the frames that wait in `between`.
    async fn insert(&mut self, between: &mut Between) -> Result<(), SendError> {
        while let Ok((kind, payload)) = between.try_recv() {
            self.frame(kind, &payload).await?;
        }
        Ok(())
    }

    async fn gather<S>(&mut self, body: S, between: &mut Between) -> Result<(), SendError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let mut body = pin!(body);
        let copied_below = if self.output.is_write_vectored() { COPIED_BELOW } else { usize::MAX };
        let mut frame = Gathered::default();
        loop {
            let chunk = tokio::select! {
                biased;
                Some((kind, payload)) = between.recv() => {
                    self.frame(kind, &payload).await?;
                    continue;
                }
                chunk = body.next() => chunk,
            };
            let Some(chunk) = chunk else { break };
            let mut chunk = chunk.map_err(SendError::Body)?;
            self.progress.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            if let Some(digesting) = &self.digesting {
                digesting.update(chunk.clone()).await;
            }
            while !chunk.is_empty() {
                self.insert(between).await?;
                if copied_below == usize::MAX && frame.len == 0 && chunk.len() >= DATA_PAYLOAD {
                    self.frame(FrameType::Data, &chunk.split_to(DATA_PAYLOAD)).await?;
                    continue;
                }
                let room = DATA_PAYLOAD - frame.len;
                frame.add(chunk.split_to(chunk.len().min(room)), copied_below);
                if frame.len == DATA_PAYLOAD {
                    self.parts(FrameType::Data, frame.take()).await?;
                }
            }
        }
        if frame.len > 0 {
            self.insert(between).await?;
            self.parts(FrameType::Data, frame.take()).await?;
        }
        self.insert(between).await?;
        let Some(digesting) = self.digesting.take() else { return self.frame(FrameType::End, &[]).await };
        let digest = digesting.finish().await;
        let digest = digest
            .ok_or_else(|| SendError::Body(io::Error::other("the digest of the tar was interrupted")))?;
        *self.progress.sent.lock() = Some(digest);
        self.frame(FrameType::End, digest.to_string().as_bytes()).await
    }
}

/// The payload of the next frame: chunks as they came, small ones joined.
#[derive(Default)]
struct Gathered {
    pieces: Vec<Bytes>,
    joined: BytesMut,
    len: usize,
}

impl Gathered {
    fn add(&mut self, piece: Bytes, copied_below: usize) {
        self.len += piece.len();
        if piece.len() < copied_below {
            if self.joined.capacity() == 0 {
                self.joined.reserve(DATA_PAYLOAD);
            }
            self.joined.extend_from_slice(&piece);
            return;
        }
        self.close();
        self.pieces.push(piece);
    }

    fn close(&mut self) {
        if !self.joined.is_empty() {
            self.pieces.push(self.joined.split().freeze());
        }
    }

    fn take(&mut self) -> Vec<Bytes> {
        self.close();
        self.len = 0;
        std::mem::take(&mut self.pieces)
    }
}

impl Receiver {
    /// [`Receiver::next`] that owns its half, for use in `select!`: a dropped read would lose bytes.
    pub(super) async fn next_owned(mut self) -> (Self, Result<Incoming, SvmError>) {
        let word = self.next().await;
        (self, word)
    }

    /// The agent's next message. An Error frame becomes [`SvmError::Refused`].
    pub(super) async fn next(&mut self) -> Result<Incoming, SvmError> {
        if let Some(result) = self.result.take() {
            return Ok(Incoming::Result(result));
        }
        loop {
            match self.word().await? {
                Incoming::Data(bytes) if self.digesting.is_some() => {
                    if let Some(digesting) = &self.digesting {
                        digesting.update(bytes.clone()).await;
                    }
                    if let Some(before) = self.held.replace(bytes) {
                        return Ok(Incoming::Data(before));
                    }
                }
                Incoming::Result(json) => {
                    self.check_digest(&json).await?;
                    let Some(held) = self.held.take() else { return Ok(Incoming::Result(json)) };
                    self.result = Some(json);
                    return Ok(Incoming::Data(held));
                }
                other => return Ok(other),
            }
        }
    }

    /// Compares the digest in the agent's summary with that of the bytes that passed here.
    async fn check_digest(&mut self, json: &[u8]) -> Result<(), SvmError> {
        let sent = self.progress.sent.lock().take();
        if let Some(sent) = sent
            && self.decode::<Told>(json)?.tar_digest != Some(sent)
        {
            return Err(
                self.protocol("the digest in the summary differs from that of the tar that was sent".into())
            );
        }
        let Some(digesting) = self.digesting.take() else { return Ok(()) };
        let told = self.decode::<Told>(json)?.tar_digest;
        let told = told.ok_or_else(|| self.protocol("an exact tar without a digest".into()))?;
        // The agent checks other functions, which the first records use: only it knows the function beforehand.
        if told.kind == DigestKind::Blake3 && digesting.finish().await != Some(told) {
            let message = "layer image or exact record: digest of the tar does not match";
            return Err(SvmError::Refused(WireError::new(ErrorKind::Corrupt, message)));
        }
        Ok(())
    }

    async fn word(&mut self) -> Result<Incoming, SvmError> {
        let mut head = [0u8; HEADER_LEN];
        self.fill(&mut &mut head[..]).await?;
        let (kind, len) =
            svm_protocol::parse_header(head).map_err(|e| SvmError::from_frame(&self.name, &e))?;
        // Not zeroed first: payloads are the bulk of all bytes.
        let mut payload = BytesMut::with_capacity(len);
        self.fill(&mut (&mut payload).limit(len)).await?;
        match kind {
            // Empty frames would count as progress forever, and as the end of the stream to a reader.
            FrameType::Data if len == 0 => Err(self.protocol("an empty data frame".into())),
            FrameType::Data => Ok(Incoming::Data(payload.freeze())),
            FrameType::Event => Ok(Incoming::Event(self.decode(&payload)?)),
            FrameType::Result => Ok(Incoming::Result(payload.freeze())),
            FrameType::Error => Err(SvmError::Refused(self.decode::<WireError>(&payload)?)),
            other => Err(self.protocol(format!("unexpected {other:?} frame"))),
        }
    }

    /// Bytes of the body that were sent, or are about to be.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.progress.bytes.load(Ordering::Relaxed)
    }

    /// Counts an event of the agent as progress, and lets it accept nothing for one more time-out.
    pub(super) fn excuse(&self) {
        self.progress.touch();
        *self.progress.excused.lock() = Some(Instant::now());
    }

    /// Waits for the Result of an operation that sends nothing else.
    pub(super) async fn result<T: DeserializeOwned>(&mut self) -> Result<T, SvmError> {
        match self.next().await? {
            Incoming::Result(json) => self.decode(&json),
            Incoming::Data(_) => Err(self.protocol("unexpected data".into())),
            Incoming::Event(_) => Err(self.protocol("unexpected event".into())),
        }
    }

    /// Parses a message of the agent.
    pub(super) fn decode<T: DeserializeOwned>(&self, json: &[u8]) -> Result<T, SvmError> {
        serde_json::from_slice(json).map_err(|e| self.protocol(format!("malformed message: {e}")))
    }

    pub(super) fn protocol(&self, reason: String) -> SvmError {
        SvmError::Protocol { vm: self.name.clone(), reason }
    }

    /// The reason of a failure to send: the agent's own Error if there is one, else its death.
    pub(super) async fn after_send_error(&mut self, e: SendError) -> SvmError {
        match e {
            SendError::Body(e) => SvmError::Body(e.to_string()),
            SendError::Timeout => SvmError::Timeout { what: "sending to the service VM", after: self.idle },
            SendError::Channel(e) => {
                // Data that were in flight when the agent closed. Beyond this limit the Error is not searched for.
                let mut left = AFTER_BREAK;
                loop {
                    match self.next().await {
                        Ok(Incoming::Data(bytes)) if bytes.len() <= left => left -= bytes.len(),
                        Ok(_) => return self.protocol(format!("channel broke while sending: {e}")),
                        Err(e) => return e,
                    }
                }
            }
        }
    }

    /// [`Receiver::after_send_error`] for a receiver that is waiting for a message already.
    pub(super) async fn after_send_error_of(
        waiting: impl Future<Output = (Self, Result<Incoming, SvmError>)>,
        e: SendError,
        idle: Duration,
    ) -> SvmError {
        match e {
            SendError::Body(e) => SvmError::Body(e.to_string()),
            SendError::Timeout => SvmError::Timeout { what: "sending to the service VM", after: idle },
            e @ SendError::Channel(_) => match waiting.await {
                (_, Err(error)) => error,
                (mut receiver, Ok(_)) => receiver.after_send_error(e).await,
            },
        }
    }

    /// Reads until there is no room left in `buf`.
    async fn fill(&mut self, buf: &mut (impl BufMut + Send)) -> Result<(), SvmError> {
        while buf.has_remaining_mut() {
            let read = timeout(self.idle, self.input.read_buf(buf)).await;
            let reason = match read {
                Err(_) if !self.progress.is_idle(self.idle) => continue,
                Err(_) => return Err(SvmError::Timeout { what: "the service VM", after: self.idle }),
                Ok(Ok(0)) => "channel ended without a result".to_owned(),
                Ok(Ok(_)) => {
                    self.progress.touch();
                    continue;
                }
                Ok(Err(e)) => format!("channel broke: {e}"),
            };
            let otherwise = self.protocol(reason);
            return Err(explain(&self.vm, &self.name, otherwise).await);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svm::{Death, DiskId, DiskSource};
    use futures_util::future::{BoxFuture, FutureExt, pending};
    use svm_protocol::{ApplyOptions, ExportSummary, JailReport};
    use tokio::io::DuplexStream;

    /// A VM whose agent is the test.
    #[derive(Debug)]
    struct Machine(Mutex<Option<DuplexStream>>);

    impl ServiceVm for Machine {
        fn describe(&self) -> String {
            "test".into()
        }
        fn attach<'a>(&'a self, _: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
            pending().boxed()
        }
        fn detach(&self, _: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
            pending().boxed()
        }
        fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
            let channel = self.0.lock().take();
            async move { Ok(Box::new(channel.unwrap()) as Channel) }.boxed()
        }
        fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
            pending().boxed()
        }
        fn terminate(&self) -> BoxFuture<'_, ()> {
            pending().boxed()
        }
        fn death(&self) -> BoxFuture<'_, Death> {
            pending().boxed()
        }
        fn console(&self) -> String {
            String::new()
        }
        fn daemon_digests(&self) -> bool {
            true
        }
        fn jail(&self) -> Option<JailReport> {
            None
        }
    }

    /// An operation, and the agent's end of its channel with the request read.
    async fn start(operation: &Operation) -> (Sender, Receiver, DuplexStream) {
        start_with(operation, Duration::from_secs(20)).await
    }

    async fn start_with(operation: &Operation, idle: Duration) -> (Sender, Receiver, DuplexStream) {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let vm: Arc<dyn ServiceVm> = Arc::new(Machine(Mutex::new(Some(ours))));
        let (sender, receiver) = begin(&vm, "test", idle, operation).await.unwrap();
        assert_eq!(frame(&mut theirs).await.0, FrameType::Request);
        (sender, receiver, theirs)
    }

    async fn frame(channel: &mut DuplexStream) -> (FrameType, Vec<u8>) {
        let mut head = [0; HEADER_LEN];
        channel.read_exact(&mut head).await.unwrap();
        let (kind, len) = svm_protocol::parse_header(head).unwrap();
        let mut payload = vec![0; len];
        channel.read_exact(&mut payload).await.unwrap();
        (kind, payload)
    }

    async fn say(channel: &mut DuplexStream, kind: FrameType, payload: &[u8]) {
        channel.write_all(&svm_protocol::header(kind, payload.len())).await.unwrap();
        channel.write_all(payload).await.unwrap();
    }

    fn summary(digest: Option<TarDigest>) -> Vec<u8> {
        serde_json::to_vec(&ExportSummary { tar_bytes: 8, tar_digest: digest, ..ExportSummary::default() })
            .unwrap()
    }

    #[tokio::test]
    async fn an_applied_tar_ends_with_its_digest_and_a_summary_with_another_is_refused() {
        let tar = b"all of the tar";
        let digest = TarDigest::of(DigestKind::Blake3, tar);
        for (answer, good) in [(Some(digest), true), (Some(TarDigest::default()), false), (None, false)] {
            let operation = Operation::Apply {
                image: DiskId(0),
                record: DiskId(1),
                scratch: None,
                lowers: vec![],
                options: ApplyOptions::default(),
            };
            let (mut sender, mut receiver, mut agent) = start(&operation).await;
            let body = futures_util::stream::iter(tar.chunks(5).map(|c| Ok(Bytes::from_static(c))));
            let (_between, mut between) = mpsc::unbounded_channel();
            assert!(sender.body(body, &mut between).await.is_ok());
            assert_eq!(frame(&mut agent).await, (FrameType::Data, tar.to_vec()));
            assert_eq!(frame(&mut agent).await, (FrameType::End, digest.to_string().into_bytes()));
            say(&mut agent, FrameType::Result, &summary(answer)).await;
            let result = receiver.result::<ExportSummary>().await;
            assert_eq!(result.is_ok(), good, "{result:?}");
        }
    }

    fn replaying(bytes: u64) -> Vec<u8> {
        serde_json::to_vec(&svm_protocol::OperationEvent::Replaying { bytes }).unwrap()
    }

    #[tokio::test]
    async fn an_agent_that_says_it_replays_is_waited_for_and_a_silent_one_is_not() {
        const IDLE: Duration = Duration::from_millis(500);
        const WORDS: usize = 8;
        for talks in [true, false] {
            let operation = Operation::Apply {
                image: DiskId(0),
                record: DiskId(1),
                scratch: None,
                lowers: vec![],
                options: ApplyOptions::default(),
            };
            let (mut sender, mut receiver, mut agent) = start_with(&operation, IDLE).await;
            let (insert, mut between) = mpsc::unbounded_channel();
            // More than the channel holds.
            let body = futures_util::stream::iter((0..64).map(|_| Ok(Bytes::from(vec![7; 1 << 16]))));
            let reading = tokio::spawn(async move {
                for n in 0..WORDS as u64 {
                    tokio::time::sleep(IDLE / 2).await;
                    if talks {
                        say(&mut agent, FrameType::Event, &replaying(n)).await;
                    }
                }
                let mut resumes = 0;
                loop {
                    let mut head = [0; HEADER_LEN];
                    if agent.read_exact(&mut head).await.is_err() {
                        return None;
                    }
                    let (kind, len) = svm_protocol::parse_header(head).unwrap();
                    let mut payload = vec![0; len];
                    if agent.read_exact(&mut payload).await.is_err() {
                        return None;
                    }
                    match kind {
                        FrameType::End => return Some(resumes),
                        FrameType::Resume => resumes += 1,
                        _ => {}
                    }
                }
            });
            let hearing = tokio::spawn(async move {
                let mut heard = 0;
                loop {
                    let (back, word) = receiver.next_owned().await;
                    receiver = back;
                    match word {
                        Ok(Incoming::Event(svm_protocol::OperationEvent::Replaying { .. })) => {
                            receiver.excuse();
                            heard += 1;
                        }
                        _ => return heard,
                    }
                    if heard == WORDS / 2 {
                        insert.send((FrameType::Resume, b"null".to_vec())).unwrap();
                    }
                }
            });
            let sent = sender.body(body, &mut between).await;
            if talks {
                assert!(sent.is_ok(), "an agent that talks was given up");
                assert_eq!(reading.await.unwrap(), Some(1), "the answer goes between the frames of the body");
                assert_eq!(hearing.await.unwrap(), WORDS);
            } else {
                assert!(matches!(sent, Err(SendError::Timeout)), "a silent agent was waited for");
            }
        }
    }

    #[tokio::test]
    async fn a_frame_without_a_byte_and_data_without_end_are_refused() {
        let operation = Operation::ExportExact { image: DiskId(0), record: DiskId(1) };
        let (_sender, mut receiver, mut agent) = start(&operation).await;
        say(&mut agent, FrameType::Data, b"").await;
        assert!(matches!(receiver.next().await, Err(SvmError::Protocol { .. })));
        // The sending side broke, and the agent sends on and on.
        let (sender, mut receiver, mut agent) = start(&operation).await;
        let flood = tokio::spawn(async move {
            let frame =
                [&svm_protocol::header(FrameType::Data, DATA_PAYLOAD)[..], &vec![7; DATA_PAYLOAD]].concat();
            let mut sent = 0;
            while agent.write_all(&frame).await.is_ok() {
                sent += 1;
            }
            sent
        });
        let broken = SendError::Channel(io::ErrorKind::BrokenPipe.into());
        assert!(matches!(receiver.after_send_error(broken).await, SvmError::Protocol { .. }));
        drop((receiver, sender));
        let frames = flood.await.unwrap();
        assert!(frames <= AFTER_BREAK / DATA_PAYLOAD + 8, "{frames} frames were taken");
        // An Error that was left before is still found.
        let (_sender, mut receiver, mut agent) = start(&operation).await;
        say(&mut agent, FrameType::Data, b"late").await;
        say(&mut agent, FrameType::Data, b"later").await;
        let error = serde_json::to_vec(&WireError::new(ErrorKind::Limit, "why")).unwrap();
        say(&mut agent, FrameType::Error, &error).await;
        let broken = SendError::Channel(io::ErrorKind::BrokenPipe.into());
        assert_eq!(receiver.after_send_error(broken).await.refused_kind(), Some(ErrorKind::Limit));
    }

    #[tokio::test]
    async fn the_last_bytes_of_an_exact_tar_come_only_after_its_digest_was_found_right() {
        let digest = TarDigest::of(DigestKind::Blake3, b"onetwo");
        let old = TarDigest { kind: DigestKind::Sha256, bytes: [0; 32] };
        let cases =
            [(Some(digest), true), (Some(TarDigest::default()), false), (None, false), (Some(old), true)];
        for (told, good) in cases {
            let operation = Operation::ExportExact { image: DiskId(0), record: DiskId(1) };
            let (_sender, mut receiver, mut agent) = start(&operation).await;
            say(&mut agent, FrameType::Data, b"one").await;
            say(&mut agent, FrameType::Data, b"two").await;
            assert!(matches!(receiver.next().await, Ok(Incoming::Data(b)) if b == "one"[..]));
            say(&mut agent, FrameType::Result, &summary(told)).await;
            let last = receiver.next().await;
            if good {
                assert!(matches!(last, Ok(Incoming::Data(b)) if b == "two"[..]));
                assert!(matches!(receiver.next().await, Ok(Incoming::Result(_))));
            } else {
                let wrong = matches!(last, Err(SvmError::Refused(ref e)) if e.kind == ErrorKind::Corrupt);
                assert_eq!(wrong, told.is_some());
                assert!(last.is_err());
            }
        }
    }
}
