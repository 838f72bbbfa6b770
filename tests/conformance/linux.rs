//! What only Linux has: virtual machines under QEMU with a kernel of their own, mounts, and plugins on both backends.

#[path = "disks.rs"]
mod disks;
#[path = "faults.rs"]
mod faults;
#[path = "foreign.rs"]
mod foreign;
#[path = "live.rs"]
mod live;
#[path = "plugin.rs"]
pub(crate) mod plugin;
#[path = "speed.rs"]
mod speed;
#[path = "start.rs"]
mod start;

use crate::{embedded, image_folder, killed, qemu, turn};

macro_rules! disks {
    ($($name:ident),* $(,)?) => {
        mod on_embedded { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::disks::$name(crate::embedded()).await;
            }
        )* }
        mod on_qemu { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let _one_at_a_time = crate::turn().await;
                super::disks::$name(crate::qemu()).await;
            }
        )* }
    };
}

disks!(
    a_hash_tree_with_a_scratch_disk,
    a_disk_in_a_vhdx,
    a_dirty_file_system_is_read_and_a_foreign_one_is_refused,
    garbage_on_a_channel,
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_write_to_a_sandbox_is_seen_on_embedded() {
    live::what_others_write_to_a_sandbox_is_seen(embedded()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_write_to_a_sandbox_is_seen_on_qemu() {
    let _one_at_a_time = turn().await;
    live::what_others_write_to_a_sandbox_is_seen(qemu()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_sandbox_is_refused_with_advice_on_embedded() {
    foreign::a_foreign_sandbox_is_refused_with_advice(embedded()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_sandbox_is_refused_with_advice_on_qemu() {
    let _one_at_a_time = turn().await;
    foreign::a_foreign_sandbox_is_refused_with_advice(qemu()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guests_kernel_reads_what_our_reader_does_not_know() {
    let _one_at_a_time = turn().await;
    foreign::the_guests_kernel_reads_what_our_reader_does_not_know(qemu()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_foreign_sandboxes_cost_one_operation() {
    let _one_at_a_time = turn().await;
    foreign::hostile_foreign_sandboxes_cost_one_operation(qemu()).await;
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
async fn restored_machines_have_a_clock_and_random_numbers_of_their_own() {
    let _one_at_a_time = turn().await;
    disks::restored_machines_wake_alone(qemu()).await;
}

/// The price of a kernel's reading: our reader and the guest's kernel on the same content, in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "figures for people"]
async fn speed_of_foreign_sandboxes() {
    let _one_at_a_time = turn().await;
    foreign::speed(qemu()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_spare_goes_on_with_the_hosts_clock_on_qemu() {
    let _one_at_a_time = turn().await;
    disks::a_paused_spare_goes_on_with_the_hosts_clock(qemu()).await;
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
