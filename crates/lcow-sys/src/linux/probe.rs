//! Attempts from inside what the jail forbids: the self-test of `worker --self-test`.
//!
//! ```text
//!   jail::enter ─ attempt("open") ─► Refused(EPERM) │ Allowed │ (the process is gone: SIGSYS)
//! ```
//!
//! Uses bare system calls, as a compromised worker would. An attempt that succeeds does no harm. Called by `svm-agent` (self-
//! test only).

use std::io;

/// Names of all attempts.
pub const ATTEMPTS: [&str; 19] = [
    "open",
    "create",
    "stat",
    "socket",
    "connect",
    "bind",
    "exec",
    "fork",
    "ptrace",
    "mount",
    "unshare",
    "signal",
    "exec-memory",
    "raise-limit",
    "io-uring",
    "setuid",
    "hidden-room",
    "urgent-byte",
    "send-descriptor",
];

/// The result of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The call succeeded: the jail has a hole.
    Allowed,
    /// The call failed with this error number.
    Refused(i32),
}

/// Makes the attempt `name`; `None` if it is not in [`ATTEMPTS`].
pub fn attempt(name: &str) -> Option<Outcome> {
    // Without seccomp, socket() works, and the attempts on it test Landlock and the empty network.
    let address = |path: &[u8]| {
        let mut a = [0u8; 110];
        a[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
        a[2..2 + path.len()].copy_from_slice(path);
        a
    };
    let unix = address(b"/run/docker.sock");
    let mut stat = [0u64; 32];
    let limit = [u64::MAX; 2];
    let argv: [*const libc::c_char; 2] = [c"/bin/true".as_ptr(), std::ptr::null()];
    // SAFETY: every pointer is to a live, NUL-terminated string or a buffer of the size that the call expects; the
    // forked child does nothing but exit.
    let r = unsafe {
        match name {
            "open" => {
                libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), libc::O_RDONLY)
            }
            "create" => {
                let flags = libc::O_WRONLY | libc::O_TMPFILE;
                libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/tmp".as_ptr(), flags, 0o600)
            }
            "stat" => {
                let path = c"/etc/passwd".as_ptr();
                let flags = libc::AT_EMPTY_PATH;
                libc::syscall(libc::SYS_newfstatat, libc::AT_FDCWD, path, stat.as_mut_ptr(), flags)
            }
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "connect" => {
                let fd = libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0);
                libc::syscall(libc::SYS_connect, if fd < 0 { 0 } else { fd }, unix.as_ptr(), unix.len())
            }
            "bind" => {
                let fd = libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0);
                libc::syscall(libc::SYS_bind, if fd < 0 { 0 } else { fd }, unix.as_ptr(), unix.len())
            }
            "exec" => libc::syscall(libc::SYS_execve, argv[0], argv.as_ptr(), argv.as_ptr().add(1)),
            "fork" => {
                let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
                if pid == 0 {
                    libc::syscall(libc::SYS_exit_group, 0);
                }
                pid
            }
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, libc::getppid(), 0, 0),
            "mount" => {
                let (fs, at) = (c"tmpfs".as_ptr(), c"/".as_ptr());
                libc::syscall(libc::SYS_mount, fs, at, fs, 0, 0)
            }
            "unshare" => libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER),
            // Signal 0 only checks whether a signal could be sent.
            "signal" => libc::syscall(libc::SYS_kill, libc::getppid(), 0),
            "exec-memory" => {
                let (prot, flags) =
                    (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::syscall(libc::SYS_mmap, 0, 4096, prot, flags, -1, 0)
            }
            "raise-limit" => libc::syscall(libc::SYS_prlimit64, 0, libc::RLIMIT_CORE, limit.as_ptr(), 0),
            "io-uring" => libc::syscall(libc::SYS_io_uring_setup, 0, 0),
            "setuid" => libc::syscall(libc::SYS_setuid, 0),
            // Space beyond the end of a file (FALLOC_FL_KEEP_SIZE), in a memory file that ends with this process.
            "hidden-room" => {
                let fd = libc::syscall(libc::SYS_memfd_create, c"room".as_ptr(), 0);
                libc::syscall(libc::SYS_fallocate, if fd < 0 { 1 } else { fd }, 1, 0, 4096)
            }
            "urgent-byte" => {
                let mut message: libc::msghdr = std::mem::zeroed();
                libc::syscall(libc::SYS_recvmsg, 0, &raw mut message, libc::MSG_OOB)
            }
            "send-descriptor" => {
                let message: libc::msghdr = std::mem::zeroed();
                libc::syscall(libc::SYS_sendmsg, 0, &raw const message, 0)
            }
            _ => return None,
        }
    };
    Some(if r < 0 {
        Outcome::Refused(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Outcome::Allowed
    })
}
