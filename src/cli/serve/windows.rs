//! `serve` on a named pipe.

use super::{CliError, ServeArgs, answer};
use crate::{cli::runtime, config::Options, listen::PipeIncoming, telemetry};
use std::{future::Future, process::ExitCode, time::Duration};

#[expect(clippy::needless_pass_by_value, reason = "as on unix")]
pub(in crate::cli) fn run(args: ServeArgs) -> Result<ExitCode, CliError> {
    telemetry::start_logging(args.log_format);
    let options = Options::load(args.config.as_deref(), &args.storage_opt)?;
    runtime()?.block_on(async {
        let (mut interrupt, mut close) =
            (tokio::signal::windows::ctrl_c()?, tokio::signal::windows::ctrl_break()?);
        let stop = async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = close.recv() => {}
            }
            tracing::info!("stopping after running requests have finished; a second Ctrl+C stops at once");
            tokio::spawn(async move {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = close.recv() => {}
                }
                tracing::warn!("stopped at once");
                std::process::exit(1);
            });
        };
        serve(&args, options, || {}, stop).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Serves the pipe until `stop` resolves.
pub(in crate::cli) async fn serve(
    args: &ServeArgs,
    options: Options,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), CliError> {
    let limit = Duration::from_secs(args.pipe_write_timeout.max(1));
    let incoming = PipeIncoming::bind(&args.pipe, &args.pipe_security, limit)?;
    let tell = || {
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            pipe = %args.pipe.display(),
            root = %args.root.display(),
            "ready"
        );
        ready();
    };
    answer(incoming, args, options, tell, stop).await
}
