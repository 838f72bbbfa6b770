//! Worker processes: a job of one process, a token without rights, and only the handles that it is given.
//!
//! ```text
//!   CreateRestrictedToken ─ no privileges, administrators deny-only, low integrity
//!   CreateProcessAsUser   ─ two inherited handles (control, stderr), no window, in its job from the first instruction:
//!                           one process, memory limit, killed with the job's last handle ─ resume
//!   DuplicateHandle       ─ disks and channels, with no more access than the worker may have
//! ```
//!
//! The job ends with this process, however that ends, and the worker with the job. Called by `svm::embedded`.

use super::{check, tried, wide};
use std::{
    ffi::{OsStr, OsString},
    io,
    os::windows::{
        ffi::OsStrExt,
        io::{AsHandle, AsRawHandle, BorrowedHandle, FromRawHandle, OwnedHandle, RawHandle},
    },
    path::PathBuf,
    ptr,
};
use windows_sys::Win32::{
    Foundation::{
        DUPLICATE_SAME_ACCESS, DuplicateHandle, HANDLE, HANDLE_FLAG_INHERIT, LocalFree, SetHandleInformation,
        WAIT_OBJECT_0,
    },
    Security::{
        Authorization::ConvertStringSidToSidW, CreateRestrictedToken, DISABLE_MAX_PRIVILEGE, GetLengthSid,
        PSID, SID_AND_ATTRIBUTES, SetTokenInformation, TOKEN_ADJUST_DEFAULT, TOKEN_ASSIGN_PRIMARY,
        TOKEN_DUPLICATE, TOKEN_MANDATORY_LABEL, TOKEN_QUERY, TokenIntegrityLevel,
    },
    Storage::FileSystem::{FILE_GENERIC_READ, FILE_GENERIC_WRITE},
    System::{
        JobObjects::{
            CreateJobObjectW, IsProcessInJob, JOB_OBJECT_LIMIT_ACTIVE_PROCESS,
            JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION, JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE,
            JOB_OBJECT_LIMIT_PROCESS_MEMORY, JOBOBJECT_EXTENDED_LIMIT_INFORMATION,
            JobObjectExtendedLimitInformation, SetInformationJobObject, TerminateJobObject,
        },
        SystemServices::SE_GROUP_INTEGRITY,
        Threading::{
            CREATE_NO_WINDOW, CREATE_SUSPENDED, CREATE_UNICODE_ENVIRONMENT, CreateProcessAsUserW,
            DeleteProcThreadAttributeList, EXTENDED_STARTUPINFO_PRESENT, GetCurrentProcess,
            GetExitCodeProcess, INFINITE, InitializeProcThreadAttributeList, OpenProcessToken,
            PROC_THREAD_ATTRIBUTE_HANDLE_LIST, PROC_THREAD_ATTRIBUTE_JOB_LIST, PROCESS_INFORMATION,
            ResumeThread, STARTF_USESTDHANDLES, STARTUPINFOEXW, UpdateProcThreadAttribute,
            WaitForSingleObject,
        },
    },
};

/// SID of the group of administrators.
const ADMINISTRATORS: &str = "S-1-5-32-544";
/// Integrity level that can write to almost nothing of a user; a process can start with it.
pub(super) const LOW_INTEGRITY: &str = "S-1-16-4096";
/// Integrity level that can write to nothing; a running process lowers itself to it.
pub(super) const UNTRUSTED: &str = "S-1-16-0";

/// A worker to start.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// Path of the program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its complete environment, except for `SystemRoot`, without which no program starts.
    pub env: Vec<(OsString, OsString)>,
    /// Limit of the memory that it may commit, in bytes.
    pub memory: u64,
}

/// A started worker. Dropping it kills the process.
#[derive(Debug)]
pub struct WorkerProcess {
    pid: u32,
    process: OwnedHandle,
    job: OwnedHandle,
}

/// A SID that the system allocated.
struct Sid(PSID);

