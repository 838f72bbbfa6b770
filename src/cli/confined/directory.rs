//! A new directory with files, which appears whole or not at all.
//!
//! ```text
//!   create ─► .lcow-graphdriver.XXXXXX ─ member(NAME): files ─► commit: sync, rename        dropped before: deleted
//!             in a jailed process the parent has it, and the child asks for its files
//! ```
//!
//! Called by commands whose output is more than single files.

#[cfg(target_os = "linux")]
use super::child;
use crate::cli::{
    CliError,
    layer::failure::{failed, shown},
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// A directory without its name yet.
#[derive(Debug)]
pub(in crate::cli) struct NewDirectory {
    place: PathBuf,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    /// Here: the directory, and its files, to be synced.
    Own(TempDir, Vec<File>),
    /// By the parent.
    #[cfg(target_os = "linux")]
    Granted,
}

impl NewDirectory {
    /// Starts a directory that will be `place`, where nothing may be.
    pub(in crate::cli) fn create(place: &Path) -> Result<Self, CliError> {
        #[cfg(target_os = "linux")]
        if let Some(granted) = child::directory(place) {
            granted.map_err(|e| e.to_string())?;
            return Ok(Self { place: place.to_owned(), kept: Kept::Granted });
        }
        if fs::symlink_metadata(place).is_ok() {
            return Err(format!("{} exists already; name a new directory", shown(place)).into());
        }
        let parent = match place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".lcow-graphdriver.");
        #[cfg(unix)]
        // The umask removes the permissions that a new directory must not have.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let made = builder.tempdir_in(parent).map_err(|e| failed("create a directory in", parent, &e))?;
        Ok(Self { place: place.to_owned(), kept: Kept::Own(made, Vec::new()) })
    }

    /// A new file of letters, digits, `.` and `-`.
    pub(in crate::cli) fn member(&mut self, name: &str) -> io::Result<File> {
        match &mut self.kept {
            #[cfg(target_os = "linux")]
            Kept::Granted => child::member(name),
            Kept::Own(made, members) => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
                if name.is_empty() || name.starts_with('.') || !name.bytes().all(plain) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                let place = made.path().join(name);
                let file = File::options().read(true).write(true).create_new(true).open(place)?;
                members.push(file.try_clone()?);
                Ok(file)
            }
        }
    }

    /// An unnamed file on the same disk.
    pub(in crate::cli) fn scratch(&self) -> io::Result<File> {
        match &self.kept {
            #[cfg(target_os = "linux")]
            Kept::Granted => child::scratch_member(),
            Kept::Own(made, _) => tempfile::tempfile_in(made.path()),
        }
    }

    /// Makes everything durable and gives the directory its name.
    pub(in crate::cli) fn commit(self) -> Result<(), CliError> {
        match self.kept {
            #[cfg(target_os = "linux")]
            Kept::Granted => Ok(child::commit_directory().map_err(|e| e.to_string())?),
            Kept::Own(made, members) => {
                let place = &self.place;
                for member in members {
                    member.sync_all().map_err(|e| failed("sync", place, &e))?;
                }
                #[cfg(unix)]
                File::open(made.path()).and_then(|d| d.sync_all()).map_err(|e| failed("sync", place, &e))?;
                fs::rename(made.path(), place).map_err(|e| failed("write", place, &e))?;
                // Nothing is left under the old name.
                let _ = made.keep();
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn it_has_members_of_plain_names_only_and_appears_at_the_commit() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("out");
        let mut made = NewDirectory::create(&place).unwrap();
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "a\0"] {
            assert!(made.member(bad).is_err(), "{bad:?}");
        }
        made.member("000-abc.img").unwrap().write_all(b"1").unwrap();
        assert!(made.member("000-abc.img").is_err(), "a file is made once");
        assert!(!place.exists());
        made.commit().unwrap();
        assert_eq!(fs::read(place.join("000-abc.img")).unwrap(), b"1");
        assert!(NewDirectory::create(&place).is_err());
        drop(NewDirectory::create(&dir.path().join("other")).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
