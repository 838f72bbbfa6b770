//! Connections: gRPC over HTTP/2, and HTTP/1.1 for an operator, on one listener.
//!
//! ```text
//!   accept ─► preface of HTTP/2? ─► tonic's routes        else ─► /healthz /metrics /svm /snapshots /unmount-idle
//!   stop: no new connection ─► running calls get the limit ─► what is left is cut off
//! ```
//!
//! containerd keeps one connection for all its calls, so a call that stalls must not stall the others: each stream has a
//! window of its own. Called by `cli`.

use super::{Face, differ::DiffService, snapshots::SnapshotService};
use crate::{
    driver::{
        Clients,
        snapshots::{SnapshotKind, keys, labels::Labels},
    },
    error::with_causes,
};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use containerd_api::{diff::diff_server::DiffServer, snapshots::snapshots_server::SnapshotsServer};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use serde::Serialize;
use std::{pin::pin, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Largest message in each direction, as containerd's own (`defaults.DefaultMaxRecvMsgSize`).
const MAX_MESSAGE: usize = 16 << 20;
/// Largest head of an HTTP/1.1 request.
const MAX_HEAD: usize = 64 << 10;

/// A snapshot in the list for an operator.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    namespace: String,
    name: String,
    kind: SnapshotKind,
    parent: String,
    labels: Labels,
}

fn router(face: Face) -> Router {
    let snapshots = SnapshotsServer::new(SnapshotService(face.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let diff = DiffServer::new(DiffService(face.clone()))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let operators = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/metrics", get(metrics))
        .route("/svm", get(service_vms))
        .route("/snapshots", get(list))
        .route("/unmount-idle", post(unmount_idle))
        .with_state(face);
    tonic::service::Routes::new(snapshots).add_service(diff).into_axum_router().merge(operators)
}

async fn metrics(State(face): State<Face>) -> Response {
    match face.metrics().render(&face.snapshots().gauges().await) {
        Ok(text) => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// For `lcow-graphdriver store unmount-idle`.
async fn unmount_idle(State(face): State<Face>) -> StatusCode {
    face.snapshots().unmount_idle().await;
    StatusCode::NO_CONTENT
}

async fn service_vms(State(face): State<Face>) -> Response {
    let vms = face.snapshots().service_vms().into_iter();
    let shown = vms.map(|vm| serde_json::json!({"name": vm.name, "leases": vm.leases, "machine": vm.machine, "console": vm.console}));
    axum::Json(shown.collect::<Vec<_>>()).into_response()
}

async fn list(State(face): State<Face>) -> Response {
    let rows = face.snapshots().rows().into_iter().map(|row| Row {
        id: row.id.to_string(),
        namespace: keys::parts(&row.info.name).0.to_owned(),
        name: row.info.name,
        kind: row.info.kind,
        parent: row.info.parent,
        labels: row.info.labels,
    });
    axum::Json(rows.collect::<Vec<_>>()).into_response()
}

/// Serves calls until `stop` resolves. Running calls then get `limit` to finish; what is left is cut off.
pub async fn serve<L>(mut listener: L, face: Face, limit: Duration, stop: impl Future<Output = ()> + Send)
where
    L: axum::serve::Listener,
{
    let clients = Clients::default();
    let idle = {
        let (clients, snapshots) = (clients.clone(), face.snapshots().clone());
        tokio::spawn(async move {
            loop {
                clients.all_gone().await;
                snapshots.unmount_idle().await;
            }
        })
    };
    let service = TowerToHyperService::new(router(face));
    let (stopping, cut, tasks) = (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
    let mut stop = pin!(stop);
    loop {
        let io = tokio::select! {
            biased;
            () = &mut stop => break,
            (io, _) = listener.accept() => io,
        };
        let (client, served) =
            (clients.arrive(), connection(io, service.clone(), stopping.clone(), cut.clone()));
        tasks.spawn(async move {
            served.await;
            drop(client);
        });
    }
    drop(listener);
    idle.abort();
    stopping.cancel();
    tasks.close();
    if timeout(limit, tasks.wait()).await.is_err() {
        tracing::warn!(
            connections = tasks.len(),
            seconds = limit.as_secs(),
            "cutting off calls that did not finish in time"
        );
        cut.cancel();
        tasks.wait().await;
    }
}

async fn connection<I>(
    io: I,
    service: TowerToHyperService<Router>,
    stopping: CancellationToken,
    cut: CancellationToken,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().max_buf_size(MAX_HEAD);
    let mut served = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut told = false;
    loop {
        tokio::select! {
            ended = served.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(error = %with_causes(&*error), "a connection ended early");
                }
                return;
            }
            () = stopping.cancelled(), if !told => {
                told = true;
                served.as_mut().graceful_shutdown();
            }
            () = cut.cancelled() => return,
        }
    }
}
