//! Records that are right, damaged, and hostile.

use super::*;
use crate::{DiffError, TarDigest};
use disk_io::{FaultDisk, MemDisk, ReadAt, WriteAt};
use proptest::prelude::*;
use zerocopy::IntoBytes;

/// A piece of tar: literal bytes, or a range of the image.
#[derive(Debug, Clone)]
enum Piece {
    Literal(Vec<u8>),
    Image(u64, u64),
}

fn image(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}

fn tar_of(pieces: &[Piece], image: &[u8]) -> Vec<u8> {
    let part = |p: &Piece| match p {
        Piece::Literal(bytes) => bytes.clone(),
        Piece::Image(offset, len) => image[*offset as usize..(offset + len) as usize].to_vec(),
    };
    pieces.iter().flat_map(part).collect()
}

fn write(pieces: &[Piece], image: &[u8], out: impl WriteAt) -> Result<u64, DiffError> {
    let mut writer = RecordWriter::new(out)?;
    for piece in pieces {
        match piece {
            Piece::Literal(bytes) => writer.literal(bytes),
            Piece::Image(offset, len) => writer.image(*offset, *len),
        }
    }
    let digest = TarDigest::of(DigestKind::Blake3, &tar_of(pieces, image));
    writer.finish(digest, image.len() as u64)
}

fn record_of(pieces: &[Piece], image: &[u8]) -> Vec<u8> {
    let disk = MemDisk::new();
    let n = write(pieces, image, &disk).unwrap();
    assert_eq!(n, disk.size().unwrap());
    disk.to_vec()
}

/// What a replay gave out, and its result.
fn play(image: &[u8], record: &[u8]) -> (Vec<u8>, Result<ReplaySummary, DiffError>) {
    let mut out = Vec::new();
    let result = replay(MemDisk::from(image.to_vec()), MemDisk::from(record.to_vec()), &mut out);
    (out, result)
}

fn sample() -> (Vec<u8>, Vec<Piece>) {
    let image = image(3 << 20);
    let mut pieces = vec![Piece::Literal(b"head".to_vec())];
    for i in 0..300u64 {
        pieces.push(Piece::Image(i * 4096, 100 + i));
        pieces.push(Piece::Literal(vec![i as u8; 512]));
    }
    pieces.push(Piece::Image(2 << 20, 1 << 20));
    pieces.push(Piece::Image(5, 7));
    pieces.push(Piece::Image(12, 30));
    pieces.push(Piece::Literal(vec![0; 10_240]));
    (image, pieces)
}

