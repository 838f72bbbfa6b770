//! `serve`: the plugin itself.
//!
//! ```text
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
    driver::{Driver, DriverConfig},
    telemetry::Metrics,
};
use std::{fmt::Debug, future::Future, sync::Arc, time::Duration};

/// Serves requests until `stop` resolves; running requests finish first, or are cut off when the time limit expires.
/// `ready` is called once the store is open.
async fn answer<L, S>(
    incoming: L,
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
    let driver = Arc::new(Driver::start(config)?);
    let metrics = Arc::new(Metrics::new(&driver.phases()));
    let context = Context { driver: driver.clone(), metrics };
    ready();
    api::serve(incoming, context, Duration::from_secs(args.stop_timeout), stop).await;
    driver.stop().await;
    tracing::info!("stopped");
    Ok(())
}
