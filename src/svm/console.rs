//! What a service VM said last, kept for errors and told to the log.
//!
//! ```text
//!   stderr of a worker, serial console of a guest ─► lines, escaped ─► log (warn)
//!                                                                  └─► the last 64, shown in errors and by `svm console`
//! ```
//!
//! Called by the backends.

use parking_lot::Mutex;
use std::{collections::VecDeque, sync::Arc};
use tokio::io::{AsyncRead, AsyncReadExt};

/// How much of what a VM said is kept; lines and bytes per line.
const CONSOLE_LINES: usize = 64;
const CONSOLE_LINE: usize = 1024;

/// The last lines. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Console(Arc<Mutex<VecDeque<String>>>);

impl Console {
    /// Keeps and logs what comes from `source` until its end; `label` says in the log who speaks.
    pub(super) fn follow(&self, mut source: impl AsyncRead + Send + Unpin + 'static, label: String) {
        let lines = self.0.clone();
        tokio::spawn(async move {
            let (mut buffer, mut line) = ([0u8; 4096], Vec::new());
            loop {
                let n = source.read(&mut buffer).await.unwrap_or(0);
                for &b in &buffer[..n] {
                    if b != b'\n' && b != b'\r' {
                        line.push(b);
                    }
                    if b == b'\n' || line.len() >= CONSOLE_LINE {
                        keep(&lines, &mut line, &label);
                    }
                }
                if n == 0 {
                    keep(&lines, &mut line, &label);
                    return;
                }
            }
        });
    }

    /// The last lines.
    pub(super) fn tail(&self) -> String {
        let lines = self.0.lock();
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

fn keep(lines: &Mutex<VecDeque<String>>, line: &mut Vec<u8>, label: &str) {
    if line.is_empty() {
        return;
    }
    // Escaped, because a taken-over VM may speak to the terminal of whoever reads the log.
    let text = line.escape_ascii().to_string();
    line.clear();
    tracing::warn!(vm = label, "{text}");
    let mut lines = lines.lock();
    if lines.len() == CONSOLE_LINES {
        lines.pop_front();
    }
    lines.push_back(text);
}
