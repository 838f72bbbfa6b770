//! The slots for disks in a machine: four SCSI controllers with 64 units each.
//!
//! ```text
//!   Slot n ─► controller n / 64 (by its GUID), unit n % 64 ─► resource path (host), serial text (agent)
//! ```
//!
//! A slot is reused only after its disk was really removed. Called by `hcs`.

/// GUIDs that Hyper-V gives the SCSI controllers 0…3 of a utility VM.
const CONTROLLERS: [&str; 4] = [
    "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
    "0110f83b-de10-5172-a266-78bca56bf50a",
    "b5d2d8d4-3a75-51bf-945b-3444dc6b8579",
    "305891a9-b251-5dfe-91a2-c25d9212275b",
];
/// Units of a controller.
const UNITS: u16 = 64;
/// Disks of a machine.
pub const MAX_DISKS: u16 = CONTROLLERS.len() as u16 * UNITS;

/// A place for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u16);

impl Slot {
    /// The `n`th slot; `None` beyond the last.
    pub fn new(n: u16) -> Option<Self> {
        (n < MAX_DISKS).then_some(Self(n))
    }

    /// GUIDs of all controllers.
    pub fn controllers() -> impl Iterator<Item = &'static str> {
        CONTROLLERS.into_iter()
    }

    fn controller(self) -> &'static str {
        CONTROLLERS[usize::from(self.0 / UNITS)]
    }

    fn unit(self) -> u16 {
        self.0 % UNITS
    }

    /// The slot in a document.
    pub fn resource_path(self) -> String {
        format!("VirtualMachine/Devices/Scsi/{}/Attachments/{}", self.controller(), self.unit())
    }

    /// The slot in messages to the agent: `GUID of the controller:unit`. In a guest the GUID is the controller's
    /// directory below `/sys/bus/vmbus/devices`.
    pub fn serial(self) -> String {
        format!("{}:{}", self.controller(), self.unit())
    }
}

/// Which slots are taken.
#[derive(Debug, Default)]
pub struct Luns([u64; CONTROLLERS.len()]);

impl Luns {
    /// Takes the lowest free slot; `None` if all are taken.
    pub fn take(&mut self) -> Option<Slot> {
        let (controller, taken) = self.0.iter_mut().enumerate().find(|(_, taken)| **taken != u64::MAX)?;
        let unit = taken.trailing_ones() as u16;
        *taken |= 1 << unit;
        Slot::new(controller as u16 * UNITS + unit)
    }

    /// Gives a slot back.
    pub fn give_back(&mut self, slot: Slot) {
        self.0[usize::from(slot.0 / UNITS)] &= !(1 << slot.unit());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_slot_is_given_once_and_the_lowest_first() {
        let mut luns = Luns::default();
        let all: Vec<Slot> = std::iter::from_fn(|| luns.take()).collect();
        assert_eq!((all.len(), all.iter().collect::<BTreeSet<_>>().len()), (256, 256));
        assert_eq!(all.iter().map(|s| s.serial()).collect::<BTreeSet<_>>().len(), 256);
        for n in [200, 3, 64] {
            luns.give_back(all[n]);
        }
        assert_eq!([luns.take(), luns.take(), luns.take()], [Some(all[3]), Some(all[64]), Some(all[200])]);
        assert_eq!(luns.take(), None);
    }

    #[test]
    fn the_path_names_the_controller() {
        assert_eq!(
            Slot::new(130).unwrap().resource_path(),
            "VirtualMachine/Devices/Scsi/b5d2d8d4-3a75-51bf-945b-3444dc6b8579/Attachments/2"
        );
        assert_eq!(Slot::new(256), None);
    }
}
