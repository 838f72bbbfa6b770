//! The product below a real Docker engine: every test starts an engine of its own, drives it as people do, and
//! compares **contents**.
//!
//! ```text
//!   basics  images  committed  classic_build  buildkit  busy  restarts  userns  deep  quota  chaos  parallel  hostile  removal  identity
//!   endurance
//!      └───────┴──────────┴───────────┴─────────┴─────────┴──┬────┴─────┴──────┴───────┴────────┴───────┘
//!                     rootfs (what is imported)  manifest (what a tree holds)  archive (image archives)
//!                  engine (a room with dockerd) ─► isolation (the room) ─► command   tarball (tar bytes)
//! ```
//!
//! Needs root, Debian's docker.io, busybox-static, attr, rsync and gcc; says so where they are missing. Environment:
//! `LCOW_E2E_DRIVER=managed` runs the same tests on the managed plugin, `=containerd` on Docker 28 or later whose images
//! are in a containerd with the product as its snapshotter, `=overlay2` and `=containerd-overlayfs` on the engines' own,
//! as controls of the tests; `LCOW_E2E_PATH` is put before the search path (another engine); `LCOW_E2E_OPTIONS` gives the
//! driver options (`lcow.globalmode=true …`); `LCOW_E2E_KEEP` keeps the engines' folders; `LCOW_E2E_SEED` repeats a run
//! of the chaos test. `scripts/test --matrix` sets them.

mod archive;
mod basics;
mod buildkit;
mod busy;
mod chaos;
mod classic_build;
#[allow(dead_code, reason = "the tests of the managed plugin use the rest")]
mod command;
mod committed;
mod deep;
mod endurance;
#[allow(dead_code, reason = "the tests of the managed plugin use the rest")]
mod engine;
mod hostile;
mod identity;
mod images;
#[allow(dead_code, reason = "the tests of the containerd face use the rest")]
mod isolation;
mod manifest;
mod parallel;
#[allow(dead_code, reason = "the tests of the managed plugin use the rest")]
mod plugin;
#[allow(dead_code, reason = "the tests of the containerd face use the rest")]
mod proxy;
mod quota;
mod registry;
mod removal;
mod restarts;
mod rootfs;
mod tails;
mod tarball;
mod userns;
