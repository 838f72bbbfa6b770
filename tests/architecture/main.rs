//! Holds the code to the picture in `src/lib.rs`: arrows point down only, `unsafe` lives in `lcow-sys` (tests have none
//! either), files stay readable.

mod circles;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Modules that know no runtime, no HTTP, no configuration.
const PLAIN: &[&str] = &[
    "svm-agent",
    "svm-protocol",
    "layer-codec",
    "layer-recode",
    "layer-tar",
    "oci-image",
    "ext4-image",
    "vhd-image",
    "verity-tree",
    "disk-io",
];
/// Crates that plain modules must not use.
const RUNTIME_CRATES: &[&str] = &["tokio", "axum", "hyper", "hyper_util", "tower_http", "toml_edit", "clap"];
/// Lines of a file without its tests.
const MAX_LINES: usize = 600;

/// What a generator writes: each file is as long as its service.
const GENERATED: &[&str] = &["containerd-api/generated", "cri-client/generated"];

/// Unsafe code outside of `sys`, below the package's folder, and why it can't be there.
const UNSAFE_ELSEWHERE: &[(&str, &str)] = &[
    ("tests/computecore_double/lib.rs", "a test double of a DLL: its exports take and give raw pointers"),
    ("fuzz/fuzz_targets/bound/mod.rs", "an allocator that counts: the trait has no other form"),
];

/// The heading in `src/lib.rs` below which each room stands with what it uses, from the top down.
const PICTURE: &str = "# Rooms";

/// The rows of the picture: a room (a module of the program or a crate), and what it uses.
fn picture() -> Vec<(String, BTreeSet<String>)> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let lines = text.lines().skip_while(|line| !line.contains(PICTURE)).skip(1);
    let rows: Vec<_> = lines
        .take_while(|line| line.starts_with("//!") && !line.starts_with("//! # "))
        .filter_map(|line| line.trim_start_matches("//!").split_once('│'))
        .map(|(room, used)| (room.trim().to_owned(), used.split_whitespace().map(str::to_owned).collect()))
        .collect();
    assert!(rows.len() > 15, "the picture was not found in src/lib.rs");
    rows
}

/// The crates below the program.
fn crate_names() -> Vec<String> {
    picture().into_iter().map(|(name, _)| name).filter(|name| name.contains('-')).collect()
}

/// The files of the program and of the crates below it: of the program by their paths below `src`, of a crate by the
/// crate's name and their paths below its `src`.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = rust_files("src");
    for (path, text) in rust_files("crates") {
        let mut parts = path.components();
        let name = parts.next().unwrap();
        if parts.next().is_some_and(|folder| folder.as_os_str() == "src") {
            found.push((Path::new(&name).join(parts.as_path()), text));
        }
    }
    assert!(found.len() > 200, "the sources were not found");
    found
}

/// The Rust files of a folder of the package, by their paths below it.
fn rust_files(folder: &str) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut found = Vec::new();
    walk(&root, &mut found);
    found.into_iter().map(|(path, text)| (path.strip_prefix(&root).unwrap().to_owned(), text)).collect()
}

fn module_of(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

fn is_test_file(path: &Path) -> bool {
    path.components()
        .any(|c| c.as_os_str() == "tests" || c.as_os_str() == "tests.rs" || c.as_os_str() == "testing")
        || path.file_stem().is_some_and(|s| s.to_string_lossy().ends_with("_tests"))
}

/// Code without comments and without the test module at its end.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Names right behind each `crate::`, groups opened, and the crates of this workspace that are named.
fn uses(code: &str) -> Vec<String> {
    let mut names: Vec<String> = crate_names()
        .into_iter()
        .filter(|name| {
            let path = format!("{}::", name.replace('-', "_"));
            code.match_indices(&path).any(|(at, _)| {
                !code[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':')
            })
        })
        .collect();
    for rest in code.replace("lcow_graphdriver::", "crate::").split("crate::").skip(1) {
        if let Some(group) = rest.strip_prefix('{') {
            let (mut depth, mut item) = (0, String::new());
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => names.push(std::mem::take(&mut item)),
                    c if depth == 0 => item.push(c),
                    _ => {}
                }
            }
            names.push(item);
        } else {
            names.push(rest.to_owned());
        }
    }
    names
        .iter()
        .map(|n| {
            n.trim()
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_' || *c == '-')
                .collect::<String>()
        })
        .filter(|n| !n.is_empty())
        .collect()
}

