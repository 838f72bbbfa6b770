//! A scripted hostile peer, at either end of a link.
//!
//! ```text
//!   script ─► Peer ══ duplex of 64 KiB ══ RemoteAgent (the daemon's end)      what is held is counted by the link's own
//!   script ─► bytes ══ socket pair ══ link::serve (the agent's end)           meters, so a run gives the same figures
//! ```
//!
//! A script may greet, answer, flood without reading, stop in mid-frame. Each test ends by the link's end, or by the
//! flood's; none by a clock.

use crate::svm::remote::{inbox::Inbox, link::data_frame, queue::FULL, *};
use futures_util::FutureExt;
use std::{io::Write as _, os::unix::net::UnixStream, time::Duration};
use svm_agent::{
    RealCodec,
    codec::Codec,
    link::{Platform, serve_counted},
};
use svm_protocol::{
    ErrorKind, WireError,
    link::{self, Kind, MAX_INLINE, WINDOW},
    meter::{PIECE_COST, cost},
    slots::TRANSFER_BYTES,
};
use tokio::io::{DuplexStream, ReadHalf, WriteHalf, duplex, split};

/// Bytes of a flood that an unbounded end would keep.
const FLOOD: usize = 16 << 20;
/// What an inbox may hold: what was paid, twice where small pieces share half-full buffers, and a last one.
const INBOX: usize = 2 * WINDOW + WINDOW / 16 + 2 * (MAX_INLINE + PIECE_COST);

/// A guest's agent that does what a test says.
struct Peer {
    input: ReadHalf<DuplexStream>,
    output: WriteHalf<DuplexStream>,
    /// What the daemon said first.
    wake: Option<Wake>,
}

impl Peer {
    /// Both ends, greeted, with a transfer disk or without.
    async fn greeted(transfer: bool) -> (RemoteAgent, Self) {
        let (ours, theirs) = duplex(64 << 10);
        let (input, output) = split(theirs);
        let mut peer = Self { input, output, wake: None };
        let (input, output) = split(ours);
        let transfer = transfer.then(|| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(TRANSFER_BYTES).unwrap();
            (file, TransferDisk::new("transfer"))
        });
        let (agent, ()) = tokio::join!(RemoteAgent::connect(input, output, transfer), peer.greet());
        (agent.unwrap(), peer)
    }

    /// Reads the Wake and answers as an honest agent does.
    async fn greet(&mut self) {
        let mut sync = [0; SYNC.len()];
        self.input.read_exact(&mut sync).await.unwrap();
        assert_eq!(sync, SYNC);
        let (_, message) = self.frame().await;
        let wake: Wake = serde_json::from_slice(&message[HEADER_LEN..]).unwrap();
        let hello = Hello {
            version: PROTOCOL_VERSION,
            jail: svm_protocol::JailReport::default(),
            nonce: wake.nonce,
            transfer: wake.transfer.is_some(),
            witness: None,
        };
        self.wake = Some(wake);
        self.output.write_all(&SYNC).await.unwrap();
        self.message(0, FrameType::Hello, &hello).await;
    }

    async fn frame(&mut self) -> (u32, Vec<u8>) {
        let mut head = [0; link::HEADER_LEN];
        self.input.read_exact(&mut head).await.unwrap();
        let link::Parsed::Frame(header) = link::parse(head).unwrap() else { panic!("a SYNC") };
        let mut payload = vec![0; header.len];
        self.input.read_exact(&mut payload).await.unwrap();
        (header.channel, payload)
    }

    async fn message<T: serde::Serialize>(&mut self, channel: u32, kind: FrameType, message: &T) {
        let bytes = data_frame(channel, &control_frame(kind, message).unwrap());
        self.output.write_all(&bytes).await.unwrap();
    }

    /// Takes the next control request and says yes.
    async fn accept(&mut self) -> Control {
        let (channel, message) = self.frame().await;
        assert_eq!(channel, 0);
        let request: ControlRequest = serde_json::from_slice(&message[HEADER_LEN..]).unwrap();
        let reply = ControlReply { seq: request.seq, error: None, witness: None };
        self.message(0, FrameType::Reply, &reply).await;
        request.control
    }

    /// Sends `bytes` over and over, reading nothing, until [`FLOOD`] bytes are out or the link is gone: how many.
    async fn flood(&mut self, bytes: &[u8]) -> usize {
        let many = bytes.repeat((32 << 10) / bytes.len() + 1);
        let mut sent = 0;
        while sent < FLOOD {
            match self.output.write_all(&many).await {
                Ok(()) => sent += many.len(),
                Err(_) => break,
            }
        }
        sent
    }
}

