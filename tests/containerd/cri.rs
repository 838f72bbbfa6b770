//! The product below Kubernetes: a client of the container runtime interface (CRI) drives containerd as kubelet does.
//!
//! ```text
//!   test ─► Kubelet ─CRI─► containerd ─► the product | overlayfs (the control)
//!              │               └ pulls ─► registry (loopback, plain HTTP by hosts.toml)
//!              └ ctr ─► the pinned image of sandboxes, made here
//! ```
//!
//! Pods use the node's network, as a network is none of a snapshotter's business. A pod with a user namespace cannot: it
//! gets an empty network namespace from a CNI plugin that makes nothing. What containerd knows of containers is read
//! through the CRI, what is left on the disk is looked at. Needs what the other tests of this program need.

use crate::{
    command::wait_until,
    image::{self, Image, LARGE, Layer, MOUNT_POINTS, Packing},
    isolation::Daemon,
    node::{Node, Snapshotter},
    proxy::{self, CONTAINERD_SOCKET, LCOW_SOCKET},
    registry::Registry,
    tarball::{self, Entry},
    tree::Tree,
};
use cri_client::runtime::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStats, ContainerStatsFilter,
    ContainerStatsRequest, ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ExecSyncResponse,
    FilesystemUsage, IdMapping, ImageFsInfoRequest, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    ListContainerStatsRequest, ListImagesRequest, ListPodSandboxRequest, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxState, PullImageRequest, RemoveContainerRequest,
    RemoveImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StatusRequest,
    StopContainerRequest, StopPodSandboxRequest, UserNamespace, VersionRequest,
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

/// containerd's namespace of everything that the CRI makes.
const NAMESPACE: &str = "k8s.io";
/// Longest time of one call: a call that hangs fails its test.
const CALL_LIMIT: Duration = Duration::from_mins(1);
/// Longest wait for what containerd and the product do by themselves.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest message: the output of a command in full.
const MESSAGE: usize = 32 << 20;
/// The image of sandboxes.
const PAUSE: &str = "example.com/pause:1";
/// What the CRI mounts into each container, besides what runc mounts.
const FILES: &[&str] = &["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
/// Seconds between two looks at the sizes of snapshots (`stats_collect_period`; 10 by default).
const COLLECT: u32 = 1;
/// Bytes that blocks and inodes make of usage more or less.
const SLACK: u64 = 256 << 10;
/// First host id of user namespaces.
const HOST_ID: u32 = 200_000;
/// Ids of a user namespace.
const HOST_IDS: u32 = 65_536;

/// How containerd pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pull {
    /// By the transfer service, the default from 2.1 on.
    Transfer,
    /// In the CRI's own code, as before.
    Local,
}

/// A pod.
#[derive(Debug)]
struct Pod {
    id: String,
    config: PodSandboxConfig,
}

/// A node with containerd's CRI on, and its client.
#[derive(Debug)]
struct Kubelet {
    node: Node,
    registry: Registry,
    /// The one that the CRI is configured to use.
    snapshotter: Snapshotter,
    pull: Pull,
    containerd: Option<Daemon>,
    runtime: tokio::runtime::Runtime,
    pods: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// An image of one layer that waits for ever, as a pod's sandbox does. Images of tests run `/bin/sh`.
fn pause() -> Image {
    let script = "#!/bin/busybox sh\nwhile :; do /bin/busybox sleep 1000; done\n";
    let mut entries = image::shell();
    entries.retain(|e| e.path != b"bin/sh");
    entries.push(Entry::file("bin/sh", script).mode(0o755));
    Image::new(vec![Layer::new(entries, Packing::Gzip)])
}

/// The node's network.
fn on_the_node() -> NamespaceOption {
    NamespaceOption { network: NamespaceMode::Node.into(), ..Default::default() }
}

/// A client of containerd's socket, as the host reaches it; connects at the first call, and again after a restart.
fn connect(runtime: &tokio::runtime::Runtime, node: &Node) -> Channel {
    let socket = node.containerd_socket();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    let _context = runtime.enter();
    Endpoint::from_static("http://localhost").timeout(CALL_LIMIT).connect_with_connector_lazy(connector)
}

impl Kubelet {
    fn start(snapshotter: Snapshotter, pull: Pull) -> Self {
        let node = Node::without_containerd();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("runtime of the client");
        let channel = connect(&runtime, &node);
        let registry = Registry::start();
        let mut kubelet = Self {
            pods: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE),
            images: ImageServiceClient::new(channel),
            node,
            registry,
            snapshotter,
            pull,
            containerd: None,
            runtime,
        };
        kubelet.write_files();
        kubelet.start_containerd();
        kubelet.import_pause();
        kubelet
    }

