//! The report of a process that confined itself, the same for all systems.

use serde::{Deserialize, Serialize};

/// The parts of the jail that are in force. Inside a virtual machine all are false: the machine is the jail.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailReport {
    /// The system-call allow-list is installed.
    pub seccomp: bool,
    /// ABI version of the kernel's Landlock, which denies all paths and ports; 0 if it has none.
    pub landlock_abi: u32,
    /// Landlock enforces everything that was requested.
    pub landlock_full: bool,
    /// `no_new_privs` is set.
    pub no_new_privs: bool,
    /// The process has its own network namespace.
    pub net_namespace: bool,
    /// The process has its own IPC and UTS namespaces.
    pub ipc_namespace: bool,
    /// The root directory is an empty file system that is not mounted anywhere else.
    pub empty_root: bool,
    /// Inherited descriptors were closed.
    #[serde(default)]
    pub closed_descriptors: bool,
    /// The process runs as a user that owns nothing.
    pub unprivileged_user: bool,
    /// The process has no capabilities.
    pub no_capabilities: bool,
    /// All resource limits are set.
    pub limits: bool,
    /// Windows: names of the restrictions in force (job, token, integrity, mitigations).
    #[serde(default)]
    pub walls: Vec<String>,
    /// For each part that could not be applied: why. For people.
    pub notes: Vec<String>,
}

impl JailReport {
    /// Whether no path can be opened: Landlock denies all, or the root is empty and the filter allows neither `open` nor
    /// `socket`.
    pub fn no_path(&self) -> bool {
        self.landlock_abi > 0 || (self.empty_root && self.seccomp)
    }

    /// Names of the restrictions that a strict jail requires and that are not in force.
    pub fn missing(&self) -> Vec<&'static str> {
        let walls = [
            (self.seccomp, "system-call filter"),
            (self.no_new_privs, "no_new_privs"),
            (self.unprivileged_user, "a user that owns nothing"),
            (self.no_capabilities, "no capabilities"),
            (self.closed_descriptors, "closed descriptors"),
            (self.limits, "resource limits"),
            (self.no_path(), "no path (Landlock, or an empty root behind the system-call filter)"),
        ];
        walls.into_iter().filter(|(stands, _)| !stands).map(|(_, name)| name).collect()
    }
}