impl Sid {
    fn parse(text: &str) -> io::Result<Self> {
        let (text, mut sid) = (wide(OsStr::new(text))?, ptr::null_mut());
        // SAFETY: the text ends with a NUL, and one pointer is stored.
        check(unsafe { ConvertStringSidToSidW(text.as_ptr(), &raw mut sid) })
            .map_err(tried("parse a SID"))?;
        Ok(Self(sid))
    }
}

impl Drop for Sid {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a call whose result LocalFree frees.
        unsafe { LocalFree(self.0) };
    }
}

/// Takes ownership of a handle that a call stored.
///
/// # Safety
/// `handle` must be open, and nothing else may own it.
unsafe fn own(handle: HANDLE) -> OwnedHandle {
    // SAFETY: the caller's promise.
    unsafe { OwnedHandle::from_raw_handle(handle as RawHandle) }
}

/// The token of this process.
pub(super) fn own_token(access: u32) -> io::Result<OwnedHandle> {
    let mut token = ptr::null_mut();
    // SAFETY: one handle is stored.
    check(unsafe { OpenProcessToken(GetCurrentProcess(), access, &raw mut token) })?;
    // SAFETY: the call succeeded.
    Ok(unsafe { own(token) })
}

/// Lowers the integrity level of a token.
pub(super) fn set_integrity(token: BorrowedHandle<'_>, level: &str) -> io::Result<()> {
    let sid = Sid::parse(level)?;
    let label = TOKEN_MANDATORY_LABEL {
        Label: SID_AND_ATTRIBUTES { Sid: sid.0, Attributes: SE_GROUP_INTEGRITY as u32 },
    };
    // SAFETY: the SID is valid.
    let length = size_of::<TOKEN_MANDATORY_LABEL>() as u32 + unsafe { GetLengthSid(sid.0) };
    // SAFETY: the structure and the SID that it points to live until the call returns.
    check(unsafe {
        SetTokenInformation(
            token.as_raw_handle().cast(),
            TokenIntegrityLevel,
            (&raw const label).cast(),
            length,
        )
    })
}

fn restricted_token() -> io::Result<OwnedHandle> {
    let own_access = TOKEN_DUPLICATE | TOKEN_ASSIGN_PRIMARY | TOKEN_QUERY | TOKEN_ADJUST_DEFAULT;
    let token = own_token(own_access).map_err(tried("open the own token"))?;
    let administrators = Sid::parse(ADMINISTRATORS)?;
    let disable = [SID_AND_ATTRIBUTES { Sid: administrators.0, Attributes: 0 }];
    let mut restricted = ptr::null_mut();
    // SAFETY: the array has the given length, and one handle is stored.
    check(unsafe {
        CreateRestrictedToken(
            token.as_raw_handle().cast(),
            DISABLE_MAX_PRIVILEGE,
            disable.len() as u32,
            disable.as_ptr(),
            0,
            ptr::null(),
            0,
            ptr::null(),
            &raw mut restricted,
        )
    })
    .map_err(tried("make a restricted token"))?;
    // SAFETY: the call succeeded.
    let restricted = unsafe { own(restricted) };
    set_integrity(restricted.as_handle(), LOW_INTEGRITY).map_err(tried("lower a token's integrity"))?;
    Ok(restricted)
}

fn job(memory: u64) -> io::Result<OwnedHandle> {
    // SAFETY: both pointers may be null.
    let handle = unsafe { CreateJobObjectW(ptr::null(), ptr::null()) };
    if handle.is_null() {
        return Err(tried("make a job")(io::Error::last_os_error()));
    }
    // SAFETY: the call succeeded.
    let job = unsafe { own(handle) };
    let mut limits = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
    limits.BasicLimitInformation.LimitFlags = JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
        | JOB_OBJECT_LIMIT_ACTIVE_PROCESS
        | JOB_OBJECT_LIMIT_PROCESS_MEMORY
        | JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION;
    limits.BasicLimitInformation.ActiveProcessLimit = 1;
    limits.ProcessMemoryLimit = usize::try_from(memory).unwrap_or(usize::MAX);
    // SAFETY: the structure has the given length.
    check(unsafe {
        SetInformationJobObject(
            job.as_raw_handle().cast(),
            JobObjectExtendedLimitInformation,
            (&raw const limits).cast(),
            size_of::<JOBOBJECT_EXTENDED_LIMIT_INFORMATION>() as u32,
        )
    })
    .map_err(tried("limit a job"))?;
    Ok(job)
}

