//! The worker process: the agent behind the jail.
//!
//! Start and jail differ by system; the protocol is the same. Started by
//! `svm::embedded` of the daemon as `lcow-graphdriver worker`.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(windows)]
mod windows;

#[cfg(target_os = "linux")]
pub use linux::worker_main;
#[cfg(windows)]
pub use windows::worker_main;
