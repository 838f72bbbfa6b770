//! A short write in the place of a process that waits: the first half of its bytes, through a copy of its descriptor.
//!
//! ```text
//!   write(fd, bytes, n) ─► /proc/PID/mem: the bytes ─► pidfd_getfd: the same open file ─► write n/2 ─► returns n/2
//! ```
//!
//! Called by `watch`.

use lcow_sys::linux::power::{Call, Verdict};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

/// Longest write that is copied; longer ones are cut to it.
const MOST: usize = 1 << 20;
/// Bytes of a `struct iovec`.
const IOVEC: usize = 16;

/// Does the first half of a write. [`Verdict::Done`] if there is no half, or it cannot be done here: the kernel does all.
pub(crate) fn write(call: &Call) -> Verdict {
    let [fd, address, count, offset, ..] = call.arguments;
    let bytes = match call.number {
        libc::SYS_write | libc::SYS_pwrite64 => half(call.thread, address, count as usize),
        libc::SYS_writev | libc::SYS_pwritev => first_piece(call.thread, address, count as usize),
        _ => None,
    };
    let Some((bytes, file)) = bytes.and_then(|bytes| Some((bytes, descriptor(call.thread, fd)?))) else {
        return Verdict::Done;
    };
    let written = match call.number {
        libc::SYS_pwrite64 | libc::SYS_pwritev => rustix::io::pwrite(&file, &bytes, offset),
        _ => rustix::io::write(&file, &bytes),
    };
    match written {
        Ok(count) => Verdict::Returned(count),
        Err(error) => Verdict::Failed(error.raw_os_error()),
    }
}

fn memory(thread: u32, address: u64, count: usize) -> Option<Vec<u8>> {
    let memory = fs::File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = vec![0; count];
    memory.read_exact_at(&mut bytes, address).ok()?;
    Some(bytes)
}

fn half(thread: u32, address: u64, count: usize) -> Option<Vec<u8>> {
    let count = (count / 2).min(MOST);
    if count == 0 { None } else { memory(thread, address, count) }
}

/// The first half of what a write of several pieces writes.
fn first_piece(thread: u32, address: u64, count: usize) -> Option<Vec<u8>> {
    let table = memory(thread, address, count * IOVEC)?;
    let number = |at: usize| u64::from_ne_bytes(table[at..at + 8].try_into().expect("8 bytes"));
    let pieces: Vec<(u64, usize)> =
        (0..count).map(|n| (number(n * IOVEC), number(n * IOVEC + 8) as usize)).collect();
    let total: usize = pieces.iter().map(|(_, length)| length).sum();
    let mut wanted = (total / 2).min(MOST);
    let mut bytes = Vec::new();
    for (address, length) in pieces {
        let part = length.min(wanted);
        bytes.extend(memory(thread, address, part)?);
        wanted -= part;
    }
    if bytes.is_empty() { None } else { Some(bytes) }
}

/// The open file behind a descriptor of a process.
fn descriptor(thread: u32, fd: u64) -> Option<OwnedFd> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let group = status.lines().find_map(|line| line.strip_prefix("Tgid:\t"))?.parse().ok()?;
    let process = pidfd_open(Pid::from_raw(group)?, PidfdFlags::empty()).ok()?;
    pidfd_getfd(process, i32::try_from(fd).ok()?, PidfdGetfdFlags::empty()).ok()
}
