//! File operations of a store on NTFS or ReFS.
//!
//! ```text
//!   rename   MoveFileEx, write-through; retried while a scanner has the file open
//!   plain    not sparse, compressed or encrypted: Hyper-V attaches no such files (0xC03A001A)
//!   clone    shares blocks between files on ReFS; elsewhere the caller copies
//!   writers  reopened without sharing writes, which the system refuses while there are writers
//! ```
//!
//! Called by `store`, `svm` and `driver`.

use super::{check, tried, wide_path};
use std::{
    ffi::c_void,
    fs::File,
    io,
    os::windows::{
        fs::OpenOptionsExt,
        io::{AsRawHandle, FromRawHandle, OwnedHandle, RawHandle},
    },
    path::Path,
    ptr,
    time::{Duration, Instant},
};
use windows_sys::Win32::{
    Foundation::{
        ERROR_ACCESS_DENIED, ERROR_BLOCK_TOO_MANY_REFERENCES, ERROR_DELETE_PENDING, ERROR_DIR_NOT_EMPTY,
        ERROR_INVALID_FUNCTION, ERROR_INVALID_PARAMETER, ERROR_LOCK_VIOLATION, ERROR_NOT_SAME_DEVICE,
        ERROR_NOT_SUPPORTED, ERROR_SHARING_VIOLATION, GENERIC_READ, GENERIC_WRITE, INVALID_HANDLE_VALUE,
    },
    Storage::FileSystem::{
        COMPRESSION_FORMAT_NONE, FILE_ATTRIBUTE_COMPRESSED, FILE_ATTRIBUTE_ENCRYPTED,
        FILE_ATTRIBUTE_SPARSE_FILE, FILE_BASIC_INFO, FILE_FLAG_BACKUP_SEMANTICS, FILE_ID_INFO,
        FILE_SHARE_DELETE, FILE_SHARE_READ, FileBasicInfo, FileIdInfo, GetDiskFreeSpaceExW,
        GetFileInformationByHandleEx, MOVEFILE_REPLACE_EXISTING, MOVEFILE_WRITE_THROUGH, MoveFileExW,
        ReOpenFile,
    },
    System::{
        IO::DeviceIoControl,
        Ioctl::{
            DUPLICATE_EXTENTS_DATA, FSCTL_DUPLICATE_EXTENTS_TO_FILE, FSCTL_SET_COMPRESSION, FSCTL_SET_SPARSE,
        },
    },
};

/// How long an operation on a file that another process has open is retried. Virus scanners and indexers close files within
/// a second.
const PATIENCE: Duration = Duration::from_secs(3);
/// First pause between two attempts; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(2);

/// Whether an error may be temporary, because another process briefly has the file open.
pub fn is_transient(error: &io::Error) -> bool {
    let codes = [ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION, ERROR_ACCESS_DENIED];
    error.raw_os_error().is_some_and(|code| codes.contains(&(code as u32)))
}

/// Repeats `work` while it fails with an error that may be temporary, for up to three seconds.
///
/// # Errors
/// The last error.
pub fn patiently<T>(work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    patiently_if(is_transient, work)
}

/// Deletes a directory and its content. If the file system cannot remove names of open files immediately (before Windows 10
/// 1607, and Wine), they remain until the last handle is closed, and the directory is "not empty" until then.
///
/// # Errors
/// The last error, after retries.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let may_pass = |e: &io::Error| {
        let pending = [ERROR_DIR_NOT_EMPTY, ERROR_DELETE_PENDING];
        is_transient(e) || e.raw_os_error().is_some_and(|code| pending.contains(&(code as u32)))
    };
    patiently_if(may_pass, || std::fs::remove_dir_all(path))
}

fn patiently_if<T>(
    may_pass: impl Fn(&io::Error) -> bool,
    mut work: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let (begin, mut pause) = (Instant::now(), FIRST_PAUSE);
    loop {
        match work() {
            Err(e) if may_pass(&e) && begin.elapsed() < PATIENCE => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(200));
            }
            other => return other,
        }
    }
}

