//! Doors: whether an ApplyDiff may still deliver a tar to a layer.
//!
//! ```text
//!   ApplyDiff ─► enter ──► … refused, failed, panicked, given up, client gone ──► stays closed, with the first reason
//!                  │  └──► the body ended properly and was empty ─────────────► reopen
//!                  └─────► applied ───────────────────────────────────────────► reopen (the state refuses from now on)
//!   Remove ─► part: a running ApplyDiff is given up ─► the layer goes ─► forget
//! ```
//!
//! A client's transport reads from the tar before this program sees any of it, and when the connection breaks,
//! dockerd's client sends what is left as a new request. A request that did not end as a complete tar, or as provably
//! empty, may therefore have consumed the beginning of the tar, however early it failed: the door of that layer stays
//! closed until Remove.
//!
//! Invariants: a door is closed before anything else is done for a request, and only `reopen` opens it, so no exit path
//! (`?`, a panic, a dropped future) leaves it open. A layer that does not exist has a door too: it may be created
//! before the client retries. A layer that an earlier process created has none and takes no tar (`Layer::made_here`):
//! what the end of that process cut is unknown. Called by `apply`, `lifecycle` and, for requests that broke off in
//! their head, `api` through `Driver::distrust`.

use crate::store::LayerId;
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a Remove waits for the end of an ApplyDiff that it cancels.
const PARTING: Duration = Duration::from_secs(10);
/// A door of a layer that never existed is forgotten after this time; clients repeat a request for 30 s.
const MEMORY: Duration = Duration::from_mins(10);
/// Number of closed doors at which old ones are dropped.
const SWEEP_AT: usize = 1024;
/// Longest reason that is kept, in bytes.
const MAX_REASON: usize = 4096;

/// Why a door is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Closed {
    /// Another ApplyDiff is in progress.
    Busy,
    /// An earlier ApplyDiff was refused or failed; this was the first reason.
    Failed(Arc<str>),
}

/// Identifies one layer among those of the same id: a number of its home, and its generation there.
pub(super) type Which = (u64, u64);

/// The doors of all homes.
#[derive(Debug, Default)]
pub(super) struct Doors {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    tickets: u64,
    closed: HashMap<LayerId, Door>,
}

#[derive(Debug)]
struct Door {
    /// Distinguishes this closing from a later one.
    ticket: u64,
    /// `None` if no layer existed: then it applies to any later one.
    which: Option<Which>,
    since: Instant,
    /// `None` while the ApplyDiff runs.
    reason: Option<Arc<str>>,
    give_up: CancellationToken,
    /// Ends with the [`Entry`].
    running: Option<watch::Receiver<()>>,
}

/// The door of a running ApplyDiff.
#[derive(Debug)]
pub(super) struct Entry {
    shared: Arc<Mutex<Shared>>,
    id: LayerId,
    ticket: u64,
    give_up: CancellationToken,
    _running: watch::Sender<()>,
}

impl Doors {
    /// Closes the door for a new ApplyDiff.
    ///
    /// # Errors
    /// It was closed already.
    pub(super) fn enter(&self, id: &LayerId, which: Option<Which>) -> Result<Entry, Closed> {
        let mut shared = self.shared.lock();
        if let Some(closed) = shared.closed(id, which) {
            return Err(closed);
        }
        let (sender, receiver) = watch::channel(());
        let ticket = shared.close(id, which, None, Some(receiver));
        let give_up = shared.closed.get(id).map(|door| door.give_up.clone()).unwrap_or_default();
        Ok(Entry { shared: self.shared.clone(), id: id.clone(), ticket, give_up, _running: sender })
    }

    /// Why the door is closed, if it is.
    pub(super) fn closed(&self, id: &LayerId, which: Option<Which>) -> Option<Closed> {
        self.shared.lock().closed(id, which)
    }

    /// Closes a door for a request that failed before it could enter.
    pub(super) fn close(&self, id: &LayerId, which: Option<Which>, reason: &str) {
        let mut shared = self.shared.lock();
        if shared.closed(id, which).is_none() {
            shared.close(id, which, Some(bounded(reason)), None);
        }
    }

    /// The latest closing of any door, for [`Doors::forget`] after a removal that cancelled nothing.
    pub(super) fn latest(&self) -> u64 {
        self.shared.lock().tickets
    }

    /// Cancels a running ApplyDiff of a layer that is to be removed and waits for its end. The result is for
    /// [`Doors::forget`], after the removal.
    pub(super) async fn part(&self, id: &LayerId) -> u64 {
        let (upto, running) = {
            let shared = self.shared.lock();
            let running = shared.closed.get(id).and_then(|door| {
                door.give_up.cancel();
                door.running.clone()
            });
            (shared.tickets, running)
        };
        if let Some(mut running) = running {
            // An error means that the entry was dropped, which is what is waited for.
            let _ = tokio::time::timeout(PARTING, running.changed()).await;
        }
        upto
    }

    /// Opens the door of a removed layer, unless it was closed after `upto`.
    pub(super) fn forget(&self, id: &LayerId, upto: u64) {
        let mut shared = self.shared.lock();
        if shared.closed.get(id).is_some_and(|door| door.ticket <= upto) {
            shared.closed.remove(id);
        }
    }
}

