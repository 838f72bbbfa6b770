//! What the control channel of a service VM carries: its greeting, disks, channels.

use crate::{DiskFormat, DiskId, JailReport, WireError};
use serde::{Deserialize, Serialize};

/// First message of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION) of the agent.
    pub version: u32,
    /// What the agent did to lock itself in; names of the parts that took hold.
    pub jail: JailReport,
    /// On a link: what the [`Wake`] said, so that no greeting is taken for another session's.
    #[serde(default)]
    pub nonce: u64,
    /// On a link: the transfer disk is in use.
    #[serde(default)]
    pub transfer: bool,
    /// What shows that the machine woke well; none from agents that share the daemon's kernel.
    #[serde(default)]
    pub witness: Option<Witness>,
}

/// A machine's clock and random numbers right after its [`Wake`] or [`Control::Wake`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// The machine's clock: nanoseconds since 1970, UTC.
    pub unix_nanos: u64,
    /// Bytes of its random numbers, drawn for this answer and used for nothing else. Machines that are restored from
    /// one saved state would all draw the same, had the reseeding failed.
    pub random: [u8; 16],
}

/// First message to an agent at the other end of a [`link`](crate::link).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION) of the daemon.
    pub version: u32,
    /// To be repeated in [`Hello`].
    pub nonce: u64,
    /// Fresh random bytes, since machines restored from one saved state know each other's.
    pub entropy: Vec<u8>,
    /// Nanoseconds since 1970, UTC.
    pub unix_nanos: u64,
    /// A disk for bulk bytes.
    pub transfer: Option<crate::slots::TransferDisk>,
}

/// Request on the control channel. Descriptors travel beside it where the transport has them (SCM_RIGHTS).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Is anybody there?
    Ping,
    /// A disk: its descriptor travels beside (embedded), or it is found by serial number (VMs).
    Attach {
        /// Its number from now on.
        disk: DiskId,
        /// Writes are allowed.
        writable: bool,
        /// First byte of the window.
        offset: u64,
        /// Bytes of the window; `None` = to the end, and writable disks may grow.
        len: Option<u64>,
        /// How a VM finds the device.
        serial: Option<String>,
        /// How the disk's bytes lie in the file.
        #[serde(default)]
        format: DiskFormat,
    },
    /// Forget a disk.
    Detach {
        /// Which.
        disk: DiskId,
    },
    /// A data channel: its descriptor travels beside (embedded), or it is a channel of the link (VMs).
    Open {
        /// Number on the link; higher than all before.
        #[serde(default)]
        channel: u32,
    },
    /// The machine stood still since its [`Wake`], and its clock with it. The reply has a [`Witness`].
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
    /// Number.
    pub seq: u64,
    /// What.
    pub control: Control,
}

/// Answer to a control request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlReply {
    /// Number of the request.
    pub seq: u64,
    /// Why it failed.
    pub error: Option<WireError>,
    /// After a [`Control::Wake`]: what shows that the machine woke well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<Witness>,
}
