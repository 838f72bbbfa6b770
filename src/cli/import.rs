//! `store import`: imports images of another storage driver, of another engine, or of an original LCOW home.
//!
//! ```text
//!   data-root   overlay2 or vfs, engine stopped ─► store + the engine's database      migrate
//!   engine      a running engine ─docker save─► ─docker load─► another running one    here
//!   lcow-home   an original LCOW home ─► a tar for each layer                          migrate
//! ```
//!
//! Progress goes to standard error: a bar on a terminal, else a line for each layer or image. Called by `store`.

use super::{
    CliError,
    output::{bar, print_json},
    runtime,
};
use crate::{
    config::Options,
    driver::{Driver, DriverConfig},
    migrate::{self, EngineDb, Event},
};
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

/// The note on containers that every kind of import prints.
const NO_CONTAINERS: &str = "containers are not imported; commit those that matter first (`docker commit`)";

#[derive(Debug, Subcommand)]
pub(super) enum ImportCommand {
    /// Imports the images of an overlay2 or vfs data root; both engines must be stopped. Containers are not imported.
    DataRoot(DataRootArgs),
    /// Copies images from one running engine to another with `docker save` and `docker load`. Containers are not
    /// copied.
    Engine(EngineArgs),
    /// Writes the layers of an original LCOW home as tars.
    LcowHome(LcowHomeArgs),
}

