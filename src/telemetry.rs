//! Logs and metrics.
//!
//! Called by `cli` (set-up), `api` and `driver` (counting). Metrics answer an operator's questions: which request, how
//! often, with what outcome, how long, how many bytes; and what the driver holds (layers, mounts, service VMs).

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use std::time::{Duration, Instant};

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging to standard error; `RUST_LOG` selects what is logged; the default is `info`.
pub fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
        }
        LogFormat::Json => builder.json().init(),
    }
}

/// Starts logging to a file, for a service that has no standard error. A file larger than 16 MiB is
/// renamed to `*.old` first, replacing an earlier one.
///
/// # Errors
/// The file cannot be opened or renamed.
#[cfg(windows)]
pub fn log_to_file(format: LogFormat, path: &std::path::Path) -> std::io::Result<()> {
    const MAX_BYTES: u64 = 16 << 20;
    if std::fs::metadata(path).is_ok_and(|m| m.len() > MAX_BYTES) {
        std::fs::rename(path, path.with_extension("old"))?;
    }
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::sync::Mutex::new(file));
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Labels of a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: String,
    outcome: &'static str,
}

/// Label of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointLabel {
    endpoint: String,
}

/// Kinds of transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transfer {
    /// ApplyDiff.
    Apply,
    /// Diff.
    Diff,
}

/// Parts of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Waiting for a service VM.
    Wait,
    /// Turning the tar into an image, as fast as it comes.
    Apply,
    /// Turning a layer into a tar, as fast as it is taken.
    Export,
    /// Writing image and record back to the disk.
    Sync,
    /// The second service VM's check.
    Check,
    /// Moving the files to their place.
    Commit,
}

/// Labels of a phase.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    transfer: &'static str,
    phase: &'static str,
}

/// How long the phases of transfers took. Clones count together.
#[derive(Debug, Clone)]
pub struct Phases(Family<PhaseLabels, Histogram>);

impl Default for Phases {
    fn default() -> Self {
        /// From 1 ms, times 4, 12 times: to 70 minutes.
        const BUCKETS: (f64, f64, u16) = (0.001, 4.0, 12);
        Self(Family::new_with_constructor(|| {
            Histogram::new(exponential_buckets(BUCKETS.0, BUCKETS.1, BUCKETS.2))
        }))
    }
}

impl Phases {
    /// A phase begins; it ends when the timer is dropped, however the transfer went.
    pub fn begin(&self, transfer: Transfer, phase: Phase) -> PhaseTimer {
        let labels = PhaseLabels {
            transfer: match transfer {
                Transfer::Apply => "apply",
                Transfer::Diff => "diff",
            },
            phase: match phase {
                Phase::Wait => "wait",
                Phase::Apply => "apply",
                Phase::Export => "export",
                Phase::Sync => "sync",
                Phase::Check => "check",
                Phase::Commit => "commit",
            },
        };
        PhaseTimer { phases: self.clone(), labels, begin: Instant::now() }
    }
}

/// A phase that runs.
#[derive(Debug)]
pub struct PhaseTimer {
    phases: Phases,
    labels: PhaseLabels,
    begin: Instant,
}

impl Drop for PhaseTimer {
    fn drop(&mut self) {
        self.phases.0.get_or_create(&self.labels).observe(self.begin.elapsed().as_secs_f64());
    }
}

/// The outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded.
    Done,
    /// It was refused or failed.
    Failed,
    /// It failed because the store or a layer is damaged.
    Corrupt,
}

/// What the driver holds at the time of a scrape.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gauges {
    /// Layers in the current store.
    pub layers: u64,
    /// Merged views that are mounted.
    pub mounts: u64,
    /// Images and sandboxes that are mounted for views.
    pub disks: u64,
    /// Images that stay mounted for the next view.
    pub kept: u64,
    /// Running service VMs, spares included.
    pub service_vms: u64,
    /// Spares.
    pub spares: u64,
    /// Service VMs started so far.
    pub boots: u64,
    /// Guests booted from nothing so far, where service VMs are restored from a saved one.
    pub cold_boots: u64,
    /// Service VMs restored from a saved guest so far.
    pub restores: u64,
    /// Leases that had to wait for a service VM.
    pub lease_waits: u64,
    /// Service VMs that failed so far.
    pub vm_failures: u64,
    /// Bytes free on the home's disk.
    pub free_bytes: u64,
}

/// Reads one number of them.
type ReadGauge = fn(&Gauges) -> u64;

/// The program's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    seconds: Family<EndpointLabel, Histogram>,
    bytes_in: Counter,
    bytes_out: Counter,
    corruption: Counter,
    gauges: Vec<(ReadGauge, Gauge)>,
}

