//! Replies and request bodies, by the rules of dockerd rather than of HTTP.

use super::{
    called::{Called, HEADER, outcome_of},
    serve::Patience,
    wire::{ChangeEntry, Named, Outcome as Told},
};
use crate::{
    driver::{ChangedPath, DriverError},
    error::{Fault, Kind, with_causes},
    telemetry::Outcome,
};
use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, Request},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::{Serialize, de::DeserializeOwned};
use std::{convert::Infallible, io::Write};

/// The content type of plugin replies.
pub(super) const CONTENT_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";
/// Largest JSON request. The largest real one, an Init with id maps, has a few KB.
const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Bytes of a long JSON reply that are made at a time.
const REPLY_PART: usize = 64 << 10;

/// A failed request: a status and a text for `Err`.
///
/// dockerd takes any status but 200 as a failure and shows the text; 404 means "no such method" to it, so it is used
/// for unknown paths only.
///
/// As a response it is an empty one that carries this: `observe` logs it and makes the reply of it, with the request's
/// number.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    /// For the engine, which shows it to its user.
    answer: String,
    /// For the log: the answer and what only an operator can use.
    pub(super) log: String,
    kind: Kind,
    pub(super) outcome: Outcome,
}

impl Failure {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let answer = message.into();
        let kind = if status.is_client_error() { Kind::Usage } else { Kind::Internal };
        Self { status, log: answer.clone(), answer, kind, outcome: Outcome::Failed }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// Logs it and makes the reply.
    pub(super) fn reply(self, called: &Called) -> Response {
        called.failed(Some(self.status), self.outcome, &self.log);
        let err = format!("{} (request {})", self.answer, called.number());
        let mut response = Reply(Told { err, code: Some(self.kind.name()) }).into_response();
        *response.status_mut() = self.status;
        response.headers_mut().insert(HEADER, called.header());
        response
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        let kind = error.kind();
        let status = match kind {
            Kind::Usage => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, answer: with_causes(&error), log: error.for_log(), kind, outcome: outcome_of(&error) }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// A JSON reply with the protocol's content type.
pub(super) struct Reply<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Reply<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(mut text) => {
                text.push(b'\n');
                ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
            }
            Err(e) => {
                Failure::new(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot encode the reply: {e}"))
                    .into_response()
            }
        }
    }
}

/// The reply of Changes, made while it is sent: its text may be several times as long as its paths.
///
/// JSON has no place for names that are not UTF-8; they are shown with replacement characters.
pub(super) fn changes(changes: Vec<ChangedPath>) -> Response {
    /// What remains to be said.
    struct Rest {
        changes: std::vec::IntoIter<ChangedPath>,
        first: bool,
        ended: bool,
    }
    fn part(rest: &mut Rest) -> Result<Bytes, serde_json::Error> {
        let mut text = Vec::with_capacity(REPLY_PART + REPLY_PART / 4);
        if rest.first {
            text.extend_from_slice(br#"{"Changes":["#);
        }
        while text.len() < REPLY_PART {
            let Some(change) = rest.changes.next() else {
                rest.ended = true;
                text.extend_from_slice(b"],\"Err\":\"\"}\n");
                break;
            };
            if !std::mem::take(&mut rest.first) {
                text.push(b',');
            }
            let entry =
                ChangeEntry { path: String::from_utf8_lossy(&change.path).into_owned(), kind: change.kind };
            serde_json::to_writer(text.by_ref(), &entry)?;
        }
        Ok(text.into())
    }
    let rest = Rest { changes: changes.into_iter(), first: true, ended: false };
    let parts = futures_util::stream::unfold(rest, |mut rest| async move {
        if rest.ended {
            return None;
        }
        let part = part(&mut rest);
        Some((part, rest))
    });
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], Body::from_stream(parts)).into_response()
}

/// A JSON request body, whatever its Content-Type says: dockerd sends none.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Named> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let called = request.extensions().get::<Called>().cloned();
        let body = read_small(request).await?;
        if body.is_empty() {
            // What a daemon's client sends when it repeats a request whose connection broke.
            return Err(Failure::bad_request(
                "the request has no body, but a JSON object is expected; docker sends such a request if the plugin was \
                 restarted during the first one: repeat the command",
            ));
        }
        let request: T = serde_json::from_slice(&body)
            .map_err(|e| Failure::bad_request(format!("the request is not the expected JSON object: {e}")))?;
        if let Some(called) = called {
            called.names(request.name());
        }
        Ok(Self(request))
    }
}

/// A request whose body says nothing (`{}` or none) and must only be of bounded size.
pub(super) struct Ignored;

impl<S: Send + Sync> FromRequest<S> for Ignored {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        read_small(request).await.map(|_| Self)
    }
}

/// The request's number, for handlers.
impl<S: Send + Sync> axum::extract::FromRequestParts<S> for Called {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, _: &S) -> Result<Self, Infallible> {
        // `observe` put it there; it stands before every handler.
        Ok(parts.extensions.get::<Self>().cloned().expect("every request passes observe"))
    }
}

async fn read_small(request: Request) -> Result<Bytes, Failure> {
    let patience = request.extensions().get::<Patience>().cloned().unwrap_or_default();
    let whole = Limited::new(request.into_body(), MAX_REQUEST_BYTES).collect();
    let Some(read) = patience.wait(whole).await else {
        return Err(Failure::new(
            StatusCode::REQUEST_TIMEOUT,
            "the rest of the request did not arrive in time",
        ));
    };
    match read {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => Err(Failure::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request has more than {MAX_REQUEST_BYTES} bytes"),
        )),
        Err(e) => Err(Failure::bad_request(format!("the request was cut: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_are_the_same_json_in_parts() {
        for count in [0, 1, 2, 5000] {
            let list: Vec<ChangedPath> = (0..count)
                .map(|n| ChangedPath { path: format!("/\u{1}\"{n}").into_bytes(), kind: (n % 3) as u8 })
                .collect();
            let body = changes(list.clone()).into_body().collect().await.unwrap().to_bytes();
            let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(json["Err"], "");
            let read = json["Changes"].as_array().unwrap();
            assert_eq!(read.len(), list.len());
            for (read, made) in read.iter().zip(&list) {
                assert_eq!(read["Path"].as_str().unwrap().as_bytes(), made.path);
                assert_eq!(read["Kind"], made.kind);
            }
        }
    }
}
