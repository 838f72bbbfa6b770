//! The link between a daemon and an agent in a virtual machine: many channels over one stream of bytes.
//!
//! ```text
//!   ┌──────────── 16 bytes SYNC ────────────┐ then link frames, both ways:
//!   ┌────────────┬───────────────┬──────┬──────────┐
//!   │ u32 LE len │ u32 LE channel│ kind │ len bytes│      channel 0 = control, 1… = one operation each
//!   └────────────┴───────────────┴──────┴──────────┘
//!   Data    bytes of the channel, paid for by the receiver's credit      Close   the sender has let go of the channel
//!   Credit  the receiver took so many bytes                              Stored  as Data, but the bytes lie in a slot
//!   Free    the receiver has emptied a slot                                      of the transfer disk
//! ```
//!
//! One multiplexed stream, not a port for each operation. Ports (virtio-serial) are few, fixed when a VM's state is
//! saved, and keep the bytes of a hung-up predecessor; a connection for each (hvsock) is a second mechanism for the
//! same thing. Here an operation is cancelled by a frame, whatever the transport; back-pressure is credit per
//! channel, so that one reader that sleeps holds up nobody else; and a transport is no more than a pair of streams:
//! a serial port, a socket, a Windows pipe, or, in tests, the standard streams of a process.
//!
//! Invariants, both ends:
//! * The reading side never waits for anything but the stream: what it reads has a place that the credit paid for.
//! * At most [`WINDOW`](svm_protocol::link::WINDOW) bytes of a channel are under way in each direction; more is a broken protocol. So is a frame that
//!   brings nothing (Data or Stored of no byte, Credit of 0): it would cost nothing. Small pieces are joined, so that
//!   what an inbox holds is at most about twice what was paid ([`meter`](svm_protocol::meter) counts it).
//! * What an end queues for a peer that reads nothing is bounded: bytes of a body wait for room, and when even the
//!   answers that nobody waits for (Credit, Free, Close) fill the queue, the session ends.
//! * A broken protocol ends the *session*. The agent then lets go of all channels and waits for the next SYNC, so
//!   garbage costs one session, not the agent. A SYNC is also legal at any frame's place: a VM that was restored from
//!   a saved state finds a new daemon in the middle of a session that nobody else remembers.
//! * What is sent in a session can't be taken for another's: [`svm_protocol::Hello`] repeats the nonce of its `Wake`.
//!
//! Bulk bytes: a serial port in an emulated machine moves 130–180 MB/s, a disk that is read past the guest's page
//! cache more than 1 GB/s. A *transfer disk* ([`slots`](svm_protocol::slots)), a memory file that both sides map to slots, carries every
//! piece that is worth a disk request; the stream then carries only the slot's number. Without such a disk, or with
//! all slots in use, bytes go inline: nothing ever waits for a slot.
//!
//! Behind a link the daemon digests the tars that pass ([`AgentChannel::daemon_digests`]): it moves their bytes anyhow, on
//! a real processor, and its own digest is one that a machine which was taken over can't lie about.
//!
//! [`AgentChannel::daemon_digests`]: super::channel::AgentChannel::daemon_digests
//! [`svm_protocol::link`] is what both ends share, [`session`] the guest's end ([`serve`]); the daemon's end is `svm::remote`.

mod inbox;
pub mod session;

pub use session::{Platform, serve, serve_counted};
