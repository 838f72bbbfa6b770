//! userns-remap: the user namespace whose maps the mounts of layers get.
//!
//! ```text
//!   layer.vhd   container ids ─► mount of the image ── id-mapped by this namespace ─► host ids in the merged view
//!   sandbox     host ids      ─► mounted as it is (overlayfs refuses an id-mapped upper)
//! ```
//!
//! Overlayfs accepts id-mapped lower layers from Linux 5.19 on. On older kernels userns-remap is refused at Init:
//! otherwise the first container would fail, with an error that explains nothing. Called by `home`.

use super::DriverError;
use crate::{error::Attempt, store::InitRecord, svm::IdRange};
use lcow_sys::linux::idmap::user_namespace;
use std::{os::fd::OwnedFd, sync::Arc};

/// The first kernel whose overlayfs accepts id-mapped lower layers.
const OVERLAY_ON_MAPPED: (u32, u32) = (5, 19);

/// The namespace for the maps of `init`; `None` without userns-remap.
///
/// # Errors
/// [`DriverError::Usage`] on a kernel that is too old, [`DriverError::Mount`] if the kernel refuses the maps.
pub(super) fn namespace(init: &InitRecord) -> Result<Option<Arc<OwnedFd>>, DriverError> {
    if init.uid_maps.is_empty() && init.gid_maps.is_empty() {
        return Ok(None);
    }
    namespace_of(&init.uid_maps, &init.gid_maps).map(|namespace| Some(Arc::new(namespace)))
}

/// A namespace with these maps.
///
/// # Errors
/// As [`namespace`].
pub(super) fn namespace_of(uids: &[IdRange], gids: &[IdRange]) -> Result<OwnedFd, DriverError> {
    check_kernel(&rustix::system::uname().release().to_string_lossy())?;
    let made = user_namespace(uids, gids);
    Ok(made.map_err(Attempt::on_path("make a user namespace for", "id maps"))?)
}

/// Refuses a kernel release, as `uname -r` prints it, that is too old. One that cannot be parsed passes: its mounts will
/// show.
fn check_kernel(release: &str) -> Result<(), DriverError> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else { return Ok(()) };
    if (major, minor) >= OVERLAY_ON_MAPPED {
        return Ok(());
    }
    let (least, and) = OVERLAY_ON_MAPPED;
    Err(DriverError::Usage(format!(
        "containers in user namespaces (userns-remap; with containerd, remap-ids and pods with hostUsers: false) need Linux \
         {least}.{and} or newer, whose overlayfs accepts id-mapped layers, and this kernel is {release}; update the kernel, \
         or start dockerd without --userns-remap, the pod with hostUsers: true"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_ids_are_refused_in_plain_words_on_kernels_before_5_19() {
        for release in ["5.19.0", "5.19", "6.1.0-18-amd64", "10.0-rc1", "unknown", "6", ""] {
            assert!(check_kernel(release).is_ok(), "{release}");
        }
        for release in ["5.18.19", "5.10.0-28-cloud-amd64", "4.19.1", "5.9"] {
            let error = check_kernel(release).unwrap_err().to_string();
            assert!(
                ["5.19", release, "--userns-remap", "hostUsers"].iter().all(|part| error.contains(part)),
                "{error}"
            );
        }
    }
}
