//! Why an image could not be fetched, and what to do.
//!
//! Text that comes from a registry is escaped and truncated before it becomes part of a message. No message has a password
//! or a token. Called by everything in this crate.

use oci_image::Digest;
use std::io;

/// An error of fetching a part of an image; `host` and `repository` are those of the image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The registry or its token service wants other credentials.
    #[error(
        "{host} refused access to {repository}: {reason}; log in with `docker login {host}`, or check the name"
    )]
    Unauthorized {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
        /// What it said, or what is missing.
        reason: String,
    },
    /// The registry does not have it.
    #[error("{host} has no {what} in {repository}; check the name")]
    NotFound {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
        /// What was asked for.
        what: String,
    },
    /// The certificate of a host is not accepted.
    #[error(
        "the certificate of {host} is not accepted: {reason}; if its authority is yours, name it with --ca FILE"
    )]
    Certificate {
        /// The host.
        host: String,
        /// Why.
        reason: String,
    },
    /// A host does not speak TLS.
    #[error("{host} does not speak TLS: {reason}; use --plain-http if it is meant to be reached without it")]
    NoTls {
        /// The host.
        host: String,
        /// What was received.
        reason: String,
    },
    /// A host cannot be reached.
    #[error("cannot connect to {host}; check its name and port, and the variables for proxies")]
    Connect {
        /// The host, or its proxy.
        host: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// Another status than expected.
    #[error("{host} answered {status} for {what} in {repository}{reason}")]
    Status {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
        /// What was asked for.
        what: String,
        /// The status of HTTP.
        status: u16,
        /// What it said, after a colon, or nothing.
        reason: String,
    },
    /// A host breaks the protocol.
    #[error("{host} sent an invalid reply for {what}: {reason}")]
    Protocol {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Bytes do not have the digest that names them.
    #[error(
        "digest mismatch of {what} from {host}: expected {expected}, found {found}; it is corrupt in the registry or on the way"
    )]
    Digest {
        /// The registry.
        host: String,
        /// What was fetched.
        what: String,
        /// The digest that names it.
        expected: Box<Digest>,
        /// The digest of its bytes.
        found: Box<Digest>,
    },
    /// More bytes, documents or redirects than are accepted.
    #[error("{what} from {host} exceeds a limit: {reason}")]
    Limit {
        /// The host.
        host: String,
        /// What was fetched.
        what: String,
        /// The limit.
        reason: String,
    },
    /// A digest was asked for that no document of the image names.
    #[error("no document of the image names {0}")]
    Unnamed(Box<Digest>),
    /// The connection was lost again and again.
    #[error(
        "the connection to {host} was lost after {have} of {size} bytes of {what}; the next attempt continues there"
    )]
    Interrupted {
        /// The registry.
        host: String,
        /// What was fetched.
        what: String,
        /// Bytes in the cache.
        have: u64,
        /// All its bytes.
        size: u64,
        /// The last error of the system.
        #[source]
        source: io::Error,
    },
    /// A file with credentials, or of certificates, or a variable cannot be used.
    #[error("cannot use {what}: {reason}")]
    Configuration {
        /// The file, the helper or the variable.
        what: String,
        /// Why.
        reason: String,
    },
    /// The cache cannot be used.
    #[error("cannot use the cache at {path}; name another directory with --cache")]
    Cache {
        /// The file or directory.
        path: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
}

impl From<RegistryError> for io::Error {
    /// What the registry does not have is `NotFound`. The [`RegistryError`] is inside, with its causes.
    fn from(error: RegistryError) -> Self {
        let kind = match &error {
            RegistryError::NotFound { .. } => io::ErrorKind::NotFound,
            RegistryError::Unauthorized { .. } => io::ErrorKind::PermissionDenied,
            RegistryError::Connect { source, .. } | RegistryError::Cache { source, .. } => source.kind(),
            RegistryError::Interrupted { .. } => io::ErrorKind::ConnectionReset,
            _ => io::ErrorKind::InvalidData,
        };
        // A missing directory for the cache is no missing blob.
        let kind = match (&error, kind) {
            (RegistryError::NotFound { .. }, kind) => kind,
            (_, io::ErrorKind::NotFound) => io::ErrorKind::Other,
            (_, kind) => kind,
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_registry_does_not_have_is_not_found() {
        let missing =
            RegistryError::NotFound { host: "h.x".into(), repository: "a".into(), what: "tag \"b\"".into() };
        let missing = io::Error::from(missing);
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert_eq!(missing.to_string(), "h.x has no tag \"b\" in a; check the name");
        let source = io::Error::from(io::ErrorKind::NotFound);
        let cache = io::Error::from(RegistryError::Cache { path: "/x".into(), source });
        assert_eq!(cache.kind(), io::ErrorKind::Other);
    }
}
