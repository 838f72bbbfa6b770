//! The jail of `image`: what a command that looks at an image cannot do, and what happens where a part of it is missing.

use crate::{Scene, image, sample, text};
use oci_image::testing::Packing;
use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

/// The jailed process of a command.
fn jailed_child(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn status(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

/// A command that waits for its standard input within the jail, and is looked at.
fn waiting(command: &mut Command, look: impl FnOnce(u32)) {
    let mut parent =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // The jail is complete when the filter of system calls is there, and the child then waits for the archive.
    let child = loop {
        if let Some(child) = jailed_child(parent.id())
            && status(child, "Seccomp") == "2"
            && status(child, "State").starts_with('S')
        {
            break child;
        }
        assert!(parent.try_wait().unwrap().is_none(), "the command ended");
        std::thread::yield_now();
    };
    look(child);
    drop(parent.stdin.take());
    assert!(!parent.wait().unwrap().success(), "an empty archive");
}

fn is_jailed(child: u32) {
    assert_eq!(status(child, "NoNewPrivs"), "1");
    for set in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
        assert!(status(child, set).bytes().all(|b| b == b'0'), "{set}");
    }
}

#[test]
fn images_are_read_without_rights_by_root_and_by_others() {
    waiting(&mut image(&["ls", "-"]), |child| {
        is_jailed(child);
        assert!(status(child, "Uid").split_whitespace().all(|id| id.parse::<u32>().unwrap() >= 0x4c45_0000));
    });
    // An ordinary user: the program must be executable for it.
    let scene = Scene::new();
    let program = scene.path("program");
    fs::copy(env!("CARGO_BIN_EXE_lcow-graphdriver"), &program).unwrap();
    fs::set_permissions(scene.path(""), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    command.args(["image", "ls", "-", "--scratch", "/tmp"]).uid(12345).gid(12345);
    waiting(&mut command, is_jailed);
    let source = scene.layout("layout", &sample(Packing::Gzip));
    let done = Command::new(&program).args(["image", "ls", &source]).uid(12345).gid(12345).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(done.stdout, text(&["ls", &source]).into_bytes());
}

#[test]
fn a_missing_part_of_the_jail_ends_the_command_unless_best_effort_was_given() {
    let scene = Scene::new();
    let source = scene.layout("layout", &sample(Packing::Gzip));
    // With a low hard limit, the limits of the jail cannot be set.
    let limited = |arguments: &[&str]| {
        let mut command = Command::new("prlimit");
        command.args(["--nofile=64:64", env!("CARGO_BIN_EXE_lcow-graphdriver"), "image"]).args(arguments);
        // Root may raise limits; others may not.
        command.uid(12345).gid(12345).output().unwrap()
    };
    let program = fs::metadata(env!("CARGO_BIN_EXE_lcow-graphdriver"));
    assert!(program.is_ok());
    let done = limited(&["ls", &source]);
    let message = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{message}");
    assert!(message.contains("resource limits") && message.contains("--jail=best-effort"), "{message}");
    let done = limited(&["ls", "--jail=best-effort", &source]);
    let message = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success() && message.contains("warning") && message.contains("resource limits"),
        "{message}"
    );
    assert_eq!(done.stdout, text(&["ls", &source]).into_bytes());
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let scene = Scene::new();
    let source = scene.layout("layout", &sample(Packing::Gzip));
    let mut child =
        image(&["cat", &source, "bin/sh"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(141), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(done.stderr.is_empty());
}
