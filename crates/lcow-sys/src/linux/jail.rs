//! How a worker confines itself before it reads the first untrusted byte.
//!
//! ```text
//!   start ─ close all but 0,1,2 ─ own namespaces ─ empty root ─ own user ─ no capabilities ─ die with parent
//!         ─ limits ─ Landlock: no path, no port, no foreign signal ─ seccomp: descriptors, memory, threads only
//! ```
//!
//! The restrictions are independent: if a kernel lacks one (Landlock, namespaces for ordinary users), the others still hold,
//! and [`JailReport`] says which are in force. A *strict* jail requires a set of them ([`JailReport::missing`]) and fails if
//! one is not in force:
//!
//! | restriction | as root | as an ordinary user |
//! |---|---|---|
//! | filter, `no_new_privs`, no capabilities, closed descriptors, limits | required | required |
//! | a user that owns nothing | required | already that user |
//! | no path: Landlock, *or* an empty root and a filter without open and socket | required | Landlock (an empty root needs root) |
//! | own network and IPC | in addition: the filter has no socket | likewise, if the kernel permits it to users |
//!
//! There is deliberately no mount namespace: it would copy, and so keep busy, every layer mounted on the host. A root on a
//! detached, empty tmpfs gives the same view without that. Called by `svm-agent`.

use super::seccomp;
use crate::jail::JailReport;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::{
    fs::{CWD, FileType},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
    process::{DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, setrlimit},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};
use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::Path,
};

/// User and group id of "nobody".
pub const NOBODY: u32 = 65534;

/// Most threads of a worker.
const MAX_THREADS: u64 = 8192;

/// How a worker is confined.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// Limit of the address space, in bytes.
    pub memory: u64,
    /// Limit of open descriptors.
    pub descriptors: u64,
    /// Limit of the size of written files, in bytes; `None` for no limit.
    pub file_size: Option<u64>,
    /// As root: user and group to become. If the user namespace of the process has no such user, "nobody" is used.
    pub user: u32,
    /// Fail unless everything is in force that [`JailReport::missing`] requires.
    pub strict: bool,
    /// The setting with which an operator can do without, for the message of such a failure.
    pub relax: &'static str,
    /// Omit the system-call filter, so that the self-test can look at the other restrictions.
    pub without_seccomp: bool,
}

