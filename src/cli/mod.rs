//! The command line: `serve`, `store`, `layer`, `call`, and the hidden `worker`.
//!
//! ```text
//!   lcow-graphdriver serve    the plugin                          listen ─► api ─► driver
//!                    store    list, check, repair, import         store, driver (scrub), migrate (import)
//!                    layer    convert one layer on files          diff
//!                    image    look into container images          oci-image
//!                    call     one request to a running plugin     HTTP client on its socket or pipe
//!                    svm      service VMs: list, console, bench   the same client; svm for bench
//!                    service  install, start, stop (Windows)      the service manager
//!                    config   check, dump, template               config
//!                    containerd-config   print and check containerd's configuration
//!                    completions, man   for shells and manuals    clap
//!                    worker   (hidden) the embedded service VM    agent
//!                    confined (hidden) another command in a jail  the same command
//! ```
//!
//! clap parses the command line. Results go to standard output (tables for people, `--json` for programs), messages to
//! standard error. The exit status is 0 for success, 1 for a failure, 2 for a wrong command line. Called by `main`
//! alone.

mod call;
mod config;
mod confined;
mod containerd_config;
mod generate;
mod image;
#[cfg(target_os = "linux")]
mod import;
#[cfg(target_os = "linux")]
mod import_engine;
mod layer;
mod listing;
mod output;
mod registry;
mod serve;
#[cfg(windows)]
mod service;
mod store;
mod svm;

use crate::{config as options, telemetry::LogFormat};
use clap::{Args, Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode, sync::Arc};
use svm_agent::{RealCodec, codec::Codec};

/// Default directory of the service's own state.
#[cfg(unix)]
pub const DEFAULT_ROOT: &str = "/var/lib/lcow";
/// Default directory of the service's own state.
#[cfg(windows)]
pub const DEFAULT_ROOT: &str = r"C:\ProgramData\lcow";
/// Where dockerd looks for a plugin named `lcow`.
#[cfg(unix)]
pub const DEFAULT_SOCKET: &str = "/run/docker/plugins/lcow.sock";
/// The pipe that the discovery file names.
#[cfg(windows)]
pub const DEFAULT_PIPE: &str = r"\\.\pipe\lcow";

/// Default directory of containerd's snapshots.
#[cfg(unix)]
pub const DEFAULT_CONTAINERD_ROOT: &str = "/var/lib/lcow/containerd";
/// Default directory of containerd's snapshots.
#[cfg(windows)]
pub const DEFAULT_CONTAINERD_ROOT: &str = r"C:\ProgramData\lcow\containerd";
/// containerd's root (`defaults.DefaultRootDir`).
#[cfg(unix)]
pub const DEFAULT_CONTAINERD_DATA: &str = "/var/lib/containerd";
/// containerd's root (`defaults.DefaultRootDir`).
#[cfg(windows)]
pub const DEFAULT_CONTAINERD_DATA: &str = r"C:\ProgramData\containerd\root";
/// Where containerd listens (`defaults.DefaultAddress`).
#[cfg(unix)]
pub const DEFAULT_CONTAINERD_ADDRESS: &str = "/run/containerd/containerd.sock";
/// Where containerd listens (`defaults.DefaultAddress`).
#[cfg(windows)]
pub const DEFAULT_CONTAINERD_ADDRESS: &str = r"\\.\pipe\containerd-containerd";

/// An error that ends a command; it is printed with its causes.
pub(crate) type CliError = Box<dyn std::error::Error + Send + Sync>;

