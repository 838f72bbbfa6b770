//! Time of a lease of the embedded backend, with the real program as its worker: `cargo bench --bench lease`.
//!
//! ```text
//!   new       start a process, jail it, greet it      safe mode without spares: what a burst of requests waits for
//!   running   share a service VM that is up           global mode
//! ```
//!
//! `service_vm` measures spares and the bytes in and out.

use criterion::Criterion;
use lcow_graphdriver::svm::{
    Mode, Pool, PoolConfig, Purpose,
    embedded::{EmbeddedBackend, EmbeddedConfig},
};
use std::{sync::Arc, time::Duration};

fn lease(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let mut group = c.benchmark_group("lease");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (name, mode) in [("new", Mode::Safe), ("running", Mode::Global)] {
        let backend = Arc::new(EmbeddedBackend::new(EmbeddedConfig {
            program: env!("CARGO_BIN_EXE_lcow-graphdriver").into(),
            ..EmbeddedConfig::default()
        }));
        let config = PoolConfig { mode, spares: 0, ..PoolConfig::default() };
        let pool = runtime.block_on(async { Pool::start(backend, config) });
        let take = || runtime.block_on(pool.lease("bench", Purpose::Work)).expect("a lease");
        // In global mode this starts the service VM that the others share.
        let first = take();
        group.bench_function(name, |b| b.iter(take));
        drop(first);
        runtime.block_on(pool.shutdown(Duration::ZERO));
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    lease(&mut criterion);
    criterion.final_summary();
}
