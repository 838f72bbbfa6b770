//! The streams of an operation as frames: a tar that comes in, bytes that go out.
//!
//! ```text
//!   channel ─► Data, Data, End ─► TarFrames ─► FrameInput ─► codec           a request in mid-stream (`ask`) keeps the
//!   channel ◄─ Data, Data ◄────── FrameOutput ◄──────────── codec           Data that come before its Resume
//! ```
//!
//! Bytes are read straight into the codec's buffer. An error leaves no short frame behind: a frame that was announced is
//! filled or the channel is broken. Called by `operation`.

use super::{
    channel::{AgentChannel, Conn, sending},
    codec::ToldDigest,
};
use disk_io::{ReadAt, StreamOut};
use std::{
    cell::RefCell,
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    time::Duration,
};
use svm_protocol::{
    DATA_PAYLOAD, ErrorKind, FrameType, HEADER_LEN, OperationEvent, WireError, read_frame, write_frame,
    write_json,
};

/// The most bytes of a digest's text.
const MAX_DIGEST_TEXT: usize = 128;

/// The most bytes of tar that are kept while waiting for a Resume. The daemon stops sending once it has seen the event, so
/// this bounds what is in transit.
const MAX_KEPT: usize = 64 << 20;
/// With more bytes than this, the daemon is given time to see the event.
const KEPT_AT_ONCE: usize = 4 << 20;
/// That time, for each frame.
const PATIENCE: Duration = Duration::from_millis(20);

/// The stream that comes in: Data frames up to End.
pub(super) struct TarFrames<'a> {
    channel: &'a dyn AgentChannel,
    /// Present if the daemon digests; set from its End.
    pub(super) told: Option<ToldDigest>,
    left: usize,
    end: bool,
    pub(super) broken: bool,
    /// Data that came before a Resume.
    kept: VecDeque<u8>,
}

/// [`TarFrames`] as the codec reads them.
pub(super) struct FrameInput<'f, 'a>(pub(super) &'f RefCell<TarFrames<'a>>);

impl Read for FrameInput<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buf)
    }
}

impl<'a> TarFrames<'a> {
    pub(super) fn new(channel: &'a dyn AgentChannel) -> Self {
        let told = channel.daemon_digests().then(ToldDigest::default);
        Self { told, ..Self::undigested(channel) }
    }

    /// A stream that the daemon never digests: that of a recoding.
    pub(super) fn undigested(channel: &'a dyn AgentChannel) -> Self {
        Self { channel, told: None, left: 0, end: false, broken: false, kept: VecDeque::new() }
    }

    /// Sends an event in mid-stream; gives the payload of its Resume. Data that precede it are kept.
    pub(super) fn ask(&mut self, event: OperationEvent) -> Result<Vec<u8>, WireError> {
        write_json(&mut Conn(self.channel), FrameType::Event, &event).map_err(|e| sending(&e))?;
        // The daemon needs time to see the event before the channel is emptied.
        std::thread::sleep(PATIENCE);
        let answer = self.until_resume();
        self.broken |= answer.is_err();
        answer.map_err(|e| WireError::new(ErrorKind::Cancelled, format!("waiting for Resume: {e}")))
    }

    fn until_resume(&mut self) -> io::Result<Vec<u8>> {
        let mut payload = Vec::new();
        loop {
            if self.left > 0 {
                self.keep_frame()?;
            }
            match read_frame(&mut Conn(self.channel), &mut payload).map_err(io::Error::other)? {
                FrameType::Resume => return Ok(payload),
                FrameType::Data if !self.end => self.kept.extend(&payload),
                FrameType::End if !self.end && payload.len() <= MAX_DIGEST_TEXT => {
                    self.take_digest(&payload)?;
                    self.end = true;
                }
                other => {
                    return Err(io::Error::other(format!("{other:?} frame where a Resume was expected")));
                }
            }
            if self.kept.len() > MAX_KEPT {
                return Err(io::Error::other("the tar continues where a Resume was expected"));
            }
            if self.kept.len() > KEPT_AT_ONCE {
                std::thread::sleep(PATIENCE);
            }
        }
    }

    /// Keeps the rest of the current frame.
    fn keep_frame(&mut self) -> io::Result<()> {
        let mut rest = vec![0; std::mem::take(&mut self.left)];
        Conn(self.channel).read_exact(&mut rest)?;
        self.kept.extend(&rest);
        Ok(())
    }