/// Renames a file or directory on one volume, replacing a file; durable when it returns.
///
/// # Errors
/// The last error, after retries.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let (old, new) = (wide_path(from)?, wide_path(to)?);
    let flags = MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH;
    // SAFETY: both names end with a NUL.
    patiently(|| check(unsafe { MoveFileExW(old.as_ptr(), new.as_ptr(), flags) }))
}

/// Makes the names in a directory durable, if the file system supports it.
///
/// # Errors
/// The directory cannot be opened or flushed. It is not an error if flushing directories is unsupported or not permitted:
/// NTFS and ReFS journal names in order anyway.
pub fn flush_folder(path: &Path) -> io::Result<()> {
    let opened = std::fs::OpenOptions::new().write(true).custom_flags(FILE_FLAG_BACKUP_SEMANTICS).open(path);
    let cannot = [ERROR_ACCESS_DENIED, ERROR_INVALID_FUNCTION, ERROR_NOT_SUPPORTED];
    match opened.and_then(|folder| folder.sync_all()) {
        Err(e) if e.raw_os_error().is_some_and(|code| cannot.contains(&(code as u32))) => Ok(()),
        // Wine reports that a directory is not a file.
        Err(e) if matches!(e.kind(), io::ErrorKind::IsADirectory | io::ErrorKind::InvalidInput) => Ok(()),
        other => other,
    }
}

/// Attributes of an open file (`FILE_ATTRIBUTE_…`).
///
/// # Errors
/// The system call fails.
pub fn attributes(file: &File) -> io::Result<u32> {
    let mut info = FILE_BASIC_INFO::default();
    // SAFETY: the structure has the given length.
    check(unsafe {
        GetFileInformationByHandleEx(
            file.as_raw_handle().cast(),
            FileBasicInfo,
            (&raw mut info).cast(),
            size_of::<FILE_BASIC_INFO>() as u32,
        )
    })?;
    Ok(info.FileAttributes)
}

/// Makes a file attachable to a virtual machine, by removing compression that it inherited from its directory.
///
/// # Errors
/// An attribute cannot be changed; the file is encrypted, which only its owner can undo.
pub fn make_plain(file: &File) -> io::Result<()> {
    let found = attributes(file)?;
    if found & FILE_ATTRIBUTE_COMPRESSED != 0 {
        control(file, FSCTL_SET_COMPRESSION, &COMPRESSION_FORMAT_NONE.to_le_bytes())
            .map_err(tried("uncompress"))?;
    }
    if found & FILE_ATTRIBUTE_SPARSE_FILE != 0 {
        control(file, FSCTL_SET_SPARSE, &[0]).map_err(tried("make not sparse"))?;
    }
    check_plain(file)
}

/// Checks that a virtual machine can attach a file.
///
/// # Errors
/// The file is sparse, compressed or encrypted, or its attributes cannot be read.
pub fn check_plain(file: &File) -> io::Result<()> {
    match not_plain(attributes(file)?) {
        None => Ok(()),
        Some(what) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!(
                "the file is {what}, and Hyper-V attaches no such disk; clear that attribute of the store's directory"
            ),
        )),
    }
}

/// The attribute that prevents a file from being attached, if any.
fn not_plain(attributes: u32) -> Option<&'static str> {
    let wrong = [
        (FILE_ATTRIBUTE_COMPRESSED, "compressed"),
        (FILE_ATTRIBUTE_SPARSE_FILE, "sparse"),
        (FILE_ATTRIBUTE_ENCRYPTED, "encrypted"),
    ];
    wrong.iter().find(|(bit, _)| attributes & bit != 0).map(|(_, what)| *what)
}

fn control(file: &File, code: u32, input: &[u8]) -> io::Result<()> {
    // SAFETY: the input is valid for its length.
    unsafe { control_raw(file, code, input.as_ptr().cast(), input.len()) }
}

/// # Safety
/// `input` must be valid for `len` bytes.
unsafe fn control_raw(file: &File, code: u32, input: *const c_void, len: usize) -> io::Result<()> {
    let mut returned = 0;
    // SAFETY: the input is valid for its length, there is no output, and the handle is not overlapped.
    check(unsafe {
        DeviceIoControl(
            file.as_raw_handle().cast(),
            code,
            input,
            len as u32,
            ptr::null_mut(),
            0,
            &raw mut returned,
            ptr::null_mut(),
        )
    })
}

