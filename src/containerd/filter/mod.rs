//! containerd's filter language: which snapshots a List asks for.
//!
//! ```text
//!   ["kind==active,parent==\"sha256:…\"", "labels.\"containerd.io/snapshot.ref\""]
//!      └ selector ┘ └─ AND ─┘                └ OR
//!   texts ─parse─► selectors: field, test ─pattern─► Filters ─matches(candidate)─► bool
//! ```
//!
//! The model is containerd's `pkg/filters` with the snapshot adaptor of `core/snapshots/storage/bolt.go`:
//!
//! | text | matches |
//! |---|---|
//! | no filter at all, or an empty one | every snapshot |
//! | `field` | if the field is present; `name` and `parent` always are, even if they are empty |
//! | `field==value` | if it is present and equal |
//! | `field!=value` | if it is absent or different; but an absent one equals the empty text |
//! | `field~=value` | if Go's regular expression finds something in it; an absent one is the empty text |
//!
//! Fields are `name`, `parent`, `kind` (`active`, `view` or `committed`, in lower case and compared as such) and `labels`
//! with the key behind a dot. A key with characters other than letters, digits, `_` and `.` is quoted as a Go string. Any
//! other field is absent. Parts behind `name`, `parent` and `kind` are ignored.
//!
//! One thing differs: a regular expression that does not compile is an error here, while containerd logs it and matches
//! nothing.
//!
//! Filters come from any client of the socket: lengths and numbers are limited (`MAX_*`), expressions are matched in linear
//! time, and nothing recurses. Called by the service's List; fuzzed by `containerd_filter`.

mod parse;
mod pattern;

pub use parse::{FilterError, Reason};
pub use pattern::PatternError;

use parse::{Field, Selector, Test};
use pattern::Pattern;
use std::collections::BTreeMap;

/// Filters of one request.
pub const MAX_FILTERS: usize = 64;
/// Regular expressions of one request; each can take some milliseconds to compile.
pub const MAX_PATTERNS: usize = 16;

/// What filters look at of a snapshot.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Key or name.
    pub name: &'a str,
    /// Name of the parent; empty if there is none.
    pub parent: &'a str,
    /// `active`, `view` or `committed`.
    pub kind: &'a str,
    /// Labels.
    pub labels: &'a BTreeMap<String, String>,
}

/// The filters of one request.
#[derive(Debug, Default)]
pub struct Filters(Vec<Vec<(Field, Check)>>);

/// A test that is ready to run.
#[derive(Debug)]
enum Check {
    Present,
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    Matches(Pattern),
}

impl Filters {
    /// Parses all filters of a request.
    ///
    /// # Errors
    /// [`FilterError`]: a text breaks the syntax, a limit is exceeded, or a regular expression does not compile.
    pub fn parse<S: AsRef<str>>(texts: &[S]) -> Result<Self, FilterError> {
        if texts.len() > MAX_FILTERS {
            return Err(FilterError { filter: MAX_FILTERS, offset: 0, reason: Reason::TooManyFilters });
        }
        let mut patterns = 0;
        let mut filters = Vec::with_capacity(texts.len());
        for (filter, text) in texts.iter().enumerate() {
            let fault = |(offset, reason)| FilterError { filter, offset, reason };
            let mut checks = Vec::new();
            for Selector { field, test, offset } in parse::selectors(text.as_ref()).map_err(fault)? {
                let check = match test {
                    Test::Present => Check::Present,
                    Test::Equal(value) => Check::Equal(value),
                    Test::NotEqual(value) => Check::NotEqual(value),
                    Test::Matches(text) => {
                        patterns += 1;
                        if patterns > MAX_PATTERNS {
                            return Err(fault((offset, Reason::TooManyPatterns)));
                        }
                        let compiled = Pattern::compile(&text);
                        Check::Matches(compiled.map_err(|e| fault((offset, Reason::Pattern(e))))?)
                    }
                };
                checks.push((field, check));
            }
            filters.push(checks);
        }
        Ok(Self(filters))
    }

    /// Whether one of the filters matches, or there is none.
    pub fn matches(&self, candidate: &Candidate<'_>) -> bool {
        self.0.is_empty()
            || self.0.iter().any(|all| all.iter().all(|(field, check)| check.passes(candidate.value(field))))
    }
}

impl Candidate<'_> {
    /// The value of a field, if it is present.
    fn value(&self, field: &Field) -> Option<&str> {
        match field {
            Field::Name => Some(self.name),
            Field::Parent => Some(self.parent),
            Field::Kind => Some(self.kind),
            Field::Label(key) => {
                std::str::from_utf8(key).ok().and_then(|key| self.labels.get(key)).map(String::as_str)
            }
            Field::Unknown => None,
        }
    }
}

impl Check {
    fn passes(&self, value: Option<&str>) -> bool {
        let bytes = value.unwrap_or_default().as_bytes();
        match self {
            Self::Present => value.is_some(),
            Self::Equal(wanted) => value.is_some() && bytes == wanted,
            Self::NotEqual(unwanted) => bytes != unwanted,
            Self::Matches(pattern) => pattern.finds(bytes),
        }
    }
}

#[cfg(test)]
mod tests;
