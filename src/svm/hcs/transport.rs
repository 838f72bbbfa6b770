//! How the agent of a machine reaches this process.
//!
//! ```text
//!   listen(runtime id) ── then the machine starts ──► accept ──► a pair of byte streams ──► svm::remote
//! ```
//!
//! Hyper-V sockets are the only transport in the program. They are behind a trait because Wine has none: tests use a
//! named pipe. Called by `hcs`.

use futures_util::{FutureExt, future::BoxFuture};
use lcow_sys::windows::hvsock::{HvStream, Listener};
use std::{
    io::{self, Read, Write},
    sync::Arc,
    time::Duration,
};
pub use svm_protocol::VSOCK_PORT;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes between a blocking end and the runtime, each way.
const BUFFER: usize = 256 << 10;

/// The reading end of an agent's stream.
pub type AgentInput = Box<dyn AsyncRead + Send + Unpin>;
/// The writing end of an agent's stream.
pub type AgentOutput = Box<dyn AsyncWrite + Send + Unpin>;

/// Makes listeners.
pub trait AgentTransport: Send + Sync + std::fmt::Debug + 'static {
    /// Listens for the agent of the machine with this runtime id; the machine has not started yet.
    ///
    /// # Errors
    /// What the system says.
    fn listen(&self, machine: uuid::Uuid) -> io::Result<Box<dyn AgentListener>>;
}

/// Waits for one agent.
pub trait AgentListener: Send {
    /// Its connection. Dropping the future gives up.
    fn accept(
        self: Box<Self>,
        patience: Duration,
    ) -> BoxFuture<'static, io::Result<(AgentInput, AgentOutput)>>;
}

/// Hyper-V sockets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hvsock;

impl AgentTransport for Hvsock {
    fn listen(&self, machine: uuid::Uuid) -> io::Result<Box<dyn AgentListener>> {
        Ok(Box::new(Listener::bind(machine, VSOCK_PORT)?))
    }
}

impl AgentListener for Listener {
    fn accept(
        self: Box<Self>,
        patience: Duration,
    ) -> BoxFuture<'static, io::Result<(AgentInput, AgentOutput)>> {
        async move {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            tokio::task::spawn_blocking(move || {
                let accepted = Listener::accept(&self, patience, || sender.is_closed());
                // If the waiter is gone, the connection is closed.
                let _ = sender.send(accepted);
            });
            let stream = receiver.await.map_err(io::Error::other)??;
            Ok(bridge(stream))
        }
        .boxed()
    }
}

/// Blocking sockets on threads of their own: the runtime's poller knows only network sockets for certain.
fn bridge(stream: HvStream) -> (AgentInput, AgentOutput) {
    let stream = Arc::new(stream);
    let runtime = tokio::runtime::Handle::current();
    let (input, mut to_us) = tokio::io::simplex(BUFFER);
    let (mut from_us, output) = tokio::io::simplex(BUFFER);
    let (reading, handle) = (stream.clone(), runtime.clone());
    tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; BUFFER];
        while let Ok(n) = (&*reading).read(&mut buffer) {
            if n == 0 || handle.block_on(to_us.write_all(&buffer[..n])).is_err() {
                break;
            }
        }
    });
    tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; BUFFER];
        while let Ok(n) = runtime.block_on(from_us.read(&mut buffer)) {
            if n == 0 || (&*stream).write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        stream.close();
    });
    (Box::new(input), Box::new(output))
}
