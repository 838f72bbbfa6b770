//! Times of an inode: 32 bits of seconds, and an extra word with 2 bits of epoch and 30 bits of nanoseconds.

/// Seconds and nanoseconds since 1970 (UTC); seconds may be negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds, rounded towards the past.
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

impl Timestamp {
    /// First second that ext4 can hold: 1901-12-13.
    pub const MIN_SECS: i64 = i32::MIN as i64;
    /// Last second that ext4 can hold: 2446-05-10.
    pub const MAX_SECS: i64 = (3 << 32) + i32::MAX as i64;

    /// The on-disk pair (seconds, extra). Times out of range become the nearest that fits, as in the kernel.
    pub fn encode(self) -> (u32, u32) {
        let secs = self.secs.clamp(Self::MIN_SECS, Self::MAX_SECS);
        let low = secs as u32;
        let epoch = ((secs - i64::from(low as i32)) >> 32) as u32 & 3;
        (low, epoch | self.nanos.min(999_999_999) << 2)
    }

    /// The time that an on-disk pair means. Nanoseconds are not checked (up to 2^30 - 1 in a broken image).
    pub fn decode(low: u32, extra: u32) -> Self {
        Self { secs: i64::from(low as i32) + (i64::from(extra & 3) << 32), nanos: extra >> 2 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_as_the_kernel_does() {
        let cases = [
            (0, 0, 0, 0),
            (-1, 5, u32::MAX, 5 << 2),
            (Timestamp::MIN_SECS, 0, 0x8000_0000, 0),
            (0x7fff_ffff, 1, 0x7fff_ffff, 4),
            (0x8000_0000, 0, 0x8000_0000, 1),
            (0x1_7fff_ffff, 0, 0x7fff_ffff, 1),
            (Timestamp::MAX_SECS, 999_999_999, 0x7fff_ffff, 3 | 999_999_999 << 2),
        ];
        for (secs, nanos, low, extra) in cases {
            let t = Timestamp { secs, nanos };
            assert_eq!(t.encode(), (low, extra), "{secs}");
            assert_eq!(Timestamp::decode(low, extra), t);
        }
        assert_eq!(Timestamp { secs: i64::MAX, nanos: 0 }.encode(), (0x7fff_ffff, 3));
        assert_eq!(Timestamp { secs: i64::MIN, nanos: 0 }.encode(), (0x8000_0000, 0));
    }
}
