//! What is accepted, what wins over what, and whether the documentation tells it.

use super::*;

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
        // Paths and words for a kernel take nearly any text.
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
    let mut options = Options::default();
    let variable = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    let given = [variable("LCOW_POOL_MAX", " "), variable("LCOW_SVM", ""), variable("LCOW_MEMORY", "1g")];
    options.set_environment(given.into_iter()).unwrap();
    assert_eq!(options, Options { memory_bytes: 1 << 30, ..Options::default() });
}

/// The default that a row of the documentation tells for this system: `a`, or `a (Windows: b)` and the like.
fn told_default(cell: &str) -> &str {
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
        assert_eq!(told_default(cell), spec.default, "the default of {} in docs/options.md", spec.name);
    }
}