#[derive(Debug, Args)]
pub(super) struct DataRootArgs {
    /// The engine's data root (`/var/lib/docker`; with userns-remap, the directory in it named after the ids). It is
    /// only read.
    from: PathBuf,
    /// The storage driver to import from, if the data root has layers of both: overlay2 or vfs.
    #[arg(long)]
    from_driver: Option<String>,
    /// The data root of the engine that gets the images; by default, the same.
    #[arg(long)]
    to: Option<PathBuf>,
    /// The new storage driver, exactly as it is given to the engine.
    #[arg(long, default_value = "lcow")]
    driver: String,
    /// Directory of the store; by default, `<data root>/<driver>`. A managed plugin's is
    /// `<data root>/plugins/<id>/propagated-mount/<driver>`.
    #[arg(long)]
    home: Option<PathBuf>,
    /// Prints the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct EngineArgs {
    /// Socket of the engine that has the images (`/run/docker.sock`).
    from: PathBuf,
    /// Socket of the engine that gets them.
    to: PathBuf,
    /// Names or ids of images; by default, all.
    images: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct LcowHomeArgs {
    /// The home: a directory with a subdirectory for each layer. It is only read.
    home: PathBuf,
    /// Directory to write the tars to; existing ones are not written again.
    to: PathBuf,
    /// Prints the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: ImportCommand) -> Result<ExitCode, CliError> {
    match command {
        ImportCommand::DataRoot(args) => runtime()?.block_on(data_root(args)),
        ImportCommand::Engine(args) => {
            runtime()?.block_on(super::import_engine::copy(&args.from, &args.to, &args.images))
        }
        ImportCommand::LcowHome(args) => runtime()?.block_on(lcow_home(args)),
    }
}

async fn data_root(args: DataRootArgs) -> Result<ExitCode, CliError> {
    let found = migrate::look(&args.from, args.from_driver.as_deref())?;
    if args.driver.is_empty() || args.driver.contains('/') || args.driver == found.driver() {
        return Err(format!("--driver '{}': expected the name of the new storage driver", args.driver).into());
    }
    let root = args.to.clone().unwrap_or_else(|| args.from.clone());
    if !root.is_dir() {
        return Err(
            format!("'{}' is not a directory; give the data root of the engine", root.display()).into()
        );
    }
    let home = std::path::absolute(args.home.unwrap_or_else(|| root.join(&args.driver)))?;
    eprintln!(
        "importing {} images, {} layers of {}, from '{}' into '{}'",
        found.images,
        found.layers(),
        found.driver(),
        args.from.display(),
        home.display()
    );
    if found.containers > 0 {
        eprintln!("{} {NO_CONTAINERS}", found.containers);
    }
    if let Some(parent) = home.parent() {
        std::fs::create_dir_all(parent).map_err(|e| format!("cannot create '{}': {e}", parent.display()))?;
    }
    let options = Options::load(None, &[])?;
    let config = DriverConfig { root: home.clone(), options, worker_program: None };
    let driver = Driver::repair(&home, config)?;
    let progress = Arc::new(Progress::default());
    let watch: Arc<dyn Fn(Event) + Send + Sync> = {
        let progress = progress.clone();
        Arc::new(move |event| progress.hear(event))
    };
    let target = EngineDb::new(&root, &args.driver);
    let outcome = migrate::import(&found, &root, &target, &driver, &watch).await;
    driver.stop().await;
    progress.end();
    let report = outcome?;
    if args.json {
        print_json(&report)?;
    } else {
        println!(
            "imported {} images with {} layers ({} of them in an earlier run), {} names added",
            report.images,
            report.layers + report.layers_earlier,
            report.layers_earlier,
            report.names
        );
        for name in &report.names_taken {
            println!("name not added: {name} refers to another image there");
        }
        for fault in &report.failed {
            println!("not imported: {fault}");
        }
        for image in &report.left_out {
            println!("left out: image {} {}: {}", image.image, image.names.join(" "), image.reason);
        }
        if let Some(reason) = &report.stopped {
            println!("stopped: {reason}; fix that and run the same command again to continue");
        }
        if report.containers_left_out > 0 {
            println!("{} {NO_CONTAINERS}", report.containers_left_out);
        }
    }
    let whole = report.failed.is_empty() && report.stopped.is_none();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Shows the events of an import.
#[derive(Default)]
struct Progress {
    state: parking_lot::Mutex<(Option<ProgressBar>, usize)>,
}

impl Progress {
    fn hear(&self, event: Event) {
        let mut state = self.state.lock();
        let (shown, layers) = &mut *state;
        match (event, shown) {
            (Event::Planned { layers: all, bytes }, shown) => {
                *layers = all;
                *shown = bar(bytes);
            }
            (Event::Layer { number, id, .. }, Some(bar)) => {
                bar.set_message(format!("{number}/{layers} {:.12}", id.as_str()));
            }
            (Event::Layer { number, id, bytes }, None) => {
                eprintln!("layer {number} of {layers}: {id}, {}", ByteSize(bytes));
            }
            // A tar is a little longer than its files, so the bar may reach its end early.
            (Event::Bytes(n), Some(bar)) => bar.inc(n),
            (Event::Done { bytes, earlier: true }, Some(bar)) => bar.inc(bytes),
            (Event::Failed(text), Some(bar)) => bar.println(text),
            (Event::Failed(text), None) => eprintln!("{text}"),
            (Event::Bytes(_) | Event::Done { .. }, _) => {}
        }
    }

    fn end(&self) {
        if let Some(bar) = self.state.lock().0.take() {
            bar.finish_and_clear();
        }
    }
}

async fn lcow_home(args: LcowHomeArgs) -> Result<ExitCode, CliError> {
    let watch = |done: usize, all: usize, id: &crate::store::LayerId| {
        eprintln!("layer {} of {all}: {id}", done + 1);
    };
    let report = migrate::export_original(&args.home, &args.to, watch).await?;
    // The list gives the parent of each tar.
    let list = args.to.join("layers.json");
    crate::store::durable::write_json(&list, &report.layers)?;
    if args.json {
        print_json(&report)?;
    } else {
        println!(
            "{} layers in '{}'; {} lists their parents",
            report.layers.len(),
            args.to.display(),
            shown(&list)
        );
        for fault in &report.failed {
            println!("not read: {fault}");
        }
        if report.sandboxes_left_out > 0 {
            println!("{} sandboxes left out: {NO_CONTAINERS}", report.sandboxes_left_out);
        }
    }
    Ok(if report.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn shown(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}
