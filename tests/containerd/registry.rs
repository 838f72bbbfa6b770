//! A registry on loopback, in this process: it serves the images that a test gives it, and can be made to fail.
//!
//! ```text
//!   GET, HEAD /v2/  ·  /v2/<name>/manifests/<tag or digest>  ·  /v2/<name>/blobs/<digest>
//! ```
//!
//! As the distribution specification has it, as far as a pull needs it. Lives until it is dropped.

use crate::image::{Image, MANIFEST};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, Method, Response, StatusCode, Uri, header},
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

#[derive(Debug, Default)]
struct Contents {
    /// Manifests' digests by `name:tag`.
    tags: BTreeMap<String, String>,
    blobs: BTreeMap<String, Bytes>,
    manifests: Vec<String>,
    /// Blobs of which only so many bytes are sent, although all are announced.
    cut: BTreeMap<String, usize>,
    requests: Vec<String>,
}

/// A running registry.
#[derive(Debug)]
pub(crate) struct Registry {
    address: SocketAddr,
    contents: Arc<Mutex<Contents>>,
    /// Serves; dropped first, so that no request outlives the registry.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("runtime of the registry");
        let contents = Arc::new(Mutex::new(Contents::default()));
        let router = Router::new().fallback(serve).with_state(Arc::clone(&contents));
        let listener =
            runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port on loopback");
        let address = listener.local_addr().expect("address");
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { address, contents, runtime: Some(runtime) }
    }

    /// Where it listens: the first part of its images' references.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Offers an image; returns its reference.
    pub(crate) fn offer(&self, name: &str, image: &Image) -> String {
        let mut contents = self.contents.lock().expect("registry");
        contents.tags.insert(format!("{name}:latest"), image.digest());
        contents.manifests.push(image.digest());
        contents.blobs.extend(image.blobs().into_iter().map(|(digest, blob)| (digest, Bytes::from(blob))));
        format!("{}/{name}:latest", self.address)
    }

    /// Ends each reply with this blob after so many bytes.
    pub(crate) fn cut(&self, digest: &str, bytes: usize) {
        self.contents.lock().expect("registry").cut.insert(digest.to_owned(), bytes);
    }

    /// Sends all blobs in full again.
    pub(crate) fn heal(&self) {
        self.contents.lock().expect("registry").cut.clear();
    }

    /// How many times blobs with one of these digests were sent.
    pub(crate) fn sent(&self, digests: &[String]) -> usize {
        let contents = self.contents.lock().expect("registry");
        contents.requests.iter().filter(|r| digests.iter().any(|d| r.ends_with(d.as_str()))).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(
    State(contents): State<Arc<Mutex<Contents>>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response<Body> {
    let reply = |status| Response::builder().status(status);
    let none = || reply(StatusCode::NOT_FOUND).body(Body::empty()).expect("reply");
    let mut contents = contents.lock().expect("registry");
    let path = uri.path().trim_end_matches('/');
    if path == "/v2" {
        return reply(StatusCode::OK).body(Body::empty()).expect("reply");
    }
    let Some((name, kind, wanted)) = path.strip_prefix("/v2/").and_then(|rest| {
        let (rest, wanted) = rest.rsplit_once('/')?;
        let (name, kind) = rest.rsplit_once('/')?;
        Some((name, kind, wanted))
    }) else {
        return none();
    };
    let digest = match kind {
        "manifests" => {
            contents.tags.get(&format!("{name}:{wanted}")).cloned().unwrap_or_else(|| wanted.to_owned())
        }
        _ => wanted.to_owned(),
    };
    let Some(blob) = contents.blobs.get(&digest).cloned() else { return none() };
    let media = if contents.manifests.contains(&digest) { MANIFEST } else { "application/octet-stream" };
    if method == Method::GET {
        contents.requests.push(digest.clone());
    }
    // A fetch that continues names where it does.
    let begin = headers
        .get(header::RANGE)
        .and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.split('-').next()?.parse().ok())
        .unwrap_or(0)
        .min(blob.len());
    let status = if begin > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let mut head = reply(status)
        .header(header::CONTENT_TYPE, media)
        .header(header::CONTENT_LENGTH, blob.len() - begin)
        .header("Docker-Content-Digest", &digest);
    if begin > 0 {
        head = head.header(header::CONTENT_RANGE, format!("bytes {begin}-{}/{}", blob.len() - 1, blob.len()));
    }
    let body = match contents.cut.get(&digest) {
        _ if method == Method::HEAD => Body::empty(),
        Some(bytes) => {
            let part = blob.slice(begin..(*bytes).clamp(begin, blob.len()));
            let cut = std::io::Error::other("the registry cuts this blob");
            Body::from_stream(futures_util::stream::iter([Ok(part), Err(cut)]))
        }
        None => Body::from(blob.slice(begin..)),
    };
    head.body(body).expect("reply")
}
