//! The pool's policy under named faults and random events.

use super::*;
use crate::svm::job::{Access, FileIdentity};
use proptest::prelude::*;

fn disk(n: u64, access: Access) -> DiskKey {
    (FileIdentity { device: 1, inode: n }, access, 0, None)
}

fn layer(id: &str) -> VmName {
    VmName::Layer(id.into())
}

/// A machine with its outstanding work, driven by hand.
struct World {
    machine: PoolMachine,
    /// Actions whose answers are due.
    due: Vec<Action>,
    log: Vec<Action>,
    booted: BTreeSet<VmId>,
    ended: BTreeSet<VmId>,
    attached: BTreeSet<(VmId, DiskKey)>,
}

impl World {
    fn new(spares: usize, max_vms: usize) -> Self {
        let mut machine = PoolMachine::new(Settings { spares, max_vms });
        let first = machine.start();
        let mut world = Self {
            machine,
            due: Vec::new(),
            log: Vec::new(),
            booted: BTreeSet::new(),
            ended: BTreeSet::new(),
            attached: BTreeSet::new(),
        };
        world.note(first);
        world
    }

    fn note(&mut self, actions: Vec<Action>) {
        for action in actions {
            match &action {
                Action::Boot(vm) => {
                    assert!(self.booted.insert(*vm), "vm {vm} is booted twice");
                    self.due.push(action.clone());
                }
                Action::End(vm) => {
                    assert!(self.booted.contains(vm), "vm {vm} is ended but never was");
                    assert!(self.ended.insert(*vm), "vm {vm} is ended twice");
                    self.attached.retain(|(v, _)| v != vm);
                    self.due.push(action.clone());
                }
                Action::Attach(vm, key) => {
                    assert!(!self.ended.contains(vm), "attach to ended vm {vm}");
                    assert!(self.attached.insert((*vm, *key)), "disk {key:?} attached twice to vm {vm}");
                    self.due.push(action.clone());
                }
                Action::Detach(vm, key) => {
                    assert!(self.attached.contains(&(*vm, *key)), "disk {key:?} is not attached to vm {vm}");
                    self.due.push(action.clone());
                }
                Action::Grant(_, vm) => assert!(!self.ended.contains(vm), "lease on ended vm {vm}"),
                _ => {}
            }
            self.log.push(action);
        }
    }

    fn step(&mut self, event: PoolEvent) {
        let actions = self.machine.step(event);
        self.note(actions);
        self.machine.check().unwrap();
    }

    /// Answers the oldest due action.
    fn answer(&mut self, index: usize, well: bool) {
        if self.due.is_empty() {
            return;
        }
        let action = self.due.remove(index % self.due.len());
        match action {
            Action::Boot(vm) if well => self.step(PoolEvent::Booted(vm)),
            Action::Boot(vm) => self.step(PoolEvent::BootFailed(vm)),
            Action::End(vm) => self.step(PoolEvent::Ended(vm)),
            Action::Attach(vm, key) if well => self.step(PoolEvent::Attached(vm, key)),
            Action::Attach(vm, key) => {
                self.attached.remove(&(vm, key));
                self.step(PoolEvent::AttachFailed(vm, key));
            }
            Action::Detach(vm, key) => {
                self.attached.remove(&(vm, key));
                self.step(if well { PoolEvent::Detached(vm, key) } else { PoolEvent::DetachFailed(vm, key) });
            }
            _ => unreachable!("only these are due"),
        }
    }

    fn settle(&mut self) {
        while !self.due.is_empty() {
            self.answer(0, true);
        }
    }

    fn acquire(&mut self, lease: LeaseId, name: VmName) {
        self.step(PoolEvent::Acquire { lease, name, export: false });
    }

    fn vm_of(&self, lease: LeaseId) -> Option<VmId> {
        self.log.iter().rev().find_map(|a| match a {
            Action::Grant(l, vm) if *l == lease => Some(*vm),
            _ => None,
        })
    }

    fn count(&self, wanted: impl Fn(&Action) -> bool) -> usize {
        self.log.iter().filter(|a| wanted(a)).count()
    }
}

#[test]
fn fault_1_two_starters_of_one_id_get_one_vm() {
    let mut w = World::new(0, 8);
    w.acquire(1, layer("a"));
    w.acquire(2, layer("a"));
    assert_eq!(w.count(|a| matches!(a, Action::Boot(_))), 1);
    w.settle();
    assert_eq!(w.vm_of(1), w.vm_of(2));
    assert!(w.vm_of(1).is_some());
}

#[test]
fn fault_2_the_first_close_does_not_end_the_others_vm() {
    let mut w = World::new(0, 8);
    w.acquire(1, layer("a"));
    w.acquire(2, layer("a"));
    w.settle();
    w.step(PoolEvent::Release { lease: 1, poison: false });
    assert_eq!(w.count(|a| matches!(a, Action::End(_))), 0);
    w.step(PoolEvent::Release { lease: 2, poison: false });
    assert_eq!(w.count(|a| matches!(a, Action::End(_))), 1);
}

