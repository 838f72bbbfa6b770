//! Both ends of a link, in one process, over a socket pair.

#[cfg(unix)]
mod hostile;
mod recode;

use super::*;
use crate::svm::Channel;
use std::{
    net::{Shutdown, TcpListener, TcpStream},
    path::PathBuf,
    sync::Mutex,
    time::Duration,
};
use svm_agent::{RealCodec, codec::Codec, link::Platform};
use svm_protocol::{
    DigestKind, ErrorKind, Operation, TarDigest, WireError, link, parse_header, slots::TRANSFER_BYTES,
};
use tokio::time::timeout;

/// A platform whose disks are files named by their serials; no part of it is Linux.
struct Files {
    folder: PathBuf,
    /// The times that it was told.
    woken: Mutex<Vec<Duration>>,
}

impl Platform for Files {
    fn open_disk(&self, serial: &str, writable: bool) -> Result<File, WireError> {
        let file = File::options().read(true).write(writable).open(self.folder.join(serial));
        file.map_err(|e| WireError::new(ErrorKind::Usage, format!("disk {serial}: {e}")))
    }
    fn open_transfer(&self, serial: &str) -> Result<File, WireError> {
        self.open_disk(serial, true)
    }
    fn forget_disk(&self, _: &str) {}
    fn wake(&self, entropy: &[u8], unix_time: Duration) -> Vec<String> {
        assert!(entropy.len() == ENTROPY_BYTES && unix_time > Duration::from_hours(24 * 365 * 50));
        let mut woken = self.woken.lock().unwrap();
        woken.push(unix_time);
        match woken.len() {
            1 => vec!["woken".into()],
            2 => vec![],
            _ => vec!["no clock".into(), "no random numbers".into()],
        }
    }
    fn witness(&self) -> Option<Witness> {
        let woken = self.woken.lock().unwrap();
        let unix_nanos = u64::try_from(woken.last()?.as_nanos()).unwrap();
        Some(Witness { unix_nanos, random: [woken.len() as u8; 16] })
    }
}

/// An agent on a thread; the daemon's end of its stream.
fn agent(folder: &std::path::Path) -> TcpStream {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    theirs.set_nodelay(true).unwrap();
    ours.set_nodelay(true).unwrap();
    let platform: Arc<dyn Platform> = Arc::new(Files { folder: folder.to_owned(), woken: Mutex::default() });
    std::thread::spawn(move || {
        let codec: Arc<dyn Codec> = Arc::new(RealCodec::default());
        let output = theirs.try_clone().unwrap();
        let _ = svm_agent::link::serve(&theirs, output, &platform, &codec);
        let _ = theirs.shutdown(Shutdown::Both);
    });
    ours
}

async fn connect(stream: TcpStream, transfer: Option<(File, TransferDisk)>) -> io::Result<RemoteAgent> {
    stream.set_nonblocking(true)?;
    let (input, output) = tokio::net::TcpStream::from_std(stream)?.into_split();
    timeout(Duration::from_secs(20), RemoteAgent::connect(input, output, transfer)).await?
}

fn transfer_file(folder: &std::path::Path) -> (File, TransferDisk) {
    let path = folder.join("transfer");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(TRANSFER_BYTES).unwrap();
    (file, TransferDisk::new("transfer"))
}

fn tar_of(bytes: usize) -> Vec<u8> {
    let mut header = vec![0; 512];
    let fields: [(usize, &[u8]); 6] = [
        (0, b"file"),
        (100, b"0000644\x000000000\x000000000\x00"),
        (124, &format!("{bytes:011o}\0").into_bytes()),
        (136, b"14000000000\0"),
        (148, b"        0"),
        (257, b"ustar\x0000"),
    ];
    for (at, text) in fields {
        header[at..at + text.len()].copy_from_slice(text);
    }
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header.extend((0..bytes).map(|n| (n * 31 / 7) as u8));
    header.resize(header.len().next_multiple_of(512) + 1024, 0);
    header
}

