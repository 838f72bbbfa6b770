//! The language as containerd documents it, its corner cases as its own package decides them, and hostile filters.

use super::{parse::MAX_SELECTORS, parse::MAX_TEXT, *};

/// Name, parent, kind, labels.
type Row = (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const ROWS: &[Row] = &[
    ("foo", "", "committed", &[("foo", "true")]),
    ("bar", "foo", "active", &[]),
    (
        "default/1/extract-1 sha256:ab",
        "foo",
        "view",
        &[("foo", "present"), ("more complex label", "present")],
    ),
    ("bar2", "foo", "active", &[("bar", "true"), ("containerd.io/snapshot.ref", "sha256:cd")]),
    ("fooer", "bar2", "committed", &[("a \\ and \"", "x"), ("a \\ and \".post", "present"), ("ä", "ö, ü")]),
    ("", "", "", &[("", "empty key"), ("foo", "omg_asdf.asdf-qwer")]),
];

fn matching(filters: &Filters) -> Vec<usize> {
    let labels = |row: &Row| row.3.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let fits = |row: &Row| {
        let labels: BTreeMap<String, String> = labels(row);
        filters.matches(&Candidate { name: row.0, parent: row.1, kind: row.2, labels: &labels })
    };
    (0..ROWS.len()).filter(|n| fits(&ROWS[*n])).collect()
}

fn of(texts: &[&str]) -> Vec<usize> {
    matching(&Filters::parse(texts).unwrap_or_else(|e| panic!("{texts:?}: {e}")))
}

#[test]
fn selectors_match_as_containerd_documents_them() {
    let all = [0, 1, 2, 3, 4, 5];
    for (text, rows) in [
        ("", &all[..]),
        ("name", &all),
        ("parent", &all),
        ("name==foo", &[0]),
        ("name!=foo", &[1, 2, 3, 4, 5]),
        ("name==bar,kind==active", &[1]),
        ("parent==foo", &[1, 2, 3]),
        ("parent==\"\"", &[0, 5]),
        // Lower case, and no other.
        ("kind==active", &[1, 3]),
        ("kind==Active", &[]),
        ("kind!=active,kind!=view", &[0, 4, 5]),
        ("labels.foo", &[0, 2, 5]),
        ("labels.foo==true", &[0]),
        ("labels.foo==omg_asdf.asdf-qwer", &[5]),
        // An absent field is the empty text.
        ("labels.foo!=true", &[1, 2, 3, 4, 5]),
        ("labels.foo!=\"\"", &[0, 2, 5]),
        ("labels.none~=^$", &all),
        ("labels.\"more complex label\"", &[2]),
        ("labels.\"containerd.io/snapshot.ref\"==sha256:cd,parent==\"foo\"", &[3]),
        // Dots join, quoted or not.
        ("labels.containerd.\"io/snapshot\".ref", &[3]),
        (r#"labels."a \\ and \""==x"#, &[4]),
        (r#"labels."a \\ and \"".post==present"#, &[4]),
        ("labels", &[5]),
        ("labels.\"\"", &[5]),
        ("labels.\"ä\"==\"ö, ü\"", &[4]),
        ("labels.\"\\u00e4\"~=|^\\u00f6|", &[4]),
        ("labels.\"\\xc3\\xa4\"==\"\\303\\266, \\u00fc\"", &[4]),
        // Parts behind fields that have none are ignored; unknown fields are absent.
        ("name.x.y==foo", &[0]),
        ("size", &[]),
        ("size!=1", &all),
        ("size==\"\"", &[]),
        ("Name==foo", &[]),
        ("\"name\"==foo", &[0]),
        // White space in front of tokens.
        (" name== foo, parent ==\t\"\"", &[0]),
        ("name==foo=\"!|/~x", &[]),
        ("name~=^ba", &[1, 3]),
        ("name~=\"^ba\"", &[1, 3]),
        ("name~=/^ba/,kind==active", &[1, 3]),
        ("name~=|o{2}|", &[0, 4]),
        ("name~=/a{1,2}r$/", &[1]),
        (r#"name~=/[a-z]{0,1}"\//"#, &[]),
        ("name~=\"\"", &all),
    ] {
        assert_eq!(of(&[text]), rows, "{text}");
    }
}

#[test]
fn one_of_several_filters_must_match() {
    assert_eq!(matching(&Filters::parse::<&str>(&[]).unwrap()), [0, 1, 2, 3, 4, 5]);
    assert_eq!(of(&["name==foo", "kind==view"]), [0, 2]);
    assert!(of(&["name==x", "kind==x"]).is_empty());
    assert_eq!(of(&["name==x", ""]), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn what_breaks_the_syntax_is_refused_with_its_place() {
    for (text, offset, reason) in [
        (" ", 1, Reason::Field),
        ("name==foo,", 10, Reason::Field),
        ("labels.", 7, Reason::Field),
        ("labels.?x", 7, Reason::Field),
        ("labels.ä==x", 7, Reason::Field),
        ("labels . foo", 7, Reason::Operator),
        (",", 0, Reason::Field),
        ("=", 0, Reason::Field),
        ("labels.|foo|==x", 7, Reason::Quote),
        ("name==|foo|", 6, Reason::Quote),
        ("name!=/foo/", 6, Reason::Quote),
        ("labels.ns/key==value", 9, Reason::Operator),
        ("labels.key==/value", 12, Reason::Unterminated),
        ("labels.\"key", 7, Reason::Unterminated),
        ("labels.\"k\ney\"", 7, Reason::Unterminated),
        ("image~=,id", 7, Reason::Value),
        ("name==", 6, Reason::Value),
        ("name==.x", 6, Reason::Value),
        ("name ", 5, Reason::Operator),
        ("name foo", 5, Reason::Operator),
        ("name=foo", 4, Reason::UnknownOperator),
        ("name===foo", 4, Reason::UnknownOperator),
        ("name=~foo", 4, Reason::UnknownOperator),
        ("name==foo ", 9, Reason::Behind),
        ("name==foo bar", 9, Reason::Behind),
        ("name==\"foo\"bar", 11, Reason::Behind),
        ("name==\"\\q\"", 7, Reason::Escape),
        ("name==\"\\400\"", 7, Reason::Escape),
        ("name==\"\\18\"", 7, Reason::Escape),
        ("name==\"\\x4\"", 7, Reason::Escape),
        ("name==\"\\U00110000\"", 7, Reason::Escape),
        ("name==\"\\'\"", 7, Reason::Escape),
        ("name==\"\\", 7, Reason::Escape),
        ("name~=/\\d/", 7, Reason::Escape),
        ("name==a\0b", 7, Reason::Character),
        ("name==\u{fffd}", 6, Reason::Character),
        ("name==\u{1}\u{1}", 7, Reason::Behind),
        ("name~=(", 6, Reason::Pattern(PatternError::Unsupported)),
        ("name~=a**", 6, Reason::Pattern(PatternError::Syntax(3))),
        ("name~=\"\\xff\"", 6, Reason::Pattern(PatternError::Encoding)),
    ] {
        let refused = Filters::parse(&["name", text]).expect_err(text);
        assert_eq!((refused.filter, refused.offset, refused.reason), (1, offset, reason), "{text}");
    }
}

#[test]
fn hostile_filters_meet_limits() {
    let refused = |texts: &[String]| Filters::parse(texts).unwrap_err().reason;
    assert_eq!(refused(&vec![String::new(); MAX_FILTERS + 1]), Reason::TooManyFilters);
    assert!(Filters::parse(&vec![String::new(); MAX_FILTERS]).is_ok());
    assert_eq!(refused(&["a".repeat(MAX_TEXT + 1)]), Reason::TooLong);
    assert!(Filters::parse(&["a".repeat(MAX_TEXT)]).is_ok());
    assert_eq!(refused(&[vec!["name"; MAX_SELECTORS + 1].join(",")]), Reason::TooManySelectors);
    assert!(Filters::parse(&[vec!["name"; MAX_SELECTORS].join(",")]).is_ok());
    assert_eq!(refused(&vec!["name~=a".to_owned(); MAX_PATTERNS + 1]), Reason::TooManyPatterns);
    assert!(Filters::parse(&vec!["name~=a".to_owned(); MAX_PATTERNS]).is_ok());
    // Patterns that explode, that are deep, that are long.
    let pattern = |text: String| match refused(&[format!("name~={text}")]) {
        Reason::Pattern(error) => error,
        other => panic!("{other}"),
    };
    assert_eq!(pattern("((a{1000}){1000}){1000}".to_owned()), PatternError::Unsupported);
    assert_eq!(pattern(r"(\pL{1000}){1000}".to_owned()), PatternError::Unsupported);
    assert_eq!(pattern(format!("{}a{}", "(".repeat(1000), ")".repeat(1000))), PatternError::Unsupported);
    assert_eq!(pattern("a".repeat(5000)), PatternError::TooLong);
    // Time is linear where a backtracking engine takes forever.
    let filters = Filters::parse(&["name~=^(a+)+$"]).unwrap();
    let name = format!("{}b", "a".repeat(100_000));
    let none = BTreeMap::new();
    assert!(!filters.matches(&Candidate { name: &name, parent: "", kind: "active", labels: &none }));
}

/// Results of containerd's `pkg/filters` 2.1.9 and of Go's `regexp` 1.19 (`tests/golden/containerd-filters/main.go`).
const DECIDED: &str = include_str!("../../../tests/golden/containerd-filters/cases.jsonl");

#[derive(serde::Deserialize)]
struct DecidedRow {
    name: String,
    parent: String,
    kind: String,
    labels: BTreeMap<String, String>,
}

#[test]
fn containerd_and_go_decide_the_same() {
    let mut rows: Vec<DecidedRow> = Vec::new();
    let (mut hits, mut errors, mut faults) = (0, 0, Vec::new());
    for line in DECIDED.lines() {
        let mut case: serde_json::Value = serde_json::from_str(line).unwrap();
        if let Some(new) = case.get_mut("rows") {
            rows = serde_json::from_value(new.take()).unwrap();
            continue;
        }
        let theirs = &case["result"];
        let ours = if let Some(texts) = case.get("filter") {
            let texts: Vec<String> = serde_json::from_value(texts.clone()).unwrap();
            match Filters::parse(&texts) {
                Ok(filters) => {
                    let fits = |row: &DecidedRow| {
                        let DecidedRow { name, parent, kind, labels } = row;
                        filters.matches(&Candidate { name, parent, kind, labels })
                    };
                    serde_json::json!((0..rows.len()).filter(|n| fits(&rows[*n])).collect::<Vec<_>>())
                }
                // The one thing that differs: containerd matches nothing then.
                Err(FilterError { reason: Reason::Pattern(_), .. }) => theirs.clone(),
                Err(_) => "error".into(),
            }
        } else {
            let text = |key: &str| case.get(key).and_then(|v| v.as_str()).unwrap_or_default();
            match Pattern::compile(text("regexp").as_bytes()) {
                Ok(pattern) => pattern.finds(text("value").as_bytes()).into(),
                Err(_) => "error".into(),
            }
        };
        hits += usize::from(ours != "error" && ours != false);
        errors += usize::from(ours == "error");
        if ours != *theirs {
            faults.push(format!("{line}: ours is {ours}"));
        }
    }
    assert!(hits > 300 && errors > 100, "{hits} hits, {errors} errors");
    assert!(faults.is_empty(), "{} differ:\n{}", faults.len(), faults.join("\n"));
}
