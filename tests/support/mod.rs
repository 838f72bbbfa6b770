//! A running plugin and a client that talks to it as dockerd does, byte by byte.
//!
//! The client is written on bare sockets, not on the HTTP library that the plugin uses: it can cut a body, send
//! nothing, send too much, and it sees how a reply really ends.
#![allow(dead_code, reason = "each test program uses its own part")]

#[cfg(target_os = "linux")]
pub(crate) mod injection;
#[cfg(target_os = "linux")]
pub(crate) mod leftovers;
pub(crate) mod machine;
pub(crate) mod refusal;
pub(crate) mod skip;
pub(crate) mod transport;

use serde_json::Value;
use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use transport::{FLAG, Stream};

/// Longest wait for a plugin to answer.
const READY: Duration = Duration::from_mins(1);
/// Longest wait for one reply.
const REPLY: Duration = Duration::from_mins(1);

/// How many layers stay mounted without a container.
const KEEP: &str = "lcow.mount.keep";

/// A plugin process with its own directory; ended and cleaned up on drop, mounts included.
pub(crate) struct Plugin {
    child: Child,
    pub(crate) folder: PathBuf,
    pub(crate) arguments: Vec<String>,
    environment: Vec<(String, PathBuf)>,
    /// The home that Init will name.
    pub(crate) home: PathBuf,
    /// The command that the next start goes through: a tracer that becomes the program.
    pub(crate) launcher: Vec<String>,
    _temporary: tempfile::TempDir,
}