/// Quotes an argument so that the C runtime and Rust's standard library parse it back unchanged.
fn quoted(argument: &OsStr, line: &mut Vec<u16>) {
    let (quote, backslash) = (u16::from(b'"'), u16::from(b'\\'));
    line.push(quote);
    let mut slashes = 0;
    for unit in argument.encode_wide() {
        if unit == quote {
            line.extend(std::iter::repeat_n(backslash, slashes + 1));
        }
        slashes = if unit == backslash { slashes + 1 } else { 0 };
        line.push(unit);
    }
    line.extend(std::iter::repeat_n(backslash, slashes));
    line.push(quote);
}

fn environment(pairs: &[(OsString, OsString)]) -> Vec<u16> {
    let mut all: Vec<(OsString, OsString)> = pairs.to_vec();
    if let Some(root) = std::env::var_os("SystemRoot") {
        all.push(("SystemRoot".into(), root));
    }
    // The system requires the names to be sorted.
    all.sort_by_key(|(name, _)| name.to_ascii_uppercase());
    let mut block = Vec::new();
    for (name, value) in all {
        block.extend(name.encode_wide().chain([u16::from(b'=')]).chain(value.encode_wide()).chain([0]));
    }
    block.push(0);
    block
}

/// An attribute list with the handles that a child inherits, and the job in which it is created: a daemon that was killed
/// between creating a process and assigning it to a job would leave that process behind.
struct Attributes {
    memory: Vec<usize>,
    /// Both must live as long as the list.
    handles: Box<[HANDLE; 2]>,
    job: Box<[HANDLE; 1]>,
}

impl Attributes {
    /// Number of attributes in the list.
    const COUNT: u32 = 2;

    fn new(handles: [HANDLE; 2], job: HANDLE) -> io::Result<Self> {
        let mut bytes = 0;
        // SAFETY: the first call only returns the size, and "fails".
        unsafe { InitializeProcThreadAttributeList(ptr::null_mut(), Self::COUNT, 0, &raw mut bytes) };
        let memory = vec![0; bytes.div_ceil(size_of::<usize>())];
        let mut list = Self { memory, handles: Box::new(handles), job: Box::new([job]) };
        // SAFETY: the memory is aligned and has the size that the system returned.
        check(unsafe {
            InitializeProcThreadAttributeList(list.memory.as_mut_ptr().cast(), Self::COUNT, 0, &raw mut bytes)
        })?;
        let attributes = [
            (PROC_THREAD_ATTRIBUTE_HANDLE_LIST, list.handles.as_ptr(), size_of_val(&*list.handles)),
            (PROC_THREAD_ATTRIBUTE_JOB_LIST, list.job.as_ptr(), size_of_val(&*list.job)),
        ];
        for (attribute, values, length) in attributes {
            // SAFETY: the list was initialised; the handles lie in boxes that live as long as the list.
            check(unsafe {
                UpdateProcThreadAttribute(
                    list.memory.as_mut_ptr().cast(),
                    0,
                    attribute as usize,
                    values.cast(),
                    length,
                    ptr::null_mut(),
                    ptr::null(),
                )
            })?;
        }
        Ok(list)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: the list was initialised and is not used again.
        unsafe { DeleteProcThreadAttributeList(self.memory.as_mut_ptr().cast()) };
    }
}

fn inheritable(handle: &OwnedHandle) -> io::Result<HANDLE> {
    let raw = handle.as_raw_handle().cast();
    // SAFETY: the handle is open.
    check(unsafe { SetHandleInformation(raw, HANDLE_FLAG_INHERIT, HANDLE_FLAG_INHERIT) })?;
    Ok(raw)
}

