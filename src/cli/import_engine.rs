//! `store import engine`: copies images from one running engine to another, with the engines' own save and load.
//!
//! ```text
//!   GET /images/json ─► for each image: GET /images/get?names=… ──body──► POST /images/load
//!                       then its id is queried: the same digest, the same bytes
//! ```
//!
//! The bytes are passed on without being interpreted. An image that the target has, with its names, is not sent again.
//! An image that cannot be copied is left out, with the reason, and the next one is tried, as long as both engines
//! answer.

use super::{CliError, output::bar};
use bytes::Bytes;
use bytesize::ByteSize;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use indicatif::ProgressBar;
use serde::Deserialize;
use std::{collections::BTreeMap, path::Path, process::ExitCode};

/// Longest response that is read into memory, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// Bytes that need no quoting in a query.
const PLAIN: &[u8] = b"-_.~/:@";

type Body = BoxBody<Bytes, CliError>;

#[derive(Debug, Deserialize)]
struct Image {
    #[serde(rename = "Id")]
    id: String,
    #[serde(rename = "RepoTags")]
    names: Option<Vec<String>>,
    #[serde(rename = "Size", default)]
    size: u64,
}

impl Image {
    /// Its names, or its id if it has none.
    fn references(&self) -> Vec<String> {
        let names = self.names.iter().flatten().filter(|n| !n.contains("<none>"));
        let names: Vec<String> = names.cloned().collect();
        if names.is_empty() { vec![self.id.clone()] } else { names }
    }

    fn is_called(&self, wanted: &str) -> bool {
        let short = self.id.strip_prefix("sha256:").unwrap_or(&self.id);
        self.id == wanted
            || (wanted.len() >= 12 && short.starts_with(wanted))
            || self.references().iter().any(|n| n == wanted || *n == format!("{wanted}:latest"))
    }
}

