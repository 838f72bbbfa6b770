//! The protocol between daemon and service VM: frames, messages and their limits.
//!
//! ```text
//!   ┌────────────┬──────┬──────────────────┐
//!   │ u32 LE len │ type │ len bytes        │   len ≤ 1 MiB
//!   └────────────┴──────┴──────────────────┘
//!   one channel = one operation:
//!     daemon ► Request(JSON) Data* End            agent ► Data* (Event ◄► Resume)* Result(JSON) │ Error(JSON)
//!   control (one per VM):
//!     agent ► Hello(JSON)         daemon ► Control(JSON, descriptors beside it) ◄► Reply(JSON)
//! ```
//!
//! A stream without its explicit `Result` or `Error` was cut and is an error, whatever came before. Both ends treat
//! the other as hostile: lengths are checked before memory is taken, unknown types end the channel. This module does
//! no I/O but through `Read`/`Write`; `svm` reads the same frames asynchronously with [`parse_header`].

pub use crate::diff::{Change, ChangeKind, DigestKind, LiveFile, TarDigest};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, Read, Write};

/// Version of frames and messages; both sides of a pair must agree.
pub const PROTOCOL_VERSION: u32 = 4;
/// Bytes of a frame header.
pub const HEADER_LEN: usize = 5;
/// Most payload bytes of any frame.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Payload bytes of the data frames that we send: large enough that a frame's fixed cost vanishes, small enough that
/// hundreds of streams fit in memory.
pub const DATA_PAYLOAD: usize = 256 << 10;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameType {
    /// agent: version and state of the jail, first frame of a control channel.
    Hello = 1,
    /// daemon: an [`Operation`], first frame of a data channel.
    Request = 2,
    /// either: bytes of the stream.
    Data = 3,
    /// daemon: the stream is complete. Behind a [`link`](super::link) with the text of its digest.
    End = 4,
    /// agent: something the daemon must do before the agent goes on ([`Event`]).
    Event = 5,
    /// daemon: done, go on (answers one `Event`).
    Resume = 6,
    /// agent: the operation failed ([`WireError`]); last frame.
    Error = 7,
    /// agent: the operation is complete (its summary in JSON); last frame.
    Result = 8,
    /// daemon: a [`Control`] request.
    Control = 9,
    /// agent: answer to a `Control`.
    Reply = 10,
    /// daemon: first frame of a link's control channel ([`Wake`]).
    Wake = 11,
}

impl FrameType {
    fn from_byte(b: u8) -> Option<Self> {
        Some(match b {
            1 => Self::Hello,
            2 => Self::Request,
            3 => Self::Data,
            4 => Self::End,
            5 => Self::Event,
            6 => Self::Resume,
            7 => Self::Error,
            8 => Self::Result,
            9 => Self::Control,
            10 => Self::Reply,
            11 => Self::Wake,
            _ => return None,
        })
    }
}

/// The peer broke the protocol, or the channel broke.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The channel failed.
    #[error("channel: {0}")]
    Io(#[from] io::Error),
    /// The channel ended between frames.
    #[error("channel closed")]
    Closed,
    /// A type that does not exist, or is not allowed here.
    #[error("unexpected frame type {0}")]
    Type(u8),
    /// A length beyond [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes exceeds the limit of {MAX_PAYLOAD}")]
    TooLong(u32),
    /// The JSON of a frame is not what its type says.
    #[error("malformed message: {0}")]
    Json(#[from] serde_json::Error),
}

/// Splits a header into type and payload length.
///
/// # Errors
/// [`FrameError::Type`], [`FrameError::TooLong`].
pub fn parse_header(header: [u8; HEADER_LEN]) -> Result<(FrameType, usize), FrameError> {
    let [len @ .., byte] = header;
    let len = u32::from_le_bytes(len);
    let kind = FrameType::from_byte(byte).ok_or(FrameError::Type(byte))?;
    if len as usize > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len));
    }
    Ok((kind, len as usize))
}

