//! `svm`: the state and console output of a running plugin's service VMs, and a benchmark of each kind.
//!
//! ```text
//!   ls, console   GET /svm on the plugin's socket ─► table, last lines
//!   bench         a pool of its own for each backend ─► first lease, lease, apply, exact diff of one tar
//! ```
//!
//! `bench` needs no plugin and leaves nothing behind but QEMU's template, if a directory for it is given.

use super::{
    CliError,
    call::{Endpoint, get},
    output::{print_json, table},
    runtime,
};
use clap::{Args, Subcommand};
use serde::Deserialize;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(super) enum SvmCommand {
    /// Lists the service VMs of a running plugin.
    Ls(LsArgs),
    /// Shows the last lines of console output of a running plugin's service VMs.
    Console(ConsoleArgs),
    /// Benchmarks each kind of service VM that works on this machine, with a tar.
    #[cfg(target_os = "linux")]
    Bench(bench::BenchArgs),
}

/// Arguments of `svm ls`.
#[derive(Debug, Args)]
pub(super) struct LsArgs {
    #[command(flatten)]
    endpoint: Endpoint,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `svm console`.
#[derive(Debug, Args)]
pub(super) struct ConsoleArgs {
    /// Name of one service VM, as shown by `svm ls`; by default, all are shown.
    name: Option<String>,
    #[command(flatten)]
    endpoint: Endpoint,
}

/// A service VM in the reply of `GET /svm`.
#[derive(Debug, Deserialize)]
struct Vm {
    name: String,
    leases: usize,
    machine: String,
    console: String,
}

pub(super) fn run(command: SvmCommand) -> Result<ExitCode, CliError> {
    match command {
        SvmCommand::Ls(args) => runtime()?.block_on(ls(&args)),
        SvmCommand::Console(args) => runtime()?.block_on(console(&args)),
        #[cfg(target_os = "linux")]
        SvmCommand::Bench(args) => runtime()?.block_on(bench::run(&args)),
    }
}

async fn fetch(endpoint: &Endpoint) -> Result<serde_json::Value, CliError> {
    Ok(serde_json::from_slice(&get(endpoint, "/svm").await?)?)
}

async fn ls(args: &LsArgs) -> Result<ExitCode, CliError> {
    let reply = fetch(&args.endpoint).await?;
    if args.json {
        print_json(&reply)?;
        return Ok(ExitCode::SUCCESS);
    }
    let vms: Vec<Vm> = serde_json::from_value(reply)?;
    let mut table = table(&["NAME", "LEASES", "MACHINE"]);
    for vm in &vms {
        table.add_row([&vm.name, &vm.leases.to_string(), &vm.machine]);
    }
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

async fn console(args: &ConsoleArgs) -> Result<ExitCode, CliError> {
    let vms: Vec<Vm> = serde_json::from_value(fetch(&args.endpoint).await?)?;
    let mut found = vms.iter().filter(|vm| args.name.as_ref().is_none_or(|n| *n == vm.name)).peekable();
    if let (Some(name), None) = (&args.name, found.peek()) {
        return Err(
            format!("no service VM named '{name}' is running; `lcow-graphdriver svm ls` lists them").into()
        );
    }
    for vm in found {
        println!("==> {} ({})", vm.name, vm.machine);
        if !vm.console.is_empty() {
            println!("{}", vm.console);
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(target_os = "linux")]
mod bench;
