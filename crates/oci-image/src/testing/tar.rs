//! Tars for tests, entry by entry.

use layer_tar::writer::{Header, Kind, Version, append, padding};

/// A tar that is being built.
#[derive(Debug, Clone, Default)]
pub struct Tar(Vec<u8>);

const HEADER: Header<'_> = Header {
    kind: Kind::File,
    path: b"",
    link: b"",
    mode: 0o644,
    uid: 0,
    gid: 0,
    mtime: (1_700_000_000, 0),
    device: (0, 0),
    size: 0,
    xattrs: &[],
    sparse: None,
};

impl Tar {
    /// Appends an entry with these fields.
    pub fn entry(&mut self, header: &Header<'_>, data: &[u8]) -> &mut Self {
        append(&mut self.0, header, Version::V2);
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len() + padding(data.len() as u64), 0);
        self
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.entry(&Header { path: path.as_bytes(), size: data.len() as u64, ..HEADER }, data)
    }

    /// A directory.
    pub fn dir(&mut self, path: &str) -> &mut Self {
        let path = format!("{}/", path.trim_end_matches('/'));
        self.entry(&Header { kind: Kind::Directory, path: path.as_bytes(), mode: 0o755, ..HEADER }, b"")
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        let header = Header {
            kind: Kind::Symlink,
            path: path.as_bytes(),
            link: target.as_bytes(),
            mode: 0o777,
            ..HEADER
        };
        self.entry(&header, b"")
    }

    /// A hard link.
    pub fn link(&mut self, path: &str, target: &str) -> &mut Self {
        let header =
            Header { kind: Kind::HardLink, path: path.as_bytes(), link: target.as_bytes(), ..HEADER };
        self.entry(&header, b"")
    }

    /// A file that deletes `name` in `directory` of the layers below.
    pub fn whiteout(&mut self, directory: &str, name: &str) -> &mut Self {
        let path = [directory, &format!(".wh.{name}")]
            .iter()
            .filter(|p| !p.is_empty())
            .copied()
            .collect::<Vec<_>>()
            .join("/");
        self.file(&path, b"")
    }

    /// A file that hides everything in `directory` of the layers below.
    pub fn opaque(&mut self, directory: &str) -> &mut Self {
        self.whiteout(directory, ".wh..opq")
    }

    /// The bytes, with the end of the archive.
    pub fn finish(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}
