//! Where each option's value comes from: the built-in default, the file, the environment, the command line or the engine.
//!
//! ```text
//!   file ─► environment ─► command line ─► engine (Init)     a later one replaces the value and its place
//!                              │
//!                              ▼
//!                Effective { options, places, problems }
//! ```
//!
//! A problem does not end the reading, so that `config check` reports all of them at once; `Options::load` stops at the
//! first. Called by `Options::load` and `cli::config`.

use super::{ConfigError, Options, SPECS, env_name};
use std::{
    fmt,
    path::{Path, PathBuf},
};
use toml_edit::{ImDocument, Item, TableLike, Value};

/// The sources to read, strongest last.
#[derive(Debug, Default)]
pub struct Inputs<'a> {
    /// The configuration file.
    pub file: Option<&'a Path>,
    /// Names and values of environment variables; those of other programs are passed over.
    pub environment: Vec<(String, String)>,
    /// `name=value` texts of `--storage-opt`.
    pub command_line: &'a [String],
    /// `name=value` texts of the engine's Init.
    pub engine: &'a [String],
}

/// The place that a value, or a problem, comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The built-in default.
    Default,
    /// A line of the configuration file, counted from 1.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// An environment variable.
    Environment {
        /// Its name.
        variable: String,
    },
    /// `--storage-opt` of this program.
    CommandLine,
    /// `--storage-opt` of dockerd, as sent in Init.
    Engine,
}

impl Place {
    /// Name of the source, for programs.
    pub fn source(&self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::File { .. } => "file",
            Self::Environment { .. } => "environment",
            Self::CommandLine => "command-line",
            Self::Engine => "engine",
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment { variable } => write!(f, "environment variable {variable}"),
            Self::CommandLine => f.write_str("command line"),
            Self::Engine => f.write_str("engine (last Init)"),
        }
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {error}")]
pub struct Problem {
    /// Where it was found.
    pub place: Place,
    /// What is wrong.
    pub error: ConfigError,
}

/// The options in force, with the place of each.
#[derive(Debug)]
pub struct Effective {
    /// The values; where there is a problem, the value of a weaker source.
    pub options: Options,
    /// The place of each option's value, in the order of [`SPECS`].
    pub places: Vec<Place>,
    /// Everything that is wrong, weakest source first.
    pub problems: Vec<Problem>,
}

impl Effective {
    /// Reads all sources.
    ///
    /// # Errors
    /// A configuration file that is named and cannot be read. Everything else is a [`Problem`].
    pub fn read(inputs: &Inputs<'_>) -> Result<Self, ConfigError> {
        let mut effective = Self {
            options: Options::default(),
            places: vec![Place::Default; SPECS.len()],
            problems: Vec::new(),
        };
        if let Some(path) = inputs.file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
            effective.take_file(path, &text);
        }
        for (variable, value) in &inputs.environment {
            let spec = SPECS.iter().find(|s| env_name(s.name).eq_ignore_ascii_case(variable));
            // An empty value counts as unset: `docker plugin set` cannot unset a variable.
            if let Some(spec) = spec
                && !value.trim().is_empty()
            {
                effective.set(spec.name, value, Place::Environment { variable: variable.clone() });
            }
        }
        effective.take_pairs(inputs.command_line, &Place::CommandLine);
        effective.take_pairs(inputs.engine, &Place::Engine);
        Ok(effective)
    }

    /// Name, value and place of every option.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, String, &Place)> {
        self.options.entries().zip(&self.places).map(|((name, value), place)| (name, value, place))
    }

    fn take_file(&mut self, path: &Path, text: &str) {
        let place = |at: usize| Place::File { path: path.to_owned(), line: line_of(text, at) };
        let document = match ImDocument::parse(text) {
            Ok(document) => document,
            Err(error) => {
                let place = place(error.span().map_or(0, |span| span.start));
                // The parser's messages have several lines; the place is named already.
                let reason = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
                self.problems.push(Problem { place, error: ConfigError::File { reason } });
                return;
            }
        };
        let mut found = Vec::new();
        flatten("", document.as_table(), &mut found);
        for (name, value, at) in found {
            self.set(&name, &value, place(at));
        }
    }

    fn take_pairs(&mut self, pairs: &[String], place: &Place) {
        for pair in pairs {
            if let Some((name, value)) = pair.split_once('=') {
                self.set(name.trim(), value, place.clone());
            } else {
                let error = ConfigError::NoValue { option: pair.clone() };
                self.problems.push(Problem { place: place.clone(), error });
            }
        }
    }

    fn set(&mut self, name: &str, value: &str, place: Place) {
        match self.options.set(name, value) {
            Ok(()) => {
                let at = SPECS.iter().position(|s| s.name.eq_ignore_ascii_case(name));
                self.places[at.expect("an option that was set has a specification")] = place;
            }
            Err(error) => self.problems.push(Problem { place, error }),
        }
    }
}

/// The environment of this process; bytes that are not UTF-8 are replaced.
pub(super) fn environment() -> Vec<(String, String)> {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

/// The number of the line that holds a byte, counted from 1.
fn line_of(text: &str, at: usize) -> usize {
    1 + text.get(..at).unwrap_or(text).matches('\n').count()
}

/// Full name, value and position of every key in a table and in the tables below it.
fn flatten(prefix: &str, table: &dyn TableLike, found: &mut Vec<(String, String, usize)>) {
    for (key, item) in table.iter() {
        let name = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
        if let Some(table) = item.as_table_like() {
            flatten(&name, table, found);
            continue;
        }
        let text = match item {
            Item::Value(Value::String(text)) => text.value().clone(),
            Item::Value(Value::Integer(n)) => n.value().to_string(),
            Item::Value(Value::Float(n)) => n.value().to_string(),
            Item::Value(Value::Boolean(b)) => b.value().to_string(),
            other => other.to_string().trim().to_owned(),
        };
        let span = table.key(key).and_then(toml_edit::Key::span).or_else(|| item.span());
        found.push((name, text, span.map_or(0, |span| span.start)));
    }
}