/// Largest cluster of ReFS, in bytes; a clone begins and ends at a cluster boundary.
const CLUSTER: u64 = 64 << 10;
/// Most bytes of one clone; a call accepts less than 4 GiB.
const MOST_CLONED: u64 = 1 << 30;

/// Shares the blocks of `from` from offset `start` with `to` from offset 0, as far as the file system supports it (ReFS,
/// within one volume). Returns the number of bytes done, a prefix of `len`; the caller copies the rest, or everything. `to`
/// must be at least `len` bytes long.
///
/// # Errors
/// The call fails for another reason than missing support.
pub fn clone_prefix(from: &File, start: u64, to: &File, len: u64) -> io::Result<u64> {
    if !start.is_multiple_of(CLUSTER) {
        return Ok(0);
    }
    let whole = len - len % CLUSTER;
    let mut done = 0;
    while done < whole {
        let bytes = (whole - done).min(MOST_CLONED);
        let request = DUPLICATE_EXTENTS_DATA {
            FileHandle: from.as_raw_handle().cast(),
            SourceFileOffset: (start + done) as i64,
            TargetFileOffset: done as i64,
            ByteCount: bytes as i64,
        };
        // SAFETY: the structure has the given length, and both handles are open.
        let cloned = unsafe {
            let size = size_of::<DUPLICATE_EXTENTS_DATA>();
            control_raw(to, FSCTL_DUPLICATE_EXTENTS_TO_FILE, (&raw const request).cast(), size)
        };
        match cloned {
            Ok(()) => done += bytes,
            Err(e) if e.raw_os_error().is_some_and(|code| CANNOT_CLONE.contains(&(code as u32))) => break,
            Err(e) => return Err(tried("clone blocks")(e)),
        }
    }
    Ok(done)
}

/// Errors for another file system, another volume, files of different integrity, and a block that too many files share.
const CANNOT_CLONE: [u32; 5] = [
    ERROR_NOT_SUPPORTED,
    ERROR_INVALID_FUNCTION,
    ERROR_INVALID_PARAMETER,
    ERROR_NOT_SAME_DEVICE,
    ERROR_BLOCK_TOO_MANY_REFERENCES,
];

/// Volume and number of an open file; `None` if its number exceeds 64 bits (ReFS).
///
/// # Errors
/// The system call fails.
pub fn identity(file: &File) -> io::Result<Option<(u64, u64)>> {
    let mut info = FILE_ID_INFO::default();
    // SAFETY: the structure has the given length.
    check(unsafe {
        GetFileInformationByHandleEx(
            file.as_raw_handle().cast(),
            FileIdInfo,
            (&raw mut info).cast(),
            size_of::<FILE_ID_INFO>() as u32,
        )
    })?;
    let number = u128::from_le_bytes(info.FileId.Identifier);
    Ok(u64::try_from(number).ok().map(|number| (info.VolumeSerialNumber, number)))
}

