//! `config`: shows and checks the options that `serve` would use, and prints a commented configuration file.
//!
//! ```text
//!   file ─► environment ─► command line ─► Init's options, as the store recorded them ─► table, JSON, or problems
//! ```
//!
//! Nothing is written, and the service need not run. `check` ends with status 1 if there is a problem. Called by `cli`.

use super::{Cli, CliError, HomeArgs};
use crate::{
    config::{self, ENV_PREFIX, Effective, Inputs, SPECS, env_name},
    driver::Driver,
    store::Marker,
};
use clap::{Args, CommandFactory, Subcommand};
use comfy_table::{Table, presets};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// The configuration file that the Debian package's service names.
#[cfg(unix)]
const PACKAGED_FILE: Option<&str> = Some("/etc/lcow/config.toml");
/// A Windows service reads only the file that was named at its installation.
#[cfg(windows)]
const PACKAGED_FILE: Option<&str> = None;

/// The commands of `config`.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Checks all sources of options; exits with 1 if an option is unknown or a value is not accepted.
    Check(SourceArgs),
    /// Shows the value of every option, and the source that set it.
    Dump(DumpArgs),
    /// Prints a configuration file with every option, commented out at its default.
    Template,
}

/// The sources of options, as for `serve`.
#[derive(Debug, Args)]
pub(super) struct SourceArgs {
    /// The TOML file with options; by default the Debian package's /etc/lcow/config.toml, if it exists.
    #[arg(long, env = "LCOW_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets an option, as for `serve`; can be repeated.
    #[arg(long = "storage-opt", value_name = "NAME=VALUE")]
    storage_opt: Vec<String>,
    #[command(flatten)]
    home: HomeArgs,
}

/// Arguments of `config dump`.
#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    #[command(flatten)]
    sources: SourceArgs,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// The output of `config dump --json`.
#[derive(Debug, Serialize)]
struct Dump<'a> {
    /// The configuration file that was read.
    file: Option<&'a Path>,
    options: Vec<Row<'a>>,
}

/// One option.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'static str,
    value: String,
    default: &'static str,
    /// `default`, `file`, `environment`, `command-line` or `engine`.
    source: &'static str,
    /// The file and line, or the variable.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<String>,
    /// The option's environment variable.
    variable: &'a str,
}

/// The sources' contents.
struct Reading {
    file: Option<PathBuf>,
    effective: Effective,
    /// Variables with this program's prefix that nothing reads.
    unknown_variables: Vec<String>,
}

pub(super) fn run(command: ConfigCommand) -> Result<ExitCode, CliError> {
    match command {
        ConfigCommand::Check(args) => check(&args),
        ConfigCommand::Dump(args) => dump(&args),
        ConfigCommand::Template => print(&config::template()),
    }
}

fn check(args: &SourceArgs) -> Result<ExitCode, CliError> {
    let reading = read(args)?;
    if report(&reading) {
        return Ok(ExitCode::FAILURE);
    }
    let file = reading.file.as_ref().map_or("none".into(), |file| file.display().to_string());
    let changed = reading.effective.places.iter().filter(|place| **place != config::Place::Default).count();
    print(&format!("no problems: {changed} of {} options set; configuration file: {file}\n", SPECS.len()))
}

fn dump(args: &DumpArgs) -> Result<ExitCode, CliError> {
    let reading = read(&args.sources)?;
    if report(&reading) {
        return Ok(ExitCode::FAILURE);
    }
    let entries = reading.effective.entries();
    if args.json {
        let variables: Vec<String> = SPECS.iter().map(|spec| env_name(spec.name)).collect();
        let rows = entries.zip(SPECS).zip(&variables).map(|(((name, value, place), spec), variable)| Row {
            name,
            value,
            default: spec.default,
            source: place.source(),
            place: match place {
                config::Place::File { .. } => Some(place.to_string()),
                config::Place::Environment { variable } => Some(variable.clone()),
                _ => None,
            },
            variable,
        });
        let dump = Dump { file: reading.file.as_deref(), options: rows.collect() };
        print(&format!("{}\n", serde_json::to_string_pretty(&dump)?))
    } else {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(["OPTION", "VALUE", "SOURCE"]);
        for (name, value, place) in entries {
            table.add_row([name, &value, &place.to_string()]);
        }
        print(&format!("{table}\n"))
    }
}

/// Writes to standard output; a reader that has closed it gets the exit status of a shell's closed pipe.
fn print(text: &str) -> Result<ExitCode, CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::from(super::layer::CLOSED_PIPE)),
        Err(e) => Err(e.into()),
    }
}

fn read(args: &SourceArgs) -> Result<Reading, CliError> {
    let file = match &args.config {
        Some(file) => Some(file.clone()),
        None => PACKAGED_FILE.map(PathBuf::from).filter(|file| file.exists()),
    };
    let engine = match engine_options(&args.home) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("lcow-graphdriver: note: options sent by the engine are unknown: {error}");
            Vec::new()
        }
    };
    let environment = environment();
    let unknown_variables = unknown_variables(&environment);
    let inputs =
        Inputs { file: file.as_deref(), environment, command_line: &args.storage_opt, engine: &engine };
    Ok(Reading { effective: Effective::read(&inputs)?, file, unknown_variables })
}

/// The options of the last Init, which the store keeps; none if there has been no Init.
fn engine_options(args: &HomeArgs) -> Result<Vec<String>, CliError> {
    let home = match &args.home {
        Some(home) => home.clone(),
        None => Driver::last_home(&args.root)?.unwrap_or_else(|| args.root.clone()),
    };
    Ok(Marker::read(&home)?.map(|marker| marker.init.opts).unwrap_or_default())
}

fn environment() -> Vec<(String, String)> {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

/// Variables with this program's prefix that neither an option nor an argument of any command reads. They have no
/// effect, so they are reported and are no failure.
fn unknown_variables(environment: &[(String, String)]) -> Vec<String> {
    fn collect(command: &clap::Command, known: &mut BTreeSet<String>) {
        let variables = command.get_arguments().filter_map(clap::Arg::get_env);
        known.extend(variables.map(|name| name.to_string_lossy().to_ascii_uppercase()));
        command.get_subcommands().for_each(|below| collect(below, known));
    }
    let mut known: BTreeSet<String> = SPECS.iter().map(|spec| env_name(spec.name)).collect();
    collect(&Cli::command(), &mut known);
    let names = environment.iter().map(|(name, _)| name);
    let ours = names.filter(|name| name.to_ascii_uppercase().starts_with(ENV_PREFIX));
    ours.filter(|name| !known.contains(&name.to_ascii_uppercase())).cloned().collect()
}

/// Prints what is wrong on standard error; whether there was a problem.
fn report(reading: &Reading) -> bool {
    for name in &reading.unknown_variables {
        eprintln!(
            "lcow-graphdriver: note: environment variable {name} has no effect: there is no such option"
        );
    }
    for problem in &reading.effective.problems {
        eprintln!("lcow-graphdriver: {problem}");
    }
    !reading.effective.problems.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_variable_is_noticed_and_those_of_commands_are_not() {
        let names = ["LCOW_ROOT", "LCOW_CONFIG", "LCOW_POOL_MAX", "lcow_svm", "PATH", "LCOW_POOLMAX"];
        let environment: Vec<_> = names.map(|name| (name.to_owned(), "1".to_owned())).into();
        assert_eq!(unknown_variables(&environment), ["LCOW_POOLMAX"]);
    }
}
