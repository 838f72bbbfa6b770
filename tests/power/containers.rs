//! What containers do: they mount what the daemon shows, write files, and sync them as any program does.
//!
//! Called by `work`, `round` and `verify`.

use containerd_api::types::Mount;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Mounts of containerd at a place; unmounted on drop.
pub(crate) struct Shown {
    pub(crate) place: PathBuf,
}

impl Shown {
    /// Mounts a snapshot below `folder`, as a shim does.
    pub(crate) fn mount(folder: &Path, mounts: &[Mount]) -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let place = folder.join("mnt").join(NUMBER.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir_all(&place)?;
        let [only] = mounts else { return Err(io::Error::other(format!("{} mounts", mounts.len()))) };
        let mut flags = MountFlags::empty();
        let mut data: Vec<&str> = Vec::new();
        for option in &only.options {
            match option.as_str() {
                "ro" => flags |= MountFlags::RDONLY,
                "rw" => {}
                "rbind" => flags |= MountFlags::BIND | MountFlags::REC,
                other => data.push(other),
            }
        }
        let data = CString::new(data.join(",")).map_err(io::Error::other)?;
        mount(&only.source, &place, &only.r#type, flags, Some(data.as_c_str()))?;
        Ok(Self { place })
    }

    /// Unmounts it.
    pub(crate) fn end(self) -> io::Result<()> {
        Ok(unmount(&self.place, UnmountFlags::empty())?)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = unmount(&self.place, UnmountFlags::DETACH);
    }
}

/// Writes a file and syncs it and its directory: it must survive.
pub(crate) fn write_synced(folder: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(folder.join(name))?;
    file.write_all(content)?;
    file.sync_all()?;
    File::open(folder)?.sync_all()
}

/// The bytes of the n-th file of a container that writes on and on.
pub(crate) fn nth(n: u64) -> Vec<u8> {
    super::support::noise(n + 1, 3000 + (n as usize % 7) * 900)
}

/// Writes and syncs files until the cut; `done` is the number of files that were synced before it.
pub(crate) fn write_on(folder: &Path, done: &AtomicU64, cutting: &AtomicBool) {
    for n in 0.. {
        let written = write_synced(folder, &format!("n{n}"), &nth(n));
        if written.is_err() || cutting.load(Ordering::SeqCst) {
            return;
        }
        done.store(n + 1, Ordering::SeqCst);
    }
}
