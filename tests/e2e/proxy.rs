//! containerd with the product as its proxy snapshotter and differ: the configuration that an operator would write, and
//! the commands of both daemons.
//!
//! ```text
//!   dockerd -s lcow ─► containerd, root <folder>/containerd, state and socket /run/containerd
//!   ctr                    └─ gRPC ─► lcow-graphdriver serve --containerd-socket /run/lcow.sock
//! ```
//!
//! Both snapshotters are always there: the product's `lcow`, and `overlayfs` as a control and for foreign mounts. A
//! control without the product has `overlayfs` alone. Called by `engine`, and by the tests of the containerd face.

use crate::isolation::{Daemon, Room};
use std::{
    fmt::Write as _,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

/// Where the product listens, in the room.
pub(crate) const LCOW_SOCKET: &str = "/run/lcow.sock";
/// Where containerd listens by default.
pub(crate) const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// Plugins that no test asks for. Some of them would reach outside of the room, or only take time to start.
const DISABLED: &[&str] = &[
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.differ.v1.erofs",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.tracing",
];

/// Those of [`DISABLED`] that a comparison of snapshotters asks for.
const PEERS: &[&str] = &[
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.differ.v1.erofs",
];

/// Runs one of the project's scripts on the host; returns what it printed, without the last newline.
pub(crate) fn script(name: &str, args: &[&str]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name);
    let run = Command::new(&path).args(args).output().unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
    let error = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "scripts/{name} {args:?} failed, {}\n{error}", run.status);
    String::from_utf8(run.stdout).expect("UTF-8").trim_end().to_owned()
}

/// The product's folder of snapshots.
pub(crate) fn home(room: &Room) -> PathBuf {
    room.folder().join("lcow")
}

/// containerd's configuration; `version` is that of its format: 2 for 1.7, 3 for 2. With `blank`, the file system that
/// each of its snapshots begins as, there is the snapshotter blockfile, and erofs.
fn configuration(room: &Room, version: u32, with_lcow: bool, blank: Option<&Path>) -> String {
    let folder = room.folder().display();
    let is_peer = |plugin: &str| blank.is_some() && PEERS.contains(&plugin);
    let disabled: Vec<&str> = DISABLED.iter().copied().filter(|plugin| !is_peer(plugin)).collect();
    let mut text = format!(
        "version = {version}\nroot = \"{folder}/containerd\"\nstate = \"/run/containerd\"\n\
         disabled_plugins = {disabled:?}\n[debug]\n  level = \"info\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{folder}/opt\"\n"
    );
    let mut unpack = vec![("overlayfs", "walking")];
    let mut differs = vec!["walking"];
    if let Some(blank) = blank {
        let _ = write!(
            text,
            "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\n  scratch_file = \"{}\"\n  fs_type = \"ext4\"\n",
            blank.display()
        );
        differs.insert(0, "erofs");
    }
    if with_lcow {
        differs.insert(0, "lcow-diff");
        let _ = write!(
            text,
            "[proxy_plugins.lcow]\n  type = \"snapshot\"\n  address = \"{LCOW_SOCKET}\"\n  \
             platform = \"linux/amd64\"\n  capabilities = [\"rebase\", \"remap-ids\"]\n\
             [proxy_plugins.lcow.exports]\n  root = \"{}\"\n\
             [proxy_plugins.lcow-diff]\n  type = \"diff\"\n  address = \"{LCOW_SOCKET}\"\n  \
             platform = \"linux/amd64\"\n\
             [plugins.\"io.containerd.service.v1.diff-service\"]\n  default = {differs:?}\n",
            home(room).display()
        );
        unpack.push(("lcow", "lcow-diff"));
    }
    for (snapshotter, differ) in unpack {
        let _ = write!(
            text,
            "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux/amd64\"\n  \
             snapshotter = \"{snapshotter}\"\n  differ = \"{differ}\"\n"
        );
    }
    text
}

/// Starts containerd, and waits until it serves; `blank` as for [`configuration`].
pub(crate) fn start_containerd(room: &Room, version: u32, with_lcow: bool, blank: Option<&Path>) -> Daemon {
    let file = room.folder().join("containerd.toml");
    fs::write(&file, configuration(room, version, with_lcow, blank)).expect("configuration");
    let mut command = room.inside("containerd");
    command.arg("--config").arg(file);
    let mut daemon = room.daemon("containerd", command);
    room.wait_for("containerd", &mut daemon, || room.run(&["ctr", "version"]).ok());
    daemon
}

/// Starts the product as a service for containerd, and waits for its socket. `arguments` are further ones of `serve`.
pub(crate) fn start_lcow(room: &Room, name: &str, arguments: &[String]) -> Daemon {
    let mut command = room.inside(env!("CARGO_BIN_EXE_lcow-graphdriver"));
    command.args(["serve", "--containerd-socket", LCOW_SOCKET, "--containerd-root"]).arg(home(room));
    command.args(["--containerd-address", CONTAINERD_SOCKET, "--root"]).arg(room.folder().join("plugin"));
    command.args(["--socket", "/run/docker/plugins/lcow.sock"]).args(arguments);
    command.env("RUST_BACKTRACE", "1").env("RUST_LOG", "lcow_graphdriver=debug,info");
    let mut daemon = room.daemon(name, command);
    let socket = room.seen_from_outside(LCOW_SOCKET);
    room.wait_for(name, &mut daemon, || UnixStream::connect(&socket).is_ok());
    daemon
}
