//! How a test reaches the service, and the service its containerd: unix sockets, or named pipes on Windows.

use std::{
    io,
    path::{Path, PathBuf},
};

/// The address of the service, or of its containerd, for a test with this directory.
#[cfg(unix)]
pub(crate) fn address(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.sock"))
}

/// The authority that grpc-go sends with each call: "localhost" for a unix socket.
#[cfg(unix)]
pub(crate) fn authority(_: &Path) -> String {
    "localhost".to_owned()
}

#[cfg(unix)]
pub(crate) async fn dial(address: PathBuf) -> io::Result<tokio::net::UnixStream> {
    tokio::net::UnixStream::connect(address).await
}

/// Clients of a listener at `address`.
#[cfg(unix)]
pub(crate) fn incoming(
    address: &Path,
) -> impl futures_util::Stream<Item = io::Result<tokio::net::UnixStream>> + use<> {
    let listener = tokio::net::UnixListener::bind(address).unwrap();
    futures_util::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    })
}

#[cfg(windows)]
pub(crate) use pipe::{address, authority, dial, incoming};

#[cfg(windows)]
mod pipe {
    use super::*;
    use std::{
        pin::Pin,
        task::{Context, Poll},
        time::Duration,
    };
    use tokio::{
        io::{AsyncRead, AsyncWrite, ReadBuf},
        net::windows::named_pipe::{ClientOptions, NamedPipeClient, NamedPipeServer, ServerOptions},
    };
    use tonic::transport::server::Connected;

    /// `ERROR_PIPE_BUSY`: the next instance does not exist yet.
    const BUSY: i32 = 231;

    pub(crate) fn address(folder: &Path, name: &str) -> PathBuf {
        // The directory's name is random.
        let folder = folder.file_name().unwrap().to_string_lossy().replace('.', "-");
        PathBuf::from(format!(r"\\.\pipe\lcow-{name}-{folder}@localhost"))
    }

    /// The whole name, percent-encoded but for the `@`: what stands before it counts as user information, where `%` is
    /// allowed.
    pub(crate) fn authority(address: &Path) -> String {
        address.to_str().unwrap().replace('\\', "%5C")
    }

    pub(crate) async fn dial(address: PathBuf) -> io::Result<NamedPipeClient> {
        loop {
            match ClientOptions::new().open(&address) {
                Err(e) if e.raw_os_error() == Some(BUSY) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                opened => return opened,
            }
        }
    }

    /// A client's connection, as tonic's server takes it.
    pub(crate) struct Pipe(NamedPipeServer);

    impl Connected for Pipe {
        type ConnectInfo = ();

        fn connect_info(&self) {}
    }

    impl AsyncRead for Pipe {
        fn poll_read(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(context, buf)
        }
    }

    impl AsyncWrite for Pipe {
        fn poll_write(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(context, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(context)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(context)
        }
    }

    /// Clients of a pipe `address`.
    pub(crate) fn incoming(address: &Path) -> impl futures_util::Stream<Item = io::Result<Pipe>> + use<> {
        let name = address.to_owned();
        let first = ServerOptions::new().first_pipe_instance(true).create(&name).unwrap();
        futures_util::stream::unfold((name, first), |(name, waiting)| async {
            if let Err(error) = waiting.connect().await {
                return Some((Err(error), (name, waiting)));
            }
            let next = ServerOptions::new().create(&name).unwrap();
            Some((Ok(Pipe(waiting)), (name, next)))
        })
    }
}
