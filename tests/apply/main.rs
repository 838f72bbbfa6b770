//! Layers applied and seen through the kernel: needs root, loop devices, e2fsprogs, GNU tar, bsdtar,
//! python3, and Go with the distribution's packages of moby and containerd.

mod build;
mod engines;
mod faults;
mod flat;
mod foreign;
mod golden;
mod growth;
mod implied;
mod kernel;
mod layer;
mod semantics;
mod tree;
