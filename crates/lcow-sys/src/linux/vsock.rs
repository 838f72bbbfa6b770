//! The guest's side of sockets between guest and host (vsock(7)): Hyper-V's `hv_sock`, `virtio-vsock`, loopback.
//!
//! ```text
//!   connect(cid 2 = host, port) ─► File: a stream of bytes, both ways
//! ```
//!
//! Called by `svm-agent` in a guest.

use super::{Context, SysError};
use std::{
    fs::File,
    io,
    mem::{size_of, zeroed},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// The context id of the host (`VMADDR_CID_HOST`, include/uapi/linux/vm_sockets.h).
pub const HOST: u32 = libc::VMADDR_CID_HOST;
/// The context id of this kernel (`VMADDR_CID_LOCAL`), if it has the module `vsock_loopback`.
pub const LOCAL: u32 = libc::VMADDR_CID_LOCAL;

/// Connects a stream. The kernel gives up after two seconds (vsock(7), `SO_VM_SOCKETS_CONNECT_TIMEOUT`).
///
/// # Errors
/// [`SysError::Os`]: `ENODEV` or `EAFNOSUPPORT` while no transport is loaded, `ECONNREFUSED` or `ECONNRESET` if there is no
/// listener, `ETIMEDOUT`.
pub fn connect(cid: u32, port: u32) -> Result<File, SysError> {
    let shown = || format!("{cid}:{port:#x}");
    let socket = open().context("open a socket to", shown())?;
    let address = address(cid, port);
    // SAFETY: the address is initialized and has the given length; the call only reads it.
    let r = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) };
    if r != 0 {
        return Err(io::Error::last_os_error()).context("connect to", shown());
    }
    Ok(File::from(socket))
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn open() -> io::Result<OwnedFd> {
    // SAFETY: the arguments are plain numbers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the descriptor is open and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: the structure consists of plain numbers, for which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// A listener on this kernel's loopback.
    fn listen(port: u32) -> OwnedFd {
        let socket = open().expect("this kernel has no vsock");
        let address = address(LOCAL, port);
        // SAFETY: as in `connect`.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) };
        let e = io::Error::last_os_error();
        assert_eq!(bound, 0, "{e}: without vsock_loopback (CONFIG_VSOCKETS_LOOPBACK) there is no loopback");
        // SAFETY: the arguments are plain numbers.
        assert_eq!(unsafe { libc::listen(socket.as_raw_fd(), 1) }, 0);
        socket
    }

    #[test]
    #[ignore = "needs a kernel with vsock_loopback; scripts/test runs it where there is one"]
    fn a_stream_carries_bytes_both_ways() {
        let port = 0x4c43_0000 | (std::process::id() & 0xffff);
        let listener = listen(port);
        let far = std::thread::spawn(move || {
            // SAFETY: the address of the peer is not requested.
            let fd =
                unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            // SAFETY: the call succeeded, so the descriptor is open and nothing else owns it.
            let mut stream = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
            let mut word = [0; 4];
            stream.read_exact(&mut word).unwrap();
            stream.write_all(&word).unwrap();
        });
        let mut stream = connect(LOCAL, port).unwrap();
        stream.write_all(b"ping").unwrap();
        let mut word = [0; 4];
        stream.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"ping");
        assert_eq!(stream.read(&mut word).unwrap(), 0, "the end of the stream");
        far.join().unwrap();
    }

    #[test]
    fn a_connection_without_a_listener_is_an_error_that_names_the_address() {
        let error = connect(LOCAL, 0x4c43_ffff).unwrap_err();
        assert!(error.to_string().contains("1:0x4c43ffff"), "{error}");
    }
}
