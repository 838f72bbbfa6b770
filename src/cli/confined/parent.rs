//! The parent of a jailed command: starts it, opens what it asks for if that was granted, and ends as it ends.
//!
//! ```text
//!   run ─► start `confined ARGUMENTS` ─► Request ─ granted? ─► open ─► Reply + descriptor … end of the socket ─► exit status
//! ```
//!
//! The child's messages are not trusted: one that is no request ends it. Called by the commands, through `confined`.

use super::{
    Grants, JailArgs, NewDirectory, Strictness,
    child::{BEST_EFFORT_VARIABLE, COLUMNS_VARIABLE, in_jail, name},
    direct,
    message::{MAX_MESSAGE, Reply, Request},
};
use crate::cli::{
    CliError,
    layer::{
        input::{standard_input, widen_pipe},
        output::{NewFile, standard_output, stream},
    },
};
use lcow_sys::linux::{
    fdpass,
    process::{Ended, WorkerCommand, start_attached},
};
use oci_image::{Files, LayoutFile, RemotePart, Scratch, Source};
use std::{
    collections::HashMap,
    ffi::OsString,
    fs::File,
    io::{self, IsTerminal},
    os::fd::AsFd,
    path::Path,
    process::ExitCode,
    sync::Arc,
};

/// Variables that the child inherits.
const INHERITED: [&str; 3] = ["RUST_BACKTRACE", "SOURCE_DATE_EPOCH", "NO_COLOR"];
/// Most new files of one command: the blobs of an image and its documents.
const MAX_FILES: usize = 2048;
/// Columns of a terminal that does not say.
const COLUMNS: &str = "80";

/// Does the work of a command in a jailed process, or, in that process, here.
///
/// `arguments` are those of this program, its name first.
pub(in crate::cli) fn run(
    grants: &Grants,
    jail: &JailArgs,
    arguments: &[OsString],
    work: impl FnOnce() -> Result<ExitCode, CliError>,
) -> Result<ExitCode, CliError> {
    if in_jail() {
        name(grants);
        return work();
    }
    // A jailed process cannot do so, and both ends wait less for a wide pipe.
    for file in [standard_input(), standard_output()].into_iter().flatten() {
        widen_pipe(&file);
    }
    let mut args = vec![OsString::from("confined")];
    args.extend(arguments.iter().skip(1).cloned());
    let mut env: Vec<(OsString, OsString)> =
        INHERITED.iter().filter_map(|name| Some((OsString::from(name), std::env::var_os(name)?))).collect();
    // glibc reserves 64 MiB of address space per arena.
    env.push(("MALLOC_ARENA_MAX".into(), "2".into()));
    if jail.jail == Strictness::BestEffort {
        env.push((BEST_EFFORT_VARIABLE.into(), "1".into()));
    }
    if io::stderr().is_terminal() {
        let columns = std::env::var_os("COLUMNS").unwrap_or_else(|| COLUMNS.into());
        env.push((COLUMNS_VARIABLE.into(), columns));
    }
    let command = WorkerCommand { program: "/proc/self/exe".into(), args, env };
    let mut worker = start_attached(&command)
        .map_err(|e| format!("cannot start the process that reads the input: {e}"))?;
    let Some(control) = worker.control.take() else {
        return Err("the process that reads the input has no control socket".into());
    };
    let mut desk = Desk::new(grants);
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let (n, _) = match fdpass::receive(control.as_fd(), &mut buffer) {
            // The child is gone.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
            other => other.map_err(|e| format!("the process that reads the input: {e}"))?,
        };
        if n == 0 {
            break;
        }
        let request: Request = serde_json::from_slice(&buffer[..n])
            .map_err(|_| "the process that reads the input sent a malformed request, and was ended")?;
        let (reply, file) = match desk.serve(&request) {
            Ok(Some((room, file))) => (Reply::File { room }, Some(file)),
            Ok(None) => (Reply::Done, None),
            Err(e) => (Reply::from(e), None),
        };
        let text = serde_json::to_vec(&reply)?;
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        match fdpass::send(control.as_fd(), &text, &fds) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
            other => other.map_err(|e| format!("the process that reads the input: {e}"))?,
        }
    }
    match worker.wait() {
        Ended::Exit(status) => Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)),
        ended => Err(format!("the process that reads the input ended: {ended}").into()),
    }
}

