//! One owner per store.

use super::{StoreError, files, layout};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Seek, Write},
    path::Path,
};

/// Holds the store of a home for this process; the system releases it when the process ends, however it ends.
#[derive(Debug)]
pub struct OwnerLock {
    _file: File,
}

/// Longest name of a holder that is shown, in bytes.
const MAX_HOLDER: u64 = 200;

impl OwnerLock {
    /// Locks the store, or names the process that holds it.
    pub fn take(home: &Path) -> Result<Self, StoreError> {
        let path = home.join(layout::OWNER_LOCK);
        let mut options = OpenOptions::new();
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            // No links: the file is overwritten, and a link may name any file. Non-blocking, in case it is a pipe.
            let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
            options.mode(0o600).custom_flags(flags.bits().cast_signed());
        }
        let mut file = files::open_or_create(&path, &mut options).map_err(StoreError::io("open", &path))?;
        let metadata = file.metadata().map_err(StoreError::io("look at", &path))?;
        if !metadata.is_file() || has_other_names(&metadata) {
            return Err(StoreError::Usage(format!(
                "'{}' is not a regular file with a single name; check what it is, and delete it if it is not needed",
                path.display()
            )));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Locked { home: home.to_owned(), holder: holder_of(&path) });
            }
            Err(TryLockError::Error(e)) => return Err(StoreError::io("lock", &path)(e)),
        }
        // The text is only for the message to others; the lock itself is what counts.
        let name =
            std::env::current_exe().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let text =
            format!("process {} ({})\n", std::process::id(), name.as_deref().unwrap_or("unknown program"));
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(text.as_bytes()))
            .map_err(StoreError::io("write", &path))?;
        Ok(Self { _file: file })
    }
}

/// Whether the file has other names (hard links), whose content a write would change.
fn has_other_names(metadata: &fs::Metadata) -> bool {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::nlink(metadata) > 1;
    #[cfg(not(unix))]
    {
        let _ = metadata;
        false
    }
}

fn holder_of(path: &Path) -> String {
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|f| f.take(MAX_HOLDER).read_to_string(&mut text));
    match (read, text.trim()) {
        (Ok(_), name) if !name.is_empty() => name.to_owned(),
        _ => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_with_the_holders_name() {
        let home = tempfile::tempdir().unwrap();
        let lock = OwnerLock::take(home.path()).unwrap();
        // flock is per open file description, so a second open in one process meets the same refusal.
        let error = OwnerLock::take(home.path()).unwrap_err();
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        drop(lock);
        OwnerLock::take(home.path()).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_written_through_a_link_or_into_what_is_no_file() {
        let home = tempfile::tempdir().unwrap();
        let (path, precious) = (home.path().join(layout::OWNER_LOCK), home.path().join("precious"));
        let refused = |what: &str| {
            OwnerLock::take(home.path()).expect_err(what);
            fs::remove_file(&path).unwrap();
        };
        fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        refused("a symbolic link");
        std::os::unix::fs::symlink(home.path().join("made"), &path).unwrap();
        refused("a link to nothing");
        assert!(!home.path().join("made").exists());
        fs::hard_link(&precious, &path).unwrap();
        refused("a hard link");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        refused("a pipe");
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
        OwnerLock::take(home.path()).unwrap();
    }
}
