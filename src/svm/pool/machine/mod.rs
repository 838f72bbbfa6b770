//! The pool's policy as a pure state machine: events in, actions out, no clock, no task, no VM.
//!
//! ```text
//!                Boot             Booted           granted                 last lease gone, died, poisoned
//!     (nothing) ─────► Booting ─────────► Idle ─────────────► Leased ──────────────────────────────► Ending ─► (nothing)
//!                         │ BootFailed                 global: stays Leased without leases             Ended
//! ```
//!
//! Invariants (`check.rs`, held by random tests): a VM is booted once and ended once; leases are only on
//! Leased VMs; a name has at most one VM that takes new leases; a disk has at most one attach under way or done per
//! VM; the number of VMs never exceeds the maximum; exports never hold all of them; nothing waits while it could be
//! served. Called by the shell in `pool`.

mod event;

pub use event::{Action, DiskKey, LeaseId, PoolEvent, UseId, VmId, VmName};

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Limits of the pool.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// VMs kept ready.
    pub spares: usize,
    /// VMs at a time; at least 2.
    pub max_vms: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Booting,
    Idle,
    Leased,
    Ending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DiskStage {
    Attaching,
    Attached,
    Detaching,
}

#[derive(Debug)]
struct Disk {
    stage: DiskStage,
    users: BTreeSet<UseId>,
}

#[derive(Debug)]
struct Vm {
    stage: Stage,
    name: Option<VmName>,
    /// Accepts no new leases; ends with its last one.
    retired: bool,
    leases: BTreeSet<LeaseId>,
    disks: BTreeMap<DiskKey, Disk>,
}

#[derive(Debug)]
struct Lease {
    name: VmName,
    export: bool,
    vm: Option<VmId>,
    uses: BTreeMap<UseId, DiskKey>,
}

/// Numbers for Status and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// VMs started.
    pub boots: u64,
    /// Of them, how many failed.
    pub boot_failures: u64,
    /// VMs that died unexpectedly.
    pub deaths: u64,
    /// VMs taken out of use.
    pub poisoned: u64,
    /// Leases granted.
    pub granted: u64,
    /// Leases that had to wait.
    pub waits: u64,
}

/// The pool's state.
#[derive(Debug)]
pub struct PoolMachine {
    settings: Settings,
    vms: BTreeMap<VmId, Vm>,
    leases: BTreeMap<LeaseId, Lease>,
    queue: VecDeque<LeaseId>,
    next_vm: VmId,
    draining: bool,
    /// The last boot failed: no spares are booted until a lease needs a VM.
    boot_trouble: bool,
    counters: Counters,
}

impl PoolMachine {
    /// An empty pool. Spares start with the first [`PoolMachine::start`].
    pub fn new(mut settings: Settings) -> Self {
        settings.max_vms = settings.max_vms.max(2);
        Self {
            settings,
            vms: BTreeMap::new(),
            leases: BTreeMap::new(),
            queue: VecDeque::new(),
            next_vm: 1,
            draining: false,
            boot_trouble: false,
            counters: Counters::default(),
        }
    }

    /// The actions that boot the spares.
    pub fn start(&mut self) -> Vec<Action> {
        let mut out = Vec::new();
        self.dispatch(&mut out);
        out
    }

