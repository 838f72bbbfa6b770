//! How many clients are connected, so that their last one's end is noticed.
//!
//! ```text
//!   accept ─► arrive ─► Client … dropped with the connection ─► none left for GONE_AFTER ─► all_gone
//! ```
//!
//! An engine keeps a connection open for as long as it runs, and does not always say that it stops: dockerd with
//! live-restore sends no Cleanup. Called by `api` and `containerd`, which then unmount what no container uses.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;

/// How long there must be no connection: a client that opens one for each request is not gone between two.
const GONE_AFTER: Duration = Duration::from_secs(3);

/// The clients of one listener. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Clients(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    connected: AtomicUsize,
    last_left: Notify,
}

/// A client that is connected, until this is dropped.
#[derive(Debug)]
pub struct Client(Arc<Inner>);

impl Clients {
    /// Counts a client.
    #[must_use = "it is counted until this is dropped"]
    pub fn arrive(&self) -> Client {
        self.0.connected.fetch_add(1, Ordering::SeqCst);
        Client(self.0.clone())
    }

    /// Waits until the last client has left and no other has come for a few seconds.
    pub async fn all_gone(&self) {
        self.gone_for(GONE_AFTER).await;
    }

    async fn gone_for(&self, pause: Duration) {
        loop {
            self.0.last_left.notified().await;
            tokio::time::sleep(pause).await;
            if self.0.connected.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.0.connected.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.last_left.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const PAUSE: Duration = Duration::from_millis(5);

    #[tokio::test]
    async fn they_are_gone_when_the_last_one_has_left_for_a_while() {
        let clients = Clients::default();
        let (one, two) = (clients.arrive(), clients.arrive());
        drop(one);
        assert!(clients.gone_for(PAUSE).now_or_never().is_none(), "one is still there");
        drop(two);
        // Another one comes before the pause can begin.
        let early = clients.arrive();
        let gone = tokio::spawn({
            let clients = clients.clone();
            async move { clients.gone_for(PAUSE).await }
        });
        tokio::time::sleep(PAUSE * 10).await;
        assert!(!gone.is_finished(), "another one has come");
        drop(early);
        gone.await.unwrap();
    }
}
