//! Output: whole files or none, and standard output.
//!
//! ```text
//!   create ─► OUT's directory/.OUT.XXXXXX ─ writes ─► commit: sync, rename to OUT         dropped before: deleted
//! ```

use super::{
    failure::{failed, shown},
    input::widen_pipe,
};
use crate::cli::CliError;
#[cfg(target_os = "linux")]
use crate::cli::confined;
use disk_io::{ReadAt, StreamOut, WriteAt};
use indicatif::ProgressBar;
use lcow_sys::{splice::send_file, writeback::Writeback};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// A file that appears under its name only when it is complete.
pub(in crate::cli) struct NewFile {
    place: PathBuf,
    temporary: Temporary,
}

/// Who has the file's temporary name.
enum Temporary {
    /// This process.
    Own(NamedTempFile),
    /// The parent of this jailed process.
    #[cfg(target_os = "linux")]
    Granted(confined::Granted),
}

impl NewFile {
    /// Starts a file for `path`; a file that exists there is replaced by [`Self::commit`].
    pub(in crate::cli) fn create(path: &Path) -> Result<Self, CliError> {
        #[cfg(target_os = "linux")]
        if let Some(granted) = confined::create(path) {
            // The message is the parent's, and complete.
            let granted = granted.map_err(|e| e.to_string())?;
            return Ok(Self { place: path.to_owned(), temporary: Temporary::Granted(granted) });
        }
        let refuse = |what: &str| format!("cannot write {}: {what}", shown(path));
        let place = match fs::metadata(path) {
            Ok(known) if known.is_dir() => {
                return Err(refuse("it is a directory; name a file in it").into());
            }
            Ok(known) if !known.is_file() => {
                return Err(refuse("it is not a regular file; name another").into());
            }
            // The file that a symbolic link leads to is replaced, not the link.
            Ok(_) => fs::canonicalize(path).map_err(|e| failed("write", path, &e))?,
            Err(_) => path.to_owned(),
        };
        let name = place.file_name().ok_or_else(|| refuse("it does not name a file"))?;
        let folder = match place.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        #[cfg(unix)]
        // The umask removes the permissions that a new file must not have.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(folder).map_err(|e| failed("create a file in", folder, &e))?;
        Ok(Self { place, temporary: Temporary::Own(temporary) })
    }

    /// An unnamed file on the same disk.
    #[cfg_attr(
        not(target_os = "linux"),
        expect(clippy::infallible_destructuring_match, reason = "only Linux has files that were granted")
    )]
    pub(in crate::cli) fn scratch(&self) -> Result<File, CliError> {
        let temporary = match &self.temporary {
            Temporary::Own(temporary) => temporary,
            #[cfg(target_os = "linux")]
            Temporary::Granted(granted) => return Ok(granted.scratch().map_err(|e| e.to_string())?),
        };
        let folder = temporary.path().parent().unwrap_or(Path::new("."));
        tempfile::tempfile_in(folder).map_err(|e| failed("create a file in", folder, &e))
    }

    /// The file, empty at first.
    pub(in crate::cli) fn file(&self) -> &File {
        match &self.temporary {
            Temporary::Own(temporary) => temporary.as_file(),
            #[cfg(target_os = "linux")]
            Temporary::Granted(granted) => granted.file(),
        }
    }

    /// The file as a disk whose writeback begins while it is being written.
    pub(in crate::cli) fn disk(&self) -> Result<NewDisk, CliError> {
        let file = self.file().try_clone().map_err(|e| failed("open", &self.place, &e))?;
        Ok(NewDisk { file, writeback: Writeback::default() })
    }

    /// Gives the file the permissions and, as far as the caller may, the owner of the one that it replaces.
    pub(super) fn keep_owner(&self, old: &File) -> Result<(), CliError> {
        let about = |e: io::Error| failed("write", &self.place, &e);
        let known = old.metadata().map_err(about)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let new = self.file().metadata().map_err(about)?;
            if (new.uid(), new.gid()) != (known.uid(), known.gid()) {
                std::os::unix::fs::fchown(self.file(), Some(known.uid()), Some(known.gid()))
                    .map_err(about)?;
            }
        }
        self.file().set_permissions(known.permissions()).map_err(about)
    }

    /// Makes the file durable and gives it its name.
    pub(in crate::cli) fn commit(self) -> Result<(), CliError> {
        self.file().sync_all().map_err(|e| failed("sync", &self.place, &e))?;
        match self.temporary {
            Temporary::Own(temporary) => {
                temporary.persist(&self.place).map_err(|e| failed("write", &self.place, &e.error))?;
            }
            #[cfg(target_os = "linux")]
            Temporary::Granted(granted) => granted.commit().map_err(|e| e.to_string())?,
        }
        Ok(())
    }
}

