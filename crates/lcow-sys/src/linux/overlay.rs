//! Overlay mounts over any number of lowers.
//!
//! ```text
//!  new API (6.7+)   fsopen ─ fsconfig lowerdir+=a, lowerdir+=b, … upperdir= workdir= ─ fsmount ─ move_mount
//!  one page         thread: unshare(CLONE_FS), chdir(base), mount("lowerdir=a:b:…,upperdir=…")   ≤ 4095 bytes
//! ```
//!
//! Options that the kernel's configuration could enable are always explicit (`index`, `metacopy`, `redirect_dir`,
//! `nfs_export` off): images must not carry host-specific xattrs, and a crafted redirect in a lower must not be followed.
//! `xino` is explicit too, as the caller requests: with it the view is one device, whose inode numbers are those of the
//! layers with the index of the layer in the upper bits. Source: Documentation/filesystems/overlayfs.rst. Called by
//! `driver`.

use super::{Context, SysError};
use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    },
    thread::UnshareFlags,
};
use std::{
    ffi::{CString, OsStr},
    io,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

/// Number of bytes that the kernel copies of an option string: one page without the terminator. The smallest page of all
/// supported machines, so that a chain that works on one works on all.
pub const OPTION_PAGE: usize = 4096 - 1;
const EXPLICIT: [(&str, &str); 4] =
    [("index", "off"), ("metacopy", "off"), ("redirect_dir", "nofollow"), ("nfs_export", "off")];

/// An overlay to mount.
#[derive(Debug, Clone, Default)]
pub struct OverlaySpec {
    /// The directory that relative lowers, upper and work are relative to; the working directory of a one-page mount.
    pub base: PathBuf,
    /// Lower directories, topmost first; at least one.
    pub lowers: Vec<PathBuf>,
    /// The writable upper directory and its work directory (on the same file system); `None` for a read-only overlay.
    pub upper: Option<(PathBuf, PathBuf)>,
    /// SELinux label of all files (`context=`).
    pub context: Option<String>,
    /// Mount point; absolute.
    pub target: PathBuf,
    /// One device and unique inode numbers, which exceed 32 bits for lower files. Without it, files have the numbers of
    /// their layers and a device for each.
    pub xino: bool,
    /// Mount the view read-only, even with an upper directory.
    pub read_only: bool,
}

impl OverlaySpec {
    /// The options that are always explicit.
    fn switches(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        EXPLICIT.into_iter().chain([("xino", if self.xino { "on" } else { "off" })])
    }
}

/// The kernel interface of an overlay mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayMethod {
    /// The new API, or one page if the kernel lacks `lowerdir+`.
    Auto,
    /// Only the new API.
    NewApi,
    /// Only one option string with names relative to `base`.
    OnePage,
}

/// Whether the root of a layer is marked as opaque, so that it hides the layers below.
///
/// # Errors
/// [`SysError::Os`] if the attribute cannot be read; a missing attribute is not an error.
pub fn is_opaque(root: &Path) -> Result<bool, SysError> {
    let mut value = [0; 2];
    match rustix::fs::getxattr(root, "trusted.overlay.opaque", &mut value) {
        Ok(len) => Ok(value.get(..len) == Some(b"y")),
        Err(Errno::NODATA | Errno::RANGE | Errno::OPNOTSUPP) => Ok(false),
        Err(e) => Err(e).context("read the attributes of", root),
    }
}

/// Mounts the overlay and returns the method used ([`OverlayMethod::NewApi`] or [`OverlayMethod::OnePage`]).
///
/// # Errors
/// [`SysError::Os`]; [`SysError::Usage`] without lowers, if the names do not fit one page, or for a label that an option
/// string cannot carry.
pub fn mount_overlay(spec: &OverlaySpec, method: OverlayMethod) -> Result<OverlayMethod, SysError> {
    if spec.lowers.is_empty() {
        return Err(SysError::usage("mount overlay on", &spec.target, "no lower directory given"));
    }
    if method != OverlayMethod::OnePage {
        match new_api(spec) {
            Ok(()) => return Ok(OverlayMethod::NewApi),
            // EINVAL from `lowerdir+` (before 6.7), ENOSYS from fsopen (before 5.2), EPERM if the seccomp filter of a
            // container allows only the old mount call.
            Err(Refused::Unknown(_)) if method == OverlayMethod::Auto => {}
            Err(Refused::Unknown(e) | Refused::Failed(e)) => return Err(e),
        }
    }
    one_page(spec)?;
    Ok(OverlayMethod::OnePage)
}