#[test]
fn the_picture_is_the_code_and_its_arrows_point_down_only() {
    let rows = picture();
    let mut real: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, text) in sources() {
        let room = module_of(&path);
        if room == "lib" || is_test_file(&path) {
            continue;
        }
        let used = real.entry(room.clone()).or_default();
        // Inside of a crate `crate::` is the crate itself.
        let inside = room.contains('-');
        used.extend(
            uses(&code(&text)).into_iter().filter(|name| *name != room && (!inside || name.contains('-'))),
        );
    }
    let drawn: BTreeMap<_, _> = rows.iter().cloned().collect();
    let rows_wanted: Vec<String> = real
        .iter()
        .filter(|(room, used)| drawn.get(*room) != Some(used))
        .map(|(room, used)| {
            let used: Vec<&str> = used.iter().map(String::as_str).collect();
            format!("//! {room:<13}│ {}", used.join(" "))
        })
        .collect();
    assert!(rows_wanted.is_empty(), "src/lib.rs must say, in '{PICTURE}':\n{}", rows_wanted.join("\n"));
    assert_eq!(drawn.len(), real.len(), "src/lib.rs draws rooms that are not there: {:?}", drawn.keys());
    let place = |room: &str| rows.iter().position(|(name, _)| name == room).unwrap_or_default();
    let upwards: Vec<String> = rows
        .iter()
        .flat_map(|(room, used)| used.iter().map(move |name| (room, name)))
        .filter(|(room, name)| place(name) <= place(room))
        .map(|(room, name)| format!("{room} uses {name}, which stands above it"))
        .collect();
    assert!(upwards.is_empty(), "{}", upwards.join("\n"));
}

/// The daemon never interprets layer bytes: what it is made of cannot reach the guest's side.
#[test]
fn the_daemons_rooms_know_neither_agent_nor_tars() {
    const ROOMS: [&str; 7] = ["api", "containerd", "driver", "store", "svm", "listen", "error"];
    const FORBIDDEN: [&str; 2] = ["svm-agent", "layer-tar"];
    let rows: BTreeMap<_, _> = picture().into_iter().collect();
    for room in ROOMS {
        let used = rows.get(room).unwrap_or_else(|| panic!("there is no room '{room}'"));
        for name in FORBIDDEN {
            assert!(
                !used.contains(name),
                "{room} uses {name}: layer bytes are interpreted in a service VM only"
            );
        }
    }
}

/// Crates that speak TLS or HTTP to other machines.
const OF_REGISTRIES: [&str; 5] = ["oci-registry", "ring", "rustls", "rustls-native-certs", "ureq"];
/// Crates of TLS that would have to be built from C.
const FOREIGN_TLS: [&str; 4] = ["aws-lc-rs", "aws-lc-sys", "native-tls", "openssl-sys"];

/// The packages of a Cargo.lock, each with those that it needs for itself or its tests.
fn locked(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut packages: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in text.split("[[package]]").skip(1) {
        let name = package.lines().find_map(|line| line.strip_prefix("name = ")).expect("a name");
        // A dependency with several versions has its version behind its name.
        let needed = package
            .lines()
            .filter_map(|line| line.strip_prefix(" \""))
            .filter_map(|line| line.split(['"', ' ']).next())
            .map(str::to_owned);
        packages.entry(name.trim_matches('"').to_owned()).or_default().extend(needed);
    }
    packages
}

/// A package and everything that it needs.
fn closure<'a>(packages: &'a BTreeMap<String, BTreeSet<String>>, name: &'a str) -> BTreeSet<&'a str> {
    let (mut found, mut todo) = (BTreeSet::new(), vec![name]);
    while let Some(name) = todo.pop() {
        if found.insert(name) {
            let needed = packages.get(name).unwrap_or_else(|| panic!("{name} is not in Cargo.lock"));
            todo.extend(needed.iter().map(String::as_str));
        }
    }
    found
}

