//! The embedded backend: a jailed child process, a second instance of this program.
//!
//! How workers are started, confined and watched depends on the system; what they do is the same. Called by `pool`
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
