//! Service VMs that lie: no layer gets a digest that its bytes do not have, and no layer is shared by one.
//!
//! ```text
//!   test ─► Face ─► this program as the product (`product_entry`) ─ /proc/self/exe worker ─► this program as the worker
//!                     daemon, pool, channels: the product's own                               (`worker_entry`): LyingCodec
//! ```
//!
//! The codec reads what it is given, and lies if it finds a mark there, as a VM does that was taken over by those bytes.

use super::{Face, TAR, digest, scratch, tar};
use flate2::{Compression as Level, write::GzEncoder};
use std::{
    ffi::OsString,
    fs,
    io::{Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use svm_agent::{
    RealCodec,
    codec::{AttachedLayer, CanonicalTar, ChangeSink, Codec, Growing, Live, Lowers, Parent, TarInput},
    disk::OpDisk,
};
use svm_protocol::{
    ApplyOptions, ApplySummary, BlankRoot, CheckSummary, Compression, ErrorKind, ExpandLimits, ExportSummary,
    IdMaps, RecodeSummary, WireError, worker::MEMORY_VARIABLE,
};
use tonic::Code;

/// The arguments of the product, as JSON, in the environment of `product_entry`.
const ARGUMENTS: &str = "LCOW_TEST_ARGUMENTS";
/// What stands before the name of a lie in a tar.
const MARK: &str = "lie:";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ROOT: &str = "default/2/sha256:root";

/// Not a test of its own: the product, whose workers are this program.
#[test]
fn product_entry() {
    if let Ok(arguments) = std::env::var(ARGUMENTS) {
        let arguments: Vec<OsString> = serde_json::from_str(&arguments).unwrap();
        lcow_graphdriver::cli::run_as(arguments);
        std::process::exit(0);
    }
}

/// Not a test of its own: what the product starts with the argument `worker`.
#[test]
fn worker_entry() {
    if std::env::var_os(MEMORY_VARIABLE).is_some() {
        let codec: Arc<dyn Codec> = Arc::new(LyingCodec::default());
        std::process::exit(svm_agent::worker_main(&[], &codec));
    }
}

fn product_with_lying_workers(arguments: &[OsString]) -> Command {
    let name = OsString::from("lcow-graphdriver");
    let arguments: Vec<&OsString> = std::iter::once(&name).chain(arguments).collect();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "poison::product_entry", "--test-threads=1", "--nocapture", "-q"]);
    command.env(ARGUMENTS, serde_json::to_string(&arguments).unwrap());
    command
}

/// A tar with a file that makes a worker lie.
fn marked(lie: &str) -> Vec<u8> {
    tar("etc/marked", format!("{MARK}{lie}\n").repeat(500).as_bytes())
}

