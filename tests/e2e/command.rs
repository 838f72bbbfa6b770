//! Commands that run beside the test: their whole output is kept, none may run forever, and a failure shows what was
//! asked and what came back. Called by `engine`.

use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    io::{Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Longest time that one command may take.
const COMMAND_LIMIT: Duration = Duration::from_mins(3);
/// Time between two looks at something that is waited for.
pub(crate) const TICK: Duration = Duration::from_millis(20);

/// What a command did.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    shown: String,
}

impl Run {
    pub(crate) fn ok(&self) -> bool {
        self.status.success()
    }
    /// Both outputs as text.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", String::from_utf8_lossy(&self.stdout), self.stderr)
    }
    /// Fails unless the command succeeded.
    pub(crate) fn expect_ok(self) -> Self {
        assert!(self.ok(), "`{}` failed, {}\n{}", self.shown, self.status, self.text());
        self
    }
    /// Fails if the command succeeded; the text says why it failed.
    pub(crate) fn expect_failure(self) -> String {
        assert!(!self.ok(), "`{}` succeeded, but had to fail\n{}", self.shown, self.text());
        self.text()
    }
}

/// A command that runs.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    shown: String,
    readers: [thread::JoinHandle<Vec<u8>>; 2],
    begun: Instant,
}

impl Running {
    /// The pid of what was started (of `nsenter`, for a command in a room).
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
    /// Waits for the end. A command that takes longer than any should is killed, and fails the test.
    pub(crate) fn wait(mut self) -> Run {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for a command") {
                break status;
            }
            if self.begun.elapsed() > COMMAND_LIMIT {
                for pid in children(self.child.id()) {
                    kill(pid);
                }
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("`{}` still ran after {COMMAND_LIMIT:?}", self.shown);
            }
            thread::sleep(TICK);
        };
        let [stdout, stderr] = self.readers.map(|r| r.join().expect("reader of a command's output"));
        Run { status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned(), shown: self.shown }
    }
}

/// Starts a command with all of its output collected.
pub(crate) fn start(mut command: Command, input: Option<Vec<u8>>) -> Running {
    let shown = shown(&command);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start `{shown}`: {e}"));
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // A command that ends early closes its input; its status tells.
        thread::spawn(move || drop(stdin.write_all(&input)));
    }
    fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // A cut output shows in what the test compares.
            let _ = from.read_to_end(&mut bytes);
            bytes
        })
    }
    let readers =
        [collect(child.stdout.take().expect("stdout")), collect(child.stderr.take().expect("stderr"))];
    Running { child, shown, readers, begun: Instant::now() }
}

/// A command as people would type it, without the way into the room.
fn shown(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|w| w.to_string_lossy())
        .collect();
    let text = words.join(" ");
    let text = text.split_once(" -- ").map_or(text.as_str(), |(_, inner)| inner);
    if text.len() > 600 { format!("{}…", &text[..text.floor_char_boundary(600)]) } else { text.to_owned() }
}

pub(crate) fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // Somebody else may have been faster.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Direct children of a process.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

pub(crate) fn wait_until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < limit, "waited {limit:?} for {what}");
        thread::sleep(TICK);
    }
}
