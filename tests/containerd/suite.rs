//! containerd's own suite of tests for snapshotters (core/snapshots/testsuite), as a client of the product's socket; the
//! control is containerd's overlayfs behind containerd's socket.
//!
//! ```text
//!   scripts/containerd-suite ─► program ─gRPC─► product | containerd ─► overlayfs
//!                                  └─ after each test ─► a socket of this test: kill -9, start, go on
//! ```

use crate::{
    command::start,
    node::{Node, Release, Snapshotter},
    proxy::{CONTAINERD_SOCKET, LCOW_SOCKET, script},
};
use std::{os::unix::net::UnixListener, process::Command, sync::OnceLock};

/// The tests of containerd 2.1's suite.
const TESTS: usize = 21;

/// The suite's program, built at the first call.
fn program() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| script("containerd-suite", &[]))
}

/// The suite in a node's room; `between` is a socket that it dials after each test.
fn command(node: &Node, socket: &str, between: Option<&str>, parallel: &str) -> Command {
    let mut command = node.room.inside(program());
    // The suite's folders are named after it, and end with the room.
    command.env("TMPDIR", node.scratch("suite")).env("LCOW_SUITE_SOCKET", socket);
    command.env("LCOW_SUITE_SNAPSHOTTER", node.snapshotter.name());
    command.env("LCOW_SUITE_BETWEEN", between.unwrap_or_default());
    command.args(["-test.v", "-test.root", "-test.timeout=150s", &format!("-test.parallel={parallel}")]);
    command
}

/// Fails unless all of the suite's tests passed.
fn assert_passed(run: &crate::command::Run) {
    let text = run.text();
    let count = |word: &str| text.lines().filter(|l| l.starts_with(&format!("    --- {word}:"))).count();
    let (passed, failed, skipped) = (count("PASS"), count("FAIL"), count("SKIP"));
    let shown: String = text.lines().filter(|l| !l.contains("level=debug")).collect::<Vec<_>>().join("\n");
    assert!(
        run.ok() && passed >= TESTS && failed == 0 && skipped == 0,
        "the suite: {passed} of {TESTS} passed, {failed} failed, {skipped} skipped\n{shown}"
    );
}

#[test]
fn control_on_containerds_overlayfs() {
    let node = Node::start(Release::V2, Snapshotter::Overlayfs);
    assert_passed(&start(command(&node, CONTAINERD_SOCKET, None, "4"), None).wait());
}

#[test]
fn all_tests_pass_at_once() {
    let node = Node::start(Release::V2, Snapshotter::Lcow);
    assert_passed(&start(command(&node, LCOW_SOCKET, None, "4"), None).wait());
}

#[test]
fn all_tests_pass_with_kills_between_them() {
    let node = Node::without_containerd();
    let socket = node.room.folder().join("between.sock");
    let listener = UnixListener::bind(&socket).expect("socket");
    let between = socket.to_str().expect("UTF-8");
    let running = start(command(&node, LCOW_SOCKET, Some(between), "1"), None);
    for _test in 0..TESTS {
        // Closed, and so answered, when the product runs again.
        let _connection = listener.accept().expect("the suite");
        node.kill_lcow();
        node.start_lcow();
    }
    assert_passed(&running.wait());
}