/// What reads untrusted bytes, in a worker or a guest, cannot reach a network: the crates for that are not below it.
#[test]
fn neither_agent_nor_parsers_link_what_reaches_registries() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let packages = locked(&text);
    let of_registries = closure(&packages, "oci-registry");
    for name in OF_REGISTRIES {
        assert!(
            of_registries.contains(name),
            "{name} is not part of oci-registry any more: correct this list"
        );
    }
    for name in FOREIGN_TLS {
        assert!(!packages.contains_key(name), "{name} is built from C, and ring suffices");
    }
    for name in PLAIN.iter().chain(&["lcow-sys"]) {
        let needed = closure(&packages, name);
        let found: Vec<_> = OF_REGISTRIES.iter().filter(|of| needed.contains(**of)).collect();
        assert!(found.is_empty(), "{name} links {found:?}");
    }
}

/// The daemon fetches no image, and neither do the processes that it starts: only commands that read images do.
#[test]
fn only_commands_on_images_reach_registries() {
    for (room, used) in picture() {
        assert!(room == "cli" || !used.contains("oci-registry"), "{room} uses oci-registry");
    }
    let (mut crate_users, mut module_users) = (BTreeSet::new(), BTreeSet::new());
    for (path, text) in sources() {
        if path.starts_with("oci-registry") || is_test_file(&path) {
            continue;
        }
        let (path, code) = (path.to_string_lossy().replace('\\', "/"), code(&text));
        if code.contains("oci_registry") {
            crate_users.insert(path.clone());
        }
        if code.contains("registry::") && path.starts_with("cli/") {
            module_users.insert(path);
        }
    }
    assert_eq!(crate_users.into_iter().collect::<Vec<_>>(), ["cli/registry.rs"]);
    assert_eq!(
        module_users.into_iter().collect::<Vec<_>>(),
        ["cli/confined/mod.rs", "cli/image/mod.rs", "cli/registry.rs"]
    );
}

#[test]
fn manifests_name_what_the_picture_shows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    let rows = picture();
    let crates: Vec<_> = rows.iter().filter(|(name, _)| name.contains('-')).collect();
    for (name, used) in &crates {
        let manifest = fs::read_to_string(root.join(name).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split_once("\n[dependencies]\n").expect("dependencies").1;
        let dependencies = dependencies.split("\n[").next().unwrap();
        let names: BTreeSet<String> = dependencies
            .lines()
            .filter_map(|line| line.split(['.', ' ']).next())
            .filter(|name| crates.iter().any(|(other, _)| other == name))
            .map(str::to_owned)
            .collect();
        assert_eq!(&names, used, "crates/{name}/Cargo.toml");
    }
    assert_eq!(fs::read_dir(root).unwrap().count(), crates.len(), "a crate is not in the picture");
}

/// Crates that only tests use: nothing of them reaches the program.
const OF_TESTS: &[&str] = &["cri-client"];

/// The tables of a manifest in which a crate is named as a dependency.
fn tables_that_name(manifest: &str, name: &str) -> Vec<String> {
    let mut table = String::new();
    let mut found = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            line.trim_matches(['[', ']']).clone_into(&mut table);
        }
        let key = line.split(['.', ' ', '=']).next();
        let named = key == Some(name) || line.contains(&format!("\"{name}\""));
        if named && table.ends_with("dependencies") {
            found.push(table.clone());
        }
    }
    found
}

#[test]
fn crates_of_tests_are_dependencies_of_tests_only() {
    let example =
        "[dependencies]\na.workspace = true\nb = { package = \"c\" }\n[target.x.dev-dependencies]\na = \"1\"";
    assert_eq!(tables_that_name(example, "a"), ["dependencies", "target.x.dev-dependencies"]);
    assert_eq!(tables_that_name(example, "c"), ["dependencies"]);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let crates = fs::read_dir(root.join("crates")).unwrap().map(|entry| entry.unwrap().path());
    let folders: Vec<PathBuf> = crates.chain([root.to_owned()]).collect();
    for name in OF_TESTS {
        let mut users = 0;
        for folder in &folders {
            let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
            for table in tables_that_name(&manifest, name) {
                let of_tests = table.ends_with("dev-dependencies");
                assert!(
                    of_tests || table == "workspace.dependencies",
                    "{}: {name} in [{table}]",
                    folder.display()
                );
                users += usize::from(of_tests);
            }
        }
        assert!(users > 0, "no test uses {name}");
    }
}

