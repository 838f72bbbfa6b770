//! Links and parents: every inode has as many names as its link count, and directories form one tree.
//!
//! Called by [`super::check`] when all inodes were seen.

use super::{Checker, blocks::Bits, kind};
use crate::{
    Ext4Error, Place,
    error::LinkFault,
    layout::{EXT4_GOOD_OLD_FIRST_INO, EXT4_LINK_MAX, EXT4_ROOT_INO, superblock::RoCompat},
};
use disk_io::ReadAt;

impl<R: ReadAt> Checker<R> {
    pub(super) fn tree(&mut self) -> Result<(), Ext4Error> {
        if let Some((block, _)) = self.shared.iter().find(|(_, left)| **left != 0) {
            return Err(Ext4Error::corrupt(LinkFault::XattrBlockReferences, Place::block(*block)));
        }
        match self.nodes.get_mut(EXT4_ROOT_INO as usize) {
            Some(root) if root.kind == kind::DIRECTORY && root.parent_or_names == 0 => {
                root.parent_or_names = EXT4_ROOT_INO;
                root.named_as = kind::DIRECTORY;
            }
            _ => return Err(Ext4Error::corrupt(LinkFault::Root, Place::inode(EXT4_ROOT_INO))),
        }
        for (ino, node) in self.nodes.iter().enumerate().skip(1) {
            let ino = ino as u32;
            let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(ino)));
            match node.kind {
                0 | kind::RESERVED if node.named_as != 0 || node.parent_or_names != 0 => {
                    return bad(LinkFault::NamedButFree);
                }
                0 | kind::RESERVED => {}
                kind::EA => {
                    if node.named_as != 0 || node.parent_or_names != node.links {
                        return bad(LinkFault::XattrReferences);
                    }
                }
                kind::DIRECTORY => {
                    if node.named_as != kind::DIRECTORY || node.parent_or_names == 0 {
                        return bad(LinkFault::Unnamed);
                    }
                    if node.dotdot != node.parent_or_names {
                        return bad(LinkFault::Parent);
                    }
                    let links = u32::from(node.subdirs) + 2;
                    let many = links > EXT4_LINK_MAX;
                    if many && !self.fs.geometry().has_ro(RoCompat::EXT4_FEATURE_RO_COMPAT_DIR_NLINK) {
                        return bad(LinkFault::NoDirNlink);
                    }
                    if node.links != if many { 1 } else { links } {
                        return bad(LinkFault::DirectoryCount);
                    }
                }
                own => {
                    if node.named_as != own || node.parent_or_names != node.links {
                        return bad(LinkFault::Count);
                    }
                }
            }
            if ino < EXT4_GOOD_OLD_FIRST_INO && ino != EXT4_ROOT_INO && node.kind != kind::RESERVED {
                return bad(LinkFault::ReservedUnmarked);
            }
        }
        self.connected()
    }

    /// Follows parents up to the root; each directory is visited at most twice.
    fn connected(&self) -> Result<(), Ext4Error> {
        let mut reach_root = Bits::new(self.nodes.len() as u64);
        reach_root.insert(u64::from(EXT4_ROOT_INO));
        // The parent of a directory that is not known to reach the root.
        let parent = |reach_root: &Bits, ino: u32| {
            let node = self.nodes.get(ino as usize).filter(|node| node.kind == kind::DIRECTORY)?;
            (!reach_root.contains(u64::from(ino))).then_some(node.parent_or_names)
        };
        for start in 1..self.nodes.len() as u32 {
            let (mut ino, mut steps) = (start, 0);
            while let Some(up) = parent(&reach_root, ino) {
                steps += 1;
                if steps > self.report.directories {
                    return Err(Ext4Error::corrupt(LinkFault::Loop, Place::inode(ino)));
                }
                ino = up;
            }
            let mut ino = start;
            while let Some(up) = parent(&reach_root, ino) {
                reach_root.insert(u64::from(ino));
                ino = up;
            }
        }
        Ok(())
    }
}
