//! `serve`: the plugin itself.
//!
//! ```text
//!   both     dockerd's listener ─► api;  containerd's listener ─► containerd;  one or both, each with a store of its own
//!   Linux    as pid 1 (managed plugin, any container): /dev ─► supervise ─► serve again, as an ordinary process
//!            otherwise: options ─► socket ─► driver ─► requests … SIGTERM
//!   Windows  by hand: options ─► pipe ─► driver ─► requests … Ctrl+C
//!            as a service: the same, stopped by the service manager (`service`)
//! ```

#[cfg(unix)]
mod unix;
#[cfg(windows)]
pub(super) mod windows;

#[cfg(unix)]
pub(super) use unix::run;
#[cfg(windows)]
pub(super) use windows::run;

use super::{CliError, ServeArgs};
use crate::{
    api::{self, Context},
    config::Options,
    containerd::{self, Face, FaceConfig},
    driver::{Driver, DriverConfig, snapshots::Snapshots},
    telemetry::Metrics,
};
use std::{fmt::Debug, future::Future, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// The listeners of a service: for dockerd, for containerd, or both.
struct Listeners<L> {
    docker: Option<L>,
    containerd: Option<L>,
}

/// Serves requests until `stop` resolves; running requests finish first, or are cut off when the time limit expires.
/// `ready` is called once the stores are open.
async fn answer<L, S>(
    listeners: Listeners<L>,
    args: &ServeArgs,
    options: Options,
    ready: impl FnOnce(),
    stop: S,
) -> Result<(), CliError>
where
    L: axum::serve::Listener,
    L::Addr: Debug,
    S: Future<Output = ()> + Send + 'static,
{
    let config = DriverConfig { root: args.root.clone(), options, worker_program: None };
    let docker = match listeners.docker {
        Some(listener) => Some((listener, Arc::new(Driver::start(config.clone())?))),
        None => None,
    };
    let containerd = match listeners.containerd {
        Some(listener) => Some((listener, Snapshots::open(&args.containerd_root, &config)?)),
        None => None,
    };
    ready();
    let (limit, stopping) = (Duration::from_secs(args.stop_timeout), CancellationToken::new());
    let stopped = || stopping.clone().cancelled_owned();
    let serve_docker = async {
        let Some((listener, driver)) = docker else { return };
        let metrics = Arc::new(Metrics::new(&driver.phases()));
        api::serve(listener, Context { driver: driver.clone(), metrics }, limit, stopped()).await;
        driver.stop().await;
    };
    let serve_containerd = async {
        let Some((listener, snapshots)) = containerd else { return };
        let metrics = Arc::new(Metrics::new(&snapshots.phases()));
        let config =
            FaceConfig { engine: args.containerd_address.clone(), data: args.containerd_data.clone() };
        let face = Face::new(snapshots.clone(), metrics, &config);
        containerd::serve(listener, face, limit, stopped()).await;
        snapshots.stop().await;
    };
    let told = async {
        stop.await;
        stopping.cancel();
    };
    tokio::join!(told, serve_docker, serve_containerd);
    tracing::info!("stopped");
    Ok(())
}