/// Crates that can be published.
const LIBRARIES: &[&str] = &[
    "disk-io",
    "ext4-image",
    "layer-codec",
    "layer-recode",
    "layer-tar",
    "oci-image",
    "verity-tree",
    "vhd-image",
];

#[test]
fn libraries_forbid_unsafe_code_and_explain_themselves() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates");
    for name in LIBRARIES {
        let read = |file: &str| {
            fs::read_to_string(crates.join(name).join(file)).unwrap_or_else(|e| panic!("{name}/{file}: {e}"))
        };
        let root = read("src/lib.rs");
        assert!(root.contains("#![forbid(unsafe_code)]"), "{name} does not forbid unsafe code");
        assert!(root.contains("include_str!(\"../README.md\")"), "{name}: its README is not tested");
        for part in ["```text", "# Limits", "tability"] {
            let first = root.lines().take_while(|line| line.starts_with("//!"));
            assert!(first.into_iter().any(|line| line.contains(part)), "{name}: no {part} on its first page");
        }
        assert!(read("README.md").contains("```rust\n"), "{name}: its README has no example");
        assert!(read("CHANGELOG.md").contains("## [Unreleased]"), "{name}: CHANGELOG.md");
        assert!(crates.join(name).join("examples").is_dir(), "{name} has no examples");
        let manifest = read("Cargo.toml");
        for key in ["description", "license", "readme", "keywords", "categories", "rust-version"] {
            assert!(manifest.contains(&format!("\n{key}")), "{name}: no {key} in Cargo.toml");
        }
    }
}

#[test]
fn the_reader_of_this_test_sees_groups_and_paths() {
    let code =
        "use crate::{\n a::B,\n c,\n};\nuse crate::d::e;\nuse disk_io::ReadAt;\nlet x = crate::f::g();";
    assert_eq!(uses(code), ["disk-io", "a", "c", "d", "f"]);
}

#[test]
fn formats_know_no_runtime() {
    for (path, text) in sources() {
        if !PLAIN.contains(&module_of(&path).as_str()) {
            continue;
        }
        for name in RUNTIME_CRATES {
            assert!(!code(&text).contains(&format!("{name}::")), "{} uses {name}", path.display());
        }
    }
}

/// Whether a line has unsafe code, or allows it; quoted text and comments do not count.
fn has_unsafe(line: &str) -> bool {
    if line.trim() == "#![forbid(unsafe_code)]" {
        return false;
    }
    let bare: String = line.split("//").next().unwrap().split('"').step_by(2).collect();
    let mut words = bare.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    !bare.contains("forbid(unsafe_code)") && words.any(|word| word == "unsafe" || word == "unsafe_code")
}

