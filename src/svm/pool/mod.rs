//! The pool: a tokio shell that carries out the actions of [`machine`].
//!
//! ```text
//!   lease(), drop(Lease), VM died, … ─► PoolEvent ─► PoolMachine::step ─► Actions ─► tasks (boot, end, attach, detach)
//!                                        ▲                                         │
//!                                        └───────────── Booted, Ended, … ──────────┘
//! ```
//!
//! The machine is behind a lock that is never held across an await. Called by `driver`.

mod lease;
mod machine;
mod recode;

pub use lease::Lease;
pub use recode::Recoded;

use super::{
    CheckJob, CheckSummary, DiskId, DiskSource, JailReport, ServiceVm, SvmError, VmBackend, VmSpec,
    no_writer_left,
};
use lease::check;
use machine::{Action, DiskKey, LeaseId, PoolEvent, PoolMachine, Settings, UseId, VmId, VmName};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, oneshot},
    time::timeout,
};

/// How VMs are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One VM per layer id, ended after the id's last operation.
    Safe,
    /// One VM for all, until [`Pool::retire`] or [`Pool::shutdown`].
    Global,
}

/// What a lease is for. Exports may wait for their reader, who may wait for an apply; so exports never take the last VM
/// (a Diff that streams into an ApplyDiff would wait forever).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Needs nothing but its input: apply, check, changes, sizes.
    Work,
    /// Streams to a reader of unknown pace.
    Export,
}

/// How the pool behaves.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Safe or global.
    pub mode: Mode,
    /// VMs started ahead.
    pub spares: usize,
    /// VMs at a time, spares included; at least 2.
    pub max_vms: usize,
    /// How long a VM may take to greet.
    pub boot_timeout: Duration,
    /// How long an operation may make no progress (`lcow.timeout`).
    pub idle_timeout: Duration,
    /// Longest freeze of a live sandbox; then it is thawed and the operation fails.
    pub freeze_limit: Duration,
    /// How often every VM is pinged; zero for never.
    pub ping_interval: Duration,
    /// Whether to clear up after a killed daemon. Not for a second pool in one process, which would find the machines
    /// of the first.
    pub reap: bool,
    /// A virtual machine's kernel may mount sandboxes that the reader of this program does not support
    /// (`lcow.guestmount`).
    pub guest_mount: bool,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            mode: Mode::Safe,
            spares: 2,
            max_vms: 64,
            boot_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_mins(5),
            freeze_limit: Duration::from_secs(10),
            ping_interval: Duration::from_secs(30),
            reap: true,
            guest_mount: false,
        }
    }
}

/// What the pool is doing now, for Status and metrics.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolSnapshot {
    /// Safe or global.
    pub mode: Mode,
    /// Name of the backend.
    pub backend: &'static str,
    /// Running VMs that hold leases or are kept (global): name and number of leases.
    pub vms: Vec<(String, usize)>,
    /// VMs ready to be taken.
    pub spares: usize,
    /// VMs that are starting.
    pub booting: usize,
    /// Leases held.
    pub leases: usize,
    /// Leases waited for.
    pub waiting: usize,
    /// VMs started since the pool began.
    pub boots: u64,
    /// Starts that failed.
    pub boot_failures: u64,
    /// VMs that died unexpectedly.
    pub deaths: u64,
    /// VMs taken out of use because they misbehaved.
    pub poisoned: u64,
    /// Leases granted.
    pub granted: u64,
    /// Leases that had to wait for a VM.
    pub waits: u64,
    /// Seconds waited in total.
    pub wait_seconds: f64,
    /// The jail of the last started VM's agent.
    pub jail: Option<JailReport>,
    /// What the backend runs on; may be empty.
    pub detail: String,
    /// Guests that were booted rather than restored.
    pub cold_boots: u64,
    /// VMs that were restored from a saved guest.
    pub restores: u64,
}

