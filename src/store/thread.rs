//! Where the store may wait for a disk.

/// Proof that its holder runs on a thread that may stand still: a disk can take seconds for one sync, and a runtime
/// whose few threads wait for it answers nobody. Whatever of the store touches a file asks for this; look-ups, which
/// read memory only, do not.
#[derive(Debug)]
pub struct DiskThread(());

impl DiskThread {
    /// Runs work on a thread made for waiting.
    ///
    /// # Errors
    /// The work panicked, or the runtime ends.
    pub async fn run<T: Send + 'static>(
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        tokio::task::spawn_blocking(move || work(&Self(()))).await
    }

    /// The caller says that no task of a runtime runs on this thread: a command that does one thing, a start before
    /// the first request, a thread of one's own. `tests/architecture.rs` lists who may say so.
    pub const fn here() -> Self {
        Self(())
    }
}
