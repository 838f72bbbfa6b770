//! The tool itself, where it is at hand: see `docs/hcsshim-profile.md`.

use crate::{
    corpus::CASES,
    image::{digests, hcsshim, text},
    profile,
    tars::{Wildness, random},
};
use lcow_graphdriver::{
    diff::DiffError,
    ext4::{Ext4Error, hcsshim::DEFAULT_MAX_DISK},
};
use std::{collections::BTreeMap, env, fs, fs::File, path::Path, process::Command};

/// A number from the environment.
fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// Runs the tool; its error.
fn run(tar: &Path, image: &Path, overlay: bool, inline: bool) -> Result<(), String> {
    let mut command = Command::new(env::var_os("LCOW_TAR2EXT4").expect("LCOW_TAR2EXT4 names the tool"));
    command.arg("-i").arg(tar).arg("-o").arg(image);
    command.args(overlay.then_some("-overlay")).args(inline.then_some("-inline"));
    let output = command.output().expect("the tool runs");
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

#[test]
#[ignore = "needs hcsshim's tar2ext4, which no distribution has: LCOW_TAR2EXT4=PATH, see docs/hcsshim-profile.md"]
fn the_corpus_has_the_tools_hashes() {
    let max_disk = number("LCOW_TAR2EXT4_MAX_DISK", DEFAULT_MAX_DISK);
    let dir = tempfile::tempdir().expect("a folder");
    let (tar, image) = (dir.path().join("in.tar"), dir.path().join("out.img"));
    let mut wrong = Vec::new();
    for case in CASES {
        fs::write(&tar, (case.tar)()).expect("a tar");
        run(&tar, &image, case.overlay, case.inline).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let (sha256, root) = digests(&mut File::open(&image).expect("an image"));
        let golden = case.golden[usize::from(max_disk != DEFAULT_MAX_DISK)];
        if (sha256.as_str(), root.as_str()) != golden {
            wrong.push(format!("{}: (\"{sha256}\", \"{root}\")", case.name));
        }
    }
    assert!(wrong.is_empty(), "the tool gives other hashes:\n{}", wrong.join("\n"));
}

#[test]
#[ignore = "needs hcsshim's tar2ext4, which no distribution has: LCOW_TAR2EXT4=PATH, see docs/hcsshim-profile.md"]
fn random_tars_give_the_tools_bytes() {
    let max_disk = number("LCOW_TAR2EXT4_MAX_DISK", DEFAULT_MAX_DISK);
    let (first, count) = (number("LCOW_TAR2EXT4_SEED", 1), number("LCOW_TAR2EXT4_COUNT", 200));
    let dir = tempfile::tempdir().expect("a folder");
    let (tar_path, image_path) = (dir.path().join("in.tar"), dir.path().join("out.img"));
    let mut refused: BTreeMap<String, u32> = BTreeMap::new();
    let (mut same, mut both) = (0, 0);
    for seed in first..first + count {
        let wildness = if seed % 2 == 0 { Wildness::Tame } else { Wildness::Wild };
        let tar = random(seed, 1 + seed % 60, wildness);
        fs::write(&tar_path, &tar).expect("a tar");
        for (overlay, inline) in [(true, false), (false, false), (true, true)] {
            let case = format!("seed {seed}, overlay {overlay}, inline {inline}");
            let ours = hcsshim(&tar, profile(max_disk, overlay, inline));
            match (run(&tar_path, &image_path, overlay, inline), ours) {
                (Ok(()), Ok(image)) => {
                    let ours = fs::read(image.dir.path().join("image")).expect("an image");
                    assert!(fs::read(&image_path).expect("an image") == ours, "{case}: other bytes");
                    same += 1;
                }
                (Err(e), Ok(_)) => panic!("{case}: only the tool refuses: {e}"),
                (Ok(()), Err(e)) => {
                    let unsupported =
                        matches!(e, DiffError::Image { source: Ext4Error::Unsupported { .. }, .. });
                    assert!(unsupported, "{case}: {}", text(&e));
                    let reason: String = text(&e)
                        .split("ext4 code: ")
                        .last()
                        .unwrap_or_default()
                        .chars()
                        .filter(|c| !c.is_ascii_digit())
                        .collect();
                    *refused.entry(reason).or_default() += 1;
                }
                (Err(_), Err(_)) => both += 1,
            }
        }
    }
    println!(
        "{same} images are the same, {both} tars are refused by both; by this project only: {refused:#?}"
    );
    assert!(same > count, "too few images to say anything");
}