/// Copies images; all of them if none is named.
pub(super) async fn copy(from: &Path, to: &Path, wanted: &[String]) -> Result<ExitCode, CliError> {
    let mut images = list(from).await?;
    if let Some(unknown) = wanted.iter().find(|w| !images.iter().any(|i| i.is_called(w))) {
        return Err(format!("the engine at '{}' has no image '{unknown}'", from.display()).into());
    }
    images.retain(|i| wanted.is_empty() || wanted.iter().any(|w| i.is_called(w)));
    let present: BTreeMap<String, Image> = list(to).await?.into_iter().map(|i| (i.id.clone(), i)).collect();
    let bar = bar(images.iter().map(|i| i.size).sum());
    let (mut sent, all, mut failed) = (0, images.len(), Vec::new());
    for (n, image) in images.iter().enumerate() {
        let references = image.references();
        let name = references.first().map_or(image.id.as_str(), String::as_str);
        match &bar {
            Some(bar) => bar.set_message(format!("{}/{all} {name}", n + 1)),
            None => eprintln!("image {} of {all}: {name}, {}", n + 1, ByteSize(image.size)),
        }
        let there = present.get(&image.id).map(Image::references).unwrap_or_default();
        if !present.contains_key(&image.id) || references.iter().any(|r| *r != image.id && !there.contains(r))
        {
            let copied = match send(from, to, &references, bar.as_ref()).await {
                Ok(()) => verify(to, image).await,
                Err(error) => Err(error),
            };
            match copied {
                Ok(()) => sent += 1,
                Err(error) => {
                    let text = format!("{name}: {error}");
                    match &bar {
                        Some(bar) => bar.println(&text),
                        None => eprintln!("{text}"),
                    }
                    failed.push(text);
                    // An engine that has stopped fails every image.
                    if let Err(gone) = list(from).await.and(list(to).await) {
                        failed.push(format!("stopped at image {} of {all}: {gone}", n + 1));
                        break;
                    }
                }
            }
        } else if let Some(bar) = &bar {
            bar.inc(image.size);
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if failed.is_empty() {
        println!("all {all} images are present, {sent} of them sent now; containers are not copied");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{sent} of {all} images sent now; containers are not copied");
    for text in &failed {
        println!("not copied: {text}");
    }
    Ok(ExitCode::FAILURE)
}

async fn list(socket: &Path) -> Result<Vec<Image>, CliError> {
    let answer = whole(request(socket, Method::GET, "/images/json", empty()).await?).await?;
    Ok(serde_json::from_slice(&answer)?)
}

async fn send(from: &Path, to: &Path, names: &[String], bar: Option<&ProgressBar>) -> Result<(), CliError> {
    let query: Vec<String> = names.iter().map(|n| format!("names={}", quoted(n))).collect();
    let saved = request(from, Method::GET, &format!("/images/get?{}", query.join("&")), empty()).await?;
    let bar = bar.cloned();
    let counted = saved.into_body().map_frame(move |frame| {
        if let (Some(bar), Some(data)) = (&bar, frame.data_ref()) {
            bar.inc(data.len() as u64);
        }
        frame
    });
    let body = counted.map_err(|e| CliError::from(format!("the archive ended early: {e}"))).boxed();
    let answer = whole(request(to, Method::POST, "/images/load?quiet=1", body).await?).await?;
    // A load that fails halfway reports it in a response with status 200.
    for line in answer.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let said = serde_json::from_slice::<serde_json::Value>(line).unwrap_or_default();
        if let Some(error) = said.get("error").and_then(serde_json::Value::as_str) {
            return Err(format!("cannot load {}: {error}", names.join(", ")).into());
        }
    }
    Ok(())
}

/// Fails unless the engine has the image under the same id and all of its names.
async fn verify(to: &Path, image: &Image) -> Result<(), CliError> {
    for reference in image.references() {
        let path = format!("/images/{}/json", quoted(&reference));
        let found: Image =
            serde_json::from_slice(&whole(request(to, Method::GET, &path, empty()).await?).await?)?;
        if found.id != image.id {
            return Err(format!(
                "image id mismatch for {reference}: expected {}, found {}",
                image.id, found.id
            )
            .into());
        }
    }
    Ok(())
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

async fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: Body,
) -> Result<Response<Incoming>, CliError> {
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .map_err(|e| format!("cannot connect to '{}': {e}; is the engine running?", socket.display()))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "docker")
        .header(header::CONTENT_TYPE, "application/x-tar")
        .body(body)?;
    let response = sender.send_request(request).await.map_err(|e| match std::error::Error::source(&e) {
        Some(cause) => format!("'{}' {path}: {cause}", socket.display()),
        None => format!("'{}' {path}: {e}", socket.display()),
    })?;
    if response.status() == StatusCode::OK {
        return Ok(response);
    }
    let status = response.status();
    let text = String::from_utf8_lossy(&whole(response).await?).trim().to_owned();
    Err(format!("the engine at '{}' answers {path} with {status}: {text}", socket.display()).into())
}

async fn whole(response: Response<Incoming>) -> Result<Bytes, CliError> {
    let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER);
    Ok(body.collect().await?.to_bytes())
}

/// Percent-encodes a text for a query or a path.
fn quoted(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut quoted, byte| {
        if byte.is_ascii_alphanumeric() || PLAIN.contains(&byte) {
            quoted.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(quoted, "%{byte:02X}");
        }
        quoted
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_by_name_and_id() {
        let id = format!("sha256:{}", "ab".repeat(32));
        let image = Image { id: id.clone(), names: Some(vec!["a/b:latest".into(), "c:1".into()]), size: 0 };
        for name in ["a/b", "a/b:latest", "c:1", &id, "abababababab"] {
            assert!(image.is_called(name), "{name}");
        }
        for name in ["c", "a", "ab", "abababababac"] {
            assert!(!image.is_called(name), "{name}");
        }
        let bare = Image { id: id.clone(), names: Some(vec!["<none>:<none>".into()]), size: 0 };
        assert_eq!(bare.references(), [id]);
        assert_eq!(quoted("a/b:1 &ü"), "a/b:1%20%26%C3%BC");
    }
}
