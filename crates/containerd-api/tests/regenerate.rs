//! The checked-in files are what the generators make of `proto/`.
//!
//! ```text
//!   proto/*.proto ─protox─► descriptors ─prost, tonic─► one file a package ─► src/generated/*.rs
//!                                                                             compared, or written with LCOW_WRITE_GOLDEN
//! ```

use std::{fs, path::Path};

/// A package and the module that it becomes.
const MODULES: &[(&str, &str)] = &[
    ("containerd.types", "types"),
    ("containerd.services.content.v1", "content"),
    ("containerd.services.diff.v1", "diff"),
    ("containerd.services.leases.v1", "leases"),
    ("containerd.services.snapshots.v1", "snapshots"),
];

/// The text of one module as the generators make it, with its first line.
fn generated(package: &str, module: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let files = protox::compile([format!("{module}.proto")], [root.join("proto")]).unwrap();
    let mut generator = tonic_prost_build::configure()
        .build_transport(false)
        .emit_rerun_if_changed(false)
        // Sorted, so that equal messages have equal bytes.
        .btree_map(".")
        // The bytes of blobs are not copied out of the transport's buffer.
        .bytes(".containerd.services.content.v1")
        .out_dir(out.path());
    if module != "types" {
        generator = generator.extern_path(".containerd.types", "crate::types");
    }
    generator.compile_fds(files).unwrap();
    let text = fs::read_to_string(out.path().join(format!("{package}.rs"))).unwrap();
    format!("//! Generated from `proto/{module}.proto` by `tests/regenerate.rs`.\n{text}")
}

#[test]
fn the_checked_in_files_are_what_the_generators_make() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated");
    let write = std::env::var_os("LCOW_WRITE_GOLDEN").is_some();
    let mut stale = Vec::new();
    for (package, module) in MODULES {
        let path = folder.join(format!("{module}.rs"));
        let text = generated(package, module);
        assert!(text.len() > 1000, "{module}: {} bytes generated", text.len());
        if write {
            fs::write(&path, text).unwrap();
        } else if fs::read_to_string(&path).ok() != Some(text) {
            stale.push(module);
        }
    }
    assert!(
        stale.is_empty(),
        "src/generated is not what proto/ gives: {stale:?}; run LCOW_WRITE_GOLDEN=1 cargo test -p containerd-api --test regenerate"
    );
    let protos = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")).unwrap().count();
    assert_eq!(protos, MODULES.len(), "a file of proto/ is not generated");
}
