//! Where a round takes place: a disk that can be cut, and mounts that no other process sees.
//!
//! ```text
//!   folder/ (ordinary)            sockets, logs
//!   folder/ram/ (tmpfs)           disk: sparse file ─► /dev/loopN ─► folder/disk/ (ext4 │ xfs)
//! ```
//!
//! Invariants:
//! * Only the round's thread, and what it starts, has these mounts: they end with it, and the loop devices with them.
//! * The disk is attached anew for each mount, so that nothing stays in the cache of the block device.

use super::PATIENCE;
use lcow_sys::linux::{
    loopdev::{self, LoopDevice, LoopSpec},
    power,
};
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Bytes of the disk; sparse. `mkfs.xfs` makes none below 300 MB.
const BYTES: u64 = 512 << 20;
/// The kernel's id of this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A file system that can be shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    Ext4,
    Xfs,
}

impl Ground {
    pub(crate) const ALL: [Self; 2] = [Self::Ext4, Self::Xfs];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// No commit of the journal by time during a round: it would save what was not synced.
    fn options(self) -> Option<&'static std::ffi::CStr> {
        match self {
            Self::Ext4 => Some(c"commit=300"),
            Self::Xfs => None,
        }
    }

    fn format(self, disk: &Path, more: &[&str]) {
        let arguments: &[&str] = match self {
            Self::Ext4 => &["-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1", "-J", "size=8"],
            Self::Xfs => &["-q", "-f", "-K"],
        };
        run(Command::new(format!("mkfs.{}", self.name())).args(arguments).args(more).arg(disk));
    }

    /// The file system's own check of an unmounted disk; changes nothing.
    pub(crate) fn check(self, disk: &Path) -> Result<(), String> {
        let mut command = match self {
            Self::Ext4 => Command::new("e2fsck"),
            Self::Xfs => Command::new("xfs_repair"),
        };
        match self {
            Self::Ext4 => command.args(["-f", "-n"]),
            Self::Xfs => command.args(["-n", "-f"]),
        };
        let output = command.arg(disk).output().expect("e2fsprogs and xfsprogs: scripts/install-deps test");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            return Ok(());
        }
        Err(format!("{command:?}: {}{}", text(&output.stdout), text(&output.stderr)))
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}: scripts/install-deps test"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The disk, mounted.
struct Mounted {
    device: LoopDevice,
    /// Its root, for the cut.
    root: File,
}

pub(crate) struct Room {
    ground: Ground,
    pub(crate) folder: PathBuf,
    mounted: Option<Mounted>,
    boots: u32,
    _temporary: tempfile::TempDir,
}

impl Room {
    /// Gives the calling thread mounts of its own, and mounts a new disk. The thread must end with the round.
    pub(crate) fn enter(ground: Ground) -> Self {
        Self::enter_with(ground, BYTES, &[])
    }

    /// As [`Room::enter`], with an ext4 that is soon full.
    pub(crate) fn enter_small(bytes: u64, inodes: u64) -> Self {
        Self::enter_with(Ground::Ext4, bytes, &["-N", &inodes.to_string()])
    }

    fn enter_with(ground: Ground, bytes: u64, options: &[&str]) -> Self {
        power::own_mounts().expect("mounts of their own need root");
        let temporary = tempfile::Builder::new().prefix("lcow-power-").tempdir().unwrap();
        let folder = temporary.path().canonicalize().unwrap();
        let mut room = Self { ground, folder, mounted: None, boots: 0, _temporary: temporary };
        let ram = room.folder.join("ram");
        fs::create_dir(&ram).unwrap();
        fs::create_dir(room.disk()).unwrap();
        mount("tmpfs", &ram, "tmpfs", MountFlags::empty(), Some(c"size=1g")).unwrap();
        File::create_new(room.file()).unwrap().set_len(bytes).unwrap();
        ground.format(&room.file(), options);
        room.mount();
        room
    }

    fn file(&self) -> PathBuf {
        self.folder.join("ram/disk")
    }

    /// Where the disk is mounted.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Mounts the disk, in what the daemon takes for another boot.
    pub(crate) fn mount(&mut self) {
        assert!(self.mounted.is_none());
        let file = File::options().read(true).write(true).open(self.file()).unwrap();
        let spec = LoopSpec { autoclear: true, ..LoopSpec::default() };
        let device = loopdev::attach(file.as_fd(), &spec).expect("loop devices need root");
        mount(&device.path, self.disk(), self.ground.name(), MountFlags::empty(), self.ground.options())
            .unwrap_or_else(|e| panic!("mount {}: {e}", self.ground.name()));
        let root = File::open(self.disk()).unwrap();
        self.mounted = Some(Mounted { device, root });
        if self.boots > 0 {
            // A second mount would be on the first one's file, which could not be deleted then.
            unmount(BOOT_ID, UnmountFlags::empty()).unwrap();
        }
        self.boots += 1;
        let id = self.folder.join(format!("boot{}", self.boots));
        fs::write(&id, format!("{:08}-0000-4000-8000-000000000000\n", self.boots)).unwrap();
        mount(&id, BOOT_ID, "", MountFlags::BIND, None).unwrap();
    }

    /// The cut.
    pub(crate) fn cut(&self) {
        power::cut(&self.mounted.as_ref().unwrap().root, &self.disk()).unwrap();
    }

    /// Unmounts the disk and whatever is mounted on it; nothing of it stays in memory.
    pub(crate) fn unmount(&mut self) {
        let Some(Mounted { device, root }) = self.mounted.take() else { return };
        drop(root);
        let begin = Instant::now();
        loop {
            let points = self.mounts();
            if points.is_empty() {
                break;
            }
            for point in points.iter().rev() {
                match unmount(point, UnmountFlags::empty()) {
                    // A process that was killed, or a loop device that its last mount releases, is still ending.
                    Ok(()) | Err(Errno::BUSY | Errno::INVAL | Errno::NOENT) => {}
                    // What lies on a cut disk cannot even be looked up there.
                    Err(Errno::IO) => unmount(point, UnmountFlags::DETACH).unwrap(),
                    Err(e) => panic!("unmount {point}: {e}"),
                }
            }
            assert!(begin.elapsed() < PATIENCE, "still mounted: {:?}", self.mounts());
            std::thread::sleep(Duration::from_millis(1));
        }
        let number = device.number;
        // With autoclear: the last descriptor detaches it.
        drop(device);
        while loopdev::status(number).unwrap().is_some_and(|s| s.backing_inode == self.inode()) {
            assert!(begin.elapsed() < PATIENCE, "/dev/loop{number} is still attached");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn inode(&self) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(self.file()).unwrap())
    }

    /// Mount points on the disk, and its own, as this thread sees them.
    fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let (disk, below) = (self.disk(), self.folder.join("mnt"));
        let ours = |point: &&str| Path::new(point).starts_with(&disk) || Path::new(point).starts_with(&below);
        table.lines().filter_map(|l| l.split(' ').nth(4)).filter(ours).map(str::to_owned).collect()
    }

    /// The check of the unmounted disk.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.ground.check(&self.file())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // The mounts end with the thread; the folder can be deleted only without them.
        self.mounted = None;
        for point in self.mounts().iter().rev() {
            let _ = unmount(point, UnmountFlags::DETACH);
        }
        let _ = unmount(self.folder.join("ram"), UnmountFlags::DETACH);
    }
}
