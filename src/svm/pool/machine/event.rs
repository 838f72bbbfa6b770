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

/// Which disk: file, access and window.
pub type DiskKey = (FileIdentity, Access, u64, Option<u64>);

/// What a VM is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum VmName {
    /// Safe mode: one layer.
    Layer(String),
    /// Global mode: everything.
    Global,
    /// One check, shared with nobody.
    Check(LeaseId),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoolEvent {
    /// Somebody wants a VM of this name.
    Acquire {
        /// New number.
        lease: LeaseId,
        /// Which.
        name: VmName,
        /// It will stream to a reader of unknown pace.
        export: bool,
    },
    /// A lease, held or still waited for, is given up.
    Release {
        /// Which.
        lease: LeaseId,
        /// Its VM misbehaved.
        poison: bool,
    },
    /// A VM is up.
    Booted(VmId),
    /// A VM did not come up; nothing of it is left.
    BootFailed(VmId),
    /// A VM ended by itself.
    Died(VmId),
    /// A VM does not answer.
    Sick(VmId),
    /// An ended VM is gone for good.
    Ended(VmId),
    /// A lease wants a disk.
    Attach {
        /// Who.
        lease: LeaseId,
        /// New number.
        usage: UseId,
        /// Which.
        disk: DiskKey,
    },
    /// A lease needs a disk no more.
    Detach {
        /// Who.
        lease: LeaseId,
        /// Which use.
        usage: UseId,
    },
    /// An attach worked.
    Attached(VmId, DiskKey),
    /// An attach did not.
    AttachFailed(VmId, DiskKey),
    /// A detach worked.
    Detached(VmId, DiskKey),
    /// A detach did not: the VM is in an unknown state.
    DetachFailed(VmId, DiskKey),
    /// No VM of now takes new leases; end them as their leases end.
    Retire,
    /// End retired VMs though they hold leases.
    EndRetired,
    /// As `Retire`, and no new leases ever.
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
    /// The lease will not be: a boot failed.
    RefuseBoot(LeaseId),
    /// The lease will not be: the pool is being stopped.
    RefuseDraining(LeaseId),
    /// The lease's VM is gone.
    Lost(LeaseId),
    /// Attach; answer Attached or AttachFailed.
    Attach(VmId, DiskKey),
    /// Detach; answer Detached or DetachFailed.
    Detach(VmId, DiskKey),
    /// The disk is there for this use.
    DiskReady(UseId, VmId, DiskKey),
    /// The disk is not there for this use.
    DiskFailed(UseId),
}
