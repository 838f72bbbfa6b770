//! Hyper-V sockets: streams between this host and a virtual machine, without a network.
//!
//! ```text
//!   Listener::bind(machine, port) ── before the machine starts ──► accept ──► HvStream     guest: AF_VSOCK, CID 2, port
//!   service of a port: PPPPPPPP-facb-11e6-bd58-64006a7986d3        (hvsocket.h: HV_GUID_VSOCK_TEMPLATE)
//! ```
//!
//! Blocking calls. Wine has no such sockets, so only the error path has been run. Called by `svm::hcs`.

use std::{
    io::{self, Read, Write},
    mem,
    os::windows::io::{AsRawSocket, FromRawSocket, OwnedSocket, RawSocket},
    sync::Once,
    time::{Duration, Instant},
};
use windows_sys::Win32::Networking::WinSock::{
    AF_HYPERV, FD_SET, INVALID_SOCKET, SD_BOTH, SOCK_STREAM, SOCKET, SOCKET_ERROR, TIMEVAL,
    WSA_FLAG_NO_HANDLE_INHERIT, WSA_FLAG_OVERLAPPED, WSADATA, WSAGetLastError, WSASocketW, WSAStartup,
    accept, bind, listen, recv, select, send, shutdown,
};

/// `HV_PROTOCOL_RAW`
const PROTOCOL_RAW: i32 = 1;
/// The bytes after the port in the GUID of a service.
const TEMPLATE: [u8; 12] = [0xcb, 0xfa, 0xe6, 0x11, 0xbd, 0x58, 0x64, 0x00, 0x6a, 0x79, 0x86, 0xd3];
/// Winsock 2.2.
const VERSION: u16 = 0x0202;
/// How often a wait checks whether its caller has given up.
const LOOK: Duration = Duration::from_millis(100);

/// `SOCKADDR_HV` of hvsocket.h.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    machine: [u8; 16],
    service: [u8; 16],
}

/// The service of a vsock port, in the memory order of a `GUID`.
fn service(port: u32) -> [u8; 16] {
    let mut guid = [0; 16];
    guid[..4].copy_from_slice(&port.to_le_bytes());
    guid[4..].copy_from_slice(&TEMPLATE);
    guid
}

fn last_error() -> io::Error {
    // SAFETY: no arguments.
    io::Error::from_raw_os_error(unsafe { WSAGetLastError() })
}

fn raw(socket: &OwnedSocket) -> SOCKET {
    socket.as_raw_socket() as SOCKET
}

/// A listener for the agent of one machine.
#[derive(Debug)]
pub struct Listener(OwnedSocket);

impl Listener {
    /// Listens on a vsock port for connections of the machine with this runtime id.
    ///
    /// # Errors
    /// The address family is unsupported if Hyper-V is not enabled.
    pub fn bind(machine: uuid::Uuid, port: u32) -> io::Result<Self> {
        static START: Once = Once::new();
        START.call_once(|| {
            let mut data: WSADATA = WSADATA::default();
            // SAFETY: one structure is written. After a failure the next call fails.
            unsafe { WSAStartup(VERSION, &raw mut data) };
        });
        // SAFETY: the protocol information may be null.
        let socket = unsafe {
            WSASocketW(
                i32::from(AF_HYPERV),
                SOCK_STREAM,
                PROTOCOL_RAW,
                std::ptr::null(),
                0,
                WSA_FLAG_OVERLAPPED | WSA_FLAG_NO_HANDLE_INHERIT,
            )
        };
        if socket == INVALID_SOCKET {
            return Err(last_error());
        }
        // SAFETY: the call succeeded, so the socket is open and ours alone.
        let socket = unsafe { OwnedSocket::from_raw_socket(socket as RawSocket) };
        let address = Address {
            family: AF_HYPERV,
            reserved: 0,
            machine: machine.to_bytes_le(),
            service: service(port),
        };
        // SAFETY: the address has the given length.
        if unsafe { bind(raw(&socket), (&raw const address).cast(), size_of::<Address>() as i32) } != 0 {
            return Err(last_error());
        }
        // SAFETY: the socket is open and bound.
        if unsafe { listen(raw(&socket), 1) } != 0 {
            return Err(last_error());
        }
        Ok(Self(socket))
    }

    /// Accepts the first connection. Gives up after `patience`, or when `given_up` returns true.
    ///
    /// # Errors
    /// `TimedOut`; the socket fails.
    pub fn accept(&self, patience: Duration, given_up: impl Fn() -> bool) -> io::Result<HvStream> {
        let begin = Instant::now();
        loop {
            let mut set = FD_SET { fd_count: 1, ..FD_SET::default() };
            set.fd_array[0] = raw(&self.0);
            let wait = TIMEVAL { tv_sec: 0, tv_usec: LOOK.as_micros() as i32 };
            // SAFETY: the set names one open socket; the other sets may be null.
            let ready = unsafe {
                select(0, &raw mut set, std::ptr::null_mut(), std::ptr::null_mut(), &raw const wait)
            };
            match ready {
                SOCKET_ERROR => return Err(last_error()),
                0 if begin.elapsed() > patience || given_up() => return Err(io::ErrorKind::TimedOut.into()),
                0 => continue,
                _ => {}
            }
            // SAFETY: the socket listens; the address of the peer is not requested.
            let socket = unsafe { accept(raw(&self.0), std::ptr::null_mut(), std::ptr::null_mut()) };
            if socket == INVALID_SOCKET {
                return Err(last_error());
            }
            // SAFETY: the call succeeded, so the socket is open and ours alone.
            return Ok(HvStream(unsafe { OwnedSocket::from_raw_socket(socket as RawSocket) }));
        }
    }
}

/// A connection to an agent. Different threads can read and write at the same time.
#[derive(Debug)]
pub struct HvStream(OwnedSocket);

impl HvStream {
    /// Shuts down both directions; a blocked read returns.
    pub fn close(&self) {
        // SAFETY: the socket is open. It may already be disconnected.
        unsafe { shutdown(raw(&self.0), SD_BOTH) };
    }
}

fn length(bytes: usize) -> i32 {
    i32::try_from(bytes).unwrap_or(i32::MAX)
}

impl Read for &HvStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { recv(raw(&self.0), buf.as_mut_ptr(), length(buf.len()), 0) };
        usize::try_from(n).map_err(|_| last_error())
    }
}

impl Write for &HvStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { send(raw(&self.0), buf.as_ptr(), length(buf.len()), 0) };
        usize::try_from(n).map_err(|_| last_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const _: () = assert!(mem::size_of::<Address>() == 36);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_a_service() {
        let guid = uuid::Uuid::from_bytes_le(service(0x0000_1389));
        assert_eq!(guid.to_string(), "00001389-facb-11e6-bd58-64006a7986d3");
    }
}
