//! What a worker does to itself before it sees the first untrusted byte.
//!
//! ```text
//!   start ─ close all but 0,1,2 ─ own namespaces ─ empty root ─ nobody ─ no capabilities ─ die with parent
//!         ─ limits ─ Landlock: no path, no port, no foreign signal ─ seccomp: descriptors, memory, threads only
//! ```
//!
//! Each wall stands alone: what one kernel lacks (Landlock, namespaces for ordinary users) the others still hold, and
//! [`Report`] says which took hold. There is no mount namespace on purpose: it would copy, and so keep busy, every
//! layer mounted on the host; a root on a detached, empty tmpfs gives the same view without that. Must run while the
//! process has one thread. Called by `agent`.

use super::seccomp;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope,
};
use rustix::{
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    },
    process::{DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, setrlimit},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};
use std::io;

/// The user and group "nobody".
const NOBODY: u32 = 65534;

/// How a worker is to be held.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// Address space; bytes.
    pub memory: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Size of any file written; bytes. `None` = no limit.
    pub file_size: Option<u64>,
    /// Leave out the system-call filter (the self-test looks at the other walls alone).
    pub without_seccomp: bool,
}

/// Which walls took hold.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// System-call filter.
    pub seccomp: bool,
    /// Landlock version of the kernel, 0 if none.
    pub landlock_abi: u32,
    /// Landlock enforces all that was asked.
    pub landlock_full: bool,
    /// Set-user-id programs give nothing.
    pub no_new_privs: bool,
    /// Own, empty network.
    pub net_namespace: bool,
    /// Own IPC objects and host name.
    pub ipc_namespace: bool,
    /// The root folder is empty.
    pub empty_root: bool,
    /// Runs as nobody.
    pub unprivileged_user: bool,
    /// No capability left.
    pub no_capabilities: bool,
    /// All limits set.
    pub limits: bool,
    /// Why the others did not.
    pub notes: Vec<String>,
}

/// Locks this process in, as far as kernel and rights allow.
///
/// # Errors
/// Only if not even `no_new_privs` and one of Landlock and seccomp took hold: then the process must not go on.
pub fn enter(spec: &Spec) -> io::Result<Report> {
    let mut report = Report::default();
    let mut note = Vec::new();
    let mut held = |what: &str, result: io::Result<()>| match result {
        Ok(()) => true,
        Err(e) => {
            note.push(format!("{what}: {e}"));
            false
        }
    };
    // When memory runs out the kernel should take a worker, which costs one request, before anything else.
    held("oom_score_adj", std::fs::write("/proc/self/oom_score_adj", "1000"));
    held("close_range", close_all_from(3));
    // SAFETY: SIG_IGN installs no code of ours. A write beyond the file-size limit is then EFBIG, not death.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let root = rustix::process::geteuid().is_root();
    if root {
        report.net_namespace = held("net namespace", unshare(UnshareFlags::NEWNET));
        report.ipc_namespace = held("ipc namespace", unshare(UnshareFlags::NEWIPC | UnshareFlags::NEWUTS));
        report.empty_root = held("empty root", empty_root());
    } else {
        let own = UnshareFlags::NEWUSER | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
        report.net_namespace = held("namespaces", unshare(own));
        report.ipc_namespace = report.net_namespace;
    }
    held("bounding set", clear_bounding_set());
    if root {
        report.unprivileged_user = held("nobody", become_nobody());
    } else {
        report.unprivileged_user = true;
    }
    report.no_capabilities = held("capabilities", drop_capabilities());
    // After the change of user, which resets both.
    held(
        "parent death",
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into),
    );
    held(
        "dumpable",
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Into::into),
    );
    report.limits = held("limits", limit(spec));
    report.no_new_privs = held("no_new_privs", rustix::thread::set_no_new_privs(true).map_err(Into::into));
    match lock_paths() {
        Ok((abi, full)) => (report.landlock_abi, report.landlock_full) = (abi, full),
        Err(e) => {
            held("landlock", Err(e));
        }
    }
    if !spec.without_seccomp {
        report.seccomp = held("seccomp", seccomp::install());
    }
    report.notes = note;
    if !report.no_new_privs || !(report.seccomp || report.landlock_abi > 0 || spec.without_seccomp) {
        return Err(io::Error::other(format!("the jail does not hold: {}", report.notes.join("; "))));
    }
    Ok(report)
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the process has one thread (see the module's text), and none of these flags splits memory or the
    // descriptor table from it.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Makes an empty read-only tmpfs, which nobody else can reach, the root and working folder.
fn empty_root() -> io::Result<()> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "mode", "0")?;
    fsconfig_set_string(&fs, "size", "4k")?;
    fsconfig_create(&fs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    rustix::process::fchdir(&mount)?;
    rustix::process::chroot(".")?;
    Ok(())
}