/// The header of a frame with `len` payload bytes.
pub fn header(kind: FrameType, len: usize) -> [u8; HEADER_LEN] {
    debug_assert!(len <= MAX_PAYLOAD);
    let [a, b, c, d] = (len as u32).to_le_bytes();
    [a, b, c, d, kind as u8]
}

/// Reads one frame into `buffer` (cleared first; never grows beyond [`MAX_PAYLOAD`]).
///
/// # Errors
/// [`FrameError::Closed`] if the channel ends before a frame begins, `UnexpectedEof` if it ends inside one.
pub fn read_frame(input: &mut dyn Read, buffer: &mut Vec<u8>) -> Result<FrameType, FrameError> {
    let mut head = [0u8; HEADER_LEN];
    let mut have = 0;
    while have < HEADER_LEN {
        match input.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let (kind, len) = parse_header(head)?;
    buffer.clear();
    buffer.resize(len, 0);
    input.read_exact(buffer)?;
    Ok(kind)
}

/// Writes one frame, header and payload in one system call where the channel allows it.
///
/// # Errors
/// What the channel says; `InvalidInput` for a payload beyond [`MAX_PAYLOAD`].
pub fn write_frame(output: &mut dyn Write, kind: FrameType, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "frame payload beyond the limit"));
    }
    let head = header(kind, payload.len());
    let mut sent = 0;
    while sent < HEADER_LEN {
        match output.write_vectored(&[IoSlice::new(&head[sent..]), IoSlice::new(payload)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => sent += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    output.write_all(&payload[sent - HEADER_LEN..])
}

/// Writes `message` as JSON in one frame.
///
/// # Errors
/// As [`write_frame`]; `InvalidData` if it can't be put in JSON.
pub fn write_json<T: Serialize>(output: &mut dyn Write, kind: FrameType, message: &T) -> io::Result<()> {
    write_frame(output, kind, &serde_json::to_vec(message)?)
}

/// A disk of a VM, by the number under which it was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DiskId(pub u32);

/// How a disk's bytes lie in its file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// One after the other.
    #[default]
    Raw,
    /// In the blocks of a VHDX, which is read only. A VM to which the host attaches the VHDX sees a raw disk.
    Vhdx,
}

/// How a layer's files lie in its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// Made by ApplyDiff: the layer's root is `/`.
    Applied,
    /// Written through a mount: the layer's root is `/upper`.
    Sandbox,
}

/// A layer as an operation sees it: an attached disk and what is on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// The attached disk.
    pub disk: DiskId,
    /// What lies on it.
    pub kind: LayerKind,
    /// A sandbox that the agent's reader does not know may be mounted with the guest's kernel (`lcow.guestmount`).
    #[serde(default)]
    pub guest_mount: bool,
}

/// What a layer is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ParentRef {
    /// Nothing: all of the target's merged view is new.
    None,
    /// `target[1..]`: what lies in `target[0]` is the diff.
    Own,
    /// Another chain, nearest first; merged views are compared by content.
    Chain(Vec<LayerRef>),
}

/// One range of a user-namespace map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// First id inside.
    pub container_id: u32,
    /// First id on the host.
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

/// User-namespace maps; empty means ids are as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    /// User ids.
    pub uids: Vec<IdRange>,
    /// Group ids.
    pub gids: Vec<IdRange>,
}

/// Layout of the image to write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Ours.
    #[default]
    Default,
    /// Byte for byte what hcsshim's tar2ext4 writes.
    Hcsshim,
}

/// How a tar becomes an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyOptions {
    /// Layout.
    pub profile: Profile,
    /// Block size of the default profile: 1024, 2048 or 4096 bytes.
    pub block_size: u32,
    /// dm-verity tree behind the file system.
    pub verity: bool,
    /// The image may not grow beyond this; bytes.
    pub max_image_bytes: u64,
    /// With userns-remap: an entry whose owner is outside of these is refused. Ids stay as the tar has them.
    pub id_maps: IdMaps,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        Self {
            profile: Profile::Default,
            block_size: 1024,
            verity: false,
            max_image_bytes: 1 << 40,
            id_maps: IdMaps::default(),
        }
    }
}

