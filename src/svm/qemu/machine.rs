//! The machine: QEMU's command line, the process, and its descriptors.
//!
//! ```text
//!   3 monitor   4 port of the agent   5 serial console   6 transfer disk   7 memory   8 kernel, 9 initrd │ 8 state   (KVM)
//! ```
//!
//! q35 with only what is needed: one serial line, one virtio-serial port, one virtio-scsi controller. Every file is a
//! descriptor; no socket, no image and no memory has a name that could be left behind. The same command line must make
//! the template and every machine restored from it, so it is built in one place; its text is part of the template's
//! key. Called by `template` and `vm`.

use super::{
    find::{Accelerator, Qemu},
    qmp::Qmp,
};
use crate::svm::{SvmError, console::Console};
use lcow_sys::linux::{
    asyncfd, fdpass,
    launch::{FIRST_FD, Order, send_order},
    process::{WorkerCommand, WorkerProcess, spawn_worker},
};
use rustix::fs::MemfdFlags;
use std::{
    ffi::OsString,
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::PathBuf,
};
use svm_protocol::{PORT_NAME, slots::TRANSFER_BYTES};
use tokio::{io::Interest, net::UnixStream};

/// Kernel buffer of the agent's port and the monitor, each way; bytes.
const SOCKET_BUFFER: usize = 256 << 10;
/// Users that machines run as: one each, so that a compromised machine cannot reach its siblings. Above those of
/// distributions and user namespaces' usual ranges.
const FIRST_USER: u32 = 0x4c43_0000;
/// Address space of QEMU beyond the guest's memory: translated code, program, libraries, threads' stacks.
const OVERHEAD: u64 = 4 << 30;
/// Unit number of the transfer disk.
pub(super) const TRANSFER_UNIT: u32 = 0;

/// What all machines of a backend have in common.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    pub(super) qemu: Qemu,
    pub(super) accelerator: Accelerator,
    /// Model under TCG.
    pub(super) cpu: String,
    /// Bytes, a multiple of 2 MiB.
    pub(super) memory: u64,
    /// The complete kernel command line.
    pub(super) kernel_line: String,
    /// The program with the hidden `launch` subcommand, and what makes it launch.
    /// See [`Order::strict`].
    pub(super) strict: bool,
    pub(super) launcher: PathBuf,
    pub(super) launcher_args: Vec<OsString>,
    pub(super) launcher_env: Vec<(OsString, OsString)>,
}