    /// Whether the stream is read to its explicit end (looks at the next frame if there is one).
    pub(super) fn ended(&mut self) -> bool {
        self.end || matches!(self.read(&mut [0]), Ok(0))
    }

    fn next_frame(&mut self) -> io::Result<()> {
        let mut head = [0; HEADER_LEN];
        Conn(self.channel).read_exact(&mut head)?;
        match svm_protocol::parse_header(head).map_err(io::Error::other)? {
            (FrameType::Data, 0) => return Err(io::Error::other("a data frame with 0 bytes")),
            (FrameType::Data, len) => self.left = len,
            (FrameType::End, len) if len <= MAX_DIGEST_TEXT => {
                let mut text = vec![0; len];
                Conn(self.channel).read_exact(&mut text)?;
                self.take_digest(&text)?;
                self.end = true;
            }
            (other, _) => return Err(io::Error::other(format!("{other:?} frame inside the tar's stream"))),
        }
        Ok(())
    }

    /// If the daemon digests, End carries the digest; otherwise it is empty.
    fn take_digest(&self, text: &[u8]) -> io::Result<()> {
        let bad = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
        match &self.told {
            None if text.is_empty() => Ok(()),
            None => Err(bad("an unexpected digest at the tar's end")),
            Some(told) => {
                let text =
                    std::str::from_utf8(text).map_err(|_| bad("the tar's end carries no valid digest"))?;
                let digest = text.parse().map_err(|e| bad(&format!("the tar's end: {e}")))?;
                // Read once: End is the last frame.
                told.set(digest).map_err(|_| bad("a second end of the tar"))
            }
        }
    }
}

impl Read for TarFrames<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if !self.kept.is_empty() {
            let n = self.kept.read(buf)?;
            if self.kept.is_empty() {
                self.kept = VecDeque::new();
            }
            return Ok(n);
        }
        let got = (|| {
            while self.left == 0 && !self.end {
                self.next_frame()?;
            }
            if self.end {
                return Ok(0);
            }
            let want = buf.len().min(self.left);
            match self.channel.receive(&mut buf[..want])? {
                0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                n => Ok(n),
            }
        })();
        match got {
            Ok(n) => {
                self.left = self.left.saturating_sub(n);
                Ok(n)
            }
            Err(e) => {
                if e.kind() != io::ErrorKind::Interrupted {
                    self.broken = true;
                }
                Err(e)
            }
        }
    }
}

/// The stream that goes out: Data frames of at most [`DATA_PAYLOAD`].
pub(super) struct FrameOutput<'a> {
    channel: &'a dyn AgentChannel,
    buffer: Vec<u8>,
}

impl<'a> FrameOutput<'a> {
    pub(super) fn new(channel: &'a dyn AgentChannel) -> Self {
        Self { channel, buffer: Vec::new() }
    }

    pub(super) fn finish(&mut self) -> Result<(), WireError> {
        self.flush().map_err(|e| sending(&e))
    }
}

impl Write for FrameOutput<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.buffer.is_empty() && buf.len() >= DATA_PAYLOAD {
            // A full frame is sent without a copy.
            write_frame(&mut Conn(self.channel), FrameType::Data, &buf[..DATA_PAYLOAD])?;
            return Ok(DATA_PAYLOAD);
        }
        if self.buffer.capacity() == 0 {
            self.buffer.reserve_exact(DATA_PAYLOAD);
        }
        let n = buf.len().min(DATA_PAYLOAD - self.buffer.len());
        self.buffer.extend_from_slice(&buf[..n]);
        if self.buffer.len() == DATA_PAYLOAD {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            write_frame(&mut Conn(self.channel), FrameType::Data, &self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }
}

