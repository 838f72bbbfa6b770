//! `computecore.dll`, the API of the Host Compute Service, loaded at run time: with a static import the program would not
//! start where Hyper-V is not enabled.
//!
//! ```text
//!   Library ─ GetProcAddress ─► HcsCreateOperation, HcsCreateComputeSystem, …
//!   System::create ─► start ─► modify* ─► terminate ─► drop = HcsCloseComputeSystem (the machine ends with it)
//!   each call: operation ─► call ─► pending? wait ─► result document ─► close the operation
//! ```
//!
//! Every call blocks, at most up to its time-out. Called by `svm::hcs`.

use super::{wide, wide_path};
use std::{
    ffi::{OsStr, c_void},
    fmt,
    path::Path,
    ptr,
    sync::Arc,
    time::Duration,
};
use windows_sys::Win32::{
    Foundation::{HMODULE, LocalFree},
    System::LibraryLoader::{
        GetProcAddress, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS, LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR,
        LOAD_LIBRARY_SEARCH_SYSTEM32, LoadLibraryExW,
    },
};

/// Name of the DLL.
const NAME: &str = "computecore.dll";
/// Code and facility of an HCS error, whether it comes as HRESULT (0x8037…) or as status (0xC037…).
const CODE_MASK: u32 = 0x0FFF_FFFF;
/// The operation is pending; its result must be awaited.
const PENDING: u32 = 0x0037_0103;
/// The machine is in the wrong state for the call.
const INVALID_STATE: u32 = 0x0037_0105;
/// There is no such machine.
const NOT_FOUND: u32 = 0x0037_010E;
/// The machine has already stopped.
const ALREADY_STOPPED: u32 = 0x0037_0110;
/// `ERROR_NOT_FOUND` as HRESULT: the resource to change does not exist.
const NO_SUCH_RESOURCE: u32 = 0x8007_0490;
/// `HcsEventSystemExited`.
const EVENT_EXITED: u32 = 1;

type Operation = *mut c_void;
type RawSystem = *mut c_void;
type Text = *const u16;

#[repr(C)]
struct Event {
    kind: u32,
    data: Text,
    operation: Operation,
}

type Callback = unsafe extern "system" fn(*const Event, *const c_void);

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($arg:ty),*) -> $result:ty;)*) => {
        struct Functions { $($field: unsafe extern "system" fn($($arg),*) -> $result,)* }

        impl Functions {
            fn load(module: HMODULE) -> Result<Self, LoadError> {
                Ok(Self { $($field: {
                    // SAFETY: the module is loaded, and the name ends with a NUL.
                    let found = unsafe { GetProcAddress(module, concat!($name, "\0").as_ptr()) };
                    let found = found.ok_or(LoadError::Function($name))?;
                    // SAFETY: the function has this signature according to the documentation of the DLL.
                    unsafe { std::mem::transmute::<unsafe extern "system" fn() -> isize,
                        unsafe extern "system" fn($($arg),*) -> $result>(found) }
                },)* })
            }
        }
    };
}

functions! {
    create_operation = "HcsCreateOperation": fn(*const c_void, *const c_void) -> Operation;
    close_operation = "HcsCloseOperation": fn(Operation) -> ();
    wait = "HcsWaitForOperationResult": fn(Operation, u32, *mut *mut u16) -> i32;
    create = "HcsCreateComputeSystem": fn(Text, Text, Operation, *const c_void, *mut RawSystem) -> i32;
    open = "HcsOpenComputeSystem": fn(Text, u32, *mut RawSystem) -> i32;
    start = "HcsStartComputeSystem": fn(RawSystem, Operation, Text) -> i32;
    modify = "HcsModifyComputeSystem": fn(RawSystem, Operation, Text, *mut c_void) -> i32;
    properties = "HcsGetComputeSystemProperties": fn(RawSystem, Operation, Text) -> i32;
    terminate = "HcsTerminateComputeSystem": fn(RawSystem, Operation, Text) -> i32;
    set_callback = "HcsSetComputeSystemCallback": fn(RawSystem, u32, *const c_void, Callback) -> i32;
    close = "HcsCloseComputeSystem": fn(RawSystem) -> ();
    grant = "HcsGrantVmAccess": fn(Text, Text) -> i32;
    grant_group = "HcsGrantVmGroupAccess": fn(Text) -> i32;
}

