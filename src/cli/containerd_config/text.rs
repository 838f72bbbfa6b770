//! The text of containerd's configuration: a drop-in, or a whole file with the sections merged in.
//!
//! ```text
//!   Face ─► drop_in ─► # comments, [proxy_plugins.lcow], diff-service, unpack_config, CRI
//!                          │
//!   main file, parsed ─────┴─► into ─► the same file, its comments kept
//! ```
//!
//! Merging follows what containerd does with imported files (compared with `containerd config dump` of 1.7.24 and
//! 2.1.9 by `tests/containerd_config`): lists are replaced, not extended, so a list printed here is complete. 1.7
//! replaces a whole plugin section, so a drop-in for it leaves CRI's section commented out. Pure functions. Called by
//! `mod`.

use super::face::{Engine, Face, Format, PARALLEL_UNPACK, System};
use std::fmt::{self, Write as _};
use toml_edit::{Array, ArrayOfTables, DocumentMut, Item, Table, TomlError, Value};

/// The first containerd that merges an imported plugin section with the main file's, key by key.
pub(super) const MERGES_SECTIONS: Engine = Engine { major: 2, minor: 0 };
/// The table with a section for each plugin.
pub(super) const PLUGINS: &str = "plugins";
/// The table with a section for each plugin that runs in a process of its own.
pub(super) const PROXIES: &str = "proxy_plugins";
/// Plugin with the order in which differs are asked.
pub(super) const DIFF_SERVICE: &str = "io.containerd.service.v1.diff-service";
/// Plugin that unpacks what the transfer service pulls.
pub(super) const TRANSFER: &str = "io.containerd.transfer.v1.local";
/// Plugin with CRI's runtime handlers, from format 3 on.
const CRI_RUNTIME: &str = "io.containerd.cri.v1.runtime";
/// Plugin of CRI before format 3.
pub(super) const CRI: &str = "io.containerd.grpc.v1.cri";

/// Where the text will stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Destination {
    DropIn,
    MainFile,
}

/// The drop-in for a containerd.
pub(super) fn drop_in(face: &Face) -> String {
    render(face, Destination::DropIn)
}

/// Whether CRI's settings are comments in the drop-in, because containerd would replace the main file's whole section.
pub(super) fn cri_is_comment(face: &Face) -> bool {
    face.engine < MERGES_SECTIONS && (face.default || !face.runtimes.is_empty())
}

/// The main file `text` with the sections merged in; what else it says, and its comments, stay.
///
/// # Errors
/// `text` is not TOML.
pub(super) fn into(face: &Face, text: &str) -> Result<String, TomlError> {
    let mut main: DocumentMut = text.parse()?;
    let ours: DocumentMut = render(face, Destination::MainFile).parse()?;
    merge(main.as_table_mut(), ours.as_table());
    Ok(main.to_string())
}

fn render(face: &Face, destination: Destination) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, face, destination);
    out
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn write(out: &mut String, face: &Face, destination: Destination) -> fmt::Result {
    let Face { engine, format, name, .. } = face;
    let (differ, address, platform) = (face.differ(), quoted(&face.address), quoted(&face.platform));
    if destination == Destination::DropIn {
        writeln!(
            out,
            "# containerd {engine}: lcow-graphdriver as the snapshotter {name} and the differ {differ}."
        )?;
        writeln!(
            out,
            "# The main file must import this one (imports = [\"/etc/containerd/conf.d/*.toml\"]) and have"
        )?;
        writeln!(out, "# the same version.")?;
    }
    writeln!(out, "version = {}\n", format.number())?;
    writeln!(out, "[proxy_plugins.{name}]")?;
    writeln!(out, "  type = \"snapshot\"")?;
    if face.system == System::Windows {
        writeln!(
            out,
            "  # The @ makes the name an authority that HTTP/2 accepts; without it every call fails."
        )?;
    }
    writeln!(out, "  address = {address}")?;
    writeln!(out, "  platform = {platform}")?;
    let capabilities: Array = face.capabilities().iter().copied().collect();
    writeln!(out, "  capabilities = {}", Value::from(capabilities).to_string().trim())?;
    writeln!(out, "  [proxy_plugins.{name}.exports]")?;
    writeln!(out, "    # The file system that CRI reports as the image file system.")?;
    writeln!(out, "    root = {}\n", quoted(&face.root))?;
    writeln!(out, "[proxy_plugins.{differ}]")?;
    writeln!(out, "  type = \"diff\"")?;
    writeln!(out, "  address = {address}")?;
    writeln!(out, "  platform = {platform}\n")?;
    writeln!(out, "# The next differ is asked about whatever is not in a layer of {name}.")?;
    writeln!(out, "[plugins.\"{DIFF_SERVICE}\"]")?;
    let differs: Array = face.differs().into_iter().collect();
    writeln!(out, "  default = {}\n", Value::from(differs).to_string().trim())?;
    writeln!(
        out,
        "# The list of unpack_config replaces containerd's own, which has only the built-in snapshotter."
    )?;
    if *engine >= PARALLEL_UNPACK {
        writeln!(out, "[plugins.\"{TRANSFER}\"]")?;
        writeln!(out, "  # Layers of an image that are unpacked at once.")?;
        writeln!(out, "  max_concurrent_unpacks = {}", face.unpacks)?;
    }
    for (platform, snapshotter, differ) in face.unpack_configs() {
        writeln!(out, "  [[plugins.\"{TRANSFER}\".unpack_config]]")?;
        writeln!(out, "    platform = {}", quoted(&platform))?;
        writeln!(out, "    snapshotter = {}", quoted(&snapshotter))?;
        writeln!(out, "    differ = {}", quoted(&differ))?;
    }
    let cri = cri(face)?;
    if cri.is_empty() {
        return Ok(());
    }
    if destination == Destination::DropIn && cri_is_comment(face) {
        writeln!(
            out,
            "\n# containerd {engine} replaces the main file's whole CRI section by that of an imported file,"
        )?;
        writeln!(
            out,
            "# SystemdCgroup and the pause image included. Add these lines to the main file (--into FILE does it):"
        )?;
        for line in cri.lines() {
            writeln!(out, "#{}{line}", if line.is_empty() { "" } else { " " })?;
        }
    } else {
        write!(out, "\n{cri}")?;
    }
    Ok(())
}