#[test]
fn tests_have_no_unsafe_code_but_what_is_listed() {
    let mut unused: Vec<&str> = UNSAFE_ELSEWHERE.iter().map(|(path, _)| *path).collect();
    let mut faults = Vec::new();
    let folders = ["tests", "fuzz/fuzz_targets"];
    for (path, text) in
        folders.iter().flat_map(|f| rust_files(f).into_iter().map(move |(p, t)| (Path::new(f).join(p), t)))
    {
        let Some(n) = text.lines().position(has_unsafe) else { continue };
        match unused.iter().position(|known| Path::new(known) == path) {
            Some(known) => drop(unused.remove(known)),
            None => {
                faults.push(format!(
                    "{}:{} has unsafe code: it belongs in crates/lcow-sys",
                    path.display(),
                    n + 1
                ));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(unused.is_empty(), "no unsafe code any more in {unused:?}: strike them off the list");
}

#[test]
fn unsafe_code_lives_in_lcow_sys_and_each_block_says_why() {
    for (line, expected) in [
        ("    let x = unsafe { f() };", true),
        ("#[unsafe(no_mangle)]", true),
        ("unsafe extern {", true),
        ("#![allow(unsafe_code)]", true),
        ("#![forbid(unsafe_code)]", false),
        // That what is quoted does not count, this file shows by itself.
        ("let unsafely = 1; // unsafe fn", false),
    ] {
        assert_eq!(has_unsafe(line), expected, "{line}");
    }
    for (path, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (n, line) in lines.iter().enumerate() {
            let bare = line.split("//").next().unwrap();
            assert!(
                !has_unsafe(line) || module_of(&path) == "lcow-sys",
                "{}:{} has unsafe code",
                path.display(),
                n + 1
            );
            if !bare.contains("unsafe {") && !bare.contains("unsafe fn") && !bare.contains("unsafe impl") {
                continue;
            }
            let before = lines[n.saturating_sub(8)..=n].join("\n");
            // A function says what its callers must promise.
            let said =
                before.contains("SAFETY") || (bare.contains("unsafe fn") && before.contains("# Safety"));
            assert!(said, "{}:{} lacks its SAFETY reason", path.display(), n + 1);
        }
    }
}

#[test]
fn every_file_begins_with_what_it_is_and_stays_readable() {
    for (path, text) in sources() {
        assert!(text.starts_with("//!"), "{} lacks its first screen", path.display());
        let lines = text.split("#[cfg(test)]\nmod tests").next().unwrap().lines().count();
        let long = is_test_file(&path) || GENERATED.iter().any(|folder| path.starts_with(folder));
        assert!(long || lines <= MAX_LINES, "{} has {lines} lines", path.display());
    }
}

#[test]
fn no_glob_reexports_and_no_catch_all_modules() {
    for (path, text) in sources() {
        for line in code(&text).lines() {
            assert!(
                !(line.trim_start().starts_with("pub use") && line.contains("::*")),
                "{}: {line}",
                path.display()
            );
        }
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(!["utils", "util", "helpers", "misc", "common"].contains(&name), "{}", path.display());
    }
}

/// What the last column of a table of `docs/faults.md` names: each text in backquotes.
fn named_tests(page: &str) -> Vec<String> {
    let rows = page.lines().filter(|line| line.starts_with("| ") && !line.contains("| test |"));
    rows.filter_map(|row| row.trim_end().trim_end_matches('|').rsplit('|').next())
        .flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

#[test]
fn every_test_that_the_table_of_faults_names_is_there() {
    assert_eq!(named_tests("| 1 | a `b` | `c`, `d` |\n| # | what | test |"), ["c", "d"]);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/faults.md")).unwrap();
    let code: String = ["src", "crates", "tests", "fuzz"]
        .iter()
        .flat_map(|folder| rust_files(folder).into_iter().map(|(_, text)| text))
        .collect::<Vec<_>>()
        .join("\n");
    let named = named_tests(&page);
    assert!(named.len() > 30, "the table was not found");
    let there = |name: &str| match name.split_once('/') {
        // A program of tests, or a script.
        Some(_) => root.join(name).exists(),
        None => code.contains(&format!("fn {name}(")),
    };
    let missing: Vec<_> = named.iter().filter(|name| !there(name)).collect();
    assert!(missing.is_empty(), "docs/faults.md names tests that are not there: {missing:?}");
}

/// Who may say that a thread belongs to no runtime ([`DiskThread::here`]): file work of the store is for threads that
/// may wait, and a runtime's may not.
const MAY_WAIT: &[(&str, &str)] = &[
    ("store/thread.rs", "what says it"),
    ("store/tests.rs", "tests of functions that block"),
    ("store/snapshots/tests.rs", "tests of functions that block"),
    ("store/tests/power/check.rs", "tests of functions that block"),
    ("store/tests/power/sequences.rs", "tests of functions that block"),
    ("driver/power_tests.rs", "tests of functions that block"),
    ("driver/snapshots/power_tests.rs", "tests of functions that block"),
    ("cli/store/mod.rs", "commands that do one thing"),
    ("cli/store/space.rs", "commands that do one thing"),
    ("driver/home.rs", "the thread that deletes debris"),
    ("driver/mod.rs", "a start before the first request, and commands"),
    ("driver/snapshots/mod.rs", "a start before the first request"),
    ("driver/snapshots/tests.rs", "tests of a start"),
];

#[test]
fn only_threads_that_may_wait_work_on_the_stores_files() {
    let said: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| text.contains("DiskThread::here()") || text.contains("fn here()"))
        .map(|(path, _)| path.to_string_lossy().replace('\\', "/"))
        .collect();
    let known: Vec<&str> = MAY_WAIT.iter().map(|(path, _)| *path).collect();
    let others: Vec<_> = said.iter().filter(|path| !known.contains(&path.as_str())).collect();
    assert!(others.is_empty(), "{others:?} may not say that their threads may wait for a disk");
    assert_eq!(said.len(), known.len(), "a row of the table is not needed any more: {said:?}");
}

/// Calls that create, rename, link, delete or sync a file or a directory.
const CHANGES_OF_FILES: &[&str] = &[
    "fs::write(",
    "fs::copy(",
    "fs::rename(",
    "fs::remove_",
    "fs::hard_link(",
    "fs::symlink(",
    "fs::symlink_file(",
    "fs::create_dir",
    "DirBuilder",
    "File::create",
    "create_new(",
    ".create(true)",
    ".sync_all()",
    ".sync_data()",
    "renameat",
    "unlinkat",
    "tree::remove",
];

/// Such calls of `store` and `driver` beside `store/files.rs`, which is recorded when power cuts are enumerated.
const NOT_RECORDED: &[(&str, &str, &str)] = &[
    ("driver/root.rs", "DirBuilder", "the service's own directory on Windows, which is no store"),
    ("driver/live.rs", ".sync_data()", "before a clone of a sandbox, which is read once and has no name"),
];

#[test]
fn one_file_makes_all_changes_of_a_store() {
    const ONLY: &str = "store/files.rs";
    let (mut faults, mut unused, mut recorded) = (Vec::new(), NOT_RECORDED.to_vec(), 0);
    for (path, text) in sources() {
        let name = path.to_string_lossy().replace('\\', "/");
        let ours = name.starts_with("store/") || name.starts_with("driver/");
        if !ours || is_test_file(&path) {
            continue;
        }
        // Some files have their tests behind a longer attribute.
        let code = code(text.split("mod tests {").next().unwrap());
        for call in CHANGES_OF_FILES.iter().filter(|call| code.contains(**call)) {
            if name == ONLY {
                recorded += 1;
            } else if let Some(at) = unused.iter().position(|(file, known, _)| *file == name && known == call)
            {
                unused.remove(at);
            } else {
                faults.push(format!("{name} calls {call} and should call a function of {ONLY}"));
            }
        }
    }
    assert!(recorded > 6, "the calls of {ONLY} were not found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(unused.is_empty(), "not there any more: {unused:?}");
}

/// The rows of a table of limits: what, and how many.
fn limits(text: &str, comment: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix(comment)?.trim().strip_prefix("| "))
        .filter_map(|row| {
            let mut cells = row.split(" | ");
            let (what, most) = (cells.next()?, cells.next()?);
            Some((what.to_owned(), most.replace(',', "").parse().ok()?))
        })
        .collect()
}

#[test]
fn the_limits_of_a_layer_in_the_docs_are_those_of_the_codec() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let code = fs::read_to_string(root.join("crates/layer-codec/src/limits.rs")).unwrap();
    let docs = fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let docs = docs.split_once("## What a layer can hold").expect("a section of the docs").1;
    let docs = docs.split("\n## ").next().unwrap_or_default();
    let held = limits(&code, "//!");
    assert!(held.len() > 9, "the table of the codec was not found");
    assert_eq!(limits(docs, ""), held, "docs/operations.md");
}

/// The module that a file is, below its crate's root.
fn module_path(path: &Path) -> Vec<String> {
    let mut parts: Vec<String> =
        path.with_extension("").components().map(|c| c.as_os_str().to_str().unwrap().to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") || parts == ["lib"] || parts == ["main"] {
        parts.pop();
    }
    parts
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut roots = vec!["src".to_owned()];
    roots.extend(crate_names().iter().map(|name| format!("crates/{name}/src")));
    let mut found = Vec::new();
    for folder in roots {
        assert!(root.join(&folder).is_dir());
        let sources: Vec<circles::Source> = rust_files(&folder)
            .into_iter()
            .filter(|(path, _)| {
                !is_test_file(path) && path != Path::new("main.rs") && !path.starts_with("bin")
            })
            .map(|(path, text)| circles::Source {
                name: format!("{folder}/{}", path.display()),
                module: module_path(&path),
                code: code(&text),
            })
            .collect();
        found.extend(circles::circles(&sources));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
