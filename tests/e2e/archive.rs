//! Image archives as `docker save` writes and `docker load` reads them: taken apart, and made by hand.
//!
//! ```text
//!   manifest.json  [{ Config, RepoTags, Layers: [path, …] }]     <config>.json  { rootfs: { diff_ids }, … }
//!   <layer>/layer.tar                                            the layers, lowest first
//! ```

use crate::{
    manifest::sha256,
    tarball::{self, Entry, Kind},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, io::Read as _};

/// One image of an archive.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) config: Value,
    /// The layers' tars, lowest first.
    pub(crate) layers: Vec<Vec<u8>>,
}

impl Image {
    /// The digests that the image's configuration names.
    pub(crate) fn diff_ids(&self) -> Vec<String> {
        let ids = self.config["rootfs"]["diff_ids"].as_array().expect("diff_ids");
        ids.iter().map(|id| id.as_str().expect("a digest").to_owned()).collect()
    }

    /// Fails unless every layer's bytes have the digest that the image names.
    pub(crate) fn assert_digests(&self) {
        let found: Vec<String> = self.layers.iter().map(|l| format!("sha256:{}", sha256(l))).collect();
        assert_eq!(found, self.diff_ids(), "the saved layers have other digests than the image names");
    }
}

/// Reads the output of `docker save`.
pub(crate) fn read(archive: &[u8]) -> Vec<Image> {
    let entries = tarball::parse(archive);
    let mut files: BTreeMap<String, &[u8]> = BTreeMap::new();
    for entry in &entries {
        if let Kind::File(data) = &entry.kind {
            files.insert(String::from_utf8_lossy(&entry.path).into_owned(), data);
        }
    }
    // A layer that several images share is a link to its first copy.
    for entry in &entries {
        if let Kind::Symlink(target) = &entry.kind {
            let target = String::from_utf8_lossy(target).into_owned();
            let data = files[target.trim_start_matches("../")];
            files.insert(String::from_utf8_lossy(&entry.path).into_owned(), data);
        }
    }
    let manifest: Value = serde_json::from_slice(files["manifest.json"]).expect("manifest.json");
    let images = manifest.as_array().expect("a list of images").iter();
    images
        .map(|image| {
            let name = |v: &Value| v.as_str().expect("a path").to_owned();
            let layers = image["Layers"].as_array().expect("layers").iter();
            Image {
                config: serde_json::from_slice(files[&name(&image["Config"])]).expect("image configuration"),
                layers: layers.map(|l| unpacked(files[&name(l)])).collect(),
            }
        })
        .collect()
}

/// A layer's tar. Engines that keep what they pulled save it as it came.
fn unpacked(blob: &[u8]) -> Vec<u8> {
    const GZIP: &[u8] = &[0x1f, 0x8b];
    if !blob.starts_with(GZIP) {
        return blob.to_vec();
    }
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(blob).read_to_end(&mut tar).expect("a layer in gzip");
    tar
}

/// Makes an archive of one image. Its digests are right, whatever the layers' bytes are.
pub(crate) fn write(tag: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|l| format!("sha256:{}", sha256(l))).collect();
    let time = "2021-03-04T05:06:07Z";
    let history: Vec<Value> = layers.iter().map(|_| json!({"created": time, "created_by": "test"})).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": time, "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
    })
    .to_string();
    let name = format!("{}.json", sha256(config.as_bytes()));
    let paths: Vec<String> = (0..layers.len()).map(|n| format!("{n:04}/layer.tar")).collect();
    let manifest =
        json!([{"Config": name, "RepoTags": [format!("{tag}:latest")], "Layers": paths}]).to_string();
    let mut entries = vec![Entry::file(&name, config), Entry::file("manifest.json", manifest)];
    for (path, layer) in paths.iter().zip(layers) {
        entries.push(Entry::dir(path.split_once('/').expect("a folder").0));
        entries.push(Entry::file(path, layer));
    }
    tarball::build(&entries)
}
