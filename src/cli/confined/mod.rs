//! Commands that look at hostile files do so in a jailed process of their own.
//!
//! ```text
//!   command ─ parses its arguments ─► Grants: which files these arguments name
//!      │ starts itself again: `confined ARGUMENTS`        standard output and error are the command's own
//!      ▼
//!   parent: opens what is granted ◄── Request over a message socket ── child: jail, then the same command
//!                                 ── Reply, descriptor ──►                    parses, inflates, prints
//! ```
//!
//! The child has no path, no network, no other process and no right of its own: it can ask for the files that the command
//! line names, parts of an image in a registry included, which the parent fetches, and for nothing else. What it is given is read-only, but for outputs and scratch files. Where the kernel or a
//! container lacks a part of the jail, the command ends, unless `--jail=best-effort` was given.
//!
//! On Windows, commands work in their own process, with the rights of their user: the restricted job of the embedded
//! service VM hands over handles at the start of a process only, and an image's blobs are known later than that. Called by
//! `image` and by `run`.

#[cfg(target_os = "linux")]
mod child;
mod directory;
#[cfg(target_os = "linux")]
mod message;
#[cfg(target_os = "linux")]
mod parent;

#[cfg(target_os = "linux")]
mod terminal;

#[cfg(target_os = "linux")]
pub(super) use child::{Granted, child, columns, create, files, in_jail, open, place_in_layout, stream};
pub(super) use directory::NewDirectory;
#[cfg(target_os = "linux")]
pub(super) use parent::run;
#[cfg(target_os = "linux")]
pub(super) use terminal::Blind;

use super::registry::{self, RegistryArgs};
use clap::Args;
use oci_image::{Direct, Files, Source};
use std::{path::PathBuf, sync::Arc};
#[cfg(not(target_os = "linux"))]
use {
    super::CliError,
    std::{ffi::OsString, process::ExitCode},
};

/// How strict the jail is.
#[cfg(target_os = "linux")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Strictness {
    /// The command ends if a part of the jail cannot be set up.
    Strict,
    /// The command warns and continues with the parts that can.
    BestEffort,
}

/// The option for the jail.
#[derive(Debug, Args)]
pub(super) struct JailArgs {
    /// What to do if the kernel or a container lacks a part of the jail in which the input is read.
    #[cfg(target_os = "linux")]
    #[arg(long, value_enum, value_name = "MODE", default_value = "strict")]
    jail: Strictness,
}

/// What sources may use besides their own files.
#[derive(Debug, Clone, Default)]
pub(super) struct Means {
    /// Directory for scratch files.
    pub(super) scratch: Option<PathBuf>,
    /// How registries are read.
    pub(super) registry: RegistryArgs,
    /// Bytes of a blob that is fetched.
    pub(super) blob_bytes: u64,
}

/// The files that a command line names.
#[derive(Debug, Default)]
pub(super) struct Grants {
    /// Sources, in the order of the command line.
    pub(super) sources: Vec<Source>,
    /// What they may use.
    pub(super) means: Means,
    /// Files that are read; `-` is standard input.
    pub(super) inputs: Vec<PathBuf>,
    /// Files that are written.
    pub(super) files: Vec<PathBuf>,
    /// The place among the sources of a layout that is written.
    pub(super) layout: Option<usize>,
    /// A directory that is made.
    pub(super) directory: Option<PathBuf>,
}

/// Does the work of a command in this process: there is no jail on this system.
#[cfg(not(target_os = "linux"))]
pub(super) fn run(
    _: &Grants,
    _: &JailArgs,
    _: &[OsString],
    work: impl FnOnce() -> Result<ExitCode, CliError>,
) -> Result<ExitCode, CliError> {
    work()
}

/// A file that this process may not open itself: none.
#[cfg(not(target_os = "linux"))]
pub(super) fn open(_: &std::path::Path) -> Option<std::io::Result<std::fs::File>> {
    None
}

/// The files of a source.
#[cfg(not(target_os = "linux"))]
pub(super) fn files(_: usize, source: &Source, means: &Means) -> Arc<dyn Files> {
    direct(source, means)
}

/// The files of a source, opened and fetched by this process.
fn direct(source: &Source, means: &Means) -> Arc<dyn Files> {
    let scratch = means.scratch.as_deref();
    match source {
        Source::Registry(name) => registry::files(name, &means.registry, scratch, means.blob_bytes),
        _ => Arc::new(Direct::new(source.place(), scratch)),
    }
}