impl Plugin {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_in(arguments, &[])
    }

    /// Starts a plugin with its own environment variables.
    pub(crate) fn start_in(arguments: &[&str], environment: &[(&str, &Path)]) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        // Links are resolved on unix only: Windows would give a verbatim path.
        let folder = temporary.path().to_owned();
        #[cfg(unix)]
        let folder = folder.canonicalize().unwrap();
        let mut arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        // Most tests look at the mount table right after the last Put.
        if !arguments.iter().any(|argument| argument.starts_with(KEEP)) {
            arguments.extend(["--storage-opt".to_owned(), format!("{KEEP}=0")]);
        }
        let environment: Vec<_> =
            environment.iter().map(|(name, value)| ((*name).to_owned(), value.to_path_buf())).collect();
        let child = Self::spawn(&folder, &arguments, &environment, &[]);
        let home = folder.join("home");
        let plugin =
            Self { child, folder, arguments, environment, home, launcher: Vec::new(), _temporary: temporary };
        plugin.wait_until_ready();
        plugin
    }

    fn spawn(
        folder: &Path,
        arguments: &[String],
        environment: &[(String, PathBuf)],
        launcher: &[String],
    ) -> Child {
        let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).unwrap();
        let words = launcher.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_lcow-graphdriver")]);
        let words: Vec<&str> = words.collect();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args(["serve", "--root"])
            .arg(folder.join("root"))
            .arg(FLAG)
            .arg(transport::address(folder));
        transport::prepare(&mut command);
        command
            .args(arguments)
            .env("RUST_LOG", "lcow_graphdriver=debug,info")
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn wait_until_ready(&self) {
        let begin = Instant::now();
        while transport::connect(&self.socket()).is_err() {
            assert!(begin.elapsed() < READY, "the plugin does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The socket, or the pipe.
    pub(crate) fn socket(&self) -> PathBuf {
        transport::address(&self.folder)
    }

    /// A connection whose reads time out.
    pub(crate) fn connect(&self) -> Stream {
        transport::connect(&self.socket()).unwrap()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.home.clone()
    }

    /// kill -9 and a new process on the same directories.
    pub(crate) fn kill_and_restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGSTOP: it accepts no connections, and the system queues them.
    #[cfg(target_os = "linux")]
    pub(crate) fn pause(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }

    /// kill -9 to its workers; false if there is none.
    #[cfg(target_os = "linux")]
    pub(crate) fn kill_workers(&self) -> bool {
        use rustix::process::{Pid, Signal, kill_process};
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid())) else { return false };
        let mut killed = false;
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            for pid in children.split_ascii_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
                killed |= kill_process(pid, Signal::KILL).is_ok();
            }
        }
        killed
    }

    /// SIGTERM (Windows: Ctrl+Break); the exit status.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        transport::ask_to_stop(&self.child);
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begin.elapsed() < READY, "the plugin does not stop:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A new process on the same directories, after a stop or a kill.
    pub(crate) fn start_again(&mut self) {
        self.child = Self::spawn(&self.folder, &self.arguments, &self.environment, &self.launcher);
        // A worker that a killed plugin was just forking holds its socket for a moment: a connection alone proves nothing.
        let begin = Instant::now();
        while !self.answers() {
            assert!(begin.elapsed() < READY, "the plugin does not answer:\n{}", self.log());
            // For the same reason it may find the address in use.
            if self.child.try_wait().unwrap().is_some() {
                self.child = Self::spawn(&self.folder, &self.arguments, &self.environment, &self.launcher);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn answers(&self) -> bool {
        let request = b"POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n";
        let asked = transport::connect(&self.socket()).and_then(|mut stream| {
            stream.write_all(request)?;
            Reply::read(stream)
        });
        asked.is_ok_and(|reply| reply.status == 200)
    }

    /// Init with this plugin's usual home.
    pub(crate) fn init(&self) {
        let home = self.home();
        self.ok(
            "GraphDriver.Init",
            &serde_json::json!({"Home": home, "Opts": null, "UIDMaps": null, "GIDMaps": null}),
        );
    }

    /// A call that must succeed; its reply.
    pub(crate) fn ok(&self, method: &str, request: &Value) -> Value {
        let reply = self.call(method, request);
        assert_eq!(reply.status, 200, "{method} {request}: {}\n{}", reply.text(), self.log());
        let value = reply.json();
        assert_eq!(
            value.get("Err").and_then(Value::as_str).unwrap_or(""),
            "",
            "{method} {request}\n{}",
            self.log()
        );
        value
    }

    /// A call that must fail; its `Err`.
    pub(crate) fn err(&self, method: &str, request: &Value) -> String {
        let reply = self.call(method, request);
        assert_ne!(reply.status, 200, "{method} {request} worked: {}", reply.text());
        reply.json()["Err"].as_str().unwrap().to_owned()
    }

    pub(crate) fn call(&self, method: &str, request: &Value) -> Reply {
        self.send(method, format!("{request}\n").as_bytes())
    }

    /// A POST as dockerd's client makes it: no Content-Type, an empty Host.
    pub(crate) fn send(&self, method: &str, body: &[u8]) -> Reply {
        let head = format!(
            "POST /{method} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {}\r\n\
             Accept: application/vnd.docker.plugins.v1.2+json\r\nAccept-Encoding: gzip\r\n\r\n",
            body.len()
        );
        self.raw(&[head.as_bytes(), body].concat())
    }

    /// Sends any bytes; returns the reply.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        // A server that answers before it has read everything may close its side early.
        let _ = stream.write_all(bytes);
        Reply::read(stream).unwrap_or_else(|e| panic!("no reply: {e}\n{}", self.log()))
    }

    /// ApplyDiff with a chunked body.
    pub(crate) fn apply(&self, id: &str, parent: &str, tar: &[u8]) -> Reply {
        let mut stream = self.begin_apply(id, parent);
        // A failed layer may be refused before its end.
        let _ = send_chunks(&mut stream, tar, 1000).and_then(|()| stream.write_all(b"0\r\n\r\n"));
        Reply::read(stream).unwrap_or_else(|e| panic!("no reply: {e}\n{}", self.log()))
    }

    /// The head of an ApplyDiff; the body is the caller's.
    pub(crate) fn begin_apply(&self, id: &str, parent: &str) -> Stream {
        let mut stream = self.connect();
        write!(
            stream,
            "POST /GraphDriver.ApplyDiff?id={id}&parent={parent} HTTP/1.1\r\nHost: plugin.moby.localhost\r\n\
             Transfer-Encoding: chunked\r\n\r\n"
        )
        .unwrap();
        stream
    }

    /// Create + ApplyDiff that must work; the size.
    pub(crate) fn layer(&self, id: &str, parent: &str, tar: &[u8]) -> u64 {
        self.ok("GraphDriver.Create", &serde_json::json!({"ID": id, "Parent": parent}));
        let reply = self.apply(id, parent, tar);
        assert_eq!(reply.status, 200, "ApplyDiff {id}: {}\n{}", reply.text(), self.log());
        reply.json()["Size"].as_u64().unwrap()
    }

    /// Diff that must work: the tar.
    pub(crate) fn diff(&self, id: &str, parent: &str) -> Vec<u8> {
        let reply = self.call("GraphDriver.Diff", &serde_json::json!({"ID": id, "Parent": parent}));
        assert_eq!(reply.status, 200, "Diff {id}: {}\n{}", reply.text(), self.log());
        assert!(reply.complete, "the diff was cut\n{}", self.log());
        reply.body
    }

    pub(crate) fn get(&self, id: &str) -> PathBuf {
        PathBuf::from(self.ok("GraphDriver.Get", &serde_json::json!({"ID": id}))["Dir"].as_str().unwrap())
    }

    pub(crate) fn put(&self, id: &str) {
        self.ok("GraphDriver.Put", &serde_json::json!({"ID": id}));
    }

    /// Waits until a layer's `layer.json` has a state.
    pub(crate) fn wait_for_state(&self, id: &str, state: &str) {
        let (path, begin) = (self.home().join(id).join("layer.json"), std::time::Instant::now());
        let is = |text: &[u8]| {
            serde_json::from_slice::<serde_json::Value>(text).is_ok_and(|meta| meta["state"] == state)
        };
        while !std::fs::read(&path).is_ok_and(|text| is(&text)) {
            assert!(begin.elapsed() < REPLY, "layer {id} does not become {state}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn remove(&self, id: &str) {
        self.ok("GraphDriver.Remove", &serde_json::json!({"ID": id}));
    }

    /// Mount points below this plugin's directory now.
    #[cfg(windows)]
    #[cfg_attr(not(target_os = "linux"), expect(clippy::unused_self, reason = "only Linux has mounts"))]
    pub(crate) fn mounts(&self) -> Vec<String> {
        Vec::new()
    }

    /// Mount points below this plugin's directory now.
    #[cfg(unix)]
    pub(crate) fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let prefix = self.folder.to_str().unwrap();
        table
            .lines()
            .filter_map(|l| l.split(' ').nth(4))
            .filter(|p| p.starts_with(prefix))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A frozen file system would outlive its mounts.
        #[cfg(target_os = "linux")]
        for point in self.mounts() {
            let _ = lcow_sys::linux::freeze::thaw(Path::new(&point));
        }
        // Latest mounts first: views before the disks below them, stacked ones once each.
        #[cfg(unix)]
        for point in self.mounts().into_iter().rev() {
            let _ = rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH);
        }
        #[cfg(target_os = "linux")]
        leftovers::release_all_below(&self.folder);
    }
}

/// Sends bytes as HTTP chunks.
pub(crate) fn send_chunks(stream: &mut Stream, bytes: &[u8], size: usize) -> io::Result<()> {
    for chunk in bytes.chunks(size) {
        stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes())?;
        stream.write_all(chunk)?;
        stream.write_all(b"\r\n")?;
    }
    Ok(())
}