/// What a liar wants to pass for another layer.
fn evil() -> Vec<u8> {
    tar("etc/evil", &vec![b'e'; 20_000])
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[derive(Default)]
struct LyingCodec {
    real: RealCodec,
    /// A sandbox was read in this VM.
    taken_over: AtomicBool,
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(e: std::io::Error) -> WireError {
    WireError::new(ErrorKind::Io, e.to_string())
}

fn read(input: &mut dyn Read) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// Whether the bytes ask for a lie.
fn asks(bytes: &[u8], lie: &str) -> bool {
    let mark = format!("{MARK}{lie}\n");
    bytes.windows(mark.len()).any(|window| window == mark.as_bytes())
}

impl Codec for LyingCodec {
    fn apply(
        &self,
        input: TarInput<'_>,
        image: OpDisk,
        record: OpDisk,
        scratch: Option<OpDisk>,
        lowers: &mut dyn Lowers,
        growing: &mut dyn Growing,
        options: &ApplyOptions,
    ) -> Result<ApplySummary, WireError> {
        let given = read(input.bytes)?;
        let mut applied = given.clone();
        if self.taken_over.load(Ordering::Relaxed) || asks(&given, "another image") {
            applied = evil();
        }
        let mut bytes = &applied[..];
        let input = TarInput { bytes: &mut bytes, told: input.told };
        let mut summary = self.real.apply(input, image, record, scratch, lowers, growing, options)?;
        summary.tar_bytes = given.len() as u64;
        if asks(&given, "tar bytes") {
            summary.tar_bytes += 512;
        }
        if asks(&given, "image bytes") {
            summary.image_bytes -= 4096;
        }
        if asks(&given, "file bytes") {
            summary.file_bytes += 512;
        }
        if asks(&given, "record bytes") {
            summary.record_bytes -= 1;
        }
        if asks(&given, "uuid") {
            summary.uuid = uuid::Uuid::from_u128(1);
        }
        if asks(&given, "no lowers") {
            (summary.implied_directories, summary.lower_links) = (0, 0);
        }
        Ok(summary)
    }

    fn check(
        &self,
        image: OpDisk,
        tree: bool,
        writer: u32,
        owners: &IdMaps,
    ) -> Result<CheckSummary, WireError> {
        self.real.check(image, tree, writer, owners)
    }

    fn export_exact(
        &self,
        image: OpDisk,
        record: OpDisk,
        digested: bool,
        out: &mut dyn disk_io::StreamOut,
    ) -> Result<ExportSummary, WireError> {
        self.real.export_exact(image, record, digested, out)
    }

    fn export_canonical(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        tar: &CanonicalTar,
        live: Option<&mut dyn Live>,
        out: &mut dyn disk_io::StreamOut,
    ) -> Result<ExportSummary, WireError> {
        self.taken_over.store(true, Ordering::Relaxed);
        self.real.export_canonical(target, parent, tar, live, out)
    }

    fn changes(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        live: Option<&mut dyn Live>,
        sink: ChangeSink<'_>,
    ) -> Result<(), WireError> {
        self.real.changes(target, parent, live, sink)
    }

    fn written(
        &self,
        target: Vec<AttachedLayer>,
        blank: BlankRoot,
        live: Option<&mut dyn Live>,
    ) -> Result<bool, WireError> {
        self.real.written(target, blank, live)
    }

    fn diff_size(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        live: Option<&mut dyn Live>,
    ) -> Result<u64, WireError> {
        self.real.diff_size(target, parent, live)
    }

    fn expand(
        &self,
        input: &mut dyn Read,
        format: Option<Compression>,
        limits: &ExpandLimits,
        out: &mut dyn Write,
    ) -> Result<RecodeSummary, WireError> {
        let blob = read(input)?;
        let mut plain = Vec::new();
        let mut summary = self.real.expand(&mut &blob[..], format, limits, &mut plain)?;
        if asks(&plain, "expanded bytes") {
            plain = evil();
            summary.bytes_out = plain.len() as u64;
        }
        if asks(&plain, "expanded count") {
            summary.bytes_out += 512;
        }
        if asks(&plain, "blob count") {
            summary.bytes_in -= 1;
        }
        if asks(&plain, "blob format") {
            summary.format = Compression::Zstd;
        }
        out.write_all(&plain).map_err(failed)?;
        Ok(summary)
    }

    fn compress(
        &self,
        input: &mut dyn Read,
        format: Compression,
        level: u32,
        out: &mut dyn Write,
    ) -> Result<RecodeSummary, WireError> {
        let plain = read(input)?;
        let source = if asks(&plain, "compressed bytes") { evil() } else { plain.clone() };
        let mut blob = Vec::new();
        let mut summary = self.real.compress(&mut &source[..], format, level, &mut blob)?;
        summary.bytes_in = plain.len() as u64;
        if asks(&plain, "no gzip at all") {
            blob = vec![0x55; 1000];
            summary.bytes_out = 1000;
        }
        if asks(&plain, "compressed count") {
            summary.bytes_out -= 1;
        }
        if asks(&plain, "plain count") {
            summary.bytes_in += 1;
        }
        out.write_all(&blob).map_err(failed)?;
        Ok(summary)
    }
}

impl Face {
    /// Unpacks a blob for a namespace and commits it; the digest of the reply, and the directory of the layer.
    async fn take(&self, namespace: &str, name: &str, media_type: &str, blob: &[u8]) -> (String, String) {
        let key = format!("{namespace}/1/extract-7 {name}");
        let mounts = self.prepare(&key, "", &[]).await.unwrap();
        let folder = mounts[0].source.clone();
        let applied = self.apply(media_type, blob, mounts).await.unwrap();
        self.commit(&format!("{namespace}/2/{name}"), &key, &[]).await.unwrap();
        (applied.digest, folder)
    }

    /// The blob of a layer without a parent.
    async fn blob_of(&self, name: &str, media_type: &str) -> Result<Vec<u8>, tonic::Status> {
        let mounts = self.view("default/9/view", name).await.unwrap();
        let blob = self.diff_as(media_type, Vec::new(), mounts).await;
        self.remove("default/9/view").await.unwrap();
        blob
    }
}

/// The image of a layer: snapshots that share it have the same.
fn image(folder: &str) -> (u64, u64) {
    let found = fs::metadata(Path::new(folder).join("layer.vhd")).unwrap();
    (found.dev(), found.ino())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_has_the_digest_of_the_bytes_that_it_was_made_of() {
    let face = Face::start_as(product_with_lying_workers).await;
    let honest = marked("expanded bytes");
    // The reply names what came out, not what the blob holds: containerd compares it and refuses.
    let (named, false_folder) = face.take("one", "false", GZIP, &gzip(&honest)).await;
    assert_eq!(named, digest(&evil()));
    // Where it has a name all the same, nothing passes for the honest layer, and who shows the same bytes shares them.
    let (named, true_folder) = face.take("two", "true", TAR, &honest).await;
    assert_eq!(named, digest(&honest));
    assert_ne!(image(&true_folder), image(&false_folder));
    assert_eq!(face.blob_of("two/2/true", TAR).await.unwrap(), honest);
    let (named, same_folder) = face.take("three", "same", TAR, &evil()).await;
    assert_eq!((named, image(&same_folder)), (digest(&evil()), image(&false_folder)));
    assert_eq!(face.blob_of("three/2/same", TAR).await.unwrap(), evil());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_of_other_bytes_is_not_shared_and_gives_no_blob() {
    let face = Face::start_as(product_with_lying_workers).await;
    let hostile = marked("another image");
    let (named, false_folder) = face.take("one", "false", TAR, &hostile).await;
    assert_eq!(named, digest(&hostile), "never the digest of what the worker wrote");
    let (named, true_folder) = face.take("two", "true", TAR, &evil()).await;
    assert_eq!(named, digest(&evil()));
    assert_ne!(image(&true_folder), image(&false_folder));
    let before = face.engine.digests();
    for media_type in [TAR, GZIP] {
        let refused = face.blob_of("one/2/false", media_type).await.unwrap_err();
        assert!(refused.message().contains(&digest(&hostile)), "{refused}");
        assert_eq!(refused.code(), Code::DataLoss);
    }
    assert_eq!(face.engine.digests(), before, "a blob was committed");
    assert_eq!(face.blob_of("two/2/true", TAR).await.unwrap(), evil());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn false_counts_and_names_are_refused_and_leave_nothing() {
    let face = Face::start_as(product_with_lying_workers).await;
    // A lower layer with a directory that the others only imply.
    face.unpack(ROOT, "", &tar("etc/base", b"base")).await;
    for (lie, parent, packed) in [
        ("expanded count", "", true),
        ("blob count", "", true),
        ("blob format", "", true),
        ("tar bytes", "", false),
        ("image bytes", "", false),
        ("file bytes", "", false),
        ("record bytes", "", false),
        ("uuid", "", false),
        ("no lowers", ROOT, false),
    ] {
        let key = format!("default/3/extract-8 {lie}");
        let mounts = face.prepare(&key, parent, &[]).await.unwrap();
        let folder = mounts[0].source.clone();
        let tar = marked(lie);
        let refused = if packed {
            face.apply(GZIP, &gzip(&tar), mounts).await
        } else {
            face.apply(TAR, &tar, mounts).await
        };
        let refused = refused.expect_err(lie);
        assert_ne!(refused.code(), Code::Unimplemented, "{lie}: no other differ may try: {refused}");
        assert!(!Path::new(&folder).join("layer.vhd").exists(), "{lie}: {refused}");
        assert!(face.commit(&format!("default/4/{lie}"), &key, &[]).await.is_err(), "{lie} has a name");
        face.remove(&key).await.unwrap();
    }
    assert_eq!(face.list().await.len(), 1);
    // Without a parent the last one tells the truth.
    let (named, _) = face.take("default", "true", TAR, &marked("no lowers")).await;
    assert_eq!(named, digest(&marked("no lowers")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_expands_to_the_tar_that_it_is_labelled_with() {
    let face = Face::start_as(product_with_lying_workers).await;
    for lie in ["compressed bytes", "no gzip at all", "compressed count", "plain count"] {
        let (_, _) = face.take("default", lie, TAR, &marked(lie)).await;
        let before = face.engine.digests();
        let refused = face.blob_of(&format!("default/2/{lie}"), GZIP).await.expect_err(lie);
        assert_ne!(refused.code(), Code::Unimplemented, "{lie}: {refused}");
        assert_eq!(face.engine.digests(), before, "{lie}: a blob was committed");
        assert_eq!(face.blob_of(&format!("default/2/{lie}"), TAR).await.unwrap(), marked(lie));
    }
    face.take("default", "honest", TAR, &evil()).await;
    let blob = face.blob_of("default/2/honest", GZIP).await.unwrap();
    let mut plain = Vec::new();
    flate2::read::MultiGzDecoder::new(&blob[..]).read_to_end(&mut plain).unwrap();
    assert_eq!(plain, evil());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_vm_that_reads_a_sandbox_does_not_write_its_layer() {
    let face = Face::start_as(product_with_lying_workers).await;
    face.unpack(ROOT, "", &tar("etc/base", b"base")).await;
    // More than an inode holds.
    let text = "honest\n".repeat(1000);
    let folder = scratch::written(&face, ROOT, "default/4/written", &text).await;
    face.prepare("default/5/one", "default/4/written", &[]).await.unwrap();
    assert_eq!(scratch::file_in(&folder.join("layer.vhd"), "/etc/new"), text);
}
