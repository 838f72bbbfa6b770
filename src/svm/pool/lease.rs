//! A lease, and the operations on it.
//!
//! ```text
//!   Lease ─ attach disks (counted) ─ channel ─ Request ─ stream ─ Result      dropped: disks, then VM, given back
//! ```
//!
//! Called by `driver`.

use super::{Inner, machine::PoolEvent};
use crate::svm::{
    ApplyJob, CheckJob, CompareJob, DiskSource, ExportJob, ExportKind, ExportSummary, GrowJob, LayerDisk,
    LiveControl, ParentDisks, ServiceVm, SvmError, TarStream,
    exchange::{self, Incoming, Receiver, Sender},
    replays,
    stream::{Freeze, Item, QUEUED_CHUNKS},
};
use bytes::Bytes;
use futures_util::Stream;
use serde::de::DeserializeOwned;
use std::{
    collections::HashMap,
    fmt, io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use svm_protocol::{
    ApplySummary, Change, CheckSummary, CopyJob, DiskId, ErrorKind, FrameType, GrowSummary, LayerRef,
    Operation, ParentRef, WireError, decode_change,
};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;

/// Most bytes of changed paths that are accepted from a VM. The engine needs several times as much memory for them; the
/// 100,000 files of a real image have some 8 MiB.
const MAX_CHANGES: usize = 32 << 20;

/// Bytes that an image's file may have: verity tree (less than one block for 64) and VHD footer come on top of the
/// largest file system.
fn largest_file(max_image_bytes: u64) -> u64 {
    max_image_bytes + max_image_bytes / 64 + (64 << 20)
}

/// The right to use a VM; dropping it gives the VM back.
pub struct Lease {
    inner: Arc<Inner>,
    id: u64,
    name: String,
    vm: Option<Arc<dyn ServiceVm>>,
    poison: AtomicBool,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("id", &self.id).field("vm", &self.name).finish_non_exhaustive()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Before the event, so that a clone here does not delay the end of the VM.
        self.vm = None;
        let poison = self.poison.load(Ordering::Relaxed);
        self.inner.run(
            |m| m.step(PoolEvent::Release { lease: self.id, poison }),
            |state| {
                state.grants.remove(&self.id);
            },
        );
    }
}

/// A guest's page cache turns a full disk into an I/O error; the host knows the real cause.
fn say_full(error: SvmError, job: &ApplyJob) -> SvmError {
    /// Fewer free bytes than this count as none.
    const NONE_LEFT: u64 = 1 << 20;
    if error.refused_kind() == Some(ErrorKind::Io)
        && let SvmError::Refused(said) = &error
        && [&job.image, &job.record].iter().any(|disk| bytes_left(disk).is_some_and(|left| left < NONE_LEFT))
    {
        let message = format!("no space left on the host: {}", said.message);
        return SvmError::Refused(WireError::new(ErrorKind::NoSpace, message));
    }
    error
}

/// Free bytes of the file system of a disk's file.
fn bytes_left(disk: &DiskSource) -> Option<u64> {
    #[cfg(unix)]
    return rustix::fs::fstatvfs(&*disk.file).ok().map(|s| s.f_bavail.saturating_mul(s.f_frsize));
    #[cfg(windows)]
    return lcow_sys::windows::fs::available_bytes(disk.path.parent()?).ok();
}

/// A disk in use by one operation.
struct DiskUse {
    inner: Arc<Inner>,
    lease: u64,
    usage: u64,
}

impl Drop for DiskUse {
    fn drop(&mut self) {
        self.inner.run(
            |m| m.step(PoolEvent::Detach { lease: self.lease, usage: self.usage }),
            |state| {
                state.disk_waiters.remove(&self.usage);
                state.sources.remove(&self.usage);
            },
        );
    }
}

/// The disks of one operation, each attached once.
#[derive(Default)]
struct Attached {
    uses: Vec<(super::DiskKey, DiskUse)>,
    known: HashMap<super::DiskKey, DiskId>,
}

impl Attached {
    /// The operation no longer needs this disk.
    fn release(&mut self, id: DiskId) {
        self.known.retain(|_, known| *known != id);
        let known = &self.known;
        self.uses.retain(|(key, _)| known.contains_key(key));
    }
}

impl Lease {
    pub(super) fn ticket(inner: Arc<Inner>, id: u64, name: String) -> Self {
        Self { inner, id, name, vm: None, poison: AtomicBool::new(false) }
    }

