//! What a jailed command and its parent say to each other: one request, one reply, each one message.
//!
//! ```text
//!   child ── Request (JSON) ──► parent          parent ── Reply (JSON) + descriptor ──► child
//! ```
//!
//! Files are named by their place on the command line, so a request cannot name a path. Called by `parent` and `child`.

use oci_image::{Digest, ImageError, LayoutFile, RemotePart};
use serde::{Deserialize, Serialize};
use std::{error::Error, fmt::Write as _, io};

/// Longest message in bytes.
pub(super) const MAX_MESSAGE: usize = 16 << 10;

/// What the child asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Request {
    /// The archive of a source.
    Archive {
        /// Its place among the sources.
        source: usize,
    },
    /// `oci-layout` of a source.
    Layout {
        /// Its place among the sources.
        source: usize,
    },
    /// `index.json` of a source.
    Index {
        /// Its place among the sources.
        source: usize,
    },
    /// A blob of a source.
    Blob {
        /// Its place among the sources.
        source: usize,
        /// Its digest.
        digest: Digest,
    },
    /// The manifest or index to which the name of a source in a registry leads.
    Named {
        /// Its place among the sources.
        source: usize,
    },
    /// A manifest or an index of a source in a registry.
    Document {
        /// Its place among the sources.
        source: usize,
        /// Its digest.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
    /// A configuration or a layer of a source in a registry.
    Remote {
        /// Its place among the sources.
        source: usize,
        /// Its digest.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
    /// An unnamed file.
    Scratch {
        /// The source that it is for.
        source: usize,
    },
    /// A file to read.
    Input {
        /// Its place among the files that are read.
        input: usize,
    },
    /// A pipe or device to write to, if that is what is there.
    Stream {
        /// Its place among the files that are written.
        output: usize,
    },
    /// A new file, under a temporary name.
    Create {
        /// Its place among the files that are written.
        output: usize,
    },
    /// An unnamed file beside a new file.
    Beside {
        /// The number of the new file.
        file: usize,
    },
    /// `oci-layout` of the layout that is written, as a new file.
    NewLayout {
        /// Its place among the sources.
        source: usize,
    },
    /// `index.json` of the layout that is written, as a new file.
    NewIndex {
        /// Its place among the sources.
        source: usize,
    },
    /// A blob of the layout that is written, as a new file.
    NewBlob {
        /// Its place among the sources.
        source: usize,
        /// Its digest.
        digest: Digest,
    },
    /// Gives a new file its name.
    Commit {
        /// The number of the new file.
        file: usize,
    },
    /// The directory that is made, under a temporary name.
    Directory,
    /// A new file of this directory.
    Member {
        /// Its name there.
        name: String,
    },
    /// An unnamed file beside its files.
    DirectoryScratch,
    /// Gives the directory its name.
    CommitDirectory,
}

impl Request {
    /// A file of a layout.
    pub(super) fn layout(source: usize, name: &LayoutFile) -> Self {
        match name {
            LayoutFile::Layout => Self::Layout { source },
            LayoutFile::Index => Self::Index { source },
            LayoutFile::Blob(digest) => Self::Blob { source, digest: *digest },
        }
    }

    /// A part of an image in a registry.
    pub(super) fn remote(source: usize, part: &RemotePart) -> Self {
        match *part {
            RemotePart::Named => Self::Named { source },
            RemotePart::Document { digest, size } => Self::Document { source, digest, size },
            RemotePart::Blob { digest, size } => Self::Remote { source, digest, size },
        }
    }

    /// A new file of a layout.
    pub(super) fn new_in_layout(source: usize, name: &LayoutFile) -> Self {
        match name {
            LayoutFile::Layout => Self::NewLayout { source },
            LayoutFile::Index => Self::NewIndex { source },
            LayoutFile::Blob(digest) => Self::NewBlob { source, digest: *digest },
        }
    }

    /// The place of its source, if it is about one.
    pub(super) fn source(&self) -> Option<usize> {
        match self {
            Self::Archive { source }
            | Self::Layout { source }
            | Self::Index { source }
            | Self::Blob { source, .. }
            | Self::Named { source }
            | Self::Document { source, .. }
            | Self::Remote { source, .. }
            | Self::NewLayout { source }
            | Self::NewIndex { source }
            | Self::NewBlob { source, .. }
            | Self::Scratch { source } => Some(*source),
            Self::Input { .. }
            | Self::Stream { .. }
            | Self::Create { .. }
            | Self::Beside { .. }
            | Self::Commit { .. }
            | Self::Directory
            | Self::Member { .. }
            | Self::DirectoryScratch
            | Self::CommitDirectory => None,
        }
    }
}

/// What the parent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reply {
    /// The descriptor comes with this message.
    File {
        /// For a scratch file: bytes that it may take. For a new file: its number.
        room: u64,
    },
    /// It is done, or there is nothing to open.
    Done,
    /// The system's error.
    Errno(i32),
    /// It is not there, and why.
    NotFound(String),
    /// Something that is not supported.
    Unsupported {
        /// What.
        what: String,
        /// Why.
        reason: String,
    },
    /// Another error.
    Failed(String),
}