fn data(channel: u32, bytes: &[u8]) -> Vec<u8> {
    [&link::header(channel, Kind::Data, bytes.len()), bytes].concat()
}

/// Opens channel 1 with a peer that says yes.
async fn open(agent: &RemoteAgent, peer: &mut Peer) -> RemoteChannel {
    let (channel, control) = tokio::join!(agent.open_channel(), peer.accept());
    assert_eq!(control, Control::Open { channel: 1 });
    channel.unwrap()
}

fn hold(agent: &RemoteAgent, what: &str) {
    let (queued, received) = agent.most_held();
    assert!(queued <= FULL + cost(MAX_INLINE), "{what}: {queued} bytes queued");
    // Two channels are open at most: control and one more.
    assert!(received <= 2 * INBOX, "{what}: {received} bytes received and kept");
}

#[tokio::test]
async fn a_guest_that_floods_without_reading_gets_no_memory() {
    /// The link outlives the flood.
    const STAYS: bool = true;
    let foreign_slot = svm_protocol::slots::SLOTS;
    let floods: Vec<(&str, Vec<u8>, bool)> = vec![
        ("an empty Data frame", link::header(1, Kind::Data, 0).to_vec(), false),
        ("an empty Data frame of control", link::header(0, Kind::Data, 0).to_vec(), false),
        ("an empty Data frame of nobody", link::header(77, Kind::Data, 0).to_vec(), false),
        ("an empty slot", link::numbers(1, Kind::Stored, &[foreign_slot, 0]), false),
        ("an empty slot of nobody", link::numbers(77, Kind::Stored, &[foreign_slot, 0]), false),
        ("credit of nothing", link::numbers(1, Kind::Credit, &[0]), false),
        ("credit that was not used", link::numbers(1, Kind::Credit, &[1]), false),
        ("single bytes", data(1, &[7]), false),
        ("single bytes of control", data(0, &[7]), false),
        ("pieces that fill a shared buffer badly", [data(1, &[7]), data(1, &[7; 4096])].concat(), false),
        ("pieces of half a shared buffer", data(1, &[7; 2049]), false),
        ("whole frames", data(1, &[7; MAX_INLINE]), false),
        ("slots that nobody reads", link::numbers(1, Kind::Stored, &[foreign_slot, 1]), false),
        ("slots of nobody", link::numbers(77, Kind::Stored, &[foreign_slot + 1, 4096]), false),
        ("a slot of ours", link::numbers(77, Kind::Stored, &[0, 1]), false),
        ("more than a slot", link::numbers(77, Kind::Stored, &[foreign_slot, u32::MAX]), false),
        ("a slot that was not lent", link::numbers(0, Kind::Free, &[1]), false),
        ("bytes of nobody", data(77, &[7; 100]), STAYS),
        ("credit of nobody", link::numbers(77, Kind::Credit, &[u32::MAX]), STAYS),
        ("the end of nobody", link::header(77, Kind::Close, 0).to_vec(), STAYS),
        ("the end of a channel, again and again", link::header(1, Kind::Close, 0).to_vec(), STAYS),
        ("no frame", vec![0xff; 9], false),
        ("half a SYNC", SYNC[..9].to_vec(), false),
        ("a frame that is too long", link::numbers(1, Kind::Data, &[])[..0].to_vec(), false),
    ];
    for (what, bytes, stays) in floods {
        let bytes = if bytes.is_empty() { [&u32::MAX.to_le_bytes()[..], &[1; 5]].concat() } else { bytes };
        let (agent, mut peer) = Peer::greeted(true).await;
        let channel = open(&agent, &mut peer).await;
        let sent = peer.flood(&bytes).await;
        hold(&agent, what);
        assert_eq!(sent >= FLOOD, stays, "{what}: {sent} bytes were taken");
        if stays {
            let (pinged, control) = tokio::join!(agent.ping(), peer.accept());
            assert!(pinged.is_ok() && control == Control::Ping, "{what}");
        } else {
            assert!(agent.ping().await.is_err(), "{what}: the link has ended");
        }
        drop(channel);
    }
}