impl WorkerProcess {
    /// Starts a worker: `control` becomes its standard input, `stderr` its standard output and error. Both are closed in
    /// this process.
    ///
    /// # Errors
    /// Any step fails; the message names it. No process is left behind, and none runs with more rights than intended.
    #[expect(clippy::needless_pass_by_value, reason = "the handles are closed here once the worker has them")]
    pub fn start(command: &WorkerCommand, control: OwnedHandle, stderr: OwnedHandle) -> io::Result<Self> {
        let token = restricted_token()?;
        let job = job(command.memory)?;
        let mut line = Vec::new();
        quoted(command.program.as_os_str(), &mut line);
        for argument in &command.args {
            line.push(u16::from(b' '));
            quoted(argument, &mut line);
        }
        line.push(0);
        let program = super::wide(command.program.as_os_str())?;
        let block = environment(&command.env);
        let (input, output) = (inheritable(&control)?, inheritable(&stderr)?);
        let mut list = Attributes::new([input, output], job.as_raw_handle().cast())
            .map_err(tried("list a worker's handles and its job"))?;
        let mut startup = STARTUPINFOEXW::default();
        startup.StartupInfo.cb = size_of::<STARTUPINFOEXW>() as u32;
        startup.StartupInfo.dwFlags = STARTF_USESTDHANDLES;
        startup.StartupInfo.hStdInput = input;
        startup.StartupInfo.hStdOutput = output;
        startup.StartupInfo.hStdError = output;
        startup.lpAttributeList = list.memory.as_mut_ptr().cast();
        let mut started = PROCESS_INFORMATION::default();
        let flags =
            CREATE_SUSPENDED | CREATE_NO_WINDOW | CREATE_UNICODE_ENVIRONMENT | EXTENDED_STARTUPINFO_PRESENT;
        // SAFETY: all strings end with NULs (the block with two), the line is writable, and the structures live until
        // the call returns.
        check(unsafe {
            CreateProcessAsUserW(
                token.as_raw_handle().cast(),
                program.as_ptr(),
                line.as_mut_ptr(),
                ptr::null(),
                ptr::null(),
                1,
                flags,
                block.as_ptr().cast(),
                ptr::null(),
                (&raw const startup).cast(),
                &raw mut started,
            )
        })
        .map_err(tried("start a worker"))?;
        // SAFETY: the call succeeded and stored two handles.
        let (process, thread) = unsafe { (own(started.hProcess), own(started.hThread)) };
        let worker = Self { pid: started.dwProcessId, process, job };
        // From here on a failure drops the worker, which kills it before it has run an instruction.
        if !worker.is_held() {
            worker.kill_process();
            return Err(io::Error::other("the system started a worker outside its job"));
        }
        // SAFETY: the handle is open.
        if unsafe { ResumeThread(thread.as_raw_handle().cast()) } == u32::MAX {
            return Err(tried("resume a worker")(io::Error::last_os_error()));
        }
        Ok(worker)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it is in its job.
    pub fn is_held(&self) -> bool {
        let mut held = 0;
        // SAFETY: both handles are open, and one integer is written.
        let asked = check(unsafe {
            IsProcessInJob(
                self.process.as_raw_handle().cast(),
                self.job.as_raw_handle().cast(),
                &raw mut held,
            )
        });
        asked.is_ok() && held != 0
    }

    /// Duplicates a handle into the worker and returns its number there, with no more access than `access`.
    ///
    /// # Errors
    /// The worker has ended, or the handle lacks the access.
    pub fn give(&self, handle: BorrowedHandle<'_>, access: Given) -> io::Result<u64> {
        let (wanted, options) = match access {
            Given::Same => (0, DUPLICATE_SAME_ACCESS),
            Given::Read => (FILE_GENERIC_READ, 0),
            Given::ReadWrite => (FILE_GENERIC_READ | FILE_GENERIC_WRITE, 0),
        };
        let mut theirs = ptr::null_mut();
        // SAFETY: all handles are open; the new one belongs to the other process.
        check(unsafe {
            DuplicateHandle(
                GetCurrentProcess(),
                handle.as_raw_handle().cast(),
                self.process.as_raw_handle().cast(),
                &raw mut theirs,
                wanted,
                0,
                options,
            )
        })
        .map_err(tried("duplicate a handle into a worker"))?;
        Ok(theirs as u64)
    }

    /// Ends it, if it has not ended.
    pub fn kill(&self) {
        // SAFETY: the handle is open.
        unsafe { TerminateJobObject(self.job.as_raw_handle().cast(), KILLED) };
    }

    fn kill_process(&self) {
        // SAFETY: the handle is open.
        unsafe {
            windows_sys::Win32::System::Threading::TerminateProcess(
                self.process.as_raw_handle().cast(),
                KILLED,
            )
        };
    }

    /// A handle to wait for its end on another thread.
    ///
    /// # Errors
    /// The handle cannot be duplicated.
    pub fn end_watch(&self) -> io::Result<EndWatch> {
        self.process.try_clone().map(EndWatch)
    }
}

/// Exit status of a worker that this process ended.
const KILLED: u32 = 0xdead;

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The access of a duplicated handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// That of the original.
    Same,
    /// Reading a file.
    Read,
    /// Reading and writing a file.
    ReadWrite,
}

