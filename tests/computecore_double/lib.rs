//! A **test double** of `computecore.dll`: the calls that `svm::hcs` makes, without Hyper-V.
//!
//! ```text
//!   create ─ document checked ─► machine ── start ─► files_agent.exe (dials \\.\pipe\lcow-double-<RuntimeId>)
//!   hot-add ─ document, grant, attributes, sharing, format checked ─► a raw file in the machine's own folder
//!   remove ─► what was written goes back into the VHDX      close of the last handle ─► the process is killed
//! ```
//!
//! Wrong use is answered as the service answers it, with an error document that says what is wrong. Faults come
//! through the kernel's command line, so that they belong to one machine:
//! `double.fail-add=N` the Nth hot-add fails · `double.pending=MS` every call is answered later · `double.lose-at=N` the
//! machine is lost in the Nth hot-add · `double.late-exit=MS` the word of its end comes late · `double.mute=1` no agent ·
//! `double.attributes=N` every file is taken to have these attributes (Wine has no sparse or compressed ones).
//! At any time through files in the machine's folder, `%TEMP%\computecore-double-<id>`: `order.kill`, `order.pause`.
#![cfg(windows)]
#![allow(unsafe_code, reason = "a DLL's exports take and give what its C callers do")]
#![allow(
    missing_docs,
    clippy::missing_safety_doc,
    clippy::missing_panics_doc,
    reason = "the interface is Microsoft's"
)]

mod check;
mod disk;

use lcow_sys::windows::foreign::ForeignProcess;
use parking_lot::{Condvar, Mutex};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::c_void,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    ptr,
    sync::{Arc, LazyLock},
    time::Duration,
};

const S_OK: u32 = 0;
const PENDING: u32 = 0xC037_0103;
const INVALID_STATE: u32 = 0xC037_0105;
const NOT_FOUND: u32 = 0xC037_010E;
const ALREADY_STOPPED: u32 = 0xC037_0110;
const INVALID_JSON: u32 = 0xC037_010D;
const TIMEOUT: u32 = 0xC037_0118;
const ACCESS_DENIED: u32 = 0x8007_0005;

#[link(name = "kernel32")]
unsafe extern "system" {
    fn LocalAlloc(flags: u32, bytes: usize) -> *mut c_void;
}

/// Whether a test has given this order since it was last asked for.
fn take_order(folder: &Path, name: &str) -> bool {
    std::fs::remove_file(folder.join(name)).is_ok()
}

/// An error with its document.
pub(crate) struct Fault(u32, String);

type Answer = Result<String, Fault>;

#[derive(Default)]
struct Operation {
    answer: Mutex<Option<(u32, String)>>,
    done: Condvar,
}

#[repr(C)]
pub struct Event {
    kind: u32,
    data: *const u16,
    operation: *mut c_void,
}

pub type Callback = unsafe extern "system" fn(*const Event, *const c_void);

#[derive(Default)]
struct Faults {
    fail_add: Option<u32>,
    lose_at: Option<u32>,
    pending: Option<Duration>,
    late_exit: Option<Duration>,
    mute: bool,
    attributes: u32,
}

#[derive(PartialEq, Clone, Copy)]
enum Phase {
    Created,
    Running,
    Stopped,
}

struct State {
    phase: Phase,
    agent: Option<Child>,
    disks: BTreeMap<String, disk::Disk>,
    adds: u32,
    callback: Option<(Callback, usize)>,
    handles: u32,
}

struct Machine {
    id: String,
    runtime_id: uuid::Uuid,
    console: String,
    folder: PathBuf,
    faults: Faults,
    state: Mutex<State>,
}

type Handle = Arc<Machine>;

static MACHINES: LazyLock<Mutex<HashMap<String, Handle>>> = LazyLock::new(Mutex::default);
/// What each machine was granted, by its id; `*` = every machine.
static GRANTS: LazyLock<Mutex<HashSet<(String, PathBuf)>>> = LazyLock::new(Mutex::default);

unsafe fn text(units: *const u16) -> String {
    if units.is_null() {
        return String::new();
    }
    let mut len = 0;
    unsafe {
        while *units.add(len) != 0 {
            len += 1;
        }
        String::from_utf16_lossy(std::slice::from_raw_parts(units, len))
    }
}

fn allocated(text: &str) -> *mut u16 {
    if text.is_empty() {
        return ptr::null_mut();
    }
    let units: Vec<u16> = text.encode_utf16().chain([0]).collect();
    unsafe {
        let memory = LocalAlloc(0, units.len() * 2).cast::<u16>();
        memory.copy_from_nonoverlapping(units.as_ptr(), units.len());
        memory
    }
}

/// Answers a call: through the operation, at once or later.
unsafe fn answer(
    operation: *mut c_void,
    later: Option<Duration>,
    work: impl FnOnce() -> Answer + Send + 'static,
) -> i32 {
    let operation = unsafe {
        Arc::increment_strong_count(operation.cast::<Operation>());
        Arc::from_raw(operation.cast::<Operation>())
    };
    let finish = move || {
        let result = match work() {
            Ok(document) => (S_OK, document),
            Err(Fault(code, document)) => (code, document),
        };
        *operation.answer.lock() = Some(result);
        operation.done.notify_all();
    };
    if let Some(later) = later {
        std::thread::spawn(move || {
            std::thread::sleep(later);
            finish();
        });
        return PENDING as i32;
    }
    finish();
    S_OK as i32
}