    /// Brings the image of sandboxes; the CRI takes note of it by an event.
    fn import_pause(&self) {
        let archive = self.node.scratch("pause").join("archive.tar");
        fs::write(&archive, pause().oci_archive(PAUSE)).expect("archive");
        let archive = archive.to_str().expect("UTF-8");
        let import = ["images", "import", "--snapshotter", self.snapshotter.name(), archive];
        self.node.ctr_in(NAMESPACE, &import);
        wait_until("the CRI to see the image of sandboxes", PATIENCE, || {
            self.image_names().contains(&PAUSE.to_owned()).then_some(())
        });
    }

    fn folder(&self) -> &Path {
        self.node.room.folder()
    }

    /// Configurations of containerd, of its registries, and of the plugin for networks.
    fn write_files(&self) {
        let folder = self.folder();
        let address = self.registry.address();
        let hosts = folder.join("certs.d").join(address.to_string());
        let network = folder.join("cni");
        for place in [&hosts, &network.join("conf"), &network.join("bin")] {
            fs::create_dir_all(place).expect("folder");
        }
        let text = format!(
            "server = \"http://{address}\"\n[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
        fs::write(hosts.join("hosts.toml"), text).expect("hosts.toml");
        let text = r#"{"cniVersion":"1.0.0","name":"none","plugins":[{"type":"none"}]}"#;
        fs::write(network.join("conf/10-none.conflist"), text).expect("network");
        // An interface that is not there: containerd asks for an address and no more.
        let script = r#"#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
    VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
    ADD) echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'"$CNI_NETNS"'"}],"ips":[{"address":"192.0.2.1/32","interface":0}]}' ;;
esac
"#;
        let plugin = network.join("bin/none");
        fs::write(&plugin, script).expect("plugin");
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).expect("mode of the plugin");
        fs::write(folder.join("cri.toml"), self.configuration()).expect("configuration");
    }

    /// containerd's configuration. Of runc, this environment allows neither a lower `oom_score_adj` nor the two options of
    /// `net.ipv4`.
    fn configuration(&self) -> String {
        let (folder, name) = (self.folder().display(), self.snapshotter.name());
        let differ = if self.snapshotter == Snapshotter::Lcow { "lcow-diff" } else { "walking" };
        let local = self.pull == Pull::Local;
        let home = self.node.home();
        let home = home.display();
        format!(
            r#"version = 3
root = "{folder}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.differ.v1.erofs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[debug]
  level = "info"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[proxy_plugins.lcow]
  type = "snapshot"
  address = "{LCOW_SOCKET}"
  platform = "linux/amd64"
  capabilities = ["rebase", "remap-ids"]
  [proxy_plugins.lcow.exports]
    root = "{home}"
[proxy_plugins.lcow-diff]
  type = "diff"
  address = "{LCOW_SOCKET}"
  platform = "linux/amd64"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.service.v1.diff-service"]
  default = ["lcow-diff", "walking"]
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "{name}"
  differ = "{differ}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{name}"
  stats_collect_period = {COLLECT}
  use_local_image_pull = {local}
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE}"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{folder}/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{folder}/cni/bin"]
    conf_dir = "{folder}/cni/conf"
    use_internal_loopback = true
