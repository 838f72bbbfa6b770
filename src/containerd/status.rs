//! Errors of the driver as gRPC codes.
//!
//! ```text
//!   no such snapshot        NotFound             the store's disk is full    ResourceExhausted
//!   key or name is taken    AlreadyExists        damaged data                DataLoss
//!   wrong state             FailedPrecondition   ended by a client or Remove Cancelled
//!   wrong argument          InvalidArgument      everything else             Internal
//! ```
//!
//! The code is all that containerd's proxy keeps of an error (`errgrpc.ToNative`); the table follows
//! `core/snapshots/storage/bolt.go`. **`Unimplemented` is never made here**: to containerd it means that the next differ is
//! to be asked, so only `differ` answers it, for mounts and media types that are not ours. Called by `called`.

use crate::{
    driver::{DriverError, snapshots::SnapshotRefusal},
    error::{Fault as _, Kind, with_causes},
};
use tonic::{Code, Status};

/// The status of an error: its code, and what the user of the engine reads.
pub(super) fn of(error: &DriverError) -> Status {
    Status::new(code_of(error), with_causes(error))
}

fn code_of(error: &DriverError) -> Code {
    if let Some(refusal) = error.snapshot_refusal() {
        return match refusal {
            SnapshotRefusal::NotFound(_) => Code::NotFound,
            SnapshotRefusal::Exists(_) => Code::AlreadyExists,
            SnapshotRefusal::Invalid(_) => Code::InvalidArgument,
            SnapshotRefusal::Precondition(_) => Code::FailedPrecondition,
        };
    }
    match error.kind() {
        Kind::Usage => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::State | Kind::Unsupported => Code::FailedPrecondition,
        Kind::Corrupt => Code::DataLoss,
        Kind::Limit | Kind::NoSpace => Code::ResourceExhausted,
        Kind::Busy => Code::Unavailable,
        Kind::Cancelled => Code::Cancelled,
        Kind::Io | Kind::ServiceVm | Kind::Internal => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Attempt, CorruptFile};
    use std::io;

    #[test]
    fn refusals_have_the_codes_of_containerds_own_snapshotters() {
        let refusal = |r: SnapshotRefusal| DriverError::from(r);
        let full = Attempt::on_path("write", "/h")(io::Error::from(io::ErrorKind::StorageFull));
        for (error, code) in [
            (refusal(SnapshotRefusal::NotFound("k".into())), Code::NotFound),
            (refusal(SnapshotRefusal::Exists("k".into())), Code::AlreadyExists),
            (refusal(SnapshotRefusal::Invalid("x".into())), Code::InvalidArgument),
            (refusal(SnapshotRefusal::Precondition("x".into())), Code::FailedPrecondition),
            (DriverError::Usage("x".into()), Code::InvalidArgument),
            (DriverError::Io(full), Code::ResourceExhausted),
            (DriverError::Corrupt(CorruptFile::new("/h", "x")), Code::DataLoss),
            (DriverError::Internal("x".into()), Code::Internal),
        ] {
            let status = of(&error);
            assert_eq!(status.code(), code, "{error}");
            assert!(!status.message().is_empty());
        }
    }
}
