//! Messages on the control channel of a service VM: greeting, disks, channels.
//!
//! ```text
//!   agent ─► Hello        daemon ─► Wake (link only), ControlRequest ─► agent ─► ControlReply, same number
//! ```
//!
//! Called by `svm` of the daemon and by the agent's `serve`.

use crate::{DiskFormat, DiskId, JailReport, WireError};
use serde::{Deserialize, Serialize};

/// First message of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION) of the agent.
    pub version: u32,
    /// The sandbox layers that are in force in the agent.
    pub jail: JailReport,
    /// On a link: the nonce of the [`Wake`], which ties the greeting to this session.
    #[serde(default)]
    pub nonce: u64,
    /// On a link: the transfer disk is in use.
    #[serde(default)]
    pub transfer: bool,
    /// Evidence that the VM resumed correctly; absent from agents that share the daemon's kernel.
    #[serde(default)]
    pub witness: Option<Witness>,
}

/// A VM's clock and random numbers right after its [`Wake`] or [`Control::Wake`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// The VM's clock: nanoseconds since 1970, UTC.
    pub unix_nanos: u64,
    /// Random bytes, drawn for this answer and used for nothing else. VMs that are restored from one saved state would
    /// all draw the same bytes if reseeding had failed.
    pub random: [u8; 16],
}

/// First message to an agent at the other end of a [`link`](crate::link).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION) of the daemon.
    pub version: u32,
    /// The agent repeats it in its [`Hello`].
    pub nonce: u64,
    /// Fresh random bytes: VMs restored from one saved state would otherwise have the same random numbers.
    pub entropy: Vec<u8>,
    /// Nanoseconds since 1970, UTC.
    pub unix_nanos: u64,
    /// A disk for bulk bytes, if there is one.
    pub transfer: Option<crate::slots::TransferDisk>,
}

/// Request on the control channel. Descriptors travel beside it where the transport has them (SCM_RIGHTS).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Answered at once: shows that the agent is alive.
    Ping,
    /// Attaches a disk. Its descriptor travels beside the message (embedded), or it is found by serial number (VMs).
    Attach {
        /// The number by which operations refer to it.
        disk: DiskId,
        /// Writes are allowed.
        writable: bool,
        /// First byte of the window in the file.
        offset: u64,
        /// Bytes of the window; `None` means to the end of the file, and then writable disks may grow.
        len: Option<u64>,
        /// How a VM finds the device.
        serial: Option<String>,
        /// Format of the file.
        #[serde(default)]
        format: DiskFormat,
    },
    /// Detaches a disk.
    Detach {
        /// Its number.
        disk: DiskId,
    },
    /// Opens a data channel. Its descriptor travels beside the message (embedded), or it is a channel of the link (VMs).
    Open {
        /// Number on the link; higher than all earlier ones. 0 without a link.
        #[serde(default)]
        channel: u32,
    },
    /// The VM and its clock were stopped since its [`Wake`]. The reply has a [`Witness`].
    Wake {
        /// Fresh random bytes.
        entropy: Vec<u8>,
        /// Nanoseconds since 1970, UTC.
        unix_nanos: u64,
    },
}

/// A numbered control request; the reply carries the same number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlRequest {
    /// Number, repeated in the reply.
    pub seq: u64,
    /// The request.
    pub control: Control,
}

/// Answer to a control request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlReply {
    /// Number of the request.
    pub seq: u64,
    /// Why it failed; `None` if it succeeded.
    pub error: Option<WireError>,
    /// After a [`Control::Wake`]: evidence that the VM resumed correctly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<Witness>,
}
