//! The checker against `e2fsck -fn`: images are mutated, their checksums made right, and whatever our checker takes must
//! be clean for e2fsck too.
//!
//! ```text
//!   bases ──► mutate (seed, number) ──► our checker ──┬─ takes it ──► e2fsck -fn must say 0
//!                                                     └─ refuses it: the reason is counted
//! ```
//!
//! Each mutation is chosen by a seed and its number alone: `LCOW_MUTATIONS` (5,000) of them, from
//! `LCOW_MUTATIONS_SEED` (1) on; `LCOW_MUTATIONS_ONLY` repeats a single number, and `LCOW_MUTATIONS_KEEP` names a folder
//! for what the two disagree about and for one in forty of what both take. Needs e2fsprogs.
#![cfg(target_os = "linux")]

mod bases;
#[path = "../apply/build.rs"]
#[allow(dead_code, reason = "tests/apply uses the rest")]
mod build;
mod hostile;
mod image;
mod kinds;
mod mutate;

use bases::Base;
use disk_io::{ReadAt, WriteAt};
use ext4_image::check::{CheckLimits, check};
use image::Image;
use mutate::{Choice, Mutant, Random};
use std::{
    collections::BTreeMap,
    env, fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

/// Mutations of an ordinary run.
const COUNT: u64 = 5_000;
/// Of what both take, one in so many is kept.
const KEPT: u64 = 40;

/// Bytes as a disk.
struct Bytes<'a>(&'a [u8]);

impl ReadAt for Bytes<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)).unwrap_or(&[]);
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

/// What e2fsck says of an image; `None` if it is clean.
fn e2fsck(path: &Path) -> Option<String> {
    let out = Command::new("e2fsck")
        .arg("-fn")
        .arg(path)
        .env("LC_ALL", "C")
        .output()
        .expect("this test needs e2fsck");
    if out.status.code() == Some(0) {
        return None;
    }
    let text = String::from_utf8_lossy(&out.stdout);
    let lines: Vec<&str> =
        text.lines().filter(|l| !l.is_empty() && !l.starts_with("Pass ")).take(3).collect();
    Some(format!("{:?}: {}", out.status.code(), lines.join(" | ")))
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}='{text}' is no number")))
}

/// Counts of one kind of image.
#[derive(Default, Clone, Copy)]
struct Counts {
    tried: u64,
    accepted: u64,
}

#[derive(Default)]
struct Found {
    counts: BTreeMap<&'static str, Counts>,
    /// What we take and e2fsck does not, and panics.
    wrong: Vec<String>,
}

struct Campaign {
    seed: u64,
    keep: Option<PathBuf>,
    folder: tempfile::TempDir,
    found: Mutex<Found>,
}

impl Campaign {
    /// The mutations `numbers` of one image.
    fn run(&self, base: &Base, numbers: impl Iterator<Item = u64>, thread: usize) {
        let good = &base.bytes;
        let mut image = Image::new(good.clone());
        let choice = Choice::new(&image);
        let path = self.folder.path().join(format!("{thread}.img"));
        let theirs = image.for_e2fsck();
        fs::write(&path, &theirs).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let mut counts = Counts::default();
        for number in numbers {
            let mut random = Random::new(self.seed, number);
            let mut mutant = Mutant::new(&mut image, good);
            while !mutant.mutate(&choice, &mut random) {
                mutant.restore();
            }
            counts.tried += 1;
            let what = || format!("{} {number}: {}", base.name, mutant.what.join(", "));
            let ours =
                catch_unwind(AssertUnwindSafe(|| check(Bytes(&mutant.image.bytes), CheckLimits::default())));
            match ours {
                Err(_) => self.wrong(format!("PANIC {}", what())),
                Ok(Err(_)) => {}
                Ok(Ok(_)) => {
                    counts.accepted += 1;
                    for range in &mutant.changed {
                        file.write_all_at(&mutant.image.bytes[range.clone()], range.start as u64).unwrap();
                    }
                    if let Some(fault) = e2fsck(&path) {
                        self.wrong(format!("{} :: {fault}", what()));
                        self.keep("wrong", number, &mutant.image.bytes);
                    } else if counts.accepted.is_multiple_of(KEPT) {
                        self.keep("taken", number, &mutant.image.bytes);
                    }
                    for range in &mutant.changed {
                        file.write_all_at(&theirs[range.clone()], range.start as u64).unwrap();
                    }
                }
            }
            mutant.restore();
        }
        let mut found = self.found.lock().unwrap();
        let sum = found.counts.entry(base.name).or_default();
        sum.tried += counts.tried;
        sum.accepted += counts.accepted;
    }

    fn wrong(&self, what: String) {
        self.found.lock().unwrap().wrong.push(what);
    }

    fn keep(&self, kind: &str, number: u64, bytes: &[u8]) {
        if let Some(folder) = &self.keep {
            fs::write(folder.join(format!("{kind}-{}-{number}.img", self.seed)), bytes).unwrap();
        }
    }
}

#[test]
fn what_the_checker_takes_is_clean_for_e2fsck() {
    let (count, seed) = (number("LCOW_MUTATIONS", COUNT), number("LCOW_MUTATIONS_SEED", 1));
    let only = env::var("LCOW_MUTATIONS_ONLY").ok().map(|_| number("LCOW_MUTATIONS_ONLY", 0));
    let bases = bases::all();
    for base in &bases {
        let image = Bytes(&base.bytes);
        check(&image, CheckLimits::default()).unwrap_or_else(|e| panic!("{}: {e}", base.name));
        let mut taken_apart = Image::new(base.bytes.clone());
        for unit in taken_apart.units.clone() {
            // Reserved inodes have no checksum, as nothing is in them.
            if taken_apart.bytes[unit.span()].iter().any(|b| *b != 0) {
                taken_apart.seal(&unit);
            }
        }
        assert!(
            taken_apart.bytes == base.bytes,
            "{}: a checksum is not computed as it was written",
            base.name
        );
    }
    // In memory where there is such a place: e2fsck reads each image.
    let shared = Path::new("/dev/shm");
    let folder = if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() }.unwrap();
    let keep = env::var_os("LCOW_MUTATIONS_KEEP").map(PathBuf::from);
    let campaign = Campaign { seed, keep, folder, found: Mutex::default() };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (campaign, bases) = (&campaign, &bases);
            scope.spawn(move || {
                for (i, base) in bases.iter().enumerate() {
                    // Number n is a mutation of image n modulo their count, by thread n divided by it.
                    let of_base = (i as u64..count).step_by(bases.len());
                    let mine =
                        of_base.enumerate().filter(|(turn, _)| turn % threads == thread).map(|(_, n)| n);
                    campaign.run(base, mine.filter(|n| only.is_none_or(|only| only == *n)), thread);
                }
            });
        }
    });
    let found = campaign.found.into_inner().unwrap();
    let mut all = Counts::default();
    for (name, counts) in &found.counts {
        println!("{name:32} {:7} mutations, {:7} accepted", counts.tried, counts.accepted);
        all = Counts { tried: all.tried + counts.tried, accepted: all.accepted + counts.accepted };
    }
    println!(
        "seed {seed}: {} mutations, {} accepted, {} of them wrong",
        all.tried,
        all.accepted,
        found.wrong.len()
    );
    assert!(found.wrong.is_empty(), "taken, and damaged for e2fsck:\n{}", found.wrong.join("\n"));
    // A checker that refuses all would pass, too.
    assert!(only.is_some() || all.accepted * 10 > all.tried, "hardly anything is accepted");
}