/// The root folder of a sandbox that was only made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlankRoot {
    /// Permission bits.
    pub permissions: u16,
    /// Owner, as a host id.
    pub uid: u32,
    /// Group, as a host id.
    pub gid: u32,
}

/// What one data channel is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Nothing; answers `null`.
    Ping,
    /// Tar in (Data frames, End); image and record out on disks. Answers [`ApplySummary`].
    Apply {
        /// Writable, empty.
        image: DiskId,
        /// Writable, empty: the exact-diff record.
        record: DiskId,
        /// Writable, empty, of no use afterwards: the leaves of a large hash tree go there.
        scratch: Option<DiskId>,
        /// The parents, nearest first, for hard links into them: lent one after the other by [`Event::Lower`].
        lowers: Vec<LayerKind>,
        /// Options.
        options: ApplyOptions,
    },
    /// Strict check of an image's metadata. Answers [`CheckSummary`].
    Check {
        /// The image.
        image: DiskId,
        /// The disk goes on behind the file system with a hash tree: every block is held against it.
        tree: bool,
        /// The version of the writer that made it (`ext4::check::CheckLimits::writer`).
        writer: u32,
        /// With userns-remap: an owner outside of these fails the check, too. Empty: all are fine.
        #[serde(default)]
        owners: IdMaps,
    },
    /// The very tar that was applied (Data frames). Answers [`ExportSummary`].
    ExportExact {
        /// The image.
        image: DiskId,
        /// Its record.
        record: DiskId,
    },
    /// The canonical tar of a difference (Data frames). Answers [`ExportSummary`].
    ExportCanonical {
        /// The layer and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// What it is compared with.
        parent: ParentRef,
        /// Version of the canonical format.
        format: u32,
        /// Host ids found in sandboxes are mapped back to these containers' ids.
        id_maps: IdMaps,
        /// Sandboxes among the layers are mounted and in use: Events are sent.
        live: bool,
        /// What of them is copied while they stand still.
        #[serde(default)]
        copies: Option<CopyJob>,
    },
    /// Paths that differ (Data frames of [`encode_change`]). Answers `null`.
    Changes {
        /// The layer and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// What it is compared with.
        parent: ParentRef,
        /// Sandboxes among the layers are mounted and in use: Events are sent.
        live: bool,
    },
    /// Sum of the regular-file bytes of a difference. Answers `u64`.
    DiffSize {
        /// The layer and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// What it is compared with.
        parent: ParentRef,
        /// Sandboxes among the layers are mounted and in use: Events are sent.
        live: bool,
    },
    /// Whether a sandbox differs from a blank one on the same ancestors. Answers `bool`.
    Written {
        /// The sandbox and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// A blank sandbox's root folder.
        blank: BlankRoot,
        /// Sandboxes among them may be in use: Events are sent.
        live: bool,
    },
}

/// What an export copies of live sandboxes before [`Event::MetadataRead`], and reads from there afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyJob {
    /// Writable, empty, of no use afterwards.
    pub scratch: DiskId,
    /// Files that changed since (ctime), seconds since 1970 by the clock of the kernel that has them mounted;
    pub since: i64,
    /// and these, by which a former attempt failed.
    pub changed: Vec<LiveFile>,
    /// Most bytes in all. Smaller files come first.
    pub most_bytes: u64,
    /// Most milliseconds in all.
    pub most_millis: u64,
}

impl Operation {
    /// Its name in logs and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Apply { .. } => "apply",
            Self::Check { .. } => "check",
            Self::ExportExact { .. } => "export-exact",
            Self::ExportCanonical { .. } => "export-canonical",
            Self::Changes { .. } => "changes",
            Self::DiffSize { .. } => "diff-size",
            Self::Written { .. } => "written",
        }
    }
}

