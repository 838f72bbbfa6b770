//! The jailed process of a command: enters the jail, then runs the command with files that its parent opens.
//!
//! ```text
//!   descriptor 0  message socket to the parent      1, 2  the command's own output and messages
//!   child ─ jail::enter ─ run_as(ARGUMENTS) ─► files, open, create ─► the parent
//! ```
//!
//! Called by `run`, for the hidden subcommand `confined`.

use super::{
    Grants, Means, direct,
    message::{MAX_MESSAGE, Reply, Request},
};
use lcow_sys::linux::{
    fdpass,
    jail::{self, Spec},
};
use oci_image::{Files, LayoutFile, RemotePart, Scratch, Source};
use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

/// Set by the parent: an incomplete jail is accepted.
pub(super) const BEST_EFFORT_VARIABLE: &str = "LCOW_CONFINED_BEST_EFFORT";
/// Set by the parent if its standard error is a terminal: its columns. A jailed process cannot ask a terminal.
pub(super) const COLUMNS_VARIABLE: &str = "LCOW_CONFINED_COLUMNS";
/// Address space in bytes: trees of the most entries, and decoders.
const MEMORY: u64 = 16 << 30;
/// Open descriptors.
const DESCRIPTORS: u64 = 1024;
/// Users that jailed commands become if they are started by root: by process id, so that commands share neither limits nor
/// signals. Above those of the daemon's workers.
const FIRST_USER: u32 = 0x4c45_0000;

/// The socket to the parent.
static PARENT: OnceLock<Mutex<OwnedFd>> = OnceLock::new();

/// The files that the command line names: those that are read, and those that are written.
static NAMED: OnceLock<(Vec<PathBuf>, Vec<PathBuf>)> = OnceLock::new();

/// Remembers what the command line names, by which files are asked for.
pub(super) fn name(grants: &Grants) {
    // A command names its files once.
    let _ = NAMED.set((grants.inputs.clone(), grants.files.clone()));
}

/// The place of a path on the command line.
fn place(path: &Path, written: bool) -> io::Result<usize> {
    let (read, new) = NAMED.get().ok_or(io::ErrorKind::NotFound)?;
    let list = if written { new } else { read };
    let place = list.iter().position(|named| named == path);
    place.ok_or_else(|| io::Error::other("the command line does not name this file"))
}

/// Opens a file that the command line names for reading; `None` in a process that may do so itself.
pub(in crate::cli) fn open(path: &Path) -> Option<io::Result<File>> {
    in_jail().then(|| Ok(ask(&Request::Input { input: place(path, false)? })?.0))
}

/// Opens a pipe or device that the command line names for writing, if that is what is there; `None` in a process that may do
/// so itself.
pub(in crate::cli) fn stream(path: &Path) -> Option<io::Result<Option<File>>> {
    in_jail().then(|| Ok(exchange(&Request::Stream { output: place(path, true)? })?.map(|(file, _)| file)))
}

/// Starts a new file that the command line names; `None` in a process that may do so itself.
pub(in crate::cli) fn create(path: &Path) -> Option<io::Result<Granted>> {
    in_jail().then(|| {
        let (file, number) = ask(&Request::Create { output: place(path, true)? })?;
        Ok(Granted { file, number: number as usize })
    })
}

/// Starts a new file of the layout at this place among the sources; `None` in a process that may do so itself.
pub(in crate::cli) fn place_in_layout(source: usize, name: &LayoutFile) -> Option<io::Result<Granted>> {
    in_jail().then(|| {
        let (file, number) = ask(&Request::new_in_layout(source, name))?;
        Ok(Granted { file, number: number as usize })
    })
}

/// A new file whose temporary name the parent has.
#[derive(Debug)]
pub(in crate::cli) struct Granted {
    file: File,
    number: usize,
}

impl Granted {
    /// The file.
    pub(in crate::cli) fn file(&self) -> &File {
        &self.file
    }

    /// An unnamed file on the same disk.
    pub(in crate::cli) fn scratch(&self) -> io::Result<File> {
        Ok(ask(&Request::Beside { file: self.number })?.0)
    }

    /// Gives the file its name.
    pub(in crate::cli) fn commit(self) -> io::Result<()> {
        exchange(&Request::Commit { file: self.number }).map(drop)
    }
}

/// Starts the directory that the command line names; `None` in a process that may do so itself.
pub(super) fn directory(_: &Path) -> Option<io::Result<()>> {
    in_jail().then(|| exchange(&Request::Directory).map(drop))
}

