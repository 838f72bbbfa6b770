//! Links and parents: every inode is reached, as often as it says, and directories form one tree.
//!
//! Called by [`super::check`] when all inodes were seen.

use super::{Checker, FIRST_INO, ROOT_INO, kind};
use crate::{
    Ext4Error,
    reader::{corrupt, superblock::ro_compat},
};
use disk_io::ReadAt;

/// `EXT4_LINK_MAX`: a directory with more subdirectories has a link count of 1.
const LINK_MAX: u32 = 65_000;

impl<R: ReadAt> Checker<R> {
    pub(super) fn tree(&mut self) -> Result<(), Ext4Error> {
        if self.shared.values().any(|left| *left != 0) {
            return Err(corrupt("xattr blocks", "one has fewer owners than it says"));
        }
        match self.nodes.get_mut(ROOT_INO as usize) {
            Some(root) if root.kind == kind::DIRECTORY && root.parent_or_names == 0 => {
                root.parent_or_names = ROOT_INO;
                root.named_as = kind::DIRECTORY;
            }
            _ => return Err(corrupt("inode 2", "the root is no directory, or has a name")),
        }
        for (ino, node) in self.nodes.iter().enumerate().skip(1) {
            let bad = |reason: &'static str| Err(corrupt(format!("inode {ino}"), reason));
            match node.kind {
                0 | kind::RESERVED if node.named_as != 0 || node.parent_or_names != 0 => {
                    return bad("it is named, but free or reserved");
                }
                0 | kind::RESERVED => {}
                kind::EA => {
                    if node.named_as != 0 || node.parent_or_names != node.links {
                        return bad("a value of an xattr with a wrong count of references");
                    }
                }
                kind::DIRECTORY => {
                    if node.named_as != kind::DIRECTORY || node.parent_or_names == 0 {
                        return bad("a directory without a name");
                    }
                    if node.dotdot != node.parent_or_names {
                        return bad("`..` does not name the parent");
                    }
                    let links = u32::from(node.subdirs) + 2;
                    let many = links > LINK_MAX;
                    if many && self.fs.geometry().feature_ro_compat & ro_compat::DIR_NLINK == 0 {
                        return bad("more subdirectories than counted, but no feature dir_nlink");
                    }
                    if node.links != if many { 1 } else { links } {
                        return bad("a directory's link count is wrong");
                    }
                }
                own => {
                    if node.named_as != own || node.parent_or_names != node.links {
                        return bad("its names do not fit its type or link count");
                    }
                }
            }
            if (ino as u32) < FIRST_INO && ino as u32 != ROOT_INO && node.kind != kind::RESERVED {
                return bad("a reserved inode is not marked as used");
            }
        }
        self.connected()
    }

    /// Follows parents up to the root; each directory is visited at most twice.
    fn connected(&mut self) -> Result<(), Ext4Error> {
        // `dotdot` was checked and equals the parent: from here on it marks what was seen. 0: reaches the root.
        for start in 1..self.nodes.len() as u32 {
            let mut ino = start;
            loop {
                if ino == ROOT_INO {
                    break;
                }
                let Some(node) =
                    self.node(ino).filter(|node| node.kind == kind::DIRECTORY && node.dotdot != 0)
                else {
                    break;
                };
                if node.dotdot == u32::MAX {
                    return Err(corrupt(format!("inode {ino}"), "a directory is inside itself"));
                }
                node.dotdot = u32::MAX;
                ino = node.parent_or_names;
            }
            // Second way up: these are good.
            let mut ino = start;
            while ino != ROOT_INO {
                match self.node(ino) {
                    Some(node) if node.kind == kind::DIRECTORY && node.dotdot == u32::MAX => {
                        node.dotdot = 0;
                        ino = node.parent_or_names;
                    }
                    _ => break,
                }
            }
        }
        Ok(())
    }
}
