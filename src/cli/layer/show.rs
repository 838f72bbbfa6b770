//! `layer inspect` and `layer ls`: the contents of an image. Called by `cli::layer`.

use super::{
    InspectArgs, LsArgs,
    failure::failed,
    image::{Container, Disk, Image, fs_bytes, kind, resolve},
    input,
};
use crate::cli::{
    CliError,
    listing::{date, escaped, permissions},
    output::{print, print_json},
};
use bytesize::ByteSize;
use ext4_image::{Ext4, Ext4Error, FileKind, Inode};
use layer_codec::{
    LayerKind, RootHash, TarDigest,
    record::{self, RecordInfo},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    fs::File,
    path::Path,
    process::ExitCode,
};
use uuid::Uuid;
use verity_tree;
use vhd_image::vhd::Footer;

/// The output of `inspect`; sizes in bytes.
#[derive(Debug, Serialize)]
struct Inspection {
    file_bytes: u64,
    /// `layer` or `sandbox`.
    kind: &'static str,
    vhd: Option<VhdFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vhdx: Option<VhdxFacts>,
    ext4: Ext4Facts,
    counts: Counts,
    #[serde(skip_serializing_if = "Option::is_none")]
    verity: Option<VerityFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<RecordFacts>,
}

#[derive(Debug, Serialize)]
struct VerityFacts {
    root_hash: RootHash,
    /// Offset of its super block on the disk, in bytes: `veritysetup --hash-offset`.
    hash_offset: u64,
    data_blocks: u64,
    uuid: Uuid,
}

#[derive(Debug, Serialize)]
struct VhdFacts {
    disk_bytes: u64,
    uuid: Uuid,
    /// Seconds since 2000.
    timestamp: u32,
    /// Block size of a dynamic disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    block_bytes: Option<u64>,
}

impl VhdFacts {
    fn new(footer: &Footer, block_bytes: Option<u64>) -> Self {
        let uuid = Uuid::from_bytes(footer.uuid);
        Self { disk_bytes: footer.disk_bytes, uuid, timestamp: footer.timestamp, block_bytes }
    }
}

#[derive(Debug, Serialize)]
struct VhdxFacts {
    disk_bytes: u64,
    block_size: u32,
    logical_sector: u32,
    physical_sector: u32,
    disk_id: Uuid,
    fixed: bool,
}

#[derive(Debug, Serialize)]
struct Ext4Facts {
    uuid: Uuid,
    bytes: u64,
    block_size: u32,
    blocks: u64,
    groups: u32,
    inode_size: u16,
    inodes: u32,
    features: Vec<String>,
}

/// Contents of the tree; a hard-linked inode counts once.
#[derive(Debug, Default, Serialize)]
struct Counts {
    names: u64,
    directories: u64,
    opaque_directories: u64,
    files: u64,
    /// Sum of the sizes of regular files.
    file_bytes: u64,
    hard_links: u64,
    symlinks: u64,
    devices: u64,
    whiteouts: u64,
    fifos: u64,
    sockets: u64,
    xattrs: u64,
}

#[derive(Debug, Serialize)]
struct RecordFacts {
    record_bytes: u64,
    tar_bytes: u64,
    tar_digest: TarDigest,
    image_bytes: u64,
    frames: u64,
}

impl From<RecordInfo> for RecordFacts {
    fn from(info: RecordInfo) -> Self {
        Self {
            record_bytes: info.record_bytes,
            tar_bytes: info.tar_bytes,
            tar_digest: info.tar_digest,
            image_bytes: info.image_bytes,
            frames: info.frames,
        }
    }
}

pub(super) fn open_record(path: &Path) -> Result<(File, RecordInfo), CliError> {
    let file = input::open_file(path).map_err(|e| failed("open", path, &e))?;
    let info = record::inspect(&file).map_err(|e| failed("read the exact record", path, &e))?;
    Ok((file, info))
}