impl Metrics {
    /// All metrics at zero, beside the phases that the driver counts.
    pub fn new(phases: &Phases) -> Self {
        /// From 1 ms, doubled 16 times: to 65 s.
        const BUCKETS: (f64, f64, u16) = (0.001, 2.0, 17);
        let mut registry = Registry::with_prefix("lcow");
        let requests = Family::default();
        let seconds = Family::<EndpointLabel, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(BUCKETS.0, BUCKETS.1, BUCKETS.2))
        });
        let (bytes_in, bytes_out, corruption) = (Counter::default(), Counter::default(), Counter::default());
        registry.register("requests", "Requests by endpoint and outcome", Family::clone(&requests));
        registry.register_with_unit(
            "request_duration",
            "Time to the end of the reply's head",
            Unit::Seconds,
            seconds.clone(),
        );
        registry.register_with_unit(
            "transfer_phase",
            "Time of the phases of transfers, including failed ones",
            Unit::Seconds,
            phases.0.clone(),
        );
        registry.register(
            "corruption",
            "Requests that met a damaged layer or a damaged store",
            corruption.clone(),
        );
        registry.register_with_unit(
            "diff_received",
            "Tar bytes received by ApplyDiff",
            Unit::Bytes,
            bytes_in.clone(),
        );
        registry.register_with_unit("diff_sent", "Tar bytes sent by Diff", Unit::Bytes, bytes_out.clone());
        type Row = (&'static str, &'static str, ReadGauge);
        let rows: [Row; 12] = [
            ("layers", "Layers in the current store", |g| g.layers),
            ("mounts", "Mounted merged views", |g| g.mounts),
            ("disks", "Images and sandboxes that are mounted for views", |g| g.disks),
            ("disks_kept", "Images that stay mounted for the next view", |g| g.kept),
            ("service_vms", "Running service VMs, spares included", |g| g.service_vms),
            ("service_vm_spares", "Spare service VMs", |g| g.spares),
            ("service_vm_boots", "Service VMs started since the program's start, in any way", |g| g.boots),
            ("service_vm_cold_boots", "Guests booted to save a template", |g| g.cold_boots),
            ("service_vm_restores", "Service VMs restored from a template", |g| g.restores),
            ("service_vm_lease_waits", "Leases that waited for a service VM", |g| g.lease_waits),
            ("service_vm_failures", "Service VMs that failed since the program's start", |g| g.vm_failures),
            ("free_bytes", "Bytes free on the disk of the home", |g| g.free_bytes),
        ];
        let gauges = rows
            .into_iter()
            .map(|(name, help, read)| {
                let gauge = Gauge::default();
                registry.register(name, help, gauge.clone());
                (read, gauge)
            })
            .collect();
        Self { registry, requests, seconds, bytes_in, bytes_out, corruption, gauges }
    }

    /// Counts a request.
    pub fn request(&self, endpoint: &str, outcome: Outcome, took: Duration) {
        let endpoint = endpoint.to_owned();
        let outcome = match outcome {
            Outcome::Done => "ok",
            Outcome::Failed => "error",
            Outcome::Corrupt => {
                self.corruption.inc();
                "corrupt"
            }
        };
        self.requests.get_or_create(&RequestLabels { endpoint: endpoint.clone(), outcome }).inc();
        self.seconds.get_or_create(&EndpointLabel { endpoint }).observe(took.as_secs_f64());
    }

    /// A counter of received tar bytes.
    pub fn received(&self) -> impl FnMut(u64) + Send + 'static {
        let counter = self.bytes_in.clone();
        move |n| {
            counter.inc_by(n);
        }
    }

    /// A counter of sent tar bytes.
    pub fn sent(&self) -> impl FnMut(u64) + Send + 'static {
        let counter = self.bytes_out.clone();
        move |n| {
            counter.inc_by(n);
        }
    }

    /// The text that Prometheus reads.
    pub fn render(&self, now: &Gauges) -> Result<String, std::fmt::Error> {
        for (read, gauge) in &self.gauges {
            gauge.set(i64::try_from(read(now)).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_shows_requests_bytes_and_gauges() {
        let phases = Phases::default();
        let metrics = Metrics::new(&phases);
        metrics.request("GraphDriver.Get", Outcome::Done, Duration::from_millis(3));
        metrics.request("GraphDriver.Get", Outcome::Failed, Duration::from_millis(3));
        metrics.request("GraphDriver.Get", Outcome::Corrupt, Duration::from_millis(3));
        drop(phases.begin(Transfer::Apply, Phase::Check));
        metrics.received()(10);
        let text = metrics.render(&Gauges { layers: 7, ..Gauges::default() }).unwrap();
        for line in [
            "lcow_requests_total{endpoint=\"GraphDriver.Get\",outcome=\"ok\"} 1",
            "lcow_requests_total{endpoint=\"GraphDriver.Get\",outcome=\"error\"} 1",
            "lcow_requests_total{endpoint=\"GraphDriver.Get\",outcome=\"corrupt\"} 1",
            "lcow_corruption_total 1",
            "lcow_transfer_phase_seconds_count{transfer=\"apply\",phase=\"check\"} 1",
            "lcow_diff_received_bytes_total 10",
            "lcow_layers 7",
        ] {
            assert!(text.contains(line), "{line} is missing in:\n{text}");
        }
    }
}
