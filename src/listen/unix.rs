//! Unix sockets.

use super::ListenError;
use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::net::{UnixListener, UnixStream, unix::SocketAddr};

/// Pause after an accept that failed for want of descriptors, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listening unix socket.
#[derive(Debug)]
pub struct UnixIncoming {
    listener: UnixListener,
    /// Path, device and inode of the socket that this process made; `None` for one that was handed over.
    made: Option<(PathBuf, u64, u64)>,
}

impl UnixIncoming {
    /// Listens on a new socket at `path`, mode 0600. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// A socket on which a process answers, or a path that is no socket. A stale socket is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let io = |action| move |source| ListenError::Io { action, path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(ListenError::NotASocket { path: path.to_owned() });
            }
            Ok(_) if StdStream::connect(path).is_ok() => {
                return Err(ListenError::InUse { path: path.to_owned() });
            }
            Ok(_) => tracing::info!(path = %path.display(), "replacing a stale socket"),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder).map_err(io("create the directory of"))?;
                }
            }
            Err(e) => return Err(io("look at")(e)),
        }
        let private = path.with_extension(format!("{}.new", std::process::id()));
        let _ = fs::remove_file(&private);
        let listener = UnixListener::bind(&private).map_err(io("bind"))?;
        let place = || -> io::Result<fs::Metadata> {
            fs::set_permissions(&private, fs::Permissions::from_mode(0o600))?;
            fs::rename(&private, path)?;
            fs::symlink_metadata(path)
        };
        match place() {
            Ok(metadata) => {
                Ok(Self { listener, made: Some((path.to_owned(), metadata.dev(), metadata.ino())) })
            }
            Err(e) => {
                let _ = fs::remove_file(&private);
                Err(io("rename")(e))
            }
        }
    }

    /// Takes a socket that systemd made (socket activation).
    pub fn adopt(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, made: None })
    }
}

impl axum::serve::Listener for UnixIncoming {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok(connection) => return connection,
                Err(e) => {
                    tracing::warn!(error = %e, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Drop for UnixIncoming {
    fn drop(&mut self) {
        let Some((path, dev, ino)) = &self.made else { return };
        // A successor may have replaced the socket already: only our own is removed.
        if fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (*dev, *ino)) {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/lcow.sock");
        let first = UnixIncoming::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(UnixIncoming::bind(&path), Err(ListenError::InUse { .. })));
        drop(first);
        assert!(!path.exists());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves its socket behind: a stale one");
        let second = UnixIncoming::bind(&path).unwrap();
        // Somebody else's socket at the path is not removed by our end.
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(second);
        assert!(path.exists());
        drop(other);
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(UnixIncoming::bind(&path), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }
}
