//! The worker's system-call filter.
//!
//! ```text
//!   call ─► [kill list] ─► [clone3 → ENOSYS] ─► [allow list, else EPERM]      the strictest action wins
//! ```
//!
//! A codec needs I/O on the descriptors that it has, memory, threads and clocks. The list has nothing that takes a path,
//! creates a descriptor, starts a program or accesses another process. Calls that only a compromised worker would make end
//! it immediately, so that the daemon sees the reason; all others fail with `EPERM`, so that a harmless probe of the standard
//! library does not crash it. Messages are received with fixed flags and never sent with `sendmsg`: urgent bytes and
//! descriptors in flight are known escapes from such jails, and a worker only needs `write`. `fallocate` is missing because
//! it can allocate space beyond the end of a file, which neither the file's size nor a limit shows. `clone3` must fail with
//! `ENOSYS`: glibc then uses `clone`, whose flags a filter can check (those of clone3 are in memory).
//!
//! One list for all threads, in code: the threads of a worker do the same work on the same descriptors, so lists of their
//! own would differ by a call or two, and a list in a file could be replaced. Called by [`super::jail`].

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};
use std::{collections::BTreeMap, io};

/// Allowed with any arguments.
const FREE: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sendfile,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_ppoll,
    libc::SYS_shutdown,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getpid,
    libc::SYS_gettid,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// Calls that only a compromised worker makes.
const DEADLY: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_open_tree,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_io_uring_setup,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_pidfd_getfd,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn condition(
    argument: u8,
    op: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, op, value)
}

fn allow_list() -> Result<Rules, seccompiler::BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let mut rules: Rules = FREE.iter().map(|n| (*n, Vec::new())).collect();
    let mut only = |call: libc::c_long, conditions| -> Result<(), seccompiler::BackendError> {
        rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    };
    // Threads, never processes.
    let thread = (libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND) as u64;
    let forbidden =
        (libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET) as u64;
    let flags = |argument, value: libc::c_int| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, Eq, value.cast_unsigned().into())
    };
    only(libc::SYS_recvmsg, vec![flags(2, libc::MSG_CMSG_CLOEXEC)?])?;
    only(libc::SYS_recvfrom, vec![flags(3, 0)?])?;
    only(libc::SYS_clone, vec![condition(0, MaskedEq(thread | forbidden), thread)?])?;
    // Memory is never made executable.
    let exec = libc::PROT_EXEC as u64;
    only(libc::SYS_mmap, vec![condition(2, MaskedEq(exec), 0)?])?;
    only(libc::SYS_mprotect, vec![condition(2, MaskedEq(exec), 0)?])?;
    // stat of a descriptor. (A path could still be passed; the root directory is empty.)
    let empty = libc::AT_EMPTY_PATH as u64;
    only(libc::SYS_newfstatat, vec![condition(3, MaskedEq(empty), empty)?])?;
    only(libc::SYS_statx, vec![condition(2, MaskedEq(empty), empty)?])?;
    for command in [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC] {
        only(libc::SYS_fcntl, vec![condition(1, Eq, command as u64)?])?;
    }
    // abort() signals its own process.
    only(libc::SYS_tgkill, vec![condition(0, Eq, u64::from(std::process::id()))?])?;
    // Names of threads, for debuggers.
    only(libc::SYS_prctl, vec![condition(0, Eq, libc::PR_SET_NAME as u64)?])?;
    // Reading limits, not setting them (the new limit, argument 2, is NULL).
    only(libc::SYS_prlimit64, vec![condition(2, Eq, 0)?])?;
    Ok(rules)
}

/// Installs a filter that refuses new sockets and connections, and nothing else, for a foreign program that is given all its
/// sockets. Landlock does not control paths of unix sockets.
///
/// # Errors
/// As [`install`].
pub(super) fn no_new_sockets() -> io::Result<()> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let calls =
        [libc::SYS_socket, libc::SYS_socketpair, libc::SYS_connect, libc::SYS_bind, libc::SYS_io_uring_setup];
    let rules = calls.iter().map(|n| (*n, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).map_err(io::Error::other)?;
    let program = BpfProgram::try_from(filter).map_err(io::Error::other)?;
    apply_filter(&program).map_err(io::Error::other)
}

/// Installs the filters on this thread and all threads that it will start, irrevocably.
///
/// # Errors
/// `ENOSYS` if the kernel has no seccomp; the architecture has no filter.
pub(super) fn install() -> io::Result<()> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let errno = |e: i32| SeccompAction::Errno(e.cast_unsigned());
    let listed = |calls: &[libc::c_long]| calls.iter().map(|n| (*n, Vec::new())).collect::<Rules>();
    let layers = [
        (listed(DEADLY), SeccompAction::Allow, SeccompAction::KillProcess),
        (listed(&[libc::SYS_clone3]), SeccompAction::Allow, errno(libc::ENOSYS)),
        (allow_list().map_err(io::Error::other)?, errno(libc::EPERM), SeccompAction::Allow),
    ];
    // All are compiled first, so that an error leaves no partial filter.
    let programs = layers
        .into_iter()
        .map(|(rules, mismatch, hit)| BpfProgram::try_from(SeccompFilter::new(rules, mismatch, hit, arch)?))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io::Error::other)?;
    // seccomp(2) itself is allowed until the last layer.
    for program in &programs {
        apply_filter(program).map_err(io::Error::other)?;
    }
    Ok(())
}
