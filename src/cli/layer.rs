//! `layer`: one layer on files (stub until the codec is merged).
use super::CliError;
use clap::Subcommand;
use std::process::ExitCode;
#[derive(Debug, Subcommand)]
pub(super) enum LayerCommand {}
pub(super) fn run(command: LayerCommand) -> Result<ExitCode, CliError> {
    match command {}
}
