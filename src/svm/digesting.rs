//! The daemon's digest of a tar that passes by, on a thread of its own.
//!
//! ```text
//!   Sender::body ─ chunks ─┐
//!                          ├─► 8 chunks ─► blocking thread ─► digest      a dropped Digesting ends the thread
//!   Receiver::next ─ Data ─┘
//! ```
//!
//! For VMs whose agents do not digest ([`ServiceVm::daemon_digests`](super::ServiceVm::daemon_digests)). Bytes are
//! moved and digested, never interpreted. Called by `exchange`.

use bytes::Bytes;
use svm_protocol::{DigestKind, TarDigest};
use tokio::{sync::mpsc, task::JoinHandle};

/// Chunks queued for the thread: it must not hold more of a stream than its window.
const CHUNKS: usize = 8;

/// A digest being computed.
pub(super) struct Digesting {
    chunks: mpsc::Sender<Bytes>,
    digest: JoinHandle<TarDigest>,
}

impl Digesting {
    /// Starts a thread for an empty stream.
    pub(super) fn start() -> Self {
        let (chunks, mut queue) = mpsc::channel::<Bytes>(CHUNKS);
        let digest = tokio::task::spawn_blocking(move || {
            let mut hasher = DigestKind::Blake3.hasher();
            while let Some(chunk) = queue.blocking_recv() {
                hasher.update(&chunk);
            }
            hasher.finish()
        });
        Self { chunks, digest }
    }

    /// Adds bytes of the stream.
    pub(super) async fn update(&self, chunk: Bytes) {
        // If the thread is gone, `finish` returns `None`.
        let _ = self.chunks.send(chunk).await;
    }

    /// The digest of all bytes; `None` if the runtime is ending.
    pub(super) async fn finish(self) -> Option<TarDigest> {
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
        let digesting = Digesting::start();
        for chunk in data.chunks(30_001) {
            digesting.update(Bytes::copy_from_slice(chunk)).await;
        }
        assert_eq!(digesting.finish().await, Some(TarDigest::of(DigestKind::Blake3, &data)));
        assert_eq!(Digesting::start().finish().await, Some(TarDigest::default()));
    }
}
