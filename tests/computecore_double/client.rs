//! The side of a test: the HCS backend on the double, whose agents come over a named pipe. Wine has no Hyper-V sockets.

use futures_util::{FutureExt, future::BoxFuture};
use lcow_graphdriver::svm::hcs::{
    AgentInput, AgentListener, AgentOutput, AgentTransport, HcsBackend, HcsConfig,
};
use lcow_sys::windows::{
    computecore::Library,
    pipe::{Instance, create_server},
    security::SecurityDescriptor,
};
use std::{ffi::OsString, io, sync::Arc, time::Duration};
use tokio::net::windows::named_pipe::NamedPipeServer;

/// In place of Hyper-V sockets.
#[derive(Debug)]
pub(crate) struct PipeTransport;

struct PipeListener(NamedPipeServer);

impl AgentTransport for PipeTransport {
    fn listen(&self, machine: uuid::Uuid) -> io::Result<Box<dyn AgentListener>> {
        let name = OsString::from(format!(r"\\.\pipe\lcow-double-{machine}"));
        let descriptor = SecurityDescriptor::parse("D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW)")?;
        Ok(Box::new(PipeListener(create_server(&name, Instance::First, &descriptor)?)))
    }
}

impl AgentListener for PipeListener {
    fn accept(self: Box<Self>, _: Duration) -> BoxFuture<'static, io::Result<(AgentInput, AgentOutput)>> {
        async move {
            self.0.connect().await?;
            let (input, output) = tokio::io::split(self.0);
            Ok((Box::new(input) as AgentInput, Box::new(output) as AgentOutput))
        }
        .boxed()
    }
}

/// A backend on the double, which is built as an example beside this test.
pub(crate) fn backend(config: HcsConfig) -> HcsBackend {
    let double = std::env::current_exe().unwrap();
    let double = double.parent().unwrap().join(r"..\examples\computecore_double.dll");
    HcsBackend::with(config, Library::load(Some(&double)), Arc::new(PipeTransport))
}