"#
        )
    }

    fn start_containerd(&mut self) {
        let mut command = self.node.room.inside("containerd");
        command.arg("--config").arg(self.folder().join("cri.toml"));
        let mut daemon = self.node.room.daemon("containerd", command);
        self.node.room.wait_for("containerd", &mut daemon, || self.is_ready());
        self.containerd = Some(daemon);
    }

    /// Whether the CRI answers, runtime and network. It serves a moment later than containerd's other services.
    fn is_ready(&self) -> bool {
        let version = self.ask(self.pods.clone().version(VersionRequest::default()));
        let status = self.ask(self.pods.clone().status(StatusRequest::default()));
        let (Ok(version), Ok(status)) = (version, status) else { return false };
        assert_eq!((&version.runtime_name[..], &version.runtime_api_version[..]), ("containerd", "v1"));
        let conditions = status.status.expect("a status").conditions;
        ["RuntimeReady", "NetworkReady"]
            .iter()
            .all(|name| conditions.iter().any(|c| c.r#type == *name && c.status))
    }

    /// Whether the runtime can map the ids of mounts, which user namespaces of pods ask for.
    fn maps_mounts(&self) -> bool {
        let status = self.ask(self.pods.clone().status(StatusRequest::default())).expect("Status");
        let mut features = status.runtime_handlers.into_iter().filter_map(|handler| handler.features);
        features.any(|features| features.user_namespaces)
    }

    fn kill_containerd(&mut self) {
        self.containerd.take().expect("containerd runs").kill();
    }

    /// A power cut, and the start after it.
    fn reboot(&mut self) {
        drop(self.containerd.take());
        // That one comes without the CRI.
        self.node.reboot();
        self.node.kill_containerd();
        let channel = connect(&self.runtime, &self.node);
        self.pods = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE);
        self.images = ImageServiceClient::new(channel);
        self.start_containerd();
    }

    fn ask<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        self.runtime.block_on(call).map(Response::into_inner)
    }

    fn image_names(&self) -> Vec<String> {
        let reply = self.ask(self.images.clone().list_images(ListImagesRequest::default()));
        reply.expect("ListImages").images.into_iter().flat_map(|image| image.repo_tags).collect()
    }

    fn pull(&self, name: &str) -> String {
        let image = Some(ImageSpec { image: name.to_owned(), ..Default::default() });
        let request = PullImageRequest { image, sandbox_config: None };
        let reply = self.ask(self.images.clone().pull_image(request));
        reply.unwrap_or_else(|e| panic!("PullImage {name}: {e}")).image_ref
    }

    fn remove_image(&self, name: &str) {
        let image = Some(ImageSpec { image: name.to_owned(), ..Default::default() });
        self.ask(self.images.clone().remove_image(RemoveImageRequest { image })).expect("RemoveImage");
    }

    /// What the images' file system holds.
    fn image_file_system(&self) -> FilesystemUsage {
        let reply = self.ask(self.images.clone().image_fs_info(ImageFsInfoRequest {})).expect("ImageFsInfo");
        let [of_images] = &reply.image_filesystems[..] else { panic!("{reply:?}") };
        // 2.1 names none of containers: they are in the same one.
        assert!(reply.container_filesystems.iter().all(|s| s.fs_id == of_images.fs_id), "{reply:?}");
        of_images.clone()
    }

    /// The folder that statistics must name: kubelet looks at the file system that holds it.
    fn root_of_snapshotter(&self) -> PathBuf {
        match self.snapshotter {
            Snapshotter::Lcow => self.node.home(),
            Snapshotter::Overlayfs => self.folder().join("containerd/io.containerd.snapshotter.v1.overlayfs"),
        }
    }

    /// A pod in the node's network.
    fn run_pod(&self, name: &str) -> Pod {
        self.try_pod(name, on_the_node(), []).expect("RunPodSandbox")
    }

    fn try_pod(
        &self,
        name: &str,
        namespaces: NamespaceOption,
        annotations: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Pod, Status> {
        let context = LinuxSandboxSecurityContext { namespace_options: Some(namespaces) };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            annotations: annotations.into_iter().collect(),
            log_directory: self.node.scratch("logs").to_str().expect("UTF-8").to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.node.room.cgroup()),
                security_context: Some(context),
            }),
            ..Default::default()
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let reply = self.ask(self.pods.clone().run_pod_sandbox(request))?;
        Ok(Pod { id: reply.pod_sandbox_id, config })
    }

    /// States of all pods, by id.
    fn pod_states(&self) -> BTreeMap<String, PodSandboxState> {
        let reply = self.ask(self.pods.clone().list_pod_sandbox(ListPodSandboxRequest {}));
        let items = reply.expect("ListPodSandbox").items;
        items.into_iter().map(|pod| (pod.id.clone(), pod.state())).collect()
    }

    fn remove_pod(&self, pod: &Pod) {
        let pod_sandbox_id = pod.id.clone();
        self.ask(self.pods.clone().stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id }))
            .expect("StopPodSandbox");
        let pod_sandbox_id = pod.id.clone();
        self.ask(self.pods.clone().remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }))
            .expect("RemovePodSandbox");
    }

    /// Makes a container that sleeps.
    fn create(
        &self,
        pod: &Pod,
        name: &str,
        image: &str,
        annotations: &[(&str, &str)],
    ) -> Result<String, Status> {
        let linux = pod.config.linux.clone().expect("namespaces").security_context.expect("namespaces");
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: image.to_owned(), ..Default::default() }),
            command: vec!["/bin/sleep".to_owned(), "100000".to_owned()],
            annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: linux.namespace_options,
                }),
            }),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        self.ask(self.pods.clone().create_container(request)).map(|reply| reply.container_id)
    }

    /// Makes and starts a container that sleeps.
    fn run(&self, pod: &Pod, name: &str, image: &str, annotations: &[(&str, &str)]) -> String {
        let id = self.create(pod, name, image, annotations).expect("CreateContainer");
        assert_eq!(self.state(&id), ContainerState::ContainerCreated);
        self.start_container(&id);
        id
    }

    fn try_start(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.ask(self.pods.clone().start_container(request)).map(|_| ())
    }

    fn start_container(&self, id: &str) {
        self.try_start(id).expect("StartContainer");
        assert_eq!(self.state(id), ContainerState::ContainerRunning);
    }

    fn state(&self, id: &str) -> ContainerState {
        let request = ContainerStatusRequest { container_id: id.to_owned(), ..Default::default() };
        let reply = self.ask(self.pods.clone().container_status(request)).expect("ContainerStatus");
        reply.status.expect("a status").state()
    }

    fn remove_container(&self, id: &str) {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: 0 };
        self.ask(self.pods.clone().stop_container(request)).expect("StopContainer");
        assert_eq!(self.state(id), ContainerState::ContainerExited);
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.ask(self.pods.clone().remove_container(request)).expect("RemoveContainer");
    }

    /// Runs a shell in a container, whatever comes of it.
    fn try_exec(&self, id: &str, script: &str) -> ExecSyncResponse {
        let cmd = ["/bin/sh", "-ec", script].map(str::to_owned).to_vec();
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 0 };
        self.ask(self.pods.clone().exec_sync(request)).unwrap_or_else(|e| panic!("ExecSync {script}: {e}"))
    }

    /// Runs a shell in a container; returns what it printed.
    fn exec(&self, id: &str, script: &str) -> Vec<u8> {
        let reply = self.try_exec(id, script);
        let error = String::from_utf8_lossy(&reply.stderr);
        assert_eq!((reply.exit_code, &error[..]), (0, ""), "{script}");
        reply.stdout
    }

    /// The layer that a container writes to, by both calls; `None` until containerd has looked at it once.
    fn writable_layer(&self, id: &str) -> Option<FilesystemUsage> {
        let request = ContainerStatsRequest { container_id: id.to_owned() };
        let one = self.ask(self.pods.clone().container_stats(request)).expect("ContainerStats");
        let filter = Some(ContainerStatsFilter { id: id.to_owned(), ..Default::default() });
        let request = ListContainerStatsRequest { filter };
        let list = self.ask(self.pods.clone().list_container_stats(request)).expect("ListContainerStats");
        let layer = |stats: &ContainerStats| {
            assert_eq!(stats.attributes.as_ref().expect("attributes").id, id);
            let layer = stats.writable_layer.clone().expect("a writable layer");
            layer.used_bytes.is_some().then_some(layer)
        };
        let [in_list] = &list.stats[..] else { panic!("statistics of {id}: {list:?}") };
        layer(&one.stats.expect("statistics")).and(layer(in_list))
    }

    /// Bytes and inodes of the layer that a container writes to, once `wanted` holds of the bytes.
    fn usage(&self, id: &str, what: &str, wanted: impl Fn(u64) -> bool) -> (u64, u64) {
        wait_until(what, PATIENCE, || {
            let layer = self.writable_layer(id)?;
            let place = layer.fs_id.expect("a file system").mountpoint;
            assert_eq!(Path::new(&place), self.root_of_snapshotter());
            let (bytes, inodes) = (layer.used_bytes?.value, layer.inodes_used?.value);
            wanted(bytes).then_some((bytes, inodes))
        })
    }

    /// The root of a running container, as the host reaches it; needs no daemon.
    fn root_of(&self, id: &str) -> PathBuf {
        let file = format!("/run/containerd/io.containerd.runtime.v2.task/{NAMESPACE}/{id}/init.pid");
        let pid = fs::read_to_string(self.node.room.seen_from_outside(file)).expect("pid of the task");
        self.node.room.seen_from_outside(format!("/proc/{}/root", pid.trim()))
    }

    /// Fails unless a container sees what it must.
    fn assert_tree(&self, id: &str, expected: &Tree, what: &str) {
        let hidden = [MOUNT_POINTS, FILES].concat();
        let mut expected = expected.without(&hidden);
        // The CRI's files are made there.
        expected.change("/etc", |_| {});
        expected.assert_same(&Tree::of_folder(&self.root_of(id)).without(&hidden), what);
    }

    /// Removes all images, and fails unless nothing is left: no pod, no snapshot, no mount, no loop device, no file.
    fn assert_nothing_left(&self) {
        for name in self.image_names() {
            self.remove_image(&name);
        }
        assert_eq!(self.image_names(), Vec::<String>::new());
        assert_eq!(self.pod_states(), BTreeMap::new());
        assert_eq!(self.node.ctr_in(NAMESPACE, &["containers", "ls", "-q"]), "");
        wait_until("snapshots and content to be collected", PATIENCE, || {
            let list = ["snapshots", "--snapshotter", self.snapshotter.name(), "ls"];
            let snapshots = self.node.ctr_in(NAMESPACE, &list).lines().count();
            (snapshots <= 1 && self.node.ctr_in(NAMESPACE, &["content", "ls", "-q"]).is_empty()).then_some(())
        });
        wait_until("mounts, loop devices and layers to go", PATIENCE, || {
            let node = &self.node;
            (node.mounts().is_empty() && node.loops().is_empty() && node.layers().is_empty()).then_some(())
        });
        let table = self.node.room.mount_table();
        let rootfs = table.lines().find(|line| line.contains(" /run/containerd/"));
        assert_eq!(rootfs, None, "a container's mount is left");
    }
}

