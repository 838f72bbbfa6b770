//! A client that notes what it asked, what it was answered, and when.
//!
//! ```text
//!   tick ─► request ─► answer: its meaning for the model ─► tick ─► history
//! ```
//!
//! The clock counts, it does not measure. A client Puts only what it got, and writes only through views that it holds.

use super::{
    FAMILIES, History,
    model::{Answer, Call, Named, Refusal, Request, Seen},
};
use crate::support::{Plugin, Reply, Tar, transport};
use layer_codec::{DigestKind, TarDigest};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Write,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Bytes of the file of a content of version 0; each version has one more.
const BASE_SIZE: u64 = 1000;
/// Names that containers write.
const NAMES: u8 = 12;
/// Between two attempts to reach a plugin that is not there.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two requests of a client.
const BREATH: Duration = Duration::from_micros(200);
/// `f_type` of overlayfs (linux/magic.h).
const OVERLAYFS_SUPER_MAGIC: rustix::fs::FsWord = 0x794c_7630;

/// Gives each moment an even number once.
#[derive(Default)]
pub(super) struct Clock(AtomicU64);

impl Clock {
    pub(super) fn tick(&self) -> u64 {
        2 + self.0.fetch_add(2, Ordering::SeqCst)
    }
}

/// The version of the next content.
static VERSION: AtomicU32 = AtomicU32::new(1);
/// The versions that were sent, by the digests of their tars.
static SENT: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

fn file_of(id: &str, version: u32) -> String {
    format!("d/{id}-{version}")
}

fn tar(id: &str, version: u32) -> Vec<u8> {
    let size = BASE_SIZE + u64::from(version);
    Tar::new().dir("d/").file(&file_of(id, version), &vec![b'.'; size as usize]).end()
}

/// What became of a request on its way.
enum Sent {
    /// Nothing listens.
    Not,
    /// The connection broke.
    Broken,
    Answered(Reply),
}

pub(super) struct Client<'a> {
    address: PathBuf,
    home: PathBuf,
    history: &'a History,
    random: u64,
    /// References of this client, by layer.
    held: HashMap<&'static str, u32>,
}

impl<'a> Client<'a> {
    pub(super) fn new(plugin: &Plugin, history: &'a History, seed: u64, number: u64) -> Self {
        let random = (seed.wrapping_mul(64) + number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self { address: plugin.socket(), home: plugin.home(), history, random, held: HashMap::new() }
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 20) % limit
    }

    pub(super) fn one_request(&mut self) {
        let family = self.below(FAMILIES.len() as u64) as usize;
        let layer = self.below(FAMILIES[family].ids.len() as u64) as usize;
        let held = self.held.get(FAMILIES[family].ids[layer]).copied().unwrap_or(0);
        let request = match self.below(32) {
            0..5 => Request::Create,
            5..7 => Request::CreateReadWrite,
            7..11 => Request::ApplyDiff(VERSION.fetch_add(1, Ordering::Relaxed)),
            11..15 if held > 0 => Request::Write(self.below(u64::from(NAMES)) as u8),
            15..18 if held > 0 => Request::Put,
            18..20 => Request::Remove,
            20..22 => Request::Exists,
            15..18 | 22..24 => Request::GetMetadata,
            24..27 => Request::Diff,
            27 => Request::DiffSize,
            28 => Request::Changes,
            _ => Request::Get,
        };
        let under_way = self.history.under_way.read().unwrap_or_else(PoisonError::into_inner);
        let sent = self.record(family, layer, request);
        drop(under_way);
        // Also leaves the lock to the one who looks at everything.
        std::thread::sleep(if sent { BREATH } else { PAUSE });
    }

    /// What a process says of each layer, by these requests.
    pub(super) fn look_at_everything(&mut self, requests: &[Request]) {
        for (family, layers) in FAMILIES.iter().enumerate() {
            for layer in 0..layers.ids.len() {
                for request in requests {
                    self.record(family, layer, *request);
                }
            }
        }
    }

