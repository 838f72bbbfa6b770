//! A block device that this process serves.
//!
//! ```text
//!   ext4 ─► /dev/nbdN ─► kernel's nbd ══ socket pair ══ thread here ─► Served::read, write
//! ```
//!
//! It presents to the kernel what is not a device: a window of one, the disk inside a VHDX, or a disk whose writes are kept
//! elsewhere. One thread waits in `NBD_DO_IT`, one serves requests; both end when the [`Device`] is dropped. Unmount it
//! before that: later reads fail. The caller assigns the device numbers. Called by `svm-agent` in a guest, where it is the
//! only user of the module.

use super::{Context, SysError};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Size of a sector in bytes, the smallest request of the kernel.
pub const SECTOR: u64 = 512;
/// Parameters of the module: no search for partitions on hostile disks, [`DEVICES`] devices.
pub const MODULE_PARAMETERS: &std::ffi::CStr = c"max_part=0 nbds_max=16";
/// Number of devices.
pub const DEVICES: u32 = 16;

// include/uapi/linux/nbd.h
/// Requests, all of which take a number or nothing.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Request {
    /// `NBD_SET_SOCK`: the descriptor of a socket.
    SetSock = 0xAB00,
    /// `NBD_SET_BLKSIZE`: bytes.
    SetBlkSize = 0xAB01,
    /// `NBD_DO_IT`.
    DoIt = 0xAB03,
    /// `NBD_CLEAR_SOCK`.
    ClearSock = 0xAB04,
    /// `NBD_SET_SIZE_BLOCKS`: number of blocks.
    SetSizeBlocks = 0xAB07,
    /// `NBD_DISCONNECT`.
    Disconnect = 0xAB08,
    /// `NBD_SET_FLAGS`: bits.
    SetFlags = 0xAB0A,
}
/// `NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH`.
const FLAGS: u64 = 1 | 4;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
/// Upper bound of a request, in bytes (`max_hw_sectors` of the driver is less).
const MAX_REQUEST: u32 = 32 << 20;
/// How long the device may take to start.
const START: Duration = Duration::from_secs(20);

/// The disk behind a device.
pub trait Served: Send + Sync + 'static {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// The reader of the device gets an input/output error.
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// As [`Served::read`].
    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()>;
}

/// A running device; dropping it stops it.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    file: Arc<File>,
    threads: Vec<JoinHandle<()>>,
}