    pub(super) fn granted(&mut self, vm: Arc<dyn ServiceVm>) {
        self.vm = Some(vm);
    }

    /// Name of the VM (`<id>_svm` or `_lcow_global_svm_`).
    pub fn vm_name(&self) -> &str {
        &self.name
    }

    /// What the backend calls the VM ("worker 1234"), for logs.
    pub fn vm_description(&self) -> String {
        self.vm.as_ref().map(|vm| vm.describe()).unwrap_or_default()
    }

    /// Records a failure for which the VM is to blame.
    pub(super) fn judge<T>(&self, result: Result<T, SvmError>) -> Result<T, SvmError> {
        if let Err(e) = &result
            && e.blames_vm()
        {
            self.poison.store(true, Ordering::Relaxed);
        }
        result
    }

    async fn attach(&self, attached: &mut Attached, disk: &DiskSource) -> Result<DiskId, SvmError> {
        let identity = disk.identity().map_err(|e| SvmError::Disk {
            vm: self.name.clone(),
            disk: disk.path.display().to_string(),
            reason: e.to_string(),
        })?;
        let key = (identity, disk.access, disk.offset, disk.len);
        if let Some(id) = attached.known.get(&key) {
            return Ok(*id);
        }
        let (lease, usage) = (self.id, self.inner.number());
        let (sender, ready) = oneshot::channel();
        attached.uses.push((key, DiskUse { inner: self.inner.clone(), lease, usage }));
        self.inner.run(
            |m| m.step(PoolEvent::Attach { lease, usage, disk: key }),
            |state| {
                state.disk_waiters.insert(usage, sender);
                state.sources.insert(usage, (key, disk.clone()));
            },
        );
        let id = ready.await.unwrap_or(Err(SvmError::Cancelled("the service VM went away")))?;
        attached.known.insert(key, id);
        Ok(id)
    }

    async fn attach_layers(
        &self,
        attached: &mut Attached,
        layers: &[LayerDisk],
    ) -> Result<Vec<LayerRef>, SvmError> {
        let mut refs = Vec::with_capacity(layers.len());
        for layer in layers {
            let disk = self.attach(attached, &layer.disk).await?;
            refs.push(LayerRef { disk, kind: layer.kind, guest_mount: self.inner.config.guest_mount });
        }
        Ok(refs)
    }

    async fn attach_parent(
        &self,
        attached: &mut Attached,
        parent: &ParentDisks,
    ) -> Result<ParentRef, SvmError> {
        Ok(match parent {
            ParentDisks::None => ParentRef::None,
            ParentDisks::Own => ParentRef::Own,
            ParentDisks::Chain(layers) => ParentRef::Chain(self.attach_layers(attached, layers).await?),
        })
    }

    /// How long an operation may make no progress.
    pub(super) fn idle_timeout(&self) -> Duration {
        self.inner.config.idle_timeout
    }

    pub(super) async fn begin(&self, operation: &Operation) -> Result<(Sender, Receiver), SvmError> {
        let vm = self.vm.as_ref().ok_or(SvmError::Cancelled("the lease has no service VM"))?;
        exchange::begin(vm, &self.name, self.inner.config.idle_timeout, operation).await
    }

    /// Lets the file system on a disk grow. What was written is durable.
    ///
    /// # Errors
    /// [`SvmError::Refused`] for a file system that cannot grow, and so on.
    pub async fn grow(&self, job: &GrowJob) -> Result<GrowSummary, SvmError> {
        let run = async {
            let mut attached = Attached::default();
            let disk = self.attach(&mut attached, &job.disk).await?;
            let data = job.data.iter().map(|range| (range.start, range.end)).collect();
            let operation = Operation::Grow { disk, bytes: job.bytes, data };
            let (_sender, mut receiver) = self.begin(&operation).await?;
            receiver.result().await
        };
        self.judge(run.await)
    }