/// What stood in the queue would be answered only by a peer that reads: a reader of ours that takes all leaves one
/// Credit frame for each step, for as long as the guest sends.
#[tokio::test]
async fn credit_that_is_never_read_ends_the_link_before_it_fills_memory() {
    let (agent, mut peer) = Peer::greeted(false).await;
    let mut channel = open(&agent, &mut peer).await;
    // What is queued of bodies leaves the rest for answers.
    while channel.write(&vec![7; MAX_INLINE]).now_or_never().is_some() {
        peer.output.write_all(&link::numbers(1, Kind::Credit, &[MAX_INLINE as u32])).await.unwrap();
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
    let queue_of = |steps: usize| steps * cost(link::HEADER_LEN + 4);
    let mut buffer = vec![0; MAX_INLINE];
    let bytes = data(1, &vec![7; MAX_INLINE]);
    let mut taken = 0;
    // More steps than the rest of the queue has room for.
    let steps = 2 * WINDOW / cost(link::HEADER_LEN + 4);
    let ended = loop {
        if taken / link::CREDIT_STEP > steps {
            break None;
        }
        let (sent, read) = tokio::join!(peer.output.write_all(&bytes), channel.read_exact(&mut buffer));
        match (sent, read) {
            (Ok(()), Ok(n)) => taken += n,
            (_, read) => break read.err().or(Some(io::ErrorKind::BrokenPipe.into())),
        }
    };
    assert!(ended.is_some(), "{taken} bytes were taken from an agent that reads nothing");
    assert!(agent.most_held().0 <= FULL + queue_of(1));
}

#[tokio::test]
async fn a_body_is_not_queued_for_a_guest_that_credits_without_reading() {
    for transfer in [false, true] {
        let (agent, mut peer) = Peer::greeted(transfer).await;
        let mut channel = open(&agent, &mut peer).await;
        let (piece, mut accepted, mut stalls) = (vec![7; MAX_INLINE], 0, 0);
        while accepted < FLOOD && stalls < 1000 {
            match channel.write(&piece).now_or_never() {
                Some(n) => {
                    let n = n.unwrap();
                    accepted += n;
                    // It has read nothing of it.
                    peer.output.write_all(&link::numbers(1, Kind::Credit, &[n as u32])).await.unwrap();
                }
                None => stalls += 1,
            }
            tokio::task::yield_now().await;
        }
        hold(&agent, "a body");
        let slots = if transfer { TRANSFER_BYTES as usize / 2 } else { 0 };
        assert!(accepted < FULL + slots + (256 << 10), "{accepted} bytes were accepted");
        // It goes on as soon as somebody reads.
        let (written, read) = tokio::join!(channel.write(&piece), async {
            let mut all = vec![0; accepted.min(FULL / 2)];
            peer.input.read_exact(&mut all).await.map(drop)
        });
        assert!(transfer || (written.is_ok() && read.is_ok()));
    }
}

#[tokio::test]
async fn an_empty_piece_is_no_end_of_a_stream() {
    let (agent, mut peer) = Peer::greeted(false).await;
    let mut channel = open(&agent, &mut peer).await;
    peer.output.write_all(&data(1, b"begin")).await.unwrap();
    peer.output.write_all(&link::header(1, Kind::Data, 0)).await.unwrap();
    let mut all = Vec::new();
    let e = channel.read_to_end(&mut all).await.unwrap_err();
    assert_eq!((e.kind(), all.as_slice()), (io::ErrorKind::BrokenPipe, &b"begin"[..]));
}

#[tokio::test]
async fn a_guest_that_stops_in_mid_frame_is_an_error_and_no_end() {
    let whole = data(1, &[7; 100]);
    let stored = link::numbers(1, Kind::Stored, &[svm_protocol::slots::SLOTS, 100]);
    for bytes in [&whole, &stored] {
        for cut in 1..bytes.len() {
            let (agent, mut peer) = Peer::greeted(true).await;
            let mut channel = open(&agent, &mut peer).await;
            peer.output.write_all(&bytes[..cut]).await.unwrap();
            // While it just stands there the channel waits, and whoever reads it has a clock of its own.
            let mut all = Vec::new();
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            assert!(channel.read_to_end(&mut all).now_or_never().is_none(), "cut at {cut}");
            drop(peer);
            let e = channel.read_to_end(&mut all).await.unwrap_err();
            assert_eq!((e.kind(), all.len()), (io::ErrorKind::BrokenPipe, 0), "cut at {cut}");
            hold(&agent, "a cut frame");
        }
    }
}

#[tokio::test]
async fn greetings_without_end_are_given_up() {
    let (ours, theirs) = duplex(64 << 10);
    let (input, output) = split(ours);
    let (_, mut flood) = split(theirs);
    let hello = Hello {
        version: PROTOCOL_VERSION,
        jail: svm_protocol::JailReport::default(),
        nonce: 0,
        transfer: false,
        witness: None,
    };
    let stale = [&SYNC[..], &data_frame(0, &control_frame(FrameType::Hello, &hello).unwrap())].concat();
    let endless = tokio::spawn(async move { while flood.write_all(&stale).await.is_ok() {} });
    let e = RemoteAgent::connect(input, output, None).await.unwrap_err();
    assert!(e.to_string().contains("greeting"), "{e}");
    endless.await.unwrap();
}

#[test]
fn an_inbox_counts_down_to_nothing() {
    let meter = Arc::new(Meter::default());
    let inbox = Inbox::new(meter.clone());
    for n in [1, 1, 5000, 1, 4096, 4095] {
        inbox.put(vec![7; n].as_slice().into()).unwrap();
    }
    assert!(meter.now() > 13_000);
    drop(inbox);
    assert_eq!(meter.now(), 0);
}

/// Nothing is there.
struct Bare;

impl Platform for Bare {
    fn open_disk(&self, serial: &str, _: bool) -> Result<File, WireError> {
        Err(WireError::new(ErrorKind::Usage, format!("no disk {serial}")))
    }
    fn open_transfer(&self, _: &str) -> Result<File, WireError> {
        let file = tempfile::tempfile().map_err(|e| WireError::new(ErrorKind::Io, e.to_string()))?;
        file.set_len(TRANSFER_BYTES).map_err(|e| WireError::new(ErrorKind::Io, e.to_string()))?;
        Ok(file)
    }
    fn forget_disk(&self, _: &str) {}
    fn wake(&self, _: &[u8], _: Duration) -> Vec<String> {
        Vec::new()
    }
}

#[test]
fn a_daemon_that_floods_gets_no_memory_of_the_agent() {
    let greeting = {
        let wake = Wake {
            version: PROTOCOL_VERSION,
            nonce: 1,
            entropy: vec![],
            unix_nanos: 0,
            transfer: Some(TransferDisk::new("t")),
        };
        let open = ControlRequest { seq: 1, control: Control::Open { channel: 1 } };
        let mut bytes = SYNC.to_vec();
        bytes.extend_from_slice(&data_frame(0, &control_frame(FrameType::Wake, &wake).unwrap()));
        bytes.extend_from_slice(&data_frame(0, &control_frame(FrameType::Control, &open).unwrap()));
        // A request of which only the head comes: the operation waits, and so does all behind it.
        bytes.extend_from_slice(&data(1, &svm_protocol::header(FrameType::Request, 1000)));
        bytes
    };
    let floods: Vec<(&str, Vec<u8>)> = vec![
        ("an empty Data frame", link::header(1, Kind::Data, 0).to_vec()),
        ("an empty slot", link::numbers(1, Kind::Stored, &[0, 0])),
        ("single bytes of control", data(0, &[0xff])),
        ("pieces of half a shared buffer", data(1, &[7; 2049])),
        ("one slot again and again", link::numbers(1, Kind::Stored, &[0, 1])),
        ("one slot of nobody again and again", link::numbers(9, Kind::Stored, &[0, 1])),
        ("bytes of nobody", data(9, &[7; 100])),
    ];
    for (what, bytes) in floods {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let meter = Arc::new(Meter::default());
        let counted = meter.clone();
        let agent = std::thread::spawn(move || {
            let (platform, codec): (Arc<dyn Platform>, Arc<dyn Codec>) =
                (Arc::new(Bare), Arc::new(RealCodec::default()));
            let output = theirs.try_clone().unwrap();
            let _ = serve_counted(&theirs, output, &platform, &codec, &counted);
        });
        // What the agent says is read and forgotten: one that waits for its reader is another test's matter.
        let mut answers = ours.try_clone().unwrap();
        let reader = std::thread::spawn(move || io::copy(&mut answers, &mut io::sink()));
        let mut out = &ours;
        out.write_all(&greeting).unwrap();
        let many = bytes.repeat((32 << 10) / bytes.len() + 1);
        let mut sent = 0;
        while sent < FLOOD / 4 && out.write_all(&many).is_ok() {
            sent += many.len();
        }
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        agent.join().unwrap();
        drop(ours);
        let _ = reader.join().unwrap();
        assert!(meter.most() <= 2 * INBOX, "{what}: {} bytes held", meter.most());
    }
}
