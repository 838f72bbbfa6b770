//! A token for threads that may wait for a disk.

/// Proof that the current thread may block. A disk can take seconds for one sync, and a runtime whose few threads wait
/// for it serves no requests. Every function of the store that touches a file requires this; lookups, which only read
/// memory, do not.
#[derive(Debug)]
pub struct DiskThread(());

impl DiskThread {
    /// Runs work on a thread that may block.
    ///
    /// # Errors
    /// The work panicked, or the runtime is shutting down.
    pub async fn run<T: Send + 'static>(
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        // What is logged on the way belongs to the request that asked for it.
        let span = tracing::Span::current();
        tokio::task::spawn_blocking(move || span.in_scope(|| work(&Self(())))).await
    }

    /// Asserts that no task of a runtime runs on this thread: in a command, before the first request, or on a dedicated
    /// thread. `tests/architecture.rs` lists the callers that may do so.
    pub const fn here() -> Self {
        Self(())
    }
}