/// Docker graphdriver plugin that keeps every layer as one ext4 file system in a VHD and handles untrusted bytes only
/// in service VMs.
#[derive(Debug, Parser)]
#[command(name = "lcow-graphdriver", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answers dockerd's graphdriver requests on a unix socket (Windows: a named pipe).
    #[command(after_help = options_help())]
    Serve(ServeArgs),
    /// Lists, checks and repairs a layer store, and imports images into it.
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Converts single layers between tars and images, as files.
    #[command(subcommand)]
    Layer(layer::LayerCommand),
    /// Looks into whole container images, in layouts and archives.
    #[command(subcommand)]
    Image(Box<image::ImageCommand>),
    /// Sends one request to a running plugin and prints its reply.
    Call(call::CallArgs),
    /// Shows the service VMs of a running plugin, and benchmarks each kind.
    #[command(subcommand)]
    Svm(svm::SvmCommand),
    /// Installs, starts and stops the plugin as a Windows service.
    #[cfg(windows)]
    #[command(subcommand)]
    Service(service::ServiceCommand),
    /// Shows and checks the options of `serve`, and prints a commented configuration file.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Prints the configuration with which containerd uses this service, or checks an existing one.
    ContainerdConfig(containerd_config::ContainerdConfigArgs),
    /// Prints shell completions.
    Completions(generate::CompletionsArgs),
    /// Writes the manual pages into a directory.
    Man(generate::ManArgs),
    /// The embedded service VM; started by `serve` only.
    #[command(hide = true)]
    Worker {
        /// The arguments that the parent passes.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        args: Vec<String>,
    },
    /// The jailed process of another command, which starts it.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Confined {
        /// The arguments of that command.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Confines itself and executes a virtual machine's program; started by `serve` only.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Launch,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
struct ServeArgs {
    /// Directory of the service's own state, and of the layer store until dockerd's Init names another.
    #[arg(long, env = "LCOW_ROOT", default_value = DEFAULT_ROOT)]
    root: PathBuf,
    /// The socket to listen on; ignored if systemd passes a socket.
    #[cfg(unix)]
    #[arg(long, env = "LCOW_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The named pipe to listen on.
    #[cfg(windows)]
    #[arg(long, env = "LCOW_PIPE", default_value = DEFAULT_PIPE)]
    pipe: std::ffi::OsString,
    /// Security descriptor of the pipe, in SDDL; by default, the system and administrators may connect.
    #[cfg(windows)]
    #[arg(long, env = "LCOW_PIPE_SECURITY", value_name = "SDDL", default_value = crate::listen::pipe::DEFAULT_SECURITY)]
    pipe_security: String,
    /// Seconds after which a client that does not read its reply is disconnected.
    #[cfg(windows)]
    #[arg(long, env = "LCOW_PIPE_WRITE_TIMEOUT", value_name = "SECONDS", default_value_t = crate::listen::pipe::WRITE_TIMEOUT.as_secs())]
    pipe_write_timeout: u64,
    /// The socket (Windows: named pipe) on which containerd finds its snapshotter and differ; without it, containerd is
    /// not served.
    #[arg(long, env = "LCOW_CONTAINERD_SOCKET", value_name = "SOCKET")]
    containerd_socket: Option<PathBuf>,
    /// Directory of containerd's snapshots, which are apart from the layers of dockerd.
    #[arg(long, env = "LCOW_CONTAINERD_ROOT", value_name = "DIRECTORY", default_value = DEFAULT_CONTAINERD_ROOT)]
    containerd_root: PathBuf,
    /// containerd's own socket (Windows: named pipe), for the blobs of its content store.
    #[arg(long, env = "CONTAINERD_ADDRESS", value_name = "SOCKET", default_value = DEFAULT_CONTAINERD_ADDRESS)]
    containerd_address: PathBuf,
    /// containerd's own root directory, for `lcow.containerd.content=file`.
    #[arg(long, env = "LCOW_CONTAINERD_DATA", value_name = "DIRECTORY", default_value = DEFAULT_CONTAINERD_DATA)]
    containerd_data: PathBuf,
    /// Serves containerd only: no socket for dockerd.
    #[arg(long, env = "LCOW_NO_DOCKER")]
    no_docker: bool,
    /// A TOML file with options; `config template` prints one.
    #[arg(long, env = "LCOW_CONFIG")]
    config: Option<PathBuf>,
    /// Sets an option, for example `lcow.sandboxsize=30`; can be repeated. The options are listed below.
    #[arg(long = "storage-opt", value_name = "NAME=VALUE")]
    storage_opt: Vec<String>,
    /// Seconds that running requests get to finish after a request to stop; then they are cut off.
    #[arg(long, env = "LCOW_STOP_TIMEOUT", value_name = "SECONDS", default_value_t = 90)]
    stop_timeout: u64,
    /// Format of log lines on standard error; RUST_LOG selects what is logged.
    #[arg(long, env = "LCOW_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: LogFormat,
}