    /// Whether the request was sent.
    fn record(&mut self, family: usize, layer: usize, request: Request) -> bool {
        let id = FAMILIES[family].ids[layer];
        let parent = FAMILIES[family].parents[layer].map_or("", |n| FAMILIES[family].ids[n]);
        let begin = self.history.clock.tick();
        let answer = if let Request::Write(bit) = request {
            Some(self.write(id, bit))
        } else {
            self.ask(id, parent, request)
        };
        let end = self.history.clock.tick();
        let Some(answer) = answer else { return false };
        match (request, answer) {
            (Request::Get, Answer::Done) => *self.held.entry(id).or_default() += 1,
            // One that failed, or had no answer, may have dropped it.
            (Request::Put, _) | (Request::Remove, Answer::Done) => {
                self.held.entry(id).and_modify(|held| *held = held.saturating_sub(1));
            }
            _ => {}
        }
        self.history.add(family, begin, end, Call { layer, request, answer, excused: false });
        true
    }

    /// `None` if the request was not sent.
    fn ask(&self, id: &str, parent: &str, request: Request) -> Option<Answer> {
        let of = json!({"ID": id, "Parent": parent}).to_string().into_bytes();
        let (method, body) = match request {
            Request::Create => ("Create".to_owned(), of),
            Request::CreateReadWrite => ("CreateReadWrite".to_owned(), of),
            Request::ApplyDiff(version) => {
                let tar = tar(id, version);
                let digests = [DigestKind::Sha256, DigestKind::Blake3].map(|kind| TarDigest::of(kind, &tar));
                SENT.lock().unwrap().extend(digests.map(|digest| (digest.to_string(), version)));
                (format!("ApplyDiff?id={id}&parent={parent}"), tar)
            }
            Request::Get => ("Get".to_owned(), of),
            Request::Put => ("Put".to_owned(), of),
            Request::Remove => ("Remove".to_owned(), of),
            Request::Exists => ("Exists".to_owned(), of),
            Request::GetMetadata => ("GetMetadata".to_owned(), of),
            Request::Diff => ("Diff".to_owned(), of),
            Request::DiffSize => ("DiffSize".to_owned(), of),
            Request::Changes => ("Changes".to_owned(), of),
            Request::Write(_) | Request::Restart => unreachable!("not a request to the plugin"),
        };
        match self.post(&method, &body) {
            Sent::Not => None,
            Sent::Broken => Some(Answer::Lost),
            Sent::Answered(reply) if reply.status != 200 => Some(refusal(id, &reply.text())),
            Sent::Answered(reply) if !reply.complete => Some(Answer::Failed),
            Sent::Answered(reply) => Some(meaning(id, request, &reply)),
        }
    }

