//! Images of registries on the command line: `docker://HOST[:PORT]/NAME[:TAG|@DIGEST]`.
//!
//! ```text
//!   jailed command ── RemotePart ──► its parent: files ─► oci_registry ─► cache, registry
//!                  ◄── descriptor ──
//! ```
//!
//! Without the feature `registry`, such a source is refused with the command that fetches an image. Nothing but commands that
//! read images uses this module, and in a jailed process it does nothing. Called by `image` and `confined`.

use clap::Args;
use oci_image::{Files, RegistryName};
use std::{path::Path, sync::Arc};
#[cfg(feature = "registry")]
use {
    super::output::bar,
    indicatif::ProgressBar,
    oci_image::{Digest, Limits},
    oci_registry::{Progress, Registry, Settings},
    std::{
        path::PathBuf,
        sync::{Mutex, PoisonError},
    },
};

/// Hexadecimal digits of a digest beside a progress bar.
#[cfg(feature = "registry")]
const DIGITS: usize = 12;

/// How registries are read.
#[cfg(feature = "registry")]
#[derive(Debug, Clone, Default, Args)]
pub(super) struct RegistryArgs {
    /// Directory in which blobs from registries are kept, and continued after an interruption; by default, lcow-graphdriver
    /// in the user's directory for caches ($XDG_CACHE_HOME, ~/.cache).
    #[arg(long, value_name = "DIRECTORY")]
    cache: Option<PathBuf>,
    /// Reads registries without TLS. Names and passwords are then sent in plain text.
    #[arg(long)]
    plain_http: bool,
    /// A PEM file with certificates of authorities that are trusted besides the system's.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// How registries are read: not at all.
#[cfg(not(feature = "registry"))]
#[derive(Debug, Clone, Default, Args)]
pub(super) struct RegistryArgs {}

/// Accepts an image of a registry.
#[cfg(feature = "registry")]
#[expect(clippy::unnecessary_wraps, reason = "builds without the feature refuse it")]
pub(super) fn check(_: &RegistryName) -> Result<(), String> {
    Ok(())
}

/// Refuses an image of a registry.
#[cfg(not(feature = "registry"))]
pub(super) fn check(name: &RegistryName) -> Result<(), String> {
    Err(format!(
        "docker://{name}: this build reads no registries (feature registry); fetch the image first, for example with \
         `skopeo copy docker://NAME oci:DIR:TAG`"
    ))
}

/// The parts of an image as files, of at most `blob_bytes` each.
#[cfg(feature = "registry")]
pub(super) fn files(
    name: &RegistryName,
    args: &RegistryArgs,
    scratch: Option<&Path>,
    blob_bytes: u64,
) -> Arc<dyn Files> {
    let settings = Settings {
        cache: args.cache.clone(),
        plain_http: args.plain_http,
        ca: args.ca.clone(),
        scratch: scratch.map(Path::to_owned),
        document_bytes: Limits::default().document_bytes,
        blob_bytes,
    };
    Arc::new(Registry::new(name, settings, Some(Box::new(Bar::default()))))
}

/// The parts of an image: none.
#[cfg(not(feature = "registry"))]
pub(super) fn files(_: &RegistryName, _: &RegistryArgs, scratch: Option<&Path>, _: u64) -> Arc<dyn Files> {
    Arc::new(oci_image::Direct::new(oci_image::Place::Registry, scratch))
}

/// A progress bar for the blob that is being fetched, on a terminal.
#[cfg(feature = "registry")]
#[derive(Debug, Default)]
struct Bar(Mutex<Option<ProgressBar>>);

#[cfg(feature = "registry")]
impl Bar {
    fn with(&self, act: impl FnOnce(&ProgressBar)) {
        if let Some(bar) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            act(bar);
        }
    }
}

#[cfg(feature = "registry")]
impl Progress for Bar {
    fn begin(&self, digest: &Digest, size: u64) {
        let new = bar(size);
        if let Some(new) = &new {
            new.set_message(format!("fetching {}", &digest.hex()[..DIGITS]));
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = new;
    }

    fn advance(&self, have: u64) {
        self.with(|bar| bar.set_position(have));
    }

    fn end(&self) {
        self.with(ProgressBar::finish_and_clear);
    }
}