enum Refused {
    /// The kernel does not support this method; the other may work.
    Unknown(SysError),
    Failed(SysError),
}

impl From<SysError> for Refused {
    fn from(e: SysError) -> Self {
        Self::Failed(e)
    }
}

fn new_api(spec: &OverlaySpec) -> Result<(), Refused> {
    let action = "mount overlay on";
    let unknown = |e: Errno| match e {
        Errno::NOSYS | Errno::PERM | Errno::INVAL => {
            Refused::Unknown(SysError::Os { action, subject: spec.target.clone(), source: e.into() })
        }
        e => Refused::Failed(SysError::Os { action, subject: spec.target.clone(), source: e.into() }),
    };
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(unknown)?;
    fsconfig_set_string(fs.as_fd(), "source", "overlay").map_err(unknown)?;
    for lower in &spec.lowers {
        let path = spec.base.join(lower);
        fsconfig_set_string(fs.as_fd(), "lowerdir+", &path).map_err(|e| match e {
            Errno::INVAL | Errno::NOSYS => unknown(e),
            e => Refused::Failed(SysError::Os {
                action: "add overlay lower",
                subject: path.clone(),
                source: e.into(),
            }),
        })?;
    }
    if let Some((upper, work)) = &spec.upper {
        for (key, path) in [("upperdir", spec.base.join(upper)), ("workdir", spec.base.join(work))] {
            fsconfig_set_string(fs.as_fd(), key, escape(path.as_os_str(), b"\\"))
                .context("set the overlay's writable directory", &path)?;
        }
    }
    for (key, value) in spec.switches() {
        fsconfig_set_string(fs.as_fd(), key, value).context("set overlay options for", &spec.target)?;
    }
    if let Some(context) = &spec.context {
        fsconfig_set_string(fs.as_fd(), "context", context.as_str())
            .context("set the label of", &spec.target)?;
    }
    if spec.read_only {
        fsconfig_set_flag(fs.as_fd(), "ro").context(action, &spec.target)?;
    }
    fsconfig_create(fs.as_fd()).context(action, &spec.target)?;
    let mut attributes = MountAttrFlags::empty();
    if spec.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let mount =
        fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(action, &spec.target)?;
    move_mount(mount.as_fd(), "", CWD, &spec.target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context(action, &spec.target)?;
    Ok(())
}

/// The option string of a one-page mount.
fn option_string(spec: &OverlaySpec) -> Result<CString, SysError> {
    let relative = |p: &Path| p.strip_prefix(&spec.base).map_or_else(|_| p.to_owned(), Path::to_owned);
    let mut data = b"lowerdir=".to_vec();
    for (n, lower) in spec.lowers.iter().enumerate() {
        if n > 0 {
            data.push(b':');
        }
        data.extend(escape(relative(lower).as_os_str(), b"\\:,"));
    }
    if let Some((upper, work)) = &spec.upper {
        for (key, path) in [("upperdir", upper), ("workdir", work)] {
            data.extend(format!(",{key}=").into_bytes());
            data.extend(escape(relative(path).as_os_str(), b"\\:,"));
        }
    }
    for (key, value) in spec.switches() {
        data.extend(format!(",{key}={value}").into_bytes());
    }
    if let Some(context) = &spec.context {
        // Labels with categories contain commas, so they are quoted as the kernel's LSM parser expects. That parser has no
        // escapes: a quote would end the label, and the rest would become options.
        if let Some(bad) = context.chars().find(|c| *c == '"' || *c == '\\' || c.is_control()) {
            let reason = format!("the label {context:?} holds {bad:?}, which an option string cannot carry");
            return Err(SysError::usage("mount overlay on", &spec.target, reason));
        }
        data.extend(format!(",context=\"{context}\"").into_bytes());
    }
    if data.len() > OPTION_PAGE {
        let reason = format!(
            "{} lowers need {} bytes of options, one page holds {OPTION_PAGE}",
            spec.lowers.len(),
            data.len()
        );
        return Err(SysError::usage("mount overlay on", &spec.target, reason));
    }
    CString::new(data)
        .map_err(|_| SysError::usage("mount overlay on", &spec.target, "a name holds a NUL byte"))
}

fn one_page(spec: &OverlaySpec) -> Result<(), SysError> {
    let data = option_string(spec)?;
    let flags = if spec.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    // The working directory is shared by all threads of a process, so the mount happens on a thread with its own.
    std::thread::scope(|scope| {
        let stand_in = std::thread::Builder::new().name("overlay-mount".into());
        let helper = stand_in.spawn_scoped(scope, || -> Result<(), SysError> {
            // SAFETY: CLONE_FS gives this thread its own working directory, root and umask and affects no descriptors or
            // memory of others; the thread ends right after the mount.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
                .context("unshare the working directory for", &spec.base)?;
            rustix::process::chdir(&spec.base).context("enter", &spec.base)?;
            rustix::mount::mount("overlay", &spec.target, "overlay", flags, Some(data.as_c_str()))
                .context("mount overlay on", &spec.target)
        });
        let helper = helper.context("start a helper thread for", &spec.target)?;
        helper.join().unwrap_or_else(|_| {
            Err(io::Error::other("the helper thread panicked")).context("mount overlay on", &spec.target)
        })
    })
}

/// Puts a backslash before each byte that the parser of overlayfs treats as a separator.
fn escape(name: &OsStr, special: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for &b in name.as_bytes() {
        if special.contains(&b) {
            out.push(b'\\');
        }
        out.push(b);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(lowers: usize) -> OverlaySpec {
        OverlaySpec {
            base: "/base".into(),
            lowers: (0..lowers).map(|n| format!("/base/l/{n}").into()).collect(),
            upper: Some(("u/0/upper".into(), "u/0/work".into())),
            context: None,
            target: "/t".into(),
            xino: true,
            read_only: false,
        }
    }

    #[test]
    fn short_names_of_128_lowers_fit_one_page() {
        let s = option_string(&spec(128)).unwrap();
        assert!(s.as_bytes().starts_with(b"lowerdir=l/0:l/1:"));
        assert!(
            s.as_bytes().ends_with(b",index=off,metacopy=off,redirect_dir=nofollow,nfs_export=off,xino=on")
        );
        let e = option_string(&spec(2000)).unwrap_err();
        assert!(e.to_string().contains("one page holds 4095"), "{e}");
    }

    #[test]
    fn a_label_never_becomes_another_option() {
        for label in ["a\",upperdir=/etc,x=\"", "a\"", "a\nb", "a\0b", "a\\"] {
            let s = OverlaySpec { context: Some(label.into()), ..spec(1) };
            let e = option_string(&s).unwrap_err().to_string();
            assert!(e.contains("the label"), "{e}");
        }
        let s = OverlaySpec { context: Some("u:r:t:s0:c1,c2".into()), ..spec(1) };
        assert!(option_string(&s).is_ok());
    }

    #[test]
    fn separators_in_names_are_escaped() {
        let mut s = spec(1);
        s.lowers = vec!["a:b,c\\d".into()];
        s.context = Some("system_u:object_r:container_file_t:s0:c1,c2".into());
        let text = option_string(&s).unwrap().into_string().unwrap();
        assert!(text.starts_with("lowerdir=a\\:b\\,c\\\\d,"), "{text}");
        assert!(text.ends_with(",context=\"system_u:object_r:container_file_t:s0:c1,c2\""), "{text}");
    }
}
