//! Replies and request bodies, by dockerd's rules instead of the web's.

use super::wire::Outcome;
use crate::driver::{DriverError, with_causes};
use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, Request},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::{Serialize, de::DeserializeOwned};

/// The content type of plugin replies.
pub(super) const CONTENT_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";
/// Largest JSON request. The largest real one, an Init with id maps, has a few KB.
const MAX_REQUEST_BYTES: usize = 1 << 20;

/// A failed request: a status and a text for `Err`.
///
/// dockerd takes any status but 200 as a failure and shows the text; 404 means "no such method" to it, so it is used
/// for unknown paths only.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into() }
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        let status =
            if error.is_usage() { StatusCode::BAD_REQUEST } else { StatusCode::INTERNAL_SERVER_ERROR };
        Self { status, message: with_causes(&error) }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = Reply(Outcome { err: self.message }).into_response();
        *response.status_mut() = self.status;
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
                (StatusCode::INTERNAL_SERVER_ERROR, format!("{{\"Err\":\"cannot encode the reply: {e}\"}}\n"))
                    .into_response()
            }
        }
    }
}

/// A JSON request body, whatever its Content-Type says: dockerd sends none.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let body = read_small(request.into_body()).await?;
        if body.is_empty() {
            // What a daemon's client sends when it repeats a request whose connection broke.
            return Err(Failure::bad_request(
                "the request has no body, where a JSON object is expected; docker sends this when the plugin went away \
                 during a request: try the command again",
            ));
        }
        serde_json::from_slice(&body).map(Json).map_err(|e| {
            Failure::bad_request(format!("the request is not the JSON object that is expected: {e}"))
        })
    }
}

/// A request whose body says nothing (`{}` or none) and must only be of bounded size.
pub(super) struct Ignored;

impl<S: Send + Sync> FromRequest<S> for Ignored {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        read_small(request.into_body()).await.map(|_| Self)
    }
}

async fn read_small(body: Body) -> Result<Bytes, Failure> {
    match Limited::new(body, MAX_REQUEST_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => Err(Failure {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            message: format!("the request has more than {MAX_REQUEST_BYTES} bytes"),
        }),
        Err(e) => Err(Failure::bad_request(format!("the request broke off: {e}"))),
    }
}
