//! Detects the end of a VM and notifies those who wait for it.
//!
//! ```text
//!   End      tell(cause) ─► the first cause is kept, with the console's last lines ─► wait()      every backend
//!   Process  a child process ─ watched ─► reaped ─► End::tell                                     embedded, qemu
//! ```
//!
//! The first cause is final; later callers get the same one. The watch holds the process weakly, so that dropping a VM
//! ends its process instead of waiting for it. Called by the backends.

use super::{Death, SvmError, console::Console};
use futures_util::future::BoxFuture;
use tokio::sync::watch;

/// The cause if no better one is known.
const UNEXPLAINED: &str = "ended";

/// The end of a VM, to set and to wait for. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct End {
    told: watch::Sender<Option<Death>>,
    console: Console,
}

impl End {
    /// For a running VM with this console.
    pub(super) fn new(console: Console) -> Self {
        Self { told: watch::channel(None).0, console }
    }

    /// The VM has ended. Later causes are dropped.
    pub(super) fn tell(&self, cause: impl Into<String>) {
        self.told.send_if_modified(|death| {
            let first = death.is_none();
            if first {
                *death = Some(Death { cause: cause.into(), console: self.console.tail() });
            }
            first
        });
    }

    /// How it ended, if it has.
    pub(super) fn seen(&self) -> Option<Death> {
        self.told.borrow().clone()
    }

    /// A receiver of the end; it closes when all `End`s are dropped.
    #[cfg(windows)]
    pub(super) fn watch(&self) -> watch::Receiver<Option<Death>> {
        self.told.subscribe()
    }

    /// Resolves when it has ended.
    pub(super) fn wait(&self) -> BoxFuture<'static, Death> {
        let mut watch = self.told.subscribe();
        Box::pin(async move {
            let seen = watch.wait_for(Option::is_some).await.ok().and_then(|d| d.clone());
            seen.unwrap_or_else(|| Death { cause: UNEXPLAINED.into(), console: String::new() })
        })
    }

    /// Its last console output.
    pub(super) fn console(&self) -> String {
        self.console.tail()
    }

    /// The error of a failed boot, with the cause of the VM's end, if it has ended, and its console output.
    pub(super) fn boot_failed(&self, reason: impl std::fmt::Display) -> SvmError {
        let cause = self.seen().map_or_else(String::new, |d| format!(" ({})", d.cause));
        SvmError::Boot { reason: format!("{reason}{cause}"), console: self.console() }
    }
}

#[cfg(any(target_os = "linux", windows))]
pub(super) use process::Process;

#[cfg(any(target_os = "linux", windows))]
mod process {
    #[cfg(target_os = "linux")]
    use super::UNEXPLAINED;
    use super::{Death, End};
    #[cfg(target_os = "linux")]
    use lcow_sys::linux::process::WorkerProcess;
    #[cfg(windows)]
    use lcow_sys::windows::process::WorkerProcess;
    use parking_lot::Mutex;
    use std::{
        io,
        sync::{Arc, Weak},
    };

    /// A VM's process, until it has ended. Dropping it ends the process.
    pub(in crate::svm) struct Process {
        /// `None` once reaped.
        running: Arc<Mutex<Option<WorkerProcess>>>,
        pub(in crate::svm) end: End,
    }

    impl Process {
        /// Watches `process`, and reaps it when it ends.
        ///
        /// # Errors
        /// It cannot be watched, and was ended.
        pub(in crate::svm) fn watch(process: WorkerProcess, end: End) -> io::Result<Self> {
            let watch = process.end_watch()?;
            let running = Arc::new(Mutex::new(Some(process)));
            Self::follow(watch, Arc::downgrade(&running), end.clone())?;
            Ok(Self { running, end })
        }

        #[cfg(target_os = "linux")]
        fn follow(
            watch: std::os::fd::OwnedFd,
            running: Weak<Mutex<Option<WorkerProcess>>>,
            end: End,
        ) -> io::Result<()> {
            let watch = lcow_sys::linux::asyncfd::watch(watch, tokio::io::Interest::READABLE)?;
            tokio::spawn(async move {
                let _ = watch.readable().await;
                // Its pipes and sockets usually still hold its last output.
                tokio::task::yield_now().await;
                let reaped = running.upgrade().and_then(|running| {
                    let mut running = running.lock();
                    let reaped = running.as_mut().and_then(WorkerProcess::try_reap);
                    *running = None;
                    reaped
                });
                end.tell(reaped.map_or_else(|| UNEXPLAINED.to_owned(), |e| e.to_string()));
            });
            Ok(())
        }

        #[cfg(windows)]
        fn follow(
            watch: lcow_sys::windows::process::EndWatch,
            running: Weak<Mutex<Option<WorkerProcess>>>,
            end: End,
        ) -> io::Result<()> {
            std::thread::Builder::new().name("worker-end".into()).spawn(move || {
                let cause = watch.wait();
                if let Some(running) = running.upgrade() {
                    *running.lock() = None;
                }
                end.tell(cause);
            })?;
            Ok(())
        }

        /// Calls `work` with the process, if it has not ended.
        #[cfg(windows)]
        pub(in crate::svm) fn with<T>(&self, act: impl FnOnce(&WorkerProcess) -> T) -> Option<T> {
            self.running.lock().as_ref().map(act)
        }

        /// Kills it and waits until it is reaped. No graceful shutdown is needed: what was written is in the files'
        /// page cache.
        pub(in crate::svm) async fn terminate(&self) -> Death {
            if let Some(process) = self.running.lock().as_ref() {
                process.kill();
            }
            self.end.wait().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_cause_is_kept_and_told_to_all() {
        let end = End::new(Console::default());
        assert!(end.seen().is_none());
        let early = end.wait();
        end.tell("signal 9");
        end.clone().tell("its handle was closed");
        for death in [early.await, end.wait().await, end.seen().unwrap()] {
            assert_eq!(death.cause, "signal 9");
        }
        let e = end.boot_failed("it did not greet").to_string();
        assert!(e.ends_with("it did not greet (signal 9)"), "{e}");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_process_is_reaped_and_its_end_told() {
        use lcow_sys::linux::process::{WorkerCommand, spawn_worker};
        let start = async |script: &str| {
            let args = vec!["-c".into(), script.into()];
            let command = WorkerCommand { program: "/bin/sh".into(), args, env: Vec::new() };
            let (sender, started) = tokio::sync::oneshot::channel();
            spawn_worker(command, move |worker| drop(sender.send(worker))).unwrap();
            let process = started.await.unwrap().unwrap();
            let pid = process.pid();
            (Process::watch(process, End::new(Console::default())).unwrap(), pid)
        };
        let gone = |pid: i32| !std::path::Path::new(&format!("/proc/{pid}")).exists();
        let (process, pid) = start("exit 7").await;
        assert_eq!(process.end.wait().await.cause, "exit status 7");
        assert!(gone(pid));
        let (process, pid) = start("exec sleep 1000").await;
        assert_eq!(process.terminate().await.cause, "signal 9");
        assert!(gone(pid));
        // Dropped by its last user: end it, and notify those who wait.
        let (process, pid) = start("exec sleep 1000").await;
        let end = process.end.wait();
        drop(process);
        assert!(gone(pid));
        assert_eq!(end.await.cause, UNEXPLAINED);
    }
}
