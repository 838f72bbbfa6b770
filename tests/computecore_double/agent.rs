//! The agent as a Windows process whose disks are files: the guest of the test double of `computecore.dll`.
//!
//! ```text
//!   files_agent PIPE FOLDER      serial "GUID:unit" ─► FOLDER\GUID_unit
//! ```

#[cfg(windows)]
fn main() {
    use lcow_sys::windows::pipe::PipeStream;
    use std::{ffi::OsString, fs::File, io, path::PathBuf, sync::Arc, time::Duration};
    use svm_agent::{
        RealCodec,
        codec::Codec,
        link::{self, Platform},
    };
    use svm_protocol::{ErrorKind, WireError};

    struct Files(PathBuf);

    impl Platform for Files {
        fn open_disk(&self, serial: &str, writable: bool) -> Result<File, WireError> {
            let path = self.0.join(serial.replace(':', "_"));
            let file = File::options().read(true).write(writable).open(&path);
            file.map_err(|e| WireError::new(ErrorKind::Io, format!("disk {serial}: {e}")))
        }
        fn open_transfer(&self, serial: &str) -> Result<File, WireError> {
            self.open_disk(serial, true)
        }
        fn forget_disk(&self, _: &str) {}
        fn wake(&self, _: &[u8], _: Duration) -> Vec<String> {
            Vec::new()
        }
    }

    struct Output(Arc<PipeStream>);

    impl io::Write for Output {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            (&*self.0).write(buf)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let mut arguments = std::env::args_os().skip(1);
    let (pipe, folder): (OsString, OsString) = (arguments.next().unwrap(), arguments.next().unwrap());
    let begin = std::time::Instant::now();
    let stream = loop {
        match PipeStream::connect(&pipe, Duration::from_secs(5)) {
            Ok(stream) => break Arc::new(stream),
            Err(e) if begin.elapsed() > Duration::from_secs(10) => {
                eprintln!("files_agent: {e}");
                std::process::exit(1);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    eprintln!("files_agent: hello from the guest");
    let platform: Arc<dyn Platform> = Arc::new(Files(folder.into()));
    let codec: Arc<dyn Codec> = Arc::new(RealCodec::default());
    let ended = link::serve(&*stream, Output(stream.clone()), &platform, &codec);
    if let Err(e) = ended {
        eprintln!("files_agent: {e}");
    }
}

#[cfg(not(windows))]
fn main() {
    eprintln!("files_agent: for tests on Windows");
}