#[test]
fn what_was_recorded_comes_back() {
    let (image, pieces) = sample();
    let big = (0..1_500_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<_>>();
    let cases: Vec<Vec<Piece>> = vec![
        vec![],
        vec![Piece::Literal(vec![1])],
        vec![Piece::Image(0, image.len() as u64)],
        vec![Piece::Literal(big)],
        (0..100_000).map(|i| Piece::Image((i * 7919) % 3_000_000, 1 + i % 3)).collect(),
        pieces,
    ];
    for pieces in cases {
        let tar = tar_of(&pieces, &image);
        let record = record_of(&pieces, &image);
        let (out, result) = play(&image, &record);
        let summary = result.unwrap();
        assert_eq!(summary.tar_bytes, tar.len() as u64);
        assert_eq!(summary.tar_digest, TarDigest::of(DigestKind::Blake3, &tar));
        assert!(out == tar, "{} bytes come back as {}", tar.len(), out.len());
        let info = inspect(&MemDisk::from(record.clone())).unwrap();
        assert_eq!((info.record_bytes, info.tar_bytes), (record.len() as u64, tar.len() as u64));
    }
}

#[test]
fn neighbouring_ranges_are_one_op() {
    let image = image(1 << 20);
    let split: Vec<_> = (0..1024).map(|i| Piece::Image(i * 1024, 1024)).collect();
    assert_eq!(record_of(&split, &image), record_of(&[Piece::Image(0, 1 << 20)], &image));
}

#[test]
fn headers_are_small() {
    let image = image(1 << 20);
    let pieces: Vec<_> = (0..2000u64)
        .flat_map(|i| {
            let mut header = vec![0u8; 512];
            let name = format!("usr/share/doc/package-{i}/copyright");
            header[..name.len()].copy_from_slice(name.as_bytes());
            header[100..108].copy_from_slice(b"0000644\0");
            header[148..154].copy_from_slice(format!("{:06o}", 5000 + (i * 37) % 999).as_bytes());
            [Piece::Literal(header), Piece::Image((i % 200) * 4096, 3000)]
        })
        .collect();
    let (tar, record) = (tar_of(&pieces, &image).len(), record_of(&pieces, &image).len());
    assert!(record * 100 < tar, "{record} of {tar}");
}

#[test]
fn every_damaged_bit_of_a_record_is_found_and_never_gives_the_wrong_end() {
    let image = image(64 << 10);
    let pieces = [
        Piece::Literal((0..200).collect()),
        Piece::Image(4096, 9000),
        Piece::Literal(vec![7; 600]),
        Piece::Image(100, 50),
    ];
    let record = record_of(&pieces, &image);
    for at in 0..record.len() {
        for bit in [0, 3, 7] {
            let mut bad = record.clone();
            bad[at] ^= 1 << bit;
            let (out, result) = play(&image, &bad);
            let error = result.expect_err("damage is found");
            assert!(
                matches!(error, DiffError::Corrupt { .. } | DiffError::Unsupported { .. }),
                "byte {at}: {error:?}"
            );
            assert!(out.is_empty(), "byte {at}: a small tar is given out whole or not at all");
        }
    }
}

#[test]
fn a_damaged_image_is_found() {
    let (image, pieces) = sample();
    let record = record_of(&pieces, &image);
    let tar = tar_of(&pieces, &image);
    for at in [0, 4096, (2 << 20) + 17, image.len() - 1] {
        let mut bad = image.clone();
        bad[at] ^= 0x10;
        let (out, result) = play(&bad, &record);
        assert!(matches!(result, Err(DiffError::Corrupt { .. })), "{at}: {result:?}");
        assert!(out.len() < tar.len());
    }
    let (_, result) = play(&image[..image.len() - 1], &record);
    assert!(matches!(result, Err(DiffError::Corrupt { what: "layer image", .. })), "{result:?}");
}

#[test]
fn truncation_and_growth_are_found() {
    let image = image(64 << 10);
    let record = record_of(&[Piece::Literal((0..200).collect()), Piece::Image(4096, 9000)], &image);
    for len in 0..record.len() {
        let (_, result) = play(&image, &record[..len]);
        assert!(matches!(result, Err(DiffError::Corrupt { .. })), "{len}: {result:?}");
    }
    let (_, result) = play(&image, &[record, vec![0]].concat());
    assert!(matches!(result, Err(DiffError::Corrupt { .. })), "{result:?}");
}

/// A record with right checksums around any frames: what a hostile service VM could make.
fn forged(frames: &[(&[u8], &[u8])], tar_bytes: u64, image_bytes: u64, tar: &[u8]) -> Vec<u8> {
    let header = RawHeader { magic: MAGIC, version: VERSION.into(), flags: 0.into() };
    let mut out = header.as_bytes().to_vec();
    let mut crc = header.crc();
    for (ops, literals) in frames {
        let packed = zstd::bulk::compress(&[*ops, *literals].concat(), 1).unwrap();
        let mut frame = RawFrame {
            kind: FRAME.into(),
            ops: (ops.len() as u32).into(),
            literals: (literals.len() as u32).into(),
            packed: (packed.len() as u32).into(),
            crc: 0.into(),
        };
        crc = frame.crc_after(crc, &packed);
        frame.crc = crc.into();
        out.extend_from_slice(frame.as_bytes());
        out.extend_from_slice(&packed);
    }
    let mut trailer = RawTrailer {
        kind: END.into(),
        // As the first records have it.
        digest_kind: 0.into(),
        frames: (frames.len() as u64).into(),
        tar_bytes: tar_bytes.into(),
        image_bytes: image_bytes.into(),
        record_bytes: ((out.len() + TRAILER_BYTES) as u64).into(),
        digest: TarDigest::of(DigestKind::Sha256, tar).bytes,
        crc: 0.into(),
        reserved: 0.into(),
    };
    trailer.crc = trailer.crc_after(crc).into();
    out.extend_from_slice(trailer.as_bytes());
    out
}

fn ops(list: &[(u64, Option<i64>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for &(len, delta) in list {
        put_varint(&mut out, len << 1 | u64::from(delta.is_some()));
        if let Some(delta) = delta {
            put_varint(&mut out, zigzag(delta));
        }
    }
    out
}

#[test]
fn forged_records_are_refused() {
    let image = image(4096);
    let huge = i64::MAX as u64;
    let good =
        forged(&[(&ops(&[(3, None), (2, Some(5))]), b"abc")], 5, 4096, &[b"abc", &image[5..7]].concat());
    assert!(play(&image, &good).1.is_ok());
    let bomb = vec![0u8; 1 << 20];
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty op", forged(&[(&ops(&[(0, None)]), b"")], 0, 4096, b"")),
        ("empty image op", forged(&[(&ops(&[(0, Some(0))]), b"")], 0, 4096, b"")),
        ("no ops", forged(&[(b"", b"abc")], 3, 4096, b"abc")),
        ("unused literals", forged(&[(&ops(&[(1, None)]), b"abc")], 1, 4096, b"a")),
        ("missing literals", forged(&[(&ops(&[(4, None)]), b"abc")], 4, 4096, b"abc")),
        ("past the image", forged(&[(&ops(&[(1, Some(4096))]), b"")], 1, 4096, b"a")),
        ("before the image", forged(&[(&ops(&[(1, Some(-1))]), b"")], 1, 4096, b"a")),
        ("huge range", forged(&[(&ops(&[(huge, Some(1))]), b"")], huge, 4096, b"a")),
        ("huge literal", forged(&[(&ops(&[(huge, None)]), b"a")], huge, 4096, b"a")),
        (
            "far range",
            forged(&[(&ops(&[(5, Some(i64::MAX)), (5, Some(i64::MAX))]), b"")], 10, u64::MAX, b"a"),
        ),
        ("image larger than the disk", forged(&[(&ops(&[(1, None)]), b"a")], 1, 4097, b"a")),
        ("more than told", forged(&[(&ops(&[(3, None)]), b"abc")], 2, 4096, b"ab")),
        ("less than told", forged(&[(&ops(&[(3, None)]), b"abc")], 4, 4096, b"abc")),
        ("other digest", forged(&[(&ops(&[(3, None)]), b"abc")], 3, 4096, b"abd")),
        ("cut varint", forged(&[(&[0x80], b"")], 0, 4096, b"")),
        ("long varint", forged(&[(&[0xff; 11], b"")], 0, 4096, b"")),
        ("bomb", forged(&[(&ops(&[(1 << 20, None)]), &bomb)], 1 << 20, 4096, &bomb)),
    ];
    for (what, record) in cases {
        let (out, result) = play(&image, &record);
        assert!(matches!(result, Err(DiffError::Corrupt { .. })), "{what}: {result:?}");
        assert!(out.is_empty(), "{what}");
    }
}

#[test]
fn swapped_frames_are_found() {
    let image = image(4096);
    let (first, second) = (ops(&[(3, None)]), ops(&[(3, None)]));
    let record = forged(&[(&first, b"abc"), (&second, b"abd")], 6, 4096, b"abcabd");
    assert!(play(&image, &record).1.is_ok());
    let frame = (record.len() - HEADER_BYTES - TRAILER_BYTES) / 2;
    let mut bad = record.clone();
    bad[HEADER_BYTES..HEADER_BYTES + frame]
        .copy_from_slice(&record[HEADER_BYTES + frame..HEADER_BYTES + 2 * frame]);
    bad[HEADER_BYTES + frame..HEADER_BYTES + 2 * frame]
        .copy_from_slice(&record[HEADER_BYTES..HEADER_BYTES + frame]);
    assert!(matches!(play(&image, &bad).1, Err(DiffError::Corrupt { .. })));
}

#[test]
fn a_full_disk_is_reported() {
    let (image, pieces) = sample();
    let size = record_of(&pieces, &image).len() as u64;
    for budget in [0, 1, 15, 16, 100, size / 2, size - 1] {
        let error = write(&pieces, &image, FaultDisk::full_after(MemDisk::new(), budget)).unwrap_err();
        let DiffError::Io { source, .. } = error else { panic!("{budget}: {error:?}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{budget}");
    }
    write(&pieces, &image, FaultDisk::full_after(MemDisk::new(), size)).unwrap();
}

#[test]
fn numbers_survive() {
    for value in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
        let mut bytes = Vec::new();
        put_varint(&mut bytes, value);
        let mut rest = &bytes[..];
        assert_eq!((take_varint(&mut rest), rest), (Some(value), &[][..]));
        assert_eq!(zigzag(unzigzag(value)), value);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_pieces_come_back(list in prop::collection::vec((any::<bool>(), 0u64..60_000, 1u64..5000), 0..200)) {
        let image = image(65_536);
        let pieces: Vec<_> = list
            .iter()
            .map(|&(literal, at, len)| if literal {
                Piece::Literal(image[at as usize..(at + len) as usize].iter().rev().copied().collect())
            } else {
                Piece::Image(at, len)
            })
            .collect();
        let (out, result) = play(&image, &record_of(&pieces, &image));
        prop_assert!(result.is_ok());
        prop_assert!(out == tar_of(&pieces, &image));
    }

    #[test]
    fn any_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let image = image(4096);
        prop_assert!(play(&image, &bytes).1.is_err());
        let mut framed = forged(&[(&bytes, b"abc")], 100, 4096, b"abc");
        prop_assert!(play(&image, &framed).1.is_err());
        framed.truncate(framed.len() / 2);
        prop_assert!(play(&image, &framed).1.is_err());
    }
}
