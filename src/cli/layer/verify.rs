//! `layer verify`: is an image what was written?
//!
//! ```text
//!   metadata ── strict check │ around the file system ── zeros │ footer ── that of a layer │ every block ── hash tree, if there is one │ every byte of the tar ── exact record, if given
//! ```

use super::{
    VerifyArgs,
    failure::{failed, shown},
    image::{Container, Image, fs_bytes},
    input,
    output::Counted,
    show::open_record,
};
use crate::cli::{
    CliError,
    output::{print, print_json},
};
use ext4_image::check::{CheckLimits, check};
use layer_codec::{RootHash, TarDigest, record};
use serde::Serialize;
use std::{fmt::Write as _, io, process::ExitCode};
use svm_agent::damage;
use uuid::Uuid;
use verity_tree;
use vhd_image::vhd;

/// What `verify` found.
#[derive(Debug, Serialize)]
struct Verified {
    sound: bool,
    uuid: Uuid,
    inodes: u64,
    directories: u64,
    blocks_used: u64,
    /// The hash tree that every block was checked against.
    #[serde(skip_serializing_if = "Option::is_none")]
    verity: Option<Tree>,
    /// The verified digest; only with a record.
    #[serde(skip_serializing_if = "Option::is_none")]
    tar_digest: Option<TarDigest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tar_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Tree {
    root_hash: RootHash,
    data_blocks: u64,
}

pub(super) fn verify(args: &VerifyArgs) -> Result<ExitCode, CliError> {
    let image = Image::open(&args.image)?;
    if image.kind()?.is_sandbox() {
        return Err(format!(
            "{} is a sandbox; only images made by `layer pack` or ApplyDiff can be verified (try `e2fsck -fn`)",
            shown(&args.image)
        )
        .into());
    }
    // The tree is checked first: it can name the damaged file, while the metadata check only finds that something is
    // wrong.
    let tree = verify_tree(args, &image)?;
    let report =
        check(image.disk.clone(), CheckLimits::default()).map_err(|e| failed("verify", &args.image, &e))?;
    verity_tree::check_around(&image.disk, report.image_bytes, tree.is_some())
        .map_err(|e| failed("verify", &args.image, &e))?;
    if let Container::Vhd(footer) = image.container {
        // Both are accepted: `layer convert` gives an image of profile hcsshim the default footer.
        let ours = [footer.to_bytes(), footer.to_bytes_hcsshim()];
        if footer.timestamp != 0
            || image.footer.is_none_or(|found| !ours.contains(&found))
            || footer.disk_bytes + vhd::FOOTER_SIZE as u64 != image.file_bytes
        {
            return Err(format!("{}: its vhd footer is not that of a layer", shown(&args.image)).into());
        }
    }
    let replayed = match &args.record {
        None => None,
        Some(path) => {
            let (record, info) = open_record(path)?;
            let bar = input::bar(Some(info.tar_bytes));
            let result = record::replay(&image.disk, &record, Counted { out: io::sink(), bar: &bar });
            bar.finish_and_clear();
            Some(result.map_err(|e| failed("verify", &args.image, &e))?)
        }
    };
    let verified = Verified {
        sound: true,
        uuid: Uuid::from_bytes(report.uuid),
        inodes: report.inodes,
        directories: report.directories,
        blocks_used: report.blocks_used,
        verity: tree,
        tar_digest: replayed.map(|r| r.tar_digest),
        tar_bytes: replayed.map(|r| r.tar_bytes),
    };
    if args.json {
        print_json(&verified)?;
    } else {
        print(&text(args, &verified))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn verify_tree(args: &VerifyArgs, image: &Image) -> Result<Option<Tree>, CliError> {
    let fs = image.ext4()?;
    let about = |e| failed("verify", &args.image, &e);
    let Some(superblock) = verity_tree::find(&image.disk, fs_bytes(&fs)).map_err(about)? else {
        return match args.root_hash {
            None => Ok(None),
            Some(_) => Err(format!("{} has no hash tree", shown(&args.image)).into()),
        };
    };
    let bar = input::bar(Some(superblock.offset));
    let report = verity_tree::check(&image.disk, &superblock, &mut |at| bar.set_position(at));
    bar.finish_and_clear();
    let report = report.map_err(about)?;
    if !report.is_sound() {
        return Err(format!("{} is damaged: {}", shown(&args.image), damage(&fs, &report)).into());
    }
    let root_hash = RootHash(report.root);
    match args.root_hash {
        Some(expected) if expected != root_hash => Err(format!(
            "{} is sound but not the expected image: its root hash is {root_hash}",
            shown(&args.image)
        )
        .into()),
        _ => Ok(Some(Tree { root_hash, data_blocks: report.data_blocks })),
    }
}

fn text(args: &VerifyArgs, verified: &Verified) -> String {
    let mut text = format!(
        "{}: metadata sound, {} inodes, {} directories, {} blocks used, uuid {}\n",
        shown(&args.image),
        verified.inodes,
        verified.directories,
        verified.blocks_used,
        verified.uuid
    );
    // Writing to a String cannot fail.
    if let Some(tree) = &verified.verity {
        let _ =
            writeln!(text, "all {} blocks match the hash tree, root {}", tree.data_blocks, tree.root_hash);
    }
    if let (Some(bytes), Some(digest)) = (verified.tar_bytes, verified.tar_digest) {
        let _ = writeln!(text, "its tar of {bytes} bytes is intact, {digest}");
    } else if verified.verity.is_none() {
        text.push_str(
            "file data was not checked; that needs a hash tree (pack --verity) or the exact record (--record)\n",
        );
    }
    text
}
