//! The calls that are watched, and the errors that each may return, by its man page and the kernel's file systems. A call
//! that is not listed cannot fail for reasons outside of the program, or its failure cannot be told from a bug in it
//! (`EBADF`, `EINVAL`).

use libc::{
    EAGAIN, EBUSY, EINTR, EIO, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC, SYS_accept4, SYS_chmod, SYS_chown,
    SYS_clone, SYS_clone3, SYS_copy_file_range, SYS_epoll_create1, SYS_epoll_ctl, SYS_eventfd2,
    SYS_fallocate, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fcntl, SYS_fdatasync, SYS_fgetxattr, SYS_flock,
    SYS_fsconfig, SYS_fsmount, SYS_fsopen, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_getdents64, SYS_ioctl,
    SYS_link, SYS_linkat, SYS_memfd_create, SYS_mkdir, SYS_mkdirat, SYS_mmap, SYS_mount, SYS_mount_setattr,
    SYS_move_mount, SYS_mremap, SYS_newfstatat, SYS_open, SYS_open_tree, SYS_openat, SYS_pipe2, SYS_pread64,
    SYS_preadv, SYS_pwrite64, SYS_pwritev, SYS_read, SYS_readlink, SYS_readlinkat, SYS_readv, SYS_recvfrom,
    SYS_recvmsg, SYS_rename, SYS_renameat, SYS_renameat2, SYS_rmdir, SYS_sendfile, SYS_sendmsg, SYS_sendto,
    SYS_socket, SYS_socketpair, SYS_splice, SYS_stat, SYS_statfs, SYS_statx, SYS_symlink, SYS_symlinkat,
    SYS_sync_file_range, SYS_syncfs, SYS_umount2, SYS_unlink, SYS_unlinkat, SYS_utimensat, SYS_vfork,
    SYS_write, SYS_writev, c_long,
};

/// Not an error of the kernel: half of the bytes are written, and the call returns their number.
pub(crate) const SHORT: i32 = -1;

/// A call.
pub(crate) struct Kind {
    pub(crate) number: c_long,
    pub(crate) name: &'static str,
    /// Arguments that are paths.
    pub(crate) paths: &'static [usize],
    /// An argument that is a descriptor.
    pub(crate) descriptor: Option<usize>,
    pub(crate) errors: &'static [i32],
}

const fn on_path(
    number: c_long,
    name: &'static str,
    paths: &'static [usize],
    errors: &'static [i32],
) -> Kind {
    Kind { number, name, paths, descriptor: None, errors }
}

const fn on_fd(number: c_long, name: &'static str, errors: &'static [i32]) -> Kind {
    Kind { number, name, paths: &[], descriptor: Some(0), errors }
}

const fn bare(number: c_long, name: &'static str, errors: &'static [i32]) -> Kind {
    Kind { number, name, paths: &[], descriptor: None, errors }
}

const OPEN: &[i32] = &[EIO, EMFILE, ENOMEM, ENFILE, EINTR];
const NAME: &[i32] = &[EIO, ENOSPC, ENOMEM];
const GONE: &[i32] = &[EIO, ENOMEM];
const LOOK: &[i32] = &[EIO, ENOMEM];
const PUT: &[i32] = &[EIO, SHORT, ENOSPC, EINTR];
const NEW: &[i32] = &[EMFILE, ENFILE, ENOMEM];
const MOUNT: &[i32] = &[ENOMEM, EIO];

