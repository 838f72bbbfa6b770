//! Every text that a user can see, in one file: `tests/messages/messages.txt`.
//!
//! ```text
//!   src, crates/*/src ─► literals.rs: string literals without comments and test modules ─┐
//!   lcow-graphdriver … --help, all commands ────────────────────────────────────────────┴─► messages.txt
//! ```
//!
//! The file is there to be read: messages that stand side by side are easily compared in tone, form and vocabulary
//! (STYLE.md). `LCOW_WRITE_GOLDEN=1 cargo test --test messages` writes it anew; read the difference and commit it.
#![cfg(target_os = "linux")]

mod literals;

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const HEADER: &str = "\
# What users can see: messages of errors, logs and panics, by file, in the order of the code; then all --help texts.
# Written by LCOW_WRITE_GOLDEN=1 cargo test --test messages; compared by the same test. Do not edit it by hand.
";

/// The Rust files below a directory of the workspace, sorted, without those that hold tests only.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("entry").path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if stem == "tests" || stem == "testing" || stem.ends_with("_tests") {
            continue;
        }
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
}

/// Adds the help of a command and of all commands below it.
fn add_help(command: &[&str], text: &mut String) {
    let output = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .args(command)
        .arg("--help")
        // Help shows the values of variables, and is as wide as the terminal.
        .env_clear()
        .output()
        .expect("lcow-graphdriver");
    assert!(output.status.success(), "{command:?} --help: {}", output.status);
    let help = String::from_utf8(output.stdout).expect("UTF-8");
    let name = [&["lcow-graphdriver"], command].concat().join(" ");
    let _ = write!(text, "\n## {name} --help\n\n");
    for line in help.trim_end().lines() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    for line in lines.take_while(|line| line.starts_with("  ")) {
        // Names are indented by two blanks, continued descriptions by more.
        let below = line[2..].split(' ').next().unwrap_or_default();
        if !below.is_empty() && below != "help" {
            add_help(&[command, &[below]].concat(), text);
        }
    }
}

#[test]
fn all_messages_stand_in_one_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "crates"] {
        sources(&root.join(folder), &mut files);
    }
    files.retain(|path| path.strip_prefix(root).is_ok_and(|p| p.iter().any(|name| name == "src")));
    let mut text = HEADER.to_owned();
    for path in &files {
        let source = fs::read_to_string(path).expect("source");
        let mut seen = BTreeSet::new();
        let messages = literals::messages(&source);
        let messages: Vec<_> = messages.into_iter().filter(|m| seen.insert(m.clone())).collect();
        if !messages.is_empty() {
            let name = path.strip_prefix(root).expect("below the root").display();
            let _ = write!(text, "\n## {name}\n\n");
            for message in messages {
                text.extend([message.as_str(), "\n"]);
            }
        }
    }
    add_help(&[], &mut text);

    let kept = root.join("tests/messages/messages.txt");
    if std::env::var_os("LCOW_WRITE_GOLDEN").is_some() {
        fs::write(&kept, text).expect("messages.txt");
        return;
    }
    let old = fs::read_to_string(&kept).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (before, now) = (lines(&old), lines(&text));
    let changes = before.difference(&now).map(|line| format!("-{line}\n"));
    let changes: String = changes.chain(now.difference(&before).map(|line| format!("+{line}\n"))).collect();
    assert!(
        old == text,
        "the messages differ from tests/messages/messages.txt:\n{changes}\nif that is intended: \
         LCOW_WRITE_GOLDEN=1 cargo test --test messages, and read the difference before you commit it (STYLE.md)"
    );
}
