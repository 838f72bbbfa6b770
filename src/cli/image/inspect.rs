//! `image inspect`: what an image says of itself. No layer is read. Called by `cli::image`.

use super::{InspectArgs, open};
use crate::cli::{
    CliError,
    listing::escaped,
    output::{print, print_json, table},
};
use bytesize::ByteSize;
use oci_image::{Digest, Image, RunConfig};
use serde::Serialize;
use serde_json::Value;
use std::{fmt::Write as _, process::ExitCode};

/// The output of `inspect`; sizes in bytes.
#[derive(Debug, Serialize)]
struct Inspection {
    names: Vec<String>,
    /// Digest of the configuration, which Docker calls the id of the image.
    id: Digest,
    /// Digest of the manifest; Docker archives have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest_digest: Option<Digest>,
    platform: String,
    created: String,
    layers: Vec<LayerFacts>,
    /// The whole configuration.
    config: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Value>,
    /// All images that the source offers for this name.
    listed: Vec<ListedFacts>,
}

#[derive(Debug, Serialize)]
struct LayerFacts {
    layer: usize,
    digest: Digest,
    diff_id: Digest,
    media_type: String,
    blob_bytes: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    created_by: String,
}

#[derive(Debug, Serialize)]
struct ListedFacts {
    digest: Digest,
    names: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<String>,
}

fn facts(image: &Image) -> Result<Inspection, serde_json::Error> {
    let config = image.config();
    let steps: Vec<&str> =
        config.history.iter().filter(|step| !step.empty_layer).map(|step| step.created_by.as_str()).collect();
    // A history that does not fit the layers says nothing about them.
    let steps = if steps.len() == image.layers().len() { steps } else { vec![""; image.layers().len()] };
    let layers = image.layers().iter().zip(steps).enumerate();
    Ok(Inspection {
        names: image.names().to_vec(),
        id: config.digest,
        manifest_digest: image.manifest().map(|manifest| manifest.descriptor.digest),
        platform: config.platform.to_string(),
        created: config.created.clone(),
        layers: layers
            .map(|(layer, (named, step))| LayerFacts {
                layer,
                digest: named.descriptor.digest,
                diff_id: named.diff_id,
                media_type: named.descriptor.media_type.to_string(),
                blob_bytes: named.descriptor.size,
                created_by: step.to_owned(),
            })
            .collect(),
        config: serde_json::from_slice(&config.raw)?,
        manifest: image.manifest().map(|manifest| serde_json::from_slice(&manifest.bytes)).transpose()?,
        listed: image
            .listed()
            .iter()
            .map(|other| ListedFacts {
                digest: other.digest,
                names: other.names.clone(),
                platform: other.platform.as_ref().map(ToString::to_string),
            })
            .collect(),
    })
}

pub(super) fn inspect(args: &InspectArgs) -> Result<ExitCode, CliError> {
    let opened = open::open(0, &args.image, &args.source)?;
    let facts = facts(&opened.image)?;
    if args.json {
        print_json(&facts)?;
    } else {
        print(&text(&facts, &opened.image.config().config))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Foreign text on one line.
fn line_of(text: &str) -> String {
    escaped(text.as_bytes())
}

fn text(facts: &Inspection, run: &RunConfig) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<12}{}", line_of(value));
        }
    };
    for name in &facts.names {
        line("name", name);
    }
    line("id", &facts.id.to_string());
    if let Some(digest) = facts.manifest_digest {
        line("manifest", &digest.to_string());
    }
    line("platform", &facts.platform);
    line("created", &facts.created);
    let list = |words: &[String]| {
        if words.is_empty() { String::new() } else { format!("{words:?}") }
    };
    line("entrypoint", &list(&run.entrypoint));
    line("cmd", &list(&run.cmd));
    line("user", &run.user);
    line("workdir", &run.working_dir);
    line("stopsignal", &run.stop_signal);
    for variable in &run.env {
        line("env", variable);
    }
    for (name, value) in &run.labels {
        line("label", &format!("{name}={value}"));
    }
    for port in run.exposed_ports.keys() {
        line("port", port);
    }
    for path in run.volumes.keys() {
        line("volume", path);
    }
    let mut layers = table(&["LAYER", "BLOB", "TYPE", "DIGEST"]);
    for row in &facts.layers {
        layers.add_row([
            row.layer.to_string(),
            ByteSize(row.blob_bytes).to_string(),
            row.media_type.clone(),
            row.digest.to_string(),
        ]);
    }
    let _ = write!(text, "\n{layers}\n");
    if facts.listed.len() > 1 {
        let mut others = table(&["PLATFORM", "NAMES", "DIGEST"]);
        for row in &facts.listed {
            let names = row.names.iter().map(|name| line_of(name)).collect::<Vec<_>>().join(" ");
            others.add_row([row.platform.clone().unwrap_or_default(), names, row.digest.to_string()]);
        }
        let _ = write!(text, "\n{others}\n");
    }
    text
}