#[test]
fn a_pod_runs_a_pulled_image_and_leaves_nothing() {
    a_pod_lives(Snapshotter::Lcow, Pull::Transfer);
}

#[test]
fn a_pod_runs_an_image_that_the_cri_itself_pulled() {
    a_pod_lives(Snapshotter::Lcow, Pull::Local);
}

#[test]
fn a_pod_lives_on_the_control() {
    a_pod_lives(Snapshotter::Overlayfs, Pull::Transfer);
}

fn a_pod_lives(snapshotter: Snapshotter, pull: Pull) {
    let kubelet = Kubelet::start(snapshotter, pull);
    let image = image::full();
    let name = kubelet.registry.offer("full", &image);
    let before = kubelet.image_file_system();
    let id = kubelet.pull(&name);
    assert!(id.starts_with("sha256:") && image.blobs().contains_key(&id), "{id} is not the configuration");
    let mut names = kubelet.image_names();
    names.sort();
    assert_eq!(names, [name.clone(), PAUSE.to_owned()]);

    // What kubelet decides by, whether images have to be deleted.
    let system = wait_until("the image in the file system's statistics", PATIENCE, || {
        let system = kubelet.image_file_system();
        let used = |s: &FilesystemUsage| s.used_bytes.map_or(0, |v| v.value);
        (used(&system) >= used(&before) + 2 * LARGE as u64).then_some(system)
    });
    let place = system.fs_id.expect("a file system").mountpoint;
    assert_eq!(Path::new(&place), kubelet.root_of_snapshotter());
    assert!(fs::metadata(&place).is_ok_and(|m| m.is_dir()), "{place} is no folder");
    let (used, inodes) = (system.used_bytes.expect("bytes").value, system.inodes_used.expect("inodes").value);
    // Two images: shells, two large files, and everything that is small.
    assert!(used < 4 * LARGE as u64 && inodes > 100, "{used} bytes, {inodes} inodes");

    let pod = kubelet.run_pod("pod");
    assert_eq!(kubelet.pod_states(), BTreeMap::from([(pod.id.clone(), PodSandboxState::SandboxReady)]));
    let container = kubelet.run(&pod, "box", &name, &[]);
    let mut expected = image.tree();
    kubelet.assert_tree(&container, &expected, "the container");
    assert_eq!(kubelet.exec(&container, "cat /data/large"), image::random_bytes(1, LARGE));
    assert_eq!(
        kubelet.exec(&container, "cat /data/old; stat -c %a /data/kept /tmp"),
        b"changed\n700\n1777\n"
    );
    let failed = kubelet.try_exec(&container, "echo out; echo err >&2; exit 3");
    assert_eq!((&failed.stdout[..], &failed.stderr[..], failed.exit_code), (&b"out\n"[..], &b"err\n"[..], 3));

    let (empty, _) = kubelet.usage(&container, "statistics of the container", |_| true);
    assert!(empty < SLACK, "{empty} bytes before anything was written");
    kubelet.exec(&container, "dd if=/dev/urandom of=/data/five bs=1M count=5 2>/dev/null; sync -f /data");
    const FIVE: u64 = 5 << 20;
    let (bytes, inodes) = kubelet.usage(&container, "5 MiB in the statistics", |bytes| bytes >= FIVE);
    assert!(bytes <= empty + FIVE + SLACK, "{bytes} bytes");
    assert!((3..20).contains(&inodes), "{inodes} inodes");
    kubelet.exec(&container, "rm /data/five; rm -r /data/nested; echo more >>/data/old; sync -f /data");
    kubelet.usage(&container, "the deletion in the statistics", |bytes| bytes < empty + SLACK);
    expected.delete("/data/nested");
    expected.put_file("/data/old", 0o444, "changed\nmore\n");
    expected.change("/data", |_| {});
    kubelet.assert_tree(&container, &expected, "the changed container");

    // A second container of the same image sees nothing of the first.
    let other = kubelet.run(&pod, "other", &name, &[]);
    kubelet.assert_tree(&other, &image.tree(), "the second container");
    kubelet.remove_container(&other);
    kubelet.remove_container(&container);
    kubelet.remove_pod(&pod);
    kubelet.assert_nothing_left();
    // Once more, from the registry, and with containers that run when their pod is removed.
    kubelet.pull(&name);
    let digests: Vec<String> = image.layers.iter().map(|layer| image::digest(&layer.blob)).collect();
    assert_eq!(kubelet.registry.sent(&digests), 2 * digests.len(), "the blobs, twice");
    kubelet.import_pause();
    let pod = kubelet.run_pod("pod");
    let container = kubelet.run(&pod, "box", &name, &[]);
    kubelet.assert_tree(&container, &image.tree(), "the container of the second pull");
    kubelet.remove_pod(&pod);
    kubelet.assert_nothing_left();
}

