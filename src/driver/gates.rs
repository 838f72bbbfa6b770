//! One gate per layer.
//!
//! A gate is held while the layer's mount state changes and while a service VM reads the metadata of a sandbox, so
//! that no mount or unmount happens under its eyes. It is never held across bulk I/O. Several gates are always taken
//! in the order of their ids, so that two takers cannot wait for each other.

use crate::store::LayerId;
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
    _guards: Vec<OwnedMutexGuard<()>>,
}

impl Gates {
    /// Closes the gates of some layers, waiting for whoever holds them now.
    pub(super) async fn close<'a>(&self, ids: impl IntoIterator<Item = &'a LayerId>) -> Held {
        let ordered: BTreeSet<&LayerId> = ids.into_iter().collect();
        let mut guards = Vec::with_capacity(ordered.len());
        for id in ordered {
            let gate = {
                let mut gates = self.gates.lock();
                // A gate that only the map knows is nobody's: drop those now and then, so that the map stays as small
                // as the number of layers in use.
                if gates.len() >= SWEEP_AT {
                    gates.retain(|_, gate| Arc::strong_count(gate) > 1);
                }
                gates.entry(id.clone()).or_default().clone()
            };
            guards.push(gate.lock_owned().await);
        }
        Held { _guards: guards }
    }
}

/// Number of known gates at which idle ones are dropped.
const SWEEP_AT: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn takers_of_overlapping_sets_take_turns_and_never_dead_lock() {
        let gates = Arc::new(Gates::default());
        let ids: Vec<LayerId> = (0..6).map(|n| format!("l{n}").parse().unwrap()).collect();
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
        drop(held);
        timeout(Duration::from_secs(5), gates.close(&ids[..2])).await.unwrap();
    }
}
