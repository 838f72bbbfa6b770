//! `svm bench`: the first lease, a lease, apply and exact diff, on every backend that works here.
//!
//! A lease is shown without a spare machine, the operations with one, as the daemon keeps spares.

use crate::{
    cli::{CliError, output::table},
    svm::{
        ApplyJob, ApplyOptions, DiskSource, ExportJob, ExportKind, Pool, PoolConfig, Purpose, VmBackend,
        embedded::{EmbeddedBackend, EmbeddedConfig},
        qemu::{QemuBackend, QemuConfig},
    },
};
use clap::Args;
use futures_util::StreamExt;
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::io::ReaderStream;
use vhd_image::vhd::FOOTER_SIZE;

/// Bytes read from the tar at a time.
const CHUNK: usize = 256 << 10;
/// How long a first boot, which creates QEMU's template, may take.
const BOOT: Duration = Duration::from_mins(2);
/// How long a spare may take to become ready.
const SPARE: Duration = Duration::from_secs(30);
/// Runs of each backend; the best one is shown, because other programs share the machine.
const RUNS: usize = 3;

/// Arguments of `svm bench`.
#[derive(Debug, Args)]
pub(in crate::cli) struct BenchArgs {
    /// An uncompressed tar without whiteouts, such as a base image's layer.
    tar: PathBuf,
    /// Directory of the guest's vmlinux and initrd (scripts/build-svm-image); without it, QEMU is not measured.
    #[arg(long, value_name = "DIRECTORY")]
    kirdpath: Option<PathBuf>,
    /// Directory for temporary files; all of them are deleted.
    #[arg(long, value_name = "DIRECTORY", default_value = "/var/tmp")]
    work: PathBuf,
}

struct Figures {
    first: Duration,
    lease: Duration,
    apply: Duration,
    diff: Duration,
}

pub(in crate::cli) async fn run(args: &BenchArgs) -> Result<ExitCode, CliError> {
    let work = tempfile::Builder::new().prefix("lcow-bench-").tempdir_in(&args.work)?;
    let mut backends: Vec<Arc<dyn VmBackend>> =
        vec![Arc::new(EmbeddedBackend::new(EmbeddedConfig::default()))];
    if let Some(kird) = &args.kirdpath {
        let config = QemuConfig::new(kird.join("vmlinux"), kird.join("initrd"), work.path());
        backends.push(Arc::new(QemuBackend::new(config)));
    }
    let mut table = table(&["BACKEND", "FIRST LEASE", "LEASE", "APPLY", "EXACT DIFF", "RUNS ON"]);
    let mut failed = false;
    for backend in backends {
        match measure(&backend, &args.tar, work.path()).await {
            Ok(f) => {
                let shown = |d: Duration| format!("{:.3} s", d.as_secs_f64());
                table.add_row([
                    backend.name().to_owned(),
                    shown(f.first),
                    shown(f.lease),
                    shown(f.apply),
                    shown(f.diff),
                    backend.detail(),
                ]);
            }
            Err(e) => {
                failed = true;
                eprintln!("lcow-graphdriver: {}: {e}", backend.name());
            }
        }
    }
    println!("{table}");
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn measure(backend: &Arc<dyn VmBackend>, tar: &Path, work: &Path) -> Result<Figures, CliError> {
    let start = |spares| {
        let config = PoolConfig { spares, boot_timeout: BOOT, ..PoolConfig::default() };
        Pool::start(backend.clone(), config)
    };
    let pool = start(0);
    let leases = leases(&pool).await;
    pool.shutdown(Duration::from_secs(5)).await;
    let (first, lease) = leases?;
    let pool = start(1);
    let result = rounds(&pool, tar, work).await;
    pool.shutdown(Duration::from_secs(5)).await;
    let (apply, diff) = result?;
    Ok(Figures { first, lease, apply, diff })
}

/// The first lease and the best of the others, each with a machine started for it.
async fn leases(pool: &Pool) -> Result<(Duration, Duration), CliError> {
    let mut times = Vec::new();
    for run in 0..=RUNS {
        let begin = Instant::now();
        // Each lease has its own name: an operation that is just ending would share its VM with the next one of the
        // same name.
        drop(pool.lease(&format!("lease-{run}"), Purpose::Work).await?);
        times.push(begin.elapsed());
    }
    let first = times.remove(0);
    Ok((first, times.into_iter().min().unwrap_or(first)))
}

/// Waits until a spare is ready, as it is on a machine that was idle for a moment.
async fn spare_ready(pool: &Pool) -> Result<(), CliError> {
    let begin = Instant::now();
    while pool.snapshot().spares == 0 {
        if begin.elapsed() > SPARE {
            return Err(format!("no spare machine was ready within {} s", SPARE.as_secs()).into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// The best times of an apply and of an exact diff.
async fn rounds(pool: &Pool, tar: &Path, work: &Path) -> Result<(Duration, Duration), CliError> {
    let (mut apply, mut diff) = (Duration::MAX, Duration::MAX);
    for run in 0..RUNS {
        let (image, record) = (fresh(&work.join("image"))?, fresh(&work.join("record"))?);
        spare_ready(pool).await?;
        let begin = Instant::now();
        let lease = pool.lease(&format!("apply-{run}"), Purpose::Work).await?;
        let file = tokio::fs::File::open(tar).await;
        let file = file.map_err(|e| format!("cannot open '{}': {e}", tar.display()))?;
        let job = ApplyJob {
            image,
            record,
            scratch: None,
            lowers: Vec::new(),
            larger: None,
            options: ApplyOptions::default(),
        };
        lease.tar_to_layer(job, ReaderStream::with_capacity(file, CHUNK)).await?;
        drop(lease);
        apply = apply.min(begin.elapsed());

        let image = readable(&work.join("image"))?;
        let len = image.file.metadata()?.len().saturating_sub(FOOTER_SIZE as u64);
        let kind = ExportKind::Exact { image: image.window(0, len), record: readable(&work.join("record"))? };
        spare_ready(pool).await?;
        let begin = Instant::now();
        let lease = pool.lease(&format!("diff-{run}"), Purpose::Export).await?;
        let mut back = lease.layer_to_tar(ExportJob { kind, live: None }).await?;
        let mut bytes = 0;
        while let Some(chunk) = back.next().await {
            bytes += chunk?.len() as u64;
        }
        diff = diff.min(begin.elapsed());
        let expected = std::fs::metadata(tar)?.len();
        if bytes != expected {
            return Err(format!("diff size mismatch: expected {expected} bytes, found {bytes}").into());
        }
    }
    Ok((apply, diff))
}

fn fresh(path: &Path) -> std::io::Result<DiskSource> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    Ok(DiskSource::read_write(Arc::new(file), path.to_owned()))
}

fn readable(path: &Path) -> std::io::Result<DiskSource> {
    Ok(DiskSource::read_only(Arc::new(File::open(path)?), path.to_owned()))
}
