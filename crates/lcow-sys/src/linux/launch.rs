//! Starts a foreign program (QEMU) like a worker: confined, and with descriptors instead of paths.
//!
//! ```text
//!   daemon ── spawner thread ─► lcow-graphdriver launch   0 ◄═ Order, then descriptors (SCM_RIGHTS, in groups)
//!                                  own net, IPC, root ─ own user ─ no capabilities ─ dies with the daemon ─ limits
//!                                  Landlock: files of the system and descriptors 3… only ─ no new sockets
//!                                  exec program args…     3, 4, 5, … = the descriptors, in order
//! ```
//!
//! The program knows no paths of the files that it is given. It can read the system's programs, libraries and firmware; it
//! can open no other path and create no socket, and it runs as a user of its own, without capabilities or network. Called by
//! `svm::qemu`, which sends the order, and `cli`, which runs [`launch_main`].

use super::{fdpass, jail, process};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Command, Stdio},
};

/// Number of the first passed descriptor.
pub const FIRST_FD: i32 = 3;
/// Largest order, in bytes.
const MAX_ORDER: usize = 64 << 10;

/// The program to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// Its path.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Number of descriptors that follow.
    pub fds: usize,
    /// User and group to run as, if the launcher may change them.
    pub user: u32,
    /// Limit of the address space, in bytes.
    pub memory: u64,
    /// Do not start the program unless every required restriction is in force: a user that owns nothing, no capabilities,
    /// `no_new_privs`, limits, no new sockets, and Landlock or a root of its own.
    pub strict: bool,
}

/// Sends an order and its descriptors to a launcher that has just been started.
///
/// # Errors
/// As [`fdpass::send`].
pub fn send_order(socket: BorrowedFd<'_>, order: &Order, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    debug_assert_eq!(order.fds, fds.len());
    fdpass::send(socket, &serde_json::to_vec(order)?, &[])?;
    for group in fds.chunks(fdpass::MAX_FDS) {
        fdpass::send(socket, b"fds", group)?;
    }
    Ok(())
}

/// Runs the launcher. Returns only after a failure, with the exit status. Call it first in `main`: descriptors above 2 are
/// closed.
pub fn launch_main() -> i32 {
    match launch() {
        Ok(never) => match never {},
        Err(e) => {
            eprintln!("launch: {e}");
            1
        }
    }
}

fn launch() -> io::Result<std::convert::Infallible> {
    super::single_thread()?;
    // SAFETY: this is called first in main, with one thread, when the process owns no descriptor but 0, 1 and 2.
    unsafe { jail::close_all_from(FIRST_FD as u32)? };
    let stdin = io::stdin();
    let socket = stdin.as_fd();
    let mut buffer = vec![0; MAX_ORDER];
    let (n, _) = fdpass::receive(socket, &mut buffer)?;
    let order: Order = serde_json::from_slice(&buffer[..n])?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    while fds.len() < order.fds {
        let (n, more) = fdpass::receive(socket, &mut buffer)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        fds.extend(more);
    }
    for (n, fd) in fds.iter().enumerate() {
        // The kernel assigns the lowest free number, and nothing else is open.
        if fd.as_raw_fd() != FIRST_FD + n as i32 {
            return Err(io::Error::other("descriptors did not arrive in order"));
        }
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    // Opened before paths are denied.
    let null = File::open("/dev/null")?;
    let confinement = jail::confine(order.user, order.memory, &order.program, &fds);
    for note in &confinement.notes {
        eprintln!("launch: {note}");
    }
    if order.strict && !confinement.missing.is_empty() {
        return Err(io::Error::other(format!(
            "the confinement of {} is incomplete; missing: {}; lcow.jail=best-effort continues without",
            order.program.display(),
            confinement.missing.join(", ")
        )));
    }
    if process::peer_gone(socket) {
        return Err(io::Error::other("the daemon is gone"));
    }
    Err(Command::new(&order.program)
        .args(&order.args)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", "/nonexistent")
        .current_dir("/")
        .stdin(Stdio::from(null))
        .exec())
}
