//! Loop devices that a test left behind: finds and releases them.
//!
//! ```text
//!   directory ─► loop devices of files below it, deleted ones too ─► mount ─► fsfreeze -u ─► umount ─► losetup --detach
//! ```

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// Loop devices (`/dev/loopN`) and their files, of those below a directory, deleted ones included. The directory's name
/// must be unique: the path of a file that was attached in another mount namespace may begin differently.
pub(crate) fn devices_below(folder: &Path) -> Vec<(String, String)> {
    let name = format!("/{}/", folder.file_name().unwrap().to_str().unwrap());
    let devices = fs::read_dir("/sys/block").unwrap().flatten().filter_map(|entry| {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        Some((format!("/dev/{}", entry.file_name().to_str()?), file.trim_end().to_owned()))
    });
    devices.filter(|(_, file)| file.contains(&name)).collect()
}

/// Thaws and detaches what is on loop devices of files below a directory.
pub(crate) fn release_all_below(folder: &Path) {
    for (device, _) in devices_below(folder) {
        release(&device);
    }
}

/// Thaws what is on a loop device, mounted or not, and detaches it.
pub(crate) fn release(device: &str) {
    let Ok(place) = tempfile::tempdir() else { return };
    let place = place.path().to_str().unwrap();
    for (program, arguments) in [
        // A read-only file system refuses the first, any other the second.
        ("mount", vec!["-t", "ext4", device, place]),
        ("mount", vec!["-t", "ext4", "-o", "ro", device, place]),
        ("fsfreeze", vec!["-u", place]),
        ("umount", vec!["-l", place]),
        ("losetup", vec!["--detach", device]),
    ] {
        let _ = Command::new(program).args(arguments).stderr(Stdio::null()).status();
    }
}
