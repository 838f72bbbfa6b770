//! A running machine: attaching and detaching disks, channels, and its end.
//!
//! ```text
//!   attach   add-fd ─ blockdev-add (raw: offset, size) ─ device_add scsi-hd ─ agent: Attach "lun:0:N"
//!   detach   agent: Detach ─ device_del … DEVICE_DELETED ─ blockdev-del ─ remove-fd
//!   spare    paused after the greeting; the first attach or channel lets it go on ─ agent: Wake (the time)
//! ```
//!
//! Always `raw` with the window's offset and size: a VHD's footer is never inside the disk, and nothing probes bytes
//! that a container wrote. A read-only disk is a read-only descriptor. A disk that grows is a sparse file of the
//! largest size, cut to its length when the operation has reported it ([`ServiceVm::grown`]). QEMU ignores flushes: the
//! daemon syncs what it keeps.

use super::{
    machine::{QemuMachine, TRANSFER_UNIT},
    qmp::{Qmp, QmpError},
};
use crate::svm::{
    Access, Channel, Death, DiskFormat, DiskId, DiskSource, ServiceVm, SvmError, Witness,
    end::{End, Process},
    remote::{RemoteAgent, RemoteDisk},
};
use futures_util::{FutureExt, future::BoxFuture};
use lcow_sys::linux::process::{is_writable, reopen_read_only};
use parking_lot::Mutex;
use serde_json::json;
use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};
use svm_protocol::{JailReport, slots::TransferDisk};
use tokio::{sync::broadcast::error::RecvError, time::timeout};

/// Most disks of one machine at a time.
pub(super) const MAX_DISKS: u32 = 1024;
/// Units up to here have the short form of a SCSI address; higher ones are used when all of these are taken.
const SHORT_UNITS: u32 = 255;
/// Descriptor sets of disks begin here; lower ones are on the command line.
const FIRST_SET: u32 = 100;
/// How long a guest may take to release a disk.
const UNPLUG_TIME: Duration = Duration::from_secs(20);
/// Interval between attempts to delete a block node that is still in use.
const NODE_TRIES: u32 = 100;

/// A machine in use.
pub(super) struct QemuVm {
    label: String,
    qmp: Qmp,
    agent: RemoteAgent,
    process: Process,
    disks: Mutex<Disks>,
    paused: tokio::sync::Mutex<bool>,
    /// The last report of the machine's clock and random numbers.
    witness: Mutex<Option<Witness>>,
    /// Size of a disk that grows.
    growing_bytes: u64,
    /// Most disks at a time.
    most_disks: u32,
}

#[derive(Default)]
struct Disks {
    next: u32,
    /// The unit taken last.
    last: u32,
    units: HashMap<DiskId, u32>,
    taken: BTreeSet<u32>,
}

impl Disks {
    /// The free unit that was unused for longest, and a number never used before. A guest learns of a removed disk a
    /// moment later, and would take a new disk in its place for the old one.
    fn take(&mut self, most: u32) -> Option<(DiskId, u32)> {
        if self.taken.len() >= most as usize {
            return None;
        }
        let first = TRANSFER_UNIT + 1;
        let unit = (self.last + 1..=SHORT_UNITS)
            .chain(first..=MAX_DISKS)
            .find(|u| *u >= first && !self.taken.contains(u))?;
        self.last = if unit < SHORT_UNITS { unit } else { TRANSFER_UNIT };
        self.taken.insert(unit);
        let id = DiskId(self.next);
        self.next += 1;
        self.units.insert(id, unit);
        Some((id, unit))
    }

    fn give_back(&mut self, id: DiskId) {
        if let Some(unit) = self.units.remove(&id) {
            self.taken.remove(&unit);
        }
    }
}

impl fmt::Debug for QemuVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QemuVm").field("label", &self.label).finish_non_exhaustive()
    }
}

impl QemuVm {
    /// Resumes a restored machine, greets its agent and pauses it again until it is needed.
    pub(super) async fn greet(
        mut machine: QemuMachine,
        number: u64,
        growing_bytes: u64,
        most_disks: u32,
        limit: Duration,
    ) -> Result<Arc<Self>, SvmError> {
        let greeted = timeout(limit, Self::hello(&mut machine)).await;
        let QemuMachine { process, qmp, console, .. } = machine;
        let end = End::new(console);
        let agent = match greeted {
            Ok(Ok(agent)) => agent,
            Ok(Err(e)) => return Err(end.boot_failed(e)),
            Err(_) => {
                let reason = format!("the restored guest did not greet within {}s", limit.as_secs());
                return Err(end.boot_failed(reason));
            }
        };
        Ok(Arc::new(Self {
            label: format!("qemu {} (vm {number})", process.pid()),
            qmp,
            process: Process::watch(process, end.clone()).map_err(|e| end.boot_failed(e))?,
            disks: Mutex::default(),
            paused: tokio::sync::Mutex::new(true),
            witness: Mutex::new(agent.hello().witness.clone()),
            growing_bytes,
            most_disks,
            agent,
        }))
    }

