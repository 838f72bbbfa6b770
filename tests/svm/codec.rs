//! A codec that makes channels, jail and pool visible without a file system: an image is the tar itself.

use disk_io::{ReadAt, StreamOut, WriteAt};
use std::io;
use svm_agent::{
    codec::{AttachedLayer, CanonicalTar, ChangeSink, Codec, Growing, Live, Lowers, Parent, TarInput},
    disk::OpDisk,
};
use svm_protocol::{
    ApplyOptions, ApplySummary, BlankRoot, Change, ChangeKind, CheckSummary, ErrorKind, ExportSummary,
    IdMaps, WireError,
};

/// Magic first bytes of a "tar" make the codec misbehave.
pub(crate) struct TestCodec;

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(e: io::Error) -> WireError {
    WireError::new(ErrorKind::Io, e.to_string())
}

fn copy_out(disk: &OpDisk, out: &mut dyn StreamOut) -> Result<u64, WireError> {
    let size = disk.size().map_err(failed)?;
    let (mut buf, mut at) = (vec![0; 256 << 10], 0);
    while at < size {
        let n = disk.read_at(&mut buf, at).map_err(failed)?;
        if n == 0 {
            break;
        }
        out.write_all(&buf[..n]).map_err(failed)?;
        at += n as u64;
    }
    Ok(at)
}

impl Codec for TestCodec {
    fn apply(
        &self,
        input: TarInput<'_>,
        image: OpDisk,
        record: OpDisk,
        _: Option<OpDisk>,
        lowers: &mut dyn Lowers,
        _: &mut dyn Growing,
        options: &ApplyOptions,
    ) -> Result<ApplySummary, WireError> {
        let (mut buf, mut at, mut asks) = (vec![0; 256 << 10], 0u64, false);
        loop {
            let n = input.bytes.read(&mut buf).map_err(failed)?;
            if n == 0 {
                break;
            }
            if at == 0 {
                match &buf[..n.min(5)] {
                    b"panic" => panic!("on request"),
                    b"crash" => std::process::abort(),
                    b"below" => asks = true,
                    b"bad!!" => return Err(WireError::new(ErrorKind::Corrupt, "entry x at offset 0: bad")),
                    _ => {}
                }
            }
            if at + n as u64 > options.max_image_bytes {
                return Err(WireError::new(ErrorKind::Limit, "too large"));
            }
            image.write_all_at(&buf[..n], at).map_err(failed)?;
            at += n as u64;
        }
        record.write_all_at(b"record", 0).map_err(failed)?;
        let mut below = 0;
        if asks {
            for _ in 0..lowers.count() {
                below += lowers.next()?.disk.size().map_err(failed)?;
            }
        }
        Ok(ApplySummary {
            image_bytes: at,
            tar_bytes: at,
            entries: lowers.count() as u64,
            diff_size: below,
            lower_links: if asks { lowers.count() as u64 } else { 0 },
            ..ApplySummary::default()
        })
    }

    fn check(&self, image: OpDisk, _: bool, _: u32, _: &IdMaps) -> Result<CheckSummary, WireError> {
        if image.write_at(b"x", 0).is_ok() {
            return Err(WireError::new(ErrorKind::Internal, "a read-only disk took a write"));
        }
        Ok(CheckSummary { blocks: image.size().map_err(failed)?, ..CheckSummary::default() })
    }

    fn export_exact(
        &self,
        image: OpDisk,
        _: OpDisk,
        _: bool,
        out: &mut dyn StreamOut,
    ) -> Result<ExportSummary, WireError> {
        let tar_bytes = copy_out(&image, out)?;
        let mut head = [0; 5];
        let n = image.read_at(&mut head, 0).map_err(failed)?;
        match &head[..n] {
            b"later" => Err(WireError::new(ErrorKind::Corrupt, "digest differs")),
            b"died!" => {
                let _ = out.flush();
                std::process::abort()
            }
            _ => Ok(ExportSummary { tar_bytes, ..ExportSummary::default() }),
        }
    }

    fn export_canonical(
        &self,
        target: Vec<AttachedLayer>,
        _: Parent,
        _: &CanonicalTar,
        live: Option<&mut dyn Live>,
        out: &mut dyn StreamOut,
    ) -> Result<ExportSummary, WireError> {
        if let Some(live) = live {
            let mut head = [0; 5];
            let n = target[0].disk.read_at(&mut head, 0).map_err(failed)?;
            loop {
                live.metadata_read()?;
                live.before_recheck()?;
                if &head[..n] != b"again" {
                    break;
                }
            }
            live.metadata_read()?;
        }
        // Endless, so that only a cancel ends it.
        loop {
            copy_out(&target[0].disk, out)?;
        }
    }

    fn written(
        &self,
        _: Vec<AttachedLayer>,
        _: BlankRoot,
        live: Option<&mut dyn Live>,
    ) -> Result<bool, WireError> {
        if let Some(live) = live {
            live.metadata_read()?;
        }
        Ok(true)
    }

    fn changes(
        &self,
        target: Vec<AttachedLayer>,
        _: Parent,
        live: Option<&mut dyn Live>,
        sink: ChangeSink<'_>,
    ) -> Result<(), WireError> {
        if let Some(live) = live {
            live.metadata_read()?;
        }
        for n in 0..target[0].disk.size().map_err(failed)? {
            sink(&Change { path: format!("/path/{n}").into_bytes(), kind: ChangeKind::Added })?;
        }
        Ok(())
    }

    fn diff_size(
        &self,
        target: Vec<AttachedLayer>,
        _: Parent,
        live: Option<&mut dyn Live>,
    ) -> Result<u64, WireError> {
        if live.is_some() {
            // Never says that the metadata are read.
            std::thread::sleep(std::time::Duration::from_hours(1));
        }
        target[0].disk.size().map_err(failed)
    }
}