/// Applies a tar to files of `folder` and reads it back.
async fn round_trip(agent: &RemoteAgent, folder: &std::path::Path, name: &str, bytes: usize, first: u32) {
    let (image, record) = (format!("{name}.image"), format!("{name}.record"));
    for (n, serial) in [&image, &record].into_iter().enumerate() {
        File::create(folder.join(serial)).unwrap();
        let disk = RemoteDisk {
            disk: DiskId(first + n as u32),
            writable: true,
            offset: 0,
            len: None,
            serial: serial.clone(),
            format: DiskFormat::Raw,
        };
        agent.attach(&disk).await.unwrap();
    }
    let tar = tar_of(bytes);
    let operation = Operation::Apply {
        image: DiskId(first),
        record: DiskId(first + 1),
        lowers: vec![],
        scratch: None,
        options: svm_protocol::ApplyOptions::default(),
    };
    let mut channel: Channel = Box::new(agent.open_channel().await.unwrap());
    let mut frames = Vec::new();
    svm_protocol::write_json(&mut frames, FrameType::Request, &operation).unwrap();
    for chunk in tar.chunks(svm_protocol::DATA_PAYLOAD) {
        svm_protocol::write_frame(&mut frames, FrameType::Data, chunk).unwrap();
    }
    let digest = TarDigest::of(DigestKind::Blake3, &tar).to_string();
    svm_protocol::write_frame(&mut frames, FrameType::End, digest.as_bytes()).unwrap();
    channel.write_all(&frames).await.unwrap();
    let (kind, payload) = frame_of(&mut channel).await;
    assert_eq!(kind, FrameType::Result, "{}", String::from_utf8_lossy(&payload));
    let operation = Operation::ExportExact { image: DiskId(first), record: DiskId(first + 1) };
    let mut channel: Channel = Box::new(agent.open_channel().await.unwrap());
    channel.write_all(&control_frame(FrameType::Request, &operation).unwrap()).await.unwrap();
    let mut back = Vec::new();
    loop {
        match frame_of(&mut channel).await {
            (FrameType::Data, bytes) => back.extend_from_slice(&bytes),
            (FrameType::Result, summary) => {
                let summary: svm_protocol::ExportSummary = serde_json::from_slice(&summary).unwrap();
                assert_eq!(summary.tar_digest.unwrap().to_string(), digest);
                break;
            }
            (kind, text) => panic!("{kind:?}: {}", String::from_utf8_lossy(&text)),
        }
    }
    assert!(back == tar, "{} bytes came back of {}", back.len(), tar.len());
    for n in 0..2 {
        agent.detach(DiskId(first + n)).await.unwrap();
    }
}

