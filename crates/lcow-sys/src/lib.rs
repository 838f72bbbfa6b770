//! System calls that no safe crate offers, behind safe functions: the only crate of the workspace with `unsafe` code.
//!
//! ```text
//!   daemon, command line, agent            safe code, forbidden or denied to be anything else
//!   ────────────────────────────────────────────────────────────────────────────────────────
//!   jail       the report of what confines a process      splice     file ─► pipe or socket, by the kernel
//!   linux      loop devices, mounts, jail, processes …    writeback  early write-back hints
//!   windows    pipes, jobs, tokens, access lists, HCS …
//!   ────────────────────────────────────────────────────────────────────────────────────────
//!   rustix, landlock, seccompiler, libc    windows-sys
//! ```
//!
//! Rules:
//!
//! * It wraps kernels, and knows nothing of layers, stores or protocols.
//! * Every `unsafe` block states why it is sound; a function that is sound only under a condition that it cannot check is an
//!   `unsafe fn`. Two functions for the first steps of a process are exceptions and say why: `linux::jail::enter`, and
//!   `windows::process::take_given`. Others that need a single thread (`launch`, `supervise`) check that there is only one.
//! * A request code of `ioctl` never meets an argument of another type: requests with a pointer are functions of their
//!   own, and requests with a number are variants of an enum. Structures of the kernel have a compile-time size check.
//! * The feature `tokio` adds what belongs to an event loop. The agent is built without it, so neither a guest nor a worker
//!   contains a runtime.
//!
//! Not published: its functions are the calls that this program needs, with the errors that its operators need.
#![allow(unsafe_code)]

pub mod jail;
#[cfg(target_os = "linux")]
pub mod linux;
pub mod sparse;
pub mod splice;
#[cfg(windows)]
pub mod windows;
pub mod writeback;
