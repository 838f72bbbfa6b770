//! The daemon's digest of a tar that passes by, on a thread of its own.
//!
//! ```text
//!   Sender::body ─ chunks ─┐
//!                          ├─► 8 chunks ─► blocking thread ─► digest      a dropped Digesting ends the thread
//!   Receiver::next ─ Data ─┘
//! ```
//!
//! For VMs whose agents do not digest ([`ServiceVm::daemon_digests`](super::ServiceVm::daemon_digests)), and for digests
//! that a service VM must not be able to choose. Bytes are moved and digested, never interpreted. Called by `exchange` and
//! by `driver::snapshots`.

use bytes::Bytes;
use svm_protocol::{DigestKind, TarDigest};
use tokio::{sync::mpsc, task::JoinHandle};

/// Chunks queued for the thread: it must not hold more of a stream than its window.
const CHUNKS: usize = 8;

/// A digest being computed.
pub struct Digesting {
    chunks: mpsc::Sender<Bytes>,
    digest: JoinHandle<TarDigest>,
}

impl Digesting {
    /// Starts a thread for an empty stream. Must be called within a tokio runtime.
    pub fn start(kind: DigestKind) -> Self {
        let (chunks, mut queue) = mpsc::channel::<Bytes>(CHUNKS);
        let digest = tokio::task::spawn_blocking(move || {
            let mut hasher = kind.hasher();
            while let Some(chunk) = queue.blocking_recv() {
                hasher.update(&chunk);
            }
            hasher.finish()
        });
        Self { chunks, digest }
    }

    /// Adds bytes of the stream.
    pub async fn update(&self, chunk: Bytes) {
        // If the thread is gone, `finish` returns `None`.
        let _ = self.chunks.send(chunk).await;
    }

    /// The digest of all bytes; `None` if the runtime is ending.
    pub async fn finish(self) -> Option<TarDigest> {
        drop(self.chunks);
        self.digest.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_digest_is_that_of_all_chunks_in_order() {
        let data: Vec<u8> = (0..1_000_000u32).map(|n| (n / 7) as u8).collect();
        let digesting = Digesting::start(DigestKind::Blake3);
        for chunk in data.chunks(30_001) {
            digesting.update(Bytes::copy_from_slice(chunk)).await;
        }
        assert_eq!(digesting.finish().await, Some(TarDigest::of(DigestKind::Blake3, &data)));
        assert_eq!(Digesting::start(DigestKind::Blake3).finish().await, Some(TarDigest::default()));
    }
}
