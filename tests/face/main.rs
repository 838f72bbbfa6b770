//! The service for containerd over its real transport, with the answers that virtual machines need
//! (`lcow.containerd.mounts=lcow-layer`): on Windows through a named pipe, whose golden replies are those of containerd's
//! own `windows-lcow` (`plugins/snapshots/lcow/lcow.go`), folder names aside.

#[cfg(target_os = "linux")]
mod conversion;
mod engine;
#[cfg(target_os = "linux")]
mod poison;
#[cfg(target_os = "linux")]
mod scratch;
mod transport;

use containerd_api::{
    diff::{ApplyRequest, DiffRequest, diff_client::DiffClient},
    snapshots::{
        CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
        RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest, ViewSnapshotRequest,
        snapshots_client::SnapshotsClient,
    },
    types::{Descriptor, Mount},
};
use engine::{Engine, digest};
use hyper_util::rt::TokioIo;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lcow-graphdriver");
/// Longest wait for the service to answer.
const READY: Duration = Duration::from_mins(1);
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const SIZE_GB: &str = "containerd.io/snapshot/io.microsoft.container.storage.rootfs.size-gb";
const LOCATION: &str = "containerd.io/snapshot/io.microsoft.container.storage.rootfs.location";

/// The product.
fn product(arguments: &[OsString]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments);
    command
}

/// A running service with its containerd; ended on drop.
struct Face {
    child: Child,
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "only Linux's tests start it again"))]
    arguments: Vec<OsString>,
    home: PathBuf,
    engine: Engine,
    snapshots: SnapshotsClient<Channel>,
    diffs: DiffClient<Channel>,
    folder: tempfile::TempDir,
}

impl Drop for Face {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// A tar with one file.
fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

/// Starts the service; its output goes to the log in `folder`.
fn spawn(mut command: Command, folder: &std::path::Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    command.env("RUST_LOG", "info").stdin(Stdio::null()).stderr(log.try_clone().unwrap()).stdout(log);
    command.spawn().unwrap()
}

impl Face {
    async fn start() -> Self {
        Self::start_as(product).await
    }