#[test]
fn fault_3_a_second_use_of_a_disk_in_global_mode_attaches_nothing_anew() {
    let mut w = World::new(0, 8);
    let d = disk(7, Access::ReadOnly);
    w.acquire(1, VmName::Global);
    w.acquire(2, VmName::Global);
    w.settle();
    w.step(PoolEvent::Attach { lease: 1, usage: 10, disk: d });
    w.step(PoolEvent::Attach { lease: 2, usage: 11, disk: d });
    w.settle();
    assert_eq!(w.count(|a| matches!(a, Action::Attach(..))), 1);
    assert_eq!(w.count(|a| matches!(a, Action::DiskReady(..))), 2);
    w.step(PoolEvent::Detach { lease: 1, usage: 10 });
    assert_eq!(w.count(|a| matches!(a, Action::Detach(..))), 0, "still in use");
    w.step(PoolEvent::Release { lease: 2, poison: false });
    assert_eq!(w.count(|a| matches!(a, Action::Detach(..))), 1, "the last use is gone");
}

#[test]
fn fault_4_read_only_and_read_write_are_different_disks() {
    let mut w = World::new(0, 8);
    w.acquire(1, VmName::Global);
    w.settle();
    w.step(PoolEvent::Attach { lease: 1, usage: 1, disk: disk(7, Access::ReadOnly) });
    w.step(PoolEvent::Attach { lease: 1, usage: 2, disk: disk(7, Access::ReadWrite) });
    assert_eq!(w.count(|a| matches!(a, Action::Attach(..))), 2);
}

#[test]
fn fault_9_failure_paths_leave_no_vm_behind() {
    let mut w = World::new(0, 8);
    w.acquire(1, layer("a"));
    w.answer(0, false);
    assert_eq!(w.count(|a| matches!(a, Action::RefuseBoot(1))), 1);
    assert!(w.machine.vms.is_empty() && w.machine.leases.is_empty());
    w.acquire(2, layer("a"));
    w.settle();
    w.step(PoolEvent::Attach { lease: 2, usage: 1, disk: disk(1, Access::ReadWrite) });
    w.answer(0, false);
    assert_eq!(w.count(|a| matches!(a, Action::DiskFailed(1))), 1);
    w.step(PoolEvent::Release { lease: 2, poison: false });
    w.settle();
    assert!(w.machine.vms.is_empty(), "{:?}", w.machine);
}

#[test]
fn fault_12_a_failed_detach_replaces_the_vm_instead_of_poisoning_later_work() {
    let mut w = World::new(0, 8);
    w.acquire(1, VmName::Global);
    w.settle();
    w.step(PoolEvent::Attach { lease: 1, usage: 1, disk: disk(1, Access::ReadOnly) });
    w.settle();
    w.step(PoolEvent::Detach { lease: 1, usage: 1 });
    w.answer(0, false);
    w.acquire(2, VmName::Global);
    w.settle();
    assert_ne!(w.vm_of(1), w.vm_of(2));
    w.step(PoolEvent::Attach { lease: 2, usage: 2, disk: disk(1, Access::ReadOnly) });
    w.settle();
    assert_eq!(w.count(|a| matches!(a, Action::DiskReady(2, ..))), 1);
}

#[test]
fn fault_13_the_global_vm_goes_at_cleanup_and_comes_back_when_needed() {
    let mut w = World::new(0, 8);
    w.acquire(1, VmName::Global);
    w.settle();
    w.step(PoolEvent::Release { lease: 1, poison: false });
    assert_eq!(w.count(|a| matches!(a, Action::End(_))), 0, "global lives on");
    w.step(PoolEvent::Retire);
    w.settle();
    assert!(w.machine.vms.is_empty());
    w.acquire(2, VmName::Global);
    w.settle();
    assert!(w.vm_of(2).is_some());
}

#[test]
fn global_mode_deadlock_exports_never_take_the_last_vm() {
    let mut w = World::new(0, 2);
    for lease in 1..=3 {
        w.step(PoolEvent::Acquire { lease, name: layer(&format!("x{lease}")), export: true });
    }
    w.settle();
    assert!(w.vm_of(1).is_some() && w.vm_of(2).is_none() && w.vm_of(3).is_none());
    // The apply that the first export streams into was asked for last, and is served.
    w.acquire(9, layer("l"));
    w.settle();
    assert!(w.vm_of(9).is_some());
    w.step(PoolEvent::Release { lease: 9, poison: false });
    w.step(PoolEvent::Release { lease: 1, poison: false });
    w.settle();
    assert!(w.vm_of(2).is_some());
}

#[test]
fn waiters_are_served_in_order_and_at_most_max_vms_run() {
    let mut w = World::new(1, 2);
    for lease in 1..=5 {
        w.acquire(lease, layer(&format!("l{lease}")));
    }
    for lease in 1..=5 {
        w.settle();
        assert!(w.vm_of(lease).is_some(), "lease {lease}");
        w.step(PoolEvent::Release { lease, poison: false });
    }
}

