//! `lcow-graphdriver`: layer storage for containers that live in virtual machines.
//!
//! Every layer is one file, an ext4 file system in a VHD, and untrusted layer bytes (tar streams, container file
//! systems) are read and written only inside a *service VM*. The daemon moves bytes and descriptors; it never parses
//! them.
//!
//! ```text
//!            dockerd, curl        containerd                      operator
//!                 │ /GraphDriver.*     │ gRPC: Snapshots, Diff         │ layer … store … call …
//!   ┌─────────────▼────────────────────▼───┐                      ┌────▼────┐
//!   │ listen         unix socket, pipe     │◄─────────────────────┤  cli    │
//!   │ api  router    containerd  services  │                      └────┬────┘
//!   └─────────────┬────────────────────────┘  migrate  other drivers' images │
//!   ┌─────────────▼────────────────────────────────────▼──────────────▼──┐
//!   │ driver   what a graphdriver and a snapshotter mean on layers       │
//!   └──────┬─────────────┬────────────────────────────────────────────────┘
//!   ┌──────▼─────┐ ┌─────▼──────┐
//!   │ store      │ │ svm        │  pool of service VMs, backends
//!   │ ids, files │ └─────┬──────┘
//!   └────────────┘ ═ ═ ═ ╪ ═ ═ ═ jail: descriptors and frames only
//!                  ┌─────▼──────┐
//!                  │ svm-agent  │  the guest side
//!                  │ layer-codec│  layer ⇄ tar, changes, exact record; oci-image: images as files
//!                  │ layer-tar  │  formats, with ext4-image, vhd-image and verity-tree
//!                  │ disk-io    │  ReadAt, WriteAt
//!                  └────────────┘
//! ```
//!
//! # Rooms
//! Modules of this package and, with a hyphen, crates of the workspace. Each may use what is listed below it, and
//! nothing above; `tests/architecture` checks the code against these lines.
//!
//! ```text
//! main         │ cli
//! cli          │ api config containerd disk-io driver ext4-image layer-codec layer-recode layer-tar lcow-sys listen migrate oci-image oci-registry store svm svm-agent telemetry verity-tree vhd-image
//! api          │ driver error layer-codec store telemetry
//! containerd   │ config containerd-api driver error telemetry
//! migrate      │ config driver error store svm vhd-image
//! driver       │ config disk-io error ext4-image lcow-sys store svm telemetry verity-tree vhd-image
//! store        │ error layer-codec lcow-sys
//! svm          │ disk-io error lcow-sys svm-protocol vhd-image
//! error        │ lcow-sys svm-protocol
//! listen       │ lcow-sys
//! config       │ layer-codec
//! telemetry    │
//! svm-agent    │ disk-io ext4-image layer-codec layer-recode lcow-sys svm-protocol verity-tree vhd-image
//! svm-protocol │ disk-io ext4-image layer-codec layer-recode layer-tar lcow-sys verity-tree
//! oci-registry │ oci-image
//! oci-image    │ disk-io layer-recode layer-tar
//! layer-codec  │ disk-io ext4-image layer-tar verity-tree vhd-image
//! layer-recode │ disk-io
//! layer-tar    │ disk-io
//! ext4-image   │ disk-io
//! vhd-image    │ disk-io
//! verity-tree  │ disk-io
//! containerd-api│
//! cri-client   │
//! lcow-sys     │
//! disk-io      │
//! ```
//!
//! [`lcow_sys`] is the only crate with `unsafe` code; it wraps system calls and knows nothing of layers.
//!
//! # Glossary
//! * **layer**: an immutable `layer.vhd` made from a tar by `ApplyDiff`.
//! * **sandbox**: a writable ext4 of fixed size with `upper` and `work` directories, the read-write layer of a
//!   container.
//! * **chain**: the ancestors of a layer, nearest first (`layerchain.json`).
//! * **service VM** (SVM): where layer bytes are interpreted: a jailed worker process or a virtual machine.
//! * **exact record**: the parts of an applied tar that the image does not hold, so that Diff returns exactly the
//!   original bytes.
//! * **snapshot**: what containerd calls a layer or a sandbox, with a key or a name (`snapshot.json`).
//! * **canonical diff**: the only tar that represents a written layer, wherever it is made.
//!
//! The whole glossary is in `docs/architecture.md`.

#![forbid(unsafe_code)]
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
pub mod containerd;
pub(crate) mod driver;
pub(crate) mod listen;
#[cfg(target_os = "linux")]
pub(crate) mod migrate;
pub(crate) mod store;
pub(crate) mod telemetry;
