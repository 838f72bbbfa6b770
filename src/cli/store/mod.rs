//! `store`: lists, checks, repairs and cleans up a store; its room in [`space`].

mod space;

use super::{
    CliError, HomeArgs,
    call::{Endpoint, post},
    output::{print_json, table},
    runtime,
};
use crate::{
    config::Options,
    driver::{Driver, DriverConfig, snapshots::keys},
    store::{DiskThread, Layer, LayerId, LayerState, SnapshotKind, Store},
};
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use comfy_table::CellAlignment;
use layer_codec::TarDigest;
use serde::Serialize;
use std::{collections::BTreeMap, io::IsTerminal, path::PathBuf, process::ExitCode};

#[derive(Debug, Subcommand)]
pub(super) enum StoreCommand {
    /// Lists layers. Works while a plugin is running.
    Ls(ViewArgs),
    /// Shows layers below their parents. Works while a plugin is running.
    Tree(ViewArgs),
    /// Shows the disk usage of layers. Works while a plugin is running.
    Du(DuArgs),
    /// Makes the sandbox of a layer larger: while it is mounted, by a running plugin; if no plugin runs, offline.
    Grow(space::GrowArgs),
    /// Gives the host what mounted sandboxes do not use; `layer compact` does it for an unmounted one. Needs a running plugin.
    #[cfg(target_os = "linux")]
    Trim(space::TrimArgs),
    /// Checks every layer: files, image metadata, and the digest of its exact tar. Works while a plugin is running.
    Scrub(ViewArgs),
    /// Deletes what crashes left behind (never a layer). Refused while a plugin owns the store: the plugin does this
    /// itself.
    Gc(GcArgs),
    /// Like gc; also unmounts disks that no view uses, and lists damaged layers. Refused while a plugin owns the store.
    Repair(ViewArgs),
    /// Unmounts the layers of a running plugin that stay mounted without a container (lcow.mount.keep).
    UnmountIdle(UnmountIdleArgs),
    /// Imports images from another storage driver, another engine, or an original LCOW home.
    #[cfg(target_os = "linux")]
    #[command(subcommand)]
    Import(super::import::ImportCommand),
}

/// Arguments of all commands but `import`.
#[derive(Debug, Args)]
pub(super) struct ViewArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `du`.
#[derive(Debug, Args)]
pub(super) struct DuArgs {
    #[command(flatten)]
    view: ViewArgs,
    /// Shows for each sandbox instead how much of it the host would get back (`store trim` for a mounted one, `layer
    /// compact` for others). Of a mounted one it is an estimate. Reads the file systems' bitmaps.
    #[arg(long)]
    reclaimable: bool,
}

/// Arguments of `unmount-idle`.
#[derive(Debug, Args)]
pub(super) struct UnmountIdleArgs {
    #[command(flatten)]
    endpoint: Endpoint,
}

/// Arguments of `gc`.
#[derive(Debug, Args)]
pub(super) struct GcArgs {
    #[command(flatten)]
    view: ViewArgs,
    /// Only shows what would be deleted.
    #[arg(long)]
    dry_run: bool,
}

/// A layer as the lists show it.
#[derive(Debug, Serialize)]
struct Row {
    id: LayerId,
    parent: Option<LayerId>,
    state: String,
    /// Bytes of regular files (applied layers).
    size: Option<u64>,
    /// Bytes on the disk.
    disk: u64,
    created: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<TarDigest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotRow>,
}

/// What containerd knows of a layer.
#[derive(Debug, Serialize)]
struct SnapshotRow {
    namespace: String,
    /// Its key or name, without namespace and number.
    name: String,
    kind: SnapshotKind,
    /// The image that it was pulled for, where containerd said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
}

/// Label with the reference of the image that a snapshot was prepared for (`pkg/snapshotters/annotations.go`).
const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";

fn snapshot_row(layer: &Layer) -> Option<SnapshotRow> {
    let snapshot = layer.snapshot()?;
    let (namespace, name) = keys::parts(&snapshot.name);
    Some(SnapshotRow {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        kind: snapshot.kind,
        image: snapshot.labels.get(IMAGE_REF).cloned(),
    })
}

pub(super) fn run(command: StoreCommand) -> Result<ExitCode, CliError> {
    match command {
        StoreCommand::Ls(args) => ls(&args),
        StoreCommand::Tree(args) => tree(&args),
        StoreCommand::Du(args) if args.reclaimable => space::reclaimable(&args.view),
        StoreCommand::Du(args) => du(&args.view),
        StoreCommand::Grow(args) => space::grow(&args),
        #[cfg(target_os = "linux")]
        StoreCommand::Trim(args) => space::trim(&args),
        StoreCommand::Scrub(args) => scrub(&args),
        StoreCommand::Gc(args) => gc(&args),
        StoreCommand::Repair(args) => repair(&args),
        StoreCommand::UnmountIdle(args) => runtime()?.block_on(unmount_idle(&args)),
        #[cfg(target_os = "linux")]
        StoreCommand::Import(command) => super::import::run(command),
    }
}