/// Walks the whole tree. A directory is entered once, however often a broken image names it.
fn count(fs: &Ext4<Disk>) -> Result<Counts, Ext4Error> {
    let mut counts = Counts::default();
    let mut seen = HashSet::from([fs.root()]);
    let mut todo = vec![fs.root()];
    while let Some(ino) = todo.pop() {
        let dir = fs.inode(ino)?;
        counts.directories += 1;
        let xattrs = fs.xattrs(&dir)?;
        counts.xattrs += xattrs.len() as u64;
        counts.opaque_directories +=
            u64::from(xattrs.iter().any(|x| x.name == b"trusted.overlay.opaque" && x.value == b"y"));
        let entries = fs.read_dir(&dir)?;
        counts.names += entries.len() as u64;
        for entry in entries {
            if !seen.insert(entry.ino) {
                counts.hard_links += 1;
                continue;
            }
            let inode = fs.inode(entry.ino)?;
            if inode.kind == FileKind::Directory {
                todo.push(entry.ino);
                continue;
            }
            counts.xattrs += fs.xattrs(&inode)?.len() as u64;
            let counter = match inode.kind {
                FileKind::File => {
                    counts.file_bytes = counts.file_bytes.saturating_add(inode.size);
                    &mut counts.files
                }
                FileKind::Symlink => &mut counts.symlinks,
                FileKind::CharDevice if inode.is_whiteout() => &mut counts.whiteouts,
                FileKind::CharDevice | FileKind::BlockDevice => &mut counts.devices,
                FileKind::Fifo => &mut counts.fifos,
                FileKind::Socket | FileKind::Directory => &mut counts.sockets,
            };
            *counter += 1;
        }
    }
    Ok(counts)
}

pub(super) fn inspect(args: &InspectArgs) -> Result<ExitCode, CliError> {
    let image = Image::open(&args.image)?;
    let fs = image.ext4()?;
    let about = |e: Ext4Error| failed("read", &args.image, &e);
    let geometry = fs.geometry();
    let record = args.record.as_deref().map(open_record).transpose()?;
    let inspection = Inspection {
        file_bytes: image.file_bytes,
        kind: match kind(&fs).map_err(about)? {
            LayerKind::Applied => "layer",
            LayerKind::Sandbox | LayerKind::Scratch(_) => "sandbox",
        },
        vhd: match &image.container {
            Container::Vhd(footer) => Some(VhdFacts::new(footer, None)),
            Container::DynamicVhd { footer, block_bytes } => Some(VhdFacts::new(footer, Some(*block_bytes))),
            _ => None,
        },
        vhdx: match &image.container {
            Container::Vhdx(g) => Some(VhdxFacts {
                disk_bytes: g.disk_bytes,
                block_size: g.block_size,
                logical_sector: g.logical_sector,
                physical_sector: g.physical_sector,
                disk_id: g.disk_id,
                fixed: g.fixed,
            }),
            _ => None,
        },
        ext4: Ext4Facts {
            uuid: Uuid::from_bytes(geometry.uuid),
            bytes: fs_bytes(&fs),
            block_size: geometry.block_size,
            blocks: geometry.blocks_count,
            groups: geometry.groups,
            inode_size: geometry.inode_size,
            inodes: geometry.inodes_count,
            features: geometry.feature_names(),
        },
        counts: count(&fs).map_err(about)?,
        verity: verity_facts(&image, &fs)?,
        record: record.map(|(_, info)| info.into()),
    };
    if args.json {
        print_json(&inspection)?;
    } else {
        print(&inspection_text(&inspection))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn verity_facts(image: &Image, fs: &Ext4<Disk>) -> Result<Option<VerityFacts>, CliError> {
    let about = |e| failed("read", &image.path, &e);
    let Some(superblock) = verity_tree::find(&image.disk, fs_bytes(fs)).map_err(about)? else {
        return Ok(None);
    };
    Ok(Some(VerityFacts {
        root_hash: RootHash(verity_tree::root(&image.disk, &superblock).map_err(about)?),
        hash_offset: superblock.offset,
        data_blocks: superblock.data_blocks,
        uuid: Uuid::from_bytes(superblock.uuid),
    }))
}

fn inspection_text(i: &Inspection) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<12}{value}");
    };
    line("file", format!("{} ({} bytes), {}", ByteSize(i.file_bytes), i.file_bytes, i.kind));
    line(
        "vhd",
        match (&i.vhd, &i.vhdx) {
            (Some(v), _) => {
                let kind = v
                    .block_bytes
                    .map_or("fixed".to_owned(), |b| format!("dynamic, blocks of {}", ByteSize(b)));
                format!("{kind}, disk of {} bytes, uuid {}", v.disk_bytes, v.uuid)
            }
            (_, Some(v)) => format!(
                "vhdx, {}, disk of {} bytes, blocks of {}, sectors of {}, id {}",
                if v.fixed { "fixed" } else { "dynamic" },
                v.disk_bytes,
                ByteSize(v.block_size.into()),
                v.logical_sector,
                v.disk_id
            ),
            _ => "no footer: a bare image".to_owned(),
        },
    );
    let e = &i.ext4;
    line("uuid", e.uuid.to_string());
    line("ext4", format!("{} blocks of {} bytes in {} groups", e.blocks, e.block_size, e.groups));
    line("inodes", format!("{} of {} bytes", e.inodes, e.inode_size));
    line("features", e.features.join(" "));
    let c = &i.counts;
    line(
        "holds",
        format!(
            "{} names: {} directories, {} files of {}",
            c.names,
            c.directories,
            c.files,
            ByteSize(c.file_bytes)
        ),
    );
    line(
        "",
        [
            ("additional names of files", c.hard_links),
            ("symbolic links", c.symlinks),
            ("devices", c.devices),
            ("pipes", c.fifos),
            ("sockets", c.sockets),
            ("whiteouts", c.whiteouts),
            ("opaque directories", c.opaque_directories),
            ("extended attributes", c.xattrs),
        ]
        .map(|(name, n)| format!("{n} {name}"))
        .join(", "),
    );
    if let Some(v) = &i.verity {
        line("verity", format!("{}, {} blocks, hash offset {}", v.root_hash, v.data_blocks, v.hash_offset));
    }
    if let Some(r) = &i.record {
        line("record", format!("{} in {} frames", ByteSize(r.record_bytes), r.frames));
        line("tar", format!("{} bytes, {}", r.tar_bytes, r.tar_digest));
    }
    text
}