/// A new file that is written at given offsets.
pub(in crate::cli) struct NewDisk {
    file: File,
    writeback: Writeback,
}

impl ReadAt for NewDisk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
}

impl WriteAt for NewDisk {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let written = self.file.write_at(buf, offset)?;
        self.writeback.written(&self.file, offset + written as u64);
        Ok(written)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// Whether a tar would go to a terminal. A jailed process cannot see that, so its parent asks before.
pub(in crate::cli) fn refuse_terminal(output: &Path) -> Result<(), CliError> {
    if output.as_os_str() == "-" && io::stdout().is_terminal() {
        return Err("a tar is not written to a terminal; redirect the output, or name a file".into());
    }
    Ok(())
}

/// The pipe or device at `path`, open for writing; `None` if a new file belongs there.
pub(in crate::cli) fn stream(path: &Path) -> Option<io::Result<File>> {
    fs::metadata(path)
        .is_ok_and(|known| !known.is_file() && !known.is_dir())
        .then(|| File::options().write(true).open(path))
}

/// The destination of a tar.
pub(super) enum TarOutput {
    /// A new file.
    File(NewFile),
    /// Standard output, a pipe or a device: bytes written there cannot be taken back.
    Stream(File),
}

impl TarOutput {
    pub(super) fn create(path: &Path) -> Result<Self, CliError> {
        if path.as_os_str() == "-" {
            refuse_terminal(path)?;
            return Ok(Self::Stream(standard_output().map_err(|e| failed("write", path, &e))?));
        }
        #[cfg(target_os = "linux")]
        if let Some(granted) = confined::stream(path) {
            return match granted.map_err(|e| failed("open", path, &e))? {
                Some(stream) => Ok(Self::Stream(stream)),
                None => Ok(Self::File(NewFile::create(path)?)),
            };
        }
        if let Some(stream) = stream(path) {
            return Ok(Self::Stream(stream.map_err(|e| failed("open", path, &e))?));
        }
        Ok(Self::File(NewFile::create(path)?))
    }

    /// Completes the output.
    pub(super) fn commit(self) -> Result<(), CliError> {
        match self {
            Self::File(file) => file.commit(),
            Self::Stream(_) => Ok(()),
        }
    }

    fn file(&self) -> &File {
        match self {
            Self::File(file) => file.file(),
            Self::Stream(stream) => stream,
        }
    }
}

impl Write for TarOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file().write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StreamOut for TarOutput {
    fn splice(&mut self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
        match self {
            // For a file, the kernel would copy the data anyway.
            Self::File(_) => Ok(0),
            Self::Stream(stream) => send_file(&*stream, file, offset, len),
        }
    }
}

/// Output whose progress is shown by a bar.
pub(super) struct Counted<'a, W> {
    pub(super) out: W,
    pub(super) bar: &'a ProgressBar,
}

impl<W: StreamOut> Write for Counted<'_, W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.out.write(buf)?;
        self.bar.inc(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<W: StreamOut> StreamOut for Counted<'_, W> {
    fn splice(&mut self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
        let sent = self.out.splice(file, offset, len)?;
        self.bar.inc(sent);
        Ok(sent)
    }
}

/// Standard output as a file: the standard library's own searches every byte for line ends.
pub(in crate::cli) fn standard_output() -> io::Result<File> {
    #[cfg(unix)]
    let own = std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned()?;
    #[cfg(windows)]
    let own = std::os::windows::io::AsHandle::as_handle(&io::stdout()).try_clone_to_owned()?;
    let file = own.into();
    widen_pipe(&file);
    Ok(file)
}
