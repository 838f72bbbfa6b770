//! The life of the Windows service, with the real service manager (Wine's, in this project's own runs): installed,
//! started, asked, stopped, started again, uninstalled.
#![cfg(windows)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lcow-graphdriver");
const PIPE: &str = r"\\.\pipe\lcow-service-test";

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn ok(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    text(&output)
}

fn refused(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(!output.status.success(), "{arguments:?} was taken: {}", text(&output));
    text(&output)
}

fn discovery() -> PathBuf {
    Path::new(&std::env::var_os("ProgramData").unwrap()).join(r"docker\plugins\lcow.spec")
}

/// Takes the service out of the system, also after a failure.
struct Installed;

impl Drop for Installed {
    fn drop(&mut self) {
        run(&["service", "uninstall"]);
    }
}

fn ask(method: &str, body: &str) -> String {
    ok(&["call", method, body, "--pipe", PIPE])
}

#[test]
fn a_service_is_installed_started_stopped_and_uninstalled() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root of the service");
    let (root, config) = (root.to_str().unwrap(), folder.path().join("lcow.toml"));
    fs::write(&config, "[lcow]\nsandboxsize = 21\ntimeout = 77\n").unwrap();
    let config = config.to_str().unwrap();
    run(&["service", "uninstall"]);
    assert!(refused(&["service", "start"]).contains("is it installed?"));
    // A wrong option is told when it is given, and nothing is installed.
    let wrong = refused(&["service", "install", "--root", root, "--storage-opt", "lcow.nonsense=1"]);
    assert!(wrong.contains("lcow.nonsense"), "{wrong}");
    refused(&["service", "status"]);
    let install = ["service", "install", "--root", root, "--pipe", PIPE, "--config", config];
    ok(&[&install[..], &["--storage-opt", "lcow.timeout=99"]].concat());
    let installed = Installed;
    assert!(ok(&["service", "status"]).contains("Stopped"));
    for round in 0..2 {
        ok(&["service", "start"]);
        assert!(ok(&["service", "status"]).contains("Running"));
        assert_eq!(fs::read_to_string(discovery()).unwrap(), "npipe:////./pipe/lcow-service-test");
        // The configuration file counts, and what was given on the command line counts more.
        let status = ask("GraphDriver.Status", "{}");
        assert!(
            status.contains("21.0 GiB") && status.contains("\"99\"") && !status.contains("\"77\""),
            "{status}"
        );
        if round == 0 {
            ask("GraphDriver.Create", r#"{"ID":"kept"}"#);
        } else {
            assert!(ask("GraphDriver.Exists", r#"{"ID":"kept"}"#).contains("true"));
        }
        ok(&["service", "stop"]);
        assert!(!discovery().exists(), "the discovery file is there after the stop");
        assert!(
            refused(&["call", "GraphDriver.Status", "{}", "--pipe", PIPE]).contains("is the plugin running")
        );
    }
    let log = fs::read_to_string(Path::new(root).join("lcow.log")).unwrap();
    assert_eq!(log.matches("ready").count(), 2, "{log}");
    assert!(log.contains("stopping after running requests have finished"), "{log}");
    // Uninstalling a running service stops it first.
    ok(&["service", "start"]);
    ok(&["service", "uninstall"]);
    assert!(!discovery().exists());
    std::mem::forget(installed);
    let begin = Instant::now();
    // The manager takes a service out when its last handle is closed.
    while run(&["service", "status"]).status.success() {
        assert!(begin.elapsed() < Duration::from_secs(10), "the service is still there");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_service_that_cannot_start_says_where_to_look() {
    // By hand, without a service manager, it explains itself.
    let told = refused(&["service", "run", "--discovery", r"C:\nowhere\lcow.spec"]);
    assert!(told.contains("use 'serve'"), "{told}");
}
