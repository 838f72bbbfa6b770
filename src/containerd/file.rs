//! Blobs as files of containerd's content store (`lcow.containerd.content=file`). Linux only.
//!
//! ```text
//!   <containerd's root>/io.containerd.content.v1.content/blobs/sha256/<64 hex digits>
//!     no link on the way, a regular file of our own user, of the size of the descriptor
//!     ─► thread: 1 MiB reads ─► 2 chunks ─► Apply          compressed: digested on the way, and compared at the end
//! ```
//!
//! Saves the way through gRPC, which costs a core's second for each 600 MB, but skips what containerd's API checks:
//! whether the namespace may read the blob. Therefore an option. The digest of a plain blob is its diffID, which the
//! caller compares. Called by `differ`.

use crate::driver::snapshots::{BlobBytes, Compression, DigestKind, Digesting, sniff};
use bytes::Bytes;
use futures_util::stream;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::{
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};
use tokio::sync::mpsc;

/// Where containerd's content store keeps blobs, below its root (`plugins/content/local/store.go`).
const BLOBS: &str = "io.containerd.content.v1.content/blobs/sha256";
/// Prefix of the only kind of digest that containerd makes files for today.
const SHA256: &str = "sha256:";
/// Hexadecimal digits of such a digest.
const DIGITS: usize = 64;
/// Bytes of one read.
const CHUNK: usize = 1 << 20;
/// Chunks that are read ahead.
const AHEAD: usize = 2;

/// A blob that cannot be read as a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    /// The digest is not one of a file.
    #[error("the digest is not sha256 with {DIGITS} lower-case hexadecimal digits")]
    Digest,
    /// It is not containerd's file of this blob.
    #[error("'{}' is not a blob of containerd: {reason}; check --containerd-data, or set lcow.containerd.content=grpc", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system refused.
    #[error("cannot open '{}'; check --containerd-data, or set lcow.containerd.content=grpc", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The file name of a blob.
fn name(digest: &str) -> Result<&str, FileError> {
    let hex = digest.strip_prefix(SHA256).ok_or(FileError::Digest)?;
    let valid = hex.len() == DIGITS && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    valid.then_some(hex).ok_or(FileError::Digest)
}

/// Opens the blob below containerd's root. Blocks.
fn open(root: &Path, digest: &str, size: u64) -> Result<File, FileError> {
    let name = name(digest)?;
    let path = root.join(BLOBS).join(name);
    let io = |source: rustix::io::Errno| FileError::Io { path: path.clone(), source: source.into() };
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, directory, Mode::empty()).map_err(io)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let below = format!("{BLOBS}/{name}");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened: OwnedFd = rustix::fs::openat2(&top, below, flags, Mode::empty(), resolve).map_err(io)?;
    let file = File::from(opened);
    let foreign = |reason: String| FileError::Foreign { path: path.clone(), reason };
    let found = file.metadata().map_err(|source| FileError::Io { path: path.clone(), source })?;
    let me = rustix::process::geteuid().as_raw();
    if !found.is_file() {
        return Err(foreign("it is no regular file".into()));
    }
    if found.uid() != me {
        return Err(foreign(format!("it belongs to user {}, not to {me}", found.uid())));
    }
    if found.len() != size {
        return Err(foreign(format!("it has {} bytes, the descriptor says {size}", found.len())));
    }
    Ok(file)
}

/// The bytes of a blob. An error is the last item; a compressed blob whose digest is another ends with one.
///
/// # Errors
/// [`FileError`].
pub(super) async fn read(root: PathBuf, digest: String, size: u64) -> Result<BlobBytes, FileError> {
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(AHEAD);
    let wanted = digest.clone();
    let opened = tokio::task::spawn_blocking(move || open(&root, &digest, size));
    let mut file = match opened.await {
        Ok(opened) => opened?,
        Err(error) => return Err(FileError::Io { path: PathBuf::new(), source: io::Error::other(error) }),
    };
    tokio::task::spawn_blocking(move || {
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            let item = match (&mut file).take(CHUNK as u64).read_to_end(&mut chunk) {
                Ok(0) => return,
                Ok(_) => Ok(Bytes::from(chunk)),
                Err(error) => Err(error),
            };
            // A receiver that is gone has cancelled.
            if item.is_err() | sender.blocking_send(item).is_err() {
                return;
            }
        }
    });
    Ok(Box::pin(stream::unfold(State { receiver, wanted, digesting: None, begun: false }, next)))
}

