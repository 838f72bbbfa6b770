//! Random cycles: what the kernel wrote is there after each, and e2fsck finds nothing.

use super::{GIB, Kind, MIB, Mounted, fsck, json, make, raw_view, support::noise, taken, text};
use disk_io::{ReadAt, WriteAt};
use ext4_image::format::BlankVersion;
use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};
use vhd_image::vhdx::VhdxWriter;

/// Cycles of an ordinary run.
const ROUNDS: u64 = 40;
/// Largest disk.
const LARGEST: u64 = 40 * GIB;

fn variable(name: &str, usual: u64) -> u64 {
    env::var(name).map_or(usual, |text| text.parse().unwrap())
}

/// xorshift64*: the same draws for a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % n
    }
}

/// A disk with what must be on it.
struct Disk {
    folder: tempfile::TempDir,
    path: PathBuf,
    kind: Kind,
    bytes: u64,
    /// Name, seed and length of each file.
    files: BTreeMap<String, (u64, usize)>,
    /// Its journal is in use.
    dirty: bool,
    made: u64,
}

impl Disk {
    fn new(random: &mut Random) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kind = Kind::ALL[random.below(3) as usize];
        let version = [BlankVersion::First, BlankVersion::Second][random.below(2) as usize];
        let bytes = (32 + random.below(400)) * MIB + random.below(2) * 512 * 7;
        let path = folder.path().join(format!("disk.{}", kind.extension()));
        make(&path, kind, version, bytes);
        Self { folder, path, kind, bytes, files: BTreeMap::new(), dirty: false, made: 0 }
    }

    /// Lets the kernel write and delete files; with `cut` the disk is what it is while it is mounted.
    fn write(&mut self, random: &mut Random, cut: bool) {
        let (view, bytes) = raw_view(&self.path, self.kind, self.folder.path());
        let mounted = Mounted::new(&view, bytes, "rw");
        let upper = mounted.path().join("upper");
        for _ in 0..=random.below(12) {
            if random.below(3) == 0 && !self.files.is_empty() {
                let n = random.below(self.files.len() as u64) as usize;
                let name = self.files.keys().nth(n).unwrap().clone();
                fs::remove_file(upper.join(&name)).unwrap();
                self.files.remove(&name);
                continue;
            }
            self.made += 1;
            let (name, seed) = (format!("d{}/f{}", random.below(5), self.made), self.made);
            let scale = 8 + random.below(12);
            let len = random.below(1 << scale) as usize;
            let path = upper.join(&name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if fs::write(&path, noise(seed, len)).is_ok() {
                self.files.insert(name, (seed, len));
            } else {
                // The disk is full, which is no error of what is tested.
                let _ = fs::remove_file(&path);
            }
        }
        if cut {
            rustix::fs::syncfs(File::open(mounted.path()).unwrap()).unwrap();
            let copy = self.folder.path().join("cut");
            let status = Command::new("cp").arg("--sparse=always").args([&view, &copy]).status().unwrap();
            assert!(status.success());
            mounted.unmount();
            fs::rename(&copy, &view).unwrap();
        } else {
            mounted.unmount();
        }
        self.dirty = cut;
        if self.kind == Kind::Vhdx {
            self.put_back(&view);
        }
    }

    /// Writes what the kernel changed into the VHDX.
    fn put_back(&self, view: &Path) {
        const CHUNK: usize = 64 << 10;
        let raw = File::open(view).unwrap();
        let file = File::options().read(true).write(true).open(&self.path).unwrap();
        let writer = VhdxWriter::open(&file).unwrap();
        let (mut new, mut old) = (vec![0; CHUNK], vec![0; CHUNK]);
        for range in lcow_sys::sparse::data_ranges(&raw, self.bytes) {
            for at in (range.start / CHUNK as u64 * CHUNK as u64..range.end).step_by(CHUNK) {
                let n = (self.bytes - at).min(CHUNK as u64) as usize;
                raw.read_exact_at(&mut new[..n], at).unwrap();
                writer.read_exact_at(&mut old[..n], at).unwrap();
                if new[..n] != old[..n] {
                    writer.write_all_at(&new[..n], at).unwrap();
                }
            }
        }
        writer.sync().unwrap();
    }

    fn grow(&mut self, random: &mut Random) {
        let more = match random.below(4) {
            0 => random.below(300) * 512,
            1 => random.below(200) * MIB,
            2 => random.below(2000) * MIB + 512,
            _ => random.below(12) * GIB,
        };
        let size = (self.bytes + more).min(LARGEST);
        let done = json(&["layer", "grow", text(&self.path), &size.to_string()]);
        assert_eq!(done["journal_replayed"], self.dirty);
        assert_eq!(done["after"]["disk"], size);
        (self.bytes, self.dirty) = (size, false);
    }

    fn compact(&mut self, random: &mut Random) {
        let before = (taken(&self.path), fs::metadata(&self.path).unwrap().len());
        let path = text(&self.path).to_owned();
        let mut arguments = vec!["layer", "compact", &path];
        if random.below(2) == 0 {
            arguments.push("--in-place");
        }
        let done = json(&arguments);
        assert_eq!(done["journal_replayed"], self.dirty);
        let after = (taken(&self.path), fs::metadata(&self.path).unwrap().len());
        if self.kind == Kind::Vhdx {
            assert!(after.1 <= before.1, "{before:?}, {after:?}");
        } else {
            assert!(after.0 <= before.0 + 64 * 1024 && after.1 == before.1, "{before:?}, {after:?}");
        }
        self.dirty = false;
    }

    fn clone(&mut self, random: &mut Random) {
        self.made += 1;
        let new = self.folder.path().join(format!("clone{}.{}", self.made, self.kind.extension()));
        let path = text(&self.path).to_owned();
        let size = (self.bytes + random.below(300) * MIB).to_string();
        let mut arguments = vec!["layer", "clone", &path, text(&new)];
        if random.below(2) == 0 {
            arguments.extend(["--size", &size]);
        }
        let done = json(&arguments);
        self.bytes = done["disk_bytes"].as_u64().unwrap();
        fs::remove_file(&self.path).unwrap();
        (self.path, self.dirty) = (new, false);
    }

    /// Everything is as it was written.
    fn check(&self) {
        let (view, bytes) = raw_view(&self.path, self.kind, self.folder.path());
        if self.dirty {
            return;
        }
        // e2fsck takes the end of the file for the disk's; a VHD's footer behind it changes nothing.
        fsck(&view);
        let mounted = Mounted::new(&view, bytes, "ro");
        for (name, (seed, len)) in &self.files {
            let found = fs::read(mounted.path().join("upper").join(name)).unwrap();
            assert!(found == noise(*seed, *len), "{name}");
        }
        mounted.unmount();
    }
}

#[test]
fn what_a_kernel_wrote_survives_any_cycle() {
    let (rounds, first) = (variable("LCOW_SPACE_ROUNDS", ROUNDS), variable("LCOW_SPACE_SEED", 1));
    // A disk lives for ten cycles.
    const LIFE: u64 = 10;
    let mut counts = BTreeMap::new();
    for seed in first..first + rounds.div_ceil(LIFE) {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut disk = Disk::new(&mut random);
        for cycle in 0..LIFE {
            println!("seed {seed}, cycle {cycle}: {:?} of {} bytes", disk.kind, disk.bytes);
            let cut = random.below(3) == 0;
            disk.write(&mut random, cut);
            let what = ["grow", "compact", "clone"][random.below(3) as usize];
            println!("  {what}, the journal in use: {cut}, {} files", disk.files.len());
            match what {
                "grow" => disk.grow(&mut random),
                "compact" => disk.compact(&mut random),
                _ => disk.clone(&mut random),
            }
            disk.check();
            *counts.entry((disk.kind.extension(), what, cut)).or_insert(0) += 1;
        }
    }
    println!("{counts:?}");
    assert!(counts.len() > 8 || rounds < ROUNDS, "{counts:?}");
}