async fn frame_of(channel: &mut Channel) -> (FrameType, Vec<u8>) {
    let mut head = [0; HEADER_LEN];
    channel.read_exact(&mut head).await.unwrap();
    let (kind, len) = parse_header(head).unwrap();
    let mut payload = vec![0; len];
    channel.read_exact(&mut payload).await.unwrap();
    (kind, payload)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_go_over_a_link_with_and_without_a_transfer_disk() {
    for with_disk in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let transfer = with_disk.then(|| transfer_file(folder.path()));
        let agent = connect(agent(folder.path()), transfer).await.unwrap();
        assert_eq!(agent.hello().transfer, with_disk);
        assert_eq!(agent.hello().jail.notes, ["woken"]);
        agent.ping().await.unwrap();
        let e = agent.detach(DiskId(7)).await.unwrap_err().to_string();
        assert!(e.contains("no disk 7"), "{e}");
        round_trip(&agent, folder.path(), "small", 10, 0).await;
        // Many windows long, on several channels at once.
        let both = (
            round_trip(&agent, folder.path(), "a", 9_000_001, 10),
            round_trip(&agent, folder.path(), "b", 5_000_000, 20),
        );
        tokio::join!(both.0, both.1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_stood_still_is_told_the_time_and_says_what_it_could_not_do() {
    let folder = tempfile::tempdir().unwrap();
    let agent = connect(agent(folder.path()), None).await.unwrap();
    let greeting = agent.hello().witness.clone().unwrap();
    let woken = agent.wake().await.unwrap().unwrap();
    assert!(woken.unix_nanos > greeting.unix_nanos);
    assert_eq!((greeting.random[0], woken.random[0]), (1, 2));
    let e = agent.wake().await.unwrap_err().to_string();
    assert_eq!(e, "no clock; no random numbers");
    agent.ping().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_channel_cancels_and_a_sleeping_one_holds_up_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let agent = connect(agent(folder.path()), Some(transfer_file(folder.path()))).await.unwrap();
    // An apply whose tar never comes: it waits in the agent, and the link goes on.
    for (n, name) in ["i", "r"].into_iter().enumerate() {
        File::create(folder.path().join(name)).unwrap();
        let disk = RemoteDisk {
            disk: DiskId(n as u32),
            writable: true,
            offset: 0,
            len: None,
            serial: name.into(),
            format: DiskFormat::Raw,
        };
        agent.attach(&disk).await.unwrap();
    }
    let options = svm_protocol::ApplyOptions::default();
    let operation =
        Operation::Apply { image: DiskId(0), record: DiskId(1), lowers: vec![], scratch: None, options };
    let mut sleeping = agent.open_channel().await.unwrap();
    sleeping.write_all(&control_frame(FrameType::Request, &operation).unwrap()).await.unwrap();
    // Bytes that nobody takes until the window is full: back-pressure, not memory.
    let full = timeout(Duration::from_millis(300), async {
        let mut stuck = agent.open_channel().await.unwrap();
        let mut request = control_frame(
            FrameType::Request,
            &Operation::Check {
                image: DiskId(9),
                tree: false,
                writer: 2,
                owners: svm_protocol::IdMaps::default(),
            },
        )
        .unwrap();
        request.truncate(8);
        stuck.write_all(&request).await.unwrap();
        stuck.write_all(&vec![0; 3 * link::WINDOW]).await
    })
    .await;
    // The agent takes what it can't read as a request for an error and lets go: broken pipe, or still waiting.
    assert!(full.is_err() || full.unwrap().is_err());
    round_trip(&agent, folder.path(), "other", 3_000_000, 10).await;
    drop(sleeping);
    round_trip(&agent, folder.path(), "next", 1000, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_costs_a_session_and_not_the_agent() {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    for garbage in [
        &b"\x00\x01\x02 anything that is no SYNC \xff\xff\xff\xff"[..],
        &link::SYNC,
        &[link::SYNC.as_slice(), &[0xff; 64]].concat(),
        &[link::SYNC.as_slice(), &data_of(&[0xff; 5])].concat(),
        &[link::SYNC.as_slice(), &data_of(b"\x02\x00\x00\x00\x0b{}")].concat(),
        &[link::SYNC.as_slice(), &data_of(b"\x02\x00\x00\x00\x09{}")].concat(),
        &[link::SYNC.as_slice(), &link::numbers(0, link::Kind::Free, &[3])].concat(),
        &[link::SYNC.as_slice(), &link::numbers(0, link::Kind::Stored, &[3, 9])].concat(),
        &[link::SYNC.as_slice(), &link::numbers(0, link::Kind::Credit, &[u32::MAX])].concat(),
    ] {
        let mut stream = agent(folder.path());
        stream.write_all(garbage).unwrap();
        let agent = connect(stream, None).await.unwrap();
        round_trip(&agent, folder.path(), "l", 100_000, 0).await;
    }
}

fn data_of(bytes: &[u8]) -> Vec<u8> {
    [&link::header(0, link::Kind::Data, bytes.len()), bytes].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_agent_ends_its_link_and_every_channel() {
    use std::io::{Read, Write};
    let lies: [Vec<u8>; 5] = [
        vec![0xff; 9],
        link::numbers(0, link::Kind::Credit, &[u32::MAX]),
        link::numbers(1, link::Kind::Stored, &[0, 1]),
        link::numbers(0, link::Kind::Free, &[0]),
        (0..17)
            .flat_map(|_| [&link::header(0, link::Kind::Data, 65536)[..], &vec![0; 65536]].concat())
            .collect(),
    ];
    for lie in lies {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut theirs = listener.accept().unwrap().0;
        let hostile = std::thread::spawn(move || {
            let mut head = [0; 16 + link::HEADER_LEN + svm_protocol::HEADER_LEN];
            theirs.read_exact(&mut head).unwrap();
            let len =
                u32::from_le_bytes(head[16..20].try_into().unwrap()) as usize - svm_protocol::HEADER_LEN;
            let mut wake = vec![0; len];
            theirs.read_exact(&mut wake).unwrap();
            let wake: Wake = serde_json::from_slice(&wake).unwrap();
            let jail = svm_protocol::JailReport::default();
            let mut hello =
                Hello { version: PROTOCOL_VERSION, jail, nonce: 1, transfer: false, witness: None };
            // First a stale greeting, as an earlier session may have left it.
            for nonce in [7, wake.nonce] {
                hello.nonce = nonce;
                theirs.write_all(&link::SYNC).unwrap();
                theirs.write_all(&data_of(&control_frame(FrameType::Hello, &hello).unwrap())).unwrap();
            }
            let _ = theirs.write_all(&lie);
            let _ = theirs.read_to_end(&mut Vec::new());
        });
        let agent = connect(ours, None).await.unwrap();
        let failed = timeout(Duration::from_secs(10), agent.ping()).await.expect("never ends");
        assert!(failed.is_err());
        assert!(agent.open_channel().await.is_err());
        drop(agent);
        hostile.join().unwrap();
    }
}
