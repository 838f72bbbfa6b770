//! `layer mount`: an image in a folder of this machine, for looking around.
//!
//! ```text
//!   IMAGE ──► loop device (window of the disk, gone with the mount) ──► ext4 ──► FOLDER         `umount FOLDER` ends it
//! ```
//!
//! The kernel reads the file system then: an applied image is checked first, as the service does.

use super::{
    MountArgs,
    failure::{failed, shown},
    image::{Container, Image, fs_bytes},
    output::print,
};
use crate::{
    cli::CliError,
    diff::LayerKind,
    ext4::check::{CheckLimits, check},
    sys::linux::{
        loopdev::{LoopSpec, attach},
        mount::{Ext4Options, mount_ext4},
    },
};
use std::{fs::OpenOptions, os::fd::AsFd, process::ExitCode};

pub(super) fn mount(args: &MountArgs) -> Result<ExitCode, CliError> {
    let image = Image::open(&args.image)?;
    let kind = match image.container {
        Container::Vhdx(_) => Some("VHDX"),
        Container::DynamicVhd { .. } => Some("dynamic VHD"),
        Container::Raw | Container::Vhd(_) => None,
    };
    if let Some(kind) = kind {
        return Err(format!(
            "{0} is a {kind}, which the kernel cannot mount: `lcow-graphdriver layer convert {0} OUT.vhd` makes one that it can",
            shown(&args.image)
        )
        .into());
    }
    let kind = image.kind()?;
    if args.write && kind == LayerKind::Applied {
        return Err(format!(
            "{} is an applied layer: it never changes; mount it without --write",
            shown(&args.image)
        )
        .into());
    }
    if kind == LayerKind::Applied {
        check(image.disk.clone(), CheckLimits::default()).map_err(|e| failed("verify", &args.image, &e))?;
    }
    let file = OpenOptions::new()
        .read(true)
        .write(args.write)
        .open(&args.image)
        .map_err(|e| failed("open", &args.image, &e))?;
    let spec = LoopSpec {
        sizelimit: fs_bytes(&image.ext4()?),
        read_only: !args.write,
        autoclear: true,
        name: args.image.to_string_lossy().into_owned(),
        ..LoopSpec::default()
    };
    let device = attach(file.as_fd(), &spec).map_err(|e| failed("attach", &args.image, &e))?;
    let options = Ext4Options {
        read_only: !args.write,
        discard: args.write,
        noatime: true,
        nodev: true,
        nosuid: true,
        ..Ext4Options::default()
    };
    mount_ext4(&device.path, &args.folder, options).map_err(|e| {
        let hint = if kind == LayerKind::Sandbox && !args.write {
            "; a sandbox that was not unmounted has a journal to replay: mount it with --write"
        } else {
            ""
        };
        CliError::from(format!("{}{hint}", failed("mount", &args.image, &e)))
    })?;
    print(&format!("{} is mounted on {}; `umount` ends it\n", shown(&args.image), shown(&args.folder)))?;
    Ok(ExitCode::SUCCESS)
}
