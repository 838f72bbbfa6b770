//! What is wrong with a configuration of containerd, for the containerd face.
//!
//! ```text
//!   Loaded (merged files) + Face (what it should be) ─► [ error | note: section: what; remedy ]
//! ```
//!
//! An error is a configuration with which pulls, containers or statistics fail, or with which layers go elsewhere; a
//! note is something that is lost and may be meant so. Pure functions. Called by `mod`.

use super::{
    face::{Face, Format, PARALLEL_UNPACK, System},
    load::Loaded,
    text::{CRI, DIFF_SERVICE, MERGES_SECTIONS, PLUGINS, PROXIES, TRANSFER},
};
use std::fmt;
use toml_edit::{Item, Table, TableLike};

/// Snapshotters that containerd registers itself; a proxy of the same name is refused at its start.
const BUILT_IN_SNAPSHOTTERS: &[&str] = &[
    "blockfile",
    "btrfs",
    "cimfs",
    "devmapper",
    "erofs",
    "native",
    "overlayfs",
    "windows",
    "windows-lcow",
    "zfs",
];
/// Differs that containerd registers itself.
const BUILT_IN_DIFFERS: &[&str] = &["blockcim", "cimfs", "erofs", "walking", "windows", "windows-lcow"];
/// Beginning of a local pipe's name.
const PIPE: &str = r"\\.\pipe\";

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Severity {
    Error,
    Note,
}

/// One thing that is wrong, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) severity: Severity,
    /// The section, or the file.
    place: String,
    text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Note => "note",
        };
        write!(f, "{severity}: {}: {}", self.place, self.text)
    }
}

struct Check<'a> {
    face: &'a Face,
    root: &'a Table,
    found: Vec<Finding>,
}

/// All findings, in the order of the file's parts.
pub(super) fn check(face: &Face, loaded: &Loaded) -> Vec<Finding> {
    let mut check = Check { face, root: &loaded.root, found: Vec::new() };
    check.versions(loaded);
    check.snapshotter();
    check.differ();
    check.differ_order();
    check.unpack_configs();
    check.cri();
    check.found
}

/// The item below a table, key by key.
fn below<'a>(table: &'a dyn TableLike, keys: &[&str]) -> Option<&'a Item> {
    let (first, rest) = keys.split_first()?;
    let item = table.get(first)?;
    if rest.is_empty() { Some(item) } else { below(item.as_table_like()?, rest) }
}

fn strings(item: Option<&Item>) -> Vec<&str> {
    item.and_then(Item::as_array).into_iter().flatten().filter_map(toml_edit::Value::as_str).collect()
}

impl<'a> Check<'a> {
    fn error(&mut self, place: impl Into<String>, text: impl Into<String>) {
        self.found.push(Finding { severity: Severity::Error, place: place.into(), text: text.into() });
    }

    fn note(&mut self, place: impl Into<String>, text: impl Into<String>) {
        self.found.push(Finding { severity: Severity::Note, place: place.into(), text: text.into() });
    }

