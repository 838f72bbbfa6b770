//! How a test reaches a plugin: a unix socket on Linux, a named pipe on Windows. Everything above is the same.

use std::{io, path::PathBuf, process::Command};

#[cfg(unix)]
mod system {
    use super::*;

    /// A client's connection.
    pub(crate) type Stream = std::os::unix::net::UnixStream;

    pub(crate) fn connect(address: &std::path::Path) -> io::Result<Stream> {
        let stream = Stream::connect(address)?;
        stream.set_read_timeout(Some(super::super::REPLY))?;
        Ok(stream)
    }

    /// The address that the plugin of `folder` listens on.
    pub(crate) fn address(folder: &std::path::Path) -> PathBuf {
        folder.join("lcow.sock")
    }

    /// The flag that names the address.
    pub(crate) const FLAG: &str = "--socket";

    pub(crate) fn prepare(_: &mut Command) {}

    /// Asks a plugin to stop.
    pub(crate) fn ask_to_stop(child: &std::process::Child) {
        rustix::process::kill_process(rustix::process::Pid::from_child(child), rustix::process::Signal::TERM)
            .unwrap();
    }

    /// Whether the address still exists in the system.
    pub(crate) fn is_there(address: &std::path::Path) -> bool {
        address.exists()
    }
}

#[cfg(windows)]
mod system {
    use super::*;
    use lcow_sys::windows::{pipe::PipeStream, process::send_break};
    use std::{os::windows::process::CommandExt, time::Duration};

    /// A client's connection.
    pub(crate) type Stream = PipeStream;

    /// Longest wait for a free instance.
    const PATIENCE: Duration = Duration::from_secs(20);
    /// `CREATE_NEW_PROCESS_GROUP`: so that a break reaches this plugin alone.
    const NEW_GROUP: u32 = 0x200;

    pub(crate) fn connect(address: &std::path::Path) -> io::Result<Stream> {
        let stream = PipeStream::connect(address.as_os_str(), PATIENCE)?;
        stream.set_timeout(Some(super::super::REPLY));
        Ok(stream)
    }

    /// The address that the plugin of `folder` listens on.
    pub(crate) fn address(folder: &std::path::Path) -> PathBuf {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        PathBuf::from(format!(r"\\.\pipe\lcow-test-{name}"))
    }

    /// The flag that names the address.
    pub(crate) const FLAG: &str = "--pipe";

    pub(crate) fn prepare(command: &mut Command) {
        command.creation_flags(NEW_GROUP);
        // The access list for the system and administrators would exclude an ordinary user who runs the tests.
        command.args(["--pipe-security", "D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW)"]);
    }

    /// Asks a plugin to stop.
    pub(crate) fn ask_to_stop(child: &std::process::Child) {
        send_break(child.id()).unwrap();
    }

    /// Whether a plugin listens on the address.
    pub(crate) fn is_there(address: &std::path::Path) -> bool {
        PipeStream::connect(address.as_os_str(), Duration::ZERO).is_ok()
    }
}

#[allow(unused_imports, reason = "not every test program asks whether the address exists")]
pub(crate) use system::is_there;
pub(crate) use system::{FLAG, Stream, address, ask_to_stop, connect, prepare};
