//! Security descriptors, written in SDDL.
//!
//! ```text
//!   "D:P(A;OICI;GA;;;SY)…" ──parse──► SecurityDescriptor ──► SECURITY_ATTRIBUTES of a pipe or directory
//! ```
//!
//! Called by `listen` (the pipe), `store` (its directories) and `svm`.

use super::{check, wide, wide_path};
use std::{ffi::OsStr, io, path::Path, ptr};
use windows_sys::Win32::{
    Foundation::LocalFree,
    Security::{
        Authorization::{ConvertStringSecurityDescriptorToSecurityDescriptorW, SDDL_REVISION_1},
        PSECURITY_DESCRIPTOR, SECURITY_ATTRIBUTES,
    },
    Storage::FileSystem::CreateDirectoryW,
};

/// A parsed security descriptor.
#[derive(Debug)]
pub struct SecurityDescriptor(PSECURITY_DESCRIPTOR);

// SAFETY: the memory never changes after its creation, and its only owner frees it once.
unsafe impl Send for SecurityDescriptor {}
// SAFETY: as above; shared readers see constant bytes.
unsafe impl Sync for SecurityDescriptor {}

impl SecurityDescriptor {
    /// Parses SDDL (`D:P(A;;GA;;;SY)(A;;GA;;;BA)`).
    ///
    /// # Errors
    /// `InvalidInput` for text that is not SDDL.
    pub fn parse(sddl: &str) -> io::Result<Self> {
        let text = wide(OsStr::new(sddl))?;
        let mut descriptor = ptr::null_mut();
        // SAFETY: the text ends with a NUL, and the system stores one pointer that LocalFree frees.
        let parsed = check(unsafe {
            ConvertStringSecurityDescriptorToSecurityDescriptorW(
                text.as_ptr(),
                SDDL_REVISION_1,
                &raw mut descriptor,
                ptr::null_mut(),
            )
        });
        parsed.map_err(|e| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("'{sddl}' is not a security descriptor: {e}"))
        })?;
        Ok(Self(descriptor))
    }

    /// The form for calls that create objects; valid while `self` exists.
    pub(crate) fn attributes(&self, inherit: bool) -> SECURITY_ATTRIBUTES {
        SECURITY_ATTRIBUTES {
            nLength: size_of::<SECURITY_ATTRIBUTES>() as u32,
            lpSecurityDescriptor: self.0,
            bInheritHandle: i32::from(inherit),
        }
    }
}

impl Drop for SecurityDescriptor {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a call whose result LocalFree frees, and nothing else frees it.
        unsafe { LocalFree(self.0) };
    }
}

/// Creates a directory with its own access list.
///
/// # Errors
/// `AlreadyExists`, or the parent directory is missing or not writable.
pub fn create_dir(path: &Path, descriptor: &SecurityDescriptor) -> io::Result<()> {
    let name = wide_path(path)?;
    let attributes = descriptor.attributes(false);
    // SAFETY: both pointers are valid for the call.
    check(unsafe { CreateDirectoryW(name.as_ptr(), &raw const attributes) })
}

/// The access list of a file or directory as SDDL, as stored by the system.
///
/// # Errors
/// The list cannot be read.
#[cfg(any(test, feature = "testing"))]
pub fn access_list(path: &Path) -> io::Result<String> {
    use windows_sys::Win32::Security::{
        Authorization::{
            ConvertSecurityDescriptorToStringSecurityDescriptorW, GetNamedSecurityInfoW, SE_FILE_OBJECT,
        },
        DACL_SECURITY_INFORMATION,
    };
    let name = wide_path(path)?;
    let mut descriptor = ptr::null_mut();
    // SAFETY: the name ends with a NUL; one pointer is stored, the others may be null.
    let status = unsafe {
        GetNamedSecurityInfoW(
            name.as_ptr(),
            SE_FILE_OBJECT,
            DACL_SECURITY_INFORMATION,
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
            &raw mut descriptor,
        )
    };
    if status != 0 {
        return Err(io::Error::from_raw_os_error(status as i32));
    }
    let descriptor = SecurityDescriptor(descriptor);
    let (mut text, mut len) = (ptr::null_mut(), 0);
    // SAFETY: the descriptor is the system's own; one pointer and one number are stored.
    check(unsafe {
        ConvertSecurityDescriptorToStringSecurityDescriptorW(
            descriptor.0,
            SDDL_REVISION_1,
            DACL_SECURITY_INFORMATION,
            &raw mut text,
            &raw mut len,
        )
    })?;
    // SAFETY: the call succeeded: so many units are there, the last of them a NUL.
    let units = unsafe { std::slice::from_raw_parts(text, len as usize) };
    let sddl = String::from_utf16_lossy(units).trim_end_matches('\0').to_owned();
    // SAFETY: the pointer came from the call that asks for LocalFree, and nothing uses it any more.
    unsafe { LocalFree(text.cast()) };
    Ok(sddl)
}

/// Who has which rights by a list in SDDL, whatever the order and the flags: names of rights as a file system keeps them.
#[cfg(any(test, feature = "testing"))]
pub fn rights(sddl: &str) -> std::collections::BTreeSet<(String, String)> {
    let entries = sddl.split('(').skip(1).filter_map(|entry| entry.split_once(')'));
    entries
        .map(|(entry, _)| {
            let fields: Vec<&str> = entry.split(';').collect();
            // Generic rights become those of files when the list is stored; read and execute has no name then.
            let right = match fields[2] {
                "GA" => "FA",
                "GRGX" | "FRFX" => "0x1200a9",
                other => other,
            };
            (fields[5].to_owned(), right.to_owned())
        })
        .collect()
}

/// Whether this is Wine, which keeps no lists: it makes a file's mode of them, and a list of the mode.
#[cfg(any(test, feature = "testing"))]
pub fn is_wine() -> bool {
    use windows_sys::Win32::System::LibraryLoader::{GetModuleHandleW, GetProcAddress};
    let Ok(name) = wide(OsStr::new("ntdll.dll")) else { return false };
    // SAFETY: both names end with a NUL, and the module is in every process.
    unsafe { GetProcAddress(GetModuleHandleW(name.as_ptr()), c"wine_get_version".as_ptr().cast()) }.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sddl_is_parsed_or_refused_with_its_text() {
        SecurityDescriptor::parse("D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GRGX;;;S-1-5-83-0)").unwrap();
        let error = SecurityDescriptor::parse("nonsense").unwrap_err();
        assert!(
            error.kind() == io::ErrorKind::InvalidInput && error.to_string().contains("nonsense"),
            "{error}"
        );
    }

    #[test]
    fn a_folder_with_a_list_can_be_used_by_its_maker() {
        let folder = tempfile::tempdir().unwrap();
        let descriptor =
            SecurityDescriptor::parse("D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GA;;;OW)").unwrap();
        let path = folder.path().join("private");
        create_dir(&path, &descriptor).unwrap();
        std::fs::write(path.join("f"), "x").unwrap();
        assert_eq!(create_dir(&path, &descriptor).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
    #[test]
    fn a_list_is_read_as_who_may_what() {
        let given = rights("D:P(A;OICI;GA;;;SY)(A;OICI;GRGX;;;S-1-5-83-0)");
        let kept = "D:PAI(A;;FA;;;SY)(A;OICIIO;GA;;;SY)(A;ID;0x1200a9;;;S-1-5-83-0)";
        assert_eq!(given, rights(kept));
        assert_ne!(given, rights("D:P(A;;FA;;;SY)(A;;FA;;;WD)"));
    }
}
