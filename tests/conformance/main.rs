//! One suite for every backend of service VMs: what the driver relies on, with the real codec.
//!
//! ```text
//!   suite::apply, suite::cancel, …  ×  embedded │ qemu       + identical: the same bytes from all of them
//! ```
//!
//! `qemu` needs QEMU and the guest that `scripts/build-svm-image` makes (`LCOW_SVM_IMAGE` names its folder, else
//! `<target>/svm-image`). Without them its tests fail and say what is missing; who wants the rest alone leaves them out by
//! name (`cargo test --test conformance -- --skip qemu`), which cargo counts.

#![cfg(target_os = "linux")]

mod disks;
mod faults;
mod files;
mod killed;
mod plugin;
mod speed;
mod start;
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
fn qemu() -> Arc<dyn VmBackend> {
    static BACKEND: OnceLock<Arc<QemuBackend>> = OnceLock::new();
    let backend = BACKEND.get_or_init(|| {
        let backend = QemuBackend::new(qemu_config());
        backend.preflight().expect("virtual machines can be made here (see the first lines of this file)");
        Arc::new(backend)
    });
    backend.clone()
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
    ($($module:ident::$name:ident),* $(,)?) => {
        mod on_embedded { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$module::$name(super::embedded()).await;
            }
        )* }
        mod on_qemu { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let _one_at_a_time = super::turn().await;
                super::$module::$name(super::qemu()).await;
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
    suite::apply_and_exact_diff,
    suite::canonical_diff_changes_and_sizes,
    suite::a_blank_sandbox_is_empty,
    suite::read_only_disks_stay_read_only,
    suite::two_hundred_disks,
    suite::concurrent_operations_in_both_modes,
    suite::a_dropped_export_is_cancelled,
    suite::a_killed_vm_fails_one_operation,
    suite::a_silent_vm_is_given_up,
    suite::hostile_layers_are_refused,
    suite::a_full_disk_is_an_error_of_its_own,
    suite::a_diff_streams_into_an_apply,
    suite::nothing_is_left_behind,
    disks::a_hash_tree_with_a_scratch_disk,
    disks::a_disk_in_a_vhdx,
    disks::a_dirty_file_system_is_read_and_a_foreign_one_is_refused,
    disks::garbage_on_a_channel,
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
    assert!(qemu().limits().disks >= 256, "a chain of 128 layers and its parent must fit");
    let few = QemuBackend::new(QemuConfig { disks: 12, ..qemu_config() });
    suite::more_disks_than_the_limit_are_an_error(Arc::new(few)).await;
}

#[test]
fn a_start_without_a_guest_names_what_is_missing() {
    start::names_what_is_missing();
}

/// A test with plugins of its own on virtual machines, which waits for its turn.
async fn on_plugins(test: impl FnOnce(&[String]) + Send + 'static) {
    let _one_at_a_time = turn().await;
    let options = ["lcow.svm=qemu".into(), format!("lcow.kirdpath={}", image_folder().display())];
    tokio::task::spawn_blocking(move || test(&options)).await.unwrap();
}

#[test]
fn a_killed_daemon_leaves_nothing_on_embedded() {
    killed::leaves_nothing(&["lcow.svm=embedded".into()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_leaves_nothing_on_qemu() {
    on_plugins(killed::leaves_nothing).await;
}

#[test]
fn fault_10_scratch_goes_in_every_case_on_embedded() {
    plugin::scratch_goes_in_every_case(&["lcow.svm=embedded".into()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_10_scratch_goes_in_every_case_on_qemu() {
    on_plugins(plugin::scratch_goes_in_every_case).await;
}

macro_rules! faults {
    ($($name:ident),* $(,)?) => {
        mod faults_on_embedded { $(
            #[test]
            fn $name() {
                super::faults::$name(&["lcow.svm=embedded".into()]);
            }
        )* }
        mod faults_on_qemu { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::on_plugins(super::faults::$name).await;
            }
        )* }
    };
}

faults!(
    fault_6_an_export_that_fails_half_way_is_cut,
    fault_7_and_23_a_read_only_layer_is_exported_at_once_and_without_get,
    fault_14_what_a_vm_holds_is_removed_all_the_same,
    fault_20_blanks_made_at_one_time_are_all_whole,
    fault_21_an_apply_that_stands_still_holds_up_nobody,
    fault_22_missing_folders_are_no_reason_to_crash,
);

#[test]
fn metrics_show_no_restores_on_embedded() {
    plugin::metrics_tell_restores_from_boots(&["lcow.svm=embedded".into()], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_show_restores_on_qemu() {
    on_plugins(|options| plugin::metrics_tell_restores_from_boots(options, true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_measures_embedded_and_qemu() {
    on_plugins(|_| plugin::bench_measures_each_backend(&image_folder())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identical_bytes_from_embedded_and_qemu() {
    let _one_at_a_time = turn().await;
    let (ours, theirs) = (files::Files::new(), files::Files::new());
    let expected = disks::bytes(embedded(), &ours).await;
    let found = disks::bytes(qemu(), &theirs).await;
    assert_eq!(expected.len(), 8);
    for ((what, expected), (same, found)) in expected.iter().zip(&found) {
        assert_eq!(what, same);
        assert!(expected == found, "{what}: {} bytes of embedded, {} of qemu", expected.len(), found.len());
    }
    disks::reads_the_others_layers(qemu(), &ours, &found).await;
    disks::reads_the_others_layers(embedded(), &theirs, &expected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restored_machines_have_a_clock_and_random_numbers_of_their_own() {
    let _one_at_a_time = turn().await;
    disks::restored_machines_wake_alone(qemu()).await;
}

/// The table of `docs/service-vms.md`: `cargo test --release --test conformance -- --ignored --nocapture figures`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "figures for people, of use in a release build only"]
async fn figures_of_embedded_and_qemu() {
    for backend in [embedded(), qemu()] {
        suite::figures(backend).await;
    }
}

/// Wall and processor time of each operation, the backends in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "figures for people, of use in an optimised build only"]
async fn speed() {
    let rounds = std::env::var("LCOW_ROUNDS").map_or(3, |n| n.parse().unwrap());
    for backend in std::iter::once(embedded()).chain([qemu()]) {
        speed::figures(&backend, rounds).await;
    }
}
