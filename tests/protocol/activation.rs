//! Sockets that systemd passes, told apart by `FileDescriptorName=` (`sd_listen_fds(3)`).
//!
//! ```text
//!   python3: bind, listen, descriptors 3 and 4, LISTEN_* ─exec─► serve ─► "ready"
//! ```

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Longest wait for a reply.
const REPLY: Duration = Duration::from_secs(30);

/// Does what systemd does: a socket for each name, from descriptor 3 on, and the variables for this process.
const SYSTEMD: &str = r"
import os, socket, sys
folder, names, command = sys.argv[1], sys.argv[2].split(':'), sys.argv[3:]
kept = []
for place, name in enumerate(names):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, name))
    listener.listen()
    kept.append(os.dup2(listener.fileno(), 100 + place))
for place, descriptor in enumerate(kept):
    os.dup2(descriptor, 3 + place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=':'.join(names))
os.execv(command[0], command)
";

struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the service with sockets of these names below `folder`, and waits until it is ready.
fn activated(folder: &Path, names: &str) -> Service {
    let mut command = Command::new("python3");
    command.args(["-c", SYSTEMD]).arg(folder).args([names, env!("CARGO_BIN_EXE_lcow-graphdriver"), "serve"]);
    command.arg("--root").arg(folder.join("root")).arg("--socket").arg(folder.join("own"));
    command.arg("--containerd-root").arg(folder.join("containerd-root"));
    let mut service = Service(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("python3"));
    let mut log = BufReader::new(service.0.stderr.take().expect("stderr"));
    let mut all = String::new();
    while !all.lines().last().unwrap_or_default().contains("ready") {
        assert!(log.read_line(&mut all).expect("log") > 0, "the service ended: {all}");
    }
    // A full pipe would stop the service.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    service
}

/// The beginning of the reply to a request, or to HTTP/2's preface.
fn reply(socket: &Path, request: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).unwrap_or_else(|e| panic!("{}: {e}", socket.display()));
    stream.set_read_timeout(Some(REPLY)).expect("socket");
    stream.write_all(request).expect("request");
    let mut bytes = vec![0; 16];
    let read = stream.read(&mut bytes).expect("reply");
    bytes.truncate(read);
    bytes
}

fn serves_docker(socket: &Path) {
    let request =
        b"POST /Plugin.Activate HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    assert!(reply(socket, request).starts_with(b"HTTP/1.1 200"), "{}", socket.display());
}

fn serves_containerd(socket: &Path) {
    /// RFC 9113, 3.4 and 6.5: the preface and an empty SETTINGS frame; a server answers with its SETTINGS.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    /// Type of a SETTINGS frame, behind 3 bytes of length.
    const SETTINGS: u8 = 4;
    assert_eq!(reply(socket, PREFACE).get(3), Some(&SETTINGS), "{}", socket.display());
}

#[test]
fn the_sockets_that_systemd_passes_are_told_apart_by_name() {
    // The default name of a descriptor is that of its unit: a unit of an earlier release names none.
    for docker in ["docker", "lcow-graphdriver.socket"] {
        let folder = tempfile::tempdir().expect("directory");
        let _service = activated(folder.path(), &format!("containerd:{docker}"));
        serves_docker(&folder.path().join(docker));
        serves_containerd(&folder.path().join("containerd"));
        assert!(!fs::exists(folder.path().join("own")).expect("directory"));
    }
}

#[test]
fn without_dockers_socket_only_containerd_is_served() {
    let folder = tempfile::tempdir().expect("directory");
    let _service = activated(folder.path(), "containerd");
    serves_containerd(&folder.path().join("containerd"));
    assert!(!fs::exists(folder.path().join("own")).expect("directory"), "dockerd's socket was made");
}