/// Whether any handle of any process can write to an open file now.
///
/// # Errors
/// The system call fails.
pub fn has_writers(file: &File) -> io::Result<bool> {
    // SAFETY: the handle is open for the call.
    let handle = unsafe {
        ReOpenFile(file.as_raw_handle().cast(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, 0)
    };
    if handle == INVALID_HANDLE_VALUE {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(ERROR_SHARING_VIOLATION as i32) {
            Ok(true)
        } else {
            Err(error)
        };
    }
    // SAFETY: the call succeeded, so the handle is open and nothing else owns it; it is closed immediately.
    drop(unsafe { OwnedHandle::from_raw_handle(handle as RawHandle) });
    Ok(false)
}

/// Whether the handle of an open file may write.
pub fn is_writable(file: &File) -> bool {
    // SAFETY: the handle is open. A request for more access than it has fails.
    let handle = unsafe { ReOpenFile(file.as_raw_handle().cast(), GENERIC_WRITE, FILE_SHARE_READ, 0) };
    handle != INVALID_HANDLE_VALUE && {
        // SAFETY: as in `has_writers`.
        drop(unsafe { OwnedHandle::from_raw_handle(handle as RawHandle) });
        true
    }
}

/// Bytes available to this process on the volume of `path`.
///
/// # Errors
/// The system call fails.
pub fn available_bytes(path: &Path) -> io::Result<u64> {
    let name = wide_path(path)?;
    let mut bytes = 0;
    // SAFETY: the name ends with a NUL; one integer is written, the other pointers may be null.
    check(unsafe { GetDiskFreeSpaceExW(name.as_ptr(), &raw mut bytes, ptr::null_mut(), ptr::null_mut()) })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rename_replaces_a_file_and_moves_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("old"), "old").unwrap();
        std::fs::write(at("new"), "new").unwrap();
        rename(&at("new"), &at("old")).unwrap();
        assert_eq!(std::fs::read_to_string(at("old")).unwrap(), "new");
        std::fs::create_dir(at("folder")).unwrap();
        rename(&at("folder"), &at("elsewhere")).unwrap();
        flush_folder(folder.path()).unwrap();
        assert!(at("elsewhere").is_dir());
        assert_eq!(rename(&at("nothing"), &at("x")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn names_longer_than_260_characters_work() {
        let folder = tempfile::tempdir().unwrap();
        let deep = (0..6).fold(folder.path().to_owned(), |path, _| path.join("d".repeat(60)));
        assert!(deep.as_os_str().len() > 300);
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("a"), "x").unwrap();
        rename(&deep.join("a"), &deep.join("b")).unwrap();
        assert_eq!(std::fs::read_to_string(deep.join("b")).unwrap(), "x");
    }

    #[test]
    fn temporary_errors_are_retried_and_others_are_reported() {
        let mut left = 3;
        let busy = || io::Error::from_raw_os_error(ERROR_SHARING_VIOLATION as i32);
        patiently(|| {
            left -= 1;
            if left > 0 { Err(busy()) } else { Ok(()) }
        })
        .unwrap();
        let mut calls = 0;
        let missing: io::Result<()> = patiently(|| {
            calls += 1;
            Err(io::ErrorKind::NotFound.into())
        });
        assert!(missing.is_err() && calls == 1);
    }

    #[test]
    fn sparse_compressed_and_encrypted_files_are_no_disks() {
        // FILE_ATTRIBUTE_… as winnt.h has them: Wine has no such files to ask.
        for (attributes, expected) in [
            (0x20, None),
            (0x80, None),
            (0x2021, None),
            (0x220, Some("sparse")),
            (0x820, Some("compressed")),
            (0x4020, Some("encrypted")),
        ] {
            assert_eq!(not_plain(attributes), expected, "{attributes:#x}");
        }
    }

    /// Neither NTFS nor Wine can: the caller copies. On ReFS all but the last part of a cluster is done.
    #[test]
    fn a_clone_is_a_prefix_and_may_be_empty() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            File::options().read(true).write(true).create_new(true).open(folder.path().join(name)).unwrap()
        };
        let (from, to) = (open("from"), open("to"));
        let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n / 3) as u8).collect();
        io::Write::write_all(&mut &from, &bytes).unwrap();
        to.set_len(200_000).unwrap();
        let done = clone_prefix(&from, 0, &to, 200_000).unwrap();
        assert!(done == 0 || done == 3 * CLUSTER, "{done}");
        let copied = std::fs::read(folder.path().join("to")).unwrap();
        assert!(
            copied[..done as usize] == bytes[..done as usize]
                && copied[done as usize..].iter().all(|b| *b == 0)
        );
        assert_eq!(clone_prefix(&from, 512, &to, 100_000).unwrap(), 0, "not at a cluster's edge");
        assert_eq!(clone_prefix(&from, 0, &to, 1000).unwrap(), 0, "less than a cluster");
    }

    #[test]
    fn a_folder_with_an_open_file_goes_when_the_file_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tree");
        std::fs::create_dir(&path).unwrap();
        let held = File::create(path.join("f")).unwrap();
        let closer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(held);
        });
        remove_tree(&path).unwrap();
        closer.join().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn writers_are_seen_and_files_know_themselves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let writer = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        make_plain(&writer).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(has_writers(&reader).unwrap());
        assert_eq!(identity(&writer).unwrap(), identity(&reader).unwrap());
        drop(writer);
        assert!(!has_writers(&reader).unwrap());
        assert!(available_bytes(folder.path()).unwrap() > 0);
    }
}
