//! The language that a daemon and its service VMs speak: frames, messages, links and slots.
//!
//! ```text
//!   daemon (svm) ── channel: frames ─────────────────────────────────── agent in a worker process
//!                └─ link: many channels over one stream, bulk in slots ─ agent in a virtual machine
//! ```
//!
//! [`frame`] is the form of everything that is sent, [`Control`] what a VM's control channel asks for, [`Operation`] what a
//! data channel does, [`link`] and [`slots`] what both ends of a link share. Both sides treat the other as hostile.
//! Nothing here opens, waits or starts anything. Called by `svm` of the daemon and by `svm-agent`.
//!
//! # Versions
//! Both sides of a pair must have the same [`PROTOCOL_VERSION`]; a guest's image is built together with its daemon.
//!
//! | version | why |
//! |---|---|
//! | 1 | the first release: channels, disks, apply, check, export, changes |
//! | 2 | links: a machine's agent greets with the nonce of its `Wake`, and bulk bytes go through slots |
//! | 3 | an apply's lowers are lent one after the other, when a hard link asks for them |
//! | 4 | larger blocks in the middle of a tar, copies of live files, a check by the writer's version and with owners |

mod aligned;
mod control;
mod error;
pub mod frame;
pub mod link;
pub mod meter;
mod operation;
mod root_hash;
pub mod slots;
pub mod worker;

pub use aligned::{ALIGN, Aligned};
pub use control::{Control, ControlReply, ControlRequest, Hello, Wake, Witness};
pub use error::{ErrorKind, WireError, with_causes};
pub use frame::{
    DATA_PAYLOAD, FrameError, FrameType, HEADER_LEN, MAX_PAYLOAD, header, parse_header, read_frame,
    write_frame, write_json,
};
pub use layer_codec::{Change, ChangeKind, DigestKind, LiveFile, TarDigest};
pub use lcow_sys::jail::JailReport;
pub use operation::{
    ApplyOptions, ApplySummary, BlankRoot, CheckSummary, CopyJob, DiskFormat, DiskId, Event, ExportSummary,
    IdMaps, IdRange, LargerDisks, LayerKind, LayerRef, Operation, ParentRef, Profile, decode_change,
    encode_change,
};
pub use root_hash::RootHash;

/// Version of frames and messages; both sides of a pair must agree.
pub const PROTOCOL_VERSION: u32 = 4;
/// The port that an agent dials on its host where there is no serial port (vsock, Hyper-V sockets): "LCOW".
pub const VSOCK_PORT: u32 = 0x4c43_4f57;
/// Name of the virtio-serial port that leads to the daemon.
pub const PORT_NAME: &str = "lcow.agent";
/// Most operations at a time in one agent.
pub const MAX_OPERATIONS: usize = 1024;
/// Most disks attached at a time in one agent.
pub const MAX_DISKS: usize = 2048;
