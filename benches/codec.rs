//! Throughput of the codec in memory, without processes and disks: `cargo bench --bench codec`.
//!
//! ```text
//!   apply    tar ─► image + exact record       replay  image + exact record ─► the same tar
//!   check    image ─► sound or not             blank   nothing ─► an empty sandbox
//! ```
//!
//! The layer has both kinds of load: many small files, where headers and inodes dominate, and a few large ones, where
//! bytes dominate.

use criterion::{BatchSize, Criterion, Throughput};
use disk_io::{MemDisk, SubDisk};
use ext4_image::{
    check::{CheckLimits, check},
    format::{BlankOptions, blank},
};
use layer_codec::{
    apply::{ApplyOptions, NoLowers, apply},
    record,
};
use layer_tar::writer::{Header, Kind, Version, append, padding};
use std::{hint::black_box, time::Duration};

const SMALL_FILES: usize = 2000;
const SMALL: usize = 1500;
const LARGE_FILES: usize = 4;
const LARGE: usize = 2 << 20;
/// Size of the blank sandbox, in bytes.
const SANDBOX: u64 = 20 << 30;

fn tar() -> Vec<u8> {
    let mut tar = Vec::new();
    let mut file = |path: String, size: usize, seed: usize| {
        let header = Header {
            kind: Kind::File,
            path: path.as_bytes(),
            link: b"",
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (1_700_000_000, 0),
            device: (0, 0),
            size: size as u64,
            xattrs: &[],
            sparse: None,
        };
        let data = append(&mut tar, &header, Version::V2);
        tar.extend((0..size).map(|n| ((n + seed) / 7 * 31) as u8));
        tar.resize(tar.len() + padding(data), 0);
    };
    for n in 0..SMALL_FILES {
        file(format!("usr/share/{}/{n}", n / 100), SMALL, n);
    }
    for n in 0..LARGE_FILES {
        file(format!("usr/lib/large{n}"), LARGE, n);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn codec(c: &mut Criterion) {
    let tar = tar();
    let options = ApplyOptions::default();
    let (image, exact) = (MemDisk::new(), MemDisk::new());
    let summary =
        apply(tar.as_slice(), &image, &exact, &mut NoLowers, &options).expect("the tar can be applied");

    let mut group = c.benchmark_group("codec");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    group.throughput(Throughput::Bytes(tar.len() as u64));
    group.bench_function("apply", |b| {
        b.iter_batched(
            || (MemDisk::new(), MemDisk::new()),
            |(image, exact)| apply(tar.as_slice(), &image, &exact, &mut NoLowers, &options),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("replay", |b| {
        b.iter_batched(
            || Vec::with_capacity(tar.len()),
            |mut out| record::replay(&image, &exact, &mut out),
            BatchSize::PerIteration,
        );
    });
    group.throughput(Throughput::Bytes(summary.image_bytes));
    group.bench_function("check", |b| {
        let disk = SubDisk::new(&image, 0, summary.image_bytes);
        b.iter(|| check(&disk, CheckLimits::default()).expect("the image is sound"));
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("blank", |b| {
        b.iter(|| blank(black_box(SANDBOX), &BlankOptions::default()).expect("a sandbox of this size"));
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    codec(&mut criterion);
    criterion.final_summary();
}
