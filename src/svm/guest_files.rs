//! Kernel and initramfs of a guest, for the backends of virtual machines.
//!
//! Checked before the first machine, so that the start reports what is missing. Called by `qemu` and `hcs`.

use std::{fs::File, path::Path};

/// Opens kernel and initramfs for reading; `build` is the command that builds them.
///
/// # Errors
/// Everything that is wrong with either, and what the operator has to do.
pub(super) fn open(kernel: &Path, initrd: &Path, build: &str) -> Result<[File; 2], String> {
    let wrong = match (open_one(kernel), open_one(initrd)) {
        (Ok(kernel), Ok(initrd)) => return Ok([kernel, initrd]),
        (Err(kernel), Err(initrd)) => format!("{kernel}; {initrd}"),
        (Err(one), _) | (_, Err(one)) => one,
    };
    Err(format!(
        "{wrong}; build the guest with {build}, or name it by lcow.kirdpath, lcow.kernel and lcow.initrd"
    ))
}

/// Opens a non-empty file. Checks its type first, because some systems open a directory like a file and others refuse
/// it with an unhelpful error.
fn open_one(path: &Path) -> Result<File, String> {
    let opened = match path.metadata() {
        Ok(found) if !found.is_file() => Err("is no file".to_owned()),
        Ok(found) if found.len() == 0 => Err("is empty".to_owned()),
        Ok(_) => File::open(path).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    opened.map_err(|e| format!("{}: {e}", path.display()))
}