/// An entry as `ls` lists it.
#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    inode: u32,
    /// Octal digits.
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    links: u16,
    mtime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<(u32, u32)>,
    whiteout: bool,
    /// Values as text with escapes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
}

fn listed(fs: &Ext4<Disk>, name: &[u8], inode: &Inode) -> Result<Listed, Ext4Error> {
    let is_device = matches!(inode.kind, FileKind::CharDevice | FileKind::BlockDevice);
    let target = (inode.kind == FileKind::Symlink).then(|| fs.symlink_target(inode)).transpose()?;
    Ok(Listed {
        name: escaped(name),
        kind: match inode.kind {
            FileKind::File => "file",
            FileKind::Directory => "directory",
            FileKind::Symlink => "symlink",
            FileKind::CharDevice => "char-device",
            FileKind::BlockDevice => "block-device",
            FileKind::Fifo => "fifo",
            FileKind::Socket => "socket",
        },
        inode: inode.ino,
        mode: format!("{:04o}", inode.mode & 0o7777),
        uid: inode.uid,
        gid: inode.gid,
        size: inode.size,
        links: inode.links,
        mtime: date(inode.mtime.secs),
        target: target.as_deref().map(escaped),
        device: is_device.then_some(inode.rdev),
        whiteout: inode.is_whiteout(),
        xattrs: fs.xattrs(inode)?.iter().map(|x| (escaped(&x.name), escaped(&x.value))).collect(),
    })
}

pub(super) fn ls(args: &LsArgs) -> Result<ExitCode, CliError> {
    let image = Image::open(&args.image)?;
    let fs = image.ext4()?;
    let about = |e: CliError| failed(&format!("list '{}' of", args.path), &args.image, &*e);
    let rows = list(&fs, args.path.as_bytes(), args.long || args.json).map_err(about)?;
    if args.json {
        let rows: Vec<&Listed> = rows.iter().map(|(_, row, _)| row).collect();
        print_json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for (_, row, mode) in &rows {
        if args.long {
            let size = match row.device {
                Some((major, minor)) => format!("{major}, {minor}"),
                None => row.size.to_string(),
            };
            let _ = write!(
                text,
                "{} {:>3} {:>5} {:>5} {size:>10} {} ",
                permissions(*mode),
                row.links,
                row.uid,
                row.gid,
                row.mtime
            );
        }
        text += &row.name;
        if let (true, Some(target)) = (args.long, &row.target) {
            let _ = write!(text, " -> {target}");
        }
        text.push('\n');
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Name, facts and mode of each entry, sorted by name.
type Rows = Vec<(Vec<u8>, Listed, u16)>;

fn list(fs: &Ext4<Disk>, path: &[u8], long: bool) -> Result<Rows, CliError> {
    let inode = resolve(fs, path, false)?;
    if inode.kind != FileKind::Directory {
        return Ok(vec![(path.to_vec(), listed(fs, path, &inode)?, inode.mode)]);
    }
    let mut rows = Vec::new();
    for entry in fs.read_dir(&inode)? {
        // Without -l the inodes need not be read, and a broken one does not hide its neighbors.
        let node = if long { fs.inode(entry.ino)? } else { inode.clone() };
        let row = if long { listed(fs, &entry.name, &node)? } else { bare(&entry.name, &node) };
        rows.push((entry.name, row, node.mode));
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(rows)
}

/// A row of which only the name is used.
fn bare(name: &[u8], inode: &Inode) -> Listed {
    Listed {
        name: escaped(name),
        kind: "",
        inode: inode.ino,
        mode: String::new(),
        uid: 0,
        gid: 0,
        size: 0,
        links: 0,
        mtime: String::new(),
        target: None,
        device: None,
        whiteout: false,
        xattrs: BTreeMap::new(),
    }
}