    /// Writes the tar `body` as an image with its record. Both files are written but not synced.
    ///
    /// # Errors
    /// [`SvmError::Body`] if the body fails (a cut upload), [`SvmError::Refused`] for a bad tar, and so on.
    pub async fn tar_to_layer<S>(&self, job: ApplyJob, body: S) -> Result<ApplySummary, SvmError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        self.judge(self.apply(&job, body).await)
    }

    async fn apply<S>(&self, job: &ApplyJob, body: S) -> Result<ApplySummary, SvmError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let mut attached = Attached::default();
        let image = self.attach(&mut attached, &job.image).await?;
        let record = self.attach(&mut attached, &job.record).await?;
        let lowers = job.lowers.iter().map(|layer| layer.kind).collect();
        let scratch = match &job.scratch {
            Some(scratch) => Some(self.attach(&mut attached, scratch).await?),
            None => None,
        };
        let operation = Operation::Apply { image, record, scratch, lowers, options: job.options.clone() };
        let mut growing = Growing { lease: self, job, first: [image, record], second: None, least: Some(0) };
        let summary = self.apply_stream(&operation, body, &mut attached, &mut growing).await;
        let summary = summary.map_err(|e| say_full(e, job))?;
        let (image, record) = growing.second.unwrap_or_else(|| (job.image.clone(), job.record.clone()));
        if let Some(vm) = &self.vm {
            // The driver checks the summary against the files, and a VM that saw no tar checks the image.
            vm.grown(&image, summary.file_bytes.min(largest_file(job.options.max_image_bytes))).await?;
            vm.grown(&record, summary.record_bytes.min(job.options.max_image_bytes)).await?;
        }
        Ok(summary)
    }

    async fn apply_stream<S>(
        &self,
        operation: &Operation,
        body: S,
        attached: &mut Attached,
        growing: &mut Growing<'_>,
    ) -> Result<ApplySummary, SvmError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let (mut sender, receiver) = self.begin(operation).await?;
        let (insert, mut between) = mpsc::unbounded_channel();
        let mut receiving = Box::pin(receiver.next_owned());
        let sent = {
            let mut sending = pin!(sender.body(body, &mut between));
            loop {
                let (receiver, early) = tokio::select! {
                    biased;
                    early = &mut receiving => early,
                    sent = &mut sending => break sent,
                };
                match early {
                    // The agent may refuse before it has seen everything, but cannot succeed.
                    Err(e) => return Err(e),
                    Ok(Incoming::Event(event)) => {
                        // Send nothing meanwhile: the agent would have to buffer what comes before the answer.
                        if let Some(answer) = growing.answer(event, attached, receiver.sent_bytes()).await? {
                            let _ = insert.send((FrameType::Resume, answer));
                        }
                        receiver.excuse();
                    }
                    Ok(_) => return Err(receiver.protocol("a message before the end of the tar".into())),
                }
                receiving = Box::pin(receiver.next_owned());
            }
        };
        let (mut receiver, mut word) = match sent {
            Ok(()) => {
                let (receiver, word) = receiving.await;
                (receiver, word?)
            }
            Err(e) => {
                let idle = self.inner.config.idle_timeout;
                return Err(Receiver::after_send_error_of(receiving, e, idle).await);
            }
        };
        let mut lowers = growing.job.lowers.iter();
        loop {
            match word {
                Incoming::Result(json) => {
                    let summary: ApplySummary = receiver.decode(&json)?;
                    // Layers that depend on nothing are shared: what was read from a hostile lower layer must not pass.
                    if lowers.len() < growing.job.lowers.len() && !summary.depends_on_lowers() {
                        let reason = "it asked for lower layers, and reports that it used none";
                        return Err(receiver.protocol(reason.into()));
                    }
                    return Ok(summary);
                }
                Incoming::Event(svm_protocol::OperationEvent::Lower) => {
                    let lower = lowers.next();
                    let lower = lower
                        .ok_or_else(|| receiver.protocol("asked for more lowers than there are".into()))?;
                    let disk = self.attach(attached, &lower.disk).await?;
                    if let Err(e) = sender.frame(FrameType::Resume, disk.0.to_string().as_bytes()).await {
                        return Err(receiver.after_send_error(e).await);
                    }
                }
                Incoming::Event(event) => {
                    let answer = growing.answer(event, attached, receiver.sent_bytes()).await?;
                    receiver.excuse();
                    if let Some(answer) = answer
                        && let Err(e) = sender.frame(FrameType::Resume, &answer).await
                    {
                        return Err(receiver.after_send_error(e).await);
                    }
                }
                Incoming::Data(_) => return Err(receiver.protocol("unexpected data".into())),
            }
            word = receiver.next().await?;
        }
    }

    /// Streams a layer's tar. Returns when the first bytes (or a complete empty tar) are there, so an early failure is
    /// an error here. The stream keeps the lease.
    ///
    /// # Errors
    /// As [`Lease::tar_to_layer`]; [`SvmError::Live`].
    pub async fn layer_to_tar(self, job: ExportJob) -> Result<TarStream, SvmError> {
        let (sender, stream) = mpsc::channel(QUEUED_CHUNKS);
        let exporting = async move {
            let end = tokio::select! {
                biased;
                () = sender.closed() => None,
                done = self.export(job, &sender) => Some(self.judge(done)),
            };
            // The lease is dropped first, so that the VM is free when the reader sees the end of the stream.
            drop(self);
            if let Some(end) = end {
                let _ = sender.send(end.map(Item::Done)).await;
            }
        };
        tokio::spawn(exporting.in_current_span());
        TarStream::begin(stream).await
    }

    async fn copies(
        &self,
        attached: &mut Attached,
        live: Option<&dyn LiveControl>,
    ) -> Result<Option<CopyJob>, SvmError> {
        let Some(live) = live else { return Ok(None) };
        let copies = live.copies().await.map_err(|e| SvmError::Live(format!("make a scratch disk: {e}")))?;
        let Some(copies) = copies else { return Ok(None) };
        Ok(Some(CopyJob {
            scratch: self.attach(attached, &copies.scratch).await?,
            since: copies.since,
            changed: copies.changed,
            most_bytes: copies.most_bytes,
            most_millis: u64::try_from(copies.most_time.as_millis()).unwrap_or(u64::MAX),
        }))
    }

    async fn export(
        &self,
        job: ExportJob,
        out: &mpsc::Sender<Result<Item, SvmError>>,
    ) -> Result<ExportSummary, SvmError> {
        let mut attached = Attached::default();
        let operation = match &job.kind {
            ExportKind::Exact { image, record } => Operation::ExportExact {
                image: self.attach(&mut attached, image).await?,
                record: self.attach(&mut attached, record).await?,
            },
            ExportKind::Canonical { target, parent, format, id_maps, source_date_epoch } => {
                Operation::ExportCanonical {
                    target: self.attach_layers(&mut attached, target).await?,
                    parent: self.attach_parent(&mut attached, parent).await?,
                    format: *format,
                    id_maps: id_maps.clone(),
                    live: job.live.is_some(),
                    copies: self.copies(&mut attached, job.live.as_deref()).await?,
                    source_date_epoch: *source_date_epoch,
                }
            }
        };
        let mut freeze = Freeze::new(job.live, self.inner.config.freeze_limit);
        freeze.freeze().await?;
        let (mut sender, mut receiver) = freeze.within(self.begin(&operation)).await??;
        loop {
            match freeze.next(&mut sender, &mut receiver).await? {
                // Bytes are sent at the reader's pace, during which writers must not be stopped.
                Incoming::Data(_) if freeze.is_frozen() => {
                    return Err(receiver.protocol("data while the sandbox is frozen".into()));
                }
                Incoming::Data(bytes) => {
                    if out.send(Ok(Item::Data(bytes))).await.is_err() {
                        return Err(SvmError::Cancelled("the reader of the tar has gone"));
                    }
                }
                Incoming::Result(json) => return receiver.decode(&json),
                Incoming::Event(_) => return Err(receiver.protocol("unexpected event".into())),
            }
        }
    }

    /// Paths that differ, in the agent's order. At most 256 MiB of paths.
    ///
    /// # Errors
    /// As [`Lease::layer_to_tar`].
    pub async fn changes(&self, job: CompareJob) -> Result<Vec<Change>, SvmError> {
        let operation = |target, parent, live| Operation::Changes { target, parent, live };
        let (data, ()) = self.judge(self.compare(job, operation).await)?;
        let mut rest = data.as_slice();
        let mut changes = Vec::new();
        let bad = |reason: &str| SvmError::Protocol { vm: self.name.clone(), reason: reason.to_owned() };
        while let Some(change) = self.judge(decode_change(&mut rest).map_err(bad))? {
            changes.push(change);
        }
        Ok(changes)
    }

    /// Sum of the regular-file bytes of the difference.
    ///
    /// # Errors
    /// As [`Lease::layer_to_tar`].
    pub async fn diff_size(&self, job: CompareJob) -> Result<u64, SvmError> {
        let operation = |target, parent, live| Operation::DiffSize { target, parent, live };
        self.judge(self.compare(job, operation).await).map(|(_, size)| size)
    }

    /// Whether the nearest layer of the job, a sandbox on its own parents, was ever written; `blank` describes the root
    /// of one that was not.
    ///
    /// # Errors
    /// As [`Lease::layer_to_tar`].
    pub async fn written(&self, job: CompareJob, blank: svm_protocol::BlankRoot) -> Result<bool, SvmError> {
        let operation = |target, _, live| Operation::Written { target, blank, live };
        self.judge(self.compare(job, operation).await).map(|(_, written)| written)
    }

    async fn compare<T: DeserializeOwned>(
        &self,
        job: CompareJob,
        operation: impl FnOnce(Vec<LayerRef>, ParentRef, bool) -> Operation,
    ) -> Result<(Vec<u8>, T), SvmError> {
        let mut attached = Attached::default();
        let target = self.attach_layers(&mut attached, &job.target).await?;
        let parent = self.attach_parent(&mut attached, &job.parent).await?;
        let operation = operation(target, parent, job.live.is_some());
        let mut freeze = Freeze::new(job.live, self.inner.config.freeze_limit);
        freeze.freeze().await?;
        let (mut sender, mut receiver) = freeze.within(self.begin(&operation)).await??;
        let mut data = Vec::new();
        loop {
            match freeze.next(&mut sender, &mut receiver).await? {
                Incoming::Data(bytes) => {
                    if data.len() + bytes.len() > MAX_CHANGES {
                        let message = format!(
                            "the paths that changed have more than {MAX_CHANGES} bytes together, which is the limit of \
                             a list; compare the directories of interest in the container, or commit it"
                        );
                        return Err(SvmError::Refused(WireError::new(ErrorKind::Limit, message)));
                    }
                    data.extend_from_slice(&bytes);
                }
                Incoming::Result(json) => return Ok((data, receiver.decode(&json)?)),
                Incoming::Event(_) => return Err(receiver.protocol("unexpected event".into())),
            }
        }
    }
}

