//! The protocol between the daemon and its service VMs: frames, messages, links and slots.
//!
//! ```text
//!   daemon (svm) ── channel: frames ─────────────────────────────────── agent in a worker process
//!                └─ link: many channels over one stream, bulk in slots ─ agent in a virtual machine
//! ```
//!
//! [`frame`] defines the framing, [`Control`] the requests on a VM's control channel, [`Operation`] the request on a data
//! channel, [`link`] and [`slots`] what both ends of a link share. Each side treats the other as hostile.
//! Nothing here opens, waits or starts anything; ids, digests, options and summaries are `layer-codec`'s
//! and `layer-recode`'s. Called by `svm` of the daemon and by `svm-agent`.
//!
//! # Versions
//! Both sides of a pair must have the same [`PROTOCOL_VERSION`]; a guest image is built together with its daemon.
//!
//! | version | why |
//! |---|---|
//! | 1 | the first release: channels, disks, apply, check, export, changes |
//! | 2 | links: an agent in a VM repeats the nonce of its `Wake` in its `Hello`, and bulk bytes go through slots |
//! | 3 | the lower layers of an apply are attached one after the other, when a hard link needs them |
//! | 4 | restart with larger blocks in the middle of a tar, copies of live files, checks by writer version and of owners |
//! | 5 | expand and compress: operations whose streams flow in both directions at once |
//! | 6 | a disk's file system can grow |

#![forbid(unsafe_code)]

mod aligned;
mod control;
mod error;
pub mod frame;
pub mod link;
pub mod meter;
mod operation;
pub mod slots;
pub mod worker;

pub use aligned::{ALIGN, Aligned};
pub use control::{Control, ControlReply, ControlRequest, Hello, Wake, Witness};
pub use error::{ErrorKind, WireError, with_causes};
pub use frame::{
    DATA_PAYLOAD, FrameError, FrameType, HEADER_LEN, MAX_PAYLOAD, header, parse_header, read_frame,
    write_frame, write_json,
};
pub use layer_codec::{
    BlankRoot, Change, ChangeKind, ContainerId, DigestKind, IdMaps, IdRange, LayerKind, LiveFile, RootHash,
    TarDigest,
    apply::{ApplyLimits, ApplyOptions, ApplySummary, LowerUse, Profile},
};
pub use layer_recode::{
    Compression, ExpandLimits, GZIP_LEVEL, MAX_WINDOW_LOG, RecodeSummary, SNIFF_BYTES, ZSTD_LEVEL, sniff,
};
pub use lcow_sys::jail::JailReport;
pub use operation::{
    CheckSummary, CopyJob, DiskFormat, DiskId, ExportSummary, GrowSummary, LargerDisks, LayerRef, Operation,
    OperationEvent, ParentRef, decode_change, encode_change,
};

/// Version of frames and messages; both sides of a pair must agree.
pub const PROTOCOL_VERSION: u32 = 6;
/// The port that an agent connects to on its host where there is no serial port (vsock, Hyper-V sockets): "LCOW".
pub const VSOCK_PORT: u32 = 0x4c43_4f57;
/// Name of the virtio-serial port that leads to the daemon.
pub const PORT_NAME: &str = "lcow.agent";
/// The maximum number of concurrent operations of one agent.
pub const MAX_OPERATIONS: usize = 1024;
/// The maximum number of disks attached to one agent.
pub const MAX_DISKS: usize = 2048;
