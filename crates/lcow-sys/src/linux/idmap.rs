//! Idmapped mounts: a view of the same files with shifted owners.
//!
//! ```text
//!   child: clone(NEWUSER) ─ waits        parent: writes uid_map, gid_map ─ opens ns/user ─ ends the child
//!   open_tree(CLONE) ─ mount_setattr(IDMAP, user namespace) ─ move_mount
//! ```
//!
//! Source: mount_setattr(2), user_namespaces(7). Linux 5.12 or later for ext4, 5.19 as lowers of an overlay. The mount keeps
//! the namespace alive after the child has ended. Called by `driver`.

use super::{Context, SysError};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
    process::{Pid, Signal, WaitOptions},
};
use std::{
    fmt::{Display, Write as _},
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// `MOUNT_ATTR_IDMAP`, `include/uapi/linux/mount.h`.
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}
const _: () = assert!(size_of::<MountAttr>() == 32); // MOUNT_ATTR_SIZE_VER0

/// Creates a user namespace with these maps and returns its descriptor. Each range displays as a line of `/proc/<pid>/uid_map`:
/// `INSIDE OUTSIDE COUNT`. For an idmapped mount, `INSIDE` is the first id on disk and `OUTSIDE` the first id that the mount
/// shows. Without a range of one sort, those ids are left as they are.
///
/// # Errors
/// [`SysError::Os`] if namespaces are not permitted or the kernel refuses the maps.
pub fn user_namespace<R: Display>(uids: &[R], gids: &[R]) -> Result<OwnedFd, SysError> {
    let subject = Path::new("user namespace");
    let mut pipe = [-1; 2];
    // SAFETY: `pipe` has space for the two descriptors that pipe2 writes.
    if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error()).context("make a pipe for", subject);
    }
    // SAFETY: pipe2 has just returned both descriptors, and nothing else owns them.
    let (reader, writer) = unsafe { (OwnedFd::from_raw_fd(pipe[0]), OwnedFd::from_raw_fd(pipe[1])) };
    // SAFETY: without CLONE_VM the child has a copy of this process's memory, as after fork; no pointers are passed.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone, libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0, 0, 0)
    };
    if pid == 0 {
        // In the child of a threaded process only bare system calls are sound: no allocation, no locks, no drop.
        let mut byte = 0u8;
        // SAFETY: the descriptors are valid copies, `byte` outlives the read, and _exit does not return.
        unsafe {
            // Copies of the parent's descriptors would keep mounts and pipes busy while the child waits. The pipe may have
            // any numbers: in a daemon that was started with closed standard descriptors they are 0 and 1.
            if pipe[0] > 0 {
                libc::syscall(libc::SYS_close_range, 0, pipe[0] - 1, 0);
            }
            libc::syscall(libc::SYS_close_range, pipe[0] + 1, u32::MAX, 0);
            libc::syscall(libc::SYS_close, pipe[1]);
            // A signal with a handler interrupts the read, and must not end the wait.
            while libc::syscall(libc::SYS_read, pipe[0], &raw mut byte, 1) < 0
                && *libc::__errno_location() == libc::EINTR
            {}
            libc::syscall(libc::SYS_exit_group, 0);
        }
        // Not reached; a panic here would run code that a forked child must not.
        loop {
            std::hint::spin_loop();
        }
    }
    let pid = i32::try_from(pid).ok().filter(|p| *p > 0);
    let Some(pid) = pid.and_then(Pid::from_raw) else {
        return Err(io::Error::last_os_error()).context("make", subject);
    };
    // The child has not been waited for, so its number cannot belong to another process.
    let made = fill_namespace(pid, uids, gids);
    drop(writer);
    drop(reader);
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    made
}

fn fill_namespace<R: Display>(pid: Pid, uids: &[R], gids: &[R]) -> Result<OwnedFd, SysError> {
    let directory = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    for (name, map) in [("uid_map", uids), ("gid_map", gids)] {
        let path = directory.join(name);
        let mut text = String::new();
        for range in map {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{range}");
        }
        if map.is_empty() {
            // A mount does not accept a namespace with an unset map.
            let _ = writeln!(text, "0 0 {}", u32::MAX);
        }
        std::fs::write(&path, text).context("write", &path)?;
    }
    let path = directory.join("ns/user");
    Ok(File::open(&path).context("open", &path)?.into())
}

/// Mounts an idmapped view of the mount at `source` on `target`. `namespace` comes from [`user_namespace`].
///
/// # Errors
/// [`SysError::Os`]: `EINVAL` if kernel or file system do not support it.
pub fn mount_idmapped(
    source: &Path,
    target: &Path,
    namespace: &OwnedFd,
    read_only: bool,
) -> Result<(), SysError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags).context("clone the mount", source)?;
    let read_only_bit = u64::from(read_only);
    let attr = MountAttr {
        attr_set: MOUNT_ATTR_IDMAP | read_only_bit,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    // SAFETY: the empty path is a static C string, `attr` is a live `struct mount_attr` of the size given, and both
    // descriptors are open for the whole call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if r != 0 {
        return Err(io::Error::last_os_error()).context("map the ids of", source);
    }
    move_mount(tree.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("mount on", target)
}