    async fn hello(machine: &mut QemuMachine) -> Result<RemoteAgent, String> {
        let text = |e: &dyn fmt::Display| e.to_string();
        machine.qmp.run("cont", json!({})).await.map_err(|e| text(&e))?;
        let port = machine.agent.take().ok_or("the port was taken already")?;
        let transfer = machine.transfer.try_clone().map_err(|e| text(&e))?;
        let (input, output) = port.into_split();
        let disk = TransferDisk::new(serial(TRANSFER_UNIT));
        let agent =
            RemoteAgent::connect(input, output, Some((transfer, disk))).await.map_err(|e| text(&e))?;
        for note in &agent.hello().jail.notes {
            tracing::warn!(note, "service VM's guest");
        }
        machine.qmp.run("stop", json!({})).await.map_err(|e| text(&e))?;
        Ok(agent)
    }

    /// Ends the pause of a spare. Its clock was stopped too, so the time is sent before anything else.
    async fn go_on(&self) -> Result<(), QmpError> {
        let mut paused = self.paused.lock().await;
        if *paused {
            self.qmp.run("cont", json!({})).await?;
            // A broken link makes the caller's next request fail; a wrong clock alone does not.
            match self.agent.wake().await {
                Ok(witness) => *self.witness.lock() = witness,
                Err(error) => tracing::warn!(vm = self.label, %error, "cannot send a service VM the time"),
            }
            *paused = false;
        }
        Ok(())
    }

    fn disk_error(&self, disk: impl fmt::Display, e: impl fmt::Display) -> SvmError {
        SvmError::Disk { vm: self.label.clone(), disk: disk.to_string(), reason: e.to_string() }
    }

    async fn plug(&self, disk: &DiskSource, id: DiskId, unit: u32) -> Result<(), String> {
        let text = |e: &dyn fmt::Display| e.to_string();
        self.go_on().await.map_err(|e| text(&e))?;
        let writable = disk.access == Access::ReadWrite;
        let reopened;
        let mut fd: BorrowedFd<'_> = disk.file.as_fd();
        if !writable && is_writable(fd).map_err(|e| text(&e))? {
            reopened = reopen_read_only(fd).map_err(|e| text(&e))?;
            fd = reopened.as_fd();
        }
        // The agent applies a window of a VHDX; the device is the whole file.
        let within = disk.format == DiskFormat::Vhdx;
        let (offset, mut len) = if within { (0, None) } else { (disk.offset, disk.len) };
        if grows(disk) {
            disk.file.set_len(self.growing_bytes).map_err(|e| text(&e))?;
        } else if len.is_none() {
            len = Some(disk.file.metadata().map_err(|e| text(&e))?.len().saturating_sub(offset));
        }
        let set = FIRST_SET + unit;
        self.qmp.run_with("add-fd", json!({ "fdset-id": set }), &[fd]).await.map_err(|e| text(&e))?;
        let mut node = json!({
            "driver": "raw", "node-name": node(unit), "read-only": !writable, "offset": offset,
            "cache": { "no-flush": true },
            "file": { "driver": "file", "filename": format!("/dev/fdset/{set}"), "read-only": !writable,
                      "locking": "off", "cache": { "no-flush": true } },
        });
        // The device rounds up a length that is not a multiple of a sector (an exact record); the agent keeps the exact
        // one.
        if let Some(len) = len.filter(|l| l.is_multiple_of(512) && *l > 0) {
            node["size"] = json!(len);
        }
        self.qmp.run("blockdev-add", node).await.map_err(|e| text(&e))?;
        let device = json!({ "driver": "scsi-hd", "bus": "vscsi.0", "scsi-id": 0, "lun": unit,
            "drive": self::node(unit), "id": device(unit), "share-rw": true,
            "werror": "report", "rerror": "report" });
        self.qmp.run("device_add", device).await.map_err(|e| text(&e))?;
        let (offset, len) = if within { (disk.offset, disk.len) } else { (0, len) };
        let (serial, format) = (serial(unit), disk.format);
        let disk = RemoteDisk { disk: id, writable, offset, len, serial, format };
        self.agent.attach(&disk).await.map_err(|e| text(&e))
    }

    /// Whether the device no longer exists. A device that is being removed refuses with another class.
    async fn is_gone(&self, device: &str) -> bool {
        let asked = self.qmp.run("device_del", json!({ "id": device })).await;
        matches!(asked, Err(QmpError::Refused { class, .. }) if class == "DeviceNotFound")
    }

