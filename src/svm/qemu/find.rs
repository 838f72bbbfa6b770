//! Finds QEMU and checks its version, and whether this host can accelerate it.
//!
//! `/dev/kvm` alone proves nothing: it exists on hosts whose processor has no virtualization, where starting a guest
//! hangs or fails. So the processor must report `vmx` or `svm`, the device must open, and even then the first boot has
//! a deadline, after which the backend continues with TCG.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

/// Oldest major version: 7.2 with TCG crashes at random under kernels from 6.1 on.
pub const OLDEST: (u32, u32) = (8, 2);
/// Where it is searched for.
const PLACES: &[&str] =
    &["/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"];

/// How guests' instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By translation.
    Tcg,
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG",
        })
    }
}

/// A usable QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// Its version as text.
    pub version: String,
}

/// Searches for QEMU: at `wanted`, or where distributions put it.
///
/// # Errors
/// What the operator has to do.
pub fn find(wanted: Option<&Path>) -> Result<Qemu, String> {
    let place = wanted.map(Path::to_owned).or_else(|| PLACES.iter().map(PathBuf::from).find(|p| p.exists()));
    let program = place.ok_or(
        "no qemu-system-x86_64 is installed; install QEMU 8.2 or later (Debian 12: qemu-system-x86 of bookworm-backports), or set lcow.svm=embedded",
    )?;
    let output = std::process::Command::new(&program)
        .arg("--version")
        .env_clear()
        .output()
        .map_err(|e| format!("{} cannot be run: {e}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, number) = parse_version(&text)
        .ok_or_else(|| format!("{} does not report its version: {}", program.display(), text.trim()))?;
    if number < OLDEST {
        return Err(format!(
            "{} is version {version}; {}.{} or later is needed (Debian 12: qemu-system-x86 of bookworm-backports)",
            program.display(),
            OLDEST.0,
            OLDEST.1
        ));
    }
    Ok(Qemu { program, version })
}

fn parse_version(text: &str) -> Option<(String, (u32, u32))> {
    let version = text.lines().next()?.split("version ").nth(1)?.split([' ', '(']).next()?;
    let mut parts = version.split('.');
    let number = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some((version.to_owned(), number))
}

/// The KVM device, if the processor supports virtualization.
pub fn kvm_device() -> Option<File> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    if !has_virtualisation(&cpuinfo) {
        return None;
    }
    File::options().read(true).write(true).open("/dev/kvm").ok()
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).and_then(|l| l.split_once(':'));
    flags.is_some_and(|(_, flags)| flags.split_ascii_whitespace().any(|f| f == "vmx" || f == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        for (text, version) in [
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", Some((10, 0))),
            ("QEMU emulator version 7.2.17 (qemu-7.2.17-1)", Some((7, 2))),
            ("QEMU emulator version 8.2.0", Some((8, 2))),
            ("something else", None),
            ("QEMU emulator version x", None),
        ] {
            assert_eq!(parse_version(text).map(|v| v.1), version, "{text}");
        }
    }

    #[test]
    fn virtualisation_is_a_flag_of_its_own_and_no_part_of_another() {
        assert!(has_virtualisation("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags : fpu svm\n"));
        assert!(!has_virtualisation("flags : fpu svm_lock nosvmx\nbugs : vmx\n"));
    }

    #[test]
    fn a_missing_or_wrong_program_is_a_message_that_tells_what_to_do() {
        let e = find(Some(Path::new("/nonexistent/qemu"))).unwrap_err();
        assert!(e.contains("cannot be run"), "{e}");
        let e = find(Some(Path::new("/bin/true"))).unwrap_err();
        assert!(e.contains("version"), "{e}");
    }
}
