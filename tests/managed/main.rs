//! The product as a managed plugin, below the engines that take one: Debian 12's own 20.10, and 26.1.
//!
//! ```text
//!   package    what is in the plugin: configuration, folders, the same bytes each time; pid 1
//!   lifecycle  create, enable, everyday, crash, replace, restart, disable, upgrade     everyday ◄─ also the v1 socket
//!      └──► room: an engine whose plugin scripts/build-plugin made ──► e2e/engine (shared with the `e2e` tests)
//! ```
//!
//! Needs root, Debian's docker.io, docker-registry, busybox-static and attr, and, for 26.1, the network once
//! (`scripts/fetch-engines`); says so where they are missing. The plugin is built by `scripts/build-plugin`, which
//! takes some minutes the first time. Environment: as the `e2e` tests, and `LCOW_E2E_PLUGIN` names an archive of
//! `scripts/build-plugin --save` to test instead.

#[path = "../e2e/archive.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod archive;
#[path = "../e2e/command.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod command;
#[path = "../e2e/engine.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod engine;
mod everyday;
#[path = "../e2e/isolation.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod isolation;
mod lifecycle;
#[path = "../e2e/manifest.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod manifest;
mod migrate;
mod package;
#[path = "../e2e/plugin.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod plugin;
#[path = "../e2e/proxy.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod proxy;
mod room;
#[path = "../e2e/rootfs.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod rootfs;
#[path = "../e2e/tarball.rs"]
#[allow(dead_code, reason = "the e2e tests use the rest")]
mod tarball;
