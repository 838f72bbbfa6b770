//! One suite for every backend of service VMs: what the driver relies on, with the real codec.
//!
//! ```text
//!   suite::apply, suite::cancel, …  ×  embedded │ qemu (Linux) │ hcs (Windows)    + identical: the same bytes from all
//! ```
//!
//! `hcs` runs against the test double of `computecore.dll`, with all of the suite; in `read_only_disks_stay_read_only` the
//! file is not open for writing there, because Hyper-V opens disks alone. Left out is `a_killed_daemon_leaves_nothing`: a
//! daemon of its own would load the real DLL and listen on Hyper-V sockets (`tests/hcs` has what a predecessor left).
//!
//! `qemu` needs QEMU and the guest that `scripts/build-svm-image` makes (`LCOW_SVM_IMAGE` names its folder, else
//! `<target>/svm-image`). Without them its tests fail and say what is missing; who wants the rest alone leaves them out by
//! name (`cargo test --test conformance -- --skip qemu`), which cargo counts.

#![cfg(any(target_os = "linux", windows))]

#[cfg(windows)]
#[path = "../computecore_double/client.rs"]
mod client;
mod files;
mod frames;
mod identical;
mod killed;
#[cfg(target_os = "linux")]
mod linux;
mod suite;
#[path = "../support/mod.rs"]
mod support;

#[cfg(target_os = "linux")]
use lcow_graphdriver::svm::qemu::{Accelerator, QemuBackend, QemuConfig};
use lcow_graphdriver::svm::{
    VmBackend,
    embedded::{EmbeddedBackend, EmbeddedConfig},
};
use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

fn embedded() -> Arc<dyn VmBackend> {
    Arc::new(EmbeddedBackend::new(EmbeddedConfig {
        program: env!("CARGO_BIN_EXE_lcow-graphdriver").into(),
        ..EmbeddedConfig::default()
    }))
}

#[cfg(target_os = "linux")]
fn image_folder() -> PathBuf {
    std::env::var_os("LCOW_SVM_IMAGE").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("svm-image"),
        PathBuf::from,
    )
}

/// One backend for all tests of this process, so that the template is made once.
#[cfg(target_os = "linux")]
fn qemu() -> Arc<dyn VmBackend> {
    static BACKEND: OnceLock<Arc<QemuBackend>> = OnceLock::new();
    let backend = BACKEND.get_or_init(|| {
        let backend = QemuBackend::new(qemu_config());
        backend.preflight().expect("virtual machines can be made here (see the first lines of this file)");
        Arc::new(backend)
    });
    backend.clone()
}

#[cfg(target_os = "linux")]
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

/// The backends besides the embedded one.
#[cfg(target_os = "linux")]
struct Others;
#[cfg(windows)]
type Others = Hcs;

#[cfg(target_os = "linux")]
impl Others {
    fn new() -> Self {
        Self
    }

    #[expect(clippy::unused_self, reason = "as on Windows")]
    fn backend(&self) -> Arc<dyn VmBackend> {
        qemu()
    }
}

macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        mod on_embedded { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::suite::$name(super::embedded()).await;
            }
        )* }
        #[cfg(target_os = "linux")]
        mod on_qemu { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let _one_at_a_time = super::turn().await;
                super::suite::$name(super::qemu()).await;
            }
        )* }
        #[cfg(windows)]
        mod on_hcs { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let place = super::Hcs::new();
                super::suite::$name(place.backend()).await;
                place.assert_clear();
            }
        )* }
    };
}

/// Folders of an HCS backend on the double.
#[cfg(windows)]
struct Hcs(tempfile::TempDir);

