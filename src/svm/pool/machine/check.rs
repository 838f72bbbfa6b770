//! The invariants of the pool's state machine, for its tests.

use super::{DiskStage, PoolMachine, Stage, VmName};
use std::collections::BTreeSet;

impl PoolMachine {
    /// Checks the invariants.
    ///
    /// # Errors
    /// Describes the first invariant that is broken.
    pub fn check(&self) -> Result<(), String> {
        if self.vms.len() > self.settings.max_vms {
            return Err(format!("{} VMs, at most {} allowed", self.vms.len(), self.settings.max_vms));
        }
        let mut names = BTreeSet::new();
        for (id, v) in &self.vms {
            if v.stage != Stage::Leased && !(v.leases.is_empty() && v.disks.is_empty()) {
                return Err(format!("vm {id} is {:?} with leases or disks", v.stage));
            }
            if v.stage == Stage::Leased && !v.retired && !names.insert(v.name.clone()) {
                return Err(format!("two VMs are called {:?}", v.name));
            }
            if v.stage == Stage::Leased
                && v.leases.is_empty()
                && (v.retired || v.name != Some(VmName::Global))
            {
                return Err(format!("vm {id} is kept without a lease"));
            }
            for lease in &v.leases {
                if self.leases.get(lease).and_then(|l| l.vm) != Some(*id) {
                    return Err(format!("vm {id} holds lease {lease}, which does not hold it"));
                }
            }
            for (key, d) in &v.disks {
                if d.stage == DiskStage::Attached && d.users.is_empty() {
                    return Err(format!("disk {key:?} of vm {id} is attached for nobody"));
                }
                for usage in &d.users {
                    if !v.leases.iter().any(|l| self.leases[l].uses.get(usage) == Some(key)) {
                        return Err(format!("use {usage} of disk {key:?} belongs to no lease of vm {id}"));
                    }
                }
            }
        }
        for (id, l) in &self.leases {
            match l.vm {
                None if !self.queue.contains(id) => {
                    return Err(format!("lease {id} waits outside the queue"));
                }
                Some(vm) if !self.vms.get(&vm).is_some_and(|v| v.leases.contains(id)) => {
                    return Err(format!("lease {id} is on vm {vm}, which is not its own"));
                }
                _ => {}
            }
        }
        let exporting =
            self.vms.values().filter(|v| v.name != Some(VmName::Global) && self.exporting(v)).count();
        if exporting >= self.settings.max_vms {
            return Err("exports hold every VM".into());
        }
        let idle = self.vms.values().any(|v| v.stage == Stage::Idle && !v.retired);
        let work_waits = self.queue.iter().any(|l| self.leases.get(l).is_some_and(|l| !l.export));
        if idle && work_waits {
            return Err("work waits beside an idle VM".into());
        }
        Ok(())
    }
}
