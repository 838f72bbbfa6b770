//! Profile `hcsshim` held to hcsshim's `tar2ext4`: by hashes of what that tool made, and against the tool itself.

#[path = "../apply/tree.rs"]
mod tree;

mod better;
mod corpus;
mod image;
mod kernel;
mod refused;
mod tars;
mod tool;

use corpus::CASES;
use ext4_image::{
    check::{CheckLimits, check},
    hcsshim::{DEFAULT_MAX_DISK, LCOW_MAX_DISK},
};
use image::{hcsshim, text};
use layer_codec::apply::HcsshimProfile;

fn profile(max_disk: u64, overlay: bool, inline: bool) -> HcsshimProfile {
    HcsshimProfile {
        max_disk_bytes: max_disk,
        inline_data: inline,
        convert_whiteouts: overlay,
        convert_backslashes: false,
    }
}

#[test]
fn images_and_root_hashes_are_those_of_the_tool() {
    for case in CASES {
        let tar = (case.tar)();
        for (max_disk, golden) in [DEFAULT_MAX_DISK, LCOW_MAX_DISK].into_iter().zip(case.golden) {
            let mut image = hcsshim(&tar, profile(max_disk, case.overlay, case.inline))
                .unwrap_or_else(|e| panic!("{}: {}", case.name, text(&e)));
            check(&image.file, CheckLimits::default()).unwrap_or_else(|e| panic!("{}: {e}", case.name));
            assert_eq!(image.e2fsck(), Vec::<String>::new(), "{}", case.name);
            let found = image.digests();
            let found = (found.image.as_str(), found.root.as_str(), found.rest.as_str());
            assert_eq!(found, golden, "{}, {max_disk}", case.name);
            assert_eq!(image.summary.verity_root.map(|root| root.to_string()).as_deref(), Some(golden.1));
        }
    }
}