/// CRI's sections; empty if nothing of CRI uses the snapshotter.
fn cri(face: &Face) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let Face { format, name, .. } = face;
    let (images, runtimes) = match format {
        Format::V2 => {
            (format!("[plugins.\"{CRI}\".containerd]"), format!("plugins.\"{CRI}\".containerd.runtimes"))
        }
        Format::V3 => (
            format!("[plugins.\"{}\"]", format.cri_images().0),
            format!("plugins.\"{CRI_RUNTIME}\".containerd.runtimes"),
        ),
    };
    // On Windows most pods are Windows pods: only runtime handlers choose this snapshotter there.
    if face.default && face.system == System::Linux {
        writeln!(out, "{images}")?;
        writeln!(out, "  snapshotter = {}", quoted(name))?;
        if *format == Format::V2 && face.engine >= MERGES_SECTIONS && face.runtimes.is_empty() {
            writeln!(
                out,
                "# Without a runtime handler, containerd {} forgets the snapshotter of a version 2 file.",
                face.engine
            )?;
            writeln!(out, "[{runtimes}.runc]")?;
            writeln!(out, "  runtime_type = \"io.containerd.runc.v2\"")?;
        }
    }
    for runtime in &face.runtimes {
        let handler = quoted(&runtime.name);
        writeln!(out, "[{runtimes}.{handler}]")?;
        if let Some(shim) = &runtime.shim {
            writeln!(out, "  runtime_type = {}", quoted(shim))?;
            writeln!(out, "  # Options (SystemdCgroup = true) are not inherited from another handler.")?;
        }
        writeln!(out, "  snapshotter = {}", quoted(name))?;
        if *format == Format::V3 {
            writeln!(out, "[plugins.\"{}\".runtime_platforms.{handler}]", format.cri_images().0)?;
            writeln!(out, "  platform = {}", quoted(&face.platform))?;
            writeln!(out, "  snapshotter = {}", quoted(name))?;
        }
    }
    Ok(out)
}

/// Puts `from` into `to`: tables key by key, the two lists by their entries, everything else replaced.
fn merge(to: &mut Table, from: &Table) {
    for (key, item) in from {
        match (to.get_mut(key), item) {
            (Some(Item::Table(to)), Item::Table(from)) => merge(to, from),
            // An inline table becomes a table of its own, so that sections can be added to it.
            (Some(there), Item::Table(from)) if there.is_inline_table() => {
                let mut table = there.clone().into_table().unwrap_or_default();
                merge(&mut table, from);
                *there = Item::Table(table);
            }
            (Some(there), Item::ArrayOfTables(from)) => {
                *there = Item::ArrayOfTables(unpack_configs(there, from));
            }
            (Some(Item::Value(Value::Array(to))), Item::Value(Value::Array(from))) if key == "default" => {
                let old: Vec<String> = to.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
                let new: Vec<String> = from.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
                let others = old.into_iter().filter(|name| !new.contains(name)).collect::<Vec<_>>();
                *to = new.iter().cloned().chain(others).collect();
            }
            (Some(there @ Item::Value(_)), Item::Value(new)) => {
                let decor = there.as_value().map(|old| old.decor().clone()).unwrap_or_default();
                let mut new = new.clone();
                *new.decor_mut() = decor;
                *there = Item::Value(new);
            }
            _ => {
                let mut item = item.clone();
                // Written after everything that the file has, in the order of the text.
                forget_position(&mut item);
                match from.key(key) {
                    Some(key) => drop(to.insert_formatted(key, item)),
                    None => drop(to.insert(key, item)),
                }
            }
        }
    }
}

fn forget_position(item: &mut Item) {
    match item {
        Item::Table(table) => {
            table.set_position(usize::MAX);
            table.iter_mut().for_each(|(_, below)| forget_position(below));
        }
        Item::ArrayOfTables(tables) => tables.iter_mut().for_each(|table| table.set_position(usize::MAX)),
        _ => {}
    }
}

/// Our entries, then those of the file for another platform or snapshotter.
fn unpack_configs(old: &Item, ours: &ArrayOfTables) -> ArrayOfTables {
    let names = |table: &Table| {
        ["platform", "snapshotter"]
            .map(|key| table.get(key).and_then(Item::as_str).unwrap_or_default().to_owned())
    };
    let known: Vec<_> = ours.iter().map(names).collect();
    let mut all = ours.clone();
    // The list stays where the file has it.
    let place = old.as_array_of_tables().and_then(|tables| tables.get(0)).and_then(Table::position);
    for table in old.as_array_of_tables().into_iter().flatten() {
        if !known.contains(&names(table)) {
            all.push(table.clone());
        }
    }
    all.iter_mut().for_each(|table| table.set_position(place.unwrap_or(usize::MAX)));
    all
}
