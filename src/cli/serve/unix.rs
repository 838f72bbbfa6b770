//! `serve` on a unix socket.

use super::{CliError, Listeners, ServeArgs, answer};
use crate::{
    cli::runtime,
    config::Options,
    listen::UnixIncoming,
    telemetry::{self},
};
use std::{os::unix::net::UnixListener, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};

pub(in crate::cli) fn run(args: ServeArgs) -> Result<ExitCode, CliError> {
    #[cfg(target_os = "linux")]
    if lcow_sys::linux::init::is_first_process() {
        return as_first_process(&args.root);
    }
    telemetry::start_logging(args.log_format);
    let options = Options::load(args.config.as_deref(), &args.storage_opt)?;
    runtime()?.block_on(serve(args, options))
}

async fn serve(args: ServeArgs, options: Options) -> Result<ExitCode, CliError> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // The socket comes first: clients that wait for it can connect now, and get a reply as soon as the store is open.
    let mut passed = Passed::from_env()?;
    let docker = match passed.docker.take() {
        _ if args.no_docker => None,
        Some(listener) => Some(UnixIncoming::adopt(listener)?),
        // systemd passes the sockets that are active: dockerd's is not wanted.
        None if passed.containerd.is_some() => None,
        None => Some(UnixIncoming::bind(&args.socket)?),
    };
    let serves_docker = docker.is_some();
    let containerd = match (passed.containerd.take(), &args.containerd_socket) {
        (Some(listener), _) => Some(UnixIncoming::adopt(listener)?),
        (None, Some(path)) => Some(UnixIncoming::bind(path)?),
        (None, None) => None,
    };
    if docker.is_none() && containerd.is_none() {
        return Err(
            "there is nothing to serve: --no-docker needs --containerd-socket, or a socket from systemd"
                .into(),
        );
    }
    let containerd_at = match (&containerd, &args.containerd_socket) {
        (Some(_), Some(path)) => Some(path.display().to_string()),
        (Some(_), None) => Some("a socket from systemd".to_owned()),
        (None, _) => None,
    };
    let listeners = Listeners { docker, containerd };
    let ready = || {
        #[cfg(target_os = "linux")]
        watch_propagation(&args.root);
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            socket = serves_docker.then(|| args.socket.display().to_string()),
            root = %args.root.display(),
            containerd = containerd_at,
            "ready"
        );
        // Without systemd there is no one to notify.
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
    };
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping after running requests have finished; a second signal stops at once");
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("stopped at once by a second signal");
            thaw_all();
            std::process::exit(1);
        });
    };
    let answered = answer(listeners, &args, options, ready, stop).await;
    thaw_all();
    answered.map(|()| ExitCode::SUCCESS)
}

/// Sockets that systemd made, by their `FileDescriptorName=`: "containerd", or any other name for dockerd's.
struct Passed {
    docker: Option<UnixListener>,
    containerd: Option<UnixListener>,
}

impl Passed {
    fn from_env() -> Result<Self, CliError> {
        // sd_listen_fds(3): names in the order of the descriptors, separated by colons.
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut sockets = listenfd::ListenFd::from_env();
        let mut passed = Self { docker: None, containerd: None };
        for index in 0..sockets.len() {
            let Some(listener) = sockets.take_unix_listener(index)? else { continue };
            let name = names.split(':').nth(index).unwrap_or_default();
            let place = if name == CONTAINERD_NAME { &mut passed.containerd } else { &mut passed.docker };
            *place = Some(listener);
        }
        Ok(passed)
    }
}

/// Name of the descriptor of containerd's socket.
const CONTAINERD_NAME: &str = "containerd";

/// Thaws sandboxes, so that no container waits for a process that has ended.
fn thaw_all() {
    /// A freeze in progress first writes back dirty pages.
    #[cfg(target_os = "linux")]
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(10);
    #[cfg(target_os = "linux")]
    match lcow_sys::linux::freeze::thaw_all(LIMIT) {
        0 => {}
        left => tracing::error!(left, "some sandboxes are still frozen; the next start thaws them"),
    }
}

/// In a managed plugin: exits when an engine that stops leaves the plugin running but unmounts its directory, so that
/// the next engine finds no live plugin and starts a new one, with a directory that it sees. Nothing is lost: an engine
/// does this only when no container runs. Exiting later, at the engine's first request, would not work: the engine
/// repeats a request without its body.
#[cfg(target_os = "linux")]
fn watch_propagation(root: &std::path::Path) {
    let Some(canary) = lcow_sys::linux::init::Canary::find(root) else { return };
    std::thread::spawn(move || {
        if let Err(error) = canary.wait_until_gone() {
            tracing::warn!(%error, "cannot watch mounts");
            return;
        }
        tracing::warn!(
            "the engine unmounted the plugin's directory; exiting, so that the engine starts the plugin with a new one"
        );
        thaw_all();
        // EX_TEMPFAIL of sysexits.h.
        std::process::exit(75);
    });
}

/// The first process of a container: prepares `/dev`, starts the plugin, reaps processes and forwards signals.
#[cfg(target_os = "linux")]
fn as_first_process(root: &std::path::Path) -> Result<ExitCode, CliError> {
    use lcow_sys::linux::init;
    use std::{error::Error as _, os::unix::process::ExitStatusExt};
    /// Added to a signal's number to make an exit status, as in shells.
    const BY_SIGNAL: i32 = 128;
    if let Err(error) = init::furnish_dev() {
        // Layers can still be converted; a Get reports what is missing.
        crate::cli::report(&format!("layers cannot be mounted on this system: {error}"), error.source());
    }
    // Only needed to notice what an engine does with a plugin that it leaves running; everything else works without it.
    if let Err(error) = init::Canary::set(root) {
        crate::cli::report(&format!("cannot watch mounts: {error}"), error.source());
    }
    let mut again = std::process::Command::new("/proc/self/exe");
    again.args(std::env::args_os().skip(1));
    let status = init::supervise(&mut again).map_err(|e| format!("cannot start or watch the plugin: {e}"))?;
    let code = status.code().or_else(|| status.signal().map(|n| BY_SIGNAL + n)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
