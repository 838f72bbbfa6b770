//! Expands standard input, whatever it is compressed with: `expand_stdin < layer.tar.gz > layer.tar`.

use layer_recode::{ExpandLimits, expand};
use std::io;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let limits = ExpandLimits::of_output(1 << 40);
    let summary = expand(&mut io::stdin().lock(), None, &limits, &mut io::stdout().lock())?;
    eprintln!("{}: {} bytes became {}", summary.format, summary.bytes_in, summary.bytes_out);
    Ok(())
}