impl StreamOut for FrameOutput<'_> {
    fn splice(&mut self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
        if !self.channel.sends_files() || len == 0 {
            return Ok(0);
        }
        self.flush()?;
        let len = len.min(DATA_PAYLOAD as u64);
        Conn(self.channel).write_all(&svm_protocol::header(FrameType::Data, len as usize))?;
        let mut sent = 0;
        while sent < len {
            match self.channel.send_file(file, offset + sent, len - sent)? {
                0 => break,
                n => sent += n,
            }
        }
        // The header announced a full frame: what could not be spliced is read and written.
        if sent < len {
            let mut rest = vec![0; (len - sent) as usize];
            file.read_exact_at(&mut rest, offset + sent)?;
            Conn(self.channel).write_all(&rest)?;
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::IoSlice, sync::Mutex};

    /// What a channel does when it is to send a file.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// Takes one in so many of the bytes, at least one.
        Part(u64),
        /// Takes nothing: the system can't go on.
        Nothing,
        Fails,
    }

    /// A daemon's end that takes files by halves, and other bytes in small pieces.
    struct Fake {
        steps: Mutex<VecDeque<Step>>,
        sent: Mutex<Vec<u8>>,
    }

    impl AgentChannel for Fake {
        fn receive(&self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }

        fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
            /// No divisor of anything here.
            const MOST: usize = 7_777;
            let all: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).take(MOST).collect();
            self.sent.lock().unwrap().extend_from_slice(&all);
            Ok(all.len())
        }

        fn peer_gone(&self) -> bool {
            false
        }

        fn send_file(&self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
            // Behind the last step: all at once.
            let n = match self.steps.lock().unwrap().pop_front().unwrap_or(Step::Part(1)) {
                Step::Part(parts) => (len / parts).max(1),
                Step::Nothing => 0,
                Step::Fails => return Err(io::ErrorKind::ConnectionReset.into()),
            };
            let mut bytes = vec![0; n as usize];
            file.read_exact_at(&mut bytes, offset)?;
            self.sent.lock().unwrap().extend_from_slice(&bytes);
            Ok(n)
        }

        fn sends_files(&self) -> bool {
            true
        }
    }

    impl Fake {
        fn new(steps: &[Step]) -> Self {
            Self { steps: Mutex::new(steps.iter().copied().collect()), sent: Mutex::default() }
        }

        /// What the frames carried.
        fn content(&self) -> Vec<u8> {
            let sent = self.sent.lock().unwrap();
            let (mut rest, mut frame, mut all) = (sent.as_slice(), Vec::new(), Vec::new());
            while !rest.is_empty() {
                assert_eq!(read_frame(&mut rest, &mut frame).unwrap(), FrameType::Data);
                assert!(!frame.is_empty() && frame.len() <= DATA_PAYLOAD, "{} bytes", frame.len());
                all.extend_from_slice(&frame);
            }
            all
        }
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_frame_that_was_sent_in_part_is_filled_up_with_the_right_bytes() {
        const BEGIN: usize = 4_099;
        let bytes: Vec<u8> = (0..BEGIN + 2 * DATA_PAYLOAD + 1234).map(|n| (n / 251 + n) as u8).collect();
        let file = file_of(&bytes);
        let cases: [&[Step]; 9] = [
            &[],
            &[Step::Nothing],
            &[Step::Part(2)],
            &[Step::Part(2), Step::Nothing],
            &[Step::Part(2), Step::Part(3), Step::Nothing],
            &[Step::Part(u64::MAX), Step::Nothing],
            // The first frame whole, the second not at all or in part, the third in part.
            &[Step::Part(1), Step::Nothing, Step::Part(2), Step::Nothing],
            &[Step::Part(1), Step::Part(2), Step::Nothing, Step::Part(3), Step::Nothing],
            // All but little, and then nothing.
            &[Step::Part(2), Step::Part(2), Step::Part(2), Step::Part(1)],
        ];
        for steps in cases {
            let fake = Fake::new(steps);
            let mut out = FrameOutput::new(&fake);
            out.write_all(b"before").unwrap();
            let mut at = BEGIN;
            while at < bytes.len() {
                let n = out.splice(&file, at as u64, (bytes.len() - at) as u64).unwrap() as usize;
                assert_eq!(n, DATA_PAYLOAD.min(bytes.len() - at), "{steps:?}");
                at += n;
            }
            out.write_all(b"behind").unwrap();
            out.finish().unwrap();
            let expected = [b"before", &bytes[BEGIN..], b"behind"].concat();
            assert!(fake.content() == expected, "{steps:?}");
        }
    }

    #[test]
    fn a_promised_frame_that_can_not_be_filled_is_an_error_and_no_short_frame() {
        let file = file_of(&[7; 1000]);
        let splice = |steps: &[Step], len| FrameOutput::new(&Fake::new(steps)).splice(&file, 0, len);
        // The file ends before the frame does.
        let e = splice(&[Step::Part(2), Step::Nothing], 1500).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
        let e = splice(&[Step::Part(2), Step::Fails], 1000).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
    }
}
