//! A server that answers as a test says: registries that are wrong, slow or hostile, and token services.

use oci_image::testing::Store;
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Longest wait for a request or for room to write.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// Path and query.
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The first byte that is asked for.
    pub(super) fn from(&self) -> usize {
        let range = self.header("range").and_then(|range| range.strip_prefix("bytes="));
        range.and_then(|range| range.trim_end_matches('-').parse().ok()).unwrap_or(0)
    }
}

/// A reply.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Body,
}

/// The bytes of a reply.
pub(super) enum Body {
    /// All of them.
    Whole(Vec<u8>),
    /// The first of them, with the length of all; then the connection ends.
    Cut(Vec<u8>, usize),
    /// With another length in the header.
    Lie(Vec<u8>, usize),
    /// Chunks without an end.
    Endless,
}

impl Answer {
    pub(super) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: Body::Whole(body.into()) }
    }

    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) fn body(body: Body) -> Self {
        Self { status: 200, headers: Vec::new(), body }
    }
}

/// What a registry that is right answers: repository `app`, the first entry of the store under every tag.
pub(super) fn right(store: &Store, request: &Request) -> Answer {
    let blob = |name: &str| store.blobs.iter().find(|(digest, _)| digest.to_string() == name);
    if let Some(name) = request.path.strip_prefix("/v2/app/manifests/") {
        let entry = &store.entries[0];
        let (digest, bytes) = blob(name).unwrap_or_else(|| store.blobs.get_key_value(&entry.digest).unwrap());
        return Answer::new(200, bytes.clone()).with("Docker-Content-Digest", digest.to_string());
    }
    match request.path.strip_prefix("/v2/app/blobs/").and_then(blob) {
        None => Answer::new(404, ""),
        Some((_, bytes)) => match request.from() {
            0 => Answer::new(200, bytes.clone()),
            from => Answer::new(206, &bytes[from..])
                .with("Content-Range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
        },
    }
}

/// A running server.
pub(super) struct Fake {
    pub(super) port: u16,
    log: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub(super) fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (log, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (requests, ended, answer) = (Arc::clone(&log), Arc::clone(&stop), Arc::new(answer));
        let thread = thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (requests, answer) = (Arc::clone(&requests), Arc::clone(&answer));
                thread::spawn(move || {
                    let _ = stream.set_read_timeout(Some(PATIENCE));
                    let _ = stream.set_write_timeout(Some(PATIENCE));
                    if let Some(request) = read(&stream) {
                        requests.lock().unwrap().push(request.clone());
                        // A client that hangs up is what many tests want.
                        let _ = write(&stream, answer(&request));
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                });
            }
        });
        Self { port, log, stop, thread: Some(thread) }
    }

    /// The requests so far.
    pub(super) fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reads a request.
fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = || -> Option<String> {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        Some(line.trim_end().to_owned())
    };
    let path = line()?.split(' ').nth(1)?.to_owned();
    let mut request = Request { path, headers: Vec::new(), body: String::new() };
    while let Some((name, value)) = line()?.split_once(':') {
        request.headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    reader.take(length).read_to_string(&mut request.body).ok()?;
    Some(request)
}

fn write(mut stream: &TcpStream, answer: Answer) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", answer.status);
    for &(name, ref value) in &answer.headers {
        head.extend([name, ": ", value.as_str(), "\r\n"]);
    }
    let (bytes, length) = match answer.body {
        Body::Whole(bytes) => {
            let length = bytes.len();
            (bytes, Some(length))
        }
        Body::Cut(mut bytes, most) => {
            let length = bytes.len();
            bytes.truncate(most);
            (bytes, Some(length))
        }
        Body::Lie(bytes, length) => (bytes, Some(length)),
        Body::Endless => (Vec::new(), None),
    };
    stream.write_all(head.as_bytes())?;
    match length {
        Some(length) => write!(stream, "Content-Length: {length}\r\n\r\n")?,
        None => write!(stream, "Transfer-Encoding: chunked\r\n\r\n")?,
    }
    stream.write_all(&bytes)?;
    while length.is_none() {
        stream.write_all(b"1000\r\n")?;
        stream.write_all(&[b' '; 0x1000])?;
        stream.write_all(b"\r\n")?;
    }
    Ok(())
}
