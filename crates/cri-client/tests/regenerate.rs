//! The checked-in file is what the generators make of `proto/`.
//!
//! ```text
//!   proto/runtime.proto ─protox─► descriptors ─prost, tonic─► src/generated/runtime.rs
//!                                                             compared, or written with LCOW_WRITE_GOLDEN
//! ```

use std::{fs, path::Path};

/// The text of the module as the generators make it, with its first line.
fn generated() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let files = protox::compile(["runtime.proto"], [root.join("proto")]).unwrap();
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .emit_rerun_if_changed(false)
        // Sorted, so that equal messages have equal bytes.
        .btree_map(".")
        .out_dir(out.path())
        .compile_fds(files)
        .unwrap();
    let text = fs::read_to_string(out.path().join("runtime.v1.rs")).unwrap();
    format!("//! Generated from `proto/runtime.proto` by `tests/regenerate.rs`.\n{text}")
}

#[test]
fn the_checked_in_file_is_what_the_generators_make() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("src/generated/runtime.rs");
    let text = generated();
    assert!(text.len() > 10_000, "{} bytes generated", text.len());
    if std::env::var_os("LCOW_WRITE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    } else {
        assert!(
            fs::read_to_string(&path).ok() == Some(text),
            "src/generated is not what proto/ gives; run LCOW_WRITE_GOLDEN=1 cargo test -p cri-client --test regenerate"
        );
    }
    assert_eq!(fs::read_dir(root.join("proto")).unwrap().count(), 1, "a file of proto/ is not generated");
}
