//! Output of all commands: text, JSON and tables on standard output, progress on standard error.
//!
//! Nothing here panics when standard output is a closed pipe, as `print!` and `println!` do. Used by `store`, `import`,
//! `svm`, `layer` and `registry`.

use super::CliError;
use comfy_table::{Table, presets};
use serde::Serialize;
use std::io::{self, Write};
#[cfg(any(target_os = "linux", feature = "registry"))]
use {
    indicatif::{ProgressBar, ProgressStyle},
    std::io::IsTerminal,
};

/// Prints text to standard output.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())?;
    Ok(())
}

/// Prints indented JSON and a line end to standard output.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// An empty table without borders.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header.to_vec());
    table
}

/// A progress bar of `length` bytes with room for a message; `None` unless standard error is a terminal.
#[cfg(any(target_os = "linux", feature = "registry"))]
pub(super) fn bar(length: u64) -> Option<ProgressBar> {
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}").ok()?;
    io::stderr().is_terminal().then(|| ProgressBar::new(length).with_style(style))
}
