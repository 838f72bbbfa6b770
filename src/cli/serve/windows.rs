//! `serve` on a named pipe.

use super::{CliError, Listeners, ServeArgs, answer};
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
    let security = &args.pipe_security;
    let docker = if args.no_docker { None } else { Some(PipeIncoming::bind(&args.pipe, security, limit)?) };
    let bind = |name: &std::path::PathBuf| PipeIncoming::bind_for_grpc(name.as_os_str(), security, limit);
    let containerd = args.containerd_socket.as_ref().map(bind).transpose()?;
    let listeners = Listeners { docker, containerd };
    let tell = || {
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            pipe = (!args.no_docker).then(|| args.pipe.display().to_string()),
            root = %args.root.display(),
            containerd = args.containerd_socket.as_ref().map(|name| name.display().to_string()),
            "ready"
        );
        ready();
    };
    answer(listeners, args, options, tell, stop).await
}
