//! One request as operators see it: its number, its line in the log, its place in the metrics.
//!
//! ```text
//!   head ─► Called (number, endpoint) ─► handler names the layer ─► reply ─► finished: counted, logged at debug
//!                                                     │ failed, cut, or the client hung up
//!                                                     └──► one line at warn: request, endpoint, layer, seconds, error
//!   whatever driver, store and service VM log on the way is within the span "request", with the same fields
//! ```
//!
//! Invariants: each request that does not succeed has exactly one such line, and its reply, if there is one, carries
//! the same number: as the header [`HEADER`] and, as docker shows nothing else, at the end of `Err`. Called by the
//! handlers, by `stream` for bodies that fail late, and by `serve` for heads that never became a request.

use super::Context;
use crate::{driver::DriverError, telemetry::Outcome};
use axum::http::{HeaderValue, StatusCode};
use parking_lot::Mutex;
use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

/// Header with the request's number, in every reply.
pub(super) const HEADER: &str = "x-request-id";
/// Hexadecimal digits of a request's number.
const DIGITS: usize = 12;

/// A new number for a request, by which it is found in the log.
pub(super) fn number() -> String {
    let mut text = uuid::Uuid::new_v4().simple().to_string();
    text.truncate(DIGITS);
    text
}

/// The outcome of a failed request, for the metrics.
pub(super) fn outcome_of(error: &DriverError) -> Outcome {
    if error.is_corrupt() { Outcome::Corrupt } else { Outcome::Failed }
}

/// A request that is being answered. Clones are the same request; if the last one is
/// dropped without an outcome, the client hung up.
#[derive(Debug, Clone)]
pub(super) struct Called(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Context,
    number: String,
    endpoint: String,
    layer: OnceLock<String>,
    begin: Instant,
    /// What is logged on the way carries it, so that it can be joined to the request. Of the highest level, so that no
    /// filter which lets a warning through leaves it out.
    span: tracing::Span,
    told: Mutex<bool>,
}

impl Called {
    pub(super) fn new(context: Context, endpoint: String) -> Self {
        let number = number();
        let span = tracing::error_span!("request", request = number, endpoint, layer = tracing::field::Empty);
        Self(Arc::new(Inner {
            context,
            number,
            endpoint,
            layer: OnceLock::new(),
            begin: Instant::now(),
            span,
            told: Mutex::new(false),
        }))
    }

    /// Records the layer that the request is about.
    pub(super) fn names(&self, layer: &str) {
        if self.0.layer.set(layer.to_owned()).is_ok() {
            self.0.span.record("layer", layer);
        }
    }

    /// The span of all work for this request.
    pub(super) fn span(&self) -> tracing::Span {
        self.0.span.clone()
    }

    pub(super) fn number(&self) -> &str {
        &self.0.number
    }

    pub(super) fn header(&self) -> HeaderValue {
        // Hexadecimal digits are a header value.
        HeaderValue::from_str(&self.0.number).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// Records success.
    pub(super) fn finished(&self, status: StatusCode) {
        if self.0.tell(Outcome::Done) {
            tracing::debug!(
                parent: None,
                request = self.0.number,
                endpoint = self.0.endpoint,
                layer = self.0.layer(),
                status = status.as_u16(),
                micros = self.0.begin.elapsed().as_micros() as u64,
                "request"
            );
        }
    }

    /// Records that the request was refused, failed, or was cut.
    pub(super) fn failed(&self, status: Option<StatusCode>, outcome: Outcome, error: &str) {
        self.0.failed(status, outcome, error);
    }

    /// Logs that an operation failed after its client had hung up.
    pub(super) fn failed_alone(&self, error: &str) {
        tracing::warn!(
            parent: None,
            request = self.0.number,
            endpoint = self.0.endpoint,
            layer = self.0.layer(),
            seconds = self.0.begin.elapsed().as_secs_f32(),
            error,
            "the operation failed after its client had hung up"
        );
    }
}

impl Inner {
    fn layer(&self) -> &str {
        self.layer.get().map_or("-", String::as_str)
    }

    /// Counts the request once; false if it was counted before.
    fn tell(&self, outcome: Outcome) -> bool {
        if std::mem::replace(&mut *self.told.lock(), true) {
            return false;
        }
        self.context.metrics.request(&self.endpoint, outcome, self.begin.elapsed());
        true
    }

    fn failed(&self, status: Option<StatusCode>, outcome: Outcome, error: &str) {
        if self.tell(outcome) {
            tracing::warn!(
                parent: None,
                request = self.number,
                endpoint = self.endpoint,
                layer = self.layer(),
                status = status.map(|s| s.as_u16()),
                seconds = self.begin.elapsed().as_secs_f32(),
                damage = (outcome == Outcome::Corrupt).then_some(true),
                error,
                "request failed"
            );
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.failed(None, Outcome::Failed, "the client hung up before the end of the reply");
    }
}