#[test]
fn a_pod_goes_on_when_daemons_are_killed() {
    let mut kubelet = Kubelet::start(Snapshotter::Lcow, Pull::Transfer);
    let image = image::full();
    let name = kubelet.registry.offer("full", &image);
    kubelet.pull(&name);
    let pod = kubelet.run_pod("pod");
    let container = kubelet.run(&pod, "box", &name, &[]);
    kubelet.exec(&container, "mkdir /work && echo first >/work/file");
    let mut expected = image.tree();
    expected.put_directory("/work", 0o755);
    let mut text = "first\n".to_owned();
    let ready = BTreeMap::from([(pod.id.clone(), PodSandboxState::SandboxReady)]);
    for victims in [&["lcow"][..], &["containerd"], &["lcow", "containerd"]] {
        for victim in victims {
            if *victim == "lcow" { kubelet.node.kill_lcow() } else { kubelet.kill_containerd() }
        }
        // Without its snapshotter, containerd runs commands in what runs, and makes nothing new.
        if victims == ["lcow"] {
            text += "while it was away\n";
            kubelet.exec(&container, "echo while it was away >>/work/file");
            let status = kubelet.create(&pod, "too early", &name, &[]).expect_err("a container without us");
            assert!(status.message().contains("lcow.sock"), "{status}");
        }
        fs::write(kubelet.root_of(&container).join("data/old"), "by hand\n")
            .expect("a file of the container");
        if victims.contains(&"lcow") {
            kubelet.node.start_lcow();
        }
        if victims.contains(&"containerd") {
            kubelet.start_containerd();
        }
        assert_eq!(kubelet.pod_states(), ready, "{victims:?}");
        assert_eq!(kubelet.state(&container), ContainerState::ContainerRunning, "{victims:?}");
        text += "afterwards\n";
        kubelet.exec(&container, "echo afterwards >>/work/file");
        assert_eq!(kubelet.exec(&container, "cat /work/file"), text.as_bytes(), "{victims:?}");
        expected.put_file("/work/file", 0o644, &text);
        expected.put_file("/data/old", 0o444, "by hand\n");
        kubelet.assert_tree(&container, &expected, &format!("the container without {victims:?}"));
        let other = wait_until("containerd to connect again", PATIENCE, || {
            kubelet.create(&pod, "other", &name, &[]).ok()
        });
        kubelet.start_container(&other);
        kubelet.assert_tree(&other, &image.tree(), "a container of later");
        kubelet.remove_container(&other);
    }
    kubelet.exec(&container, "dd if=/dev/zero of=/data/big bs=1M count=8 2>/dev/null; sync -f /data");
    kubelet.usage(&container, "8 MiB in the statistics", |bytes| bytes >= 8 << 20);
    kubelet.remove_container(&container);
    kubelet.remove_pod(&pod);
    kubelet.assert_nothing_left();
}

