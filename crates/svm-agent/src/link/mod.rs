//! The link between a daemon and an agent in a virtual machine: many channels over one stream of bytes.
//!
//! ```text
//!   ┌──────────── 16 bytes SYNC ────────────┐ then link frames, both ways:
//!   ┌────────────┬───────────────┬──────┬──────────┐
//!   │ u32 LE len │ u32 LE channel│ kind │ len bytes│      channel 0 = control, 1… = one operation each
//!   └────────────┴───────────────┴──────┴──────────┘
//!   Data    bytes of the channel, paid for by the receiver's credit      Close   the sender has closed the channel
//!   Credit  the receiver has consumed so many bytes                      Stored  as Data, but the bytes lie in a slot
//!   Free    the receiver has emptied a slot                                      of the transfer disk
//! ```
//!
//! Why one multiplexed stream instead of a port for each operation: ports (virtio-serial) are few, fixed when a VM's state
//! is saved, and keep the bytes of a closed predecessor; a connection for each operation (hvsock) would be a second
//! mechanism. Here a frame cancels an operation, on any transport; back-pressure is credit per channel, so a slow reader
//! delays no other channel; and a transport is only a pair of streams: a serial port, a socket, a Windows pipe or, in
//! tests, the standard streams of a process.
//!
//! Invariants, both ends:
//! * The reading side waits for the stream only: there is room for everything that the credit allows.
//! * At most [`WINDOW`](svm_protocol::link::WINDOW) bytes of a channel are in transit in each direction; more is a
//!   violation of the protocol. So is an empty frame (Data or Stored of 0 bytes, Credit of 0), which would cost no credit.
//!   Small pieces are joined, so that the memory of an inbox is at most about twice its credit
//!   ([`meter`](svm_protocol::meter) counts it).
//! * What an end queues for a peer that reads nothing is bounded: bytes of a body wait for room, and if even Credit, Free
//!   and Close frames, for which no sender waits, fill the queue, the session ends.
//! * A violation of the protocol ends the *session*. The agent then closes all channels and waits for the next SYNC, so
//!   garbage costs one session, not the agent. A SYNC is also valid in place of any frame: a VM that was restored from a
//!   saved state meets a new daemon in the middle of a session that only the VM remembers.
//! * Frames of one session cannot be mistaken for another's: [`svm_protocol::Hello`] repeats the nonce of its `Wake`.
//!
//! Bulk bytes: a serial port in an emulated machine moves 130–180 MB/s, a disk that is read past the guest's page
//! cache more than 1 GB/s. A *transfer disk* ([`slots`](svm_protocol::slots)), a memory file that both sides divide into slots, carries every
//! piece that is worth a disk request; the stream then carries only the slot's number. Without such a disk, or with
//! all slots in use, bytes go inline: nothing ever waits for a slot.
//!
//! Over a link the daemon digests the tars that pass ([`AgentChannel::daemon_digests`]): it moves their bytes anyway, on a
//! real processor, and a compromised VM cannot forge that digest.
//!
//! [`AgentChannel::daemon_digests`]: super::channel::AgentChannel::daemon_digests
//! [`svm_protocol::link`] is what both ends share, [`session`] the guest's end ([`serve`]); the daemon's end is `svm::remote`.

mod inbox;
pub mod session;

pub use session::{Platform, serve, serve_counted};
