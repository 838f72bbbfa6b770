//! Images that are written come back as they were, and as the same bytes each time.

use super::{
    Destination, DirectLayout, NewImage, NewLayer, Step, append_layer, write_docker_archive, write_layout,
    write_oci_archive,
};
use crate::{
    Blob, Blobs, Descriptor, Digest, Image, ImageError, ImageErrorKind, Layer, Options, Source, media,
    testing::{PACKINGS, Packing, Store, Tar, directory, pack},
};
use std::{fs, io, path::Path, sync::Arc};
use tempfile::TempDir;

/// The blob of the new layer.
#[derive(Debug)]
struct One(Vec<u8>);

impl Blobs for One {
    fn open(&self, _: &Descriptor) -> io::Result<Blob> {
        Ok(Blob { size: self.0.len() as u64, bytes: Box::new(io::Cursor::new(self.0.clone())) })
    }
}

fn base(place: &Path, packing: Packing) -> Image {
    let mut store = Store::default();
    let tar = Tar::default().file("a", b"base").finish();
    // The same layer twice has one blob.
    let manifest = store.manifest("linux/arm64", &[(&tar, packing), (&tar, packing)]);
    store.list(manifest, "base");
    directory(place, &store.files());
    Source::Layout { directory: place.into(), reference: None }.open(&Options::default()).unwrap()
}

/// The image with one more layer.
fn extended(base: &Image, packing: Packing) -> (NewImage, Vec<u8>) {
    let plain = Tar::default().file("b", b"new").finish();
    let blob = pack(&plain, packing);
    let suffix = if packing == Packing::Plain { "" } else { "+gzip" };
    let descriptor =
        Descriptor::new(&format!("{}{suffix}", media::OCI_LAYER), Digest::sha256(&blob), blob.len() as u64);
    let diff_id = Digest::sha256(&plain);
    let step =
        Step { created: "1970-01-01T00:00:01Z".into(), created_by: "commit".into(), comment: String::new() };
    let config = append_layer(&base.config().raw, &diff_id, &step).unwrap();
    let mut layers = NewLayer::all_of(base);
    layers.push(NewLayer { layer: Layer { descriptor, diff_id }, blobs: Arc::new(One(blob)) });
    (NewImage { config, layers }, plain)
}

#[test]
fn a_written_image_is_the_base_and_one_layer_more() {
    for packing in PACKINGS {
        let place = TempDir::new().unwrap();
        let base = base(&place.path().join("base"), packing);
        let new_packing = if packing == Packing::Plain { Packing::Plain } else { Packing::Gzip };
        let (new, plain) = extended(&base, new_packing);
        let layout = place.path().join("out/layout");
        write_layout(&DirectLayout::new(&layout), "new", &new).unwrap();
        let (oci, docker) = (place.path().join("oci.tar"), place.path().join("docker.tar"));
        let archive = |path: &Path, docker: bool| {
            let mut out = Vec::new();
            if docker {
                write_docker_archive(&mut out, Some("app:new"), &new, 7).unwrap();
            } else {
                write_oci_archive(&mut out, Some("new"), &new, 7).unwrap();
            }
            fs::write(path, &out).unwrap();
            out
        };
        assert!(
            archive(&oci, false) == archive(&oci, false) && archive(&docker, true) == archive(&docker, true)
        );
        for source in [
            Source::Layout { directory: layout.clone(), reference: Some("new".into()) },
            Source::OciArchive { file: oci.clone(), reference: Some("new".into()) },
            Source::DockerArchive { file: docker.clone(), reference: Some("app:new".into()) },
        ] {
            let image = source.open(&Options::default()).unwrap();
            assert_eq!(image.config().raw, new.config, "{source}");
            assert_eq!(image.layers().len(), 3);
            assert_eq!(image.config().config, base.config().config);
            assert_eq!(image.config().created, "1970-01-01T00:00:01Z");
            assert_eq!(image.config().history.len(), 3);
            for index in 0..2 {
                assert_eq!(image.layers()[index].descriptor.digest, base.layers()[index].descriptor.digest);
            }
            let mut found = Vec::new();
            io::Read::read_to_end(&mut image.open_layer(2).unwrap(), &mut found).unwrap();
            assert!(found == plain);
        }
        // Into the base's own layout: both images are there, and the tag moves if it is written again.
        write_layout(&DirectLayout::new(&place.path().join("base")), "new", &new).unwrap();
        write_layout(&DirectLayout::new(&place.path().join("base")), "new", &new).unwrap();
        let open = |name: &str| {
            let source =
                Source::Layout { directory: place.path().join("base"), reference: Some(name.to_owned()) };
            source.open(&Options::default()).unwrap()
        };
        assert_eq!(open("base").layers().len(), 2);
        assert_eq!(open("new").listed().len(), 1);
        let left: Vec<_> = fs::read_dir(place.path().join("base/blobs/sha256")).unwrap().collect();
        assert!(left.into_iter().all(|entry| !entry.unwrap().file_name().to_string_lossy().starts_with('.')));
    }
}

#[test]
fn what_does_not_belong_together_is_not_written() {
    let place = TempDir::new().unwrap();
    let base = base(&place.path().join("base"), Packing::Gzip);
    let (mut new, _) = extended(&base, Packing::Gzip);
    let kind = |result: Result<(), ImageError>| result.unwrap_err().kind();
    let out = place.path().join("out");
    // A blob that is not what its descriptor says leaves no image.
    new.layers[2].blobs = Arc::new(One(b"other".to_vec()));
    assert_eq!(kind(write_layout(&DirectLayout::new(&out), "new", &new).map(drop)), ImageErrorKind::Corrupt);
    assert!(!out.join("index.json").exists());
    new.layers.pop();
    assert_eq!(kind(write_oci_archive(&mut Vec::new(), None, &new, 0)), ImageErrorKind::Corrupt);
    assert_eq!(kind(write_docker_archive(&mut Vec::new(), None, &new, 0)), ImageErrorKind::Corrupt);
    for bad in ["{}", "[]", "x"] {
        assert!(append_layer(bad.as_bytes(), &Digest::sha256(b""), &Step::default()).is_err());
    }
}

#[test]
fn destinations_have_a_form() {
    assert!(
        matches!(Destination::parse("oci:d:1.0"), Ok(Destination::Layout { reference, .. }) if reference == "1.0")
    );
    assert!(matches!(
        Destination::parse("oci-archive:f"),
        Ok(Destination::OciArchive { reference: None, .. })
    ));
    assert!(matches!(
        Destination::parse("docker-archive:f:a:b"),
        Ok(Destination::DockerArchive { reference: Some(_), .. })
    ));
    for bad in [
        "oci:d",
        "-",
        "f",
        "docker://x",
        "oci:d@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ] {
        assert!(Destination::parse(bad).is_err(), "{bad}");
    }
}
