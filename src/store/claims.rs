//! Claims: one thread at a time works in a layer's directory.
//!
//! ```text
//!   create, update, commit, remove ─► claim(id) ─► file work, syncs ─► publish in the index ─► claim given back
//!                                                                      (its lock: held for this only)
//! ```

use super::LayerId;
use parking_lot::{Condvar, Mutex};
use std::{collections::HashSet, sync::Arc};

/// The directories that are claimed now.
#[derive(Debug, Clone, Default)]
pub(super) struct Claims {
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    busy: Mutex<HashSet<String>>,
    freed: Condvar,
}

/// A claim on one layer's directory; released on drop.
#[derive(Debug)]
pub(super) struct Claim {
    state: Arc<State>,
    folder: String,
}

impl Claims {
    /// Waits until the directory of `id` is free. A thread holds at most one claim, so claims cannot deadlock.
    pub(super) fn take(&self, id: &LayerId) -> Claim {
        // On Windows, names that differ only in case are the same directory.
        let folder = if cfg!(windows) { id.as_str().to_ascii_lowercase() } else { id.to_string() };
        let mut busy = self.state.busy.lock();
        while !busy.insert(folder.clone()) {
            self.state.freed.wait(&mut busy);
        }
        drop(busy);
        Claim { state: self.state.clone(), folder }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.state.busy.lock().remove(&self.folder);
        self.state.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn one_worker_in_a_folder_and_others_beside_it() {
        let claims = Claims::default();
        let (a, b): (LayerId, LayerId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let held = claims.take(&a);
        drop(claims.take(&b));
        let inside = Arc::new(AtomicUsize::new(0));
        let workers: Vec<_> = (0..8)
            .map(|_| {
                let (claims, a, inside) = (claims.clone(), a.clone(), inside.clone());
                std::thread::spawn(move || {
                    for _ in 0..100 {
                        let _claim = claims.take(&a);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two work in one folder");
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        assert_eq!(inside.load(Ordering::SeqCst), 0);
        drop(held);
        for worker in workers {
            worker.join().unwrap();
        }
    }
}