/// Why the API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no DLL.
    #[error(
        "Hyper-V is not enabled: {NAME} cannot be loaded; enable it with: Enable-WindowsOptionalFeature -Online -FeatureName Microsoft-Hyper-V -All"
    )]
    Missing(#[source] std::io::Error),
    /// The DLL is too old.
    #[error("this Windows is too old: its {NAME} has no {0}; Windows 10 1809 or Server 2019 is required")]
    Function(&'static str),
}

/// A call that failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{call} failed with {code:#010x}{}", document_suffix(document))]
pub struct HcsError {
    /// Name of the function.
    pub call: &'static str,
    /// HRESULT or status.
    pub code: u32,
    /// The error document of the service; may be empty.
    pub document: String,
}

fn document_suffix(document: &str) -> String {
    if document.is_empty() { String::new() } else { format!(": {document}") }
}

impl HcsError {
    /// Whether the resource to be removed from a machine does not exist.
    pub fn is_absent(&self) -> bool {
        self.code == NO_SUCH_RESOURCE
    }

    /// Whether the machine to be ended has already ended.
    pub fn is_gone(&self) -> bool {
        [INVALID_STATE, NOT_FOUND, ALREADY_STOPPED].contains(&(self.code & CODE_MASK))
    }
}

/// The loaded DLL. It stays loaded until the process ends.
pub struct Library {
    functions: Functions,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Library")
    }
}

impl Library {
    /// Loads the system's DLL, or the one at `path` (a test double).
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(path: Option<&Path>) -> Result<Arc<Self>, LoadError> {
        let (name, flags) = match path {
            // Only from the system directory, so that a DLL beside the program is never loaded.
            None => (wide(OsStr::new(NAME)), LOAD_LIBRARY_SEARCH_SYSTEM32),
            Some(path) => (
                std::path::absolute(path).and_then(|p| wide(p.as_os_str())),
                LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR | LOAD_LIBRARY_SEARCH_DEFAULT_DIRS,
            ),
        };
        let name = name.map_err(LoadError::Missing)?;
        // SAFETY: the name ends with a NUL.
        let module = unsafe { LoadLibraryExW(name.as_ptr(), ptr::null_mut(), flags) };
        if module.is_null() {
            return Err(LoadError::Missing(std::io::Error::last_os_error()));
        }
        Ok(Arc::new(Self { functions: Functions::load(module)? }))
    }

    /// Makes one call within an operation and returns its result document.
    fn operate(
        &self,
        call: &'static str,
        patience: Duration,
        begin: impl FnOnce(&Functions, Operation) -> i32,
    ) -> Result<String, HcsError> {
        let functions = &self.functions;
        // SAFETY: both pointers may be null: the operation is awaited, without a callback.
        let operation = unsafe { (functions.create_operation)(ptr::null(), ptr::null()) };
        let begun = begin(functions, operation) as u32;
        let (mut code, mut document) = (begun, String::new());
        if begun == 0 || begun & CODE_MASK == PENDING {
            let mut text = ptr::null_mut();
            let millis = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX - 1);
            // SAFETY: the operation is open, and one pointer is stored.
            code = unsafe { (functions.wait)(operation, millis, &raw mut text) } as u32;
            document = take_text(text);
        }
        // SAFETY: the operation is open and not used again.
        unsafe { (functions.close_operation)(operation) };
        if code == 0 { Ok(document) } else { Err(HcsError { call, code, document }) }
    }

    /// Lets one machine open a file.
    ///
    /// # Errors
    /// [`HcsError`] of the service.
    pub fn grant_access(&self, machine: &str, path: &Path) -> Result<(), HcsError> {
        let call = "HcsGrantVmAccess";
        let (machine, path) = (text(call, machine)?, file_text(call, path)?);
        // SAFETY: both texts end with NULs.
        outcome(call, unsafe { (self.functions.grant)(machine.as_ptr(), path.as_ptr()) })
    }

    /// Lets all machines read a file. For shared layers, an access list that names each machine would overflow.
    ///
    /// # Errors
    /// [`HcsError`] of the service.
    pub fn grant_group_access(&self, path: &Path) -> Result<(), HcsError> {
        let call = "HcsGrantVmGroupAccess";
        let path = file_text(call, path)?;
        // SAFETY: the text ends with a NUL.
        outcome(call, unsafe { (self.functions.grant_group)(path.as_ptr()) })
    }
}

