//! Where the layer of a sandbox is in its file system.
//!
//! ```text
//!   LayerKind::Sandbox        /upper                      as this project's mounts write it
//!   LayerKind::Scratch(ID)    /scratch/ID/upper           as runhcs writes it: hcsshim, internal/guest/runtime/hcsv2/uvm.go
//!   LayerKind::Scratch(None)  /upper, if it holds anything; else /scratch/*/upper, if there is exactly one; else /upper
//! ```
//!
//! The file system is untrusted: paths are made of validated ids, symlinks are not followed, and what is no directory does not
//! count. Called by `view` and by `apply::chain`.

use super::{DiffError, fs::Fs};
use disk_io::ReadAt;
use ext4_image::{Ext4, FileKind, Inode};
use std::{fmt, str::FromStr};

/// The directory that holds the layer.
const UPPER: &[u8] = b"upper";
/// The directory in which runhcs keeps a directory for each container of a pod.
const SCRATCH: &[u8] = b"scratch";

/// The most bytes of a container's id: containerd's limit (pkg/identifiers).
const MAX_ID: usize = 76;

/// The id of a container, as containerd allows it (pkg/identifiers): at most 76 letters and digits, with single `.`, `_` and
/// `-` between them. So it is one component of a path.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(into = "String", try_from = "String"))]
pub struct ContainerId {
    bytes: [u8; MAX_ID],
    len: u8,
}

impl ContainerId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        self.bytes.get(..usize::from(self.len)).and_then(|id| str::from_utf8(id).ok()).unwrap_or_default()
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// A text that is no [`ContainerId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "malformed container id: expected at most 76 letters and digits, with single `.`, `_` and `-` between them"
)]
pub struct BadContainerId;

impl FromStr for ContainerId {
    type Err = BadContainerId;

    fn from_str(text: &str) -> Result<Self, BadContainerId> {
        let parts_are_good = text
            .split(['.', '_', '-'])
            .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
        let mut bytes = [0; MAX_ID];
        let place = bytes.get_mut(..text.len()).filter(|_| parts_are_good).ok_or(BadContainerId)?;
        place.copy_from_slice(text.as_bytes());
        Ok(Self { bytes, len: text.len() as u8 })
    }
}

impl TryFrom<String> for ContainerId {
    type Error = BadContainerId;

    fn try_from(text: String) -> Result<Self, BadContainerId> {
        text.parse()
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.as_str().to_owned()
    }
}

/// Takes a name of a directory and its inode.
type Visit<'a> = &'a mut dyn FnMut(&[u8], u32) -> Result<(), DiffError>;

/// The directories of a file system.
pub(super) trait Directories {
    /// An inode.
    fn inode_at(&self, ino: u32) -> Result<Inode, DiffError>;
    /// The names of a directory.
    fn each(&self, dir: &Inode, visit: Visit<'_>) -> Result<(), DiffError>;

    /// The directory of this name.
    fn directory(&self, dir: &Inode, name: &[u8]) -> Result<Option<Inode>, DiffError> {
        let mut found = None;
        self.each(dir, &mut |other, ino| {
            if other == name {
                found = Some(ino);
            }
            Ok(())
        })?;
        let Some(ino) = found else { return Ok(None) };
        Ok(Some(self.inode_at(ino)?).filter(|inode| inode.kind == FileKind::Directory))
    }
}

impl<R: ReadAt> Directories for Ext4<R> {
    fn inode_at(&self, ino: u32) -> Result<Inode, DiffError> {
        Ok(self.inode(ino)?)
    }

    fn each(&self, dir: &Inode, visit: Visit<'_>) -> Result<(), DiffError> {
        self.visit_dir(dir, |name, ino, _| visit(name, ino))
    }
}

impl<D: ReadAt> Directories for Fs<D> {
    fn inode_at(&self, ino: u32) -> Result<Inode, DiffError> {
        self.inode(ino)
    }

    fn each(&self, dir: &Inode, visit: Visit<'_>) -> Result<(), DiffError> {
        self.visit_dir(dir, |name, ino, _| visit(name, ino))
    }
}

/// The upper directory of this project's own sandboxes.
pub(super) fn own(fs: &dyn Directories, root: &Inode) -> Result<Option<Inode>, DiffError> {
    fs.directory(root, UPPER)
}

/// The upper directory of a sandbox that runhcs may have written.
///
/// # Errors
/// `Unsupported` if it could be any of several.
pub(super) fn scratch(
    fs: &dyn Directories,
    root: &Inode,
    id: Option<ContainerId>,
) -> Result<Option<Inode>, DiffError> {
    let holder = fs.directory(root, SCRATCH)?;
    if let Some(id) = id {
        let Some(holder) = holder else { return Ok(None) };
        let Some(container) = fs.directory(&holder, id.as_str().as_bytes())? else { return Ok(None) };
        return fs.directory(&container, UPPER);
    }
    let own = own(fs, root)?;
    let Some(holder) = holder else { return Ok(own) };
    if let Some(own) = &own {
        let mut empty = true;
        fs.each(own, &mut |_, _| {
            empty = false;
            Ok(())
        })?;
        if !empty {
            return Ok(Some(own.clone()));
        }
    }
    let mut containers = Vec::new();
    fs.each(&holder, &mut |name, ino| {
        containers.push((name.to_vec(), ino));
        Ok(())
    })?;
    let mut found: Option<(Vec<u8>, Inode)> = None;
    for (name, ino) in containers {
        let inode = fs.inode_at(ino)?;
        if inode.kind != FileKind::Directory {
            continue;
        }
        let Some(upper) = fs.directory(&inode, UPPER)? else { continue };
        if let Some((first, _)) = &found {
            return Err(several(first, &name));
        }
        found = Some((name, upper));
    }
    Ok(found.map(|(_, upper)| upper).or(own))
}

fn several(first: &[u8], second: &[u8]) -> DiffError {
    /// Enough to recognize an id.
    const MOST: usize = MAX_ID;
    let shown = |name: &[u8]| name.get(..MOST).unwrap_or(name).escape_ascii().to_string();
    DiffError::Unsupported {
        what: "sandbox image",
        reason: format!(
            "several containers wrote into it, among them \"{}\" and \"{}\"; name the one to read",
            shown(first),
            shown(second)
        ),
    }
}

/// The error for a sandbox without the directory.
pub(super) fn missing(id: Option<ContainerId>) -> DiffError {
    let reason = match id {
        None => "it has no directory `upper`".to_owned(),
        Some(id) => format!("it has no directory `scratch/{id}/upper`"),
    };
    DiffError::Unsupported { what: "sandbox image", reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_containerd() {
        let long = "a".repeat(MAX_ID);
        for good in ["a", "A1", "extract-617573825-32Yj", "a.b_c-d", &long] {
            assert_eq!(good.parse::<ContainerId>().unwrap().as_str(), good);
        }
        let longer = "a".repeat(MAX_ID + 1);
        for bad in ["", ".", "..", "a/b", "a..b", "-a", "a-", "a b", "ä", "a\0", &longer] {
            assert_eq!(bad.parse::<ContainerId>(), Err(BadContainerId), "{bad}");
        }
    }
}