    /// `plugins.<plugin>` and the keys below it.
    fn plugin(&self, plugin: &str, keys: &[&str]) -> Option<&'a Item> {
        let mut path = vec![PLUGINS, plugin];
        path.extend(keys);
        below(self.root, &path)
    }

    fn versions(&mut self, loaded: &Loaded) {
        let (engine, newest) = (self.face.engine, self.face.engine.format().number());
        let main = loaded.version();
        if loaded.format().is_none() || main > newest {
            self.error(
                "version",
                format!("containerd {engine} does not read version {main} with these plugins; write version = {newest}"),
            );
        }
        for (path, version) in loaded.files.iter().skip(1).filter(|(_, version)| *version != main) {
            self.error(
                path.display().to_string(),
                format!(
                    "its version is {version} and that of the main file {main}, so containerd ignores sections of one of \
                     them; print it anew with --config-version {main}"
                ),
            );
        }
        for (name, files) in &loaded.twice {
            let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
            self.error(
                format!("{PROXIES}.{name}"),
                format!(
                    "defined in {}, and only the last one counts; delete the others",
                    files.join(" and ")
                ),
            );
        }
        let other = match loaded.format() {
            Some(Format::V3) => CRI,
            _ => Format::V3.cri_images().0,
        };
        let misplaced = match loaded.format() {
            // In version 3 the old name has only the stream server's settings.
            Some(Format::V3) => {
                ["containerd", "registry", "cni"].iter().any(|key| self.plugin(CRI, &[key]).is_some())
            }
            _ => self.plugin(other, &[]).is_some(),
        };
        if misplaced {
            let (plugin, keys) = loaded.format().unwrap_or(Format::V2).cri_images();
            let plugin = format!("\"{plugin}\"");
            let section = [&[PLUGINS, &plugin], keys].concat().join(".");
            self.error(
                format!("{PLUGINS}.\"{other}\""),
                format!("not a section of version {main}; CRI's snapshotter is in [{section}]"),
            );
        }
    }

    /// The proxy of a name, if it is a table.
    fn proxy(&self, name: &str) -> Option<&'a dyn TableLike> {
        below(self.root, &[PROXIES, name]).and_then(Item::as_table_like)
    }

    /// Type, address and platform of a proxy.
    fn proxy_basics(&mut self, name: &str, proxy: &dyn TableLike, kind: &str) {
        let place = format!("{PROXIES}.{name}");
        let text = |key: &str| proxy.get(key).and_then(Item::as_str).unwrap_or_default();
        if text("type") != kind {
            self.error(
                &place,
                format!("type is '{}'; write type = \"{kind}\"", text("type").escape_default()),
            );
        }
        let (address, expected) = (text("address"), &self.face.address);
        let pipe = address.starts_with(PIPE);
        if pipe && !address.contains('@') {
            self.error(
                &place,
                format!(
                    "the pipe's name has no @, so containerd sends an invalid authority and every call fails; let the \
                     service listen on {address}@localhost and write that"
                ),
            );
        } else if address != expected {
            self.error(&place, format!("address is '{}' and the service listens on '{expected}'; write that address, or name the other one with --containerd-socket", address.escape_default()));
        }
        let platform = text("platform");
        if platform.is_empty() && self.face.system == System::Windows {
            self.error(
                &place,
                format!(
                    "without a platform it counts as windows; write platform = \"{}\"",
                    self.face.platform
                ),
            );
        } else if !platform.is_empty() && platform != self.face.platform {
            self.error(
                &place,
                format!(
                    "platform is '{}'; write platform = \"{}\"",
                    platform.escape_default(),
                    self.face.platform
                ),
            );
        }
    }

    fn built_in(&mut self, name: &str, names: &[&str], plugin: &str) {
        let id = format!("io.containerd.{plugin}.v1.{name}");
        if names.contains(&name) && !strings(self.root.get("disabled_plugins")).contains(&id.as_str()) {
            self.error(
                format!("{PROXIES}.{name}"),
                format!("containerd has a plugin of its own with that name; choose another name, or add \"{id}\" to disabled_plugins"),
            );
        }
    }

    fn snapshotter(&mut self) {
        let face = self.face;
        let place = format!("{PROXIES}.{}", face.name);
        self.built_in(&face.name, BUILT_IN_SNAPSHOTTERS, "snapshotter");
        let Some(proxy) = self.proxy(&face.name) else {
            let address = |item: &Item| item.get("address").and_then(Item::as_str) == Some(&face.address);
            let snapshot = |item: &Item| item.get("type").and_then(Item::as_str) == Some("snapshot");
            let proxies = self.root.get(PROXIES).and_then(Item::as_table_like);
            let other = proxies.and_then(|t| t.iter().find(|(_, item)| address(item) && snapshot(item)));
            let text = match other {
                Some((other, _)) => {
                    format!("missing, and '{other}' has the service's address; check with --name {other}")
                }
                None => "missing; add the section that containerd-config prints, or import its file".into(),
            };
            self.error(place, text);
            return;
        };
        self.proxy_basics(&face.name, proxy, "snapshot");
        match proxy.get("exports").and_then(|exports| exports.get("root")).and_then(Item::as_str) {
            None => self.error(
                &place,
                format!("no exports.root, so CRI looks for the image file system where nothing is; add [{place}.exports] root = '{}'", face.root),
            ),
            Some(root) if root != face.root => self.error(
                &place,
                format!("exports.root is '{}' and the layers are in '{}'; write that directory, or name the other one with --containerd-root", root.escape_default(), face.root),
            ),
            Some(_) => {}
        }
        let capabilities = strings(proxy.get("capabilities"));
        for wanted in face.capabilities() {
            if !capabilities.contains(wanted) {
                let loss = match *wanted {
                    "rebase" => "layers of an image are unpacked one after the other",
                    _ => "containers in user namespaces cost a copy of their whole image",
                };
                self.error(
                    &place,
                    format!("capability \"{wanted}\" is missing: {loss}; add it to capabilities"),
                );
            }
        }
    }

    fn differ(&mut self) {
        let name = self.face.differ();
        self.built_in(&name, BUILT_IN_DIFFERS, "diff");
        match self.proxy(&name) {
            Some(proxy) => self.proxy_basics(&name, proxy, "diff"),
            None => self.error(
                format!("{PROXIES}.{name}"),
                format!("missing, so no layer can be unpacked into {}; add the section that containerd-config prints", self.face.name),
            ),
        }
    }

    fn differ_order(&mut self) {
        let (place, wanted) = (format!("{PLUGINS}.\"{DIFF_SERVICE}\""), self.face.differs());
        let list = strings(self.plugin(DIFF_SERVICE, &["default"]));
        let remedy = format!("write default = {wanted:?}");
        let ours = list.iter().position(|name| *name == wanted[0]);
        match ours {
            None => self.error(
                &place,
                format!("default does not name {}, which is therefore never asked; {remedy}", wanted[0]),
            ),
            Some(0) => {}
            Some(_) => self.error(
                &place,
                format!(
                    "default names {} before {}, which fails on its layers; {remedy}",
                    list[0], wanted[0]
                ),
            ),
        }
        if ours.is_some() {
            for name in wanted[1..].iter().filter(|name| !list.contains(&name.as_str())) {
                self.error(
                    &place,
                    format!(
                        "default does not name {name}, so the other snapshotters cannot unpack; {remedy}"
                    ),
                );
            }
        }
    }

    fn unpack_configs(&mut self) {
        let face = self.face;
        let (place, differ) = (format!("{PLUGINS}.\"{TRANSFER}\""), face.differ());
        let tables: Vec<&dyn TableLike> = match self.plugin(TRANSFER, &["unpack_config"]) {
            Some(Item::ArrayOfTables(tables)) => tables.iter().map(|table| table as &dyn TableLike).collect(),
            Some(item) => item
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|value| value.as_inline_table().map(|table| table as &dyn TableLike))
                .collect(),
            None => Vec::new(),
        };
        let text =
            |table: &'a dyn TableLike, key: &str| table.get(key).and_then(Item::as_str).unwrap_or_default();
        let of = |name: &str| tables.iter().copied().find(|table| text(*table, "snapshotter") == name);
        match of(&face.name) {
            None => self.error(&place, format!("no unpack_config for {}, so a pull ends with 'no unpack platforms defined'; add the one that containerd-config prints", face.name)),
            Some(table) if text(table, "differ") != differ => self.error(
                &place,
                format!("the unpack_config of {} has the differ '{}'; write differ = \"{differ}\"", face.name, text(table, "differ").escape_default()),
            ),
            Some(table) if text(table, "platform") != face.platform => self.error(
                &place,
                format!("the unpack_config of {} has the platform '{}'; write platform = \"{}\"", face.name, text(table, "platform").escape_default(), face.platform),
            ),
            Some(_) => {}
        }
        if !tables.is_empty() {
            for (_, snapshotter, _) in face.system.kept() {
                if of(snapshotter).is_none() {
                    self.note(&place, format!("no unpack_config for {snapshotter}: images can no longer be pulled into it; add one if it is still used"));
                }
            }
        }
        let unpacks = self.plugin(TRANSFER, &["max_concurrent_unpacks"]).and_then(Item::as_integer);
        match unpacks {
            Some(_) if face.engine < PARALLEL_UNPACK => {
                self.note(
                    &place,
                    format!(
                        "containerd {} ignores max_concurrent_unpacks ({PARALLEL_UNPACK} or later reads it)",
                        face.engine
                    ),
                );
            }
            None | Some(..=1) if face.engine >= PARALLEL_UNPACK => {
                self.note(
                    &place,
                    format!(
                        "layers are unpacked one after the other; write max_concurrent_unpacks = {}",
                        face.unpacks
                    ),
                );
            }
            _ => {}
        }
    }

    fn cri(&mut self) {
        let face = self.face;
        let (plugin, keys) = face.format.cri_images();
        let mut path = keys.to_vec();
        path.push("snapshotter");
        let chosen = self.plugin(plugin, &path).and_then(Item::as_str).unwrap_or_default();
        let ours = chosen == face.name;
        if face.default && face.system == System::Linux && !ours {
            self.error(
                format!("{PLUGINS}.\"{plugin}\""),
                format!(
                    "the snapshotter of CRI is '{}'; write snapshotter = \"{}\"",
                    chosen.escape_default(),
                    face.name
                ),
            );
        }
        let handlers = self.plugin(CRI, &["containerd", "runtimes"]).is_some();
        if ours && face.format == Format::V2 && face.engine >= MERGES_SECTIONS && !handlers {
            let text = format!(
                "containerd {} forgets the snapshotter of a version 2 file that has no runtime handler; add \
                 [{PLUGINS}.\"{CRI}\".containerd.runtimes.runc] runtime_type = 'io.containerd.runc.v2', or write version 3",
                face.engine
            );
            self.error(format!("{PLUGINS}.\"{CRI}\".containerd"), text);
        }
        let disabled = strings(self.root.get("disabled_plugins"));
        if (face.default || ours) && disabled.iter().any(|name| *name == "cri" || name.contains(".cri")) {
            self.error(
                "disabled_plugins",
                "CRI is disabled, so Kubernetes cannot use this containerd; take it off the list",
            );
        }
    }
}
