//! Foreign disk formats, recognized by their first or last bytes: they are not read, and never treated as raw disks.
//!
//! ```text
//!   head of the file, its last sector ─► a format's name, and the command that makes a raw disk from it
//! ```
//!
//! Source: the probes of QEMU's block drivers, `file`'s magic. Called by `image`.

use super::failure::shown;
use std::path::Path;

/// Bytes of a file's head that distinguish the formats.
pub(super) const HEAD: usize = 512;
/// Bytes at a file's end that identify a format: the last sector.
pub(super) const TAIL: usize = 512;

/// A format, the offset of its mark, and the command that makes a raw disk from it; `IN` stands for the file.
#[derive(Debug)]
struct Format {
    name: &'static str,
    at: usize,
    mark: &'static [u8],
    command: &'static str,
}

const fn format(name: &'static str, at: usize, mark: &'static [u8], command: &'static str) -> Format {
    Format { name, at, mark, command }
}

const QCOW: &str = "qemu-img convert -f qcow -O raw IN OUT.img";
const QCOW2: &str = "qemu-img convert -f qcow2 -O raw IN OUT.img";
const VMDK: &str = "qemu-img convert -f vmdk -O raw IN OUT.img";
const PARALLELS: &str = "qemu-img convert -f parallels -O raw IN OUT.img";
const DMG: &str = "qemu-img convert -f dmg -O raw IN OUT.img";

const BY_HEAD: &[Format] = &[
    format("qcow", 0, b"QFI\xfb\0\0\0\x01", QCOW),
    format("qcow2", 0, b"QFI\xfb", QCOW2),
    format("QED", 0, b"QED\0", "qemu-img convert -f qed -O raw IN OUT.img"),
    format("VMDK", 0, b"KDMV", VMDK),
    format("VMDK", 0, b"COWD", VMDK),
    format("VMDK", 0, b"\xbe\xba\xfe\xca\0\0\0\0", VMDK),
    format("VMDK", 0, b"# Disk DescriptorFile", VMDK),
    format("VDI", 64, b"\x7f\x10\xda\xbe", "qemu-img convert -f vdi -O raw IN OUT.img"),
    format("Parallels disk", 0, b"WithoutFreeSpace", PARALLELS),
    format("Parallels disk", 0, b"WithouFreSpacExt", PARALLELS),
    format("Bochs disk", 0, b"Bochs Virtual HD Image", "qemu-img convert -f bochs -O raw IN OUT.img"),
    format("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n", "qemu-img convert -f cloop -O raw IN OUT.img"),
    format("DMG", 0, b"koly\0\0\0\x04", DMG),
    format("encrypted DMG", 0, b"encrcdsa", "hdiutil convert IN -format UDTO -o OUT` (on macOS) `"),
    format("LUKS", 0, b"LUKS\xba\xbe", "cryptsetup open IN NAME && dd if=/dev/mapper/NAME of=OUT.img bs=1M"),
    format("Expert Witness (E01)", 0, b"EVF\x09\x0d\x0a\xff\0", "ewfexport -f raw -t OUT IN"),
    format("gzip", 0, b"\x1f\x8b\x08", "gzip -dc IN >OUT.img"),
    format("xz", 0, b"\xfd7zXZ\0", "xz -dc IN >OUT.img"),
    format("bzip2", 0, b"BZh", "bzip2 -dc IN >OUT.img"),
    format("zstd", 0, b"\x28\xb5\x2f\xfd", "zstd -dc IN >OUT.img"),
    format("lz4", 0, b"\x04\x22\x4d\x18", "lz4 -dc IN >OUT.img"),
    format("zip", 0, b"PK\x03\x04", "unzip -p IN >OUT.img"),
    format("7z", 0, b"7z\xbc\xaf\x27\x1c", "7z x -so IN >OUT.img"),
    format("tar", 257, b"ustar", "tar -xf IN` or, if it is a layer, `lcow-graphdriver layer pack IN OUT.vhd"),
];
/// Formats with their mark in the last sector.
const BY_TAIL: &[Format] = &[
    format("DMG", 0, b"koly\0\0\0\x04", DMG),
    format("encrypted DMG", TAIL - 8, b"cdsaencr", "hdiutil convert IN -format UDTO -o OUT` (on macOS) `"),
];

/// The format that a head, or a tail of [`TAIL`] bytes, identifies.
fn known(bytes: &[u8], formats: &'static [Format]) -> Option<&'static Format> {
    formats.iter().find(|f| bytes.get(f.at..).is_some_and(|rest| rest.starts_with(f.mark)))
}

/// Why a file is not a raw disk, judged by its head and its last sector, and what to do; `None` if it may be one.
pub(super) fn refusal(path: &Path, head: &[u8], tail: &[u8]) -> Option<String> {
    let format = known(head, BY_HEAD).or_else(|| known(tail, BY_TAIL))?;
    let quoted = format!("'{}'", path.display());
    let command = format.command.replace("IN", &quoted);
    Some(format!(
        "{} is {}, which is not supported; make a raw disk from it with `{command}`",
        shown(path),
        format.name
    ))
}

/// Why the disk in a VHD or VHDX is not read, judged by its head. Tools that guess formats would treat a raw copy of it
/// as that format, whose header may name any file of the host.
pub(super) fn refusal_inside(path: &Path, head: &[u8]) -> Option<String> {
    let format = known(head, BY_HEAD)?;
    Some(format!(
        "the disk in {} begins like {}; it is not read, because tools that guess formats would misinterpret a copy of it",
        shown(path),
        format.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_known_and_its_command_names_the_file() {
        for format in BY_HEAD.iter().chain(BY_TAIL) {
            assert!(format.at + format.mark.len() <= HEAD && format.command.contains("IN"), "{format:?}");
        }
        let mut head = vec![0; HEAD];
        for format in BY_HEAD {
            head.fill(0);
            head[format.at..format.at + format.mark.len()].copy_from_slice(format.mark);
            let said = refusal(Path::new("a b.img"), &head, &[]).unwrap();
            assert!(
                said.contains(&format!("is {}, which", format.name)) && said.contains("'a b.img'"),
                "{said}"
            );
            assert!(refusal_inside(Path::new("x"), &head).unwrap().contains(format.name));
        }
        head.fill(0);
        assert_eq!(refusal(Path::new("x"), &head, &head), None);
        head[..4].copy_from_slice(b"koly");
        head[7] = 4;
        assert!(refusal(Path::new("x"), &[0; HEAD], &head).unwrap().contains("is DMG, which"));
        // A short file is no reason to fail.
        assert_eq!(refusal(Path::new("x"), b"QF", b""), None);
    }
}
