//! Which values are accepted, which source wins, and whether the documentation agrees.

use super::{specs::MAX_BOOT_PARAMETERS, *};

#[test]
fn sizes_are_read_as_docker_reads_them() {
    for (text, bytes) in [
        ("1G", Some(1 << 30)),
        ("1g", Some(1 << 30)),
        ("1GB", Some(1 << 30)),
        ("1GiB", Some(1 << 30)),
        ("512m", Some(512 << 20)),
        ("0.5g", Some(1 << 29)),
        ("4096", Some(4096)),
        ("10 MB", Some(10 << 20)),
        ("2t", Some(2 << 40)),
        ("", None),
        ("x", None),
        ("-1", None),
        ("1q", None),
    ] {
        assert_eq!(parse_size(text, Unit::Bytes), bytes, "{text:?}");
    }
    assert_eq!(parse_sandbox_size("20", Unit::Gigabytes), Some(20 << 30));
    assert_eq!(parse_sandbox_size("1m", Unit::Bytes), None);
    assert_eq!(parse_sandbox_size("3t", Unit::Bytes), None);
}

#[test]
fn every_bad_value_names_the_option_the_value_and_what_is_accepted() {
    let mut options = Options::default();
    for spec in SPECS {
        // Paths and kernel parameters accept nearly any text.
        let bad = match spec.name {
            "lcow.kirdpath" | "lcow.kernel" | "lcow.initrd" => String::new(),
            "lcow.bootparameters" => "x".repeat(MAX_BOOT_PARAMETERS + 1),
            _ => "not-a-value".to_owned(),
        };
        let error = options.set(spec.name, &bad).unwrap_err().to_string();
        for part in [spec.name, &format!("'{bad}'"), spec.accepts] {
            assert!(error.contains(part), "{error}");
        }
    }
    assert_eq!(options, Options::default());
    let error = options.set("lcow.nonsense", "1").unwrap_err().to_string();
    assert!(error.contains("lcow.nonsense") && error.contains("lcow.globalmode"), "{error}");
    assert!(options.set_all(&["lcow.globalmode"]).unwrap_err().to_string().contains("name=value"));
}

#[test]
fn the_originals_spellings_of_true_and_false() {
    for text in ["1", "t", "T", "TRUE", "true", "True"] {
        let mut options = Options::default();
        options.set("LCOW.GlobalMode", text).unwrap();
        assert!(options.global_mode);
    }
    assert!(Options::default().set("lcow.globalmode", "yes").is_err());
}

#[test]
fn the_file_is_weaker_than_the_command_line() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[lcow]\nsandboxsize = 30\nglobalmode = true\n[lcow.pool]\nmax = 7\n")
        .unwrap();
    let options = Options::load(Some(file.path()), &["lcow.sandboxsize=40".into()]).unwrap();
    assert_eq!((options.sandbox_bytes, options.global_mode, options.pool_max), (40 << 30, true, 7));
    std::fs::write(file.path(), "[lcow]\nsandboxsise = 30\n").unwrap();
    assert!(Options::load(Some(file.path()), &[]).unwrap_err().to_string().contains("lcow.sandboxsise"));
    assert!(matches!(
        Options::load(Some(Path::new("/nonexistent/x.toml")), &[]),
        Err(ConfigError::Read { .. })
    ));
}

#[test]
fn an_empty_variable_is_not_set() {
    let variable = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    let environment =
        vec![variable("LCOW_POOL_MAX", " "), variable("LCOW_SVM", ""), variable("LCOW_MEMORY", "1g")];
    let effective = Effective::read(&Inputs { environment, ..Inputs::default() }).unwrap();
    assert!(effective.problems.is_empty());
    assert_eq!(effective.options, Options { memory_bytes: 1 << 30, ..Options::default() });
}

#[test]
fn every_value_has_its_place_and_stronger_sources_replace_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "# options\n[lcow]\nsandboxsize = 30\n\nverity = true\npool.max = 7\nxino = \"off\"\n",
    )
    .unwrap();
    let effective = Effective::read(&Inputs {
        file: Some(file.path()),
        environment: vec![("LCOW_VERITY".into(), "false".into()), ("LCOW_TIMEOUT".into(), "9".into())],
        command_line: &["lcow.timeout=10".into(), "lcow.xino=on".into()],
        engine: &["LCOW.xino=off".into()],
    })
    .unwrap();
    assert!(effective.problems.is_empty(), "{:?}", effective.problems);
    let line = |line| Place::File { path: file.path().to_owned(), line };
    for (name, value, place) in effective.entries() {
        let expected = match name {
            "lcow.sandboxsize" => ("30.0 GiB", line(3)),
            "lcow.pool.max" => ("7", line(6)),
            "lcow.verity" => ("false", Place::Environment { variable: "LCOW_VERITY".into() }),
            "lcow.timeout" => ("10", Place::CommandLine),
            "lcow.xino" => ("off", Place::Engine),
            _ => {
                assert_eq!(place, &Place::Default, "{name}");
                continue;
            }
        };
        assert_eq!((value.as_str(), place), (expected.0, &expected.1), "{name}");
    }
}

