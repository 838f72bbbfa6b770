//! How a worker confines itself before it reads the first untrusted byte.
//!
//! ```text
//!   started with: restricted token, low integrity, job of one process (see `process`)
//!   then itself:  untrusted integrity ─ no new code ─ no child ─ no foreign images ─ no win32k ─ strict handles
//! ```
//!
//! The restrictions are independent, and the report of [`enter`] says which are in force. One that an old system lacks is
//! noted and is not fatal: job and token were required before the worker ran at all. Called by `svm-agent`.

use super::{
    check,
    process::{UNTRUSTED, own_token, set_integrity},
};
use crate::jail::JailReport;
use std::{io, os::windows::io::AsHandle};
use windows_sys::Win32::{
    Security::{TOKEN_ADJUST_DEFAULT, TOKEN_QUERY},
    System::{
        JobObjects::IsProcessInJob,
        Threading::{
            GetCurrentProcess, PROCESS_MITIGATION_POLICY, ProcessChildProcessPolicy,
            ProcessDynamicCodePolicy, ProcessExtensionPointDisablePolicy, ProcessImageLoadPolicy,
            ProcessStrictHandleCheckPolicy, ProcessSystemCallDisablePolicy, SetProcessMitigationPolicy,
        },
    },
};

/// Each policy is a set of bits in one 32-bit field.
const POLICIES: &[(&str, PROCESS_MITIGATION_POLICY, u32)] = &[
    // ProhibitDynamicCode
    ("no dynamic code", ProcessDynamicCodePolicy, 1),
    // NoChildProcessCreation
    ("no child process", ProcessChildProcessPolicy, 1),
    // NoRemoteImages, NoLowMandatoryLabelImages, PreferSystem32Images
    ("own images only", ProcessImageLoadPolicy, 0b111),
    // DisableExtensionPoints
    ("no extension points", ProcessExtensionPointDisablePolicy, 1),
    // DisallowWin32kSystemCalls
    ("no win32k", ProcessSystemCallDisablePolicy, 1),
    // RaiseExceptionOnInvalidHandleReference, HandleExceptionsPermanentlyEnabled
    ("strict handles", ProcessStrictHandleCheckPolicy, 0b11),
];

/// Confines this process as far as the system supports it.
///
/// # Errors
/// The process is not in a job: it was not started by the daemon and must end.
pub fn enter() -> io::Result<JailReport> {
    let mut in_job = 0;
    // SAFETY: a null job means any job; one integer is written.
    check(unsafe { IsProcessInJob(GetCurrentProcess(), std::ptr::null_mut(), &raw mut in_job) })?;
    if in_job == 0 {
        return Err(io::Error::other("the worker is not in a job; only the plugin starts workers"));
    }
    let mut report =
        JailReport { walls: vec!["job".into(), "restricted token".into()], ..JailReport::default() };
    let mut held = |wall: &str, result: io::Result<()>| match result {
        Ok(()) => report.walls.push(wall.into()),
        Err(e) => report.notes.push(format!("{wall}: {e}")),
    };
    held(
        "untrusted integrity",
        own_token(TOKEN_ADJUST_DEFAULT | TOKEN_QUERY)
            .and_then(|token| set_integrity(token.as_handle(), UNTRUSTED)),
    );
    for (wall, policy, bits) in POLICIES {
        // SAFETY: every one of these policies is a structure of 32 bits.
        let set = check(unsafe {
            SetProcessMitigationPolicy(*policy, (&raw const *bits).cast(), size_of::<u32>())
        });
        held(wall, set);
    }
    Ok(report)
}