/// How a machine begins.
pub(super) enum Beginning<'a> {
    /// A boot whose memory is written to `memory`.
    Boot { kernel: &'a File, initrd: &'a File, memory: &'a File },
    /// A private view of a template's memory, and a stream with the devices' state.
    Restore { memory: &'a File, state: OwnedFd },
}

/// A started process with our ends of its sockets.
pub(super) struct QemuMachine {
    pub(super) process: WorkerProcess,
    pub(super) qmp: Qmp,
    /// The agent's port, until it is taken.
    pub(super) agent: Option<UnixStream>,
    pub(super) transfer: File,
    pub(super) console: Console,
}

impl Recipe {
    /// QEMU's arguments. `restore`: the machine waits for a state.
    pub(super) fn arguments(&self, restore: bool) -> Vec<String> {
        let fd = |n: i32| FIRST_FD + n;
        let memory = self.memory >> 20;
        let (share, extra) = if restore { ("off", ",readonly=on,rom=off") } else { ("on", "") };
        let mut args: Vec<String> = [
            "-name",
            "lcow-svm",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-nic",
            "none",
            "-smp",
            "1",
            "-machine",
            "q35,smm=off,vmport=off,hpet=off,i8042=off,sata=off,smbus=off,memory-backend=ram",
        ]
        .map(str::to_owned)
        .to_vec();
        let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
        add("-m", format!("{memory}"));
        add(
            "-object",
            format!(
                "memory-backend-file,id=ram,size={memory}M,mem-path=/proc/self/fd/{},share={share}{extra}",
                fd(4)
            ),
        );
        match self.accelerator {
            Accelerator::Kvm => {
                add("-accel", "kvm,device=/dev/fdset/9".into());
                add("-add-fd", format!("fd={},set=9", if restore { fd(6) } else { fd(7) }));
                add("-cpu", "host,migratable=off".into());
            }
            Accelerator::Tcg => {
                add("-accel", "tcg,tb-size=128".into());
                add("-cpu", self.cpu.clone());
            }
        }
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        add("-chardev", format!("socket,id=qmp,fd={}", fd(0)));
        add("-mon", "chardev=qmp,mode=control".into());
        add("-chardev", format!("socket,id=agent,fd={}", fd(1)));
        add("-chardev", format!("socket,id=console,fd={}", fd(2)));
        add("-serial", "chardev:console".into());
        add("-device", "virtio-serial-pci,id=vserial,max_ports=2".into());
        add("-device", format!("virtserialport,bus=vserial.0,nr=1,chardev=agent,name={PORT_NAME}"));
        add("-device", "virtio-scsi-pci,id=vscsi,num_queues=1,virtqueue_size=128,seg_max_adjust=on".into());
        add("-add-fd", format!("fd={},set=1", fd(3)));
        add(
            "-blockdev",
            "driver=raw,node-name=transfer,cache.no-flush=on,file.driver=file,file.filename=/dev/fdset/1,file.cache.no-flush=on,file.locking=off".into(),
        );
        add(
            "-device",
            format!(
                "scsi-hd,bus=vscsi.0,scsi-id=0,lun={TRANSFER_UNIT},drive=transfer,id=dtransfer,share-rw=on"
            ),
        );
        if restore {
            add("-incoming", "defer".into());
            args.push("-S".into());
        } else {
            add("-kernel", format!("/proc/self/fd/{}", fd(5)));
            add("-initrd", format!("/proc/self/fd/{}", fd(6)));
            add("-append", self.kernel_line.clone());
        }
        args
    }

    /// Starts a machine; with `kvm` where the accelerator needs it.
    pub(super) async fn start(
        &self,
        number: u64,
        beginning: Beginning<'_>,
        kvm: Option<&File>,
    ) -> Result<QemuMachine, SvmError> {
        let console = Console::default();
        let failed = |reason: String| SvmError::Boot { reason, console: console.tail() };
        let io = |e: std::io::Error| failed(e.to_string());
        let (qmp, their_qmp) = fdpass::stream_pair(SOCKET_BUFFER).map_err(io)?;
        let (agent, their_agent) = fdpass::stream_pair(SOCKET_BUFFER).map_err(io)?;
        let (serial, their_serial) = fdpass::stream_pair(SOCKET_BUFFER).map_err(io)?;
        let transfer =
            rustix::fs::memfd_create("lcow-transfer", MemfdFlags::CLOEXEC).map_err(|e| io(e.into()))?;
        let transfer = File::from(transfer);
        transfer.set_len(TRANSFER_BYTES).map_err(io)?;
        let restore = matches!(beginning, Beginning::Restore { .. });
        let order = |fds: usize| Order {
            program: self.qemu.program.clone(),
            args: self.arguments(restore),
            fds,
            user: FIRST_USER + (number & 0xffff) as u32,
            memory: self.memory + OVERHEAD,
            strict: self.strict,
        };
        let command = WorkerCommand {
            program: self.launcher.clone(),
            args: self.launcher_args.clone(),
            env: self.launcher_env.clone(),
        };
        let (sender, started) = tokio::sync::oneshot::channel();
        spawn_worker(command, move |worker| {
            // If the waiter is gone, dropping the process here kills and reaps it.
            let _ = sender.send(worker);
        })
        .map_err(io)?;
        let gone = || failed("the spawner thread is gone".into());
        let mut process = started
            .await
            .map_err(|_| gone())?
            .map_err(|e| failed(format!("{}: {e}", self.launcher.display())))?;
        let label = format!("qemu {} (vm {number})", process.pid());
        let (Some(stderr), Some(socket)) = (process.stderr.take(), process.control.take()) else {
            return Err(failed("launcher without control socket".into()));
        };
        let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(OwnedFd::from(stderr)).map_err(io)?;
        console.follow(pipe, label.clone());
        console.follow(stream(serial).map_err(io)?, label);
        {
            let mut fds =
                vec![their_qmp.as_fd(), their_agent.as_fd(), their_serial.as_fd(), transfer.as_fd()];
            match &beginning {
                Beginning::Boot { kernel, initrd, memory } => {
                    fds.extend([memory.as_fd(), kernel.as_fd(), initrd.as_fd()]);
                }
                Beginning::Restore { memory, state } => fds.extend([memory.as_fd(), state.as_fd()]),
            }
            fds.extend(kvm.filter(|_| self.accelerator == Accelerator::Kvm).map(AsFd::as_fd));
            let order = order(fds.len());
            send_order(socket.as_fd(), &order, &fds).map_err(io)?;
        }
        // This process's copies of its ends must be closed, or its death would not close them.
        drop((their_qmp, their_agent, their_serial, beginning));
        let watch = asyncfd::watch(process.end_watch().map_err(io)?, Interest::READABLE).map_err(io)?;
        let qmp = tokio::select! {
            qmp = Qmp::start(qmp) => qmp,
            _ = watch.readable() => Err(super::qmp::QmpError::Broken("the process has ended".into())),
        };
        // The socket stays open until here: the launcher takes its end for the end of this process.
        drop(socket);
        let qmp = match qmp {
            Ok(qmp) => qmp,
            Err(e) => {
                let ended = process.kill_and_reap();
                // Its last output may still be on its way.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                return Err(failed(format!("{} did not start: {e} ({ended})", self.qemu.program.display())));
            }
        };
        Ok(QemuMachine { process, qmp, agent: Some(stream(agent).map_err(io)?), transfer, console })
    }
}

/// A socket for the runtime.
pub(super) fn stream(fd: OwnedFd) -> std::io::Result<UnixStream> {
    let stream = StdStream::from(fd);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}
