//! A registry of the distribution on loopback, images that are pushed to it, and proxies.

use crate::Scene;
use oci_image::{Descriptor, Digest, Index, MediaKind, testing::Store};
use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Longest wait for a server.
const PATIENCE: Duration = Duration::from_secs(30);
/// Ports that are tried: another program may take one that was free.
const TRIES: usize = 5;

/// A running docker-registry.
pub(super) struct Server {
    process: Child,
    pub(super) port: u16,
}

impl Server {
    /// Starts a registry whose images are below `storage`; `more` is appended to its configuration, behind `http:`.
    pub(super) fn start(scene: &Scene, storage: &str, more: &str) -> Self {
        let storage = scene.path(storage);
        for _ in 0..TRIES {
            let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).unwrap().port();
            let config = scene.path(&format!("registry-{port}.yml"));
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: \
                 127.0.0.1:{port}\n{more}",
                storage.display()
            );
            fs::write(&config, text).unwrap();
            let mut process = Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("docker-registry; see scripts/install-deps test");
            let end = Instant::now() + PATIENCE;
            while process.try_wait().unwrap().is_none() && Instant::now() < end {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() && process.try_wait().unwrap().is_none() {
                    return Self { process, port };
                }
                thread::sleep(Duration::from_millis(20));
            }
            let _ = process.kill();
            let _ = process.wait();
        }
        panic!("docker-registry does not listen");
    }

    /// Pushes what a descriptor leads to, under a tag.
    pub(super) fn push(&self, store: &Store, repository: &str, descriptor: &Descriptor, tag: &str) {
        for (digest, bytes) in &store.blobs {
            self.push_blob(repository, digest, bytes);
        }
        self.push_document(store, repository, descriptor, tag);
    }

    fn push_blob(&self, repository: &str, digest: &Digest, bytes: &[u8]) {
        let path = format!("/v2/{repository}/blobs/uploads/");
        let (status, head) = exchange(self.port, "POST", &path, "", &[]);
        assert_eq!(status, 202, "{head}");
        let location = header(&head, "location").expect("a location");
        let path = location
            .split_once("://")
            .map_or(location.as_str(), |(_, rest)| rest.find('/').map_or("/", |at| &rest[at..]));
        let mark = if path.contains('?') { '&' } else { '?' };
        let (status, head) = exchange(
            self.port,
            "PUT",
            &format!("{path}{mark}digest={digest}"),
            "application/octet-stream",
            bytes,
        );
        assert_eq!(status, 201, "{head}");
    }

    fn push_document(&self, store: &Store, repository: &str, descriptor: &Descriptor, reference: &str) {
        let bytes = &store.blobs[&descriptor.digest];
        if descriptor.media_type.kind() == MediaKind::Index {
            let index: Index = serde_json::from_slice(bytes).unwrap();
            for inner in &index.manifests {
                self.push_document(store, repository, inner, &inner.digest.to_string());
            }
        }
        let path = format!("/v2/{repository}/manifests/{reference}");
        let (status, head) = exchange(self.port, "PUT", &path, &descriptor.media_type.0, bytes);
        assert_eq!(status, 201, "{head}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One request; gives the status, and the whole reply as text.
fn exchange(port: u16, method: &str, path: &str, media_type: &str, body: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Type: {media_type}\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    let reply = String::from_utf8_lossy(&reply).into_owned();
    let status = reply.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, reply)
}

fn header(head: &str, name: &str) -> Option<String> {
    head.lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim().to_owned())
}

/// A proxy on loopback.
pub(super) struct Proxy {
    pub(super) port: u16,
    connections: Arc<Mutex<usize>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A proxy to a port that cuts its first connections: the n-th one after `cuts[n]` bytes of replies.
    pub(super) fn that_cuts(to: u16, cuts: &[usize]) -> Self {
        let cuts = cuts.to_vec();
        Self::start(move |number, client| {
            let most = cuts.get(number).copied().unwrap_or(usize::MAX);
            if let Ok(server) = TcpStream::connect(("127.0.0.1", to)) {
                forward(client, server, most);
            }
        })
    }

    /// A proxy that is asked to CONNECT to `host`, and connects to a port on loopback.
    pub(super) fn for_host(host: &'static str, to: u16) -> Self {
        Self::start(move |_, mut client| {
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && client.read(&mut byte).is_ok_and(|n| n > 0) {
                head.push(byte[0]);
            }
            let right = head.starts_with(format!("CONNECT {host} HTTP/1.1\r\n").as_bytes());
            let reply = if right { "200 OK" } else { "403 Forbidden" };
            let _ = client.write_all(format!("HTTP/1.1 {reply}\r\n\r\n").as_bytes());
            if right && let Ok(server) = TcpStream::connect(("127.0.0.1", to)) {
                forward(client, server, usize::MAX);
            }
        })
    }

    fn start(serve: impl Fn(usize, TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connections, stop) = (Arc::new(Mutex::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, ended) = (Arc::clone(&connections), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let number = {
                    let mut number = counted.lock().unwrap();
                    *number += 1;
                    *number - 1
                };
                let _ = client.set_read_timeout(Some(PATIENCE));
                serve(number, client);
            }
        });
        Self { port, connections, stop, thread: Some(thread) }
    }

    /// Connections so far.
    pub(super) fn connections(&self) -> usize {
        *self.connections.lock().unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Forwards both directions; the threads end with the connections.
fn forward(client: TcpStream, server: TcpStream, most: usize) {
    let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let (mut client, server) = (client, server);
        let _ = std::io::copy(&mut (&server).take(most as u64), &mut client);
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    });
}

/// A certificate for 127.0.0.1, its key and its authority: cert.pem, key.pem and ca.pem in `folder`.
pub(super) fn certificates(folder: &Path) {
    let openssl = |arguments: &[&str]| {
        let done = Command::new("openssl").args(arguments).current_dir(folder).output();
        let done = done.expect("openssl; see scripts/install-deps test");
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let request = |more: &[&str]| openssl(&[&["req"][..], &key, more].concat());
    request(&["-x509", "-days", "2", "-subj", "/CN=an authority", "-keyout", "ca.key", "-out", "ca.pem"]);
    request(&["-subj", "/CN=127.0.0.1", "-keyout", "key.pem", "-out", "request.pem"]);
    fs::write(folder.join("extensions"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n").unwrap();
    let sign =
        ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions"];
    openssl(&[&["x509", "-req", "-in", "request.pem", "-out", "cert.pem"][..], &sign].concat());
}
