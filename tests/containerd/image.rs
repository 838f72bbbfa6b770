//! Images made by hand: layers of every kind, packed in every way, as an OCI layout, a Docker archive, or the blobs of a
//! registry.
//!
//! ```text
//!   entries ─tar─► diffID ─gzip, zstd─► blob ─┐
//!                                             ├─ config, manifest ─► oci_archive | docker_archive | blobs
//!   entries ─tar─► diffID ─────────────► blob ┘
//!        └──────► tree: what a container of it must see
//! ```

use crate::{
    tarball::{self, Entry, Kind},
    tree::{Tree, sha256},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, io::Write as _};

/// Media type of a manifest.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a plain layer; `+gzip` and `+zstd` are appended.
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Magic number of a zstd frame that decoders skip (RFC 8878, 3.1.2).
const SKIPPABLE: u32 = 0x184d_2a50;
/// Bytes of the large file: more than one chunk of containerd's content API.
pub(crate) const LARGE: usize = (3 << 20) + 17;
/// Links to busybox that the tests call.
const APPLETS: &[&str] = &[
    "sh", "cat", "chmod", "chown", "cp", "dd", "df", "echo", "find", "head", "id", "ln", "ls", "mkdir",
    "mkfifo", "mknod", "mv", "rm", "rmdir", "seq", "sleep", "stat", "sync", "touch", "true", "wc",
];

/// How a layer's tar becomes a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    /// Several gzip members one after the other, as parallel compressors write them.
    GzipMembers,
    Zstd,
    /// A frame that is skipped before and after the data, as zstd:chunked has them.
    ZstdSkippable,
}

impl Packing {
    fn pack(self, tar: &[u8]) -> Vec<u8> {
        let gzip = |bytes: &[u8]| {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            out.write_all(bytes).expect("gzip");
            out.finish().expect("gzip")
        };
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).expect("zstd");
        let skippable = [&SKIPPABLE.to_le_bytes()[..], &7_u32.to_le_bytes(), b"skipped"].concat();
        match self {
            Self::Plain => tar.to_vec(),
            Self::Gzip => gzip(tar),
            Self::GzipMembers => tar.chunks(tar.len().div_ceil(3)).flat_map(gzip).collect(),
            Self::Zstd => zstd(tar),
            Self::ZstdSkippable => [&skippable[..], &zstd(tar), &skippable].concat(),
        }
    }

    fn media_type(self) -> String {
        match self {
            Self::Plain => LAYER.to_owned(),
            Self::Gzip | Self::GzipMembers => format!("{LAYER}+gzip"),
            Self::Zstd | Self::ZstdSkippable => format!("{LAYER}+zstd"),
        }
    }
}

/// The digest of some bytes, as images name them.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

/// One layer of an image.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) entries: Vec<Entry>,
    pub(crate) tar: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) media_type: String,
}

impl Layer {
    pub(crate) fn new(entries: Vec<Entry>, packing: Packing) -> Self {
        let tar = tarball::build(&entries);
        Self { blob: packing.pack(&tar), media_type: packing.media_type(), tar, entries }
    }

    /// A layer that somebody else packed; `tar` is what is in it.
    pub(crate) fn packed(tar: Vec<u8>, blob: Vec<u8>, media_type: &str) -> Self {
        Self { entries: tarball::parse(&tar), tar, blob, media_type: media_type.to_owned() }
    }

    pub(crate) fn diff_id(&self) -> String {
        digest(&self.tar)
    }

    pub(crate) fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": digest(&self.blob), "size": self.blob.len() })
    }
}

