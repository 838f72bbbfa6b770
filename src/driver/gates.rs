//! Gates: one lock per layer for its mount state.
//!
//! ```text
//!   look: which layers? ─► close their gates ─► look again: the same? ─► work, on a thread that may wait ─► open
//!          ▲                                       │ no
//!          └───────────────── open ◄───────────────┘
//! ```
//!
//! A gate is held while the layer's mount state changes and while a service VM reads the metadata of a sandbox, so that
//! no mount or unmount happens meanwhile. It is never held across bulk I/O. Several gates are always taken in the order
//! of their ids, so they cannot deadlock.
//!
//! Closed gates move into the work ([`Held::run`]): the request of a client that hangs up is dropped, which must not
//! open them while the work goes on. Functions that change mounts require them ([`Held::covers`]).

use super::{DriverError, on_disk_thread};
use crate::store::{DiskThread, LayerId};
use parking_lot::Mutex;
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};
use tokio::sync::OwnedMutexGuard;

type Gate = Arc<tokio::sync::Mutex<()>>;

/// The gates of a home.
#[derive(Debug, Default)]
pub(super) struct Gates {
    gates: Mutex<HashMap<LayerId, Gate>>,
}

/// Some closed gates; they open on drop.
#[derive(Debug)]
pub(super) struct Held {
    ids: BTreeSet<LayerId>,
    _guards: Vec<OwnedMutexGuard<()>>,
}

impl Held {
    /// Fails if the gate of a layer is not among these, which is a bug.
    pub(super) fn covers(&self, id: &LayerId) -> Result<(), DriverError> {
        if self.ids.contains(id) {
            return Ok(());
        }
        Err(DriverError::Internal(format!("layer {id} was about to change with an open gate")))
    }

    /// Runs `work` under these gates. They stay closed until it drops them, whether or not the caller still waits.
    pub(super) async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce(&DiskThread, Self) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        on_disk_thread(move |thread| work(thread, self)).await
    }
}

impl Gates {
    fn gate(&self, id: &LayerId) -> Gate {
        let mut gates = self.gates.lock();
        // Drop unused gates now and then, so that the map stays as small as the number of layers in use.
        if gates.len() >= SWEEP_AT {
            gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        }
        gates.entry(id.clone()).or_default().clone()
    }

    /// Closes the gates of some layers; waits for their current holders.
    pub(super) async fn close<'a>(&self, ids: impl IntoIterator<Item = &'a LayerId>) -> Held {
        let ids: BTreeSet<LayerId> = ids.into_iter().cloned().collect();
        let mut guards = Vec::with_capacity(ids.len());
        for id in &ids {
            let gate = self.gate(id);
            guards.push(gate.lock_owned().await);
        }
        Held { ids, _guards: guards }
    }

    /// Closes the gates of the layers that `look` returns, and repeats until it returns the same ones under closed
    /// gates.
    pub(super) async fn close_what(
        &self,
        look: impl Fn() -> Result<BTreeSet<LayerId>, DriverError>,
    ) -> Result<Held, DriverError> {
        // Each further round means that another request has changed the set meanwhile.
        loop {
            let held = self.close(&look()?).await;
            if look()? == held.ids {
                return Ok(held);
            }
        }
    }

    /// Closes one gate if it is open.
    #[cfg(any(target_os = "linux", test))]
    pub(super) fn try_close(&self, id: &LayerId) -> Option<Held> {
        let guard = self.gate(id).try_lock_owned().ok()?;
        Some(Held { ids: [id.clone()].into(), _guards: vec![guard] })
    }
}

/// Number of known gates at which idle ones are dropped.
const SWEEP_AT: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    fn ids(count: usize) -> Vec<LayerId> {
        (0..count).map(|n| format!("l{n}").parse().unwrap()).collect()
    }

    #[tokio::test]
    async fn takers_of_overlapping_sets_take_turns_and_never_dead_lock() {
        let gates = Arc::new(Gates::default());
        let ids = ids(6);
        let tasks: Vec<_> = (0..200)
            .map(|n| {
                let (gates, mut wanted) =
                    (gates.clone(), vec![ids[n % 6].clone(), ids[(n * 5 + 1) % 6].clone()]);
                wanted.push(wanted[0].clone());
                tokio::spawn(async move {
                    let held = gates.close(&wanted).await;
                    tokio::task::yield_now().await;
                    drop(held);
                })
            })
            .collect();
        for task in tasks {
            timeout(Duration::from_secs(20), task).await.expect("no dead lock").unwrap();
        }
        let held = gates.close(&ids[..1]).await;
        assert!(timeout(Duration::from_millis(50), gates.close(&ids[..2])).await.is_err());
        assert!(gates.try_close(&ids[0]).is_none() && gates.try_close(&ids[1]).is_some());
        drop(held);
        timeout(Duration::from_secs(5), gates.close(&ids[..2])).await.unwrap();
    }

    /// The set changes while its gates are waited for: the old set is released and the new one taken.
    #[tokio::test]
    async fn gates_are_looked_at_again_when_they_are_closed() {
        let (gates, ids) = (Arc::new(Gates::default()), ids(3));
        let wanted = Arc::new(Mutex::new(BTreeSet::from([ids[0].clone(), ids[1].clone()])));
        let blocking = gates.close(&ids[..1]).await;
        let taker = {
            let (gates, wanted) = (gates.clone(), wanted.clone());
            tokio::spawn(async move { gates.close_what(|| Ok(wanted.lock().clone())).await.unwrap() })
        };
        tokio::task::yield_now().await;
        *wanted.lock() = [ids[0].clone(), ids[2].clone()].into();
        drop(blocking);
        let held = timeout(Duration::from_secs(20), taker).await.unwrap().unwrap();
        assert!(held.covers(&ids[2]).is_ok() && held.covers(&ids[1]).is_err());
        assert!(gates.try_close(&ids[1]).is_some() && gates.try_close(&ids[2]).is_none());
    }

    /// A cancelled request does not open the gates of work that it began.
    #[tokio::test]
    async fn gates_stay_closed_under_work_that_nobody_waits_for() {
        let (gates, ids) = (Arc::new(Gates::default()), ids(1));
        let held = gates.close(&ids).await;
        let (begun, begins) = tokio::sync::oneshot::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let request = tokio::spawn(held.run(move |_, _held| {
            begun.send(()).unwrap();
            ends.recv().unwrap();
            Ok(())
        }));
        begins.await.unwrap();
        request.abort();
        request.await.unwrap_err();
        assert!(gates.try_close(&ids[0]).is_none(), "the gate is open while the work goes on");
        end.send(()).unwrap();
        timeout(Duration::from_secs(20), gates.close(&ids)).await.unwrap();
    }
}