/// Confines this process as far as kernel and privileges allow.
///
/// Call it first in `main`, while no other thread does anything and nothing owns a descriptor above 2: they are closed, and
/// some restrictions hold for the calling thread and those that it starts. That is not checked, since the workers of tests
/// run on the second thread of the test harness, whose first one waits.
///
/// # Errors
/// A strict jail: a required restriction is not in force. Any jail: not even `no_new_privs` and one of Landlock and seccomp
/// are in force. The process must end then.
pub fn enter(spec: &Spec) -> io::Result<JailReport> {
    let mut report = JailReport::default();
    let mut note = Vec::new();
    let mut held = |what: &str, result: io::Result<()>| match result {
        Ok(()) => true,
        Err(e) => {
            note.push(format!("{what}: {e}"));
            false
        }
    };
    // If memory runs out, the kernel should kill a worker first, which costs one request.
    held("oom_score_adj", std::fs::write("/proc/self/oom_score_adj", "1000"));
    // SAFETY: a worker calls this first, when nothing in it owns a descriptor but 0, 1 and 2.
    report.closed_descriptors = held("close_range", unsafe { close_all_from(3) });
    // SAFETY: SIG_IGN installs no handler. A write beyond the file-size limit then fails with EFBIG.
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
        report.unprivileged_user =
            held("own user", become_user(spec.user)) || held("nobody", become_user(NOBODY));
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
    let missing = report.missing();
    if spec.strict && !missing.is_empty() {
        return Err(io::Error::other(format!(
            "the jail is incomplete; missing: {} ({}); {} continues without",
            missing.join(", "),
            report.notes.join("; "),
            spec.relax
        )));
    }
    if !report.no_new_privs || !(report.seccomp || report.landlock_abi > 0 || spec.without_seccomp) {
        return Err(io::Error::other(format!("the jail is incomplete: {}", report.notes.join("; "))));
    }
    Ok(report)
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: none of these flags separates memory or the descriptor table, which other threads could rely on.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Makes an empty, read-only, detached tmpfs the root and the working directory.
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

/// Closes all descriptors from `first`.
///
/// # Safety
/// Nothing in this process owns one of them, and there is one thread, so none appears meanwhile.
pub(super) unsafe fn close_all_from(first: u32) -> io::Result<()> {
    // SAFETY: the call takes plain numbers; the caller promises that no owner is left with a closed descriptor.
    let r = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Directories of programs, libraries and firmware, which a foreign program may read and execute.
const SYSTEM: [&str; 11] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/opt",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/dev/urandom",
];

/// What [`confine`] achieved.
#[derive(Debug, Default)]
pub(super) struct Confinement {
    /// Names of the required restrictions that are not in force.
    pub missing: Vec<&'static str>,
    /// For each part that could not be applied: why. For people.
    pub notes: Vec<String>,
}

/// Confines this process before it executes a foreign program (QEMU, which has its own system-call filter and needs its
/// libraries): own network and IPC, a root without the host's other mounts, user `user` if the process may change it, no
/// capabilities, `no_new_privs`, death with its parent, limits, Landlock (the system's programs and libraries, `files`,
/// and nothing else), no new sockets. The process must have one thread.
///
/// Required are: a user that owns nothing, no capabilities, `no_new_privs`, limits, no new sockets, and either Landlock or
/// a root of its own. Own network and IPC are a second wall behind the filter of sockets.
pub(super) fn confine(user: u32, memory: u64, program: &Path, files: &[OwnedFd]) -> Confinement {
    let mut notes = Vec::new();
    let mut held = |what: &str, result: io::Result<()>| match result {
        Ok(()) => true,
        Err(e) => {
            notes.push(format!("{what}: {e}"));
            false
        }
    };
    let _ = std::fs::write("/proc/self/oom_score_adj", "500");
    let (mut own_user, mut own_root) = (true, false);
    if rustix::process::geteuid().is_root() {
        held("own namespaces", unshare(UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS));
        own_root = match bare_root() {
            // Before Linux 6.15 nothing can be mounted in a detached tree. Landlock and the filter still hold.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => false,
            other => held("own root", other),
        };
        held("bounding set", clear_bounding_set());
        own_user = held("own user", become_user(user)) || held("nobody", become_user(NOBODY));
    }
    let no_capabilities = held("capabilities", drop_capabilities());
    held(
        "parent death",
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into),
    );
    let mut limited = true;
    for (resource, value) in [(Resource::Core, 0), (Resource::As, memory), (Resource::Nproc, 64)] {
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        limited &= held("limits", setrlimit(resource, limit).map_err(Into::into));
    }
    let no_new_privs = held("no_new_privs", rustix::thread::set_no_new_privs(true).map_err(Into::into));
    let landlock = held("landlock", lock_system(program, files));
    let no_sockets = held("seccomp", seccomp::no_new_sockets());
    let required = [
        (own_user, "a user that owns nothing"),
        (no_capabilities, "no capabilities"),
        (limited, "resource limits"),
        (no_new_privs, "no_new_privs"),
        (landlock || own_root, "no foreign path (Landlock, or a root of its own)"),
        (no_sockets, "no new sockets (system-call filter)"),
    ];
    let missing = required.into_iter().filter(|(stands, _)| !stands).map(|(_, name)| name).collect();
    Confinement { missing, notes }
}

