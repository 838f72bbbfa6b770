//! The tool itself, where it is at hand: `scripts/compare-hcsshim` builds it and runs these.

use crate::{
    corpus::{CASES, Case},
    image::{Image, digests, hcsshim, hide_ids, in_hcsshim, make_from, text},
    profile,
    tars::{Wildness, random},
};
use ext4_image::{
    Ext4Error,
    hcsshim::{DEFAULT_MAX_DISK, LCOW_MAX_DISK},
};
use layer_codec::{DiffError, apply::HcsshimProfile};
use std::{collections::BTreeMap, env, fs, fs::File, io::Read, path::Path, process::Command};

/// A number from the environment.
fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// Runs the tool, with a tree and a footer; its error.
fn run(tar: &Path, image: &Path, profile: &HcsshimProfile) -> Result<(), String> {
    let mut command = Command::new(env::var_os("LCOW_TAR2EXT4").expect("LCOW_TAR2EXT4 names the tool"));
    command.arg("-i").arg(tar).arg("-o").arg(image).args(["-verity", "-vhd"]);
    command.arg("-max").arg(profile.max_disk_bytes.to_string());
    for (set, flag) in [
        (profile.convert_whiteouts, "-overlay"),
        (profile.inline_data, "-inline"),
        (profile.convert_backslashes, "-convert-slash"),
    ] {
        command.args(set.then_some(flag));
    }
    let output = command.output().expect("the tool runs");
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Compares the whole files, but for their UUIDs.
fn assert_same_bytes(image: &Image, tools: &Path, case: &str) {
    let mut files = [&image.path(), tools].map(|p| File::open(p).expect("an image"));
    let sizes = files.each_ref().map(|f| f.metadata().expect("an image").len());
    assert_eq!(sizes[0], sizes[1], "{case}: sizes");
    let mut left = image.summary.image_bytes;
    let mut buffers = [const { Vec::new() }; 2];
    while left > 0 {
        let now = left.min(1 << 20);
        for (file, buffer) in files.iter_mut().zip(&mut buffers) {
            buffer.clear();
            file.take(now).read_to_end(buffer).expect("an image");
        }
        assert!(buffers[0] == buffers[1], "{case}: other bytes in the file system, {left} before its end");
        left -= now;
    }
    for (file, buffer) in files.iter_mut().zip(&mut buffers) {
        buffer.clear();
        file.read_to_end(buffer).expect("an image");
        hide_ids(buffer);
    }
    assert!(buffers[0] == buffers[1], "{case}: other bytes in the tree or the footer");
}

fn profiles() -> impl Iterator<Item = HcsshimProfile> {
    [
        (DEFAULT_MAX_DISK, true, false),
        (DEFAULT_MAX_DISK, false, true),
        (LCOW_MAX_DISK, true, true),
        (LCOW_MAX_DISK, false, false),
    ]
    .into_iter()
    .map(|(max_disk, overlay, inline)| profile(max_disk, overlay, inline))
}

#[test]
#[ignore = "needs hcsshim's tar2ext4, which no distribution has: scripts/compare-hcsshim"]
fn the_corpus_has_the_tools_hashes() {
    let dir = tempfile::tempdir().expect("a folder");
    let (tar, image) = (dir.path().join("in.tar"), dir.path().join("out.img"));
    let mut wrong = Vec::new();
    for Case { name, tar: make, overlay, inline, golden } in CASES {
        fs::write(&tar, make()).expect("a tar");
        for (max_disk, golden) in [DEFAULT_MAX_DISK, LCOW_MAX_DISK].into_iter().zip(golden) {
            let profile = profile(max_disk, *overlay, *inline);
            run(&tar, &image, &profile).unwrap_or_else(|e| panic!("{name}: {e}"));
            let ours = hcsshim(&make(), profile).unwrap_or_else(|e| panic!("{name}: {}", text(&e)));
            let found = digests(&mut File::open(&image).expect("an image"), ours.summary.image_bytes);
            if (found.image.as_str(), found.root.as_str(), found.rest.as_str()) != *golden {
                wrong.push(format!("{name}: (\"{}\", \"{}\", \"{}\")", found.image, found.root, found.rest));
            }
        }
    }
    assert!(wrong.is_empty(), "the tool gives other hashes:\n{}", wrong.join("\n"));
}

#[test]
#[ignore = "needs hcsshim's tar2ext4, which no distribution has: scripts/compare-hcsshim"]
fn random_tars_give_the_tools_bytes() {
    let (first, count) = (number("LCOW_TAR2EXT4_SEED", 1), number("LCOW_TAR2EXT4_COUNT", 200));
    let dir = tempfile::tempdir().expect("a folder");
    let (tar_path, image_path) = (dir.path().join("in.tar"), dir.path().join("out.img"));
    let mut refused: BTreeMap<String, u32> = BTreeMap::new();
    let (mut same, mut both) = (0, 0);
    for seed in first..first + count {
        let wildness = if seed % 2 == 0 { Wildness::Tame } else { Wildness::Wild };
        let tar = random(seed, 1 + seed % 60, wildness);
        fs::write(&tar_path, &tar).expect("a tar");
        for mut profile in profiles() {
            profile.convert_backslashes = seed % 3 == 0;
            let case = format!("seed {seed}, {profile:?}");
            let ours = hcsshim(&tar, profile);
            match (run(&tar_path, &image_path, &profile), ours) {
                (Ok(()), Ok(image)) => {
                    assert_same_bytes(&image, &image_path, &case);
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

#[test]
#[ignore = "needs hcsshim's tar2ext4, which no distribution has: scripts/compare-hcsshim"]
fn tars_of_a_folder_give_the_tools_bytes() {
    let folder = env::var_os("LCOW_TAR2EXT4_TARS").expect("LCOW_TAR2EXT4_TARS names a folder with tars");
    let dir = tempfile::tempdir().expect("a folder");
    let image_path = dir.path().join("out.img");
    for entry in fs::read_dir(folder).expect("a folder with tars") {
        let tar = entry.expect("a folder with tars").path();
        if tar.extension().is_none_or(|e| e != "tar") {
            continue;
        }
        for profile in profiles() {
            let case = format!("{}, {profile:?}", tar.display());
            let ours = make_from(File::open(&tar).expect("a tar"), in_hcsshim(profile), |_, _| {});
            match (run(&tar, &image_path, &profile), ours) {
                (Ok(()), Ok(image)) => {
                    assert_same_bytes(&image, &image_path, &case);
                    println!("{case}: the same");
                }
                (tools, Err(e)) => println!("{case}: refused: {}; the tool: {tools:?}", text(&e)),
                (Err(e), Ok(_)) => panic!("{case}: only the tool refuses: {e}"),
            }
        }
    }
}