#[test]
fn after_a_reboot_pods_are_made_anew_from_the_same_images() {
    let mut kubelet = Kubelet::start(Snapshotter::Lcow, Pull::Transfer);
    let image = image::full();
    let name = kubelet.registry.offer("full", &image);
    kubelet.pull(&name);
    let pod = kubelet.run_pod("pod");
    let container = kubelet.run(&pod, "box", &name, &[]);
    kubelet.exec(&container, "echo lost >/data/lost");
    kubelet.reboot();
    assert_eq!(kubelet.pod_states(), BTreeMap::from([(pod.id.clone(), PodSandboxState::SandboxNotready)]));
    // As kubelet does: what has ended is removed, and made anew.
    let request = RemoveContainerRequest { container_id: container };
    kubelet.ask(kubelet.pods.clone().remove_container(request)).expect("RemoveContainer after a reboot");
    kubelet.remove_pod(&pod);
    let pod = kubelet.run_pod("pod");
    let container = kubelet.run(&pod, "box", &name, &[]);
    kubelet.assert_tree(&container, &image.tree(), "the container after a reboot");
    let digests: Vec<String> = image.layers.iter().map(|layer| image::digest(&layer.blob)).collect();
    assert_eq!(kubelet.registry.sent(&digests), digests.len(), "the image was fetched again");
    kubelet.remove_container(&container);
    kubelet.remove_pod(&pod);
    kubelet.assert_nothing_left();
}