/// One image.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) layers: Vec<Layer>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"] },
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(Layer::diff_id).collect::<Vec<_>>() },
        });
        let config = serde_json::to_vec(&config).expect("JSON");
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": { "mediaType": CONFIG, "digest": digest(&config), "size": config.len() },
            "layers": layers.iter().map(Layer::descriptor).collect::<Vec<_>>(),
        });
        Self { config, manifest: serde_json::to_vec(&manifest).expect("JSON"), layers }
    }

    /// What a container of this image must see.
    pub(crate) fn tree(&self) -> Tree {
        let mut tree = Tree::default();
        for layer in &self.layers {
            tree.apply(&layer.entries);
        }
        tree
    }

    /// The same image with a layer more.
    pub(crate) fn with(&self, layer: Layer) -> Self {
        Self::new(self.layers.iter().cloned().chain([layer]).collect())
    }

    /// The manifest's digest.
    pub(crate) fn digest(&self) -> String {
        digest(&self.manifest)
    }

    /// Chain ids of the layers, lowest first, which are the names of their snapshots (image-spec, config.md, ChainID).
    pub(crate) fn chain_ids(&self) -> Vec<String> {
        let mut chain: Vec<String> = Vec::new();
        for layer in &self.layers {
            let id = match chain.last() {
                None => layer.diff_id(),
                Some(below) => digest(format!("{below} {}", layer.diff_id()).as_bytes()),
            };
            chain.push(id);
        }
        chain
    }

    /// All blobs by digest; the manifest is one of them.
    pub(crate) fn blobs(&self) -> BTreeMap<String, Vec<u8>> {
        let own = [self.config.clone(), self.manifest.clone()];
        let blobs = self.layers.iter().map(|l| l.blob.clone()).chain(own);
        blobs.map(|blob| (digest(&blob), blob)).collect()
    }

    /// An OCI image layout as a tar, which names the image `name`.
    pub(crate) fn oci_archive(&self, name: &str) -> Vec<u8> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": MANIFEST,
                "digest": self.digest(),
                "size": self.manifest.len(),
                "platform": { "architecture": "amd64", "os": "linux" },
                "annotations": { "io.containerd.image.name": name },
            }],
        });
        let mut files = vec![
            Entry::file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#),
            Entry::file("index.json", serde_json::to_vec(&index).expect("JSON")),
        ];
        let path = |digest: &str| format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"));
        files.extend(self.blobs().into_iter().map(|(digest, blob)| Entry::file(path(&digest), blob)));
        tarball::build(&files)
    }

    /// A Docker archive, whose layers are plain tars.
    pub(crate) fn docker_archive(&self, name: &str) -> Vec<u8> {
        let layer = |n: usize| format!("{n}/layer.tar");
        let layers: Vec<String> = (0..self.layers.len()).map(layer).collect();
        let config = format!("{}.json", sha256(&self.config));
        let manifest = json!([{ "Config": config, "RepoTags": [name], "Layers": layers }]);
        let mut files = vec![
            Entry::file("manifest.json", serde_json::to_vec(&manifest).expect("JSON")),
            Entry::file(&config, &self.config),
        ];
        for (path, layer) in layers.iter().zip(&self.layers) {
            files.push(Entry::dir(path.split_once('/').expect("a folder").0));
            files.push(Entry::file(path, &layer.tar));
        }
        tarball::build(&files)
    }
}

/// Bytes that do not compress and are the same in every run (xorshift).
pub(crate) fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Enough to run a shell: directories, busybox, its applets. What runc mounts on is there, so that it makes nothing.
pub(crate) fn shell() -> Vec<Entry> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|p| std::fs::read(p).ok());
    let busybox = busybox.expect("busybox (apt-get install busybox-static)");
    let mut entries: Vec<Entry> =
        ["bin/", "dev/", "etc/", "proc/", "run/", "sys/", "tmp/", "data/"].iter().map(Entry::dir).collect();
    entries[6].mode = 0o1777;
    entries.push(Entry::file("bin/busybox", busybox).mode(0o755));
    entries.extend(APPLETS.iter().map(|a| Entry::symlink(format!("bin/{a}"), "busybox")));
    entries.push(Entry::file("etc/passwd", "root:x:0:0:root:/:/bin/sh\n"));
    entries
}

/// The mount points of a container that ctr starts: what runc mounts hides them.
pub(crate) const MOUNT_POINTS: &[&str] = &["/dev", "/proc", "/run", "/sys"];

