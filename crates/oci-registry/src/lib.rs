//! Images of registries: their parts appear as files in a cache when they are asked for.
//!
//! ```text
//!   oci_image (parses, maybe in a jail) ── RemotePart ──► Registry: Files ─┬─ in the cache ────────────► File
//!                                                                          └─ Client ─► Part ─ digest ─┘
//!   cache        blobs/<algorithm>/<hex>, and <hex>.part while it is fetched
//!   client       requests of one repository: authorization, redirects, limits     credentials   config.json, helpers
//!   transport    HTTP/1.1, rustls with ring, proxies                              challenge     WWW-Authenticate
//! ```
//!
//! # Guarantees
//!
//! * Nothing of an image is parsed here, but for the digests that stand in documents: only those are fetched, so a process
//!   that asks cannot send other texts to the registry.
//! * A file gets its name in the cache when all its bytes, those of earlier attempts included, have the right digest.
//! * Documents, blobs, headers, replies of token services and redirects are limited.
//! * Credentials go to the registry and to the token service that it names, never to another host to which a redirect leads,
//!   and stand in no message. Where TLS is spoken, no redirect leads out of it.
//!
//! # Limits
//!
//! Pulls only; HTTP/1.1; no client certificates. Called by the command line: the daemon, its workers and the agent of service
//! VMs do not use this crate.

#![forbid(unsafe_code)]

mod cache;
mod challenge;
mod client;
mod credentials;
mod error;
mod fetch;
mod proxy;
mod transport;

pub use cache::default_cache;
pub use error::RegistryError;
pub use fetch::{Progress, Registry, Settings};
