//! Images in registries: how one is named, and its blobs. This crate fetches nothing.
//!
//! ```text
//!   docker://HOST[:PORT]/NAME[:TAG|@DIGEST] ─parse─► RegistryName
//!   descriptor ─► RemotePart::Document (index, manifest) or ::Blob (configuration, layer) ─► Files::remote ─► a file
//! ```
//!
//! Names are those of `distribution/reference`, but for the host, which must be there. Called by `source`.

use crate::{Blob, Blobs, Descriptor, Digest, Files, MediaKind, RemotePart, name::DOCKER_HUB, text::shown};
use std::{fmt, io, str::FromStr, sync::Arc};

/// Longest host and repository together (`NameTotalLengthMax`).
const MAX_NAME: usize = 255;
/// Longest tag.
const MAX_TAG: usize = 128;
/// The tag of a name that has none.
const DEFAULT_TAG: &str = "latest";

/// Which image of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistryReference {
    /// The image that has this tag now.
    Tag(String),
    /// The image whose manifest or index has this digest.
    Digest(Digest),
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// The name of an image in a registry. Its parts have no characters but those of names, so they can be parts of a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryName {
    host: String,
    repository: String,
    reference: RegistryReference,
}

impl RegistryName {
    /// Host, with its port if it was given; an address of IPv6 is in brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Tag or digest.
    pub fn reference(&self) -> &RegistryReference {
        &self.reference
    }

    /// Reads `HOST[:PORT]/NAME[:TAG|@DIGEST]`; gives the reason if it is none.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (host, rest) = text
            .split_once('/')
            .filter(|(host, _)| is_named(host))
            .ok_or("name the registry, too: docker://HOST[:PORT]/NAME[:TAG|@DIGEST]")?;
        if !is_host(host) {
            return Err(format!("{} is no host", shown(host)));
        }
        let (path, reference) = if let Some((path, digest)) = rest.split_once('@') {
            if path.contains(':') {
                return Err("give either a tag or a digest".to_owned());
            }
            let digest = digest.parse().map_err(|e: crate::DigestError| e.to_string())?;
            (path, RegistryReference::Digest(digest))
        } else {
            let (path, tag) = rest.split_once(':').unwrap_or((rest, DEFAULT_TAG));
            if !is_tag(tag) {
                return Err(format!("{} is no tag", shown(tag)));
            }
            (path, RegistryReference::Tag(tag.to_owned()))
        };
        if !path.split('/').all(is_component) || host.len() + path.len() >= MAX_NAME {
            return Err(format!("{} is no name of a repository, which has lower-case letters", shown(path)));
        }
        let host = host.to_ascii_lowercase();
        let host = if host == format!("index.{DOCKER_HUB}") { DOCKER_HUB.to_owned() } else { host };
        let library = if host == DOCKER_HUB && !path.contains('/') { "library/" } else { "" };
        Ok(Self { host, repository: format!("{library}{path}"), reference })
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.reference {
            RegistryReference::Tag(_) => ':',
            RegistryReference::Digest(_) => '@',
        };
        write!(f, "{}/{}{mark}{}", self.host, self.repository, self.reference)
    }
}

impl FromStr for RegistryName {
    type Err = crate::ImageError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).map_err(|reason| crate::ImageError::Usage(format!("{}: {reason}", shown(text))))
    }
}

/// Whether the first part of a name is a host and not a part of a repository's name.
fn is_named(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost"
}

/// Whether a text is a host with or without a port.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match rest.strip_prefix(':') {
                Some(port) => ("ipv6", Some(port)),
                None if rest.is_empty() => ("ipv6", None),
                None => return false,
            }
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.split('.').all(label)
        && port.is_none_or(|port| {
            port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
        })
}

/// Whether a text is a tag: `[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}`.
fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

/// Whether a text is a part of a repository's name: lower-case letters and digits, separated by `.`, `_`, `__` or hyphens.
fn is_component(text: &str) -> bool {
    let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let mut rest = text.as_bytes();
    loop {
        let word = rest.iter().take_while(|byte| plain(byte)).count();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        let between = rest.iter().take_while(|byte| !plain(byte)).count();
        match &rest[..between] {
            [] => return true,
            b"." | b"_" | b"__" => {}
            hyphens if hyphens.iter().all(|byte| *byte == b'-') => {}
            _ => return false,
        }
        rest = &rest[between..];
    }
}

/// The blobs of an image in a registry.
#[derive(Debug)]
pub(crate) struct RegistryBlobs {
    pub(crate) files: Arc<dyn Files>,
}

impl Blobs for RegistryBlobs {
    fn open(&self, descriptor: &Descriptor) -> io::Result<Blob> {
        let (digest, size) = (descriptor.digest, descriptor.size);
        let document = match descriptor.media_type.kind() {
            MediaKind::Index | MediaKind::Manifest | MediaKind::Schema1 => true,
            // Only an index has entries without a type.
            _ => descriptor.media_type.0.is_empty(),
        };
        let part =
            if document { RemotePart::Document { digest, size } } else { RemotePart::Blob { digest, size } };
        let file = self.files.remote(&part)?;
        Ok(Blob { size: file.metadata()?.len(), bytes: Box::new(file) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_host_and_parts_that_can_stand_in_a_url() {
        let digest = Digest::sha256(b"");
        let by_digest = format!("localhost/a/b@{digest}");
        for (text, host, repository, reference) in [
            ("127.0.0.1:5000/app", "127.0.0.1:5000", "app", "latest"),
            ("Registry.Example/team/app-x__y.z:1.0_A", "registry.example", "team/app-x__y.z", "1.0_A"),
            ("[::1]:5000/a--b", "[::1]:5000", "a--b", "latest"),
            ("docker.io/busybox:1", "docker.io", "library/busybox", "1"),
            ("index.docker.io/a/b", "docker.io", "a/b", "latest"),
            (&by_digest, "localhost", "a/b", &digest.to_string()),
        ] {
            let name = RegistryName::parse(text).unwrap();
            assert_eq!((name.host(), name.repository()), (host, repository), "{text}");
            assert_eq!(name.reference().to_string(), reference, "{text}");
            assert_eq!(name.to_string().parse::<RegistryName>().unwrap(), name, "{text}");
        }
        let long = format!("localhost/{}", "a".repeat(MAX_NAME));
        let both = format!("localhost/a:b@{digest}");
        for bad in [
            "",
            "busybox",
            "library/busybox",
            "localhost",
            "localhost/",
            "localhost:5000",
            "localhost:/a",
            "localhost:0/a",
            "localhost:99999/a",
            "localhost:+1/a",
            "-x.y/a",
            "x..y/a",
            "user:pw@host.x/a",
            "host.x@y/a",
            "[::1/a",
            "[::x]/a",
            "host.x/A",
            "host.x/a//b",
            "host.x/../b",
            "host.x/a/.",
            "host.x/a___b",
            "host.x/a._b",
            "host.x/a-",
            "host.x/a:",
            "host.x/a:-x",
            "host.x/a:b:c",
            "host.x/a:b/c",
            "host.x/a?b",
            "host.x/a%2fb",
            "host.x/a b",
            "host.x/a\r\nx",
            "host.x/a@sha256:00",
            "host.x/a@",
            &both,
            &long,
        ] {
            assert!(RegistryName::parse(bad).is_err(), "{bad}");
        }
    }
}