/// Something the daemon must do before an operation goes on. Resume answers, with the [`DiskId`] of a lent layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// All metadata are in memory: the file system may be thawed.
    MetadataRead,
    /// Files are about to be looked at again: freeze once more.
    BeforeRecheck,
    /// An apply has read its tar and looks for a link's target in the next of its lowers, which is to be lent now.
    /// Few tars ever ask, and a machine takes long for each disk.
    Lower,
    /// An apply met something that needs larger blocks and begins anew on a second pair of disks, [`LargerDisks`] in the
    /// Resume. It may be asked while the tar is being sent, once; Data that are under way are kept for later.
    LargerBlocks,
    /// An apply reads what it wrote and will take no Data for a while. Nobody answers.
    Replaying {
        /// Bytes of the tar that it has read so far: more than it said before, and no more than were sent.
        bytes: u64,
    },
    /// An apply no longer needs its first pair of disks. Nobody answers.
    Replayed,
}

/// The second pair of disks of an apply: both writable and empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LargerDisks {
    /// For the image.
    pub image: DiskId,
    /// For the exact-diff record.
    pub record: DiskId,
}

/// What applying a tar gave.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplySummary {
    /// Bytes of the ext4 file system.
    pub image_bytes: u64,
    /// Bytes of the file: ext4, verity tree, VHD footer.
    pub file_bytes: u64,
    /// Sum of regular-file bytes, a hard-linked inode once.
    pub diff_size: u64,
    /// Bytes of the tar stream, all of it.
    pub tar_bytes: u64,
    /// Digest of the tar stream.
    pub tar_digest: TarDigest,
    /// Bytes of the record.
    pub record_bytes: u64,
    /// UUID of the file system.
    pub uuid: uuid::Uuid,
    /// Entries of the tar.
    pub entries: u64,
    /// Root hash of the verity tree, if the image has one.
    pub verity_root: Option<RootHash>,
}

/// What a check found (an image that fails it is an error of kind [`ErrorKind::Corrupt`]).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSummary {
    /// Bytes of the file system.
    pub image_bytes: u64,
    /// Whose layout it has.
    pub profile: Profile,
    /// Inodes in use.
    pub inodes: u64,
    /// Blocks in use.
    pub blocks: u64,
    /// UUID of the file system.
    pub uuid: uuid::Uuid,
    /// Root hash of the tree that every block was held against, where that was asked for.
    pub verity: Option<RootHash>,
}

/// Root hash of a dm-verity tree; 64 hexadecimal digits in messages and on screens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RootHash(pub crate::verity::Hash);

impl std::fmt::Display for RootHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl From<RootHash> for String {
    fn from(hash: RootHash) -> Self {
        hash.to_string()
    }
}

impl TryFrom<String> for RootHash {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bad = "a root hash is 64 hexadecimal digits";
        let mut hash = [0; crate::verity::HASH];
        if text.len() != 2 * hash.len() || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad);
        }
        for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad)?;
        }
        Ok(Self(hash))
    }
}

/// What an export gave.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSummary {
    /// Bytes of tar sent.
    pub tar_bytes: u64,
    /// Their digest, where it is known: of an exact tar.
    pub tar_digest: Option<TarDigest>,
    /// Names that begin with `.wh.`, and what lies below them, that a canonical tar left out.
    #[serde(default)]
    pub hidden: u64,
    /// The first of them, printable.
    #[serde(default)]
    pub first_hidden: Option<String>,
}

/// Appends a change as `{kind u8, u32 LE length, path}`.
pub fn encode_change(out: &mut Vec<u8>, change: &Change) {
    out.push(change.kind as u8);
    out.extend_from_slice(&(change.path.len() as u32).to_le_bytes());
    out.extend_from_slice(&change.path);
}

/// Takes the next change off `bytes`; `None` at their end.
///
/// # Errors
/// A reason, if the bytes are not what [`encode_change`] writes.
pub fn decode_change(bytes: &mut &[u8]) -> Result<Option<Change>, &'static str> {
    let Some((kind, rest)) = bytes.split_first() else { return Ok(None) };
    let kind = match kind {
        0 => ChangeKind::Modified,
        1 => ChangeKind::Added,
        2 => ChangeKind::Deleted,
        _ => return Err("unknown kind of change"),
    };
    let (len, rest) = rest.split_first_chunk::<4>().ok_or("change without length")?;
    let len = u32::from_le_bytes(*len) as usize;
    let (path, rest) = rest.split_at_checked(len).ok_or("change cut off")?;
    *bytes = rest;
    Ok(Some(Change { path: path.to_vec(), kind }))
}