#[test]
fn a_dead_vm_fails_its_own_leases_only() {
    let mut w = World::new(1, 8);
    w.acquire(1, layer("a"));
    w.acquire(2, layer("b"));
    w.settle();
    let dead = w.vm_of(1).unwrap();
    w.step(PoolEvent::Died(dead));
    assert_eq!(w.count(|a| matches!(a, Action::Lost(1))), 1);
    assert_eq!(w.count(|a| matches!(a, Action::Lost(2))), 0);
    w.settle();
    w.acquire(3, layer("a"));
    w.settle();
    assert_ne!(w.vm_of(3), Some(dead));
    w.step(PoolEvent::Release { lease: 1, poison: true });
}

#[test]
fn boots_that_keep_failing_are_not_repeated_without_need() {
    let mut w = World::new(3, 8);
    for _ in 0..3 {
        w.answer(0, false);
    }
    assert!(w.due.is_empty(), "{:?}", w.due);
    w.acquire(1, layer("a"));
    w.settle();
    assert!(w.vm_of(1).is_some());
    assert_eq!(w.machine.reserves(), (3, 0), "spares come back with the first good boot");
}

#[test]
fn drain_refuses_ends_and_empties() {
    let mut w = World::new(2, 3);
    w.acquire(1, layer("a"));
    w.settle();
    w.acquire(2, layer("b"));
    w.step(PoolEvent::Drain);
    w.acquire(3, layer("c"));
    assert_eq!(w.count(|a| matches!(a, Action::RefuseDraining(_))), 1 + usize::from(w.vm_of(2).is_none()));
    w.step(PoolEvent::EndRetired);
    w.settle();
    assert!(w.machine.drained());
}

#[derive(Debug, Clone)]
enum Move {
    Acquire(u8, bool, bool),
    Release(usize, bool),
    Answer(usize, bool),
    Die(usize),
    Sick(usize),
    Attach(usize, u64, bool),
    Detach(usize),
    Retire,
    EndRetired,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => (0u8..4, any::<bool>(), any::<bool>()).prop_map(|(n, e, c)| Move::Acquire(n, e, c)),
        4 => (any::<usize>(), prop::bool::weighted(0.1)).prop_map(|(n, p)| Move::Release(n, p)),
        10 => (any::<usize>(), prop::bool::weighted(0.9)).prop_map(|(n, w)| Move::Answer(n, w)),
        1 => any::<usize>().prop_map(Move::Die),
        1 => any::<usize>().prop_map(Move::Sick),
        4 => (any::<usize>(), 0u64..3, any::<bool>()).prop_map(|(l, d, w)| Move::Attach(l, d, w)),
        3 => any::<usize>().prop_map(Move::Detach),
        1 => Just(Move::Retire),
        1 => Just(Move::EndRetired),
    ];
    prop::collection::vec(one, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn random_events_break_no_invariant(
        global in any::<bool>(), spares in 0usize..4, max in 2usize..6, script in moves(),
    ) {
        let mut w = World::new(spares, max);
        let (mut next, mut leases, mut uses) = (1u64, Vec::new(), Vec::new());
        for m in script {
            next += 1;
            match m {
                Move::Acquire(n, export, check) => {
                    leases.push(next);
                    let name = if check { VmName::Check(next) } else if global { VmName::Global } else { layer(&n.to_string()) };
                    w.step(PoolEvent::Acquire { lease: next, name, export: export && !check });
                }
                Move::Release(n, poison) if !leases.is_empty() => {
                    let lease = leases.remove(n % leases.len());
                    w.step(PoolEvent::Release { lease, poison });
                }
                Move::Answer(n, well) => w.answer(n, well),
                Move::Die(n) | Move::Sick(n) => {
                    let vms: Vec<VmId> = w.machine.vms.keys().copied().collect();
                    if let Some(vm) = vms.get(n % vms.len().max(1)) {
                        w.step(if matches!(m, Move::Die(_)) { PoolEvent::Died(*vm) } else { PoolEvent::Sick(*vm) });
                    }
                }
                Move::Attach(l, d, write) if !leases.is_empty() => {
                    let lease = leases[l % leases.len()];
                    uses.push((lease, next));
                    let access = if write { Access::ReadWrite } else { Access::ReadOnly };
                    w.step(PoolEvent::Attach { lease, usage: next, disk: disk(d, access) });
                }
                Move::Detach(n) if !uses.is_empty() => {
                    let (lease, usage) = uses.remove(n % uses.len());
                    w.step(PoolEvent::Detach { lease, usage });
                }
                Move::Retire => w.step(PoolEvent::Retire),
                Move::EndRetired => w.step(PoolEvent::EndRetired),
                _ => {}
            }
        }
        // Every lease that is still wanted is granted once the VMs come up and the others go.
        w.settle();
        for lease in leases {
            w.step(PoolEvent::Release { lease, poison: false });
            w.settle();
        }
        prop_assert_eq!(w.machine.leases(), (0, 0));
        // Nothing but spares and the global VM is left; after a drain nothing at all.
        w.step(PoolEvent::Drain);
        w.settle();
        prop_assert!(w.machine.drained(), "{:?}", w.machine);
        prop_assert_eq!(&w.booted.len(), &(w.ended.len() + w.machine.counters().boot_failures as usize));
        prop_assert!(w.attached.is_empty());
    }
}