impl Shared {
    fn closed(&self, id: &LayerId, which: Option<Which>) -> Option<Closed> {
        let door = self.closed.get(id)?;
        if let (Some(then), Some(now)) = (door.which, which)
            && then != now
        {
            return None;
        }
        Some(door.reason.clone().map_or(Closed::Busy, Closed::Failed))
    }

    fn close(
        &mut self,
        id: &LayerId,
        which: Option<Which>,
        reason: Option<Arc<str>>,
        running: Option<watch::Receiver<()>>,
    ) -> u64 {
        if self.closed.len() >= SWEEP_AT {
            self.closed.retain(|_, door| {
                door.which.is_some() || door.running.is_some() || door.since.elapsed() < MEMORY
            });
        }
        self.tickets += 1;
        let door = Door {
            ticket: self.tickets,
            which,
            since: Instant::now(),
            reason,
            give_up: CancellationToken::new(),
            running,
        };
        self.closed.insert(id.clone(), door);
        self.tickets
    }
}

impl Entry {
    /// Records the layer that the request found.
    pub(super) fn found(&self, which: Which) {
        if let Some(door) = self.mine(&mut self.shared.lock()) {
            door.which = Some(which);
        }
    }

    /// Resolves when the layer is being removed.
    pub(super) fn given_up(&self) -> impl Future<Output = ()> + 'static {
        self.give_up.clone().cancelled_owned()
    }

    /// Keeps the door closed, with a reason.
    pub(super) fn fail(self, reason: &str) {
        if let Some(door) = self.mine(&mut self.shared.lock()) {
            door.reason = Some(bounded(reason));
        }
    }

    /// Opens the door again: nothing was lost, or the layer is complete and its state refuses further tars.
    pub(super) fn reopen(self) {
        let mut shared = self.shared.lock();
        if self.mine(&mut shared).is_some() {
            shared.closed.remove(&self.id);
        }
    }

    fn mine<'a>(&self, shared: &'a mut Shared) -> Option<&'a mut Door> {
        shared.closed.get_mut(&self.id).filter(|door| door.ticket == self.ticket)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut shared = self.shared.lock();
        if let Some(door) = self.mine(&mut shared) {
            door.running = None;
            door.reason.get_or_insert_with(|| "the request ended before its tar did".into());
        }
    }
}

/// Cuts a reason to [`MAX_REASON`].
pub(super) fn bounded(reason: &str) -> Arc<str> {
    reason[..reason.floor_char_boundary(MAX_REASON)].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> LayerId {
        "layer".parse().unwrap()
    }

    fn failed(doors: &Doors, which: Option<Which>) -> String {
        match doors.enter(&id(), which) {
            Err(Closed::Failed(reason)) => reason.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_door_opens_only_by_reopen_and_forget() {
        let doors = Doors::default();
        let one = Some((1, 1));
        let entry = doors.enter(&id(), one).unwrap();
        assert_eq!(doors.enter(&id(), one).unwrap_err(), Closed::Busy);
        entry.reopen();
        doors.enter(&id(), one).unwrap().fail("first");
        assert_eq!(failed(&doors, one), "first");
        doors.close(&id(), one, "second");
        assert_eq!(failed(&doors, one), "first", "the first reason is kept");
        let upto = doors.shared.lock().tickets;
        doors.forget(&id(), upto);
        drop(doors.enter(&id(), one).unwrap());
        assert!(failed(&doors, one).contains("ended before"), "a dropped entry stays closed");
        // A removal that found children at first, and none when its turn came.
        let upto = doors.latest();
        doors.forget(&id(), upto);
        doors.enter(&id(), None).unwrap().reopen();
        // Another layer of the same id, in another home or after a removal that did not use the doors.
        doors.enter(&id(), Some((1, 2))).unwrap().reopen();
    }

    #[test]
    fn a_layer_that_was_not_there_is_closed_when_it_comes() {
        let doors = Doors::default();
        doors.enter(&id(), None).unwrap().fail("it does not exist");
        assert_eq!(failed(&doors, Some((1, 7))), "it does not exist");
        // A layer that is created while the request looks for it belongs to that request.
        let upto = doors.shared.lock().tickets;
        doors.forget(&id(), upto);
        let entry = doors.enter(&id(), None).unwrap();
        entry.found((1, 8));
        entry.fail("cut");
        assert_eq!(failed(&doors, Some((1, 8))), "cut");
        doors.enter(&id(), Some((1, 9))).unwrap().reopen();
    }

    #[tokio::test]
    async fn a_removal_waits_for_the_apply_and_opens_no_later_door() {
        let doors = Arc::new(Doors::default());
        let entry = doors.enter(&id(), Some((1, 1))).unwrap();
        let apply = tokio::spawn(async move {
            entry.given_up().await;
            entry.fail("removed");
        });
        let upto = doors.part(&id()).await;
        assert!(apply.is_finished() || failed(&doors, Some((1, 1))) == "removed");
        // The layer was removed, and another of its id entered before `forget`.
        let entry = doors.enter(&id(), Some((1, 2))).unwrap();
        doors.forget(&id(), upto);
        assert_eq!(doors.enter(&id(), Some((1, 2))).unwrap_err(), Closed::Busy);
        entry.reopen();
    }

    #[test]
    fn long_reasons_are_cut_between_letters() {
        assert_eq!(bounded(&"é".repeat(MAX_REASON)).len(), MAX_REASON);
        assert_eq!(bounded(&format!("x{}", "é".repeat(MAX_REASON))).len(), MAX_REASON - 1);
    }
}