/// A running VM, for `svm ls`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolVm {
    /// Its name while it is leased (`<id>_svm`), and `spare-<number>` before.
    pub name: String,
    /// Leases held on it.
    pub leases: usize,
    /// The backend's name for it ("worker 1234").
    pub machine: String,
    /// Its last console output, escaped.
    pub console: String,
}

/// How long a check waits for former writers of the image to end.
const WRITERS_GRACE: Duration = Duration::from_secs(5);

type Granted = Result<(VmId, Arc<dyn ServiceVm>), SvmError>;
type DiskAnswer = Result<DiskId, SvmError>;

struct State {
    machine: PoolMachine,
    vms: HashMap<VmId, Arc<dyn ServiceVm>>,
    grants: HashMap<LeaseId, oneshot::Sender<Granted>>,
    disk_waiters: HashMap<UseId, oneshot::Sender<DiskAnswer>>,
    sources: HashMap<UseId, (DiskKey, DiskSource)>,
    disks: HashMap<(VmId, DiskKey), DiskId>,
    boot_error: Option<SvmError>,
    disk_errors: HashMap<(VmId, DiskKey), SvmError>,
    waited: Duration,
    jail: Option<JailReport>,
}

struct Inner {
    backend: Arc<dyn VmBackend>,
    config: PoolConfig,
    runtime: tokio::runtime::Handle,
    state: Mutex<State>,
    next: AtomicU64,
    /// Set once the leftovers of a killed daemon are cleared, which is before the first boot.
    reaped: tokio::sync::OnceCell<()>,
    /// Notified after every change.
    changed: Notify,
}

/// Service VMs, handed out by lease. Cheap to clone.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("snapshot", &self.snapshot()).finish()
    }
}

impl Pool {
    /// Starts a pool on the current tokio runtime; spares start at once.
    pub fn start(backend: Arc<dyn VmBackend>, config: PoolConfig) -> Self {
        let max_vms = config.max_vms.min(backend.limits().vms).max(2);
        let machine = PoolMachine::new(Settings { spares: config.spares.min(max_vms), max_vms });
        let ping = config.ping_interval;
        let inner = Arc::new(Inner {
            backend,
            runtime: tokio::runtime::Handle::current(),
            state: Mutex::new(State {
                machine,
                vms: HashMap::new(),
                grants: HashMap::new(),
                disk_waiters: HashMap::new(),
                sources: HashMap::new(),
                disks: HashMap::new(),
                boot_error: None,
                disk_errors: HashMap::new(),
                waited: Duration::ZERO,
                jail: None,
            }),
            next: AtomicU64::new(1),
            reaped: tokio::sync::OnceCell::new_with((!config.reap).then_some(())),
            config,
            changed: Notify::new(),
        });
        inner.run(PoolMachine::start, |_| {});
        if !ping.is_zero() {
            let pool = Arc::downgrade(&inner);
            inner.runtime.spawn(async move {
                loop {
                    tokio::time::sleep(ping).await;
                    let Some(inner) = pool.upgrade() else { return };
                    inner.ping_all();
                }
            });
        }
        Self { inner }
    }

    /// Ends and clears what a killed daemon left, unless that has been done. The first boot does it, too.
    pub async fn clear_predecessor(&self) {
        self.inner.reaped.get_or_init(|| self.inner.reap()).await;
    }

    /// A VM for work on layer `id`; waits, in order of requests, while all VMs are taken.
    ///
    /// # Errors
    /// [`SvmError::Boot`], [`SvmError::Cancelled`].
    pub async fn lease(&self, id: &str, purpose: Purpose) -> Result<Lease, SvmError> {
        let name = match self.inner.config.mode {
            Mode::Safe => VmName::Layer(id.to_owned()),
            Mode::Global => VmName::Global,
        };
        self.acquire(name, purpose).await
    }

