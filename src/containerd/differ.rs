//! The Diff service: a blob of the content store becomes a layer, and a difference becomes a blob.
//!
//! ```text
//!   Apply ─ descriptor ─► content: Read ─► driver: expand, digest, unpack, check ─► {tar, diffID, size}
//!   Diff  ─ mounts ─► driver: tar ─► digest ─► (service VM: compress) ─► digest ─► content: Write under a lease of ours
//! ```
//!
//! Invariants:
//! * Mounts that are not ours, and media types that need a processor, are answered with Unimplemented: containerd then asks
//!   the next differ of its list. No other error has that code.
//! * A call that is cancelled ends its service VMs.
//! * The namespace is that of the header; versions before 2.1 send none, and then it is that of the snapshot whose mounts
//!   these are: containerd's keys begin with it.
//!
//! Called by containerd.

use super::{
    Face,
    called::Called,
    engine::{EngineError, UNCOMPRESSED},
    mask::{self, Labels},
    media, mounts,
};
#[cfg(target_os = "linux")]
use crate::driver::snapshots::Applied;
use crate::{
    driver::{
        DriverError,
        snapshots::{
            ApplyRequest as DriverRequest, Blob, BlobBytes, Compression, DiffRequest as DriverDiff,
            DigestKind, Digesting, ShownPlace, keys,
        },
    },
    error::with_causes,
};
use containerd_api::{
    NAMESPACE_HEADER,
    diff::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse, diff_server::Diff as Service},
    types::Descriptor,
};
use futures_util::{StreamExt, TryStreamExt, future::BoxFuture};
use std::sync::{Arc, OnceLock};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};
use tracing::Instrument;

/// Namespace of a snapshot whose key has none: that of `ctr` and of containerd's own clients.
const DEFAULT_NAMESPACE: &str = "default";

/// Most bytes of a blob in one message of a Write.
const MAX_CHUNK: usize = 1 << 20;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct DiffService(pub(super) Face);

impl DiffService {
    fn namespace(&self, headers: &MetadataMap, place: &ShownPlace) -> String {
        if let Some(name) = headers.get(NAMESPACE_HEADER).and_then(|value| value.to_str().ok())
            && !name.is_empty()
        {
            return name.to_owned();
        }
        let snapshot = self.0.snapshots().name_of(place).unwrap_or_default();
        match keys::parts(&snapshot).0 {
            "" => DEFAULT_NAMESPACE.to_owned(),
            name => name.to_owned(),
        }
    }

    async fn unpack(&self, headers: &MetadataMap, request: ApplyRequest) -> Result<Descriptor, Status> {
        let blob = request.diff.unwrap_or_default();
        let called = Called::new(&self.0, "Apply", &blob.digest);
        let place = mounts::place_of(&request.mounts).filter(|place| self.0.snapshots().takes_layer(place));
        let Some(place) = place else {
            return Err(
                called.pass_on("the mounts are not those of a snapshot that this differ can unpack into")
            );
        };
        // Payloads are for processors of other types. CRI's own pull sends ocicrypt's with every layer, encrypted or not
        // (`internal/cri/server/images/image_pull.go`, encryptedImagesPullOpts).
        if !media::is_layer(&blob.media_type) {
            let text =
                format!("media type '{}' is not handled by this differ", blob.media_type.escape_debug());
            return Err(called.pass_on(&text));
        }
        let Ok(size) = u64::try_from(blob.size) else {
            self.0.snapshots().spoil(&place);
            return Err(called.refuse(Status::invalid_argument("the descriptor has a negative size")));
        };
        let namespace = self.namespace(headers, &place);
        let content = Stored {
            face: &self.0,
            namespace: &namespace,
            digest: &blob.digest,
            size,
            broken: Arc::default(),
        };
        let applied = match Box::pin(self.0.snapshots().apply(DriverRequest { place }, &content))
            .instrument(called.span())
            .await
        {
            #[cfg(target_os = "linux")]
            Ok(applied) if self.is_of_damaged_file(&applied, &blob.digest) => {
                Err(called.refuse(Status::data_loss(format!(
                    "the file of blob {} has digest {}: containerd's content store is damaged",
                    blob.digest, applied.diff_id
                ))))
            }
            Ok(applied) => called.end(Ok(applied)),
            Err(FaceError::Driver(error)) => match content.broken.get() {
                Some(status) => Err(called.refuse(status.clone())),
                None => called.end(Err(error)),
            },
            Err(FaceError::Content(error)) => {
                Err(called.refuse(content_status(&error, &blob.digest, &namespace)))
            }
            #[cfg(target_os = "linux")]
            Err(FaceError::File(error)) => {
                Err(called.refuse(Status::failed_precondition(with_causes(&error))))
            }
        }?;
        Ok(Descriptor {
            media_type: media::TAR.into(),
            digest: applied.diff_id.to_string(),
            size: i64::try_from(applied.bytes).unwrap_or(i64::MAX),
            ..Descriptor::default()
        })
    }
}

impl DiffService {
    /// Whether a plain blob that was read as a file is another than the one that was asked for: its digest is its diffID.
    /// Compressed ones are digested while they are read (`file`).
    #[cfg(target_os = "linux")]
    fn is_of_damaged_file(&self, applied: &Applied, digest: &str) -> bool {
        self.0.data().is_some()
            && applied.compression == Compression::Plain
            && applied.diff_id.to_string() != digest
    }

