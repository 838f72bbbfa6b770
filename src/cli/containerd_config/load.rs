//! A configuration of containerd as containerd itself sees it: the main file and what it imports, merged.
//!
//! ```text
//!   config.toml ── imports = ["conf.d/*.toml"] ─► files, in the order of their names ─► imports of those …
//!        └─────────────── merged ◄──────────────────────┘
//!   `containerd config dump`, on standard input: merged already, so its imports are not read again
//! ```
//!
//! A later file wins. Lists are replaced; a proxy is replaced whole; a plugin's section is merged key by key from 2.0
//! on, and replaced whole by 1.7. Called by `mod` for `--check`.

use super::{
    face::{Engine, Format},
    text::{MERGES_SECTIONS, PLUGINS, PROXIES},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    path::{Path, PathBuf},
};
use toml_edit::{DocumentMut, Item, Table};

/// A file without `version` is read as this one.
const UNVERSIONED: i64 = 1;

/// A file that cannot be read as a configuration.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not TOML: {reason}", path.display())]
    Syntax { path: PathBuf, reason: String },
}

/// What the files say together.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) root: Table,
    /// Every file that was read, the main one first, with its `version`.
    pub(super) files: Vec<(PathBuf, i64)>,
    /// Proxies that several files define: only the last definition counts.
    pub(super) twice: Vec<(String, Vec<PathBuf>)>,
}

impl Loaded {
    /// The `version` of the main file.
    pub(super) fn version(&self) -> i64 {
        self.files.first().map_or(UNVERSIONED, |(_, version)| *version)
    }

    /// The format of the main file; `None` if no supported engine reads it.
    pub(super) fn format(&self) -> Option<Format> {
        Format::from_number(self.version())
    }
}

/// Reads a configuration that is complete in one text.
///
/// # Errors
/// `text` is not TOML.
pub(super) fn merged_text(path: &Path, text: &str) -> Result<Loaded, LoadError> {
    let root = parse(path, text)?;
    let files = vec![(path.to_owned(), version(&root))];
    Ok(Loaded { root, files, twice: Vec::new() })
}

/// Reads a file and, recursively, the files that it imports.
///
/// # Errors
/// A file cannot be read, or is not TOML. A pattern that fits no file is not an error.
pub(super) fn with_imports(main: &Path, engine: Option<Engine>) -> Result<Loaded, LoadError> {
    let mut loaded = Loaded::default();
    let mut pending = VecDeque::from([main.to_owned()]);
    let mut seen = BTreeSet::new();
    let mut proxies = BTreeMap::<String, Vec<PathBuf>>::new();
    while let Some(path) = pending.pop_front() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let text = std::fs::read_to_string(&path)
            .map_err(|source| LoadError::Read { path: path.clone(), source })?;
        let root = parse(&path, &text)?;
        loaded.files.push((path.clone(), version(&root)));
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        for pattern in root.get("imports").and_then(Item::as_array).into_iter().flatten() {
            if let Some(pattern) = pattern.as_str() {
                pending.extend(matching(&folder.join(pattern))?);
            }
        }
        for (name, _) in root.get(PROXIES).and_then(Item::as_table_like).into_iter().flat_map(|t| t.iter()) {
            proxies.entry(name.to_owned()).or_default().push(path.clone());
        }
        // What an engine that is not known does is what the format's newest engine does.
        let whole = match engine {
            Some(engine) => engine < MERGES_SECTIONS,
            None => loaded.format() == Some(Format::V2),
        };
        merge(&mut loaded.root, &root, &mut Vec::new(), whole);
    }
    loaded.twice = proxies.into_iter().filter(|(_, files)| files.len() > 1).collect();
    Ok(loaded)
}

fn parse(path: &Path, text: &str) -> Result<Table, LoadError> {
    let document = text.parse::<DocumentMut>().map_err(|error| LoadError::Syntax {
        path: path.to_owned(),
        // The parser's messages have several lines.
        reason: error.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
    })?;
    Ok(document.into_table())
}