    async fn acquire(&self, name: VmName, purpose: Purpose) -> Result<Lease, SvmError> {
        let lease = self.inner.number();
        let (sender, granted) = oneshot::channel();
        let shown = shown(&name);
        // From here on, dropping the future returns what was granted meanwhile.
        let mut ticket = Lease::ticket(self.inner.clone(), lease, shown);
        let asked = Instant::now();
        let export = purpose == Purpose::Export;
        self.inner.run(
            |m| m.step(PoolEvent::Acquire { lease, name, export }),
            |state| {
                state.grants.insert(lease, sender);
            },
        );
        let answer = granted.await.unwrap_or(Err(SvmError::Cancelled("the pool is gone")));
        self.inner.state.lock().waited += asked.elapsed();
        let (_, vm) = answer?;
        ticket.granted(vm);
        Ok(ticket)
    }

    /// Checks an image in a VM that is used for nothing else.
    ///
    /// # Errors
    /// [`SvmError::Refused`] says what is wrong with the image; [`SvmError::StillWritable`].
    pub async fn check_image(&self, job: CheckJob) -> Result<CheckSummary, SvmError> {
        if job.require_no_writers {
            self.wait_for_writers(&job).await?;
        }
        let lease = self.inner.number();
        let lease = self.acquire(VmName::Check(lease), Purpose::Work).await?;
        check(&lease, &job).await
    }