/// containerd 2.1 passes annotations of pods on to the sandbox's snapshot, and those of containers to none: a container's
/// size is the configured one.
#[test]
fn containers_have_the_configured_quota_and_sandboxes_their_pods_own() {
    let kubelet = Kubelet::start(Snapshotter::Lcow, Pull::Transfer);
    kubelet.node.stop_lcow();
    let arguments = ["--storage-opt", "lcow.sandboxsize=64MiB"].map(str::to_owned);
    let lcow = proxy::start_lcow(&kubelet.node.room, "lcow", &arguments);
    let name = kubelet.registry.offer("small", &image::small(1));
    kubelet.pull(&name);
    let annotation = |size: &str| [("containerd.io/snapshot/max-size".to_owned(), size.to_owned())];
    let pod = kubelet.try_pod("pod", on_the_node(), annotation("33554432")).expect("RunPodSandbox");
    let sizes = || -> Vec<u64> {
        let place = |layer: String| kubelet.node.home().join(layer).join("sandbox.vhd");
        let files = kubelet.node.layers().into_iter().map(place);
        files.filter_map(|file| Some(fs::metadata(file).ok()?.len())).collect()
    };
    const FOOTER: u64 = 512;
    assert_eq!(sizes(), [(32 << 20) + FOOTER], "the sandbox of the pod");

    let container = kubelet.run(&pod, "box", &name, &[("containerd.io/snapshot/max-size", "33554432")]);
    let full = kubelet.try_exec(&container, "dd if=/dev/zero of=/data/big bs=1M count=100");
    let error = String::from_utf8_lossy(&full.stderr);
    assert!(full.exit_code == 1 && error.contains("No space left on device"), "{error}");
    let kept = kubelet.exec(&container, "wc -c </data/big; sync -f /data");
    let kept: u64 = String::from_utf8_lossy(&kept).trim().parse().expect("a number");
    assert!((40 << 20..64 << 20).contains(&kept), "{kept} bytes fitted into 64 MiB");
    kubelet.usage(&container, "a full container in the statistics", |bytes| bytes >= kept);
    let after =
        kubelet.exec(&container, "rm /data/big; sync -f /data; echo after >/data/after; cat /data/after");
    assert_eq!(after, b"after\n", "a container that was full");

    let layers = kubelet.node.layers().len();
    for bad in ["lots", "-5", "0", "1k"] {
        let status =
            kubelet.try_pod("bad", on_the_node(), annotation(bad)).expect_err("a pod with a bad quota");
        assert!(status.message().contains("max-size"), "{bad}: {status}");
    }
    assert_eq!(kubelet.node.layers().len(), layers, "refused pods left layers");
    kubelet.remove_container(&container);
    kubelet.remove_pod(&pod);
    kubelet.assert_nothing_left();
    lcow.kill();
}

#[test]
fn a_pod_with_a_user_namespace_sees_its_own_ids() {
    a_pod_with_a_user_namespace(Snapshotter::Lcow);
}

#[test]
fn a_pod_with_a_user_namespace_on_the_control() {
    a_pod_with_a_user_namespace(Snapshotter::Overlayfs);
}

fn a_pod_with_a_user_namespace(snapshotter: Snapshotter) {
    let kubelet = Kubelet::start(snapshotter, Pull::Transfer);
    let image = image::full();
    let name = kubelet.registry.offer("full", &image);
    kubelet.pull(&name);
    let map = vec![IdMapping { host_id: HOST_ID, container_id: 0, length: HOST_IDS }];
    let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: map.clone(), gids: map };
    let namespaces = NamespaceOption { userns_options: Some(users), ..Default::default() };
    let pod = kubelet.try_pod("pod", namespaces, []).expect("RunPodSandbox with a user namespace");
    // The host sees the ids that the pod has there.
    let busybox = fs::metadata(kubelet.root_of(&pod.id).join("bin/busybox")).expect("the sandbox's busybox");
    assert_eq!((busybox.uid(), busybox.gid()), (HOST_ID, HOST_ID));
    // Files such as /etc/hosts are mounted into containers with mapped ids, which runc can from 1.2 on.
    let container = kubelet.create(&pod, "box", &name, &[]).expect("CreateContainer");
    match (kubelet.maps_mounts(), kubelet.try_start(&container)) {
        (true, Ok(())) => {
            let ids = kubelet.exec(&container, "id -u; cat /proc/self/uid_map");
            let ids = String::from_utf8_lossy(&ids).split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(ids, format!("0 0 {HOST_ID} {HOST_IDS}"));
            assert_eq!(kubelet.exec(&container, "stat -c %u:%g /data/nested"), b"1000:1001\n");
        }
        (false, Err(status)) => assert!(status.message().contains("idmap mounts not supported"), "{status}"),
        (supported, started) => panic!("runc maps mounts: {supported}, StartContainer: {started:?}"),
    }
    kubelet.remove_container(&container);
    kubelet.remove_pod(&pod);
    kubelet.assert_nothing_left();
}

