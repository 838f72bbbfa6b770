//! Any text as filters of containerd's List, and any text as a quoted value, which then matches itself.
//!
//! ```text
//!   input:  0 │ filter \n filter \n …        1 │ name
//! ```
#![no_main]

use bound::Limit;
use lcow_graphdriver::containerd::filter::{Candidate, Filters};
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeMap;

mod bound;

/// A request has at most 16 regular expressions, each of which is limited to a megabyte when it is compiled.
const LIMIT: Limit = Limit { held: (64 << 20, 4096), asked: (1 << 30, 65536), disk: (0, 0), steps: (0, 0) };

fuzz_target!(|input: &[u8]| {
    LIMIT.hold(input.len(), || one(input));
});

fn one(input: &[u8]) {
    let Some((mode, text)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let labels: BTreeMap<String, String> = [("containerd.io/snapshot.ref".into(), "sha256:ab".into())].into();
    if *mode == 0 {
        let texts: Vec<&str> = text.split('\n').collect();
        match Filters::parse(&texts) {
            Ok(filters) => {
                for (name, kind) in [("default/1/key", "active"), ("", "view"), (&text[..], "committed")] {
                    filters.matches(&Candidate { name, parent: "sha256:ab", kind, labels: &labels });
                }
            }
            Err(error) => {
                let filter = texts.get(error.filter).map_or(0, |filter| filter.len());
                assert!(error.offset <= filter, "{error}");
            }
        }
    } else {
        let mut filter = String::from("name==\"");
        for c in text.chars() {
            match c {
                '"' | '\\' => filter.extend(['\\', c]),
                c if c.is_ascii_graphic() => filter.push(c),
                c => filter.push_str(&format!("\\U{:08x}", u32::from(c))),
            }
        }
        filter.push('"');
        let Ok(filters) = Filters::parse(&[&filter]) else {
            assert!(filter.len() > 32 << 10, "{filter}");
            return;
        };
        let candidate = Candidate { name: &text, parent: "", kind: "active", labels: &labels };
        assert!(filters.matches(&candidate), "{filter}");
        let longer = format!("{text}x");
        assert!(!filters.matches(&Candidate { name: &longer, ..candidate }), "{filter}");
    }
}