/// The lowest layer of [`full`]: a shell, and one of everything.
fn lowest() -> Vec<Entry> {
    let mut entries = shell();
    // cap_net_raw, effective and permitted, version 2 (capability.h, struct vfs_cap_data).
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    entries.extend([
        Entry::dir("data/nested/").mode(0o750).owner(1000, 1001),
        Entry::dir("data/nested/deeper/").mode(0o2775),
        Entry::file("data/nested/deeper/file", "deep\n").owner(1000, 1000).mode(0o600),
        Entry::file("data/empty", ""),
        Entry::file("data/large", random_bytes(1, LARGE)),
        Entry::file("data/linked", "one file, three names\n").mode(0o640),
        Entry::hard_link("data/linked-2", "data/linked").mode(0o640),
        Entry::hard_link("data/nested/linked-3", "data/linked").mode(0o640),
        Entry::symlink("data/relative", "nested/deeper/file"),
        Entry::symlink("data/absolute", "/data/large"),
        Entry::symlink("data/dangling", "../../no/such/thing"),
        Entry::symlink("data/long", [b'x'; 200]),
        Entry::symlink("data/folder-link", "nested").owner(3, 4),
        Entry::file("data/setuid", "#!/bin/sh\n").mode(0o4755),
        Entry::file("data/setgid", "#!/bin/sh\n").mode(0o2711),
        Entry::file("data/attribute", "has attributes\n").xattr("user.note", b"value\0with\nbytes\xff"),
        Entry::file("data/capable", "#!/bin/sh\n").mode(0o755).xattr("security.capability", capability),
        Entry::dir("data/attributes/").xattr("user.on", "a directory"),
        Entry::file("data/old", "from 1970\n").mtime(1, 0),
        Entry::file("data/new", "from 2100\n").mtime(4_102_444_800, 999_999_999),
        Entry::file("data/ids", "many\n").owner(1_000_000, 2_000_001),
        Entry::dir("data/odd/"),
        Entry::file("data/odd/with space", "1"),
        Entry::file("data/odd/with\nnewline", "2"),
        Entry::file("data/odd/-dash", "3"),
        Entry::file("data/odd/back\\slash\"quote'", "4"),
        Entry::file("data/odd/\u{fc}ml\u{e4}ut-\u{65e5}\u{672c}", "5"),
        Entry::file(b"data/odd/not-utf8-\xff\xfe".as_slice(), "6"),
        Entry::file([b"data/odd/".as_slice(), &[b'n'; 255]].concat(), "7"),
        Entry::dir("data/nodes/"),
        Entry::new("data/nodes/null", Kind::CharDevice(1, 3), 0o666),
        Entry::new("data/nodes/block", Kind::BlockDevice(7, 300), 0o660),
        Entry::new("data/nodes/pipe", Kind::Fifo, 0o622),
        Entry::dir("data/kept/").mode(0o700).owner(7, 8),
        Entry::dir("data/opaque/"),
        Entry::file("data/opaque/hidden", "hidden"),
        Entry::dir("data/opaque/below/"),
        Entry::file("data/opaque/below/hidden-too", "hidden"),
        Entry::file("data/becomes-a-directory", "file"),
        Entry::dir("data/becomes-a-file/"),
        Entry::file("data/becomes-a-file/inside", "gone"),
    ]);
    entries
}

/// An image with everything that a layer can hold, whose layers are packed in every way.
pub(crate) fn full() -> Image {
    let changes = vec![
        Entry::dir("data/"),
        Entry::file("data/.wh.empty", ""),
        Entry::file("data/.wh.odd", ""),
        Entry::file("data/.wh.linked-2", ""),
        Entry::dir("data/opaque/").mode(0o711),
        Entry::file("data/opaque/.wh..wh..opq", ""),
        Entry::file("data/opaque/shown", "shown"),
        Entry::dir("data/becomes-a-directory/"),
        Entry::file("data/becomes-a-directory/inside", "new"),
        Entry::file("data/becomes-a-file", "file now"),
        Entry::file("data/old", "changed\n").mode(0o444),
        // Same content, another mode.
        Entry::file("data/setuid", "#!/bin/sh\n").mode(0o755),
        Entry::file("data/again", "one file, two names\n"),
        Entry::hard_link("data/nested/again-2", "data/again"),
    ];
    // Directories that no entry of the layer describes: of a lower layer, with its modes, and new ones.
    let implied = vec![
        Entry::file("tmp/in-tmp", "sticky stays"),
        Entry::file("data/kept/inside", "0700 stays"),
        Entry::file("made/by/name", "0755 of root"),
        Entry::file("data/attributes/inside", "the attribute stays"),
    ];
    let last = vec![
        Entry::file("data/empty", "is back\n").owner(9, 9),
        Entry::file("data/large-too", random_bytes(2, LARGE)),
        Entry::file("made/.wh.by", ""),
    ];
    Image::new(vec![
        Layer::new(lowest(), Packing::Gzip),
        Layer::new(changes, Packing::ZstdSkippable),
        Layer::new(Vec::new(), Packing::Zstd),
        Layer::new(implied, Packing::Plain),
        Layer::new(last, Packing::GzipMembers),
    ])
}

/// A small image: a shell and one file, which `seed` chooses.
pub(crate) fn small(seed: u64) -> Image {
    let file = Entry::file("data/seeded", random_bytes(seed, 100_000));
    Image::new(vec![Layer::new(shell(), Packing::Gzip), Layer::new(vec![file], Packing::Gzip)])
}

/// An image in which one layer with files and the empty one are there twice, with another in between that hides the files.
pub(crate) fn repeated() -> Image {
    let files = || {
        let entries = vec![
            Entry::dir("data/"),
            Entry::file("data/one", "first\n"),
            Entry::file("data/two", "second\n"),
        ];
        Layer::new(entries, Packing::Gzip)
    };
    let hides =
        vec![Entry::dir("data/"), Entry::file("data/.wh.one", ""), Entry::file("data/two", "changed\n")];
    let empty = || Layer::new(Vec::new(), Packing::Gzip);
    let layers = vec![
        Layer::new(shell(), Packing::Gzip),
        files(),
        empty(),
        Layer::new(hides, Packing::Gzip),
        files(),
        empty(),
    ];
    Image::new(layers)
}
