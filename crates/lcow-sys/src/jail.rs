//! What a process did to lock itself in: one report for all systems.

use serde::{Deserialize, Serialize};

/// Which parts of the jail took hold. Inside a real VM all are false: the VM is the jail.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailReport {
    /// System-call allow-list.
    pub seccomp: bool,
    /// No paths, no ports: the kernel's Landlock version, 0 if it has none.
    pub landlock_abi: u32,
    /// Landlock enforces everything that was asked.
    pub landlock_full: bool,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Own network namespace.
    pub net_namespace: bool,
    /// Own IPC and UTS namespaces.
    pub ipc_namespace: bool,
    /// The root folder is an empty, unreachable file system.
    pub empty_root: bool,
    /// No descriptor of the daemon's was inherited.
    #[serde(default)]
    pub closed_descriptors: bool,
    /// Runs as a user that owns nothing.
    pub unprivileged_user: bool,
    /// No capability is left.
    pub no_capabilities: bool,
    /// All resource limits are set.
    pub limits: bool,
    /// Windows: names of the walls that hold (job, token, integrity, mitigations).
    #[serde(default)]
    pub walls: Vec<String>,
    /// Why parts did not take hold, for people.
    pub notes: Vec<String>,
}

impl JailReport {
    /// No path can be opened: Landlock forbids all, or there is none below an empty root and the filter knows neither
    /// open nor socket.
    pub fn no_path(&self) -> bool {
        self.landlock_abi > 0 || (self.empty_root && self.seccomp)
    }

    /// Names of the walls that a strict jail asks for and that do not stand.
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
