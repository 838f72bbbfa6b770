//! `layer mount`: mounts an image on a directory of this machine, for inspection.
//!
//! ```text
//!   IMAGE ──► loop device (window of the disk, gone with the mount) ──► ext4 ──► DIRECTORY      `umount DIRECTORY` unmounts it
//! ```
//!
//! The kernel then reads the file system with all its privileges, so an image is first checked strictly, as the service
//! does. For a sandbox, which was written by a kernel, only the structure can be checked, so it must be requested
//! (`--sandbox` or `--write`). The file is opened once: what was checked is what is mounted, whatever its name refers
//! to by then.

use super::{
    MountArgs,
    failure::{failed, shown},
    image::{Container, Image, fs_bytes},
};
use crate::cli::{CliError, output::print};
use ext4_image::check::{CheckLimits, check, check_sandbox};
use lcow_sys::linux::{
    loopdev::{LoopSpec, attach},
    mount::{Ext4Options, mount_ext4},
};
use std::{os::fd::AsFd, process::ExitCode};

pub(super) fn mount(args: &MountArgs) -> Result<ExitCode, CliError> {
    let image = Image::open_with(&args.image, args.write)?;
    let name = shown(&args.image);
    let kind = match image.container {
        Container::Vhdx(_) => Some("VHDX"),
        Container::DynamicVhd { .. } => Some("dynamic VHD"),
        Container::Raw | Container::Vhd(_) => None,
    };
    if let Some(kind) = kind {
        return Err(format!(
            "{name} is a {kind}, which the kernel cannot mount; convert it with `lcow-graphdriver layer convert {name} OUT.vhd`"
        )
        .into());
    }
    let verify = |e| failed("verify", &args.image, &e);
    if args.sandbox || args.write {
        if image.has_no_journal()? {
            return Err(format!(
                "{name} is an applied layer, which never changes; mount it without --write and --sandbox"
            )
            .into());
        }
        let shape = check_sandbox(image.disk.clone(), CheckLimits::default()).map_err(verify)?;
        if shape.needs_recovery && !args.write {
            return Err(format!(
                "{name} was not unmounted and has a journal to replay, which changes it; mount it with --write"
            )
            .into());
        }
    } else {
        check(image.disk.clone(), CheckLimits::default()).map_err(|e| match image.has_no_journal() {
            Ok(false) => CliError::from(format!(
                "{name} has a journal, as sandboxes do, so only its structure can be checked; if you trust its origin, \
                 mount it with --sandbox (read-only) or --write"
            )),
            _ => verify(e),
        })?;
    }
    let spec = LoopSpec {
        sizelimit: fs_bytes(&image.ext4()?),
        read_only: !args.write,
        autoclear: true,
        name: args.image.to_string_lossy().into_owned(),
        ..LoopSpec::default()
    };
    let device = attach(image.file.as_fd(), &spec).map_err(|e| failed("attach", &args.image, &e))?;
    let options = Ext4Options {
        read_only: !args.write,
        discard: args.write,
        noload: args.sandbox && !args.write,
        noatime: true,
        nodev: true,
        nosuid: true,
    };
    mount_ext4(&device.path, &args.folder, options).map_err(|e| failed("mount", &args.image, &e))?;
    print(&format!("{name} is mounted on {}; unmount it with `umount`\n", shown(&args.folder)))?;
    Ok(ExitCode::SUCCESS)
}