pub(super) fn close_all_from(first: u32) -> io::Result<()> {
    // SAFETY: runs before anything of ours owns a descriptor above 2, so no owner is left with a stale number.
    let r = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Confines this process before it becomes a foreign program (QEMU, which brings its own system-call filter and needs
/// its libraries): own network and IPC, user `user` if we may choose one, no capabilities, no gain by set-user-id
/// programs, dies with its parent, limits. Gives notes on what did not take hold.
pub(super) fn confine(user: u32, memory: u64) -> Vec<String> {
    let mut notes = Vec::new();
    let mut held = |what: &str, result: io::Result<()>| {
        if let Err(e) = result {
            notes.push(format!("{what}: {e}"));
        }
    };
    let _ = std::fs::write("/proc/self/oom_score_adj", "500");
    if rustix::process::geteuid().is_root() {
        held("own namespaces", unshare(UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS));
        held("bounding set", clear_bounding_set());
        held("own user", become_user(user).or_else(|_| become_user(NOBODY)));
    }
    held("capabilities", drop_capabilities());
    held(
        "parent death",
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into),
    );
    let limits = [(Resource::Core, 0), (Resource::As, memory), (Resource::Nproc, 64)];
    for (resource, value) in limits {
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        held("limits", setrlimit(resource, limit).map_err(Into::into));
    }
    held("no_new_privs", rustix::thread::set_no_new_privs(true).map_err(Into::into));
    notes
}

fn become_nobody() -> io::Result<()> {
    become_user(NOBODY)
}

fn become_user(id: u32) -> io::Result<()> {
    rustix::thread::set_thread_groups(&[])?;
    let (group, user) = (Gid::from_raw(id), Uid::from_raw(id));
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    Ok(())
}

fn clear_bounding_set() -> io::Result<()> {
    for capability in 0..=63 {
        // SAFETY: PR_CAPBSET_DROP takes a plain number.
        let r = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if r != 0 {
            let e = io::Error::last_os_error();
            // EINVAL: a number above the kernel's last capability.
            return if e.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(e) };
        }
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    // Fails on kernels before 4.3 only, which have no ambient set.
    let _ = rustix::thread::clear_ambient_capability_set();
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(Into::into)
}

fn limit(spec: &Spec) -> io::Result<()> {
    for (resource, value) in [
        (Resource::Core, Some(0)),
        (Resource::As, Some(spec.memory)),
        (Resource::Nofile, Some(spec.descriptors)),
        (Resource::Fsize, spec.file_size),
        (Resource::Memlock, Some(0)),
        (Resource::Msgqueue, Some(0)),
        // Counts the threads of all workers (one user); processes are refused by seccomp.
        (Resource::Nproc, Some(8192)),
    ] {
        setrlimit(resource, Rlimit { current: value, maximum: value })?;
    }
    Ok(())
}

/// Landlock with no rule: every path, port, abstract socket and foreign process is out of reach.
fn lock_paths() -> io::Result<(u32, bool)> {
    // SAFETY: with LANDLOCK_CREATE_RULESET_VERSION (1) the call reads no memory and returns the version.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    if abi <= 0 {
        return Err(io::Error::last_os_error());
    }
    // The newest version that we were tested with; newer rights are asked for when they are known here.
    let newest = ABI::V7;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(newest))
        .and_then(|r| r.handle_access(AccessNet::from_all(newest)))
        .and_then(|r| r.scope(Scope::from_all(newest)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(io::Error::other)?;
    Ok((abi as u32, status.ruleset == RulesetStatus::FullyEnforced))
}
