//! The product as containerd's proxy snapshotter and differ, below real containerds: every test starts a node of its
//! own, drives it as people and engines do, and compares **contents**.
//!
//! ```text
//!   calls  unpack ─► client (gRPC)   content (a double of containerd's)
//!     └──────┴───────────┐
//!   everyday  committed  life  hostile  deleted  kills  suite  cri (Kubernetes' interface)
//!      └───────┴───────┴───────┴──────┴──────┴──► node (a room with containerd and the product) ─► proxy (their configuration) ─► isolation (the room)
//!          image (layers, OCI archives)   registry (loopback)   tree (what is expected, what is found)
//! ```
//!
//! Most tests run on each containerd and twice on it: on the product, and on containerd's own `overlayfs` and `walking`
//! differ, as a control that shows that a test asks for what containerd really does. Needs root, Debian's runc and
//! busybox-static, and the network once (`scripts/fetch-engines`, `scripts/containerd-suite`). Environment:
//! `LCOW_E2E_KEEP` keeps the folders of nodes.

#![cfg(target_os = "linux")]

mod calls;
mod client;
#[path = "../e2e/command.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod command;
mod committed;
mod content;
mod cri;
mod deleted;
mod everyday;
mod hostile;
mod image;
#[path = "../e2e/isolation.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod isolation;
mod kills;
mod life;
mod node;
#[path = "../e2e/proxy.rs"]
mod proxy;
mod registry;
mod suite;
#[path = "../e2e/tarball.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod tarball;
mod tree;
mod unpack;