/// Waits for a process.
#[derive(Debug)]
pub struct EndWatch(OwnedHandle);

impl EndWatch {
    /// Blocks until the process has ended, and describes how it ended.
    pub fn wait(&self) -> String {
        // SAFETY: the handle is open.
        if unsafe { WaitForSingleObject(self.0.as_raw_handle().cast(), INFINITE) } != WAIT_OBJECT_0 {
            return "ended".into();
        }
        let mut status = 0;
        // SAFETY: the handle is open, and one integer is written.
        match check(unsafe { GetExitCodeProcess(self.0.as_raw_handle().cast(), &raw mut status) }) {
            Ok(()) if status == KILLED => "killed".into(),
            // These are status codes of the system (an access violation is 0xC0000005).
            Ok(()) if status >= 0x8000_0000 => format!("exit status {status:#x}"),
            Ok(()) => format!("exit status {status}"),
            Err(_) => "ended".into(),
        }
    }
}

/// A duplicate of this process's standard input: the control pipe of a worker.
///
/// # Errors
/// There is no standard input.
pub fn take_standard_input() -> io::Result<OwnedHandle> {
    io::stdin().as_handle().try_clone_to_owned()
}

/// Takes ownership of a handle that the daemon has duplicated into this process ([`WorkerProcess::give`]).
///
/// Sound only for numbers of the daemon, which sends each once. That cannot be checked: a worker trusts its daemon, and the
/// code that receives its messages must not contain `unsafe`.
///
/// # Errors
/// The number is not an open handle of this process.
pub fn take_given(number: u64) -> io::Result<OwnedHandle> {
    let handle = usize::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)? as HANDLE;
    let mut flags = 0;
    // SAFETY: the call only looks the number up.
    check(unsafe { windows_sys::Win32::Foundation::GetHandleInformation(handle, &raw mut flags) })?;
    // SAFETY: the handle is open, and the daemon that created it here has sent its number once.
    Ok(unsafe { own(handle) })
}

/// Sends Ctrl+Break to the process group of `pid`, which asks a console program to end.
///
/// # Errors
/// There is no such group, or this process has no console.
pub fn send_break(pid: u32) -> io::Result<()> {
    use windows_sys::Win32::System::Console::{CTRL_BREAK_EVENT, GenerateConsoleCtrlEvent};
    // SAFETY: the arguments are plain numbers.
    check(unsafe { GenerateConsoleCtrlEvent(CTRL_BREAK_EVENT, pid) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_as_windows_reads_them() {
        for (argument, expected) in [
            ("plain", r#""plain""#),
            (r#"a "b" c"#, r#""a \"b\" c""#),
            (r"C:\end\", r#""C:\end\\""#),
            (r#"x\\"y"#, r#""x\\\\\"y""#),
            ("", r#""""#),
        ] {
            let mut line = Vec::new();
            quoted(OsStr::new(argument), &mut line);
            assert_eq!(String::from_utf16(&line).unwrap(), expected);
        }
    }
}