/// Opens what is granted, and keeps new files until they get their names or are deleted.
struct Desk<'a> {
    grants: &'a Grants,
    /// Sources that were asked for; one in a registry keeps its connection.
    sources: HashMap<usize, Arc<dyn Files>>,
    files: Vec<Option<NewFile>>,
    directory: Option<NewDirectory>,
}

impl<'a> Desk<'a> {
    fn new(grants: &'a Grants) -> Self {
        Self { grants, sources: HashMap::new(), files: Vec::new(), directory: None }
    }

    /// Starts a new file; gives its number, too.
    fn create(&mut self, path: &Path) -> io::Result<(u64, File)> {
        if self.files.len() >= MAX_FILES {
            return Err(io::Error::other("too many new files"));
        }
        let new = NewFile::create(path).map_err(|e| io::Error::other(e.to_string()))?;
        let file = new.file().try_clone()?;
        self.files.push(Some(new));
        Ok((self.files.len() as u64 - 1, file))
    }

    /// Starts a new file of the layout that is written.
    fn place(&mut self, source: usize, name: &LayoutFile) -> io::Result<(u64, File)> {
        let granted = (self.grants.layout == Some(source)).then(|| self.grants.sources.get(source)).flatten();
        let Some(Source::Layout { directory, .. }) = granted else {
            return Err(io::Error::other("the command line does not name such a layout"));
        };
        let path = directory.join(name.path());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        self.create(&path)
    }

    /// Does what a request asks for; gives a file, with the room of a scratch file or the number of a new one.
    fn serve(&mut self, request: &Request) -> io::Result<Option<(u64, File)>> {
        let unnamed = || io::Error::other("the command line does not name such a file");
        let whole = |e: CliError| io::Error::other(e.to_string());
        let file = match request {
            Request::Input { input } => {
                let path = self.grants.inputs.get(*input).ok_or_else(unnamed)?;
                if path.as_os_str() == "-" { standard_input()? } else { File::open(path)? }
            }
            Request::Stream { output } => {
                let path = self.grants.files.get(*output).ok_or_else(unnamed)?;
                let Some(stream) = stream(path) else { return Ok(None) };
                stream?
            }
            Request::Create { output } => {
                let path = self.grants.files.get(*output).ok_or_else(unnamed)?;
                return self.create(path).map(Some);
            }
            Request::NewLayout { source } => return self.place(*source, &LayoutFile::Layout).map(Some),
            Request::NewIndex { source } => return self.place(*source, &LayoutFile::Index).map(Some),
            Request::NewBlob { source, digest } => {
                return self.place(*source, &LayoutFile::Blob(*digest)).map(Some);
            }
            Request::Beside { file } => {
                let new = self.files.get(*file).and_then(Option::as_ref).ok_or_else(unnamed)?;
                new.scratch().map_err(whole)?
            }
            Request::Commit { file } => {
                let new = self.files.get_mut(*file).and_then(Option::take).ok_or_else(unnamed)?;
                new.commit().map_err(whole)?;
                return Ok(None);
            }
            Request::Directory => {
                let place = self.grants.directory.as_ref().ok_or_else(unnamed)?;
                self.directory = Some(NewDirectory::create(place).map_err(whole)?);
                return Ok(None);
            }
            Request::Member { name } => self.directory.as_mut().ok_or_else(unnamed)?.member(name)?,
            Request::DirectoryScratch => self.directory.as_ref().ok_or_else(unnamed)?.scratch()?,
            Request::CommitDirectory => {
                self.directory.take().ok_or_else(unnamed)?.commit().map_err(whole)?;
                return Ok(None);
            }
            other => return self.of_source(other).map(Some),
        };
        Ok(Some((0, file)))
    }