    /// Processes one event.
    pub fn step(&mut self, event: PoolEvent) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            PoolEvent::Acquire { lease, name, export } => self.acquire(lease, name, export, &mut out),
            PoolEvent::Release { lease, poison } => self.release(lease, poison, &mut out),
            PoolEvent::Booted(vm) => {
                self.boot_trouble = false;
                if let Some(v) = self.vms.get_mut(&vm)
                    && v.stage == Stage::Booting
                {
                    v.stage = Stage::Idle;
                    if v.retired {
                        self.end(vm, &mut out);
                    }
                }
            }
            PoolEvent::BootFailed(vm) => {
                if self.vms.get(&vm).is_some_and(|v| v.stage == Stage::Booting) {
                    self.vms.remove(&vm);
                    self.counters.boot_failures += 1;
                    self.boot_trouble = true;
                    // Fail one waiter now rather than let all of them retry forever.
                    if let Some(lease) = self.queue.pop_front() {
                        self.leases.remove(&lease);
                        out.push(Action::RefuseBoot(lease));
                    }
                }
            }
            PoolEvent::Died(vm) => {
                if self.vms.get(&vm).is_some_and(|v| matches!(v.stage, Stage::Idle | Stage::Leased)) {
                    self.counters.deaths += 1;
                    self.end(vm, &mut out);
                }
            }
            PoolEvent::Sick(vm) => {
                if self.vms.get(&vm).is_some_and(|v| matches!(v.stage, Stage::Idle | Stage::Leased)) {
                    self.counters.poisoned += 1;
                    self.end(vm, &mut out);
                }
            }
            PoolEvent::Ended(vm) => {
                if self.vms.get(&vm).is_some_and(|v| v.stage == Stage::Ending) {
                    self.vms.remove(&vm);
                }
            }
            PoolEvent::Attach { lease, usage, disk } => self.attach(lease, usage, disk, &mut out),
            PoolEvent::Detach { lease, usage } => self.detach(lease, usage, &mut out),
            PoolEvent::Attached(vm, disk) => self.attached(vm, disk, &mut out),
            PoolEvent::AttachFailed(vm, disk) => {
                if let Some(v) = self.vms.get_mut(&vm)
                    && v.disks.get(&disk).is_some_and(|d| d.stage == DiskStage::Attaching)
                    && let Some(d) = v.disks.remove(&disk)
                {
                    self.fail_users(&d.users, &mut out);
                }
            }
            PoolEvent::Detached(vm, disk) => {
                if let Some(v) = self.vms.get_mut(&vm)
                    && let Some(d) = v.disks.get_mut(&disk)
                    && d.stage == DiskStage::Detaching
                {
                    if d.users.is_empty() {
                        v.disks.remove(&disk);
                    } else {
                        d.stage = DiskStage::Attaching;
                        out.push(Action::Attach(vm, disk));
                    }
                }
            }
            PoolEvent::DetachFailed(vm, disk) => {
                if let Some(v) = self.vms.get_mut(&vm)
                    && v.disks.get(&disk).is_some_and(|d| d.stage == DiskStage::Detaching)
                    && let Some(d) = v.disks.remove(&disk)
                {
                    self.fail_users(&d.users, &mut out);
                    self.retire(vm, true, &mut out);
                }
            }
            PoolEvent::Retire => self.retire_all(false, &mut out),
            PoolEvent::EndRetired => {
                let retired: Vec<VmId> = self
                    .vms
                    .iter()
                    .filter(|(_, v)| v.retired && v.stage == Stage::Leased)
                    .map(|(id, _)| *id)
                    .collect();
                for vm in retired {
                    self.end(vm, &mut out);
                }
            }
            PoolEvent::Drain => {
                self.draining = true;
                for lease in std::mem::take(&mut self.queue) {
                    self.leases.remove(&lease);
                    out.push(Action::RefuseDraining(lease));
                }
                self.retire_all(true, &mut out);
            }
        }
        self.dispatch(&mut out);
        out
    }

    fn acquire(&mut self, lease: LeaseId, name: VmName, export: bool, out: &mut Vec<Action>) {
        if self.draining {
            out.push(Action::RefuseDraining(lease));
            return;
        }
        self.leases.insert(lease, Lease { name, export, vm: None, uses: BTreeMap::new() });
        self.queue.push_back(lease);
        self.dispatch(out);
        if self.queue.contains(&lease) {
            self.counters.waits += 1;
        }
    }

    fn release(&mut self, lease: LeaseId, poison: bool, out: &mut Vec<Action>) {
        self.queue.retain(|l| *l != lease);
        let Some(gone) = self.leases.get(&lease) else { return };
        let uses: Vec<UseId> = gone.uses.keys().copied().collect();
        let vm = gone.vm;
        // A safe VM ends with its last lease: detaching its disks one by one would be wasted work.
        let Some(vm) = vm else {
            self.leases.remove(&lease);
            return;
        };
        let last = self
            .vms
            .get(&vm)
            .is_some_and(|v| v.leases.len() == 1 && (v.retired || poison || v.name != Some(VmName::Global)));
        if !last {
            for usage in uses {
                self.detach(lease, usage, out);
            }
        }
        self.leases.remove(&lease);
        if let Some(v) = self.vms.get_mut(&vm) {
            v.leases.remove(&lease);
            if last {
                if poison {
                    self.counters.poisoned += 1;
                }
                self.end(vm, out);
            } else if poison {
                self.retire(vm, true, out);
            }
        }
    }

    /// Gives `vm` no new leases; ends it now if it has none.
    fn retire(&mut self, vm: VmId, poisoned: bool, out: &mut Vec<Action>) {
        let Some(v) = self.vms.get_mut(&vm) else { return };
        if poisoned && !v.retired {
            self.counters.poisoned += 1;
        }
        v.retired = true;
        if v.leases.is_empty() && matches!(v.stage, Stage::Idle | Stage::Leased) {
            self.end(vm, out);
        }
    }

    fn retire_all(&mut self, spares_too: bool, out: &mut Vec<Action>) {
        let ids: Vec<VmId> = self
            .vms
            .iter()
            .filter(|(_, v)| spares_too || v.stage == Stage::Leased)
            .map(|(id, _)| *id)
            .collect();
        for vm in ids {
            self.retire(vm, false, out);
        }
    }

    /// Ends `vm` now; its leases lose it.
    fn end(&mut self, vm: VmId, out: &mut Vec<Action>) {
        let Some(v) = self.vms.get_mut(&vm) else { return };
        v.stage = Stage::Ending;
        v.disks.clear();
        for lease in std::mem::take(&mut v.leases) {
            if let Some(l) = self.leases.remove(&lease) {
                out.extend(l.uses.keys().map(|u| Action::DiskFailed(*u)));
                out.push(Action::Lost(lease));
            }
        }
        out.push(Action::End(vm));
    }

    fn attach(&mut self, lease: LeaseId, usage: UseId, disk: DiskKey, out: &mut Vec<Action>) {
        let Some(l) = self.leases.get_mut(&lease) else {
            out.push(Action::DiskFailed(usage));
            return;
        };
        let Some((vm, v)) = l.vm.and_then(|vm| Some((vm, self.vms.get_mut(&vm)?))) else {
            out.push(Action::DiskFailed(usage));
            return;
        };
        l.uses.insert(usage, disk);
        if let Some(d) = v.disks.get_mut(&disk) {
            d.users.insert(usage);
            if d.stage == DiskStage::Attached {
                out.push(Action::DiskReady(usage, vm, disk));
            }
        } else {
            v.disks.insert(disk, Disk { stage: DiskStage::Attaching, users: BTreeSet::from([usage]) });
            out.push(Action::Attach(vm, disk));
        }
    }

    fn detach(&mut self, lease: LeaseId, usage: UseId, out: &mut Vec<Action>) {
        let Some(l) = self.leases.get_mut(&lease) else { return };
        let Some(disk) = l.uses.remove(&usage) else { return };
        let Some((vm, v)) = l.vm.and_then(|vm| Some((vm, self.vms.get_mut(&vm)?))) else { return };
        if let Some(d) = v.disks.get_mut(&disk) {
            d.users.remove(&usage);
            if d.users.is_empty() && d.stage == DiskStage::Attached {
                d.stage = DiskStage::Detaching;
                out.push(Action::Detach(vm, disk));
            }
        }
    }

    fn attached(&mut self, vm: VmId, disk: DiskKey, out: &mut Vec<Action>) {
        let Some(v) = self.vms.get_mut(&vm) else { return };
        let Some(d) = v.disks.get_mut(&disk) else { return };
        if d.stage != DiskStage::Attaching {
            return;
        }
        if d.users.is_empty() {
            d.stage = DiskStage::Detaching;
            out.push(Action::Detach(vm, disk));
        } else {
            d.stage = DiskStage::Attached;
            out.extend(d.users.iter().map(|u| Action::DiskReady(*u, vm, disk)));
        }
    }

    fn fail_users(&mut self, users: &BTreeSet<UseId>, out: &mut Vec<Action>) {
        for usage in users {
            for l in self.leases.values_mut() {
                l.uses.remove(usage);
            }
            out.push(Action::DiskFailed(*usage));
        }
    }

    fn exporting(&self, vm: &Vm) -> bool {
        vm.leases.iter().any(|l| self.leases.get(l).is_some_and(|l| l.export))
    }

    /// Serves the queue in order, then starts what is missing.
    fn dispatch(&mut self, out: &mut Vec<Action>) {
        let mut exporting = self.vms.values().filter(|v| self.exporting(v)).count();
        let mut wanted: BTreeSet<VmName> = BTreeSet::new();
        let mut waiting = VecDeque::new();
        for lease in std::mem::take(&mut self.queue) {
            let Some(l) = self.leases.get(&lease) else { continue };
            let (name, export) = (l.name.clone(), l.export);
            let known = self
                .vms
                .iter()
                .find(|(_, v)| v.stage == Stage::Leased && !v.retired && v.name.as_ref() == Some(&name));
            let limit = self.settings.max_vms - 1;
            let adds_export = export && known.is_none_or(|(_, v)| !self.exporting(v));
            // Global mode: one VM serves all, so an export takes no VM from others.
            if adds_export && name != VmName::Global && exporting >= limit {
                // Later requests may overtake: earlier exports may wait for them.
                waiting.push_back(lease);
                continue;
            }
            let idle = || self.vms.iter().find(|(_, v)| v.stage == Stage::Idle && !v.retired);
            let Some(vm) = known.or_else(idle).map(|(id, _)| *id) else {
                wanted.insert(name);
                waiting.push_back(lease);
                continue;
            };
            exporting += usize::from(adds_export);
            if let Some(v) = self.vms.get_mut(&vm) {
                v.stage = Stage::Leased;
                v.name = Some(name);
                v.leases.insert(lease);
            }
            if let Some(l) = self.leases.get_mut(&lease) {
                l.vm = Some(vm);
            }
            self.counters.granted += 1;
            out.push(Action::Grant(lease, vm));
        }
        self.queue = waiting;
        if self.draining {
            return;
        }
        let count = |stage| self.vms.values().filter(|v| v.stage == stage && !v.retired).count();
        let spares = if self.boot_trouble { 0 } else { self.settings.spares };
        let missing = (wanted.len() + spares).saturating_sub(count(Stage::Idle) + count(Stage::Booting));
        if wanted.is_empty() {
            // Booted for a request that was cancelled: keep no more than the spares.
            let idle: Vec<VmId> =
                self.vms.iter().filter(|(_, v)| v.stage == Stage::Idle).map(|(id, _)| *id).collect();
            for vm in idle.into_iter().skip(self.settings.spares) {
                self.end(vm, out);
            }
        }
        for _ in 0..missing.min(self.settings.max_vms.saturating_sub(self.vms.len())) {
            let vm = self.next_vm;
            self.next_vm += 1;
            let stage = Stage::Booting;
            let empty =
                Vm { stage, name: None, retired: false, leases: BTreeSet::new(), disks: BTreeMap::new() };
            self.vms.insert(vm, empty);
            self.counters.boots += 1;
            out.push(Action::Boot(vm));
        }
    }

    /// Whether a drained pool is empty.
    pub fn drained(&self) -> bool {
        self.draining && self.vms.is_empty()
    }

    /// Whether retired VMs still exist.
    pub fn retiring(&self) -> bool {
        self.vms.values().any(|v| v.retired || v.stage == Stage::Ending)
    }

    /// Numbers since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Leases held and waited for.
    pub fn leases(&self) -> (usize, usize) {
        (self.leases.len() - self.queue.len(), self.queue.len())
    }

    /// VMs idle and booting.
    pub fn reserves(&self) -> (usize, usize) {
        let count = |stage| self.vms.values().filter(|v| v.stage == stage).count();
        (count(Stage::Idle), count(Stage::Booting))
    }

    /// VMs in use: number, name, leases.
    pub fn in_use(&self) -> Vec<(VmId, VmName, usize)> {
        let leased = self.vms.iter().filter(|(_, v)| v.stage == Stage::Leased);
        leased.filter_map(|(id, v)| Some((*id, v.name.clone()?, v.leases.len()))).collect()
    }
}

#[cfg(test)]
mod check;
#[cfg(test)]
mod tests;
