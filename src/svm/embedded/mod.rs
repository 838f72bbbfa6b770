//! The embedded backend: a jailed child process of this very program.
//!
//! Each system starts, confines and watches its workers in its own way; what they do is the same. Called by `pool`
//! through the traits in `svm`.

#[cfg(target_os = "linux")]
mod control;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(windows)]
mod windows;

#[cfg(target_os = "linux")]
pub use linux::{EmbeddedBackend, EmbeddedConfig};
#[cfg(windows)]
pub use windows::{EmbeddedBackend, EmbeddedConfig};
