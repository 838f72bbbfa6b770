//! A test that cannot run here reports so, and is counted as skipped, never as passed.
//!
//! ```text
//!   LCOW_SKIPS names a file: a line is added, the test ends, and scripts/test moves it from "passed" to "skipped"
//!   without it: a failure
//! ```

use std::{fs, io::Write};

/// Notes that a test cannot run here. The caller returns at once; `reason` says what is missing.
///
/// # Panics
/// If `LCOW_SKIPS` is not set, so that skips are not counted.
#[track_caller]
pub(crate) fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let Some(list) = std::env::var_os("LCOW_SKIPS") else {
        panic!("{name} cannot run here: {reason} (LCOW_SKIPS=FILE lets it be skipped, and counted there)");
    };
    let mut list = fs::File::options().create(true).append(true).open(list).expect("LCOW_SKIPS");
    list.write_all(format!("{name}: {reason}\n").as_bytes()).expect("LCOW_SKIPS");
}
