//! Messages with descriptors over a socketpair (SCM_RIGHTS).
//!
//! ```text
//!   daemon ── one message = one datagram (SOCK_SEQPACKET) + up to 4 descriptors ──► worker
//! ```
//!
//! Descriptors arrive close-on-exec. A truncated message, or one with more descriptors than there is space for, is an error,
//! so no message is received in part. Called by `svm::embedded` and `svm-agent`.

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

/// Most descriptors in one message.
pub const MAX_FDS: usize = 4;

/// A connected pair of message sockets, both close-on-exec.
///
/// # Errors
/// socketpair(2), for example `EMFILE`.
pub fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// A connected pair of byte-stream sockets, both close-on-exec, with kernel buffers of up to `buffer` bytes each way if
/// permitted.
///
/// # Errors
/// socketpair(2), for example `EMFILE`.
pub fn stream_pair(buffer: usize) -> io::Result<(OwnedFd, OwnedFd)> {
    let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for fd in [&a, &b] {
        // Only affects speed: net.core.wmem_max limits an ordinary user.
        if rustix::net::sockopt::set_socket_send_buffer_size_force(fd, buffer).is_err() {
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(fd, buffer);
        }
    }
    Ok((a, b))
}

/// Sends `message` with `fds` (at most [`MAX_FDS`]).
///
/// # Errors
/// `InvalidInput` for too many descriptors; `WouldBlock` on a non-blocking socket that is full; `BrokenPipe` if the peer is
/// gone; sendmsg(2).
pub fn send(socket: BorrowedFd<'_>, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors in one message"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(socket, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message into `buffer` and returns its length and descriptors. Length 0 without descriptors means that the
/// peer is gone.
///
/// # Errors
/// `InvalidData` for a message that did not fit; `WouldBlock` on a non-blocking socket without a message.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message or its descriptors were truncated",
        ));
    }
    Ok((received.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::fd::AsFd,
    };

    #[test]
    fn a_descriptor_arrives_with_its_message() {
        let (a, b) = message_pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"here").unwrap();
        file.rewind().unwrap();
        send(a.as_fd(), b"take", &[file.as_fd(), file.as_fd()]).unwrap();
        send(a.as_fd(), b"none", &[]).unwrap();
        drop(a);
        let mut buffer = [0; 16];
        let (n, mut fds) = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..n], fds.len()), (&b"take"[..], 2));
        let mut text = String::new();
        File::from(fds.remove(0)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "here");
        let (n, fds) = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((n, fds.len()), (4, 0));
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap().0, 0, "end");
    }

    #[test]
    fn truncated_messages_are_errors() {
        let (a, b) = message_pair().unwrap();
        send(a.as_fd(), &[7; 100], &[]).unwrap();
        let e = receive(b.as_fd(), &mut [0; 10]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidData);
        let fd = a.as_fd();
        assert!(send(fd, b"x", &[fd; MAX_FDS + 1]).is_err());
    }
}