impl From<io::Error> for Reply {
    fn from(error: io::Error) -> Self {
        if let Some(errno) = error.raw_os_error() {
            return Self::Errno(errno);
        }
        match error.downcast::<ImageError>() {
            Ok(ImageError::Unsupported { what, reason }) => Self::Unsupported { what, reason },
            Ok(other) => Self::Failed(other.to_string()),
            Err(other) if other.kind() == io::ErrorKind::NotFound => Self::NotFound(with_causes(&other)),
            Err(other) => Self::Failed(with_causes(&other)),
        }
    }
}

/// The text of an error and of its causes.
fn with_causes(error: &io::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    text
}

impl Reply {
    /// The error that it stands for; with a descriptor, its room.
    pub(super) fn into_result(self) -> io::Result<Option<u64>> {
        match self {
            Self::File { room } => Ok(Some(room)),
            Self::Done => Ok(None),
            Self::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
            Self::NotFound(text) => Err(io::Error::new(io::ErrorKind::NotFound, text)),
            Self::Unsupported { what, reason } => Err(ImageError::Unsupported { what, reason }.into()),
            Self::Failed(text) => Err(io::Error::other(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_arrive_as_they_were() {
        let missing = Reply::from(io::Error::from_raw_os_error(2)).into_result().unwrap_err();
        assert_eq!((missing.kind(), missing.raw_os_error()), (io::ErrorKind::NotFound, Some(2)));
        let link = ImageError::Unsupported { what: "index.json".into(), reason: "a link".into() };
        let text = link.to_string();
        let link = Reply::from(io::Error::from(link)).into_result().unwrap_err();
        assert_eq!(link.downcast::<ImageError>().unwrap().to_string(), text);
        let none = io::Error::new(io::ErrorKind::NotFound, "no such tag");
        let none = Reply::from(none).into_result().unwrap_err();
        assert_eq!((none.kind(), none.to_string().as_str()), (io::ErrorKind::NotFound, "no such tag"));
        assert_eq!(Reply::File { room: 7 }.into_result().unwrap(), Some(7));
    }

    #[test]
    fn a_request_names_no_path() {
        for bad in [
            r#"{"blob":{"source":0,"digest":"../../etc/passwd"}}"#,
            r#"{"blob":{"source":0,"digest":"sha256:..", "path":"/etc/passwd"}}"#,
            r#"{"archive":{"source":0,"path":"/etc/passwd"}}"#,
            r#"{"open":{"path":"/etc/passwd"}}"#,
            r#"{"create":{"output":"/etc/passwd"}}"#,
            r#"{"archive":{"source":-1}}"#,
            r#"{"remote":{"source":0,"digest":"sha256:../x","size":1}}"#,
            r#"{"named":{"source":0,"name":"host/app"}}"#,
            "",
        ] {
            assert!(serde_json::from_str::<Request>(bad).is_err(), "{bad}");
        }
        let request = Request::layout(1, &LayoutFile::Blob(Digest::sha256(b"")));
        let text = serde_json::to_string(&request).unwrap();
        assert!(text.len() < MAX_MESSAGE);
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
