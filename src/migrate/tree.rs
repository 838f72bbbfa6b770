//! A layer's directory below another storage driver: files are opened by the names in the layer's tar.
//!
//! The names and the files are untrusted. `openat2` with `RESOLVE_IN_ROOT` treats the directory as `/`, so that neither
//! `..` nor a symbolic link leads out of it, as in the engine's own unpacking; and anything but a regular file (a
//! device, a pipe) is refused before a byte of it is read.

use std::{
    fs::File,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// An open directory.
#[derive(Debug)]
pub(super) struct Tree {
    folder: File,
}

impl Tree {
    pub(super) fn open(folder: PathBuf) -> io::Result<Self> {
        let folder = File::open(folder)?;
        if folder.metadata()?.is_dir() {
            Ok(Self { folder })
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    }

    /// Opens a regular file of the directory.
    pub(super) fn file(&self, name: &[u8]) -> io::Result<File> {
        use rustix::fs::{Mode, OFlags, ResolveFlags};
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        // No magic links, and no crossing into another file system that happens to be mounted there.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let path = Path::new(std::ffi::OsStr::from_bytes(name));
        let file: File = rustix::fs::openat2(&self.folder, path, flags, Mode::empty(), resolve)?.into();
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "it is no longer a regular file"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, io::Read, os::unix::fs::symlink};

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("dir")).unwrap();
        fs::write(outer.path().join("secret"), "outside").unwrap();
        fs::write(root.join("dir/file"), "inside").unwrap();
        fs::write(root.join("secret"), "inside").unwrap();
        symlink(outer.path(), root.join("out")).unwrap();
        symlink("/dir", root.join("absolute")).unwrap();
        symlink("../../..", root.join("dir/up")).unwrap();
        symlink("secret", root.join("link")).unwrap();
        let tree = Tree::open(root).unwrap();
        let read = |name: &str| -> io::Result<String> {
            let mut text = String::new();
            tree.file(name.as_bytes())?.read_to_string(&mut text)?;
            Ok(text)
        };
        for inside in
            ["dir/file", "./dir/file", "/dir/file", "absolute/file", "../secret", "dir/up/secret", "/secret"]
        {
            assert_eq!(read(inside).unwrap(), "inside", "{inside}");
        }
        for refused in ["out/secret", "link", "dir", "dir/none", "", "dev/null", "/proc/self/exe"] {
            assert!(read(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn a_pipe_is_refused_and_waited_for_by_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let made = std::process::Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap();
        assert!(made.success());
        let tree = Tree::open(folder.path().to_owned()).unwrap();
        assert!(tree.file(b"pipe").unwrap_err().to_string().contains("regular file"));
    }
}
