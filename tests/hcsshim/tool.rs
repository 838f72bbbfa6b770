//! The tool itself, where it is at hand: see `docs/hcsshim-profile.md`.

use crate::tars::{Wildness, random};
use lcow_graphdriver::{
    diff::{
        DiffError,
        apply::{ApplyOptions, HcsshimProfile, NoLowers, Profile, apply},
    },
    ext4::{
        Ext4Error,
        hcsshim::HcsshimOptions,
        writer::WriterOptions,
    },
    io::{MemDisk, ReadAt},
};
use std::{collections::BTreeMap, env, fs, process::Command};

fn text(e: &DiffError) -> String {
    let causes = std::iter::successors(std::error::Error::source(e), |s| s.source());
    causes.fold(e.to_string(), |text, cause| text + ": " + &cause.to_string())
}

/// The image that this project makes.
fn ours(tar: &[u8], profile: HcsshimProfile) -> Result<Vec<u8>, DiffError> {
    let (image, record) = (MemDisk::new(), MemDisk::new());
    let options = ApplyOptions {
        profile: Profile::Hcsshim(profile),
        footer: false,
        ..ApplyOptions::new(WriterOptions::default())
    };
    let summary = apply(tar, &image, &record, &mut NoLowers, &options)?;
    let mut bytes = vec![0; summary.image_bytes as usize];
    image.read_exact_at(&mut bytes, 0).expect("the image can be read");
    Ok(bytes)
}

/// `LCOW_TAR2EXT4=PATH`, and `LCOW_TAR2EXT4_MAX_DISK=BYTES` if that program has another maximum disk size than 16 GiB.
#[test]
#[ignore = "needs hcsshim's tar2ext4, which no distribution has: LCOW_TAR2EXT4=PATH, see docs/hcsshim-profile.md"]
fn random_tars_give_the_tools_bytes() {
    let tool = env::var("LCOW_TAR2EXT4").expect("LCOW_TAR2EXT4 names the tool");
    let get = |name: &str, default: u64| env::var(name).map_or(default, |v| v.parse().expect("a number"));
    let max_disk_bytes = get("LCOW_TAR2EXT4_MAX_DISK", 16 << 30);
    let (first, count) = (get("LCOW_TAR2EXT4_SEED", 1), get("LCOW_TAR2EXT4_COUNT", 200));
    let dir = tempfile::tempdir().expect("a folder");
    let (tar_path, image_path) = (dir.path().join("in.tar"), dir.path().join("out.img"));
    let mut refused: BTreeMap<String, u32> = BTreeMap::new();
    let (mut same, mut both) = (0, 0);
    for seed in first..first + count {
        let wildness = if seed % 2 == 0 { Wildness::Tame } else { Wildness::Wild };
        let tar = random(seed, 1 + seed % 60, wildness);
        fs::write(&tar_path, &tar).expect("a tar");
        for (overlay, inline) in [(true, false), (false, false), (true, true)] {
            let mut profile =
                HcsshimProfile::new(HcsshimOptions { inline_data: inline, ..HcsshimOptions::new(max_disk_bytes) });
            profile.convert_whiteouts = overlay;
            let mut command = Command::new(&tool);
            command.arg("-i").arg(&tar_path).arg("-o").arg(&image_path);
            command.args(overlay.then_some("-overlay")).args(inline.then_some("-inline"));
            let output = command.output().expect("the tool runs");
            let case = format!("seed {seed}, overlay {overlay}, inline {inline}");
            match (output.status.success(), ours(&tar, profile)) {
                (true, Ok(image)) => {
                    assert!(fs::read(&image_path).expect("an image") == image, "{case}: other bytes");
                    same += 1;
                }
                (false, Ok(_)) => panic!("{case}: only the tool refuses: {}", String::from_utf8_lossy(&output.stderr)),
                (true, Err(e)) => {
                    assert!(
                        matches!(e, DiffError::Image { source: Ext4Error::Unsupported { .. }, .. }),
                        "{case}: {}",
                        text(&e)
                    );
                    let text = text(&e);
                    let reason = text.split("into the image: ").nth(1).unwrap_or(&text);
                    let reason: String = reason.chars().filter(|c| !c.is_ascii_digit()).collect();
                    *refused.entry(reason).or_default() += 1;
                }
                (false, Err(e)) => {
                    both += 1;
                    if env::var_os("LCOW_TAR2EXT4_VERBOSE").is_some() {
                        println!("{case}: {} | {}", String::from_utf8_lossy(&output.stderr).trim(), text(&e));
                    }
                }
            }
        }
    }
    println!("{same} images are the same, {both} tars are refused by both; by this project only: {refused:#?}");
    assert!(same * 4 > count, "too few images to say anything");
}
