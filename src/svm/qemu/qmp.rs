//! QEMU's machine protocol: one JSON object a line, commands by number, descriptors beside them.
//!
//! ```text
//!   {"execute": "add-fd", "id": 7, …} + SCM_RIGHTS ─►      ◄─ {"return": …, "id": 7} │ {"error": …}      ◄─ {"event": …}
//! ```
//!
//! JSON is serde's. Replies find their command by id; events are kept for those who wait. What comes from QEMU is
//! bounded and not trusted. Called by `vm` and `template`.

use lcow_sys::linux::fdpass;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{broadcast, oneshot},
};

/// Longest line that is taken; bytes.
const MAX_LINE: usize = 1 << 20;
/// Events kept for a waiter that is late.
const EVENTS: usize = 1024;

/// QEMU's reply to a command.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// It refused.
    #[error("qemu refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// The monitor is gone.
    #[error("qemu's monitor: {0}")]
    Broken(String),
}

#[derive(Debug, Deserialize)]
struct Message {
    id: Option<u64>,
    #[serde(rename = "return")]
    ok: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    data: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// An event.
#[derive(Debug, Clone)]
pub(super) struct QmpEvent {
    /// `DEVICE_DELETED`, …
    pub(super) name: String,
    /// Its details.
    pub(super) data: Value,
}

type Waiters = Mutex<Option<HashMap<u64, oneshot::Sender<Message>>>>;

/// A monitor.
pub(super) struct Qmp {
    stream: Arc<UnixStream>,
    /// `None` once the monitor is gone.
    waiters: Arc<Waiters>,
    events: broadcast::Sender<QmpEvent>,
    next: AtomicU64,
    sending: tokio::sync::Mutex<()>,
}

impl Qmp {
    /// Takes over a monitor's socket and leaves its greeting mode.
    pub(super) async fn start(socket: OwnedFd) -> Result<Self, QmpError> {
        let broken = |e: io::Error| QmpError::Broken(e.to_string());
        let stream = StdStream::from(socket);
        stream.set_nonblocking(true).map_err(broken)?;
        let stream = Arc::new(UnixStream::from_std(stream).map_err(broken)?);
        let waiters: Arc<Waiters> = Arc::new(Mutex::new(Some(HashMap::new())));
        let events = broadcast::channel(EVENTS).0;
        let (input, table, told) = (stream.clone(), waiters.clone(), events.clone());
        tokio::spawn(async move {
            let _ = read(&input, &table, &told).await;
            table.lock().take();
        });
        let qmp =
            Self { stream, waiters, events, next: AtomicU64::new(1), sending: tokio::sync::Mutex::default() };
        qmp.run("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Events from now on.
    pub(super) fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }

    /// Runs a command.
    pub(super) async fn run(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.run_with(command, arguments, &[]).await
    }

    /// Runs a command that takes descriptors.
    pub(super) async fn run_with(
        &self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, QmpError> {
        let gone = || QmpError::Broken("it is closed".into());
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiters.lock().as_mut().ok_or_else(gone)?.insert(id, sender);
        let mut line =
            json!({ "execute": command, "arguments": arguments, "id": id }).to_string().into_bytes();
        line.push(b'\n');
        self.send(&line, fds).await.map_err(|e| QmpError::Broken(e.to_string()))?;
        let reply = answer.await.map_err(|_| gone())?;
        match reply.error {
            Some(e) => {
                Err(QmpError::Refused { command: command.into(), class: e.class, description: e.desc })
            }
            None => Ok(reply.ok.unwrap_or(Value::Null)),
        }
    }

    async fn send(&self, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _whole_lines = self.sending.lock().await;
        let stream = &*self.stream;
        // Commands are much smaller than a socket's buffer, so a stream socket accepts them completely or not at all.
        stream.async_io(Interest::WRITABLE, || fdpass::send(stream.as_fd(), line, fds)).await
    }
}

async fn read(
    stream: &UnixStream,
    waiters: &Waiters,
    events: &broadcast::Sender<QmpEvent>,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        stream.readable().await?;
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(e),
        }
        while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            // The greeting has none of the fields and falls through.
            let Ok(message) = serde_json::from_slice::<Message>(&line) else { continue };
            if let Some(name) = message.event {
                tracing::trace!(name, "qemu event");
                // There may be no listener.
                let _ = events.send(QmpEvent { name, data: message.data.unwrap_or_default() });
            } else if let Some(id) = message.id
                && let Some(waiter) = waiters.lock().as_mut().and_then(|w| w.remove(&id))
            {
                let _ = waiter.send(message);
            }
        }
        if buffer.len() > MAX_LINE {
            return Err(io::Error::other("line too long"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::fd::AsRawFd};

    #[tokio::test]
    async fn replies_find_their_commands_and_events_their_waiters() {
        let (ours, theirs) = fdpass::stream_pair(64 << 10).unwrap();
        let peer = std::thread::spawn(move || {
            let mut theirs = StdStream::from(theirs);
            theirs.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").unwrap();
            let mut fds = Vec::new();
            let mut seen = 0;
            let mut buffer = vec![0; 65536];
            while seen < 3 {
                let (n, more) = fdpass::receive(theirs.as_fd(), &mut buffer).unwrap();
                if n == 0 {
                    break;
                }
                fds.extend(more);
                for line in buffer[..n].split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                    seen += 1;
                    let command: Value = serde_json::from_slice(line).unwrap();
                    let id = &command["id"];
                    let answer = match command["execute"].as_str().unwrap() {
                        "bad" => {
                            json!({"error": {"class": "GenericError", "desc": "no such thing"}, "id": id})
                        }
                        _ => json!({"return": {"n": seen}, "id": id}),
                    };
                    let event = json!({"event": "DEVICE_DELETED", "data": {"device": "d1"}, "timestamp": {}});
                    theirs.write_all(format!("{event}\r\n{answer}\r\n").as_bytes()).unwrap();
                }
            }
            assert!(fds.len() == 1 && fds[0].as_raw_fd() > 2);
        });
        let qmp = Qmp::start(ours).await.unwrap();
        let mut events = qmp.events();
        let file = tempfile::tempfile().unwrap();
        let value = qmp.run_with("good", json!({}), &[file.as_fd()]).await.unwrap();
        assert_eq!(value["n"], 2);
        let e = qmp.run("bad", json!({})).await.unwrap_err();
        assert!(matches!(&e, QmpError::Refused { description, .. } if description == "no such thing"), "{e}");
        assert_eq!(events.recv().await.unwrap().data["device"], "d1");
        peer.join().unwrap();
        assert!(matches!(qmp.run("more", json!({})).await, Err(QmpError::Broken(_))));
    }
}
