//! The agent as the first process of a Linux guest.
//!
//! ```text
//!   /init ─ mounts ─ modules (/modules/NN-name.ko, in order) ─ port "lcow.agent" ─ link::serve … again and again
//!   serial "lun:C:N" ─► /sys/class/scsi_device/H:0:T:N/device/block/* ─► /dev/sdX      H = the C-th SCSI host
//! ```
//!
//! The only part of the agent that is Linux: it finds ports and disks, and wakes the machine. Everything that is
//! worth telling goes to the console. Called by the program `lcow-agent`.

use super::{
    codec::{Codec, RealCodec},
    link::{self, Platform},
    wire::{ErrorKind, WireError, Witness},
};
use crate::sys::linux::guest;
use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Name of the virtio-serial port that leads to the daemon.
pub const PORT_NAME: &str = "lcow.agent";
/// Modules of the initramfs, loaded in the order of their names.
const MODULES: &str = "/modules";
/// How long a disk that the daemon has attached may take to be seen.
const DISK_WAIT: Duration = Duration::from_mins(1);
/// How long the kernel may take to see a disk by itself, before it is told where to look: a controller drops events when
/// more disks come and go at one time than the guest has room for (virtio 1.2, 5.6.6.3), and on a full machine a disk
/// was not seen within 20 s while two hundred others went.
const SCAN_AFTER: Duration = Duration::from_secs(2);
/// How often a look is taken.
const LOOK: Duration = Duration::from_millis(1);
/// Pause while nobody is at the other end of the port.
const ALONE: Duration = Duration::from_millis(5);

/// Runs the agent for the life of the machine.
pub fn main() -> ! {
    if let Err(e) = run() {
        eprintln!("lcow-agent: {e}");
    }
    guest::end_machine()
}

fn run() -> io::Result<()> {
    guest::mount_basics().map_err(io::Error::other)?;
    load_modules()?;
    let codec: Arc<dyn Codec> = Arc::new(RealCodec);
    let platform: Arc<dyn Platform> = Arc::new(Guest);
    let path = wait_for(DISK_WAIT, port).ok_or_else(|| io::Error::other(format!("no port {PORT_NAME}")))?;
    loop {
        // Opened anew each time: that drops what a former daemon left in the port.
        let port = File::options().read(true).write(true).open(&path)?;
        link::serve(&port, port.try_clone()?, &platform, &codec)?;
        std::thread::sleep(ALONE);
    }
}

fn load_modules() -> io::Result<()> {
    let mut modules: Vec<PathBuf> = match fs::read_dir(MODULES) {
        Ok(entries) => entries.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>()?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    modules.sort();
    for module in &modules {
        guest::load_module(module).map_err(io::Error::other)?;
    }
    Ok(())
}

fn wait_for<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if start.elapsed() > limit {
            return None;
        }
        std::thread::sleep(LOOK);
    }
}

/// The device of the port, once it is there.
fn port() -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            let path = Path::new("/dev").join(entry.file_name());
            return path.exists().then_some(path);
        }
    }
    None
}

/// Controller and unit of a serial "lun:C:N".
fn parse_serial(serial: &str) -> Option<(usize, u32)> {
    let (controller, unit) = serial.strip_prefix("lun:")?.split_once(':')?;
    Some((controller.parse().ok()?, unit.parse().ok()?))
}

/// Number of a controller's host, and how Linux writes a unit there.
fn address(controller: usize, unit: u32) -> Option<(u32, u32)> {
    let mut hosts: Vec<u32> = fs::read_dir("/sys/class/scsi_host")
        .ok()?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.strip_prefix("host")?.parse().ok())
        .collect();
    hosts.sort_unstable();
    // Beyond 255 Linux counts units by their address on the wire, whose upper bits say "flat" (SAM-5, 4.7.7.4).
    Some((*hosts.get(controller)?, if unit < 256 { unit } else { unit | 0x4000 }))
}

/// Lets the kernel look for one unit, whatever it has heard of it.
fn scan(controller: usize, unit: u32) {
    if let Some((host, unit)) = address(controller, unit) {
        // A kernel that refuses has its own events still.
        let _ = fs::write(format!("/sys/class/scsi_host/host{host}/scan"), format!("0 0 {unit}"));
    }
}

/// The block device of a unit, if the kernel has found it.
fn block_device(controller: usize, unit: u32) -> Option<PathBuf> {
    let (host, unit) = address(controller, unit)?;
    let device = format!("/sys/class/scsi_device/{host}:0:0:{unit}/device/block");
    let name = fs::read_dir(device).ok()?.flatten().next()?.file_name();
    Some(Path::new("/dev").join(name))
}

struct Guest;

impl Guest {
    fn open(serial: &str, writable: bool, flags: i32) -> Result<File, WireError> {
        let (controller, unit) = parse_serial(serial).ok_or_else(|| {
            WireError::new(ErrorKind::Usage, format!("disk {serial}: not of the form lun:C:N"))
        })?;
        // The device is listed before it can be opened.
        let mut looked = Instant::now();
        let opened = wait_for(DISK_WAIT, || {
            if looked.elapsed() > SCAN_AFTER {
                scan(controller, unit);
                looked = Instant::now();
            }
            let path = block_device(controller, unit)?;
            File::options().read(true).write(writable).custom_flags(flags).open(path).ok()
        });
        opened.ok_or_else(|| {
            WireError::new(
                ErrorKind::Io,
                format!("disk {serial} has not come up within {}s", DISK_WAIT.as_secs()),
            )
        })
    }
}

impl Platform for Guest {
    fn open_disk(&self, serial: &str, writable: bool) -> Result<File, WireError> {
        Self::open(serial, writable, 0)
    }

    fn open_transfer(&self, serial: &str) -> Result<File, WireError> {
        Self::open(serial, true, libc::O_DIRECT)
    }

    fn forget_disk(&self, _: &str) {}

    fn wake(&self, entropy: &[u8], unix_time: Duration) -> Vec<String> {
        [guest::reseed(entropy), guest::set_clock(unix_time)]
            .into_iter()
            .filter_map(|done| done.err().map(|e| e.to_string()))
            .collect()
    }

    fn witness(&self) -> Option<Witness> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let mut random = [0; 16];
        File::open("/dev/urandom").ok()?.read_exact(&mut random).ok()?;
        Some(Witness { unix_nanos: u64::try_from(now.as_nanos()).ok()?, random })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_name_controller_and_unit() {
        assert_eq!(parse_serial("lun:0:7"), Some((0, 7)));
        assert_eq!(parse_serial("lun:3:63"), Some((3, 63)));
        for bad in ["", "lun", "lun:1", "lun:x:1", "lun:1:", "7", "lun:1:2:3"] {
            assert_eq!(parse_serial(bad), None, "{bad}");
        }
    }
}
