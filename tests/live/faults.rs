//! FIFREEZE, FITHAW and FICLONE watched and made to fail, in the program's own calls.
//!
//! ```text
//!   cc ─► faults.so ─ LD_PRELOAD ─► the plugin: each ioctl of the three ─► <folder>/calls, a line each
//!                                                <folder>/no-thaw there  ─► FITHAW fails with EIO, and is not made
//! ```

use super::support::Plugin;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Stands before the C library's function in the plugin.
const SOURCE: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int there(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    const char *folder = getenv("FAULTS"), *name = NULL;
    if ((unsigned)request == (unsigned)FIFREEZE) name = "freeze";
    if ((unsigned)request == (unsigned)FITHAW) name = "thaw";
    if ((unsigned)request == (unsigned)FICLONE) name = "clone";
    if (!folder || !name) return (int)syscall(SYS_ioctl, fd, request, argument);
    char fault[32];
    snprintf(fault, sizeof fault, "no-%s", name);
    long result = -1;
    if (there(folder, fault)) errno = EIO;
    else result = syscall(SYS_ioctl, fd, request, argument);
    int error = errno;
    char path[4096], line[64];
    snprintf(path, sizeof path, "%s/calls", folder);
    int calls = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (calls >= 0) {
        int length = snprintf(line, sizeof line, "%s %d\n", name, result < 0 ? error : 0);
        if (write(calls, line, length) != length) abort();
        close(calls);
    }
    errno = error;
    return (int)result;
}
"#;

/// The calls of one plugin.
pub(crate) struct Faults {
    folder: tempfile::TempDir,
}

impl Faults {
    /// A plugin whose calls go through here.
    pub(crate) fn plugin(arguments: &[&str]) -> (Plugin, Self) {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("faults.c"), folder.path().join("faults.so"));
        fs::write(&source, SOURCE).unwrap();
        let mut build = Command::new("cc");
        build.args(["-shared", "-fPIC", "-Wall", "-o"]).arg(&library).arg(&source);
        let output = build.output().expect("cc must be installed: scripts/install-deps");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let environment = [("LD_PRELOAD", library.as_path()), ("FAULTS", folder.path())];
        let plugin = Plugin::start_in(arguments, &environment);
        (plugin, Self { folder })
    }

    fn fault(&self, call: &str) -> PathBuf {
        self.folder.path().join(format!("no-{call}"))
    }

    /// From now on `call` (freeze, thaw, clone) fails.
    pub(crate) fn fail(&self, call: &str) {
        fs::write(self.fault(call), "").unwrap();
    }

    /// It works again.
    pub(crate) fn mend(&self, call: &str) {
        fs::remove_file(self.fault(call)).unwrap();
    }

    /// All calls so far: name and error number, 0 for those that worked.
    pub(crate) fn calls(&self) -> Vec<(String, i32)> {
        let text = fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default();
        let parse = |line: &str| {
            let (name, error) = line.split_once(' ').unwrap();
            (name.to_owned(), error.parse().unwrap())
        };
        text.lines().map(parse).collect()
    }

    /// How many of one call ended so.
    pub(crate) fn count(&self, call: &str, error: i32) -> usize {
        self.calls().iter().filter(|(name, e)| name == call && *e == error).count()
    }
}

/// Whether something can be written below a folder; a frozen file system lets the one who tries wait, so a thread is left
/// to it. Gives what to ask later whether it was.
pub(crate) fn writing(folder: &Path) -> impl FnMut() -> bool + use<> {
    let file = folder.join(format!("written-{}", uuid::Uuid::new_v4()));
    let thread = std::thread::spawn(move || fs::write(file, "x").unwrap());
    move || thread.is_finished()
}