struct State {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    wanted: String,
    /// Of a compressed blob.
    digesting: Option<Digesting>,
    begun: bool,
}

async fn next(mut state: State) -> Option<(io::Result<Bytes>, State)> {
    match state.receiver.recv().await {
        Some(Ok(chunk)) => {
            if !state.begun {
                state.begun = true;
                let plain = sniff(&chunk) == Compression::Plain;
                state.digesting = (!plain).then(|| Digesting::start(DigestKind::Sha256));
            }
            if let Some(digesting) = &state.digesting {
                digesting.update(chunk.clone()).await;
            }
            Some((Ok(chunk), state))
        }
        Some(Err(error)) => {
            state.digesting = None;
            Some((Err(error), state))
        }
        None => {
            let found = state.digesting.take()?.finish().await?.to_string();
            if found == state.wanted {
                return None;
            }
            let text = format!(
                "the file of blob {} has digest {found}: containerd's content store is damaged",
                state.wanted
            );
            Some((Err(io::Error::new(io::ErrorKind::InvalidData, text)), state))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::snapshots::TarDigest;
    use futures_util::StreamExt;
    use std::os::unix::fs::symlink;

    struct Root(tempfile::TempDir);

    impl Root {
        fn new() -> Self {
            let root = Self(tempfile::tempdir().unwrap());
            std::fs::create_dir_all(root.0.path().join(BLOBS)).unwrap();
            root
        }

        /// Puts a blob under the digest of `named`.
        fn put(&self, named: &[u8], bytes: &[u8]) -> String {
            let digest = TarDigest::of(DigestKind::Sha256, named).to_string();
            std::fs::write(self.0.path().join(BLOBS).join(name(&digest).unwrap()), bytes).unwrap();
            digest
        }

        async fn read(&self, digest: &str, size: usize) -> Result<Vec<u8>, String> {
            let opened = read(self.0.path().to_owned(), digest.to_owned(), size as u64).await;
            let mut bytes = opened.map_err(|e| e.to_string())?;
            let mut all = Vec::new();
            while let Some(chunk) = bytes.next().await {
                all.extend_from_slice(&chunk.map_err(|e| e.to_string())?);
            }
            Ok(all)
        }
    }

    #[tokio::test]
    async fn blobs_are_read_whole_and_compressed_ones_are_digested() {
        let root = Root::new();
        let plain: Vec<u8> = (0..3 * CHUNK as u32 + 5).map(|n| (n / 3) as u8).collect();
        let packed = [&b"\x1f\x8b\x08\0"[..], &plain].concat();
        for bytes in [&plain[..], &packed[..], b""] {
            let digest = root.put(bytes, bytes);
            assert_eq!(root.read(&digest, bytes.len()).await.unwrap(), bytes);
        }
        let digest = root.put(b"other", &packed);
        let error = root.read(&digest, packed.len()).await.unwrap_err();
        assert!(error.contains("damaged"), "{error}");
    }

    #[tokio::test]
    async fn what_is_not_containerds_file_is_refused() {
        let root = Root::new();
        let digest = root.put(b"x", b"x");
        assert!(root.read(&digest, 2).await.unwrap_err().contains("1 bytes"));
        let blobs = root.0.path().join(BLOBS);
        let file = blobs.join(name(&digest).unwrap());
        std::fs::rename(&file, root.0.path().join("elsewhere")).unwrap();
        symlink(root.0.path().join("elsewhere"), &file).unwrap();
        assert!(root.read(&digest, 1).await.unwrap_err().contains("cannot open"));
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(root.read(&digest, 1).await.unwrap_err().contains("no regular file"));
        for bad in ["", "sha256:", "sha512:ab", "sha256:../../../../etc/passwd", &digest.to_uppercase()] {
            assert!(root.read(bad, 1).await.unwrap_err().contains("digest"), "{bad}");
        }
    }
}
