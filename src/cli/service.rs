//! `service`: the plugin as a Windows service.
//!
//! ```text
//!   service install … ─► service manager: "lcow-graphdriver service run …", started with the system
//!   service run (by the manager) ─► log file ─► pipe ─► store open ─► running, discovery file written
//!                                   stop ─► requests end ─► discovery file removed ─► stopped
//! ```
//!
//! Docker on Windows finds plugins by files in `%ProgramData%\docker\plugins`; the file exists exactly while the
//! service answers. Options come from the configuration file and the environment, never from the registry. Called by
//! `cli`.

use super::{CliError, ServeArgs, runtime, serve};
use crate::{config::Options, telemetry};
use clap::Subcommand;
use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use windows_service::{
    define_windows_service,
    service::{
        ServiceAccess, ServiceControl, ServiceControlAccept, ServiceErrorControl, ServiceExitCode,
        ServiceInfo, ServiceStartType, ServiceState, ServiceStatus, ServiceType,
    },
    service_control_handler::{self, ServiceControlHandlerResult, ServiceStatusHandle},
    service_dispatcher,
    service_manager::{ServiceManager, ServiceManagerAccess},
};

/// The service's name.
const NAME: &str = "lcow-graphdriver";
/// Where Docker looks for plugins, below `%ProgramData%`.
const PLUGINS: &str = r"docker\plugins";
/// The discovery file.
const SPEC: &str = "lcow.spec";
/// The log, below the root.
const LOG: &str = "lcow.log";
/// Longest wait for a service to start or stop. A stop lets running requests end.
const PATIENCE: Duration = Duration::from_mins(1);
/// The wait hint that is reported to the manager for each step.
const STEP: Duration = Duration::from_secs(30);

/// The commands of `service`.
#[derive(Debug, Subcommand)]
pub(super) enum ServiceCommand {
    /// Installs the service; the arguments given here are used at every start.
    Install(ServeArgs),
    /// Starts the service and waits until it is ready.
    Start,
    /// Stops the service after running requests have finished.
    Stop,
    /// Stops and uninstalls the service; layers are kept.
    Uninstall,
    /// Shows the state of the service.
    Status,
    /// The service itself; started by the service manager.
    #[command(hide = true)]
    Run {
        /// The discovery file. Named at installation: a service's environment is not its installer's.
        #[arg(long)]
        discovery: PathBuf,
        #[command(flatten)]
        args: ServeArgs,
    },
}

