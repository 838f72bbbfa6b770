//! Directories: linear, depth first, children by inode number and name; every block ends with an empty entry.

use super::{BLOCK, HcsshimWriter, Result, ino_of};
use crate::layout::dir::{entry_size, file_type, put_entry};
use disk_io::WriteAt;

/// The least room for the empty entry.
const FILLER: usize = 12;

impl<W: WriteAt> HcsshimWriter<W> {
    /// Writes the directory tree.
    pub(super) fn write_directories(&mut self) -> Result<()> {
        // (directory, parent), the next one last.
        let mut todo = vec![(0, 0)];
        while let Some((dir, parent)) = todo.pop() {
            let below = self.write_directory(dir, parent)?;
            todo.extend(below.into_iter().rev().map(|child| (child, dir)));
        }
        Ok(())
    }

    /// Writes one directory; gives its subdirectories.
    fn write_directory(&mut self, dir: u32, parent: u32) -> Result<Vec<u32>> {
        // Nothing is looked up in it any more.
        let children = self.nodes[dir as usize].children.take().unwrap_or_default();
        let mut children: Vec<(u32, Box<[u8]>)> =
            children.0.into_iter().map(|(name, node)| (node, name)).collect();
        children.sort_unstable();
        let mut block = [0; BLOCK as usize];
        let (mut at, mut size) = (0, 0);
        let dots: [(u32, &[u8]); 2] = [(dir, b"."), (parent, b"..")];
        for (node, name) in dots.into_iter().chain(children.iter().map(|(node, name)| (*node, &name[..]))) {
            let len = entry_size(name.len());
            if block.len() - at < len + FILLER {
                self.write_dir_block(&mut block, at)?;
                (at, size) = (0, size + BLOCK);
            }
            put_entry(&mut block[at..], ino_of(node), len, name, file_type(self.nodes[node as usize].mode));
            at += len;
        }
        self.write_dir_block(&mut block, at)?;
        size += BLOCK;
        self.end_run(dir, size)?;
        self.nodes[dir as usize].size = size;
        children.retain(|(node, _)| self.nodes[*node as usize].is_dir());
        Ok(children.into_iter().map(|(node, _)| node).collect())
    }

    fn write_dir_block(&mut self, block: &mut [u8; BLOCK as usize], at: usize) -> Result<()> {
        let rest = block.len() - at;
        put_entry(&mut block[at..], 0, rest, b"", 0);
        self.out.write(block)?;
        block.fill(0);
        Ok(())
    }
}
