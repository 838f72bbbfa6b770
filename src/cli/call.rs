//! `call`: one request to a running plugin, as curl would send it.

use super::{CliError, runtime};
use bytes::Bytes;
use clap::Args;
use futures_util::TryStreamExt;
use http_body_util::{BodyExt, Either, Full, StreamBody};
use hyper::{Method, Request, body::Frame};
use hyper_util::rt::TokioIo;
use std::{io, path::PathBuf, process::ExitCode};
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio_util::io::ReaderStream;

/// Bytes read from a tar at a time.
const CHUNK: usize = 256 << 10;

/// Arguments of `call`.
#[derive(Debug, Args)]
pub(super) struct CallArgs {
    /// The method and, for ApplyDiff, its query: `GraphDriver.Status`, `GraphDriver.ApplyDiff?id=a&parent=`.
    method: String,
    /// The request's JSON.
    #[arg(default_value = "{}")]
    json: String,
    /// Sends a file as the body instead, such as the tar of an ApplyDiff; `-` is standard input.
    #[arg(long, short = 'i', value_name = "FILE")]
    input: Option<PathBuf>,
    #[command(flatten)]
    endpoint: Endpoint,
}

/// The endpoint of a running plugin.
#[derive(Debug, Args)]
pub(super) struct Endpoint {
    /// Socket of the plugin.
    #[cfg(unix)]
    #[arg(long, env = "LCOW_SOCKET", default_value = super::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Named pipe of the plugin.
    #[cfg(windows)]
    #[arg(long, env = "LCOW_PIPE", default_value = super::DEFAULT_PIPE)]
    pipe: std::ffi::OsString,
}

/// Connects to the plugin's socket.
#[cfg(unix)]
async fn connect(args: &Endpoint) -> Result<tokio::net::UnixStream, CliError> {
    let connected = tokio::net::UnixStream::connect(&args.socket).await;
    Ok(connected
        .map_err(|e| format!("cannot connect to '{}': {e}; is the plugin running?", args.socket.display()))?)
}

/// Connects to the plugin's pipe, and waits up to ten seconds while all its instances are in use.
#[cfg(windows)]
async fn connect(args: &Endpoint) -> Result<tokio::net::windows::named_pipe::NamedPipeClient, CliError> {
    use std::time::Duration;
    /// `ERROR_PIPE_BUSY`: every instance has a client, and the next one does not exist yet.
    const BUSY: i32 = 231;
    /// Attempts, 20 ms apart: ten seconds.
    const TURNS: usize = 500;
    let mut turns = 0;
    loop {
        match tokio::net::windows::named_pipe::ClientOptions::new().open(&args.pipe) {
            Err(e) if e.raw_os_error() == Some(BUSY) && turns < TURNS => {
                turns += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            connected => {
                let name = args.pipe.display();
                return Ok(connected
                    .map_err(|e| format!("cannot connect to '{name}': {e}; is the plugin running?"))?);
            }
        }
    }
}

type Source = Box<dyn AsyncRead + Send + Sync + Unpin>;

pub(super) fn run(args: CallArgs) -> Result<ExitCode, CliError> {
    runtime()?.block_on(call(args))
}

async fn call(args: CallArgs) -> Result<ExitCode, CliError> {
    let stream = connect(&args.endpoint).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driven = tokio::spawn(connection);
    let body = match &args.input {
        None => Either::Left(Full::new(Bytes::from(args.json))),
        Some(path) => {
            let source: Source = if path.as_os_str() == "-" {
                Box::new(tokio::io::stdin())
            } else {
                let open = tokio::fs::File::open(path).await;
                Box::new(open.map_err(|e| format!("cannot open '{}': {e}", path.display()))?)
            };
            Either::Right(StreamBody::new(ReaderStream::with_capacity(source, CHUNK).map_ok(Frame::data)))
        }
    };
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("/{}", args.method.trim_start_matches('/')))
        .header(hyper::header::HOST, "")
        .header(hyper::header::ACCEPT, "application/vnd.docker.plugins.v1.2+json")
        .body(body)?;
    let response = sender.send_request(request).await?;
    let ok = response.status().is_success();
    let mut reply = response.into_body();
    let mut out = tokio::io::stdout();
    let mut head = Vec::new();
    while let Some(frame) = reply.frame().await {
        let frame = frame.map_err(|e| io::Error::other(format!("the reply ended early: {e}")))?;
        if let Some(data) = frame.data_ref() {
            if head.len() < ERROR_HEAD {
                head.extend_from_slice(&data[..data.len().min(ERROR_HEAD - head.len())]);
            }
            out.write_all(data).await?;
        }
    }
    out.flush().await?;
    drop(sender);
    driven.abort();
    // An `Err` in a reply with status 200 is a failure as well.
    let failed = serde_json::from_slice::<serde_json::Value>(&head)
        .is_ok_and(|v| v.get("Err").and_then(|e| e.as_str()).is_some_and(|e| !e.is_empty()));
    Ok(if ok && !failed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The body of the reply to a GET.
pub(super) async fn get(endpoint: &Endpoint, path: &str) -> Result<Bytes, CliError> {
    request(endpoint, Method::GET, path).await
}

/// The body of the reply to a POST without content.
pub(super) async fn post(endpoint: &Endpoint, path: &str) -> Result<Bytes, CliError> {
    request(endpoint, Method::POST, path).await
}

async fn request(endpoint: &Endpoint, method: Method, path: &str) -> Result<Bytes, CliError> {
    let stream = connect(endpoint).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driven = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "")
        .body(Full::new(Bytes::new()))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driven.abort();
    if !status.is_success() {
        return Err(format!("the plugin replied {status}: {}", String::from_utf8_lossy(&body)).into());
    }
    Ok(body)
}

/// The field `Done` of the reply to a POST of `json`; `None` if no plugin listens at the endpoint.
pub(super) async fn done(
    endpoint: &Endpoint,
    method: &str,
    json: &serde_json::Value,
) -> Result<Option<serde_json::Value>, CliError> {
    let Ok(stream) = connect(endpoint).await else { return Ok(None) };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driven = tokio::spawn(connection);
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("/{method}"))
        .header(hyper::header::HOST, "")
        .body(Full::new(Bytes::from(serde_json::to_vec(json)?)))?;
    let response = sender.send_request(request).await?;
    let body = response.into_body().collect().await?.to_bytes();
    driven.abort();
    let mut reply: serde_json::Value = serde_json::from_slice(&body)?;
    match reply.get("Err").and_then(|e| e.as_str()) {
        Some(error) if !error.is_empty() => Err(error.to_owned().into()),
        _ => Ok(Some(reply["Done"].take())),
    }
}

/// Bytes of a reply that are searched for an `Err`.
const ERROR_HEAD: usize = 64 << 10;
