//! Layers applied and seen through the kernel: needs root, loop devices, e2fsprogs, GNU tar, bsdtar and python3.

mod build;
mod faults;
mod foreign;
mod growth;
mod layer;
#[path = "../support/loopmount.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod loopmount;
mod semantics;
mod tree;
