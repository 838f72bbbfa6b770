//! What a service VM says: logged line by line, its last lines kept for error messages.
//!
//! Called by backends.

use parking_lot::Mutex;
use std::{collections::VecDeque, sync::Arc};
use tokio::io::{AsyncRead, AsyncReadExt};

/// How much of what a VM said is kept; lines and bytes per line.
const LINES: usize = 64;
const LINE: usize = 1024;

/// The last lines of a VM.
#[derive(Debug, Clone, Default)]
pub(super) struct Console(Arc<Mutex<VecDeque<String>>>);

impl Console {
    /// Keeps and logs what comes from `input` until its end.
    pub(super) fn follow<R: AsyncRead + Send + Unpin + 'static>(&self, mut input: R, vm: String) {
        let lines = self.0.clone();
        tokio::spawn(async move {
            let (mut buffer, mut line) = ([0u8; 4096], Vec::new());
            loop {
                let n = input.read(&mut buffer).await.unwrap_or(0);
                for &b in &buffer[..n] {
                    if b != b'\n' && b != b'\r' {
                        line.push(b);
                    }
                    if b == b'\n' || line.len() >= LINE {
                        keep(&lines, &mut line, &vm);
                    }
                }
                if n == 0 {
                    keep(&lines, &mut line, &vm);
                    return;
                }
            }
        });
    }

    /// The last lines.
    pub(super) fn tail(&self) -> String {
        self.0.lock().iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

fn keep(lines: &Mutex<VecDeque<String>>, line: &mut Vec<u8>, vm: &str) {
    if line.is_empty() {
        return;
    }
    // Escaped, because a VM that was taken over may speak to the terminal of whoever reads the log.
    let text = line.escape_ascii().to_string();
    line.clear();
    tracing::warn!(vm, "{text}");
    let mut lines = lines.lock();
    if lines.len() == LINES {
        lines.pop_front();
    }
    lines.push_back(text);
}
