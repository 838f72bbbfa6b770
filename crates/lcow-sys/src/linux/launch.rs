//! Starts a foreign program (QEMU) the way workers are started, with descriptors, and confined.
//!
//! ```text
//!   daemon ── spawner thread ─► lcow-graphdriver launch   0 ◄═ Order, then descriptors (SCM_RIGHTS, in groups)
//!                                  own net, IPC, root ─ own user ─ no capability ─ dies with the daemon ─ limits
//!                                  Landlock: system's files and descriptors 3… only ─ no new socket
//!                                  exec program args…     3, 4, 5, … = the descriptors, in order
//! ```
//!
//! The program has no name of anything that it is given. It can read the system's own programs, libraries and firmware;
//! no other path opens, no socket can be made, and as a user of its own, without capabilities or network, it has no way
//! to ours. Called by `svm::qemu` (which
//! sends) and `cli` (which runs [`launch_main`]).

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

/// The first descriptor that is passed has this number.
pub const FIRST_FD: i32 = 3;
/// Largest order; bytes.
const MAX_ORDER: usize = 64 << 10;

/// What to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Descriptors that follow.
    pub fds: usize,
    /// User and group to run as, where we may choose.
    pub user: u32,
    /// Address space; bytes.
    pub memory: u64,
}

/// Sends an order and its descriptors to a launcher that has just been started.
///
/// # Errors
/// What the system says.
pub fn send_order(socket: BorrowedFd<'_>, order: &Order, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    debug_assert_eq!(order.fds, fds.len());
    fdpass::send(socket, &serde_json::to_vec(order)?, &[])?;
    for group in fds.chunks(fdpass::MAX_FDS) {
        fdpass::send(socket, b"fds", group)?;
    }
    Ok(())
}

/// Runs the launcher: returns only if something failed, with the exit status.
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
    jail::close_all_from(FIRST_FD as u32)?;
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
        // The lowest free number is taken, and nothing else is open.
        if fd.as_raw_fd() != FIRST_FD + n as i32 {
            return Err(io::Error::other("descriptors did not arrive in order"));
        }
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    // While it can still be opened.
    let null = File::open("/dev/null")?;
    for note in jail::confine(order.user, order.memory, &order.program, &fds) {
        eprintln!("launch: {note}");
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