/// The second pair of disks of an apply.
struct Growing<'a> {
    lease: &'a Lease,
    job: &'a ApplyJob,
    first: [DiskId; 2],
    second: Option<(DiskSource, DiskSource)>,
    /// The bytes that the next report of a replay must exceed, until it ends.
    least: Option<u64>,
}

impl Growing<'_> {
    /// Handles an event; returns the content of the Resume, if one is due.
    async fn answer(
        &mut self,
        event: svm_protocol::OperationEvent,
        attached: &mut Attached,
        sent: u64,
    ) -> Result<Option<Vec<u8>>, SvmError> {
        let name = &self.lease.name;
        let protocol = |reason: String| SvmError::Protocol { vm: name.clone(), reason };
        match (event, &self.job.larger) {
            // A replay must end: only real progress extends the time-out.
            (svm_protocol::OperationEvent::Replaying { bytes }, _)
                if self.second.is_some()
                    && bytes <= sent
                    && self.least.is_some_and(|least| bytes >= least) =>
            {
                self.least = Some(bytes + 1);
                replays::touch();
                Ok(None)
            }
            (svm_protocol::OperationEvent::LargerBlocks, Some(larger)) if self.second.is_none() => {
                let (image, record) = larger.make().await.map_err(|e| SvmError::SecondPair(e.to_string()))?;
                let disks = svm_protocol::LargerDisks {
                    image: self.lease.attach(attached, &image).await?,
                    record: self.lease.attach(attached, &record).await?,
                };
                let answer = serde_json::to_vec(&disks).map_err(|e| protocol(e.to_string()))?;
                self.second = Some((image, record));
                Ok(Some(answer))
            }
            (svm_protocol::OperationEvent::LargerBlocks, None) => {
                Err(SvmError::SecondPair("this apply has no second pair of disks".into()))
            }
            (svm_protocol::OperationEvent::Replayed, _)
                if self.second.is_some() && self.least.take().is_some() =>
            {
                for (id, disk) in self.first.iter().zip([&self.job.image, &self.job.record]) {
                    attached.release(*id);
                    // Its content is garbage now, and its space is needed.
                    if let Err(error) = disk.file.set_len(0) {
                        tracing::warn!(path = %disk.path.display(), %error, "cannot empty a first disk");
                    }
                }
                Ok(None)
            }
            _ => Err(protocol(format!("an apply has no {event:?} now"))),
        }
    }
}

/// The check of an image on a lease of its own.
pub(super) async fn check(lease: &Lease, job: &CheckJob) -> Result<CheckSummary, SvmError> {
    let run = async {
        let mut attached = Attached::default();
        let image = lease.attach(&mut attached, &job.image).await?;
        let (tree, writer, owners) = (job.tree, job.writer, job.owners.clone());
        let operation = Operation::Check { image, tree, writer, owners };
        let (_sender, mut receiver) = lease.begin(&operation).await?;
        receiver.result().await
    };
    lease.judge(run.await)
}