fn outcome(call: &'static str, code: i32) -> Result<(), HcsError> {
    if code == 0 { Ok(()) } else { Err(HcsError { call, code: code as u32, document: String::new() }) }
}

fn bad_text(call: &'static str) -> impl FnOnce(std::io::Error) -> HcsError {
    // E_INVALIDARG
    move |e| HcsError { call, code: 0x8007_0057, document: e.to_string() }
}

fn text(call: &'static str, text: &str) -> Result<Vec<u16>, HcsError> {
    wide(OsStr::new(text)).map_err(bad_text(call))
}

fn file_text(call: &'static str, path: &Path) -> Result<Vec<u16>, HcsError> {
    // The service requires plain paths if they are short enough, and verbatim ones beyond that.
    const LIMIT: usize = 248;
    let plain = path.as_os_str().len() < LIMIT;
    (if plain { wide(path.as_os_str()) } else { wide_path(path) }).map_err(bad_text(call))
}

/// Takes a text that the API allocated.
fn take_text(text: *mut u16) -> String {
    if text.is_null() {
        return String::new();
    }
    let mut len = 0;
    // SAFETY: the API's texts end with a NUL, and nothing behind it is read.
    while unsafe { *text.add(len) } != 0 {
        len += 1;
    }
    // SAFETY: `len` units were just read.
    let read = String::from_utf16_lossy(unsafe { std::slice::from_raw_parts(text, len) });
    // SAFETY: the API asks for LocalFree, and the text is not used again.
    unsafe { LocalFree(text.cast()) };
    read
}

type OnExit = Box<dyn Fn(String) + Send + Sync>;

/// A machine. Dropping it closes the handle; a machine ends with its last handle.
pub struct System {
    library: Arc<Library>,
    raw: RawSystem,
    /// Called by the service's threads until the handle is closed.
    _on_exit: Box<OnExit>,
}

// SAFETY: the API's handles may be used from any thread, and the callback is Send and Sync.
unsafe impl Send for System {}
// SAFETY: as above; the API serializes calls on one handle.
unsafe impl Sync for System {}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("System")
    }
}

unsafe extern "system" fn on_event(event: *const Event, context: *const c_void) {
    // SAFETY: the API passes a valid event, and the context that was set, which outlives the handle.
    let (event, on_exit) = unsafe { (&*event, &*context.cast::<OnExit>()) };
    if event.kind == EVENT_EXITED {
        let mut data = String::new();
        if !event.data.is_null() {
            let mut len = 0;
            // SAFETY: the text ends with a NUL, nothing after it is read, and it stays valid during the call.
            while unsafe { *event.data.add(len) } != 0 {
                len += 1;
            }
            // SAFETY: `len` units were just read.
            data = String::from_utf16_lossy(unsafe { std::slice::from_raw_parts(event.data, len) });
        }
        on_exit(data);
    }
}

impl System {
    /// Creates a machine without starting it. `on_exit` is called once, with the document that says how it ended.
    ///
    /// # Errors
    /// [`HcsError`] with the document of the service.
    pub fn create(
        library: &Arc<Library>,
        id: &str,
        document: &str,
        patience: Duration,
        on_exit: impl Fn(String) + Send + Sync + 'static,
    ) -> Result<Self, HcsError> {
        let call = "HcsCreateComputeSystem";
        let (id, document) = (text(call, id)?, text(call, document)?);
        let mut raw = ptr::null_mut();
        let created = library.operate(call, patience, |f, op| {
            // SAFETY: the texts end with NULs, the operation is open, no descriptor means the default one, and one
            // handle is stored.
            unsafe { (f.create)(id.as_ptr(), document.as_ptr(), op, ptr::null(), &raw mut raw) }
        });
        if raw.is_null() {
            return Err(created.err().unwrap_or(HcsError {
                call,
                code: 0x8000_FFFF,
                document: "no handle".into(),
            }));
        }
        let on_exit: Box<OnExit> = Box::new(Box::new(on_exit));
        let context: *const OnExit = &raw const *on_exit;
        let system = Self { library: library.clone(), raw, _on_exit: on_exit };
        created?;
        // SAFETY: the handle is open; the context lives in a box that is dropped after the handle is closed, and the
        // API makes no call after that.
        outcome("HcsSetComputeSystemCallback", unsafe {
            (library.functions.set_callback)(raw, 0, context.cast(), on_event)
        })?;
        Ok(system)
    }

