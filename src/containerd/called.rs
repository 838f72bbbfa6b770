//! One call as operators see it: a line in the log if it fails, and its place in the metrics.
//!
//! ```text
//!   call ─► Called (method, snapshot) ─► handler ─► done: counted, logged at debug
//!                                          │ refused, failed, or the client hung up
//!                                          └──► one line: method, snapshot, seconds, error
//!   whatever driver, store and service VM log on the way is within the span "call", with a number, method and snapshot
//! ```
//!
//! containerd asks for snapshots that do not exist, and for keys that exist, in the normal course of a pull; such answers
//! are logged at debug, everything else at warn. Called by `snapshots` and `differ`.

use super::{Face, status};
use crate::{driver::DriverError, telemetry::Outcome};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};
use tonic::{Code, Status};

/// Bytes of a key that a line shows; keys are free text from outside.
const SHOWN: usize = 300;

/// The next call's number: the lines of one call have the same, in the log of one process.
static NUMBER: AtomicU64 = AtomicU64::new(1);

/// A call that is being answered; dropped without an outcome, the client hung up.
#[derive(Debug)]
pub(super) struct Called {
    face: Face,
    method: &'static str,
    number: u64,
    snapshot: String,
    /// What is logged on the way carries it. Of the highest level, so that no filter which lets a warning through leaves
    /// it out.
    span: tracing::Span,
    begin: Instant,
    told: bool,
}

impl Called {
    /// A call of `method` for the snapshot of this key or name.
    pub(super) fn new(face: &Face, method: &'static str, snapshot: &str) -> Self {
        let shown: String = snapshot.chars().take(SHOWN).flat_map(char::escape_debug).collect();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let span = tracing::error_span!(parent: None, "call", number, call = method, snapshot = shown);
        Self { face: face.clone(), method, number, snapshot: shown, span, begin: Instant::now(), told: false }
    }

    /// The span of all work for this call.
    pub(super) fn span(&self) -> tracing::Span {
        self.span.clone()
    }

    /// Counts the call, logs it, and turns its error into a status.
    pub(super) fn end<T>(self, result: Result<T, DriverError>) -> Result<T, Status> {
        match result {
            Ok(value) => {
                self.done();
                Ok(value)
            }
            Err(error) => {
                let outcome = if error.is_corrupt() { Outcome::Corrupt } else { Outcome::Failed };
                let status = status::of(&error);
                self.fail(outcome, status.code(), &error.for_log());
                Err(status)
            }
        }
    }

    /// Counts a call that succeeded.
    pub(super) fn done(mut self) {
        self.told = true;
        self.face.metrics().request(self.method, Outcome::Done, self.begin.elapsed());
        tracing::debug!(
            parent: None,
            number = self.number,
            call = self.method,
            snapshot = self.snapshot,
            micros = self.begin.elapsed().as_micros() as u64,
            "call"
        );
    }

    /// Counts and logs a call that is refused with `status`.
    pub(super) fn refuse(self, status: Status) -> Status {
        let (code, text) = (status.code(), status.message().to_owned());
        self.fail(Outcome::Failed, code, &text);
        status
    }

    /// Leaves the call to the next differ: not a failure.
    pub(super) fn pass_on(mut self, reason: &str) -> Status {
        self.told = true;
        self.face.metrics().request(self.method, Outcome::Done, self.begin.elapsed());
        tracing::debug!(
            parent: None,
            number = self.number,
            call = self.method,
            snapshot = self.snapshot,
            reason,
            "call left to the next differ"
        );
        Status::unimplemented(reason)
    }

    fn fail(mut self, outcome: Outcome, code: Code, error: &str) {
        self.told = true;
        self.failed(outcome, code, error);
    }

    fn failed(&self, outcome: Outcome, code: Code, error: &str) {
        self.face.metrics().request(self.method, outcome, self.begin.elapsed());
        let seconds = self.begin.elapsed().as_secs_f32();
        let (number, call, snapshot) = (self.number, self.method, &self.snapshot);
        if matches!(code, Code::NotFound | Code::AlreadyExists) {
            tracing::debug!(parent: None, number, call, snapshot, ?code, seconds, error, "call refused");
        } else {
            let damage = (outcome == Outcome::Corrupt).then_some(true);
            tracing::warn!(parent: None, number, call, snapshot, ?code, seconds, damage, error, "call failed");
        }
    }
}

impl Drop for Called {
    fn drop(&mut self) {
        if !self.told {
            self.failed(Outcome::Failed, Code::Cancelled, "the client hung up before the end of the call");
        }
    }
}
