//! Layers in a temporary folder, and tars to make them from.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, future::BoxFuture, stream};
use lcow_graphdriver::svm::{
    ApplyJob, ApplyOptions, ApplySummary, CompareJob, DiskSource, ExportJob, ExportKind, IdMaps, LayerDisk,
    LayerKind, ParentDisks, Pool, Purpose, SecondPair, SvmError, TarStream,
};
use std::{fs::File, io, path::PathBuf, sync::Arc};

pub(crate) struct Files {
    pub(crate) folder: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn writable(&self, name: &str) -> DiskSource {
        let path = self.path(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        DiskSource::read_write(Arc::new(file), path)
    }

    pub(crate) fn readable(&self, name: &str) -> DiskSource {
        DiskSource::read_only(Arc::new(File::open(self.path(name)).unwrap()), self.path(name))
    }

    pub(crate) fn apply_job(&self, name: &str) -> ApplyJob {
        ApplyJob {
            image: self.writable(&format!("{name}.vhd")),
            record: self.writable(&format!("{name}.record")),
            scratch: None,
            lowers: Vec::new(),
            larger: None,
            options: ApplyOptions::default(),
        }
    }

    /// Where an apply that needs larger blocks goes on: `NAME.larger.vhd` and `NAME.larger.record`.
    pub(crate) fn larger(&self, name: &str) -> Arc<dyn SecondPair> {
        let pair = ["vhd", "record"].map(|kind| self.path(&format!("{name}.larger.{kind}")));
        Arc::new(Larger(pair))
    }

    /// Applies `tar` as the layer `name`.
    pub(crate) async fn apply(&self, pool: &Pool, name: &str, tar: &[u8]) -> Result<ApplySummary, SvmError> {
        let lease = pool.lease(name, Purpose::Work).await?;
        lease.tar_to_layer(self.apply_job(name), body(tar, 60_000)).await
    }

    /// The image without its footer.
    pub(crate) fn image(&self, name: &str) -> DiskSource {
        let disk = self.readable(&format!("{name}.vhd"));
        let len = disk.file.metadata().unwrap().len() - 512;
        disk.window(0, len)
    }

    pub(crate) fn layer(&self, name: &str) -> LayerDisk {
        LayerDisk { disk: self.image(name), kind: LayerKind::Applied }
    }

    pub(crate) fn exact(&self, name: &str) -> ExportJob {
        let record = self.readable(&format!("{name}.record"));
        ExportJob { kind: ExportKind::Exact { image: self.image(name), record }, live: None }
    }

    pub(crate) fn canonical(&self, names: &[&str], parent: ParentDisks) -> ExportJob {
        let target = names.iter().map(|n| self.layer(n)).collect();
        let kind = ExportKind::Canonical {
            target,
            parent,
            format: 1,
            id_maps: IdMaps::default(),
            source_date_epoch: None,
        };
        ExportJob { kind, live: None }
    }

    pub(crate) fn compare(&self, names: &[&str]) -> CompareJob {
        let target = names.iter().map(|n| self.layer(n)).collect();
        CompareJob { target, parent: ParentDisks::Own, live: None }
    }

    pub(crate) async fn export(&self, pool: &Pool, id: &str, job: ExportJob) -> Result<Vec<u8>, SvmError> {
        collect(pool.lease(id, Purpose::Export).await?.layer_to_tar(job).await?).await
    }
}

/// Paths of a second pair.
struct Larger([PathBuf; 2]);

impl SecondPair for Larger {
    fn make(&self) -> BoxFuture<'_, io::Result<(DiskSource, DiskSource)>> {
        let make = |path: &PathBuf| {
            let file = File::options().read(true).write(true).create_new(true).open(path)?;
            Ok::<_, io::Error>(DiskSource::read_write(Arc::new(file), path))
        };
        let made = make(&self.0[0]).and_then(|image| Ok((image, make(&self.0[1])?)));
        Box::pin(async { made })
    }
}

pub(crate) async fn collect(mut tar: TarStream) -> Result<Vec<u8>, SvmError> {
    let mut all = Vec::new();
    while let Some(chunk) = tar.next().await {
        all.extend_from_slice(&chunk?);
    }
    assert!(tar.complete(), "a stream without error must be complete");
    Ok(all)
}

pub(crate) fn body(content: &[u8], chunk: usize) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
    let content = Bytes::copy_from_slice(content);
    let all: Vec<_> =
        (0..content.len()).step_by(chunk).map(|at| (at, (at + chunk).min(content.len()))).collect();
    stream::iter(all.into_iter().map(move |(a, b)| Ok(content.slice(a..b))))
}

/// Bytes that compress badly and differ by `seed`.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A tar in the making.
#[derive(Default)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    pub(crate) fn entry(mut self, name: &str, flag: u8, content: &[u8], link: &str) -> Self {
        let mut header = vec![0; 512];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, if flag == b'5' { b"0000755\0" } else { b"0000644\0" });
        put(108, b"0000000\x000000000\x00");
        put(124, format!("{:011o}\0", content.len()).as_bytes());
        put(136, b"14000000000\0");
        put(148, b"        ");
        put(156, &[flag]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A symbolic link with a target of any length.
    pub(crate) fn long_link(self, name: &str, target: &str) -> Self {
        let body = target.len() + " linkpath=\n".len();
        let len = (body..body + 20).find(|len| len.to_string().len() + body == *len).unwrap();
        let pax = format!("{len} linkpath={target}\n");
        self.entry("pax", b'x', pax.as_bytes(), "").entry(name, b'2', b"", "x")
    }

    pub(crate) fn folder(self, name: &str) -> Self {
        self.entry(name, b'5', b"", "")
    }

    pub(crate) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(name, b'0', content, "")
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize((self.0.len() + 1024).next_multiple_of(10_240), 0);
        self.0
    }
}

/// A tar with `files` files of `bytes` each, in folders of 100.
pub(crate) fn tree(files: usize, bytes: usize, seed: u64) -> Vec<u8> {
    let mut tar = Tar::default();
    for n in 0..files {
        if n % 100 == 0 {
            tar = tar.folder(&format!("d{}/", n / 100));
        }
        tar = tar.file(&format!("d{}/f{n}", n / 100), &noise(bytes, seed + n as u64));
    }
    tar.entry("link", b'2', b"", "d0/f0").end()
}