    /// Opens a machine of an earlier process, to end it.
    ///
    /// # Errors
    /// [`HcsError`] of the service.
    pub fn open(library: &Arc<Library>, id: &str) -> Result<Self, HcsError> {
        /// `GENERIC_ALL`
        const ALL: u32 = 0x1000_0000;
        let call = "HcsOpenComputeSystem";
        let id = text(call, id)?;
        let mut raw = ptr::null_mut();
        // SAFETY: the text ends with a NUL, and one handle is stored.
        outcome(call, unsafe { (library.functions.open)(id.as_ptr(), ALL, &raw mut raw) })?;
        Ok(Self { library: library.clone(), raw, _on_exit: Box::new(Box::new(|_| {})) })
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`HcsError`] of the service.
    pub fn start(&self, patience: Duration) -> Result<(), HcsError> {
        let call = "HcsStartComputeSystem";
        // SAFETY: handle and operation are open; no options.
        self.library
            .operate(call, patience, |f, op| unsafe { (f.start)(self.raw, op, ptr::null()) })
            .map(drop)
    }

    /// Changes it (hot-add, remove).
    ///
    /// # Errors
    /// [`HcsError`] of the service.
    pub fn modify(&self, document: &str, patience: Duration) -> Result<(), HcsError> {
        let call = "HcsModifyComputeSystem";
        let document = text(call, document)?;
        let begin = |f: &Functions, op| {
            // SAFETY: handle and operation are open, the text ends with a NUL, and the identity may be null.
            unsafe { (f.modify)(self.raw, op, document.as_ptr(), ptr::null_mut()) }
        };
        self.library.operate(call, patience, begin).map(drop)
    }

    /// Its properties as JSON.
    ///
    /// # Errors
    /// [`HcsError`] of the service.
    pub fn properties(&self, patience: Duration) -> Result<String, HcsError> {
        let call = "HcsGetComputeSystemProperties";
        // SAFETY: handle and operation are open; without a query the basic properties are returned.
        self.library.operate(call, patience, |f, op| unsafe { (f.properties)(self.raw, op, ptr::null()) })
    }

    /// Ends it, if it has not ended.
    ///
    /// # Errors
    /// [`HcsError`] of the service.
    pub fn terminate(&self, patience: Duration) -> Result<(), HcsError> {
        let call = "HcsTerminateComputeSystem";
        // SAFETY: handle and operation are open; no options.
        let ended =
            self.library.operate(call, patience, |f, op| unsafe { (f.terminate)(self.raw, op, ptr::null()) });
        match ended {
            Err(e) if !e.is_gone() => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for System {
    fn drop(&mut self) {
        // SAFETY: the handle is open and not used again.
        unsafe { (self.library.functions.close)(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_dll_says_that_hyper_v_is_not_enabled() {
        let error = Library::load(Some(Path::new(r"C:\nowhere\computecore.dll"))).unwrap_err();
        assert!(error.to_string().contains("Hyper-V is not enabled"), "{error}");
    }

    #[test]
    fn benign_codes_are_known_in_both_forms() {
        let error = |code| HcsError { call: "x", code, document: String::new() };
        for code in [0xC037_0110, 0xC037_010E, 0xC037_0105, 0x8037_0110, 0x8037_010E, 0x8037_0105] {
            assert!(error(code).is_gone(), "{code:#x}");
        }
        assert!(!error(0xC037_0103).is_gone() && !error(0x8007_0005).is_gone());
    }
}
