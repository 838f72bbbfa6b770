//! The daemon's end of a worker's control socket.
//!
//! ```text
//!   call ─► lock ─► send(request seq, descriptors) ─► receive until reply seq
//! ```
//!
//! One call at a time; a caller that gave up between request and reply leaves a stale reply, which the next caller
//! recognizes by its number and drops. Called by `embedded`.

use lcow_sys::linux::{asyncfd, fdpass};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};
use svm_protocol::{
    Control, ControlReply, ControlRequest, FrameType, Hello,
    worker::{MAX_CONTROL, parse_message},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Mutex,
};

/// The daemon's end.
pub(super) struct ControlClient {
    state: Mutex<State>,
}

struct State {
    socket: AsyncFd<OwnedFd>,
    seq: u64,
    buffer: Vec<u8>,
}

impl ControlClient {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let socket = asyncfd::watch(socket, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { state: Mutex::new(State { socket, seq: 0, buffer: vec![0; MAX_CONTROL] }) })
    }

    /// Waits for the worker's greeting.
    pub(super) async fn hello(&self) -> io::Result<Hello> {
        let mut state = self.state.lock().await;
        match state.receive().await? {
            (FrameType::Hello, payload) => Ok(serde_json::from_slice(&payload)?),
            (other, _) => Err(unexpected(other)),
        }
    }

    /// Sends a request and waits for the reply.
    pub(super) async fn call(&self, control: Control, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut state = self.state.lock().await;
        state.seq += 1;
        let seq = state.seq;
        let payload = serde_json::to_vec(&ControlRequest { seq, control })?;
        let mut message = svm_protocol::header(FrameType::Control, payload.len()).to_vec();
        message.extend_from_slice(&payload);
        state.send(&message, fds).await?;
        loop {
            let reply: ControlReply = match state.receive().await? {
                (FrameType::Reply, payload) => serde_json::from_slice(&payload)?,
                (other, _) => return Err(unexpected(other)),
            };
            match reply.error {
                _ if reply.seq < seq => {}
                _ if reply.seq > seq => return Err(io::Error::other("reply to a request never made")),
                Some(e) => return Err(io::Error::other(e)),
                None => return Ok(()),
            }
        }
    }
}

fn unexpected(kind: FrameType) -> io::Error {
    io::Error::other(format!("unexpected {kind:?} frame on the control channel"))
}

impl State {
    async fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.socket.async_io(Interest::WRITABLE, |s| fdpass::send(s.as_fd(), message, fds)).await
    }

    async fn receive(&mut self) -> io::Result<(FrameType, Vec<u8>)> {
        let Self { socket, buffer, .. } = self;
        // Descriptors from a worker are never wanted; they are closed as they are dropped here.
        let received = socket.async_io(Interest::READABLE, |s| fdpass::receive(s.as_fd(), buffer)).await;
        let (n, _) = received?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "control channel closed"));
        }
        let (kind, payload) = parse_message(&buffer[..n]).map_err(io::Error::other)?;
        Ok((kind, payload.to_vec()))
    }
}
