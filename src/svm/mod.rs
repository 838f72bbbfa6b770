//! Service VMs: where layer bytes are interpreted, and the pool that hands them out.
//!
//! ```text
//!   driver ──lease(id)──► pool ──boot, end──► VmBackend  (embedded │ qemu │ hcs)
//!      │                   │ attach, detach        │
//!      │ tar_to_layer …    ▼                       ▼
//!      └──────────────► Lease ──one channel per operation──► ServiceVm ══ agent
//! ```
//!
//! The daemon moves bytes and descriptors without parsing them; what comes back from a VM is untrusted, too. A dead VM
//! fails the leases that it held and nothing else. Time-outs are for idleness, never for a whole transfer.
//!
//! Memory per stream, whatever its length: one frame of at most 256 KiB being filled, one being read (at most 1 MiB,
//! 256 KiB from our own agent), two queued, and the socket's buffers (at most 512 KiB): below 2 MiB.

mod console;
mod digesting;
pub mod embedded;
mod end;
mod exchange;
mod guest_files;
#[cfg(windows)]
pub mod hcs;
mod job;
mod pool;
#[cfg(target_os = "linux")]
pub mod qemu;
pub mod remote;
mod replays;
mod stream;

pub use digesting::Digesting;
pub use job::{
    Access, ApplyJob, CheckJob, CompareJob, CompressJob, CopyDisk, DiskSource, ExpandJob, ExportJob,
    ExportKind, FileIdentity, GrowJob, LayerDisk, LiveControl, ParentDisks, SecondPair, no_writer_left,
};
pub use pool::{Lease, Mode, Pool, PoolConfig, PoolSnapshot, PoolVm, Purpose, Recoded};
pub use replays::within as replayed_within;
pub use stream::TarStream;
pub use svm_protocol::{
    ApplyLimits, ApplyOptions, ApplySummary, BlankRoot, Change, ChangeKind, CheckSummary, Compression,
    ContainerId, DigestKind, DiskFormat, DiskId, ErrorKind, ExpandLimits, ExportSummary, GrowSummary, IdMaps,
    IdRange, JailReport, LayerKind, LiveFile, LowerUse, Profile, RecodeSummary, RootHash, SNIFF_BYTES,
    TarDigest, Witness, sniff,
};

use crate::error::{Fault, Kind};
use futures_util::future::BoxFuture;
use std::{fmt, io, sync::Arc, time::Duration};
use svm_protocol::{FrameError, WireError};
use tokio::io::{AsyncRead, AsyncWrite};

/// Why something in a service VM failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SvmError {
    /// The VM ended while it was needed.
    #[error("service VM {vm} died: {cause}")]
    Died {
        /// Its name.
        vm: String,
        /// Exit status or signal.
        cause: String,
        /// Its last console output.
        console: String,
    },
    /// The VM could not be started.
    #[error("cannot start a service VM: {reason}")]
    Boot {
        /// The reason.
        reason: String,
        /// Its last console output.
        console: String,
    },
    /// Nothing happened for too long.
    #[error("{what} made no progress for {}s", after.as_secs_f32())]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The operation was refused by the codec: see the kind.
    #[error("{}", .0.message)]
    Refused(WireError),
    /// The VM broke the protocol; it is not used again.
    #[error("service VM {vm} broke the protocol: {reason}")]
    Protocol {
        /// Its name.
        vm: String,
        /// What was wrong.
        reason: String,
    },
    /// A disk could not be attached or detached.
    #[error("disk {disk} of service VM {vm}: {reason}")]
    Disk {
        /// Name of the VM.
        vm: String,
        /// The disk.
        disk: String,
        /// The reason.
        reason: String,
    },
    /// The caller's body failed; its error.
    #[error("reading the layer's tar: {0}")]
    Body(String),
    /// An entry needs larger blocks, but the second pair of disks could not be made.
    #[error("an entry of the tar needs larger blocks, but the apply cannot be restarted with them: {0}")]
    SecondPair(String),
    /// Freezing or thawing a live sandbox failed.
    #[error("live sandbox: {0}")]
    Live(String),
    /// The pool is being stopped, or the lease was dropped.
    #[error("cancelled: {0}")]
    Cancelled(&'static str),
    /// Another process can still write the image that was to be checked.
    #[error("image {0} is still open for writing elsewhere, so a check would prove nothing")]
    StillWritable(String),
}