pub(crate) const CALLS: &[Kind] = &[
    on_path(SYS_open, "open", &[0], OPEN),
    on_path(SYS_openat, "openat", &[1], OPEN),
    on_fd(SYS_read, "read", &[EIO, EINTR]),
    on_fd(SYS_pread64, "pread64", &[EIO, EINTR]),
    on_fd(SYS_readv, "readv", &[EIO]),
    on_fd(SYS_preadv, "preadv", &[EIO]),
    on_fd(SYS_write, "write", PUT),
    on_fd(SYS_pwrite64, "pwrite64", PUT),
    on_fd(SYS_writev, "writev", PUT),
    on_fd(SYS_pwritev, "pwritev", PUT),
    on_fd(SYS_fsync, "fsync", &[EIO, ENOSPC, EINTR]),
    on_fd(SYS_fdatasync, "fdatasync", &[EIO, ENOSPC]),
    on_fd(SYS_syncfs, "syncfs", &[EIO, ENOSPC]),
    on_fd(SYS_sync_file_range, "sync_file_range", &[EIO, ENOSPC]),
    on_path(SYS_rename, "rename", &[0, 1], NAME),
    on_path(SYS_renameat, "renameat", &[1, 3], NAME),
    on_path(SYS_renameat2, "renameat2", &[1, 3], NAME),
    on_path(SYS_link, "link", &[0, 1], NAME),
    on_path(SYS_linkat, "linkat", &[1, 3], NAME),
    on_path(SYS_symlink, "symlink", &[1], NAME),
    on_path(SYS_symlinkat, "symlinkat", &[2], NAME),
    on_path(SYS_mkdir, "mkdir", &[0], NAME),
    on_path(SYS_mkdirat, "mkdirat", &[1], NAME),
    on_path(SYS_unlink, "unlink", &[0], GONE),
    on_path(SYS_unlinkat, "unlinkat", &[1], GONE),
    on_path(SYS_rmdir, "rmdir", &[0], GONE),
    on_fd(SYS_ftruncate, "ftruncate", &[EIO, ENOSPC, EINTR]),
    on_fd(SYS_fallocate, "fallocate", &[EIO, ENOSPC, EINTR]),
    on_fd(SYS_copy_file_range, "copy_file_range", &[EIO, ENOSPC, ENOMEM]),
    on_fd(SYS_sendfile, "sendfile", &[EIO, ENOMEM]),
    on_fd(SYS_splice, "splice", &[ENOMEM]),
    on_path(SYS_stat, "stat", &[0], LOOK),
    on_path(SYS_statx, "statx", &[1], LOOK),
    on_path(SYS_newfstatat, "newfstatat", &[1], LOOK),
    on_path(SYS_statfs, "statfs", &[0], LOOK),
    on_fd(SYS_fstatfs, "fstatfs", &[EIO, ENOMEM, EINTR]),
    on_path(SYS_chmod, "chmod", &[0], NAME),
    on_fd(SYS_fchmod, "fchmod", NAME),
    on_path(SYS_fchmodat, "fchmodat", &[1], NAME),
    on_path(SYS_chown, "chown", &[0], NAME),
    on_fd(SYS_fchown, "fchown", NAME),
    on_fd(SYS_utimensat, "utimensat", NAME),
    on_fd(SYS_getdents64, "getdents64", LOOK),
    on_path(SYS_readlink, "readlink", &[0], LOOK),
    on_path(SYS_readlinkat, "readlinkat", &[1], LOOK),
    on_path(SYS_mount, "mount", &[1], MOUNT),
    bare(SYS_fsopen, "fsopen", &[ENOMEM, EMFILE]),
    bare(SYS_fsconfig, "fsconfig", MOUNT),
    bare(SYS_fsmount, "fsmount", &[ENOMEM, EMFILE]),
    on_path(SYS_move_mount, "move_mount", &[3], MOUNT),
    on_path(SYS_open_tree, "open_tree", &[1], &[ENOMEM, EMFILE]),
    on_path(SYS_mount_setattr, "mount_setattr", &[1], MOUNT),
    on_path(SYS_umount2, "umount2", &[0], &[EBUSY, ENOMEM]),
    on_fd(SYS_ioctl, "ioctl", &[EIO, ENOMEM]),
    on_fd(SYS_fcntl, "fcntl", &[EMFILE, EAGAIN]),
    on_fd(SYS_flock, "flock", &[ENOMEM, EINTR]),
    bare(SYS_socketpair, "socketpair", NEW),
    bare(SYS_pipe2, "pipe2", NEW),
    bare(SYS_eventfd2, "eventfd2", NEW),
    bare(SYS_epoll_create1, "epoll_create1", NEW),
    bare(SYS_memfd_create, "memfd_create", NEW),
    bare(SYS_socket, "socket", NEW),
    bare(SYS_accept4, "accept4", NEW),
    bare(SYS_epoll_ctl, "epoll_ctl", &[ENOMEM]),
    bare(SYS_clone, "clone", &[EAGAIN, ENOMEM]),
    bare(SYS_clone3, "clone3", &[EAGAIN, ENOMEM]),
    bare(SYS_vfork, "vfork", &[EAGAIN, ENOMEM]),
    bare(SYS_mmap, "mmap", &[ENOMEM]),
    bare(SYS_mremap, "mremap", &[ENOMEM]),
    on_fd(SYS_sendmsg, "sendmsg", &[ENOMEM, ENOBUFS]),
    on_fd(SYS_sendto, "sendto", &[ENOMEM, ENOBUFS]),
    on_fd(SYS_recvmsg, "recvmsg", &[ENOMEM]),
    on_fd(SYS_recvfrom, "recvfrom", &[ENOMEM]),
    on_fd(SYS_fgetxattr, "fgetxattr", &[EIO]),
];

/// The call with a number.
pub(crate) fn kind(number: c_long) -> Option<&'static Kind> {
    CALLS.iter().find(|kind| kind.number == number)
}

/// The errors of a call about an object; none for a few pairs that cannot fail, such as an event descriptor that is written.
pub(crate) fn of(call: &str, object: &str) -> &'static [i32] {
    let transfer = ["read", "write", "readv", "writev"].contains(&call);
    match object {
        "kernel object" if transfer || call == "ioctl" || call == "fcntl" => &[],
        "socket" | "pipe" if call.starts_with("write") => &[SHORT, ENOMEM],
        "socket" | "pipe" if transfer => &[ENOMEM],
        "socket" | "pipe" if call == "ioctl" || call == "fcntl" => &[],
        _ => CALLS.iter().find(|kind| kind.name == call).map_or(&[], |kind| kind.errors),
    }
}

/// The usual name of an error.
pub(crate) fn name(error: i32) -> String {
    if error == SHORT {
        return "a short write".to_owned();
    }
    std::io::Error::from_raw_os_error(error).to_string()
}