fn control(file: &File, request: Request, argument: u64) -> io::Result<()> {
    // SAFETY: all these requests take a number or nothing; the kernel reads and writes no memory of this process.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, argument as libc::c_ulong) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Device {
    /// Presents `bytes` (whole sectors) of `served` as `/dev/nbd{number}`.
    ///
    /// # Errors
    /// [`SysError::Os`]: there is no such device (the module is not loaded), it is in use, or it does not start.
    pub fn start(number: u32, bytes: u64, served: Arc<dyn Served>) -> Result<Self, SysError> {
        let path = PathBuf::from(format!("/dev/nbd{number}"));
        let action = "set up the block device";
        let file = File::options().read(true).write(true).open(&path).context("open", &path)?;
        let (ours, theirs) = UnixStream::pair().context("make a socket pair for", &path)?;
        control(&file, Request::SetBlkSize, SECTOR).context(action, &path)?;
        control(&file, Request::SetSizeBlocks, bytes / SECTOR).context(action, &path)?;
        control(&file, Request::SetFlags, FLAGS).context(action, &path)?;
        control(&file, Request::SetSock, theirs.as_raw_fd() as u64).context(action, &path)?;
        // The kernel holds the socket now.
        drop(theirs);
        let mut device = Self { path, file: Arc::new(file), threads: Vec::new() };
        let kernel = device.file.clone();
        let spawn = |name: &str| std::thread::Builder::new().name(name.into());
        let waiting = spawn("nbd").spawn(move || {
            // Returns when the device has stopped; the reason does not matter then.
            let _ = control(&kernel, Request::DoIt, 0);
        });
        device.threads.push(waiting.context("start a thread for", &device.path)?);
        let answering = spawn("nbd-serve").spawn(move || {
            // The end of the stream is the end of the device.
            let _ = serve(&ours, &*served);
        });
        device.threads.push(answering.context("start a thread for", &device.path)?);
        device.wait_until_there(bytes)?;
        Ok(device)
    }

    fn wait_until_there(&self, bytes: u64) -> Result<(), SysError> {
        let begin = Instant::now();
        while (&*self.file).seek(SeekFrom::End(0)).context("ask for the size of", &self.path)? != bytes {
            if begin.elapsed() > START {
                let late = io::Error::from(io::ErrorKind::TimedOut);
                return Err(late).context("bring up", &self.path);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Path of the device.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Both fail if the kernel has already stopped it.
        let _ = control(&self.file, Request::Disconnect, 0);
        let _ = control(&self.file, Request::ClearSock, 0);
        for thread in self.threads.drain(..) {
            // A panic has been reported on standard error.
            let _ = thread.join();
        }
    }
}

/// Serves requests until the kernel disconnects.
fn serve(mut stream: &UnixStream, served: &dyn Served) -> io::Result<()> {
    let mut data = Vec::new();
    loop {
        let mut request = [0; 28];
        stream.read_exact(&mut request)?;
        if request[..4] != REQUEST_MAGIC.to_be_bytes() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let number =
            |at: usize, len: usize| request[at..at + len].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        // The upper half has flags that were not offered.
        let (command, offset, len) = (number(6, 2) as u16, number(16, 8), number(24, 4) as u32);
        if command == DISCONNECT {
            return Ok(());
        }
        let len = if matches!(command, READ | WRITE) { len } else { 0 };
        if len > MAX_REQUEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        data.resize(len as usize, 0);
        let done = match command {
            READ => served.read(&mut data, offset),
            WRITE => {
                stream.read_exact(&mut data)?;
                served.write(&data, offset)
            }
            FLUSH => Ok(()),
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        let error = if done.is_ok() { 0 } else { libc::EIO as u32 };
        let mut reply = Vec::with_capacity(16);
        reply.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
        reply.extend_from_slice(&error.to_be_bytes());
        reply.extend_from_slice(&request[8..16]);
        stream.write_all(&reply)?;
        if command == READ && done.is_ok() {
            stream.write_all(&data)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Memory(Mutex<Vec<u8>>);

    impl Served for Memory {
        fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let bytes = self.0.lock().unwrap();
            let from = bytes.get(offset as usize..offset as usize + buf.len());
            buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }

        fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            self.0.lock().unwrap()[offset as usize..offset as usize + buf.len()].copy_from_slice(buf);
            Ok(())
        }
    }

    fn request(command: u16, handle: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend_from_slice(&u32::from(command).to_be_bytes());
        request.extend_from_slice(&handle.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&len.to_be_bytes());
        request
    }

    fn answer(mut stream: &UnixStream, len: usize) -> (u32, u64, Vec<u8>) {
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], REPLY_MAGIC.to_be_bytes());
        let mut data = vec![0; len];
        stream.read_exact(&mut data).unwrap();
        (
            u32::from_be_bytes(reply[4..8].try_into().unwrap()),
            u64::from_be_bytes(reply[8..].try_into().unwrap()),
            data,
        )
    }

    #[test]
    fn requests_are_answered_by_their_handles_until_the_last() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let memory = Memory(Mutex::new((0..4096u32).map(|n| (n / 512) as u8).collect()));
        let server = std::thread::spawn(move || serve(&ours, &memory));
        let send = |bytes: &[u8]| (&theirs).write_all(bytes).unwrap();
        send(&request(READ, 7, 1024, 512));
        assert_eq!(answer(&theirs, 512), (0, 7, vec![2; 512]));
        send(&request(WRITE, 8, 512, 512));
        send(&[9; 512]);
        assert_eq!(answer(&theirs, 0).0, 0);
        send(&request(FLUSH, 9, 0, 0));
        assert_eq!(answer(&theirs, 0), (0, 9, vec![]));
        send(&request(READ, 10, 512, 1024));
        assert_eq!(answer(&theirs, 1024), (0, 10, [vec![9; 512], vec![2; 512]].concat()));
        for (command, offset) in [(READ, 4096), (17, 0)] {
            send(&request(command, 11, offset, 512));
            assert_eq!(answer(&theirs, 0), (libc::EIO as u32, 11, vec![]), "{command}");
        }
        send(&request(DISCONNECT, 12, 0, 0));
        assert!(server.join().unwrap().is_ok());
    }
}
