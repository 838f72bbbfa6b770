//! The commented configuration file: every option with its help, commented out at its default.
//!
//! Removing the `#` before every assignment gives the built-in defaults (tested). Called by `cli::config`; the Debian
//! package installs the result as `/etc/lcow/config.toml`.

use super::{OptionSpec, PREFIX, SPECS, env_name};
use std::fmt::Write as _;

/// Width of comments, in characters.
const WIDTH: usize = 100;

/// The text of a configuration file in which every option is commented out.
pub fn template() -> String {
    let mut text = String::from(
        "# Options of lcow-graphdriver. Each is shown at its default, commented out. This file is the weakest source: the\n\
         # environment, --storage-opt of `serve`, and --storage-opt of dockerd replace what it says.\n\
         # `lcow-graphdriver config check` checks it; `lcow-graphdriver config dump` shows what is in force.\n",
    );
    let mut section = "";
    // The keys of a table follow its header, so options without a table of their own come first.
    let (mut specs, mut below): (Vec<_>, Vec<_>) = SPECS.iter().partition(|spec| table(spec).0 == "lcow");
    below.sort_by_key(|spec| table(spec).0);
    specs.append(&mut below);
    for spec in specs {
        let (header, key) = table(spec);
        if header != section {
            let _ = writeln!(text, "\n[{header}]");
            section = header;
        }
        text.push('\n');
        comment(&mut text, spec.help);
        comment(&mut text, &format!("Accepts {}. Environment: {}.", spec.accepts, env_name(spec.name)));
        let _ = writeln!(text, "#{key} = {}", value(spec.default));
    }
    text
}

/// The table and the key of an option: `lcow.pool.max` is `max` in `lcow.pool`. An option cannot be a table as well, so
/// `lcow.mount.keep` is `"mount.keep"` in `lcow`.
fn table(spec: &OptionSpec) -> (&'static str, String) {
    let (table, key) = spec.name.rsplit_once('.').unwrap_or((PREFIX, spec.name));
    match table.rsplit_once('.') {
        Some((above, name)) if SPECS.iter().any(|other| other.name == table) => {
            (above, format!("\"{name}.{key}\""))
        }
        _ => (table, key.to_owned()),
    }
}

/// A default as TOML. A literal string takes Windows paths as they are.
fn value(default: &str) -> String {
    if default == "true" || default == "false" || default.parse::<u64>().is_ok() {
        default.to_owned()
    } else if default.contains('\\') {
        format!("'{default}'")
    } else {
        format!("\"{default}\"")
    }
}

/// Appends a text as comment lines of at most [`WIDTH`] characters.
fn comment(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}
