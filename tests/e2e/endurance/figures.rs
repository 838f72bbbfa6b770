//! What the product holds at one moment, and whether that is flat over many.
//!
//! ```text
//!   samples ─► without the first third (caches fill) ─► median of all slopes between two samples (Theil and Sen) × cycles
//!           ─► growth ≤ what is allowed for that figure?
//! ```
//!
//! A median takes no notice of single peaks. What is allowed is an amount, not a rate: the longer the run, the less may be lost in
//! a cycle. Called by the endurance tests.

#![allow(clippy::cast_precision_loss, reason = "counts and bytes here are far below 2^52")]

use std::{fmt::Write as _, fs, path::Path};

/// Names of the figures, in their order.
pub(super) const NAMES: [&str; 5] =
    ["resident memory (KiB)", "descriptors", "loop devices", "mounts", "disk (KiB)"];
/// How much each may grow in a whole run: a part of what one more thing of its kind would take, or what allocators keep.
const ALLOWED: [f64; 5] = [6144.0, 4.0, 0.9, 0.9, 2048.0];
/// Fewer samples behind the warm-up say nothing.
pub(super) const FEWEST: usize = 6;

/// The figures behind a cycle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub(super) cycle: u64,
    /// Since the begin.
    pub(super) seconds: f64,
    pub(super) values: [f64; NAMES.len()],
}

impl Sample {
    /// Of a process and a home that nothing uses at this moment.
    pub(super) fn take(cycle: u64, seconds: f64, pid: u32, home: &Path, loops: usize, mounts: usize) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the product runs");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|line| line.split_whitespace().next()?.parse().ok()).expect("VmRSS");
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("the product runs").count();
        let values =
            [resident, descriptors as f64, loops as f64, mounts as f64, allocated(home) as f64 / 1024.0];
        Self { cycle, seconds, values }
    }
}

/// Bytes that the files below a home take, without what is mounted there.
fn allocated(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        // An entry may be deleted meanwhile.
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        sum += metadata.blocks() * 512;
        if metadata.is_dir() && name != "merged" && name != "mnt" {
            sum += allocated(&entry.path());
        }
    }
    sum
}

/// Growth of a figure from the first sample behind the warm-up to the last, by the median slope.
fn growth(samples: &[Sample], figure: usize) -> f64 {
    let mut slopes = Vec::new();
    for (n, one) in samples.iter().enumerate() {
        for other in &samples[n + 1..] {
            let cycles = (other.cycle - one.cycle) as f64;
            slopes.push((other.values[figure] - one.values[figure]) / cycles);
        }
    }
    slopes.sort_by(f64::total_cmp);
    let span = samples.last().map_or(0, |last| last.cycle) - samples.first().map_or(0, |first| first.cycle);
    slopes[slopes.len() / 2] * span as f64
}

/// The figures that grew by more than is allowed, each with its growth.
///
/// # Panics
/// Too few samples.
pub(super) fn grown(samples: &[Sample]) -> Vec<(&'static str, f64)> {
    let steady = &samples[samples.len() / 3..];
    assert!(steady.len() >= FEWEST, "only {} samples behind the warm-up", steady.len());
    let growths = (0..NAMES.len()).map(|figure| (NAMES[figure], growth(steady, figure), ALLOWED[figure]));
    growths.filter(|(_, growth, allowed)| growth > allowed).map(|(name, growth, _)| (name, growth)).collect()
}

/// A line for each sample, separated by tabs, below the names: what `scripts/endurance.py` plots.
pub(super) fn table(samples: &[Sample]) -> String {
    let mut text = format!("cycle\tseconds\t{}\n", NAMES.join("\t"));
    for sample in samples {
        let values: Vec<String> = sample.values.iter().map(|value| format!("{value:.0}")).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}\t{:.1}\t{}", sample.cycle, sample.seconds, values.join("\t"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples of a figure that begins at 100 and follows a rule; the others stand still.
    fn following(figure: usize, rule: impl Fn(u64) -> f64) -> Vec<Sample> {
        let sample = |cycle| {
            let mut values = [100.0; NAMES.len()];
            values[figure] += rule(cycle);
            Sample { cycle, seconds: cycle as f64, values }
        };
        (0..30).map(sample).collect()
    }

    #[test]
    fn what_leaks_is_found_and_what_only_moves_is_not() {
        for figure in 0..NAMES.len() {
            let allowed = ALLOWED[figure];
            let wave = |cycle: u64| if cycle.is_multiple_of(3) { allowed * 5.0 } else { 0.0 };
            let cases: [(&str, Vec<Sample>, bool); 6] = [
                ("flat", following(figure, |_| 0.0), false),
                ("grows in every cycle", following(figure, |cycle| cycle as f64 * allowed / 8.0), true),
                ("grows now and then", following(figure, |cycle| (cycle / 4) as f64 * allowed), true),
                (
                    "grows below peaks",
                    following(figure, |cycle| wave(cycle) + cycle as f64 * allowed / 8.0),
                    true,
                ),
                (
                    "fills a cache at first",
                    following(figure, |cycle| cycle.min(8) as f64 * allowed * 10.0),
                    false,
                ),
                ("peaks", following(figure, wave), false),
            ];
            for (what, samples, leaks) in cases {
                let found: Vec<&str> = grown(&samples).iter().map(|(name, _)| *name).collect();
                let expected: &[&str] = if leaks { &[NAMES[figure]] } else { &[] };
                assert_eq!(found, expected, "{what}");
            }
        }
    }

    #[test]
    fn a_table_has_a_line_for_each_sample() {
        let text = table(&following(0, |_| 0.0));
        assert_eq!(text.lines().count(), 31);
        assert!(text.starts_with("cycle\tseconds\tresident memory (KiB)\t"), "{text}");
    }
}
