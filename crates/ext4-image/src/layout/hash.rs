//! The directory hash `half_md4` over unsigned bytes.
//!
//! Source: Documentation/filesystems/ext4/directory.rst (hash tree), RFC 1320 for MD4's functions; fs/ext4/hash.c fixes
//! the order of words and shifts. Used by the writer, the reader and the checker.

/// `hash_version`: half of MD4.
pub(crate) const DX_HASH_HALF_MD4: u8 = 1;

const INITIAL: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
/// The largest hash is kept free: it marks the end of a directory when it is read.
const END: u32 = 0xffff_fffe;

/// One step: register, message word, shift.
type Step = (usize, u32);
const ROUND_1: [Step; 8] = [(0, 3), (1, 7), (2, 11), (3, 19), (4, 3), (5, 7), (6, 11), (7, 19)];
const ROUND_2: [Step; 8] = [(1, 3), (3, 5), (5, 9), (7, 13), (0, 3), (2, 5), (4, 9), (6, 13)];
const ROUND_3: [Step; 8] = [(3, 3), (7, 9), (2, 11), (6, 15), (1, 3), (5, 9), (0, 11), (4, 15)];

#[expect(clippy::many_single_char_names, reason = "the registers' names in RFC 1320")]
#[inline]
fn round(
    state: &mut [u32; 4],
    words: &[u32; 8],
    steps: &[Step; 8],
    constant: u32,
    f: impl Fn(u32, u32, u32) -> u32,
) {
    for &(word, by) in steps {
        // The registers turn: after four steps each has been the target once.
        let [a, b, c, d] = *state;
        let sum = a.wrapping_add(f(b, c, d)).wrapping_add(words[word]).wrapping_add(constant);
        *state = [d, sum.rotate_left(by), b, c];
    }
}

/// Packs up to 32 bytes into eight big-endian words, padded with the length.
fn pack(chunk: &[u8], len: usize) -> [u32; 8] {
    // The kernel does not mask; names end at 255 bytes, so it is the same.
    let pad = (len as u32 & 0xff) * 0x0101_0101;
    let mut words = [pad; 8];
    for (word, bytes) in words.iter_mut().zip(chunk.chunks(4)) {
        *word = bytes.iter().fold(pad, |value, &b| (value << 8).wrapping_add(u32::from(b)));
    }
    words
}

/// Major and minor hash of a name (at most 255 bytes). The lowest bit of the major hash is always 0.
pub(crate) fn half_md4(name: &[u8], seed: &[u32; 4]) -> (u32, u32) {
    let mut state = if seed.iter().all(|&w| w == 0) { INITIAL } else { *seed };
    for (i, chunk) in name.chunks(32).enumerate() {
        let words = pack(chunk, name.len() - i * 32);
        let mut s = state;
        round(&mut s, &words, &ROUND_1, 0, |x, y, z| z ^ (x & (y ^ z)));
        round(&mut s, &words, &ROUND_2, 0x5A82_7999, |x, y, z| (x & y).wrapping_add((x ^ y) & z));
        round(&mut s, &words, &ROUND_3, 0x6ED9_EBA1, |x, y, z| x ^ y ^ z);
        for (total, part) in state.iter_mut().zip(s) {
            *total = total.wrapping_add(part);
        }
    }
    let major = state[1] & !1;
    (if major == END { END - 2 } else { major }, state[2])
}
