//! What goes into the pool's state machine and what comes out of it: events and actions.
//!
//! The shell in `pool` turns requests and the ends of its tasks into events, and carries out the actions. Each action
//! that starts something names the events that answer it; the machine relies on exactly one of them coming.

use crate::svm::job::{Access, FileIdentity};

/// Number of a VM, never used twice.
pub type VmId = u64;
/// Number of a lease, never used twice.
pub type LeaseId = u64;
/// Number of one use of a disk, never used twice.
pub type UseId = u64;

/// Identifies a disk: file, access and window.
pub type DiskKey = (FileIdentity, Access, u64, Option<u64>);

/// What a VM is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum VmName {
    /// Safe mode: one layer.
    Layer(String),
    /// Global mode: everything.
    Global,
    /// One check, not shared.
    Check(LeaseId),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoolEvent {
    /// A request for a VM of this name.
    Acquire {
        /// A new number.
        lease: LeaseId,
        /// The VM name that is asked for.
        name: VmName,
        /// It will stream to a reader of unknown pace.
        export: bool,
    },
    /// A lease is released, whether it is held or still waited for.
    Release {
        /// The lease.
        lease: LeaseId,
        /// Its VM misbehaved.
        poison: bool,
    },
    /// A VM is up.
    Booted(VmId),
    /// A boot failed; nothing of the VM is left.
    BootFailed(VmId),
    /// A VM ended unexpectedly.
    Died(VmId),
    /// A VM does not answer.
    Sick(VmId),
    /// An ended VM is gone for good.
    Ended(VmId),
    /// A lease wants a disk.
    Attach {
        /// The lease.
        lease: LeaseId,
        /// A new number.
        usage: UseId,
        /// The disk.
        disk: DiskKey,
    },
    /// A lease no longer needs a disk.
    Detach {
        /// The lease.
        lease: LeaseId,
        /// The use.
        usage: UseId,
    },
    /// An attach worked.
    Attached(VmId, DiskKey),
    /// An attach failed.
    AttachFailed(VmId, DiskKey),
    /// A detach worked.
    Detached(VmId, DiskKey),
    /// A detach failed: the VM is in an unknown state.
    DetachFailed(VmId, DiskKey),
    /// The present VMs get no new leases and end with their last one.
    Retire,
    /// End retired VMs even if they hold leases.
    EndRetired,
    /// As `Retire`, and grant no new leases ever.
    Drain,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start a VM; answer Booted or BootFailed.
    Boot(VmId),
    /// End a VM; answer Ended.
    End(VmId),
    /// The lease holds this VM now.
    Grant(LeaseId, VmId),
    /// The lease is refused, because a boot failed.
    RefuseBoot(LeaseId),
    /// The lease is refused, because the pool is being stopped.
    RefuseDraining(LeaseId),
    /// The lease's VM is gone.
    Lost(LeaseId),
    /// Attach; answer Attached or AttachFailed.
    Attach(VmId, DiskKey),
    /// Detach; answer Detached or DetachFailed.
    Detach(VmId, DiskKey),
    /// The disk is attached for this use.
    DiskReady(UseId, VmId, DiskKey),
    /// The disk could not be attached for this use.
    DiskFailed(UseId),
}