    /// Removes the parts of a disk that exist.
    async fn unplug(&self, unit: u32) -> Result<(), QmpError> {
        let mut events = self.qmp.events();
        let name = device(unit);
        match self.qmp.run("device_del", json!({ "id": name })).await {
            Ok(_) => {
                let gone = async {
                    loop {
                        match events.recv().await {
                            Ok(event)
                                if event.name != "DEVICE_DELETED"
                                    || event.data["device"] != name.as_str() => {}
                            Ok(_) => return true,
                            // The event may be among those that were lost when many disks were removed at once, so ask.
                            Err(RecvError::Lagged(_)) if self.is_gone(&name).await => return true,
                            Err(RecvError::Lagged(_)) => {}
                            Err(RecvError::Closed) => return false,
                        }
                    }
                };
                if !matches!(timeout(UNPLUG_TIME, gone).await, Ok(true)) {
                    return Err(QmpError::Broken(format!("the guest does not release {name}")));
                }
            }
            Err(QmpError::Refused { class, .. }) if class == "DeviceNotFound" => {}
            Err(e) => return Err(e),
        }
        // The node stays in use for a moment after its device is removed.
        let mut tries = 0;
        while let Err(e) = self.qmp.run("blockdev-del", json!({ "node-name": node(unit) })).await {
            tries += 1;
            match e {
                QmpError::Refused { description, .. } if description.contains("Failed to find") => break,
                e if tries == NODE_TRIES => return Err(e),
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        match self.qmp.run("remove-fd", json!({ "fdset-id": FIRST_SET + unit })).await {
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

fn grows(disk: &DiskSource) -> bool {
    disk.access == Access::ReadWrite && disk.len.is_none() && disk.offset == 0
}

fn node(unit: u32) -> String {
    format!("n{unit}")
}

fn device(unit: u32) -> String {
    format!("d{unit}")
}

fn serial(unit: u32) -> String {
    format!("lun:0:{unit}")
}

impl ServiceVm for QemuVm {
    fn describe(&self) -> String {
        self.label.clone()
    }

    fn attach<'a>(&'a self, disk: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
        async move {
            let path = disk.path.display();
            let taken = self.disks.lock().take(self.most_disks);
            let (id, unit) = taken.ok_or_else(|| {
                self.disk_error(&path, format!("{} disks are attached already", self.most_disks))
            })?;
            if let Err(e) = self.plug(disk, id, unit).await {
                if self.unplug(unit).await.is_ok() {
                    self.disks.lock().give_back(id);
                }
                return Err(self.disk_error(path, e));
            }
            Ok(id)
        }
        .boxed()
    }

    fn detach(&self, disk: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
        async move {
            let unit = self.disks.lock().units.get(&disk).copied();
            let unit = unit.ok_or_else(|| self.disk_error(disk.0, "not attached"))?;
            self.agent.detach(disk).await.map_err(|e| self.disk_error(disk.0, e))?;
            self.unplug(unit).await.map_err(|e| self.disk_error(disk.0, e))?;
            self.disks.lock().give_back(disk);
            Ok(())
        }
        .boxed()
    }

    fn grown<'a>(&'a self, disk: &'a DiskSource, len: u64) -> BoxFuture<'a, Result<(), SvmError>> {
        async move {
            if grows(disk) {
                disk.file
                    .set_len(len.min(self.growing_bytes))
                    .map_err(|e| self.disk_error(disk.path.display(), e))?;
            }
            Ok(())
        }
        .boxed()
    }

    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
        async move {
            let protocol =
                |e: &dyn fmt::Display| SvmError::Protocol { vm: self.label.clone(), reason: e.to_string() };
            self.go_on().await.map_err(|e| protocol(&e))?;
            let channel = self.agent.open_channel().await.map_err(|e| protocol(&e))?;
            Ok(Box::new(channel) as Channel)
        }
        .boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
        async move {
            let protocol =
                |e: &dyn fmt::Display| SvmError::Protocol { vm: self.label.clone(), reason: e.to_string() };
            if *self.paused.lock().await {
                // A paused guest cannot answer; its process can.
                return self.qmp.run("query-status", json!({})).await.map(|_| ()).map_err(|e| protocol(&e));
            }
            self.agent.ping().await.map_err(|e| protocol(&e))
        }
        .boxed()
    }

    fn terminate(&self) -> BoxFuture<'_, ()> {
        self.process.terminate().map(|_| ()).boxed()
    }

    fn death(&self) -> BoxFuture<'_, Death> {
        self.process.end.wait()
    }

    fn console(&self) -> String {
        self.process.end.console()
    }

    fn daemon_digests(&self) -> bool {
        true
    }

    fn jail(&self) -> Option<JailReport> {
        None
    }

    fn witness(&self) -> Option<Witness> {
        self.witness.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_used_again_late_and_numbers_never() {
        let mut disks = Disks::default();
        let (a, unit) = disks.take(MAX_DISKS).unwrap();
        assert_eq!(unit, TRANSFER_UNIT + 1);
        let (b, _) = disks.take(MAX_DISKS).unwrap();
        disks.give_back(a);
        let (c, again) = disks.take(MAX_DISKS).unwrap();
        assert!(again != unit && c != a && c != b);
        for _ in 0..SHORT_UNITS {
            let (id, _) = disks.take(MAX_DISKS).unwrap();
            disks.give_back(id);
        }
        assert!(disks.taken.len() == 2 && !disks.taken.contains(&unit));
        while disks.take(MAX_DISKS).is_some() {}
        assert_eq!(disks.taken.len(), MAX_DISKS as usize);
    }
}
