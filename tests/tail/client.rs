//! A client that treats its tar as dockerd's does: Go's `net/http` transport below moby's `callWithRetry`.
//!
//! ```text
//!   tar (one reader, shared by all tries) ─► 32 KiB copies ─► chunks ─► 4 KiB buffer ─► socket      one thread
//!                                                            reply ◄──────────────────── socket     another
//!   whichever comes first counts: a reply ends the try, a broken write or read starts the next one, with what is left
//! ```

use super::support::{
    Reply,
    transport::{Stream, connect},
};
use std::{
    io::{self, BufWriter, Read, Write},
    path::Path,
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread,
    time::Duration,
};

/// What Go's `io.Copy` reads at a time.
const COPY: usize = 32 << 10;
/// What Go's transport gathers before it writes.
const BUFFER: usize = 4 << 10;
/// What Go's transport waits for the end of a request whose reply has arrived.
const LAST_WAIT: Duration = Duration::from_millis(50);

/// The tar: read once, whoever asks.
#[derive(Clone)]
pub(crate) struct Source(Arc<std::sync::Mutex<Box<dyn Read + Send>>>);

impl Source {
    pub(crate) fn new(reader: impl Read + Send + 'static) -> Self {
        Self(Arc::new(std::sync::Mutex::new(Box::new(reader))))
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap().read(buffer)
    }
}

/// What happened first.
enum First {
    Replied(Reply),
    Broke(io::Error),
}

/// One `http.Client.Do`.
pub(crate) fn send_once(socket: &Path, line: &str, source: &Source) -> io::Result<Reply> {
    let stream = connect(socket)?;
    let (events, first) = channel();
    let writing = thread::spawn({
        let (stream, source, events, line) =
            (stream.try_clone()?, source.clone(), events.clone(), line.to_owned());
        move || {
            if let Err(e) = write(stream, &line, &source) {
                let _ = events.send(First::Broke(e));
            }
        }
    });
    let reading = thread::spawn({
        let stream = stream.try_clone()?;
        move || read(stream, &events)
    });
    let outcome = match first.recv().unwrap() {
        First::Replied(reply) => {
            let begin = std::time::Instant::now();
            while !writing.is_finished() && begin.elapsed() < LAST_WAIT {
                thread::sleep(Duration::from_millis(2));
            }
            Ok(reply)
        }
        First::Broke(e) => Err(e),
    };
    // Go closes a connection whose request did not end.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    writing.join().unwrap();
    reading.join().unwrap();
    outcome
}

fn write(stream: Stream, line: &str, source: &Source) -> io::Result<()> {
    let mut output = BufWriter::with_capacity(BUFFER, stream);
    write!(output, "{line} HTTP/1.1\r\nHost: plugin.moby.localhost\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    let mut buffer = vec![0; COPY];
    loop {
        let read = source.read(&mut buffer)?;
        if read == 0 {
            output.write_all(b"0\r\n\r\n")?;
            return output.flush();
        }
        write!(output, "{read:x}\r\n")?;
        output.write_all(&buffer[..read])?;
        output.write_all(b"\r\n")?;
    }
}

fn read(stream: Stream, events: &Sender<First>) {
    let event = match Reply::read(stream) {
        Ok(reply) if reply.complete => First::Replied(reply),
        Ok(_) => First::Broke(io::ErrorKind::UnexpectedEof.into()),
        Err(e) => First::Broke(e),
    };
    let _ = events.send(event);
}

/// `callWithRetry`: the same source again after each broken connection.
pub(crate) fn send(socket: &Path, line: &str, source: &Source, tries: u32) -> io::Result<Reply> {
    let mut last = io::Error::other("no try");
    for _ in 0..tries {
        match send_once(socket, line, source) {
            Ok(reply) => return Ok(reply),
            Err(e) => last = e,
        }
        thread::sleep(Duration::from_millis(100));
    }
    Err(last)
}

/// The first line of an ApplyDiff.
pub(crate) fn apply_line(id: &str, parent: &str) -> String {
    format!("POST /GraphDriver.ApplyDiff?id={id}&parent={parent}")
}

/// A tar of empty files, which has a header in every block, so that each of its tails is a tar as well.
pub(crate) fn headers_only(files: usize) -> Vec<u8> {
    (0..files).fold(super::support::Tar::new(), |tar, n| tar.file(&format!("f{n:07}"), b"")).end()
}

/// A tar whose first entry is refused and that has `more` bytes behind it, made as they are read.
pub(crate) fn refused_at_once(more: u64) -> impl Read + Send {
    // A header whose checksum is wrong.
    let mut first = super::support::Tar::new().file("evil", b"").bytes;
    first[0] ^= 1;
    io::Cursor::new(first).chain(io::repeat(0x5a).take(more))
}