/// Why an operation failed in the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The tar or image breaks its format.
    Corrupt,
    /// Well-formed, but more than we do.
    Unsupported,
    /// A size or number beyond a limit.
    Limit,
    /// The disk of the output is full.
    NoSpace,
    /// Reading or writing failed.
    Io,
    /// The request makes no sense (unknown disk, …).
    Usage,
    /// The file changed while it was read (live sandboxes).
    Changed,
    /// The daemon gave up.
    Cancelled,
    /// A fault of ours (panic).
    Internal,
}

/// Why an operation failed: kind and text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// What sort of failure.
    pub kind: ErrorKind,
    /// For people: names entry and offset where there are any.
    pub message: String,
    /// Of [`ErrorKind::Changed`]: the files that changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<LiveFile>,
}

impl WireError {
    /// A failure of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), changed: Vec::new() }
    }
}

/// First message of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the agent.
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

/// First message to an agent at the other end of a [`link`](super::link).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// [`PROTOCOL_VERSION`] of the daemon.
    pub version: u32,
    /// To be repeated in [`Hello`].
    pub nonce: u64,
    /// Fresh random bytes, since machines restored from one saved state know each other's.
    pub entropy: Vec<u8>,
    /// Nanoseconds since 1970, UTC.
    pub unix_nanos: u64,
    /// A disk for bulk bytes.
    pub transfer: Option<super::link::slots::TransferDisk>,
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_limits_hold() {
        let mut wire = Vec::new();
        write_frame(&mut wire, FrameType::Data, b"abc").unwrap();
        write_frame(&mut wire, FrameType::End, b"").unwrap();
        let (mut input, mut buffer) = (wire.as_slice(), Vec::new());
        assert_eq!(read_frame(&mut input, &mut buffer).unwrap(), FrameType::Data);
        assert_eq!(buffer, b"abc");
        assert_eq!(read_frame(&mut input, &mut buffer).unwrap(), FrameType::End);
        assert!(matches!(read_frame(&mut input, &mut buffer), Err(FrameError::Closed)));
        assert!(write_frame(&mut wire, FrameType::Data, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }

    #[test]
    fn hostile_headers_take_no_memory() {
        let mut buffer = Vec::new();
        for bytes in
            [&[0xff, 0xff, 0xff, 0xff, 3][..], &[1, 0, 0x10, 0, 3], &[0, 0, 0, 0, 0], &[0, 0, 0, 0, 99]]
        {
            assert!(matches!(
                read_frame(&mut &bytes[..], &mut buffer),
                Err(FrameError::TooLong(_) | FrameError::Type(_))
            ));
            assert!(buffer.capacity() == 0);
        }
        for cut in 1..9 {
            let bytes = [4, 0, 0, 0, 3, b'a', b'b', b'c', b'd'];
            assert!(
                matches!(read_frame(&mut &bytes[..cut], &mut buffer), Err(FrameError::Io(_))),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn changes_round_trip_and_hostile_ones_are_refused() {
        let all = [
            Change { path: b"/a\xff".to_vec(), kind: ChangeKind::Added },
            Change { path: vec![], kind: ChangeKind::Deleted },
        ];
        let mut bytes = Vec::new();
        for change in &all {
            encode_change(&mut bytes, change);
        }
        let mut rest = bytes.as_slice();
        assert_eq!(decode_change(&mut rest).unwrap().as_ref(), Some(&all[0]));
        assert_eq!(decode_change(&mut rest).unwrap().as_ref(), Some(&all[1]));
        assert_eq!(decode_change(&mut rest).unwrap(), None);
        for bad in [&[7, 0, 0, 0, 0][..], &[0, 1], &[0, 0xff, 0xff, 0xff, 0xff, 1]] {
            assert!(decode_change(&mut &bad[..]).is_err());
        }
    }
}
