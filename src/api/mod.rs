//! The HTTP endpoints: `/Plugin.Activate`, `/GraphDriver.*`, `/healthz`, `/metrics`, `/svm`, `/Lcow.*` (for the command line).
//!
//! ```text
//!   POST /GraphDriver.X ─► router ─► extractor (ignores Content-Type, bounds the body)
//!                                  ─► Driver::x ─► 200 + JSON with Err ""   or   4xx/5xx + {"Err": text}
//!   ApplyDiff: query + chunked tar in          Diff: chunked tar out, cut without its last chunk on a late error
//! ```
//!
//! Invariants: only well-formed requests reach the driver; operations that change state run to their end even if the
//! client hangs up (only the two transfers are cancelled by it); nothing here limits a whole transfer; a reply is sent
//! at once, even if the rest of the request is still arriving, and reaches its client (`serve`); each request that
//! fails is one line in the log (`called`). Called by `cli` with the listeners of `listen`. The protocol's source is
//! moby's `daemon/graphdriver/proxy.go` and `pkg/plugins/client.go`, and what real daemons were seen to send.

mod called;
mod reply;
mod serve;
mod stream;
mod wire;

pub use serve::serve;

use crate::{
    driver::{Driver, LayerRequest as DriverRequest, SandboxGrown},
    error::with_causes,
    store::InitRecord,
    telemetry::{Metrics, Outcome},
};
use axum::{
    Extension, Router,
    body::Body,
    extract::{MatchedPath, Query, Request, State, rejection::QueryRejection},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use called::{Called, HEADER};
use futures_util::StreamExt;
use reply::{Failure, Ignored, Json, Reply};
use std::{path::PathBuf, sync::Arc};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument as _;

/// What every handler shares.
#[derive(Debug, Clone)]
pub struct Context {
    /// The driver.
    pub driver: Arc<Driver>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

/// The whole service.
pub fn router(context: Context) -> Router {
    let router = Router::new();
    #[cfg(target_os = "linux")]
    let router = router.route("/Lcow.Trim", post(trim));
    router
        .route("/Plugin.Activate", post(activate))
        .route("/GraphDriver.Init", post(init))
        .route("/GraphDriver.Capabilities", post(capabilities))
        .route("/GraphDriver.Create", post(create))
        .route("/GraphDriver.CreateReadWrite", post(create_read_write))
        .route("/GraphDriver.Remove", post(remove))
        .route("/GraphDriver.Get", post(get_layer))
        .route("/GraphDriver.Put", post(put))
        .route("/GraphDriver.Exists", post(exists))
        .route("/GraphDriver.Status", post(status))
        .route("/GraphDriver.GetMetadata", post(metadata))
        .route("/GraphDriver.Cleanup", post(cleanup))
        .route("/GraphDriver.Diff", post(diff))
        .route("/GraphDriver.Changes", post(changes))
        .route("/GraphDriver.DiffSize", post(diff_size))
        .route("/GraphDriver.ApplyDiff", post(apply_diff))
        .route("/Lcow.Grow", post(grow))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .route("/svm", get(service_vms))
        .route("/unmount-idle", post(unmount_idle))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(context.clone(), observe))
        .with_state(context)
}

type Answer<T> = Result<Reply<T>, Failure>;

/// Numbers, counts and logs each request.
async fn observe(State(context): State<Context>, mut request: Request, next: Next) -> Response {
    let endpoint = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unknown".to_owned(), |path| path.as_str().trim_start_matches('/').to_owned());
    let called = Called::new(context, endpoint);
    request.extensions_mut().insert(called.clone());
    let span = called.span();
    let mut response = next.run(request).instrument(span).await;
    if let Some(failure) = response.extensions_mut().remove::<Failure>() {
        return failure.reply(&called);
    }
    let status = response.status();
    response.headers_mut().insert(HEADER, called.header());
    if !status.is_success() {
        called.failed(Some(status), Outcome::Failed, "see the reply");
    } else if response.extensions_mut().remove::<Streams>().is_none() {
        called.finished(status);
    }
    response
}

/// Marks a reply whose body reports the outcome of the request itself.
#[derive(Clone)]
struct Streams;

/// Runs a state change to its end, whether or not the client waits for it.
async fn to_the_end<T: Send + 'static, E: Into<Failure> + Send + 'static>(
    called: Called,
    work: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, Failure> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(
        async move {
            let result = work.await.map_err(Into::into);
            if let Err(Err(failure)) = sender.send(result) {
                called.failed_alone(&failure.log);
            }
        }
        .in_current_span(),
    );
    if let Ok(result) = receiver.await {
        return result;
    }
    let why = task.await.err().map_or_else(|| "it returned no result".to_owned(), |e| e.to_string());
    Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the operation ended unexpectedly: {why}")))
}

async fn activate(_: Ignored) -> Reply<wire::Activated> {
    Reply(wire::Activated { implements: ["GraphDriver"] })
}

async fn init(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::InitRequest>,
) -> Answer<wire::Outcome> {
    if request.home.is_empty() {
        return Err(Failure::bad_request("Init names no Home"));
    }
    let init = InitRecord {
        opts: request.opts.unwrap_or_default(),
        uid_maps: request.uid_maps.unwrap_or_default(),
        gid_maps: request.gid_maps.unwrap_or_default(),
    };
    to_the_end(called, async move { context.driver.init(PathBuf::from(request.home), init).await }).await?;
    Ok(Reply(wire::Outcome::default()))
}

async fn capabilities(State(context): State<Context>, _: Ignored) -> Answer<wire::CapabilitiesReply> {
    let reproduces_exact_diffs = context.driver.reproduces_exact_diffs().await?;
    Ok(Reply(wire::CapabilitiesReply { capabilities: wire::Capabilities { reproduces_exact_diffs } }))
}

fn layer_request(request: wire::LayerRequest) -> DriverRequest {
    DriverRequest {
        id: request.id,
        parent: request.parent,
        storage_opt: request.storage_opt.unwrap_or_default(),
    }
}

async fn create(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::Outcome> {
    to_the_end(called, async move { context.driver.create(layer_request(request)).await }).await?;
    Ok(Reply(wire::Outcome::default()))
}

async fn create_read_write(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::Outcome> {
    to_the_end(called, async move { context.driver.create_read_write(layer_request(request)).await }).await?;
    Ok(Reply(wire::Outcome::default()))
}

async fn remove(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::Outcome> {
    to_the_end(called, async move { context.driver.remove(&request.id).await }).await?;
    Ok(Reply(wire::Outcome::default()))
}

async fn get_layer(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::DirReply> {
    let dir = to_the_end(called, async move { context.driver.get(&request.id, &request.mount_label).await })
        .await?;
    // A home is given as JSON text, so its folders are text as well.
    Ok(Reply(wire::DirReply { dir: dir.to_string_lossy().into_owned(), err: String::new() }))
}

async fn put(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::Outcome> {
    to_the_end(called, async move { context.driver.put(&request.id).await }).await?;
    Ok(Reply(wire::Outcome::default()))
}

async fn exists(
    State(context): State<Context>,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::ExistsReply> {
    Ok(Reply(wire::ExistsReply { exists: context.driver.exists(&request.id).await? }))
}

async fn status(State(context): State<Context>, _: Ignored) -> Answer<wire::StatusReply> {
    Ok(Reply(wire::StatusReply { status: context.driver.status().await }))
}

async fn metadata(
    State(context): State<Context>,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::MetadataReply> {
    let metadata = context.driver.metadata(&request.id).await?;
    Ok(Reply(wire::MetadataReply { metadata, err: String::new() }))
}

async fn cleanup(State(context): State<Context>, called: Called, _: Ignored) -> Answer<wire::Outcome> {
    to_the_end(called, async move { context.driver.cleanup().await }).await?;
    Ok(Reply(wire::Outcome::default()))
}

async fn diff(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::LayerRequest>,
) -> Result<Response, Failure> {
    let idle = context.driver.idle_timeout();
    let mut tar = Box::pin(context.driver.diff(&request.id, &request.parent).await?);
    // The first bytes are awaited before the status is sent, so that an early failure is a proper error.
    let first = match tar.next().await {
        Some(Ok(bytes)) => bytes,
        Some(Err(e)) => return Err(e.into()),
        None => {
            return Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "the service VM sent no tar"));
        }
    };
    let stream = futures_util::stream::once(async move { Ok(first) }).chain(tar);
    let body = stream::outgoing(stream, idle, context.metrics.sent(), called);
    Ok(([(header::CONTENT_TYPE, "application/x-tar")], Extension(Streams), body).into_response())
}

async fn changes(
    State(context): State<Context>,
    Json(request): Json<wire::LayerRequest>,
) -> Result<Response, Failure> {
    Ok(reply::changes(context.driver.changes(&request.id, &request.parent).await?))
}

async fn diff_size(
    State(context): State<Context>,
    Json(request): Json<wire::LayerRequest>,
) -> Answer<wire::SizeReply> {
    let size = context.driver.diff_size(&request.id, &request.parent).await?;
    Ok(Reply(wire::SizeReply { size, err: String::new() }))
}

async fn apply_diff(
    State(context): State<Context>,
    called: Called,
    query: Result<Query<wire::ApplyQuery>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Answer<wire::SizeReply> {
    let Query(query) = query.map_err(|e| Failure::bad_request(format!("invalid query: {e}")))?;
    called.names(&query.id);
    // What dockerd's client sends when it repeats a request whose connection broke: never a layer, and known to be
    // empty before anything is read, so the layer stays as it was.
    if headers.get(header::CONTENT_LENGTH).is_some_and(|n| n == "0") {
        if let Some(earlier) = context.driver.refused_before(&query.id).await {
            return Err(earlier.into());
        }
        return Err(Failure::bad_request(
            "the body is empty: no tar at all (an empty layer is a tar of 1024 zero bytes)",
        ));
    }
    let idle = context.driver.idle_timeout();
    let tar = stream::incoming(body, idle, context.metrics.received());
    let size = context.driver.apply_diff(&query.id, &query.parent, tar).await?;
    Ok(Reply(wire::SizeReply { size, err: String::new() }))
}

async fn healthz(State(context): State<Context>) -> Response {
    match context.driver.reproduces_exact_diffs().await {
        Ok(_) => (StatusCode::OK, "ok\n").into_response(),
        Err(e) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", with_causes(&e))).into_response(),
    }
}

/// Makes a sandbox larger; for `lcow-graphdriver store grow`, not for dockerd.
async fn grow(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::GrowRequest>,
) -> Answer<wire::Done<SandboxGrown>> {
    let work = async move { context.driver.grow(&request.id, request.bytes, request.at_next_start).await };
    let done = to_the_end(called, work).await?;
    Ok(Reply(wire::Done { done, err: String::new() }))
}

/// Gives back what mounted sandboxes do not use; for `lcow-graphdriver store trim`, not for dockerd.
#[cfg(target_os = "linux")]
async fn trim(
    State(context): State<Context>,
    called: Called,
    Json(request): Json<wire::TrimRequest>,
) -> Answer<wire::Done<Vec<crate::driver::Trimmed>>> {
    let done = to_the_end(called, async move { context.driver.trim(request.id.as_deref()).await }).await?;
    Ok(Reply(wire::Done { done, err: String::new() }))
}

/// The running service VMs and the end of their console output; for `lcow-graphdriver svm`, not for dockerd.
async fn service_vms(State(context): State<Context>) -> Response {
    let vms = context.driver.service_vms().into_iter();
    let shown = vms.map(|vm| wire::ServiceVm {
        name: vm.name,
        leases: vm.leases,
        machine: vm.machine,
        console: vm.console,
    });
    match serde_json::to_vec(&shown.collect::<Vec<_>>()) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(e) => Failure::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

/// For `lcow-graphdriver store unmount-idle`.
async fn unmount_idle(State(context): State<Context>) -> Reply<wire::Outcome> {
    context.driver.unmount_idle().await;
    Reply(wire::Outcome::default())
}

async fn metrics(State(context): State<Context>) -> Response {
    match context.metrics.render(&context.driver.gauges().await) {
        Ok(text) => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Err(e) => Failure::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

async fn unknown(request: Request) -> Failure {
    Failure::new(StatusCode::NOT_FOUND, format!("there is no method '{}'", request.uri().path()))
}

async fn wrong_method(method: Method, request: Request) -> Failure {
    Failure::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("'{}' cannot be used with {method}; send a POST", request.uri().path()),
    )
}

/// The panic itself was written to the log by the program's hook.
fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error; see the log of the driver")
        .into_response()
}
