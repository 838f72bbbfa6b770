//! `store grow`, `store trim` and `store du --reclaimable`: the room of sandboxes.
//!
//! ```text
//!   grow    a plugin runs? ─ yes ─► POST /Lcow.Grow        no ─► this process owns the store for a moment
//!   trim    POST /Lcow.Trim
//!   du      sandboxes' files ─► what has space on the disk and is free in the file system
//! ```

use super::{ViewArgs, existing, home_of};
use crate::{
    cli::{
        CliError, HomeArgs,
        call::{Endpoint, done},
        output::{print, print_json, table},
        runtime,
    },
    config::Options,
    driver::{Driver, DriverConfig},
    store::{DiskThread, LayerId, LayerState, Store, allocated_bytes, layout},
};
use bytesize::ByteSize;
use clap::Args;
use disk_io::{ReadAt, SubDisk};
use ext4_image::offline::estimate_free_space;
use lcow_sys::sparse::data_ranges;
use serde::{Deserialize, Serialize};
use std::{fs::File, ops::Range, path::Path, process::ExitCode, sync::Arc};
use vhd_image::{vhd, vhdx::Vhdx};

/// Arguments of `grow`.
#[derive(Debug, Args)]
pub(in crate::cli) struct GrowArgs {
    #[command(flatten)]
    home: HomeArgs,
    #[command(flatten)]
    endpoint: Endpoint,
    /// If the sandbox is mounted and cannot grow now (no CAP_SYS_RESOURCE, a sandbox of an earlier release), lets it grow
    /// before it is mounted the next time.
    #[arg(long)]
    at_next_start: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    /// The layer.
    id: String,
    /// The size that its sandbox is to have (`40GiB`).
    size: ByteSize,
}

/// Arguments of `trim`.
#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
pub(in crate::cli) struct TrimArgs {
    #[command(flatten)]
    endpoint: Endpoint,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    /// A layer; without it, all mounted sandboxes.
    id: Option<String>,
}

/// The reply of `Lcow.Grow`.
#[derive(Debug, Deserialize)]
struct Grown {
    how: String,
    before: u64,
    after: u64,
}

pub(super) fn grow(args: &GrowArgs) -> Result<ExitCode, CliError> {
    let bytes = args.size.as_u64();
    let request = serde_json::json!({ "ID": args.id, "Bytes": bytes, "AtNextStart": args.at_next_start });
    let reply = runtime()?.block_on(async {
        if let Some(reply) = done(&args.endpoint, "Lcow.Grow", &request).await? {
            return Ok::<_, CliError>(reply);
        }
        let home = existing(&home_of(&args.home)?)?;
        let options = Options::load(None, &[])?;
        let config = DriverConfig { root: args.home.root.clone(), options, worker_program: None };
        let driver = Driver::repair(&home, config)?;
        let grown = driver.grow(&args.id, bytes, args.at_next_start).await;
        driver.stop().await;
        Ok(serde_json::to_value(grown?)?)
    })?;
    if args.json {
        print_json(&reply)?;
        return Ok(ExitCode::SUCCESS);
    }
    let grown: Grown = serde_json::from_value(reply)?;
    let how = match grown.how.as_str() {
        "not_made" => "it will be made with that size",
        "mounted" => "while it is mounted",
        "put_off" => "before it is mounted the next time",
        _ => "offline",
    };
    print(&format!(
        "{}: sandbox of {} before, {} now ({how})\n",
        args.id,
        ByteSize(grown.before),
        ByteSize(grown.after)
    ))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(target_os = "linux")]