    /// Waits until no process can write the image. The VM that wrote it is being ended (safe mode) or has been asked to
    /// close it (global mode); a VM that does not close it is ended, too.
    async fn wait_for_writers(&self, job: &CheckJob) -> Result<(), SvmError> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        let mut ended = false;
        loop {
            match no_writer_left(&job.image) {
                Err(SvmError::StillWritable(_)) if start.elapsed() < WRITERS_GRACE => {}
                other => return other,
            }
            if !ended && self.inner.config.mode == Mode::Global && start.elapsed() > WRITERS_GRACE / 2 {
                tracing::error!(image = %job.image.path.display(), "the global service VM keeps an image open: ending it");
                ended = true;
                self.retire(Duration::ZERO).await;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// What it is doing now.
    pub fn snapshot(&self) -> PoolSnapshot {
        let state = self.inner.state.lock();
        let m = &state.machine;
        let (counters, (leases, waiting), (spares, booting)) = (m.counters(), m.leases(), m.reserves());
        PoolSnapshot {
            mode: self.inner.config.mode,
            backend: self.inner.backend.name(),
            vms: m.in_use().into_iter().map(|(_, name, leases)| (shown(&name), leases)).collect(),
            spares,
            booting,
            leases,
            waiting,
            boots: counters.boots,
            boot_failures: counters.boot_failures,
            deaths: counters.deaths,
            poisoned: counters.poisoned,
            granted: counters.granted,
            waits: counters.waits,
            wait_seconds: state.waited.as_secs_f64(),
            jail: state.jail.clone(),
            detail: self.inner.backend.detail(),
            cold_boots: self.inner.backend.cold_boots(),
            restores: self.inner.backend.restores(),
        }
    }

    /// The running VMs, leased ones first.
    pub fn running(&self) -> Vec<PoolVm> {
        let (used, vms) = {
            let state = self.inner.state.lock();
            (state.machine.in_use(), state.vms.clone())
        };
        let mut all: Vec<PoolVm> = vms
            .into_iter()
            .map(|(number, vm)| {
                let work = used.iter().find(|(id, ..)| *id == number);
                PoolVm {
                    name: work.map_or_else(|| format!("spare-{number}"), |(_, name, _)| shown(name)),
                    leases: work.map_or(0, |(.., leases)| *leases),
                    machine: vm.describe(),
                    console: vm.console(),
                }
            })
            .collect();
        all.sort_by(|a, b| b.leases.cmp(&a.leases).then_with(|| a.name.cmp(&b.name)));
        all
    }

    /// For Cleanup: uses no present VM for new leases and ends all of them, idle ones now, the others when their leases
    /// end or after `grace`. The pool stays usable.
    pub async fn retire(&self, grace: Duration) {
        self.inner.event(PoolEvent::Retire);
        if timeout(grace, self.inner.until(|m| !m.retiring())).await.is_err() {
            self.inner.event(PoolEvent::EndRetired);
            self.inner.until(|m| !m.retiring()).await;
        }
    }

    /// Stops the pool: grants no new leases, and ends VMs when their leases end or after `grace`. Returns when no VM is
    /// left.
    pub async fn shutdown(&self, grace: Duration) {
        self.inner.event(PoolEvent::Drain);
        if timeout(grace, self.inner.until(PoolMachine::drained)).await.is_err() {
            self.inner.event(PoolEvent::EndRetired);
            self.inner.until(PoolMachine::drained).await;
        }
    }
}

fn shown(name: &VmName) -> String {
    match name {
        VmName::Layer(id) => format!("{id}_svm"),
        VmName::Global => "_lcow_global_svm_".to_owned(),
        VmName::Check(n) => format!("check-{n}_svm"),
    }
}

impl Inner {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn event(self: &Arc<Self>, event: PoolEvent) {
        self.run(|m| m.step(event), |_| {});
    }

    /// Waits until the machine's state satisfies `reached`.
    async fn until(&self, reached: impl Fn(&PoolMachine) -> bool) {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if reached(&self.state.lock().machine) {
                return;
            }
            changed.await;
        }
    }

    /// Prepares the shell's tables, takes a step of the machine, and carries out the actions.
    fn run(
        self: &Arc<Self>,
        step: impl FnOnce(&mut PoolMachine) -> Vec<Action>,
        prepare: impl FnOnce(&mut State),
    ) {
        let mut state = self.state.lock();
        prepare(&mut state);
        let actions = step(&mut state.machine);
        for action in actions {
            self.carry_out(&mut state, &action);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn carry_out(self: &Arc<Self>, state: &mut State, action: &Action) {
        match *action {
            Action::Boot(vm) => {
                let inner = self.clone();
                self.runtime.spawn(async move { inner.boot(vm).await });
            }
            Action::End(vm) => {
                let gone = state.vms.remove(&vm);
                state.disks.retain(|(v, _), _| *v != vm);
                state.disk_errors.retain(|(v, _), _| *v != vm);
                let inner = self.clone();
                self.runtime.spawn(async move {
                    if let Some(gone) = gone {
                        gone.terminate().await;
                    }
                    inner.event(PoolEvent::Ended(vm));
                });
            }
            Action::Grant(lease, vm) => {
                let answer = state.vms.get(&vm).map(|v| (vm, v.clone()));
                let answer = answer.ok_or(SvmError::Cancelled("the service VM went away"));
                if let Some(waiter) = state.grants.remove(&lease) {
                    // If the waiter is gone, dropping its ticket releases the lease.
                    let _ = waiter.send(answer);
                }
            }
            Action::RefuseBoot(lease) => {
                let unknown = || SvmError::Boot { reason: "unknown".into(), console: String::new() };
                let e = state.boot_error.clone().unwrap_or_else(unknown);
                if let Some(waiter) = state.grants.remove(&lease) {
                    let _ = waiter.send(Err(e));
                }
            }
            Action::RefuseDraining(lease) => {
                if let Some(waiter) = state.grants.remove(&lease) {
                    let _ = waiter.send(Err(SvmError::Cancelled("the service VM pool is being stopped")));
                }
            }
            // Its operations notice their broken channels and ask the VM for the cause.
            Action::Lost(lease) => {
                state.grants.remove(&lease);
            }
            Action::Attach(vm, disk) => self.attach(state, vm, disk),
            Action::Detach(vm, disk) => self.detach(state, vm, disk),
            Action::DiskReady(usage, vm, disk) => {
                state.sources.remove(&usage);
                let answer = state.disks.get(&(vm, disk)).copied();
                if let Some(waiter) = state.disk_waiters.remove(&usage) {
                    let _ = waiter.send(answer.ok_or(SvmError::Cancelled("the disk went away")));
                }
            }
            Action::DiskFailed(usage) => {
                let key = state.sources.remove(&usage).map(|(key, _)| key);
                let known =
                    state.disk_errors.iter().find(|((_, k), _)| Some(*k) == key).map(|(_, e)| e.clone());
                if let Some(waiter) = state.disk_waiters.remove(&usage) {
                    let _ =
                        waiter.send(Err(known.unwrap_or(SvmError::Cancelled("the service VM went away"))));
                }
            }
        }
    }

    async fn reap(&self) {
        match self.backend.reap().await {
            Ok(0) => {}
            Ok(n) => tracing::info!(n, "cleared up what service VMs of a killed daemon left"),
            Err(e) => tracing::warn!("cannot clear up after a killed daemon: {e}"),
        }
    }

    async fn boot(self: Arc<Self>, number: VmId) {
        let after = self.config.boot_timeout;
        self.reaped.get_or_init(|| self.reap()).await;
        let booted = timeout(after, self.backend.boot(VmSpec { number })).await;
        let booted = booted.unwrap_or(Err(SvmError::Timeout { what: "starting a service VM", after }));
        match booted {
            Ok(vm) => {
                let (watched, jail) = (vm.clone(), vm.jail());
                self.run(
                    |m| m.step(PoolEvent::Booted(number)),
                    |state| {
                        state.vms.insert(number, vm);
                        state.jail = jail;
                    },
                );
                let death = watched.death();
                let inner = Arc::downgrade(&self);
                drop(self);
                let death = death.await;
                drop(watched);
                if let Some(inner) = inner.upgrade() {
                    tracing::debug!(vm = number, cause = death.cause, "service VM ended");
                    inner.event(PoolEvent::Died(number));
                }
            }
            Err(e) => {
                tracing::error!(vm = number, error = e.with_console(), "a service VM did not start");
                self.run(|m| m.step(PoolEvent::BootFailed(number)), |state| state.boot_error = Some(e));
            }
        }
    }

    fn attach(self: &Arc<Self>, state: &mut State, number: VmId, disk: DiskKey) {
        let source = state.sources.values().find(|(key, _)| *key == disk).map(|(_, s)| s.clone());
        let vm = state.vms.get(&number).cloned();
        let inner = self.clone();
        let after = self.config.idle_timeout;
        self.runtime.spawn(async move {
            let attached = match (vm, source) {
                (Some(vm), Some(source)) => timeout(after, vm.attach(&source))
                    .await
                    .unwrap_or(Err(SvmError::Timeout { what: "attaching a disk", after })),
                _ => Err(SvmError::Cancelled("the service VM went away")),
            };
            match attached {
                Ok(id) => inner.run(
                    |m| m.step(PoolEvent::Attached(number, disk)),
                    |state| {
                        state.disks.insert((number, disk), id);
                    },
                ),
                Err(e) => inner.run(
                    |m| m.step(PoolEvent::AttachFailed(number, disk)),
                    |state| {
                        state.disk_errors.insert((number, disk), e);
                    },
                ),
            }
        });
    }

    fn detach(self: &Arc<Self>, state: &mut State, number: VmId, disk: DiskKey) {
        let id = state.disks.remove(&(number, disk));
        let vm = state.vms.get(&number).cloned();
        let inner = self.clone();
        let after = self.config.idle_timeout;
        self.runtime.spawn(async move {
            let detached = match (vm, id) {
                (Some(vm), Some(id)) => {
                    matches!(timeout(after, vm.detach(id)).await, Ok(Ok(())))
                }
                _ => false,
            };
            inner.event(if detached {
                PoolEvent::Detached(number, disk)
            } else {
                PoolEvent::DetachFailed(number, disk)
            });
        });
    }

    fn ping_all(self: &Arc<Self>) {
        let vms: Vec<_> = self.state.lock().vms.iter().map(|(n, v)| (*n, v.clone())).collect();
        for (number, vm) in vms {
            let inner = self.clone();
            let after = self.config.boot_timeout;
            self.runtime.spawn(async move {
                if !matches!(timeout(after, vm.ping()).await, Ok(Ok(()))) {
                    tracing::error!(vm = vm.describe(), "service VM does not answer: ending it");
                    inner.event(PoolEvent::Sick(number));
                }
            });
        }
    }
}