#[test]
fn a_container_with_a_user_namespace_sees_its_own_ids() {
    a_container_with_a_user_namespace(Snapshotter::Lcow);
}

#[test]
fn a_container_with_a_user_namespace_on_the_control() {
    a_container_with_a_user_namespace(Snapshotter::Overlayfs);
}

/// As the CRI does it, but for mounts with mapped ids, which older versions of runc lack.
fn a_container_with_a_user_namespace(snapshotter: Snapshotter) {
    let kubelet = Kubelet::start(snapshotter, Pull::Transfer);
    let image = image::full();
    let name = kubelet.registry.offer("full", &image);
    kubelet.pull(&name);
    let (map, cgroup) = (format!("0:{HOST_ID}:{HOST_IDS}"), kubelet.node.room.cgroup().to_owned());
    let ctr = |args: &[&str]| kubelet.node.ctr_in(NAMESPACE, args);
    let run = ["run", "--detach", "--null-io", "--snapshotter", snapshotter.name(), "--cgroup", &cgroup];
    let mapped = ["--remap-labels", "--uidmap", &map, "--gidmap", &map, &name, "box", "/bin/sleep", "100000"];
    ctr(&[&run[..], &mapped].concat());
    let exec = |script: &str| ctr(&["tasks", "exec", "--exec-id", "exec", "box", "/bin/sh", "-ec", script]);
    let ids = exec("id -u; cat /proc/self/uid_map").split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(ids, format!("0 0 {HOST_ID} {HOST_IDS}"));
    exec("echo new >/data/made && chown 5:6 /data/made && echo more >>/data/old && rm -r /data/opaque");
    let seen = exec("stat -c %u:%g /bin/busybox /data/nested /data/made; cat /data/old; ls /data/nested");
    assert_eq!(seen, "0:0\n1000:1001\n5:6\nchanged\nmore\nagain-2\ndeeper\nlinked-3");
    let host = fs::metadata(kubelet.root_of("box").join("data/made")).expect("what the container made");
    assert_eq!((host.uid(), host.gid()), (HOST_ID + 5, HOST_ID + 6));
    if snapshotter == Snapshotter::Lcow {
        // The difference has the container's ids again; containerd's own differ writes the host's.
        let diff = ["snapshots", "--snapshotter", "lcow", "diff", "--media-type", image::LAYER, "box"];
        let file = kubelet.node.scratch("diff").join("tar");
        let command = format!("ctr -n {NAMESPACE} {} >{}", diff.join(" "), file.display());
        kubelet.node.room.run(&["sh", "-ec", &command]).expect_ok();
        let entries = tarball::parse(&fs::read(&file).expect("the difference"));
        let owner = |path: &str| entries.iter().find(|e| e.path == path.as_bytes()).map(|e| (e.uid, e.gid));
        assert_eq!(owner("data/made"), Some((5, 6)));
        assert_eq!(owner("data/old"), Some((0, 0)));
        assert!(owner("data/.wh.opaque").is_some(), "the diff lacks a whiteout");
        // A restart changes nothing for the container, nor for the next start of its task.
        kubelet.node.kill_lcow();
        kubelet.node.start_lcow();
        assert_eq!(exec("cat /data/made"), "new");
        ctr(&["tasks", "kill", "--signal", "SIGKILL", "box"]);
        ctr(&["tasks", "delete", "--force", "box"]);
        ctr(&["tasks", "start", "--detach", "--null-io", "box"]);
        assert_eq!(exec("cat /data/made; stat -c %u:%g /data/made /bin/busybox"), "new\n5:6\n0:0");
        // The product ends the lease of a difference a little later, or, after a kill, by its time: an hour.
        for lease in ctr(&["leases", "ls", "-q"]).split_whitespace() {
            ctr(&["leases", "rm", "--sync", lease]);
        }
    }
    ctr(&["tasks", "kill", "--signal", "SIGKILL", "box"]);
    ctr(&["tasks", "delete", "--force", "box"]);
    ctr(&["containers", "rm", "box"]);
    kubelet.assert_nothing_left();
}
