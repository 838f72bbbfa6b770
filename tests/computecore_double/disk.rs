//! Disks of a machine: what Hyper-V would refuse is refused, and what is taken becomes a raw file for the agent.

use super::Fault;
use disk_io::{ReadAt, WriteAt};
use lcow_sys::windows::{
    fs::{attributes, has_writers},
    pipe::{Instance, create_server},
    security::SecurityDescriptor,
};
use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};
use vhd_image::{
    vhd::{FOOTER_SIZE, Footer},
    vhdx::{Vhdx, VhdxWriter},
};

/// Sparse, compressed or encrypted.
const NOT_PLAIN: u32 = 0xC03A_001A;
/// `FILE_ATTRIBUTE_…` of files that Hyper-V does not attach.
const REFUSED: [(u32, &str); 3] = [(0x200, "sparse"), (0x800, "compressed"), (0x4000, "encrypted")];
const SHARING: u32 = 0x8007_0020;
const CORRUPT: u32 = 0xC03A_0002;
const PIECE: usize = 1 << 20;

/// A path as it is compared.
pub(crate) fn plain(path: &Path) -> PathBuf {
    let text = path.to_string_lossy().to_lowercase();
    PathBuf::from(text.strip_prefix(r"\\?\").unwrap_or(&text))
}

pub(crate) struct Disk {
    path: PathBuf,
    writable: bool,
    /// Held open, as the machine's process holds it.
    _held: File,
}

fn io(what: &Path) -> impl Fn(io::Error) -> Fault {
    move |e| Fault(0x8007_0000 | e.raw_os_error().unwrap_or(0x1f) as u32, format!("{}: {e}", what.display()))
}

impl Disk {
    /// Opens a disk as a machine would and lays its bytes out at `raw`; it is taken to have the attributes `also`, too.
    pub(crate) fn lend(path: &Path, read_only: bool, raw: &Path, also: u32) -> Result<Self, Fault> {
        let file = File::options().read(true).write(!read_only).open(path).map_err(io(path))?;
        let found = attributes(&file).map_err(io(path))? | also;
        if let Some((_, what)) = REFUSED.iter().find(|(bit, _)| found & bit != 0) {
            return Err(Fault(NOT_PLAIN, format!("{} is {what}", path.display())));
        }
        let reader = File::open(path).map_err(io(path))?;
        drop(file);
        if has_writers(&reader).map_err(io(path))? {
            return Err(Fault(SHARING, format!("{} is open for writing elsewhere", path.display())));
        }
        let out = File::options().read(true).write(true).create_new(true).open(raw).map_err(io(raw))?;
        let corrupt = |e: &dyn std::fmt::Display| Fault(CORRUPT, format!("{}: {e}", path.display()));
        match path.extension().and_then(OsStr::to_str) {
            Some("vhd") => {
                let len = ReadAt::size(&reader).map_err(io(path))?;
                let end = len.checked_sub(FOOTER_SIZE as u64).ok_or_else(|| corrupt(&"too short"))?;
                let mut bytes = [0; FOOTER_SIZE];
                reader.read_exact_at(&mut bytes, end).map_err(io(path))?;
                let footer = Footer::parse(&bytes).map_err(|e| corrupt(&e))?;
                if footer.disk_bytes != end || !read_only {
                    return Err(corrupt(&"not the footer of this file, or lent for writing"));
                }
                out.set_len(end).map_err(io(raw))?;
                copy(&reader, &out, std::slice::from_ref(&(0..end))).map_err(io(raw))?;
            }
            Some("vhdx") => {
                let vhdx = Vhdx::open(&reader).map_err(|e| corrupt(&e))?;
                let ranges = vhdx.allocated();
                if read_only {
                    out.set_len(vhdx.geometry().disk_bytes).map_err(io(raw))?;
                }
                copy(&vhdx, &out, &ranges).map_err(io(raw))?;
            }
            _ => return Err(corrupt(&"Hyper-V knows a disk by .vhd or .vhdx")),
        }
        Ok(Self { path: path.to_owned(), writable: !read_only, _held: reader })
    }

    /// Takes it away: what was written goes where the machine would have written it.
    pub(crate) fn give_back(self, raw: &Path) -> Result<(), Fault> {
        if self.writable {
            let written = File::open(raw).map_err(io(raw))?;
            let file = File::options().read(true).write(true).open(&self.path).map_err(io(&self.path))?;
            let vhdx = VhdxWriter::open(file).map_err(|e| Fault(CORRUPT, e.to_string()))?;
            let end = ReadAt::size(&written).map_err(io(raw))?;
            copy(&written, &vhdx, std::slice::from_ref(&(0..end)))
                .and_then(|()| vhdx.sync())
                .map_err(io(&self.path))?;
        }
        // The agent has let go of it; if not, the test should see it.
        fs::remove_file(raw).map_err(io(raw))
    }
}

fn copy(from: &impl ReadAt, to: &impl WriteAt, ranges: &[std::ops::Range<u64>]) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let n = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
            from.read_exact_at(&mut buffer[..n], at)?;
            // Zeros are not written: a disk of zeros has no block.
            if buffer[..n].iter().any(|b| *b != 0) {
                to.write_all_at(&buffer[..n], at)?;
            }
            at += n as u64;
        }
    }
    Ok(())
}

/// The serial console: the machine's process is the pipe's server.
pub(crate) fn serve_console(name: &str, mut from: impl Read + Send + 'static) {
    let name = name.to_owned();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut pipe = runtime.block_on(async {
            let descriptor = SecurityDescriptor::parse("D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW)").unwrap();
            create_server(OsStr::new(&name), Instance::First, &descriptor).unwrap()
        });
        let _ = runtime.block_on(pipe.connect());
        let mut buffer = [0; 1024];
        while let Ok(n) = from.read(&mut buffer) {
            if n == 0
                || runtime.block_on(tokio::io::AsyncWriteExt::write_all(&mut pipe, &buffer[..n])).is_err()
            {
                return;
            }
        }
    });
}
