//! Whole images: every kind of source with every compression, and what must be refused.

use crate::{
    Descriptor, Digest, Files, Image, ImageError, ImageErrorKind, LayoutFile, Limits, Options, Platform,
    RemotePart, Scratch, Source, media,
    testing::{PACKINGS, Packing, Store, Tar, archive, directory, pack},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

/// A directory with files of a test.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// A layout in a directory.
    fn layout(&self, files: &[(String, Vec<u8>)]) -> Source {
        let path = self.path().join("layout");
        directory(&path, files);
        Source::Layout { directory: path, reference: None }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn oci_archive(&self, bytes: &[u8]) -> Source {
        Source::OciArchive { file: self.file("oci.tar", bytes), reference: None }
    }

    fn docker_archive(&self, bytes: &[u8]) -> Source {
        Source::DockerArchive { file: self.file("docker.tar", bytes), reference: None }
    }
}

fn named(source: &Source, name: &str) -> Source {
    let reference = Some(name.to_owned());
    match source.clone() {
        Source::Layout { directory, .. } => Source::Layout { directory, reference },
        Source::OciArchive { file, .. } => Source::OciArchive { file, reference },
        Source::DockerArchive { file, .. } => Source::DockerArchive { file, reference },
        other @ (Source::Stdin | Source::Registry(_)) => other,
    }
}

fn open(source: &Source) -> Result<Image, ImageError> {
    source.open(&Options::default())
}

fn for_platform(source: &Source, platform: &str) -> Result<Image, ImageError> {
    source.open(&Options { platform: Some(platform.parse().unwrap()), ..Options::default() })
}

fn kind<T>(result: Result<T, ImageError>) -> ImageErrorKind {
    match result {
        Ok(_) => panic!("it was accepted"),
        Err(e) => e.kind(),
    }
}

/// The plain bytes of a layer.
fn plain(image: &Image, index: usize) -> Result<Vec<u8>, ImageError> {
    let mut layer = image.open_layer(index)?;
    let mut bytes = Vec::new();
    layer.read_to_end(&mut bytes).map_err(|e| e.downcast::<ImageError>().unwrap())?;
    let summary = layer.finish()?;
    assert_eq!(summary.plain_bytes, bytes.len() as u64);
    assert_eq!(summary.blob_bytes, image.layers()[index].descriptor.size);
    Ok(bytes)
}

fn tars() -> [Vec<u8>; 3] {
    let noise: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    [
        Tar::default().dir("bin").file("bin/sh", &noise).symlink("sh", "bin/sh").finish(),
        Tar::default().file("bin/sh", b"another").finish(),
        Tar::default().whiteout("", "sh").finish(),
    ]
}

fn image_of(packing: Packing) -> Store {
    let mut store = Store::default();
    let tars = tars();
    let layers: Vec<(&[u8], Packing)> = tars.iter().map(|tar| (tar.as_slice(), packing)).collect();
    let manifest = store.manifest("linux/amd64", &layers);
    store.list(manifest, "1.0");
    store
}

#[test]
fn every_source_gives_the_same_layers_for_every_compression() {
    for packing in PACKINGS {
        let (place, store) = (Place::new(), image_of(packing));
        let (files, saved) = (store.files(), store.docker());
        let mut reversed = files.clone();
        reversed.reverse();
        let mut both = saved.clone();
        both.extend(files.clone());
        let sources = [
            place.layout(&files),
            place.oci_archive(&archive(&files)),
            Source::OciArchive { file: place.file("reversed.tar", &archive(&reversed)), reference: None },
            Source::OciArchive {
                file: place.file("oci.tar.gz", &pack(&archive(&files), Packing::GzipMembers)),
                reference: None,
            },
            place.docker_archive(&archive(&saved)),
            Source::DockerArchive {
                file: place.file("docker.tar.zst", &pack(&archive(&saved), Packing::ZstdChunked)),
                reference: None,
            },
            Source::DockerArchive { file: place.file("both.tar", &archive(&both)), reference: None },
        ];
        for source in &sources {
            let image = open(source).unwrap_or_else(|e| panic!("{packing:?} {source}: {e}"));
            assert_eq!(image.layers().len(), 3, "{source}");
            assert_eq!(image.config().config.entrypoint, ["/init"]);
            for (index, tar) in tars().iter().enumerate() {
                assert!(plain(&image, index).unwrap() == *tar, "{packing:?} {source} {index}");
                // Again, and another at the same time.
                let mut first = image.open_layer(index).unwrap();
                first.read_exact(&mut [0; 512]).unwrap();
                assert!(plain(&image, index).unwrap() == *tar);
                assert_eq!(first.finish().unwrap().plain_bytes, tar.len() as u64);
            }
            let name = if matches!(source, Source::DockerArchive { .. }) { "test:1.0" } else { "1.0" };
            assert_eq!(open(&named(source, name)).unwrap().config().digest, image.config().digest);
            assert_eq!(kind(open(&named(source, "absent"))), ImageErrorKind::NotFound);
            assert_eq!(kind(image.open_layer(3)), ImageErrorKind::Usage);
            assert_eq!(for_platform(source, "linux/amd64").unwrap().layers(), image.layers());
            assert_eq!(kind(for_platform(source, "linux/s390x")), ImageErrorKind::NotFound);
        }
    }
}

#[test]
fn a_platform_is_chosen_through_nested_indexes_and_past_attestations() {
    let mut store = Store::default();
    let mut entries = Vec::new();
    for platform in ["linux/amd64", "linux/arm/v7", "linux/arm64/v8", "linux/amd64/v3"] {
        let tar = Tar::default().file(platform, platform.as_bytes()).finish();
        entries.push(store.manifest(platform, &[(&tar, Packing::Gzip)]));
    }
    let mut attestation = store.manifest("linux/amd64", &[(b"not a layer", Packing::Plain)]);
    attestation.platform = Some(Platform::new("unknown", "unknown", ""));
    attestation.annotations.insert(crate::REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned());
    let mut missing = entries[0].clone();
    missing.digest = Digest::sha256(b"of another platform, and not copied");
    missing.platform = Some(Platform::new("windows", "amd64", ""));
    let inner = store.index(&[&entries[..2], &[attestation.clone(), missing]].concat());
    let outer = store.index(&[inner, entries[2].clone(), entries[3].clone(), attestation]);
    store.list(outer, "app");
    let place = Place::new();
    for source in [place.layout(&store.files()), place.oci_archive(&archive(&store.files()))] {
        for (wanted, found) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/amd64/v4", "linux/amd64/v3"),
            ("linux/arm64", "linux/arm64/v8"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/arm/v8", "linux/arm/v7"),
        ] {
            let image = for_platform(&named(&source, "app"), wanted).unwrap();
            let tar = plain(&image, 0).unwrap();
            assert!(tar.starts_with(found.as_bytes()), "{wanted}");
            assert_eq!(image.names(), ["app"]);
            assert_eq!(image.listed().len(), 5);
        }
        assert_eq!(kind(for_platform(&source, "linux/riscv64")), ImageErrorKind::NotFound);
        let digest = entries[1].digest.to_string();
        let image = open(&named(&source, &digest)).unwrap();
        assert_eq!(image.config().platform.to_string(), "linux/arm/v7");
    }
}

#[test]
fn what_fits_twice_is_an_error() {
    let mut store = Store::default();
    for name in ["a:1", "b:1"] {
        let tar = Tar::default().file(name, b"").finish();
        let manifest = store.manifest("linux/amd64", &[(&tar, Packing::Plain)]);
        store.list(manifest, name);
    }
    let place = Place::new();
    let sources = [place.layout(&store.files()), place.docker_archive(&archive(&store.docker()))];
    for source in sources {
        let e = source
            .open(&Options { platform: Some(Platform::new("linux", "amd64", "")), ..Options::default() });
        let e = e.unwrap_err();
        assert!(matches!(e, ImageError::Ambiguous { .. }), "{e}");
        assert!(e.to_string().contains("a:1") && e.to_string().contains("b:1"), "{e}");
        for name in ["a:1", "b:1", "docker.io/library/b:1"] {
            let image = for_platform(&named(&source, name), "linux/amd64").unwrap();
            assert!(plain(&image, 0).unwrap().starts_with(&name.as_bytes()[name.len() - 3..]));
        }
    }
}

/// A store whose manifest was changed, and what must be found.
fn changed(change: impl FnOnce(&mut Value)) -> Store {
    let mut store = image_of(Packing::Gzip);
    let entry = store.entries.pop().unwrap();
    let mut manifest: Value = serde_json::from_slice(&store.blobs[&entry.digest]).unwrap();
    change(&mut manifest);
    let descriptor = store.document(media::OCI_MANIFEST, &manifest);
    store.list(descriptor, "1.0");
    store
}

#[test]
fn images_that_contradict_themselves_are_refused() {
    use ImageErrorKind::{Corrupt, Limit, NotFound, Unsupported};
    let other = Digest::sha256(b"other").to_string();
    let cases: Vec<(&str, Store, ImageErrorKind)> = vec![
        ("a layer too many", changed(|m| m["layers"].as_array_mut().unwrap().truncate(2)), Corrupt),
        ("no configuration", changed(|m| drop(m.as_object_mut().unwrap().remove("config"))), Corrupt),
        ("both kinds", changed(|m| m["manifests"] = json!([])), Corrupt),
        ("schema 1", changed(|m| m["schemaVersion"] = json!(1)), Corrupt),
        ("a missing configuration", changed(|m| m["config"]["digest"] = json!(other)), NotFound),
        ("a wrong size of the configuration", changed(|m| m["config"]["size"] = json!(1)), Corrupt),
        ("a huge configuration", changed(|m| m["config"]["size"] = json!(1u64 << 40)), Limit),
        (
            "an artifact",
            changed(|m| m["config"]["mediaType"] = json!("application/vnd.oci.empty.v1+json")),
            Unsupported,
        ),
        (
            "an encrypted layer",
            changed(|m| {
                m["layers"][1]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
            }),
            Unsupported,
        ),
        (
            "a digest that is a path",
            changed(|m| m["layers"][1]["digest"] = json!("sha256:../../etc/passwd")),
            Corrupt,
        ),
        ("a negative size", changed(|m| m["layers"][1]["size"] = json!(-1)), Corrupt),
        (
            "thousands of layers",
            changed(|m| {
                let layer = m["layers"][0].clone();
                m["layers"] = Value::Array(vec![layer; 5000]);
            }),
            Limit,
        ),
    ];
    for (what, store, expected) in cases {
        let place = Place::new();
        for source in [place.layout(&store.files()), place.oci_archive(&archive(&store.files()))] {
            assert_eq!(kind(open(&source)), expected, "{what}");
        }
    }
}

#[test]
fn layers_that_are_not_what_the_image_says_have_no_end() {
    use ImageErrorKind::{Corrupt, NotFound, Unsupported};
    let other = Digest::sha256(b"other").to_string();
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let cases: Vec<(&str, Store, ImageErrorKind)> = vec![
        ("a missing blob", changed(|m| m["layers"][0]["digest"] = json!(other)), NotFound),
        (
            "a foreign layer",
            changed(|m| {
                m["layers"][0]["digest"] = json!(other);
                m["layers"][0]["mediaType"] = json!(foreign);
            }),
            Unsupported,
        ),
        ("a wrong size", changed(|m| m["layers"][0]["size"] = json!(7)), Corrupt),
        ("exchanged layers", changed(|m| m["layers"].as_array_mut().unwrap().swap(0, 1)), Corrupt),
        (
            "another blob below the digest",
            {
                let mut store = image_of(Packing::Gzip);
                let digest = store.saved[0].2[0];
                let blob = store.blobs.get_mut(&digest).unwrap();
                let middle = blob.len() / 2;
                blob[middle] ^= 1;
                store
            },
            Corrupt,
        ),
        (
            "a compression that is not supported",
            {
                let mut store = Store::default();
                let manifest = store.manifest("linux/amd64", &[(b"\xFD7zXZ\0 and so on", Packing::Plain)]);
                store.list(manifest, "");
                store
            },
            Unsupported,
        ),
    ];
    for (what, store, expected) in cases {
        let place = Place::new();
        for source in [place.layout(&store.files()), place.oci_archive(&archive(&store.files()))] {
            let image = open(&source).unwrap_or_else(|e| panic!("{what}: {e}"));
            let e = plain(&image, 0).unwrap_err();
            assert_eq!(e.kind(), expected, "{what}: {e}");
            let Ok(mut layer) = image.open_layer(0) else { continue };
            let finished = layer.read(&mut [0; 1]).is_ok();
            assert!(!finished || layer.finish().is_err(), "{what}");
        }
    }
    // The digest explains a stream that does not expand.
    let mut store = image_of(Packing::Gzip);
    let digest = store.saved[0].2[0];
    store.blobs.get_mut(&digest).unwrap()[20] ^= 0xff;
    let place = Place::new();
    let image = open(&place.layout(&store.files())).unwrap();
    assert!(matches!(plain(&image, 0), Err(ImageError::Digest { expected, .. }) if *expected == digest));
}

#[test]
fn bombs_are_stopped_by_size_and_by_ratio() {
    let zeros = vec![0; 100 << 20];
    let mut store = Store::default();
    let manifest = store.manifest("linux/amd64", &[(&zeros, Packing::Zstd), (&zeros, Packing::Gzip)]);
    store.list(manifest, "");
    let place = Place::new();
    let source = place.layout(&store.files());
    let with = |limits: Limits| source.open(&Options { limits, ..Options::default() }).unwrap();
    // zstd compresses zeros by more than 1100, gzip cannot.
    let image = with(Limits::default());
    assert_eq!(kind(image.open_layer(0).unwrap().finish()), ImageErrorKind::Limit);
    let image = with(Limits::default());
    assert_eq!(image.open_layer(1).unwrap().finish().unwrap().plain_bytes, 100 << 20);
    let image = with(Limits { ratio: u64::MAX, ..Limits::default() });
    assert_eq!(image.open_layer(0).unwrap().finish().unwrap().plain_bytes, 100 << 20);
    let image = with(Limits { image_bytes: 99 << 20, ..Limits::default() });
    assert_eq!(kind(image.open_layer(1).unwrap().finish()), ImageErrorKind::Limit);
    // Each layer fits, and both together do not; a layer that is read twice counts once.
    let image = with(Limits { image_bytes: 150 << 20, ratio: u64::MAX, ..Limits::default() });
    for _ in 0..2 {
        assert_eq!(image.open_layer(0).unwrap().finish().unwrap().plain_bytes, 100 << 20);
    }
    assert_eq!(kind(image.open_layer(1).unwrap().finish()), ImageErrorKind::Limit);
    // An archive that is one.
    let file = place.file("bomb.tar.zst", &pack(&zeros, Packing::Zstd));
    assert_eq!(kind(open(&Source::OciArchive { file, reference: None })), ImageErrorKind::Limit);
}

#[test]
fn indexes_have_a_depth_and_a_number() {
    let mut store = Store::default();
    let tar = Tar::default().finish();
    let mut entry = store.manifest("linux/amd64", &[(&tar, Packing::Plain)]);
    for _ in 0..5 {
        entry = store.index(&[entry]);
    }
    store.list(entry, "");
    let place = Place::new();
    let source = place.layout(&store.files());
    for (limits, good) in [
        (Limits::default(), true),
        (Limits { index_depth: 5, ..Limits::default() }, true),
        (Limits { index_depth: 4, ..Limits::default() }, false),
        (Limits { documents: 7, ..Limits::default() }, true),
        (Limits { documents: 6, ..Limits::default() }, false),
        (Limits { document_bytes: 100, ..Limits::default() }, false),
    ] {
        let result = source.open(&Options { limits, ..Options::default() });
        assert_eq!(result.as_ref().err().map(ImageError::kind), (!good).then_some(ImageErrorKind::Limit));
    }
    // An index cannot contain its own digest; one that claims to is not what its digest says.
    let mut store = Store::default();
    let fake = Descriptor::new(media::OCI_INDEX, Digest::sha256(b"itself"), 0);
    let inner = store.index(std::slice::from_ref(&fake));
    let bytes = store.blobs[&inner.digest].clone();
    store.blobs.insert(fake.digest, bytes.clone());
    store.list(Descriptor { size: bytes.len() as u64, ..fake }, "");
    let place = Place::new();
    assert_eq!(kind(open(&place.layout(&store.files()))), ImageErrorKind::Corrupt);
}

#[test]
fn members_that_lead_out_of_an_archive_are_refused() {
    let store = image_of(Packing::Plain);
    let good = store.files();
    let with = |extra: &dyn Fn(&mut Tar)| {
        let mut tar = Tar::default();
        for (name, bytes) in &good {
            tar.file(name, bytes);
        }
        extra(&mut tar);
        tar.finish()
    };
    let layer = format!("blobs/sha256/{}", store.saved[0].2[0].hex());
    let place = Place::new();
    for bad in ["../outside", "blobs/../index.json", "/../x"] {
        let source = place.oci_archive(&with(&|tar| {
            tar.file(bad, b"x");
        }));
        assert_eq!(kind(open(&source)), ImageErrorKind::Corrupt, "{bad}");
    }
    for (target, expected) in [
        ("/etc/passwd", ImageErrorKind::Corrupt),
        ("../../../etc/passwd", ImageErrorKind::Corrupt),
        ("absent", ImageErrorKind::Corrupt),
    ] {
        let source = place.oci_archive(&with(&|tar| {
            tar.symlink(&layer, target);
        }));
        let image = open(&source).unwrap();
        assert_eq!(kind(plain(&image, 0)), expected, "{target}");
    }
    // A loop.
    let source = place.oci_archive(&with(&|tar| {
        tar.symlink(&layer, "x").symlink("blobs/sha256/x", &layer[13..]);
    }));
    assert_eq!(kind(plain(&open(&source).unwrap(), 0)), ImageErrorKind::Corrupt);
    // Links within the archive are followed.
    let blob = store.blobs[&store.saved[0].2[0]].clone();
    let source = place.oci_archive(&with(&|tar| {
        tar.file("moved", &blob).symlink(&layer, "../../moved");
    }));
    assert!(plain(&open(&source).unwrap(), 0).unwrap() == tars()[0]);
    let source = place.oci_archive(&with(&|tar| {
        tar.file("moved", &blob).link(&layer, "moved");
    }));
    assert!(plain(&open(&source).unwrap(), 0).unwrap() == tars()[0]);
    let limits = Limits { members: good.len(), ..Limits::default() };
    let source = place.oci_archive(&with(&|tar| {
        tar.file("one more", b"");
    }));
    let result = source.open(&Options { limits, ..Options::default() });
    assert_eq!(kind(result), ImageErrorKind::Limit);
}

#[test]
fn links_between_layers_of_old_docker_archives_are_followed() {
    let store = image_of(Packing::Plain);
    let mut tar = Tar::default();
    let saved = store.docker();
    let layer = |n: usize| format!("{}/layer.tar", &store.saved[0].2[n].hex()[..12]);
    for (name, bytes) in &saved {
        if *name == layer(1) {
            tar.dir("elsewhere").file("elsewhere/layer.tar", bytes).symlink(name, "../elsewhere/layer.tar");
        } else if *name == layer(2) {
            tar.file("elsewhere/hard", bytes).link(name, "./elsewhere/hard");
        } else {
            tar.file(name, bytes);
        }
    }
    let place = Place::new();
    let image = open(&place.docker_archive(&tar.finish())).unwrap();
    for (index, tar) in tars().iter().enumerate() {
        assert!(plain(&image, index).unwrap() == *tar);
    }
}

#[test]
fn archives_that_are_cut_or_of_another_kind_are_named() {
    let place = Place::new();
    let whole = archive(&image_of(Packing::Gzip).docker());
    for cut in [0, 100, 512, 1000, whole.len() / 2] {
        let result = open(&place.docker_archive(&whole[..cut]));
        assert!(matches!(kind(result), ImageErrorKind::Corrupt | ImageErrorKind::NotFound), "{cut}");
    }
    let hint = |result: Result<Image, ImageError>, text: &str| {
        let e = result.unwrap_err().to_string();
        assert!(e.contains(text), "{e}");
    };
    hint(open(&place.oci_archive(&whole)), "docker-archive:");
    hint(open(&place.docker_archive(&archive(&image_of(Packing::Gzip).files()))), "docker save");
    let old = Tar::default().file("repositories", b"{}").file("0/layer.tar", b"").finish();
    hint(open(&place.docker_archive(&old)), "before 1.10");
    hint(open(&place.oci_archive(b"BZh91AY&SY")), "bzip2 -dc");
    hint(open(&place.oci_archive(&[7; 2000])), "tar");
    // Windows opens no directory as a file.
    #[cfg(unix)]
    hint(open(&Source::OciArchive { file: place.path().into(), reference: None }), "oci:DIR");
    let files = [("oci-layout".to_owned(), br#"{"imageLayoutVersion":"2.0"}"#.to_vec())];
    hint(open(&place.layout(&files)), "version");
}

#[cfg(unix)]
#[test]
fn symbolic_links_in_a_layout_are_not_followed() {
    use std::os::unix::fs::symlink;
    let store = image_of(Packing::Gzip);
    let blob = format!("blobs/sha256/{}", store.saved[0].2[0].hex());
    for part in ["index.json", "oci-layout", "blobs", "blobs/sha256", &blob] {
        let place = Place::new();
        let source = place.layout(&store.files());
        let path = place.path().join("layout").join(part);
        let moved = place.path().join("moved");
        fs::rename(&path, &moved).unwrap();
        symlink(&moved, &path).unwrap();
        let e = open(&source).and_then(|image| plain(&image, 0)).unwrap_err();
        assert_eq!(e.kind(), ImageErrorKind::Unsupported, "{part}: {e}");
        assert!(e.to_string().contains("cp -RL"), "{e}");
    }
    // The directory itself may be a link.
    let place = Place::new();
    place.layout(&store.files());
    let link = place.path().join("link");
    symlink(place.path().join("layout"), &link).unwrap();
    open(&Source::Layout { directory: link, reference: None }).unwrap();
    // A pipe does not block.
    let source = place.layout(&store.files());
    let index = place.path().join("layout/index.json");
    fs::remove_file(&index).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &index, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    assert_eq!(kind(open(&source)), ImageErrorKind::Unsupported);
}

#[cfg(unix)]
#[test]
fn a_stream_is_spooled_within_its_room_and_leaves_nothing() {
    use crate::{Files, LayoutFile, Scratch};
    use std::{io, sync::Arc};
    /// An archive in a pipe.
    #[derive(Debug)]
    struct Piped(Vec<u8>, u64, PathBuf);
    impl Files for Piped {
        fn archive(&self) -> io::Result<fs::File> {
            let (reader, mut writer) = io::pipe()?;
            let bytes = self.0.clone();
            std::thread::spawn(move || io::Write::write_all(&mut writer, &bytes));
            Ok(std::os::fd::OwnedFd::from(reader).into())
        }
        fn layout(&self, _: &LayoutFile) -> io::Result<fs::File> {
            unreachable!("an archive has no layout");
        }
        fn scratch(&self) -> io::Result<Scratch> {
            Ok(Scratch { file: tempfile::tempfile_in(&self.2)?, room: self.1 })
        }
    }
    let place = Place::new();
    for store in [image_of(Packing::Gzip), image_of(Packing::Plain)] {
        for bytes in [archive(&store.files()), archive(&store.docker())] {
            for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
                let packed = pack(&bytes, packing);
                let len = bytes.len() as u64;
                for (room, good) in [(u64::MAX, true), (len, true), (len - 1, false)] {
                    let files: Arc<dyn Files> =
                        Arc::new(Piped(packed.clone(), room, place.path().to_owned()));
                    let result = Source::Stdin.open_with(&files, &Options::default());
                    assert_eq!(
                        result.as_ref().err().map(ImageError::kind),
                        (!good).then_some(ImageErrorKind::NoSpace)
                    );
                    if let Ok(image) = result {
                        assert!(plain(&image, 0).unwrap() == tars()[0]);
                    }
                }
            }
        }
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

/// The parts of a registry with the blobs of a store, under any tag.
#[derive(Debug)]
struct Remote {
    store: Store,
    named: Digest,
    asked: Mutex<Vec<RemotePart>>,
}

impl Files for Remote {
    fn archive(&self) -> io::Result<fs::File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn layout(&self, _: &LayoutFile) -> io::Result<fs::File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remote(&self, part: &RemotePart) -> io::Result<fs::File> {
        self.asked.lock().unwrap().push(*part);
        let digest = match part {
            RemotePart::Named => self.named,
            RemotePart::Document { digest, .. } | RemotePart::Blob { digest, .. } => *digest,
        };
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the registry has none");
        let mut file = tempfile::tempfile()?;
        file.write_all(self.store.blobs.get(&digest).ok_or_else(missing)?)?;
        file.rewind()?;
        Ok(file)
    }

    fn scratch(&self) -> io::Result<Scratch> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn an_image_of_a_registry_is_found_through_its_parts() {
    let mut store = Store::default();
    let tar = Tar::default().file("a", b"1").finish();
    let arm = store.manifest("linux/arm/v7", &[(&tar, Packing::Gzip)]);
    let x86 = store.manifest("linux/amd64", &[(&tar, Packing::Plain)]);
    let index = store.index(&[arm.clone(), x86.clone()]);
    let open = |named: Digest, name: &str, platform: Option<&str>| {
        let remote = Arc::new(Remote { store: store.clone(), named, asked: Mutex::default() });
        let files: Arc<dyn Files> = Arc::<Remote>::clone(&remote);
        let platform = platform.map(|text| text.parse().unwrap());
        let source = Source::parse(&format!("docker://h.x/{name}")).unwrap();
        let image = source.open_with(&files, &Options { platform, ..Options::default() });
        (image, remote)
    };
    let (image, remote) = open(index.digest, "a:1", Some("linux/arm/v7"));
    let image = image.unwrap();
    assert_eq!(image.manifest().unwrap().descriptor.digest, arm.digest);
    assert_eq!(image.names(), ["h.x/a:1"]);
    assert!(plain(&image, 0).unwrap() == tar);
    let asked = remote.asked.lock().unwrap();
    let documents = asked.iter().filter(|part| matches!(part, RemotePart::Document { .. })).count();
    let blobs = asked.iter().filter(|part| matches!(part, RemotePart::Blob { .. })).count();
    assert_eq!((asked[0], blobs), (RemotePart::Named, 2), "configuration and layer: {asked:?}");
    assert!(documents > 0);
    // A manifest by itself, by tag and by digest.
    assert!(open(x86.digest, "a", None).0.is_ok());
    assert!(open(x86.digest, &format!("a@{}", x86.digest), None).0.is_ok());
    assert_eq!(kind(open(x86.digest, &format!("a@{}", arm.digest), None).0), ImageErrorKind::Corrupt);
    assert_eq!(kind(open(x86.digest, "a", Some("linux/s390x")).0), ImageErrorKind::NotFound);
    let missing = open(Digest::sha256(b""), "a", None).0.unwrap_err();
    assert_eq!(missing.to_string(), "the manifest not found; the registry has none");
}

#[test]
fn a_spooled_archive_gives_back_what_is_no_longer_needed() {
    let noise = |seed: u64| -> Vec<u8> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
            (state >> 56) as u8
        };
        std::iter::repeat_with(next).take(3 << 20).collect()
    };
    let tars: Vec<Vec<u8>> = (1..4).map(|n| Tar::default().file("a", &noise(n)).finish()).collect();
    let layers: Vec<(&[u8], Packing)> = tars.iter().map(|tar| (&tar[..], Packing::Plain)).collect();
    let mut store = Store::default();
    let manifest = store.manifest("linux/amd64", &layers);
    store.list(manifest, "");
    let place = Place::new();
    for (bytes, docker) in [(archive(&store.files()), false), (archive(&store.docker()), true)] {
        let file = place.file("spooled.gz", &pack(&bytes, Packing::Gzip));
        let source = if docker {
            Source::DockerArchive { file, reference: None }
        } else {
            Source::OciArchive { file, reference: None }
        };
        let image = open(&source).unwrap();
        for (number, tar) in tars.iter().enumerate().rev() {
            let end = number + 1;
            image.keep_layers(0..end);
            assert!(plain(&image, number).unwrap() == *tar);
        }
        assert_eq!(kind(plain(&image, 2)), ImageErrorKind::Io);
        assert!(plain(&image, 0).is_ok());
    }
    // The archive itself stays as it is.
    let image = open(&place.oci_archive(&archive(&store.files()))).unwrap();
    image.keep_layers(0..0);
    assert!(plain(&image, 2).is_ok());
}
