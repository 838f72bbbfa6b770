//! A layout in a directory: new, or one that gains an image.
//!
//! ```text
//!   blobs/sha256/.tmp… ─ write, sync, rename ─► blobs/sha256/<hex>        those that are there stay
//!   .tmp… ─ write, sync, rename ─► index.json                             last: the image appears whole or not at all
//! ```
//!
//! [`LayoutOut`] writes the files, [`DirectLayout`] in this process. Two writers of one layout at the same time are not kept
//! apart: the index of the one that renames last counts.

use super::{NewImage, archives};
use crate::{Digest, Direct, Document, Files, ImageError, Index, LayoutFile, Limits, MediaType, Place};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// Fills a file.
pub type Fill<'a> = dyn FnMut(&mut File) -> Result<(), ImageError> + 'a;

/// A layout that can be written.
pub trait LayoutOut {
    /// Opens a file that is there.
    ///
    /// # Errors
    /// `NotFound`; any error of the system.
    fn open(&self, name: &LayoutFile) -> io::Result<File>;

    /// Makes a file of this name, or replaces it, when `fill` has written it and it is durable.
    ///
    /// # Errors
    /// That of `fill`; [`ImageError::Write`].
    fn place(&self, name: &LayoutFile, fill: &mut Fill<'_>) -> Result<(), ImageError>;

    /// Makes the names in the layout's directories durable.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    fn sync(&self) -> Result<(), ImageError>;
}

/// Writes a layout in this process.
#[derive(Debug, Clone)]
pub struct DirectLayout {
    directory: PathBuf,
}

impl DirectLayout {
    /// The layout in `directory`, which is made if it is not there.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }
}

/// The error of writing a file, or in a directory, of the layout.
fn writing(what: String) -> impl Fn(io::Error) -> ImageError {
    move |source| ImageError::Write { what: what.clone(), source }
}

impl LayoutOut for DirectLayout {
    fn open(&self, name: &LayoutFile) -> io::Result<File> {
        Direct::new(Place::Directory(self.directory.clone()), None).layout(name)
    }

    fn place(&self, name: &LayoutFile, fill: &mut Fill<'_>) -> Result<(), ImageError> {
        let path = self.directory.join(name.path());
        let folder = path.parent().unwrap_or(&self.directory);
        let failed = writing(name.path());
        fs::create_dir_all(folder).map_err(&failed)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".tmp");
        #[cfg(unix)]
        // The umask removes the permissions that a new file must not have.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder).map_err(&failed)?;
        fill(file.as_file_mut())?;
        file.as_file().sync_all().map_err(&failed)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        Ok(())
    }

    fn sync(&self) -> Result<(), ImageError> {
        #[cfg(unix)]
        for folder in [self.directory.join("blobs").join("sha256"), self.directory.clone()] {
            let failed = writing("the layout".to_owned());
            File::open(&folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
        }
        Ok(())
    }
}

/// Writes an image under a tag; an image that has this tag already loses it, and its blobs stay. Gives the digest of the
/// manifest.
///
/// # Errors
/// [`ImageError::Write`]; those of the blobs that are copied; those of an index that is there and cannot be read.
pub fn write_layout(out: &dyn LayoutOut, reference: &str, image: &NewImage) -> Result<Digest, ImageError> {
    let (config, manifest) = image.documents(Some(reference))?;
    let index = index(out, reference, archives::index(&manifest))?;
    for (digest, (n, new)) in image.blobs() {
        let name = LayoutFile::Blob(digest);
        // It got its name when it was complete.
        let there = out.open(&name).and_then(|file| file.metadata());
        if !there.is_ok_and(|known| known.len() == new.layer.descriptor.size) {
            out.place(&name, &mut |file| archives::copy_blob(n, new, file))?;
        }
    }
    let bytes = |name: LayoutFile, bytes: &[u8]| {
        let what = name.path();
        out.place(&name, &mut |file| {
            file.write_all(bytes).map_err(|source| ImageError::Write { what: what.clone(), source })
        })
    };
    for document in [&config, &manifest] {
        bytes(LayoutFile::Blob(document.descriptor.digest), &document.bytes)?;
    }
    bytes(LayoutFile::Layout, archives::LAYOUT)?;
    bytes(LayoutFile::Index, &super::to_json(&index)?)?;
    out.sync()?;
    Ok(manifest.descriptor.digest)
}

/// The index of the layout, with the new image in it.
fn index(out: &dyn LayoutOut, reference: &str, new: Index) -> Result<Index, ImageError> {
    let what = LayoutFile::Index.path();
    let limit = Limits::default().document_bytes;
    let mut bytes = Vec::new();
    match out.open(&LayoutFile::Index) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(new),
        Err(e) => return Err(ImageError::reading(&what, e)),
        Ok(file) => {
            file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| ImageError::reading(&what, e))?;
        }
    }
    if bytes.len() as u64 > limit {
        return Err(ImageError::limit(what, format!("more than {limit} bytes")));
    }
    let Document::Index(mut index) =
        Document::parse(&what, &bytes, &MediaType::default(), &Limits::default())?
    else {
        return Err(ImageError::corrupt(what, "it is not an index"));
    };
    index
        .manifests
        .retain(|entry| entry.annotations.get(crate::REF_NAME).is_none_or(|name| name != reference));
    index.manifests.extend(new.manifests);
    Ok(index)
}