#[test]
fn all_problems_are_reported_with_their_places() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "[lcow]\nsandboxsise = 30\nverity = [1]\n[lcow.pool]\nmax = 0\n[lcov]\nx = 1\n",
    )
    .unwrap();
    let effective = Effective::read(&Inputs {
        file: Some(file.path()),
        environment: vec![("LCOW_MEMORY".into(), "much".into())],
        command_line: &["lcow.svm".into()],
        engine: &["lcow.nonsense=1".into()],
    })
    .unwrap();
    let told: Vec<String> = effective.problems.iter().map(ToString::to_string).collect();
    let path = file.path().display();
    for (told, begin) in told.iter().zip([
        format!("{path}:2: unknown option 'lcow.sandboxsise'"),
        format!("{path}:3: option lcow.verity: '[1]' is not accepted; give true or false"),
        format!("{path}:5: option lcow.pool.max: '0' is not accepted; give 2 to 1024"),
        format!("{path}:7: unknown option 'lcov.x'"),
        "environment variable LCOW_MEMORY: option lcow.memory: 'much'".into(),
        "command line: option 'lcow.svm' has no value".into(),
        "engine (last Init): unknown option 'lcow.nonsense'".into(),
    ]) {
        assert!(told.starts_with(&begin), "{told} is not {begin}");
    }
    assert_eq!(told.len(), 7);
    assert_eq!(effective.options, Options::default());

    std::fs::write(file.path(), "[lcow]\nverity = true\nmax == 0\n").unwrap();
    let error = Options::load(Some(file.path()), &[]).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{path}:3: the file is not valid TOML: ")), "{error}");
}

#[test]
fn what_is_shown_is_accepted_again() {
    for (name, value) in Options::default().entries() {
        let mut options = Options::default();
        options.set(name, &value).unwrap();
        assert_eq!(options, Options::default(), "{name}={value}");
    }
}

#[test]
fn the_commented_file_names_every_option_at_its_default() {
    let text = template();
    let of_file = |text: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Effective::read(&Inputs { file: Some(file.path()), ..Inputs::default() }).unwrap()
    };
    assert!(text.lines().all(|line| line.len() <= 120), "{text}");
    let commented = of_file(&text);
    assert!(commented.problems.is_empty() && commented.places.iter().all(|place| *place == Place::Default));
    // An assignment has no space behind the `#`, a comment has one.
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if !rest.is_empty() && !rest.starts_with(' ') => rest,
        _ => line,
    });
    let uncommented = of_file(&lines.collect::<Vec<_>>().join("\n"));
    assert!(uncommented.problems.is_empty(), "{:?}", uncommented.problems);
    assert!(uncommented.places.iter().all(|place| *place != Place::Default), "{text}");
    assert_eq!(uncommented.options, Options::default());
}

/// The default that a row of the documentation gives for this system: `a`, or `a (Windows: b)` and the like.
fn documented_default(cell: &str) -> &str {
    let Some((linux, others)) = cell.strip_suffix(')').and_then(|c| c.split_once(" (")) else {
        return cell;
    };
    if cfg!(target_os = "linux") {
        return linux;
    }
    let named = if cfg!(windows) { others.strip_prefix("Windows: ") } else { None };
    named.or_else(|| others.strip_prefix("elsewhere: ")).unwrap_or(linux)
}

#[test]
fn the_documentation_lists_every_option() {
    let docs = include_str!("../../docs/options.md");
    for spec in SPECS {
        let begin = format!("| `{}` | `{}` |", spec.name, env_name(spec.name));
        let row = docs.lines().find_map(|line| line.strip_prefix(&begin));
        let row = row.unwrap_or_else(|| panic!("docs/options.md lacks the row: {begin}"));
        let cell = row.split('|').next().unwrap_or_default().trim();
        assert_eq!(documented_default(cell), spec.default, "the default of {} in docs/options.md", spec.name);
    }
}

/// The text without its links: ` ([page](address))` and the like.
fn without_links(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(" ([").or_else(|| rest.find(" (see [")) {
        out.push_str(&rest[..at]);
        // The addresses have no blanks, so the last parenthesis before a blank, a full stop or the end closes it.
        let end = rest[at..].find("))").expect("a link in parentheses") + at + 2;
        rest = &rest[end..];
    }
    out + rest
}

#[test]
fn the_documentation_has_the_help_of_every_option() {
    let docs = include_str!("../../docs/options.md");
    for spec in SPECS {
        let row = docs.lines().find(|line| line.starts_with(&format!("| `{}` ", spec.name))).expect("a row");
        assert!(without_links(row).contains(spec.help), "docs/options.md differs from: {}", spec.help);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn the_managed_plugin_describes_every_option() {
    let plugin: serde_json::Value =
        serde_json::from_str(include_str!("../../plugin-config.json")).expect("JSON");
    let variables = plugin["env"].as_array().expect("env");
    // A plugin of dockerd does not serve containerd.
    for spec in SPECS.iter().filter(|spec| !spec.name.starts_with(CONTAINERD_PREFIX)) {
        let variable = variables.iter().find(|v| v["name"] == env_name(spec.name)).expect("a variable");
        let text = format!("{} Accepts {}. Default {}.", spec.help, spec.accepts, spec.default);
        assert_eq!(variable["description"], text, "{} in plugin-config.json", spec.name);
    }
}