/// A new file of this directory.
pub(super) fn member(name: &str) -> io::Result<File> {
    Ok(ask(&Request::Member { name: name.to_owned() })?.0)
}

/// An unnamed file beside its files.
pub(super) fn scratch_member() -> io::Result<File> {
    Ok(ask(&Request::DirectoryScratch)?.0)
}

/// Gives the directory its name.
pub(super) fn commit_directory() -> io::Result<()> {
    exchange(&Request::CommitDirectory).map(drop)
}

/// Whether this process is a jailed command.
pub(in crate::cli) fn in_jail() -> bool {
    PARENT.get().is_some()
}

/// Columns of the terminal on which a jailed command may draw.
pub(in crate::cli) fn columns() -> Option<u16> {
    if !in_jail() {
        return None;
    }
    std::env::var(COLUMNS_VARIABLE).ok()?.parse().ok().filter(|columns| *columns > 0)
}

/// Runs a command in a jail; `arguments` are those of the program, without its name.
pub(in crate::cli) fn child(
    arguments: Vec<OsString>,
    run: impl FnOnce(Vec<OsString>) -> ExitCode,
) -> ExitCode {
    let best_effort = std::env::var_os(BEST_EFFORT_VARIABLE).is_some();
    let spec = Spec {
        memory: MEMORY,
        descriptors: DESCRIPTORS,
        file_size: None,
        user: FIRST_USER + (std::process::id() & 0xffff),
        strict: !best_effort,
        relax: "--jail=best-effort",
        without_seccomp: false,
    };
    let report = match jail::enter(&spec) {
        Ok(report) => report,
        Err(e) => {
            eprintln!("lcow-graphdriver: {e}");
            return ExitCode::FAILURE;
        }
    };
    let missing = report.missing();
    if !missing.is_empty() {
        eprintln!(
            "lcow-graphdriver: warning: the jail is incomplete; missing: {} ({})",
            missing.join(", "),
            report.notes.join("; ")
        );
    }
    match io::stdin().as_fd().try_clone_to_owned() {
        Ok(socket) => drop(PARENT.set(Mutex::new(socket))),
        Err(e) => {
            eprintln!("lcow-graphdriver: the socket to the parent: {e}");
            return ExitCode::FAILURE;
        }
    }
    let mut all = vec![OsString::from("lcow-graphdriver")];
    all.extend(arguments);
    run(all)
}

/// The files of the source at this place of the command line.
pub(in crate::cli) fn files(source: usize, named: &Source, means: &Means) -> Arc<dyn Files> {
    if in_jail() { Arc::new(Asking { source }) } else { direct(named, means) }
}

/// Files that the parent opens.
#[derive(Debug)]
struct Asking {
    source: usize,
}

/// Asks the parent; gives the file, if there is one, and the number that comes with it.
fn exchange(request: &Request) -> io::Result<Option<(File, u64)>> {
    let socket = PARENT.get().ok_or_else(|| io::Error::other("this process has no parent to ask"))?;
    let text = serde_json::to_vec(request)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    // One request at a time; a thread that panicked has left no reply behind that this one could take for its own.
    let socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
    // One write is one message; `sendmsg` is not on the filter's list.
    let sent = rustix::io::retry_on_intr(|| rustix::io::write(&*socket, &text))?;
    if sent != text.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let (n, fds) = fdpass::receive(socket.as_fd(), &mut buffer)?;
    if n == 0 {
        return Err(io::Error::other("the parent process is gone"));
    }
    let Some(number) = serde_json::from_slice::<Reply>(&buffer[..n])?.into_result()? else { return Ok(None) };
    let file = fds.into_iter().next().ok_or_else(|| io::Error::other("a reply without a descriptor"))?;
    Ok(Some((File::from(file), number)))
}

/// Asks the parent for a file; gives it, and the number that comes with it.
fn ask(request: &Request) -> io::Result<(File, u64)> {
    exchange(request)?.ok_or_else(|| io::Error::other("a reply without a file"))
}

impl Files for Asking {
    fn archive(&self) -> io::Result<File> {
        Ok(ask(&Request::Archive { source: self.source })?.0)
    }

    fn layout(&self, name: &LayoutFile) -> io::Result<File> {
        Ok(ask(&Request::layout(self.source, name))?.0)
    }

    fn remote(&self, part: &RemotePart) -> io::Result<File> {
        Ok(ask(&Request::remote(self.source, part))?.0)
    }

    fn scratch(&self) -> io::Result<Scratch> {
        let (file, room) = ask(&Request::Scratch { source: self.source })?;
        Ok(Scratch { file, room })
    }
}
