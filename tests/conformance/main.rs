//! One suite for every backend of service VMs: what the driver relies on, with the real codec.
//!
//! ```text
//!   suite::apply, suite::cancel, …  ×  embedded │ qemu       + identical: the same bytes from all of them
//! ```
//!
//! `qemu` needs QEMU and the guest that `scripts/build-svm-image` makes (`LCOW_SVM_IMAGE` names its folder, else
//! `<target>/svm-image`). Without them its tests fail, unless `LCOW_SVM_SKIP` says why they may be left out; then they
//! say so and pass.

#![cfg(target_os = "linux")]

mod files;
mod killed;
mod speed;
mod suite;
#[path = "../support/mod.rs"]
mod support;

use lcow_graphdriver::svm::{
    VmBackend,
    embedded::{EmbeddedBackend, EmbeddedConfig},
    qemu::{Accelerator, QemuBackend, QemuConfig},
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

fn embedded() -> Arc<dyn VmBackend> {
    Arc::new(EmbeddedBackend::new(EmbeddedConfig {
        program: env!("CARGO_BIN_EXE_lcow-graphdriver").into(),
        ..EmbeddedConfig::default()
    }))
}

fn image_folder() -> PathBuf {
    std::env::var_os("LCOW_SVM_IMAGE").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("svm-image"),
        PathBuf::from,
    )
}

/// One backend for all tests of this process, so that the template is made once.
fn qemu() -> Option<Arc<dyn VmBackend>> {
    static BACKEND: OnceLock<Option<Arc<QemuBackend>>> = OnceLock::new();
    let backend = BACKEND.get_or_init(|| {
        if let Ok(reason) = std::env::var("LCOW_SVM_SKIP") {
            eprintln!("skipped: qemu: {reason}");
            return None;
        }
        Some(Arc::new(QemuBackend::new(qemu_config())))
    });
    backend.clone().map(|b| b as Arc<dyn VmBackend>)
}

fn qemu_config() -> QemuConfig {
    let folder = image_folder();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance");
    let mut config = QemuConfig::new(folder.join("vmlinux"), folder.join("initrd"), cache);
    config.launcher = env!("CARGO_BIN_EXE_lcow-graphdriver").into();
    if let Ok(cpu) = std::env::var("LCOW_SVM_CPU") {
        config.cpu = cpu;
    }
    config.accelerator = std::env::var_os("LCOW_SVM_TCG").map(|_| Accelerator::Tcg);
    config
}

macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        mod on_embedded { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::suite::$name(super::embedded()).await;
            }
        )* }
        mod on_qemu { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let _one_at_a_time = super::turn().await;
                if let Some(backend) = super::qemu() { super::suite::$name(backend).await; }
            }
        )* }
    };
}

/// Emulated machines on few processors only slow each other down.
async fn turn() -> tokio::sync::MutexGuard<'static, ()> {
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    TURN.lock().await
}

suite!(
    apply_and_exact_diff,
    canonical_diff_changes_and_sizes,
    a_blank_sandbox_is_empty,
    read_only_disks_stay_read_only,
    two_hundred_disks,
    concurrent_operations_in_both_modes,
    a_dropped_export_is_cancelled,
    a_killed_vm_fails_one_operation,
    a_silent_vm_is_given_up,
    hostile_layers_are_refused,
    a_full_disk_is_an_error_of_its_own,
    a_diff_streams_into_an_apply,
    nothing_is_left_behind,
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_disks_than_the_limit_are_an_error_on_embedded() {
    assert!(embedded().limits().disks >= 256, "a chain of 128 layers and its parent must fit");
    suite::more_disks_than_the_limit_are_an_error(embedded()).await;
}

/// With a small limit: a thousand devices take a minute to come and go under emulation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_disks_than_the_limit_are_an_error_on_qemu() {
    let _one_at_a_time = turn().await;
    let Some(usual) = qemu() else { return };
    assert!(usual.limits().disks >= 256, "a chain of 128 layers and its parent must fit");
    let few = QemuBackend::new(QemuConfig { disks: 12, ..qemu_config() });
    suite::more_disks_than_the_limit_are_an_error(Arc::new(few)).await;
}

#[test]
fn a_killed_daemon_leaves_nothing_on_embedded() {
    killed::leaves_nothing(&["lcow.svm=embedded".into()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_leaves_nothing_on_qemu() {
    let _one_at_a_time = turn().await;
    if qemu().is_none() {
        return;
    }
    let kird = format!("lcow.kirdpath={}", image_folder().display());
    let killed = || killed::leaves_nothing(&["lcow.svm=qemu".into(), kird]);
    tokio::task::spawn_blocking(killed).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identical_bytes_from_every_backend() {
    let _one_at_a_time = turn().await;
    let mut all = Vec::new();
    for backend in std::iter::once(embedded()).chain(qemu()) {
        all.push((backend.name(), suite::fingerprint(backend).await));
    }
    let (first, expected) = &all[0];
    for (name, found) in &all {
        assert_eq!(found, expected, "{name} differs from {first}");
    }
}

/// The table of `docs/service-vms.md`: `cargo test --release --test conformance -- --ignored --nocapture figures`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "figures for people, of use in a release build only"]
async fn figures() {
    for backend in std::iter::once(embedded()).chain(qemu()) {
        suite::figures(backend).await;
    }
}

/// Wall and processor time of each operation, the backends in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "figures for people, of use in an optimised build only"]
async fn speed() {
    let rounds = std::env::var("LCOW_ROUNDS").map_or(3, |n| n.parse().unwrap());
    for backend in std::iter::once(embedded()).chain(qemu()) {
        speed::figures(&backend, rounds).await;
    }
}