    /// Opens or fetches a file of a source; gives the room of a scratch file, too.
    fn of_source(&mut self, request: &Request) -> io::Result<(u64, File)> {
        let (place, source) = request
            .source()
            .and_then(|place| Some((place, self.grants.sources.get(place)?)))
            .ok_or_else(|| io::Error::other("the command line does not name such a source"))?;
        let files = self.sources.entry(place).or_insert_with(|| direct(source, &self.grants.means));
        let file = match *request {
            Request::Archive { .. } => files.archive()?,
            Request::Layout { .. } => files.layout(&LayoutFile::Layout)?,
            Request::Index { .. } => files.layout(&LayoutFile::Index)?,
            Request::Blob { digest, .. } => files.layout(&LayoutFile::Blob(digest))?,
            Request::Named { .. } => files.remote(&RemotePart::Named)?,
            Request::Document { digest, size, .. } => files.remote(&RemotePart::Document { digest, size })?,
            Request::Remote { digest, size, .. } => files.remote(&RemotePart::Blob { digest, size })?,
            Request::Scratch { .. } => {
                let Scratch { file, room } = files.scratch()?;
                return Ok((room, file));
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        Ok((0, file))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Means, *};
    use oci_image::Digest;

    #[test]
    fn only_what_was_granted_is_opened() {
        let place = tempfile::tempdir().unwrap();
        let archive = place.path().join("a.tar");
        std::fs::write(&archive, b"bytes").unwrap();
        let grants = Grants {
            sources: vec![
                Source::OciArchive { file: archive, reference: None },
                Source::Layout { directory: place.path().into(), reference: None },
                Source::parse("docker://127.0.0.1:1/app").unwrap(),
            ],
            means: Means { scratch: Some(place.path().into()), ..Means::default() },
            inputs: vec![place.path().join("a.tar")],
            files: vec![place.path().join("new")],
            layout: None,
            directory: None,
        };
        let mut desk = Desk::new(&grants);
        assert!(desk.serve(&Request::Archive { source: 0 }).unwrap().is_some());
        assert!(desk.serve(&Request::Scratch { source: 1 }).unwrap().is_some());
        assert!(desk.serve(&Request::Input { input: 0 }).unwrap().is_some());
        assert!(desk.serve(&Request::Stream { output: 0 }).unwrap().is_none(), "a new file belongs there");
        let (number, _file) = desk.serve(&Request::Create { output: 0 }).unwrap().unwrap();
        assert!(desk.serve(&Request::Beside { file: number as usize }).unwrap().is_some());
        assert!(!place.path().join("new").exists());
        assert!(desk.serve(&Request::Commit { file: number as usize }).unwrap().is_none());
        assert!(place.path().join("new").exists());
        let digest = Digest::sha256(b"");
        for refused in [
            Request::Archive { source: 1 },
            Request::Archive { source: 2 },
            Request::Archive { source: 3 },
            Request::Named { source: 0 },
            Request::Document { source: 1, digest, size: 0 },
            Request::Remote { source: 1, digest, size: 0 },
            // No document has this digest, so the registry is not asked.
            Request::Remote { source: 2, digest, size: 0 },
            Request::Blob { source: 2, digest },
            Request::Index { source: 0 },
            Request::Index { source: 1 },
            Request::Blob { source: 0, digest },
            Request::Blob { source: 1, digest },
            Request::Input { input: 1 },
            Request::Stream { output: 1 },
            Request::Create { output: 1 },
            Request::Beside { file: 0 },
            Request::Commit { file: 0 },
            Request::Commit { file: 1 },
            Request::NewIndex { source: 1 },
            Request::NewBlob { source: 1, digest },
            Request::Directory,
            Request::Member { name: "a".into() },
            Request::DirectoryScratch,
            Request::CommitDirectory,
        ] {
            assert!(desk.serve(&refused).is_err(), "{refused:?}");
        }
        // What was not committed is gone.
        assert!(desk.serve(&Request::Create { output: 0 }).is_ok());
        drop(desk);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 2);
    }
}
