//! Where the time of a service VM goes: wall time and processor time of each operation, side by side.
//!
//! Processor time is that of the VM's process (all threads), so that a crowded machine's figures can be compared.
//! For people: `cargo test --profile agent --test conformance -- --ignored --nocapture speed`.

use crate::files::{Files, body, collect, tree};
use lcow_graphdriver::svm::{
    CheckJob, ExportJob, ExportKind, IdMaps, Lease, ParentDisks, Pool, PoolConfig, Purpose, VmBackend,
};
use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

/// Processor time that a process has used, without that of its children.
fn processor_time(pid: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

fn pid_of(lease: &Lease) -> i32 {
    lease.vm_description().split(' ').nth(1).unwrap().parse().unwrap()
}

struct Measured {
    name: &'static str,
    wall: Duration,
    /// Where the machine is known.
    processor: Option<Duration>,
}

async fn measure<T>(pid: i32, name: &'static str, work: impl Future<Output = T>) -> (T, Measured) {
    let before = processor_time(pid);
    let start = Instant::now();
    let done = work.await;
    let wall = start.elapsed();
    let processor = Some(processor_time(pid).saturating_sub(before));
    (done, Measured { name, wall, processor })
}

/// One layer through one backend, each operation in a machine of its own.
pub(crate) async fn figures(backend: &Arc<dyn VmBackend>, rounds: usize) {
    let files = Files::new();
    let config = PoolConfig { spares: 0, boot_timeout: Duration::from_mins(2), ..PoolConfig::default() };
    let pool = Pool::start(backend.clone(), config);
    let tar = tree(6600, 18_000, 1);
    for _ in 0..rounds {
        let mut all = Vec::new();
        let job = files.apply_job("l");
        let lease = pool.lease("l", Purpose::Work).await.unwrap();
        let (summary, m) =
            measure(pid_of(&lease), "apply", lease.tar_to_layer(job, body(&tar, 256 << 10))).await;
        let summary = summary.unwrap();
        assert_eq!(summary.tar_bytes, tar.len() as u64);
        all.push(m);
        drop(lease);
        gone(&pool).await;
        let start = Instant::now();
        let check = CheckJob {
            image: files.image("l"),
            require_no_writers: true,
            tree: false,
            writer: 2,
            owners: IdMaps::default(),
        };
        pool.check_image(check).await.unwrap();
        all.push(Measured { name: "check with its lease", wall: start.elapsed(), processor: None });
        gone(&pool).await;
        let lease = pool.lease("l", Purpose::Export).await.unwrap();
        let exact = files.exact("l");
        let pid = pid_of(&lease);
        let (back, m) =
            measure(pid, "exact", async { collect(lease.layer_to_tar(exact).await.unwrap()).await }).await;
        assert!(back.unwrap() == tar);
        all.push(m);
        gone(&pool).await;
        let lease = pool.lease("l", Purpose::Export).await.unwrap();
        let kind = ExportKind::Canonical {
            target: vec![files.layer("l")],
            parent: ParentDisks::None,
            format: 1,
            id_maps: IdMaps::default(),
            source_date_epoch: None,
        };
        let job = ExportJob { kind, live: None };
        let pid = pid_of(&lease);
        let (back, m) =
            measure(pid, "canonical", async { collect(lease.layer_to_tar(job).await.unwrap()).await }).await;
        assert!(!back.unwrap().is_empty());
        all.push(m);
        gone(&pool).await;
        let text: Vec<String> = all
            .iter()
            .map(|m| {
                let processor = m.processor.map(|p| format!(" ({:.2} s of processor)", p.as_secs_f64()));
                format!("{} {:.2} s{}", m.name, m.wall.as_secs_f64(), processor.unwrap_or_default())
            })
            .collect();
        println!("{}: {}", backend.name(), text.join(", "));
    }
    pool.shutdown(Duration::from_secs(5)).await;
}

async fn gone(pool: &Pool) {
    let start = Instant::now();
    while !pool.snapshot().vms.is_empty() {
        assert!(start.elapsed() < Duration::from_secs(30), "a machine does not go");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