    fn post(&self, method: &str, body: &[u8]) -> Sent {
        let Ok(mut stream) = transport::connect(&self.address) else { return Sent::Not };
        let head = format!(
            "POST /GraphDriver.{method} HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        // A refusal may come before the body has been read.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        Reply::read(stream).map_or(Sent::Broken, Sent::Answered)
    }

    /// A directory is made in one step, unlike a file with its bytes.
    fn write(&self, id: &str, bit: u8) -> Answer {
        let Ok(view) = File::open(self.home.join(id).join("merged")) else { return Answer::NoView };
        let shown = rustix::fs::fstatfs(&view).is_ok_and(|fs| fs.f_type == OVERLAYFS_SUPER_MAGIC);
        if !shown {
            return Answer::NoView;
        }
        match rustix::fs::mkdirat(&view, name_of(id, bit), rustix::fs::Mode::RWXU) {
            Ok(()) => Answer::Done,
            Err(rustix::io::Errno::EXIST) => Answer::Known,
            Err(_) => Answer::NoView,
        }
    }
}

fn name_of(id: &str, bit: u8) -> String {
    format!("w-{id}-{bit}")
}

/// The names among paths, one a bit.
fn names(id: &str, paths: &[String]) -> u16 {
    let is = |path: &String, bit: u8| path.trim_matches('/') == name_of(id, bit);
    (0..NAMES).filter(|bit| paths.iter().any(|path| is(path, *bit))).map(|bit| 1 << bit).sum()
}

/// The version of a layer among paths.
fn version(id: &str, paths: &[String]) -> Option<u32> {
    let begin = format!("d/{id}-");
    paths.iter().find_map(|path| path.trim_matches('/').strip_prefix(&begin)?.parse().ok())
}

/// What an answer of success means.
fn meaning(id: &str, request: Request, reply: &Reply) -> Answer {
    match request {
        Request::Exists => Answer::Exists(reply.json()["Exists"].as_bool().expect("a truth value")),
        Request::GetMetadata => metadata(id, &reply.json()["Metadata"]),
        Request::Diff => {
            let mut archive = tar::Archive::new(reply.body.as_slice());
            let path = |entry: std::io::Result<tar::Entry<&[u8]>>| {
                let mut entry = entry.expect("a whole tar");
                std::io::copy(&mut entry, &mut std::io::sink()).expect("a whole tar");
                entry.path().expect("a path").to_string_lossy().into_owned()
            };
            let paths: Vec<String> = archive.entries().expect("a tar").map(path).collect();
            let seen = content(id, &paths);
            if let Answer::Content(Seen::Version(version)) = seen {
                assert!(
                    reply.body == tar(id, version),
                    "Diff of {id} {version} has other bytes than were applied"
                );
            }
            seen
        }
        Request::Changes => {
            let list = reply.json()["Changes"].as_array().cloned().unwrap_or_default();
            let paths: Vec<String> =
                list.iter().map(|change| change["Path"].as_str().expect("a path").to_owned()).collect();
            content(id, &paths)
        }
        Request::DiffSize => match reply.json()["Size"].as_u64().expect("a number") {
            0 => Answer::Content(Seen::Sandbox),
            size => Answer::Content(Seen::Version((size - BASE_SIZE) as u32)),
        },
        Request::ApplyDiff(version) => {
            assert_eq!(reply.json()["Size"], BASE_SIZE + u64::from(version), "{id}");
            Answer::Done
        }
        _ => Answer::Done,
    }
}

fn content(id: &str, paths: &[String]) -> Answer {
    Answer::Content(version(id, paths).map_or_else(|| Seen::Names(names(id, paths)), Seen::Version))
}

/// An applied layer is recognized by the bytes of its tar.
fn metadata(id: &str, facts: &Value) -> Answer {
    let fact = |name: &str| facts[name].as_str().unwrap_or_default();
    let state = match fact("state") {
        "created" => Named::Created,
        "applying" => Named::Applying,
        "sandbox" => Named::Sandbox,
        "applied" => Named::Applied(version_of_digest(id, fact("tar_digest"))),
        other => panic!("state '{other}'"),
    };
    Answer::Metadata { state, references: fact("references").parse().expect("a number") }
}

/// The version whose tar has a digest.
fn version_of_digest(id: &str, digest: &str) -> u32 {
    let sent = SENT.lock().unwrap().get(digest).copied();
    sent.unwrap_or_else(|| panic!("{id} has a tar that was never sent: {digest}"))
}

/// Why a request was refused, by the text of the answer.
fn refusal(id: &str, text: &str) -> Answer {
    use Refusal::{
        AncestorIncomplete, Applied, Exists, GivenUp, HasChildren, HasSandbox, InProgress, Incomplete,
        NoParent, NotFound, OfEarlierProcess,
    };
    let own = format!("layer {id} is incomplete");
    // The first that fits: a refusal may repeat the text of another one as its reason.
    let texts: [(&str, Refusal); 15] = [
        (&own, Incomplete),
        ("is incomplete (its ApplyDiff", AncestorIncomplete),
        ("was created before the plugin was restarted", OfEarlierProcess),
        ("another ApplyDiff of it is in progress", InProgress),
        ("was removed while its tar was being applied", GivenUp),
        ("is already applied and never changes", Applied),
        ("exists already; remove it first", Exists),
        ("cannot be created: its parent", NoParent),
        ("still has children", HasChildren),
        ("was written through a mount", HasSandbox),
        ("is in use (a Get without its Put)", HasSandbox),
        ("was made by an earlier process", HasSandbox),
        ("is the parent of", HasSandbox),
        ("was mounted while its content", HasSandbox),
        ("does not exist", NotFound),
    ];
    let found = texts.iter().find(|(part, _)| text.contains(part));
    found.map_or(Answer::Failed, |(_, why)| Answer::Refused(*why))
}