    /// As [`Face::start`]; `program` is the command of the service with its arguments.
    async fn start_as(program: impl Fn(&[OsString]) -> Command) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (address, content) =
            (transport::address(folder.path(), "face"), transport::address(folder.path(), "containerd"));
        let home = folder.path().join("containerd");
        let engine = Engine::start(&content);
        let options = ["lcow.containerd.mounts=lcow-layer", "lcow.minfree=0", "lcow.jail=best-effort"];
        let options = options.iter().flat_map(|option| ["--storage-opt", option]);
        let mut arguments: Vec<OsString> =
            ["serve", "--no-docker"].into_iter().chain(options).map(Into::into).collect();
        for (flag, value) in [
            ("--root", folder.path().join("root")),
            ("--containerd-socket", address.clone()),
            ("--containerd-root", home.clone()),
            ("--containerd-address", content.clone()),
        ] {
            arguments.extend([flag.into(), value.into()]);
        }
        let child = spawn(program(&arguments), folder.path());
        let dialled = address.clone();
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let address = dialled.clone();
            async move { transport::dial(address).await.map(TokioIo::new) }
        });
        let origin = format!("http://{}", transport::authority(&address));
        let channel = Endpoint::from_shared(origin).unwrap().connect_with_connector_lazy(connector);
        let face = Self {
            child,
            arguments,
            home,
            engine,
            snapshots: SnapshotsClient::new(channel.clone()),
            diffs: DiffClient::new(channel),
            folder,
        };
        face.wait_until_ready().await;
        face
    }

    /// Kills the service.
    #[cfg(target_os = "linux")]
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts the service again, after its end.
    #[cfg(target_os = "linux")]
    fn spawn_again(&mut self, program: impl Fn(&[OsString]) -> Command) {
        self.child = spawn(program(&self.arguments), self.folder.path());
    }

    async fn wait_until_ready(&self) {
        let begin = Instant::now();
        loop {
            let status = self.stat("nothing").await.unwrap_err();
            if status.code() == Code::NotFound {
                return;
            }
            assert!(begin.elapsed() < READY, "the service does not answer: {status}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Bytes and inodes of a snapshot.
    async fn usage(&self, key: &str) -> (i64, i64) {
        let request = UsageRequest { key: key.into(), ..UsageRequest::default() };
        let usage = self.snapshots.clone().usage(request).await.unwrap().into_inner();
        (usage.size, usage.inodes)
    }

    async fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest { key: key.into(), ..StatSnapshotRequest::default() };
        Ok(self.snapshots.clone().stat(request).await?.into_inner().info.unwrap())
    }

    async fn prepare(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            key: key.into(),
            parent: parent.into(),
            labels: labels(with),
            ..PrepareSnapshotRequest::default()
        };
        Ok(self.snapshots.clone().prepare(request).await?.into_inner().mounts)
    }

    async fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let request =
            ViewSnapshotRequest { key: key.into(), parent: parent.into(), ..ViewSnapshotRequest::default() };
        Ok(self.snapshots.clone().view(request).await?.into_inner().mounts)
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest { key: key.into(), ..MountsRequest::default() };
        Ok(self.snapshots.clone().mounts(request).await?.into_inner().mounts)
    }

    async fn commit(&self, name: &str, key: &str, with: &[(&str, &str)]) -> Result<(), Status> {
        let request = CommitSnapshotRequest {
            name: name.into(),
            key: key.into(),
            labels: labels(with),
            ..CommitSnapshotRequest::default()
        };
        self.snapshots.clone().commit(request).await.map(|_| ())
    }

    async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest { key: key.into(), ..RemoveSnapshotRequest::default() };
        self.snapshots.clone().remove(request).await.map(|_| ())
    }

    async fn list(&self) -> Vec<(String, i32)> {
        let mut stream =
            self.snapshots.clone().list(ListSnapshotsRequest::default()).await.unwrap().into_inner();
        let mut all = Vec::new();
        while let Some(block) = stream.message().await.unwrap() {
            all.extend(block.info.into_iter().map(|info| (info.name, info.kind)));
        }
        all.sort();
        all
    }

    /// Unpacks a tar as containerd's unpacker does, and commits it under `name`.
    async fn unpack(&self, name: &str, parent: &str, tar: &[u8]) {
        let key = format!("default/1/extract-7 {name}");
        let mounts = self.prepare(&key, parent, &[]).await.unwrap();
        let size = i64::try_from(tar.len()).unwrap();
        let applied = self.apply(TAR, tar, mounts).await.unwrap();
        assert_eq!((applied.media_type.as_str(), applied.size), (TAR, size));
        assert_eq!(applied.digest, digest(tar));
        self.commit(name, &key, &[]).await.unwrap();
    }

    /// Unpacks a blob of a media type; the descriptor of the tar.
    async fn apply(&self, media_type: &str, blob: &[u8], mounts: Vec<Mount>) -> Result<Descriptor, Status> {
        let blob = Descriptor {
            media_type: media_type.into(),
            digest: self.engine.put(blob),
            size: i64::try_from(blob.len()).unwrap(),
            ..Descriptor::default()
        };
        let request = ApplyRequest { diff: Some(blob), mounts, ..ApplyRequest::default() };
        Ok(self.diffs.clone().apply(request).await?.into_inner().applied.unwrap())
    }

    /// The uncompressed tar of the difference between two snapshots.
    async fn diff(&self, left: Vec<Mount>, right: Vec<Mount>) -> Result<Vec<u8>, Status> {
        self.diff_as(TAR, left, right).await
    }

    /// The blob of the difference between two snapshots.
    async fn diff_as(
        &self,
        media_type: &str,
        left: Vec<Mount>,
        right: Vec<Mount>,
    ) -> Result<Vec<u8>, Status> {
        let request = DiffRequest { left, right, media_type: media_type.into(), ..DiffRequest::default() };
        let diff = self.diffs.clone().diff(request).await?.into_inner().diff.unwrap();
        Ok(self.engine.get(&diff.digest))
    }

    fn folder_of(&self, id: &str) -> String {
        self.home.join(id).display().to_string()
    }

    /// The only mount of windows-lcow.
    fn lcow_layer(&self, id: &str, access: &str, parents: &[&str]) -> Vec<Mount> {
        let parents: Vec<String> = parents.iter().map(|id| self.folder_of(id)).collect();
        // A nil slice of Go.
        let parents =
            if parents.is_empty() { "null".to_owned() } else { serde_json::to_string(&parents).unwrap() };
        vec![Mount {
            r#type: "lcow-layer".into(),
            source: self.folder_of(id),
            target: String::new(),
            options: vec![access.into(), format!("parentLayerPaths={parents}")],
        }]
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replies_are_those_of_windows_lcow() {
    const BASE: &str = "default/2/sha256:base";
    const TOP: &str = "default/2/sha256:top";
    const BOX: &str = "default/3/box";
    let face = Face::start().await;
    // Folders are numbered: ca, cb, …
    let extract = "default/1/extract-1 sha256:base";
    let reference = [("containerd.io/snapshot.ref", "sha256:base")];
    assert_eq!(face.prepare(extract, "", &reference).await.unwrap(), face.lcow_layer("ca", "rw", &[]));
    let info = face.stat(extract).await.unwrap();
    assert_eq!((info.name.as_str(), info.parent.as_str(), info.kind()), (extract, "", Kind::Active));
    assert_eq!(info.labels, labels(&reference));
    assert!(info.created_at.as_ref().unwrap().seconds > 0 && info.created_at == info.updated_at);
    face.remove(extract).await.unwrap();

    let (base_tar, top_tar) = (tar("etc/base", b"base"), tar("etc/top", &vec![7; 100_000]));
    face.unpack(BASE, "", &base_tar).await;
    face.unpack(TOP, BASE, &top_tar).await;
    assert!(
        face.home.join("cb").join("layer.vhd").is_file() && face.home.join("cc").join("layer.vhd").is_file()
    );
    assert!(!face.home.join("cb").join("sandbox.vhdx").exists(), "a layer of an image has no scratch disk");
    let with = [(SIZE_GB, "1"), (LOCATION, if cfg!(windows) { r"C:\scratch" } else { "/var/scratch" })];
    let golden = face.lcow_layer("cd", "rw", &["cc", "cb"]);
    assert_eq!(face.prepare(BOX, TOP, &with).await.unwrap(), golden);
    assert_eq!(face.mounts(BOX).await.unwrap(), golden);
    assert!(face.home.join("cd").join("sandbox.vhdx").is_file());
    assert_eq!(face.view("default/4/two", TOP).await.unwrap(), face.lcow_layer("cc", "ro", &["cb"]));
    assert_eq!(face.view("default/4/one", BASE).await.unwrap(), face.lcow_layer("cb", "ro", &[]));
    assert_eq!(face.view("default/4/none", "").await.unwrap(), face.lcow_layer("cg", "ro", &[]));

    let info = face.stat(TOP).await.unwrap();
    assert_eq!((info.parent.as_str(), info.kind()), (BASE, Kind::Committed));
    let (bytes, inodes) = face.usage(TOP).await;
    assert!(bytes >= 100_000 && inodes >= 1, "{bytes} bytes, {inodes} inodes");
    let listed: Vec<(String, i32)> = [
        (BASE, Kind::Committed),
        (TOP, Kind::Committed),
        (BOX, Kind::Active),
        ("default/4/none", Kind::View),
        ("default/4/one", Kind::View),
        ("default/4/two", Kind::View),
    ]
    .map(|(name, kind)| (name.to_owned(), i32::from(kind)))
    .into();
    assert_eq!(face.list().await, listed);

    // What was unpacked comes out again, byte for byte.
    let (left, right) =
        (face.mounts("default/4/one").await.unwrap(), face.mounts("default/4/two").await.unwrap());
    assert_eq!(face.diff(left, right).await.unwrap(), top_tar);

    for (result, expected) in [
        (face.prepare(BOX, TOP, &[]).await.map(drop), Code::AlreadyExists),
        (face.prepare("default/5/x", "nothing", &[]).await.map(drop), Code::NotFound),
        (face.prepare("default/5/x", BOX, &[]).await.map(drop), Code::InvalidArgument),
        (face.prepare("default/5/x", TOP, &[(SIZE_GB, "much")]).await.map(drop), Code::InvalidArgument),
        (face.prepare("default/5/x", TOP, &[(LOCATION, "..")]).await.map(drop), Code::InvalidArgument),
        (face.mounts(TOP).await.map(drop), Code::FailedPrecondition),
        (face.commit(TOP, BOX, &[]).await, Code::AlreadyExists),
        (face.remove(TOP).await, Code::FailedPrecondition),
        (face.remove("nothing").await, Code::NotFound),
    ] {
        assert_eq!(code(result), expected);
    }
    assert_eq!(face.list().await, listed);
    for key in [BOX, "default/4/two", "default/4/one", "default/4/none", TOP, BASE] {
        face.remove(key).await.unwrap();
    }
    assert_eq!(face.list().await, []);
}

#[cfg(windows)]
#[test]
fn a_pipe_that_grpc_clients_cannot_name_is_refused() {
    for name in [r"\\.\pipe\lcow", r"\\.\pipe\lcow@", r"\\.\pipe\@localhost", r"\\.\pipe\lcow@local host"] {
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new(PROGRAM)
            .args(["serve", "--no-docker", "--containerd-socket", name, "--root"])
            .arg(folder.path())
            .arg("--containerd-root")
            .arg(folder.path().join("containerd"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(r"\\.\pipe\lcow@localhost"), "{name}: {text}");
    }
}