pub(super) fn run(command: ServiceCommand) -> Result<ExitCode, CliError> {
    match command {
        ServiceCommand::Install(args) => install(&args)?,
        ServiceCommand::Start => start()?,
        ServiceCommand::Stop => stop()?,
        ServiceCommand::Uninstall => uninstall()?,
        ServiceCommand::Status => println!("{}", status()?),
        ServiceCommand::Run { discovery, args } => {
            let _ = ARGUMENTS.set(Mutex::new(Some((args, discovery))));
            service_dispatcher::start(NAME, ffi_service_main)
                .map_err(|e| told("this command is for the service manager; use 'serve' instead", &e))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An error of the service manager with a hint.
fn told(what: &str, error: &windows_service::Error) -> CliError {
    match error {
        windows_service::Error::Winapi(e) => format!("{what}: {e}").into(),
        other => format!("{what}: {other}").into(),
    }
}

fn manager(access: ServiceManagerAccess) -> Result<ServiceManager, CliError> {
    ServiceManager::local_computer(None::<&str>, access)
        .map_err(|e| told("cannot reach the service manager (administrators only)", &e))
}

fn opened(access: ServiceAccess) -> Result<windows_service::service::Service, CliError> {
    let service = manager(ServiceManagerAccess::CONNECT)?.open_service(NAME, access);
    service.map_err(|e| told("cannot open the service; is it installed?", &e))
}

/// The command line that the manager starts.
fn launch_arguments(args: &ServeArgs, discovery: PathBuf) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec!["service".into(), "run".into(), "--discovery".into(), discovery.into()];
    all.extend(["--root".into(), args.root.clone().into()]);
    all.extend([
        "--pipe".into(),
        args.pipe.clone(),
        "--pipe-security".into(),
        args.pipe_security.clone().into(),
    ]);
    all.extend(["--pipe-write-timeout".into(), args.pipe_write_timeout.to_string().into()]);
    if let Some(config) = &args.config {
        all.extend(["--config".into(), config.clone().into()]);
    }
    for option in &args.storage_opt {
        all.extend(["--storage-opt".into(), option.into()]);
    }
    all
}

fn install(args: &ServeArgs) -> Result<(), CliError> {
    // A wrong option is reported now, not in a log at the next start.
    Options::load(args.config.as_deref(), &args.storage_opt)?;
    let info = ServiceInfo {
        name: NAME.into(),
        display_name: "LCOW layer storage (Docker graphdriver plugin)".into(),
        service_type: ServiceType::OWN_PROCESS,
        start_type: ServiceStartType::AutoStart,
        error_control: ServiceErrorControl::Normal,
        executable_path: std::env::current_exe()?,
        launch_arguments: launch_arguments(args, discovery_path()?),
        dependencies: Vec::new(),
        // LocalSystem: attaching disks to virtual machines needs it.
        account_name: None,
        account_password: None,
    };
    let manager = manager(ServiceManagerAccess::CONNECT | ServiceManagerAccess::CREATE_SERVICE)?;
    let service = manager.create_service(&info, ServiceAccess::CHANGE_CONFIG | ServiceAccess::QUERY_STATUS);
    let service = service.map_err(|e| told("cannot install the service", &e))?;
    let text = "Keeps every image layer as one ext4 file system in a VHD and answers Docker on a named pipe.";
    if let Err(e) = service.set_description(text) {
        eprintln!("lcow-graphdriver: cannot set the service's description: {e}");
    }
    println!("installed the service {NAME}; start it with: lcow-graphdriver service start");
    Ok(())
}

/// Waits until the service is in a state; one that ends instead is an error.
fn wait_for(service: &windows_service::service::Service, wanted: ServiceState) -> Result<(), CliError> {
    let begin = Instant::now();
    loop {
        let status = service.query_status().map_err(|e| told("cannot query the service", &e))?;
        if status.current_state == wanted {
            return Ok(());
        }
        if status.current_state == ServiceState::Stopped {
            let reason = format!("the service stopped ({:?}); see its log: <root>\\{LOG}", status.exit_code);
            return Err(reason.into());
        }
        if begin.elapsed() > PATIENCE {
            return Err(
                format!("the service is {:?} after {} s", status.current_state, PATIENCE.as_secs()).into()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn start() -> Result<(), CliError> {
    let service = opened(ServiceAccess::START | ServiceAccess::QUERY_STATUS)?;
    service.start::<&str>(&[]).map_err(|e| told("cannot start the service", &e))?;
    wait_for(&service, ServiceState::Running)?;
    println!("{NAME} is running");
    Ok(())
}

fn stop() -> Result<(), CliError> {
    let service = opened(ServiceAccess::STOP | ServiceAccess::QUERY_STATUS)?;
    let state = service.query_status().map_err(|e| told("cannot query the service", &e))?.current_state;
    if state != ServiceState::Stopped {
        service.stop().map_err(|e| told("cannot stop the service", &e))?;
        wait_for(&service, ServiceState::Stopped)?;
    }
    println!("{NAME} is stopped");
    Ok(())
}

fn uninstall() -> Result<(), CliError> {
    stop()?;
    let service = opened(ServiceAccess::DELETE)?;
    service.delete().map_err(|e| told("cannot uninstall the service", &e))?;
    // A service that was killed could not remove it itself.
    remove_discovery(&discovery_path()?)?;
    println!("uninstalled {NAME}; layers and logs are kept");
    Ok(())
}

fn status() -> Result<String, CliError> {
    let service = opened(ServiceAccess::QUERY_STATUS)?;
    let status = service.query_status().map_err(|e| told("cannot query the service", &e))?;
    Ok(format!("{NAME}: {:?}", status.current_state))
}

fn discovery_path() -> Result<PathBuf, CliError> {
    let data = std::env::var_os("ProgramData").ok_or("the environment variable ProgramData is not set")?;
    Ok(PathBuf::from(data).join(PLUGINS).join(SPEC))
}

/// The pipe as Docker's discovery expects it: `npipe:////./pipe/lcow`.
fn discovery_text(pipe: &str) -> String {
    format!("npipe://{}", pipe.replace('\\', "/"))
}

fn write_discovery(path: &Path, pipe: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, discovery_text(pipe))
}

fn remove_discovery(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The arguments of `service run`, for the thread that the manager starts.
static ARGUMENTS: OnceLock<Mutex<Option<(ServeArgs, PathBuf)>>> = OnceLock::new();

define_windows_service!(ffi_service_main, service_main);

fn service_main(_: Vec<OsString>) {
    let given = ARGUMENTS.get().and_then(|a| a.lock().unwrap_or_else(PoisonError::into_inner).take());
    let Some((args, discovery)) = given else { return };
    let log = args.root.join(LOG);
    let logging = fs::create_dir_all(&args.root).and_then(|()| telemetry::log_to_file(args.log_format, &log));
    let (stop, stopped) = oneshot::channel();
    let stop = Mutex::new(Some(stop));
    let handler = move |event| match event {
        ServiceControl::Stop | ServiceControl::Shutdown => {
            if let Some(stop) = stop.lock().unwrap_or_else(PoisonError::into_inner).take() {
                // The receiver is gone if the service is ending already.
                let _ = stop.send(());
            }
            ServiceControlHandlerResult::NoError
        }
        ServiceControl::Interrogate => ServiceControlHandlerResult::NoError,
        _ => ServiceControlHandlerResult::NotImplemented,
    };
    let Ok(handle) = service_control_handler::register(NAME, handler) else { return };
    tell(handle, ServiceState::StartPending, 0);
    let served =
        logging.map_err(CliError::from).and_then(|()| serve_as_service(&args, &discovery, handle, stopped));
    let code = match served {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "the service failed");
            1
        }
    };
    tell(handle, ServiceState::Stopped, code);
}

fn serve_as_service(
    args: &ServeArgs,
    discovery: &Path,
    handle: ServiceStatusHandle,
    stopped: oneshot::Receiver<()>,
) -> Result<(), CliError> {
    let options = Options::load(args.config.as_deref(), &args.storage_opt)?;
    let pipe = args.pipe.to_string_lossy().into_owned();
    let ready = || {
        if let Err(error) = write_discovery(discovery, &pipe) {
            tracing::error!(path = %discovery.display(), %error, "cannot write the discovery file; Docker will not find the plugin");
        }
        tell(handle, ServiceState::Running, 0);
    };
    let stop = async move {
        // An error means that the handler is gone, so no request to stop can arrive.
        let _ = stopped.await;
        tracing::info!("stopping after running requests have finished");
        tell(handle, ServiceState::StopPending, 0);
    };
    let served = runtime()?.block_on(serve::windows::serve(args, options, ready, stop));
    if let Err(error) = remove_discovery(discovery) {
        tracing::warn!(path = %discovery.display(), %error, "cannot remove the discovery file");
    }
    served
}

fn tell(handle: ServiceStatusHandle, state: ServiceState, code: u32) {
    let accepted = match state {
        ServiceState::Running => ServiceControlAccept::STOP | ServiceControlAccept::SHUTDOWN,
        _ => ServiceControlAccept::empty(),
    };
    let pending = matches!(state, ServiceState::StartPending | ServiceState::StopPending);
    let status = ServiceStatus {
        service_type: ServiceType::OWN_PROCESS,
        current_state: state,
        controls_accepted: accepted,
        exit_code: if code == 0 { ServiceExitCode::NO_ERROR } else { ServiceExitCode::ServiceSpecific(code) },
        checkpoint: u32::from(pending),
        wait_hint: if pending { STEP } else { Duration::ZERO },
        process_id: None,
    };
    if let Err(error) = handle.set_service_status(status) {
        tracing::warn!(%error, "cannot report to the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_discovery_file_names_the_pipe_as_docker_reads_it_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker").join("plugins").join(SPEC);
        write_discovery(&path, r"\\.\pipe\lcow").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "npipe:////./pipe/lcow");
        remove_discovery(&path).unwrap();
        remove_discovery(&path).unwrap();
        assert!(!path.exists());
    }

    /// This project has no PowerShell to run it, so its text is checked instead.
    const SCRIPT: &str = include_str!("../../scripts/install.ps1");

    /// The single-quoted strings of a line.
    fn quoted(line: &str) -> impl Iterator<Item = &str> {
        line.split('\'').skip(1).step_by(2)
    }

    #[test]
    fn the_script_names_commands_options_and_places_as_the_program_has_them() {
        use crate::cli::{Cli, DEFAULT_PIPE, DEFAULT_ROOT};
        use clap::CommandFactory;
        let program = Cli::command();
        let service = program.find_subcommand("service").unwrap();
        let install = service.find_subcommand("install").unwrap();
        let (mut verbs, mut options) = (Vec::new(), Vec::new());
        for line in SCRIPT.lines().filter(|line| line.contains("@('")) {
            let words: Vec<&str> =
                quoted(line.split_once("@('").map_or("", |(_, rest)| &line[line.len() - rest.len() - 1..]))
                    .collect();
            if let Some(["service", verb]) = words.get(..2) {
                assert!(service.find_subcommand(verb).is_some(), "{line}");
                verbs.push(*verb);
            }
            options.extend(words.into_iter().filter(|word| word.starts_with("--")));
        }
        assert_eq!(verbs, ["uninstall", "uninstall", "install", "start"]);
        assert_eq!(options, ["--root", "--pipe", "--config", "--storage-opt"]);
        for option in options {
            assert!(install.get_arguments().any(|a| a.get_long() == Some(&option[2..])), "{option}");
        }
        let (data, folder) = DEFAULT_ROOT.rsplit_once('\\').unwrap();
        assert_eq!(data, r"C:\ProgramData");
        for expected in [
            format!("$Name = '{NAME}'\n"),
            format!("[string]$Pipe = '{DEFAULT_PIPE}',\n"),
            format!("[string]$Root = (Join-Path $env:ProgramData '{folder}'),\n"),
            format!("'{}.exe'", program.get_name()),
            format!(r"%ProgramData%\{PLUGINS}\{SPEC}"),
            format!("({LOG})"),
        ] {
            assert!(SCRIPT.replace('\r', "").contains(&expected), "not in the script: {expected}");
        }
        let shown = SCRIPT.split("lcow.").skip(1).filter_map(|rest| rest.split_once('='));
        let shown: Vec<String> =
            shown.map(|(name, _)| format!("lcow.{name}")).filter(|n| !n.contains(' ')).collect();
        assert!(!shown.is_empty());
        for name in shown {
            assert!(crate::config::SPECS.iter().any(|spec| spec.name == name), "{name}");
        }
    }

    #[test]
    fn the_script_has_help_for_each_parameter_and_does_nothing_under_what_if() {
        let documented: Vec<&str> =
            SCRIPT.lines().filter_map(|line| line.strip_prefix(".PARAMETER ")).map(str::trim).collect();
        let parameters = SCRIPT.split_once("\nparam(").unwrap().1.split_once("\n)").unwrap().0;
        let taken: Vec<&str> =
            parameters.lines().filter_map(|line| line.split_once('$')?.1.split([',', ' ']).next()).collect();
        assert_eq!(documented, taken);
        assert_eq!(taken.len(), 7);
        for part in [".SYNOPSIS", ".DESCRIPTION", ".EXAMPLE", "SupportsShouldProcess = $true", "-WhatIf"] {
            assert!(SCRIPT.contains(part), "{part}");
        }
        // Every command that changes something is inside an `if` that asks first.
        let (depth, mut asked, mut changes) =
            (|line: &str| line.len() - line.trim_start().len(), Vec::new(), 0);
        let code = SCRIPT.split_once("$service = Get-Service").unwrap().1;
        for line in code.lines().filter(|line| !line.trim().is_empty()) {
            asked.retain(|d| *d < depth(line));
            if ["Invoke-Program ", "New-Item ", "Copy-Item ", "Remove-Item "].iter().any(|c| line.contains(c))
            {
                assert!(!asked.is_empty(), "not asked for: {line}");
                changes += 1;
            }
            if line.contains("$PSCmdlet.ShouldProcess(") {
                asked.push(depth(line));
            }
        }
        assert_eq!(changes, 7);
    }
}