#[cfg(windows)]
impl Hcs {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        for name in ["kernel", "initrd.img"] {
            std::fs::write(place.0.path().join(name), name).unwrap();
        }
        place
    }

    fn backend(&self) -> Arc<dyn VmBackend> {
        let at = |name: &str| self.0.path().join(name);
        let mut config =
            lcow_graphdriver::svm::hcs::HcsConfig::new(at("kernel"), at("initrd.img"), at("scratch"));
        config.growing_bytes = 1 << 30;
        Arc::new(client::backend(config))
    }

    /// No scratch disk of any machine is left.
    fn assert_clear(&self) {
        let left = std::fs::read_dir(self.0.path().join("scratch")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "folders of machines are left");
    }
}

/// Emulated machines on few processors only slow each other down.
#[cfg(target_os = "linux")]
async fn turn() -> tokio::sync::MutexGuard<'static, ()> {
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    TURN.lock().await
}

suite!(
    apply_and_exact_diff,
    larger_blocks_in_mid_stream,
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
    a_stream_is_recoded_while_it_comes,
    nothing_is_left_behind,
    an_end_that_is_asked_for_twice_is_seen_by_all,
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_disks_than_the_limit_are_an_error_on_embedded() {
    assert!(embedded().limits().disks >= 256, "a chain of 128 layers and its parent must fit");
    suite::more_disks_than_the_limit_are_an_error(embedded()).await;
}

/// All 256 places of its four controllers.
#[cfg(windows)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_disks_than_the_limit_are_an_error_on_hcs() {
    let place = Hcs::new();
    assert!(place.backend().limits().disks >= 256, "a chain of 128 layers and its parent must fit");
    suite::more_disks_than_the_limit_are_an_error(place.backend()).await;
    place.assert_clear();
}

/// With a small limit: a thousand devices take a minute to come and go under emulation.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_disks_than_the_limit_are_an_error_on_qemu() {
    let _one_at_a_time = turn().await;
    assert!(qemu().limits().disks >= 256, "a chain of 128 layers and its parent must fit");
    let few = QemuBackend::new(QemuConfig { disks: 12, ..qemu_config() });
    suite::more_disks_than_the_limit_are_an_error(Arc::new(few)).await;
}

/// Not on Hyper-V, whose sandboxes are VHDX files: a service VM there is lent no other disk to write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_grows_on_embedded() {
    suite::a_sandbox_grows(embedded()).await;
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_grows_on_qemu() {
    let _one_at_a_time = turn().await;
    suite::a_sandbox_grows(qemu()).await;
}

#[test]
fn a_killed_daemon_leaves_nothing_on_embedded() {
    killed::leaves_nothing(&["lcow.svm=embedded".into()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_at_each_frame_on_embedded() {
    frames::an_end_at_each_frame(embedded()).await;
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_at_each_frame_on_qemu() {
    let _one_at_a_time = turn().await;
    frames::an_end_at_each_frame(qemu()).await;
}

#[cfg(windows)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_at_each_frame_on_hcs() {
    let place = Hcs::new();
    frames::an_end_at_each_frame(place.backend()).await;
    place.assert_clear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identical_bytes_from_every_backend() {
    #[cfg(target_os = "linux")]
    let _one_at_a_time = turn().await;
    let place = Others::new();
    let other = place.backend();
    let (ours, theirs) = (files::Files::new(), files::Files::new());
    let expected = identical::bytes(embedded(), &ours).await;
    let found = identical::bytes(other.clone(), &theirs).await;
    assert_eq!(expected.len(), 8);
    for ((what, expected), (same, found)) in expected.iter().zip(&found) {
        assert_eq!(what, same);
        let (ours, theirs) = (expected.len(), found.len());
        assert!(expected == found, "{what}: {ours} bytes of embedded, {theirs} of {}", other.name());
    }
    identical::reads_the_others_layers(other, &ours, &found).await;
    identical::reads_the_others_layers(embedded(), &theirs, &expected).await;
}

/// The table of `docs/service-vms.md`: `cargo test --release --test conformance -- --ignored --nocapture figures`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "figures for people, of use in a release build only"]
async fn figures() {
    let place = Others::new();
    for backend in [embedded(), place.backend()] {
        suite::figures(backend).await;
    }
}
