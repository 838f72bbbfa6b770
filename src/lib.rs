//! `lcow-graphdriver`: layer storage for containers that live in virtual machines.
//!
//! Every layer is one file, an ext4 file system in a VHD, and untrusted layer bytes (tar streams, container file
//! systems) are read and written only inside a *service VM*. The daemon moves bytes and descriptors; it never parses
//! them.
//!
//! ```text
//!            dockerd, curl                                        operator
//!                 │ POST /GraphDriver.*                               │ layer … store … call …
//!   ┌─────────────▼─────────────┐                                     │
//!   │ listen   unix socket/pipe │                                     │
//!   │ api      router, wire     │                                ┌────▼────┐
//!   └─────────────┬─────────────┘                                │  main   │
//!   ┌─────────────▼─────────────┐                                └────┬────┘
//!   │ driver   what a graphdriver means: create, get/put, diff, apply │
//!   └──────┬─────────────┬──────┘◄────────────────────────────────────┘
//!   ┌──────▼─────┐ ┌─────▼──────┐
//!   │ store      │ │ svm        │  pool of service VMs, backends
//!   │ ids, files │ └─────┬──────┘
//!   └────────────┘ ═ ═ ═ ╪ ═ ═ ═ jail: descriptors and frames only
//!                  ┌─────▼──────┐
//!                  │ agent      │  the guest side
//!                  │ diff       │  layer ⇄ tar, changes, exact record
//!                  │ tar ext4 vhd vhdx │ formats
//!                  │ io         │  ReadAt, WriteAt
//!                  └────────────┘
//! ```
//!
//! Arrows point down only: a module may use what is drawn below it and never what is above. `tests/architecture.rs`
//! reads the `use crate::` lines and holds the code to this picture. `migrate` stands beside `main`, above `driver`: it
//! brings other storage drivers' images over. [`lcow_sys`] is the only place with `unsafe` code; it
//! wraps system calls and knows nothing of layers.
//!
//! # Glossary
//! * **layer**: an immutable `layer.vhd` made from a tar by `ApplyDiff`.
//! * **sandbox**: a writable ext4 of fixed size with `upper` and `work` folders, the read-write layer of a container.
//! * **chain**: the ancestors of a layer, nearest first (`layerchain.json`).
//! * **service VM** (SVM): where layer bytes are interpreted: a jailed worker process or a virtual machine.
//! * **exact record**: what of an applied tar the image itself does not hold, so that Diff gives back the very bytes.
//! * **canonical diff**: the one tar that a written layer has, whoever makes it.

#![cfg_attr(
    not(target_os = "linux"),
    allow(
        dead_code,
        reason = "shared modules have parts that only Linux uses; the Linux build finds what is dead"
    )
)]
#![allow(
    unreachable_pub,
    reason = "`pub` marks the interface of a module; the modules are private to the crate"
)]

// Public only where the binary, the tests, the benchmarks and the fuzz targets need it; not a stable API.
pub mod cli;
pub mod config;
pub(crate) mod error;
pub mod svm;

pub(crate) mod api;
pub(crate) mod driver;
pub(crate) mod listen;
#[cfg(target_os = "linux")]
pub(crate) mod migrate;
pub(crate) mod store;
pub(crate) mod telemetry;