/// The store that a command works on.
#[derive(Debug, Args)]
struct HomeArgs {
    /// Directory of the store; by default, the one that the last Init named to the service of --root.
    #[arg(long)]
    home: Option<PathBuf>,
    /// Directory of the service's own state.
    #[arg(long, env = "LCOW_ROOT", default_value = DEFAULT_ROOT)]
    root: PathBuf,
}

/// The table of options for `serve --help`.
fn options_help() -> String {
    use std::fmt::Write as _;
    let mut text = String::from(
        "Options for --storage-opt, the environment and the configuration file (docs/options.md):\n",
    );
    for spec in options::SPECS {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "  {} (default {}, environment {})\n      {}\n      Accepts {}.",
            spec.name,
            spec.default,
            options::env_name(spec.name),
            spec.help,
            spec.accepts
        );
    }
    text
}

/// Runs the program.
pub fn run() -> ExitCode {
    run_as(std::env::args_os())
}

/// Runs the program with these arguments, the first of which is its name.
pub fn run_as(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> ExitCode {
    let arguments: Vec<std::ffi::OsString> = arguments.into_iter().collect();
    let cli = Cli::parse_from(&arguments);
    let result = match cli.command {
        #[cfg(target_os = "linux")]
        Command::Confined { args } => return confined::child(args, run_as),
        #[cfg(target_os = "linux")]
        Command::Launch => {
            let status = lcow_sys::linux::launch::launch_main();
            return u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from);
        }
        Command::Serve(args) => serve::run(args),
        Command::Store(command) => store::run(command),
        Command::Layer(command) => layer::run(&command, &arguments),
        Command::Image(command) => image::run(&command, &arguments),
        Command::Call(args) => call::run(args),
        Command::Svm(command) => svm::run(command),
        #[cfg(windows)]
        Command::Service(command) => service::run(command),
        Command::Config(command) => config::run(command),
        Command::ContainerdConfig(args) => containerd_config::run(&args),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
        Command::Worker { args } => {
            let codec: Arc<dyn Codec> = Arc::new(RealCodec::default());
            let status = svm_agent::worker_main(&args, &codec);
            return u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from);
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            report(&error.to_string(), error.source());
            ExitCode::FAILURE
        }
    }
}

/// Prints an error and its causes on standard error.
fn report(what: &str, mut cause: Option<&(dyn std::error::Error + 'static)>) {
    eprint!("lcow-graphdriver: {what}");
    while let Some(inner) = cause {
        eprint!(": {inner}");
        cause = inner.source();
    }
    eprintln!();
}

/// A runtime for commands that need one.
///
/// tokio panics if the system gives it no thread, and then waits for ever for those that it has: the process ends before that.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(|panic| {
        let reason = panic.payload_as_str().unwrap_or("the reason is unknown");
        eprintln!("error: cannot start the threads of the program: {reason}");
        std::process::exit(1);
    }));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    std::panic::set_hook(usual);
    runtime
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_its_help_names_every_option() {
        Cli::command().debug_assert();
        let help = options_help();
        for spec in options::SPECS {
            assert!(help.contains(spec.name) && help.contains(&options::env_name(spec.name)));
        }
    }

    #[test]
    #[cfg(unix)]
    fn serve_takes_its_documented_form() {
        let cli = Cli::try_parse_from([
            "lcow-graphdriver",
            "serve",
            "--root",
            "/r",
            "--socket",
            "/s",
            "--storage-opt",
            "lcow.globalmode=true",
            "--storage-opt",
            "lcow.sandboxsize=30",
        ])
        .unwrap();
        let Command::Serve(args) = cli.command else { panic!("not serve") };
        assert_eq!(args.storage_opt, ["lcow.globalmode=true", "lcow.sandboxsize=30"]);
    }
}