impl SvmError {
    /// The input of this operation is at fault, or may be: a VM that dies or stalls does so while it reads some layer.
    /// False for what would affect every operation.
    pub fn is_of_one_operation(&self) -> bool {
        match self {
            Self::Refused(e) => !matches!(e.kind, ErrorKind::NoSpace | ErrorKind::Io | ErrorKind::Cancelled),
            Self::Died { .. }
            | Self::Timeout { .. }
            | Self::Protocol { .. }
            | Self::Body(_)
            | Self::StillWritable(_) => true,
            Self::Boot { .. }
            | Self::Disk { .. }
            | Self::SecondPair(_)
            | Self::Live(_)
            | Self::Cancelled(_) => false,
        }
    }

    /// Its text and the last console output of the VM, for logs and command lines. The engine does not get the output:
    /// it may be long, and it comes from a VM that read untrusted bytes.
    pub fn with_console(&self) -> String {
        match self {
            Self::Died { console, .. } | Self::Boot { console, .. } if !console.is_empty() => {
                format!("{self}; last console output: {}", console.trim_end())
            }
            _ => self.to_string(),
        }
    }

    /// The codec's kind of failure, if the codec refused.
    pub fn refused_kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Refused(e) => Some(e.kind),
            _ => None,
        }
    }

    /// Whether the VM itself is at fault and must not be used again.
    pub(crate) fn blames_vm(&self) -> bool {
        matches!(self, Self::Died { .. } | Self::Timeout { .. } | Self::Protocol { .. } | Self::Disk { .. })
    }

    pub(crate) fn from_frame(vm: &str, error: &FrameError) -> Self {
        Self::Protocol { vm: vm.to_owned(), reason: error.to_string() }
    }
}

impl Fault for SvmError {
    fn kind(&self) -> Kind {
        match self {
            Self::Refused(refused) => match refused.kind {
                ErrorKind::Corrupt => Kind::Corrupt,
                ErrorKind::Unsupported => Kind::Unsupported,
                ErrorKind::Limit => Kind::Limit,
                ErrorKind::NoSpace => Kind::NoSpace,
                ErrorKind::Io => Kind::Io,
                ErrorKind::Changed => Kind::Busy,
                ErrorKind::NeedsLowers => Kind::State,
                ErrorKind::Cancelled => Kind::Cancelled,
                // The daemon made the request: a wrong one is its own bug.
                ErrorKind::Usage | ErrorKind::Internal => Kind::Internal,
            },
            Self::Body(_) | Self::Cancelled(_) => Kind::Cancelled,
            Self::StillWritable(_) => Kind::Busy,
            Self::SecondPair(_) | Self::Live(_) => Kind::Io,
            Self::Died { .. }
            | Self::Boot { .. }
            | Self::Timeout { .. }
            | Self::Protocol { .. }
            | Self::Disk { .. } => Kind::ServiceVm,
        }
    }
}

impl From<SvmError> for io::Error {
    fn from(e: SvmError) -> Self {
        Self::other(e)
    }
}

/// What is to be started.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Number that the pool gave it, unique in this process.
    pub number: u64,
}

/// How a VM ended.
#[derive(Debug, Clone)]
pub struct Death {
    /// Exit status or signal, as text.
    pub cause: String,
    /// Its last console output.
    pub console: String,
}

/// What a backend can bear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendLimits {
    /// Disks attached to one VM at a time.
    pub disks: usize,
    /// VMs at a time.
    pub vms: usize,
}

/// A byte stream to the agent, for one operation.
pub trait ChannelIo: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ChannelIo for T {}
/// A boxed [`ChannelIo`]. Dropping it cancels the operation.
pub type Channel = Box<dyn ChannelIo>;

