//! System calls that no safe crate offers, behind safe functions: the only room with `unsafe` code.
//!
//! It wraps kernels, and knows nothing of layers, stores or protocols. Every `unsafe` block states why it is sound.
//! Called by `listen`, `driver`, `store`, `svm`, `agent`, `cli` and `main`.
#![allow(unsafe_code)]

pub mod jail;
#[cfg(target_os = "linux")]
pub mod linux;
pub mod splice;
#[cfg(windows)]
pub mod windows;
pub mod writeback;
