//! The agent as the first process of a Linux guest.
//!
//! ```text
//!   /init ─ mounts ─ modules (/modules/NN-name.ko, in order) ─┬─ virtio port "lcow.agent" (QEMU)    ─┬─ link::serve …
//!                                                             └─ vsock to the host (Hyper-V)        ─┘  again and again
//!   serial "lun:C:N" ─► /sys/class/scsi_device/H:0:0:N/device/block/* ─► /dev/sdX      H = the C-th SCSI host
//!   serial "GUID:N"  ─► the same                                                       H = that of the VMBus device
//! ```
//!
//! The guest uses the first transport that it finds, unless the kernel command line names one (`lcow.agent=port` or
//! `vsock`). A VM whose daemon does not answer ends. This is the Linux-specific part of the agent: it finds ports and
//! disks, and sets clock and random numbers. Messages go to the console. Called by the program `lcow-agent`.

use super::{
    RealCodec,
    codec::Codec,
    link::{self, Platform},
    mount::GuestMounter,
};
use lcow_sys::linux::{guest, vsock};
use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use svm_protocol::{ErrorKind, PORT_NAME, VSOCK_PORT, WireError, Witness};

/// Modules of the initramfs, loaded in the order of their names.
const MODULES: &str = "/modules";
/// Modules that are loaded before the first mount of a sandbox.
const MOUNT_MODULES: &str = "/modules-mount";
/// How long to wait for a disk that the daemon has attached.
const DISK_WAIT: Duration = Duration::from_mins(1);
/// How long to wait for the kernel to find a disk by itself before scanning for it: a controller drops events if more
/// disks come and go at one time than the guest has buffers for (virtio 1.2, 5.6.6.3). On a full VM a disk was not found
/// within 20 s while two hundred others were detached.
const SCAN_AFTER: Duration = Duration::from_secs(2);
/// Interval of polling.
const LOOK: Duration = Duration::from_millis(1);
/// Pause while the other end of the port is closed.
const ALONE: Duration = Duration::from_millis(5);

/// Runs the agent until the VM ends.
pub fn main() -> ! {
    if let Err(e) = run() {
        eprintln!("lcow-agent: {e}");
    }
    guest::end_machine()
}

fn run() -> io::Result<()> {
    guest::mount_basics().map_err(io::Error::other)?;
    load_modules()?;
    let codec: Arc<dyn Codec> =
        Arc::new(RealCodec::mounting(Arc::new(GuestMounter::new(MOUNT_MODULES.into()))));
    let system = System::new("/");
    let platform: Arc<dyn Platform> = Arc::new(Guest { system: system.clone() });
    let wanted = Wanted::of(&fs::read_to_string("/proc/cmdline")?)?;
    let way = wait_for(DISK_WAIT, || system.way(wanted))
        .ok_or_else(|| io::Error::other(format!("no port {PORT_NAME}, and no VMBus of Hyper-V")))?;
    loop {
        // Opened again each time: that discards what an earlier daemon left in the port.
        let stream = match &way {
            Way::Port(path) => File::options().read(true).write(true).open(path)?,
            Way::Vsock => dial()?,
        };
        link::serve(&stream, stream.try_clone()?, &platform, &codec)?;
        std::thread::sleep(ALONE);
    }
}

/// Connects to the daemon. It listens before the VM starts, but the driver of the sockets may not be ready yet.
fn dial() -> io::Result<File> {
    let mut last = None;
    let stream = wait_for(DISK_WAIT, || match vsock::connect(vsock::HOST, VSOCK_PORT) {
        Ok(stream) => Some(stream),
        Err(e) => {
            last = Some(e);
            std::thread::sleep(ALONE);
            None
        }
    });
    stream.ok_or_else(|| {
        let heard = last.map_or_else(String::new, |e| format!(": {e}"));
        io::Error::other(format!("the daemon does not answer{heard}"))
    })
}

/// The transport that the kernel command line names: `lcow.agent=port|vsock`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// None: the first that is found.
    Any,
    Port,
    Vsock,
}