fn version(root: &Table) -> i64 {
    root.get("version").and_then(Item::as_integer).unwrap_or(UNVERSIONED)
}

/// The files that fit a path whose last component may have `*` and `?`, in the order of their names.
fn matching(pattern: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let name = pattern.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if !name.contains(['*', '?']) {
        return Ok(vec![pattern.to_owned()]);
    }
    let folder = pattern.parent().unwrap_or_else(|| Path::new("."));
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(LoadError::Read { path: folder.to_owned(), source }),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| LoadError::Read { path: folder.to_owned(), source })?;
        if fits(name.as_bytes(), entry.file_name().to_string_lossy().as_bytes()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a name fits a pattern with `*` and `?`.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => fits(rest, name) || (!name.is_empty() && fits(pattern, &name[1..])),
        ([b'?', pattern @ ..], [_, name @ ..]) => fits(pattern, name),
        ([p, pattern @ ..], [n, name @ ..]) => p == n && fits(pattern, name),
        _ => false,
    }
}

/// `path` holds the keys above `to`. Sections of `plugins` are replaced if `whole`.
fn merge(to: &mut Table, from: &Table, path: &mut Vec<String>, whole: bool) {
    for (key, item) in from {
        let parent = path.first().map(String::as_str);
        let replaced = path.len() == 1 && (parent == Some(PROXIES) || (whole && parent == Some(PLUGINS)));
        let table = |item: &Item| item.as_table_like().is_some();
        match to.get_mut(key) {
            Some(there) if !replaced && table(there) && table(item) => {
                let mut below = there.clone().into_table().unwrap_or_default();
                path.push(key.to_owned());
                merge(&mut below, &item.clone().into_table().unwrap_or_default(), path, whole);
                path.pop();
                *there = Item::Table(below);
            }
            _ => {
                to.insert(key, item.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_in_a_shell() {
        for (pattern, name, fit) in [
            ("*.toml", "lcow.toml", true),
            ("*.toml", "lcow.toml.bak", false),
            ("??-*.toml", "10-lcow.toml", true),
            ("*", "", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "aXc", false),
        ] {
            assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), fit, "{pattern} {name}");
        }
    }

    #[test]
    fn imports_are_merged_as_each_engine_does_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("conf.d")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write(
            "config.toml",
            "version = 2\nimports = [\"conf.d/*.toml\"]\n[plugins.cri]\nkept = 1\nlist = [1]\n\
             [proxy_plugins.a]\ntype = \"snapshot\"\naddress = \"/x\"\n",
        );
        write(
            "conf.d/10.toml",
            "version = 2\n[plugins.cri]\nlist = [2]\n[proxy_plugins.a]\naddress = \"/y\"\n",
        );
        let main = folder.path().join("config.toml");
        for (engine, kept) in [("1.7", false), ("2.1", true)] {
            let loaded = with_imports(&main, Some(engine.parse().unwrap())).unwrap();
            let cri = loaded.root[PLUGINS]["cri"].as_table_like().unwrap();
            assert_eq!(cri.contains_key("kept"), kept, "{engine}");
            assert_eq!(cri.get("list").unwrap().to_string().trim(), "[2]");
            assert!(loaded.root[PROXIES]["a"].get("type").is_none(), "a proxy is replaced whole");
            assert_eq!(loaded.twice.len(), 1);
            assert_eq!(loaded.files.len(), 2);
        }
    }

    #[test]
    fn a_missing_file_and_a_mistake_are_errors_with_their_path() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("c.toml");
        assert!(with_imports(&file, None).unwrap_err().to_string().contains("c.toml"));
        std::fs::write(&file, "version = \n").unwrap();
        assert!(matches!(with_imports(&file, None), Err(LoadError::Syntax { .. })));
    }
}