async fn unmount_idle(args: &UnmountIdleArgs) -> Result<ExitCode, CliError> {
    post(&args.endpoint, "/unmount-idle").await?;
    Ok(ExitCode::SUCCESS)
}

fn home_of(args: &HomeArgs) -> Result<PathBuf, CliError> {
    Ok(match &args.home {
        Some(home) => home.clone(),
        None => Driver::last_home(&args.root)?.unwrap_or_else(|| args.root.clone()),
    })
}

fn row(store: &Store, layer: &Layer) -> Row {
    let disk = store.layer_usage(&DiskThread::here(), &layer.id).map_or(0, |u| u.allocated);
    let meta = layer.meta.as_ref().ok();
    let applied = meta.and_then(|m| m.applied.as_ref());
    Row {
        id: layer.id.clone(),
        parent: layer.parent().cloned(),
        state: meta.map_or_else(|| "damaged".into(), |m| state_name(m.state).into()),
        size: applied.map(|a| a.diff_size),
        disk,
        created: meta.map_or(0, |m| m.created),
        digest: applied.map(|a| a.tar_digest),
        fault: layer.meta.as_ref().err().map(ToString::to_string),
        snapshot: snapshot_row(layer),
    }
}

fn state_name(state: LayerState) -> &'static str {
    match state {
        LayerState::Created => "created",
        LayerState::Applying => "unfinished",
        LayerState::Applied => "applied",
        LayerState::Sandbox => "sandbox",
    }
}

fn kind_name(kind: SnapshotKind) -> &'static str {
    match kind {
        SnapshotKind::View => "view",
        SnapshotKind::Active => "active",
        SnapshotKind::Committed => "committed",
    }
}

/// Characters of an id that text output shows.
const SHORT: usize = 12;

fn short(id: &LayerId) -> String {
    let text = id.as_str();
    match text.strip_suffix("-init") {
        Some(stem) if stem.len() > SHORT => format!("{}…-init", &stem[..SHORT]),
        None if text.len() > 2 * SHORT => format!("{}…", &text[..SHORT]),
        _ => text.to_owned(),
    }
}