/// Starts VMs, and ends what a crashed predecessor of this process left.
///
/// # Contract of [`VmBackend`] and [`ServiceVm`]
/// What the pool relies on. `tests/conformance` checks it of each backend, but for one clause that so far only reading
/// holds: that a dropped `boot` leaves nothing.
///
/// * **Order.** `boot` returns once the agent has greeted. A disk is attached before an operation names it and detached
///   after its channel is closed; `grown` comes between the end of an apply and the detach of its disk. `reap` runs once,
///   before the first boot, and only in the process that owns the home.
/// * **Calls at one time.** Everything takes `&self` and may be called from several tasks at once, also `boot`; attaches
///   of the same disk are serialized by the pool, which counts its uses.
/// * **Cancellation.** Any future may be dropped. A dropped `boot` leaves no process, disk or file. After a dropped `attach`
///   or `detach` the pool terminates the VM. A dropped channel cancels its operation and no other.
/// * **The end.** `terminate` may be called several times, and while other calls run, which then fail. `death` resolves for
///   every end and may be awaited by many. Dropping the last reference ends the VM without waiting.
/// * **Threads.** No call blocks a thread of the runtime: whatever waits for a disk or a process runs on one of its own.
/// * **Trust.** What a VM sends is bounded and checked by `svm-protocol` and `remote`; a backend parses nothing of it.
///
/// | | embedded | qemu | hcs |
/// |---|---|---|---|
/// | system | Linux, Windows | Linux (KVM, or TCG where there is none) | Windows with Hyper-V |
/// | the VM is | a jailed process of this program | a process of QEMU, restored from a saved guest | a compute system of vmcompute |
/// | a disk is | a descriptor or handle that is passed | a SCSI device, hot-plugged by QMP | a SCSI device, by `HcsModifyComputeSystem` |
/// | a channel is | a socket pair (Windows: a pipe) | multiplexed on one virtio-serial port (`remote`) | multiplexed on one hvsocket (`remote`) |
/// | digests of tars | in the worker | in the daemon | in the daemon |
/// | reads what our ext4 reader cannot | no | yes, by the guest's kernel | yes, by the guest's kernel |
/// | `reap` finds | nothing: workers die with their parent | templates half made | compute systems and scratch disks of the home |
pub trait VmBackend: Send + Sync + 'static {
    /// `embedded`, `qemu`, `hcs`.
    fn name(&self) -> &'static str;

    /// What it can bear.
    fn limits(&self) -> BackendLimits;

    /// What it runs on, for Status ("TCG, QEMU 10.0.2"); empty where there is nothing to say.
    fn detail(&self) -> String {
        String::new()
    }

    /// Guests booted from nothing since the backend began, where others are restored from a saved one.
    fn cold_boots(&self) -> u64 {
        0
    }

    /// VMs restored from a saved guest since the backend began.
    fn restores(&self) -> u64 {
        0
    }

    /// Starts a VM and waits for its agent's greeting. Dropping the future leaves nothing behind.
    fn boot(&self, spec: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>>;

    /// Ends and deletes what a crashed predecessor left; says how many things that were.
    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>>;
}

/// A running service VM. Dropping the last reference ends it.
pub trait ServiceVm: Send + Sync + fmt::Debug {
    /// For logs: `KIND ID (vm NUMBER)`, such as "worker 1234 (vm 3)". ID is the pid of what can be killed and stopped from
    /// outside (`tests/support/machine.rs` does both); the cause of such a death names the signal ("signal 9").
    fn describe(&self) -> String;

    /// Makes a disk visible to the agent. Not idempotent: the pool counts.
    fn attach<'a>(&'a self, disk: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>>;

    /// Takes a disk away.
    fn detach(&self, disk: DiskId) -> BoxFuture<'_, Result<(), SvmError>>;

    /// Reports the final length of a growing disk: a backend that attaches devices of fixed size cuts the file to it.
    fn grown<'a>(&'a self, disk: &'a DiskSource, len: u64) -> BoxFuture<'a, Result<(), SvmError>> {
        let _ = (disk, len);
        Box::pin(async { Ok(()) })
    }

    /// A new channel to the agent.
    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>>;

    /// Checks that the agent answers.
    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>>;

    /// Ends the VM and waits until nothing of it is left. Idempotent.
    fn terminate(&self) -> BoxFuture<'_, ()>;

    /// Resolves when the VM has ended, for whatever reason.
    fn death(&self) -> BoxFuture<'_, Death>;

    /// Its last console output.
    fn console(&self) -> String;

    /// Whether the daemon, rather than the agent, digests the tars that pass
    /// ([`AgentChannel::daemon_digests`](svm_agent::channel::AgentChannel::daemon_digests)).
    fn daemon_digests(&self) -> bool {
        false
    }

    /// The jail of the agent, if the VM is a process.
    fn jail(&self) -> Option<JailReport>;

    /// What the machine's clock and random numbers were when its agent greeted, or later when it went on after a pause,
    /// where they are its own.
    fn witness(&self) -> Option<Witness> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operation_was_given_is_told_from_what_would_meet_every_one() {
        let refused = |kind| SvmError::Refused(WireError::new(kind, "words"));
        for kind in [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::Limit, ErrorKind::Internal] {
            assert!(refused(kind).is_of_one_operation(), "{kind:?}");
        }
        for kind in [ErrorKind::NoSpace, ErrorKind::Io, ErrorKind::Cancelled] {
            assert!(!refused(kind).is_of_one_operation(), "{kind:?}");
        }
    }
}
