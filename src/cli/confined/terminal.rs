//! Standard error as a terminal that cannot be asked for anything: a jailed process may write, and nothing else.
//!
//! Called by progress bars, through `confined`.

use indicatif::TermLike;
use std::io::{self, Write as _};

/// A terminal of a known width.
#[derive(Debug)]
pub(in crate::cli) struct Blind {
    /// Its columns.
    pub(in crate::cli) columns: u16,
}

impl Blind {
    /// Moves the cursor by a control sequence (ECMA-48, CUU to CUB).
    fn cursor(n: usize, direction: char) -> io::Result<()> {
        if n == 0 { Ok(()) } else { write!(io::stderr(), "\x1b[{n}{direction}") }
    }
}

impl TermLike for Blind {
    fn width(&self) -> u16 {
        self.columns
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        Self::cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        Self::cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        Self::cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        Self::cursor(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        writeln!(io::stderr(), "{text}")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        io::stderr().write_all(text.as_bytes())
    }

    fn clear_line(&self) -> io::Result<()> {
        io::stderr().write_all(b"\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        io::stderr().flush()
    }
}