/// Makes a copy of the root mount the root, with `/proc` and `/usr` and no other mount of the host: no `/run` with its
/// sockets, no `/dev`, no `/sys`, no mounts below `/var`. Copies two or three mounts instead of a namespace, so no layer of
/// the host is kept busy.
fn bare_root() -> io::Result<()> {
    let clone =
        |path: &str| open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC);
    let root = clone("/")?;
    let device = |path: &str| std::fs::metadata(path).map(|m| m.dev());
    let mut inner = vec!["proc"];
    if device("/usr")? != device("/")? {
        inner.push("usr");
    }
    for name in inner {
        let mount = clone(&format!("/{name}"))?;
        move_mount(&mount, "", &root, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    rustix::process::fchdir(&root)?;
    rustix::process::chroot(".")?;
    Ok(())
}

/// Landlock for a foreign program: it may read and execute files of the system's packages, and reopen `files` by their
/// numbers; no other path, port, abstract socket or process.
fn lock_system(program: &Path, files: &[OwnedFd]) -> io::Result<()> {
    let newest = ABI::V7;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(newest))
        .and_then(|r| r.handle_access(AccessNet::from_all(newest)))
        .and_then(|r| r.scope(Scope::from_all(newest)))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let home = program.canonicalize().ok().and_then(|p| p.parent().map(Path::to_owned));
    // Missing paths need no rule. /proc/self, because files are reopened through it.
    let system = SYSTEM.iter().map(Path::new).chain([Path::new("/proc/self")]).chain(home.as_deref());
    let (read, write) = (AccessFs::from_read(newest), AccessFs::WriteFile | AccessFs::Truncate);
    let rules = system
        .filter_map(|path| PathFd::new(path).ok())
        .map(|path| Ok::<_, RulesetError>(PathBeneath::new(path, read)))
        .chain(PathFd::new("/dev/null").ok().map(|path| Ok(PathBeneath::new(path, read | write))));
    let own = files.iter().filter(|f| has_place(f));
    let own = own.map(|f| Ok::<_, RulesetError>(PathBeneath::new(f, write | AccessFs::ReadFile)));
    let status = ruleset
        .add_rules(rules)
        .and_then(|r| r.add_rules(own))
        .and_then(RulesetCreated::restrict_self)
        .map_err(io::Error::other)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(io::Error::other("the kernel has none"));
    }
    Ok(())
}

/// Whether it is a file with a place in some file system. Memory files have none that a rule could be made for, and need
/// none.
fn has_place(file: &OwnedFd) -> bool {
    let regular =
        rustix::fs::fstat(file).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile);
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    regular && name.is_ok_and(|name| !name.as_os_str().as_bytes().starts_with(b"/memfd:"))
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
        // Counts threads of the worker's own user, so siblings do not share it; processes are refused by seccomp.
        (Resource::Nproc, Some(MAX_THREADS)),
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
        .and_then(RulesetCreated::restrict_self)
        .map_err(io::Error::other)?;
    Ok((abi as u32, status.ruleset == RulesetStatus::FullyEnforced))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> JailReport {
        JailReport {
            seccomp: true,
            landlock_abi: 7,
            landlock_full: true,
            no_new_privs: true,
            net_namespace: true,
            ipc_namespace: true,
            empty_root: true,
            closed_descriptors: true,
            unprivileged_user: true,
            no_capabilities: true,
            limits: true,
            walls: vec![],
            notes: vec![],
        }
    }

    #[test]
    fn a_strict_jail_asks_for_each_wall_and_for_one_of_two_against_paths() {
        assert!(whole().missing().is_empty());
        type Break = fn(&mut JailReport);
        let breaks: [(&str, Break); 6] = [
            ("filter", |r| r.seccomp = false),
            ("no_new_privs", |r| r.no_new_privs = false),
            ("user", |r| r.unprivileged_user = false),
            ("capabilities", |r| r.no_capabilities = false),
            ("descriptors", |r| r.closed_descriptors = false),
            ("limits", |r| r.limits = false),
        ];
        for (name, break_it) in breaks {
            let mut report = whole();
            break_it(&mut report);
            let missing = report.missing();
            assert!(missing.len() == 1 && missing[0].contains(name), "{name}: {missing:?}");
        }
        // Without Landlock the empty root stands in, without the root Landlock; without both there are paths.
        for (landlock_abi, empty_root, paths) in [(0, true, false), (1, false, false), (0, false, true)] {
            let report = JailReport { landlock_abi, empty_root, landlock_full: false, ..whole() };
            assert_eq!(report.missing().len(), usize::from(paths), "{landlock_abi} {empty_root}");
        }
        // An empty root alone is not enough: descriptors that arrive could be opened anew.
        let report = JailReport { seccomp: false, landlock_abi: 0, ..whole() };
        assert!(report.missing().iter().any(|m| m.starts_with("no path")));
        // The own network is a second wall.
        assert!(JailReport { net_namespace: false, ipc_namespace: false, ..whole() }.missing().is_empty());
    }
}