unsafe fn machine(handle: *mut c_void) -> Handle {
    unsafe {
        Arc::increment_strong_count(handle.cast::<Machine>());
        Arc::from_raw(handle.cast::<Machine>())
    }
}

impl Machine {
    /// Ends the agent and tells of it. The word may come late.
    fn end(self: &Arc<Self>, why: &str) {
        let mut state = self.state.lock();
        if state.phase == Phase::Stopped {
            return;
        }
        state.phase = Phase::Stopped;
        if let Some(mut agent) = state.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        state.disks.clear();
        let _ = std::fs::remove_dir_all(&self.folder);
        drop(state);
        MACHINES.lock().remove(&self.id);
        let (machine, why) = (self.clone(), why.to_owned());
        std::thread::spawn(move || {
            std::thread::sleep(machine.faults.late_exit.unwrap_or_default());
            let units: Vec<u16> = why.encode_utf16().chain([0]).collect();
            let event = Event { kind: 1, data: units.as_ptr(), operation: ptr::null_mut() };
            // Under the lock: a handle that is being closed waits until the callback has returned.
            let state = machine.state.lock();
            if let Some((callback, context)) = state.callback {
                unsafe { callback(&raw const event, context as *const c_void) };
            }
        });
    }

    fn start(self: &Arc<Self>) -> Answer {
        let mut state = self.state.lock();
        if state.phase != Phase::Created {
            return Err(Fault(INVALID_STATE, "it was started before".into()));
        }
        state.phase = Phase::Running;
        if self.faults.mute {
            return Ok(String::new());
        }
        let program = std::env::current_exe().unwrap();
        let program = program.parent().unwrap().join(r"..\examples\files_agent.exe");
        let pipe = format!(r"\\.\pipe\lcow-double-{}", self.runtime_id);
        let mut agent = Command::new(program)
            .arg(pipe)
            .arg(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Fault(0x8007_0002, format!("files_agent: {e}")))?;
        disk::serve_console(&self.console, agent.stderr.take().unwrap());
        state.agent = Some(agent);
        drop(state);
        // A guest that ends by itself ends its machine.
        let machine = self.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(20));
                let mut state = machine.state.lock();
                let Some(agent) = &mut state.agent else { return };
                if take_order(&machine.folder, "order.pause") {
                    ForeignProcess::open(agent.id()).and_then(|agent| agent.suspend()).unwrap();
                }
                if take_order(&machine.folder, "order.kill") {
                    let _ = agent.kill();
                }
                if agent.try_wait().is_ok_and(|ended| ended.is_some()) {
                    drop(state);
                    machine.end("the guest ended by itself");
                    return;
                }
            }
        });
        Ok(String::new())
    }

    fn modify(self: &Arc<Self>, document: &str) -> Answer {
        let request = check::modify(document)?;
        let mut state = self.state.lock();
        if state.phase != Phase::Running {
            return Err(Fault(INVALID_STATE, "it does not run".into()));
        }
        let raw = self.folder.join(request.serial.replace(':', "_"));
        let Some(settings) = request.settings else {
            let disk = state.disks.remove(&request.serial);
            let disk = disk.ok_or_else(|| Fault(0x8007_0490, format!("no disk at {}", request.serial)))?;
            return disk.give_back(&raw).map(|()| String::new());
        };
        state.adds += 1;
        if self.faults.lose_at == Some(state.adds) {
            drop(state);
            self.end("lost by order of the test");
            return Err(Fault(INVALID_STATE, "it was lost".into()));
        }
        if self.faults.fail_add == Some(state.adds) {
            return Err(Fault(0x8007_001F, "failed by order of the test".into()));
        }
        if state.disks.contains_key(&request.serial) {
            return Err(Fault(0x8007_00B7, format!("{} is taken", request.serial)));
        }
        let granted = {
            let grants = GRANTS.lock();
            let path = disk::plain(Path::new(&settings.path));
            grants.contains(&(self.id.clone(), path.clone()))
                || (settings.read_only && grants.contains(&("*".to_owned(), path)))
        };
        if !granted {
            return Err(Fault(ACCESS_DENIED, format!("{} may not open {}", self.id, settings.path)));
        }
        let disk =
            disk::Disk::lend(Path::new(&settings.path), settings.read_only, &raw, self.faults.attributes)?;
        state.disks.insert(request.serial, disk);
        Ok(String::new())
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsCreateOperation(_: *const c_void, _: *const c_void) -> *mut c_void {
    Arc::into_raw(Arc::new(Operation::default())).cast_mut().cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsCloseOperation(operation: *mut c_void) {
    drop(unsafe { Arc::from_raw(operation.cast::<Operation>()) });
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsWaitForOperationResult(
    operation: *mut c_void,
    millis: u32,
    document: *mut *mut u16,
) -> i32 {
    let operation = unsafe { &*operation.cast::<Operation>() };
    let mut answer = operation.answer.lock();
    operation.done.wait_while_for(&mut answer, |a| a.is_none(), Duration::from_millis(millis.into()));
    let Some((code, text)) = answer.take() else { return TIMEOUT as i32 };
    unsafe { *document = allocated(&text) };
    code as i32
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsCreateComputeSystem(
    id: *const u16,
    document: *const u16,
    operation: *mut c_void,
    _: *const c_void,
    system: *mut *mut c_void,
) -> i32 {
    let (id, document) = unsafe { (text(id), text(document)) };
    let made = check::create(&document).map(|created| {
        let machine = Arc::new(Machine {
            folder: std::env::temp_dir().join(format!("computecore-double-{id}")),
            id,
            runtime_id: uuid::Uuid::new_v4(),
            console: created.console,
            faults: created.faults,
            state: Mutex::new(State {
                phase: Phase::Created,
                agent: None,
                disks: BTreeMap::new(),
                adds: 0,
                callback: None,
                handles: 1,
            }),
        });
        std::fs::create_dir_all(&machine.folder).unwrap();
        MACHINES.lock().insert(machine.id.clone(), machine.clone());
        machine
    });
    let (later, answered) = match made {
        Ok(machine) => {
            let later = machine.faults.pending;
            unsafe { *system = Arc::into_raw(machine).cast_mut().cast() };
            (later, Ok(String::new()))
        }
        Err(fault) => {
            unsafe { *system = ptr::null_mut() };
            (None, Err(fault))
        }
    };
    unsafe { answer(operation, later, move || answered) }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsOpenComputeSystem(id: *const u16, _: u32, system: *mut *mut c_void) -> i32 {
    let id = unsafe { text(id) };
    let Some(machine) = MACHINES.lock().get(&id).cloned() else { return NOT_FOUND as i32 };
    machine.state.lock().handles += 1;
    unsafe { *system = Arc::into_raw(machine).cast_mut().cast() };
    S_OK as i32
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsStartComputeSystem(
    system: *mut c_void,
    operation: *mut c_void,
    _: *const u16,
) -> i32 {
    unsafe {
        let machine = machine(system);
        answer(operation, machine.faults.pending, move || machine.start())
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsModifyComputeSystem(
    system: *mut c_void,
    operation: *mut c_void,
    document: *const u16,
    _: *mut c_void,
) -> i32 {
    unsafe {
        let (machine, document) = (machine(system), text(document));
        answer(operation, machine.faults.pending, move || machine.modify(&document))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsGetComputeSystemProperties(
    system: *mut c_void,
    operation: *mut c_void,
    _: *const u16,
) -> i32 {
    unsafe {
        let machine = machine(system);
        let (id, runtime) = (machine.id.clone(), machine.runtime_id);
        let text = serde_json::json!({
            "Id": id, "SystemType": "VirtualMachine", "Owner": "lcow-graphdriver", "RuntimeId": runtime,
        });
        answer(operation, machine.faults.pending, move || Ok(text.to_string()))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsTerminateComputeSystem(
    system: *mut c_void,
    operation: *mut c_void,
    _: *const u16,
) -> i32 {
    unsafe {
        let machine = machine(system);
        answer(operation, machine.faults.pending, move || {
            if machine.state.lock().phase == Phase::Stopped {
                return Err(Fault(ALREADY_STOPPED, String::new()));
            }
            machine.end("terminated");
            Ok(String::new())
        })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsSetComputeSystemCallback(
    system: *mut c_void,
    _: u32,
    context: *const c_void,
    callback: Callback,
) -> i32 {
    let machine = unsafe { machine(system) };
    machine.state.lock().callback = Some((callback, context as usize));
    S_OK as i32
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsCloseComputeSystem(system: *mut c_void) {
    let machine = unsafe { Arc::from_raw(system.cast::<Machine>()) };
    let last = {
        let mut state = machine.state.lock();
        state.handles -= 1;
        // The callback is its maker's, who closes last here; a second handle is only opened to end a machine.
        if state.handles == 0 {
            state.callback = None;
        }
        state.handles == 0
    };
    if last {
        machine.end("its last handle was closed");
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsGrantVmAccess(id: *const u16, path: *const u16) -> i32 {
    let (id, path) = unsafe { (text(id), PathBuf::from(text(path))) };
    if !path.is_file() {
        return 0x8007_0002_u32 as i32;
    }
    GRANTS.lock().insert((id, disk::plain(&path)));
    S_OK as i32
}

#[unsafe(no_mangle)]
pub unsafe extern "system" fn HcsGrantVmGroupAccess(path: *const u16) -> i32 {
    let path = unsafe { PathBuf::from(text(path)) };
    if !path.is_file() {
        return 0x8007_0002_u32 as i32;
    }
    GRANTS.lock().insert(("*".to_owned(), disk::plain(&path)));
    S_OK as i32
}
