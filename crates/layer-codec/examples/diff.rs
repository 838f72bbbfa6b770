//! Writes the canonical tar of a raw ext4 image to standard output, without a parent: `diff IMAGE`.

use disk_io::StreamOut;
use layer_codec::{ExportOptions, LayerKind, LayerSource, NoHooks, export};
use std::{
    env,
    error::Error,
    fs::File,
    io::{self, Write},
};

/// Standard output as a place for tars.
struct Output(io::StdoutLock<'static>);

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl StreamOut for Output {
    fn splice(&mut self, _: &File, _: u64, _: u64) -> io::Result<u64> {
        // Bytes are written, not spliced.
        Ok(0)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args_os().nth(1).ok_or("usage: diff IMAGE")?;
    let layers = [LayerSource::new(File::open(path)?, LayerKind::Applied)];
    let summary =
        export(&layers, None, &ExportOptions::default(), &mut NoHooks, &mut Output(io::stdout().lock()))?;
    eprintln!("{} entries, {} bytes of tar", summary.entries, summary.tar_bytes);
    Ok(())
}
