//! Times as that tool packs them: 34 bits of seconds, then 30 bits of nanoseconds.
//!
//! ext4 means something else: the low 32 bits are signed, and the two bits above count epochs *after* that sign. So the
//! tool's times are read back right only where bit 31 of the seconds is clear, and (clipped) before 1901. Wrong ones are
//! refused.

use super::refuse;
use crate::{Ext4Error, Timestamp};

/// Seconds of 1901-12-13, as the tool clips to it.
const CLIPPED_LOW: u64 = 0x8000_0000;

/// A packed time; 0 is none, and 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Stamp(u64);

/// The error for a time that [`Stamp::pack`] does not take.
pub(super) fn refused(t: Timestamp) -> Ext4Error {
    refuse(format!("a date of {} seconds since 1970 (hcsshim's tar2ext4 writes another one)", t.secs))
}

impl Stamp {
    /// Packs a time; `None` if another one would be read back.
    pub(super) fn pack(t: Timestamp) -> Option<Self> {
        /// The first second of year 1, which Go takes for no time at all.
        const GO_ZERO: Timestamp = Timestamp { secs: -62_135_596_800, nanos: 0 };
        if t == GO_ZERO {
            return None;
        }
        if t.secs < Timestamp::MIN_SECS {
            return Some(Self(CLIPPED_LOW));
        }
        if t.secs > Timestamp::MAX_SECS {
            return Some(Self(Timestamp::MAX_SECS as u64));
        }
        let stamp = Self(t.secs as u64 | u64::from(t.nanos) << 34);
        (Timestamp::decode(stamp.low(), stamp.extra()) == t).then_some(stamp)
    }

    /// The time unpacked and packed again; `None` if another one would be read back.
    pub(super) fn again(self) -> Option<Self> {
        (self.0 != CLIPPED_LOW).then_some(self)
    }

    /// The seconds' word of the inode.
    pub(super) fn low(self) -> u32 {
        self.0 as u32
    }

    /// The extra word of the inode.
    pub(super) fn extra(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_dates_are_packed_and_wrong_ones_refused() {
        let at = |secs| Timestamp { secs, nanos: 5 };
        for secs in [0, 1, 0x7fff_ffff, 0x1_0000_0000, 0x1_7fff_ffff, 0x2_0000_0000, Timestamp::MAX_SECS] {
            let stamp = Stamp::pack(at(secs)).unwrap();
            assert_eq!(Timestamp::decode(stamp.low(), stamp.extra()), at(secs));
            assert_eq!(stamp.again(), Some(stamp));
        }
        for secs in [-1, -0x8000_0000, 0x8000_0000, 0xffff_ffff, 0x1_8000_0000] {
            assert_eq!(Stamp::pack(at(secs)), None, "{secs}");
        }
        let early = Stamp::pack(at(Timestamp::MIN_SECS - 1)).unwrap();
        assert_eq!((early.low(), early.extra(), early.again()), (0x8000_0000, 0, None));
        let late = Stamp::pack(at(i64::MAX)).unwrap();
        assert_eq!((late.low(), late.extra()), (0x7fff_ffff, 3));
    }
}