pub(super) fn trim(args: &TrimArgs) -> Result<ExitCode, CliError> {
    /// A sandbox in the reply.
    #[derive(Deserialize)]
    struct Trimmed {
        id: String,
        before: u64,
        after: u64,
    }
    let request = serde_json::json!({ "ID": args.id });
    let reply = runtime()?.block_on(done(&args.endpoint, "Lcow.Trim", &request))?;
    let reply = reply
        .ok_or("no plugin is running at the socket; without one, no sandbox is in use: `layer compact`")?;
    if args.json {
        print_json(&reply)?;
        return Ok(ExitCode::SUCCESS);
    }
    let trimmed: Vec<Trimmed> = serde_json::from_value(reply)?;
    let mut table = table(&["BEFORE", "AFTER", "LAYER"]);
    let (mut before, mut after) = (0, 0);
    for one in &trimmed {
        (before, after) = (before + one.before, after + one.after);
        table.add_row([ByteSize(one.before).to_string(), ByteSize(one.after).to_string(), one.id.clone()]);
    }
    table.add_row([ByteSize(before).to_string(), ByteSize(after).to_string(), "all".into()]);
    print(&format!("{table}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// A sandbox of `du --reclaimable`; sizes in bytes.
#[derive(Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "the name of the option is that of the field in JSON")]
struct Reclaimable {
    id: LayerId,
    /// What its file takes.
    allocated: u64,
    /// What of it the file system does not use.
    reclaimable: Option<u64>,
    /// Its journal is in use, mostly because it is mounted.
    estimate: bool,
    /// Why there is no number.
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
}

pub(super) fn reclaimable(args: &ViewArgs) -> Result<ExitCode, CliError> {
    let store = Store::open_read_only(&DiskThread::here(), &home_of(&args.home)?)?;
    let mut rows = Vec::new();
    for layer in store.layers() {
        if layer.meta.as_ref().is_ok_and(|meta| meta.state == LayerState::Sandbox) {
            let names = [layout::SANDBOX_FILE, layout::SANDBOX_VHDX_FILE];
            let files = names.map(|name| store.layout().layer_file(&layer.id, name));
            // One that is removed meanwhile is left out.
            let Some(path) = files.iter().find(|path| path.is_file()) else { continue };
            let Ok(file) = File::open(path) else { continue };
            let allocated = file.metadata().map_or(0, |known| allocated_bytes(&known));
            let found = measure(path, file);
            rows.push(Reclaimable {
                id: layer.id.clone(),
                allocated,
                reclaimable: found.as_ref().ok().map(|(bytes, _)| *bytes),
                estimate: found.as_ref().is_ok_and(|(_, estimate)| *estimate),
                fault: found.err().map(|e| e.to_string()),
            });
        }
    }
    if args.json {
        print_json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = table(&["ON DISK", "RECLAIMABLE", "LAYER"]);
    for row in &rows {
        let bytes = match (row.reclaimable, &row.fault) {
            (Some(bytes), _) if row.estimate => format!("about {}", ByteSize(bytes)),
            (Some(bytes), _) => ByteSize(bytes).to_string(),
            (None, fault) => fault.clone().unwrap_or_default(),
        };
        table.add_row([ByteSize(row.allocated).to_string(), bytes, row.id.to_string()]);
    }
    print(&format!("{table}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// How many bytes of a sandbox's file nothing uses, and whether that is an estimate.
fn measure(path: &Path, file: File) -> Result<(u64, bool), CliError> {
    let file = Arc::new(file);
    let size = ReadAt::size(&file)?;
    if path.ends_with(layout::SANDBOX_VHDX_FILE) {
        let disk = Vhdx::open(file)?;
        let present = disk.allocated();
        let (free, estimate) = estimate_free_space(&disk)?;
        return Ok((overlap(&present, &free), estimate));
    }
    let bytes = size.saturating_sub(vhd::FOOTER_SIZE as u64);
    let present = data_ranges(&file, bytes);
    let (free, estimate) = estimate_free_space(SubDisk::new(file, 0, bytes))?;
    Ok((overlap(&present, &free), estimate))
}

/// Bytes that are in ranges of both lists, each ascending and without overlaps.
fn overlap(one: &[Range<u64>], two: &[Range<u64>]) -> u64 {
    let (mut i, mut j, mut sum) = (0, 0, 0);
    while let (Some(a), Some(b)) = (one.get(i), two.get(j)) {
        sum += a.end.min(b.end).saturating_sub(a.start.max(b.start));
        if a.end < b.end {
            i += 1;
        } else {
            j += 1;
        }
    }
    sum
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges, here often of one")]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap_in_what_both_have() {
        let one = [0..10, 20..30, 40..50];
        for (two, expected) in [
            (vec![0..50], 30),
            (vec![5..25], 10),
            (vec![10..20, 30..40], 0),
            (vec![9..21, 29..41, 49..60], 5),
            (vec![], 0),
        ] {
            assert_eq!((overlap(&one, &two), overlap(&two, &one)), (expected, expected), "{two:?}");
        }
    }
}