/// A reply as it was received.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    /// The body ended as HTTP requires (last chunk, or all of Content-Length).
    pub(crate) complete: bool,
}

impl Reply {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {}", self.text()))
    }

    pub(crate) fn read(stream: Stream) -> io::Result<Self> {
        let mut input = BufReader::new(stream);
        let mut head = String::new();
        loop {
            let mut line = String::new();
            if input.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if line == "\r\n" {
                break;
            }
            head.push_str(&line);
        }
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        let lower = head.to_ascii_lowercase();
        let mut body = Vec::new();
        let complete = if lower.contains("transfer-encoding: chunked") {
            read_chunks(&mut input, &mut body).is_ok()
        } else {
            let length = lower
                .lines()
                .find_map(|l| l.strip_prefix("content-length: ")?.trim().parse::<usize>().ok())
                .unwrap_or(0);
            body.resize(length, 0);
            input.read_exact(&mut body).is_ok()
        };
        Ok(Self { status, head, body, complete })
    }
}

fn read_chunks(input: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let size = usize::from_str_radix(line.trim(), 16).map_err(|_| io::ErrorKind::InvalidData)?;
        let start = body.len();
        body.resize(start + size, 0);
        if let Err(e) = input.read_exact(&mut body[start..]) {
            // How much of it was received is not reported.
            body.truncate(start);
            return Err(e);
        }
        input.read_line(&mut String::new())?;
        if size == 0 {
            return Ok(());
        }
    }
}

/// A small tar writer for tests: plain ustar, written by hand so that odd streams can be made as well.
#[derive(Default)]
pub(crate) struct Tar {
    pub(crate) bytes: Vec<u8>,
}

impl Tar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn entry(mut self, name: &str, kind: u8, mode: u32, link: &str, data: &[u8]) -> Self {
        let mut header = [0u8; 512];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{:011o}", data.len()));
        put(136, "14735672000");
        put(148, "        ");
        put(157, link);
        put(257, "ustar\x0000");
        header[156] = kind;
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(name, b'0', 0o644, "", data)
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.entry(name, b'5', 0o755, "", b"")
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }
}

/// Bytes that do not compress and do not repeat, the same for a seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
