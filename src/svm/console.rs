//! The console output of a service VM: the last lines are kept for errors, and lines go to the log.
//!
//! ```text
//!   stderr of a worker, serial console of a guest ─► lines, escaped ─► bucket ─► log (warn)
//!                                                                  └─► the last 64, shown in errors and by `svm console`
//! ```
//!
//! A compromised VM may print without end: the log gets [`BURST`] lines at once and [`PER_SECOND`] from then on, and
//! the number of lines left out. Called by the backends.

use parking_lot::Mutex;
use std::{collections::VecDeque, sync::Arc};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::Instant,
};

/// How much of the output is kept: lines, and bytes per line.
const CONSOLE_LINES: usize = 64;
const CONSOLE_LINE: usize = 1024;
/// Lines of one VM that are logged at once: enough for a kernel panic or a worker's backtrace.
const BURST: u32 = 256;
/// Lines logged per second after that.
const PER_SECOND: u32 = 4;

/// How many lines may still be logged.
#[derive(Debug)]
struct Bucket {
    lines: f64,
    filled: Instant,
    left_out: u64,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { lines: f64::from(BURST), filled: now, left_out: 0 }
    }

    /// If a line may be logged at `now`: how many before it were left out.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let seconds = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.lines = (self.lines + seconds * f64::from(PER_SECOND)).min(f64::from(BURST));
        if self.lines < 1.0 {
            self.left_out += 1;
            return None;
        }
        self.lines -= 1.0;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// The last lines. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Console(Arc<Mutex<VecDeque<String>>>);

impl Console {
    /// Keeps and logs what comes from `source` until its end; `label` names the VM in the log.
    pub(super) fn follow(&self, mut source: impl AsyncRead + Send + Unpin + 'static, label: String) {
        let lines = self.0.clone();
        tokio::spawn(async move {
            let (mut buffer, mut line) = ([0u8; 4096], Vec::new());
            let mut bucket = Bucket::new(Instant::now());
            loop {
                let n = source.read(&mut buffer).await.unwrap_or(0);
                for &b in &buffer[..n] {
                    if b != b'\n' && b != b'\r' {
                        line.push(b);
                    }
                    if b == b'\n' || line.len() >= CONSOLE_LINE {
                        keep(&lines, &mut line, &label, &mut bucket);
                    }
                }
                if n == 0 {
                    keep(&lines, &mut line, &label, &mut bucket);
                    say_left_out(&label, bucket.left_out);
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

fn say_left_out(label: &str, lines: u64) {
    if lines > 0 {
        tracing::warn!(vm = label, "{lines} lines left out");
    }
}

fn keep(lines: &Mutex<VecDeque<String>>, line: &mut Vec<u8>, label: &str, bucket: &mut Bucket) {
    if line.is_empty() {
        return;
    }
    // Escaped, because a compromised VM could send control sequences to the terminal of a reader of the log.
    let text = line.escape_ascii().to_string();
    line.clear();
    if let Some(left_out) = bucket.take(Instant::now()) {
        say_left_out(label, left_out);
        tracing::warn!(vm = label, "{text}");
    }
    let mut lines = lines.lock();
    if lines.len() == CONSOLE_LINES {
        lines.pop_front();
    }
    lines.push_back(text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_of_lines_is_cut_counted_and_goes_on_slowly() {
        let mut now = Instant::now();
        let mut bucket = Bucket::new(now);
        let logged = (0..1_000_000).filter(|_| bucket.take(now).is_some()).count();
        assert_eq!(logged, BURST as usize);
        assert_eq!(bucket.left_out, 1_000_000 - u64::from(BURST));
        // Each second brings some, and the first says how many were lost.
        now += Duration::from_secs(1);
        assert_eq!(bucket.take(now), Some(1_000_000 - u64::from(BURST)));
        let logged = 1 + (0..1000).filter(|_| bucket.take(now).is_some()).count();
        assert_eq!(logged, PER_SECOND as usize);
        // A long silence fills the bucket, but not beyond its size.
        now += Duration::from_hours(1);
        assert_eq!((0..1000).filter(|_| bucket.take(now).is_some()).count(), BURST as usize);
    }

    #[tokio::test]
    async fn the_last_lines_are_kept_however_many_were_said() {
        let console = Console::default();
        let said: String = (0..10_000).map(|n| ["line ", &n.to_string(), "\n"].concat()).collect();
        console.follow(std::io::Cursor::new(said.into_bytes()), "test".into());
        while !console.tail().ends_with("line 9999") {
            tokio::task::yield_now().await;
        }
        assert_eq!(console.tail().lines().count(), CONSOLE_LINES);
    }
}