impl Wanted {
    fn of(line: &str) -> io::Result<Self> {
        // As for the kernel's own parameters, the last one counts.
        match line.split_whitespace().filter_map(|word| word.strip_prefix("lcow.agent=")).next_back() {
            None => Ok(Self::Any),
            Some("port") => Ok(Self::Port),
            Some("vsock") => Ok(Self::Vsock),
            Some(other) => Err(io::Error::other(format!("lcow.agent={other}: port or vsock is known"))),
        }
    }
}

/// A transport to the daemon.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// A virtio-serial port.
    Port(PathBuf),
    /// A socket to the host.
    Vsock,
}

/// Loads the modules that every VM needs; with a kernel that has them built in there is no directory.
fn load_modules() -> io::Result<()> {
    let directory = Path::new(MODULES);
    if directory.exists() { guest::load_modules(directory, c"").map_err(io::Error::other) } else { Ok(()) }
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

/// Address of a disk, as the backends name it.
#[derive(Debug, PartialEq, Eq)]
enum DiskAddress<'a> {
    /// `lun:C:N`: unit N of the C-th SCSI host (QEMU).
    Lun { controller: usize, unit: u32 },
    /// `GUID:N`: unit N of the controller with this GUID on the VMBus (Hyper-V).
    Vmbus { controller: &'a str, unit: u32 },
}

impl<'a> DiskAddress<'a> {
    fn parse(serial: &'a str) -> Option<Self> {
        if let Some(rest) = serial.strip_prefix("lun:") {
            let (controller, unit) = rest.split_once(':')?;
            return Some(Self::Lun { controller: controller.parse().ok()?, unit: unit.parse().ok()? });
        }
        let (controller, unit) = serial.split_once(':')?;
        // It becomes part of a path.
        let is_guid =
            controller.len() == 36 && controller.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
        is_guid.then_some(Self::Vmbus { controller, unit: unit.parse().ok()? })
    }
}

/// The kernel's file systems, below a directory: `/`, or a test's own.
#[derive(Debug, Clone)]
struct System {
    root: PathBuf,
}

impl System {
    fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn entries(&self, directory: &str) -> Option<impl Iterator<Item = String> + use<>> {
        let entries = fs::read_dir(self.root.join(directory)).ok()?;
        Some(entries.flatten().filter_map(|e| e.file_name().into_string().ok()))
    }

    /// The transport to the daemon, as soon as there is one.
    fn way(&self, wanted: Wanted) -> Option<Way> {
        let port = || self.port().map(Way::Port);
        // Only Hyper-V has that bus, and it has no virtio ports: the result does not depend on the order of detection.
        let vsock = || self.entries("sys/bus/vmbus/devices")?.next().map(|_| Way::Vsock);
        match wanted {
            Wanted::Any => port().or_else(vsock),
            Wanted::Port => port(),
            Wanted::Vsock => Some(Way::Vsock),
        }
    }

    /// The device of the port, once it is there.
    fn port(&self) -> Option<PathBuf> {
        let class = "sys/class/virtio-ports";
        for entry in self.entries(class)? {
            let name =
                fs::read_to_string(self.root.join(class).join(&entry).join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                let path = self.root.join("dev").join(entry);
                return path.exists().then_some(path);
            }
        }
        None
    }

    /// The SCSI host of the controller, and how Linux writes the unit there.
    fn address(&self, place: &DiskAddress<'_>) -> Option<(u32, u32)> {
        let number = |name: String| -> Option<u32> { name.strip_prefix("host")?.parse().ok() };
        Some(match *place {
            DiskAddress::Lun { controller, unit } => {
                let mut hosts: Vec<u32> = self.entries("sys/class/scsi_host")?.filter_map(number).collect();
                hosts.sort_unstable();
                // Beyond 255 Linux counts units by their address on the wire, whose upper bits say "flat" (SAM-5, 4.7.7.4).
                (*hosts.get(controller)?, if unit < 256 { unit } else { unit | 0x4000 })
            }
            DiskAddress::Vmbus { controller, unit } => {
                let directory = format!("sys/bus/vmbus/devices/{}", controller.to_ascii_lowercase());
                (self.entries(&directory)?.find_map(number)?, unit)
            }
        })
    }

    /// Makes the kernel scan for one unit, independent of events.
    fn scan(&self, place: &DiskAddress<'_>) {
        if let Some((host, unit)) = self.address(place) {
            // If the kernel refuses, its own events remain.
            let scan = self.root.join(format!("sys/class/scsi_host/host{host}/scan"));
            let _ = fs::write(scan, format!("0 0 {unit}"));
        }
    }

    /// The SCSI device at an address, if the kernel has found it: a directory in sysfs.
    fn scsi_device(&self, place: &DiskAddress<'_>) -> Option<PathBuf> {
        let (host, unit) = self.address(place)?;
        let device = self.root.join(format!("sys/class/scsi_device/{host}:0:0:{unit}/device"));
        device.exists().then_some(device)
    }

    /// The block device at an address, if the kernel has found it.
    fn block_device(&self, place: &DiskAddress<'_>) -> Option<PathBuf> {
        let name = fs::read_dir(self.scsi_device(place)?.join("block")).ok()?.flatten().next()?.file_name();
        Some(self.root.join("dev").join(name))
    }
}

struct Guest {
    system: System,
}

impl Guest {
    fn open(&self, serial: &str, writable: bool, flags: i32) -> Result<File, WireError> {
        let place = DiskAddress::parse(serial).ok_or_else(|| {
            WireError::new(ErrorKind::Usage, format!("disk {serial}: neither of the form lun:C:N nor GUID:N"))
        })?;
        // The device is listed before it can be opened.
        let mut looked = Instant::now();
        let opened = wait_for(DISK_WAIT, || {
            if looked.elapsed() > SCAN_AFTER {
                self.system.scan(&place);
                looked = Instant::now();
            }
            let path = self.system.block_device(&place)?;
            File::options().read(true).write(writable).custom_flags(flags).open(path).ok()
        });
        opened.ok_or_else(|| {
            WireError::new(
                ErrorKind::Io,
                format!("disk {serial} did not appear within {}s", DISK_WAIT.as_secs()),
            )
        })
    }
}

impl Platform for Guest {
    fn open_disk(&self, serial: &str, writable: bool) -> Result<File, WireError> {
        self.open(serial, writable, 0)
    }

    fn open_transfer(&self, serial: &str) -> Result<File, WireError> {
        self.open(serial, true, libc::O_DIRECT)
    }

    /// On Hyper-V the device is removed before the host detaches the disk: it would otherwise exist for a moment longer, and
    /// the next disk at this address could be mistaken for it. QEMU waits for the kernel by itself.
    fn forget_disk(&self, serial: &str) {
        let Some(place @ DiskAddress::Vmbus { .. }) = DiskAddress::parse(serial) else { return };
        let Some(device) = self.system.scsi_device(&place) else { return };
        if let Err(e) = fs::write(device.join("delete"), "1") {
            eprintln!("agent: releasing disk {serial}: {e}");
        }
    }

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

    const GUID: &str = "df6d0690-79e5-55b6-a5ec-c1e2f77f580a";

    #[test]
    fn serials_name_controller_and_unit() {
        assert_eq!(DiskAddress::parse("lun:0:7"), Some(DiskAddress::Lun { controller: 0, unit: 7 }));
        assert_eq!(DiskAddress::parse("lun:3:63"), Some(DiskAddress::Lun { controller: 3, unit: 63 }));
        let vmbus = format!("{GUID}:63");
        assert_eq!(DiskAddress::parse(&vmbus), Some(DiskAddress::Vmbus { controller: GUID, unit: 63 }));
        let outside = format!("../{}:1", &GUID[3..]);
        for bad in ["", "lun", "lun:1", "lun:x:1", "lun:1:", "7", "lun:1:2:3", GUID, "a:1", &outside] {
            assert_eq!(DiskAddress::parse(bad), None, "{bad}");
        }
    }

    /// A system of files.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, path: &str, text: &str) -> &Self {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        fn system(&self) -> System {
            System::new(self.0.path())
        }

        fn dev(&self, name: &str) -> PathBuf {
            self.0.path().join("dev").join(name)
        }
    }

    #[test]
    fn the_way_is_what_the_guest_has_or_what_the_kernel_line_says() {
        let fake = Fake::new();
        let way = |wanted| fake.system().way(wanted);
        assert_eq!(way(Wanted::Any), None, "neither is there yet");
        assert_eq!(way(Wanted::Vsock), Some(Way::Vsock));
        fake.file(&format!("sys/bus/vmbus/devices/{GUID}/vendor"), "");
        assert_eq!(way(Wanted::Any), Some(Way::Vsock));
        assert_eq!(way(Wanted::Port), None);
        // A port of another name, then ours, without and with its device.
        fake.file("sys/class/virtio-ports/vport1p1/name", "org.qemu.guest_agent.0\n")
            .file("dev/vport1p1", "");
        fake.file("sys/class/virtio-ports/vport1p2/name", "lcow.agent\n");
        assert_eq!(way(Wanted::Port), None);
        fake.file("dev/vport1p2", "");
        for wanted in [Wanted::Any, Wanted::Port] {
            assert_eq!(way(wanted), Some(Way::Port(fake.dev("vport1p2"))));
        }
        for (line, expected) in [
            ("quiet panic=-1\n", Some(Wanted::Any)),
            ("lcow.agent=port lcow.agent=vsock quiet", Some(Wanted::Vsock)),
            ("xlcow.agent=vsock lcow.agent=port\n", Some(Wanted::Port)),
            ("lcow.agent=carrier-pigeon", None),
        ] {
            assert_eq!(Wanted::of(line).ok(), expected, "{line}");
        }
    }

    #[test]
    fn disks_are_found_by_their_place() {
        let fake = Fake::new();
        // Two controllers of Hyper-V and one of virtio, in the order in which their drivers came up.
        fake.file(&format!("sys/bus/vmbus/devices/{GUID}/host7/x"), "")
            .file("sys/class/scsi_host/host7/x", "");
        fake.file("sys/class/scsi_host/host10/x", "");
        for (address, name) in [("7:0:0:3", "sdb"), ("10:0:0:3", "sdc"), ("10:0:0:16684", "sdd")] {
            fake.file(&format!("sys/class/scsi_device/{address}/device/block/{name}/size"), "");
            fake.file(&format!("sys/class/scsi_device/{address}/device/delete"), "");
            fake.file(&format!("dev/{name}"), name);
        }
        let find = |serial: &str| fake.system().block_device(&DiskAddress::parse(serial).unwrap());
        let upper = GUID.to_ascii_uppercase();
        for (serial, name) in [
            (format!("{GUID}:3"), "sdb"),
            (format!("{upper}:3"), "sdb"),
            ("lun:0:3".into(), "sdb"),
            ("lun:1:3".into(), "sdc"),
            ("lun:1:300".into(), "sdd"),
        ] {
            assert_eq!(find(&serial), Some(fake.dev(name)), "{serial}");
        }
        for nothing in [format!("{GUID}:4"), "lun:2:3".into(), GUID.replace('d', "e") + ":3"] {
            assert_eq!(find(&nothing), None, "{nothing}");
        }
        let guest = Guest { system: fake.system() };
        let mut text = String::new();
        let opened = guest.open_disk(&format!("{GUID}:3"), false);
        io::Read::read_to_string(&mut opened.unwrap(), &mut text).unwrap();
        assert_eq!(text, "sdb");
        // Only a disk of Hyper-V is taken out by the guest.
        for serial in [format!("{GUID}:3"), "lun:1:3".into(), "nonsense".into()] {
            guest.forget_disk(&serial);
        }
        let told = |address: &str| {
            fs::read_to_string(fake.0.path().join(format!("sys/class/scsi_device/{address}/device/delete")))
                .unwrap()
        };
        assert_eq!((told("7:0:0:3").as_str(), told("10:0:0:3").as_str()), ("1", ""));
    }
}