    async fn pack(&self, headers: &MetadataMap, request: DiffRequest) -> Result<Descriptor, Status> {
        let called = Called::new(&self.0, "Diff", &request.r#ref);
        let Some((compression, media_type)) = media::packing(&request.media_type) else {
            let text =
                format!("media type '{}' is not made by this differ", request.media_type.escape_debug());
            return Err(called.pass_on(&text));
        };
        let places = (mounts::place_of(&request.left), mounts::place_of(&request.right));
        let (Some(left), Some(right)) = places else {
            return Err(called.pass_on("the mounts do not have the form of this service's"));
        };
        let namespace = self.namespace(headers, &right);
        let diff = DriverDiff { left, right, newest: request.source_date_epoch.map(|time| time.seconds) };
        if !self.0.snapshots().knows(&diff) {
            return Err(called.pass_on("the mounts are not those of snapshots of this service"));
        }
        let reference = if request.r#ref.is_empty() {
            format!("lcow-diff-{}", uuid::Uuid::new_v4())
        } else {
            request.r#ref
        };
        let labels = match mask::stored(&request.labels) {
            Ok(labels) => labels,
            Err(error) => return Err(called.refuse(Status::invalid_argument(error.to_string()))),
        };
        match self.write(&diff, compression, &namespace, &reference, labels).instrument(called.span()).await {
            Ok((digest, size)) => {
                called.done();
                Ok(Descriptor { media_type: media_type.into(), digest, size, ..Descriptor::default() })
            }
            Err(FaceError::Driver(error)) => called.end(Err(error)),
            Err(FaceError::Content(error)) => {
                Err(called.refuse(content_status(&error, &reference, &namespace)))
            }
            #[cfg(target_os = "linux")]
            Err(FaceError::File(error)) => {
                Err(called.refuse(Status::failed_precondition(with_causes(&error))))
            }
        }
    }

    /// Writes a diff into the content store; its digest and size.
    async fn write(
        &self,
        diff: &DriverDiff,
        compression: Compression,
        namespace: &str,
        reference: &str,
        mut labels: Labels,
    ) -> Result<(String, i64), FaceError> {
        let mut packed = self.0.snapshots().packed_diff(diff, compression).await?;
        let mut blob = self.0.content().write(namespace, reference).await.map_err(FaceError::Content)?;
        let digesting = Digesting::start(DigestKind::Sha256);
        while let Some(chunk) = packed.next().await {
            let mut chunk = chunk?;
            while !chunk.is_empty() {
                let part = chunk.split_to(chunk.len().min(MAX_CHUNK));
                digesting.update(part.clone()).await;
                blob.send(part).await.map_err(FaceError::Content)?;
            }
        }
        let (Some(digest), Some((diff_id, _))) = (digesting.finish().await, packed.plain()) else {
            return Err(DriverError::Internal("a diff ended without its digest".into()).into());
        };
        labels.insert(UNCOMPRESSED.into(), diff_id.to_string());
        let committed = blob.commit(digest.to_string(), labels).await.map_err(FaceError::Content)?;
        Ok((digest.to_string(), i64::try_from(committed.size).unwrap_or(i64::MAX)))
    }
}

/// A blob of containerd's content store.
struct Stored<'a> {
    face: &'a Face,
    namespace: &'a str,
    digest: &'a str,
    size: u64,
    /// What broke its stream, if containerd did.
    broken: Arc<OnceLock<Status>>,
}

impl Blob<FaceError> for Stored<'_> {
    fn open(&self) -> BoxFuture<'_, Result<BlobBytes, FaceError>> {
        Box::pin(async {
            #[cfg(target_os = "linux")]
            if let Some(root) = self.face.data() {
                let read = super::file::read(root.clone(), self.digest.to_owned(), self.size).await;
                return read.map_err(FaceError::File);
            }
            let read = self.face.content().read(self.namespace, self.digest, self.size).await;
            let (broken, namespace, digest) =
                (self.broken.clone(), self.namespace.to_owned(), self.digest.to_owned());
            let bytes = read.map_err(FaceError::Content)?.inspect_err(move |error| {
                if let Some(error) = EngineError::in_stream(error) {
                    let _ = broken.set(content_status(error, &digest, &namespace));
                }
            });
            Ok(Box::pin(bytes) as BlobBytes)
        })
    }
}

/// Why an Apply or a Diff failed.
enum FaceError {
    /// In the driver.
    Driver(DriverError),
    /// The content store has no such blob, or does not take one.
    Content(EngineError),
    /// The file of a blob cannot be read.
    #[cfg(target_os = "linux")]
    File(super::file::FileError),
}

impl From<DriverError> for FaceError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

/// The status of a failure of the content store.
fn content_status(error: &EngineError, blob: &str, namespace: &str) -> Status {
    let code = match error {
        EngineError::NotFound { .. } => Code::NotFound,
        _ => Code::Unavailable,
    };
    Status::new(
        code,
        format!("blob '{}' of namespace '{namespace}': {}", blob.escape_debug(), with_causes(error)),
    )
}

#[tonic::async_trait]
impl Service for DiffService {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let (headers, _, request) = request.into_parts();
        let applied = Box::pin(self.unpack(&headers, request)).await?;
        Ok(Response::new(ApplyResponse { applied: Some(applied) }))
    }

    async fn diff(&self, request: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        let (headers, _, request) = request.into_parts();
        let diff = Box::pin(self.pack(&headers, request)).await?;
        Ok(Response::new(DiffResponse { diff: Some(diff) }))
    }
}