fn ls(args: &ViewArgs) -> Result<ExitCode, CliError> {
    let store = Store::open_read_only(&DiskThread::here(), &home_of(&args.home)?)?;
    let rows: Vec<Row> = store.layers().iter().map(|l| row(&store, l)).collect();
    if args.json {
        print_json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut columns = vec!["LAYER", "PARENT", "STATE", "SIZE", "ON DISK"];
    if store.layout().holds_snapshots() {
        columns.extend(["KIND", "NAMESPACE", "IMAGE", "NAME"]);
    }
    let mut table = table(&columns);
    for row in &rows {
        let mut cells = vec![
            row.id.to_string(),
            row.parent.as_ref().map(short).unwrap_or_default(),
            row.state.clone(),
            row.size.map(|s| ByteSize(s).to_string()).unwrap_or_default(),
            ByteSize(row.disk).to_string(),
        ];
        if let Some(snapshot) = &row.snapshot {
            // Keys are free text from outside.
            let shown = |text: &str| text.escape_debug().to_string();
            cells.extend([
                kind_name(snapshot.kind).to_owned(),
                shown(&snapshot.namespace),
                snapshot.image.as_deref().map(shown).unwrap_or_default(),
                shown(&snapshot.name),
            ]);
        }
        table.add_row(cells);
    }
    for column in [3, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

/// A layer with its children.
#[derive(Debug, Serialize)]
struct Node {
    #[serde(flatten)]
    row: Row,
    children: Vec<Node>,
}

fn tree(args: &ViewArgs) -> Result<ExitCode, CliError> {
    let store = Store::open_read_only(&DiskThread::here(), &home_of(&args.home)?)?;
    let mut by_parent: BTreeMap<Option<LayerId>, Vec<Layer>> = BTreeMap::new();
    for layer in store.layers() {
        // A layer whose parent is missing is shown at the top, not lost.
        let parent = layer.parent().filter(|p| store.exists(p)).cloned();
        by_parent.entry(parent).or_default().push(layer);
    }
    let roots = nodes(&store, &by_parent, None);
    if args.json {
        print_json(&roots)?;
    } else {
        print_nodes(&roots, "");
    }
    Ok(ExitCode::SUCCESS)
}

/// Chains are acyclic and at most 128 long: a parent is created before its children, and the reader refuses loops.
fn nodes(
    store: &Store,
    by_parent: &BTreeMap<Option<LayerId>, Vec<Layer>>,
    parent: Option<&LayerId>,
) -> Vec<Node> {
    let Some(layers) = by_parent.get(&parent.cloned()) else { return Vec::new() };
    layers
        .iter()
        .map(|layer| Node { row: row(store, layer), children: nodes(store, by_parent, Some(&layer.id)) })
        .collect()
}

fn print_nodes(nodes: &[Node], indent: &str) {
    for (n, node) in nodes.iter().enumerate() {
        let last = n + 1 == nodes.len();
        let (branch, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let size = node.row.size.map(|s| format!(", {}", ByteSize(s))).unwrap_or_default();
        println!(
            "{indent}{branch}{}  {}{size}, {} on disk",
            short(&node.row.id),
            node.row.state,
            ByteSize(node.row.disk)
        );
        print_nodes(&node.children, &format!("{indent}{below}"));
    }
}

fn du(args: &ViewArgs) -> Result<ExitCode, CliError> {
    let store = Store::open_read_only(&DiskThread::here(), &home_of(&args.home)?)?;
    let usage = store.usage(&DiskThread::here());
    if args.json {
        print_json(&usage)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = table(&["ON DISK", "LENGTH", "LAYER"]);
    let (mut disk, mut length) = (usage.other_allocated, 0);
    for layer in &usage.layers {
        disk += layer.allocated;
        length += layer.apparent;
        table.add_row([
            ByteSize(layer.allocated).to_string(),
            ByteSize(layer.apparent).to_string(),
            layer.id.to_string(),
        ]);
    }
    table.add_row([
        ByteSize(usage.other_allocated).to_string(),
        String::new(),
        "staging, scratch, cache".into(),
    ]);
    table.add_row([ByteSize(disk).to_string(), ByteSize(length).to_string(), "all".into()]);
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

fn scrub(args: &ViewArgs) -> Result<ExitCode, CliError> {
    let home = home_of(&args.home)?;
    let options = Options::load(None, &[])?;
    let show = std::io::stderr().is_terminal();
    let report = runtime()?.block_on(async {
        let config = DriverConfig { root: args.home.root.clone(), options, worker_program: None };
        let driver = Driver::inspect(&home, config)?;
        let report = driver
            .scrub(|done, all| {
                if show {
                    eprint!("\r{done} of {all} layers");
                }
            })
            .await;
        if show {
            eprintln!();
        }
        driver.stop().await;
        report
    })?;
    if args.json {
        print_json(&report)?;
    } else {
        println!(
            "{} layers, {} images checked, {} of tar read back, {} unfinished, {} faults",
            report.layers,
            report.images,
            ByteSize(report.tar_bytes),
            report.unfinished.len(),
            report.faults.len()
        );
        if !report.writer_1.is_empty() {
            println!(
                "{} layers made by writer 1 (release 1): sound, but pull them again when convenient",
                report.writer_1.len()
            );
        }
        for finding in report.writer_1_differs.iter().chain(&report.faults) {
            println!("{}: {}", finding.id, finding.fault);
        }
    }
    Ok(if report.faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn gc(args: &GcArgs) -> Result<ExitCode, CliError> {
    let thread = &DiskThread::here();
    let store = Store::open(thread, &existing(&home_of(&args.view.home)?)?, |_| false)?;
    let debris = store.debris(thread)?;
    let report = if args.dry_run {
        crate::store::GcReport { deleted: debris, failed: Vec::new() }
    } else {
        store.collect(thread, debris)
    };
    if args.view.json {
        print_json(&report)?;
    } else {
        let verb = if args.dry_run { "would delete" } else { "deleted" };
        for item in &report.deleted {
            println!("{verb} {} ({})", item.path.display(), item.kind);
        }
        println!("{verb} {} items", report.deleted.len());
    }
    for (path, error) in &report.failed {
        eprintln!("cannot delete {}: {error}", path.display());
    }
    Ok(if report.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn repair(args: &ViewArgs) -> Result<ExitCode, CliError> {
    /// What a repair did.
    #[derive(Serialize)]
    struct Repaired {
        gc: crate::store::GcReport,
        faults: Vec<(LayerId, String)>,
    }
    let home = existing(&home_of(&args.home)?)?;
    let gc = {
        let thread = &DiskThread::here();
        let store = Store::open(thread, &home, |_| false)?;
        store.collect(thread, store.debris(thread)?)
    };
    let options = Options::load(None, &[])?;
    let config = DriverConfig { root: args.home.root.clone(), options, worker_program: None };
    let faults = runtime()?.block_on(async {
        let driver = Driver::repair(&home, config)?;
        driver.stop().await;
        driver.structural_faults().await
    })?;
    let repaired = Repaired { gc, faults };
    if args.json {
        print_json(&repaired)?;
    } else {
        println!("deleted {} items, {} damaged layers", repaired.gc.deleted.len(), repaired.faults.len());
        for (id, fault) in &repaired.faults {
            println!("{id}: {fault} (remove the layer with `GraphDriver.Remove`)");
        }
    }
    Ok(if repaired.faults.is_empty() && repaired.gc.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A home that already holds a store: a mistyped path must not create one.
fn existing(home: &std::path::Path) -> Result<PathBuf, CliError> {
    Store::open_read_only(&DiskThread::here(), home)?;
    Ok(home.to_owned())
}
